//! Owns who is let in when room is short: which requests are refused, and which queues make room for them.

use std::sync::Arc;
use std::time::Duration;

use super::Writer;
use super::stage::Staged;
use crate::error::StoreError;
use crate::intake::{Request, Work};
use crate::ledger::{DropReason, Outcome};
use crate::letters::DeadLetterReason;
use crate::queue::QueueShared;
use crate::reader::{self, Look};
use crate::record::{AppendRequest, Overflow, ReadLimit};
use crate::rows::{LetterHead, Mark};
use crate::space::SpaceReason;
use crate::state::PendingLetter;

/// What an entry takes up beside its body, rounded up: key, head, and its share of the other rows.
const ENTRY_BYTES: u64 = 64;
/// Room is made in so many steps at most; then the request is refused.
const STEPS_MAX: usize = 8;
/// A step takes this much, or what the request needs, or a 64th of the limit if that is less.
const STEP_BYTES: u64 = 16 << 20;
/// While requests are refused, the disk is measured this often.
const MEASURE_EVERY: Duration = Duration::from_millis(50);

/// A queue that can make room, and how.
type Giver = (Arc<QueueShared>, Overflow);

impl Writer {
    /// Answers the requests that find no room, and returns the others.
    pub(super) fn admit(&mut self, mut requests: Vec<Request>) -> Vec<Request> {
        if requests.iter().any(|request| request.done.is_behind()) {
            let (behind, others): (Vec<_>, Vec<_>) =
                requests.into_iter().partition(|request| request.done.is_behind());
            behind.into_iter().for_each(|request| request.done.send(Err(StoreError::Behind)));
            requests = others;
        }
        let needed_bytes: u64 = requests.iter().map(|request| needed(&request.work)).sum();
        if needed_bytes <= self.gauge.room().0 {
            return requests;
        }
        let mut admitted_bytes = 0;
        let mut admitted = Vec::with_capacity(requests.len());
        for request in requests.drain(..) {
            if request.done.is_behind() {
                request.done.send(Err(StoreError::Behind));
                continue;
            }
            let bytes = needed(&request.work);
            let verdict = match bytes {
                0 => Ok(()),
                _ => self.find_room(&request.work, admitted_bytes + bytes),
            };
            match verdict {
                Ok(()) => {
                    admitted_bytes += bytes;
                    admitted.push(request);
                }
                Err(reason) => {
                    self.gauge.refused(reason);
                    request.done.send(Err(StoreError::Full { reason }));
                }
            }
        }
        admitted
    }

    fn find_room(&mut self, work: &Work, bytes: u64) -> Result<(), SpaceReason> {
        if self.has_room(bytes).is_ok() {
            return Ok(());
        }
        if self.measured_at.is_none_or(|at| at.elapsed() >= MEASURE_EVERY) {
            self.measure();
        }
        let mut reason = match self.has_room(bytes) {
            Ok(()) => return Ok(()),
            Err(reason) => reason,
        };
        // Nobody is refused for what is settled and only not given back yet.
        if self.give_back() && self.has_room(bytes).is_ok() {
            return Ok(());
        }
        let Some(givers) = self.givers(work) else { return Err(reason) };
        let held = |(shared, _): &Giver| shared.with(|state| state.held_bytes());
        let most_bytes = givers.iter().map(held).fold(self.gauge.room().0, u64::saturating_add);
        if most_bytes < bytes {
            // Nothing is dropped for what would not fit even then.
            return Err(reason);
        }
        for _ in 0..STEPS_MAX {
            if !self.make_room(&givers, bytes, reason) {
                return Err(reason);
            }
            reason = match self.has_room(bytes) {
                Ok(()) => return Ok(()),
                Err(reason) => reason,
            };
        }
        Err(reason)
    }

    fn has_room(&self, bytes: u64) -> Result<(), SpaceReason> {
        let (room_bytes, reason) = self.gauge.room();
        if bytes <= room_bytes { Ok(()) } else { Err(reason) }
    }

    /// The queues that may make room for the request; `None` if one of its targets may not.
    fn givers(&self, work: &Work) -> Option<Vec<Giver>> {
        let Work::Append(append) = work else { return None };
        let mut givers: Vec<Giver> = Vec::new();
        for target in append.records.iter().flat_map(|record| &record.targets) {
            if target.overflow == Overflow::RejectNew {
                return None;
            }
            let known = givers
                .iter()
                .any(|(shared, overflow)| shared.id == target.queue.0 && *overflow == target.overflow);
            if !known {
                givers.push((self.registry.by_id(target.queue.0)?, target.overflow));
            }
        }
        Some(givers)
    }

