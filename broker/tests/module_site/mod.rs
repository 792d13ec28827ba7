//! A hub with modules on it, through its library interface.
#![allow(dead_code)] // each test program uses a part of it

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, Command, CommandReceiver, Credentials, Deliveries, Login, LoginError, Mailbox, Outcome,
    Protocol, PublishError, Settler, Target,
};
use edgehub_broker::delivery::{BackoffOptions, ModulePumpOptions};
use edgehub_broker::hub::{
    Authenticating, Authenticator, ControlOptions, Hub, HubClient, HubOptions, LedgerStatus,
};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Properties, PropertyName, SystemProperty};
use edgehub_routing::{HubConfig, OverflowPolicy};
use edgehub_storage::clock::ManualTimeSource;
use edgehub_storage::{DeadLetter, ReadLimit, Store, StoreLimits, StoreOptions};
use serde_json::json;

pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Pauses that a test can wait for.
pub(crate) const QUICK: BackoffOptions =
    BackoffOptions { first: Duration::from_millis(5), max: Duration::from_millis(20) };

/// The queue of the input that [`to_filter`] routes to.
pub(crate) const QUEUE: &str = "edge1/filter/in1";

/// Everybody is who they say, but for the device `stranger`.
pub(crate) struct Trusting;

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

pub(crate) struct Setup {
    pub(crate) hub: Hub,
    pub(crate) time: Arc<ManualTimeSource>,
}

pub(crate) fn pump(window: usize, ack_timeout: Duration) -> ModulePumpOptions {
    ModulePumpOptions { window, ack_timeout, backoff: QUICK, ..ModulePumpOptions::default() }
}

pub(crate) fn setup(window: usize, ack_timeout: Duration) -> Setup {
    setup_with(pump(window, ack_timeout), StoreLimits::default())
}

pub(crate) fn setup_with(module_pump: ModulePumpOptions, limits: StoreLimits) -> Setup {
    let time = Arc::new(ManualTimeSource::new(1_800_000_000_000));
    let store = Store::open(StoreOptions { time: time.clone(), ..StoreOptions::memory() }).unwrap();
    let options = HubOptions {
        edge_device: Identity::device("edge1").unwrap(),
        clients_max: 4,
        module_pump,
        upstream: None,
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits,
    };
    let hub = Hub::start(options, store, Arc::new(Trusting), tokio::runtime::Handle::current());
    Setup { hub, time }
}

pub(crate) fn config(routes: serde_json::Value, ttl: i64) -> HubConfig {
    HubConfig::parse(&json!({
        "schemaVersion": "1.1",
        "routes": routes,
        "storeAndForwardConfiguration": { "timeToLiveSecs": ttl }
    }))
    .unwrap()
}

pub(crate) fn to_filter() -> HubConfig {
    let route =
        r#"FROM /messages/modules/sensor/outputs/out INTO BrokeredEndpoint("/modules/filter/inputs/in1")"#;
    config(json!({ "toFilter": route }), 3600)
}

pub(crate) struct Module {
    pub(crate) client: HubClient,
    pub(crate) mailbox: CommandReceiver,
    sender: Mailbox,
}

impl Module {
    /// The way to the module's connection.
    pub(crate) fn client_mailbox(&self) -> Mailbox {
        self.sender.clone()
    }
}

/// Deliveries without any message.
pub(crate) fn nothing() -> Deliveries {
    Deliveries { target: Target::Input("in1".into()), messages: Vec::new(), settler: Settler::new() }
}

pub(crate) async fn connect(hub: &Hub, identity: &str) -> Module {
    let (sender, mailbox) = Mailbox::channel(64);
    let login = Login {
        identity: Identity::parse(identity).unwrap(),
        credentials: Credentials::None,
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Amqp,
        peer: None,
    };
    let client = hub.login(login, sender.clone()).await.unwrap();
    Module { client, mailbox, sender }
}

/// Publishes numbers on the output `out`.
pub(crate) async fn publish(hub: &Hub, module: &mut Module, numbers: Range<u32>) {
    publish_on(hub, module, "out", numbers).await.unwrap();
}

pub(crate) async fn publish_on(
    hub: &Hub,
    module: &mut Module,
    output: &str,
    numbers: Range<u32>,
) -> Result<(), PublishError> {
    let sender = hub.sender(&module.client);
    let messages = numbers
        .map(|number| {
            let text = number.to_string();
            let properties = Properties::copied_from([
                (PropertyName::System(SystemProperty::OutputName), output),
                (PropertyName::Application("number"), text.as_str()),
            ]);
            Message::new(sender.clone(), properties, Bytes::from(text.clone()))
        })
        .collect();
    hub.publish(&mut module.client, messages).await?.await
}

/// The next messages, as the numbers in their bodies, with what settles them.
pub(crate) async fn receive(module: &mut Module) -> (Vec<u32>, Vec<u64>, Settler) {
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

pub(crate) async fn receive_all(module: &mut Module, count: usize) -> Vec<u32> {
    let mut seen = Vec::new();
    while seen.len() < count {
        let (numbers, tags, settler) = receive(module).await;
        seen.extend(numbers);
        settler.settle(tags.into_iter().map(|tag| (tag, Outcome::Accepted)));
    }
    seen
}

pub(crate) fn ledger(hub: &Hub, queue: &str) -> LedgerStatus {
    let status = hub.status();
    let found = status.queues.into_iter().find(|status| status.queue == queue).expect("the queue exists");
    assert_eq!(found.ledger.gap, 0);
    found.ledger
}

/// Lets time pass at once, so that what waits for an answer is late: a time to answer that a test can wait for is one that
/// a slow machine misses.
pub(crate) async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

pub(crate) async fn until(mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "the condition did not come true in time");
        tokio::task::yield_now().await;
    }
}

/// The numbers in the bodies of deliveries, with what settles them.
pub(crate) fn numbers(deliveries: &Deliveries) -> Vec<(u64, u32)> {
    let number = |message: &Message| std::str::from_utf8(&message.body).unwrap().parse().unwrap();
    deliveries.messages.iter().map(|(tag, message)| (*tag, number(message))).collect()
}

/// All dead letters, when there are as many; what waits to be written is.
pub(crate) async fn dead_letters(hub: &Hub, count: usize) -> Vec<DeadLetter> {
    let limit = ReadLimit { count: 10_000, bytes: 64 << 20 };
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        hub.store().flush().await.unwrap();
        let letters = hub.store().dead_letters().list(None, limit, None).await.unwrap();
        if letters.len() >= count {
            return letters;
        }
        assert!(tokio::time::Instant::now() < deadline, "{} dead letters", letters.len());
    }
}
