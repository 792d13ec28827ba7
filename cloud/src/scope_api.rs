//! The two scope calls, as the cloud hub answers them to edge hubs: what a request means, and its answer. No sockets.

use edgehub_broker::identity::{
    HUB_MODULE_ID, Identity, Refusal, ScopePage, ServiceIdentity, Verdict, actor_of, unix_now_secs,
    verify_on_behalf,
};
use serde::Deserialize;

use crate::registry::Registry;

/// Most identities in one page, also when none or too many are asked for.
const PAGE_SIZE_MAX: usize = 1_000;

/// One of the two calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScopeCall {
    /// `devicesAndModulesInTargetDeviceScope`
    Below,
    /// `getDeviceAndModuleOnBehalfOf`
    One,
}

impl ScopeCall {
    /// By its name in the path, ignoring case.
    pub(crate) fn named(name: &str) -> Option<Self> {
        if name.eq_ignore_ascii_case("devicesAndModulesInTargetDeviceScope") {
            Some(Self::Below)
        } else if name.eq_ignore_ascii_case("getDeviceAndModuleOnBehalfOf") {
            Some(Self::One)
        } else {
            None
        }
    }
}

/// Why a call is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ScopeRefusal {
    /// 400
    #[error("{0}")]
    Malformed(String),
    /// 401
    #[error("{0}")]
    Unauthorized(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BelowRequest {
    page_size: Option<i64>,
    continuation_link: Option<String>,
    auth_chain: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OneRequest {
    target_device_id: Option<String>,
    target_module_id: Option<String>,
    auth_chain: Option<String>,
}

/// Answers a call of the hub module `module` on the edge device `device`, as the path names them.
pub(crate) fn answer(
    registry: &Registry,
    call: ScopeCall,
    device: &str,
    module: &str,
    authorization: Option<&str>,
    body: &[u8],
) -> Result<Vec<u8>, ScopeRefusal> {
    if module != HUB_MODULE_ID {
        return Err(ScopeRefusal::Unauthorized(format!("only {HUB_MODULE_ID} may ask for identities")));
    }
    let actor = Identity::device(device).map_err(malformed)?;
    // The command line may have changed the file since; hubs learn from here what is no longer in scope.
    if let Err(error) = registry.reload() {
        tracing::warn!(code = "EH7005", %error, "the registry is not read again");
    }
    let page = match call {
        ScopeCall::Below => below(registry, &actor, authorization, &request(body)?)?,
        ScopeCall::One => one(registry, &actor, authorization, &request(body)?)?,
    };
    Ok(page.to_json())
}

fn below(
    registry: &Registry,
    actor: &Identity,
    authorization: Option<&str>,
    request: &BelowRequest,
) -> Result<ScopePage, ScopeRefusal> {
    let chain = auth_chain(request.auth_chain.as_deref())?;
    let token = token(authorization)?;
    let target = first_device(chain)?;
    authenticate(registry, actor, &target, chain, token)?;
    let after = match request.continuation_link.as_deref() {
        None | Some("") => None,
        Some(link) => Some(Identity::parse(link).map_err(malformed)?),
    };
    let size = match request.page_size.map(usize::try_from) {
        Some(Ok(size @ 1..=PAGE_SIZE_MAX)) => size,
        _ => PAGE_SIZE_MAX,
    };
    let (identities, end) = registry.below(&target, after.as_ref(), size);
    let continuation = identities.last().filter(|_| !end).map(|last| last.identity.to_string());
    Ok(ScopePage { identities, continuation, unreadable: 0 })
}

fn one(
    registry: &Registry,
    actor: &Identity,
    authorization: Option<&str>,
    request: &OneRequest,
) -> Result<ScopePage, ScopeRefusal> {
    let chain = auth_chain(request.auth_chain.as_deref())?;
    let token = token(authorization)?;
    let device = request.target_device_id.as_deref().unwrap_or_default();
    let target = match request.target_module_id.as_deref().filter(|module| !module.is_empty()) {
        None => Identity::device(device),
        Some(module) => Identity::module(device, module),
    }
    .map_err(malformed)?;
    // Who is not a device cannot have asked; then the actor did.
    let originator = first_device(chain).unwrap_or_else(|_| actor.clone());
    authenticate(registry, actor, &originator, chain, token)?;
    let below = registry.cache().chain(&target).is_some_and(|chain| chain.contains(&originator));
    let found = registry.cache().get(&target).filter(|_| below);
    let Some(found) = found else {
        // Unknown and forbidden look the same.
        return Err(ScopeRefusal::Unauthorized(format!(
            "{actor}/{HUB_MODULE_ID} not authorized to get information for {target}"
        )));
    };
    let of_device = target.module_id().and_then(|_| registry.cache().get(&target.of_device()));
    let identities =
        of_device.into_iter().chain([found]).map(|entry| ServiceIdentity::clone(&entry)).collect();
    Ok(ScopePage { identities, continuation: None, unreadable: 0 })
}

/// The token must be that of the actor's hub, the actor must be the last element of the chain, and the device on whose
/// behalf it asks must be itself or below it.
fn authenticate(
    registry: &Registry,
    actor: &Identity,
    behalf: &Identity,
    chain: &str,
    token: &str,
) -> Result<(), ScopeRefusal> {
    if chain.rsplit(';').next() != Some(actor.device_id()) {
        return Err(ScopeRefusal::Unauthorized("the auth chain does not end with the calling device".into()));
    }
    actor_of(behalf, Some(chain)).map_err(refused)?;
    match verify_on_behalf(behalf, actor, token, registry.cache(), registry.hosts(), unix_now_secs()) {
        Verdict::Accepted(_) => Ok(()),
        Verdict::Refused(refusal) => Err(refused(refusal)),
        Verdict::Unknown(identity) => {
            Err(ScopeRefusal::Unauthorized(format!("{identity} is not in the registry")))
        }
    }
}

fn request<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ScopeRefusal> {
    serde_json::from_slice(body).map_err(malformed)
}

fn auth_chain(chain: Option<&str>) -> Result<&str, ScopeRefusal> {
    chain
        .filter(|chain| !chain.trim().is_empty())
        .ok_or_else(|| ScopeRefusal::Malformed("the member authChain is missing".into()))
}

fn first_device(chain: &str) -> Result<Identity, ScopeRefusal> {
    let first = chain.split(';').next().unwrap_or_default();
    Identity::device(first).map_err(|_| {
        ScopeRefusal::Malformed("Invalid auth chain: its first element must be a device id".into())
    })
}

fn token(authorization: Option<&str>) -> Result<&str, ScopeRefusal> {
    let Some(value) = authorization else {
        return Err(ScopeRefusal::Unauthorized("Authorization header missing".into()));
    };
    let scheme = value.split(' ').next().unwrap_or_default();
    if !scheme.eq_ignore_ascii_case("SharedAccessSignature") {
        return Err(ScopeRefusal::Unauthorized(
            "Invalid Authorization header. Only SharedAccessSignature is supported.".into(),
        ));
    }
    Ok(value)
}

fn malformed(error: impl std::fmt::Display) -> ScopeRefusal {
    ScopeRefusal::Malformed(error.to_string())
}

fn refused(refusal: Refusal) -> ScopeRefusal {
    ScopeRefusal::Unauthorized(refusal.to_string())
}
