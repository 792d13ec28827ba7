//! Messages to modules and devices over the AMQP head, as an independent client sees them.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod amqp_client;
mod recording;

use std::sync::Arc;
use std::time::Duration;

use amqp_client::{Site, amqp, data, detached, identity, receive};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use edgehub_broker::amqp::{MessageId as OurId, Value as OurValue};
use edgehub_broker::backend::{Command, Deliveries, Feature, Outcome, Settler, Target};
use edgehub_broker::head::amqp::AmqpLimits;
use edgehub_broker::message::{
    Message, Origin, Properties, PropertyName, Sender, SenderCache, SystemProperty,
};
use fe2o3_amqp::Receiver;
use fe2o3_amqp::link::delivery::Delivery;
use fe2o3_amqp::types::definitions::{Error as PeerError, ErrorCondition};
use fe2o3_amqp::types::messaging::annotations::OwnedKey;
use fe2o3_amqp::types::messaging::{
    ApplicationProperties, Body, Message as PeerMessage, MessageId, Modified,
};
use fe2o3_amqp::types::primitives::{Binary, SimpleValue, Value};
use recording::{DEADLINE, until};
use serde_json::Value as Json;
use tokio::time::{Instant, timeout};

const INPUTS: &str = "/devices/d1/modules/m1/messages/events";
const C2D: &str = "/devices/d1/messages/deviceBound";

fn input() -> Target {
    Target::Input("in1".into())
}

fn message(body: &str) -> Message {
    let sender = Sender { identity: identity("d1/m9"), origin: Origin::Internal, model_id: None };
    Message::new(Arc::new(sender), Properties::empty(), Bytes::copy_from_slice(body.as_bytes()))
}

/// Hands messages over; the tags are their numbers.
async fn deliver(site: &Site, of: &str, target: Target, settler: &Settler, numbers: std::ops::Range<u64>) {
    let messages = numbers.map(|number| (number, message(&number.to_string()))).collect();
    let deliveries = Deliveries { target, messages, settler: settler.clone() };
    site.recording.command(of, Command::Deliver(deliveries)).await;
}

async fn outcomes(settler: &Settler, count: usize) -> Vec<(u64, Outcome)> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(timeout(DEADLINE, settler.settled()).await.expect("in time"));
    }
    all
}

async fn receive_numbers(
    receiver: &mut Receiver,
    numbers: std::ops::Range<u64>,
) -> Vec<Delivery<Body<Value>>> {
    let mut received = Vec::new();
    for number in numbers {
        let delivery = receive(receiver).await;
        assert_eq!(data(&delivery), number.to_string().into_bytes());
        received.push(delivery);
    }
    received
}

/// The client's outcome, what the hub is told, and that the client's wait for the answer ends.
#[tokio::test]
async fn every_outcome_is_passed_on_and_answered() {
    for (of, address, target) in [("d1/m1", INPUTS, input()), ("d1", C2D, Target::Device)] {
        let mut site = Site::of(of).await;
        let mut down = site.receiver("down", address).await;
        let settler = Settler::new();
        deliver(&site, of, target, &settler, 0..6).await;
        let received = receive_numbers(&mut down, 0..6).await;
        let refused = PeerError::new(ErrorCondition::Custom("x:y".into()), None, None);
        let modified = |undeliverable| Modified {
            delivery_failed: Some(true),
            undeliverable_here: undeliverable,
            message_annotations: None,
        };
        down.accept(&received[0]).await.unwrap();
        down.reject(&received[1], refused).await.unwrap();
        down.release(&received[2]).await.unwrap();
        down.modify(&received[3], modified(None)).await.unwrap();
        down.modify(&received[4], modified(Some(true))).await.unwrap();
        down.accept(&received[5]).await.unwrap();
        let expected = [
            (0, Outcome::Accepted),
            (1, Outcome::Rejected),
            (2, Outcome::Released),
            (3, Outcome::Released),
            (4, Outcome::Rejected),
            (5, Outcome::Accepted),
        ];
        assert_eq!(outcomes(&settler, 6).await, expected, "{of}");
    }
}

