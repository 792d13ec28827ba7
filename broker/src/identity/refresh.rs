//! When the scope cache asks the upstream, and how often: periodic full refreshes, and single ones for logins that the cache
//! cannot accept.
//!
//! Anybody can make a login fail, so what failing logins cost is bounded: one call per identity and interval, a fixed
//! number of calls at a time, a fixed number of logins that wait, one full refresh per interval.

mod on_demand;
mod turns;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, broadcast, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::authenticate::{Accepted, Refusal, Verdict, actor_of, verify};
use super::certificate::ClientTrust;
use super::client_tokens::ClientTokens;
use super::name::Identity;
use super::record::{Authentication, ServiceIdentity, Status};
use super::scope::{IDENTITIES_MAX, ScopeCache, ScopeChange};
use super::source::{FullScope, ScopeError, ScopeSource};
use super::token::{Clock, Hosts, unix_now_secs};
use crate::backend::{Login, LoginError};
use turns::{Last, Turns};

pub use on_demand::{REFRESH_METHOD, REFRESH_METHOD_IDENTITIES_MAX};
pub use turns::REMEMBERED_REFRESHES_MAX;

/// Logins that wait for a refresh at a time; more are told to come again.
pub const WAITING_LOGINS_MAX: usize = 64;

/// Single refreshes under way at a time.
pub const SINGLE_REFRESHES_MAX: usize = 4;

/// Modules of leaf devices that one full refresh asks for one by one; with more, it removes nothing.
pub const LEAF_MODULES_MAX: usize = 1_000;

/// Single refreshes that are remembered until the full one that is under way ends.
const NEWER_MAX: usize = 1_024;

/// Changes that a slow listener may be behind; then it is told that it missed some.
pub const CHANGES_MAX: usize = 256;

/// The intervals of refreshes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefreshOptions {
    /// Between full refreshes (`DeviceScopeCacheRefreshRateSecs`, 3600 s).
    pub period: Duration,
    /// Between attempts until the first full refresh succeeds on an empty cache (60 s).
    pub first_retry: Duration,
    /// Between refreshes on demand: single ones of one identity, full ones (`DeviceScopeCacheRefreshDelaySecs`, 120 s).
    pub delay: Duration,
    /// Longest wait of a login for all refreshes that it needs (100 s).
    pub login_wait: Duration,
}

impl Default for RefreshOptions {
    fn default() -> Self {
        Self {
            period: Duration::from_secs(3_600),
            first_retry: Duration::from_secs(60),
            delay: Duration::from_secs(120),
            login_wait: Duration::from_secs(100),
        }
    }
}

/// Decides on logins, and keeps the cache fresh for that.
///
/// Locks: an identity's turn (asynchronous) is held while the upstream is asked, so that logins of one identity ask
/// once, and the full refreshes' turn likewise; the full state's is held while the cache takes an answer; all others
/// are held for single statements.
pub struct ScopeRefresher<S> {
    cache: Arc<ScopeCache>,
    source: S,
    hosts: Hosts,
    options: RefreshOptions,
    waiting: Semaphore,
    singles: Semaphore,
    turns: Turns,
    full: Mutex<FullState>,
    full_turn: tokio::sync::Mutex<()>,
    full_wanted: Notify,
    full_done: watch::Sender<u64>,
    changes: broadcast::Sender<Arc<ScopeChange>>,
    changed: watch::Sender<u64>,
    clock: Clock,
    trust: ArcSwap<ClientTrust>,
}

#[derive(Default)]
struct FullState {
    running: bool,
    wanted: bool,
    last_start: Option<Instant>,
    /// When the last one began that brought everything; what it did not bring is not in scope.
    succeeded_start: Option<Instant>,
    /// What single refreshes brought while a full one is under way; newer than its answer.
    newer: Vec<(Identity, Vec<ServiceIdentity>)>,
}

/// What became of a login once the upstream was asked as far as may be.
pub(super) struct Decision {
    pub(super) verdict: Verdict,
    /// Whether the upstream gave no answer.
    upstream_failed: bool,
}

impl Decision {
    /// The end of it: whoever is unknown is told to come again only if the upstream gave no answer.
    pub(super) fn settled(self) -> Result<Accepted, LoginError> {
        match self.verdict {
            Verdict::Accepted(accepted) => Ok(accepted),
            Verdict::Refused(refusal) => Err(LoginError::Refused(refusal.to_string())),
            Verdict::Unknown(identity) if self.upstream_failed => Err(LoginError::Unavailable(format!(
                "{identity} is unknown, and the upstream cannot be asked now"
            ))),
            Verdict::Unknown(identity) => Err(LoginError::Refused(format!("{identity} is not in scope"))),
        }
    }
}

