//! Durable queues and small keyed state: what the hub has accepted and cannot deliver yet, what became of it,
//! and what the hub must remember.
//!
//! The store knows bytes, not messages. A caller hands in records, each with the queues that take it, reads
//! them back in order, and says what became of each:
//!
//! ```
//! use edgehub_storage::{
//!     AppendRequest, Offset, Outcome, ReadLimit, Record, Settlement, Store, StoreOptions, Target, Ttl,
//! };
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Store::open(StoreOptions::memory())?; // or StoreOptions::disk("/var/lib/edgehub")
//! let queue = store.queue("iothub_Pri0")?;
//!
//! let target = Target { queue: queue.id(), ttl: Ttl::Millis(60_000) };
//! let record = Record { bytes: "21.5 °C".into(), targets: [target].into_iter().collect() };
//! let commit = store.submit(AppendRequest { records: vec![record], unrouted: 0 }).await?;
//! commit.await?; // durable: acknowledge the publisher
//!
//! let limit = ReadLimit { count: 100, bytes: 256 * 1024 };
//! let batch = queue.read(queue.checkpoint(), limit).await?;
//! for entry in &batch.entries {
//!     if !entry.is_expired(store.now()) {
//!         // send entry.bytes, wait for the receiver's acknowledgement
//!         queue.settle(&[Settlement { offset: entry.offset, outcome: Outcome::Delivered }]);
//!     }
//! }
//! assert_eq!(queue.checkpoint(), Offset::new(1));
//! assert_eq!((queue.ledger().delivered(), queue.ledger().gap()), (1, 0));
//! store.close();
//! # Ok(())
//! # }
//! ```
//!
//! # Promises
//!
//! - **Durability.** A [`Commit`] resolves when its request is durable at the store's level: [`Durability::Sync`]
//!   and [`Durability::Interval`] survive a loss of power, [`Durability::Os`] the death of the process,
//!   [`Backend::Memory`] neither. One sync serves all requests that arrive while the last one was written.
//! - **Atomicity.** A request is in all of its queues, with its counters, or in none. A write that fails refuses
//!   the requests that were in it, whole, and the store goes on.
//! - **Order.** Each queue keeps the order of the submits. Offsets are never used twice.
//! - **Ledger.** For each queue and at any time, restarts included:
//!   `accepted = delivered + expired + dropped + dead-lettered + queued`; see [`Ledger::gap`]. Nothing removes an
//!   entry but a settlement or its time to live.
//! - **At least once.** Settlements ride on the next append, or are written within milliseconds. What was settled
//!   and not written when the process died is handed out again; with a loss of power at the level
//!   [`Durability::Sync`], that is what was settled after the last append or [`Store::flush`].
//! - **Time to live** is bound at the append and judged on the store's own [`clock`], which does not jump.
//! - **Opening** reads the write-ahead log (64 MiB at most) and a few rows per queue, however long the queues are.
//!   What cannot be had for outside reasons is an [`OpenError`] that says what to do.
//! - **Damage** is never passed over in silence. Damaged files are set aside by renaming, never deleted; all that
//!   can be read goes on; what cannot is in the ledger as dropped, and in [`Store::damage`]. A log that ends early,
//!   as a loss of power leaves it, is no damage.
//! - **Memory** is bounded: the newest entries ([`StoreOptions::ring_bytes_max`]), the caches and write buffers of
//!   the engine, 128 KiB of settled offsets per queue ([`SETTLE_WINDOW_MAX`]), and what waits for the writer
//!   (4096 requests, or as many times 4 KiB).
//!
//! # Layout
//!
//! A database in `<folder>/store/db`, beside a marker of its format, a lock, and folders `damaged-*` with what was set
//! aside (16 at most, then the store does not open), with four families of keys:
//!
//! | family | key | value |
//! | --- | --- | --- |
//! | `ref` | queue (4 bytes), offset (8) | time, time to live, and the body or its place in the log |
//! | `log` | segment (5 bytes), position (3) | a body that several queues share |
//! | `meta` | kind (1 byte), queue (4), number (8) | names, tails, checkpoints, settled offsets, counters, clock |
//! | `state` | table (1 byte), key | a value of [`KeyedState`] |
//!
//! A body lies in the entry itself when one queue alone takes it. Settled entries are never deleted one by one.
//! Each queue is divided into *stretches* of 10 000 entries or 4 MiB, and the log into *segments* of 4096 bodies
//! or 1 MiB; a stretch is deleted as a range when the checkpoint has passed it, a segment when no stretch refers
//! to it any more. Reads begin at the checkpoint, so that none walks over deleted keys.
//!
//! # Threads
//!
//! One thread writes and one reads the disk; both belong to the store. Callers wait for them without blocking,
//! on any runtime. [`Store::open`], [`Store::close`] and the drop of the last [`Store`] block.
//!
//! Locks are held for moments and never across a wait. The state of a queue is the innermost: no other lock is
//! taken while it is held.

mod audit;
pub mod clock;
mod cursor;
mod damage;
mod directory;
mod engine;
mod error;
mod hot;
mod inspect;
mod intake;
mod keyed;
mod ledger;
mod options;
mod queue;
mod reader;
mod rebuild;
mod record;
mod recovery;
mod registry;
mod rescue;
mod rows;
mod store;
mod writer;

#[cfg(test)]
mod tests;

pub use audit::{Finding, FindingKind};
pub use clock::StoreTime;
pub use cursor::SETTLE_WINDOW_MAX;
pub use damage::{DAMAGE_LISTED_MAX, Damage, DamageKind, LOST_LISTED_MAX, Lost, LostEntries};
pub use error::{OpenError, StoreError};
pub use inspect::{QueueStat, StoreReader, StoreStat, TableStat, repair};
pub use keyed::{KEY_MAX_BYTES, KeyedChange, KeyedState, Table};
pub use ledger::{DropReason, HubLedger, Ledger, Outcome, Settlement};
pub use options::{Backend, Durability, INTERVAL_MAX_MS, StoreOptions};
pub use queue::{QUEUE_NAME_MAX_BYTES, Queue};
pub use record::{AppendRequest, Batch, BatchEnd, Entry, Offset, QueueId, ReadLimit, Record, Target, Ttl};
pub use registry::QUEUES_MAX;
pub use store::{Commit, REQUEST_MAX_BYTES, Store, StoreSizes};
