//! The hub through its library interface: routes, module inputs, order, windows, retries, take-over, configuration.

// What a test sets up and cannot have is a failure of the test, with its place.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, CloseReason, Command, Credentials, Deliveries, Feature, Login, LoginError, Outcome, Protocol,
    Settler,
};
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::hub::{Authenticating, Authenticator, Hub, HubClient, HubOptions, LedgerStatus};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Properties, PropertyName, SystemProperty};
use edgehub_routing::HubConfig;
use edgehub_storage::clock::ManualTimeSource;
use edgehub_storage::{Store, StoreOptions};
use serde_json::json;
use tokio::sync::mpsc;

const DEADLINE: Duration = Duration::from_secs(20);

/// Everybody is who they say, but for the device `stranger`.
struct Trusting;

impl Authenticator for Trusting {
    fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a> {
        Box::pin(async move {
            match login.identity.device_id() {
                "stranger" => Err(LoginError::Refused("unknown".into())),
                _ => Ok(()),
            }
        })
    }
}

struct Setup {
    hub: Hub,
    time: Arc<ManualTimeSource>,
}

fn setup(window: usize, ack_timeout: Duration) -> Setup {
    let time = Arc::new(ManualTimeSource::new(1_800_000_000_000));
    let store = Store::open(StoreOptions { time: time.clone(), ..StoreOptions::memory() }).unwrap();
    let options = HubOptions {
        edge_device: Identity::device("edge1").unwrap(),
        clients_max: 4,
        module_pump: ModulePumpOptions { window, ack_timeout },
        upstream: None,
    };
    let hub = Hub::start(options, store, Arc::new(Trusting), tokio::runtime::Handle::current());
    Setup { hub, time }
}

fn config(routes: serde_json::Value, ttl: i64) -> HubConfig {
    HubConfig::parse(&json!({
        "schemaVersion": "1.1",
        "routes": routes,
        "storeAndForwardConfiguration": { "timeToLiveSecs": ttl }
    }))
    .unwrap()
}

fn to_filter() -> HubConfig {
    let route =
        r#"FROM /messages/modules/sensor/outputs/out INTO BrokeredEndpoint("/modules/filter/inputs/in1")"#;
    config(json!({ "toFilter": route }), 3600)
}

struct Module {
    client: HubClient,
    mailbox: mpsc::Receiver<Command>,
}

async fn connect(hub: &Hub, identity: &str) -> Module {
    let (sender, mailbox) = mpsc::channel(64);
    let login = Login {
        identity: Identity::parse(identity).unwrap(),
        credentials: Credentials::None,
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Mqtt,
        peer: None,
    };
    let client = hub.login(login, sender).await.unwrap();
    Module { client, mailbox }
}

async fn publish(hub: &Hub, module: &mut Module, numbers: std::ops::Range<u32>) {
    let sender = hub.sender(&module.client);
    let messages = numbers
        .map(|number| {
            let text = number.to_string();
            let properties = Properties::copied_from([
                (PropertyName::System(SystemProperty::OutputName), "out"),
                (PropertyName::Application("number"), text.as_str()),
            ]);
            Message::new(sender.clone(), properties, Bytes::from(text.clone()))
        })
        .collect();
    hub.publish(&mut module.client, messages).await.unwrap().await.unwrap();
}

/// The next messages, as the numbers in their bodies, with what settles them.
async fn receive(module: &mut Module) -> (Vec<u32>, Vec<u64>, Settler) {
    match tokio::time::timeout(DEADLINE, module.mailbox.recv()).await.expect("a delivery in time") {
        Some(Command::Deliver(Deliveries { messages, settler, .. })) => {
            let tags = messages.iter().map(|(tag, _)| *tag).collect();
            let numbers = messages
                .iter()
                .map(|(_, message)| std::str::from_utf8(&message.body).unwrap().parse().unwrap())
                .collect();
            (numbers, tags, settler)
        }
        other => panic!("a delivery was expected, not {other:?}"),
    }
}