/// Whether the upstream was asked for an identity.
enum Asked {
    Yes,
    TooSoon,
    Failed,
}

impl<S: ScopeSource> ScopeRefresher<S> {
    /// A refresher of a cache. Nothing happens until [`ScopeRefresher::run`] is driven.
    pub fn new(cache: Arc<ScopeCache>, source: S, hosts: Hosts, options: RefreshOptions) -> Self {
        Self {
            cache,
            source,
            hosts,
            options,
            waiting: Semaphore::new(WAITING_LOGINS_MAX),
            singles: Semaphore::new(SINGLE_REFRESHES_MAX),
            turns: Turns::default(),
            full: Mutex::default(),
            full_turn: tokio::sync::Mutex::default(),
            full_wanted: Notify::new(),
            full_done: watch::channel(0).0,
            changes: broadcast::channel(CHANGES_MAX).0,
            changed: watch::channel(0).0,
            clock: Arc::new(unix_now_secs),
            trust: ArcSwap::from_pointee(ClientTrust::none()),
        }
    }

    /// Takes the time from another clock than the system's.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }

    /// Judges the certificates of clients by this bundle.
    #[must_use]
    pub fn with_client_trust(self, trust: ClientTrust) -> Self {
        Self { trust: ArcSwap::from_pointee(trust), ..self }
    }

    /// Judges the certificates of clients by another bundle from now on. Open connections are looked at again.
    pub fn set_client_trust(&self, trust: ClientTrust) {
        self.trust.store(Arc::new(trust));
        self.changed.send_modify(|count| *count += 1);
    }

    /// The cache.
    pub fn cache(&self) -> &Arc<ScopeCache> {
        &self.cache
    }

    /// What changes from now on. A listener that is told that it lagged must look at everything again.
    pub fn changes(&self) -> broadcast::Receiver<Arc<ScopeChange>> {
        self.changes.subscribe()
    }

    /// A number that grows with every change.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The time by which tokens are judged, in seconds since 1970.
    pub fn now_secs(&self) -> i64 {
        (self.clock)()
    }

    /// Refreshes at start, periodically and on demand; drive it for as long as the hub runs.
    pub async fn run(&self) {
        loop {
            let outcome = self.refresh_all().await;
            let result = if outcome.is_ok() { "succeeded" } else { "failed" };
            metrics::counter!("edgehub_scope_refresh_total", "result" => result).increment(1);
            metrics::gauge!("edgehub_scope_cache_identities").set(self.cache.len() as f64);
            if let Err(error) = &outcome {
                tracing::warn!(code = "EH3001", %error, "refreshing the identities in scope failed; the known ones stay");
            }
            let known = self.full.lock().succeeded_start.is_some() || !self.cache.is_empty();
            let pause = if known { self.options.period } else { self.options.first_retry };
            let wanted = async {
                while !std::mem::take(&mut self.full.lock().wanted) {
                    self.full_wanted.notified().await;
                }
            };
            // Elapsed or asked for: the next round is the same.
            let _ = timeout(pause, wanted).await;
        }
    }

    /// Refreshes everything now. An incomplete answer updates, but removes nothing.
    ///
    /// # Errors
    /// When the upstream gave nothing usable; the cache stays as it was.
    pub async fn refresh_all(&self) -> Result<Arc<ScopeChange>, ScopeError> {
        let _turn = self.full_turn.lock().await;
        {
            let mut full = self.full.lock();
            full.running = true;
            full.last_start = Some(Instant::now());
        }
        // Also when this future is dropped half way, so that nobody waits for it in vain.
        let _done = FullDone(self);
        let mut scope = self.source.all().await?;
        self.add_leaf_modules(&mut scope).await;
        self.keep_below_disabled(&mut scope);
        let FullScope { mut identities, complete } = scope;
        let change = {
            // Held while the cache takes the answer, so that no single refresh comes between.
            let mut full = self.full.lock();
            for (identity, newer) in std::mem::take(&mut full.newer) {
                identities.retain(|entry| entry.identity != identity);
                identities.extend(newer);
            }
            if complete {
                full.succeeded_start = full.last_start;
            }
            if complete { self.cache.replace_all(identities)? } else { self.cache.update(identities)? }
        };
        Ok(self.announce(change))
    }

    /// Nobody tells what is below an edge device that is disabled. What is known of it stays: it cannot connect, but may be
    /// enabled again, and then must find its queues and twins.
    fn keep_below_disabled(&self, scope: &mut FullScope) {
        let mut received: HashSet<Identity, ahash::RandomState> =
            scope.identities.iter().map(|entry| entry.identity.clone()).collect();
        let disabled = scope.identities.iter().filter(|entry| entry.edge && entry.status == Status::Disabled);
        let mut waiting: Vec<Identity> = disabled.map(|entry| entry.identity.clone()).collect();
        while let Some(device) = waiting.pop() {
            for entry in self.cache.below(&device, None, IDENTITIES_MAX).0 {
                if received.insert(entry.identity.clone()) {
                    waiting.extend(entry.edge.then(|| entry.identity.clone()));
                    scope.identities.push(entry);
                }
            }
        }
    }

