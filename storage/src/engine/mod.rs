//! Owns the difference between disk and memory: an ordered key-value engine with atomic batches.

mod disk;
mod memory;
mod meter;
mod room;
pub(crate) mod wal;

use std::sync::Arc;

use bytes::Bytes;

pub(crate) use disk::{DiskBudget, DiskEngine, DiskOpenError, DiskSizes};
pub(crate) use memory::MemoryEngine;
pub(crate) use room::file_system_bytes;

use crate::damage::DamageLog;
use crate::error::StoreError;
use crate::space::{Measured, SpaceReason};
use meter::{Operation, metered};

/// The families of keys, each with its own shape of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    /// Bodies that several queues share, by position in the log.
    Log,
    /// Queue entries, by queue and offset; the body is inside when one queue alone takes it.
    Reference,
    /// Names, counters, checkpoints.
    Meta,
    /// Keyed state.
    State,
}

impl Family {
    pub(crate) const ALL: [Self; 4] = [Self::Log, Self::Reference, Self::Meta, Self::State];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Reference => "ref",
            Self::Meta => "meta",
            Self::State => "state",
        }
    }
}

/// What the engine said no to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EngineError {
    Full(String),
    Io(String),
    Corrupt(String),
}

impl From<EngineError> for StoreError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Full(_) => Self::Full { reason: SpaceReason::Disk },
            EngineError::Io(reason) => Self::Io { reason: Arc::from(reason) },
            EngineError::Corrupt(reason) => Self::Damaged { reason: Arc::from(reason) },
        }
    }
}

/// Keys of a family that nobody reads any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) family: Family,
    pub(crate) from: Vec<u8>,
    pub(crate) to: Vec<u8>,
}

/// Takes the rows of a scan that passes over what cannot be read.
pub(crate) type RowVisitor<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<(), EngineError>;

/// How far a scan came that passes over what cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReadableScan {
    /// How often something was passed over.
    pub(crate) passed: u64,
    /// Whether rows could be read again behind each of them.
    pub(crate) reached_end: bool,
}

/// What a visitor of a scan wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Visit {
    Next,
    Stop,
}

/// A value as a scan sees it: in one piece, or as it was put.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value<'a> {
    Borrowed(&'a [u8]),
    Shared { head: &'a [u8], body: &'a Bytes },
}

impl Value<'_> {
    /// The first bytes of the value, up to the body if it is kept apart.
    pub(crate) fn head(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Shared { head, .. } => head,
        }
    }

    /// What follows the first `head_bytes` bytes; shared where the engine can.
    pub(crate) fn body(&self, head_bytes: usize) -> Bytes {
        match self {
            Self::Borrowed(bytes) => Bytes::copy_from_slice(bytes.get(head_bytes..).unwrap_or_default()),
            Self::Shared { body, .. } => (*body).clone(),
        }
    }

    /// All of it.
    pub(crate) fn whole(&self) -> Bytes {
        match self {
            Self::Shared { head: [], body } => (*body).clone(),
            Self::Shared { head, body } => Bytes::from([*head, &body[..]].concat()),
            Self::Borrowed(bytes) => Bytes::copy_from_slice(bytes),
        }
    }
}

/// The engine of a store.
#[derive(Debug)]
pub(crate) struct Engine {
    kind: Kind,
    damage: DamageLog,
    #[cfg(test)]
    failing_writes: std::sync::atomic::AtomicUsize,
}

#[derive(Debug)]
enum Kind {
    Disk(DiskEngine),
    Memory(MemoryEngine),
}

/// Changes that are made together or not at all.
pub(crate) enum Batch {
    Disk { batch: rocksdb::WriteBatch, scratch: Vec<u8> },
    Memory(Vec<memory::Change>),
}

impl Engine {
    pub(crate) fn disk(engine: DiskEngine) -> Self {
        let damage = engine.damage().clone();
        Self::new(Kind::Disk(engine), damage)
    }

    pub(crate) fn memory() -> Self {
        Self::new(Kind::Memory(MemoryEngine::default()), DamageLog::default())
    }

    fn new(kind: Kind, damage: DamageLog) -> Self {
        Self {
            kind,
            damage,
            #[cfg(test)]
            failing_writes: std::sync::atomic::AtomicUsize::new(0),
        }
    }

