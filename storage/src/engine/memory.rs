//! Owns the engine in memory: ordered maps behind one lock. Bodies are shared, not copied.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::RwLock;

use super::{Family, Value, Visit};

type Key = Box<[u8]>;

#[derive(Debug)]
struct Stored {
    head: Box<[u8]>,
    body: Bytes,
}

impl Stored {
    fn bytes(&self) -> u64 {
        (self.head.len() + self.body.len()) as u64
    }
}

fn size(key: &Key, stored: &Stored) -> u64 {
    key.len() as u64 + stored.bytes()
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
    /// Keys and values that are held, to the byte.
    used_bytes: AtomicU64,
}

impl MemoryEngine {
    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn write(&self, changes: Vec<Change>) {
        // Freed when readers are let in again: of a long range that takes the most time.
        let mut removed: Vec<(Key, Stored)> = Vec::new();
        let mut maps = self.maps.write();
        let mut used_bytes = self.used_bytes();
        for change in changes {
            let map = &mut maps[change.family as usize];
            match change.kind {
                ChangeKind::Put(key, stored) => {
                    used_bytes += size(&key, &stored);
                    let key_bytes = key.len() as u64;
                    if let Some(before) = map.insert(key, stored) {
                        used_bytes -= key_bytes + before.bytes();
                    }
                }
                ChangeKind::Delete(key) => {
                    if let Some((key, before)) = map.remove_entry(&key) {
                        used_bytes -= size(&key, &before);
                    }
                }
                ChangeKind::DeleteRange(from, to) => {
                    if from < to {
                        let first = removed.len();
                        removed.extend(map.extract_if(from..to, |_, _| true));
                        used_bytes -=
                            removed[first..].iter().map(|(key, stored)| size(key, stored)).sum::<u64>();
                    }
                }
            }
        }
        self.used_bytes.store(used_bytes, Ordering::Relaxed);
        drop(maps);
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
