//! The cache of the identities in scope, and the auth chains that follow from their parents.

mod below;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dashmap::DashMap;
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use super::name::Identity;
use super::record::{ServiceIdentity, ServiceIdentityError, Status};
use below::Index;

/// Most identities in scope.
pub const IDENTITIES_MAX: usize = 100_000;

/// Most edge devices in an auth chain, the one at the top included.
pub const CHAIN_EDGE_DEVICES_MAX: usize = 5;

const SNAPSHOT_VERSION: u32 = 1;

/// The module id of the hub on every edge device.
pub const HUB_MODULE_ID: &str = "$edgeHub";

type Map<K, V> = DashMap<K, V, ahash::RandomState>;

/// The identities in scope. Reads and single updates cost the same however many there are.
///
/// Locks: writers take the one writer lock, then single entries of the maps or the index; none of these is held while
/// another is touched.
pub struct ScopeCache {
    top: Top,
    entries: Map<Identity, Arc<ServiceIdentity>>,
    /// Scope id of an edge device to its identity: the way from a child to its parent.
    scopes: Map<Arc<str>, Identity>,
    /// The way from a parent to its children.
    below: RwLock<Index>,
    writer: Mutex<()>,
    /// The upstream has listed the whole scope since the start, so who is missing is not in it.
    complete: AtomicBool,
}

/// Where chains end.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Top {
    /// At this edge device.
    Edge(Identity),
    /// At any device without parent: seen from a cloud hub.
    Any,
}

/// What an update changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScopeChange {
    /// New ones, and those whose record differs from the one before.
    pub changed: Vec<Identity>,
    /// No longer in scope.
    pub removed: Vec<Identity>,
}

impl ScopeChange {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty()
    }
}

/// Why the cache does not take an update or a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeCacheError {
    /// More than [`IDENTITIES_MAX`].
    #[error("more than {IDENTITIES_MAX} identities in scope; split the site between several edge devices")]
    Full,
    /// A snapshot that cannot be read; begin with an empty cache.
    #[error("the snapshot of the scope cache cannot be read: {0}")]
    Snapshot(ServiceIdentityError),
    /// Written by a newer release.
    #[error("the snapshot of the scope cache has the unknown version {0}")]
    Version(u32),
}

#[derive(Serialize)]
struct SnapshotOut<'a> {
    version: u32,
    identities: Vec<&'a ServiceIdentity>,
}

#[derive(Deserialize)]
struct SnapshotVersion {
    version: u32,
}

#[derive(Deserialize)]
struct SnapshotIn {
    identities: Vec<ServiceIdentity>,
}

impl ScopeCache {
    /// An empty cache of the scope of an edge device.
    pub fn new(edge_device: &Identity) -> Self {
        Self::with_top(Top::Edge(edge_device.of_device()))
    }

    /// An empty cache of all identities of a cloud hub: chains end at devices without parent.
    pub fn of_cloud() -> Self {
        Self::with_top(Top::Any)
    }

    fn with_top(top: Top) -> Self {
        Self {
            top,
            entries: Map::default(),
            scopes: Map::default(),
            below: RwLock::default(),
            writer: Mutex::new(()),
            complete: AtomicBool::new(false),
        }
    }

    /// The edge device whose scope this is; absent for a cloud hub.
    pub fn edge_device(&self) -> Option<&Identity> {
        match &self.top {
            Top::Edge(device) => Some(device),
            Top::Any => None,
        }
    }

    /// The record of an identity.
    pub fn get(&self, identity: &Identity) -> Option<Arc<ServiceIdentity>> {
        self.entries.get(identity).map(|entry| entry.value().clone())
    }

    /// Number of identities.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All records, in no order. Copies the list, so no lock is held after it.
    pub fn all(&self) -> Vec<Arc<ServiceIdentity>> {
        self.entries.iter().map(|entry| entry.value().clone()).collect()
    }

    /// A device, its modules, and the devices whose parent it is, in the order of their names: at most `max` of those
    /// behind `after`. With the last name when there are more; nothing of a device that is unknown.
    pub fn below(
        &self,
        device: &Identity,
        after: Option<&Identity>,
        max: usize,
    ) -> (Vec<ServiceIdentity>, Option<Identity>) {
        let Some(entry) = self.get(device) else { return (Vec::new(), None) };
        let mut names = self.below.read().names(device, own_scope(&entry), after, max.saturating_add(1));
        let more = names.len() > max;
        names.truncate(max);
        let found = names.iter().filter_map(|name| self.get(name));
        let found = found.map(|entry| ServiceIdentity::clone(&entry)).collect();
        (found, names.pop().filter(|_| more))
    }

