//! Owns how a store is opened: where, how durable, with how much memory.

use std::path::PathBuf;
use std::sync::Arc;

use crate::clock::{SystemTimeSource, TimeSource};

/// The longest interval of [`Durability::Interval`], in milliseconds.
pub const INTERVAL_MAX_MS: u64 = 60_000;

/// Where a store keeps its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Below this directory, in a sub-directory `store` of our own. The directory is created if it is missing.
    Disk {
        /// The storage folder.
        path: PathBuf,
    },
    /// In memory: the same behaviour, but everything is gone when the store closes. The durability level does
    /// not matter then, and is reported as `memory`.
    Memory,
}

/// What an acknowledgement survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// A loss of power: one fsync, shared by all requests that arrive together, before they are acknowledged.
    #[default]
    Sync,
    /// A loss of power as well, but acknowledgements wait for an fsync that comes this often: less wear of
    /// flash memory for more waiting.
    Interval {
        /// How long the first request of an interval waits at most, in milliseconds; more than
        /// [`INTERVAL_MAX_MS`] counts as that.
        millis: u64,
    },
    /// The death of the process, but not a loss of power.
    Os,
}

/// How much room a store may take. Can be changed while the store is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// All that the store takes up, in bytes: on disk as `du` counts its directory, in memory keys and values.
    /// Appends are refused, or make room, a little earlier: a reserve of a 16th of it, at most 16 MiB, and the
    /// unused part of the dead letters' share are kept free. `None` is no limit.
    pub max_bytes: Option<u64>,
    /// What must stay free in the file system, in bytes; at most a 16th of the file system is asked for.
    pub free_floor_bytes: u64,
    /// What the dead letters may take up, in bytes; at most an eighth of `max_bytes`. 0 keeps none: what would go
    /// there is dropped and counted.
    pub dead_letters_max_bytes: u64,
}

impl Default for StoreLimits {
    /// No limit but a floor of 64 MiB, and 64 MiB of dead letters.
    fn default() -> Self {
        Self { max_bytes: None, free_floor_bytes: 64 << 20, dead_letters_max_bytes: 64 << 20 }
    }
}

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Where the data is.
    pub backend: Backend,
    /// When an append is acknowledged.
    pub durability: Durability,
    /// The newest entries that are kept in memory, in bytes over all queues, 64 bytes each included. Default
    /// 16 MiB; 0 keeps none.
    pub ring_bytes_max: usize,
    /// The cache of blocks read from disk, in bytes; counts the write buffers in. Default 32 MiB.
    pub cache_bytes: usize,
    /// The write buffers of the engine together, in bytes. Default 32 MiB.
    pub write_buffer_bytes: usize,
    /// How much room the store may take at first; see [`Store::set_limits`](crate::Store::set_limits).
    pub limits: StoreLimits,
    /// Where time comes from; replaced in tests.
    pub time: Arc<dyn TimeSource>,
}

impl StoreOptions {
    /// A store on disk with the defaults.
    pub fn disk(path: impl Into<PathBuf>) -> Self {
        Self::new(Backend::Disk { path: path.into() })
    }

    /// A store in memory with the defaults.
    pub fn memory() -> Self {
        Self::new(Backend::Memory)
    }

    /// A store with the defaults.
    pub fn new(backend: Backend) -> Self {
        Self {
            backend,
            durability: Durability::default(),
            ring_bytes_max: 16 << 20,
            cache_bytes: 32 << 20,
            write_buffer_bytes: 32 << 20,
            limits: StoreLimits::default(),
            time: Arc::new(SystemTimeSource::default()),
        }
    }

    /// Splits one budget of memory, in bytes: a third for the newest entries, two thirds for the cache, of which
    /// the write buffers may take half. The budget does not depend on the number of queues or entries.
    #[must_use]
    pub fn memory_budget(self, bytes: usize) -> Self {
        let third = bytes / 3;
        Self { ring_bytes_max: third, cache_bytes: bytes - third, write_buffer_bytes: third, ..self }
    }
}
