//! Owns the two calls by which an edge hub asks for identities, as they go over the wire: their names, what a request must
//! hold, who it comes from, and what is answered out of a cache. Both ends of them are here; no sockets.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::authenticate::actor_of;
use super::name::Identity;
use super::record::{ScopePage, ServiceIdentity, ServiceIdentityError};
use super::scope::{HUB_MODULE_ID, ScopeCache};
use crate::backend::{Credentials, Login, Protocol};
use crate::twin::json::is_deeper_than;

/// Longest body of a request; the chain, two ids and a continuation fit in many times.
pub const SCOPE_REQUEST_BYTES_MAX: usize = 16 * 1_024;

/// Most identities in a page, whatever a request asks for: even with all texts of the largest size, it stays below
/// [`ANSWER_BYTES_MAX`](super::ANSWER_BYTES_MAX).
pub const PAGE_IDENTITIES_MAX: usize = 1_000;

/// Deepest nesting of a body. No known member has any.
const NESTING_MAX: usize = 8;

/// The only scheme of the header `Authorization`.
const SCHEME: &str = "SharedAccessSignature";

/// One of the two calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScopeCall {
    /// A device, and what is immediately below it.
    Below,
    /// One identity, for a module with its device.
    One,
}

impl ScopeCall {
    /// By its name in the path, ignoring case.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Below, Self::One].into_iter().find(|call| name.eq_ignore_ascii_case(call.name()))
    }

    /// Its name in the path.
    pub fn name(self) -> &'static str {
        match self {
            Self::Below => "devicesAndModulesInTargetDeviceScope",
            Self::One => "getDeviceAndModuleOnBehalfOf",
        }
    }
}

/// The body of both calls; what a call does not know is left out.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ScopeBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) page_size: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) continuation_link: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) target_device_id: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) target_module_id: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) auth_chain: Option<Cow<'a, str>>,
}

/// A request that can be decided on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScopeRequest {
    /// The edge device whose hub asks.
    pub actor: Identity,
    /// From the identity on whose behalf it asks down to the actor; both may be the same.
    auth_chain: Arc<str>,
    /// The first of the chain.
    behalf: Identity,
    /// What it asks for.
    pub wanted: Wanted,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The first device of the chain, and what is immediately below it.
    Below {
        /// Only what comes behind this one, in the order of names: where the page before ended.
        after: Option<Identity>,
        /// Identities per page, 1 to [`PAGE_IDENTITIES_MAX`]; absent when the request says nothing that can be.
        page_size: Option<usize>,
    },
    /// This identity.
    One(Identity),
}

/// Why a call is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeRefusal {
    /// The request cannot be.
    #[error("{0}")]
    Malformed(String),
    /// The caller may not ask this, or what it asks for does not exist for it.
    #[error("{0}")]
    Unauthorized(String),
    /// That cannot be told now; the caller should come again, and keep what it knows.
    #[error("{0}")]
    Unavailable(String),
}

impl ScopeRefusal {
    /// Its HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::Malformed(_) => 400,
            Self::Unauthorized(_) => 401,
            Self::Unavailable(_) => 503,
        }
    }
}