    /// The ids from the target up to the top: `leaf1`, `edgeChild`, `edgeTop`; a module is followed by its device.
    ///
    /// Absent if the target is not below the top, an edge device on the way is unknown or disabled, or there are more
    /// than [`CHAIN_EDGE_DEVICES_MAX`]. The hub's own device and hub module have theirs even in an empty cache.
    pub fn chain(&self, target: &Identity) -> Option<Vec<Identity>> {
        let mut chain = Vec::with_capacity(4);
        let mut device = target.of_device();
        if target.module_id().is_some() {
            chain.push(target.clone());
        }
        if let Top::Edge(own) = &self.top
            && device == *own
            && target.module_id().is_none_or(|module| module == HUB_MODULE_ID)
        {
            chain.push(device);
            return Some(chain);
        }
        if target.module_id().is_some() && !self.entries.contains_key(target) {
            return None;
        }
        let mut edge_devices = 0;
        loop {
            let entry = self.get(&device)?;
            // Only the first device can be a leaf: scope ids name edge devices only.
            if entry.edge {
                edge_devices += 1;
                if entry.status == Status::Disabled || edge_devices > CHAIN_EDGE_DEVICES_MAX {
                    return None;
                }
            }
            chain.push(device.clone());
            if matches!(&self.top, Top::Edge(own) if device == *own) {
                return Some(chain);
            }
            match (entry.parent_scope(), &self.top) {
                (Some(scope), _) => device = self.scopes.get(scope).map(|parent| parent.value().clone())?,
                (None, Top::Any) => return Some(chain),
                (None, Top::Edge(_)) => return None,
            }
        }
    }

    /// The text form of [`ScopeCache::chain`], its elements joined by `;`.
    pub fn chain_text(&self, target: &Identity) -> Option<String> {
        let chain: Vec<String> = self.chain(target)?.iter().map(Identity::to_string).collect();
        Some(chain.join(";"))
    }

    /// Whether an identity is known to have left the scope, or never to have been in it. Not before the first
    /// complete refresh: what was restored from a snapshot may be old, and an unknown identity new.
    pub fn is_out_of_scope(&self, identity: &Identity) -> bool {
        self.complete.load(Ordering::Acquire)
            && !self.entries.contains_key(identity)
            && self.chain(identity).is_none()
    }

    /// Replaces everything by a complete refresh.
    ///
    /// # Errors
    /// [`ScopeCacheError::Full`]; the cache stays as it was.
    pub fn replace_all(&self, identities: Vec<ServiceIdentity>) -> Result<ScopeChange, ScopeCacheError> {
        let _writer = self.writer.lock();
        let kept: HashSet<Identity, ahash::RandomState> =
            identities.iter().map(|entry| entry.identity.clone()).collect();
        if kept.len() > IDENTITIES_MAX {
            return Err(ScopeCacheError::Full);
        }
        let removed: Vec<Identity> = self
            .entries
            .iter()
            .map(|entry| entry.key().clone())
            .filter(|identity| !kept.contains(identity))
            .collect();
        removed.iter().for_each(|identity| self.take(identity));
        let changed = identities.into_iter().filter_map(|entry| self.put(entry)).collect();
        self.complete.store(true, Ordering::Release);
        Ok(ScopeChange { changed, removed })
    }

    /// Takes new or newer records; the others stay. For single refreshes and incomplete full ones.
    ///
    /// # Errors
    /// [`ScopeCacheError::Full`] when there is no room for a new one; those before it are taken.
    pub fn update(
        &self,
        identities: impl IntoIterator<Item = ServiceIdentity>,
    ) -> Result<ScopeChange, ScopeCacheError> {
        let _writer = self.writer.lock();
        let mut change = ScopeChange::default();
        for entry in identities {
            if self.entries.len() >= IDENTITIES_MAX && !self.entries.contains_key(&entry.identity) {
                return Err(ScopeCacheError::Full);
            }
            change.changed.extend(self.put(entry));
        }
        Ok(change)
    }

