//! Owns how the dead letters change: all of it in a draft, which holds when its write succeeds.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::Writer;
use super::stage::{Draft, MARK_BYTES, MARK_ENTRIES_MAX};
use crate::clock::StoreTime;
use crate::cursor::Cursor;
use crate::engine::{Family, Range};
use crate::ledger::{DropReason, Outcome, Outcomes};
use crate::letters::{DeadLetter, LetterWork};
use crate::record::{Overflow, Target, Ttl};
use crate::rows::{self, DEAD_LETTERS_QUEUE, Mark, ReferenceHead, SettleRow};
use crate::state::{PendingLetter, QueueState, Stretch};

/// The dead letters are released in this many stretches at least.
const STRETCHES_MIN: u64 = 16;

/// The dead letters as they will be.
pub(super) struct LettersDraft {
    cursor: Cursor,
    outcomes: Outcomes,
    /// Stretches, and whether their rows are stored.
    marks: Vec<(Mark, bool)>,
    open: Mark,
    max_bytes: u64,
}

impl LettersDraft {
    fn held_bytes(&self) -> u64 {
        self.marks.iter().map(|(mark, _)| mark.bytes).sum::<u64>() + self.open.bytes
    }

    fn settle(&mut self, from: u64, to: u64, outcome: Outcome) -> u64 {
        let fresh = self.cursor.settle_range(from, to.min(self.open.end));
        self.outcomes.count(outcome, fresh);
        fresh
    }

    fn close_open(&mut self) {
        let next = Mark::starting_at(self.open.end);
        self.marks.push((std::mem::replace(&mut self.open, next), false));
    }

    /// Drops the oldest stretches until the rest fits.
    fn bound(&mut self) {
        let mut held_bytes = self.held_bytes();
        let over = |held_bytes: u64| held_bytes > self.max_bytes;
        let mut end = None;
        for (mark, _) in &self.marks {
            if !over(held_bytes) {
                break;
            }
            held_bytes -= mark.bytes;
            end = Some(mark.end);
        }
        if over(held_bytes) && !self.open.is_empty() {
            end = Some(self.open.end);
        }
        if let Some(end) = end {
            self.settle(0, end, Outcome::Dropped(DropReason::Overflow));
        }
    }

    /// Makes the draft true.
    pub(super) fn publish(self, state: &mut QueueState) {
        state.tail = self.open.end;
        state.hot.skip_to(state.tail);
        state.open = Stretch::of(&self.open);
        state.open_bytes = self.open.bytes;
        state.cursor = self.cursor;
        state.outcomes = self.outcomes;
        state.marks = self.marks.into_iter().map(|(mark, _)| mark).collect();
    }
}

