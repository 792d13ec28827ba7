//! Owns the writer thread: the only one that changes the engine. One group of requests becomes one atomic
//! write, with one sync for all of them.

mod stage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ahash::AHashMap;
use tokio::sync::oneshot;

use crate::clock::{Clock, ClockRow};
use crate::engine::{Engine, Family};
use crate::error::StoreError;
use crate::intake::{Group, Intake, Request, Work};
use crate::options::{Durability, INTERVAL_MAX_MS};
use crate::queue::QueueShared;
use crate::registry::Registry;
use crate::rows::{HubRow, Mark};
use stage::{Draft, LogEnd, Noted};

/// How often the writer looks at the clock, and for settled entries that can be released early.
const TICK: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(10) };
/// How long settlements wait after a write has failed.
const RETRY: Duration = Duration::from_secs(1);
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
    /// The growing stretch of each queue, in the order of their ids.
    pub(crate) open_marks: Vec<Mark>,
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
    lanes: Vec<Lane>,
    segments: AHashMap<u64, u64>,
    hub: HubRow,
    log: LogEnd,
    clock_row: Option<ClockRow>,
    /// Requests that are written and wait for the sync of their interval.
    held: Vec<oneshot::Sender<Result<(), StoreError>>>,
    sync_at: Option<Instant>,
    tick_at: Instant,
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
            lanes,
            segments: start.segments,
            // Each run begins a segment of its own: what the last one wrote last is not appended to.
            log: LogEnd { segment: hub.next_segment, bodies: 0, bytes: 0 },
            hub,
            clock_row,
            held: Vec::new(),
            sync_at: None,
            tick_at: Instant::now() + TICK,
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
            tracing::error!(?error, "the last writes of the store could not be synced");
        }
        drop(abandon);
    }

    fn write(&mut self, group: Group, tick: bool) {
        let Group { requests, bytes, settled, .. } = group;
        let mut draft = Draft {
            batch: self.engine.batch(bytes + bytes / 8 + 1024),
            now: self.clock.now(),
            hub: self.hub,
            log: self.log,
            staged: AHashMap::new(),
            noted: Vec::new(),
            references: AHashMap::new(),
            reclaim: Vec::new(),
            changed: false,
            barrier: false,
            scratch: Vec::new(),
        };
        let named = self.stage_names(&mut draft);
        let mut waiting = Vec::with_capacity(requests.len());
        for Request { work, done, .. } in requests {
            match work {
                Work::Append(append) => self.stage_append(&mut draft, append),
                Work::Keyed(changes) => {
                    for change in changes {
                        draft.changed = true;
                        match change.value {
                            Some(value) => {
                                self.engine.put(&mut draft.batch, Family::State, &change.key, &[], &value);
                            }
                            None => self.engine.delete(&mut draft.batch, Family::State, &change.key),
                        }
                    }
                }
                Work::Barrier => draft.barrier = true,
            }
            waiting.push(done);
        }
        if tick {
            self.stage_idle(&mut draft);
        }
        for shared in settled {
            self.stage_settled(&mut draft, shared);
        }
        self.stage_rows(&mut draft, tick);
        if !draft.changed {
            self.complete(waiting, Ok(()), false);
            return;
        }
        // Files are dropped for good, power cut or not; so must be the checkpoint that says nobody needs them.
        let sync = self.durability == Durability::Sync && !waiting.is_empty() || !draft.reclaim.is_empty();
        let batch = std::mem::replace(&mut draft.batch, self.engine.batch(0));
        match self.engine.write(batch, sync) {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("writes to the store succeed again");
                }
                self.lanes_named(named);
                self.publish(draft);
                self.complete(waiting, Ok(()), true);
            }
            Err(error) => {
                let error = StoreError::from(error);
                // A full disk would otherwise fill the log as well.
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, requests = waiting.len(), "a write to the store failed");
                }
                for Noted { shared, pages, gone, .. } in draft.noted {
                    if shared.take_back(&pages, gone) {
                        self.retry.push(shared);
                    }
                }
                self.retry_at = Some(Instant::now() + RETRY);
                self.complete(waiting, Err(error), false);
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
            noted.shared.with(|state| drop(state.marks.drain(..noted.released)));
        }
        let mut settled = Vec::new();
        for (id, staged) in draft.staged {
            let Some(lane) = self.lanes.get_mut(id as usize) else { continue };
            lane.active |= !staged.hot.is_empty();
            let tail = staged.open.end;
            lane.open = staged.open;
            let appended = !staged.hot.is_empty();
            let due = lane.shared.with(|state| {
                state.tail = tail;
                for entry in staged.hot {
                    state.hot.push(entry);
                }
                state.marks.extend(staged.closed);
                let prefix = state.cursor.prefix();
                state.hot.drop_below(prefix);
                state.marks.front().is_some_and(|mark| mark.end <= prefix)
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
        for (family, from, to) in draft.reclaim {
            self.engine.reclaim(family, &from, &to);
        }
        self.registry.evict(self.ring_bytes_max);
    }

    /// Answers requests; ones that were written wait for the sync where the level says so.
    fn complete(
        &mut self,
        waiting: Vec<oneshot::Sender<Result<(), StoreError>>>,
        result: Result<(), StoreError>,
        written: bool,
    ) {
        if let (Durability::Interval { millis }, true, false) = (self.durability, written, waiting.is_empty())
        {
            self.held.extend(waiting);
            self.sync_at
                .get_or_insert_with(|| Instant::now() + Duration::from_millis(millis.min(INTERVAL_MAX_MS)));
            return;
        }
        for done in waiting {
            // Who does not wait any more needs no answer.
            let _ = done.send(result.clone());
        }
    }

    fn sync_held(&mut self) {
        self.sync_at = None;
        if self.held.is_empty() {
            return;
        }
        let result = self.engine.sync().map_err(StoreError::from);
        if let Err(error) = &result {
            tracing::error!(%error, requests = self.held.len(), "a sync of the store failed");
        }
        for done in self.held.drain(..) {
            let _ = done.send(result.clone());
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