async fn receive_all(module: &mut Module, count: usize) -> Vec<u32> {
    let mut seen = Vec::new();
    while seen.len() < count {
        let (numbers, tags, settler) = receive(module).await;
        seen.extend(numbers);
        settler.settle(tags.into_iter().map(|tag| (tag, Outcome::Accepted)));
    }
    seen
}

fn ledger(hub: &Hub, queue: &str) -> LedgerStatus {
    let status = hub.status();
    assert_eq!(status.gap, 0);
    let found = status.queues.into_iter().find(|status| status.queue == queue).expect("the queue exists");
    assert_eq!(found.ledger.gap, 0);
    found.ledger
}

async fn until(mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "the condition did not come true in time");
        tokio::task::yield_now().await;
    }
}

const QUEUE: &str = "edge1/filter/in1";

#[tokio::test]
async fn messages_of_an_output_reach_the_input_in_order_and_within_the_window() {
    let Setup { hub, .. } = setup(4, DEADLINE);
    assert!(hub.apply(&to_filter()).unwrap().is_complete());
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..10).await;
    let mut filter = connect(&hub, "edge1/filter").await;
    assert_eq!(ledger(&hub, QUEUE).queued, 10, "nothing goes to a module without a subscription");
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    let (first, tags, settler) = receive(&mut filter).await;
    assert_eq!(first, [0, 1, 2, 3]);
    assert!(filter.mailbox.try_recv().is_err(), "the window is full");
    settler.settle([(tags[1], Outcome::Accepted), (tags[0], Outcome::Accepted)]);
    let (next, more, _) = receive(&mut filter).await;
    assert_eq!(next, [4, 5]);
    settler.settle(tags[2..].iter().chain(&more).map(|tag| (*tag, Outcome::Accepted)));
    assert_eq!(receive_all(&mut filter, 4).await, [6, 7, 8, 9]);
    until(|| ledger(&hub, QUEUE).delivered == 10).await;
    assert_eq!(ledger(&hub, QUEUE).queued, 0);
}

#[tokio::test]
async fn what_was_not_answered_is_offered_again_in_order_to_the_next_connection() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    publish(&hub, &mut sensor, 0..5).await;
    let mut seen = Vec::new();
    let mut all = Vec::new();
    let mut last = None;
    while seen.len() < 5 {
        let (numbers, tags, settler) = receive(&mut filter).await;
        seen.extend(numbers);
        all.extend(tags);
        last = Some(settler);
    }
    last.unwrap().settle([(all[0], Outcome::Accepted), (all[3], Outcome::Accepted)]);
    until(|| ledger(&hub, QUEUE).delivered == 2).await;
    drop(filter);
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    assert_eq!(receive_all(&mut filter, 3).await, [1, 2, 4]);
    until(|| ledger(&hub, QUEUE).delivered == 5).await;
}

#[tokio::test]
async fn a_released_or_late_message_comes_again_and_a_rejected_one_is_counted() {
    let Setup { hub, .. } = setup(16, Duration::from_millis(300));
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    publish(&hub, &mut sensor, 0..1).await;
    let (_, tags, settler) = receive(&mut filter).await;
    settler.settle([(tags[0], Outcome::Released)]);
    let (again, _, _late) = receive(&mut filter).await;
    assert_eq!(again, [0]);
    let (after_time_out, tags, settler) = receive(&mut filter).await;
    assert_eq!(after_time_out, [0]);
    settler.settle([(tags[0], Outcome::Rejected)]);
    until(|| ledger(&hub, QUEUE).dropped.get("rejected_by_receiver") == Some(&1)).await;
    publish(&hub, &mut sensor, 1..3).await;
    assert_eq!(receive_all(&mut filter, 2).await, [1, 2]);
}

