//! Owns what child hubs are told of the identities at and below them: whether they may ask, what is asked of the upstream
//! first, and how much they may cost.
//!
//! A child's answers hold keys, so it gets them only with its own hub's token, and only of what its device is above. One
//! that cannot be told the truth now is told so (503), never that an identity does not exist: it would remove it.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::name::Identity;
use super::record::ScopePage;
use super::refresh::ScopeRefresher;
use super::scope::HUB_MODULE_ID;
use super::scope_call::{PAGE_IDENTITIES_MAX, ScopeCall, ScopeRefusal, ScopeRequest, Wanted};
use super::source::{ScopeError, ScopeSource};
use crate::backend::LoginError;
use crate::head::warn_limit::WarnLimit;

/// Calls of all children that are being answered, until the last byte is sent; more are told to come again.
pub const CALLS_MAX: usize = 128;

/// The same of one child.
pub const CALLS_OF_CHILD_MAX: usize = 16;

/// Single refreshes for children under way at a time. Those for logins at this hub have places of their own.
pub const CHILD_REFRESHES_MAX: usize = 4;

static REFUSED: WarnLimit = WarnLimit::new();
static NOT_REFRESHED: WarnLimit = WarnLimit::new();

/// A call as it came, nothing of it checked.
#[derive(Clone, Copy)]
pub struct ScopeAsk<'a> {
    /// Which one.
    pub call: ScopeCall,
    /// The device of the path.
    pub device: &'a str,
    /// The module of the path.
    pub module: &'a str,
    /// The header `Authorization`.
    pub authorization: Option<&'a str>,
    /// The body.
    pub body: &'a [u8],
}

/// An answer that is being made.
pub type Answering<'a> = Pin<Box<dyn Future<Output = Result<Bytes, ScopeRefusal>> + Send + 'a>>;

/// Answers the scope calls of child hubs.
pub trait ScopeCalls: Send + Sync + 'static {
    /// The JSON of an answer. It takes up the child's place for as long as it is kept.
    ///
    /// # Errors
    /// Why there is none.
    fn answer<'a>(&'a self, ask: ScopeAsk<'a>) -> Answering<'a>;
}

/// Answers from the cache of a hub.
///
/// Locks: the places are locked for single statements.
pub struct ScopeService<S> {
    refresher: Arc<ScopeRefresher<S>>,
    places: Arc<Mutex<Places>>,
    refreshes: Semaphore,
}

impl<S: ScopeSource> ScopeService<S> {
    /// A service that answers from the refresher's cache.
    pub fn new(refresher: Arc<ScopeRefresher<S>>) -> Self {
        Self { refresher, places: Arc::default(), refreshes: Semaphore::new(CHILD_REFRESHES_MAX) }
    }

    async fn decide(&self, ask: ScopeAsk<'_>) -> Result<Bytes, ScopeRefusal> {
        let request = ScopeRequest::read(ask.call, ask.device, ask.module, ask.body)?;
        self.admit(&request, ask.authorization).await?;
        let place = Place::take(&self.places, &request.actor)?;
        let page = match &request.wanted {
            // Whatever page the child would like: as in the reference, a site of ordinary size is one page.
            Wanted::Below { .. } => request.answer(self.refresher.cache(), PAGE_IDENTITIES_MAX)?,
            Wanted::One(target) => self.one(&request, target).await?,
        };
        Ok(Bytes::from_owner(Answer { json: page.to_json(), _place: place }))
    }

    /// Lets a request through that comes from the hub of a device below this one.
    async fn admit(&self, request: &ScopeRequest, authorization: Option<&str>) -> Result<(), ScopeRefusal> {
        let actor = &request.actor;
        if self.refresher.cache().edge_device() == Some(actor) {
            // A hub that is its own parent by mistake would ask itself for ever.
            return Err(ScopeRefusal::Unauthorized(format!("{actor} is this hub itself, not below it")));
        }
        let login = request.login(authorization)?;
        match self.refresher.authenticate(&login).await {
            Ok(_) => Ok(()),
            Err(LoginError::Refused(reason)) => {
                if let Some(suppressed) = REFUSED.admit() {
                    tracing::warn!(
                        code = "EH3011",
                        %actor, target = %login.identity, suppressed, reason,
                        "A child hub is not told of identities"
                    );
                }
                // Not the reason: it would tell what exists elsewhere on the site.
                Err(request.refusal())
            }
            Err(LoginError::Unavailable(_)) => Err(unavailable(request)),
        }
    }

