//! Owns how much room there is: the limits, what was measured, what was written since, and the verdict.
//!
//! Measuring the disk costs system calls, so it is done by time and by bytes written, never per message. Between
//! two measurements everything handed to the engine counts as used, which is never too little.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::clock::{Clock, StoreTime};
use crate::options::StoreLimits;

/// The largest reserve: room that appends do not take, so that settlements, keyed state and the dead letters go on.
const RESERVE_MAX_BYTES: u64 = 16 << 20;
/// The reserve is this part of the limit, or of the file system, if that is less.
const RESERVE_PART: u64 = 16;
/// On disk, room that appends do not take because compactions need it for a while: this part of the limit, ..
const WORKING_PART: u64 = 16;
/// .. at most this much.
const WORKING_MAX_BYTES: u64 = 64 << 20;
/// The dead letters take at most this part of the limit, or of the file system.
const LETTERS_PART: u64 = 8;
/// A stretch has at most this part of the limit, so that dropping the oldest never drops much of it.
const STRETCH_PART: u64 = 64;
/// What waits to be written to the dead letters, in bytes over all queues.
const PENDING_LETTERS_MAX_BYTES: u64 = 16 << 20;
/// The disk is measured anew when this much was written, or a 64th of what is used.
const MEASURE_MIN_BYTES: u64 = 256 << 10;

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SpaceReason {
    /// The store has reached [`StoreLimits::max_bytes`].
    Limit,
    /// The file system has no more free than [`StoreLimits::free_floor_bytes`] and the reserve.
    FreeFloor,
    /// The file system refused a write for want of space.
    Disk,
}

impl SpaceReason {
    /// The reason as a metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::FreeFloor => "free_floor",
            Self::Disk => "disk",
        }
    }
}

impl fmt::Display for SpaceReason {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Limit => "it has reached its limit; raise the limit, or let the consumers catch up",
            Self::FreeFloor => {
                "the file system is down to its free floor; free space there, or lower the floor"
            }
            Self::Disk => "the file system refused a write; free space there",
        })
    }
}

/// Whether appends find room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SpaceState {
    /// They do.
    Open,
    /// They are refused, or make room where their queues allow it.
    Full {
        /// Why.
        reason: SpaceReason,
    },
}

/// How much room there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What the store takes up, in bytes; on disk what was measured and what was written since.
    pub used_bytes: u64,
    /// The limit in force; `None` without one.
    pub max_bytes: Option<u64>,
    /// What is free in the file system, in bytes; `None` for a store in memory.
    pub free_bytes: Option<u64>,
    /// Whether appends find room.
    pub state: SpaceState,
    /// Since when it is so, on the store's clock.
    pub since: StoreTime,
}

/// What a measurement found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Measured {
    pub(crate) used_bytes: u64,
    /// Free and total bytes of the file system; `None` in memory.
    pub(crate) free_bytes: Option<u64>,
    pub(crate) total_bytes: Option<u64>,
}

#[derive(Debug)]
struct Known {
    limits: StoreLimits,
    measured: Measured,
    /// [`Gauge::written`] when that was measured.
    at_written: u64,
    state: SpaceState,
    since: StoreTime,
    /// Whether the reserve's file is missing, so that what is free belongs to it first.
    reserve_missing: bool,
}

/// The account of room, shared by all threads.
#[derive(Debug)]
pub(crate) struct Gauge {
    known: Mutex<Known>,
    /// All bytes that were ever handed to the engine.
    written: AtomicU64,
    /// What the dead letters hold, in bytes.
    letters: AtomicU64,
    pending_letters: AtomicU64,
    changes: watch::Sender<SpaceState>,
    clock: Arc<Clock>,
    keeper: Mutex<KeeperCall>,
    keeper_called: Condvar,
}

/// What the keeper is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct KeeperCall {
    pub(crate) measure: bool,
    pub(crate) closing: bool,
}

impl Known {
    fn capacity_bytes(&self) -> u64 {
        let limit = self.limits.max_bytes.unwrap_or(u64::MAX);
        limit.min(self.measured.total_bytes.unwrap_or(u64::MAX))
    }

    fn reserve_bytes(&self) -> u64 {
        (self.capacity_bytes() / RESERVE_PART).min(RESERVE_MAX_BYTES)
    }

    fn working_bytes(&self) -> u64 {
        if self.measured.total_bytes.is_none() {
            return 0;
        }
        (self.capacity_bytes() / WORKING_PART).min(WORKING_MAX_BYTES)
    }

