//! Client certificates: whether the one that a connection showed proves a device, by thumbprint or by its issuer.
//!
//! That the client has the key was proven by the TLS handshake; everything else is judged here, at every login and again
//! while the connection is open. Revocation lists are not read.

use bytes::Bytes;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use time::{Date, Month, OffsetDateTime, Time};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter};

use super::{Authentication, Identity};

/// Most certificates of one connection that are looked at.
pub const CERTIFICATES_SHOWN_MAX: usize = 10;
/// Largest certificate that is looked at, in bytes.
pub const CERTIFICATE_BYTES_MAX: usize = 16_384;

/// The certificates by which those of clients are judged: the trust bundle.
pub struct ClientTrust {
    anchors: Vec<TrustAnchor<'static>>,
    /// Of each anchor, in the same order.
    facts: Vec<CertificateFacts>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// What of a certificate is looked at here (RFC 5280 §4.1.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// First moment in which it is valid.
    pub not_before: OffsetDateTime,
    /// Last moment in which it is valid.
    pub not_after: OffsetDateTime,
    /// The common name of its subject; absent when there is none, or more than one.
    pub common_name: Option<String>,
}

/// Why a certificate proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateFault {
    /// Not of the form of a certificate.
    #[error("it cannot be read")]
    Unreadable,
    /// Its time has not come.
    #[error("it is valid only from {0}; check the clock of the hub")]
    NotYetValid(OffsetDateTime),
    /// Its time is over.
    #[error("it expired at {0}; renew it")]
    Expired(OffsetDateTime),
    /// Neither thumbprint of the device is its.
    #[error("its thumbprint is none of the device's")]
    Thumbprint,
    /// It names somebody else.
    #[error("its common name is not the device's id")]
    CommonName,
    /// No chain from it to the trust bundle.
    #[error("it does not chain to the trust bundle: {0}")]
    Untrusted(String),
    /// The device proves itself otherwise.
    #[error("the device is not registered for authentication by certificate")]
    NotByCertificate,
}

impl ClientTrust {
    /// Trusts no issuer; devices with thumbprints are not concerned.
    pub fn none() -> Self {
        Self::new([]).0
    }

    /// Trusts the certificates of a bundle, roots and intermediates alike; also how many of them are not usable.
    pub fn new<'a>(bundle: impl IntoIterator<Item = CertificateDer<'a>>) -> (Self, usize) {
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        let mut trust = Self { anchors: Vec::new(), facts: Vec::new(), algorithms };
        let mut unusable = 0;
        for certificate in bundle {
            let anchor = webpki::anchor_from_trusted_cert(&certificate).map(|anchor| anchor.to_owned());
            match (anchor, CertificateFacts::of(&certificate)) {
                (Ok(anchor), Some(facts)) => {
                    trust.anchors.push(anchor);
                    trust.facts.push(facts);
                }
                _ => unusable += 1,
            }
        }
        (trust, unusable)
    }

    /// Decides on the certificates that a device showed, leaf first; gives the first second since 1970 in which they are
    /// refused.
    ///
    /// # Errors
    /// [`CertificateFault`], the first one in the order of the checks.
    pub fn verify(
        &self,
        shown: &[Bytes],
        device: &Identity,
        authentication: &Authentication,
        now_secs: i64,
    ) -> Result<i64, CertificateFault> {
        let leaf = shown.first().filter(|leaf| leaf.len() <= CERTIFICATE_BYTES_MAX);
        let leaf = leaf.ok_or(CertificateFault::Unreadable)?;
        let facts = CertificateFacts::of(leaf).ok_or(CertificateFault::Unreadable)?;
        facts.check_time(now_secs)?;
        match authentication {
            Authentication::CertificateThumbprint { primary, secondary } => {
                let own = [hex(&Sha1::digest(leaf)), hex(&Sha256::digest(leaf))];
                let known = [primary, secondary];
                let fits = |known: &str| own.iter().any(|own| own.eq_ignore_ascii_case(known));
                if !known.into_iter().flatten().any(|known| fits(known)) {
                    return Err(CertificateFault::Thumbprint);
                }
            }
            Authentication::CertificateAuthority => {
                if facts.common_name.as_deref() != Some(device.device_id()) {
                    return Err(CertificateFault::CommonName);
                }
                self.chain(leaf, &shown[1..], now_secs)?;
            }
            Authentication::SymmetricKey { .. } | Authentication::None => {
                return Err(CertificateFault::NotByCertificate);
            }
        }
        Ok(facts.not_after.unix_timestamp().saturating_add(1))
    }

    /// Whether a chain leads from the leaf, over what was shown, to the bundle. A certificate of an authority is no leaf.
    fn chain(&self, leaf: &[u8], others: &[Bytes], now_secs: i64) -> Result<(), CertificateFault> {
        let untrusted = |error: webpki::Error| CertificateFault::Untrusted(error.to_string());
        let leaf = CertificateDer::from(leaf);
        let others: Vec<CertificateDer<'_>> = others
            .iter()
            .take(CERTIFICATES_SHOWN_MAX)
            .filter(|other| other.len() <= CERTIFICATE_BYTES_MAX)
            .map(|other| CertificateDer::from(&other[..]))
            .collect();
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now_secs.max(0).unsigned_abs()));
        let leaf = EndEntityCert::try_from(&leaf).map_err(untrusted)?;
        let path = leaf
            .verify_for_usage(self.algorithms.all, &self.anchors, &others, now, AnyUsage, None, None)
            .map_err(untrusted)?;
        let used = self.anchors.iter().position(|anchor| std::ptr::eq(anchor, path.anchor()));
        match used.and_then(|index| self.facts.get(index)) {
            Some(facts) => facts.check_time(now_secs),
            None => Err(CertificateFault::Untrusted("its issuer is unknown".into())),
        }
    }
}

