//! The symmetric keys of identities: decoding, signing, comparing; never printed.

use std::fmt;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Sha256;

/// Bytes of an HMAC-SHA-256 signature.
pub const SIGNATURE_BYTES: usize = 32;

/// Longest key in bytes, decoded. The cloud hub's own keys have 32 or 64.
pub const KEY_BYTES_MAX: usize = 1_024;

/// Standard base64; the padding may be missing, as hand-copied keys have it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A key that identities share with the hub. `Debug` never prints it; it has no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct SymmetricKey(Box<[u8]>);

/// Why a text is no key. Holds nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not base64.
    #[error("the key is not base64 text; copy it again from the device's connection string")]
    NotBase64,
    /// Empty, or longer than [`KEY_BYTES_MAX`].
    #[error("the key must have 1 to {KEY_BYTES_MAX} bytes")]
    Length,
}

impl SymmetricKey {
    /// Reads the base64 form.
    ///
    /// # Errors
    /// When the text is not base64, empty or too long.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        if text.len() > KEY_BYTES_MAX.div_ceil(3) * 4 {
            return Err(KeyError::Length);
        }
        Self::from_bytes(BASE64.decode(text).map_err(|_| KeyError::NotBase64)?)
    }

    /// A key from its bytes.
    ///
    /// # Errors
    /// When there are none or too many.
    pub fn from_bytes(bytes: impl Into<Box<[u8]>>) -> Result<Self, KeyError> {
        let bytes = bytes.into();
        if bytes.is_empty() || bytes.len() > KEY_BYTES_MAX { Err(KeyError::Length) } else { Ok(Self(bytes)) }
    }

    /// The base64 form, for connection strings, the store and scope answers. Keep it out of logs.
    pub fn to_base64(&self) -> String {
        BASE64.encode(&self.0)
    }

    /// HMAC-SHA-256 over the parts, one behind the other (RFC 2104).
    pub fn sign(&self, parts: &[&[u8]]) -> [u8; SIGNATURE_BYTES] {
        self.mac(parts).finalize().into_bytes().into()
    }

    /// Whether the signature is that of the parts; compares in constant time.
    pub fn verifies(&self, parts: &[&[u8]], signature: &[u8]) -> bool {
        self.mac(parts).verify_slice(signature).is_ok()
    }

    fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&self.0).expect("a key"); // HMAC takes any length
        parts.iter().for_each(|part| mac.update(part));
        mac
    }
}

impl fmt::Debug for SymmetricKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SymmetricKey(..)")
    }
}

impl Serialize for SymmetricKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_base64())
    }
}

impl<'de> Deserialize<'de> for SymmetricKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_base64(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_as_rfc_4231_test_case_2() {
        let key = SymmetricKey::from_bytes(b"Jefe".to_vec()).unwrap();
        let signature = key.sign(&[b"what do ya want ", b"for nothing?"]);
        let hex: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
        assert!(key.verifies(&[b"what do ya want for nothing?"], &signature));
        assert!(!key.verifies(&[b"what do ya want for nothing!"], &signature));
        assert!(!key.verifies(&[b"what do ya want for nothing?"], &signature[..31]));
    }

    #[test]
    fn debug_and_errors_show_nothing() {
        let key = SymmetricKey::from_base64("c2VjcmV0").unwrap();
        assert_eq!(format!("{key:?}"), "SymmetricKey(..)");
        assert_eq!(key.to_base64(), "c2VjcmV0");
        assert_eq!(SymmetricKey::from_base64("not base64!"), Err(KeyError::NotBase64));
        assert_eq!(SymmetricKey::from_base64(""), Err(KeyError::Length));
        assert_eq!(SymmetricKey::from_base64(&"A".repeat(4_000)), Err(KeyError::Length));
    }
}
