//! Owns the errors of this crate: what failed, why, and what to do next.

use std::path::PathBuf;
use std::sync::Arc;

use crate::record::QueueId;
use crate::space::SpaceReason;

/// Why a store could not be opened. Nothing was changed in the directory unless the variant says so.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory could not be created.
    #[error("cannot create the store directory {}: {source}; create it or choose another storage folder", path.display())]
    Create {
        /// The directory that was to be created.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The directory exists, but a file in it could not be read or written.
    #[error("cannot read or write {}: {source}; give this process the rights to its storage folder, or free space", path.display())]
    Access {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// There is a file where a directory should be.
    #[error("{} is not a directory; move it away, or choose another storage folder", path.display())]
    NotADirectory {
        /// The file.
        path: PathBuf,
    },
    /// The file system cannot be written to.
    #[error("the file system of {} is read-only; mount it for writing, or choose another storage folder", path.display())]
    ReadOnly {
        /// The file or directory that was to be written.
        path: PathBuf,
    },
    /// The file system is full.
    #[error("the file system of {} is full ({reason}); free space, or choose another storage folder", path.display())]
    Full {
        /// The file or directory that was to be written.
        path: PathBuf,
        /// What the operating system or the engine said.
        reason: String,
    },
    /// Nothing is in the directory; only for what reads a store without creating it.
    #[error("there is no store in {}; give the folder that the hub uses", path.display())]
    NotFound {
        /// The store's directory.
        path: PathBuf,
    },
    /// Another process, or another store in this process, has the directory open.
    #[error("the store {} is in use by another process; stop that process, or choose another storage folder", path.display())]
    Locked {
        /// The store's directory.
        path: PathBuf,
    },
    /// The directory was written by a newer version.
    #[error("the store {} has format {found}, this version knows formats up to {supported}; install the newer version again, or choose another storage folder", path.display())]
    NewerFormat {
        /// The store's directory.
        path: PathBuf,
        /// The format that was found.
        found: u32,
        /// The newest format that this version reads.
        supported: u32,
    },
    /// The directory holds a database that is not ours, such as that of a reference hub. It was left alone.
    #[error("{} holds a database of another program, which is left alone; choose another storage folder, or move that database away", path.display())]
    ForeignDatabase {
        /// The directory with the other program's files.
        path: PathBuf,
    },
    /// Damaged parts were set aside so often that something must be wrong with the disk.
    #[error("the store {} holds {count} damaged parts that were set aside; check the disk, then move the folders damaged-* away", path.display())]
    DamagedOften {
        /// The store's directory.
        path: PathBuf,
        /// How many parts were set aside.
        count: usize,
    },
    /// The files are ours, but can neither be understood nor set aside.
    #[error("the store {} is damaged: {reason}; keep a copy, then move the directory aside to start empty", path.display())]
    Damaged {
        /// The store's directory.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The engine refused to open for another reason, such as a failing disk.
    #[error("cannot open the store {}: {reason}; check the disk and the system's log", path.display())]
    Engine {
        /// The store's directory.
        path: PathBuf,
        /// What the engine said.
        reason: String,
    },
    /// The store's threads could not be started.
    #[error("cannot start the threads of the store {}: {source}; raise the limit of threads or memory", path.display())]
    Threads {
        /// The store's directory; empty for a store in memory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// Why an operation on an open store failed. Cheap to clone: one failing write answers many requests.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The store has been closed.
    #[error("the store is closed; open it again")]
    Closed,
    /// There is no room. The store accepts again by itself once there is.
    #[error("the storage is full: {reason}")]
    Full {
        /// Why.
        reason: SpaceReason,
    },
    /// An earlier request of the same line failed; this one must not overtake it.
    #[error("a request before it was refused; repeat both, in their order")]
    Behind,
    /// Reading or writing failed. The store goes on; the request may be repeated.
    #[error("the storage failed ({reason}); check the disk and the system's log")]
    Io {
        /// What the engine said.
        reason: Arc<str>,
    },
    /// Stored bytes cannot be understood.
    #[error("stored data is damaged ({reason}); check the disk")]
    Damaged {
        /// What was found.
        reason: Arc<str>,
    },
    /// A target names a queue that this store never handed out.
    #[error("this store has no queue with id {id}; use the id of a queue that it opened")]
    UnknownQueue {
        /// The id in the target.
        id: QueueId,
    },
    /// A queue's name is empty or too long.
    #[error("a queue's name of {length_bytes} bytes was given; 1 to {max_bytes} are allowed")]
    QueueName {
        /// The length of the name that was given.
        length_bytes: usize,
        /// The longest name.
        max_bytes: usize,
    },
    /// There are as many queues as a store can have.
    #[error("the store has {max} queues, which is its limit; remove routes")]
    TooManyQueues {
        /// The limit.
        max: usize,
    },
    /// A request is larger than the store takes at once.
    #[error("a request of {length_bytes} bytes was given; up to {max_bytes} are allowed, so split it")]
    TooLarge {
        /// The size of the request's records, or of the keyed values.
        length_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// More dead letters were named than one call takes.
    #[error("{count} dead letters were named; up to {max} are allowed, so split the call")]
    TooManyLetters {
        /// How many were named.
        count: usize,
        /// The limit.
        max: usize,
    },
}
