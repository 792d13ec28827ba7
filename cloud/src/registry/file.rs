//! The file of the registry: read as a whole, replaced as a whole.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use edgehub_broker::identity::{Identity, ServiceIdentity, SymmetricKey};
use serde::{Deserialize, Serialize};

use super::RegistryError;

/// Largest registry file.
pub const REGISTRY_BYTES_MAX: u64 = 256 * 1_024 * 1_024;

const VERSION: u32 = 1;

/// What the file holds.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    pub(super) identities: BTreeMap<Identity, ServiceIdentity>,
    /// Of the policy that services use.
    pub(super) service_key: Option<SymmetricKey>,
}

/// Tells contents of the file apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    modified: SystemTime,
    len_bytes: u64,
    /// Each write makes a new file; 0 where files have no number.
    inode: u64,
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> std::io::Result<Self> {
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(metadata);
        #[cfg(not(unix))]
        let inode = 0;
        Ok(Self { modified: metadata.modified()?, len_bytes: metadata.len(), inode })
    }
}

/// The file, by its name.
#[derive(Debug)]
pub(super) struct RegistryFile {
    path: PathBuf,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FileOut<'a> {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_key: Option<&'a SymmetricKey>,
    identities: Vec<&'a ServiceIdentity>,
}

#[derive(Deserialize)]
struct FileVersion {
    version: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FileIn {
    service_key: Option<SymmetricKey>,
    identities: Vec<ServiceIdentity>,
}

impl RegistryFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Of the file as it is; none when there is none.
    pub(super) fn stamp(&self) -> Result<Option<Stamp>, RegistryError> {
        match fs::metadata(&self.path).and_then(|metadata| Stamp::of(&metadata)) {
            Ok(stamp) => Ok(Some(stamp)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read", error)),
        }
    }

    pub(super) fn read(&self) -> Result<Content, RegistryError> {
        let failed = |source| self.failed("read", source);
        let mut text = Vec::new();
        let file = File::open(&self.path).map_err(failed)?;
        file.take(REGISTRY_BYTES_MAX + 1).read_to_end(&mut text).map_err(failed)?;
        if text.len() as u64 > REGISTRY_BYTES_MAX {
            return Err(self.failed("read", std::io::Error::other("it is larger than 256 MiB")));
        }
        // The error's own text could quote a key, so only its place is told.
        let damaged = |error: serde_json::Error| RegistryError::Damaged {
            path: self.path.clone(),
            line: error.line(),
            column: error.column(),
        };
        let FileVersion { version } = serde_json::from_slice(&text).map_err(damaged)?;
        if version != VERSION {
            return Err(RegistryError::Version { path: self.path.clone(), version });
        }
        let FileIn { service_key, identities } = serde_json::from_slice(&text).map_err(damaged)?;
        let identities = identities.into_iter().map(|entry| (entry.identity.clone(), entry)).collect();
        Ok(Content { identities, service_key })
    }

    pub(super) fn write(&self, content: &Content) -> Result<(), RegistryError> {
        self.replace(content).map_err(|source| self.failed("written", source))
    }

    /// A new file beside the old one, synced, then renamed over it, then the directory synced.
    fn replace(&self, content: &Content) -> std::io::Result<()> {
        let content = FileOut {
            version: VERSION,
            service_key: content.service_key.as_ref(),
            identities: content.identities.values().collect(),
        };
        let mut text = serde_json::to_vec_pretty(&content)?;
        text.push(b'\n');
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let fresh = self.path.with_file_name(name);
        // A leftover of a crash may have other permissions.
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = create_private(&fresh)?;
        file.write_all(&text)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&fresh, &self.path)?;
        sync_directory(&self.path)
    }

    fn failed(&self, what: &'static str, source: std::io::Error) -> RegistryError {
        RegistryError::File { path: self.path.clone(), what, source }
    }
}

pub(crate) fn create_private(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Makes a rename or a new name in the file's directory durable.
pub(crate) fn sync_directory(path: &Path) -> std::io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if cfg!(unix) {
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}
