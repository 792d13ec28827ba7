//! Owns the keeper thread: it settles what expired while nobody reads, measures the room, and gives room back.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::StoreTime;
use crate::engine::{Engine, EngineError, Family, Visit};
use crate::ledger::Outcome;
use crate::queue::QueueShared;
use crate::registry::Registry;
use crate::released::Released;
use crate::rows::{self, ReferenceHead};
use crate::space::{Gauge, SpaceState};

/// An expired entry is settled and counted at most this long after its time, also when nobody reads its queue; in
/// milliseconds. Holds while no more than a million entries expire within stretches of which a part lives on; whole
/// stretches are not counted.
pub const EXPIRY_LAG_MAX_MS: u64 = 10_000;
/// How often expired entries are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(4);
/// Entries that one sweep looks at, over all queues, in stretches of which only a part has expired.
const SWEEP_ENTRIES_MAX: u64 = 1_000_000;
/// How often the room is measured while appends are refused or little is free, ..
const MEASURE_SHORT: Duration = Duration::from_millis(250);
/// .. and otherwise.
const MEASURE_LONG: Duration = Duration::from_secs(5);
/// The engine is compacted at most this often.
const COMPACT_EVERY: Duration = Duration::from_millis(250);
/// Room is given back when less than this part of what the store may take up is left, ..
const SHORT_PART: u64 = 8;
/// .. and less than this, ..
const SHORT_MAX_BYTES: u64 = 64 << 20;
/// .. and this part of it was written since, or something was released.
const COMPACT_PART: u64 = 64;

pub(crate) struct Keeper {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) gauge: Arc<Gauge>,
    pub(crate) released: Arc<Released>,
}

/// What the keeper did last.
struct Last {
    sweep: Instant,
    /// The queue that the next sweep looks at first.
    sweep_first: usize,
    measure: Instant,
    compact: Instant,
    /// What was written when the engine was compacted.
    compact_written: u64,
}

impl Keeper {
    /// Keeps the store until it closes.
    pub(crate) fn run(self) {
        let now = Instant::now();
        let mut last = Last { sweep: now, sweep_first: 0, measure: now, compact: now, compact_written: 0 };
        let mut short = self.keep_room(&mut last);
        loop {
            let measure_every = if short { MEASURE_SHORT } else { MEASURE_LONG };
            let (sweep_at, measure_at) = (last.sweep + SWEEP_EVERY, last.measure + measure_every);
            let call = self.gauge.await_call(sweep_at.min(measure_at));
            if call.closing {
                return;
            }
            let now = Instant::now();
            if call.measure || now >= measure_at {
                last.measure = now;
                short = self.keep_room(&mut last);
            }
            if now >= sweep_at {
                last.sweep = now;
                last.sweep_first = self.sweep(last.sweep_first);
            }
        }
    }

    /// Measures; gives room back and restores the reserve as is due. True while room is short.
    fn keep_room(&self, last: &mut Last) -> bool {
        if self.engine.used_bytes().is_some() {
            return false;
        }
        self.measure();
        let capacity_bytes = self.gauge.capacity_bytes();
        let full = self.gauge.space().state != SpaceState::Open;
        let short = full || self.gauge.room().0 < (capacity_bytes / SHORT_PART).min(SHORT_MAX_BYTES);
        if short && last.compact.elapsed() >= COMPACT_EVERY {
            let written = self.gauge.written();
            let always = written - last.compact_written >= capacity_bytes / COMPACT_PART;
            if self.released.give_back(&self.engine, always) {
                last.compact_written = written;
                self.measure();
            }
            last.compact = Instant::now();
        }
        self.keep_reserve();
        short
    }

    fn measure(&self) {
        let written = self.gauge.written();
        match self.engine.measure() {
            Ok(measured) => self.gauge.set_measured(measured, written),
            Err(error) => {
                tracing::warn!(code = "EH6008", %error, "the room of the store could not be measured")
            }
        }
    }

