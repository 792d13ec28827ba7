//! Owns what is known to be damaged: the kinds of damage, what was lost, and the list of a run.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

/// The most parts that are named in one run; further ones are only counted.
pub const DAMAGE_LISTED_MAX: usize = 64;
/// The most stretches of lost entries that are named for one damage; further ones are only counted.
pub const LOST_LISTED_MAX: usize = 64;

/// Its presence asks the next start to read everything.
pub(crate) const SUSPECT: &str = "SUSPECT";

/// What is damaged. The list is closed; the names are labels of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DamageKind {
    /// The write-ahead log: the newest writes.
    Log,
    /// A file of tables: older entries and state.
    Table,
    /// The list of the files that belong to the database.
    Manifest,
    /// The file that says which format the folder has.
    Marker,
    /// The database is not there at all.
    Database,
    /// Names, counters or checkpoints do not fit each other or the entries.
    Accounts,
}

impl DamageKind {
    /// All kinds.
    pub const ALL: [Self; 6] =
        [Self::Log, Self::Table, Self::Manifest, Self::Marker, Self::Database, Self::Accounts];

    /// The kind as a metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Table => "table",
            Self::Manifest => "manifest",
            Self::Marker => "marker",
            Self::Database => "database",
            Self::Accounts => "accounts",
        }
    }
}

/// Entries of a queue that cannot be read any more. They are in its ledger as dropped, reason `unreadable`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostEntries {
    /// The queue's name.
    pub queue: String,
    /// The first offset.
    pub first: u64,
    /// The last offset.
    pub last: u64,
}

/// What a damage has cost, as far as it is known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lost {
    /// Entries that are missing, in stretches; at most [`LOST_LISTED_MAX`].
    pub entries: Vec<LostEntries>,
    /// How many entries are missing, the stretches that are not named included.
    pub entries_count: u64,
    /// Whether more may be lost that nothing tells of: the newest entries of a queue, or keyed state.
    pub unknown: bool,
}

/// A part of the store that is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// What it is.
    pub kind: DamageKind,
    /// What was found.
    pub reason: String,
    /// The folder to which the damaged part was renamed; `None` if it is still in use, until the next start.
    pub set_aside: Option<PathBuf>,
    /// What is lost.
    pub lost: Lost,
}

impl Lost {
    pub(crate) fn unknown() -> Self {
        Self { unknown: true, ..Self::default() }
    }

    pub(crate) fn add(&mut self, queue: &str, first: u64, last: u64) {
        self.entries_count += last - first + 1;
        if self.entries.len() < LOST_LISTED_MAX {
            self.entries.push(LostEntries { queue: queue.to_owned(), first, last });
        }
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.entries_count == 0 {
            return out.write_str(if self.unknown { "unknown" } else { "nothing" });
        }
        write!(out, "{} entries", self.entries_count)?;
        for (index, lost) in self.entries.iter().enumerate() {
            let before = if index == 0 { ':' } else { ',' };
            write!(out, "{before} {} {}", lost.queue, lost.first)?;
            if lost.last != lost.first {
                write!(out, "-{}", lost.last)?;
            }
        }
        if self.entries.len() == LOST_LISTED_MAX {
            out.write_str(", ..")?;
        }
        if self.unknown { out.write_str("; perhaps more") } else { Ok(()) }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}; lost: {}", self.kind.as_str(), self.reason, self.lost)?;
        match &self.set_aside {
            Some(path) => write!(out, "; set aside in {}", path.display()),
            None => Ok(()),
        }
    }
}

/// The damage of a run; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct DamageLog {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The store's directory; `None` for a store in memory.
    directory: Option<PathBuf>,
    /// Whether damage that turns up belongs here: not while the store is being opened, which sets it aside.
    listening: AtomicBool,
    /// Found while opening, and not yet in the list: what is lost is still being counted.
    found: Mutex<Vec<Damage>>,
    listed: Mutex<Vec<Damage>>,
    counts: [AtomicU64; DamageKind::ALL.len()],
}

impl DamageLog {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { inner: Arc::new(Inner { directory: Some(directory), ..Inner::default() }) }
    }

    pub(crate) fn directory(&self) -> Option<&Path> {
        self.inner.directory.as_deref()
    }

    /// From now on, tables that turn out to be damaged are listed.
    pub(crate) fn listen(&self) {
        self.inner.listening.store(true, Ordering::SeqCst);
    }

    /// Keeps a damage until it is known what is lost.
    pub(crate) fn found(&self, damage: Damage) {
        self.inner.found.lock().push(damage);
    }

    pub(crate) fn take_found(&self) -> Vec<Damage> {
        std::mem::take(&mut *self.inner.found.lock())
    }

    /// Takes note of a damage and logs it. One that is listed already changes nothing; returns whether it is new.
    pub(crate) fn note(&self, damage: Damage) -> bool {
        let mut listed = self.inner.listed.lock();
        if listed.iter().any(|other| other.kind == damage.kind && other.reason == damage.reason) {
            return false;
        }
        self.inner.counts[damage.kind as usize].fetch_add(1, Ordering::Relaxed);
        if listed.len() >= DAMAGE_LISTED_MAX {
            return false;
        }
        listed.push(damage.clone());
        drop(listed);
        let set_aside = damage.set_aside.as_ref().map(|path| path.display().to_string());
        tracing::error!(
            code = "EH6001", kind = damage.kind.as_str(),
            reason = damage.reason,
            lost = %damage.lost,
            set_aside = set_aside.unwrap_or_else(|| "nothing".into()),
            "the store is damaged"
        );
        true
    }

    /// Takes note of tables that turn out to be damaged while the store is open. The next start looks at all
    /// of them, and sets aside what cannot be read.
    pub(crate) fn suspect(&self, reason: &str) {
        if !self.inner.listening.load(Ordering::SeqCst) {
            return;
        }
        let lost = Lost::unknown();
        let new =
            self.note(Damage { kind: DamageKind::Table, reason: reason.to_owned(), set_aside: None, lost });
        let Some(directory) = self.directory().filter(|_| new) else { return };
        if let Err(error) = std::fs::write(directory.join(SUSPECT), format!("{reason}\n")) {
            tracing::error!(code = "EH6002", %error, "the next start cannot be told to look for damage");
        }
    }

    pub(crate) fn all(&self) -> Vec<Damage> {
        self.inner.listed.lock().clone()
    }

    pub(crate) fn count(&self, kind: DamageKind) -> u64 {
        self.inner.counts[kind as usize].load(Ordering::Relaxed)
    }
}