#[tokio::test]
async fn messages_wait_for_credit_in_order() {
    let mut site = Site::of("d1/m1").await;
    let mut down = site.dry_receiver("down", INPUTS).await;
    let settler = Settler::new();
    deliver(&site, "d1/m1", input(), &settler, 0..5).await;
    deliver(&site, "d1/m1", input(), &settler, 5..8).await;
    down.set_credit(2).await.unwrap();
    let first = receive_numbers(&mut down, 0..2).await;
    assert!(settler.take().is_empty(), "what waits is not given back");
    down.set_credit(6).await.unwrap();
    let rest = receive_numbers(&mut down, 2..8).await;
    // All came after they had waited; the time for their answers counts from when they were sent.
    let late: Vec<u64> = settler.take_sent().into_iter().map(|(tag, _)| tag).collect();
    assert_eq!(late, Vec::from_iter(0..8));
    for delivery in first.iter().chain(&rest) {
        down.accept(delivery).await.unwrap();
    }
    let accepted: Vec<_> = (0..8).map(|tag| (tag, Outcome::Accepted)).collect();
    assert_eq!(outcomes(&settler, 8).await, accepted);
    // With credit there is no such report.
    down.set_credit(1).await.unwrap();
    site.cbs.put_good("d1/m1").await;
    deliver(&site, "d1/m1", input(), &settler, 8..9).await;
    receive_numbers(&mut down, 8..9).await;
    assert!(settler.take_sent().is_empty());
}

#[tokio::test]
async fn what_a_pump_gave_up_is_not_sent_any_more() {
    let mut site = Site::of("d1/m1").await;
    let mut down = site.dry_receiver("down", INPUTS).await;
    let (old, new) = (Settler::new(), Settler::new());
    deliver(&site, "d1/m1", input(), &old, 0..3).await;
    down.set_credit(1).await.unwrap();
    let sent = receive_numbers(&mut down, 0..1).await;
    old.abandon();
    // The same messages, made anew.
    deliver(&site, "d1/m1", input(), &new, 0..3).await;
    down.set_credit(3).await.unwrap();
    let again = receive_numbers(&mut down, 0..3).await;
    // A late answer to the abandoned one is nobody's.
    down.accept(&sent[0]).await.unwrap();
    for delivery in &again {
        down.accept(delivery).await.unwrap();
    }
    assert_eq!(outcomes(&new, 3).await.len(), 3);
    assert!(old.take().is_empty());
}

#[tokio::test]
async fn what_expires_while_it_waits_for_credit_is_not_sent() {
    for (of, address, target) in [("d1/m1", INPUTS, input()), ("d1", C2D, Target::Device)] {
        let mut site = Site::of(of).await;
        let mut down = site.dry_receiver("down", address).await;
        let settler = Settler::new();
        let messages = (0..3).map(|tag: u64| {
            let mut message = message(&tag.to_string());
            // The one in the middle is over when there is credit.
            let left = if tag == 1 { Duration::ZERO } else { Duration::from_secs(3_600) };
            message.expires_at = Some(Instant::now() + left);
            (tag, message)
        });
        let deliveries = Deliveries { target, messages: messages.collect(), settler: settler.clone() };
        site.recording.command(of, Command::Deliver(deliveries)).await;
        down.set_credit(2).await.unwrap();
        let received = [receive(&mut down).await, receive(&mut down).await];
        assert_eq!(received.each_ref().map(data), [b"0", b"2"], "{of}");
        assert_eq!(outcomes(&settler, 1).await, [(1, Outcome::Expired)]);
        for delivery in &received {
            down.accept(delivery).await.unwrap();
        }
        assert_eq!(outcomes(&settler, 2).await, [(0, Outcome::Accepted), (2, Outcome::Accepted)]);
    }
}

#[tokio::test]
async fn what_waits_is_bounded_by_bytes_and_nothing_overtakes_what_went_back() {
    let mut site = Site::of("d1/m1").await;
    let mut down = site.dry_receiver("down", INPUTS).await;
    let settler = Settler::new();
    let waiting_max = (AmqpLimits::default().deliveries_waiting_bytes_max / 260_000) as u64;
    let large = "x".repeat(259_000);
    let messages =
        (0..waiting_max + 10).map(|tag| (tag, message(if tag < waiting_max + 9 { &large } else { "" })));
    let deliveries = Deliveries { target: input(), messages: messages.collect(), settler: settler.clone() };
    site.recording.command("d1/m1", Command::Deliver(deliveries)).await;
    let back = timeout(DEADLINE, settler.settled()).await.expect("in time");
    let first = back[0].0;
    assert!((waiting_max..waiting_max + 2).contains(&first), "{first} of {waiting_max}");
    assert_eq!(back, Vec::from_iter((first..waiting_max + 10).map(|tag| (tag, Outcome::NotOffered))));
    deliver(&site, "d1/m1", input(), &settler, 100..101).await;
    assert_eq!(outcomes(&settler, 1).await, [(100, Outcome::NotOffered)]);
    down.set_credit(first as u32).await.unwrap();
    for _ in 0..first {
        let received = receive(&mut down).await;
        assert_eq!(data(&received).len(), large.len());
        down.accept(&received).await.unwrap();
    }
    assert_eq!(outcomes(&settler, first as usize).await.len(), first as usize);
    deliver(&site, "d1/m1", input(), &settler, 100..101).await;
    down.set_credit(1).await.unwrap();
    receive_numbers(&mut down, 100..101).await;
}

