//! Clients that read slowly: what may wait for them, and for how long.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{Command, Deliveries, Outcome, Settler, Target};
use edgehub_broker::head::mqtt::MqttLimits;
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, Sender};
use tokio::time::{Instant, timeout};

use crate::connection::puback;
use crate::mock::{Mock, Wire, connect, subscribe};

const MODULE: (&str, &str) = ("e/m", "devices/e/modules/m/inputs/#");
const DEVICE: (&str, &str) = ("e", "devices/e/messages/devicebound/#");

/// More than the output of a connection takes before messages wait.
const LARGE_BYTES: usize = 1_200_000;

const DEADLINE: Duration = Duration::from_secs(60);

fn message(body: Vec<u8>) -> Message {
    let identity = Identity::device("leaf").unwrap();
    let sender = Sender { identity, origin: Origin::Downstream, model_id: None };
    Message::new(Arc::new(sender), Properties::empty(), Bytes::from(body))
}

fn target(client: (&str, &str)) -> Target {
    if client == MODULE { Target::Input("in1".into()) } else { Target::Device }
}

/// A connection whose socket takes little, with a subscription.
async fn connected(mock: &Mock, client: (&str, &str), qos: u8, limits: MqttLimits) -> Wire {
    let mut wire = mock.open_with(1_024, Vec::new(), limits);
    wire.send(&connect(client.0, false, 60)).await;
    wire.expect(&[0x20, 2, 0, 0]).await;
    wire.send(&subscribe(1, &[(client.1, qos)])).await;
    wire.packet().await.unwrap();
    wire
}

async fn deliver(mock: &Mock, client: (&str, &str), settler: &Settler, messages: Vec<(u64, Message)>) {
    let deliveries = Deliveries { target: target(client), messages, settler: settler.clone() };
    mock.command(client.0, Command::Deliver(deliveries)).await;
}

/// The last byte of the next message.
async fn last_byte(wire: &mut Wire) -> u8 {
    *wire.packet().await.unwrap().1.last().unwrap()
}

async fn outcomes(settler: &Settler, count: usize) -> Vec<(u64, Outcome)> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(timeout(DEADLINE, settler.settled()).await.expect("an outcome in time"));
    }
    all
}

#[tokio::test]
async fn what_waits_is_bounded_by_bytes_and_nothing_overtakes_what_went_back() {
    let mock = Mock::default();
    let limits = MqttLimits { deliveries_waiting_bytes_max: 250_000, ..MqttLimits::default() };
    let mut wire = connected(&mock, MODULE, 0, limits).await;
    let settler = Settler::new();
    // 0 fills the output; 1 and 2 wait; 3 has no room, and 4, though small, is behind it.
    let large = |number: u8, bytes: usize| (u64::from(number), message(vec![number; bytes]));
    let messages =
        vec![large(0, LARGE_BYTES), large(1, 100_000), large(2, 100_000), large(3, 100_000), large(4, 10)];
    deliver(&mock, MODULE, &settler, messages).await;
    assert_eq!(outcomes(&settler, 2).await, [(3, Outcome::NotOffered), (4, Outcome::NotOffered)]);
    deliver(&mock, MODULE, &settler, vec![large(5, 10)]).await;
    assert_eq!(outcomes(&settler, 1).await, [(5, Outcome::NotOffered)], "nor does a later command");
    for number in 0..3 {
        assert_eq!(last_byte(&mut wire).await, number);
    }
    assert_eq!(outcomes(&settler, 3).await, [0, 1, 2].map(|tag| (tag, Outcome::Accepted)));
    // Nothing waits any more: what went back is taken.
    deliver(&mock, MODULE, &settler, vec![large(3, 100_000), large(4, 10)]).await;
    for number in 3..5 {
        assert_eq!(last_byte(&mut wire).await, number);
    }
    assert_eq!(outcomes(&settler, 2).await, [(3, Outcome::Accepted), (4, Outcome::Accepted)]);
}

