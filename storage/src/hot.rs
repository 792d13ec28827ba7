//! Owns the hot end of a queue: its newest entries in memory, within a budget that all queues share.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use crate::clock::StoreTime;
use crate::record::{Entry, Offset, Ttl};

/// What an entry costs beside its bytes.
const ENTRY_OVERHEAD_BYTES: usize = 64;

/// An entry that is held in memory.
#[derive(Debug, Clone)]
pub(crate) struct HotEntry {
    pub(crate) bytes: Bytes,
    pub(crate) accepted_at: StoreTime,
    pub(crate) ttl: Ttl,
}

impl HotEntry {
    fn cost_bytes(&self) -> usize {
        self.bytes.len() + ENTRY_OVERHEAD_BYTES
    }

    pub(crate) fn expires_at(&self) -> Option<StoreTime> {
        self.ttl.expires_at(self.accepted_at)
    }

    pub(crate) fn to_entry(&self, offset: u64) -> Entry {
        Entry {
            offset: Offset::new(offset),
            bytes: self.bytes.clone(),
            accepted_at: self.accepted_at,
            ttl: self.ttl,
        }
    }
}

/// The entries from `start` up to the queue's tail, without a hole.
#[derive(Debug)]
pub(crate) struct Hot {
    start: u64,
    entries: VecDeque<HotEntry>,
    used_bytes: Arc<AtomicUsize>,
}

impl Hot {
    pub(crate) fn new(tail: u64, used_bytes: Arc<AtomicUsize>) -> Self {
        Self { start: tail, entries: VecDeque::new(), used_bytes }
    }

    /// The first offset that is held.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn get(&self, offset: u64) -> Option<&HotEntry> {
        self.entries.get(usize::try_from(offset.checked_sub(self.start)?).ok()?)
    }

    pub(crate) fn push(&mut self, entry: HotEntry) {
        self.used_bytes.fetch_add(entry.cost_bytes(), Ordering::Relaxed);
        self.entries.push_back(entry);
    }

    /// Lets go of everything below `offset`.
    pub(crate) fn drop_below(&mut self, offset: u64) {
        let mut freed_bytes = 0;
        while self.start < offset {
            let Some(entry) = self.entries.pop_front() else { break };
            freed_bytes += entry.cost_bytes();
            self.start += 1;
        }
        self.free(freed_bytes);
    }

    /// Holds nothing below `tail`, because what was appended up to there was not kept.
    pub(crate) fn skip_to(&mut self, tail: u64) {
        self.drop_below(tail);
        self.start = self.start.max(tail);
    }

    /// When the oldest entry that is held was accepted.
    pub(crate) fn oldest(&self) -> Option<StoreTime> {
        self.entries.front().map(|entry| entry.accepted_at)
    }

    /// Lets go of the oldest entries until `needed_bytes` are free, but of none accepted after `until`. Returns
    /// what was freed.
    pub(crate) fn evict(&mut self, needed_bytes: usize, until: StoreTime) -> usize {
        let mut freed_bytes = 0;
        while freed_bytes < needed_bytes && self.oldest().is_some_and(|oldest| oldest <= until) {
            let Some(entry) = self.entries.pop_front() else { break };
            freed_bytes += entry.cost_bytes();
            self.start += 1;
        }
        self.free(freed_bytes);
        freed_bytes
    }

    fn free(&mut self, freed_bytes: usize) {
        if freed_bytes > 0 {
            self.used_bytes.fetch_sub(freed_bytes, Ordering::Relaxed);
            if self.entries.capacity() > 1024 && self.entries.len() < self.entries.capacity() / 4 {
                self.entries.shrink_to(self.entries.len() * 2);
            }
        }
    }
}

impl Drop for Hot {
    fn drop(&mut self) {
        let held_bytes = self.entries.iter().map(HotEntry::cost_bytes).sum();
        self.used_bytes.fetch_sub(held_bytes, Ordering::Relaxed);
    }
}