    /// Takes the reserve when there is room for it twice, fits it to the limit, and gives it to the file system
    /// before that is full, so that no write fails.
    fn keep_reserve(&self) {
        let wanted_bytes = self.gauge.reserve_bytes();
        let held_bytes = self.engine.reserve_bytes();
        let free_bytes = self.gauge.space().free_bytes.unwrap_or(0);
        if held_bytes > 0 && free_bytes < wanted_bytes / 2 {
            self.gauge.set_reserve_missing(true);
            match self.engine.set_reserve(0) {
                Ok(()) => {
                    tracing::warn!(
                        code = "EH6009",
                        free_bytes,
                        "the disk is almost full; the store goes on from its reserve"
                    )
                }
                Err(error) => {
                    tracing::error!(code = "EH6010", %error, "the reserve could not be given to the file system")
                }
            }
            self.measure();
            return;
        }
        if held_bytes == wanted_bytes {
            self.gauge.set_reserve_missing(false);
            return;
        }
        let disk_full = self.gauge.is_disk_full();
        if disk_full || free_bytes < wanted_bytes.saturating_mul(2) {
            self.gauge.set_reserve_missing(true);
            return;
        }
        let taken = self.engine.set_reserve(wanted_bytes);
        self.gauge.set_reserve_missing(taken.is_err());
        match taken {
            Ok(()) => self.measure(),
            Err(error) => {
                tracing::warn!(code = "EH6011", %error, "the reserve of the store could not be taken")
            }
        }
    }

    /// Settles what has expired: whole stretches by their last expiry, and entries of others by looking. Begins to
    /// look at queue `first`; returns the one that it did not come to.
    fn sweep(&self, first: usize) -> usize {
        let queues = self.registry.all();
        let mut mixed = Vec::new();
        for (index, shared) in queues.iter().enumerate() {
            let now = shared.now();
            let mut expiring = Vec::new();
            shared.settle_with(|state| {
                let expired = state.expire_stretches(now);
                expiring = state.expiring(now);
                expired > 0 || state.find_settled_beyond()
            });
            mixed.extend(expiring.into_iter().map(|range| (index, range)));
        }
        let start = mixed.partition_point(|(index, _)| *index < first);
        mixed.rotate_left(start);
        let mut left = SWEEP_ENTRIES_MAX;
        for (index, range) in mixed {
            let shared = &queues[index];
            let Some(rest) = left.checked_sub(range.end - range.start) else { return index };
            left = rest;
            // Who reads the queue meets the same error, and answers it.
            if let Err(error) = self.sweep_stretch(shared, range, shared.now()) {
                tracing::debug!(?error, queue = %shared.name, "a stretch could not be swept");
            }
        }
        0
    }

    fn sweep_stretch(
        &self,
        shared: &Arc<QueueShared>,
        range: Range<u64>,
        now: StoreTime,
    ) -> Result<(), EngineError> {
        let (mut over, mut first_expiry) = (Vec::new(), None::<StoreTime>);
        let (from, to) =
            (rows::reference_key(shared.id, range.start), rows::reference_key(shared.id, range.end));
        self.engine.scan(Family::Reference, &from, Some(&to), &mut |key, value| {
            let head = ReferenceHead::decode(value.head());
            if let (Some(offset), Some((head, _))) = (rows::reference_offset(key), head) {
                match head.ttl.expires_at(head.accepted_at) {
                    Some(end) if now >= end => over.push(offset),
                    Some(end) => first_expiry = Some(first_expiry.map_or(end, |first| first.min(end))),
                    None => {}
                }
            }
            Visit::Next
        })?;
        shared.settle_with(|state| {
            let mut expired = 0;
            for run in over.chunk_by(|one, next| one + 1 == *next) {
                if let (Some(first), Some(last)) = (run.first(), run.last()) {
                    expired += state.settle_range(*first, last + 1, Outcome::Expired);
                }
            }
            state.set_first_expiry(&range, first_expiry);
            expired > 0
        });
        Ok(())
    }
}
