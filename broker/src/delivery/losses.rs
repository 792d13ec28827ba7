//! What endpoints lose, as metrics: with the sender where it is known, the rest out of the ledger.
//!
//! Pumps know whose message they give up. The store does not when its sweeper finds expired entries, or an overflow
//! policy makes room; what the ledger shows beyond what pumps told is counted without a sender. So the sum of
//! a metric is the ledger's, whoever settled the message.

use std::sync::atomic::{AtomicU64, Ordering};

use edgehub_storage::{DeadLetterReason, DropReason, Ledger, Store};
use metrics::counter;
use parking_lot::Mutex;

use super::source::DeadLettered;
use crate::identity::Identity;

const KINDS: usize = 2 + DropReason::ALL.len();

/// How an endpoint loses a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Its time to live ended.
    Expired,
    /// It was dropped.
    Dropped(DropReason),
    /// It is in the dead letters.
    DeadLettered(DeadLetterReason),
}

impl Loss {
    fn kind(self) -> usize {
        match self {
            Loss::Expired => 0,
            Loss::DeadLettered(_) => 1,
            Loss::Dropped(reason) => 2 + reason as usize,
        }
    }

    fn count(self, messages: u64, from: &str, output: &str) {
        let (name, reason) = match self {
            Loss::Expired => ("edgehub_messages_dropped_total", "ttl_expiry"),
            Loss::Dropped(reason) => ("edgehub_messages_dropped_total", reason.as_str()),
            Loss::DeadLettered(reason) => ("edgehub_messages_dead_lettered_total", reason.as_str()),
        };
        counter!(
            name, "reason" => reason, "from" => from.to_owned(), "from_route_output" => output.to_owned()
        )
        .increment(messages);
    }
}

/// The account between the pumps and the ledger: what is lost is counted once, with its sender where a pump knows it.
pub struct Losses {
    /// Told by pumps, by kind.
    told: [AtomicU64; KINDS],
    /// Counted without a sender, and what the ledger had when the hub started.
    rest: Mutex<[u64; KINDS]>,
}

impl Losses {
    /// Counts what is lost from now on.
    pub fn new(store: &Store) -> Self {
        Self { told: std::array::from_fn(|_| AtomicU64::new(0)), rest: Mutex::new(totals(store)) }
    }

    /// Settles a message as lost, and counts it if `settle` says that it is lost in this way, by this call.
    pub(crate) fn tell(&self, loss: Loss, from: &Identity, output: &str, settle: impl FnOnce() -> bool) {
        // Before the ledger changes, so that nobody takes it for a loss without sender.
        let told = &self.told[loss.kind()];
        told.fetch_add(1, Ordering::SeqCst);
        if settle() {
            loss.count(1, &from.to_string(), output);
        } else {
            told.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Moves a message to the dead letters. False if they cannot take it now; then it is queued as before.
    #[must_use = "a message that was not taken is still queued"]
    pub(crate) fn dead_letter(
        &self,
        reason: DeadLetterReason,
        from: &Identity,
        output: &str,
        move_it: impl FnOnce() -> DeadLettered,
    ) -> bool {
        let mut outcome = DeadLettered::Otherwise;
        self.tell(Loss::DeadLettered(reason), from, output, || {
            outcome = move_it();
            outcome == DeadLettered::Moved
        });
        outcome != DeadLettered::Busy
    }

    /// Counts what the ledger shows and no pump told. Call it before metrics are rendered.
    pub(crate) fn observe(&self, store: &Store) {
        let mut rest = self.rest.lock();
        // The ledger is read first: what is told later can only make the difference smaller.
        let totals = totals(store);
        let kinds = [Loss::Expired, Loss::DeadLettered(DeadLetterReason::Overflow)];
        for loss in kinds.into_iter().chain(DropReason::ALL.map(Loss::Dropped)) {
            let kind = loss.kind();
            let told = self.told[kind].load(Ordering::SeqCst);
            let missing = totals[kind].saturating_sub(told).saturating_sub(rest[kind]);
            if missing > 0 {
                rest[kind] += missing;
                loss.count(missing, "", "");
            }
        }
    }
}

fn totals(store: &Store) -> [u64; KINDS] {
    let hub = store.hub_ledger();
    let ledger: &Ledger = hub.queues();
    let mut totals = [0; KINDS];
    totals[Loss::Expired.kind()] = ledger.expired();
    totals[Loss::DeadLettered(DeadLetterReason::Overflow).kind()] = ledger.dead_lettered();
    for reason in DropReason::ALL {
        totals[Loss::Dropped(reason).kind()] = ledger.dropped(reason);
    }
    totals
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use edgehub_storage::{AppendRequest, Outcome, Overflow, Record, Settlement, StoreOptions, Target, Ttl};
    use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

    use super::*;

    /// Counters by name, reason and sender.
    #[derive(Default)]
    struct Counters(Mutex<BTreeMap<String, Arc<AtomicU64>>>);

    impl Recorder for Counters {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            let labels = key.labels().map(|label| label.value().to_owned());
            let name: Vec<String> = std::iter::once(key.name().to_owned()).chain(labels).collect();
            Counter::from_arc(self.0.lock().entry(name.join(" ")).or_default().clone())
        }
        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::noop()
        }
        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::noop()
        }
    }

    impl Counters {
        fn shown(&self) -> Vec<(String, u64)> {
            let counters = self.0.lock();
            counters.iter().map(|(name, count)| (name.clone(), count.load(Ordering::SeqCst))).collect()
        }
    }

    #[tokio::test]
    async fn the_sum_of_the_metric_is_that_of_the_ledger_whoever_settled() {
        let store = Store::open(StoreOptions::memory()).unwrap();
        let queue = store.queue("q").unwrap();
        let target = Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew };
        let record = Record { bytes: "x".into(), targets: [target].into_iter().collect() };
        let request = AppendRequest { records: vec![record; 10], unrouted: 0 };
        store.submit(request).await.unwrap().await.unwrap();
        let settle = |offset, outcome| {
            let offset = edgehub_storage::Offset::new(offset);
            queue.settle(&[Settlement { offset, outcome }]) > 0
        };
        // What was lost before the hub started is not counted.
        settle(0, Outcome::Expired);
        let losses = Losses::new(&store);
        let sender = Identity::parse("edge1/m").unwrap();
        let counters = Counters::default();
        metrics::with_local_recorder(&counters, || {
            losses.tell(Loss::Expired, &sender, "out", || settle(1, Outcome::Expired));
            // The sweeper was faster.
            settle(2, Outcome::Expired);
            losses.observe(&store);
            losses.tell(Loss::Expired, &sender, "out", || settle(2, Outcome::Expired));
            settle(3, Outcome::Dropped(DropReason::Overflow));
            losses.observe(&store);
            losses.tell(Loss::Expired, &sender, "out", || settle(4, Outcome::Expired));
            losses.observe(&store);
        });
        let dropped = |reason: &str, from: &str, count: u64| {
            (format!("edgehub_messages_dropped_total {reason} {from}"), count)
        };
        let expected = [
            dropped("overflow", " ", 1),
            dropped("ttl_expiry", " ", 1),
            dropped("ttl_expiry", "edge1/m out", 2),
        ];
        assert_eq!(counters.shown(), expected);
    }
}
