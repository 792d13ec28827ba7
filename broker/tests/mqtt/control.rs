//! Twins and direct methods over an in-memory pipe.

use bytes::Bytes;
use edgehub_broker::backend::{
    CORRELATION_BYTES_MAX, CallId, Command, DesiredPatch, Feature, MethodAnswer, MethodCall,
    STATUS_UNREADABLE, TwinAnswer, TwinError, TwinOperation, TwinReply, TwinRequest,
};
use edgehub_broker::head::mqtt::{ConnectionEnd, MqttLimits};
use proptest::prelude::*;

use crate::connection::puback;
use crate::mock::{Mock, Wire, connect, packet, publish, subscribe};

const RESPONSES: &str = "$iothub/twin/res/#";
const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";
const METHODS: &str = "$iothub/methods/POST/#";

/// A device that subscribed to `filters`.
async fn subscribed(mock: &Mock, filters: &[(&str, u8)]) -> Wire {
    let mut wire = mock.connected("d1").await;
    wire.send(&subscribe(1, filters)).await;
    assert_eq!(wire.packet().await.unwrap().0, 0x90);
    wire
}

/// The next PUBLISH: its first byte, topic, packet id and payload.
async fn published(wire: &mut Wire) -> (u8, String, Option<u16>, Vec<u8>) {
    let (first, body) = wire.packet().await.unwrap();
    assert_eq!(first & 0xf0, 0x30, "{body:?}");
    let (len, rest) = body.split_first_chunk::<2>().unwrap();
    let (topic, rest) = rest.split_at(usize::from(u16::from_be_bytes(*len)));
    let (packet_id, payload) = match first & 0x06 {
        0 => (None, rest),
        _ => (Some(u16::from_be_bytes([rest[0], rest[1]])), &rest[2..]),
    };
    (first, String::from_utf8(topic.to_vec()).unwrap(), packet_id, payload.to_vec())
}

fn answer(request_id: &str, result: Result<TwinReply, TwinError>) -> Command {
    Command::TwinAnswer(TwinAnswer { correlation: Bytes::copy_from_slice(request_id.as_bytes()), result })
}

fn call(name: &str, payload: &'static str) -> (MethodCall, CallId) {
    let id = CallId::new();
    (MethodCall { id, name: name.into(), payload: payload.into() }, id)
}

#[tokio::test]
async fn twin_requests_reach_the_backend_and_are_acknowledged_in_order() {
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    let patch = "$iothub/twin/PATCH/properties/reported/";
    let requests = [
        publish("$iothub/twin/GET/?$rid=a%2B", 7, b" "),
        publish(&format!("{patch}?$rid=2&$version=9"), 5, b"{\"a\":1}"),
        publish(patch, 6, b"{}"),
        publish("$iothub/twin/GET/?$rid=3", 0, b""),
    ];
    wire.send(&requests.concat()).await;
    wire.expect(&[puback(7), puback(5), puback(6)].concat()).await;
    let state = mock.state.lock();
    let expected = [
        (Some("a%2B"), TwinOperation::Get),
        (Some("2"), TwinOperation::PatchReported("{\"a\":1}".into())),
        (None, TwinOperation::PatchReported("{}".into())),
        (Some("3"), TwinOperation::Get),
    ];
    let expected =
        expected.map(|(mark, operation)| TwinRequest { correlation: mark.map(Bytes::from), operation });
    let requests: Vec<_> = state.twin_requests.iter().map(|(_, request)| request.clone()).collect();
    assert_eq!(requests, expected);
    assert!(state.twin_requests.iter().all(|(identity, _)| identity.to_string() == "d1"));
}

#[tokio::test]
async fn twin_answers_have_status_version_and_body() {
    let document = Bytes::from_static(b"{\"desired\":{},\"reported\":{}}");
    let mock = Mock::default();
    let mut wire = subscribed(&mock, &[(RESPONSES, 1)]).await;
    for (request_id, result, topic) in [
        ("a%2B", Ok(TwinReply::Document(document.clone())), "$iothub/twin/res/200/?$rid=a%2B"),
        ("7", Ok(TwinReply::Patched { version: None }), "$iothub/twin/res/204/?$rid=7"),
        ("8", Ok(TwinReply::Patched { version: Some(12) }), "$iothub/twin/res/204/?$rid=8&$version=12"),
    ] {
        let body = if request_id == "a%2B" { &document[..] } else { b"" };
        mock.command("d1", answer(request_id, result)).await;
        let (first, sent_to, packet_id, payload) = published(&mut wire).await;
        assert_eq!((first, &*sent_to, &*payload), (0x32, topic, body));
        wire.send(&puback(packet_id.unwrap())).await;
    }
    for (error, status) in [
        (TwinError::Invalid("name \"a.b\"".into()), 400),
        (TwinError::Busy, 429),
        (TwinError::Failed("no\nluck".into()), 500),
    ] {
        let text = error.to_string();
        mock.command("d1", answer("9", Err(error))).await;
        let (_, topic, _, payload) = published(&mut wire).await;
        assert_eq!(topic, format!("$iothub/twin/res/{status}/?$rid=9"));
        let body: serde_json::Value = serde_json::from_slice(&payload).unwrap();
        assert_eq!(body["errorCode"], status * 1_000);
        assert_eq!(body["message"], *text);
        assert_eq!(body["trackingId"], "");
        assert!(body["timestampUtc"].as_str().unwrap().ends_with('Z'));
    }
}

