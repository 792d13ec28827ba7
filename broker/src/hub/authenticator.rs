//! Who decides on logins.

use std::future::Future;
use std::pin::Pin;

use tokio::sync::watch;

use crate::backend::{Login, LoginError};
use crate::identity::{CloudAuthenticator, ScopeRefresher, ScopeSource, Verdict, unix_now_secs};

/// A future of a decision.
pub type Authenticating<'a> = Pin<Box<dyn Future<Output = Result<(), LoginError>> + Send + 'a>>;

/// Decides on logins; an embedder may bring its own.
pub trait Authenticator: Send + Sync + 'static {
    /// Whether the credentials prove the identity.
    ///
    /// # Errors
    /// [`LoginError::Refused`] when they do not, [`LoginError::Unavailable`] when that cannot be told now.
    fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a>;

    /// Whether credentials that were accepted still prove the identity: asked of open connections, answered without
    /// waiting and without the network. By default they do so for ever.
    fn standing(&self, login: &Login) -> Standing {
        let _ = login;
        Standing::Holds { until_secs: None }
    }

    /// A number that changes whenever what is known of identities does; absent when that never happens.
    fn changed(&self) -> Option<watch::Receiver<u64>> {
        None
    }

    /// The clock by which credentials end, in seconds since 1970.
    fn now_secs(&self) -> i64 {
        unix_now_secs()
    }
}

/// What credentials that were accepted are worth now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// They prove the identity.
    Holds {
        /// Until this second since 1970; absent when only a change can end it.
        until_secs: Option<i64>,
    },
    /// They no longer do, for this reason.
    Lost(String),
}

impl<S: ScopeSource> Authenticator for ScopeRefresher<S> {
    fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a> {
        Box::pin(async move { ScopeRefresher::authenticate(self, login).await.map(drop) })
    }

    fn standing(&self, login: &Login) -> Standing {
        match self.verdict(login) {
            Verdict::Accepted(accepted) => Standing::Holds { until_secs: accepted.until_secs },
            Verdict::Refused(refusal) => Standing::Lost(refusal.to_string()),
            Verdict::Unknown(identity) => Standing::Lost(format!("{identity} is no longer in scope")),
        }
    }

    fn changed(&self) -> Option<watch::Receiver<u64>> {
        Some(self.changed())
    }

    fn now_secs(&self) -> i64 {
        ScopeRefresher::now_secs(self)
    }
}

impl<S: ScopeSource> Authenticator for CloudAuthenticator<S> {
    fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a> {
        Box::pin(CloudAuthenticator::authenticate(self, login))
    }

    fn standing(&self, login: &Login) -> Standing {
        match CloudAuthenticator::standing(self, login) {
            Ok(until_secs) => Standing::Holds { until_secs },
            Err(reason) => Standing::Lost(reason),
        }
    }

    fn changed(&self) -> Option<watch::Receiver<u64>> {
        Some(self.changed())
    }

    fn now_secs(&self) -> i64 {
        CloudAuthenticator::now_secs(self)
    }
}
