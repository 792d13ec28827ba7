//! Whole connections over an in-memory pipe.

use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{
    CloseReason, Command, Deliveries, Feature, HeadDrop, LoginError, Outcome, PublishError, Settler, Target,
};
use edgehub_broker::head::mqtt::{ConnectionEnd, MqttLimits, ProtocolError};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, Sender, Value};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;

use crate::mock::{Mock, connect, connect_with, packet, publish, subscribe};

const EVENTS: &str = "devices/d1/messages/events/";
const INPUTS: &str = "devices/e/modules/m/inputs/#";
const PING: [u8; 2] = [0xc0, 0];
const PONG: [u8; 2] = [0xd0, 0];

pub(crate) fn puback(packet_id: u16) -> Vec<u8> {
    packet(0x40, &packet_id.to_be_bytes())
}

fn deliveries(tags: std::ops::Range<u64>, body: &[u8]) -> (Deliveries, Settler) {
    let identity = Identity::device("leaf").unwrap();
    let sender = std::sync::Arc::new(Sender { identity, origin: Origin::Downstream, model_id: None });
    let settler = Settler::new();
    let message = |_| Message::new(sender.clone(), Properties::empty(), Bytes::copy_from_slice(body));
    let messages = tags.map(|tag| (tag, message(tag))).collect();
    (Deliveries { target: Target::Input("in1".into()), messages, settler: settler.clone() }, settler)
}