    /// Full answers leave out the modules of leaf devices. Those that the cache has from single refreshes are asked for one by
    /// one, so that a full refresh neither removes them nor keeps those that are gone.
    async fn add_leaf_modules(&self, scope: &mut FullScope) {
        let Some(own) = self.cache.edge_device().filter(|_| scope.complete) else { return };
        let received: HashSet<&Identity, ahash::RandomState> =
            scope.identities.iter().map(|entry| &entry.identity).collect();
        let leaves: HashSet<&Identity, ahash::RandomState> =
            scope.identities.iter().filter(|entry| !entry.edge).map(|entry| &entry.identity).collect();
        let missing: Vec<Identity> = self
            .cache
            .all()
            .iter()
            .map(|entry| entry.identity.clone())
            .filter(|identity| identity.module_id().is_some() && !received.contains(identity))
            .filter(|identity| leaves.contains(&identity.of_device()))
            .collect();
        for (index, module) in missing.iter().enumerate() {
            if index == LEAF_MODULES_MAX {
                tracing::warn!(
                    code = "EH3002",
                    count = missing.len(),
                    "too many modules of leaf devices to ask for each"
                );
                scope.complete = false;
                return;
            }
            match self.source.one(module, &own.to_string()).await {
                Ok(found) => scope.identities.extend(found),
                Err(error) => {
                    tracing::warn!(code = "EH3003", %module, %error, "a module of a leaf device is not refreshed");
                    scope.complete = false;
                    return;
                }
            }
        }
    }

    /// Asks for a full refresh by [`ScopeRefresher::run`], unless one began less than the delay ago; for regained upstream links.
    pub fn want_full(&self) {
        let mut full = self.full.lock();
        let recent = full.last_start.is_some_and(|start| start.elapsed() < self.options.delay);
        if !recent && !full.running && !full.wanted {
            full.wanted = true;
            drop(full);
            self.full_wanted.notify_one();
        }
    }

    /// Refreshes one identity now, whenever it was refreshed before; one that is gone is removed from the cache. What a
    /// child may not see is not gone: before it is removed, the upstream must say so to this hub itself.
    ///
    /// # Errors
    /// When the upstream gave nothing usable; the cache stays as it was.
    pub async fn refresh_one(
        &self,
        identity: &Identity,
        auth_chain: &str,
    ) -> Result<Arc<ScopeChange>, ScopeError> {
        let brings = |found: &[ServiceIdentity]| found.iter().any(|entry| entry.identity == *identity);
        let mut found = self.source.one(identity, auth_chain).await?;
        let own = self.cache.edge_device().filter(|own| own.device_id() != auth_chain);
        if let Some(own) = own
            && !brings(&found)
            && self.cache.get(identity).is_some()
        {
            found = self.source.one(identity, own.device_id()).await?;
        }
        let change = {
            let mut full = self.full.lock();
            if full.running && full.newer.len() < NEWER_MAX {
                full.newer.push((identity.clone(), found.clone()));
            }
            let gone = !brings(&found);
            let mut change = self.cache.update(found)?;
            if gone {
                change.removed.extend(self.cache.remove(identity).removed);
            }
            change
        };
        Ok(self.announce(change))
    }

    /// Decides on a login; asks the upstream when the cache cannot accept it.
    ///
    /// # Errors
    /// [`LoginError::Refused`] with the reason; [`LoginError::Unavailable`] when too many logins wait, or the identity
    /// is unknown and the upstream cannot be asked.
    pub async fn authenticate(&self, login: &Login) -> Result<Accepted, LoginError> {
        self.decide(login).await?.settled()
    }

