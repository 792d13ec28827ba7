//! Owns how a group of requests and settlements becomes one batch. Nothing of it holds before the write succeeds.

use std::sync::Arc;

use ahash::AHashMap;
use bytes::Bytes;

use super::Writer;
use super::letters::LettersDraft;
use crate::clock::StoreTime;
use crate::cursor::PageBits;
use crate::engine::{Batch, Family, Range};
use crate::hot::HotEntry;
use crate::queue::QueueShared;
use crate::record::{AppendRequest, Target};
use crate::rows::{self, HubRow, Logged, Mark, ReferenceHead, SettleRow};
use crate::state::PendingLetter;

/// A stretch of a queue is closed, and later released as one, at this many entries ..
pub(super) const MARK_ENTRIES_MAX: u64 = 10_000;
/// .. or bytes, its share of the log included ..
pub(super) const MARK_BYTES: u64 = 4 << 20;
/// .. or segments of the log that it refers to.
const MARK_SEGMENTS_MAX: usize = 16;
/// A segment of the log, which is released as one, ends at this many bytes ..
const SEGMENT_BYTES: u64 = 1 << 20;
/// .. or bodies.
const SEGMENT_BODIES_MAX: u64 = 4096;
/// The clock is stored when it went on by this, with the next write.
const CLOCK_ROW_MS: u64 = 1000;
/// The clock is stored by itself when the wall clock was set by this or more.
const CLOCK_SKEW_MS: i128 = 1000;

/// Changes to a lane that hold when the write succeeds.
pub(super) struct Staged {
    pub(super) open: Mark,
    pub(super) closed: Vec<Mark>,
    pub(super) hot: Vec<HotEntry>,
}

/// Settlements that are being written, to be taken back if that fails.
pub(super) struct Noted {
    pub(super) shared: Arc<QueueShared>,
    pub(super) pages: Vec<u64>,
    pub(super) gone: Vec<u64>,
    pub(super) letters: Vec<PendingLetter>,
    /// The stretches that are released, by their start; in order.
    pub(super) released: Vec<u64>,
}

/// Where the next shared body goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogEnd {
    pub(super) segment: u64,
    pub(super) bodies: u64,
    pub(super) bytes: u64,
}

/// What a group is being turned into.
pub(super) struct Draft {
    pub(super) batch: Batch,
    pub(super) now: StoreTime,
    pub(super) hub: HubRow,
    pub(super) log: LogEnd,
    pub(super) staged: AHashMap<u32, Staged>,
    pub(super) noted: Vec<Noted>,
    /// Changes to the number of references into segments of the log.
    pub(super) references: AHashMap<u64, i64>,
    /// Ranges whose files can go after the write.
    pub(super) reclaim: Vec<Range>,
    /// The dead letters, if they change.
    pub(super) letters: Option<LettersDraft>,
    pub(super) changed: bool,
    /// Whether somebody waits for its write to be durable.
    pub(super) awaited: bool,
    /// Whether something must be written, so that it is synced with all before it.
    pub(super) barrier: bool,
    pub(super) scratch: Vec<u8>,
}

impl Writer {
    /// New queues get their names stored, without a hole in their ids.
    pub(super) fn stage_names(&mut self, draft: &mut Draft) -> Vec<Arc<QueueShared>> {
        let new = self.registry.all_from(self.lanes.len());
        for shared in &new {
            draft.changed = true;
            let key = rows::name_key(shared.id);
            self.engine.put(&mut draft.batch, Family::Meta, &key, shared.name.as_bytes(), &Bytes::new());
        }
        new
    }

    pub(super) fn stage_append(&mut self, draft: &mut Draft, append: AppendRequest) {
        draft.changed = true;
        draft.hub.unrouted += append.unrouted;
        for record in append.records {
            draft.hub.references += record.targets.len() as u64;
            match record.targets.as_slice() {
                [] => draft.hub.unrouted += 1,
                [target] => {
                    draft.hub.records += 1;
                    self.stage_reference(draft, *target, &record.bytes, None);
                }
                targets => {
                    draft.hub.records += 1;
                    let logged = self.stage_body(draft, &record.bytes);
                    for target in targets {
                        self.stage_reference(draft, *target, &record.bytes, Some(logged));
                    }
                }
            }
        }
    }

