//! Shared access signature (SAS) tokens: reading and checking those of clients, making the hub's own.
//!
//! ```text
//! SharedAccessSignature sr=<audience, escaped>&sig=<signature, escaped>&se=<expiry>[&skn=<policy>]
//! ```
//!
//! The order of the checks is fixed: form, expiry, audience, signature. The first one that fails names the error.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use percent_encoding::percent_decode_str;
use tokio::sync::Mutex;

use super::key::{SIGNATURE_BYTES, SymmetricKey};
use super::name::Identity;

/// How long after its expiry a token still counts: clocks differ.
pub const EXPIRY_TOLERANCE_SECS: i64 = 300;

/// Longest token that is looked at.
pub const TOKEN_BYTES_MAX: usize = 8_192;

/// Life of the tokens that the hub makes; renewed when half of it is over.
pub const OWN_TOKEN_LIFE_SECS: i64 = 3_600;

/// Longest wait for one signature of the hub's own token.
pub const SIGN_TIMEOUT_SECS: u64 = 60;

/// How often an audience is unescaped until it fits. SDKs escape once or twice.
const AUDIENCE_DECODINGS_MAX: usize = 3;

/// Seconds since 1970-01-01 UTC by the system's clock.
pub fn unix_now_secs() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Why a token is refused. Holds nothing of the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not of the form of a token.
    #[error("the token is malformed: {0}")]
    Malformed(&'static str),
    /// Expired, tolerance included.
    #[error("the token expired at {expired_at_secs} s since 1970; check the clocks of client and hub")]
    Expired {
        /// Its expiry in seconds since 1970.
        expired_at_secs: i64,
    },
    /// Made for another host or identity.
    #[error("the token is made for another host or identity")]
    Audience,
    /// Signed with none of the identity's keys.
    #[error("the token is signed with none of the identity's keys")]
    Signature,
}

/// The host names that an audience may have: the cloud hub's, and this hub's own. Case is ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts {
    names: Vec<Box<str>>,
}

impl Hosts {
    /// The hosts whose name an audience may have.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self { names: names.into_iter().map(Into::into).collect() }
    }

    fn hold(&self, host: &str) -> bool {
        self.names.iter().any(|name| name.eq_ignore_ascii_case(host))
    }
}

/// A token that was not expired when it was read. `Debug` prints audience and expiry only.
#[derive(Clone, PartialEq, Eq)]
pub struct SasToken {
    /// As received: the signature covers its escapes and their case.
    audience: Box<str>,
    /// Absent when the text was not base64: fits no key.
    signature: Option<[u8; SIGNATURE_BYTES]>,
    /// As the signature covers it.
    expiry: Box<str>,
    expires_at_secs: i64,
}