#[tokio::test]
async fn one_message_may_wait_whatever_its_size() {
    let mock = Mock::default();
    let limits = MqttLimits { deliveries_waiting_bytes_max: 1, ..MqttLimits::default() };
    let mut wire = connected(&mock, MODULE, 0, limits).await;
    let settler = Settler::new();
    let messages = [LARGE_BYTES, 1_000, 1_000].into_iter().zip(0u8..);
    let messages = messages.map(|(bytes, number)| (u64::from(number), message(vec![number; bytes])));
    deliver(&mock, MODULE, &settler, messages.collect()).await;
    assert_eq!(outcomes(&settler, 1).await, [(2, Outcome::NotOffered)]);
    assert_eq!((last_byte(&mut wire).await, last_byte(&mut wire).await), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn what_expires_behind_a_slow_socket_is_not_sent() {
    for (client, qos) in [(MODULE, 0), (MODULE, 1), (DEVICE, 0), (DEVICE, 1)] {
        let mock = Mock::default();
        let mut wire = connected(&mock, client, qos, MqttLimits::default()).await;
        let settler = Settler::new();
        let message = |number: u8, bytes: usize, secs: u64| {
            let mut message = message(vec![number; bytes]);
            message.expires_at = Some(Instant::now() + Duration::from_secs(secs));
            (u64::from(number), message)
        };
        let messages = vec![
            message(0, LARGE_BYTES, 5),
            message(1, 10, 5),
            message(2, 10, 3_600),
            // Over before it reached the head.
            message(3, 10, 0),
        ];
        deliver(&mock, client, &settler, messages).await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(settler.take(), []);
        // What is in the output when its time ends is sent.
        for number in [0, 2] {
            assert_eq!(last_byte(&mut wire).await, number, "{client:?} {qos}");
        }
        if qos == 1 {
            wire.send(&[puback(1), puback(2)].concat()).await;
        }
        let mut settled = outcomes(&settler, 4).await;
        settled.sort_unstable_by_key(|(tag, _)| *tag);
        let expected = [Outcome::Accepted, Outcome::Expired, Outcome::Accepted, Outcome::Expired];
        assert_eq!(settled, Vec::from_iter((0..).zip(expected)), "{client:?} {qos}");
    }
}

#[tokio::test]
async fn what_a_pump_gave_up_is_not_sent_and_what_waited_has_its_time_from_when_it_was() {
    let mock = Mock::default();
    let mut wire = connected(&mock, MODULE, 1, MqttLimits::default()).await;
    let (old, new) = (Settler::new(), Settler::new());
    let messages = |bytes: [usize; 2], first: u8| {
        let messages = bytes.into_iter().zip(first..);
        messages.map(|(bytes, number)| (u64::from(number), message(vec![number; bytes]))).collect()
    };
    deliver(&mock, MODULE, &old, messages([LARGE_BYTES, 10], 0)).await;
    // Once this has gone back, the head has taken what came before.
    let unwanted = Settler::new();
    let stray =
        Deliveries { target: Target::Device, messages: messages([1, 1], 0), settler: unwanted.clone() };
    mock.command(MODULE.0, Command::Deliver(stray)).await;
    old.abandon();
    deliver(&mock, MODULE, &new, messages([10, 10], 1)).await;
    for number in [0, 1, 2] {
        assert_eq!(last_byte(&mut wire).await, number);
    }
    wire.send(&[puback(1), puback(2), puback(3)].concat()).await;
    assert_eq!(new.take_sent().into_iter().map(|(tag, _)| tag).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(outcomes(&new, 2).await, [(1, Outcome::Accepted), (2, Outcome::Accepted)]);
    assert_eq!(outcomes(&unwanted, 2).await.len(), 2);
    assert_eq!(old.take(), [(0, Outcome::Accepted)]);
}