    /// Removes an identity that is no longer in scope.
    pub fn remove(&self, identity: &Identity) -> ScopeChange {
        let _writer = self.writer.lock();
        if !self.entries.contains_key(identity) {
            return ScopeChange::default();
        }
        self.take(identity);
        ScopeChange { changed: Vec::new(), removed: vec![identity.clone()] }
    }

    /// The whole content as bytes for the store. It holds keys: encrypt it.
    pub fn snapshot(&self) -> Vec<u8> {
        let identities = self.all();
        let snapshot = SnapshotOut {
            version: SNAPSHOT_VERSION,
            identities: identities.iter().map(|entry| &**entry).collect(),
        };
        serde_json::to_vec(&snapshot).expect("JSON") // plain data: no maps, no fallible parts
    }

    /// Replaces everything by what [`ScopeCache::snapshot`] wrote.
    ///
    /// # Errors
    /// When the bytes are damaged or of a newer release; the cache stays as it was.
    pub fn restore(&self, snapshot: &[u8]) -> Result<ScopeChange, ScopeCacheError> {
        let unreadable = |error: serde_json::Error| ScopeCacheError::Snapshot(error.into());
        let SnapshotVersion { version } = serde_json::from_slice(snapshot).map_err(unreadable)?;
        if version != SNAPSHOT_VERSION {
            return Err(ScopeCacheError::Version(version));
        }
        let SnapshotIn { identities } = serde_json::from_slice(snapshot).map_err(unreadable)?;
        let complete = self.complete.load(Ordering::Acquire);
        let change = self.replace_all(identities);
        self.complete.store(complete, Ordering::Release);
        change
    }

    /// The identity, if the record is new or differs. The caller holds the writer lock.
    fn put(&self, entry: ServiceIdentity) -> Option<Identity> {
        let identity = entry.identity.clone();
        let before = self.get(&identity);
        if before.as_deref() == Some(&entry) {
            return None;
        }
        let old_scope = before.as_deref().and_then(own_scope);
        let new_scope = own_scope(&entry);
        if old_scope != new_scope {
            self.forget_scope(old_scope, &identity);
            if let Some(scope) = new_scope {
                self.scopes.insert(scope.clone(), identity.clone());
            }
        }
        let moved = before.as_deref().is_none_or(|before| before.parent_scope() != entry.parent_scope());
        if moved {
            let mut below = self.below.write();
            before.iter().for_each(|before| below.remove(before));
            below.insert(&entry);
        }
        self.entries.insert(identity.clone(), Arc::new(entry));
        Some(identity)
    }

    fn take(&self, identity: &Identity) {
        if let Some((_, entry)) = self.entries.remove(identity) {
            self.below.write().remove(&entry);
            self.forget_scope(own_scope(&entry), identity);
        }
    }

    fn forget_scope(&self, scope: Option<&Arc<str>>, identity: &Identity) {
        if let Some(scope) = scope {
            self.scopes.remove_if(scope, |_, owner| owner == identity);
        }
    }
}

impl std::fmt::Debug for ScopeCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScopeCache").field("top", &self.top).field("len", &self.len()).finish()
    }
}

