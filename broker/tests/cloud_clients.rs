//! Clients outside the scope that come with tokens of their own: what the upstream is asked, over AMQP and MQTT, and what goes
//! up for them.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use edgehub_broker::backend::{
    Backend, CloseReason, Command, CommandReceiver, Credentials, Login, LoginError, Mailbox, Protocol,
};
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::hub::{ControlOptions, Hub, HubClient, HubOptions};
use edgehub_broker::identity::{
    CloudAuthenticator, FullScope, Hosts, Identity, ProofError, RefreshOptions, ScopeError, ScopeRefresher,
    ScopeSource, ServiceIdentity, SymmetricKey, TokenProver, TokenSource, unix_now_secs,
};
use edgehub_broker::upstream::{UpstreamKind, UpstreamOptions, UpstreamProver};
use edgehub_routing::OverflowPolicy;
use edgehub_storage::StoreLimits;
use recording::{DEADLINE, Recording, until};
use serde_json::json;
use upstream_peers::cloud::Cloud;
use upstream_peers::{SHORT, Server, silent, tls};
use upstream_site::{CLOUD_HOST, Knobs, QUEUE, Site, identity, memory_store, upstream_options};

const GUEST: &str = "guest";

/// Nobody is added to what is known.
struct Nobody;

impl ScopeSource for Nobody {
    async fn one(&self, _: &Identity, _: &str) -> Result<Vec<ServiceIdentity>, ScopeError> {
        Ok(Vec::new())
    }

    async fn all(&self) -> Result<FullScope, ScopeError> {
        Ok(FullScope::default())
    }
}

async fn token(name: &str, now_secs: i64) -> Arc<str> {
    let key = SymmetricKey::from_bytes(*b"the key of a guest, as it has it").unwrap();
    let source = TokenSource::new(CLOUD_HOST, &identity(name), Arc::new(key));
    source.with_clock(Arc::new(move || now_secs)).token().await.unwrap()
}

async fn head(kind: &UpstreamKind, port: u16, tls: Arc<rustls::ServerConfig>, cloud: &Recording) -> Server {
    match kind {
        UpstreamKind::MqttHub => Server::mqtt_head(port, tls, cloud.clone()).await,
        UpstreamKind::Hub | UpstreamKind::Amqp(_) => Server::head(port, tls, cloud.clone()).await,
    }
}

fn knobs(kind: &UpstreamKind) -> Knobs {
    Knobs { kind: kind.clone(), ..Knobs::default() }
}

const KINDS: [UpstreamKind; 2] = [UpstreamKind::Hub, UpstreamKind::MqttHub];

#[tokio::test]
async fn the_upstream_s_judgement_is_told_apart_from_its_silence() {
    for kind in KINDS {
        let (server_tls, client_tls) = tls();
        let cloud = Recording::default();
        let server = head(&kind, 0, server_tls, &cloud).await;
        let (options, _) = upstream_options(server.port, client_tls.clone(), &knobs(&kind));
        let prover = UpstreamProver::new(options);
        let text = token(GUEST, unix_now_secs()).await;
        assert_eq!(prover.prove(&identity(GUEST), &text).await, Ok(()), "{kind:?}");
        {
            let state = cloud.state.lock();
            let login = state.logins.last().unwrap();
            assert_eq!((&login.identity, &login.auth_chain), (&identity(GUEST), &None));
            assert_eq!(login.credentials, Credentials::SasToken(text.clone()));
        }
        until("it is gone again", || cloud.state.lock().gone.contains(&identity(GUEST))).await;
        let ask = async |refusal| {
            cloud.state.lock().refused.insert(identity(GUEST), refusal);
            prover.prove(&identity(GUEST), &text).await
        };
        let refused = ask(LoginError::Refused("no".into())).await;
        assert!(matches!(refused, Err(ProofError::Refused(_))), "{kind:?} {refused:?}");
        let later = ask(LoginError::Unavailable("later".into())).await;
        assert!(matches!(later, Err(ProofError::Unavailable(_))), "{kind:?} {later:?}");
        server.stop().await;
        let away = prover.prove(&identity(GUEST), &text).await;
        assert!(matches!(away, Err(ProofError::Unavailable(_))), "{kind:?} {away:?}");
        let (port, _silent) = silent().await;
        let short = Knobs { operation_timeout: SHORT, ..knobs(&kind) };
        let (options, _) = upstream_options(port, client_tls, &short);
        let silence = UpstreamProver::new(options).prove(&identity(GUEST), &text).await;
        assert!(matches!(silence, Err(ProofError::Unavailable(_))), "{kind:?} {silence:?}");
    }
}

