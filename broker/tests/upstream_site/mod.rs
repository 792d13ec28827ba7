//! A hub with its upstream, and what is asked of both in tests.
#![allow(dead_code)] // each test program uses a part of it

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{Backend, Credentials, Login, Mailbox, Protocol};
use edgehub_broker::delivery::{BackoffOptions, Losses, ModulePumpOptions};
use edgehub_broker::dial::Transport;
use edgehub_broker::hub::{
    Applied, Authenticating, Authenticator, ControlOptions, Hub, HubClient, HubOptions, LedgerStatus,
};
use edgehub_broker::identity::{
    Authentication, Identity, ScopeCache, ServiceIdentity, Status, SymmetricKey, TokenSource,
};
use edgehub_broker::message::{Message, Properties, PropertyName, SystemProperty};
use edgehub_broker::upstream::control::{Control, Downward, channel};
use edgehub_broker::upstream::{Handle, UpstreamKind, UpstreamOptions, UpstreamStatus, start};
use edgehub_routing::{HubConfig, OverflowPolicy};
use edgehub_storage::clock::ManualTimeSource;
use edgehub_storage::{DeadLetterReason, ReadLimit, Store, StoreLimits, StoreOptions};
use serde_json::json;
use tokio::sync::mpsc;

use super::recording::{DEADLINE, until};

pub(crate) const CLOUD_HOST: &str = "hub1.example.net";
pub(crate) const QUEUE: &str = "iothub";

struct Trusting;

impl Authenticator for Trusting {
    fn authenticate<'a>(&'a self, _: &'a Login) -> Authenticating<'a> {
        Box::pin(std::future::ready(Ok(())))
    }
}

pub(crate) struct Site {
    pub(crate) hub: Hub,
    pub(crate) scope: Arc<ScopeCache>,
    pub(crate) time: Arc<ManualTimeSource>,
}

pub(crate) fn identity(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

/// The record of an identity of edge device `edge1`.
pub(crate) fn record(text: &str) -> ServiceIdentity {
    let edge = !text.contains('/');
    ServiceIdentity {
        identity: identity(text),
        authentication: Authentication::None,
        status: Status::Enabled,
        edge,
        device_scope: edge.then(|| "scope1".into()),
        parent_scopes: Vec::new(),
        generation_id: "1".into(),
    }
}

pub(crate) struct Knobs {
    pub(crate) operation_timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) senders: usize,
    pub(crate) lower_share_percent: u8,
    pub(crate) backoff: BackoffOptions,
    pub(crate) kind: UpstreamKind,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            operation_timeout: DEADLINE,
            idle_timeout: Duration::from_secs(60),
            senders: 0,
            lower_share_percent: 0,
            backoff: BackoffOptions { first: Duration::from_millis(20), max: Duration::from_millis(100) },
            kind: UpstreamKind::Hub,
        }
    }
}

/// What an upstream on a port of this machine is reached with, and the scope that it asks for auth chains.
pub(crate) fn upstream_options(
    port: u16,
    tls: Arc<rustls::ClientConfig>,
    knobs: &Knobs,
) -> (UpstreamOptions, Arc<ScopeCache>) {
    let own = identity("edge1/$edgeHub");
    let scope = ScopeCache::new(&identity("edge1"));
    let mut known: Vec<ServiceIdentity> =
        ["edge1", "edge1/m1", "edge1/m2", "edge1/slow"].into_iter().map(record).collect();
    known.extend((0..knobs.senders).map(|number| record(&format!("edge1/n{number}"))));
    scope.replace_all(known).unwrap();
    let scope = Arc::new(scope);
    let key = SymmetricKey::from_bytes(*b"0123456789abcdef0123456789abcdef").unwrap();
    let options = UpstreamOptions {
        kind: knobs.kind.clone(),
        target: None,
        host: "localhost".into(),
        port,
        transport: Transport::Tls,
        hub_host: CLOUD_HOST.into(),
        tokens: Arc::new(TokenSource::new(CLOUD_HOST, &own, Arc::new(key))),
        identity: own,
        tls,
        scope: scope.clone(),
        client_tokens: None,
        batch_max: 10,
        operation_timeout: knobs.operation_timeout,
        idle_timeout: knobs.idle_timeout,
        backoff: knobs.backoff,
        lower_share_percent: knobs.lower_share_percent,
        gives_up_out_of_scope: true,
        product_info: "test".into(),
    };
    (options, scope)
}

pub(crate) fn memory_store() -> (Store, Arc<ManualTimeSource>) {
    let time = Arc::new(ManualTimeSource::new(1_800_000_000_000));
    (Store::open(StoreOptions { time: time.clone(), ..StoreOptions::memory() }).unwrap(), time)
}

/// An upstream without a hub: the control plane as the hub sees it.
pub(crate) struct Plane {
    pub(crate) control: Control,
    pub(crate) downward: mpsc::Receiver<Downward>,
    pub(crate) handle: Handle,
    pub(crate) scope: Arc<ScopeCache>,
    _store: Store,
}

pub(crate) fn plane(port: u16, tls: Arc<rustls::ClientConfig>, knobs: &Knobs) -> Plane {
    let (options, scope) = upstream_options(port, tls, knobs);
    let (store, _) = memory_store();
    let (control, downward, peer) = channel(DEADLINE);
    let losses = Arc::new(Losses::new(&store));
    let handle = start(options, Some(peer), store.clone(), losses, &tokio::runtime::Handle::current());
    Plane { control, downward, handle, scope, _store: store }
}

