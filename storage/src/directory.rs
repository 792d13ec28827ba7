//! Owns the store's directory: whose it is, which format it has, and who has it open.
//!
//! ```text
//! <storage folder>/store/FORMAT        "edgehub-store 1 new" until the database exists, then "edgehub-store 1 ready"
//! <storage folder>/store/LOCK          locked while the store is open
//! <storage folder>/store/db/           the database
//! <storage folder>/store/damaged-*/    what was found to be damaged, as it was, and a text REPORT; never deleted
//! <storage folder>/store/SUSPECT       tables were found to be damaged while the store was open
//! <storage folder>/store/rescue/       a database that is being made out of a damaged one
//! <storage folder>/store/REPLAY        records of a damaged log are being written again
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::damage::{Damage, DamageKind, DamageLog, Lost};
use crate::engine::{DiskBudget, DiskOpenError, Engine};
use crate::error::OpenError;
use crate::rescue::Rescue;

/// The format that this version writes, and the newest that it reads.
pub(crate) const FORMAT: u32 = 1;
const MAGIC: &str = "edgehub-store";
const MARKER: &str = "FORMAT";
/// A longer marker is not ours.
const MARKER_MAX_BYTES: u64 = 256;
const LOCK: &str = "LOCK";
pub(crate) const DATABASE: &str = "db";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    New,
    Ready,
}

/// What the marker says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Marker {
    Missing,
    Damaged(String),
    Valid(State),
}

/// Opens the database below the storage folder; creates it if there is nothing. A directory that is not ours is
/// not touched. What is damaged is set aside, and waits in the engine's list for an account of what is lost.
pub(crate) fn open(folder: &Path, budget: DiskBudget) -> Result<Engine, OpenError> {
    let path = folder.join("store");
    create(&path)?;
    if is_database(&path) {
        return Err(OpenError::ForeignDatabase { path });
    }
    let lock = lock(&path)?;
    let marker = read_marker(&path)?;
    let mut rescue = Rescue::new(&path, budget)?;
    let database = path.join(DATABASE);
    if database.exists() && !database.is_dir() {
        return Err(OpenError::NotADirectory { path: database });
    }
    rescue.finish_interrupted()?;
    let state = match marker {
        Marker::Valid(state) => state,
        Marker::Missing if !database.exists() => {
            sync_ancestors(&path);
            write_marker(&path, State::New)?;
            State::New
        }
        Marker::Missing => {
            rescue.found(DamageKind::Marker, format!("the file {MARKER} is missing"), Lost::default());
            State::Ready
        }
        Marker::Damaged(reason) => {
            rescue.set_aside(&path.join(MARKER))?;
            rescue.found(DamageKind::Marker, format!("the file {MARKER} {reason}"), Lost::default());
            State::Ready
        }
    };
    if state == State::Ready {
        if database.exists() {
            rescue.examine()?;
        } else {
            rescue.found(DamageKind::Database, "the database is gone".into(), Lost::unknown());
        }
    }
    let damage = DamageLog::new(path.clone());
    let engine = rescue.open(&damage, lock)?;
    if state == State::New || rescue.is_marker_damaged() {
        write_marker(&path, State::Ready)?;
    }
    rescue.finish(&damage)?;
    if is_database(folder) {
        tracing::warn!(
            code = "EH6003", path = %folder.display(),
            "the database of another program, such as the reference hub, is left alone; what waits in it is not delivered"
        );
    }
    Ok(engine)
}

/// What is in a store's directory, for those who only read it.
pub(crate) struct Existing {
    pub(crate) path: PathBuf,
    pub(crate) marker: Marker,
    /// Held as long as the directory is read; `None` where no hub of this version was ever started.
    pub(crate) lock: Option<File>,
}

/// Looks at a store without changing anything.
pub(crate) fn look(folder: &Path) -> Result<Existing, OpenError> {
    let path = folder.join("store");
    if is_database(folder) && !path.exists() {
        return Err(OpenError::ForeignDatabase { path: folder.to_owned() });
    }
    if !path.exists() {
        return Err(OpenError::NotFound { path });
    }
    if !path.is_dir() {
        return Err(OpenError::NotADirectory { path });
    }
    let file = path.join(LOCK);
    let lock = match File::open(&file) {
        Ok(opened) => Some(opened),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(refused(&file, error)),
    };
    if let Some(lock) = &lock {
        take(lock, &path, &file)?;
    }
    let marker = read_marker(&path)?;
    if marker == Marker::Missing && !path.join(DATABASE).exists() {
        return Err(OpenError::NotFound { path });
    }
    Ok(Existing { path, marker, lock })
}

/// The error for something that the operating system refused.
pub(crate) fn refused(path: &Path, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => OpenError::ReadOnly { path },
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            OpenError::Full { path, reason: source.to_string() }
        }
        io::ErrorKind::NotADirectory => OpenError::NotADirectory { path },
        _ => OpenError::Access { path, source },
    }
}

