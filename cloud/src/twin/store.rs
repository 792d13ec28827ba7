//! The files of the twins: one for each, changed as a whole or not at all, also by several processes.
//!
//! ```text
//! twins/d-leaf1/device.json       twins/d-edge1/m-$edgeHub.json       twins/changed
//! ```
//!
//! Nothing is kept in memory, so what another process wrote is seen at the next look. A lock on the device's folder
//! orders the changes; `changed` is touched by processes that do not serve the clients themselves.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use edgehub_broker::identity::Identity;
use rustix::fs::FlockOperation;

use super::{Twin, TwinFault};
use crate::registry::{create_private, sync_directory};

/// Largest file of one twin.
const FILE_BYTES_MAX: u64 = 1_024 * 1_024;

const CHANGED_FILE: &str = "changed";

/// The twins on disk. All calls block on files.
#[derive(Debug)]
pub struct TwinStore {
    directory: PathBuf,
}

/// Why a twin cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum TwinStoreError {
    /// A file cannot be read or written.
    #[error("the twin {path} cannot be {what}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file is no twin.
    #[error(
        "the twin {path} is damaged at line {line}, column {column}; restore it from a copy, or remove it"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// The process is stopping.
    #[error("the request was interrupted; it may have been carried out")]
    Interrupted,
    /// The twin does not take the change.
    #[error(transparent)]
    Fault(#[from] TwinFault),
}

impl TwinStore {
    /// The twins in a folder, which the first change creates.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// The twin of an identity; an empty one if there is none of that generation.
    ///
    /// # Errors
    /// When the file cannot be read or is no twin.
    pub fn read(&self, identity: &Identity, generation_id: &str) -> Result<Twin, TwinStoreError> {
        let path = self.path(identity);
        let failed = |source| TwinStoreError::File { path: path.clone(), what: "read", source };
        let mut text = Vec::new();
        match File::open(&path) {
            Ok(file) => file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(failed)?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Twin::new(generation_id)),
            Err(error) => return Err(failed(error)),
        };
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(failed(std::io::Error::other("it is larger than 1 MiB")));
        }
        let twin: Twin = serde_json::from_slice(&text).map_err(|error| TwinStoreError::Damaged {
            path: path.clone(),
            line: error.line(),
            column: error.column(),
        })?;
        if twin.generation_id() == generation_id { Ok(twin) } else { Ok(Twin::new(generation_id)) }
    }

    /// Changes the twin of an identity; the twin after it, and what the change gives. Durable when it returns.
    ///
    /// # Errors
    /// When the file cannot be read or written, or the change fails: then nothing changes.
    pub fn change<T>(
        &self,
        identity: &Identity,
        generation_id: &str,
        change: impl FnOnce(&mut Twin) -> Result<T, TwinFault>,
    ) -> Result<(Twin, T), TwinStoreError> {
        let path = self.path(identity);
        let failed = |source| TwinStoreError::File { path: path.clone(), what: "written", source };
        let folder = path.parent().unwrap_or(&self.directory);
        fs::create_dir_all(folder).map_err(failed)?;
        let lock = File::open(folder).map_err(failed)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
        let mut twin = self.read(identity, generation_id)?;
        let outcome = change(&mut twin)?;
        write(&path, &twin).map_err(failed)?;
        Ok((twin, outcome))
    }

    /// Forgets the twin of an identity that is removed; for a device also those of its modules.
    ///
    /// # Errors
    /// When files cannot be removed; they are of an old generation then, and count as absent.
    pub fn remove(&self, identity: &Identity) -> Result<(), TwinStoreError> {
        let path = self.path(identity);
        let removed = match (identity.module_id(), path.parent()) {
            (None, Some(folder)) => fs::remove_dir_all(folder),
            _ => fs::remove_file(&path),
        };
        match removed {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                Err(TwinStoreError::File { path, what: "removed", source })
            }
            _ => Ok(()),
        }
    }

    /// Tells the process that serves the clients that twins have changed.
    ///
    /// # Errors
    /// When the file for it cannot be written.
    pub fn announce(&self) -> Result<(), TwinStoreError> {
        let path = self.directory.join(CHANGED_FILE);
        let failed = |source| TwinStoreError::File { path: path.clone(), what: "written", source };
        fs::create_dir_all(&self.directory).map_err(failed)?;
        // A new file each time: its number tells changes apart that the clock does not.
        replace(&path, b"").map_err(failed)
    }

    /// Differs after each [`TwinStore::announce`].
    pub(crate) fn announced(&self) -> Option<(SystemTime, u64)> {
        let metadata = fs::metadata(self.directory.join(CHANGED_FILE)).ok()?;
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
        #[cfg(not(unix))]
        let inode = 0;
        Some((metadata.modified().ok()?, inode))
    }

    /// Ids hold neither a slash nor a control character, and the prefix keeps dots harmless.
    fn path(&self, identity: &Identity) -> PathBuf {
        let folder = self.directory.join(format!("d-{}", identity.device_id()));
        match identity.module_id() {
            None => folder.join("device.json"),
            Some(module) => folder.join(format!("m-{module}.json")),
        }
    }
}

fn write(path: &Path, twin: &Twin) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(twin)?;
    text.push(b'\n');
    replace(path, &text)
}

/// A new file beside the old one, synced, then renamed over it, then the directory synced.
fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = create_private(&fresh)?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&fresh, path)?;
    sync_directory(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    #[test]
    fn twins_survive_and_belong_to_a_generation() {
        let directory = tempfile::tempdir().unwrap();
        let store = TwinStore::new(directory.path().join("twins"));
        for identity in ["..", "d1", "d1/$edgeHub", "d1/device", "d1/.."] {
            let (twin, version) =
                store.change(&id(identity), "7", |twin| twin.report(br#"{"a":1}"#)).unwrap();
            assert_eq!(version, 2, "{identity}");
            assert_eq!(
                TwinStore::new(directory.path().join("twins")).read(&id(identity), "7").unwrap(),
                twin
            );
        }
        assert_eq!(store.read(&id("d1"), "8").unwrap(), Twin::new("8"));
        store.remove(&id("d1/device")).unwrap();
        assert_eq!(store.read(&id("d1"), "7").unwrap().version(), 2);
        store.remove(&id("d1")).unwrap();
        store.remove(&id("d1")).unwrap();
        assert_eq!(store.read(&id("d1/$edgeHub"), "7").unwrap(), Twin::new("7"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn changes_of_several_threads_are_all_made() {
        let directory = tempfile::tempdir().unwrap();
        let count = |store: &TwinStore| {
            for _ in 0..10 {
                store.change(&id("d1"), "7", |twin| twin.report(b"{}")).unwrap();
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| count(&TwinStore::new(directory.path())));
            }
        });
        assert_eq!(TwinStore::new(directory.path()).read(&id("d1"), "7").unwrap().version(), 41);
    }

    #[test]
    fn damage_is_told_and_announcements_differ() {
        let directory = tempfile::tempdir().unwrap();
        let store = TwinStore::new(directory.path());
        store.change(&id("d1"), "7", |twin| twin.report(b"{}")).unwrap();
        fs::write(store.path(&id("d1")), b"{\"generationId\":1").unwrap();
        let error = store.read(&id("d1"), "7").unwrap_err();
        assert!(matches!(error, TwinStoreError::Damaged { line: 1, .. }), "{error}");
        let mut seen = vec![store.announced()];
        for _ in 0..3 {
            store.announce().unwrap();
            assert_ne!(seen.last(), Some(&store.announced()));
            seen.push(store.announced());
        }
    }
}
