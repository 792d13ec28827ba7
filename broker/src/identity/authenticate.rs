//! The decision whether a login is who it claims to be, from what the cache knows; no waiting, no network.
//!
//! A login on behalf of another identity carries an auth chain. Its first element must be the claimed identity, its
//! last one names the edge device that acts, the hub's own chain of the claimed identity must contain that device,
//! and the token must be that of the device's hub module. (The first implementation does not compare the first
//! element, so that one child hub could act as any identity.)

use bytes::Bytes;

use super::certificate::{CertificateFault, ClientTrust};
use super::name::Identity;
use super::scope::{CHAIN_EDGE_DEVICES_MAX, HUB_MODULE_ID, ScopeCache};
use super::token::{EXPIRY_TOLERANCE_SECS, Hosts, SasToken, TokenError};
use super::{Authentication, ServiceIdentity, Status};
use crate::backend::{Credentials, Login};

/// Most elements of an auth chain: a module, its leaf device, and the edge devices above.
const CHAIN_ELEMENTS_MAX: usize = CHAIN_EDGE_DEVICES_MAX + 2;

/// Longest auth chain in bytes.
const CHAIN_BYTES_MAX: usize = 2_048;

/// What the cache says to a login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is who it claims to be.
    Accepted(Accepted),
    /// It is not, or cannot prove it.
    Refused(Refusal),
    /// The cache does not know this identity: the claimed one or the one that acts.
    Unknown(Identity),
}

/// An accepted login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// The first second since 1970 in which the same credentials are refused, tolerance included; absent when they do not
    /// expire.
    pub until_secs: Option<i64>,
}

/// Why a login is refused. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The token's own fault; see [`TokenError`].
    #[error("{0}")]
    Token(TokenError),
    /// The token fits none of the keys that the cache has for the identity; they can be old.
    #[error("the token is signed with none of the known keys of {0}")]
    Signature(Identity),
    /// The identity is disabled in the registry.
    #[error("{0} is disabled")]
    Disabled(Identity),
    /// The identity does not prove itself by tokens.
    #[error("{0} is not registered for authentication by token")]
    NotByToken(Identity),
    /// No chain from the identity up to this hub.
    #[error("{0} is not below this hub, or an edge device between is disabled")]
    NoChain(Identity),
    /// The acting edge device is not above the claimed identity.
    #[error("{actor} does not act for {target}")]
    NotAbove {
        /// Who acts.
        actor: Identity,
        /// For whom.
        target: Identity,
    },
    /// The auth chain cannot be.
    #[error("the auth chain is malformed: {0}")]
    Chain(&'static str),
    /// No credentials.
    #[error("no credentials; send a SAS token as password")]
    NoCredentials,
    /// The certificate does not prove the device. Its record can be old.
    #[error("the certificate does not prove that this is {identity}: {fault}")]
    Certificate {
        /// The device.
        identity: Identity,
        /// Why not.
        fault: CertificateFault,
    },
    /// Certificates are for devices themselves.
    #[error("a certificate proves a device itself, not a module, and nobody acts for others with it")]
    CertificateMisplaced,
}

impl Refusal {
    /// The identity whose newer record could change the verdict; absent when none could.
    pub fn refresh(&self) -> Option<&Identity> {
        match self {
            Refusal::Signature(identity)
            | Refusal::Disabled(identity)
            | Refusal::NotByToken(identity)
            | Refusal::NoChain(identity)
            | Refusal::NotAbove { target: identity, .. }
            | Refusal::Certificate {
                identity,
                fault: CertificateFault::Thumbprint | CertificateFault::NotByCertificate,
            } => Some(identity),
            Refusal::Token(_)
            | Refusal::Chain(_)
            | Refusal::NoCredentials
            | Refusal::Certificate { .. }
            | Refusal::CertificateMisplaced => None,
        }
    }
}

