//! Four hundred days of a hub that nobody touches, by a clock of the test's: its own tokens, those of its clients,
//! certificates that are renewed, and refreshes of the scope, with outages in between.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, CloseReason, Command, CommandReceiver, Credentials, Login, LoginError, Mailbox, Protocol,
};
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::hub::{ControlOptions, Hub, HubClient, HubOptions};
use edgehub_broker::identity::{
    Authentication, Clock, FullScope, Hosts, Identity, OWN_TOKEN_LIFE_SECS, RefreshOptions, SasToken,
    ScopeCache, ScopeError, ScopeRefresher, ScopeSource, ServiceIdentity, Status, SymmetricKey, TokenSource,
};
use edgehub_routing::OverflowPolicy;
use edgehub_storage::{Store, StoreLimits, StoreOptions};
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tokio::time::Instant;

const HOST: &str = "hub1.example.net";
const DAYS: u64 = 400;
const DAY_SECS: u64 = 86_400;
/// How far the clock goes at a time. What a timer does is done within two steps.
const STEP_SECS: u64 = 1_800;
/// A client's token: its life, and how long after it still counts.
const CLIENT_TOKEN_SECS: i64 = 3_600;
const TOLERANCE_SECS: i64 = 300;
const CERTIFICATE_DAYS: u64 = 90;
/// Every thirtieth day the upstream is away for a day.
const OUTAGE_PERIOD_DAYS: u64 = 30;
const START_SECS: i64 = 1_790_000_000;

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

fn key(text: &str) -> SymmetricKey {
    SymmetricKey::from_bytes(format!("key {text}").into_bytes()).unwrap()
}

/// A cloud that lets the hub in by a valid token only.
struct Cloud {
    tokens: TokenSource,
    clock: Clock,
    records: Mutex<Vec<ServiceIdentity>>,
    away: AtomicBool,
    refreshes: AtomicU64,
    own_tokens: AtomicU64,
    last_expiry_secs: AtomicI64,
}

