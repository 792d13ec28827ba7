//! Owns the dead letters as operators see them: what could not be delivered, why, and what becomes of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::clock::StoreTime;
use crate::error::StoreError;
use crate::intake::{Intake, Work};
use crate::ledger::{DropReason, Ledger};
use crate::reader::ReaderHandle;
use crate::record::{Offset, QueueId, ReadLimit, Ttl};
use crate::registry::Registry;
use crate::rows::LetterHead;

/// The most dead letters that one call puts back or discards.
pub const LETTERS_PER_CALL_MAX: usize = 1024;

/// Why an entry was moved to the dead letters. The list is closed; its numbers are part of the stored form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DeadLetterReason {
    /// The receiver refused it.
    RejectedByReceiver = 0,
    /// Its sender is no longer in scope.
    OutOfScope = 1,
    /// It names no sender.
    NoIdentity = 2,
    /// It cannot be converted to the receiver's protocol.
    Conversion = 3,
    /// It was tried as often as it may be.
    AttemptsExhausted = 4,
    /// It made room for newer ones.
    Overflow = 5,
}

impl DeadLetterReason {
    /// All reasons.
    pub const ALL: [Self; 6] = [
        Self::RejectedByReceiver,
        Self::OutOfScope,
        Self::NoIdentity,
        Self::Conversion,
        Self::AttemptsExhausted,
        Self::Overflow,
    ];

    /// The reason as a metric's label.
    pub fn as_str(self) -> &'static str {
        self.as_drop().as_str()
    }

    /// What an entry is dropped for when there is no room for dead letters.
    pub fn as_drop(self) -> DropReason {
        match self {
            Self::RejectedByReceiver => DropReason::RejectedByReceiver,
            Self::OutOfScope => DropReason::OutOfScope,
            Self::NoIdentity => DropReason::NoIdentity,
            Self::Conversion => DropReason::Conversion,
            Self::AttemptsExhausted => DropReason::AttemptsExhausted,
            Self::Overflow => DropReason::Overflow,
        }
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u8 == number)
    }
}

/// An entry that was moved to the dead letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its place among the dead letters; never used twice.
    pub id: Offset,
    /// The queue that it comes from.
    pub queue: QueueId,
    /// That queue's name.
    pub queue_name: Arc<str>,
    /// Its offset there.
    pub offset: Offset,
    /// Why it is here.
    pub reason: DeadLetterReason,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was appended to its queue, on the store's clock.
    pub accepted_at: StoreTime,
    /// How long it could have waited there.
    pub ttl: Ttl,
    /// When it was moved here.
    pub dead_lettered_at: StoreTime,
    /// The record's bytes.
    pub bytes: Bytes,
}

/// The dead letters of a store; cheap to clone. They do not expire: an operator puts them back or discards them,
/// and at [`StoreLimits::dead_letters_max_bytes`](crate::StoreLimits::dead_letters_max_bytes) the oldest go, counted
/// as [`DropReason::Overflow`] in [`HubLedger::dead_letters`](crate::HubLedger::dead_letters).
#[derive(Debug, Clone)]
pub struct DeadLetters {
    registry: Arc<Registry>,
    intake: Arc<Intake>,
    reader: ReaderHandle,
}

/// Which letters the writer is to settle, and how many it found there.
#[derive(Debug, Default)]
pub(crate) struct LetterWork {
    pub(crate) ids: Vec<u64>,
    pub(crate) done: Arc<AtomicU64>,
}

impl DeadLetters {
    pub(crate) fn new(registry: Arc<Registry>, intake: Arc<Intake>, reader: ReaderHandle) -> Self {
        Self { registry, intake, reader }
    }

    /// The account of the dead letters; see [`HubLedger::dead_letters`](crate::HubLedger::dead_letters).
    pub fn ledger(&self) -> Ledger {
        self.registry.letters().with(|state| state.ledger())
    }