#[tokio::test]
async fn a_newer_connection_takes_over_and_strangers_are_refused() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut old = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut old.client, Feature::ModuleInputs, true);
    let mut new = connect(&hub, "edge1/filter").await;
    assert!(matches!(old.mailbox.recv().await, Some(Command::Close(CloseReason::TakenOver))));
    hub.subscribe(&mut new.client, Feature::ModuleInputs, true);
    drop(old);
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..2).await;
    assert_eq!(receive_all(&mut new, 2).await, [0, 1]);
    assert_eq!(hub.status().clients.len(), 2);

    let (sender, _mailbox) = mpsc::channel(1);
    let login = Login {
        identity: Identity::device("stranger").unwrap(),
        credentials: Credentials::None,
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Mqtt,
        peer: None,
    };
    assert!(matches!(hub.login(login.clone(), sender.clone()).await, Err(LoginError::Refused(_))));
    let _others = [connect(&hub, "leaf1").await, connect(&hub, "leaf2").await];
    let one_more = Login { identity: Identity::device("leaf3").unwrap(), ..login };
    assert!(matches!(hub.login(one_more, sender).await, Err(LoginError::Unavailable(_))));
}

#[tokio::test]
async fn what_waits_too_long_expires_and_is_counted() {
    let Setup { hub, time } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..3).await;
    time.advance(3_600_000);
    publish(&hub, &mut sensor, 3..4).await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    assert_eq!(receive_all(&mut filter, 1).await, [3]);
    until(|| ledger(&hub, QUEUE).delivered == 1).await;
    assert_eq!(ledger(&hub, QUEUE).expired, 3);
}

#[tokio::test]
async fn what_no_route_takes_is_accepted_and_counted() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&config(json!({}), 10)).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..7).await;
    assert_eq!(hub.status().unrouted, 7);
    assert!(hub.status().queues.is_empty());
}

#[tokio::test]
async fn a_bad_route_keeps_its_last_good_version_and_a_removed_one_keeps_its_messages() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..2).await;

    let broken =
        config(json!({ "toFilter": "FROM /messages/* INTO nowhere", "up": "FROM /* INTO $upstream" }), 10);
    let applied = hub.apply(&broken).unwrap();
    assert_eq!(applied.kept, ["toFilter"]);
    assert_eq!(applied.routes, ["toFilter", "up"]);
    assert_eq!(applied.rejected.len(), 1);
    publish(&hub, &mut sensor, 2..3).await;
    assert_eq!(ledger(&hub, QUEUE).queued, 3);

    hub.apply(&config(json!({}), 10)).unwrap();
    publish(&hub, &mut sensor, 3..4).await;
    let detached = hub.status().queues.into_iter().find(|status| status.queue == QUEUE).unwrap();
    assert!(detached.detached);
    assert_eq!(detached.ledger.queued, 3);

    hub.apply(&to_filter()).unwrap();
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    assert_eq!(receive_all(&mut filter, 3).await, [0, 1, 2]);

    let no_ttl = HubConfig::parse(&json!({
        "schemaVersion": "1.0", "routes": {}, "storeAndForwardConfiguration": {}
    }));
    assert!(hub.apply(&no_ttl.unwrap()).is_err());
}

#[tokio::test]
async fn lints_come_with_the_configuration_and_refuse_routes_only_when_they_are_errors() {
    let Setup { hub, .. } = setup(1, DEADLINE);
    let document = config(
        json!({
            "late": "FROM /messages/* INTO $upstream WHERE level = 'hot'",
            "sound": "FROM /messages/* INTO $upstream",
        }),
        60,
    );
    let applied = hub.apply(&document).unwrap();
    assert_eq!(applied.routes, ["late", "sound"]);
    let lints: Vec<_> = applied.lints.iter().map(|lint| (lint.route.as_str(), lint.code.name())).collect();
    assert_eq!(lints, [("late", "trailing-text")]);
    // The version before was good, so it stays.
    let applied = hub.apply(&document.clone().with_lints_as_errors()).unwrap();
    assert_eq!((applied.routes.len(), applied.kept, applied.lints.len()), (2, vec!["late".to_owned()], 0));
    assert_eq!(applied.malformed[0].category.name(), "route-lint");

    let Setup { hub, .. } = setup(1, DEADLINE);
    let applied = hub.apply(&document.with_lints_as_errors()).unwrap();
    assert_eq!(applied.routes, ["sound"]);
}
