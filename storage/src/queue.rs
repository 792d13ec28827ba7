//! Owns one queue: what its readers and settlers see of it.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::clock::{Clock, StoreTime};
use crate::cursor::{Cursor, SETTLE_WINDOW_MAX};
use crate::error::StoreError;
use crate::hot::Hot;
use crate::intake::Intake;
use crate::ledger::{Ledger, Outcome, Outcomes, Settlement};
use crate::reader::ReaderHandle;
use crate::record::{Batch, BatchEnd, Entry, Offset, QueueId, ReadLimit};
use crate::rows::Mark;

/// The longest name of a queue.
pub const QUEUE_NAME_MAX_BYTES: usize = 1024;

/// A queue of a store; cheap to clone. Entries are appended through [`Store::submit`](crate::Store::submit).
#[derive(Clone)]
pub struct Queue {
    shared: Arc<QueueShared>,
    reader: ReaderHandle,
}

/// The part of a queue that threads share.
pub(crate) struct QueueShared {
    pub(crate) id: u32,
    pub(crate) name: Arc<str>,
    clock: Arc<Clock>,
    intake: Arc<Intake>,
    state: Mutex<QueueState>,
    appended: Notify,
    checkpointed: Notify,
    closed: AtomicBool,
}

/// What is known of a queue.
#[derive(Debug)]
pub(crate) struct QueueState {
    /// The offset of the next append.
    pub(crate) tail: u64,
    pub(crate) cursor: Cursor,
    pub(crate) outcomes: Outcomes,
    pub(crate) hot: Hot,
    /// Closed stretches that are not released yet, oldest first.
    pub(crate) marks: VecDeque<Mark>,
    /// Whether the writer knows that there are settlements to write.
    listed: bool,
}

impl QueueState {
    pub(crate) fn new(
        tail: u64,
        cursor: Cursor,
        outcomes: Outcomes,
        hot: Hot,
        marks: VecDeque<Mark>,
    ) -> Self {
        Self { tail, cursor, outcomes, hot, marks, listed: false }
    }

    fn queued(&self) -> u64 {
        self.tail.saturating_sub(self.cursor.prefix()).saturating_sub(self.cursor.beyond())
    }

    pub(crate) fn ledger(&self) -> Ledger {
        Ledger { accepted: self.tail, outcomes: self.outcomes, queued: self.queued() }
    }

    pub(crate) fn settle(&mut self, offset: u64, outcome: Outcome) -> bool {
        let fresh = offset < self.tail && self.cursor.settle(offset);
        if fresh {
            self.outcomes.count(outcome, 1);
        }
        fresh
    }

    pub(crate) fn settle_range(&mut self, from: u64, to: u64, outcome: Outcome) -> u64 {
        let fresh = self.cursor.settle_range(from, to.min(self.tail));
        self.outcomes.count(outcome, fresh);
        fresh
    }

    /// Settles whole stretches from `from` on of which every entry has expired, without looking at the entries.
    fn expire_marks(&mut self, from: u64, now: StoreTime) -> u64 {
        let mut expired = 0;
        let first = self.marks.partition_point(|mark| mark.end <= from);
        for index in first..self.marks.len() {
            let mark = &self.marks[index];
            let (end, over) = (mark.end, mark.last_expiry.is_some_and(|last| now >= last));
            let reach = self.cursor.prefix().saturating_add(SETTLE_WINDOW_MAX);
            if !over || end > reach {
                break;
            }
            expired += self.settle_range(from, end, Outcome::Expired);
        }
        expired
    }

    fn read_hot(
        &mut self,
        from: u64,
        limit: ReadLimit,
        now: StoreTime,
        batch: &mut Batch,
    ) -> Option<Range<u64>> {
        let mut at = self.cursor.next_open(from);
        let mut bytes = 0;
        let end = loop {
            if at >= self.tail {
                break BatchEnd::Tail;
            }
            if !self.cursor.reaches(at) {
                break BatchEnd::Window;
            }
            let some = !batch.entries.is_empty();
            if some && (batch.entries.len() >= limit.count || bytes >= limit.bytes) {
                break BatchEnd::More;
            }
            // What memory holds reaches up to the tail, so only the start of a read can be on disk.
            let Some(hot) = self.hot.get(at) else {
                let reach = self.cursor.prefix().saturating_add(SETTLE_WINDOW_MAX);
                return Some(at..self.hot.start().min(reach));
            };
            if hot.expires_at().is_some_and(|end| now >= end) {
                batch.expired += u64::from(self.settle(at, Outcome::Expired));
            } else if some && bytes + hot.bytes.len() > limit.bytes {
                break BatchEnd::More;
            } else {
                bytes += hot.bytes.len();
                batch.entries.push(hot.to_entry(at));
            }
            at = self.cursor.next_open(at + 1);
        };
        batch.end = end;
        batch.next = Offset::new(at);
        None
    }
}

