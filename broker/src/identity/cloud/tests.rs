//! Who is asked, how often, and what an answer is worth afterwards.

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::super::authenticate::tests::{HOST, hosts, login};
use super::super::refresh::RefreshOptions;
use super::super::scope::ScopeCache;
use super::super::scope::tests::{id, key_of, site};
use super::super::source::{FullScope, ScopeError};
use super::super::{ServiceIdentity, SymmetricKey, TokenSource};
use super::*;
use crate::backend::Protocol;

const LIMIT: Duration = Duration::from_secs(40);

/// A scope that never changes.
#[derive(Default)]
struct Source {
    ones: AtomicUsize,
}

impl ScopeSource for Arc<Source> {
    async fn one(&self, identity: &Identity, _: &str) -> Result<Vec<ServiceIdentity>, ScopeError> {
        self.ones.fetch_add(1, Ordering::SeqCst);
        Ok(site().into_iter().filter(|entry| entry.identity == *identity).collect())
    }

    async fn all(&self) -> Result<FullScope, ScopeError> {
        Ok(FullScope { identities: site(), complete: true })
    }
}

/// A cloud that knows some tokens.
#[derive(Default)]
struct Cloud {
    accepted: Mutex<Vec<Arc<str>>>,
    away: Mutex<bool>,
    asked: AtomicUsize,
    at_once: AtomicUsize,
    at_once_max: AtomicUsize,
    gate: Option<Semaphore>,
}

struct UnderWay<'a>(&'a AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl TokenProver for Cloud {
    fn prove<'a>(&'a self, _: &'a Identity, token: &'a Arc<str>) -> Proving<'a> {
        Box::pin(async move {
            self.asked.fetch_add(1, Ordering::SeqCst);
            let at_once = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
            self.at_once_max.fetch_max(at_once, Ordering::SeqCst);
            let _under_way = UnderWay(&self.at_once);
            if let Some(gate) = &self.gate {
                gate.acquire().await.unwrap().forget();
            }
            tokio::task::yield_now().await;
            match (*self.away.lock(), self.accepted.lock().contains(token)) {
                (true, _) => Err(ProofError::Unavailable("it is away".into())),
                (false, true) => Ok(()),
                (false, false) => Err(ProofError::Refused("unknown".into())),
            }
        })
    }
}

struct Setup {
    source: Arc<Source>,
    cloud: Arc<Cloud>,
    now_secs: Arc<AtomicI64>,
    refresher: Arc<ScopeRefresher<Arc<Source>>>,
    tokens: Arc<ClientTokens>,
}

impl Setup {
    fn new(cloud: Cloud) -> Self {
        let (source, now_secs) = (Arc::new(Source::default()), Arc::new(AtomicI64::new(1_000_000)));
        let cache = Arc::new(ScopeCache::new(&id("top")));
        let clock = now_secs.clone();
        let refresher = ScopeRefresher::new(cache, source.clone(), hosts(), RefreshOptions::default())
            .with_clock(Arc::new(move || clock.load(Ordering::SeqCst)));
        let tokens = Arc::new(refresher.client_tokens());
        Self { source, cloud: Arc::new(cloud), now_secs, refresher: Arc::new(refresher), tokens }
    }

    async fn after_scope(cloud: Cloud) -> (Self, Arc<CloudAuthenticator<Arc<Source>>>) {
        let setup = Self::new(cloud);
        setup.refresher.refresh_all().await.unwrap();
        let (refresher, tokens) = (setup.refresher.clone(), setup.tokens.clone());
        let made = CloudAuthenticator::after_scope(refresher, tokens, setup.cloud.clone(), LIMIT);
        (setup, Arc::new(made))
    }

    /// A token of an identity, by key; it expires an hour from now.
    async fn token(&self, identity: &str, key: SymmetricKey) -> Arc<str> {
        let clock = self.now_secs.clone();
        let source = TokenSource::new(HOST, &id(identity), Arc::new(key));
        source.with_clock(Arc::new(move || clock.load(Ordering::SeqCst))).token().await.unwrap()
    }

    /// A login of an identity with a token that the cloud accepts.
    async fn good(&self, identity: &str) -> Login {
        let token = self.token(identity, key_of(identity)).await;
        self.cloud.accepted.lock().push(token.clone());
        login(identity, None, token)
    }

    async fn bad(&self, identity: &str, number: usize) -> Login {
        login(identity, None, self.token(identity, key_of(&format!("wrong {number}"))).await)
    }

    fn asked(&self) -> usize {
        self.cloud.asked.load(Ordering::SeqCst)
    }
}

fn refused(result: &Result<(), LoginError>) -> bool {
    matches!(result, Err(LoginError::Refused(_)))
}

fn unavailable(result: &Result<(), LoginError>) -> bool {
    matches!(result, Err(LoginError::Unavailable(_)))
}