    fn stage_body(&self, draft: &mut Draft, bytes: &Bytes) -> Logged {
        if draft.log.bodies >= SEGMENT_BODIES_MAX || draft.log.bytes >= SEGMENT_BYTES {
            // So that the segment is looked at below, even if nothing refers to it any more.
            draft.references.entry(draft.log.segment).or_default();
            draft.log = LogEnd { segment: draft.log.segment + 1, bodies: 0, bytes: 0 };
        }
        draft.hub.next_segment = draft.log.segment + 1;
        let sequence = draft.log.segment << rows::SEGMENT_SHIFT | draft.log.bodies;
        draft.log.bodies += 1;
        draft.log.bytes += bytes.len() as u64;
        self.engine.put(&mut draft.batch, Family::Log, &rows::log_key(sequence), &[], bytes);
        // Exact: a request is at most `REQUEST_MAX_BYTES`.
        Logged { sequence, length_bytes: bytes.len() as u32 }
    }

    pub(super) fn stage_reference(
        &self,
        draft: &mut Draft,
        target: Target,
        bytes: &Bytes,
        logged: Option<Logged>,
    ) {
        let queue = target.queue.0;
        let staged = draft.staged.entry(queue).or_insert_with(|| Staged {
            open: self
                .lanes
                .get(queue as usize)
                .map_or_else(|| Mark::starting_at(0), |lane| lane.open.clone()),
            closed: Vec::new(),
            hot: Vec::new(),
        });
        let offset = staged.open.end;
        let head = ReferenceHead { accepted_at: draft.now, ttl: target.ttl, logged };
        draft.scratch.clear();
        head.encode(&mut draft.scratch);
        let key = rows::reference_key(queue, offset);
        let body = if logged.is_some() { &Bytes::new() } else { bytes };
        self.engine.put(&mut draft.batch, Family::Reference, &key, &draft.scratch, body);
        let segment = logged.map(|logged| logged.sequence >> rows::SEGMENT_SHIFT);
        if let Some(segment) = segment {
            *draft.references.entry(segment).or_default() += 1;
        }
        let stored_bytes = (key.len() + rows::REFERENCE_HEAD_MAX_BYTES + bytes.len()) as u64;
        staged.open.add(stored_bytes, target.ttl.expires_at(draft.now), segment);
        staged.hot.push(HotEntry { bytes: bytes.clone(), accepted_at: draft.now, ttl: target.ttl });
        let entries = staged.open.end - staged.open.start;
        if entries >= MARK_ENTRIES_MAX
            || staged.open.bytes >= self.mark_bytes
            || staged.open.segments.len() >= MARK_SEGMENTS_MAX
        {
            let next = Mark::starting_at(staged.open.end);
            staged.closed.push(std::mem::replace(&mut staged.open, next));
        }
    }

    /// Closes stretches of queues at rest that are settled, so that a quiet queue gives back all its space.
    pub(super) fn stage_idle(&mut self, draft: &mut Draft) {
        for (id, lane) in self.lanes.iter_mut().enumerate() {
            let rested = !std::mem::replace(&mut lane.active, false);
            let id = id as u32;
            if !rested || lane.open.is_empty() || draft.staged.contains_key(&id) {
                continue;
            }
            if lane.shared.with(|state| state.cursor.prefix() >= state.tail) {
                let open = Mark::starting_at(lane.open.end);
                let closed = vec![lane.open.clone()];
                draft.staged.insert(id, Staged { open, closed, hot: Vec::new() });
            }
        }
    }