    /// What is damaged.
    pub(crate) fn damage(&self) -> &DamageLog {
        &self.damage
    }

    /// Lets the next writes fail; for tests.
    #[cfg(test)]
    pub(crate) fn fail_writes(&self, writes: usize) {
        self.failing_writes.store(writes, std::sync::atomic::Ordering::SeqCst);
    }

    pub(crate) fn batch(&self, capacity_bytes: usize) -> Batch {
        match &self.kind {
            Kind::Disk(_) => Batch::Disk {
                batch: rocksdb::WriteBatch::with_capacity_bytes(capacity_bytes),
                scratch: Vec::new(),
            },
            Kind::Memory(_) => Batch::Memory(Vec::new()),
        }
    }

    /// Puts a value that consists of two parts.
    pub(crate) fn put(&self, batch: &mut Batch, family: Family, key: &[u8], head: &[u8], body: &Bytes) {
        match (&self.kind, batch) {
            (Kind::Disk(engine), Batch::Disk { batch, scratch }) => {
                if head.is_empty() {
                    batch.put_cf(&engine.family(family), key, body);
                } else {
                    scratch.clear();
                    scratch.extend_from_slice(head);
                    scratch.extend_from_slice(body);
                    batch.put_cf(&engine.family(family), key, &scratch[..]);
                }
            }
            (Kind::Memory(_), Batch::Memory(changes)) => {
                changes.push(memory::Change::put(family, key, head, body.clone()));
            }
            (Kind::Disk(_), Batch::Memory(_)) | (Kind::Memory(_), Batch::Disk { .. }) => {}
        }
    }

    pub(crate) fn delete(&self, batch: &mut Batch, family: Family, key: &[u8]) {
        match (&self.kind, batch) {
            (Kind::Disk(engine), Batch::Disk { batch, .. }) => batch.delete_cf(&engine.family(family), key),
            (Kind::Memory(_), Batch::Memory(changes)) => changes.push(memory::Change::delete(family, key)),
            (Kind::Disk(_), Batch::Memory(_)) | (Kind::Memory(_), Batch::Disk { .. }) => {}
        }
    }

    /// Deletes the keys of `from..to`.
    pub(crate) fn delete_range(&self, batch: &mut Batch, family: Family, from: &[u8], to: &[u8]) {
        match (&self.kind, batch) {
            (Kind::Disk(engine), Batch::Disk { batch, .. }) => {
                batch.delete_range_cf(&engine.family(family), from, to);
            }
            (Kind::Memory(_), Batch::Memory(changes)) => {
                changes.push(memory::Change::delete_range(family, from, to));
            }
            (Kind::Disk(_), Batch::Memory(_)) | (Kind::Memory(_), Batch::Disk { .. }) => {}
        }
    }

    /// Makes the changes; when `sync`, they and all before them survive a loss of power afterwards.
    pub(crate) fn write(&self, batch: Batch, sync: bool) -> Result<(), EngineError> {
        metered(Operation::Write { sync }, || self.write_batch(batch, sync))
    }

