//! Method links of the AMQP head, as an independent client sees them.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod amqp_client;
mod recording;

use amqp_client::{Site, data, identity, receive};
use bytes::Bytes;
use edgehub_broker::backend::{CallId, Command, Feature, MethodAnswer, MethodCall, STATUS_UNREADABLE};
use fe2o3_amqp::types::messaging::{ApplicationProperties, Data, Message, MessageId, Properties};
use fe2o3_amqp::types::primitives::{Binary, SimpleValue, Uuid};
use recording::{DEADLINE, until};
use tokio::time::timeout;

const METHODS: &str = "/devices/d1/modules/m1/methods/devicebound";
const ID: [u8; 16] = [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 1, 2, 3, 4, 5, 6, 7, 8];

/// An answer, and the status and payload that the hub is told, if it is.
type Case = (Message<Data>, Option<(i32, &'static str)>);

fn answer(id: Option<MessageId>, status: Option<SimpleValue>, body: &str) -> Message<Data> {
    let mut application = ApplicationProperties::builder().insert("other", 1);
    if let Some(status) = status {
        application = application.insert("IoThub-status", status);
    }
    Message::builder()
        .properties(Properties { correlation_id: id, ..Properties::default() })
        .application_properties(application.build())
        .data(Binary::from(body.as_bytes().to_vec()))
        .build()
}

#[tokio::test]
async fn calls_reach_the_client_while_it_has_a_link_for_them() {
    let mut site = Site::of("d1/m1").await;
    let switched = |site: &Site| {
        let state = site.recording.state.lock();
        let of = state.features.iter().filter(|(_, feature, _)| *feature == Feature::Methods);
        of.map(|(_, _, on)| *on).collect::<Vec<_>>()
    };
    let mut calls = site.receiver("MethodsReceiverLink", METHODS).await;
    assert_eq!(switched(&site), [true]);
    for (payload, expected) in [("{\"a\":1}", "{\"a\":1}"), ("null", "null"), ("", "null")] {
        let payload = Bytes::from_static(payload.as_bytes());
        let call = MethodCall { id: CallId::from_bytes(ID), name: "reboot".into(), payload };
        site.recording.command("d1/m1", Command::Invoke(call)).await;
        let received = receive(&mut calls).await;
        assert_eq!(data(&received), expected.as_bytes());
        let message = received.message();
        let id = message.properties.as_ref().and_then(|found| found.correlation_id.clone());
        assert_eq!(id, Some(MessageId::Uuid(Uuid::from(ID))), "SDKs read it as a GUID");
        let application = message.application_properties.as_ref().unwrap();
        let name = SimpleValue::String("reboot".into());
        assert_eq!(application.0.get("IoThub-methodname"), Some(&name));
        assert_eq!(application.0.len(), 1);
    }
    let _telemetry = site.sender("up", "/devices/d1/modules/m1/messages/events").await;
    calls.close().await.expect("closed");
    until("off", || switched(&site) == [true, false]).await;
    // A call that comes too late is nobody's.
    let call = MethodCall { id: CallId::new(), name: "late".into(), payload: Bytes::new() };
    site.recording.command("d1/m1", Command::Invoke(call)).await;
    site.cbs.put_good("d1/m1").await;
}

#[tokio::test]
async fn answers_are_read_whatever_the_type_of_id_and_status() {
    let mut site = Site::of("d1/m1").await;
    let mut answers = site.sender("MethodsSenderLink", METHODS).await;
    let text = CallId::from_bytes(ID).to_string();
    let ids = [
        MessageId::Uuid(Uuid::from(ID)),
        MessageId::String(text.clone()),
        MessageId::String(text.to_uppercase()),
        MessageId::Binary(Binary::from(ID.to_vec())),
    ];
    let int = SimpleValue::Int;
    let mut cases: Vec<Case> = Vec::new();
    for id in ids {
        cases.push((answer(Some(id), Some(int(200)), "[1]"), Some((200, "[1]"))));
    }
    let id = || Some(MessageId::Uuid(Uuid::from(ID)));
    for status in [SimpleValue::Long(-7), SimpleValue::Short(-7), SimpleValue::Byte(-7)] {
        cases.push((answer(id(), Some(status), ""), Some((-7, ""))));
    }
    for status in [SimpleValue::Ubyte(201), SimpleValue::Uint(201), SimpleValue::Ulong(201)] {
        cases.push((answer(id(), Some(status), "{}"), Some((201, "{}"))));
    }
    let unreadable = [Some(SimpleValue::String("200".into())), Some(SimpleValue::Long(1 << 40)), None];
    for status in unreadable {
        cases.push((answer(id(), status, "{}"), Some((STATUS_UNREADABLE, ""))));
    }
    for unknown in [None, Some(MessageId::Ulong(7)), Some(MessageId::String("no guid".into()))] {
        cases.push((answer(unknown, Some(int(200)), "{}"), None));
    }
    for (number, (message, expected)) in cases.into_iter().enumerate() {
        let outcome = timeout(DEADLINE, answers.send(message)).await.expect("in time").expect("answered");
        assert!(outcome.is_accepted(), "{number}: {outcome:?}");
        // What is accepted was passed on before.
        let received = std::mem::take(&mut site.recording.state.lock().method_answers);
        let expected = expected.map(|(status, payload)| {
            let payload = Bytes::from_static(payload.as_bytes());
            (identity("d1/m1"), CallId::from_bytes(ID), MethodAnswer { status, payload })
        });
        assert_eq!(received, Vec::from_iter(expected), "{number}");
    }
}
