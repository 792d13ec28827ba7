//! What an operator does with a running hub: look at clients and messages, send a client away, stop it in order.

// What a test sets up and cannot have is a failure of the test, with its place.
#![allow(clippy::unwrap_used)]

mod module_site;

use std::time::Duration;

use edgehub_broker::backend::{
    Backend, CloseReason, Command, Feature, LoginError, Mailbox, Outcome, Protocol,
};
use edgehub_broker::dispatch::{TapError, TapOptions};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, SenderCache};
use module_site::{
    DEADLINE, QUEUE, Setup, config, connect, publish, publish_on, receive, setup, to_filter, until,
};
use serde_json::json;

#[tokio::test]
async fn a_drain_ends_publishers_and_lets_consumers_finish() {
    let Setup { hub, .. } = setup(4, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    publish(&hub, &mut sensor, 0..6).await;
    let (first, tags, settler) = receive(&mut filter).await;
    let draining = tokio::spawn({
        let hub = hub.clone();
        async move { hub.drain(DEADLINE).await }
    });
    assert!(matches!(sensor.mailbox.recv().await, Some(Command::Close(CloseReason::Stopping))));
    assert!(publish_on(&hub, &mut sensor, "out", 6..7).await.is_err(), "nothing is accepted any more");
    let (sender, _mailbox) = Mailbox::channel(1);
    let login = edgehub_broker::backend::Login {
        identity: Identity::device("leaf1").unwrap(),
        credentials: edgehub_broker::backend::Credentials::None,
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Mqtt,
        peer: None,
    };
    assert!(matches!(hub.login(login, sender).await, Err(LoginError::Unavailable(_))));
    assert!(!draining.is_finished(), "what is under way is waited for");
    settler.settle(tags.into_iter().map(|tag| (tag, Outcome::Accepted)));
    let mut seen = first;
    while seen.len() < 6 {
        let (numbers, tags, settler) = receive(&mut filter).await;
        seen.extend(numbers);
        settler.settle(tags.into_iter().map(|tag| (tag, Outcome::Accepted)));
    }
    assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
    let left = draining.await.unwrap();
    assert!(left.complete && left.queues.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_drain_waits_for_nobody_who_is_away_and_says_what_is_left() {
    let Setup { hub, .. } = setup(4, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..3).await;
    let left = hub.drain(DEADLINE).await;
    assert!(left.complete, "nothing of it could be delivered");
    assert_eq!(left.queues.into_iter().collect::<Vec<_>>(), [(QUEUE.to_owned(), 3)]);
}

#[tokio::test]
async fn a_consumer_that_never_answers_does_not_hold_a_stop() {
    let Setup { hub, .. } = setup(4, Duration::from_secs(1_000));
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    publish(&hub, &mut sensor, 0..3).await;
    let _unanswered = receive(&mut filter).await;
    // Without the rule that nothing moves, this would outlast the test.
    let left = tokio::time::timeout(DEADLINE, hub.drain(Duration::from_secs(3_600))).await.unwrap();
    assert!(!left.complete && left.queues.get(QUEUE) == Some(&3), "{left:?}");
    assert!(!hub.drain(Duration::ZERO).await.complete);
}

#[tokio::test]
async fn clients_are_shown_and_sent_away() {
    let Setup { hub, .. } = setup(4, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let _leaf = connect(&hub, "leaf1").await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    let shown: Vec<_> = hub
        .clients()
        .into_iter()
        .map(|client| (client.identity.to_string(), client.protocol, client.takes_inputs))
        .collect();
    assert_eq!(
        shown,
        [("edge1/filter".into(), Protocol::Amqp, true), ("leaf1".into(), Protocol::Amqp, false)]
    );
    let filter_id = Identity::module("edge1", "filter").unwrap();
    assert!(hub.client(&filter_id).unwrap().takes_inputs);
    assert!(hub.kick(&filter_id));
    assert!(matches!(filter.mailbox.recv().await, Some(Command::Close(CloseReason::Kicked))));
    drop(filter);
    assert_eq!(hub.client(&filter_id), None);
    assert!(!hub.kick(&filter_id));
}

#[tokio::test]
async fn a_tap_sees_what_passes_and_changes_nothing() {
    let Setup { hub, .. } = setup(4, DEADLINE);
    let route =
        r#"FROM /messages/modules/sensor/outputs/out INTO BrokeredEndpoint("/modules/filter/inputs/in1")"#;
    hub.apply(&config(json!({ "toFilter": route }), 3600)).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let options = |condition: &str| TapOptions { condition: Some(condition.into()), source: None };
    assert!(matches!(hub.tap(&options("number =")), Err(TapError::Condition(_))));
    let mut tap = hub.tap(&options("number = '2' OR number = '5'")).unwrap();
    publish(&hub, &mut sensor, 0..4).await;
    publish_on(&hub, &mut sensor, "elsewhere", 5..6).await.unwrap();
    for (body, endpoints) in [("2", vec![QUEUE]), ("5", vec![])] {
        let tapped = tap.next().await.unwrap();
        let message = Message::from_record(&tapped.record, &mut SenderCache::default()).unwrap();
        assert_eq!(&message.body[..], body.as_bytes());
        assert_eq!(tapped.endpoints.iter().map(|id| &**id).collect::<Vec<_>>(), endpoints);
    }
    assert_eq!((tap.matched(), tap.left_out()), (2, 0));
    drop(tap);
    publish(&hub, &mut sensor, 2..3).await;
    until(|| module_site::ledger(&hub, QUEUE).queued == 5).await;
}