impl ScopeRequest {
    /// Reads a request of the module `module` on the device `device`, as the path names them.
    ///
    /// # Errors
    /// [`ScopeRefusal::Unauthorized`] when the module is no hub, or the chain is not one that ends with its device;
    /// [`ScopeRefusal::Malformed`] for all else that cannot be.
    pub fn read(call: ScopeCall, device: &str, module: &str, body: &[u8]) -> Result<Self, ScopeRefusal> {
        if module != HUB_MODULE_ID {
            return Err(unauthorized(format!("only {HUB_MODULE_ID} may ask for identities")));
        }
        let actor = Identity::device(device).map_err(malformed)?;
        if body.len() > SCOPE_REQUEST_BYTES_MAX || is_deeper_than(body, NESTING_MAX) {
            return Err(malformed("the body is longer or nested deeper than any request"));
        }
        let body: ScopeBody<'_> =
            serde_json::from_slice(body).map_err(|error| malformed(ServiceIdentityError::from(error)))?;
        let auth_chain: Arc<str> = match body.auth_chain.as_deref() {
            Some(chain) if !chain.trim().is_empty() => chain.into(),
            Some(_) | None => return Err(malformed("the member authChain is missing")),
        };
        let behalf = auth_chain.split(';').next().unwrap_or_default();
        let behalf = match call {
            ScopeCall::Below => Identity::device(behalf),
            ScopeCall::One => Identity::parse(behalf),
        }
        .map_err(|_| malformed("Invalid auth chain: its first element must be a device id"))?;
        actor_of(&behalf, Some(&auth_chain)).map_err(unauthorized)?;
        if auth_chain.rsplit(';').next() != Some(actor.device_id()) {
            return Err(unauthorized("the auth chain does not end with the calling device"));
        }
        let wanted = match call {
            ScopeCall::Below => Wanted::Below {
                after: match body.continuation_link.as_deref() {
                    None | Some("") => None,
                    Some(link) => Some(Identity::parse(link).map_err(malformed)?),
                },
                page_size: body
                    .page_size
                    .and_then(|size| usize::try_from(size).ok())
                    .filter(|size| (1..=PAGE_IDENTITIES_MAX).contains(size)),
            },
            ScopeCall::One => {
                let device = body.target_device_id.as_deref().unwrap_or_default();
                let module = body.target_module_id.as_deref().filter(|module| !module.trim().is_empty());
                let target = match module {
                    None => Identity::device(device),
                    Some(module) => Identity::module(device, module),
                };
                Wanted::One(target.map_err(malformed)?)
            }
        };
        Ok(Self { actor, auth_chain, behalf, wanted })
    }

    /// The login that the caller must be able to make: for whom it asks, with its own token.
    ///
    /// # Errors
    /// [`ScopeRefusal::Unauthorized`] when the header `Authorization` holds no token.
    pub fn login(&self, authorization: Option<&str>) -> Result<Login, ScopeRefusal> {
        let token = authorization.ok_or_else(|| unauthorized("Authorization header missing"))?.trim();
        let scheme = token.split_ascii_whitespace().next().unwrap_or_default();
        if !scheme.eq_ignore_ascii_case(SCHEME) {
            return Err(unauthorized(
                "Invalid Authorization header. Only SharedAccessSignature is supported.",
            ));
        }
        // A chain of one is the device that acts for itself; with one element it would be the device's own login.
        let auth_chain = match self.auth_chain.contains(';') {
            true => self.auth_chain.clone(),
            false => format!("{0};{0}", self.auth_chain).into(),
        };
        Ok(Login {
            identity: self.behalf.clone(),
            credentials: Credentials::SasToken(token.into()),
            auth_chain: Some(auth_chain),
            product_info: "".into(),
            model_id: None,
            // What decides on it does not ask for the protocol.
            protocol: Protocol::Mqtt,
            peer: None,
        })
    }

    /// The edge device that asked first: the first of the chain, or the actor if that is a module.
    pub fn originator(&self) -> &Identity {
        match self.behalf.module_id() {
            None => &self.behalf,
            Some(_) => &self.actor,
        }
    }

    /// The answer to a caller whose login was accepted: nothing that is not at or below the device for which it asks.
    ///
    /// # Errors
    /// [`ScopeRefusal::Unauthorized`]; unknown and forbidden look the same.
    pub fn answer(&self, cache: &ScopeCache, page_size: usize) -> Result<ScopePage, ScopeRefusal> {
        let page_size = page_size.clamp(1, PAGE_IDENTITIES_MAX);
        match &self.wanted {
            Wanted::Below { after, .. } => {
                let target = &self.behalf;
                if !sees(cache, &[&self.actor], target) {
                    return Err(self.refused(target));
                }
                let (identities, next) = cache.below(target, after.as_ref(), page_size);
                let continuation = next.map(|last| last.to_string());
                Ok(ScopePage { identities, continuation, unreadable: 0 })
            }
            Wanted::One(target) => {
                // The actor too: it may have lost its right since it was let in.
                let above = [self.originator(), &self.actor];
                let found = cache.get(target).filter(|_| sees(cache, &above, target));
                let found = found.ok_or_else(|| self.refused(target))?;
                let device = target.module_id().and_then(|_| cache.get(&target.of_device()));
                let identities =
                    device.into_iter().chain([found]).map(|entry| ServiceIdentity::clone(&entry)).collect();
                Ok(ScopePage { identities, continuation: None, unreadable: 0 })
            }
        }
    }

