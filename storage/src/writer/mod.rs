//! Owns the writer thread: the only one that changes the engine. One group of requests becomes one atomic
//! write, with one sync for all of them.

mod admit;
mod keyed;
mod letters;
mod stage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ahash::AHashMap;

use crate::clock::{Clock, ClockRow};
use crate::engine::Engine;
use crate::error::StoreError;
use crate::intake::{Done, Group, Intake, Request, Work};
use crate::options::{Durability, INTERVAL_MAX_MS};
use crate::queue::QueueShared;
use crate::registry::Registry;
use crate::released::Released;
use crate::rows::{HubRow, Mark};
use crate::space::{Gauge, Measured, SpaceReason};
use crate::state::Stretch;
use keyed::KeyedWork;
use stage::{Draft, LogEnd, MARK_BYTES, Noted};

/// How often the writer looks at the clock, and for settled entries that can be released early.
const TICK: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(10) };
/// How long settlements wait after a write has failed; then the store also looks whether writes succeed again.
const RETRY: Duration = if cfg!(test) { Duration::from_millis(100) } else { Duration::from_secs(1) };

/// Who waits for a write.
type Waiting = Vec<Done>;

/// The writer's own view of a queue.
#[derive(Debug)]
struct Lane {
    shared: Arc<QueueShared>,
    /// The stretch that grows; its end is the tail.
    open: Mark,
    /// Whether there was an append since the last tick.
    active: bool,
}

/// What the store was opened with.
pub(crate) struct WriterStart {
    pub(crate) engine: Arc<Engine>,
    pub(crate) intake: Arc<Intake>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) durability: Durability,
    pub(crate) hub: HubRow,
    pub(crate) clock_row: Option<ClockRow>,
    pub(crate) ring_bytes_max: usize,
    pub(crate) gauge: Arc<Gauge>,
    pub(crate) released: Arc<Released>,
    /// The growing stretch of each queue, in the order of their ids.
    pub(crate) open_marks: Vec<Mark>,
    pub(crate) letters_open: Mark,
    /// References into the segments of the log.
    pub(crate) segments: AHashMap<u64, u64>,
}

pub(crate) struct Writer {
    engine: Arc<Engine>,
    intake: Arc<Intake>,
    registry: Arc<Registry>,
    clock: Arc<Clock>,
    durability: Durability,
    ring_bytes_max: usize,
    gauge: Arc<Gauge>,
    released: Arc<Released>,
    lanes: Vec<Lane>,
    letters_open: Mark,
    /// The largest stretch, under the limit in force.
    mark_bytes: u64,
    /// When the room was last measured here.
    measured_at: Option<Instant>,
    segments: AHashMap<u64, u64>,
    hub: HubRow,
    log: LogEnd,
    clock_row: Option<ClockRow>,
    /// Requests that are written and wait for the sync of their interval.
    held: Waiting,
    sync_at: Option<Instant>,
    tick_at: Instant,
    /// Keyed changes that wait for the end of a full disk.
    keyed_waiting: Vec<KeyedWork>,
    /// Queues whose settlements could not be written.
    retry: Vec<Arc<QueueShared>>,
    /// When they are tried again, if no request comes before.
    retry_at: Option<Instant>,
    /// Whether the last write failed.
    failing: bool,
}

impl Writer {
    pub(crate) fn new(start: WriterStart) -> Self {
        let WriterStart { engine, intake, registry, clock, durability, hub, clock_row, .. } = start;
        let lanes = registry
            .all()
            .into_iter()
            .zip(start.open_marks)
            .map(|(shared, open)| Lane { shared, open, active: true })
            .collect();
        Self {
            engine,
            intake,
            registry,
            clock,
            durability,
            ring_bytes_max: start.ring_bytes_max,
            gauge: start.gauge,
            released: start.released,
            lanes,
            letters_open: start.letters_open,
            mark_bytes: MARK_BYTES,
            measured_at: None,
            segments: start.segments,
            // Each run begins a segment of its own: what the last one wrote last is not appended to.
            log: LogEnd { segment: hub.next_segment, bodies: 0, bytes: 0 },
            hub,
            clock_row,
            held: Vec::new(),
            sync_at: None,
            tick_at: Instant::now() + TICK,
            keyed_waiting: Vec::new(),
            retry: Vec::new(),
            retry_at: None,
            failing: false,
        }
    }