    /// Takes the oldest stretches of the queue that holds most. False if there is nothing to take.
    fn make_room(&mut self, givers: &[Giver], bytes: u64, reason: SpaceReason) -> bool {
        let gives = |(shared, overflow): &&Giver| {
            // A move within a full disk frees nothing.
            let frees = *overflow == Overflow::DropOldest || reason == SpaceReason::Limit;
            frees && shared.with(|state| state.ledger().queued() > 0)
        };
        let held = |(shared, _): &&Giver| shared.with(|state| state.held_bytes());
        let Some((shared, overflow)) = givers.iter().filter(gives).max_by_key(held) else { return false };
        let enough_bytes = bytes.max(self.gauge.stretch_max_bytes().min(STEP_BYTES));
        let mut taken_bytes = 0;
        let mut draft = self.draft(0);
        while taken_bytes < enough_bytes {
            let Some(mark) = shared.with(|state| state.oldest_waiting().cloned()) else { break };
            if !self.take_stretch(shared, *overflow, &mark) {
                return false;
            }
            taken_bytes += mark.bytes;
        }
        if taken_bytes == 0 {
            // All that waits is in the stretch that grows: it is closed first, and taken in the next step.
            let Some(lane) = self.lanes.get(shared.id as usize) else { return false };
            let open = Mark::starting_at(lane.open.end);
            draft.staged.insert(shared.id, Staged { open, closed: vec![lane.open.clone()], hot: Vec::new() });
        } else {
            self.stage_settled(&mut draft, Arc::clone(shared));
        }
        let written = self.commit(draft, Vec::new(), Vec::new(), false).is_ok();
        if written && self.engine.used_bytes().is_none() {
            self.measure();
            if self.has_room(bytes).is_err() {
                self.give_back();
            }
        }
        written
    }

    /// Lets the engine give back what was released; false if there was nothing.
    fn give_back(&mut self) -> bool {
        let disk = self.engine.used_bytes().is_none();
        let given = disk && self.released.give_back(&self.engine, false);
        if given {
            self.measure();
        }
        given
    }

    /// Settles what waits in a stretch, as its policy says.
    fn take_stretch(&self, shared: &Arc<QueueShared>, overflow: Overflow, mark: &Mark) -> bool {
        match overflow {
            Overflow::RejectNew => return false,
            Overflow::DropOldest => {
                let dropped = Outcome::Dropped(DropReason::Overflow);
                shared.with(|state| state.settle_range(mark.start, mark.end, dropped));
            }
            Overflow::DeadLetter => {
                let limit = ReadLimit { count: usize::MAX, bytes: usize::MAX };
                let mut next = mark.start;
                while next < mark.end {
                    let range = next..mark.end;
                    let Ok(chunk) = reader::entries(&self.engine, shared, range, limit, Look::Settling)
                    else {
                        return false;
                    };
                    next = chunk.next;
                    for entry in chunk.entries {
                        let head = LetterHead {
                            reason: DeadLetterReason::Overflow,
                            attempts: 0,
                            queue: shared.id,
                            offset: entry.offset.get(),
                            accepted_at: entry.accepted_at,
                            ttl: entry.ttl,
                        };
                        let letter = PendingLetter { bytes: head.letter(&entry.bytes), at: shared.now() };
                        let bytes = letter.bytes.len() as u64;
                        let too_large = bytes > self.gauge.letters_max_bytes();
                        shared.with(|state| {
                            let at = entry.offset.get();
                            if too_large {
                                state.settle_range(at, at + 1, Outcome::Dropped(DropReason::Overflow));
                            } else if state.dead_letter(at, letter) {
                                self.gauge.add_pending(bytes);
                            }
                        });
                    }
                }
            }
        }
        shared.wake_checkpointed();
        true
    }
}

/// What a request takes up at most; 0 for what is never refused.
fn needed(work: &Work) -> u64 {
    match work {
        Work::Append(AppendRequest { records, .. }) => {
            let of_record = |record: &crate::record::Record| {
                record.bytes.len() as u64 + (1 + record.targets.len() as u64) * ENTRY_BYTES
            };
            records.iter().filter(|record| !record.targets.is_empty()).map(of_record).sum()
        }
        Work::Redrive(letters, _) => {
            letters.iter().map(|letter| letter.bytes.len() as u64 + ENTRY_BYTES).sum()
        }
        Work::Keyed(_) | Work::Discard(_) | Work::Barrier => 0,
    }
}