    /// Stores how far a queue is settled, and releases what nobody will read again.
    pub(super) fn stage_settled(&mut self, draft: &mut Draft, shared: Arc<QueueShared>) {
        let id = shared.id;
        let (row, pages, gone, marks, letters) = shared.with(|state| {
            QueueShared::unlist(state);
            let (pages, gone) = state.cursor.take_changes();
            let row = SettleRow { prefix: state.cursor.prefix(), outcomes: state.outcomes };
            (row, pages, gone, state.due(), std::mem::take(&mut state.letters))
        });
        draft.changed = true;
        draft.scratch.clear();
        rows::encode_settle(&row, &mut draft.scratch);
        self.put_row(draft, &rows::settle_key(id));
        self.stage_pages(draft, id, &pages, &gone);
        self.stage_letters(draft, &letters);
        // Stretches side by side are released as one.
        let mut run: Option<(u64, u64)> = None;
        for mark in &marks {
            self.engine.delete(&mut draft.batch, Family::Meta, &rows::mark_key(id, mark.end));
            for (segment, references) in &mark.segments {
                *draft.references.entry(*segment).or_default() -= i64::from(*references);
            }
            run = match run {
                Some((start, end)) if end == mark.start => Some((start, mark.end)),
                other => {
                    self.stage_release(draft, id, other);
                    Some((mark.start, mark.end))
                }
            };
        }
        self.stage_release(draft, id, run);
        draft.noted.push(Noted {
            shared,
            pages: pages.into_iter().map(|(number, _)| number).collect(),
            gone,
            letters,
            released: marks.iter().map(|mark| mark.start).collect(),
        });
    }

    pub(super) fn stage_pages(
        &self,
        draft: &mut Draft,
        id: u32,
        pages: &[(u64, Box<PageBits>)],
        gone: &[u64],
    ) {
        for (number, bits) in pages {
            draft.scratch.clear();
            rows::encode_page(bits, &mut draft.scratch);
            self.put_row(draft, &rows::page_key(id, *number));
        }
        for number in gone {
            self.engine.delete(&mut draft.batch, Family::Meta, &rows::page_key(id, *number));
        }
    }

    fn stage_release(&self, draft: &mut Draft, id: u32, run: Option<(u64, u64)>) {
        let Some((start, end)) = run else { return };
        let (from, to) = (rows::reference_key(id, start).to_vec(), rows::reference_key(id, end).to_vec());
        self.stage_delete(draft, Range { family: Family::Reference, from, to });
    }

    /// Deletes a range that nobody reads again, and its files after the write.
    pub(super) fn stage_delete(&self, draft: &mut Draft, range: Range) {
        self.engine.delete_range(&mut draft.batch, range.family, &range.from, &range.to);
        draft.reclaim.push(range);
    }

    /// The rows that follow from everything else: tails, stretches, counters, the clock.
    pub(super) fn stage_rows(&mut self, draft: &mut Draft, tick: bool) {
        let staged = std::mem::take(&mut draft.staged);
        for (id, lane) in &staged {
            for mark in &lane.closed {
                draft.scratch.clear();
                mark.encode(&mut draft.scratch);
                self.put_row(draft, &rows::mark_key(*id, mark.end));
            }
            draft.scratch.clear();
            lane.open.encode(&mut draft.scratch);
            self.put_row(draft, &rows::append_key(*id));
            draft.changed = true;
        }
        draft.staged = staged;
        let touched: Vec<(u64, i64)> = draft.references.iter().map(|(key, value)| (*key, *value)).collect();
        for (segment, change) in touched {
            let held = self.segments.get(&segment).copied().unwrap_or(0);
            if held.saturating_add_signed(change) == 0 && segment != draft.log.segment {
                let (from, to) = (rows::segment_start(segment), rows::segment_start(segment + 1));
                let range = Range { family: Family::Log, from: from.to_vec(), to: to.to_vec() };
                self.stage_delete(draft, range);
            }
        }
        if draft.hub != self.hub {
            draft.scratch.clear();
            let hub = draft.hub;
            rows::encode_hub(&hub, &mut draft.scratch);
            self.put_row(draft, &rows::hub_key());
        }
        let clock = self.clock.row();
        let due = self.clock_row.is_none_or(|last| {
            let skewed = (clock.skew_ms() - last.skew_ms()).abs() >= CLOCK_SKEW_MS;
            skewed && tick || draft.changed && (skewed || clock.store_ms >= last.store_ms + CLOCK_ROW_MS)
        });
        if due || draft.barrier {
            draft.changed = true;
            draft.scratch.clear();
            rows::encode_clock(&clock, &mut draft.scratch);
            self.put_row(draft, &rows::clock_key());
            // Set although the write may fail: the next group that is due stores it again.
            self.clock_row = Some(clock);
        }
    }

    pub(super) fn put_row(&self, draft: &mut Draft, key: &[u8]) {
        let value = std::mem::take(&mut draft.scratch);
        self.engine.put(&mut draft.batch, Family::Meta, key, &value, &Bytes::new());
        draft.scratch = value;
    }
}
