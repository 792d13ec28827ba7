//! Owns an open store: its threads, from the first row read to the last one written.

use std::fmt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::clock::{Clock, StoreTime};
use crate::damage::{Damage, DamageKind, DamageLog};
use crate::directory;
use crate::engine::{self, DiskBudget, Engine};
use crate::error::{OpenError, StoreError};
use crate::intake::{Intake, Line, Work};
use crate::keeper::Keeper;
use crate::keyed::{KeyedState, Table};
use crate::ledger::HubLedger;
use crate::letters::DeadLetters;
use crate::options::{Backend, Durability, StoreLimits, StoreOptions};
use crate::queue::Queue;
use crate::reader::{self, ReaderHandle};
use crate::record::AppendRequest;
use crate::recovery;
use crate::registry::Registry;
use crate::released::Released;
use crate::rows::Mark;
use crate::space::{Gauge, Space, SpaceState};
use crate::writer::{Writer, WriterStart};

/// The largest request, in bytes of its records or keyed values.
pub const REQUEST_MAX_BYTES: usize = 64 << 20;

/// An open store; cheap to clone, and usable from any thread or runtime. It closes when the last clone is
/// dropped, or with [`close`](Self::close).
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    durability: Option<Durability>,
    clock: Arc<Clock>,
    intake: Arc<Intake>,
    registry: Arc<Registry>,
    gauge: Arc<Gauge>,
    reader: ReaderHandle,
    threads: Mutex<Vec<JoinHandle<()>>>,
    damage: DamageLog,
    /// For sizes alone. A weak one, so that the engine is closed with the threads.
    engine: std::sync::Weak<Engine>,
}

/// What the store takes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreSizes {
    /// Table files on disk, in bytes; without the write-ahead log, which is at most about 64 MiB.
    pub table_bytes: u64,
    /// Write buffers of the engine in memory, in bytes.
    pub write_buffer_bytes: u64,
    /// The newest entries in memory, in bytes.
    pub ring_bytes: u64,
}

/// The acknowledgement of a request: resolves when all of it is durable at the store's level, or when it was
/// refused as a whole. Dropping it changes nothing about the request.
#[derive(Debug)]
#[must_use = "the request is durable when this has resolved"]
pub struct Commit {
    done: oneshot::Receiver<Result<(), StoreError>>,
}