impl SasToken {
    /// Reads a token.
    ///
    /// # Errors
    /// [`TokenError::Malformed`], or [`TokenError::Expired`] when it expired more than
    /// [`EXPIRY_TOLERANCE_SECS`] before `now_secs`.
    pub fn parse(text: &str, now_secs: i64) -> Result<Self, TokenError> {
        if text.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::Malformed("it is longer than 8192 bytes"));
        }
        let blank = TokenError::Malformed("it must be two words with one blank between them");
        let (scheme, fields) = text.split_once(char::is_whitespace).ok_or(blank)?;
        if fields.contains(char::is_whitespace) {
            return Err(blank);
        }
        if scheme != "SharedAccessSignature" {
            return Err(TokenError::Malformed("it does not begin with SharedAccessSignature"));
        }
        let fields = Fields::parse(fields)?;
        let audience = fields.audience.ok_or(TokenError::Malformed("the field sr is missing"))?;
        let signature = fields.signature.ok_or(TokenError::Malformed("the field sig is missing"))?;
        let expiry = fields.expiry.ok_or(TokenError::Malformed("the field se is missing"))?;
        let expiry = unescaped(expiry).ok_or(TokenError::Malformed("the field se is not UTF-8"))?;
        let expires_at_secs = seconds(&expiry).ok_or(TokenError::Malformed("the field se is no number"))?;
        let signature = unescaped(signature)
            .and_then(|text| BASE64.decode(text.as_bytes()).ok())
            .and_then(|bytes| bytes.try_into().ok());
        let token = Self { audience: audience.into(), signature, expiry: expiry.into(), expires_at_secs };
        token.check_expiry(now_secs)?;
        Ok(token)
    }

    /// When it expires, in seconds since 1970, without tolerance.
    pub fn expires_at_secs(&self) -> i64 {
        self.expires_at_secs
    }

    /// Checks the expiry again, tolerance included.
    ///
    /// # Errors
    /// [`TokenError::Expired`].
    pub fn check_expiry(&self, now_secs: i64) -> Result<(), TokenError> {
        if self.expires_at_secs.saturating_add(EXPIRY_TOLERANCE_SECS) < now_secs {
            return Err(TokenError::Expired { expired_at_secs: self.expires_at_secs });
        }
        Ok(())
    }

    /// Checks that the token is made for the identity (for a module: or its device) and one of the hosts. Case is
    /// ignored, and one, two or three escapings are accepted; the signature must fit the identity's key anyway.
    ///
    /// # Errors
    /// [`TokenError::Audience`].
    pub fn check_audience(&self, hosts: &Hosts, claimed: &Identity) -> Result<(), TokenError> {
        self.audience_fits(hosts, claimed, true)
    }

    /// As [`SasToken::check_audience`], but a module's token must name the module.
    ///
    /// # Errors
    /// [`TokenError::Audience`].
    pub fn check_exact_audience(&self, hosts: &Hosts, claimed: &Identity) -> Result<(), TokenError> {
        self.audience_fits(hosts, claimed, false)
    }

    /// Checks that the token is made for one of the hosts as a whole, as those of services are. Case is ignored.
    ///
    /// # Errors
    /// [`TokenError::Audience`].
    pub fn check_service_audience(&self, hosts: &Hosts) -> Result<(), TokenError> {
        let fits = self.audiences().any(|text| hosts.hold(text.strip_suffix('/').unwrap_or(&text)));
        if fits { Ok(()) } else { Err(TokenError::Audience) }
    }

    fn audience_fits(&self, hosts: &Hosts, claimed: &Identity, or_device: bool) -> Result<(), TokenError> {
        let fits = self.audiences().any(|text| {
            let Some((host, device, module)) = audience_parts(&text) else { return false };
            let module_fits = match (module, claimed.module_id()) {
                (None, None) => true,
                (None, Some(_)) => or_device,
                (Some(_), None) => false,
                (Some(module), Some(claimed)) => module.eq_ignore_ascii_case(claimed),
            };
            module_fits && hosts.hold(host) && device.eq_ignore_ascii_case(claimed.device_id())
        });
        if fits { Ok(()) } else { Err(TokenError::Audience) }
    }

    /// Checks the signature against keys; compares in constant time.
    ///
    /// # Errors
    /// [`TokenError::Signature`].
    pub fn check_signature<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a SymmetricKey>,
    ) -> Result<(), TokenError> {
        let signature = self.signature.as_ref().ok_or(TokenError::Signature)?;
        let signed: [&[u8]; 3] = [self.audience.as_bytes(), b"\n", self.expiry.as_bytes()];
        let fits = keys.into_iter().any(|key| key.verifies(&signed, signature));
        if fits { Ok(()) } else { Err(TokenError::Signature) }
    }

    /// The identities that the audience can mean, by number of escapings; for protocols that learn the identity from
    /// the token (AMQP claims-based security). The host is not looked at, a leading `amqps://` is skipped. Not yet proof of anything.
    pub fn identities(&self) -> Vec<Identity> {
        let mut found = Vec::with_capacity(1);
        for text in self.audiences() {
            let identity = audience_parts(text.strip_prefix("amqps://").unwrap_or(&text)).and_then(
                |(_, device, module)| match module {
                    None => Identity::device(device).ok(),
                    Some(module) => Identity::module(device, module).ok(),
                },
            );
            found.extend(identity.filter(|identity| !found.contains(identity)));
        }
        found
    }

    /// The audience unescaped once, twice, three times; ends early when nothing changes.
    fn audiences(&self) -> impl Iterator<Item = String> {
        let mut last = Some(String::from(&*self.audience));
        let mut decodings = 0;
        std::iter::from_fn(move || {
            let encoded = last.take()?;
            let decoded = unescaped(&encoded)?.into_owned();
            decodings += 1;
            if decodings < AUDIENCE_DECODINGS_MAX && decoded != encoded {
                last = Some(decoded.clone());
            }
            Some(decoded)
        })
    }
}

