//! Owns one queue: what its readers and settlers see of it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::clock::{Clock, StoreTime};
use crate::error::StoreError;
use crate::intake::Intake;
use crate::ledger::{DropReason, Ledger, Outcome, Settlement};
use crate::letters::DeadLetterReason;
use crate::reader::ReaderHandle;
use crate::record::{Batch, BatchEnd, Entry, Offset, QueueId, ReadLimit};
use crate::rows::LetterHead;
use crate::space::Gauge;
use crate::state::{PendingLetter, QueueState};

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
    gauge: Arc<Gauge>,
    state: Mutex<QueueState>,
    appended: Notify,
    checkpointed: Notify,
    closed: AtomicBool,
}

impl QueueShared {
    pub(crate) fn new(
        id: u32,
        name: Arc<str>,
        clock: Arc<Clock>,
        intake: Arc<Intake>,
        gauge: Arc<Gauge>,
        state: QueueState,
    ) -> Self {
        Self {
            id,
            name,
            clock,
            intake,
            gauge,
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
    pub(crate) fn take_back(&self, pages: &[u64], gone: Vec<u64>, mut letters: Vec<PendingLetter>) -> bool {
        self.with(|state| {
            state.cursor.return_changes(pages, gone);
            letters.append(&mut state.letters);
            state.letters = letters;
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
        if self.with(|state| state.is_due()) {
            self.relist();
        }
    }

    pub(crate) fn wake_readers(&self) {
        self.appended.notify_waiters();
    }

    pub(crate) fn wake_checkpointed(&self) {
        self.checkpointed.notify_waiters();
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
            batch.expired += state.expire_run(from, now);
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
    /// out, change nothing. Returns how many entries were settled by this call.
    pub fn settle(&self, settlements: &[Settlement]) -> usize {
        let mut settled = 0;
        self.shared.settle_with(|state| {
            for settlement in settlements {
                settled += usize::from(state.settle(settlement.offset.get(), settlement.outcome));
            }
            settled > 0
        });
        settled
    }

    /// Moves an entry to the dead letters, after so many attempts to deliver it. Does not wait, like
    /// [`settle`](Self::settle); but the copy among the dead letters and the settlement are written together, or,
    /// while writes fail, wait together. After a crash the entry is in one of the two places.
    ///
    /// Where there is no room for dead letters at all, or for one of this size, the entry is dropped and counted
    /// under the [same reason](DeadLetterReason::as_drop). An entry that was settled before stays so.
    ///
    /// False when too much waits to be written to the dead letters (16 MiB, so writes are failing): then nothing
    /// was changed, and the entry stays queued.
    #[must_use = "an entry that was not taken is still queued"]
    pub fn dead_letter(&self, entry: &Entry, reason: DeadLetterReason, attempts: u32) -> bool {
        let head = LetterHead {
            reason,
            attempts,
            queue: self.shared.id,
            offset: entry.offset.get(),
            accepted_at: entry.accepted_at,
            ttl: entry.ttl,
        };
        let bytes = head.letter(&entry.bytes);
        if bytes.len() as u64 > self.shared.gauge.letters_max_bytes() {
            self.settle(&[Settlement { offset: entry.offset, outcome: Outcome::Dropped(reason.as_drop()) }]);
            return true;
        }
        if !self.shared.gauge.take_pending(bytes.len() as u64) {
            return false;
        }
        let letter = PendingLetter { bytes, at: self.shared.now() };
        let mut unused_bytes = letter.bytes.len() as u64;
        self.shared.settle_with(|state| {
            let moved = state.dead_letter(entry.offset.get(), letter);
            if moved {
                unused_bytes = 0;
            }
            moved
        });
        self.shared.gauge.free_pending(unused_bytes);
        true
    }

    /// Drops everything that waits below `upto`, as an operator wants it; returns how many entries. They are
    /// counted as [`DropReason::Purged`]. Does not wait, like [`settle`](Self::settle).
    pub fn purge(&self, upto: Offset) -> u64 {
        let mut purged = 0;
        self.shared.settle_with(|state| {
            purged = state.settle_range(0, upto.get(), Outcome::Dropped(DropReason::Purged));
            purged > 0
        });
        purged
    }

    /// How many entries wait below `upto`: what [`purge`](Self::purge) would drop.
    pub fn queued_below(&self, upto: Offset) -> u64 {
        self.shared.with(|state| state.cursor.open_below(upto.get().min(state.tail)))
    }

    /// Entries from `from` on, in order, up to `limit`, as [`read`](Self::read) does, but without changing anything:
    /// expired entries that nobody has settled yet are shown like others, and the settle window does not matter. For
    /// tools; always reads the engine.
    ///
    /// # Errors
    /// When the disk cannot be read, or the store is closed.
    pub async fn peek(&self, from: Offset, limit: ReadLimit) -> Result<Batch, StoreError> {
        let mut batch = Batch::empty(from);
        let mut next = from.get();
        loop {
            let (at, tail) = self.shared.with(|state| (state.cursor.next_open(next), state.tail));
            batch.next = Offset::new(at);
            if at >= tail {
                return Ok(batch);
            }
            let chunk = self.reader.peek(Arc::clone(&self.shared), at..tail, limit).await?;
            (batch.entries, next) = (chunk.entries, chunk.next);
            if !batch.entries.is_empty() {
                batch.next = Offset::new(next);
                batch.end = if next >= tail { BatchEnd::Tail } else { BatchEnd::More };
                return Ok(batch);
            }
        }
    }
}

impl Batch {
    pub(crate) fn empty(next: Offset) -> Self {
        Self { entries: Vec::<Entry>::new(), next, expired: 0, end: BatchEnd::Tail }
    }
}