impl Writer {
    fn letters<'a>(&self, draft: &'a mut Draft) -> &'a mut LettersDraft {
        draft.letters.get_or_insert_with(|| {
            let max_bytes = self.gauge.letters_max_bytes();
            self.registry.letters().with(|state| LettersDraft {
                cursor: state.cursor.clone(),
                outcomes: state.outcomes,
                marks: state.marks.iter().map(|mark| (mark.clone(), true)).collect(),
                open: self.letters_open.clone(),
                max_bytes,
            })
        })
    }

    /// Appends what queues have moved to the dead letters.
    pub(super) fn stage_letters(&self, draft: &mut Draft, pending: &[PendingLetter]) {
        for PendingLetter { bytes, at } in pending {
            self.stage_letter(draft, bytes, *at);
        }
    }

    fn stage_letter(&self, draft: &mut Draft, letter: &Bytes, at: StoreTime) {
        let letters = self.letters(draft);
        let key = rows::reference_key(DEAD_LETTERS_QUEUE, letters.open.end);
        letters.open.add((key.len() + rows::REFERENCE_HEAD_MAX_BYTES + letter.len()) as u64, None, None);
        let stretch_bytes = (letters.max_bytes / STRETCHES_MIN).min(MARK_BYTES);
        if letters.open.bytes >= stretch_bytes || letters.open.end - letters.open.start >= MARK_ENTRIES_MAX {
            letters.close_open();
        }
        draft.scratch.clear();
        ReferenceHead { accepted_at: at, ttl: Ttl::Infinite, logged: None }.encode(&mut draft.scratch);
        self.engine.put(&mut draft.batch, Family::Reference, &key, &draft.scratch, letter);
    }

    /// Puts letters back into their queues.
    pub(super) fn stage_redrive(&self, draft: &mut Draft, redriven: &[DeadLetter], count: &AtomicU64) {
        draft.changed = true;
        for letter in redriven {
            let id = letter.id.get();
            if self.letters(draft).settle(id, id.saturating_add(1), Outcome::Delivered) == 0 {
                continue;
            }
            let target = Target { queue: letter.queue, ttl: letter.ttl, overflow: Overflow::RejectNew };
            self.stage_reference(draft, target, &letter.bytes, None);
            count.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Removes letters for good.
    pub(super) fn stage_discard(&self, draft: &mut Draft, work: &LetterWork) {
        draft.changed = true;
        for id in &work.ids {
            let purged = Outcome::Dropped(DropReason::Purged);
            let fresh = self.letters(draft).settle(*id, id.saturating_add(1), purged);
            work.done.fetch_add(fresh, Ordering::SeqCst);
        }
    }

    /// The bound of the dead letters was lowered.
    pub(super) fn stage_letters_bound(&self, draft: &mut Draft) {
        if self.gauge.letters_are_over() {
            self.letters(draft);
        }
    }

    /// The rows of the dead letters, and what of them is released.
    pub(super) fn stage_letters_rows(&self, draft: &mut Draft) {
        let Some(mut letters) = draft.letters.take() else { return };
        draft.changed = true;
        letters.bound();
        if !letters.open.is_empty() && letters.cursor.is_settled(letters.open.start, letters.open.end) {
            letters.close_open();
        }
        let (pages, gone) = letters.cursor.take_changes();
        let row = SettleRow { prefix: letters.cursor.prefix(), outcomes: letters.outcomes };
        draft.scratch.clear();
        rows::encode_settle(&row, &mut draft.scratch);
        self.put_row(draft, &rows::settle_key(DEAD_LETTERS_QUEUE));
        self.stage_pages(draft, DEAD_LETTERS_QUEUE, &pages, &gone);
        let LettersDraft { cursor, marks, .. } = &mut letters;
        marks.retain_mut(|(mark, stored)| {
            let key = rows::mark_key(DEAD_LETTERS_QUEUE, mark.end);
            if cursor.is_settled(mark.start, mark.end) {
                if *stored {
                    self.engine.delete(&mut draft.batch, Family::Meta, &key);
                }
                let range = Range {
                    family: Family::Reference,
                    from: rows::reference_key(DEAD_LETTERS_QUEUE, mark.start).to_vec(),
                    to: rows::reference_key(DEAD_LETTERS_QUEUE, mark.end).to_vec(),
                };
                self.stage_delete(draft, range);
                return false;
            }
            if !std::mem::replace(stored, true) {
                draft.scratch.clear();
                mark.encode(&mut draft.scratch);
                self.put_row(draft, &key);
            }
            true
        });
        draft.scratch.clear();
        letters.open.encode(&mut draft.scratch);
        self.put_row(draft, &rows::append_key(DEAD_LETTERS_QUEUE));
        draft.letters = Some(letters);
    }

    /// Makes the dead letters of a successful write visible.
    pub(super) fn publish_letters(&mut self, letters: LettersDraft) {
        self.letters_open = letters.open.clone();
        let held_bytes = self.registry.letters().with(|state| {
            letters.publish(state);
            state.held_bytes()
        });
        self.gauge.set_letters_bytes(held_bytes);
    }
}