    /// Dead letters behind `after`, oldest first, up to `limit`; of one queue if one is named. Read on with the
    /// last id until none come.
    ///
    /// # Errors
    /// When the disk cannot be read, or the store is closed.
    pub async fn list(
        &self,
        after: Option<Offset>,
        limit: ReadLimit,
        queue: Option<QueueId>,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let shared = self.registry.letters();
        let mut next = after.map_or(0, |after| after.next().get());
        let (mut letters, mut bytes) = (Vec::new(), 0);
        loop {
            let (from, tail) = shared.with(|state| (state.cursor.next_open(next), state.tail));
            if from >= tail {
                return Ok(letters);
            }
            let chunk = self.reader.peek(Arc::clone(shared), from..tail, limit).await?;
            for entry in chunk.entries {
                let Some(letter) = self.letter(entry.offset, entry.accepted_at, &entry.bytes) else {
                    continue;
                };
                if queue.is_some_and(|queue| queue != letter.queue) {
                    continue;
                }
                bytes += letter.bytes.len();
                if !letters.is_empty() && (letters.len() >= limit.count || bytes > limit.bytes) {
                    return Ok(letters);
                }
                letters.push(letter);
            }
            next = chunk.next;
        }
    }

    /// One dead letter; `None` if it is not there any more, or cannot be read.
    ///
    /// # Errors
    /// When the disk cannot be read, or the store is closed.
    pub async fn get(&self, id: Offset) -> Result<Option<DeadLetter>, StoreError> {
        let shared = self.registry.letters();
        let at = id.get();
        if shared.with(|state| at >= state.tail || state.cursor.next_open(at) != at) {
            return Ok(None);
        }
        let limit = ReadLimit { count: 1, bytes: usize::MAX };
        let chunk = self.reader.peek(Arc::clone(shared), at..at + 1, limit).await?;
        let entry = chunk.entries.into_iter().next();
        Ok(entry.and_then(|entry| self.letter(entry.offset, entry.accepted_at, &entry.bytes)))
    }

    /// Puts letters back at the end of the queues that they come from, in the order given, in one atomic write;
    /// returns how many. Each gets the time to live that it had, counted anew from now. Those that are not here
    /// any more, or cannot be read, are passed over.
    ///
    /// # Errors
    /// When there is no room, the write failed, too many ids or bytes were given, or the store is closed.
    pub async fn redrive(&self, ids: &[Offset]) -> Result<u64, StoreError> {
        check_count(ids)?;
        let (mut letters, mut bytes) = (Vec::new(), 0);
        for id in ids {
            letters.extend(self.get(*id).await?);
            bytes += letters.last().map_or(0, |letter: &DeadLetter| letter.bytes.len());
            if bytes > crate::REQUEST_MAX_BYTES {
                return Err(StoreError::TooLarge {
                    length_bytes: bytes,
                    max_bytes: crate::REQUEST_MAX_BYTES,
                });
            }
        }
        let count = Arc::new(AtomicU64::new(0));
        let work = Work::Redrive(letters, Arc::clone(&count));
        let done = self.intake.submit(work, bytes, None).await?;
        done.await.unwrap_or(Err(StoreError::Closed))?;
        Ok(count.load(Ordering::SeqCst))
    }

    /// Removes letters for good, in one atomic write, counted as [`DropReason::Purged`]; returns how many. Those
    /// that are not here any more are passed over.
    ///
    /// # Errors
    /// When the write failed, too many ids were given, or the store is closed.
    pub async fn discard(&self, ids: &[Offset]) -> Result<u64, StoreError> {
        check_count(ids)?;
        let work = LetterWork { ids: ids.iter().map(|id| id.get()).collect(), ..LetterWork::default() };
        let count = Arc::clone(&work.done);
        let done = self.intake.submit(Work::Discard(work), 0, None).await?;
        done.await.unwrap_or(Err(StoreError::Closed))?;
        Ok(count.load(Ordering::SeqCst))
    }

    fn letter(&self, id: Offset, dead_lettered_at: StoreTime, letter: &Bytes) -> Option<DeadLetter> {
        let (head, bytes) = LetterHead::split(letter)?;
        let queue = self.registry.by_id(head.queue)?;
        Some(DeadLetter {
            id,
            queue: QueueId(head.queue),
            queue_name: Arc::clone(&queue.name),
            offset: Offset::new(head.offset),
            reason: head.reason,
            attempts: head.attempts,
            accepted_at: head.accepted_at,
            ttl: head.ttl,
            dead_lettered_at,
            bytes,
        })
    }
}

fn check_count(ids: &[Offset]) -> Result<(), StoreError> {
    if ids.len() > LETTERS_PER_CALL_MAX {
        return Err(StoreError::TooManyLetters { count: ids.len(), max: LETTERS_PER_CALL_MAX });
    }
    Ok(())
}