#[tokio::test]
async fn connect_arrives_byte_by_byte() {
    let mock = Mock::default();
    let mut wire = mock.open();
    for byte in connect("d1", false, 60) {
        wire.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    wire.expect(&[0x20, 2, 0, 0]).await;
    for byte in publish(EVENTS, 3, b"x") {
        wire.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    wire.expect(&puback(3)).await;
}

#[tokio::test]
async fn what_comes_before_connack_is_handled_after_it() {
    let mock = Mock::default();
    let (release, held) = oneshot::channel();
    mock.state.lock().hold_login = Some(held);
    let mut wire = mock.open();
    let all =
        [connect("d1", false, 60), subscribe(1, &[("$iothub/twin/res/#", 2)]), publish(EVENTS, 2, b"x")];
    wire.send(&all.concat()).await;
    mock.until(|state| state.hold_login.is_none()).await;
    release.send(()).unwrap();
    wire.expect(&[0x20, 2, 0, 0]).await;
    let (mut one, mut two) = (wire.packet().await.unwrap(), wire.packet().await.unwrap());
    if one.0 == 0x40 {
        std::mem::swap(&mut one, &mut two);
    }
    assert_eq!((one, two), ((0x90, vec![0, 1, 1]), (0x40, vec![0, 2])));
    assert_eq!(mock.state.lock().features, [(Feature::TwinResponses, true)]);
}

#[tokio::test]
async fn publishes_of_one_read_are_one_batch_and_acknowledged_in_order() {
    let mock = Mock::default();
    mock.state.lock().hold_commits = true;
    let mut wire = mock.connected("d1").await;
    let bad = publish("devices/d1/other", 30, b"");
    wire.send(&[publish(EVENTS, 10, b"a"), publish(EVENTS, 0, b"b"), bad, publish(EVENTS, 9, b"c")].concat())
        .await;
    mock.until(|state| state.commits.len() == 1).await;
    wire.send(&[publish(EVENTS, 8, b"d"), PING.to_vec()].concat()).await;
    mock.until(|state| state.commits.len() == 2).await;
    // The ping does not wait for the store; no acknowledgement is there before it.
    wire.expect(&PONG).await;
    let (first, second) = {
        let mut state = mock.state.lock();
        (state.commits.pop_front().unwrap(), state.commits.pop_front().unwrap())
    };
    second.send(Ok(())).unwrap();
    wire.send(&PING).await;
    wire.expect(&PONG).await;
    first.send(Ok(())).unwrap();
    wire.expect(&[puback(10), puback(30), puback(9), puback(8)].concat()).await;
    let state = mock.state.lock();
    assert_eq!(state.batches, [3, 1]);
    assert_eq!(state.dropped, [HeadDrop::BadTopic]);
    assert_eq!(
        state.published.iter().map(|message| &message.body[..]).collect::<Vec<_>>(),
        [b"a", b"b", b"c", b"d"]
    );
}

#[tokio::test]
async fn pings_are_answered_while_decoding_rests() {
    let limits = MqttLimits { publishes_pending_max: 2, ..MqttLimits::default() };
    let mock = Mock::default();
    mock.state.lock().hold_commits = true;
    let mut wire = mock.open_with(65_536, Vec::new(), limits);
    wire.send(&connect("d1", false, 60)).await;
    wire.expect(&[0x20, 2, 0, 0]).await;
    let publishes: Vec<u8> = (1..=5).flat_map(|id| publish(EVENTS, id, b"x")).collect();
    wire.send(&[publishes, PING.to_vec()].concat()).await;
    wire.expect(&PONG).await;
    assert_eq!(mock.state.lock().published.len(), 2);
    for _ in 0..3 {
        mock.until(|state| !state.commits.is_empty()).await;
        let commit = mock.state.lock().commits.pop_front().unwrap();
        commit.send(Ok(())).unwrap();
    }
    wire.expect(&(1..=5).flat_map(puback).collect::<Vec<u8>>()).await;
    // The ping was answered once.
    wire.send(&PING).await;
    wire.expect(&PONG).await;
    wire.send(&[0xe0, 0]).await;
    assert_eq!(wire.ended().await, (Vec::new(), ConnectionEnd::Disconnected));
}

#[tokio::test]
async fn pings_are_answered_while_a_batch_waits_for_room() {
    let mock = Mock::default();
    let (release, held) = oneshot::channel();
    mock.state.lock().hold_publish = Some(held);
    let mut wire = mock.connected("d1").await;
    wire.send(&publish(EVENTS, 1, b"x")).await;
    wire.send(&PING).await;
    wire.expect(&PONG).await;
    assert!(mock.state.lock().published.is_empty());
    release.send(()).unwrap();
    wire.expect(&puback(1)).await;
}

#[tokio::test]
async fn last_words_before_the_end_are_published() {
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    wire.send(&[publish(EVENTS, 0, b"last"), vec![0xe0, 0]].concat()).await;
    assert_eq!(wire.ended().await.1, ConnectionEnd::Disconnected);
    assert_eq!(mock.state.lock().published.len(), 1);
    assert_eq!(mock.state.lock().clients_gone, 1);
}

#[tokio::test]
async fn a_store_that_fails_closes_without_acknowledgement() {
    let mock = Mock::default();
    mock.state.lock().hold_commits = true;
    let mut wire = mock.connected("d1").await;
    wire.send(&publish(EVENTS, 1, b"x")).await;
    mock.until(|state| !state.commits.is_empty()).await;
    let commit = mock.state.lock().commits.pop_front().unwrap();
    commit.send(Err(PublishError::Full("disk".into()))).unwrap();
    assert_eq!(wire.ended().await, (Vec::new(), ConnectionEnd::Store(PublishError::Full("disk".into()))));
}

#[tokio::test]
async fn malformed_bytes_of_each_kind_close() {
    let too_large = publish(EVENTS, 1, &vec![0; 150_000]);
    for (bytes, reason) in [
        (vec![0x50, 2, 0, 1], "first_byte"),
        (vec![0x32, 0xff, 0xff, 0xff, 0xff], "length"),
        (vec![0x30, 0xfd, 0xff, 0x0f], "packet_too_large"),
        (vec![0x30, 1, 0], "truncated"),
        (vec![0x40, 3, 0, 1, 0], "left_over"),
        (vec![0xc0, 1, 0], "left_over"),
        (vec![0x30, 3, 0, 1, 0xff], "text"),
        (vec![0x30, 3, 0, 1, 0], "text"),
        (vec![0x36, 5, 0, 1, b'a', 0, 1], "flags"),
        (vec![0x38, 3, 0, 1, b'a'], "flags"),
        (vec![0x34, 5, 0, 1, b'a', 0, 1], "qos_2"),
        (vec![0x40, 2, 0, 0], "packet_id"),
        (vec![0x30, 3, 0, 1, b'#'], "topic"),
        (vec![0x82, 2, 0, 1], "filter"),
        (vec![0xa2, 5, 0, 1, 0, 1, 0], "text"),
        (connect("d1", false, 1), "second_connect"),
        (publish("devices/d2/messages/events/", 1, b""), "sender_mismatch"),
        (publish("$iothub/twin/GET/", 1, b""), "twin_topic"),
        (too_large, "message_too_large"),
    ] {
        let mock = Mock::default();
        let mut wire = mock.connected("d1").await;
        wire.send(&bytes).await;
        let (sent, end) = wire.ended().await;
        let ConnectionEnd::Protocol(error) = end else { panic!("{reason}: {end:?}") };
        assert_eq!((error.reason(), sent.len()), (reason, 0));
        assert_eq!(mock.state.lock().clients_gone, 1);
    }
    let mut wire = Mock::default().open();
    wire.send(&publish(EVENTS, 1, b"")).await;
    assert_eq!(wire.ended().await.1, ConnectionEnd::Protocol(ProtocolError::ConnectExpected));
}

#[tokio::test]
async fn logins_are_refused_with_the_code_of_their_reason() {
    for (refuse, code) in
        [(LoginError::Refused("bad".into()), 5), (LoginError::Unavailable("not ready".into()), 3)]
    {
        let mock = Mock::default();
        mock.state.lock().refuse = Some(refuse);
        let mut wire = mock.open();
        wire.send(&connect("d1", false, 60)).await;
        assert_eq!(wire.ended().await.0, [0x20, 2, 0, code]);
    }
}

#[tokio::test(start_paused = true)]
async fn silence_ends_a_connection() {
    let mock = Mock::default();
    let start = tokio::time::Instant::now();
    let wire = mock.open();
    assert_eq!(wire.ended().await.1, ConnectionEnd::ConnectTimeout);
    assert_eq!(start.elapsed().as_secs(), 60);

    for (keep_alive_secs, silence_secs) in [(10, 15), (0, 600), (60_000, 600)] {
        let mut wire = mock.open();
        wire.send(&connect("d1", false, keep_alive_secs)).await;
        wire.expect(&[0x20, 2, 0, 0]).await;
        tokio::time::advance(Duration::from_secs(5)).await;
        wire.send(&PING).await;
        wire.expect(&PONG).await;
        let start = tokio::time::Instant::now();
        assert_eq!(wire.ended().await.1, ConnectionEnd::KeepAlive);
        assert_eq!(start.elapsed().as_secs(), silence_secs);
    }
}

#[tokio::test]
async fn the_hub_closes() {
    let mock = Mock::default();
    let wire = mock.connected("d1").await;
    mock.command("d1", Command::Close(CloseReason::TakenOver)).await;
    assert_eq!(wire.ended().await, (Vec::new(), ConnectionEnd::Closed(CloseReason::TakenOver)));
    let wire = mock.connected("d1").await;
    let crate::mock::Wire { stream, end, stop } = wire;
    stop.send(()).unwrap();
    drop(stream);
    assert_eq!(end.await.unwrap(), ConnectionEnd::Closed(CloseReason::Stopping));
}

#[tokio::test]
async fn sessions_come_back() {
    let mock = Mock::default();
    let mut wire = mock.connected("e/m").await;
    wire.send(&subscribe(1, &[(INPUTS, 1), ("x/+", 0)])).await;
    wire.expect(&[0x90, 4, 0, 1, 1, 0]).await;
    assert_eq!(mock.state.lock().sessions.len(), 1);
    // What is stored already is not stored again.
    wire.send(&subscribe(2, &[(INPUTS, 1)])).await;
    wire.expect(&[0x90, 3, 0, 2, 1]).await;
    assert_eq!(mock.state.lock().session_writes, 1);
    drop(wire);

    let mut wire = mock.open();
    wire.send(&connect("e/m", false, 60)).await;
    wire.expect(&[0x20, 2, 1, 0]).await;
    let inputs_on = (Feature::ModuleInputs, true);
    mock.until(|state| state.features == [inputs_on, inputs_on]).await;
    let (one, _) = deliveries(0..1, b"x");
    mock.command("e/m", Command::Deliver(one)).await;
    assert_eq!(wire.packet().await.unwrap().0, 0x32);
    drop(wire);

    let mut wire = mock.open();
    wire.send(&connect("e/m", true, 60)).await;
    wire.expect(&[0x20, 2, 0, 0]).await;
    assert!(mock.state.lock().sessions.is_empty());
}

#[tokio::test]
async fn a_damaged_session_locks_nobody_out() {
    let mock = Mock::default();
    let identity = Identity::parse("e/m").unwrap();
    mock.state.lock().sessions.insert(identity, Bytes::from_static(&[9, 9]));
    let mut wire = mock.connected("e/m").await;
    wire.send(&subscribe(1, &[(INPUTS, 1)])).await;
    wire.expect(&[0x90, 3, 0, 1, 1]).await;
    assert_eq!(mock.state.lock().session_writes, 1);
}

#[tokio::test]
async fn certificates_are_for_devices_and_only_without_a_password() {
    let certificate = vec![Bytes::from_static(b"der")];
    let off = MqttLimits { certificate_authentication: false, ..MqttLimits::default() };
    let without_password = |client_id: &str| {
        let mut bytes = connect(client_id, true, 60);
        bytes[9] &= !0x40;
        bytes.truncate(bytes.len() - 7);
        bytes[1] -= 7;
        bytes
    };
    for (bytes, certificates, limits, code) in [
        (without_password("d1"), certificate.clone(), MqttLimits::default(), 0),
        (without_password("d1"), certificate.clone(), off.clone(), 5),
        (without_password("d1"), Vec::new(), MqttLimits::default(), 5),
        (without_password("d1/m"), certificate.clone(), MqttLimits::default(), 5),
        (connect("d1/m", true, 60), certificate, off, 0),
    ] {
        let mock = Mock::default();
        let mut wire = mock.open_with(1_024, certificates, limits);
        wire.send(&bytes).await;
        wire.expect(&[0x20, 2, 0, code]).await;
        assert_eq!(mock.state.lock().logins.len(), usize::from(code == 0));
    }
}

#[tokio::test]
async fn deliveries_are_settled_by_their_acknowledgement() {
    let mock = Mock::default();
    let mut wire = mock.connected("e/m").await;
    wire.send(&subscribe(1, &[(INPUTS, 1)])).await;
    wire.packet().await.unwrap();
    let (some, settler) = deliveries(7..10, b"body");
    mock.command("e/m", Command::Deliver(some)).await;
    for id in 1..=3u8 {
        let (first, body) = wire.packet().await.unwrap();
        let topic = b"devices/e/modules/m/inputs/in1/%24.cdid=leaf";
        assert_eq!((first, &body[2..2 + topic.len()]), (0x32, &topic[..]));
        assert_eq!(body[2 + topic.len()..], [&[0, id][..], b"body"].concat());
    }
    assert!(settler.take().is_empty());
    wire.send(&[puback(3), puback(99), puback(1)].concat()).await;
    assert_eq!(settler.settled().await, [(9, Outcome::Accepted), (7, Outcome::Accepted)]);
    wire.send(&puback(2)).await;
    assert_eq!(settler.settled().await, [(8, Outcome::Accepted)]);
}

#[tokio::test]
async fn acknowledgements_count_before_disconnect_but_not_before_a_violation() {
    for (last, settled) in [(vec![0xe0, 0], 1), (vec![0xff, 0], 0)] {
        let mock = Mock::default();
        let mut wire = mock.connected("e/m").await;
        wire.send(&subscribe(1, &[(INPUTS, 1)])).await;
        wire.packet().await.unwrap();
        let (one, settler) = deliveries(0..1, b"x");
        mock.command("e/m", Command::Deliver(one)).await;
        wire.packet().await.unwrap();
        wire.send(&[puback(1), last].concat()).await;
        wire.ended().await;
        assert_eq!(settler.take().len(), settled);
    }
}

#[tokio::test]
async fn a_delivery_offered_again_is_a_duplicate() {
    let mock = Mock::default();
    let mut wire = mock.connected("e/m").await;
    wire.send(&subscribe(1, &[(INPUTS, 1)])).await;
    wire.packet().await.unwrap();
    let (once, _) = deliveries(1..2, b"x");
    let settler = Settler::new();
    let again = Deliveries { target: once.target.clone(), messages: once.messages.clone(), settler };
    mock.command("e/m", Command::Deliver(once)).await;
    assert_eq!(wire.packet().await.unwrap().0, 0x32);
    mock.command("e/m", Command::Deliver(again)).await;
    assert_eq!(wire.packet().await.unwrap().0, 0x3a);
}

#[tokio::test]
async fn deliveries_without_subscription_are_released_and_of_qos_0_accepted() {
    let mock = Mock::default();
    let mut wire = mock.connected("e/m").await;
    let (some, settler) = deliveries(0..2, b"x");
    mock.command("e/m", Command::Deliver(some)).await;
    assert_eq!(settler.settled().await, [(0, Outcome::NotOffered), (1, Outcome::NotOffered)]);
    wire.send(&subscribe(1, &[(INPUTS, 0)])).await;
    wire.packet().await.unwrap();
    let large = vec![7; 20_000];
    let (some, settler) = deliveries(0..2, &large);
    mock.command("e/m", Command::Deliver(some)).await;
    for _ in 0..2 {
        let (first, body) = wire.packet().await.unwrap();
        assert_eq!(first, 0x30);
        assert!(body.ends_with(&large));
    }
    let mut settled = Vec::new();
    while settled.len() < 2 {
        settled.extend(settler.settled().await);
    }
    assert_eq!(settled, [(0, Outcome::Accepted), (1, Outcome::Accepted)]);
}

#[tokio::test]
async fn deliveries_beyond_every_bound_wait_and_arrive() {
    // A pipe that takes everything never wakes the writer; one that takes little always does.
    for (qos, pipe_bytes) in [(0, 65_536), (1, 65_536), (0, 16_777_216), (1, 16_777_216)] {
        let mock = Mock::default();
        let mut wire = mock.open_with(pipe_bytes, Vec::new(), MqttLimits::default());
        wire.send(&connect("e/m", false, 60)).await;
        wire.expect(&[0x20, 2, 0, 0]).await;
        wire.send(&subscribe(1, &[(INPUTS, qos)])).await;
        wire.packet().await.unwrap();
        let (some, settler) = deliveries(0..6_000, &[1; 500]);
        mock.command("e/m", Command::Deliver(some)).await;
        let mut settled = Vec::new();
        for number in 0..6_000u32 {
            let (_, body) = wire.packet().await.unwrap();
            if qos == 1 {
                let topic_bytes = usize::from(u16::from_be_bytes([body[0], body[1]]));
                wire.send(&packet(0x40, &body[2 + topic_bytes..4 + topic_bytes])).await;
            }
            if number % 1_000 == 0 {
                settled.extend(settler.take());
            }
        }
        while settled.len() < 6_000 {
            settled.extend(settler.settled().await);
        }
        let in_order = (0..6_000).map(|tag| (tag, Outcome::Accepted)).collect::<Vec<_>>();
        assert_eq!(settled, in_order);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_reads_is_cut_off() {
    let mock = Mock::default();
    let mut wire = mock.open_with(1_024, Vec::new(), MqttLimits::default());
    wire.send(&connect("e/m", false, 0)).await;
    wire.expect(&[0x20, 2, 0, 0]).await;
    wire.send(&subscribe(1, &[(INPUTS, 0)])).await;
    wire.packet().await.unwrap();
    let start = tokio::time::Instant::now();
    let (some, settler) = deliveries(0..100, &[0; 500]);
    mock.command("e/m", Command::Deliver(some)).await;
    let crate::mock::Wire { stream, end, stop } = wire;
    assert_eq!(end.await.unwrap(), ConnectionEnd::TooSlow);
    assert!((60..70).contains(&start.elapsed().as_secs()));
    assert!(settler.take().len() < 3);
    drop((stream, stop));
}

#[tokio::test]
async fn the_will_is_published_unless_the_client_disconnects() {
    for (disconnects, published) in [(false, 1), (true, 0)] {
        let mock = Mock::default();
        let mut wire = mock.open();
        let will = Some(("devices/d1/messages/events/a=1", "gone"));
        wire.send(&connect_with("d1", "h/d1/?api-version=1", false, 60, will)).await;
        wire.expect(&[0x20, 2, 0, 0]).await;
        if disconnects {
            wire.send(&[0xe0, 0]).await;
        } else {
            wire.stream.shutdown().await.unwrap();
        }
        wire.ended().await;
        let state = mock.state.lock();
        assert_eq!(state.published.len(), published);
        for message in &state.published {
            assert_eq!(message.properties.application(|name| name == "MessageType"), Value::Text("Will"));
            assert_eq!(message.properties.application(|name| name == "a"), Value::Text("1"));
            assert_eq!(&message.body[..], b"gone");
        }
    }
}

#[tokio::test]
async fn flags_become_properties() {
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    let mut bytes = publish(EVENTS, 5, b"");
    bytes[0] |= 0x09;
    wire.send(&bytes).await;
    wire.expect(&puback(5)).await;
    let state = mock.state.lock();
    for name in ["mqtt-retain", "mqtt-dup"] {
        assert_eq!(state.published[0].properties.application(|known| known == name), Value::Text("true"));
    }
}

fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    let some = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..30),
        Just(PING.to_vec()),
        (0..3u16, ".{0,20}").prop_map(|(id, bag)| publish(&format!("{EVENTS}{bag}"), id, b"x")),
        ".{0,20}".prop_map(|topic| publish(&format!("$iothub/twin/{topic}"), 1, b"")),
        "[$a-z/#+]{1,10}".prop_map(|filter| subscribe(1, &[(&filter, 1)])),
        (1..9u16).prop_map(puback),
    ];
    proptest::collection::vec(some, 0..8).prop_map(|packets| packets.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_bytes_break_a_live_connection(bytes in any_bytes(), cut in any::<proptest::sample::Index>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mock = Mock::default();
            let mut wire = mock.connected("d1").await;
            let (one, other) = bytes.split_at(cut.index(bytes.len() + 1));
            // The hub may have closed after the first part.
            let _ = wire.stream.write_all(one).await;
            tokio::task::yield_now().await;
            let _ = wire.stream.write_all(other).await;
            let _ = wire.stream.shutdown().await;
            wire.ended().await;
            assert_eq!(mock.state.lock().clients_gone, 1);
        });
    }
}
