//! Owns the engine in memory: ordered maps behind one lock. Bodies are shared, not copied.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;
use parking_lot::RwLock;

use super::{Family, Value, Visit};

type Key = Box<[u8]>;

#[derive(Debug)]
struct Stored {
    head: Box<[u8]>,
    body: Bytes,
}

type Maps = [BTreeMap<Key, Stored>; Family::ALL.len()];

/// One change of a batch.
#[derive(Debug)]
pub(crate) struct Change {
    family: Family,
    kind: ChangeKind,
}

#[derive(Debug)]
enum ChangeKind {
    Put(Key, Stored),
    Delete(Key),
    DeleteRange(Key, Key),
}

impl Change {
    pub(super) fn put(family: Family, key: &[u8], head: &[u8], body: Bytes) -> Self {
        Self { family, kind: ChangeKind::Put(key.into(), Stored { head: head.into(), body }) }
    }

    pub(super) fn delete(family: Family, key: &[u8]) -> Self {
        Self { family, kind: ChangeKind::Delete(key.into()) }
    }

    pub(super) fn delete_range(family: Family, from: &[u8], to: &[u8]) -> Self {
        Self { family, kind: ChangeKind::DeleteRange(from.into(), to.into()) }
    }
}

/// The engine.
#[derive(Debug, Default)]
pub(crate) struct MemoryEngine {
    maps: RwLock<Maps>,
}

impl MemoryEngine {
    pub(super) fn write(&self, changes: Vec<Change>) {
        let mut maps = self.maps.write();
        for change in changes {
            let map = &mut maps[change.family as usize];
            match change.kind {
                ChangeKind::Put(key, stored) => {
                    map.insert(key, stored);
                }
                ChangeKind::Delete(key) => {
                    map.remove(&key);
                }
                ChangeKind::DeleteRange(from, to) => {
                    if from < to {
                        let keys: Vec<Key> = map.range(from..to).map(|(key, _)| key.clone()).collect();
                        for key in keys {
                            map.remove(&key);
                        }
                    }
                }
            }
        }
    }

    pub(super) fn get(&self, family: Family, key: &[u8]) -> Option<Bytes> {
        let maps = self.maps.read();
        maps[family as usize].get(key).map(whole)
    }

    pub(super) fn scan(
        &self,
        family: Family,
        from: &[u8],
        to: Option<&[u8]>,
        visit: &mut dyn FnMut(&[u8], Value<'_>) -> Visit,
    ) {
        if to.is_some_and(|to| from >= to) {
            return;
        }
        let maps = self.maps.read();
        let upper = to.map_or(Bound::Unbounded, Bound::Excluded);
        for (key, stored) in maps[family as usize].range::<[u8], _>((Bound::Included(from), upper)) {
            let value = Value::Shared { head: &stored.head, body: &stored.body };
            if visit(key, value) == Visit::Stop {
                return;
            }
        }
    }
}

fn whole(stored: &Stored) -> Bytes {
    Value::Shared { head: &stored.head, body: &stored.body }.whole()
}