impl std::fmt::Debug for ClientTrust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientTrust").field("anchors", &self.anchors.len()).finish_non_exhaustive()
    }
}

/// The cloud hub does not look at the usages of a device's certificate; nor is it done here.
struct AnyUsage;

impl ExtendedKeyUsageValidator for AnyUsage {
    fn validate(&self, _: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const TELETEX_STRING: u8 = 0x14;
const IA5_STRING: u8 = 0x16;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const VERSION: u8 = 0xa0;
/// 2.5.4.3
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

impl CertificateFacts {
    /// Reads a certificate in DER form; nothing if the form is not that of RFC 5280.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let (_, certificate, _) = element(certificate).filter(|(tag, ..)| *tag == SEQUENCE)?;
        let (_, mut rest, _) = element(certificate).filter(|(tag, ..)| *tag == SEQUENCE)?;
        if let Some((VERSION, _, after)) = element(rest) {
            rest = after;
        }
        // serial number, signature algorithm, issuer
        for _ in 0..3 {
            rest = element(rest)?.2;
        }
        let (_, validity, rest) = element(rest).filter(|(tag, ..)| *tag == SEQUENCE)?;
        let (tag, from, after) = element(validity)?;
        let not_before = moment(tag, from)?;
        let (tag, until, _) = element(after)?;
        let not_after = moment(tag, until)?;
        let (_, subject, _) = element(rest).filter(|(tag, ..)| *tag == SEQUENCE)?;
        Some(Self { not_before, not_after, common_name: common_name(subject) })
    }

    fn check_time(&self, now_secs: i64) -> Result<(), CertificateFault> {
        if now_secs < self.not_before.unix_timestamp() {
            return Err(CertificateFault::NotYetValid(self.not_before));
        }
        if now_secs > self.not_after.unix_timestamp() {
            return Err(CertificateFault::Expired(self.not_after));
        }
        Ok(())
    }
}

/// The one common name among the attributes of a name.
fn common_name(mut name: &[u8]) -> Option<String> {
    let mut found = None;
    while let Some((SET, mut set, rest)) = element(name) {
        name = rest;
        while let Some((SEQUENCE, attribute, rest)) = element(set) {
            set = rest;
            let Some((OBJECT_IDENTIFIER, COMMON_NAME, value)) = element(attribute) else { continue };
            let text = match element(value)? {
                (UTF8_STRING, text, _) => std::str::from_utf8(text).ok()?,
                (PRINTABLE_STRING | IA5_STRING | TELETEX_STRING, text, _) if text.is_ascii() => {
                    std::str::from_utf8(text).ok()?
                }
                _ => return None,
            };
            if found.replace(text.to_owned()).is_some() {
                return None;
            }
        }
    }
    found
}

/// Takes one element of DER: its tag, its content and what follows.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x83 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    let (content, after) = rest.split_at_checked(length)?;
    Some((tag, content, after))
}

