//! The identities of the stand-in, and the key of its services: one JSON file, changed as a whole or not at all.

mod edit;
mod file;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use edgehub_broker::identity::{
    Authentication, CHAIN_EDGE_DEVICES_MAX, Hosts, IDENTITIES_MAX, Identity, IdentityError, ScopeCache,
    ScopeCacheError, ServiceIdentity, Status, SymmetricKey,
};
use parking_lot::Mutex;

pub use file::REGISTRY_BYTES_MAX;
pub(crate) use file::{create_private, sync_directory};

use edit::{insert_device, new_key, new_module};
use file::{Content, RegistryFile, Stamp};

/// The policy whose key services use; it may do everything.
pub const SERVICE_POLICY: &str = "iothubowner";

/// The registry: all identities, in memory and in one file.
///
/// Locks: the state's lock is held while the file is read or written; the cache takes its own below it.
#[derive(Debug)]
pub struct Registry {
    file: RegistryFile,
    host_name: String,
    hosts: Hosts,
    cache: ScopeCache,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    content: Content,
    /// Of the file as it was last read or written.
    stamp: Option<Stamp>,
}

/// A device to be created.
#[derive(Debug, Clone, Copy, Default)]
pub struct NewDevice<'a> {
    /// Its id.
    pub id: &'a str,
    /// Whether it is an edge device: others can be below it, and it gets its hub and agent modules.
    pub edge: bool,
    /// The edge device above it.
    pub parent: Option<&'a str>,
}

/// What a service asks of an identity. What is absent stays, or is the usual.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PutIdentity {
    /// Of a change; without one the identity is created.
    pub etag: Option<ETag>,
    /// How it proves itself. Absent keys stay, or are made.
    pub authentication: Option<Authentication>,
    /// Whether it may connect.
    pub status: Option<Status>,
    /// Whether it is an edge device; not for modules.
    pub edge: bool,
    /// The scope id of the edge device above it; not for modules.
    pub parent_scope: Option<Arc<str>>,
}

/// Which state of an identity a change is meant for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ETag {
    /// Any.
    Any,
    /// That of which [`ETag::of`] gives this text.
    Is(String),
}

impl ETag {
    /// The state of an identity, as text without quotes.
    pub fn of(entry: &ServiceIdentity) -> String {
        let mut hasher = DefaultHasher::new();
        hasher.write(&entry.to_stored());
        BASE64.encode(hasher.finish().to_be_bytes())
    }

    fn fits(&self, entry: &ServiceIdentity) -> bool {
        match self {
            ETag::Any => true,
            ETag::Is(text) => *text == ETag::of(entry),
        }
    }
}

