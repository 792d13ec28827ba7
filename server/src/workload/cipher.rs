//! Owns the encryption of stored twins: keys of our own, which the workload API wraps.
//!
//! ```text
//! 1.<vector>.<wrapped key>.<nonce, text, tag>      Base64 each
//! ```
//!
//! The daemon wraps one key per run of the hub and not every twin: twins are stored while it is away, and its key never
//! sees a vector twice. Texts are sealed with AES-256-GCM (NIST SP 800-38D) under a fresh random nonce each.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use edgehub_broker::twin::{CipherError, Ciphering, TwinCipher};
use tokio::sync::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use super::{WorkloadClient, WorkloadError};

/// The form that is written; also what the seal covers beside the text.
const FORM: &str = "1";
/// Bytes of a key.
const KEY_BYTES: usize = 32;
/// Texts that one key seals: far below the 2^32 after which random nonces may meet (NIST SP 800-38D §8.3).
const KEY_SEALS_MAX: u64 = 1 << 30;
/// Keys of earlier runs that are remembered.
const OPENED_MAX: usize = 64;
/// After a failure the daemon is left alone for so long.
const PAUSE: Duration = Duration::from_secs(5);

/// Seals twins with keys that only the workload API can unwrap.
pub struct WorkloadCipher {
    client: WorkloadClient,
    seals: bool,
    keys: Mutex<Keys>,
}

/// Held while the daemon is asked, so that it is asked once for what many wait for.
#[derive(Default)]
struct Keys {
    sealing: Option<SealingKey>,
    opened: HashMap<Wrapped, Option<Arc<RandomizedNonceKey>>>,
    order: VecDeque<Wrapped>,
    failed: Option<(Instant, String)>,
}

struct SealingKey {
    key: Arc<RandomizedNonceKey>,
    wrapped: Wrapped,
    seals: u64,
}

/// A key as it is stored.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Wrapped {
    vector: Vec<u8>,
    bytes: Vec<u8>,
}

impl WorkloadCipher {
    /// A cipher; without `seals` it only opens what was sealed before.
    pub fn new(client: WorkloadClient, seals: bool) -> Self {
        Self { client, seals, keys: Mutex::default() }
    }

    async fn sealed(&self, plain: &[u8]) -> Result<String, CipherError> {
        let (key, wrapped) = {
            let mut keys = self.keys.lock().await;
            let sealing = match keys.sealing.take().filter(|sealing| sealing.seals < KEY_SEALS_MAX) {
                Some(sealing) => sealing,
                None => {
                    keys.rested()?;
                    let (key, wrapped) = self.make().await.map_err(|error| keys.fail(&error))?;
                    SealingKey { key, wrapped, seals: 0 }
                }
            };
            let sealing = keys.sealing.insert(sealing);
            sealing.seals += 1;
            (sealing.key.clone(), sealing.wrapped.clone())
        };
        let mut text = plain.to_vec();
        let nonce = key
            .seal_in_place_append_tag(Aad::from(FORM), &mut text)
            .map_err(|_| CipherError::Unavailable("the text cannot be sealed".into()))?;
        let mut body = nonce.as_ref().to_vec();
        body.append(&mut text);
        let [vector, wrapped, body] =
            [&wrapped.vector, &wrapped.bytes, &body].map(|part| BASE64.encode(part));
        Ok(format!("{FORM}.{vector}.{wrapped}.{body}"))
    }

