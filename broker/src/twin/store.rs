//! Owns the twins on disk: one record per identity, and the list of those whose reported properties wait.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use edgehub_storage::{KeyedChange, KeyedState, Store, StoreError, Table};

use super::record::{Stored, TwinRecord};
use crate::identity::Identity;

/// What a record's key is not: an identity holds no control character.
const PENDING_PREFIX: &[u8] = b"\x01";

/// Identities that are read from the list at a time.
const PAGE_KEYS: usize = 1_024;

/// The future of a cipher.
pub type Ciphering<'a, T> = Pin<Box<dyn Future<Output = Result<T, CipherError>> + Send + 'a>>;

/// Seals twins before they are stored, with a key that somebody else keeps.
pub trait TwinCipher: Send + Sync + 'static {
    /// Whether twins are sealed from now on; otherwise those that are can be read, and are stored plain when they change.
    fn seals(&self) -> bool {
        true
    }

    /// Seals a text; the result may be any text.
    fn seal<'a>(&'a self, plain: &'a [u8]) -> Ciphering<'a, String>;

    /// Opens what [`TwinCipher::seal`] made.
    fn open<'a>(&'a self, sealed: &'a str) -> Ciphering<'a, Bytes>;
}

/// Why a cipher fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CipherError {
    /// Whoever keeps the key cannot be asked now.
    #[error("the cipher for twins cannot be asked now: {0}")]
    Unavailable(String),
    /// It was sealed with another key, or is damaged; it can never be opened.
    #[error("the twin cannot be deciphered: {0}")]
    Refused(String),
}

/// Why a twin cannot be read or kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TwinStoreError {
    /// The store failed.
    #[error("the store failed: {0}")]
    Store(String),
    /// The cipher failed.
    #[error(transparent)]
    Cipher(#[from] CipherError),
    /// The twin is sealed, and there is no cipher.
    #[error("the stored twin is encrypted, and nothing can open it here; give the hub its workload API back")]
    NoCipher,
}

/// The stored form of a record, ready to be kept.
pub struct SealedTwin(Vec<KeyedChange>);

/// The twins on disk. Cheap to clone.
#[derive(Clone)]
pub struct TwinStore {
    table: KeyedState,
    cipher: Option<Arc<dyn TwinCipher>>,
}

impl TwinStore {
    /// The twins in a store. With a cipher that seals they are sealed from now on; those that are not can be read all the same.
    pub fn new(store: &Store, cipher: Option<Arc<dyn TwinCipher>>) -> Self {
        Self { table: store.keyed(Table::Twins), cipher }
    }

    /// The record of an identity; an empty one when there is none. One that is damaged, or can never be deciphered,
    /// counts as none.
    ///
    /// # Errors
    /// When it cannot be read now.
    pub async fn load(&self, identity: &Identity) -> Result<TwinRecord, TwinStoreError> {
        let Some(bytes) = self.table.get(identity.to_string().as_bytes()).await? else {
            return Ok(TwinRecord::default());
        };
        let plain = match Stored::parse(&bytes) {
            Ok(Stored::Plain(record)) => return Ok(record),
            Ok(Stored::Sealed(payload)) => {
                let cipher = self.cipher.as_ref().ok_or(TwinStoreError::NoCipher)?;
                match cipher.open(&payload).await {
                    Ok(plain) => Stored::parse(&plain).map_err(|error| error.to_string()),
                    Err(CipherError::Refused(reason)) => Err(reason),
                    Err(error @ CipherError::Unavailable(_)) => return Err(error.into()),
                }
            }
            Err(error) => Err(error.to_string()),
        };
        match plain {
            Ok(Stored::Plain(record)) => Ok(record),
            Ok(Stored::Sealed(_)) => Ok(self.lost(identity, "it is sealed twice")),
            Err(reason) => Ok(self.lost(identity, &reason)),
        }
    }

    /// Makes the stored form of a record, and of whether something of it waits for the upstream. Nothing is kept yet.
    ///
    /// # Errors
    /// When the cipher fails.
    pub async fn seal(&self, identity: &Identity, record: &TwinRecord) -> Result<SealedTwin, TwinStoreError> {
        let plain = record.to_text();
        let bytes = match self.cipher.as_ref().filter(|cipher| cipher.seals()) {
            Some(cipher) => Stored::sealed(cipher.seal(&plain).await?),
            None => plain,
        };
        let id = identity.to_string();
        let pending = Bytes::from([PENDING_PREFIX, id.as_bytes()].concat());
        let mark = if record.pending.is_empty() {
            KeyedChange::Delete(pending)
        } else {
            KeyedChange::Put(pending, Bytes::new())
        };
        Ok(SealedTwin(vec![KeyedChange::Put(Bytes::from(id), bytes), mark]))
    }

    /// Keeps what [`TwinStore::seal`] made; durable at the store's level when it resolves.
    ///
    /// # Errors
    /// When the store fails; then nothing changes.
    pub async fn put(&self, sealed: SealedTwin) -> Result<(), TwinStoreError> {
        Ok(self.table.apply(sealed.0).await?)
    }

    /// Deletes the record of an identity, whether it can be read or not.
    ///
    /// # Errors
    /// When the store fails; then nothing changes.
    pub async fn delete(&self, identity: &Identity) -> Result<(), TwinStoreError> {
        let id = identity.to_string();
        let pending = Bytes::from([PENDING_PREFIX, id.as_bytes()].concat());
        Ok(self.table.apply(vec![KeyedChange::Delete(Bytes::from(id)), KeyedChange::Delete(pending)]).await?)
    }

    /// The identities whose reported properties wait for the upstream.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn pending(&self) -> Result<Vec<Identity>, TwinStoreError> {
        let mut found = Vec::new();
        let mut after: Option<Bytes> = None;
        loop {
            let page = self.table.scan(PENDING_PREFIX, after.as_deref(), PAGE_KEYS).await?;
            let keys = page.iter().filter_map(|(key, _)| key.strip_prefix(PENDING_PREFIX));
            let texts = keys.filter_map(|id| std::str::from_utf8(id).ok());
            found.extend(texts.filter_map(|id| Identity::parse(id).ok()));
            match page.into_iter().last() {
                Some((last, _)) => after = Some(last),
                None => return Ok(found),
            }
        }
    }

    fn lost(&self, identity: &Identity, reason: &str) -> TwinRecord {
        tracing::error!(code = "EH4012", client = %identity, reason, "The stored twin is lost; it is read from the upstream again");
        TwinRecord::default()
    }
}

impl From<StoreError> for TwinStoreError {
    fn from(error: StoreError) -> Self {
        TwinStoreError::Store(error.to_string())
    }
}
