//! Owns what goes into a queue and what comes out of it: records, targets, entries.

use std::fmt;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::clock::StoreTime;

/// Identifies a queue inside one store; kept durably together with the queue's name, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(pub(crate) u32);

impl QueueId {
    /// The number, for logs and metrics.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for QueueId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// A position in a queue: 0 for the first entry, then one more for each. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Offset(u64);

impl Offset {
    /// The offset of the first entry of any queue.
    pub const ZERO: Self = Self(0);

    /// The offset with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The offset behind this one.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// How long an entry may wait in a queue, counted from its append; bound when it is appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ttl {
    /// Never expires.
    Infinite,
    /// Expires when this many milliseconds have passed; 0 expires at once.
    Millis(u64),
}

impl Ttl {
    /// When something appended at `accepted_at` expires; `None` means never.
    pub fn expires_at(self, accepted_at: StoreTime) -> Option<StoreTime> {
        match self {
            Self::Infinite => None,
            // A sum beyond the range of the clock is later than any time the clock can show.
            Self::Millis(millis) => accepted_at.checked_add_millis(millis),
        }
    }
}

/// What a queue does when there is no room for a record.
///
/// A request that finds no room is refused whole when one of its targets says [`RejectNew`](Self::RejectNew).
/// Otherwise its queues make room for all of it, the one that holds most first. If that is not enough, because they
/// are empty or the disk itself is full, the request is refused all the same, and what was removed stays removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Overflow {
    /// The request is refused with [`StoreError::Full`](crate::StoreError::Full); nothing is in any queue.
    #[default]
    RejectNew,
    /// The queue's oldest stretch is dropped, and counted as [`DropReason::Overflow`](crate::DropReason::Overflow).
    /// A stretch has up to 10 000 entries and 4 MiB, or a 64th of the limit if that is less.
    DropOldest,
    /// The queue's oldest stretch is moved to the dead letters, which let go of their own oldest at their bound.
    /// Makes no room on a disk that is full, so that the request is refused there.
    DeadLetter,
}

/// One queue that takes a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The queue.
    pub queue: QueueId,
    /// How long the record may wait there.
    pub ttl: Ttl,
    /// What happens when there is no room.
    pub overflow: Overflow,
}

/// Some bytes and the queues that take them.
///
/// `bytes` is kept in memory as it is while it is among the newest entries of its queues. A slice keeps the
/// whole buffer that it was cut from: hand in bytes that own a buffer of about their own size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The record itself; opaque to the store.
    pub bytes: Bytes,
    /// The queues; each at most once. A record without any counts as unrouted.
    pub targets: SmallVec<[Target; 2]>,
}

/// What is to be stored as one atomic unit: all of it or nothing, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AppendRequest {
    /// The records, in the order in which each queue takes them.
    pub records: Vec<Record>,
    /// Accepted messages that no route took: only counted, in the same batch.
    pub unrouted: u64,
}

/// An entry of a queue, as it was appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its position.
    pub offset: Offset,
    /// The record's bytes.
    pub bytes: Bytes,
    /// When it was appended, on the store's clock.
    pub accepted_at: StoreTime,
    /// How long it may wait.
    pub ttl: Ttl,
}

impl Entry {
    /// Whether its time to live has ended: `now − accepted_at ≥ ttl`. Take `now` from
    /// [`Store::now`](crate::Store::now), before each attempt to send.
    pub fn is_expired(&self, now: StoreTime) -> bool {
        self.ttl.expires_at(self.accepted_at).is_some_and(|end| now >= end)
    }
}

/// How much one read may return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadLimit {
    /// At most this many entries (at least one is read).
    pub count: usize,
    /// At most this many bytes of records; the first entry is returned whatever its size.
    pub bytes: usize,
}

/// What a read found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Live entries in order; settled and expired ones are left out.
    pub entries: Vec<Entry>,
    /// Where the next read goes on.
    pub next: Offset,
    /// How many entries this read found expired, and settled as such.
    pub expired: u64,
    /// Why there are no more entries.
    pub end: BatchEnd,
}

/// Why a batch ended where it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchEnd {
    /// There may be more: read on.
    More,
    /// Everything up to the tail was seen: wait with [`Queue::appended`](crate::Queue::appended).
    Tail,
    /// `from` is [`SETTLE_WINDOW_MAX`](crate::SETTLE_WINDOW_MAX) or more beyond the checkpoint: wait with
    /// [`Queue::checkpointed`](crate::Queue::checkpointed).
    Window,
}
