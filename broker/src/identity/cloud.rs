//! Decides on logins of clients that are not in the scope of this hub, by having the cloud judge their own tokens.
//!
//! Only a token of the client's own can be judged there: certificates, and logins on behalf of others, are a matter of the
//! scope. An identity that the scope knows, or whose device it knows, is never asked for: what the scope refuses stays refused.
//!
//! | known | `CloudAndScope` | `Cloud` |
//! | --- | --- | --- |
//! | in scope | the scope decides | – |
//! | the token was accepted before, and has not expired | accepted, whether the upstream is there or not | the same |
//! | neither | the scope is asked for the identity, then the cloud for the token | the cloud is asked |
//!
//! What questions cost is bounded: see [`QUESTIONS_MAX`] and its neighbours.

mod questions;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::authenticate::{Refusal, Verdict, actor_of};
use super::client_tokens::ClientTokens;
use super::name::Identity;
use super::refresh::{Decision, ScopeRefresher};
use super::source::ScopeSource;
use super::token::SasToken;
use crate::backend::{Credentials, Login, LoginError};
use questions::Questions;

pub use questions::{
    ASKED_IDENTITIES_MAX, ATTEMPTS_MAX, ATTEMPTS_SECS, QUESTIONS_MAX, REFUSED_BURST_MAX, REFUSED_PER_SEC_MAX,
    UNREACHABLE_SECS, WAITING_QUESTIONS_MAX,
};

/// A future of the cloud's judgement.
pub type Proving<'a> = Pin<Box<dyn Future<Output = Result<(), ProofError>> + Send + 'a>>;

/// Has the cloud judge the token of a client.
pub trait TokenProver: Send + Sync + 'static {
    /// Whether the cloud lets the identity in with this token. Whoever asks gives up after a time and drops the future.
    fn prove<'a>(&'a self, identity: &'a Identity, token: &'a Arc<str>) -> Proving<'a>;
}

/// Why the cloud does not let an identity in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// It judged, and does not accept the token.
    #[error("the cloud refuses the token: {0}")]
    Refused(String),
    /// It gave no judgement.
    #[error("the cloud cannot be asked: {0}")]
    Unavailable(String),
}

/// Decides on logins by the scope and the cloud, or by the cloud alone.
pub struct CloudAuthenticator<S> {
    refresher: Arc<ScopeRefresher<S>>,
    asks_scope: bool,
    prover: Arc<dyn TokenProver>,
    tokens: Arc<ClientTokens>,
    questions: Questions,
    limit: Duration,
}

impl<S: ScopeSource> CloudAuthenticator<S> {
    /// Asks the cloud for whom the scope does not know (`CloudAndScope`). A login waits for it `limit` at most.
    pub fn after_scope(
        refresher: Arc<ScopeRefresher<S>>,
        tokens: Arc<ClientTokens>,
        prover: Arc<dyn TokenProver>,
        limit: Duration,
    ) -> Self {
        Self { refresher, asks_scope: true, prover, tokens, questions: Questions::new(), limit }
    }

    /// Asks the cloud for everybody (`Cloud`). Of the refresher only the names of hosts and the clock are used.
    pub fn cloud_only(
        refresher: Arc<ScopeRefresher<S>>,
        tokens: Arc<ClientTokens>,
        prover: Arc<dyn TokenProver>,
        limit: Duration,
    ) -> Self {
        Self { asks_scope: false, ..Self::after_scope(refresher, tokens, prover, limit) }
    }