    async fn opened(&self, sealed: &str) -> Result<Bytes, CipherError> {
        let foreign = || CipherError::Refused("it does not have the form of this program".into());
        let mut parts = sealed.split('.');
        let (form, vector, wrapped, body) = (parts.next(), parts.next(), parts.next(), parts.next());
        if form != Some(FORM) || parts.next().is_some() {
            return Err(foreign());
        }
        let part = |text: Option<&str>| text.and_then(|text| BASE64.decode(text).ok()).ok_or_else(foreign);
        let wrapped = Wrapped { vector: part(vector)?, bytes: part(wrapped)? };
        let key = self.unwrapped(wrapped).await?;
        let mut body = part(body)?;
        let (nonce, text) = body.split_at_mut_checked(NONCE_LEN).ok_or_else(foreign)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| foreign())?;
        let plain = key
            .open_in_place(nonce, Aad::from(FORM), text)
            .map_err(|_| CipherError::Refused("it was changed after it was stored".into()))?;
        Ok(Bytes::copy_from_slice(plain))
    }

    /// The key behind its stored form; the daemon is asked once for each.
    async fn unwrapped(&self, wrapped: Wrapped) -> Result<Arc<RandomizedNonceKey>, CipherError> {
        let refused = || CipherError::Refused("the workload API cannot unwrap its key".into());
        let mut keys = self.keys.lock().await;
        if let Some(sealing) = keys.sealing.as_ref().filter(|sealing| sealing.wrapped == wrapped) {
            return Ok(sealing.key.clone());
        }
        if let Some(known) = keys.opened.get(&wrapped) {
            return known.clone().ok_or_else(refused);
        }
        keys.rested()?;
        let key = match self.client.decrypt(&wrapped.bytes, &wrapped.vector).await {
            Ok(bytes) => RandomizedNonceKey::new(&AES_256_GCM, &bytes).ok().map(Arc::new),
            // A daemon in trouble may answer like one that has another key now. The latter unwraps what it wraps.
            Err(WorkloadError::Refused { .. }) => match self.make().await {
                Ok(_) => None,
                Err(error) => return Err(keys.fail(&error)),
            },
            Err(error) => return Err(keys.fail(&error)),
        };
        keys.remember(wrapped, key.clone());
        key.ok_or_else(refused)
    }

    /// A new key that the daemon has shown to unwrap.
    async fn make(&self) -> Result<(Arc<RandomizedNonceKey>, Wrapped), WorkloadError> {
        const CALL: &str = "encrypt";
        let unusable = |reason: &str| WorkloadError::Answer { call: CALL, reason: reason.into() };
        let mut bytes = [0; KEY_BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| unusable("the system gives no random bytes"))?;
        // The form that the daemon's own vectors have.
        let vector = Uuid::new_v4().simple().to_string().into_bytes();
        let wrapped = Wrapped { bytes: self.client.encrypt(&bytes, &vector).await?, vector };
        if self.client.decrypt(&wrapped.bytes, &wrapped.vector).await? != bytes {
            return Err(unusable("it does not decrypt to what was encrypted"));
        }
        let key =
            RandomizedNonceKey::new(&AES_256_GCM, &bytes).map_err(|_| unusable("no key comes of it"))?;
        Ok((Arc::new(key), wrapped))
    }
}

impl Keys {
    /// Fails like the last time, for a while.
    fn rested(&self) -> Result<(), CipherError> {
        match &self.failed {
            Some((at, reason)) if at.elapsed() < PAUSE => Err(CipherError::Unavailable(reason.clone())),
            Some(_) | None => Ok(()),
        }
    }

    fn fail(&mut self, error: &WorkloadError) -> CipherError {
        let reason = error.to_string();
        self.failed = Some((Instant::now(), reason.clone()));
        CipherError::Unavailable(reason)
    }

    fn remember(&mut self, wrapped: Wrapped, key: Option<Arc<RandomizedNonceKey>>) {
        if self.order.len() >= OPENED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.opened.remove(&oldest);
        }
        self.order.push_back(wrapped.clone());
        self.opened.insert(wrapped, key);
    }
}

impl TwinCipher for WorkloadCipher {
    fn seals(&self) -> bool {
        self.seals
    }

    fn seal<'a>(&'a self, plain: &'a [u8]) -> Ciphering<'a, String> {
        Box::pin(self.sealed(plain))
    }

    fn open<'a>(&'a self, sealed: &'a str) -> Ciphering<'a, Bytes> {
        Box::pin(self.opened(sealed))
    }
}