/// `YYMMDDhhmmssZ` (years 1950 to 2049) or `YYYYMMDDhhmmssZ`.
fn moment(tag: u8, text: &[u8]) -> Option<OffsetDateTime> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match tag {
        UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i32 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    if rest.len() != 10 {
        return None;
    }
    let part = |place: usize| rest[2 * place..2 * place + 2].parse::<u8>().ok();
    let date = Date::from_calendar_date(year, Month::try_from(part(0)?).ok()?, part(1)?).ok()?;
    Some(date.with_time(Time::from_hms(part(2)?, part(3)?, part(4)?).ok()?).assume_utc())
}

fn hex(bytes: &[u8]) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(HEX[usize::from(digit)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use time::macros::datetime;

    use super::*;

    type Issuer = CertifiedIssuer<'static, KeyPair>;

    fn now_secs() -> i64 {
        datetime!(2026-06-01 00:00 UTC).unix_timestamp()
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "somebody");
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = datetime!(2026-01-01 00:00 UTC);
        params.not_after = datetime!(2027-01-01 00:00 UTC);
        params
    }

    fn authority(name: &str, above: Option<&Issuer>) -> Issuer {
        let mut params = params(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        match above {
            None => CertifiedIssuer::self_signed(params, key).unwrap(),
            Some(above) => CertifiedIssuer::signed_by(params, key, above).unwrap(),
        }
    }

    fn issued(params: &CertificateParams, issuer: &Issuer) -> Bytes {
        let certificate = params.signed_by(&KeyPair::generate().unwrap(), issuer).unwrap();
        Bytes::copy_from_slice(certificate.der())
    }

    fn der(issuer: &Issuer) -> Bytes {
        Bytes::copy_from_slice(issuer.der())
    }

    fn trust(issuers: &[&Issuer]) -> ClientTrust {
        let (trust, unusable) = ClientTrust::new(issuers.iter().map(|issuer| issuer.der().clone()));
        assert_eq!(unusable, 0);
        trust
    }

    fn decide(
        trust: &ClientTrust,
        shown: &[Bytes],
        authentication: &Authentication,
    ) -> Result<(), CertificateFault> {
        let device = Identity::device("leaf1").unwrap();
        let until_secs = trust.verify(shown, &device, authentication, now_secs())?;
        assert_eq!(until_secs, datetime!(2027-01-01 00:00:01 UTC).unix_timestamp());
        Ok(())
    }

    #[test]
    fn by_thumbprint() {
        let made = params("whoever").self_signed(&KeyPair::generate().unwrap()).unwrap();
        let shown = [Bytes::copy_from_slice(made.der())];
        let (sha1, sha256) = (hex(&Sha1::digest(made.der())), hex(&Sha256::digest(made.der())));
        assert_eq!((sha1.len(), sha256.len()), (40, 64));
        let by = |primary: Option<&str>, secondary: Option<&str>| Authentication::CertificateThumbprint {
            primary: primary.map(Into::into),
            secondary: secondary.map(Into::into),
        };
        let lower = sha256.to_lowercase();
        for (authentication, decided) in [
            (by(Some(&sha1), None), Ok(())),
            (by(Some(&sha256), None), Ok(())),
            (by(Some("00"), Some(&lower)), Ok(())),
            (by(Some(&"A".repeat(40)), None), Err(CertificateFault::Thumbprint)),
            (by(Some(&sha1[..39]), None), Err(CertificateFault::Thumbprint)),
            (by(None, None), Err(CertificateFault::Thumbprint)),
            (Authentication::None, Err(CertificateFault::NotByCertificate)),
            (
                Authentication::SymmetricKey { primary: None, secondary: None },
                Err(CertificateFault::NotByCertificate),
            ),
        ] {
            assert_eq!(decide(&ClientTrust::none(), &shown, &authentication), decided, "{authentication:?}");
        }
        assert_eq!(
            decide(&ClientTrust::none(), &[], &by(Some(&sha1), None)),
            Err(CertificateFault::Unreadable)
        );
    }

    #[test]
    fn outside_its_time_no_certificate_counts() {
        for (from, until, fault) in [
            (datetime!(2026-06-02 00:00 UTC), datetime!(2027-01-01 00:00 UTC), "valid only from"),
            (datetime!(2026-01-01 00:00 UTC), datetime!(2026-05-31 00:00 UTC), "expired"),
        ] {
            let root = authority("root", None);
            let mut params = params("leaf1");
            (params.not_before, params.not_after) = (from, until);
            let shown = [issued(&params, &root)];
            let primary = Some(hex(&Sha256::digest(&shown[0])).into());
            for authentication in [
                Authentication::CertificateAuthority,
                Authentication::CertificateThumbprint { primary, secondary: None },
            ] {
                let error = decide(&trust(&[&root]), &shown, &authentication).unwrap_err();
                assert!(error.to_string().contains(fault), "{error}");
            }
        }
    }

    #[test]
    fn by_authority() {
        let (root, other) = (authority("root", None), authority("other", None));
        let middle = authority("middle", Some(&root));
        let by = Authentication::CertificateAuthority;
        let leaf = issued(&params("leaf1"), &root);
        let deep = issued(&params("leaf1"), &middle);
        for (what, trusted, shown, good) in [
            ("below the root", &root, vec![leaf.clone()], true),
            ("the root shown too", &root, vec![leaf.clone(), der(&root)], true),
            ("another root", &other, vec![leaf.clone()], false),
            ("below a shown intermediate", &root, vec![deep.clone(), der(&middle)], true),
            ("in any order", &root, vec![deep.clone(), der(&root), der(&middle)], true),
            ("the intermediate is missing", &root, vec![deep.clone()], false),
            ("the intermediate is trusted", &middle, vec![deep.clone()], true),
            ("the root is not, but its intermediate", &middle, vec![leaf.clone()], false),
        ] {
            let decided = decide(&trust(&[trusted]), &shown, &by);
            assert_eq!(decided.is_ok(), good, "{what}: {decided:?}");
            assert!(good || matches!(decided, Err(CertificateFault::Untrusted(_))), "{what}: {decided:?}");
        }
        assert!(matches!(decide(&ClientTrust::none(), &[leaf], &by), Err(CertificateFault::Untrusted(_))));
        // Of another device, of none, of two, and an authority in place of a device.
        for wrong in [params("leaf2"), params("LEAF1"), params("leaf1 "), {
            let mut two = params("leaf1");
            two.distinguished_name.remove(DnType::CommonName);
            two
        }] {
            let shown = [issued(&wrong, &root)];
            assert_eq!(decide(&trust(&[&root]), &shown, &by), Err(CertificateFault::CommonName));
        }
        let shown = [der(&authority("leaf1", Some(&root)))];
        assert!(matches!(decide(&trust(&[&root]), &shown, &by), Err(CertificateFault::Untrusted(_))));
        // A certificate that only looks as if the root had issued it.
        let fake = authority("root", None);
        let shown = [issued(&params("leaf1"), &fake), der(&fake)];
        assert!(matches!(decide(&trust(&[&root]), &shown, &by), Err(CertificateFault::Untrusted(_))));
    }

    #[test]
    fn an_expired_root_is_no_longer_trusted() {
        let mut params_of_root = params("root");
        params_of_root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params_of_root.not_after = datetime!(2026-05-01 00:00 UTC);
        let root = CertifiedIssuer::self_signed(params_of_root, KeyPair::generate().unwrap()).unwrap();
        let shown = [issued(&params("leaf1"), &root)];
        let decided = decide(&trust(&[&root]), &shown, &Authentication::CertificateAuthority);
        assert!(matches!(decided, Err(CertificateFault::Expired(_))), "{decided:?}");
    }

    #[test]
    fn both_forms_of_time() {
        assert_eq!(moment(UTC_TIME, b"491231235959Z"), Some(datetime!(2049-12-31 23:59:59 UTC)));
        assert_eq!(moment(UTC_TIME, b"500101000000Z"), Some(datetime!(1950-01-01 00:00 UTC)));
        assert_eq!(moment(GENERALIZED_TIME, b"20500101000000Z"), Some(datetime!(2050-01-01 00:00 UTC)));
        for broken in [&b"4912312359Z"[..], b"491331235959Z", b"491231235959", b"", b"Z", b"49123123595\xffZ"]
        {
            assert_eq!(moment(UTC_TIME, broken), None);
        }
    }

    #[test]
    fn broken_copies_are_read_without_a_panic() {
        let made = params("leaf1").self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(CertificateFacts::of(made.der()).unwrap().common_name.as_deref(), Some("leaf1"));
        for end in 0..made.der().len() {
            let _any_answer = CertificateFacts::of(&made.der()[..end]);
            let mut changed = made.der().to_vec();
            changed[end] ^= 0xff;
            let shown = [Bytes::from(changed)];
            let _any_answer = decide(&ClientTrust::none(), &shown, &Authentication::CertificateAuthority);
        }
    }
}