#[tokio::test]
async fn without_a_link_messages_go_back_as_not_offered() {
    let mut site = Site::of("d1/m1").await;
    let mut telemetry = site.sender("up", INPUTS).await;
    let settler = Settler::new();
    deliver(&site, "d1/m1", input(), &settler, 0..2).await;
    let not_offered =
        |tags: std::ops::Range<u64>| tags.map(|tag| (tag, Outcome::NotOffered)).collect::<Vec<_>>();
    assert_eq!(outcomes(&settler, 2).await, not_offered(0..2));

    let mut down = site.dry_receiver("down", INPUTS).await;
    deliver(&site, "d1/m1", input(), &settler, 2..5).await;
    down.set_credit(1).await.unwrap();
    receive_numbers(&mut down, 2..3).await;
    down.close().await.expect("closed");
    assert_eq!(outcomes(&settler, 3).await, not_offered(2..5), "with a client that has some of them");
    let features = site.recording.state.lock().features.clone();
    let module = identity("d1/m1");
    let expected = [(module.clone(), Feature::ModuleInputs, true), (module, Feature::ModuleInputs, false)];
    assert_eq!(features, expected);

    // A second link of the function takes the place of the first.
    let mut first = site.receiver("first", INPUTS).await;
    deliver(&site, "d1/m1", input(), &settler, 5..6).await;
    receive_numbers(&mut first, 5..6).await;
    let mut second = site.receiver("second", INPUTS).await;
    detached(&mut first).await;
    assert_eq!(outcomes(&settler, 1).await, not_offered(5..6));
    deliver(&site, "d1/m1", input(), &settler, 6..7).await;
    receive_numbers(&mut second, 6..7).await;
    site.session.end().await.expect("ended");
    assert_eq!(outcomes(&settler, 1).await, not_offered(6..7));
    let _ = telemetry.on_detach().await;
    until("logged out", || site.recording.state.lock().gone == [identity("d1/m1")]).await;
}

#[tokio::test]
async fn a_module_has_no_messages_of_the_cloud_and_links_have_their_features() {
    let mut site = Site::of("d1/m1").await;
    let _c2d = site.receiver("c2d", "/devices/d1/modules/m1/messages/devicebound").await;
    assert!(site.recording.state.lock().features.is_empty());
    let mut site = Site::of("d1").await;
    let c2d = site.receiver("c2d", C2D).await;
    let device = identity("d1");
    assert_eq!(site.recording.state.lock().features, [(device.clone(), Feature::CloudToDevice, true)]);
    let _up = site.sender("up", "/devices/d1/messages/events").await;
    c2d.close().await.expect("closed");
    until("off", || {
        site.recording.state.lock().features.last() == Some(&(device.clone(), Feature::CloudToDevice, false))
    })
    .await;
}

#[tokio::test]
async fn what_a_client_cannot_take_at_all_is_told() {
    let mut site = Site::of("d1/m1").await;
    let builder = Receiver::builder().name("down").source(INPUTS).max_message_size(65_536u64);
    let mut down = timeout(DEADLINE, builder.attach(&mut site.session)).await.unwrap().expect("attached");
    let settler = Settler::new();
    let messages = vec![(1, message(&"x".repeat(65_536))), (2, message("2"))];
    let deliveries = Deliveries { target: input(), messages, settler: settler.clone() };
    site.recording.command("d1/m1", Command::Deliver(deliveries)).await;
    receive_numbers(&mut down, 2..3).await;
    assert_eq!(outcomes(&settler, 1).await, [(1, Outcome::NotConvertible)]);
}

