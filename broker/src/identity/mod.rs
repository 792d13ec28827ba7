//! Who is who: device and module identities, their tokens, the cache of those in scope.

mod authenticate;
mod certificate;
mod client_tokens;
mod cloud;
mod key;
mod name;
mod record;
mod refresh;
mod scope;
mod scope_call;
mod scope_client;
mod scope_service;
mod source;
mod token;

pub use authenticate::{
    Accepted, Refusal, Verdict, actor_of, verify, verify_certificate, verify_on_behalf, verify_token,
};
pub use certificate::{
    CERTIFICATE_BYTES_MAX, CERTIFICATES_SHOWN_MAX, CertificateFacts, CertificateFault, ClientTrust,
};
pub use client_tokens::{CLIENT_TOKENS_MAX, ClientToken, ClientTokens};
pub use cloud::{
    ASKED_IDENTITIES_MAX, ATTEMPTS_MAX, ATTEMPTS_SECS, CloudAuthenticator, ProofError, Proving,
    QUESTIONS_MAX, REFUSED_BURST_MAX, REFUSED_PER_SEC_MAX, TokenProver, UNREACHABLE_SECS,
    WAITING_QUESTIONS_MAX,
};
pub use key::{KEY_BYTES_MAX, KeyError, SIGNATURE_BYTES, SymmetricKey};
pub use name::{ID_BYTES_MAX, Identity, IdentityError};
pub use record::{Authentication, ScopePage, ServiceIdentity, ServiceIdentityError, Status};
pub use refresh::{
    CHANGES_MAX, LEAF_MODULES_MAX, REFRESH_METHOD, REFRESH_METHOD_IDENTITIES_MAX, REMEMBERED_REFRESHES_MAX,
    RefreshOptions, SINGLE_REFRESHES_MAX, ScopeRefresher, WAITING_LOGINS_MAX,
};
pub use scope::{
    CHAIN_EDGE_DEVICES_MAX, HUB_MODULE_ID, IDENTITIES_MAX, ScopeCache, ScopeCacheError, ScopeChange,
};
pub use scope_call::{
    PAGE_IDENTITIES_MAX, SCOPE_REQUEST_BYTES_MAX, ScopeCall, ScopeRefusal, ScopeRequest, Wanted,
};
pub use scope_client::{ANSWER_BYTES_MAX, CALL_TIMEOUT_SECS, ScopeClient, ScopeClientOptions};
pub use scope_service::{
    Answering, CALLS_MAX, CALLS_OF_CHILD_MAX, CHILD_REFRESHES_MAX, ScopeAsk, ScopeCalls, ScopeService,
};
pub use source::{FullScope, ScopeError, ScopeSource};
pub(crate) use token::escaped;
pub use token::{
    Clock, EXPIRY_TOLERANCE_SECS, Hosts, OWN_TOKEN_LIFE_SECS, SIGN_TIMEOUT_SECS, SasToken, SignError, Signer,
    Signing, TOKEN_BYTES_MAX, TokenError, TokenSource, own_audience, unix_now_secs,
};