    fn letters_max_bytes(&self) -> u64 {
        self.limits.dead_letters_max_bytes.min(self.capacity_bytes() / LETTERS_PART)
    }

    fn floor_bytes(&self) -> u64 {
        let total_bytes = self.measured.total_bytes.unwrap_or(u64::MAX);
        let missing_bytes = if self.reserve_missing { self.reserve_bytes() } else { 0 };
        self.limits.free_floor_bytes.min(total_bytes / RESERVE_PART) + missing_bytes
    }
}

impl Gauge {
    pub(crate) fn new(limits: StoreLimits, measured: Measured, clock: Arc<Clock>) -> Self {
        let since = clock.now();
        let state = SpaceState::Open;
        Self {
            known: Mutex::new(Known {
                limits,
                measured,
                at_written: 0,
                state,
                since,
                reserve_missing: measured.total_bytes.is_some(),
            }),
            written: AtomicU64::new(0),
            letters: AtomicU64::new(0),
            pending_letters: AtomicU64::new(0),
            changes: watch::Sender::new(state),
            clock,
            keeper: Mutex::default(),
            keeper_called: Condvar::new(),
        }
    }

    pub(crate) fn limits(&self) -> StoreLimits {
        self.known.lock().limits
    }

    pub(crate) fn set_limits(&self, limits: StoreLimits) {
        self.known.lock().limits = limits;
        self.judge();
        self.call_keeper();
    }

    pub(crate) fn watch(&self) -> watch::Receiver<SpaceState> {
        self.changes.subscribe()
    }

    pub(crate) fn space(&self) -> Space {
        let known = self.known.lock();
        let since_bytes = self.written.load(Relaxed) - known.at_written;
        Space {
            used_bytes: known.measured.used_bytes + since_bytes,
            max_bytes: known.limits.max_bytes,
            free_bytes: known.measured.free_bytes.map(|free| free.saturating_sub(since_bytes)),
            state: known.state,
            since: known.since,
        }
    }

    /// How many more bytes appends may take, and what stands in the way of more.
    pub(crate) fn room(&self) -> (u64, SpaceReason) {
        let known = self.known.lock();
        self.room_of(&known)
    }

    fn room_of(&self, known: &Known) -> (u64, SpaceReason) {
        let since_bytes = self.written.load(Relaxed) - known.at_written;
        let limit = known.limits.max_bytes.map_or(u64::MAX, |max_bytes| {
            let letters_bytes = known.letters_max_bytes().saturating_sub(self.letters.load(Relaxed));
            let kept_bytes = known.reserve_bytes() + known.working_bytes() + letters_bytes;
            // The reserve is a file on disk, and counted as used already.
            let file_bytes = if known.measured.total_bytes.is_some() && !known.reserve_missing {
                known.reserve_bytes()
            } else {
                0
            };
            let used_bytes = known.measured.used_bytes + since_bytes;
            max_bytes.saturating_add(file_bytes).saturating_sub(kept_bytes).saturating_sub(used_bytes)
        });
        let floor = known.measured.free_bytes.map_or(u64::MAX, |free_bytes| {
            free_bytes.saturating_sub(since_bytes).saturating_sub(known.floor_bytes())
        });
        if floor < limit {
            let disk = SpaceState::Full { reason: SpaceReason::Disk };
            (floor, if known.state == disk { SpaceReason::Disk } else { SpaceReason::FreeFloor })
        } else {
            (limit, SpaceReason::Limit)
        }
    }

    pub(crate) fn is_disk_full(&self) -> bool {
        self.known.lock().state == SpaceState::Full { reason: SpaceReason::Disk }
    }