    /// Writes until the store closes.
    pub(crate) fn run(mut self) {
        let abandon = Abandon(Arc::clone(&self.intake), Arc::clone(&self.registry));
        loop {
            let deadline =
                [self.sync_at, self.retry_at].into_iter().flatten().fold(self.tick_at, Instant::min);
            let mut group = self.intake.next(deadline);
            if !group.requests.is_empty() || self.retry_at.is_some_and(|at| Instant::now() >= at) {
                self.retry_at = None;
                group.settled.append(&mut self.retry);
            }
            let last = group.closing && group.requests.is_empty();
            let now = Instant::now();
            let tick = now >= self.tick_at || last;
            if tick {
                self.tick_at = now + TICK;
            }
            self.write(group, tick);
            if last || self.sync_at.is_some_and(|at| Instant::now() >= at) {
                self.sync_held();
            }
            if last {
                break;
            }
        }
        if let Err(error) = self.engine.sync() {
            tracing::error!(code = "EH6016", ?error, "the last writes of the store could not be synced");
        }
        drop(abandon);
    }

    fn write(&mut self, group: Group, tick: bool) {
        let Group { requests, bytes, settled, .. } = group;
        self.mark_bytes = self.gauge.stretch_max_bytes().min(MARK_BYTES);
        let requests = if requests.is_empty() { requests } else { self.admit(requests) };
        let mut draft = self.draft(bytes + bytes / 8 + 1024);
        let named = self.stage_names(&mut draft);
        let mut waiting = Vec::with_capacity(requests.len());
        let mut keyed = std::mem::take(&mut self.keyed_waiting);
        for Request { work, done, .. } in requests {
            match work {
                Work::Append(append) => self.stage_append(&mut draft, append),
                Work::Keyed(changes) => {
                    keyed.push(KeyedWork::new(changes, done));
                    continue;
                }
                Work::Redrive(letters, count) => self.stage_redrive(&mut draft, &letters, &count),
                Work::Discard(letters) => self.stage_discard(&mut draft, &letters),
                Work::Barrier => draft.barrier = true,
            }
            waiting.push(done);
        }
        draft.awaited = !waiting.is_empty();
        self.stage_keyed(&mut draft, &keyed);
        if tick {
            self.stage_idle(&mut draft);
        }
        self.stage_letters_bound(&mut draft);
        // After a failure something is written, so that the end of the failure is seen.
        draft.barrier |= self.failing;
        for shared in settled {
            self.stage_settled(&mut draft, shared);
        }
        let written = self.commit(draft, named, waiting, tick);
        self.complete_keyed(keyed, written);
    }

    fn draft(&self, capacity_bytes: usize) -> Draft {
        Draft {
            batch: self.engine.batch(capacity_bytes),
            now: self.clock.now(),
            hub: self.hub,
            log: self.log,
            staged: AHashMap::new(),
            noted: Vec::new(),
            references: AHashMap::new(),
            reclaim: Vec::new(),
            letters: None,
            changed: false,
            awaited: false,
            barrier: false,
            scratch: Vec::new(),
        }
    }

