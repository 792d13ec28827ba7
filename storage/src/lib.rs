//! Durable queues and small keyed state: what the hub has accepted and cannot deliver yet, what became of it,
//! and what the hub must remember.
//!
//! The store knows bytes, not messages. A caller hands in records, each with the queues that take it, reads
//! them back in order, and says what became of each:
//!
//! ```
//! use edgehub_storage::{
//!     AppendRequest, Offset, Outcome, Overflow, ReadLimit, Record, Settlement, Store, StoreOptions, Target,
//!     Ttl,
//! };
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Store::open(StoreOptions::memory())?; // or StoreOptions::disk("/var/lib/edgehub")
//! let queue = store.queue("iothub_Pri0")?;
//!
//! let target = Target { queue: queue.id(), ttl: Ttl::Millis(60_000), overflow: Overflow::RejectNew };
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
//!   entry but a settlement, its time to live, an operator ([`Queue::purge`]) or a declared [`Overflow`] policy.
//! - **Dead letters.** What cannot be delivered is copied to the dead letters in the same write that settles it, and
//!   stays there with its reason until an operator puts it back or discards it, within a bound of its own. The
//!   dead letters have an account of their own: [`HubLedger::dead_letters`].
//! - **At least once.** Settlements ride on the next append, or are written within milliseconds. What was settled
//!   and not written when the process died is handed out again; with a loss of power at the level
//!   [`Durability::Sync`], that is what was settled after the last append or [`Store::flush`].
//! - **Time to live** is bound at the append and judged on the store's own [`clock`], which does not jump. What has
//!   expired is passed when reading, and settled and counted within [`EXPIRY_LAG_MAX_MS`] also when nobody reads:
//!   whole stretches by the expiry of their last entry, others by a look at their entries when the first is due.
//! - **Room** is bounded: by [`StoreLimits::max_bytes`], which counts all of the store's directory as `du` does, and
//!   by a floor of free space. At the bound a request is refused whole, or its queues make room as its targets say;
//!   settlements, keyed state and dead letters go on from a reserve, which on disk is a file that is given back when
//!   the disk is almost full. What is settled gives its room back before anybody is refused. While a compaction runs,
//!   the directory may be larger by a 16th of the limit, at most 64 MiB. Keyed state is counted, but never refused.
//!   In memory, keys and values are counted to the byte, and the limit is never passed by an append.
//! - **Opening** reads the write-ahead log (64 MiB at most) and a few rows per queue, however long the queues are.
//!   What cannot be had for outside reasons is an [`OpenError`] that says what to do.
//! - **Damage** is never passed over in silence. Damaged files are set aside by renaming, never deleted; all that
//!   can be read goes on; what cannot is in the ledger as dropped, and in [`Store::damage`]. A log that ends early,
//!   as a loss of power leaves it, is no damage.
//! - **Memory** is bounded, whatever the number of queues and entries, by one budget
//!   ([`StoreOptions::memory_budget`]): the newest entries, the cache of blocks, and the write buffers in it. Beside it
//!   there are, per queue, 128 KiB of settled offsets ([`SETTLE_WINDOW_MAX`]); per stretch about 100 bytes, which is
//!   100 KB for ten million small entries; a bit for each entry that expired behind one that waits; and what waits for
//!   the writer (4096 requests, or as many times 4 KiB; 16 MiB of dead letters).
//!
//! # Layout
//!
//! A database in `<folder>/store/db`, beside a marker of its format, a lock, a file `RESERVE`, and folders `damaged-*`
//! with what was set aside (16 at most, then the store does not open), with four families of keys:
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
//! to it any more. Reads begin at the checkpoint, so that none walks over deleted keys. Under a small limit a stretch
//! is at most a 64th of it, and the files, buffers and log of the engine shrink likewise.
//!
//! The dead letters are a queue with a reserved number; each entry says before its bytes which queue it comes from,
//! its offset and times there, the reason, and how often it was tried.
//!
//! # Threads
//!
//! One thread writes, one reads for callers, and one keeps the store: it settles what expired, measures the room and
//! lets the engine give room back. All belong to the store. Callers wait for them without blocking, on any runtime. [`Store::open`], [`Store::close`] and the drop of the last [`Store`] block.
//!
//! Locks are held for moments and never across a wait, but for the one of who compacts. The state of a queue is the innermost: no other lock is
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
mod keeper;
mod keyed;
mod ledger;
mod letters;
mod options;
mod queue;
mod reader;
mod rebuild;
mod record;
mod recovery;
mod registry;
mod released;
mod rescue;
mod rows;
mod space;
mod state;
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
pub use intake::Line;
pub use keeper::EXPIRY_LAG_MAX_MS;
pub use keyed::{KEY_MAX_BYTES, KeyedChange, KeyedState, Table};
pub use ledger::{DropReason, HubLedger, Ledger, Outcome, Settlement};
pub use letters::{DeadLetter, DeadLetterReason, DeadLetters, LETTERS_PER_CALL_MAX};
pub use options::{Backend, Durability, INTERVAL_MAX_MS, StoreLimits, StoreOptions};
pub use queue::{QUEUE_NAME_MAX_BYTES, Queue};
pub use record::{
    AppendRequest, Batch, BatchEnd, Entry, Offset, Overflow, QueueId, ReadLimit, Record, Target, Ttl,
};
pub use registry::QUEUES_MAX;
pub use space::{Space, SpaceReason, SpaceState};
pub use store::{Commit, REQUEST_MAX_BYTES, Store, StoreSizes};

/// The example of the README is tested with those of this crate.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
