//! Owns the list of queues, by name and by id, and the budget of memory that their hot ends share.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ahash::AHashMap;
use parking_lot::{Mutex, RwLock};

use crate::clock::{Clock, StoreTime};
use crate::cursor::Cursor;
use crate::error::StoreError;
use crate::hot::Hot;
use crate::intake::Intake;
use crate::ledger::{HubLedger, Outcomes};
use crate::queue::{QUEUE_NAME_MAX_BYTES, QueueShared};
use crate::rows::{DEAD_LETTERS_QUEUE, HubRow, Mark};
use crate::space::Gauge;
use crate::state::QueueState;

/// The most queues of one store.
pub const QUEUES_MAX: usize = 65_536;

/// What was stored of a queue.
#[derive(Debug)]
pub(crate) struct StoredQueue {
    pub(crate) cursor: Cursor,
    pub(crate) outcomes: Outcomes,
    /// The stretch that grows; its end is the tail.
    pub(crate) open: Mark,
    pub(crate) marks: Vec<Mark>,
}

impl Default for StoredQueue {
    fn default() -> Self {
        let open = Mark::starting_at(0);
        Self { cursor: Cursor::default(), outcomes: Outcomes::default(), open, marks: Vec::new() }
    }
}

#[derive(Debug)]
pub(crate) struct Registry {
    clock: Arc<Clock>,
    intake: Arc<Intake>,
    gauge: Arc<Gauge>,
    queues: RwLock<Queues>,
    letters: Arc<QueueShared>,
    hub: Mutex<HubRow>,
    hot_bytes: Arc<AtomicUsize>,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Queues {
    by_name: AHashMap<Arc<str>, Arc<QueueShared>>,
    /// Ids are indices: there is no hole.
    by_id: Vec<Arc<QueueShared>>,
}

impl Registry {
    pub(crate) fn new(
        clock: Arc<Clock>,
        intake: Arc<Intake>,
        gauge: Arc<Gauge>,
        hub: HubRow,
        letters: StoredQueue,
    ) -> Self {
        let hot_bytes: Arc<AtomicUsize> = Arc::default();
        let letters = shared(DEAD_LETTERS_QUEUE, "", letters, (&clock, &intake, &gauge), &hot_bytes);
        let held_bytes = letters.with(|state| state.held_bytes());
        gauge.set_letters_bytes(held_bytes);
        Self {
            clock,
            intake,
            gauge,
            queues: RwLock::default(),
            letters,
            hub: Mutex::new(hub),
            hot_bytes,
            closed: AtomicBool::new(false),
        }
    }

    /// The queue that holds the dead letters.
    pub(crate) fn letters(&self) -> &Arc<QueueShared> {
        &self.letters
    }

    pub(crate) fn by_id(&self, id: u32) -> Option<Arc<QueueShared>> {
        self.queues.read().by_id.get(id as usize).cloned()
    }

    /// Takes a stored queue in; its id is the number of queues before it.
    pub(crate) fn restore(&self, name: &str, stored: StoredQueue) -> Arc<QueueShared> {
        let mut queues = self.queues.write();
        self.insert(&mut queues, name, stored)
    }

    /// The queue with this name. A new one gets the next id, stored with the next write at the latest.
    pub(crate) fn open(&self, name: &str) -> Result<Arc<QueueShared>, StoreError> {
        if name.is_empty() || name.len() > QUEUE_NAME_MAX_BYTES {
            return Err(StoreError::QueueName { length_bytes: name.len(), max_bytes: QUEUE_NAME_MAX_BYTES });
        }
        if let Some(queue) = self.queues.read().by_name.get(name) {
            return Ok(Arc::clone(queue));
        }
        let mut queues = self.queues.write();
        if let Some(queue) = queues.by_name.get(name) {
            return Ok(Arc::clone(queue));
        }
        if self.closed.load(Ordering::SeqCst) {
            return Err(StoreError::Closed);
        }
        if queues.by_id.len() >= QUEUES_MAX {
            return Err(StoreError::TooManyQueues { max: QUEUES_MAX });
        }
        let queue = self.insert(&mut queues, name, StoredQueue::default());
        drop(queues);
        self.intake.named();
        Ok(queue)
    }