#[tokio::test]
async fn a_twin_request_that_is_refused_at_once_is_answered_at_once() {
    let mock = Mock::default();
    mock.state.lock().twin_refused = Some(TwinError::Busy);
    let mut wire = subscribed(&mock, &[(RESPONSES, 0)]).await;
    wire.send(&publish("$iothub/twin/GET/?$rid=1", 0, b"")).await;
    assert_eq!(published(&mut wire).await.1, "$iothub/twin/res/429/?$rid=1");
    // Without a request id there is nobody to answer.
    wire.send(&publish("$iothub/twin/PATCH/properties/reported/", 4, b"{}")).await;
    wire.expect(&puback(4)).await;
    mock.state.lock().twin_refused = None;
    let long = "x".repeat(CORRELATION_BYTES_MAX + 1);
    wire.send(&publish(&format!("$iothub/twin/GET/?$rid={long}"), 0, b"")).await;
    assert_eq!(published(&mut wire).await.1, format!("$iothub/twin/res/400/?$rid={long}"));
    assert_eq!(mock.state.lock().twin_requests.len(), 2);
}

#[tokio::test]
async fn what_no_filter_takes_is_not_sent() {
    let mock = Mock::default();
    let mut wire = mock.connected("d1").await;
    mock.command("d1", answer("1", Ok(TwinReply::Patched { version: None }))).await;
    mock.command("d1", Command::Desired(DesiredPatch { patch: "{}".into(), version: 1 })).await;
    let (never_called, id) = call("reboot", "null");
    mock.command("d1", Command::Invoke(never_called)).await;
    mock.until(|state| !state.method_answers.is_empty()).await;
    let (_, answered, not_found) = mock.state.lock().method_answers[0].clone();
    assert_eq!((answered, not_found.status), (id, 404));
    assert!(serde_json::from_slice::<serde_json::Value>(&not_found.payload).is_ok());
    wire.send(&[0xc0, 0]).await;
    wire.expect(&[0xd0, 0]).await;
}

#[tokio::test]
async fn desired_properties_go_out_with_their_version_at_the_granted_quality() {
    for qos in [0, 1, 2] {
        let mock = Mock::default();
        let mut wire = subscribed(&mock, &[(DESIRED, qos)]).await;
        assert_eq!(mock.state.lock().features, [(Feature::DesiredProperties, true)]);
        let patch = Bytes::from_static(b"{\"a\":null,\"$version\":12}");
        mock.command("d1", Command::Desired(DesiredPatch { patch: patch.clone(), version: 12 })).await;
        let (first, topic, packet_id, payload) = published(&mut wire).await;
        assert_eq!((first, packet_id), if qos == 0 { (0x30, None) } else { (0x32, Some(1)) });
        assert_eq!(topic, "$iothub/twin/PATCH/properties/desired/?$version=12");
        assert_eq!(payload, patch);
    }
}