    fn write_batch(&self, batch: Batch, sync: bool) -> Result<(), EngineError> {
        #[cfg(test)]
        {
            use std::sync::atomic::Ordering::SeqCst;
            if self.failing_writes.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
                return Err(EngineError::Full("injected".into()));
            }
        }
        match (&self.kind, batch) {
            (Kind::Disk(engine), Batch::Disk { batch, .. }) => engine.write(batch, sync),
            (Kind::Memory(engine), Batch::Memory(changes)) => {
                engine.write(changes);
                Ok(())
            }
            (Kind::Disk(_), Batch::Memory(_)) | (Kind::Memory(_), Batch::Disk { .. }) => {
                Err(EngineError::Io("a batch of another engine".into()))
            }
        }
    }

    /// Makes everything written so far survive a loss of power.
    pub(crate) fn sync(&self) -> Result<(), EngineError> {
        match &self.kind {
            Kind::Disk(engine) => metered(Operation::Sync, || engine.sync()),
            Kind::Memory(_) => Ok(()),
        }
    }

    /// Gives the space of a range back at once where that is cheap. Nobody may read it again.
    pub(crate) fn reclaim(&self, range: &Range) {
        match &self.kind {
            Kind::Disk(engine) => engine.reclaim(range),
            Kind::Memory(_) => {}
        }
    }

    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        match &self.kind {
            Kind::Disk(engine) => metered(Operation::Read, || engine.get(family, key)),
            Kind::Memory(engine) => Ok(engine.get(family, key)),
        }
    }

    /// As `get`, if it can be told without the disk; nothing when it cannot.
    pub(crate) fn get_in_memory(&self, family: Family, key: &[u8]) -> Option<Option<Bytes>> {
        match &self.kind {
            Kind::Disk(engine) => engine.get_in_memory(family, key),
            Kind::Memory(engine) => Some(engine.get(family, key)),
        }
    }

    /// Visits the keys of `from..to` in order until told to stop.
    pub(crate) fn scan(
        &self,
        family: Family,
        from: &[u8],
        to: Option<&[u8]>,
        visit: &mut dyn FnMut(&[u8], Value<'_>) -> Visit,
    ) -> Result<(), EngineError> {
        match &self.kind {
            Kind::Disk(engine) => metered(Operation::Read, || engine.scan(family, from, to, visit)),
            Kind::Memory(engine) => {
                engine.scan(family, from, to, visit);
                Ok(())
            }
        }
    }

    /// How many bytes a batch holds, or a little more.
    pub(crate) fn batch_bytes(batch: &Batch) -> u64 {
        match batch {
            Batch::Disk { batch, .. } => batch.size_in_bytes() as u64,
            // What memory holds is known after the write.
            Batch::Memory(_) => 0,
        }
    }

    /// What the engine takes up; on disk this looks at every file.
    pub(crate) fn measure(&self) -> std::io::Result<Measured> {
        match &self.kind {
            Kind::Disk(engine) => engine.room.measure(),
            Kind::Memory(engine) => Ok(Measured { used_bytes: engine.used_bytes(), ..Measured::default() }),
        }
    }

    /// What the engine takes up, where that is known without a look.
    pub(crate) fn used_bytes(&self) -> Option<u64> {
        match &self.kind {
            Kind::Disk(_) => None,
            Kind::Memory(engine) => Some(engine.used_bytes()),
        }
    }

    /// The size of the reserve on disk.
    pub(crate) fn reserve_bytes(&self) -> u64 {
        match &self.kind {
            Kind::Disk(engine) => engine.room.reserve_bytes(),
            Kind::Memory(_) => 0,
        }
    }

    /// Takes a reserve of this size from the file system, or with 0 gives it back.
    pub(crate) fn set_reserve(&self, bytes: u64) -> std::io::Result<()> {
        match &self.kind {
            Kind::Disk(engine) if bytes == 0 => engine.room.give_reserve(),
            Kind::Disk(engine) => engine.room.take_reserve(bytes),
            Kind::Memory(_) => Ok(()),
        }
    }

    /// Gives back what released ranges still take up: in the log ahead of the tables, and in tables.
    pub(crate) fn compact(&self, ranges: &[Range]) {
        match &self.kind {
            Kind::Disk(engine) => engine.compact(ranges),
            Kind::Memory(_) => {}
        }
    }

    /// Fits files and write buffers to what the store may take up.
    pub(crate) fn fit(&self, capacity_bytes: u64) {
        match &self.kind {
            Kind::Disk(engine) => engine.fit(capacity_bytes),
            Kind::Memory(_) => {}
        }
    }

    /// Visits all rows of a family that can be read, and passes over the rest.
    pub(crate) fn scan_readable(
        &self,
        family: Family,
        visit: RowVisitor<'_>,
    ) -> Result<ReadableScan, EngineError> {
        match &self.kind {
            Kind::Disk(engine) => engine.scan_readable(family, visit),
            Kind::Memory(engine) => {
                let mut result = Ok(());
                engine.scan(family, &[], None, &mut |key, value| {
                    result = visit(key, &value.whole());
                    if result.is_ok() { Visit::Next } else { Visit::Stop }
                });
                result.map(|()| ReadableScan { passed: 0, reached_end: true })
            }
        }
    }

    /// What the engine holds on disk and in memory; `None` for an engine in memory.
    pub(crate) fn sizes(&self) -> Option<DiskSizes> {
        match &self.kind {
            Kind::Disk(engine) => Some(engine.sizes()),
            Kind::Memory(_) => None,
        }
    }
}
