//! What the hub shows of itself.

use edgehub_storage::{DropReason, HubLedger, Ledger, Queue, Space, SpaceState, StoreTime};
use metrics::{counter, gauge};
use serde::Serialize;

use super::Hub;
use crate::dispatch::split_queue_name;
use crate::upstream::UpstreamStatus;
use crate::upstream::targets::TargetStatus;

/// The state of a hub at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// The edge device.
    pub device: String,
    /// Open client connections.
    pub clients: Vec<ClientStatus>,
    /// The way up; absent without one.
    pub upstream: Option<UpstreamStatus>,
    /// The ways to targets of their own at the upstream, by target; absent without any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub upstream_targets: Vec<TargetStatus>,
    /// The level at which publishers are acknowledged.
    pub durability: &'static str,
    /// All queues, detached ones included.
    pub queues: Vec<QueueStatus>,
    /// What could not be delivered and was kept.
    pub dead_letters: DeadLetterStatus,
    /// How much room there is.
    pub space: SpaceStatus,
    /// Accepted messages that no route took, since the store was made.
    pub unrouted: u64,
    /// What the ledger of the whole store leaves unexplained; 0 in a sound store.
    pub gap: i128,
}

/// A connected client.
#[derive(Debug, Clone, Serialize)]
pub struct ClientStatus {
    /// Its identity.
    pub id: String,
}

/// A queue and its account.
#[derive(Debug, Clone, Serialize)]
pub struct QueueStatus {
    /// Its name.
    pub queue: String,
    /// The endpoint it belongs to.
    pub endpoint: String,
    /// Its priority.
    pub priority: u32,
    /// Whether no route leads to its endpoint at present.
    pub detached: bool,
    /// How long the oldest message waits, in seconds; absent when none does. Looked up every few seconds.
    pub oldest_age_secs: Option<u64>,
    /// What became of its messages.
    pub ledger: LedgerStatus,
}

/// The dead letters of the store.
#[derive(Debug, Clone, Serialize)]
pub struct DeadLetterStatus {
    /// Messages that are there.
    pub count: u64,
    /// How long the oldest is there, in seconds; absent when there is none. Looked up every few seconds.
    pub oldest_age_secs: Option<u64>,
}

/// How much room the store has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SpaceStatus {
    /// What it takes up, in bytes.
    pub used_bytes: u64,
    /// Its limit; absent without one.
    pub max_bytes: Option<u64>,
    /// What is free in its file system; absent for a store in memory.
    pub free_bytes: Option<u64>,
    /// Why new messages are refused, and what to do; absent while they are not.
    pub full: Option<String>,
}

impl From<Space> for SpaceStatus {
    fn from(space: Space) -> Self {
        let full = match space.state {
            SpaceState::Open => None,
            SpaceState::Full { reason } => Some(format!("the store is full: {reason}")),
        };
        Self { used_bytes: space.used_bytes, max_bytes: space.max_bytes, free_bytes: space.free_bytes, full }
    }
}

/// The account of a queue: `accepted = delivered + expired + dropped + dead_lettered + queued + gap`.
#[derive(Debug, Clone, Serialize)]
pub struct LedgerStatus {
    /// Messages that were appended.
    pub accepted: u64,
    /// Messages that were delivered.
    pub delivered: u64,
    /// Messages whose time to live ended first.
    pub expired: u64,
    /// Messages that were dropped, by reason; reasons without any are left out.
    pub dropped: std::collections::BTreeMap<&'static str, u64>,
    /// Messages in the dead-letter queue.
    pub dead_lettered: u64,
    /// Messages that wait.
    pub queued: u64,
    /// What the equation leaves unexplained; 0 in a sound store.
    pub gap: i128,
}

impl From<Ledger> for LedgerStatus {
    fn from(ledger: Ledger) -> Self {
        let dropped = DropReason::ALL.iter().map(|reason| (reason.as_str(), ledger.dropped(*reason)));
        Self {
            accepted: ledger.accepted(),
            delivered: ledger.delivered(),
            expired: ledger.expired(),
            dropped: dropped.filter(|(_, count)| *count > 0).collect(),
            dead_lettered: ledger.dead_lettered(),
            queued: ledger.queued(),
            gap: ledger.gap(),
        }
    }
}

impl Hub {
    /// The state at this moment.
    pub fn status(&self) -> Status {
        let routing = self.inner.dispatch.routing();
        let attached = |endpoint: &str| routing.plans().iter().any(|plan| *plan.endpoint.id == *endpoint);
        let now = self.inner.store.now();
        let queues = self.inner.store.queues();
        let queues = queues.iter().map(|queue| self.queue_status(queue, &attached, now)).collect();
        let mut clients: Vec<ClientStatus> =
            self.inner.clients.iter().map(|entry| ClientStatus { id: entry.key().to_string() }).collect();
        clients.sort_by(|a, b| a.id.cmp(&b.id));
        let ledger = self.inner.store.hub_ledger();
        Status {
            device: self.inner.edge_device.to_string(),
            clients,
            upstream: self.upstream().map(|status| status.borrow().clone()),
            upstream_targets: self.inner.target_statuses(),
            durability: self.inner.store.durability_level(),
            queues,
            dead_letters: DeadLetterStatus {
                count: ledger.dead_letters().queued(),
                oldest_age_secs: self.dead_letter_age(&ledger, now).map(|millis| millis / 1_000),
            },
            space: self.inner.store.space().into(),
            unrouted: ledger.unrouted(),
            gap: ledger.gap(),
        }
    }