impl Cloud {
    async fn let_in(&self) -> Result<(), ScopeError> {
        if self.away.load(Ordering::Relaxed) {
            return Err(ScopeError::Unreachable("cloud".into(), "it is away".into()));
        }
        let now_secs = (self.clock)();
        let text = self.tokens.token().await?;
        let token = SasToken::parse(&text, now_secs).unwrap();
        token.check_signature([&key("top/$edgeHub")]).unwrap();
        let left_secs = token.expires_at_secs() - now_secs;
        assert!(left_secs >= OWN_TOKEN_LIFE_SECS / 2, "a token with {left_secs} s left is used");
        if self.last_expiry_secs.swap(token.expires_at_secs(), Ordering::Relaxed) != token.expires_at_secs() {
            self.own_tokens.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The cloud as the refresher asks it.
struct Asked(Arc<Cloud>);

impl ScopeSource for Asked {
    async fn one(&self, identity: &Identity, _: &str) -> Result<Vec<ServiceIdentity>, ScopeError> {
        self.0.let_in().await?;
        let records = self.0.records.lock();
        Ok(records.iter().filter(|record| record.identity == *identity).cloned().collect())
    }

    async fn all(&self) -> Result<FullScope, ScopeError> {
        self.0.let_in().await?;
        self.0.refreshes.fetch_add(1, Ordering::Relaxed);
        Ok(FullScope { identities: self.0.records.lock().clone(), complete: true })
    }
}

fn record(name: &str, edge: bool, authentication: Authentication) -> ServiceIdentity {
    let scope: Arc<str> = "ms-azure-iot-edge://top-1".into();
    ServiceIdentity {
        identity: id(name),
        authentication,
        status: Status::Enabled,
        edge,
        device_scope: Some(scope.clone()),
        parent_scopes: if edge { Vec::new() } else { vec![scope] },
        generation_id: "1".into(),
    }
}

fn by_key(name: &str) -> Authentication {
    Authentication::SymmetricKey { primary: Some(key(name)), secondary: None }
}

/// A certificate of a device, and its thumbprint.
struct Shown {
    certificate: Bytes,
    thumbprint: Arc<str>,
    until_secs: i64,
}

fn certificate(from_secs: i64) -> Shown {
    let until_secs = from_secs + (CERTIFICATE_DAYS * DAY_SECS) as i64;
    let mut params = CertificateParams::new(vec!["leaf2".to_owned()]).unwrap();
    params.not_before = OffsetDateTime::from_unix_timestamp(from_secs).unwrap();
    params.not_after = OffsetDateTime::from_unix_timestamp(until_secs).unwrap();
    let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
    let digest = Sha256::digest(certificate.der());
    let thumbprint: String = digest.iter().map(|byte| format!("{byte:02X}")).collect();
    let certificate = Bytes::copy_from_slice(certificate.der());
    Shown { certificate, thumbprint: thumbprint.into(), until_secs }
}

/// A client that connects again whenever it is closed, with new credentials.
struct Client {
    name: &'static str,
    open: Option<(HubClient, CommandReceiver)>,
    logins: u64,
    until_secs: i64,
}

impl Client {
    fn new(name: &'static str) -> Self {
        Self { name, open: None, logins: 0, until_secs: 0 }
    }

    /// Looks whether the hub has closed the connection; it must have when the credentials hold no longer.
    fn look(&mut self, now_secs: i64) {
        let Some((_, mailbox)) = &mut self.open else { return };
        match mailbox.try_recv() {
            Ok(Command::Close(reason)) => {
                assert_eq!(reason, CloseReason::Unauthorized);
                assert!(now_secs > self.until_secs, "{} is closed too early", self.name);
                self.open = None;
            }
            Ok(other) => panic!("{other:?}"),
            Err(_) => {
                let late_secs = now_secs - self.until_secs;
                assert!(late_secs <= 3 * STEP_SECS as i64, "{} is open {late_secs} s too long", self.name);
            }
        }
    }

    async fn login(
        &mut self,
        hub: &Hub,
        credentials: Credentials,
        until_secs: i64,
    ) -> Result<(), LoginError> {
        let (sender, mailbox) = Mailbox::channel(64);
        let login = Login {
            identity: id(self.name),
            credentials,
            auth_chain: None,
            product_info: "".into(),
            model_id: None,
            protocol: Protocol::Mqtt,
            peer: None,
        };
        let client = hub.login(login, sender).await?;
        self.open = Some((client, mailbox));
        self.logins += 1;
        self.until_secs = until_secs;
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn four_hundred_days_of_tokens_certificates_and_refreshes() {
    let start = Instant::now();
    let clock: Clock = Arc::new(move || START_SECS + start.elapsed().as_secs() as i64);
    let hub_key = Arc::new(key("top/$edgeHub"));
    let mut shown = certificate(START_SECS - 10);
    let thumbprints = |first: &Shown, second: Option<&Shown>| Authentication::CertificateThumbprint {
        primary: Some(first.thumbprint.clone()),
        secondary: second.map(|second| second.thumbprint.clone()),
    };
    let cloud = Arc::new(Cloud {
        tokens: TokenSource::new(HOST, &id("top/$edgeHub"), hub_key).with_clock(clock.clone()),
        clock: clock.clone(),
        records: Mutex::new(vec![
            record("top", true, by_key("top")),
            record("leaf1", false, by_key("leaf1")),
            record("leaf2", false, thumbprints(&shown, None)),
        ]),
        away: AtomicBool::new(false),
        refreshes: AtomicU64::new(0),
        own_tokens: AtomicU64::new(0),
        last_expiry_secs: AtomicI64::new(0),
    });
    let refresher = ScopeRefresher::new(
        Arc::new(ScopeCache::new(&id("top"))),
        Asked(cloud.clone()),
        Hosts::new([HOST]),
        RefreshOptions::default(),
    );
    let refresher = Arc::new(refresher.with_clock(clock.clone()));
    refresher.refresh_all().await.unwrap();
    let options = HubOptions {
        edge_device: id("top"),
        clients_max: 10,
        module_pump: ModulePumpOptions::default(),
        upstream: None,
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let store = Store::open(StoreOptions::memory()).unwrap();
    let hub = Hub::start(options, store, refresher.clone(), tokio::runtime::Handle::current());
    let running = refresher.clone();
    let run = tokio::spawn(async move { running.run().await });

    let (mut by_token, mut by_certificate) = (Client::new("leaf1"), Client::new("leaf2"));
    let mut next: Option<Shown> = None;
    for step in 0..DAYS * DAY_SECS / STEP_SECS {
        let now_secs = clock();
        let day = step * STEP_SECS / DAY_SECS;
        cloud.away.store(day % OUTAGE_PERIOD_DAYS == OUTAGE_PERIOD_DAYS - 1, Ordering::Relaxed);
        by_token.look(now_secs);
        if by_token.open.is_none() {
            let tokens = TokenSource::new(HOST, &id("leaf1"), Arc::new(key("leaf1")));
            let text = tokens.with_clock(clock.clone()).token().await.unwrap();
            let until_secs = now_secs + CLIENT_TOKEN_SECS + TOLERANCE_SECS;
            by_token.login(&hub, Credentials::SasToken(text), until_secs).await.unwrap();
        }
        // Ten days before its end the next certificate is registered beside the one in use.
        let left_secs = shown.until_secs - now_secs;
        if next.is_none() && left_secs < 10 * DAY_SECS as i64 {
            let newer = certificate(now_secs);
            cloud.records.lock()[2].authentication = thumbprints(&shown, Some(&newer));
            next = Some(newer);
        }
        by_certificate.look(now_secs);
        if by_certificate.open.is_none() {
            shown = next.take().unwrap_or(shown);
            let credentials = Credentials::Certificate(vec![shown.certificate.clone()]);
            by_certificate.login(&hub, credentials, shown.until_secs).await.unwrap();
        }
        tokio::time::advance(Duration::from_secs(STEP_SECS)).await;
        // Whoever was woken does what it has to do.
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
    }
    run.abort();

    let (refreshes, own_tokens) =
        (cloud.refreshes.load(Ordering::Relaxed), cloud.own_tokens.load(Ordering::Relaxed));
    let hours = DAYS * 24;
    let outage_hours = DAYS / OUTAGE_PERIOD_DAYS * 24;
    assert!(refreshes > (hours - outage_hours) * 8 / 10 && refreshes < hours * 2, "{refreshes} refreshes");
    assert!(own_tokens > hours / 2 && own_tokens <= refreshes + 10, "{own_tokens} tokens of the hub");
    assert!(by_token.logins > hours * 3 / 10, "{} logins by token", by_token.logins);
    let certificates = DAYS / CERTIFICATE_DAYS;
    assert!(by_certificate.logins > certificates, "{} logins by certificate", by_certificate.logins);
    assert_eq!(hub.status().clients.len(), 2);
}