/// Why the registry fails.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The file cannot be read or written.
    #[error("the registry {path} cannot be {what}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The file is no registry.
    #[error("the registry {path} is damaged at line {line}, column {column}; restore it from a copy")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// The file was written by a newer release.
    #[error("the registry {path} has the unknown version {version}; it was written by a newer release")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The id cannot be.
    #[error(transparent)]
    Id(#[from] IdentityError),
    /// There is one of that name.
    #[error("{0} exists already")]
    Exists(Identity),
    /// There is none of that name.
    #[error("{0} does not exist; create it first")]
    Missing(Identity),
    /// The parent is no edge device.
    #[error("{0} is no edge device, so nothing can be below it")]
    NotEdge(Identity),
    /// Too many edge devices in a chain.
    #[error("{0} would be deeper than {CHAIN_EDGE_DEVICES_MAX} edge devices")]
    TooDeep(Identity),
    /// It is another than the one that was read.
    #[error("{0} has changed since it was read")]
    Precondition(Identity),
    /// No edge device has the scope.
    #[error("the scope that {0} is to be in belongs to no edge device")]
    NoScope(Identity),
    /// Others are below the device.
    #[error("{0} has devices below it; remove them first")]
    HasChildren(Identity),
    /// The identity has no key, so no connection string.
    #[error("{0} has no symmetric key")]
    NoKey(Identity),
    /// No randomness for a key.
    #[error("the system gives no random bytes for a key")]
    Random,
    /// Too many identities.
    #[error(transparent)]
    Full(#[from] ScopeCacheError),
}

impl Registry {
    /// Opens the registry; a file that does not exist is an empty one, and is created by the first change.
    ///
    /// # Errors
    /// When the file cannot be read or is no registry.
    pub fn open(path: impl Into<PathBuf>, host_name: &str) -> Result<Self, RegistryError> {
        let registry = Self {
            file: RegistryFile::new(path.into()),
            host_name: host_name.to_owned(),
            hosts: Hosts::new([host_name]),
            cache: ScopeCache::of_cloud(),
            state: Mutex::default(),
        };
        registry.reload()?;
        Ok(registry)
    }

    /// The host name that tokens must be made for.
    pub fn host_name(&self) -> &str {
        &self.host_name
    }

    /// The host names that tokens must be made for, as the checks take them.
    pub fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// The identities as the checks of logins take them.
    pub fn cache(&self) -> &ScopeCache {
        &self.cache
    }

    /// Reads the file again if another process changed it. Whether it did.
    ///
    /// # Errors
    /// When the file cannot be read or is no registry; the identities in memory stay.
    pub fn reload(&self) -> Result<bool, RegistryError> {
        self.reload_into(&mut self.state.lock())
    }

    /// Creates a device with new keys; an edge device also gets its hub and agent modules.
    ///
    /// # Errors
    /// When the id cannot be or exists, the parent is none, or the file cannot be written: then nothing is created.
    pub fn create_device(&self, device: NewDevice<'_>) -> Result<ServiceIdentity, RegistryError> {
        self.change(|identities| insert_device(identities, device))
    }

    /// Creates many devices with one write, parents before their children; as [`Registry::create_device`].
    ///
    /// # Errors
    /// As [`Registry::create_device`]: then none is created.
    pub fn create_devices<'a>(
        &self,
        devices: impl IntoIterator<Item = NewDevice<'a>>,
    ) -> Result<Vec<ServiceIdentity>, RegistryError> {
        self.change(|identities| {
            devices.into_iter().map(|device| insert_device(identities, device)).collect()
        })
    }

    /// Creates a module with new keys.
    ///
    /// # Errors
    /// When the id cannot be or exists, the device does not, or the file cannot be written: then nothing is created.
    pub fn create_module(&self, device: &str, module: &str) -> Result<ServiceIdentity, RegistryError> {
        let identity = Identity::module(device, module)?;
        self.change(|identities| {
            if !identities.contains_key(&identity.of_device()) {
                return Err(RegistryError::Missing(identity.of_device()));
            }
            if identities.contains_key(&identity) {
                return Err(RegistryError::Exists(identity.clone()));
            }
            let created = new_module(identity.clone())?;
            identities.insert(identity.clone(), created.clone());
            Ok(created)
        })
    }

    /// Creates an identity, or changes one: with an etag.
    ///
    /// # Errors
    /// When it exists or does not, its parent or device does not, the etag does not fit, or the file cannot be written:
    /// then nothing changes.
    pub fn put(&self, identity: &Identity, put: PutIdentity) -> Result<ServiceIdentity, RegistryError> {
        self.change(|identities| edit::put(identities, identity, put))
    }

    /// The connection string of services; makes their key if there is none.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn service_connection_string(&self) -> Result<String, RegistryError> {
        let mut state = self.state.lock();
        self.reload_into(&mut state)?;
        let key = match &state.content.service_key {
            Some(key) => key.clone(),
            None => {
                let key = new_key()?;
                let content = Content { service_key: Some(key.clone()), ..state.content.clone() };
                self.file.write(&content)?;
                state.stamp = self.file.stamp()?;
                state.content = content;
                key
            }
        };
        let host = &self.host_name;
        let key = key.to_base64();
        Ok(format!("HostName={host};SharedAccessKeyName={SERVICE_POLICY};SharedAccessKey={key}"))
    }

    /// The key of services, if it was made.
    pub(crate) fn service_key(&self) -> Option<SymmetricKey> {
        self.state.lock().content.service_key.clone()
    }

    /// Lets a device prove itself otherwise; its keys are forgotten.
    ///
    /// # Errors
    /// When it does not exist, or the file cannot be written: then nothing changes.
    pub fn set_authentication(
        &self,
        identity: &Identity,
        authentication: Authentication,
    ) -> Result<(), RegistryError> {
        self.change(|identities| {
            let entry =
                identities.get_mut(identity).ok_or_else(|| RegistryError::Missing(identity.clone()))?;
            entry.authentication = authentication;
            Ok(())
        })
    }

    /// Enables or disables a device.
    ///
    /// # Errors
    /// When it does not exist, or the file cannot be written: then nothing changes.
    pub fn set_status(&self, identity: &Identity, status: Status) -> Result<(), RegistryError> {
        self.change(|identities| {
            let entry =
                identities.get_mut(identity).ok_or_else(|| RegistryError::Missing(identity.clone()))?;
            entry.status = status;
            Ok(())
        })
    }

    /// Removes a module, or a device with all its modules.
    ///
    /// # Errors
    /// When it does not exist or has children, or the file cannot be written: then nothing changes.
    pub fn remove(&self, identity: &Identity) -> Result<(), RegistryError> {
        self.remove_if(identity, &ETag::Any)
    }

    /// The same, if the identity is still the one that was read.
    ///
    /// # Errors
    /// As [`Registry::remove`].
    pub fn remove_if(&self, identity: &Identity, etag: &ETag) -> Result<(), RegistryError> {
        self.change(|identities| {
            let entry =
                identities.remove(identity).ok_or_else(|| RegistryError::Missing(identity.clone()))?;
            if !etag.fits(&entry) {
                return Err(RegistryError::Precondition(identity.clone()));
            }
            if identity.module_id().is_none() {
                let scope = entry.device_scope.filter(|_| entry.edge);
                if identities.values().any(|child| scope.is_some() && child.parent_scope() == scope.as_ref())
                {
                    return Err(RegistryError::HasChildren(identity.clone()));
                }
                identities.retain(|other, _| other.device_id() != identity.device_id());
            }
            Ok(())
        })
    }

    /// All identities in order of their names, a device before its modules.
    pub fn list(&self) -> Vec<ServiceIdentity> {
        self.state.lock().content.identities.values().cloned().collect()
    }

    /// The connection string of an identity; holds its primary key, or `x509=true` when it proves itself by certificate.
    ///
    /// # Errors
    /// When it does not exist or has neither.
    pub fn connection_string(&self, identity: &Identity) -> Result<String, RegistryError> {
        let entry = self.cache.get(identity).ok_or_else(|| RegistryError::Missing(identity.clone()))?;
        let proof = match &entry.authentication {
            Authentication::CertificateThumbprint { .. } | Authentication::CertificateAuthority => {
                "x509=true".to_owned()
            }
            Authentication::SymmetricKey { .. } | Authentication::None => {
                let key = entry.keys().next().ok_or_else(|| RegistryError::NoKey(identity.clone()))?;
                format!("SharedAccessKey={}", key.to_base64())
            }
        };
        let module = identity.module_id().map(|module| format!("ModuleId={module};")).unwrap_or_default();
        Ok(format!("HostName={};DeviceId={};{module}{proof}", self.host_name, identity.device_id(),))
    }

    /// Applies a change to a copy, writes it, and only then makes it what counts.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<Identity, ServiceIdentity>) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let mut state = self.state.lock();
        self.reload_into(&mut state)?;
        let mut content = state.content.clone();
        let outcome = change(&mut content.identities)?;
        if content.identities.len() > IDENTITIES_MAX {
            return Err(ScopeCacheError::Full.into());
        }
        self.file.write(&content)?;
        self.cache.replace_all(content.identities.values().cloned().collect())?;
        state.stamp = self.file.stamp()?;
        state.content = content;
        Ok(outcome)
    }

    fn reload_into(&self, state: &mut State) -> Result<bool, RegistryError> {
        let stamp = self.file.stamp()?;
        let Some(stamp) = stamp.filter(|stamp| state.stamp != Some(*stamp)) else { return Ok(false) };
        let content = self.file.read()?;
        self.cache.replace_all(content.identities.values().cloned().collect())?;
        state.content = content;
        state.stamp = Some(stamp);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    fn open(directory: &Path) -> Registry {
        Registry::open(directory.join("registry.json"), "hub1.example.net").unwrap()
    }

    #[test]
    fn what_is_created_survives_and_is_in_scope() {
        let directory = tempfile::tempdir().unwrap();
        let registry = open(directory.path());
        let device = |id, edge, parent| NewDevice { id, edge, parent };
        registry.create_device(device("edge1", true, None)).unwrap();
        registry.create_device(device("child", true, Some("edge1"))).unwrap();
        let leaf = registry.create_devices([device("leaf", false, Some("child"))]).unwrap().remove(0);
        let half = registry.create_devices([device("half", false, None), device("leaf", false, None)]);
        assert!(matches!(half, Err(RegistryError::Exists(_))));
        registry.create_module("edge1", "filter").unwrap();
        assert!(matches!(registry.create_device(device("edge1", true, None)), Err(RegistryError::Exists(_))));
        assert!(matches!(
            registry.create_device(device("x", false, Some("leaf"))),
            Err(RegistryError::NotEdge(_))
        ));
        assert!(matches!(registry.create_module("no", "m"), Err(RegistryError::Missing(_))));
        let again = open(directory.path());
        assert_eq!(again.list(), registry.list());
        assert_eq!(again.list().len(), 8);
        assert_eq!(again.cache().chain_text(&id("leaf")).as_deref(), Some("leaf;child;edge1"));
        let key = leaf.keys().next().unwrap().to_base64();
        assert_eq!(
            again.connection_string(&id("leaf")).unwrap(),
            format!("HostName=hub1.example.net;DeviceId=leaf;SharedAccessKey={key}")
        );
        let text = again.connection_string(&id("edge1/filter")).unwrap();
        assert!(
            text.starts_with("HostName=hub1.example.net;DeviceId=edge1;ModuleId=filter;SharedAccessKey=")
        );
        assert!(matches!(again.remove(&id("child")), Err(RegistryError::HasChildren(_))));
        again.remove(&id("leaf")).unwrap();
        again.remove(&id("child")).unwrap();
        assert_eq!(again.list().len(), 4);
        // The other process sees it.
        assert!(registry.reload().unwrap());
        assert!(registry.cache().get(&id("leaf")).is_none());
    }

    #[test]
    fn chains_are_not_made_too_deep() {
        let directory = tempfile::tempdir().unwrap();
        let registry = open(directory.path());
        registry.create_device(NewDevice { id: "e1", edge: true, parent: None }).unwrap();
        for depth in 2..=5 {
            let (id, parent) = (format!("e{depth}"), format!("e{}", depth - 1));
            registry.create_device(NewDevice { id: &id, edge: true, parent: Some(&parent) }).unwrap();
        }
        registry.create_device(NewDevice { id: "leaf", edge: false, parent: Some("e5") }).unwrap();
        assert!(matches!(
            registry.create_device(NewDevice { id: "e6", edge: true, parent: Some("e5") }),
            Err(RegistryError::TooDeep(_))
        ));
    }

    #[test]
    fn a_write_that_fails_or_was_cut_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let registry = open(directory.path());
        registry.create_device(NewDevice { id: "d1", ..NewDevice::default() }).unwrap();
        // What a crash between writing and renaming leaves behind is not looked at, and does not stand in the way.
        let fresh = directory.path().join("registry.json.new");
        fs::write(&fresh, b"{\"version\":1,\"ident").unwrap();
        assert_eq!(open(directory.path()).list().len(), 1);
        registry.create_device(NewDevice { id: "d2", ..NewDevice::default() }).unwrap();
        assert!(!fresh.exists());
        // The new file cannot be made: a directory has its name.
        fs::create_dir(&fresh).unwrap();
        let failed = registry.create_device(NewDevice { id: "d3", ..NewDevice::default() });
        assert!(matches!(failed, Err(RegistryError::File { what: "written", .. })), "{failed:?}");
        assert!(registry.cache().get(&id("d3")).is_none());
        assert_eq!(open(directory.path()).list().len(), 2);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(directory.path().join("registry.json")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn a_damaged_file_is_refused_without_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("registry.json");
        fs::write(&path, b"{\"version\":1,\"identities\":\"c2VjcmV0\"}").unwrap();
        let error = Registry::open(&path, "h").unwrap_err();
        assert!(matches!(error, RegistryError::Damaged { .. }));
        assert!(!error.to_string().contains("c2VjcmV0"));
        fs::write(&path, b"{\"version\":9}").unwrap();
        assert!(matches!(Registry::open(&path, "h"), Err(RegistryError::Version { version: 9, .. })));
    }
}