impl fmt::Debug for SasToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SasToken")
            .field("audience", &self.audience)
            .field("expires_at_secs", &self.expires_at_secs)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Fields<'a> {
    audience: Option<&'a str>,
    signature: Option<&'a str>,
    expiry: Option<&'a str>,
}

impl<'a> Fields<'a> {
    /// Names ignore case and must not repeat, order is free, empty pieces are skipped; a value ends at a second `=`.
    fn parse(text: &'a str) -> Result<Self, TokenError> {
        let mut fields = Self::default();
        let mut others: Vec<&str> = Vec::new();
        for piece in text.split('&').filter(|piece| !piece.is_empty()) {
            let mut parts = piece.split('=');
            let name = parts.next().unwrap_or_default();
            let value = parts.next().ok_or(TokenError::Malformed("a field has no equals sign"))?;
            let repeated = if name.eq_ignore_ascii_case("sr") {
                fields.audience.replace(value).is_some()
            } else if name.eq_ignore_ascii_case("sig") {
                fields.signature.replace(value).is_some()
            } else if name.eq_ignore_ascii_case("se") {
                fields.expiry.replace(value).is_some()
            } else {
                let repeated = others.iter().any(|other| other.eq_ignore_ascii_case(name));
                others.push(name);
                if others.len() > 8 {
                    return Err(TokenError::Malformed("it has more than 8 unknown fields"));
                }
                repeated
            };
            if repeated {
                return Err(TokenError::Malformed("a field is repeated"));
            }
        }
        Ok(fields)
    }
}

/// Form decoding: `%XX`, and `+` as blank. Absent when the result is not UTF-8.
pub(crate) fn unescaped(text: &str) -> Option<Cow<'_, str>> {
    if text.contains('+') {
        let blanks = text.replace('+', " ");
        return percent_decode_str(&blanks).decode_utf8().ok().map(|text| Cow::Owned(text.into_owned()));
    }
    percent_decode_str(text).decode_utf8().ok()
}

/// Form encoding: blank as `+`, upper-case escapes, `-_.!*()` stay.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'!' | b'*' | b'(' | b')' => {
                out.push(char::from(byte));
            }
            b' ' => out.push('+'),
            _ => {
                const HEX: &[u8; 16] = b"0123456789ABCDEF";
                out.push('%');
                out.push(char::from(HEX[usize::from(byte >> 4)]));
                out.push(char::from(HEX[usize::from(byte & 15)]));
            }
        }
    }
    out
}

/// Whole seconds, rounded down: a comparison with whole seconds gives the same result as with the fraction.
fn seconds(text: &str) -> Option<i64> {
    let number: f64 = text.parse().ok()?;
    number.is_finite().then(|| number.floor() as i64)
}

/// `{host}/devices/{device}[/modules/{module}]`
fn audience_parts(text: &str) -> Option<(&str, &str, Option<&str>)> {
    let mut parts = text.split('/');
    let (host, devices, device) = (parts.next()?, parts.next()?, parts.next()?);
    if devices != "devices" {
        return None;
    }
    match (parts.next(), parts.next(), parts.next()) {
        (None, _, _) => Some((host, device, None)),
        (Some("modules"), Some(module), None) => Some((host, device, Some(module))),
        _ => None,
    }
}

/// The `sr` of an identity's own tokens: ids escaped, then the whole once more.
pub fn own_audience(hub_host: &str, identity: &Identity) -> String {
    let mut text = format!("{hub_host}/devices/{}", escaped(identity.device_id()));
    if let Some(module) = identity.module_id() {
        text.push_str("/modules/");
        text.push_str(&escaped(module));
    }
    escaped(&text)
}

/// A future of a signature.
pub type Signing<'a> = Pin<Box<dyn Future<Output = Result<[u8; SIGNATURE_BYTES], SignError>> + Send + 'a>>;

/// Signs with the hub's own key, wherever that is kept: in memory, or behind the security daemon.
pub trait Signer: Send + Sync + 'static {
    /// HMAC-SHA-256 of the data with the hub's key.
    fn sign<'a>(&'a self, data: &'a [u8]) -> Signing<'a>;
}