#[tokio::test]
async fn an_upstream_that_judges_tokens_when_they_are_put_is_understood() {
    let (server_tls, client_tls) = tls();
    let cloud = Cloud::default();
    let serving = cloud.clone();
    let server = Server::start(0, server_tls, move |stream| serving.clone().serve(stream)).await;
    let (options, _) = upstream_options(server.port, client_tls, &Knobs::default());
    let prover = UpstreamProver::new(options);
    let text = token(GUEST, unix_now_secs()).await;
    for (status, wanted) in
        [(200, None), (401, Some(true)), (404, Some(true)), (429, Some(false)), (500, Some(false))]
    {
        cloud.state.lock().token_status.insert(GUEST.into(), status);
        let refused = match prover.prove(&identity(GUEST), &text).await {
            Ok(()) => None,
            Err(ProofError::Refused(_)) => Some(true),
            Err(ProofError::Unavailable(_)) => Some(false),
        };
        assert_eq!(refused, wanted, "{status}");
    }
    assert_eq!(cloud.state.lock().attaches.iter().filter(|(of, _, _)| of == GUEST).count(), 1);
}

/// A hub in the mode `CloudAndScope` below a peer that speaks what heads do.
struct Ground {
    kind: UpstreamKind,
    cloud: Recording,
    site: Site,
    server: Server,
    tls: Arc<rustls::ServerConfig>,
    now_secs: Arc<AtomicI64>,
}

impl Ground {
    async fn new(kind: UpstreamKind) -> Self {
        let (server_tls, client_tls) = tls();
        let cloud = Recording::default();
        let server = head(&kind, 0, server_tls.clone(), &cloud).await;
        let now_secs = Arc::new(AtomicI64::new(unix_now_secs()));
        let clock = now_secs.clone();
        let clock: Arc<dyn Fn() -> i64 + Send + Sync> = Arc::new(move || clock.load(Ordering::SeqCst));
        let (options, scope) = upstream_options(server.port, client_tls, &knobs(&kind));
        let refresher =
            ScopeRefresher::new(scope.clone(), Nobody, Hosts::new([CLOUD_HOST]), RefreshOptions::default())
                .with_clock(clock.clone());
        // A round that brought nothing new: no login waits for one.
        refresher.refresh_all().await.unwrap();
        let refresher = Arc::new(refresher);
        let tokens = Arc::new(refresher.client_tokens());
        let own = SymmetricKey::from_bytes(*b"0123456789abcdef0123456789abcdef").unwrap();
        let own = TokenSource::new(CLOUD_HOST, &options.identity, Arc::new(own)).with_clock(clock);
        let upstream =
            UpstreamOptions { client_tokens: Some(tokens.clone()), tokens: Arc::new(own), ..options };
        let prover = Arc::new(UpstreamProver::new(upstream.clone()));
        let authenticator = CloudAuthenticator::after_scope(refresher, tokens, prover, DEADLINE);
        let options = HubOptions {
            edge_device: identity("edge1"),
            clients_max: 100,
            module_pump: ModulePumpOptions::default(),
            upstream: Some(upstream),
            control: ControlOptions::default(),
            overflow: OverflowPolicy::RejectNew,
            limits: StoreLimits::default(),
        };
        let (store, time) = memory_store();
        let runtime = tokio::runtime::Handle::current();
        let site = Site { hub: Hub::start(options, store, Arc::new(authenticator), runtime), scope, time };
        site.apply(json!({ "up": "FROM /messages/* INTO $upstream" }));
        Self { kind, cloud, site, server, tls: server_tls, now_secs }
    }

    fn now_secs(&self) -> i64 {
        self.now_secs.load(Ordering::SeqCst)
    }

    async fn login(&self, token: &Arc<str>) -> Result<(HubClient, CommandReceiver), LoginError> {
        let (mailbox, commands) = Mailbox::channel(64);
        let login = Login {
            identity: identity(GUEST),
            credentials: Credentials::SasToken(token.clone()),
            auth_chain: None,
            product_info: "".into(),
            model_id: None,
            protocol: Protocol::Mqtt,
            peer: None,
        };
        Ok((self.site.hub.login(login, mailbox).await?, commands))
    }

    /// What an identity last came with upstream: token and auth chain.
    fn last(&self, name: &str) -> Option<(Credentials, Option<Arc<str>>)> {
        let state = self.cloud.state.lock();
        let mut all =
            state.logins.iter().chain(&state.renewals).filter(|login| login.identity == identity(name));
        all.next_back().map(|login| (login.credentials.clone(), login.auth_chain.clone()))
    }