/// The error for a database that did not open.
pub(crate) fn not_opened(path: &Path, error: DiskOpenError) -> OpenError {
    let path = path.to_owned();
    match error {
        DiskOpenError::Locked => OpenError::Locked { path },
        DiskOpenError::ReadOnly => OpenError::ReadOnly { path },
        DiskOpenError::Denied(reason) => {
            OpenError::Access { path, source: io::Error::new(io::ErrorKind::PermissionDenied, reason) }
        }
        DiskOpenError::Full(reason) => OpenError::Full { path, reason },
        DiskOpenError::Corrupt(reason) => OpenError::Damaged { path, reason },
        DiskOpenError::Other(reason) => OpenError::Engine { path, reason },
    }
}

/// Lets the entries of a directory survive a loss of power.
pub(crate) fn sync(directory: &Path) -> Result<(), OpenError> {
    let synced = File::open(directory).and_then(|opened| opened.sync_all());
    synced.map_err(|error| refused(directory, error))
}

fn create(path: &Path) -> Result<(), OpenError> {
    // What is stored may be secret: directories that are made here are for this user only.
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(path).map_err(|source| {
        let file = path.ancestors().find(|above| above.exists()).filter(|above| !above.is_dir());
        match (file, source.kind()) {
            (Some(file), _) => OpenError::NotADirectory { path: file.to_owned() },
            (None, io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::StorageFull) => refused(path, source),
            (None, _) => OpenError::Create { path: path.to_owned(), source },
        }
    })
}

fn lock(path: &Path) -> Result<File, OpenError> {
    let file = path.join(LOCK);
    // Not truncated: it may be another's.
    let opened = File::options().create(true).truncate(false).write(true).open(&file);
    let opened = opened.map_err(|error| refused(&file, error))?;
    take(&opened, path, &file)?;
    Ok(opened)
}

fn take(lock: &File, path: &Path, file: &Path) -> Result<(), OpenError> {
    match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::Locked { path: path.to_owned() }),
        Err(error) => Err(refused(file, error.into())),
    }
}

/// Whether a directory itself is a RocksDB database.
fn is_database(path: &Path) -> bool {
    path.join("CURRENT").exists() && path.join("IDENTITY").exists()
}

fn read_marker(path: &Path) -> Result<Marker, OpenError> {
    let marker = path.join(MARKER);
    let damaged = |reason: &str| Ok(Marker::Damaged(reason.to_owned()));
    match fs::metadata(&marker) {
        Ok(data) if data.len() > MARKER_MAX_BYTES => return damaged("is too long"),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Marker::Missing),
        Err(error) => return Err(refused(&marker, error)),
    }
    let bytes = fs::read(&marker).map_err(|error| refused(&marker, error))?;
    let Ok(text) = String::from_utf8(bytes) else { return damaged("is not text") };
    let mut words = text.split_whitespace();
    let (magic, format, state) = (words.next(), words.next(), words.next());
    let Some(found) = format.filter(|_| magic == Some(MAGIC)).and_then(|format| format.parse::<u32>().ok())
    else {
        return damaged("does not name a format");
    };
    if found > FORMAT {
        return Err(OpenError::NewerFormat { path: path.to_owned(), found, supported: FORMAT });
    }
    match state {
        Some("new") if found == FORMAT => Ok(Marker::Valid(State::New)),
        Some("ready") if found == FORMAT => Ok(Marker::Valid(State::Ready)),
        _ => damaged("is not understood"),
    }
}

/// Lets directories that may have just been made survive a loss of power. Those far above were there before, and
/// may be closed to us.
fn sync_ancestors(path: &Path) {
    for directory in path.ancestors().skip(1) {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        if let Err(error) = File::open(directory).and_then(|directory| directory.sync_all()) {
            tracing::debug!(%error, path = %directory.display(), "a directory could not be synced");
        }
    }
}

fn write_marker(path: &Path, state: State) -> Result<(), OpenError> {
    let word = match state {
        State::New => "new",
        State::Ready => "ready",
    };
    replace(path, MARKER, &format!("{MAGIC} {FORMAT} {word}\n"))
}

/// Writes a small file so that a loss of power leaves the old one or the new one.
pub(crate) fn replace(directory: &Path, name: &str, text: &str) -> Result<(), OpenError> {
    let temporary = directory.join(format!("{name}.new"));
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, directory.join(name))?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|error| refused(&temporary, error))
}

/// Notes down what was set aside, beside it. A report that cannot be written is not worth a start: the log has it.
pub(crate) fn report(damage: &Damage) {
    let Some(folder) = &damage.set_aside else { return };
    let line = format!("{damage}\n");
    let write = File::options().create(true).append(true).open(folder.join("REPORT"));
    if let Err(error) = write.and_then(|mut file| file.write_all(line.as_bytes())) {
        tracing::warn!(code = "EH6004", %error, folder = %folder.display(), "the report beside the damaged part could not be written");
    }
}