    fn insert(&self, queues: &mut Queues, name: &str, stored: StoredQueue) -> Arc<QueueShared> {
        let parts = (&self.clock, &self.intake, &self.gauge);
        let queue = shared(queues.by_id.len() as u32, name, stored, parts, &self.hot_bytes);
        queues.by_name.insert(Arc::clone(&queue.name), Arc::clone(&queue));
        queues.by_id.push(Arc::clone(&queue));
        queue
    }

    pub(crate) fn all(&self) -> Vec<Arc<QueueShared>> {
        self.queues.read().by_id.clone()
    }

    /// The queues with this id and higher ones.
    pub(crate) fn all_from(&self, id: usize) -> Vec<Arc<QueueShared>> {
        self.queues.read().by_id.get(id..).unwrap_or_default().to_vec()
    }

    pub(crate) fn count(&self) -> usize {
        self.queues.read().by_id.len()
    }

    pub(crate) fn set_hub(&self, hub: HubRow) {
        *self.hub.lock() = hub;
    }

    pub(crate) fn hub_ledger(&self) -> HubLedger {
        let hub = *self.hub.lock();
        let mut ledger = HubLedger {
            records: hub.records,
            unrouted: hub.unrouted,
            references: hub.references,
            ..HubLedger::default()
        };
        for queue in self.all() {
            ledger.queues.add(&queue.with(|state| state.ledger()));
        }
        ledger.dead_letters = self.letters.with(|state| state.ledger());
        ledger
    }

    pub(crate) fn hot_bytes(&self) -> usize {
        self.hot_bytes.load(Ordering::Relaxed)
    }

    /// Lets go of the oldest entries in memory, over all queues, until they fit; some more, so that it is not
    /// done for every entry.
    pub(crate) fn evict(&self, max_bytes: usize) {
        let used_bytes = self.hot_bytes();
        if used_bytes <= max_bytes {
            return;
        }
        let mut needed_bytes = used_bytes - (max_bytes - max_bytes / 8);
        let queues = self.all();
        let mut oldest: BinaryHeap<Reverse<(StoreTime, usize)>> = queues
            .iter()
            .enumerate()
            .filter_map(|(index, queue)| Some(Reverse((queue.with(|state| state.hot.oldest())?, index))))
            .collect();
        while needed_bytes > 0 {
            let Some(Reverse((_, index))) = oldest.pop() else { break };
            let until = oldest.peek().map_or(StoreTime::from_millis(u64::MAX), |next| next.0.0);
            let (freed_bytes, next) = queues[index].with(|state| {
                let freed_bytes = state.hot.evict(needed_bytes, until);
                (freed_bytes, state.hot.oldest())
            });
            needed_bytes = needed_bytes.saturating_sub(freed_bytes);
            oldest.extend(next.map(|time| Reverse((time, index))));
        }
    }

    /// Wakes all that wait for a queue.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        for queue in self.all() {
            queue.close();
        }
    }
}

fn shared(
    id: u32,
    name: &str,
    stored: StoredQueue,
    (clock, intake, gauge): (&Arc<Clock>, &Arc<Intake>, &Arc<Gauge>),
    hot_bytes: &Arc<AtomicUsize>,
) -> Arc<QueueShared> {
    let StoredQueue { cursor, outcomes, open, marks } = stored;
    let hot = Hot::new(open.end, Arc::clone(hot_bytes));
    Arc::new(QueueShared::new(
        id,
        Arc::from(name),
        Arc::clone(clock),
        Arc::clone(intake),
        Arc::clone(gauge),
        QueueState::new(cursor, outcomes, hot, marks.into(), &open),
    ))
}
