//! The two scope calls, as the cloud hub answers them to edge hubs. No sockets.

use edgehub_broker::identity::{
    ClientTrust, PAGE_IDENTITIES_MAX, ScopeCall, ScopeRefusal, ScopeRequest, Verdict, Wanted, unix_now_secs,
    verify,
};

use crate::registry::Registry;

/// Answers a call of the hub module `module` on the edge device `device`, as the path names them.
pub(crate) fn answer(
    registry: &Registry,
    call: ScopeCall,
    device: &str,
    module: &str,
    authorization: Option<&str>,
    body: &[u8],
) -> Result<Vec<u8>, ScopeRefusal> {
    let request = ScopeRequest::read(call, device, module, body)?;
    // The command line may have changed the file since; hubs learn from here what is no longer in scope.
    if let Err(error) = registry.reload() {
        tracing::warn!(code = "EH7005", %error, "the registry is not read again");
    }
    let cache = registry.cache();
    let login = request.login(authorization)?;
    match verify(&login, cache, registry.hosts(), &ClientTrust::none(), unix_now_secs()) {
        Verdict::Accepted(_) => {}
        Verdict::Refused(refusal) => return Err(ScopeRefusal::Unauthorized(refusal.to_string())),
        Verdict::Unknown(identity) => {
            return Err(ScopeRefusal::Unauthorized(format!("{identity} is not in the registry")));
        }
    }
    let page_size = match request.wanted {
        Wanted::Below { page_size, .. } => page_size.unwrap_or(PAGE_IDENTITIES_MAX),
        Wanted::One(_) => 1,
    };
    request.answer(cache, page_size).map(|page| page.to_json())
}