/// The acting edge device of a login on behalf of another identity; absent when the login is its own.
///
/// # Errors
/// [`Refusal::Chain`] when the chain has too many elements, one that is no id, or another first one than `claimed`.
pub fn actor_of(claimed: &Identity, auth_chain: Option<&str>) -> Result<Option<Identity>, Refusal> {
    let Some(chain) = auth_chain.filter(|chain| chain.contains(';')) else { return Ok(None) };
    if chain.len() > CHAIN_BYTES_MAX {
        return Err(Refusal::Chain("it is longer than 2048 bytes"));
    }
    let mut elements = chain.split(';');
    let first = elements.next().unwrap_or_default();
    if Identity::parse(first).as_ref() != Ok(claimed) {
        return Err(Refusal::Chain("its first element is not the identity of the connection"));
    }
    let mut actor = None;
    for (index, element) in elements.enumerate() {
        if index + 2 > CHAIN_ELEMENTS_MAX {
            return Err(Refusal::Chain("it has more than 7 elements"));
        }
        actor = Some(Identity::device(element).map_err(|_| Refusal::Chain("an element is no device id"))?);
    }
    Ok(actor)
}

/// Decides on a login.
pub fn verify(
    login: &Login,
    scope: &ScopeCache,
    hosts: &Hosts,
    trust: &ClientTrust,
    now_secs: i64,
) -> Verdict {
    let token = match &login.credentials {
        Credentials::SasToken(token) => token,
        Credentials::Certificate(shown) => {
            if login.identity.module_id().is_some() || login.auth_chain.is_some() {
                return Verdict::Refused(Refusal::CertificateMisplaced);
            }
            return verify_certificate(&login.identity, shown, scope, trust, now_secs);
        }
        Credentials::None => return Verdict::Refused(Refusal::NoCredentials),
    };
    match actor_of(&login.identity, login.auth_chain.as_deref()) {
        Err(refusal) => Verdict::Refused(refusal),
        Ok(None) => verify_token(&login.identity, token, scope, hosts, now_secs),
        Ok(Some(actor)) => verify_on_behalf(&login.identity, &actor, token, scope, hosts, now_secs),
    }
}

/// Decides on the certificates that a device showed, leaf first.
pub fn verify_certificate(
    device: &Identity,
    shown: &[Bytes],
    scope: &ScopeCache,
    trust: &ClientTrust,
    now_secs: i64,
) -> Verdict {
    let Some(entry) = scope.get(device) else { return Verdict::Unknown(device.clone()) };
    if entry.status == Status::Disabled {
        return Verdict::Refused(Refusal::Disabled(device.clone()));
    }
    match trust.verify(shown, device, &entry.authentication, now_secs) {
        Ok(until_secs) => Verdict::Accepted(Accepted { until_secs: Some(until_secs) }),
        Err(fault) => Verdict::Refused(Refusal::Certificate { identity: device.clone(), fault }),
    }
}

/// Decides on a token of the edge device `actor` for an identity below it.
pub fn verify_on_behalf(
    target: &Identity,
    actor: &Identity,
    token: &str,
    scope: &ScopeCache,
    hosts: &Hosts,
    now_secs: i64,
) -> Verdict {
    let Ok(hub) = Identity::module(actor.device_id(), HUB_MODULE_ID) else {
        return Verdict::Refused(Refusal::Chain("an element is no device id"));
    };
    // The token first: who does not hold the actor's key learns nothing of what is below it, and costs no refresh
    // of the target.
    let accepted = match verify_keys(&hub, token, scope, hosts, now_secs, false) {
        Verdict::Accepted(accepted) => accepted,
        other => return other,
    };
    let Some(chain) = scope.chain(target) else {
        return match scope.get(target) {
            None => Verdict::Unknown(target.clone()),
            Some(_) => Verdict::Refused(Refusal::NoChain(target.clone())),
        };
    };
    if !chain.contains(&actor.of_device()) {
        return Verdict::Refused(Refusal::NotAbove { actor: actor.clone(), target: target.clone() });
    }
    match scope.get(target) {
        Some(entry) if entry.status == Status::Disabled => {
            Verdict::Refused(Refusal::Disabled(target.clone()))
        }
        _ => Verdict::Accepted(accepted),
    }
}

/// Decides on an identity's own token. A module's may be signed with its own or its device's keys.
pub fn verify_token(
    claimed: &Identity,
    token: &str,
    scope: &ScopeCache,
    hosts: &Hosts,
    now_secs: i64,
) -> Verdict {
    verify_keys(claimed, token, scope, hosts, now_secs, true)
}