/// The value of a vector in the types of the peer.
fn peer(json: &Json) -> Value {
    match amqp(json) {
        OurValue::String(text) => Value::String(text.as_str().into()),
        OurValue::Symbol(text) => Value::Symbol(text.as_str().into()),
        OurValue::Ubyte(number) => Value::Ubyte(number),
        OurValue::Ulong(number) => Value::Ulong(number),
        OurValue::TimestampMillis(millis) => Value::Timestamp(millis.into()),
        OurValue::Binary(bytes) => Value::Binary(bytes.to_vec().into()),
        other => panic!("{other:?}"),
    }
}

/// The message of a vector, and what it is for: with a sender it goes to an input, else to a device.
fn of_vector(input: &Json) -> (Message, Target) {
    let system = input["system"].as_object().unwrap();
    let text = |name: &str| system.get(name).map(|text| text.as_str().unwrap());
    let (sender, target) = match text("connectionDeviceId") {
        None => (identity("d1"), Target::Device),
        Some(device) => {
            let sender = match text("connectionModuleId") {
                None => identity(device),
                Some(module) => identity(&format!("{device}/{module}")),
            };
            (sender, Target::Input(text("inputName").unwrap_or("unnamed").into()))
        }
    };
    let named = SystemProperty::ALL
        .iter()
        .filter_map(|property| text(property.name()).map(|text| (PropertyName::System(*property), text)));
    let user = input["properties"].as_object().unwrap();
    let user = user.iter().map(|(name, text)| (PropertyName::Application(name), text.as_str().unwrap()));
    let properties = Properties::copied_from(named.chain(user));
    let model_id = text("modelId").map(Into::into);
    let sender = Sender { identity: sender, origin: Origin::Internal, model_id };
    let body = STANDARD.decode(input["body"].as_str().unwrap()).unwrap();
    (Message::new(Arc::new(sender), properties, body.into()), target)
}

#[tokio::test]
async fn messages_become_what_the_vectors_say() {
    let file: Json = serde_json::from_str(include_str!("vectors/amqp_messages_out.json")).unwrap();
    let mut module = Site::of("d1/m1").await;
    let mut device = Site::of("d1").await;
    let mut of_module = module.receiver("down", INPUTS).await;
    let mut of_device = device.receiver("down", C2D).await;
    let settler = Settler::new();
    for vector in file["vectors"].as_array().unwrap() {
        let (id, expected) = (&vector["id"], &vector["out"]);
        let (message, target) = of_vector(&vector["in"]);
        let named = vector["in"]["system"]["inputName"].is_string();
        let (site, of, down) = match target {
            Target::Input(_) => (&module, "d1/m1", &mut of_module),
            Target::Device => (&device, "d1", &mut of_device),
        };
        let deliveries = Deliveries { target, messages: vec![(0, message)], settler: settler.clone() };
        site.recording.command(of, Command::Deliver(deliveries)).await;
        let received = receive(down).await;
        down.accept(&received).await.unwrap();
        let sections: Vec<Vec<u8>> = match &received.message().body {
            Body::Data(batch) => batch.iter().map(|data| data.0.to_vec()).collect(),
            other => panic!("{other:?}"),
        };
        let data = expected["data"].as_array().unwrap();
        let data: Vec<Vec<u8>> =
            data.iter().map(|data| STANDARD.decode(data.as_str().unwrap()).unwrap()).collect();
        assert_eq!(sections, data, "{id}");
        let tag = received.delivery_tag();
        match expected["deliveryTag"]["hex"].as_str() {
            Some(hex) => {
                assert_eq!(tag.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), hex, "{id}");
            }
            None => assert_eq!(tag.len(), 16, "{id}"),
        }
        let message = received.message();
        let found = message.message_annotations.clone().unwrap_or_default();
        let mut found: Vec<_> = found.0.into_iter().collect();
        // Every input has a name, which some vectors leave out.
        let name = OwnedKey::from("x-opt-input-name");
        found.retain(|(key, _)| named || *key != name);
        let wanted = expected["annotations"].as_object().unwrap();
        assert_eq!(found.len(), wanted.len(), "{id}: {found:?}");
        for (key, value) in wanted {
            assert!(found.contains(&(OwnedKey::from(key.as_str()), peer(value))), "{id}: {key} in {found:?}");
        }
        let found = message.application_properties.clone().unwrap_or_default();
        let wanted = expected["application"].as_object().unwrap();
        assert_eq!(found.0.len(), wanted.len(), "{id}: {found:?}");
        for (key, value) in wanted {
            let value = SimpleValue::String(value["value"].as_str().unwrap().into());
            assert_eq!(found.0.get(key), Some(&value), "{id} {key}");
        }
        let found = message.properties.clone().unwrap_or_default();
        let text_id = |name: &str| {
            expected["properties"][name]["value"].as_str().map(|text| MessageId::String(text.into()))
        };
        let wanted = fe2o3_amqp::types::messaging::Properties {
            message_id: text_id("message-id"),
            correlation_id: text_id("correlation-id"),
            to: expected["properties"]["to"]["value"].as_str().map(Into::into),
            user_id: expected["properties"].get("user-id").map(|user| match peer(user) {
                Value::Binary(user) => user,
                other => panic!("{other:?}"),
            }),
            content_type: expected["properties"]["content-type"]["value"].as_str().map(Into::into),
            content_encoding: expected["properties"]["content-encoding"]["value"].as_str().map(Into::into),
            absolute_expiry_time: expected["properties"]["absolute-expiry-time"]["value"]
                .as_i64()
                .map(Into::into),
            ..Default::default()
        };
        assert_eq!(found, wanted, "{id}");
    }
}