#[tokio::test]
async fn methods_are_called_and_answered() {
    let mock = Mock::default();
    let mut wire = subscribed(&mock, &[(METHODS, 0)]).await;
    for (name, payload, body) in [("get log", "{\"a\":1}", "{\"a\":1}"), ("x", "", "null")] {
        let (called, id) = call(name, payload);
        mock.command("d1", Command::Invoke(called)).await;
        let (first, topic, _, sent) = published(&mut wire).await;
        assert_eq!((first, &sent[..]), (0x30, body.as_bytes()));
        assert_eq!(topic, format!("$iothub/methods/POST/{name}/?$rid={id}"));
    }
    let id = CallId::new();
    let upper = id.to_string().to_uppercase();
    for (topic, expected) in [
        (format!("$iothub/methods/res/200/?$rid={id}"), Some((200, "{}"))),
        (format!("$iothub/methods/res/-3/?$rid={upper}"), Some((-3, "{}"))),
        (format!("$iothub/methods/res/ok/?$rid={id}"), Some((STATUS_UNREADABLE, ""))),
        (format!("$iothub/methods/res/2147483648/?$rid={id}"), Some((STATUS_UNREADABLE, ""))),
        ("$iothub/methods/res/200/?$rid=nobody".to_owned(), None),
        (format!("$iothub/methods/res/200/?$rid={id}&a=1"), None),
        ("$iothub/methods/res/200/".to_owned(), None),
    ] {
        wire.send(&publish(&topic, 9, b"{}")).await;
        wire.expect(&puback(9)).await;
        let answer = mock.state.lock().method_answers.pop().map(|(_, call, answer)| (call, answer));
        let expected = expected.map(|(status, payload)| {
            (id, MethodAnswer { status, payload: Bytes::from_static(payload.as_bytes()) })
        });
        assert_eq!(answer, expected, "{topic}");
    }
}

#[tokio::test]
async fn a_method_whose_name_no_topic_carries_is_answered_in_place_of_the_client() {
    let mock = Mock::default();
    let mut wire = subscribed(&mock, &[(METHODS, 1)]).await;
    for name in ["a/b", "a+", "#", "a\0"] {
        let (called, id) = call(name, "null");
        mock.command("d1", Command::Invoke(called)).await;
        mock.until(|state| !state.method_answers.is_empty()).await;
        let (_, answered, refused) = mock.state.lock().method_answers.pop().unwrap();
        assert_eq!((answered, refused.status), (id, 400), "{name:?}");
        assert!(serde_json::from_slice::<serde_json::Value>(&refused.payload).is_ok());
    }
    wire.send(&[0xc0, 0]).await;
    wire.expect(&[0xd0, 0]).await;
}

#[tokio::test]
async fn subscriptions_of_a_stored_session_take_calls() {
    let mock = Mock::default();
    drop(subscribed(&mock, &[(METHODS, 1), (DESIRED, 1), (RESPONSES, 1)]).await);
    let mut wire = mock.open();
    wire.send(&connect("d1", false, 60)).await;
    wire.expect(&[0x20, 2, 1, 0]).await;
    mock.until(|state| state.features.len() == 6).await;
    let (called, id) = call("reboot", "null");
    mock.command("d1", Command::Invoke(called)).await;
    assert!(published(&mut wire).await.1.ends_with(&id.to_string()));
}