#[tokio::test]
async fn the_scope_decides_on_its_own_and_the_cloud_on_the_others() {
    let (setup, authenticator) = Setup::after_scope(Cloud::default()).await;
    // In scope: right and wrong, the cloud is not asked, whatever it would say.
    let wrong = setup.bad("leaf1", 0).await;
    if let Credentials::SasToken(token) = &wrong.credentials {
        setup.cloud.accepted.lock().push(token.clone());
    }
    assert!(refused(&authenticator.authenticate(&wrong).await));
    assert!(authenticator.authenticate(&setup.good("leaf1").await).await.is_ok());
    // A module whose device is in scope is one that does not exist.
    assert!(refused(&authenticator.authenticate(&setup.good("leaf1/made-up").await).await));
    assert!(refused(&authenticator.authenticate(&setup.good("top/made-up").await).await));
    assert_eq!(setup.asked(), 0);
    // Not in scope.
    let stranger = setup.good("stranger").await;
    assert!(authenticator.authenticate(&stranger).await.is_ok());
    assert!(authenticator.authenticate(&setup.good("stranger/part").await).await.is_ok());
    assert!(refused(&authenticator.authenticate(&setup.bad("other", 0).await).await));
    assert_eq!(setup.asked(), 3);
    let expires_at_secs = 1_000_000 + 3_600;
    assert_eq!(authenticator.standing(&stranger), Ok(Some(expires_at_secs + 301)));
    assert!(authenticator.standing(&setup.bad("stranger", 0).await).is_err());
    assert_eq!(setup.tokens.take_renewed().len(), 2);
}

#[tokio::test]
async fn only_tokens_of_their_own_for_this_hub_are_shown_to_the_cloud() {
    let (setup, authenticator) = Setup::after_scope(Cloud::default()).await;
    let good = setup.good("stranger").await;
    let with = |credentials| Login { credentials, ..good.clone() };
    let expired = setup.good("expired").await;
    let foreign = TokenSource::new("elsewhere.example.net", &id("stranger"), Arc::new(key_of("stranger")));
    let chained = Login { auth_chain: Some("stranger;child".into()), ..good.clone() };
    for (name, login) in [
        ("no credentials", with(Credentials::None)),
        ("a certificate", with(Credentials::Certificate(Vec::new()))),
        ("another host", with(Credentials::SasToken(foreign.token().await.unwrap()))),
        ("another identity", Login { identity: id("other"), ..good.clone() }),
        ("no token", with(Credentials::SasToken("password".into()))),
        ("on behalf", chained),
    ] {
        assert!(refused(&authenticator.authenticate(&login).await), "{name}");
        assert!(authenticator.standing(&login).is_err(), "{name}");
    }
    setup.now_secs.fetch_add(3_600 + 301, Ordering::SeqCst);
    assert!(refused(&authenticator.authenticate(&expired).await));
    assert_eq!(setup.asked(), 0);
}

#[tokio::test]
async fn who_was_let_in_comes_again_with_the_same_token_until_it_expires() {
    let (setup, authenticator) = Setup::after_scope(Cloud::default()).await;
    let login = setup.good("stranger").await;
    assert!(authenticator.authenticate(&login).await.is_ok());
    let scope_asked = setup.source.ones.load(Ordering::SeqCst);
    *setup.cloud.away.lock() = true;
    setup.now_secs.fetch_add(3_600, Ordering::SeqCst);
    assert!(authenticator.authenticate(&login).await.is_ok());
    assert_eq!(
        (setup.asked(), setup.source.ones.load(Ordering::SeqCst)),
        (1, scope_asked),
        "nobody is asked"
    );
    // Newer tokens have to be judged, and others come again later.
    assert!(unavailable(&authenticator.authenticate(&setup.good("stranger").await).await));
    assert!(unavailable(&authenticator.authenticate(&setup.good("other").await).await));
    setup.now_secs.fetch_add(301, Ordering::SeqCst);
    assert!(refused(&authenticator.authenticate(&login).await));
    assert!(authenticator.standing(&login).is_err());
}

#[tokio::test]
async fn what_the_upstream_refuses_later_is_told_and_has_to_be_judged_again() {
    let (setup, authenticator) = Setup::after_scope(Cloud::default()).await;
    let login = setup.good("stranger").await;
    assert!(authenticator.authenticate(&login).await.is_ok());
    let changed = authenticator.changed();
    setup.cloud.accepted.lock().clear();
    let own = setup.tokens.token_of(&login.identity, authenticator.now_secs()).unwrap();
    setup.tokens.refused(&login.identity, own.text());
    assert!(changed.has_changed().unwrap() && authenticator.standing(&login).is_err());
    assert!(refused(&authenticator.authenticate(&login).await));
}

