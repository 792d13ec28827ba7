//! Twin links of the AMQP head, as an independent client sees them.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod amqp_client;
mod recording;

use amqp_client::{Site, data, detached, identity, receive};
use bytes::Bytes;
use edgehub_broker::backend::{
    Command, DesiredPatch, Feature, TwinAnswer, TwinError, TwinOperation, TwinReply, TwinRequest,
};
use edgehub_broker::head::amqp::AmqpLimits;
use fe2o3_amqp::Sender;
use fe2o3_amqp::link::delivery::Delivery;
use fe2o3_amqp::types::messaging::{Body, Data, Message, MessageAnnotations, MessageId, Outcome, Properties};
use fe2o3_amqp::types::primitives::{Binary, Symbol, Uuid, Value};
use recording::{DEADLINE, until};
use tokio::time::timeout;

const TWIN: &str = "/devices/d1/twin";

fn request(operation: &str, id: Option<MessageId>, body: &str) -> Message<Data> {
    Message::builder()
        .properties(Properties { correlation_id: id, ..Properties::default() })
        .message_annotations(MessageAnnotations::builder().insert("operation", operation).build())
        .data(Binary::from(body.as_bytes().to_vec()))
        .build()
}

fn text_id(text: &str) -> Option<MessageId> {
    Some(MessageId::String(text.into()))
}

/// Sends a request, which must be accepted.
async fn ask(sender: &mut Sender, operation: &str, id: Option<MessageId>, body: &str) {
    let sent = timeout(DEADLINE, sender.send(request(operation, id, body))).await;
    let outcome = sent.expect("in time").expect("answered");
    assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
}

/// Correlation id, status and version of what was received.
fn head_of(delivery: &Delivery<Body<Value>>) -> (Option<MessageId>, Option<i32>, Option<i64>) {
    let message = delivery.message();
    let annotation = |name: &str| {
        let annotations = message.message_annotations.as_ref()?;
        annotations
            .0
            .get(&Symbol::from(name) as &dyn fe2o3_amqp::types::messaging::annotations::AnnotationKey)
    };
    let status = annotation("status").map(|value| match value {
        Value::Int(status) => *status,
        other => panic!("{other:?}"),
    });
    let version = annotation("version").map(|value| match value {
        Value::Long(version) => *version,
        other => panic!("{other:?}"),
    });
    (message.properties.as_ref().and_then(|found| found.correlation_id.clone()), status, version)
}

/// The backend's next request, and an answer to it.
async fn answer(site: &Site, result: Result<TwinReply, TwinError>) -> TwinOperation {
    until("asked", || !site.recording.state.lock().twin_requests.is_empty()).await;
    let (of, TwinRequest { correlation, operation }) = site.recording.state.lock().twin_requests.remove(0);
    assert_eq!(of, identity("d1"));
    let correlation = correlation.unwrap();
    site.recording.command("d1", Command::TwinAnswer(TwinAnswer { correlation, result })).await;
    operation
}

#[tokio::test]
async fn requests_are_answered_under_their_id_whatever_its_type() {
    let mut site = Site::of("d1").await;
    let mut answers = site.receiver("TwinReceiverLink", TWIN).await;
    let mut requests = site.sender("TwinSenderLink", "amqps://hub/devices/d1/twin").await;
    let document = Bytes::from_static(b"{\"desired\":{},\"reported\":{}}");
    let ids = [
        MessageId::String("Get1".into()),
        MessageId::Uuid(Uuid::from([0xa5; 16])),
        MessageId::Ulong(300),
        MessageId::Binary(Binary::from(vec![0, 255])),
    ];
    for id in ids {
        ask(&mut requests, "GET", Some(id.clone()), "").await;
        let asked = answer(&site, Ok(TwinReply::Document(document.clone()))).await;
        assert_eq!(asked, TwinOperation::Get);
        let received = receive(&mut answers).await;
        assert_eq!(head_of(&received), (Some(id), Some(200), None));
        assert_eq!(data(&received), document);
    }
    ask(&mut requests, "PATCH", text_id("Patch1"), "{\"a\":1}").await;
    let asked = answer(&site, Ok(TwinReply::Patched { version: Some(7) })).await;
    assert_eq!(asked, TwinOperation::PatchReported(Bytes::from_static(b"{\"a\":1}")));
    let received = receive(&mut answers).await;
    assert_eq!(head_of(&received), (text_id("Patch1"), Some(204), Some(7)));
    assert_eq!(data(&received), b"");
}