impl Plane {
    /// The next that the hub hears.
    pub(crate) async fn hears(&mut self) -> Downward {
        tokio::time::timeout(DEADLINE, self.downward.recv()).await.expect("in time").expect("open")
    }

    pub(crate) fn status(&self) -> UpstreamStatus {
        self.handle.status().borrow().clone()
    }
}

pub(crate) fn site(port: u16, tls: Arc<rustls::ClientConfig>, knobs: &Knobs) -> Site {
    let (upstream, scope) = upstream_options(port, tls, knobs);
    let site = site_on(memory_store(), upstream, scope);
    site.apply(json!({ "up": "FROM /messages/* INTO $upstream" }));
    site
}

/// A hub without routes on a store, which may be that of an earlier one.
pub(crate) fn site_on(
    (store, time): (Store, Arc<ManualTimeSource>),
    upstream: UpstreamOptions,
    scope: Arc<ScopeCache>,
) -> Site {
    let options = HubOptions {
        edge_device: identity("edge1"),
        clients_max: 10_000,
        module_pump: ModulePumpOptions::default(),
        upstream: Some(upstream),
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let hub = Hub::start(options, store, Arc::new(Trusting), tokio::runtime::Handle::current());
    Site { hub, scope, time }
}

impl Site {
    pub(crate) fn apply(&self, routes: serde_json::Value) -> Applied {
        let config = HubConfig::parse(&json!({
            "schemaVersion": "1.1",
            "routes": routes,
            "storeAndForwardConfiguration": { "timeToLiveSecs": 3600 }
        }));
        let applied = self.hub.apply(&config.unwrap()).unwrap();
        assert!(applied.is_complete());
        applied
    }

    pub(crate) async fn connect(&self, sender: &str) -> HubClient {
        let (mailbox, _) = Mailbox::channel(64);
        let login = Login {
            identity: identity(sender),
            credentials: Credentials::None,
            auth_chain: None,
            product_info: "".into(),
            model_id: Some("dtmi:example:model;1".into()),
            protocol: Protocol::Mqtt,
            peer: None,
        };
        self.hub.login(login, mailbox).await.unwrap()
    }

    /// Publishes numbers on an output.
    pub(crate) async fn publish(&self, client: &mut HubClient, output: &str, numbers: std::ops::Range<u32>) {
        let sender = self.hub.sender(client);
        let messages = numbers
            .map(|number| {
                let text = number.to_string();
                let properties = Properties::copied_from([
                    (PropertyName::System(SystemProperty::OutputName), output),
                    (PropertyName::System(SystemProperty::MessageId), text.as_str()),
                    (PropertyName::Application("level"), "hot"),
                ]);
                Message::new(sender.clone(), properties, Bytes::from(text.clone()))
            })
            .collect();
        self.hub.publish(client, messages).await.unwrap().await.unwrap();
    }

    /// Publishes a message of `body_bytes`, with a property of `escapes` bytes that MQTT escapes.
    pub(crate) async fn publish_large(&self, client: &mut HubClient, body_bytes: usize, escapes: usize) {
        let text = "/".repeat(escapes);
        let properties = Properties::copied_from([(PropertyName::Application("level"), text.as_str())]);
        let message = Message::new(self.hub.sender(client), properties, Bytes::from(vec![b'1'; body_bytes]));
        self.hub.publish(client, vec![message]).await.unwrap().await.unwrap();
    }

    /// The account of a queue; nothing may be unexplained anywhere.
    pub(crate) fn ledger(&self, queue: &str) -> LedgerStatus {
        let status = self.hub.status();
        assert!(status.queues.iter().all(|queue| queue.ledger.gap == 0));
        let found = status.queues.into_iter().find(|status| status.queue == queue);
        found.expect("the queue exists").ledger
    }

    pub(crate) fn upstream(&self) -> UpstreamStatus {
        self.hub.status().upstream.unwrap()
    }

    /// Reason and attempts of the dead letters, when there are as many.
    pub(crate) async fn dead_letters(&self, count: usize) -> Vec<(DeadLetterReason, u32)> {
        let limit = ReadLimit { count: 1_000, bytes: 1 << 20 };
        let mut letters = Vec::new();
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while letters.len() < count {
            assert!(tokio::time::Instant::now() < deadline, "{letters:?}");
            self.hub.store().flush().await.unwrap();
            letters = self.hub.store().dead_letters().list(None, limit, None).await.unwrap();
        }
        letters.into_iter().map(|letter| (letter.reason, letter.attempts)).collect()
    }

    pub(crate) async fn delivered(&self, queue: &str, count: u64) {
        // What is given up is settled on its own, not with what was delivered beside it.
        until("delivered", || {
            let ledger = self.ledger(queue);
            ledger.delivered == count && ledger.queued == 0
        })
        .await;
    }
}

/// Nothing is missing and nothing overtakes; what repeats was there before.
pub(crate) fn assert_in_order(numbers: &[u32], count: u32) {
    let mut next = 0;
    for number in numbers {
        assert!(*number <= next, "{number} came before {next} in {numbers:?}");
        next = next.max(number + 1);
    }
    assert_eq!(next, count, "{numbers:?}");
}
