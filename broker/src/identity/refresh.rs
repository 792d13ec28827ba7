//! When the scope cache asks the upstream, and how often: periodic full refreshes, and single ones for logins that the cache
//! cannot accept.
//!
//! Anybody can make a login fail, so what failing logins cost is bounded: one call per identity and interval, a fixed
//! number of calls at a time, a fixed number of logins that wait, one full refresh per interval.

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, broadcast, watch};
use tokio::time::{Instant, timeout};

use super::authenticate::{Accepted, Refusal, Verdict, actor_of, verify};
use super::certificate::ClientTrust;
use super::name::Identity;
use super::record::{Authentication, ServiceIdentity};
use super::scope::{ScopeCache, ScopeCacheError, ScopeChange};
use super::token::{Hosts, unix_now_secs};
use crate::backend::{Login, LoginError};

/// Logins that wait for a refresh at a time; more are told to come again.
pub const WAITING_LOGINS_MAX: usize = 64;

/// Single refreshes under way at a time.
pub const SINGLE_REFRESHES_MAX: usize = 4;

/// Identities whose last single refresh is remembered.
pub const REMEMBERED_REFRESHES_MAX: usize = 4_096;

/// Modules of leaf devices that one full refresh asks for one by one; with more, it removes nothing.
pub const LEAF_MODULES_MAX: usize = 1_000;

/// Single refreshes that are remembered until the full one that is under way ends.
const NEWER_MAX: usize = 1_024;

/// Changes that a slow listener may be behind; then it is told that it missed some.
pub const CHANGES_MAX: usize = 256;

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

/// The intervals of refreshes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefreshOptions {
    /// Between full refreshes (`DeviceScopeCacheRefreshRateSecs`, 3600 s).
    pub period: Duration,
    /// Between attempts until the first full refresh succeeds on an empty cache (60 s).
    pub first_retry: Duration,
    /// Between refreshes on demand: single ones of one identity, full ones (`DeviceScopeCacheRefreshDelaySecs`, 120 s).
    pub delay: Duration,
    /// Longest wait of a login for a full refresh (100 s).
    pub full_wait: Duration,
    /// Longest wait of a login for its turn and its single refresh (120 s).
    pub single_wait: Duration,
}