impl Signer for SymmetricKey {
    fn sign<'a>(&'a self, data: &'a [u8]) -> Signing<'a> {
        Box::pin(std::future::ready(Ok(SymmetricKey::sign(self, &[data]))))
    }
}

/// Why a token of the hub's own could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// The signer failed.
    #[error("signing the hub's own token failed: {0}")]
    Failed(String),
    /// The signer did not answer.
    #[error("signing the hub's own token took longer than {SIGN_TIMEOUT_SECS} s")]
    Timeout,
}

/// Makes the hub's own tokens for the upstream, and keeps the last one until half of its life is over.
pub struct TokenSource {
    audience: String,
    signer: Arc<dyn Signer>,
    cached: Mutex<Option<OwnToken>>,
}

struct OwnToken {
    text: Arc<str>,
    expires_at_secs: i64,
}

impl TokenSource {
    /// A source of tokens for an identity (the hub's: `{edge}/$edgeHub`) at a cloud hub.
    pub fn new(hub_host: &str, identity: &Identity, signer: Arc<dyn Signer>) -> Self {
        Self { audience: own_audience(hub_host, identity), signer, cached: Mutex::new(None) }
    }

    /// A token with at least half of its life left; older ones only while the signer fails, never expired ones.
    ///
    /// # Errors
    /// When the signer fails or does not answer, and no valid token is left.
    pub async fn token(&self) -> Result<Arc<str>, SignError> {
        self.token_at(unix_now_secs()).await
    }

    /// Forgets the token, because the upstream refused it.
    pub async fn forget(&self) {
        *self.cached.lock().await = None;
    }

    async fn token_at(&self, now_secs: i64) -> Result<Arc<str>, SignError> {
        // The lock is held while signing, so that callers that come together sign once; it has its deadline.
        let mut cached = self.cached.lock().await;
        let left_secs = cached.as_ref().map_or(0, |token| token.expires_at_secs - now_secs);
        // More than a whole life left: the clock was set back; a token of then may count as not yet valid.
        let fresh = (OWN_TOKEN_LIFE_SECS / 2..=OWN_TOKEN_LIFE_SECS).contains(&left_secs);
        if let Some(token) = cached.as_ref().filter(|_| fresh) {
            return Ok(token.text.clone());
        }
        match self.signed(now_secs).await {
            Ok(token) => Ok(cached.insert(token).text.clone()),
            Err(error) => match cached.as_ref() {
                Some(token) if left_secs > 0 => Ok(token.text.clone()),
                _ => Err(error),
            },
        }
    }

    async fn signed(&self, now_secs: i64) -> Result<OwnToken, SignError> {
        let expires_at_secs = now_secs + OWN_TOKEN_LIFE_SECS;
        let data = format!("{}\n{expires_at_secs}", self.audience);
        let signing = self.signer.sign(data.as_bytes());
        let signature = tokio::time::timeout(Duration::from_secs(SIGN_TIMEOUT_SECS), signing)
            .await
            .map_err(|_| SignError::Timeout)??;
        let signature = escaped(&BASE64.encode(signature));
        let text = format!("SharedAccessSignature sr={}&sig={signature}&se={expires_at_secs}", self.audience);
        Ok(OwnToken { text: text.into(), expires_at_secs })
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenSource").field("audience", &self.audience).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct File {
        now: i64,
        hosts: Vec<String>,
        identity_keys: Vec<SymmetricKey>,
        device_keys: Vec<SymmetricKey>,
        vectors: Vec<Vector>,
    }

    #[derive(serde::Deserialize)]
    struct Vector {
        id: String,
        r#in: Input,
        out: String,
    }

    #[derive(serde::Deserialize)]
    struct Input {
        token: String,
        claimed: String,
    }