    /// What an operator should look at, one sentence each, with the next step. Nothing here keeps the hub from
    /// serving: with a full store it still delivers.
    pub fn warnings(&self) -> Vec<String> {
        SpaceStatus::from(self.inner.store.space()).full.into_iter().collect()
    }

    /// Sets the gauges and counters that are derived from the store; call it before the metrics are rendered.
    pub fn observe(&self) {
        let store = &self.inner.store;
        self.inner.losses.observe(store);
        let now = store.now();
        for queue in store.queues() {
            self.observe_queue(&queue, now);
        }
        let ledger = store.hub_ledger();
        gauge!("edgehub_clock_skew_seconds").set(store.wall_skew_ms() as f64 / 1_000.0);
        gauge!("edgehub_ledger_gap").set(ledger.gap() as f64);
        gauge!("edgehub_dead_letters").set(ledger.dead_letters().queued() as f64);
        let age = self.dead_letter_age(&ledger, now).unwrap_or_default();
        gauge!("edgehub_dead_letters_oldest_age_seconds").set(age as f64 / 1_000.0);
        let space = store.space();
        gauge!("edgehub_store_used_bytes").set(space.used_bytes as f64);
        // 0 says that there is no limit, so that a limit which was lifted does not stay on the page.
        gauge!("edgehub_store_limit_bytes").set(space.max_bytes.unwrap_or_default() as f64);
        if let Some(free_bytes) = space.free_bytes {
            gauge!("edgehub_store_free_bytes").set(free_bytes as f64);
        }
        let full = matches!(space.state, SpaceState::Full { .. });
        gauge!("edgehub_store_full").set(if full { 1.0 } else { 0.0 });
        let sizes = self.inner.store.sizes();
        gauge!("edgehub_store_size_bytes", "kind" => "tables").set(sizes.table_bytes as f64);
        gauge!("edgehub_store_size_bytes", "kind" => "write_buffers").set(sizes.write_buffer_bytes as f64);
        gauge!("edgehub_store_size_bytes", "kind" => "ring").set(sizes.ring_bytes as f64);
        gauge!("edgehub_connected_clients").set(self.inner.clients.len() as f64);
    }
}

impl Hub {
    fn queue_status(&self, queue: &Queue, attached: &impl Fn(&str) -> bool, now: StoreTime) -> QueueStatus {
        let (endpoint, priority) = split_queue_name(queue.name());
        let ledger = queue.ledger();
        QueueStatus {
            queue: queue.name().to_owned(),
            endpoint: endpoint.to_owned(),
            priority,
            detached: !attached(endpoint),
            oldest_age_secs: self.queue_age(queue, &ledger, now).map(|millis| millis / 1_000),
            ledger: ledger.into(),
        }
    }

    fn observe_queue(&self, queue: &Queue, now: StoreTime) {
        let (endpoint, priority) = split_queue_name(queue.name());
        let labels = [("endpoint", endpoint.to_owned()), ("priority", priority.to_string())];
        let ledger = queue.ledger();
        gauge!("edgehub_queue_length", &labels).set(ledger.queued() as f64);
        let age = self.queue_age(queue, &ledger, now).unwrap_or_default();
        gauge!("edgehub_oldest_message_age_seconds", &labels).set(age as f64 / 1_000.0);
        counter!("edgehub_ledger_accepted_total", &labels).absolute(ledger.accepted());
        let settled = |outcome: &'static str, messages: u64| {
            let [endpoint, priority] = labels.clone();
            counter!("edgehub_ledger_settled_total", &[endpoint, priority, ("outcome", outcome.to_owned())])
                .absolute(messages);
        };
        settled("delivered", ledger.delivered());
        settled("expired", ledger.expired());
        settled("dead_lettered", ledger.dead_lettered());
        for reason in DropReason::ALL {
            // A reason that never occurred is not worth a series per queue.
            match ledger.dropped(reason) {
                0 => {}
                messages => settled(reason.as_str(), messages),
            }
        }
    }

    /// How long the oldest message of a queue waits, in milliseconds.
    fn queue_age(&self, queue: &Queue, ledger: &Ledger, now: StoreTime) -> Option<u64> {
        let at = self.inner.ages.of_queue(queue.id()).filter(|_| ledger.queued() > 0)?;
        Some(now.millis_since(at))
    }

    fn dead_letter_age(&self, ledger: &HubLedger, now: StoreTime) -> Option<u64> {
        let at = self.inner.ages.of_dead_letters().filter(|_| ledger.dead_letters().queued() > 0)?;
        Some(now.millis_since(at))
    }
}
