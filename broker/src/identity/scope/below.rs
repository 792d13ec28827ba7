//! Owns the index of who is immediately below whom: devices by the scope of their parent, modules by their device.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use super::super::name::Identity;
use super::super::record::ServiceIdentity;

/// Names only, in order. What is asked for costs what it brings, however many there are.
#[derive(Default)]
pub(super) struct Index {
    devices: HashMap<Arc<str>, BTreeSet<Identity>, ahash::RandomState>,
    modules: HashMap<Identity, BTreeSet<Identity>, ahash::RandomState>,
}

impl Index {
    pub(super) fn insert(&mut self, entry: &ServiceIdentity) {
        let identity = entry.identity.clone();
        if identity.module_id().is_some() {
            self.modules.entry(identity.of_device()).or_default().insert(identity);
        } else if let Some(scope) = entry.parent_scope() {
            self.devices.entry(scope.clone()).or_default().insert(identity);
        }
    }

    pub(super) fn remove(&mut self, entry: &ServiceIdentity) {
        let identity = &entry.identity;
        if identity.module_id().is_some() {
            take(&mut self.modules, &identity.of_device(), identity);
        } else if let Some(scope) = entry.parent_scope() {
            take(&mut self.devices, scope, identity);
        }
    }

    /// A device, its modules, and the devices in the scope that is its own, in the order of their names: at most `max` of
    /// those behind `after`.
    pub(super) fn names(
        &self,
        device: &Identity,
        own_scope: Option<&Arc<str>>,
        after: Option<&Identity>,
        max: usize,
    ) -> Vec<Identity> {
        let range = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let modules = self.modules.get(device);
        let devices = own_scope.and_then(|scope| self.devices.get(scope));
        let mut names: Vec<Identity> = [modules, devices]
            .into_iter()
            .flatten()
            .flat_map(|set| set.range::<Identity, _>(range).take(max))
            .chain(Some(device).filter(|device| after.is_none_or(|after| *device > after)))
            .cloned()
            .collect();
        names.sort_unstable();
        // A device that names itself as its parent is there twice.
        names.dedup();
        names.truncate(max);
        names
    }
}

/// Takes a name out of the set of a key; an empty set goes too.
fn take<K: std::hash::Hash + Eq>(
    sets: &mut HashMap<K, BTreeSet<Identity>, ahash::RandomState>,
    key: &K,
    identity: &Identity,
) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(identity);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}