    #[test]
    fn vectors() {
        let file: File =
            serde_json::from_str(include_str!("../../tests/vectors/protocol/sas_tokens.json")).unwrap();
        let hosts = Hosts::new(file.hosts.iter().map(String::as_str));
        assert!(file.vectors.len() >= 34);
        for vector in &file.vectors {
            let claimed = Identity::parse(&vector.r#in.claimed).unwrap();
            let device_keys = claimed.module_id().map_or(&[][..], |_| &file.device_keys);
            let result = SasToken::parse(&vector.r#in.token, file.now).and_then(|token| {
                token.check_audience(&hosts, &claimed)?;
                token.check_signature(file.identity_keys.iter().chain(device_keys))
            });
            let out = match result {
                Ok(()) => "valid",
                Err(TokenError::Malformed(_)) => "malformed",
                Err(TokenError::Expired { .. }) => "expired",
                Err(TokenError::Audience) => "audience",
                Err(TokenError::Signature) => "signature",
            };
            assert_eq!(out, vector.out, "{}", vector.id);
        }
    }

    fn key() -> SymmetricKey {
        SymmetricKey::from_bytes(b"a dummy key for tests".to_vec()).unwrap()
    }

    struct CountingSigner(AtomicUsize);

    impl Signer for CountingSigner {
        fn sign<'a>(&'a self, data: &'a [u8]) -> Signing<'a> {
            let fails = self.0.fetch_add(1, Ordering::SeqCst) == 2;
            Box::pin(async move {
                if fails { Err(SignError::Failed("gone".into())) } else { Ok(key().sign(&[data])) }
            })
        }
    }

    #[tokio::test]
    async fn own_tokens_are_renewed_at_half_their_life() {
        let identity = Identity::parse("edge1/$edgeHub").unwrap();
        let signer = Arc::new(CountingSigner(AtomicUsize::new(0)));
        let source = TokenSource::new("hub1.example.net", &identity, signer.clone());
        let first = source.token_at(1_000_000).await.unwrap();
        assert!(first.starts_with(
            "SharedAccessSignature sr=hub1.example.net%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub&sig="
        ),);
        let token = SasToken::parse(&first, 1_000_000).unwrap();
        token.check_audience(&Hosts::new(["hub1.example.net"]), &identity).unwrap();
        token.check_signature([&key()]).unwrap();
        assert_eq!(token.expires_at_secs(), 1_003_600);
        assert!(token.identities().contains(&identity));
        assert_eq!(source.token_at(1_001_800).await.unwrap(), first);
        assert_eq!(signer.0.load(Ordering::SeqCst), 1);
        let second = source.token_at(1_001_801).await.unwrap();
        assert_ne!(second, first);
        // The signer fails now: the old token does while it lives.
        assert_eq!(source.token_at(1_004_000).await.unwrap(), second);
        // The clock is set back by days: a new one.
        assert_ne!(source.token_at(500_000).await.unwrap(), second);
    }

    #[test]
    fn nothing_secret_is_printed() {
        let token = SasToken::parse("SharedAccessSignature sr=h&sig=c2VjcmV0&se=99", 0).unwrap();
        assert!(!format!("{token:?}").contains("c2VjcmV0"));
    }

    #[test]
    fn identities_of_ambiguous_audiences() {
        let token =
            SasToken::parse("SharedAccessSignature sr=amqps://h/devices/a%252541b&sig=x&se=99", 0).unwrap();
        let names: Vec<_> = token.identities().iter().map(Identity::to_string).collect();
        assert_eq!(names, ["a%2541b", "a%41b", "aAb"]);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(SharedAccessSignature )?(&?(sr|sig|se|x|%)?=?[ -~\u{e9}]{0,12}){0,6}") {
            if let Ok(token) = SasToken::parse(&text, 0) {
                let _ = token.identities();
                let claimed = Identity::device("d").unwrap();
                let _ = token.check_audience(&Hosts::new(["h"]), &claimed);
                prop_assert_eq!(token.check_signature([&key()]), Err(TokenError::Signature));
            }
        }

        #[test]
        fn own_audiences_fit_any_identity(device in "[!-.0-~]{1,20}", module in proptest::option::of("[!-.0-~]{1,20}")) {
            let identity = match &module {
                None => Identity::device(&device),
                Some(module) => Identity::module(&device, module),
            };
            let identity = identity.unwrap();
            let text = format!("SharedAccessSignature sr={}&sig=x&se=9", own_audience("h", &identity));
            let token = SasToken::parse(&text, 0).unwrap();
            prop_assert_eq!(token.check_audience(&Hosts::new(["H"]), &identity), Ok(()));
            prop_assert!(token.identities().contains(&identity));
        }
    }
}