impl Future for Commit {
    type Output = Result<(), StoreError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.done).poll(context).map(|done| done.unwrap_or(Err(StoreError::Closed)))
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Store").field("path", &self.inner.path).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens a store, and creates it if there is none. Takes as long with a large backlog as with none.
    ///
    /// Blocks for the time of some disk reads: call it before serving, or from a thread that may wait.
    ///
    /// # Errors
    /// When the directory cannot be used; [`OpenError`] names it, the reason and the next step. The store
    /// never starts empty in place of one that it cannot read.
    pub fn open(options: StoreOptions) -> Result<Self, OpenError> {
        let (path, durability, engine) = match &options.backend {
            Backend::Memory => (PathBuf::new(), None, Engine::memory()),
            Backend::Disk { path } => {
                let budget = DiskBudget {
                    cache_bytes: options.cache_bytes,
                    write_buffer_bytes: options.write_buffer_bytes,
                    capacity_bytes: capacity_bytes(&options.limits, path),
                };
                (path.clone(), Some(options.durability), directory::open(path, budget)?)
            }
        };
        Self::start(path, durability, Arc::new(engine), &options)
    }

    pub(crate) fn start(
        path: PathBuf,
        durability: Option<Durability>,
        engine: Arc<Engine>,
        options: &StoreOptions,
    ) -> Result<Self, OpenError> {
        let recovered = recovery::recover(&engine, &path)?;
        let clock = Arc::new(Clock::start(Arc::clone(&options.time), recovered.clock));
        let intake = Arc::new(Intake::new());
        let measured = engine.measure().map_err(|source| OpenError::Access { path: path.clone(), source })?;
        let gauge = Arc::new(Gauge::new(options.limits, measured, Arc::clone(&clock)));
        let released = Arc::new(Released::default());
        let letters_open = recovered.letters.open.clone();
        let registry = Arc::new(Registry::new(
            Arc::clone(&clock),
            Arc::clone(&intake),
            Arc::clone(&gauge),
            recovered.hub,
            recovered.letters,
        ));
        let mut open_marks: Vec<Mark> = Vec::with_capacity(recovered.queues.len());
        for (name, queue) in recovered.queues {
            open_marks.push(queue.open.clone());
            registry.restore(&name, queue).list_due();
        }
        let (handle, reader) = reader::channel(Arc::clone(&engine));
        let writer = Writer::new(WriterStart {
            engine: Arc::clone(&engine),
            intake: Arc::clone(&intake),
            registry: Arc::clone(&registry),
            clock: Arc::clone(&clock),
            durability: durability.unwrap_or(Durability::Os),
            hub: recovered.hub,
            clock_row: recovered.clock,
            ring_bytes_max: options.ring_bytes_max,
            gauge: Arc::clone(&gauge),
            released: Arc::clone(&released),
            open_marks,
            letters_open,
            segments: recovered.segments,
        });
        let keeper = Keeper {
            engine: Arc::clone(&engine),
            registry: Arc::clone(&registry),
            gauge: Arc::clone(&gauge),
            released,
        };
        let inner = Inner {
            path: path.clone(),
            durability,
            clock,
            intake,
            registry,
            gauge,
            reader: handle,
            threads: Mutex::new(Vec::new()),
            damage: engine.damage().clone(),
            engine: Arc::downgrade(&engine),
        };
        drop(engine);
        // Were one thread to fail, dropping `inner` would end those before it.
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(run);
            let thread = thread.map_err(|source| OpenError::Threads { path: path.clone(), source })?;
            inner.threads.lock().push(thread);
            Ok(())
        };
        spawn("store-writer", Box::new(move || writer.run()))?;
        spawn("store-reader", Box::new(move || reader.run()))?;
        spawn("store-keeper", Box::new(move || keeper.run()))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The queue with this name; a new one if there is none. Names are compared byte by byte, case included.
    /// Does not wait: the name of a new queue is stored before, or together with, its first entry.
    ///
    /// # Errors
    /// When the name is empty or too long, there are too many queues, or the store is closed.
    pub fn queue(&self, name: &str) -> Result<Queue, StoreError> {
        let shared = self.inner.registry.open(name)?;
        Ok(Queue::new(shared, self.inner.reader.clone()))
    }

    /// All queues that were ever opened, in the order of their ids.
    pub fn queues(&self) -> Vec<Queue> {
        let queues = self.inner.registry.all().into_iter();
        queues.map(|shared| Queue::new(shared, self.inner.reader.clone())).collect()
    }

    /// Hands a request to the writer, and waits only while too much is ahead of it. The returned [`Commit`]
    /// resolves when the whole request is durable.
    ///
    /// Requests are written in the order in which their submits return; a caller that awaits each submit before
    /// the next one keeps its order. If the future is dropped before it returns, nothing was handed over.
    ///
    /// # Errors
    /// When a target is unknown, the request is too large, or the store is closed. A failing write is reported
    /// by the [`Commit`].
    pub async fn submit(&self, request: AppendRequest) -> Result<Commit, StoreError> {
        self.submit_as(request, None).await
    }

    /// The same for a request of a line: when one of its requests fails, all that follow it fail as well, so that nothing
    /// overtakes what was refused.
    ///
    /// # Errors
    /// Those of [`Store::submit`]; a request behind one that failed is answered with [`StoreError::Behind`].
    pub async fn submit_in(&self, line: &Line, request: AppendRequest) -> Result<Commit, StoreError> {
        self.submit_as(request, Some(line.clone())).await
    }

    async fn submit_as(&self, request: AppendRequest, line: Option<Line>) -> Result<Commit, StoreError> {
        let count = self.inner.registry.count();
        let mut bytes = 0;
        for record in &request.records {
            bytes += record.bytes.len();
            if let Some(target) = record.targets.iter().find(|target| target.queue.0 as usize >= count) {
                return Err(StoreError::UnknownQueue { id: target.queue });
            }
        }
        if bytes > REQUEST_MAX_BYTES {
            return Err(StoreError::TooLarge { length_bytes: bytes, max_bytes: REQUEST_MAX_BYTES });
        }
        let done = self.inner.intake.submit(Work::Append(request), bytes, line).await?;
        Ok(Commit { done })
    }

    /// Waits until everything submitted and settled so far is durable at the store's level.
    ///
    /// # Errors
    /// When the write failed, or the store is closed.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let done = self.inner.intake.submit(Work::Barrier, 0, None).await?;
        done.await.unwrap_or(Err(StoreError::Closed))
    }

    /// A table of keyed state.
    pub fn keyed(&self, table: Table) -> KeyedState {
        KeyedState::new(table, Arc::clone(&self.inner.intake), self.inner.reader.clone())
    }

    /// The account of the whole store.
    pub fn hub_ledger(&self) -> HubLedger {
        self.inner.registry.hub_ledger()
    }

    /// The store's clock; see [`StoreTime`].
    pub fn now(&self) -> StoreTime {
        self.inner.clock.now()
    }

    /// By how many milliseconds the machine's wall clock is ahead of the store's; not 0 after it was set.
    pub fn wall_skew_ms(&self) -> i64 {
        let skew_ms = self.inner.clock.row().skew_ms();
        i64::try_from(skew_ms).unwrap_or(if skew_ms < 0 { i64::MIN } else { i64::MAX })
    }

    /// The level at which requests are acknowledged: `sync`, `interval`, `os` or `memory`; for metrics.
    pub fn durability_level(&self) -> &'static str {
        match self.inner.durability {
            None => "memory",
            Some(Durability::Sync) => "sync",
            Some(Durability::Interval { .. }) => "interval",
            Some(Durability::Os) => "os",
        }
    }

    /// The dead letters of all queues.
    pub fn dead_letters(&self) -> DeadLetters {
        let Inner { registry, intake, reader, .. } = &*self.inner;
        DeadLetters::new(Arc::clone(registry), Arc::clone(intake), reader.clone())
    }

    /// How much room there is, by the last measurement and what was written since.
    pub fn space(&self) -> Space {
        self.inner.gauge.space()
    }

    /// Follows whether appends find room: the receiver sees each change of the state, or the last of several.
    pub fn watch_space(&self) -> tokio::sync::watch::Receiver<SpaceState> {
        self.inner.gauge.watch()
    }

    /// How much room the store may take.
    pub fn limits(&self) -> StoreLimits {
        self.inner.gauge.limits()
    }

    /// Changes how much room the store may take; holds from the next request on. Under a lower limit nothing is
    /// removed but dead letters over their bound: appends are refused, or make room, until what waits has become
    /// less.
    pub fn set_limits(&self, limits: StoreLimits) {
        self.inner.gauge.set_limits(limits);
        if let Some(engine) = self.inner.engine.upgrade() {
            engine.fit(self.inner.gauge.capacity_bytes());
        }
        self.inner.intake.named();
    }

    /// What is damaged: found when the store was opened, and set aside; or found since, and looked at by the next
    /// start. At most [`DAMAGE_LISTED_MAX`](crate::DAMAGE_LISTED_MAX).
    pub fn damage(&self) -> Vec<Damage> {
        self.inner.damage.all()
    }

    /// How many damaged parts of this kind were found in this run, those that are not listed included.
    pub fn damage_count(&self, kind: DamageKind) -> u64 {
        self.inner.damage.count(kind)
    }

    /// What the store takes up; for metrics. Zeros after it was closed.
    pub fn sizes(&self) -> StoreSizes {
        let disk = self.inner.engine.upgrade().and_then(|engine| engine.sizes()).unwrap_or_default();
        StoreSizes {
            table_bytes: disk.table_bytes,
            write_buffer_bytes: disk.memtable_bytes,
            ring_bytes: self.inner.registry.hot_bytes() as u64,
        }
    }

    /// Writes what was handed over and settled, syncs it, and closes the store for all its clones; blocks until
    /// the files are closed. Later operations answer [`StoreError::Closed`].
    pub fn close(self) {
        self.inner.close();
    }
}

impl Inner {
    fn close(&self) {
        self.intake.close();
        self.gauge.close_keeper();
        let mut threads = self.threads.lock();
        // The reader ends last, so that what the writer wakes can still read.
        for (index, thread) in threads.drain(..).enumerate() {
            if index == 1 {
                self.reader.close();
            }
            if thread.join().is_err() {
                tracing::error!(code = "EH6015", "a thread of the store had failed");
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}

/// What a store at this path may take up.
fn capacity_bytes(limits: &StoreLimits, path: &Path) -> u64 {
    let system = engine::file_system_bytes(path).unwrap_or(u64::MAX);
    limits.max_bytes.unwrap_or(u64::MAX).min(system)
}