    /// Completes a draft, writes it, makes it visible, and answers those who wait for it.
    fn commit(
        &mut self,
        mut draft: Draft,
        named: Vec<Arc<QueueShared>>,
        waiting: Waiting,
        tick: bool,
    ) -> Result<(), StoreError> {
        self.stage_letters_rows(&mut draft);
        self.stage_rows(&mut draft, tick);
        if !draft.changed {
            self.complete(waiting, Ok(()), false);
            return Ok(());
        }
        // Files are dropped for good, power cut or not; so must be the checkpoint that says nobody needs them.
        let sync = self.durability == Durability::Sync && draft.awaited || !draft.reclaim.is_empty();
        let batch = std::mem::replace(&mut draft.batch, self.engine.batch(0));
        let batch_bytes = Engine::batch_bytes(&batch);
        match self.engine.write(batch, sync) {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("writes to the store succeed again");
                    self.gauge.recovered();
                }
                self.lanes_named(named);
                self.publish(draft);
                self.count(batch_bytes);
                self.complete(waiting, Ok(()), true);
                Ok(())
            }
            Err(error) => {
                let error = StoreError::from(error);
                // A full disk would otherwise fill the log as well.
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(code = "EH6017", %error, requests = waiting.len(), "a write to the store failed");
                }
                if matches!(error, StoreError::Full { .. }) {
                    self.disk_full();
                }
                for Noted { shared, pages, gone, letters, .. } in draft.noted {
                    if shared.take_back(&pages, gone, letters) {
                        self.retry.push(shared);
                    }
                }
                self.retry_at = Some(Instant::now() + RETRY);
                self.complete(waiting, Err(error.clone()), false);
                Err(error)
            }
        }
    }

    /// Counts what was written as used.
    fn count(&self, batch_bytes: u64) {
        match self.engine.used_bytes() {
            Some(used_bytes) => {
                let measured = Measured { used_bytes, ..Measured::default() };
                self.gauge.set_measured(measured, self.gauge.written());
            }
            None => self.gauge.wrote(batch_bytes),
        }
    }

    fn measure(&mut self) {
        self.measured_at = Some(Instant::now());
        let written = self.gauge.written();
        match self.engine.measure() {
            Ok(measured) => self.gauge.set_measured(measured, written),
            Err(error) => {
                tracing::warn!(code = "EH6018", %error, "the room of the store could not be measured")
            }
        }
    }

    /// The file system refused a write: what is not an append goes on from the reserve.
    fn disk_full(&mut self) {
        self.gauge.refused(SpaceReason::Disk);
        self.gauge.set_reserve_missing(true);
        match self.engine.set_reserve(0) {
            Ok(()) => self.measure(),
            Err(error) => {
                tracing::error!(code = "EH6019", %error, "the reserve of the store could not be given to the file system")
            }
        }
    }

    fn lanes_named(&mut self, named: Vec<Arc<QueueShared>>) {
        self.lanes.extend(named.into_iter().map(|shared| Lane {
            shared,
            open: Mark::starting_at(0),
            active: true,
        }));
    }

    /// Makes a successful write visible.
    fn publish(&mut self, draft: Draft) {
        self.hub = draft.hub;
        self.log = draft.log;
        self.registry.set_hub(draft.hub);
        for (segment, change) in draft.references {
            let held = self.segments.entry(segment).or_default();
            *held = held.saturating_add_signed(change);
            if *held == 0 && segment != self.log.segment {
                self.segments.remove(&segment);
            }
        }
        // Before the appends: the stretches to let go of are the first of each queue.
        for noted in draft.noted {
            let letter_bytes: usize = noted.letters.iter().map(|letter| letter.bytes.len()).sum();
            self.gauge.free_pending(letter_bytes as u64);
            if !noted.released.is_empty() {
                let kept = |mark: &Mark| noted.released.binary_search(&mark.start).is_err();
                noted.shared.with(|state| state.marks.retain(kept));
            }
        }
        if let Some(letters) = draft.letters {
            self.publish_letters(letters);
        }
        let mut settled = Vec::new();
        for (id, staged) in draft.staged {
            let Some(lane) = self.lanes.get_mut(id as usize) else { continue };
            lane.active |= !staged.hot.is_empty();
            let (open, open_bytes) = (Stretch::of(&staged.open), staged.open.bytes);
            lane.open = staged.open;
            let appended = !staged.hot.is_empty();
            let due = lane.shared.with(|state| {
                state.tail = open.end;
                (state.open, state.open_bytes) = (open, open_bytes);
                for entry in staged.hot {
                    state.hot.push(entry);
                }
                state.marks.extend(staged.closed);
                let prefix = state.cursor.prefix();
                state.hot.drop_below(prefix);
                state.is_due()
            });
            if due {
                settled.push(Arc::clone(&lane.shared));
            }
            if appended {
                lane.shared.wake_readers();
            }
        }
        for shared in settled {
            shared.relist();
        }
        for range in draft.reclaim {
            self.engine.reclaim(&range);
            self.released.add(range);
        }
        self.registry.evict(self.ring_bytes_max);
    }

    /// Answers requests; ones that were written wait for the sync where the level says so.
    fn complete(&mut self, waiting: Waiting, result: Result<(), StoreError>, written: bool) {
        if let (Durability::Interval { millis }, true, false) = (self.durability, written, waiting.is_empty())
        {
            self.held.extend(waiting);
            self.sync_at
                .get_or_insert_with(|| Instant::now() + Duration::from_millis(millis.min(INTERVAL_MAX_MS)));
            return;
        }
        for done in waiting {
            done.send(result.clone());
        }
    }

    fn sync_held(&mut self) {
        self.sync_at = None;
        if self.held.is_empty() {
            return;
        }
        let result = self.engine.sync().map_err(StoreError::from);
        if let Err(error) = &result {
            tracing::error!(code = "EH6020", %error, requests = self.held.len(), "a sync of the store failed");
        }
        for done in self.held.drain(..) {
            done.send(result.clone());
        }
    }
}

/// Ends what waits for the writer when its thread ends, however it does.
struct Abandon(Arc<Intake>, Arc<Registry>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.abandon();
        self.1.close();
    }
}
