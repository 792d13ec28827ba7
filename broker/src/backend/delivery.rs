//! Messages on their way to a client, and what became of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::message::Message;

/// What of a client messages are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An input of the module, by its name.
    Input(Arc<str>),
    /// The device itself: cloud-to-device messages. Their [`Message::sender`] is the device, and is not written.
    Device,
}

/// Messages for one target of a client, in order.
#[derive(Debug)]
pub struct Deliveries {
    /// What they are for.
    pub target: Target,
    /// The messages with their tags; tags name them to the settler.
    pub messages: Vec<(u64, Message)>,
    /// Where the outcomes go.
    pub settler: Settler,
}

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The receiver has it.
    Accepted,
    /// The receiver will never take it: AMQP `rejected`, or `modified` with undeliverable-here.
    Rejected,
    /// The receiver gave it back: AMQP `released`, or `modified` without undeliverable-here. It is offered again,
    /// a limited number of times.
    Released,
    /// It did not reach the receiver, which takes nothing from this input at present, or whose link is gone. It is
    /// offered again, however often that takes.
    NotOffered,
    /// The head cannot put it into its protocol, now or later.
    NotConvertible,
    /// Its time ended ([`Message::expires_at`]) while the head kept it back; it was not sent.
    Expired,
}

/// Takes the outcomes of deliveries back to the pump that made them. Cheap to clone; never blocks.
///
/// Bounded by the pump's window: a pump accepts one outcome per delivery that it has out.
#[derive(Clone, Debug, Default)]
pub struct Settler {
    shared: Arc<SettlerShared>,
}

#[derive(Debug, Default)]
struct SettlerShared {
    reports: Mutex<Reports>,
    abandoned: AtomicBool,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Reports {
    outcomes: Vec<(u64, Outcome)>,
    /// Deliveries without an outcome that were kept back at first, and when they were sent.
    sent_late: Vec<(u64, Instant)>,
}

impl Settler {
    /// A settler with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether both take outcomes to the same pump.
    pub fn same_as(&self, other: &Settler) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// A delivery that the head had to keep back, for want of credit of the receiver or of room in its socket, has been
    /// sent now: the time for its answer begins now. Nobody is woken for it.
    pub fn sent(&self, tag: u64) {
        self.shared.reports.lock().sent_late.push((tag, Instant::now()));
    }

    /// Takes what [`Settler::sent`] told of deliveries that have no outcome yet.
    pub fn take_sent(&self) -> Vec<(u64, Instant)> {
        std::mem::take(&mut self.shared.reports.lock().sent_late)
    }

    /// The pump waits for these deliveries no longer; it makes new ones of their messages. A head need not send what it
    /// still keeps back, and need not wait for the answers to the rest.
    pub fn abandon(&self) {
        self.shared.abandoned.store(true, Ordering::Relaxed);
    }

    /// Whether [`Settler::abandon`] was called.
    pub fn is_abandoned(&self) -> bool {
        self.shared.abandoned.load(Ordering::Relaxed)
    }

    /// Reports outcomes; call it once for all that one read of the socket brought.
    pub fn settle(&self, outcomes: impl IntoIterator<Item = (u64, Outcome)>) {
        let mut reports = self.shared.reports.lock();
        let before = reports.outcomes.len();
        reports.outcomes.extend(outcomes);
        if !reports.sent_late.is_empty() {
            let Reports { outcomes, sent_late } = &mut *reports;
            sent_late.retain(|(sent, _)| outcomes[before..].iter().all(|(tag, _)| tag != sent));
        }
        drop(reports);
        self.shared.wake.notify_one();
    }

    /// Waits for outcomes and takes all that are there. Cancel safe.
    pub async fn settled(&self) -> Vec<(u64, Outcome)> {
        loop {
            let taken = self.take();
            if !taken.is_empty() {
                return taken;
            }
            self.shared.wake.notified().await;
        }
    }

    /// Takes the outcomes that are there.
    pub fn take(&self) -> Vec<(u64, Outcome)> {
        std::mem::take(&mut self.shared.reports.lock().outcomes)
    }
}
