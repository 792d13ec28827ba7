//! The orderly end of the traffic: publishers first, then what is under way.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::Hub;
use super::control::Owed;
use crate::backend::{CloseReason, Command, Mailbox};
use crate::dispatch::split_queue_name;
use crate::identity::Identity;

/// A queue that gets no answer for this long has nobody who would give one; waiting longer only makes the stop late. So it
/// is with messages from the cloud, which come again. The caller of a method waits for an answer that comes once.
const STALLED: Duration = Duration::from_secs(5);
/// Pause between two looks at the queues.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// What is left when the traffic has ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remainder {
    /// Messages that stay stored, by queue; empty queues are left out.
    pub queues: BTreeMap<String, u64>,
    /// Whether everything that could be delivered was, and everything answered.
    pub complete: bool,
}

impl Hub {
    /// No message is accepted from here on: clients that only publish are closed, new ones are refused, and one that
    /// takes messages, or owes the answer of a method or of a message from the cloud, may go on until it publishes. No
    /// method is called any more. Then what is queued for those who are there is delivered, and answers come in, until
    /// nothing is left, nothing moves, or the limit ends.
    pub async fn drain(&self, limit: Duration) -> Remainder {
        let end = Instant::now() + limit;
        self.inner.stopping.store(true, Ordering::Relaxed);
        self.inner.control.refuse();
        let clients = self.inner.clients.iter();
        let open: Vec<(Identity, u64, Mailbox)> =
            clients.map(|entry| (entry.key().clone(), entry.connection, entry.mailbox.clone())).collect();
        // Looked at when no guard of the other map is held.
        let is_busy = |identity: &Identity, connection| {
            self.inner.presence.is_taken_by(identity, connection)
                || self.inner.control.owes(identity, connection)
        };
        let publishers = open.into_iter().filter(|(identity, connection, _)| !is_busy(identity, *connection));
        let closing = async {
            for (_, _, mailbox) in publishers {
                // A connection that is gone already has no use for the command.
                let _ = mailbox.send(Command::Close(CloseReason::Stopping)).await;
            }
        };
        let _ = timeout(limit, closing).await;
        let progress = || (self.settled(), self.inner.control.owed());
        let (mut last, mut moved_at) = (progress(), Instant::now());
        let complete = loop {
            let (now, current) = (Instant::now(), progress());
            let (_, owed) = current;
            if owed == (Owed { calls: 0, commands: 0 }) && self.deliverable() == 0 {
                break true;
            }
            if current != last {
                (last, moved_at) = (current, now);
            }
            let stalled = owed.calls == 0 && now.duration_since(moved_at) >= STALLED;
            if now >= end || stalled {
                break false;
            }
            sleep(LOOK_PAUSE).await;
        };
        Remainder { complete, ..self.remainder() }
    }

    /// What every queue holds.
    pub fn remainder(&self) -> Remainder {
        let queues = self.inner.store.queues();
        let queued = queues.iter().map(|queue| (queue.name().to_owned(), queue.ledger().queued()));
        Remainder { queues: queued.filter(|(_, count)| *count > 0).collect(), complete: false }
    }

    /// Messages whose receiver is there.
    fn deliverable(&self) -> u64 {
        let routing = self.inner.dispatch.routing();
        let up = self.upstream().is_some_and(|status| status.borrow().state.is_up());
        let targets = self.inner.targets_up();
        let edge = self.inner.edge_device.device_id();
        let is_there = |endpoint: &str| {
            let plan = routing.plans().iter().find(|plan| *plan.endpoint.id == *endpoint);
            match plan.map(|plan| &plan.endpoint.sink) {
                Some(edgehub_routing::Sink::Upstream) => up,
                Some(edgehub_routing::Sink::UpstreamTarget(target)) => {
                    targets.iter().any(|other| other.as_str() == &**target)
                }
                Some(edgehub_routing::Sink::ModuleInput { module, .. }) => {
                    Identity::module(edge, module).is_ok_and(|module| self.inner.presence.is_there(&module))
                }
                None => false,
            }
        };
        let queues = self.inner.store.queues();
        let served = queues.iter().filter(|queue| is_there(split_queue_name(queue.name()).0));
        served.map(|queue| queue.ledger().queued()).sum()
    }

    /// Messages that have come to their end in any way.
    fn settled(&self) -> u64 {
        let queues = self.inner.store.queues();
        let ended = |queue: &edgehub_storage::Queue| {
            let ledger = queue.ledger();
            ledger.accepted() - ledger.queued()
        };
        queues.iter().map(ended).sum()
    }
}
