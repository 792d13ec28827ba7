//! Where the records of identities come from: whoever is asked upstream, and how that fails.

use std::future::Future;

use super::name::Identity;
use super::record::ServiceIdentity;
use super::scope::ScopeCacheError;

/// Where the records come from.
pub trait ScopeSource: Send + Sync + 'static {
    /// The record of one identity, for a module with that of its device; empty when it does not exist or is not in
    /// scope. `auth_chain` is that of the edge device on whose behalf the question is asked, ending at this hub's device.
    fn one(
        &self,
        identity: &Identity,
        auth_chain: &str,
    ) -> impl Future<Output = Result<Vec<ServiceIdentity>, ScopeError>> + Send;

    /// All records in scope.
    fn all(&self) -> impl Future<Output = Result<FullScope, ScopeError>> + Send;
}

/// The answer to a full refresh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FullScope {
    /// All records that were received.
    pub identities: Vec<ServiceIdentity>,
    /// Whether that is everything. If not, nothing is removed from the cache.
    pub complete: bool,
}

/// Why the upstream gave no records. The cache stays as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// The upstream cannot be reached, or broke off.
    #[error("the upstream {0} cannot be reached for identities: {1}")]
    Unreachable(String, String),
    /// The upstream did not answer in time.
    #[error("the upstream {0} did not answer within {1} s when asked for identities")]
    Timeout(String, u64),
    /// The upstream refused the hub itself.
    #[error("the upstream refused the hub's own credentials with status {0}; check the hub's key and clock")]
    Refused(u16),
    /// The upstream failed.
    #[error("the upstream answered status {0} when asked for identities")]
    Status(u16),
    /// The answer is too large or cannot be read.
    #[error("the upstream's answer with identities is not usable: {0}")]
    Answer(String),
    /// The hub could not make its own token.
    #[error(transparent)]
    Token(#[from] super::token::SignError),
    /// The cache does not take the records.
    #[error(transparent)]
    Cache(#[from] ScopeCacheError),
}