    /// One identity, as the upstream has it now; when it cannot be asked, as the cache has it.
    async fn one(&self, request: &ScopeRequest, target: &Identity) -> Result<ScopePage, ScopeRefusal> {
        let began = Instant::now();
        let deadline = began + self.refresher.login_wait();
        let refreshed = match timeout_at(deadline, self.refresh(request, target)).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => not_refreshed(target, &error.to_string()),
            Err(_) => not_refreshed(target, "it takes too long"),
        };
        let cache = self.refresher.cache();
        if let Ok(page) = request.answer(cache, 1) {
            return Ok(page);
        }
        // It may be somewhere below where this hub knows nothing yet.
        self.refresher.await_full(deadline).await;
        let answer = request.answer(cache, 1);
        match answer {
            // The same for what is unknown and what is forbidden, so that nobody learns which.
            Err(_) if !refreshed && !self.refresher.knows_all_since(began) => Err(unavailable(request)),
            answer => answer,
        }
    }

    async fn refresh(&self, request: &ScopeRequest, target: &Identity) -> Result<(), ScopeError> {
        // Closed by nobody; without a place it would be as good as one.
        let _place = self.refreshes.acquire().await;
        let originator = request.originator();
        // It had one when it was let in.
        let chain = self.refresher.cache().chain_text(originator).unwrap_or_else(|| originator.to_string());
        self.refresher.refresh_one(target, &chain).await.map(drop)
    }
}

impl<S: ScopeSource> ScopeCalls for ScopeService<S> {
    fn answer<'a>(&'a self, ask: ScopeAsk<'a>) -> Answering<'a> {
        Box::pin(async move {
            let answer = self.decide(ask).await;
            let call = match ask.call {
                ScopeCall::Below => "below",
                ScopeCall::One => "one",
            };
            let result = match &answer {
                Ok(_) => "answered",
                Err(ScopeRefusal::Malformed(_) | ScopeRefusal::Unauthorized(_)) => "refused",
                Err(ScopeRefusal::Unavailable(_)) => "unavailable",
            };
            metrics::counter!("edgehub_scope_calls_total", "call" => call, "result" => result).increment(1);
            answer
        })
    }
}

/// An answer with the place that it takes up: it is free again when the last byte is sent, or the connection is gone.
struct Answer {
    json: Vec<u8>,
    _place: Place,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.json
    }
}

/// The calls that are being answered, by child.
#[derive(Default)]
struct Places {
    all: usize,
    of_child: HashMap<Identity, usize, ahash::RandomState>,
}

/// A call that is being answered.
struct Place {
    places: Arc<Mutex<Places>>,
    child: Identity,
}

impl Place {
    fn take(places: &Arc<Mutex<Places>>, child: &Identity) -> Result<Self, ScopeRefusal> {
        let mut taken = places.lock();
        let of_child = taken.of_child.get(child).copied().unwrap_or_default();
        if taken.all >= CALLS_MAX || of_child >= CALLS_OF_CHILD_MAX {
            return Err(ScopeRefusal::Unavailable("too many calls are under way; come again".into()));
        }
        taken.all += 1;
        taken.of_child.insert(child.clone(), of_child + 1);
        drop(taken);
        Ok(Self { places: places.clone(), child: child.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all -= 1;
        if let Some(of_child) = taken.of_child.get_mut(&self.child) {
            *of_child -= 1;
            if *of_child == 0 {
                taken.of_child.remove(&self.child);
            }
        }
    }
}

/// Says why the upstream's word is missing; false, for "not refreshed".
fn not_refreshed(target: &Identity, reason: &str) -> bool {
    if let Some(suppressed) = NOT_REFRESHED.admit() {
        tracing::warn!(code = "EH3012", %target, suppressed, reason, "refreshing an identity for a child hub failed");
    }
    false
}

fn unavailable(request: &ScopeRequest) -> ScopeRefusal {
    let actor = &request.actor;
    ScopeRefusal::Unavailable(format!(
        "whether {actor}/{HUB_MODULE_ID} may know cannot be told now; come again"
    ))
}

#[cfg(test)]
mod tests;