/// `or_device`: whether a module's token may be its device's.
fn verify_keys(
    claimed: &Identity,
    token: &str,
    scope: &ScopeCache,
    hosts: &Hosts,
    now_secs: i64,
    or_device: bool,
) -> Verdict {
    let token = SasToken::parse(token, now_secs).and_then(|token| {
        if or_device {
            token.check_audience(hosts, claimed)?;
        } else {
            token.check_exact_audience(hosts, claimed)?;
        }
        Ok(token)
    });
    let token = match token {
        Ok(token) => token,
        Err(error) => return Verdict::Refused(Refusal::Token(error)),
    };
    let Some(entry) = scope.get(claimed) else { return Verdict::Unknown(claimed.clone()) };
    let device = claimed.module_id().and_then(|_| scope.get(&claimed.of_device()));
    for entry in device.iter().chain([&entry]) {
        if entry.status == Status::Disabled {
            return Verdict::Refused(Refusal::Disabled(entry.identity.clone()));
        }
    }
    let device = device.filter(|_| or_device);
    if !by_token(&entry) && !device.as_deref().is_some_and(by_token) {
        return Verdict::Refused(Refusal::NotByToken(claimed.clone()));
    }
    let keys = entry.keys().chain(device.iter().flat_map(|device| device.keys()));
    match token.check_signature(keys) {
        Ok(()) => {
            let until_secs = token.expires_at_secs().saturating_add(EXPIRY_TOLERANCE_SECS + 1);
            Verdict::Accepted(Accepted { until_secs: Some(until_secs) })
        }
        Err(_) => Verdict::Refused(Refusal::Signature(claimed.clone())),
    }
}