    /// What the store may take up, by its limit or the size of its file system.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.known.lock().capacity_bytes()
    }

    /// The size of the reserve, in bytes.
    pub(crate) fn reserve_bytes(&self) -> u64 {
        self.known.lock().reserve_bytes()
    }

    /// What the dead letters may hold, in bytes.
    pub(crate) fn letters_max_bytes(&self) -> u64 {
        self.known.lock().letters_max_bytes()
    }

    /// Whether the dead letters hold more than they may.
    pub(crate) fn letters_are_over(&self) -> bool {
        self.letters.load(Relaxed) > self.letters_max_bytes()
    }

    /// The largest stretch under the limit in force, in bytes.
    pub(crate) fn stretch_max_bytes(&self) -> u64 {
        (self.known.lock().capacity_bytes() / STRETCH_PART).max(1)
    }

    pub(crate) fn set_letters_bytes(&self, bytes: u64) {
        self.letters.store(bytes, Relaxed);
    }

    /// Takes room for a letter that waits to be written; false if too many wait.
    pub(crate) fn take_pending(&self, bytes: u64) -> bool {
        let add = |pending: u64| Some(pending + bytes).filter(|sum| *sum <= PENDING_LETTERS_MAX_BYTES);
        self.pending_letters.fetch_update(Relaxed, Relaxed, add).is_ok()
    }

    /// Takes room for a letter that must be moved.
    pub(crate) fn add_pending(&self, bytes: u64) {
        self.pending_letters.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn free_pending(&self, bytes: u64) {
        self.pending_letters.fetch_sub(bytes, Relaxed);
    }

    /// Counts what is handed to the engine; calls the keeper when it is time to measure.
    pub(crate) fn wrote(&self, bytes: u64) {
        let written = self.written.fetch_add(bytes, Relaxed) + bytes;
        let due = {
            let known = self.known.lock();
            let step_bytes =
                (known.measured.used_bytes.min(known.capacity_bytes()) / 64).max(MEASURE_MIN_BYTES);
            known.measured.total_bytes.is_some() && written - known.at_written >= step_bytes
        };
        if due {
            self.call_keeper();
        }
    }

    /// What was written so far; take it before a measurement begins.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    /// Takes a measurement in that began when [`written`](Self::written) was `at_written`.
    pub(crate) fn set_measured(&self, measured: Measured, at_written: u64) {
        let mut known = self.known.lock();
        (known.measured, known.at_written) = (measured, at_written.max(known.at_written));
        drop(known);
        self.judge();
    }

    pub(crate) fn set_reserve_missing(&self, missing: bool) {
        self.known.lock().reserve_missing = missing;
    }

    /// An append found no room.
    pub(crate) fn refused(&self, reason: SpaceReason) {
        self.set_state(SpaceState::Full { reason });
        self.call_keeper();
    }

    /// A write succeeded after the file system had refused one.
    pub(crate) fn recovered(&self) {
        let mut known = self.known.lock();
        if known.state == (SpaceState::Full { reason: SpaceReason::Disk }) {
            // Judged below by what is free.
            known.state = SpaceState::Full { reason: SpaceReason::FreeFloor };
        }
        drop(known);
        self.judge();
    }

    /// Full stays full until there is a little room, so that the state does not flicker.
    fn judge(&self) {
        let known = self.known.lock();
        let (room_bytes, reason) = self.room_of(&known);
        let enough_bytes = (known.reserve_bytes() / 8).max(1);
        let state = match known.state {
            SpaceState::Full { reason: SpaceReason::Disk } => known.state,
            SpaceState::Full { .. } if room_bytes >= enough_bytes => SpaceState::Open,
            SpaceState::Full { .. } => SpaceState::Full { reason },
            SpaceState::Open if room_bytes == 0 => SpaceState::Full { reason },
            SpaceState::Open => SpaceState::Open,
        };
        drop(known);
        self.set_state(state);
    }

    fn set_state(&self, state: SpaceState) {
        let mut known = self.known.lock();
        if known.state == state {
            return;
        }
        known.state = state;
        known.since = self.clock.now();
        drop(known);
        match state {
            SpaceState::Open => tracing::info!("the store has room again"),
            SpaceState::Full { reason } => tracing::warn!(code = "EH6014", "the store is full: {reason}"),
        }
        self.changes.send_replace(state);
    }

    /// Asks the keeper to measure soon.
    pub(crate) fn call_keeper(&self) {
        let mut call = self.keeper.lock();
        if !std::mem::replace(&mut call.measure, true) {
            self.keeper_called.notify_one();
        }
    }

    pub(crate) fn close_keeper(&self) {
        self.keeper.lock().closing = true;
        self.keeper_called.notify_one();
    }

    /// Waits for a call, at most until `deadline`.
    pub(crate) fn await_call(&self, deadline: std::time::Instant) -> KeeperCall {
        let mut call = self.keeper.lock();
        while !call.measure && !call.closing {
            if self.keeper_called.wait_until(&mut call, deadline).timed_out() {
                break;
            }
        }
        let taken = *call;
        call.measure = false;
        taken
    }
}