fn own_scope(entry: &ServiceIdentity) -> Option<&Arc<str>> {
    entry.device_scope.as_ref().filter(|_| entry.edge)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::key::SymmetricKey;
    use super::super::record::Authentication;
    use super::*;

    pub(crate) fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    pub(crate) fn key_of(text: &str) -> SymmetricKey {
        SymmetricKey::from_bytes(format!("key of {text}").into_bytes()).unwrap()
    }

    fn entry(text: &str, edge: bool, parent: Option<&str>) -> ServiceIdentity {
        let scope = |device: &str| -> Arc<str> { format!("ms-azure-iot-edge://{device}-1").into() };
        ServiceIdentity {
            identity: id(text),
            authentication: Authentication::SymmetricKey { primary: Some(key_of(text)), secondary: None },
            status: Status::Enabled,
            edge,
            device_scope: if edge { Some(scope(text)) } else { parent.map(scope) },
            parent_scopes: parent.map(scope).into_iter().collect(),
            generation_id: "1".into(),
        }
    }

    pub(crate) fn edge(device: &str, parent: Option<&str>) -> ServiceIdentity {
        entry(device, true, parent)
    }

    pub(crate) fn leaf(device: &str, parent: &str) -> ServiceIdentity {
        entry(device, false, Some(parent))
    }

    pub(crate) fn module(name: &str) -> ServiceIdentity {
        entry(name, false, None)
    }

    pub(crate) fn site() -> Vec<ServiceIdentity> {
        vec![
            edge("top", None),
            module("top/$edgeHub"),
            module("top/filter"),
            leaf("leaf1", "top"),
            edge("child", Some("top")),
            module("child/$edgeHub"),
            module("child/mod"),
            leaf("leaf2", "child"),
        ]
    }

    #[test]
    fn chains() {
        let cache = ScopeCache::new(&id("top"));
        assert_eq!(cache.chain_text(&id("top/$edgeHub")).as_deref(), Some("top/$edgeHub;top"));
        assert_eq!(cache.chain_text(&id("top")).as_deref(), Some("top"));
        assert_eq!(cache.chain(&id("top/filter")), None);
        // Children before their parents: they dangle until those come.
        let mut entries = site();
        entries.reverse();
        cache.update(entries).unwrap();
        for (target, chain) in [
            ("top/filter", Some("top/filter;top")),
            ("leaf1", Some("leaf1;top")),
            ("leaf2", Some("leaf2;child;top")),
            ("child/mod", Some("child/mod;child;top")),
            ("child", Some("child;top")),
            ("stranger", None),
            ("child/stranger", None),
        ] {
            assert_eq!(cache.chain_text(&id(target)).as_deref(), chain, "{target}");
        }
        cache.update([ServiceIdentity { status: Status::Disabled, ..edge("child", Some("top")) }]).unwrap();
        assert_eq!(cache.chain(&id("leaf2")), None);
        assert!(cache.chain(&id("leaf1")).is_some());
    }

    #[test]
    fn the_sixth_edge_device_has_no_chain_and_loops_end() {
        let cache = ScopeCache::new(&id("e1"));
        cache.update([edge("e1", None)]).unwrap();
        for depth in 2..=6 {
            let parent = format!("e{}", depth - 1);
            cache.update([edge(&format!("e{depth}"), Some(&parent))]).unwrap();
        }
        cache.update([leaf("leaf", "e5"), leaf("lost", "e6")]).unwrap();
        assert_eq!(cache.chain(&id("e5")).unwrap().len(), 5);
        assert_eq!(cache.chain(&id("leaf")).unwrap().len(), 6);
        assert_eq!(cache.chain(&id("e6")), None);
        assert_eq!(cache.chain(&id("lost")), None);
        cache.update([edge("a", Some("b")), edge("b", Some("a"))]).unwrap();
        assert_eq!(cache.chain(&id("a")), None);
    }

    #[test]
    fn a_refresh_tells_what_changed() {
        let cache = ScopeCache::new(&id("top"));
        assert_eq!(cache.replace_all(site()).unwrap().changed.len(), 8);
        assert!(cache.replace_all(site()).unwrap().is_empty());
        let mut entries = site();
        entries.retain(|entry| entry.identity != id("leaf1"));
        entries[0].generation_id = "2".into();
        entries[0].device_scope = Some("ms-azure-iot-edge://top-2".into());
        let change = cache.replace_all(entries).unwrap();
        assert_eq!(change, ScopeChange { changed: vec![id("top")], removed: vec![id("leaf1")] });
        // The children still name the scope of the device that was.
        assert_eq!(cache.chain(&id("leaf2")), None);
        assert_eq!(cache.remove(&id("leaf2")).removed, [id("leaf2")]);
        assert!(cache.remove(&id("leaf2")).is_empty());
    }

    #[test]
    fn what_is_immediately_below_comes_in_pages() {
        let cache = ScopeCache::new(&id("top"));
        let mut entries = site();
        entries.push(module("leaf1/part"));
        cache.replace_all(entries).unwrap();
        let pages = |device: &str, max: usize| {
            let (mut pages, mut after) = (Vec::new(), None);
            loop {
                let (found, next) = cache.below(&id(device), after.as_ref(), max);
                assert!(found.len() <= max);
                pages
                    .push(found.iter().map(|entry| entry.identity.to_string()).collect::<Vec<_>>().join(" "));
                after = next;
                if after.is_none() {
                    return pages.join(", ");
                }
            }
        };
        for (device, max, expected) in [
            ("top", 10, "child leaf1 top top/$edgeHub top/filter"),
            ("top", 5, "child leaf1 top top/$edgeHub top/filter"),
            ("top", 2, "child leaf1, top top/$edgeHub, top/filter"),
            ("top", 1, "child, leaf1, top, top/$edgeHub, top/filter"),
            ("child", 3, "child child/$edgeHub child/mod, leaf2"),
            ("leaf1", 10, "leaf1 leaf1/part"),
            ("stranger", 10, ""),
        ] {
            assert_eq!(pages(device, max), expected, "{device} by {max}");
        }
        // It moved, and another left.
        cache.update([leaf("leaf1", "child")]).unwrap();
        cache.remove(&id("top/filter"));
        assert_eq!(pages("top", 10), "child top top/$edgeHub");
        assert_eq!(pages("child", 10), "child child/$edgeHub child/mod leaf1 leaf2");
        // Another device of the same name: nobody names its scope as the parent's.
        let scope = Some("ms-azure-iot-edge://child-2".into());
        cache.update([ServiceIdentity { device_scope: scope, ..edge("child", Some("top")) }]).unwrap();
        assert_eq!(pages("child", 10), "child child/$edgeHub child/mod");
    }

    proptest::proptest! {
        #[test]
        fn the_index_is_what_a_look_at_all_would_find(
            steps in proptest::collection::vec((0..6u8, 0..6u8, 0..5u8), 0..40),
            after in 0..6u8,
            max in 1..4usize,
        ) {
            let cache = ScopeCache::new(&id("d0"));
            for (number, parent, kind) in steps {
                let (device, parent) = (format!("d{number}"), format!("d{parent}"));
                match kind {
                    0 => drop(cache.remove(&id(&device))),
                    1 => drop(cache.update([leaf(&device, &parent)]).unwrap()),
                    2 => drop(cache.update([module(&format!("{device}/m{parent}"))]).unwrap()),
                    3 => drop(cache.remove(&id(&format!("{device}/m{parent}")))),
                    _ => drop(cache.update([edge(&device, Some(&parent))]).unwrap()),
                }
            }
            let after = id(&format!("d{after}"));
            for device in (0..6).map(|number| id(&format!("d{number}"))) {
                let entry = cache.get(&device);
                let scope = entry.as_deref().and_then(own_scope);
                let mut expected: Vec<ServiceIdentity> = cache
                    .all()
                    .iter()
                    .filter(|_| entry.is_some())
                    .filter(|other| {
                        other.identity.of_device() == device
                            || (scope.is_some() && other.parent_scope() == scope)
                    })
                    .filter(|other| other.identity > after)
                    .map(|other| ServiceIdentity::clone(other))
                    .collect();
                expected.sort_unstable_by(|a, b| a.identity.cmp(&b.identity));
                let next = expected.get(max).map(|_| expected[max - 1].identity.clone());
                expected.truncate(max);
                proptest::prop_assert_eq!(cache.below(&device, Some(&after), max), (expected, next));
            }
        }
    }

    #[test]
    fn a_snapshot_restores_everything() {
        let cache = ScopeCache::new(&id("top"));
        cache.replace_all(site()).unwrap();
        let other = ScopeCache::new(&id("top"));
        assert_eq!(other.restore(&cache.snapshot()).unwrap().changed.len(), 8);
        assert!(other.replace_all(site()).unwrap().is_empty());
        assert!(other.restore(b"{\"version\":1").is_err());
        assert_eq!(other.restore(b"{\"version\":2}"), Err(ScopeCacheError::Version(2)));
        assert_eq!(other.len(), 8);
    }

    #[test]
    fn a_cloud_sees_all_roots() {
        let cache = ScopeCache::of_cloud();
        cache.update(site()).unwrap();
        cache
            .update([ServiceIdentity { parent_scopes: vec![], device_scope: None, ..leaf("solo", "x") }])
            .unwrap();
        assert_eq!(cache.chain_text(&id("leaf2")).as_deref(), Some("leaf2;child;top"));
        assert_eq!(cache.chain_text(&id("solo")).as_deref(), Some("solo"));
    }
}