impl QueueShared {
    pub(crate) fn new(
        id: u32,
        name: Arc<str>,
        clock: Arc<Clock>,
        intake: Arc<Intake>,
        state: QueueState,
    ) -> Self {
        Self {
            id,
            name,
            clock,
            intake,
            state: Mutex::new(state),
            appended: Notify::new(),
            checkpointed: Notify::new(),
            closed: AtomicBool::new(false),
        }
    }

    /// Runs `work` on the state; it must be short and must not call out.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut QueueState) -> T) -> T {
        work(&mut self.state.lock())
    }

    /// Runs `work` on the state and, if it says that something was settled, lets the writer and the waiters
    /// know.
    pub(crate) fn settle_with(self: &Arc<Self>, work: impl FnOnce(&mut QueueState) -> bool) {
        let mut state = self.state.lock();
        let before = state.cursor.prefix();
        if !work(&mut state) {
            return;
        }
        let prefix = state.cursor.prefix();
        state.hot.drop_below(prefix);
        let list = !std::mem::replace(&mut state.listed, true);
        drop(state);
        if list {
            self.intake.settled(Arc::clone(self));
        }
        if prefix != before {
            self.checkpointed.notify_waiters();
        }
    }

    /// The writer takes note of what is settled; later settlements list the queue anew.
    pub(crate) fn unlist(state: &mut QueueState) {
        state.listed = false;
    }

    /// Takes back changes that could not be written. Returns whether the writer has to come back to them;
    /// otherwise newer settlements have listed the queue again.
    pub(crate) fn take_back(&self, pages: &[u64], gone: Vec<u64>) -> bool {
        self.with(|state| {
            state.cursor.return_changes(pages, gone);
            !std::mem::replace(&mut state.listed, true)
        })
    }

    /// Lists the queue, because there is something to release.
    pub(crate) fn relist(self: &Arc<Self>) {
        let list = self.with(|state| !std::mem::replace(&mut state.listed, true));
        if list {
            self.intake.settled(Arc::clone(self));
        }
    }

    /// Lists the queue if there is something to release.
    pub(crate) fn list_due(self: &Arc<Self>) {
        let due =
            self.with(|state| state.marks.front().is_some_and(|mark| mark.end <= state.cursor.prefix()));
        if due {
            self.relist();
        }
    }

    pub(crate) fn wake_readers(&self) {
        self.appended.notify_waiters();
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.appended.notify_waiters();
        self.checkpointed.notify_waiters();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(crate) fn now(&self) -> StoreTime {
        self.clock.now()
    }

    /// Reads from memory into an empty batch, or says which stretch to read from disk.
    fn step(self: &Arc<Self>, from: u64, limit: ReadLimit, batch: &mut Batch) -> Option<Range<u64>> {
        let now = self.now();
        let before = batch.expired;
        let mut on_disk = None;
        self.settle_with(|state| {
            batch.expired += state.expire_marks(from, now);
            on_disk = state.read_hot(from, limit, now, batch);
            batch.expired != before
        });
        on_disk
    }
}

impl fmt::Debug for QueueShared {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Queue").field("id", &self.id).field("name", &self.name).finish_non_exhaustive()
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shared.fmt(out)
    }
}

impl Queue {
    pub(crate) fn new(shared: Arc<QueueShared>, reader: ReaderHandle) -> Self {
        Self { shared, reader }
    }

    /// The queue's id, for [`Target`](crate::Target).
    pub fn id(&self) -> QueueId {
        QueueId(self.shared.id)
    }

    /// The queue's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The account of the queue; exact at any time.
    pub fn ledger(&self) -> Ledger {
        self.shared.with(|state| state.ledger())
    }