#[tokio::test]
async fn unacknowledged_notices_never_stop_messages_and_go_on_at_qos_0() {
    let mock = Mock::default();
    let mut wire = subscribed(&mock, &[(DESIRED, 1)]).await;
    for version in 0..300 {
        mock.command("d1", Command::Desired(DesiredPatch { patch: "{}".into(), version })).await;
        let (_, topic, packet_id, _) = published(&mut wire).await;
        assert!(topic.ends_with(&format!("={version}")));
        assert_eq!(packet_id, (version < 100).then_some(version as u16 + 1));
    }
    wire.send(&puback(50)).await;
    wire.send(&[0xc0, 0]).await;
    wire.expect(&[0xd0, 0]).await;
    mock.command("d1", Command::Desired(DesiredPatch { patch: "{}".into(), version: 300 })).await;
    assert!(published(&mut wire).await.2.is_some());
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_off_before_notices_fill_the_memory() {
    for patch_bytes in [1 << 20, 1] {
        let mock = Mock::default();
        let mut wire = mock.open_with(1_024, Vec::new(), MqttLimits::default());
        wire.send(&connect("d1", false, 0)).await;
        wire.expect(&[0x20, 2, 0, 0]).await;
        wire.send(&subscribe(1, &[(DESIRED, 0)])).await;
        wire.packet().await.unwrap();
        let mailbox = mock.state.lock().mailboxes.values().next().unwrap().clone();
        let patch = |bytes| Command::Desired(DesiredPatch { patch: vec![b' '; bytes].into(), version: 1 });
        // The first fills the output.
        mailbox.send(patch(2 << 20)).await.unwrap();
        let mut taken = 0;
        while mailbox.send(patch(patch_bytes)).await.is_ok() {
            taken += 1;
        }
        // The rest of them waited in the mailbox when it closed.
        let waited = if patch_bytes == 1 { 100 } else { 15 };
        assert!((waited..=waited + 65).contains(&taken), "{taken}");
        assert_eq!(wire.end.await.unwrap(), ConnectionEnd::TooSlow);
    }
}

#[tokio::test]
async fn notices_that_waited_arrive_in_order_once_the_client_reads() {
    let mock = Mock::default();
    let mut wire = mock.open_with(1_024, Vec::new(), MqttLimits::default());
    wire.send(&connect("d1", false, 0)).await;
    wire.expect(&[0x20, 2, 0, 0]).await;
    wire.send(&subscribe(1, &[(DESIRED, 1), (METHODS, 1)])).await;
    wire.packet().await.unwrap();
    for version in 0..30 {
        let patch = vec![b' '; 200_000].into();
        mock.command("d1", Command::Desired(DesiredPatch { patch, version })).await;
    }
    for version in 0..30 {
        let (_, topic, _, payload) = published(&mut wire).await;
        assert!(topic.ends_with(&format!("?$version={version}")), "{topic}");
        assert_eq!(payload.len(), 200_000);
    }
}

fn any_command() -> impl Strategy<Value = u8> {
    0..8u8
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the hub asks for and the client does meanwhile, the client gets whole packets, and each of its requests
    /// gets its acknowledgement in order.
    #[test]
    fn the_hub_and_the_client_talk_at_the_same_time(
        steps in proptest::collection::vec((any_command(), 0..2_000usize), 1..40),
        pipe_bytes in 64..4_096usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mock = Mock::default();
            let mut wire = mock.open_with(pipe_bytes, Vec::new(), MqttLimits::default());
            wire.send(&connect("d1", false, 0)).await;
            wire.expect(&[0x20, 2, 0, 0]).await;
            wire.send(&subscribe(1, &[(RESPONSES, 1), (DESIRED, 0), (METHODS, 1)])).await;
            wire.packet().await.unwrap();
            let (mut expected, mut acknowledged, mut asked) = (Vec::new(), Vec::new(), 0u16);
            let mut sent = Vec::new();
            for (kind, bytes) in steps {
                let body = Bytes::from(vec![b' '; bytes]);
                match kind {
                    0 | 1 => {
                        let result = Ok(TwinReply::Document(body));
                        mock.command("d1", answer(&bytes.to_string(), result)).await;
                        expected.push(format!("$iothub/twin/res/200/?$rid={bytes}"));
                    }
                    2 | 3 => {
                        let version = bytes as u64;
                        mock.command("d1", Command::Desired(DesiredPatch { patch: body, version })).await;
                        expected.push(format!("$iothub/twin/PATCH/properties/desired/?$version={version}"));
                    }
                    4 => {
                        let (called, id) = call("m", "1");
                        mock.command("d1", Command::Invoke(called)).await;
                        expected.push(format!("$iothub/methods/POST/m/?$rid={id}"));
                    }
                    5 => mock.command("d1", Command::Invoke(call("#", "1").0)).await,
                    _ => {
                        asked += 1;
                        sent.extend(publish(&format!("$iothub/twin/GET/?$rid={asked}"), asked, &body));
                        acknowledged.push(asked);
                    }
                }
            }
            let (mut reader, mut writer) = tokio::io::split(wire.stream);
            let end = packet(0xe0, &[]);
            let writing = async {
                use tokio::io::AsyncWriteExt;
                writer.write_all(&sent).await.unwrap();
            };
            let reading = async {
                let (mut topics, mut ids) = (Vec::new(), Vec::new());
                while topics.len() < expected.len() || ids.len() < acknowledged.len() {
                    use tokio::io::AsyncReadExt;
                    let first = reader.read_u8().await.unwrap();
                    let (mut len, mut shift) = (0usize, 0);
                    loop {
                        let byte = reader.read_u8().await.unwrap();
                        len |= usize::from(byte & 0x7f) << shift;
                        shift += 7;
                        if byte & 0x80 == 0 {
                            break;
                        }
                    }
                    let mut body = vec![0; len];
                    reader.read_exact(&mut body).await.unwrap();
                    match first >> 4 {
                        3 => {
                            let len = usize::from(u16::from_be_bytes([body[0], body[1]]));
                            topics.push(String::from_utf8(body[2..2 + len].to_vec()).unwrap());
                        }
                        4 => ids.push(u16::from_be_bytes([body[0], body[1]])),
                        other => panic!("packet type {other}"),
                    }
                }
                (topics, ids)
            };
            let ((), (topics, ids)) = tokio::join!(writing, reading);
            assert_eq!(topics, expected);
            assert_eq!(ids, acknowledged);
            use tokio::io::AsyncWriteExt;
            writer.write_all(&end).await.unwrap();
            drop((reader, writer));
            assert_eq!(wire.end.await.unwrap(), ConnectionEnd::Disconnected);
        });
    }
}