#[tokio::test]
async fn failures_have_a_status_and_a_json_body() {
    let mut site = Site::of("d1").await;
    let mut answers = site.receiver("down", TWIN).await;
    let mut requests = site.sender("up", TWIN).await;
    let failures = [
        (TwinError::Invalid("not an object".into()), 400),
        (TwinError::Busy, 429),
        (TwinError::Failed("no twin".into()), 500),
    ];
    for (at_once, (error, status)) in
        [false, true].into_iter().flat_map(|at_once| failures.clone().map(|failure| (at_once, failure)))
    {
        site.recording.state.lock().twin_refused = at_once.then(|| error.clone());
        ask(&mut requests, "GET", text_id("g"), "").await;
        if !at_once {
            answer(&site, Err(error.clone())).await;
        }
        let received = receive(&mut answers).await;
        assert_eq!(head_of(&received), (text_id("g"), Some(status), None));
        let body: serde_json::Value = serde_json::from_slice(&data(&received)).expect("JSON");
        assert_eq!(body["errorCode"], status * 1_000);
        assert_eq!(body["message"], error.to_string());
        assert!(
            body["timestampUtc"].as_str().is_some_and(|time| time.starts_with("20") && time.ends_with('Z'))
        );
        site.recording.state.lock().twin_requests.clear();
    }
    // Without an id there is nothing to answer.
    let outcome = timeout(DEADLINE, requests.send(request("GET", None, ""))).await.unwrap().unwrap();
    let outcome = format!("{outcome:?}");
    assert!(outcome.contains("Rejected") && outcome.contains("InvalidField"), "{outcome}");
    let long = text_id(&"x".repeat(1_100));
    let outcome = timeout(DEADLINE, requests.send(request("GET", long, ""))).await.unwrap().unwrap();
    assert!(format!("{outcome:?}").contains("InvalidField"), "{outcome:?}");
    // Something unknown is accepted and not answered.
    ask(&mut requests, "HEAD", text_id("h"), "").await;
    ask(&mut requests, "PUT", text_id("p"), "").await;
    assert_eq!(head_of(&receive(&mut answers).await), (text_id("p"), Some(200), None));
    assert!(site.recording.state.lock().twin_requests.is_empty());
}

#[tokio::test]
async fn notifications_go_on_with_the_link_and_on_and_off_by_request() {
    let mut site = Site::of("d1").await;
    let mut answers = site.receiver("down", TWIN).await;
    let mut requests = site.sender("up", TWIN).await;
    let switched = |site: &Site| {
        let state = site.recording.state.lock();
        let of = state.features.iter().filter(|(_, feature, _)| *feature == Feature::DesiredProperties);
        of.map(|(_, _, on)| *on).collect::<Vec<_>>()
    };
    assert_eq!(switched(&site), [true], "by the link alone");
    for operation in ["DELETE", "PUT"] {
        ask(&mut requests, operation, text_id(operation), "").await;
        let received = receive(&mut answers).await;
        assert_eq!(head_of(&received), (text_id(operation), Some(200), None));
        assert_eq!(data(&received), b"");
    }
    assert_eq!(switched(&site), [true, false, true]);
    let patch = Bytes::from_static(b"{\"a\":null,\"$version\":3}");
    site.recording.command("d1", Command::Desired(DesiredPatch { patch: patch.clone(), version: 3 })).await;
    let received = receive(&mut answers).await;
    assert_eq!(head_of(&received), (None, None, None));
    assert_eq!(data(&received), patch);
    answers.close().await.expect("closed");
    until("off", || switched(&site) == [true, false, true, false]).await;
    // The identity is still there by its other link.
    ask(&mut requests, "PUT", text_id("p"), "").await;
    assert!(site.recording.state.lock().gone.is_empty());
}

