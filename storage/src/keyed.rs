//! Owns small keyed state: tables of values that are read and replaced as a whole.

use std::sync::Arc;

use bytes::Bytes;

use crate::error::StoreError;
use crate::intake::{Intake, Work};
use crate::reader::ReaderHandle;

/// The longest key.
pub const KEY_MAX_BYTES: usize = 4096;

/// What a table is for. The list is closed; its numbers are part of the stored form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Table {
    /// Identities in scope, by identity.
    Identities = 1,
    /// Subscriptions of persistent sessions, by identity.
    Sessions = 2,
    /// Twins and reported patches that wait for the upstream, by identity.
    Twins = 3,
    /// The hub's own configuration.
    Configuration = 4,
    /// Product information and model ids, by identity.
    Products = 5,
    /// What a stand-in for the cloud keeps, such as its identity registry.
    Registry = 6,
    /// Methods and commands that wait for their device.
    Commands = 7,
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) key: Vec<u8>,
    /// `None` deletes.
    pub(crate) value: Option<Bytes>,
}

/// One change in a set that is made together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyedChange {
    /// Sets the value of a key.
    Put(Bytes, Bytes),
    /// Removes a key; nothing happens if there is none.
    Delete(Bytes),
}

/// One table of keyed state; cheap to clone.
#[derive(Debug, Clone)]
pub struct KeyedState {
    table: Table,
    intake: Arc<Intake>,
    reader: ReaderHandle,
}

impl KeyedState {
    pub(crate) fn new(table: Table, intake: Arc<Intake>, reader: ReaderHandle) -> Self {
        Self { table, intake, reader }
    }

    /// The value of a key.
    ///
    /// # Errors
    /// When the disk cannot be read, or the store is closed.
    pub async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.reader.get(self.full_key(key)).await
    }

    /// Sets the value of a key; durable at the store's level when the future resolves.
    ///
    /// # Errors
    /// When the write failed, the key or value is too large, or the store is closed.
    pub async fn put(&self, key: &[u8], value: Bytes) -> Result<(), StoreError> {
        self.apply(vec![KeyedChange::Put(Bytes::copy_from_slice(key), value)]).await
    }

    /// Removes a key; durable at the store's level when the future resolves.
    ///
    /// # Errors
    /// When the write failed, or the store is closed.
    pub async fn delete(&self, key: &[u8]) -> Result<(), StoreError> {
        self.apply(vec![KeyedChange::Delete(Bytes::copy_from_slice(key))]).await
    }

    /// Makes all changes or none; durable at the store's level when the future resolves. Waits up to 15 seconds for
    /// the end of a full disk, within which the reserve comes into use.
    ///
    /// # Errors
    /// When the write failed, a key or the whole is too large, or the store is closed.
    pub async fn apply(&self, changes: Vec<KeyedChange>) -> Result<(), StoreError> {
        let mut bytes = 0;
        let mut full = Vec::with_capacity(changes.len());
        for change in changes {
            let (key, value) = match change {
                KeyedChange::Put(key, value) => (key, Some(value)),
                KeyedChange::Delete(key) => (key, None),
            };
            if key.len() > KEY_MAX_BYTES {
                return Err(StoreError::TooLarge { length_bytes: key.len(), max_bytes: KEY_MAX_BYTES });
            }
            bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
            full.push(Change { key: self.full_key(&key), value });
        }
        if bytes > crate::REQUEST_MAX_BYTES {
            return Err(StoreError::TooLarge { length_bytes: bytes, max_bytes: crate::REQUEST_MAX_BYTES });
        }
        let done = self.intake.submit(Work::Keyed(full), bytes, None).await?;
        done.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Up to `count_max` keys that start with `prefix` and come after `after`, in the order of their bytes, with
    /// their values. Read on with the last key until fewer come.
    ///
    /// # Errors
    /// When the disk cannot be read, or the store is closed.
    pub async fn scan(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        count_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
        let mut from = self.full_key(prefix);
        let to = successor(from.clone());
        if let Some(after) = after {
            // The next key after a key is that key with a zero behind it.
            let mut next = self.full_key(after);
            next.push(0);
            from = from.max(next);
        }
        self.reader.scan(from, to, count_max).await
    }

    /// All keys and values, in the order of the keys' bytes. For tables that fit in memory.
    ///
    /// # Errors
    /// When the disk cannot be read, or the store is closed.
    pub async fn all(&self) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
        self.scan(&[], None, usize::MAX).await
    }

    fn full_key(&self, key: &[u8]) -> Vec<u8> {
        let mut full = Vec::with_capacity(1 + key.len());
        full.push(self.table as u8);
        full.extend_from_slice(key);
        full
    }
}

/// The first key behind all keys with this prefix. A full key starts with a table's number, so there is one.
fn successor(mut prefix: Vec<u8>) -> Vec<u8> {
    while let Some(last) = prefix.pop() {
        if let Some(next) = last.checked_add(1) {
            prefix.push(next);
            break;
        }
    }
    prefix
}
