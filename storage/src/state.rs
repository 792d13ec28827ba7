//! Owns what is known of one queue in memory: its tail, what is settled, what is held, what can be released.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;

use crate::clock::StoreTime;
use crate::cursor::{Cursor, SETTLE_WINDOW_MAX};
use crate::hot::Hot;
use crate::ledger::{Ledger, Outcome, Outcomes};
use crate::record::{Batch, BatchEnd, Offset, ReadLimit};
use crate::rows::Mark;

/// A dead letter that waits to be written, together with the settlement of its entry.
#[derive(Debug, Clone)]
pub(crate) struct PendingLetter {
    /// As it is stored.
    pub(crate) bytes: Bytes,
    /// When the entry was settled.
    pub(crate) at: StoreTime,
}

/// When the entries of a stretch expire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) first_expiry: Option<StoreTime>,
    pub(crate) last_expiry: Option<StoreTime>,
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
    /// The stretch that grows, without its share of the log.
    pub(crate) open: Stretch,
    /// What the stretch that grows takes up.
    pub(crate) open_bytes: u64,
    /// Dead letters to be written with the settlements.
    pub(crate) letters: Vec<PendingLetter>,
    /// Whether a stretch beyond the prefix may have been settled as a whole.
    pub(crate) settled_beyond: bool,
    /// Whether the writer knows that there are settlements to write.
    pub(crate) listed: bool,
}

impl Stretch {
    pub(crate) fn of(mark: &Mark) -> Self {
        let Mark { start, end, first_expiry, last_expiry, .. } = *mark;
        Self { start, end, first_expiry, last_expiry }
    }

    fn is_over(&self, now: StoreTime) -> bool {
        self.last_expiry.is_some_and(|last| now >= last)
    }

    fn has_begun(&self, now: StoreTime) -> bool {
        self.first_expiry.is_some_and(|first| now >= first)
    }
}

impl QueueState {
    pub(crate) fn new(
        cursor: Cursor,
        outcomes: Outcomes,
        hot: Hot,
        marks: VecDeque<Mark>,
        open: &Mark,
    ) -> Self {
        Self {
            tail: open.end,
            cursor,
            outcomes,
            hot,
            marks,
            open: Stretch::of(open),
            open_bytes: open.bytes,
            letters: Vec::new(),
            settled_beyond: false,
            listed: false,
        }
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
        self.settled_beyond |= fresh > 0 && self.cursor.beyond() > 0;
        fresh
    }

    /// Settles an entry as moved to the dead letters; false if it was settled before.
    pub(crate) fn dead_letter(&mut self, offset: u64, letter: PendingLetter) -> bool {
        let fresh = self.cursor.settle_range(offset, offset.saturating_add(1).min(self.tail)) == 1;
        if fresh {
            self.outcomes.dead_lettered += 1;
            self.letters.push(letter);
        }
        fresh
    }

    /// What the stretches that are not released take up.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.marks.iter().map(|mark| mark.bytes).sum::<u64>() + self.open_bytes
    }

    /// The oldest closed stretch with entries that wait.
    pub(crate) fn oldest_waiting(&self) -> Option<&Mark> {
        self.marks.iter().find(|mark| !self.cursor.is_settled(mark.start, mark.end))
    }

    /// Whether a stretch at the head can be released.
    pub(crate) fn is_due(&self) -> bool {
        self.marks.front().is_some_and(|mark| mark.end <= self.cursor.prefix())
    }

    /// The stretches of which every entry is settled.
    pub(crate) fn due(&mut self) -> Vec<Mark> {
        let prefix = self.cursor.prefix();
        let beyond = std::mem::take(&mut self.settled_beyond) && self.cursor.beyond() > 0;
        let settled =
            |mark: &&Mark| mark.end <= prefix || beyond && self.cursor.is_settled(mark.start, mark.end);
        if beyond {
            return self.marks.iter().filter(settled).cloned().collect();
        }
        self.marks.iter().take_while(settled).cloned().collect()
    }

    /// Settles whole stretches from `from` on of which every entry has expired, without looking at the entries,
    /// up to the first other one. Returns how many entries expired.
    pub(crate) fn expire_run(&mut self, from: u64, now: StoreTime) -> u64 {
        let mut expired = 0;
        let first = self.marks.partition_point(|mark| mark.end <= from);
        for index in first..self.marks.len() {
            let stretch = Stretch::of(&self.marks[index]);
            if !stretch.is_over(now) {
                return expired;
            }
            expired += self.settle_range(stretch.start.max(from), stretch.end, Outcome::Expired);
        }
        expired + self.expire_open(from, now)
    }

    /// Settles all stretches of which every entry has expired.
    pub(crate) fn expire_stretches(&mut self, now: StoreTime) -> u64 {
        let mut expired = 0;
        for index in 0..self.marks.len() {
            let stretch = Stretch::of(&self.marks[index]);
            if stretch.is_over(now) && !self.cursor.is_settled(stretch.start, stretch.end) {
                expired += self.settle_range(stretch.start, stretch.end, Outcome::Expired);
            }
        }
        expired + self.expire_open(0, now)
    }

    /// Looks for stretches beyond the prefix that were settled entry by entry; true if one can be released.
    pub(crate) fn find_settled_beyond(&mut self) -> bool {
        let settled = |mark: &Mark| self.cursor.is_settled(mark.start, mark.end);
        self.settled_beyond |= self.cursor.beyond() > 0 && self.marks.iter().any(settled);
        self.settled_beyond && self.cursor.beyond() > 0
    }

    fn expire_open(&mut self, from: u64, now: StoreTime) -> u64 {
        let Stretch { start, end, .. } = self.open;
        if start == end || from >= end || !self.open.is_over(now) {
            return 0;
        }
        self.settle_range(start.max(from), end, Outcome::Expired)
    }

    /// The stretches of which some entries have expired and others have not, or which were not looked at since.
    pub(crate) fn expiring(&self, now: StoreTime) -> Vec<Range<u64>> {
        let stretches = self.marks.iter().map(Stretch::of).chain([self.open]);
        let due = stretches.filter(|stretch| {
            stretch.has_begun(now)
                && !stretch.is_over(now)
                && !self.cursor.is_settled(stretch.start, stretch.end)
        });
        due.map(|stretch| stretch.start..stretch.end).collect()
    }

    /// The stretch at `start` was looked at: what is left of it begins to expire then.
    pub(crate) fn set_first_expiry(&mut self, looked_at: &Range<u64>, first_expiry: Option<StoreTime>) {
        let index = self.marks.partition_point(|mark| mark.start < looked_at.start);
        if let Some(mark) = self.marks.get_mut(index)
            && mark.start == looked_at.start
            && mark.end == looked_at.end
        {
            mark.first_expiry = first_expiry;
        } else if self.open.start == looked_at.start && self.open.end == looked_at.end {
            self.open.first_expiry = first_expiry;
        }
    }

    pub(crate) fn read_hot(
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
