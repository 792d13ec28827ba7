//! What the hub shows of itself.

use edgehub_storage::{DropReason, Ledger, Queue};
use metrics::gauge;
use serde::Serialize;

use super::Hub;
use crate::dispatch::split_queue_name;
use crate::upstream::UpstreamStatus;

/// The state of a hub at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// The edge device.
    pub device: String,
    /// Open client connections.
    pub clients: Vec<ClientStatus>,
    /// The way up; absent without one.
    pub upstream: Option<UpstreamStatus>,
    /// The level at which publishers are acknowledged.
    pub durability: &'static str,
    /// All queues, detached ones included.
    pub queues: Vec<QueueStatus>,
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
    /// What became of its messages.
    pub ledger: LedgerStatus,
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
        let queues = self.inner.store.queues();
        let queues = queues.iter().map(|queue| queue_status(queue, &attached)).collect();
        let mut clients: Vec<ClientStatus> =
            self.inner.clients.iter().map(|entry| ClientStatus { id: entry.key().to_string() }).collect();
        clients.sort_by(|a, b| a.id.cmp(&b.id));
        let ledger = self.inner.store.hub_ledger();
        Status {
            device: self.inner.edge_device.to_string(),
            clients,
            upstream: self.upstream().map(|status| status.borrow().clone()),
            durability: self.inner.store.durability_level(),
            queues,
            unrouted: ledger.unrouted(),
            gap: ledger.gap(),
        }
    }

    /// Sets the gauges that are derived from the store; call it before the metrics are rendered.
    pub fn observe(&self) {
        for queue in self.inner.store.queues() {
            let (endpoint, priority) = split_queue_name(queue.name());
            gauge!(
                "edgehub_queue_length",
                "endpoint" => endpoint.to_owned(), "priority" => priority.to_string()
            )
            .set(queue.ledger().queued() as f64);
        }
        let sizes = self.inner.store.sizes();
        gauge!("edgehub_store_size_bytes", "kind" => "tables").set(sizes.table_bytes as f64);
        gauge!("edgehub_store_size_bytes", "kind" => "write_buffers").set(sizes.write_buffer_bytes as f64);
        gauge!("edgehub_store_size_bytes", "kind" => "ring").set(sizes.ring_bytes as f64);
        gauge!("edgehub_connected_clients").set(self.inner.clients.len() as f64);
    }
}

fn queue_status(queue: &Queue, attached: &impl Fn(&str) -> bool) -> QueueStatus {
    let (endpoint, priority) = split_queue_name(queue.name());
    QueueStatus {
        queue: queue.name().to_owned(),
        endpoint: endpoint.to_owned(),
        priority,
        detached: !attached(endpoint),
        ledger: queue.ledger().into(),
    }
}