    /// As [`ScopeRefresher::authenticate`], for whoever can do something else for those that are unknown.
    ///
    /// # Errors
    /// [`LoginError::Unavailable`] when too many logins wait.
    pub(super) async fn decide(&self, login: &Login) -> Result<Decision, LoginError> {
        let mut verdict = self.verdict(login);
        let Some(suspect) = suspect(&verdict) else {
            return Ok(Decision { verdict, upstream_failed: false });
        };
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Err(LoginError::Unavailable("too many logins wait for their identity's refresh".into()));
        };
        let deadline = Instant::now() + self.options.login_wait;
        let asked = timeout_at(deadline, self.ask(&suspect, login)).await.unwrap_or(Asked::Failed);
        let mut upstream_failed = matches!(asked, Asked::Failed);
        if matches!(asked, Asked::Yes) {
            verdict = self.verdict(login);
        }
        if matches!(verdict, Verdict::Unknown(_) | Verdict::Refused(Refusal::NoChain(_))) {
            self.await_full(deadline).await;
            verdict = self.verdict(login);
            upstream_failed |= self.full.lock().succeeded_start.is_none();
        }
        Ok(Decision { verdict, upstream_failed })
    }

    /// The host names that the audience of a client's token may have.
    pub fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// A place for the tokens of clients outside the scope; its changes are told as those of identities are.
    pub fn client_tokens(&self) -> ClientTokens {
        ClientTokens::new(self.changed.clone())
    }

    /// What the cache says to a login, without asking the upstream.
    pub fn verdict(&self, login: &Login) -> Verdict {
        verify(login, &self.cache, &self.hosts, &self.trust.load(), self.now_secs())
    }

    /// Asks the upstream for an identity, at most once per delay.
    async fn ask(&self, identity: &Identity, login: &Login) -> Asked {
        // Before anything is known, the full refresh brings everything at once.
        if self.full.lock().succeeded_start.is_none() && self.cache.is_empty() {
            return Asked::TooSoon;
        }
        let Some(auth_chain) = self.asking_chain(identity, login) else { return Asked::TooSoon };
        let Some(turn) = self.turns.of(identity, self.options.delay) else { return Asked::Failed };
        let mut last = turn.last.lock().await;
        let unlimited =
            self.cache.get(identity).is_some_and(|entry| entry.authentication == Authentication::None);
        if let Some(Last { at, failed }) = *last
            && !unlimited
            && at.elapsed() < self.options.delay
        {
            // Whoever had the turn before has asked. If it had no answer, a full refresh since then may have brought one.
            let answered = !failed || self.full.lock().succeeded_start.is_some_and(|start| start >= at);
            return if answered { Asked::Yes } else { Asked::Failed };
        }
        let Ok(_single) = self.singles.acquire().await else { return Asked::Failed };
        // Failed also for the next login if this one gives up half way.
        let at = Instant::now();
        *last = Some(Last { at, failed: true });
        match self.refresh_one(identity, &auth_chain).await {
            Ok(_) => {
                *last = Some(Last { at, failed: false });
                Asked::Yes
            }
            Err(error) => {
                tracing::warn!(code = "EH3004", %identity, %error, "refreshing an identity failed");
                Asked::Failed
            }
        }
    }

    /// The chain of the edge device on whose behalf the question is asked: the acting child, else this edge device.
    fn asking_chain(&self, identity: &Identity, login: &Login) -> Option<String> {
        let own = self.cache.edge_device()?;
        let actor = actor_of(&login.identity, login.auth_chain.as_deref()).ok().flatten();
        // The actor's own record is asked for on behalf of this edge device: its chain may be what is unknown.
        let asker = actor.filter(|actor| *actor != identity.of_device());
        asker.and_then(|actor| self.cache.chain_text(&actor)).or_else(|| Some(own.to_string()))
    }

    /// Waits until the deadline for the full refresh that is under way, or for a new one if the delay allows it.
    pub(super) async fn await_full(&self, deadline: Instant) {
        let mut done = self.full_done.subscribe();
        self.want_full();
        let (running, wanted) = {
            let full = self.full.lock();
            (full.running, full.wanted)
        };
        if running || wanted {
            let _ = timeout_at(deadline, done.changed()).await;
        }
    }

    /// Longest wait of whoever waits for refreshes.
    pub(super) fn login_wait(&self) -> Duration {
        self.options.login_wait
    }

    /// Whether a full refresh that began since then brought everything.
    pub(super) fn knows_all_since(&self, since: Instant) -> bool {
        self.full.lock().succeeded_start.is_some_and(|start| start >= since)
    }

    fn announce(&self, change: ScopeChange) -> Arc<ScopeChange> {
        let change = Arc::new(change);
        if !change.is_empty() {
            // Fails only when nobody listens.
            let _ = self.changes.send(change.clone());
            self.changed.send_modify(|count| *count += 1);
        }
        change
    }
}

struct FullDone<'a, S>(&'a ScopeRefresher<S>);

impl<S> Drop for FullDone<'_, S> {
    fn drop(&mut self) {
        let mut full = self.0.full.lock();
        full.running = false;
        full.newer.clear();
        drop(full);
        self.0.full_done.send_modify(|rounds| *rounds += 1);
    }
}

/// The identity whose newer record could change the verdict.
fn suspect(verdict: &Verdict) -> Option<Identity> {
    match verdict {
        Verdict::Accepted(_) => None,
        Verdict::Refused(refusal) => refusal.refresh().cloned(),
        Verdict::Unknown(identity) => Some(identity.clone()),
    }
}

#[cfg(test)]
mod tests;