/// What a client sends over AMQP comes out of the store as it was sent.
#[tokio::test]
async fn properties_keep_their_type_from_client_to_client() {
    let mut site = Site::of("d1/m1").await;
    let values = [
        ("text", SimpleValue::String("5".into())),
        ("int", SimpleValue::Int(-5)),
        ("double", SimpleValue::Double(2.5.into())),
        ("bool", SimpleValue::Bool(true)),
        ("time", SimpleValue::Timestamp(1_577_836_800_123.into())),
        ("symbol", SimpleValue::Symbol("s".into())),
        ("binary", SimpleValue::Binary(vec![0, 255].into())),
        ("null", SimpleValue::Null),
    ];
    let mut up = site.sender("up", INPUTS).await;
    let mut application = ApplicationProperties::builder();
    for (name, value) in &values {
        application = application.insert(*name, value.clone());
    }
    let sent = PeerMessage::builder()
        .application_properties(application.build())
        .data(Binary::from(Vec::new()))
        .build();
    timeout(DEADLINE, up.send(sent)).await.expect("in time").expect("answered");
    let published = site.recording.state.lock().published.remove(0);
    let stored = Message::from_record(&published.to_record(), &mut SenderCache::default()).unwrap();
    let texts: Vec<_> = stored.properties.application_properties().map(|(_, text)| text).collect();
    assert_eq!(texts, ["5", "-5", "2.5", "true", "2020-01-01T00:00:00.1230000Z", "s", "AP8=", ""]);
    let mut down = site.receiver("down", INPUTS).await;
    let messages = vec![(0, stored)];
    let deliveries = Deliveries { target: input(), messages, settler: Settler::new() };
    site.recording.command("d1/m1", Command::Deliver(deliveries)).await;
    let received = receive(&mut down).await;
    let application = received.message().application_properties.clone().unwrap();
    assert_eq!(application.0.len(), values.len());
    for (name, value) in values {
        assert_eq!(application.0.get(name), Some(&value), "{name}");
    }
}

#[tokio::test]
async fn two_messages_with_the_same_lock_token_have_different_tags() {
    let mut site = Site::of("d1").await;
    let mut down = site.receiver("down", C2D).await;
    let token = "00112233-4455-6677-8899-aabbccddeeff";
    let properties = || Properties::copied_from([(PropertyName::System(SystemProperty::LockToken), token)]);
    let sender = Arc::new(Sender { identity: identity("d1"), origin: Origin::Downstream, model_id: None });
    let one = || Message::new(sender.clone(), properties(), Bytes::new());
    let settler = Settler::new();
    let messages = vec![(0, one()), (1, one())];
    let deliveries = Deliveries { target: Target::Device, messages, settler: settler.clone() };
    site.recording.command("d1", Command::Deliver(deliveries)).await;
    let (first, second) = (receive(&mut down).await, receive(&mut down).await);
    assert_ne!(first.delivery_tag(), second.delivery_tag());
    assert_eq!(second.delivery_tag().len(), 16);
    down.accept(&second).await.unwrap();
    down.accept(&first).await.unwrap();
    assert_eq!(outcomes(&settler, 2).await, [(1, Outcome::Accepted), (0, Outcome::Accepted)]);
    assert!(matches!(OurId::uuid_or_string(token), OurId::Uuid(_)));
}
