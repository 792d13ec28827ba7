//! Cloud-to-device messages over an in-memory pipe.

use std::sync::Arc;

use bytes::Bytes;
use edgehub_broker::backend::{Command, Deliveries, Feature, Outcome, Settler, Target};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, PropertyName, Sender, SystemProperty};

use crate::connection::puback;
use crate::mock::{Mock, connect, subscribe};

const DEVICE_BOUND: &str = "devices/d1/messages/devicebound/#";

fn message(properties: &[(PropertyName<'_>, &str)]) -> Message {
    let identity = Identity::device("d1").unwrap();
    let sender = Arc::new(Sender { identity, origin: Origin::Internal, model_id: None });
    Message::new(sender, Properties::copied_from(properties.iter().copied()), Bytes::from_static(b"body"))
}

fn to_device(tag: u64, message: Message) -> (Command, Settler) {
    let settler = Settler::new();
    let messages = vec![(tag, message)];
    (Command::Deliver(Deliveries { target: Target::Device, messages, settler: settler.clone() }), settler)
}

#[tokio::test]
async fn a_message_is_accepted_by_its_acknowledgement() {
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    wire.send(&subscribe(1, &[(DEVICE_BOUND, 1)])).await;
    wire.packet().await.unwrap();
    assert_eq!(mock.state.lock().features, [(Feature::CloudToDevice, true)]);
    let (command, settler) = to_device(
        5,
        message(&[
            (PropertyName::Application("p 1"), "ü"),
            (PropertyName::System(SystemProperty::MessageId), "7"),
            (PropertyName::System(SystemProperty::To), "/devices/d1/messages/deviceBound"),
        ]),
    );
    mock.command("d1", command).await;
    let (first, body) = wire.packet().await.unwrap();
    let topic = "devices/d1/messages/devicebound/%24.mid=7&\
                 %24.to=%2Fdevices%2Fd1%2Fmessages%2FdeviceBound&p%201=%C3%BC";
    assert_eq!((first, &body[2..2 + topic.len()]), (0x32, topic.as_bytes()));
    assert_eq!(body[2 + topic.len()..], *b"\0\x01body");
    assert!(settler.take().is_empty());
    wire.send(&puback(1)).await;
    assert_eq!(settler.settled().await, [(5, Outcome::Accepted)]);
}

#[tokio::test]
async fn the_property_bag_is_never_empty() {
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    wire.send(&subscribe(1, &[(DEVICE_BOUND, 0)])).await;
    wire.packet().await.unwrap();
    let to = "%24.to=%2Fdevices%2Fd1%2Fmessages%2Fdevicebound";
    for (properties, bag) in [
        (vec![], to.to_owned()),
        (vec![(PropertyName::Application("a"), "1")], format!("{to}&a=1")),
        (vec![(PropertyName::System(SystemProperty::MessageId), "m")], "%24.mid=m".to_owned()),
    ] {
        let (command, settler) = to_device(1, message(&properties));
        mock.command("d1", command).await;
        let (first, body) = wire.packet().await.unwrap();
        let topic = format!("devices/d1/messages/devicebound/{bag}");
        assert_eq!((first, &body[2..]), (0x30, [topic.as_bytes(), b"body"].concat().as_slice()));
        // At QoS 0 it is settled once the socket has it.
        assert_eq!(settler.settled().await, [(1, Outcome::Accepted)]);
    }
}

#[tokio::test]
async fn who_does_not_take_messages_is_offered_none() {
    for (client, filter) in [
        ("d1", "devices/d2/messages/devicebound/#"),
        ("d1", "$iothub/twin/res/#"),
        // A module has no cloud-to-device messages, though its filter matches their topic.
        ("d1/m", "#"),
    ] {
        let mock = Mock::default();
        let mut wire = mock.connected(client).await;
        wire.send(&subscribe(1, &[(filter, 1)])).await;
        wire.packet().await.unwrap();
        let (command, settler) = to_device(3, message(&[]));
        mock.command(client, command).await;
        assert_eq!(settler.settled().await, [(3, Outcome::NotOffered)], "{client} {filter}");
        assert!(!mock.state.lock().features.contains(&(Feature::CloudToDevice, true)));
    }
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    wire.send(&subscribe(1, &[("#", 1)])).await;
    wire.packet().await.unwrap();
    let settler = Settler::new();
    let target = Target::Input("in1".into());
    let deliveries = Deliveries { target, messages: vec![(1, message(&[]))], settler: settler.clone() };
    mock.command("d1", Command::Deliver(deliveries)).await;
    assert_eq!(settler.settled().await, [(1, Outcome::NotOffered)]);
}

#[tokio::test]
async fn a_message_may_ask_for_no_acknowledgement() {
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    wire.send(&subscribe(1, &[(DEVICE_BOUND, 1)])).await;
    wire.packet().await.unwrap();
    let (command, settler) = to_device(1, message(&[(PropertyName::Application("mqtt-qos"), "0")]));
    mock.command("d1", command).await;
    assert_eq!(wire.packet().await.unwrap().0, 0x30);
    assert_eq!(settler.settled().await, [(1, Outcome::Accepted)]);
}

#[tokio::test]
async fn what_was_not_acknowledged_comes_again_and_only_on_the_same_connection_as_a_duplicate() {
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    wire.send(&subscribe(1, &[(DEVICE_BOUND, 1)])).await;
    wire.packet().await.unwrap();
    let again = message(&[]);
    for (tag, first_byte) in [(1, 0x32), (2, 0x3a)] {
        let (command, settler) = to_device(tag, again.clone());
        mock.command("d1", command).await;
        assert_eq!(wire.packet().await.unwrap().0, first_byte);
        assert!(settler.take().is_empty());
    }
    drop(wire);
    // The subscription is that of the stored session.
    let mut wire = mock.open();
    wire.send(&connect("d1", false, 60)).await;
    wire.expect(&[0x20, 2, 1, 0]).await;
    mock.until(|state| state.features.len() == 2).await;
    let (command, settler) = to_device(3, again);
    mock.command("d1", command).await;
    assert_eq!(wire.packet().await.unwrap().0, 0x32);
    wire.send(&puback(1)).await;
    assert_eq!(settler.settled().await, [(3, Outcome::Accepted)]);
}