    /// The first entry that is not settled: all before it is finished. Reading starts here after a restart.
    pub fn checkpoint(&self) -> Offset {
        Offset::new(self.shared.with(|state| state.cursor.prefix()))
    }

    /// The offset that the next append takes.
    pub fn tail(&self) -> Offset {
        Offset::new(self.shared.with(|state| state.tail))
    }

    /// When the oldest entry that waits was appended; `None` if none waits. Reads the disk if that entry is not
    /// in memory.
    ///
    /// # Errors
    /// When the disk cannot be read, or the store is closed.
    pub async fn oldest_accepted_at(&self) -> Result<Option<StoreTime>, StoreError> {
        let (at, tail, hot) = self.shared.with(|state| {
            let at = state.cursor.next_open(0);
            (at, state.tail, state.hot.get(at).map(|entry| entry.accepted_at))
        });
        if hot.is_some() || at >= tail {
            return Ok(hot);
        }
        self.reader.accepted_at(Arc::clone(&self.shared), at).await
    }

    /// Entries from `from` on, in order, up to `limit`; settled ones are left out.
    ///
    /// Entries whose time to live has ended are left out as well, settled as [`Outcome::Expired`] and counted
    /// in [`Batch::expired`]; however many there are, one call passes them all. An entry that waits longer than
    /// its time to live after it was read is the caller's to settle.
    ///
    /// The newest entries come from memory, older ones from the reader thread. The call does not wait for an
    /// append: see [`Batch::end`] for what to do after it. Dropping the future is harmless.
    ///
    /// # Errors
    /// When the disk cannot be read, or the store is closed.
    pub async fn read(&self, from: Offset, limit: ReadLimit) -> Result<Batch, StoreError> {
        let mut batch = Batch::empty(from);
        let mut from = from.get();
        loop {
            if self.shared.is_closed() {
                return Err(StoreError::Closed);
            }
            let Some(range) = self.shared.step(from, limit, &mut batch) else { return Ok(batch) };
            let chunk = self.reader.read(Arc::clone(&self.shared), range, limit).await?;
            batch.expired += chunk.expired;
            if !chunk.entries.is_empty() {
                batch.entries = chunk.entries;
                batch.next = Offset::new(chunk.next);
                batch.end = BatchEnd::More;
                return Ok(batch);
            }
            from = chunk.next;
        }
    }

    /// Waits until the entry at `beyond` has been appended, that is until the tail is beyond it. Also returns
    /// when the store is closed. Wake-ups are not lost; dropping the future is harmless.
    pub async fn appended(&self, beyond: Offset) {
        self.wait(&self.shared.appended, |state| state.tail > beyond.get()).await;
    }

    /// Waits until the checkpoint is beyond `beyond`. Also returns when the store is closed. Wake-ups are not
    /// lost; dropping the future is harmless.
    pub async fn checkpointed(&self, beyond: Offset) {
        self.wait(&self.shared.checkpointed, |state| state.cursor.prefix() > beyond.get()).await;
    }

    async fn wait(&self, signal: &Notify, reached: impl Fn(&QueueState) -> bool) {
        loop {
            let mut notified = std::pin::pin!(signal.notified());
            // Registered before the look, so that a change after the look wakes us.
            notified.as_mut().enable();
            if self.shared.is_closed() || self.shared.with(|state| reached(state)) {
                return;
            }
            notified.await;
        }
    }

    /// Says what became of entries. Does not wait: the ledger and the checkpoint show it at once, the writer
    /// stores it with the next append, or soon by itself. After a crash, what was not stored yet is handed out
    /// again; [`Store::flush`](crate::Store::flush) waits until it is.
    ///
    /// An entry is settled once: later settlements of it, and settlements of offsets that were never handed
    /// out, change nothing.
    pub fn settle(&self, settlements: &[Settlement]) {
        self.shared.settle_with(|state| {
            let mut changed = false;
            for settlement in settlements {
                changed |= state.settle(settlement.offset.get(), settlement.outcome);
            }
            changed
        });
    }
}

impl Batch {
    pub(crate) fn empty(next: Offset) -> Self {
        Self { entries: Vec::<Entry>::new(), next, expired: 0, end: BatchEnd::Tail }
    }
}
