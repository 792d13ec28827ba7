//! Who decides on logins.

use std::future::Future;
use std::pin::Pin;

use crate::backend::{Login, LoginError};
use crate::identity::{ScopeRefresher, ScopeSource};

/// A future of a decision.
pub type Authenticating<'a> = Pin<Box<dyn Future<Output = Result<(), LoginError>> + Send + 'a>>;

/// Decides on logins; an embedder may bring its own.
pub trait Authenticator: Send + Sync + 'static {
    /// Whether the credentials prove the identity.
    ///
    /// # Errors
    /// [`LoginError::Refused`] when they do not, [`LoginError::Unavailable`] when that cannot be told now.
    fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a>;
}

impl<S: ScopeSource> Authenticator for ScopeRefresher<S> {
    fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a> {
        Box::pin(async move { ScopeRefresher::authenticate(self, login).await.map(drop) })
    }
}