    /// What is said to a caller that may not have the answer, or for whom there is none.
    pub fn refusal(&self) -> ScopeRefusal {
        match &self.wanted {
            Wanted::Below { .. } => self.refused(&self.behalf),
            Wanted::One(target) => self.refused(target),
        }
    }

    fn refused(&self, target: &Identity) -> ScopeRefusal {
        let actor = &self.actor;
        unauthorized(format!("{actor}/{HUB_MODULE_ID} not authorized to get information for {target}"))
    }
}

/// Whether an identity is at or below each of these devices.
fn sees(cache: &ScopeCache, devices: &[&Identity], target: &Identity) -> bool {
    cache.chain(target).is_some_and(|chain| devices.iter().all(|device| chain.contains(device)))
}

fn malformed(reason: impl ToString) -> ScopeRefusal {
    ScopeRefusal::Malformed(reason.to_string())
}

fn unauthorized(reason: impl ToString) -> ScopeRefusal {
    ScopeRefusal::Unauthorized(reason.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_calls_ignore_case() {
        assert_eq!(ScopeCall::named("DEVICESANDMODULESINTARGETDEVICESCOPE"), Some(ScopeCall::Below));
        assert_eq!(ScopeCall::named("getdeviceandmoduleonbehalfof"), Some(ScopeCall::One));
        assert_eq!(ScopeCall::named("putModuleOnBehalfOf"), None);
    }

    #[test]
    fn who_asks_for_whom_is_read_from_the_chain() {
        let read = |call, body: &str| ScopeRequest::read(call, "child", HUB_MODULE_ID, body.as_bytes());
        for (call, chain, login, as_chain, originator) in [
            (ScopeCall::Below, "child", "child", "child;child", "child"),
            (ScopeCall::Below, "low;child", "low", "low;child", "low"),
            (ScopeCall::One, "child", "child", "child;child", "child"),
            (ScopeCall::One, "low/m;low;child", "low/m", "low/m;low;child", "child"),
        ] {
            let body = format!(r#"{{"authChain":"{chain}","targetDeviceId":"leaf"}}"#);
            let request = read(call, &body).unwrap();
            let made = request.login(Some(" sharedaccesssignature sr=x ")).unwrap();
            assert_eq!(
                (made.identity.to_string(), made.auth_chain.as_deref()),
                (login.into(), Some(as_chain))
            );
            assert_eq!(made.credentials, Credentials::SasToken("sharedaccesssignature sr=x".into()));
            assert_eq!(request.originator().to_string(), originator);
        }
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            chain in "[a-z/;$ ]{0,20}",
            link in "\\PC{0,20}",
            size in any::<i64>(),
        ) {
            let body = serde_json::json!({
                "authChain": chain, "continuationLink": link, "pageSize": size, "targetDeviceId": link,
            });
            for call in [ScopeCall::Below, ScopeCall::One] {
                let _read_or_refused = ScopeRequest::read(call, "a", HUB_MODULE_ID, &bytes);
                if let Ok(request) = ScopeRequest::read(call, "a", HUB_MODULE_ID, body.to_string().as_bytes()) {
                    prop_assert_eq!(chain.rsplit(';').next(), Some("a"));
                    prop_assert!(request.login(Some("SharedAccessSignature x")).is_ok());
                }
            }
        }
    }
}