impl Default for RefreshOptions {
    fn default() -> Self {
        Self {
            period: Duration::from_secs(3_600),
            first_retry: Duration::from_secs(60),
            delay: Duration::from_secs(120),
            full_wait: Duration::from_secs(100),
            single_wait: Duration::from_secs(120),
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
    turns: DashMap<Identity, Arc<Turn>, ahash::RandomState>,
    full: Mutex<FullState>,
    full_turn: tokio::sync::Mutex<()>,
    full_wanted: Notify,
    full_done: watch::Sender<u64>,
    changes: broadcast::Sender<Arc<ScopeChange>>,
    changed: watch::Sender<u64>,
    clock: Clock,
    trust: ArcSwap<ClientTrust>,
}

/// A clock: seconds since 1970-01-01 UTC.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

#[derive(Default)]
struct Turn {
    last: tokio::sync::Mutex<Option<Instant>>,
}

#[derive(Default)]
struct FullState {
    running: bool,
    wanted: bool,
    last_start: Option<Instant>,
    succeeded: bool,
    /// What single refreshes brought while a full one is under way; newer than its answer.
    newer: Vec<(Identity, Vec<ServiceIdentity>)>,
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
            turns: DashMap::default(),
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
            if let Err(error) = &outcome {
                tracing::warn!(%error, "refreshing the identities in scope failed; the known ones stay");
            }
            let known = self.full.lock().succeeded || !self.cache.is_empty();
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
        let FullScope { mut identities, complete } = scope;
        let change = {
            // Held while the cache takes the answer, so that no single refresh comes between.
            let mut full = self.full.lock();
            for (identity, newer) in std::mem::take(&mut full.newer) {
                identities.retain(|entry| entry.identity != identity);
                identities.extend(newer);
            }
            full.succeeded |= complete;
            if complete { self.cache.replace_all(identities)? } else { self.cache.update(identities)? }
        };
        Ok(self.announce(change))
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
                tracing::warn!(count = missing.len(), "too many modules of leaf devices to ask for each");
                scope.complete = false;
                return;
            }
            match self.source.one(module, &own.to_string()).await {
                Ok(found) => scope.identities.extend(found),
                Err(error) => {
                    tracing::warn!(%module, %error, "a module of a leaf device is not refreshed");
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

    /// Refreshes one identity now, whenever it was refreshed before; one that is gone is removed from the cache.
    ///
    /// # Errors
    /// When the upstream gave nothing usable; the cache stays as it was.
    pub async fn refresh_one(
        &self,
        identity: &Identity,
        auth_chain: &str,
    ) -> Result<Arc<ScopeChange>, ScopeError> {
        let found = self.source.one(identity, auth_chain).await?;
        let change = {
            let mut full = self.full.lock();
            if full.running && full.newer.len() < NEWER_MAX {
                full.newer.push((identity.clone(), found.clone()));
            }
            let gone = !found.iter().any(|entry| entry.identity == *identity);
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
        let mut verdict = self.verdict(login);
        let Some(suspect) = suspect(&verdict) else { return settled(verdict, false) };
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Err(LoginError::Unavailable("too many logins wait for their identity's refresh".into()));
        };
        let asked = self.ask(&suspect, login).await;
        let mut failed = matches!(asked, Asked::Failed);
        if matches!(asked, Asked::Yes) {
            verdict = self.verdict(login);
        }
        if matches!(verdict, Verdict::Unknown(_) | Verdict::Refused(Refusal::NoChain(_))) {
            self.await_full().await;
            verdict = self.verdict(login);
            failed |= !self.full.lock().succeeded;
        }
        settled(verdict, failed)
    }

    /// What the cache says to a login, without asking the upstream.
    pub fn verdict(&self, login: &Login) -> Verdict {
        verify(login, &self.cache, &self.hosts, &self.trust.load(), self.now_secs())
    }

    /// Asks the upstream for an identity, at most once per delay.
    async fn ask(&self, identity: &Identity, login: &Login) -> Asked {
        // Before anything is known, the full refresh brings everything at once.
        if !self.full.lock().succeeded && self.cache.is_empty() {
            return Asked::TooSoon;
        }
        let Some(auth_chain) = self.asking_chain(identity, login) else { return Asked::TooSoon };
        let Some(turn) = self.turn(identity) else { return Asked::Failed };
        let asking = async {
            let mut last = turn.last.lock().await;
            let unlimited =
                self.cache.get(identity).is_some_and(|entry| entry.authentication == Authentication::None);
            if !unlimited && last.is_some_and(|last| last.elapsed() < self.options.delay) {
                // Whoever had the turn before has asked; its answer is in the cache.
                return Asked::Yes;
            }
            let Ok(_single) = self.singles.acquire().await else { return Asked::Failed };
            *last = Some(Instant::now());
            match self.refresh_one(identity, &auth_chain).await {
                Ok(_) => Asked::Yes,
                Err(error) => {
                    tracing::warn!(%identity, %error, "refreshing an identity failed");
                    Asked::Failed
                }
            }
        };
        timeout(self.options.single_wait, asking).await.unwrap_or(Asked::Failed)
    }

    /// The chain of the edge device on whose behalf the question is asked: the acting child, else this edge device.
    fn asking_chain(&self, identity: &Identity, login: &Login) -> Option<String> {
        let own = self.cache.edge_device()?;
        let actor = actor_of(&login.identity, login.auth_chain.as_deref()).ok().flatten();
        // The actor's own record is asked for on behalf of this edge device: its chain may be what is unknown.
        let asker = actor.filter(|actor| *actor != identity.of_device());
        asker.and_then(|actor| self.cache.chain_text(&actor)).or_else(|| Some(own.to_string()))
    }

    /// The turn of an identity; absent when too many are remembered that were asked for less than the delay ago.
    fn turn(&self, identity: &Identity) -> Option<Arc<Turn>> {
        if let Some(turn) = self.turns.get(identity) {
            return Some(turn.value().clone());
        }
        if self.turns.len() >= REMEMBERED_REFRESHES_MAX {
            self.turns.retain(|_, turn| match turn.last.try_lock() {
                Ok(last) => last.is_some_and(|last| last.elapsed() < self.options.delay),
                Err(_) => true,
            });
            if self.turns.len() >= REMEMBERED_REFRESHES_MAX {
                return None;
            }
        }
        Some(self.turns.entry(identity.clone()).or_default().value().clone())
    }

    /// Waits for the full refresh that is under way, or for a new one if the delay allows it.
    async fn await_full(&self) {
        let mut done = self.full_done.subscribe();
        self.want_full();
        let (running, wanted) = {
            let full = self.full.lock();
            (full.running, full.wanted)
        };
        if running || wanted {
            let _ = timeout(self.options.full_wait, done.changed()).await;
        }
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

fn settled(verdict: Verdict, upstream_failed: bool) -> Result<Accepted, LoginError> {
    match verdict {
        Verdict::Accepted(accepted) => Ok(accepted),
        Verdict::Refused(refusal) => Err(LoginError::Refused(refusal.to_string())),
        Verdict::Unknown(identity) if upstream_failed => Err(LoginError::Unavailable(format!(
            "{identity} is unknown, and the upstream cannot be asked now"
        ))),
        Verdict::Unknown(identity) => Err(LoginError::Refused(format!("{identity} is not in scope"))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::super::authenticate::tests::{hosts, login, token};
    use super::super::scope::tests::{id, key_of, leaf, site};
    use super::*;

    #[derive(Default)]
    struct Source {
        registry: Mutex<Vec<ServiceIdentity>>,
        ones: AtomicUsize,
        alls: AtomicUsize,
        fails: AtomicBool,
        gate: Option<Semaphore>,
        chains: Mutex<Vec<String>>,
    }

    impl Source {
        fn failing(&self) -> Result<(), ScopeError> {
            if self.fails.load(Ordering::SeqCst) { Err(ScopeError::Status(500)) } else { Ok(()) }
        }
    }

    impl ScopeSource for Arc<Source> {
        async fn one(&self, identity: &Identity, chain: &str) -> Result<Vec<ServiceIdentity>, ScopeError> {
            self.ones.fetch_add(1, Ordering::SeqCst);
            self.chains.lock().push(chain.to_owned());
            tokio::task::yield_now().await;
            self.failing()?;
            Ok(self.registry.lock().iter().filter(|entry| entry.identity == *identity).cloned().collect())
        }

        async fn all(&self) -> Result<FullScope, ScopeError> {
            self.alls.fetch_add(1, Ordering::SeqCst);
            self.failing()?;
            let mut identities = self.registry.lock().clone();
            identities.retain(|entry| !entry.identity.to_string().starts_with("leaf1/"));
            if let Some(gate) = &self.gate {
                gate.acquire().await.unwrap().forget();
            }
            Ok(FullScope { identities, complete: true })
        }
    }

    fn setup(delay: Duration) -> (Arc<Source>, Arc<ScopeRefresher<Arc<Source>>>) {
        let source = Arc::new(Source { registry: Mutex::new(site()), ..Source::default() });
        let cache = Arc::new(ScopeCache::new(&id("top")));
        let options = RefreshOptions { delay, ..RefreshOptions::default() };
        let refresher = Arc::new(ScopeRefresher::new(cache, source.clone(), hosts(), options));
        (source, refresher)
    }

    const LONG: Duration = Duration::from_secs(3_600);

    #[tokio::test]
    async fn a_rolled_key_costs_one_call_for_all_logins_of_the_identity() {
        let (source, refresher) = setup(LONG);
        refresher.refresh_all().await.unwrap();
        let mut changes = refresher.changes();
        let rolled = Authentication::SymmetricKey { primary: Some(key_of("new")), secondary: None };
        source.registry.lock().push(ServiceIdentity { authentication: rolled, ..leaf("leaf1", "top") });
        let login = login("leaf1", None, token("leaf1", key_of("new")).await);
        let (a, b) = tokio::join!(refresher.authenticate(&login), refresher.authenticate(&login));
        assert!(a.is_ok() && b.is_ok(), "{a:?} {b:?}");
        assert_eq!(source.ones.load(Ordering::SeqCst), 1);
        assert_eq!(changes.recv().await.unwrap().changed, [id("leaf1")]);
    }

    #[tokio::test]
    async fn a_wrong_password_costs_one_call_per_delay() {
        let (source, refresher) = setup(LONG);
        refresher.refresh_all().await.unwrap();
        let login = login("leaf1", None, token("leaf1", key_of("wrong")).await);
        for _ in 0..5 {
            assert!(matches!(refresher.authenticate(&login).await, Err(LoginError::Refused(_))));
        }
        assert_eq!(source.ones.load(Ordering::SeqCst), 1);
        assert_eq!(source.alls.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn an_unknown_identity_waits_for_the_full_refresh() {
        let (source, refresher) = setup(Duration::ZERO);
        source.fails.store(true, Ordering::SeqCst);
        let login =
            login("leaf2", Some("leaf2;child"), token("child/$edgeHub", key_of("child/$edgeHub")).await);
        let running = refresher.clone();
        let run = tokio::spawn(async move { running.run().await });
        assert!(matches!(refresher.authenticate(&login).await, Err(LoginError::Unavailable(_))));
        source.fails.store(false, Ordering::SeqCst);
        assert!(refresher.authenticate(&login).await.is_ok());
        assert_eq!(source.ones.load(Ordering::SeqCst), 0);
        run.abort();
    }

    #[tokio::test]
    async fn a_new_leaf_of_a_child_is_asked_for_on_its_behalf() {
        let (source, refresher) = setup(LONG);
        refresher.refresh_all().await.unwrap();
        source.registry.lock().push(leaf("new", "child"));
        let login = login("new", Some("new;child"), token("child/$edgeHub", key_of("child/$edgeHub")).await);
        assert!(refresher.authenticate(&login).await.is_ok());
        assert_eq!(*source.chains.lock(), ["child;top"]);
    }

    #[tokio::test]
    async fn a_removed_identity_is_announced_and_refused() {
        let (source, refresher) = setup(LONG);
        refresher.refresh_all().await.unwrap();
        source.registry.lock().retain(|entry| entry.identity != id("leaf1"));
        let mut changes = refresher.changes();
        let login = login("leaf1", None, token("leaf1", key_of("other")).await);
        assert!(matches!(refresher.authenticate(&login).await, Err(LoginError::Refused(_))));
        assert_eq!(changes.recv().await.unwrap().removed, [id("leaf1")]);
        // Offline now: what is known stays good.
        source.fails.store(true, Ordering::SeqCst);
        assert!(refresher.refresh_all().await.is_err());
        let login =
            super::super::authenticate::tests::login("top/filter", None, token("top", key_of("top")).await);
        assert!(refresher.authenticate(&login).await.is_ok());
    }

    #[tokio::test]
    async fn modules_of_leaves_outlive_a_full_refresh_while_they_exist() {
        let (source, refresher) = setup(LONG);
        refresher.refresh_all().await.unwrap();
        let part = super::super::scope::tests::module("leaf1/part");
        source.registry.lock().push(part);
        let login = login("leaf1/part", None, token("leaf1/part", key_of("leaf1/part")).await);
        assert!(refresher.authenticate(&login).await.is_ok());
        assert!(refresher.refresh_all().await.unwrap().is_empty());
        source.registry.lock().retain(|entry| entry.identity != id("leaf1/part"));
        assert_eq!(refresher.refresh_all().await.unwrap().removed, [id("leaf1/part")]);
    }

    #[tokio::test]
    async fn a_full_answer_does_not_undo_what_was_learned_while_it_came() {
        let registry = Mutex::new(site());
        let source = Arc::new(Source { registry, gate: Some(Semaphore::new(1)), ..Source::default() });
        let cache = Arc::new(ScopeCache::new(&id("top")));
        let refresher =
            ScopeRefresher::new(cache.clone(), source.clone(), hosts(), RefreshOptions::default());
        refresher.refresh_all().await.unwrap();
        let (full, ()) = tokio::join!(refresher.refresh_all(), async {
            // The full answer is made, and on its way.
            while source.alls.load(Ordering::SeqCst) < 2 {
                tokio::task::yield_now().await;
            }
            source.registry.lock().push(leaf("new", "top"));
            source.registry.lock().retain(|entry| entry.identity != id("leaf1"));
            refresher.refresh_one(&id("new"), "top").await.unwrap();
            refresher.refresh_one(&id("leaf1"), "top").await.unwrap();
            source.gate.as_ref().unwrap().add_permits(1);
        });
        assert!(full.unwrap().is_empty());
        assert!(cache.get(&id("new")).is_some());
        assert_eq!(cache.get(&id("leaf1")), None);
    }

    #[tokio::test]
    async fn waiting_logins_are_bounded() {
        let (_source, refresher) = setup(LONG);
        refresher.refresh_all().await.unwrap();
        let _all = refresher.waiting.acquire_many(WAITING_LOGINS_MAX as u32).await.unwrap();
        let login = login("leaf1", None, token("leaf1", key_of("wrong")).await);
        assert!(matches!(refresher.authenticate(&login).await, Err(LoginError::Unavailable(_))));
    }
}
