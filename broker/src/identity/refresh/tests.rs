//! What failing logins cost, and what refreshes change.

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
    let login = login("leaf2", Some("leaf2;child"), token("child/$edgeHub", key_of("child/$edgeHub")).await);
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
    let refresher = ScopeRefresher::new(cache.clone(), source.clone(), hosts(), RefreshOptions::default());
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
async fn an_unknown_identity_is_told_to_come_again_for_as_long_as_the_upstream_cannot_be_asked() {
    let (source, refresher) = setup(LONG);
    refresher.refresh_all().await.unwrap();
    source.fails.store(true, Ordering::SeqCst);
    let login = login("stranger", None, token("stranger", key_of("stranger")).await);
    // The second does not ask again, but knows that the first had no answer.
    for _ in 0..2 {
        assert!(matches!(refresher.authenticate(&login).await, Err(LoginError::Unavailable(_))));
    }
    assert_eq!(source.ones.load(Ordering::SeqCst), 1);
    // All that is in scope came since: now it is known that the stranger is not.
    source.fails.store(false, Ordering::SeqCst);
    refresher.refresh_all().await.unwrap();
    assert!(matches!(refresher.authenticate(&login).await, Err(LoginError::Refused(_))));
    assert_eq!(source.ones.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_method_refreshes_identities_whenever_they_were_before() {
    let (source, refresher) = setup(LONG);
    refresher.refresh_all().await.unwrap();
    source.registry.lock().push(leaf("new", "top"));
    source.registry.lock().retain(|entry| entry.identity != id("leaf1"));
    for payload in [r#"{"deviceIds":["new","leaf1","top/filter"]}"#, r#"{"deviceIds":[]}"#] {
        assert_eq!(refresher.refresh_by_method(payload.as_bytes()).await.status, 200, "{payload}");
    }
    assert!(refresher.cache().get(&id("new")).is_some() && refresher.cache().get(&id("leaf1")).is_none());
    let many = format!(r#"{{"deviceIds":["x"{}]}}"#, r#","x""#.repeat(REFRESH_METHOD_IDENTITIES_MAX));
    for payload in ["", "null", "{}", r#"{"deviceIds":"new"}"#, r#"{"deviceIds":["a/b/c"]}"#, &many] {
        assert_eq!(refresher.refresh_by_method(payload.as_bytes()).await.status, 400, "{payload}");
    }
    assert_eq!(source.ones.load(Ordering::SeqCst), 3);
    source.fails.store(true, Ordering::SeqCst);
    assert_eq!(refresher.refresh_by_method(br#"{"deviceIds":["new"]}"#).await.status, 500);
}

#[tokio::test(start_paused = true)]
async fn no_login_waits_longer_than_its_bound() {
    let registry = Mutex::new(site());
    let source = Arc::new(Source { registry, gate: Some(Semaphore::new(0)), ..Source::default() });
    let cache = Arc::new(ScopeCache::new(&id("top")));
    let options = RefreshOptions::default();
    let refresher = Arc::new(ScopeRefresher::new(cache, source, hosts(), options.clone()));
    // The upstream takes the question and never answers.
    let running = refresher.clone();
    let run = tokio::spawn(async move { running.run().await });
    let login = login("leaf1", None, token("leaf1", key_of("leaf1")).await);
    let start = Instant::now();
    assert!(matches!(refresher.authenticate(&login).await, Err(LoginError::Unavailable(_))));
    assert!(start.elapsed() <= options.login_wait + Duration::from_secs(1), "{:?}", start.elapsed());
    run.abort();
}

#[tokio::test]
async fn waiting_logins_are_bounded() {
    let (_source, refresher) = setup(LONG);
    refresher.refresh_all().await.unwrap();
    let _all = refresher.waiting.acquire_many(WAITING_LOGINS_MAX as u32).await.unwrap();
    let login = login("leaf1", None, token("leaf1", key_of("wrong")).await);
    assert!(matches!(refresher.authenticate(&login).await, Err(LoginError::Unavailable(_))));
}