    async fn arrives(&self, numbers: std::ops::Range<u32>) {
        let wanted: Vec<u32> = numbers.collect();
        let arrived = || {
            let mut numbers = self.cloud.numbers(GUEST);
            numbers.dedup();
            numbers.ends_with(&wanted)
        };
        until("messages of the guest", arrived).await;
    }
}

#[tokio::test]
async fn what_a_guest_sends_goes_up_with_its_own_token_and_a_newer_one_takes_its_place() {
    for kind in KINDS {
        let ground = Ground::new(kind).await;
        let first = token(GUEST, ground.now_secs()).await;
        let (mut guest, _commands) = ground.login(&first).await.unwrap();
        ground.site.publish(&mut guest, "out", 0..3).await;
        ground.arrives(0..3).await;
        assert_eq!(ground.last(GUEST).unwrap(), (Credentials::SasToken(first), None), "{:?}", ground.kind);
        let second = token(GUEST, ground.now_secs() + 60).await;
        let (mut guest, _commands) = ground.login(&second).await.unwrap();
        ground.site.publish(&mut guest, "out", 3..6).await;
        ground.arrives(3..6).await;
        let newer = || ground.last(GUEST).unwrap().0 == Credentials::SasToken(second.clone());
        until("the newer token is upstream", newer).await;
        ground.site.delivered(QUEUE, 6).await;
    }
}

#[tokio::test]
async fn a_guest_whose_token_expired_waits_alone_until_it_comes_with_a_newer_one() {
    for kind in KINDS {
        let ground = Ground::new(kind).await;
        let first = token(GUEST, ground.now_secs()).await;
        let (mut guest, _commands) = ground.login(&first).await.unwrap();
        ground.site.publish(&mut guest, "out", 0..1).await;
        ground.arrives(0..1).await;
        let Ground { kind, cloud, site, server, tls, now_secs } = ground;
        let port = server.stop().await;
        now_secs.fetch_add(7_200, Ordering::SeqCst);
        site.publish(&mut guest, "out", 1..3).await;
        let before = cloud.state.lock().logins.len();
        let server = head(&kind, port, tls.clone(), &cloud).await;
        let ground = Ground { kind, cloud, site, server, tls, now_secs };
        until("the guest is parked", || ground.site.upstream().parked_senders == 1).await;
        {
            let state = ground.cloud.state.lock();
            assert!(state.logins[before..].iter().all(|login| login.identity != identity(GUEST)));
        }
        assert_eq!(ground.site.ledger(QUEUE).queued, 2, "not in scope, and yet not given up");
        // The old token lets in no more.
        assert!(matches!(ground.login(&first).await, Err(LoginError::Refused(_))));
        let second = token(GUEST, ground.now_secs()).await;
        let (_guest, _commands) = ground.login(&second).await.unwrap();
        ground.arrives(1..3).await;
        ground.site.delivered(QUEUE, 3).await;
    }
}

#[tokio::test]
async fn a_guest_that_the_upstream_does_not_let_in_any_more_is_closed_and_judged_anew() {
    for kind in KINDS {
        let ground = Ground::new(kind).await;
        let first = token(GUEST, ground.now_secs()).await;
        let (mut guest, mut commands) = ground.login(&first).await.unwrap();
        ground.site.publish(&mut guest, "out", 0..1).await;
        ground.arrives(0..1).await;
        let refusal = LoginError::Refused("disabled".into());
        ground.cloud.state.lock().refused.insert(identity(GUEST), refusal);
        ground.cloud.command(GUEST, Command::Close(CloseReason::Unauthorized)).await;
        ground.site.publish(&mut guest, "out", 1..2).await;
        let closed = tokio::time::timeout(DEADLINE, async {
            while let Some(command) = commands.recv().await {
                if let Command::Close(reason) = command {
                    return Some(reason);
                }
            }
            None
        });
        assert_eq!(closed.await.unwrap(), Some(CloseReason::Unauthorized), "{:?}", ground.kind);
        assert!(matches!(ground.login(&first).await, Err(LoginError::Refused(_))));
        ground.cloud.state.lock().refused.clear();
        let second = token(GUEST, ground.now_secs() + 1).await;
        let (_guest, _commands) = ground.login(&second).await.unwrap();
        ground.arrives(1..2).await;
        ground.site.delivered(QUEUE, 2).await;
    }
}