#[tokio::test]
async fn a_link_of_a_new_pair_ends_the_other_one_of_the_old() {
    let pair = |text: &str| {
        let mut properties = fe2o3_amqp::types::definitions::Fields::new();
        let key = Symbol::from("com.microsoft:channel-correlation-id");
        properties.insert(key, Value::String(text.into()));
        properties
    };
    let mut site = Site::of("d1").await;
    let builder = || fe2o3_amqp::Receiver::builder().source(TWIN);
    let attach = builder().name("down").properties(pair("twin:1")).attach(&mut site.session);
    let mut answers = timeout(DEADLINE, attach).await.unwrap().expect("attached");
    // Of the same pair: both stay.
    let attach =
        Sender::builder().name("up").target(TWIN).properties(pair("other:1")).attach(&mut site.session);
    let mut requests = timeout(DEADLINE, attach).await.unwrap().expect("attached");
    ask(&mut requests, "PUT", text_id("1"), "").await;
    receive(&mut answers).await;
    // Of another: the older one of the other direction goes.
    let attach = builder().name("down2").properties(pair("twin:2")).attach(&mut site.session);
    let mut answers2 = timeout(DEADLINE, attach).await.unwrap().expect("attached");
    timeout(DEADLINE, requests.on_detach()).await.expect("in time");
    detached(&mut answers).await;
    let attach =
        Sender::builder().name("up2").target(TWIN).properties(pair("twin:2")).attach(&mut site.session);
    let mut requests2 = timeout(DEADLINE, attach).await.unwrap().expect("attached");
    ask(&mut requests2, "PUT", text_id("2"), "").await;
    assert_eq!(head_of(&receive(&mut answers2).await).0, text_id("2"));
    assert!(site.recording.state.lock().gone.is_empty());
}

#[tokio::test]
async fn answers_wait_for_credit_and_not_without_end() {
    let limits = AmqpLimits { replies_waiting_max: 3, twin_requests_max: 2, ..AmqpLimits::default() };
    let mut site = Site::with(amqp_client::strict(), limits, "d1").await;
    let mut requests = site.sender("up", TWIN).await;
    // Also before there is a link for them.
    ask(&mut requests, "PUT", text_id("0"), "").await;
    let mut answers = site.dry_receiver("down", TWIN).await;
    ask(&mut requests, "PUT", text_id("1"), "").await;
    ask(&mut requests, "PUT", text_id("2"), "").await;
    answers.set_credit(2).await.unwrap();
    for id in ["0", "1"] {
        assert_eq!(head_of(&receive(&mut answers).await).0, text_id(id));
    }
    // Two requests may wait for the backend; the next is refused at once.
    for id in ["a", "b", "c"] {
        ask(&mut requests, "GET", text_id(id), "").await;
    }
    answers.set_credit(2).await.unwrap();
    assert_eq!(head_of(&receive(&mut answers).await).0, text_id("2"));
    assert_eq!(head_of(&receive(&mut answers).await), (text_id("c"), Some(429), None));
    for _ in 0..2 {
        answer(&site, Ok(TwinReply::Patched { version: None })).await;
    }
    for id in ["3", "4"] {
        ask(&mut requests, "PUT", text_id(id), "").await;
    }
    // One too many: whoever takes nothing loses the link, and nothing else.
    let detached = detached(&mut answers).await;
    assert!(detached.contains("ResourceLimitExceeded"), "{detached}");
    let mut answers = site.receiver("down2", TWIN).await;
    ask(&mut requests, "PUT", text_id("5"), "").await;
    assert_eq!(head_of(&receive(&mut answers).await).0, text_id("5"));
}