#[tokio::test]
async fn the_cloud_alone_decides_in_its_mode() {
    let setup = Setup::new(Cloud::default());
    let (refresher, tokens) = (setup.refresher.clone(), setup.tokens.clone());
    let authenticator = CloudAuthenticator::cloud_only(refresher, tokens, setup.cloud.clone(), LIMIT);
    for identity in ["leaf1", "top/filter", "stranger"] {
        let login = setup.good(identity).await;
        assert!(authenticator.authenticate(&login).await.is_ok(), "{identity}");
        assert!(authenticator.standing(&login).is_ok(), "{identity}");
    }
    assert!(refused(&authenticator.authenticate(&setup.bad("leaf1", 0).await).await));
    let certificate =
        Login { credentials: Credentials::Certificate(Vec::new()), ..login("leaf2", None, "".into()) };
    assert!(refused(&authenticator.authenticate(&certificate).await));
    assert_eq!((setup.asked(), setup.source.ones.load(Ordering::SeqCst)), (4, 0));
    *setup.cloud.away.lock() = true;
    assert!(unavailable(&authenticator.authenticate(&setup.good("leaf2").await).await));
}

#[tokio::test]
async fn logins_with_the_same_token_ask_once() {
    let (setup, authenticator) =
        Setup::after_scope(Cloud { gate: Some(Semaphore::new(0)), ..Cloud::default() }).await;
    let login = setup.good("stranger").await;
    let both = async { tokio::join!(authenticator.authenticate(&login), authenticator.authenticate(&login)) };
    let (results, ()) = tokio::join!(both, async {
        while setup.asked() == 0 {
            tokio::task::yield_now().await;
        }
        setup.cloud.gate.as_ref().unwrap().add_permits(8);
    });
    assert!(results.0.is_ok() && results.1.is_ok(), "{results:?}");
    assert_eq!(setup.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn wrong_tokens_of_one_identity_cost_a_few_questions_and_do_not_keep_out_who_is_known() {
    let (setup, authenticator) = Setup::after_scope(Cloud::default()).await;
    let known = setup.good("stranger").await;
    assert!(authenticator.authenticate(&known).await.is_ok());
    let wrong = setup.bad("stranger", 0).await;
    for _ in 0..10 {
        assert!(refused(&authenticator.authenticate(&wrong).await), "the same again is not asked for");
    }
    assert_eq!(setup.asked(), 2);
    for number in 1..100 {
        let result = authenticator.authenticate(&setup.bad("stranger", number).await).await;
        assert_eq!(refused(&result), number < ATTEMPTS_MAX, "{number}");
    }
    assert_eq!(setup.asked(), 1 + ATTEMPTS_MAX);
    assert!(authenticator.authenticate(&known).await.is_ok());
    // Later it may try again.
    tokio::time::advance(Duration::from_secs(ATTEMPTS_SECS)).await;
    setup.now_secs.fetch_add(60, Ordering::SeqCst);
    assert!(authenticator.authenticate(&setup.good("stranger").await).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn wrong_tokens_of_many_identities_cost_a_bounded_number_of_questions() {
    let (setup, authenticator) = Setup::after_scope(Cloud::default()).await;
    for number in 0..200 {
        let result = authenticator.authenticate(&setup.bad(&format!("d{number}"), 0).await).await;
        assert_eq!(refused(&result), number < REFUSED_BURST_MAX as usize, "{number}");
    }
    assert_eq!(setup.asked(), REFUSED_BURST_MAX as usize);
    tokio::time::advance(Duration::from_secs(5)).await;
    // Good ones cost nothing of that.
    for number in 0..50 {
        let login = setup.good(&format!("good{number}")).await;
        assert!(authenticator.authenticate(&login).await.is_ok(), "{number}");
    }
}

#[tokio::test(start_paused = true)]
async fn questions_and_those_that_wait_for_them_are_bounded() {
    let (setup, authenticator) =
        Setup::after_scope(Cloud { gate: Some(Semaphore::new(0)), ..Cloud::default() }).await;
    let mut logins = tokio::task::JoinSet::new();
    for number in 0..200 {
        let (authenticator, login) = (authenticator.clone(), setup.good(&format!("d{number}")).await);
        logins.spawn(async move { authenticator.authenticate(&login).await });
    }
    // The clock moves on when nothing else can happen: nobody waits longer than that.
    let start = tokio::time::Instant::now();
    while let Some(result) = logins.join_next().await {
        assert!(unavailable(&result.unwrap()));
    }
    assert!(setup.asked() <= WAITING_QUESTIONS_MAX);
    assert_eq!(setup.cloud.at_once_max.load(Ordering::SeqCst), QUESTIONS_MAX);
    assert!(start.elapsed() <= RefreshOptions::default().login_wait + LIMIT);
}

#[tokio::test(start_paused = true)]
async fn an_upstream_that_is_away_is_not_asked_by_each_login() {
    let (setup, authenticator) =
        Setup::after_scope(Cloud { away: Mutex::new(true), ..Cloud::default() }).await;
    for number in 0..50 {
        assert!(unavailable(&authenticator.authenticate(&setup.good(&format!("d{number}")).await).await));
    }
    assert_eq!(setup.asked(), 1);
    *setup.cloud.away.lock() = false;
    tokio::time::advance(Duration::from_secs(UNREACHABLE_SECS)).await;
    let login = Login { protocol: Protocol::Amqp, ..setup.good("d1").await };
    assert!(authenticator.authenticate(&login).await.is_ok());
}