fn by_token(entry: &ServiceIdentity) -> bool {
    matches!(entry.authentication, Authentication::SymmetricKey { .. })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use super::super::scope::tests::{edge, id, key_of, leaf, site};
    use super::super::{SymmetricKey, TokenSource};
    use super::*;
    use crate::backend::Protocol;

    pub(crate) const HOST: &str = "hub1.example.net";

    pub(crate) async fn token(audience: &str, key: SymmetricKey) -> Arc<str> {
        TokenSource::new(HOST, &id(audience), Arc::new(key)).token().await.unwrap()
    }

    pub(crate) fn login(identity: &str, chain: Option<&str>, token: Arc<str>) -> Login {
        Login {
            identity: id(identity),
            credentials: Credentials::SasToken(token),
            auth_chain: chain.map(Into::into),
            product_info: "".into(),
            model_id: None,
            protocol: Protocol::Mqtt,
            peer: None,
        }
    }

    pub(crate) fn hosts() -> Hosts {
        Hosts::new([HOST, "gw1"])
    }

    fn cache() -> ScopeCache {
        let cache = ScopeCache::new(&id("top"));
        cache.replace_all(site()).unwrap();
        cache
    }

    fn decide(login: &Login, cache: &ScopeCache) -> Verdict {
        verify(login, cache, &hosts(), &ClientTrust::none(), super::super::unix_now_secs())
    }

    #[tokio::test]
    async fn own_logins() {
        let cache = cache();
        cache
            .update([
                ServiceIdentity { status: Status::Disabled, ..leaf("off", "top") },
                ServiceIdentity {
                    authentication: Authentication::CertificateAuthority,
                    ..leaf("x509", "top")
                },
            ])
            .unwrap();
        let refused = |refusal| Some(Verdict::Refused(refusal));
        for (identity, audience, key, verdict) in [
            ("leaf1", "leaf1", "leaf1", None),
            ("leaf1", "leaf1", "leaf2", refused(Refusal::Signature(id("leaf1")))),
            ("leaf1", "leaf2", "leaf1", refused(Refusal::Token(TokenError::Audience))),
            ("top/filter", "top/filter", "top/filter", None),
            ("top/filter", "top/filter", "top", None),
            ("top/filter", "top", "top", None),
            ("top", "top/filter", "top", refused(Refusal::Token(TokenError::Audience))),
            ("stranger", "stranger", "x", Some(Verdict::Unknown(id("stranger")))),
            ("Leaf1", "leaf1", "leaf1", Some(Verdict::Unknown(id("Leaf1")))),
            ("off", "off", "off", refused(Refusal::Disabled(id("off")))),
            ("x509", "x509", "x509", refused(Refusal::NotByToken(id("x509")))),
        ] {
            let verdict_got = decide(&login(identity, None, token(audience, key_of(key)).await), &cache);
            match verdict {
                None => assert!(matches!(verdict_got, Verdict::Accepted(_)), "{identity} {audience} {key}"),
                Some(verdict) => assert_eq!(verdict_got, verdict, "{identity} {audience} {key}"),
            }
        }
    }

    #[tokio::test]
    async fn on_behalf_of() {
        let cache = cache();
        cache.update([edge("other", Some("top"))]).unwrap();
        cache.update([super::super::scope::tests::module("other/$edgeHub")]).unwrap();
        let child = token("child/$edgeHub", key_of("child/$edgeHub")).await;
        let other = token("other/$edgeHub", key_of("other/$edgeHub")).await;
        let device = token("child", key_of("child")).await;
        let device_key = token("child/$edgeHub", key_of("child")).await;
        let first = Refusal::Chain("its first element is not the identity of the connection");
        for (identity, chain, token, refusal) in [
            ("leaf2", "leaf2;child", &child, None),
            ("child/mod", "child/mod;child", &child, None),
            ("child", "child;child", &child, None),
            ("leaf1", "leaf2;child", &child, Some(first)),
            (
                "leaf1",
                "leaf1;child",
                &child,
                Some(Refusal::NotAbove { actor: id("child"), target: id("leaf1") }),
            ),
            (
                "leaf2",
                "leaf2;other",
                &other,
                Some(Refusal::NotAbove { actor: id("other"), target: id("leaf2") }),
            ),
            ("leaf2", "leaf2;child", &other, Some(Refusal::Token(TokenError::Audience))),
            ("leaf2", "leaf2;child", &device, Some(Refusal::Token(TokenError::Audience))),
            ("leaf2", "leaf2;child", &device_key, Some(Refusal::Signature(id("child/$edgeHub")))),
            ("leaf2", "leaf2;;child", &child, Some(Refusal::Chain("an element is no device id"))),
            ("leaf2", "leaf2;a;b;c;d;e;f;child", &child, Some(Refusal::Chain("it has more than 7 elements"))),
        ] {
            let verdict = decide(&login(identity, Some(chain), token.clone()), &cache);
            match refusal {
                None => assert!(matches!(verdict, Verdict::Accepted(_)), "{identity} {chain}: {verdict:?}"),
                Some(refusal) => assert_eq!(verdict, Verdict::Refused(refusal), "{identity} {chain}"),
            }
        }
        let verdict = decide(&login("new", Some("new;child"), child.clone()), &cache);
        assert_eq!(verdict, Verdict::Unknown(id("new")));
        cache.update([ServiceIdentity { status: Status::Disabled, ..edge("child", Some("top")) }]).unwrap();
        let verdict = decide(&login("leaf2", Some("leaf2;child"), child), &cache);
        assert_eq!(verdict, Verdict::Refused(Refusal::Disabled(id("child"))));
    }

    #[test]
    fn certificates_and_nothing_are_refused_with_a_reason() {
        let mut login = login("leaf1", None, "".into());
        login.credentials = Credentials::Certificate(Vec::new());
        let fault = CertificateFault::Unreadable;
        let refused = Refusal::Certificate { identity: id("leaf1"), fault };
        assert_eq!(decide(&login, &cache()), Verdict::Refused(refused));
        for (identity, chain) in [("top/filter", None), ("leaf2", Some("leaf2;child"))] {
            login = Login { identity: id(identity), auth_chain: chain.map(Into::into), ..login };
            assert_eq!(decide(&login, &cache()), Verdict::Refused(Refusal::CertificateMisplaced));
        }
        login = Login { identity: id("stranger"), auth_chain: None, ..login };
        assert_eq!(decide(&login, &cache()), Verdict::Unknown(id("stranger")));
        login.credentials = Credentials::None;
        assert_eq!(decide(&login, &cache()), Verdict::Refused(Refusal::NoCredentials));
    }
}
