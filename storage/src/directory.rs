//! Owns the store's directory: whose it is, and which format it has.
//!
//! ```text
//! <storage folder>/store/FORMAT   "edgehub-store 1 new" until the database exists, then "edgehub-store 1 ready"
//! <storage folder>/store/db/      the database
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::engine::{DiskBudget, DiskEngine, DiskOpenError};
use crate::error::OpenError;

/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;
const MAGIC: &str = "edgehub-store";
const MARKER: &str = "FORMAT";
/// A longer marker is not ours.
const MARKER_MAX_BYTES: u64 = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Ready,
}

/// Opens the database below the storage folder; creates it if there is nothing. A directory that is not ours is
/// not touched.
pub(crate) fn open(folder: &Path, budget: DiskBudget) -> Result<DiskEngine, OpenError> {
    if is_database(folder) {
        return Err(OpenError::ForeignDatabase { path: folder.to_owned() });
    }
    let path = folder.join("store");
    let database = path.join("db");
    // What is stored may be secret: directories that are made here are for this user only.
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(&path).map_err(|source| OpenError::Create { path: path.clone(), source })?;
    if is_database(&path) {
        return Err(OpenError::ForeignDatabase { path });
    }
    let state = match read_marker(&path)? {
        Some(state) => state,
        None if database.exists() => {
            return Err(OpenError::Damaged {
                path,
                reason: format!("there is a database, but no file {MARKER} that says which format it has"),
            });
        }
        None => {
            sync_ancestors(&path);
            write_marker(&path, State::New)?;
            State::New
        }
    };
    if state == State::Ready && !database.join("CURRENT").exists() {
        return Err(OpenError::Damaged { path, reason: "its database is gone".into() });
    }
    let engine = DiskEngine::open(&database, budget).map_err(|error| match error {
        DiskOpenError::Locked => OpenError::Locked { path: path.clone() },
        DiskOpenError::Corrupt(reason) => OpenError::Damaged { path: path.clone(), reason },
        DiskOpenError::Other(reason) => OpenError::Engine { path: path.clone(), reason },
    })?;
    if state == State::New {
        write_marker(&path, State::Ready)?;
    }
    let reference = folder.join("edgeHub");
    if is_database(&reference) {
        tracing::info!(path = %reference.display(), "found the database of a reference hub; it is left alone");
    }
    Ok(engine)
}

/// Whether a directory itself is a RocksDB database.
fn is_database(path: &Path) -> bool {
    path.join("CURRENT").exists() && path.join("IDENTITY").exists()
}

fn read_marker(path: &Path) -> Result<Option<State>, OpenError> {
    let marker = path.join(MARKER);
    let access = |source| OpenError::Access { path: marker.clone(), source };
    let damaged = |reason: &str| OpenError::Damaged {
        path: path.to_owned(),
        reason: format!("its file {MARKER} {reason}"),
    };
    match fs::metadata(&marker) {
        Ok(data) if data.len() > MARKER_MAX_BYTES => return Err(damaged("is too long")),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(access(error)),
    }
    let bytes = fs::read(&marker).map_err(access)?;
    let text = String::from_utf8(bytes).map_err(|_| damaged("is not text"))?;
    let mut words = text.split_whitespace();
    let (magic, format, state) = (words.next(), words.next(), words.next());
    let Some(found) = format.filter(|_| magic == Some(MAGIC)).and_then(|format| format.parse::<u32>().ok())
    else {
        return Err(damaged("does not name a format"));
    };
    if found > FORMAT {
        return Err(OpenError::NewerFormat { path: path.to_owned(), found, supported: FORMAT });
    }
    match state {
        Some("new") if found == FORMAT => Ok(Some(State::New)),
        Some("ready") if found == FORMAT => Ok(Some(State::Ready)),
        _ => Err(damaged("is not understood")),
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

/// Replaces the marker so that a loss of power leaves the old one or the new one.
fn write_marker(path: &Path, state: State) -> Result<(), OpenError> {
    let temporary = path.join("FORMAT.new");
    let word = match state {
        State::New => "new",
        State::Ready => "ready",
    };
    let write = |temporary: &PathBuf| -> io::Result<()> {
        let mut file = File::create(temporary)?;
        writeln!(file, "{MAGIC} {FORMAT} {word}")?;
        file.sync_all()?;
        fs::rename(temporary, path.join(MARKER))?;
        File::open(path)?.sync_all()
    };
    write(&temporary).map_err(|source| OpenError::Access { path: temporary, source })
}