    /// Decides on a login.
    ///
    /// # Errors
    /// [`LoginError::Refused`] with the reason; [`LoginError::Unavailable`] when neither the scope nor the cloud can
    /// tell now, or too many logins wait for them.
    pub async fn authenticate(&self, login: &Login) -> Result<(), LoginError> {
        let Some(token) =
            self.own_token(login).map_err(|refusal| LoginError::Refused(refusal.to_string()))?
        else {
            return match self.asks_scope {
                true => self.refresher.authenticate(login).await.map(drop),
                false => Err(LoginError::Refused("only a token of its own proves a client here".into())),
            };
        };
        let known = self.proves(&login.identity, &token).is_some();
        if self.asks_scope {
            match self.refresher.verdict(login) {
                Verdict::Accepted(_) => return Ok(()),
                Verdict::Unknown(_) if known => return Ok(()),
                Verdict::Unknown(_) | Verdict::Refused(_) => {}
            }
            let decision: Decision = self.refresher.decide(login).await?;
            if !matches!(decision.verdict, Verdict::Unknown(_)) || !self.is_outside(&login.identity) {
                return decision.settled().map(drop);
            }
        } else if known {
            return Ok(());
        }
        self.ask(&login.identity, &token).await
    }

    /// What credentials are worth that were accepted: the first second in which they are refused, if there is one.
    ///
    /// # Errors
    /// The reason why they are worth nothing any more.
    pub fn standing(&self, login: &Login) -> Result<Option<i64>, String> {
        if self.asks_scope {
            match self.refresher.verdict(login) {
                Verdict::Accepted(accepted) => return Ok(accepted.until_secs),
                Verdict::Refused(refusal) => return Err(refusal.to_string()),
                Verdict::Unknown(_) => {}
            }
        }
        let token = self.own_token(login).map_err(|refusal| refusal.to_string())?;
        let until_secs = token.and_then(|token| self.proves(&login.identity, &token));
        let lost = || format!("{} is not in scope, and not let in by the cloud any more", login.identity);
        until_secs.map(Some).ok_or_else(lost)
    }

    /// A number that grows whenever what is known of identities changes.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.refresher.changed()
    }

    /// The time by which tokens are judged, in seconds since 1970.
    pub fn now_secs(&self) -> i64 {
        self.refresher.now_secs()
    }

    /// The token that the client has signed itself, if that is how it proves itself: of the right form, not expired, made
    /// for this identity.
    fn own_token(&self, login: &Login) -> Result<Option<OwnToken>, Refusal> {
        let text = match &login.credentials {
            Credentials::SasToken(text) => text,
            Credentials::Certificate(_) => return Ok(None),
            Credentials::None => return Err(Refusal::NoCredentials),
        };
        if actor_of(&login.identity, login.auth_chain.as_deref())?.is_some() {
            return Ok(None);
        }
        let token = SasToken::parse(text, self.now_secs()).and_then(|token| {
            token.check_audience(self.refresher.hosts(), &login.identity)?;
            Ok(token)
        });
        let expires_at_secs = token.map_err(Refusal::Token)?.expires_at_secs();
        Ok(Some(OwnToken { text: text.clone(), expires_at_secs }))
    }

    /// Until when a token proves its identity because the cloud has accepted it.
    fn proves(&self, identity: &Identity, token: &OwnToken) -> Option<i64> {
        self.tokens.proves(identity, &token.text).filter(|until_secs| *until_secs > self.now_secs())
    }

    /// Whether the scope knows neither the identity nor its device.
    fn is_outside(&self, identity: &Identity) -> bool {
        let (scope, device) = (self.refresher.cache(), identity.of_device());
        scope.edge_device() != Some(&device) && scope.get(identity).is_none() && scope.get(&device).is_none()
    }

    async fn ask(&self, identity: &Identity, token: &OwnToken) -> Result<(), LoginError> {
        let answered = || self.proves(identity, token).is_some();
        let question = async {
            self.prover.prove(identity, &token.text).await?;
            let kept = self.tokens.accept(identity, &token.text, token.expires_at_secs, self.now_secs());
            let full = || ProofError::Unavailable("too many clients outside the scope are let in".into());
            if kept { Ok(()) } else { Err(full()) }
        };
        self.questions.ask(identity, &token.text, self.limit, answered, question).await
    }
}

/// A token that a client has signed itself; not yet proof of anything.
struct OwnToken {
    text: Arc<str>,
    expires_at_secs: i64,
}

#[cfg(test)]
mod tests;
