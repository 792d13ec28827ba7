//! Open connections end when what they proved no longer holds: with the real cache and a clock of the test's.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::backend::{
    Backend, CloseReason, Command, CommandReceiver, Credentials, Login, LoginError, Mailbox, Protocol,
};
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::hub::{
    Authenticating, Authenticator, ControlOptions, Hub, HubClient, HubOptions, Standing,
};
use edgehub_broker::identity::{
    Authentication, FullScope, Hosts, Identity, RefreshOptions, ScopeCache, ScopeError, ScopeRefresher,
    ScopeSource, ServiceIdentity, Status, SymmetricKey, TokenSource, unix_now_secs,
};
use edgehub_routing::OverflowPolicy;
use edgehub_storage::{Store, StoreLimits, StoreOptions};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

const HOST: &str = "hub1.example.net";
/// Life of the tokens here, and how long after it they still count.
const HOLDS_SECS: u64 = 3_600 + 300;

type Records = Arc<Mutex<BTreeMap<Identity, ServiceIdentity>>>;

struct Registry(Records);

impl ScopeSource for Registry {
    async fn one(&self, identity: &Identity, _: &str) -> Result<Vec<ServiceIdentity>, ScopeError> {
        Ok(self.0.lock().get(identity).cloned().into_iter().collect())
    }

    async fn all(&self) -> Result<FullScope, ScopeError> {
        Ok(FullScope { identities: self.0.lock().values().cloned().collect(), complete: true })
    }
}

struct Site {
    hub: Hub,
    refresher: Arc<ScopeRefresher<Registry>>,
    records: Records,
}

struct Client {
    _client: HubClient,
    mailbox: CommandReceiver,
}

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

fn key(text: &str) -> SymmetricKey {
    SymmetricKey::from_bytes(format!("key {text}").into_bytes()).unwrap()
}

fn record(name: &str, edge: bool, parent: Option<&str>) -> ServiceIdentity {
    let scope = |device: &str| -> Arc<str> { format!("ms-azure-iot-edge://{device}-1").into() };
    ServiceIdentity {
        identity: id(name),
        authentication: Authentication::SymmetricKey { primary: Some(key(name)), secondary: None },
        status: Status::Enabled,
        edge,
        device_scope: if edge { Some(scope(name)) } else { parent.map(scope) },
        parent_scopes: parent.map(scope).into_iter().collect(),
        generation_id: "1".into(),
    }
}

async fn site() -> Site {
    let records = [
        record("top", true, None),
        record("top/mod", false, None),
        record("leaf1", false, Some("top")),
        record("leaf2", false, Some("top")),
        record("leaf2/mod", false, None),
        record("child", true, Some("top")),
        record("child/$edgeHub", false, None),
        record("below", false, Some("child")),
    ];
    let records: Records =
        Arc::new(Mutex::new(records.into_iter().map(|record| (record.identity.clone(), record)).collect()));
    let start = Instant::now();
    let start_secs = unix_now_secs();
    let refresher = ScopeRefresher::new(
        Arc::new(ScopeCache::new(&id("top"))),
        Registry(records.clone()),
        Hosts::new([HOST]),
        RefreshOptions::default(),
    )
    .with_clock(Arc::new(move || start_secs + start.elapsed().as_secs() as i64));
    let refresher = Arc::new(refresher);
    refresher.refresh_all().await.unwrap();
    let hub = hub_with(refresher.clone());
    Site { hub, refresher, records }
}

fn hub_with(authenticator: Arc<dyn Authenticator>) -> Hub {
    let options = HubOptions {
        edge_device: id("top"),
        clients_max: 100,
        module_pump: ModulePumpOptions::default(),
        upstream: None,
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let store = Store::open(StoreOptions::memory()).unwrap();
    Hub::start(options, store, authenticator, tokio::runtime::Handle::current())
}

impl Site {
    async fn try_connect(&self, name: &str, chain: Option<&str>) -> Result<Client, LoginError> {
        let signer = match chain {
            None => name.to_owned(),
            Some(chain) => format!("{}/$edgeHub", chain.rsplit(';').next().unwrap()),
        };
        let token = TokenSource::new(HOST, &id(&signer), Arc::new(key(&signer))).token().await.unwrap();
        let (sender, mailbox) = Mailbox::channel(64);
        let login = Login {
            identity: id(name),
            credentials: Credentials::SasToken(token),
            auth_chain: chain.map(Into::into),
            product_info: "".into(),
            model_id: None,
            protocol: Protocol::Mqtt,
            peer: None,
        };
        Ok(Client { _client: self.hub.login(login, sender).await?, mailbox })
    }

    async fn connect(&self, name: &str) -> Client {
        self.try_connect(name, None).await.unwrap()
    }

    /// Changes a record where the hub asks, and lets the hub ask.
    async fn change(&self, name: &str, change: impl FnOnce(&mut ServiceIdentity)) {
        change(self.records.lock().get_mut(&id(name)).unwrap());
        self.refresher.refresh_one(&id(name), "top").await.unwrap();
    }
}

impl Client {
    /// Waits for the end of the connection.
    async fn closed(&mut self) -> CloseReason {
        match timeout(Duration::from_secs(100_000), self.mailbox.recv()).await.unwrap() {
            Some(Command::Close(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    async fn stays(&mut self) {
        assert!(timeout(Duration::from_secs(10), self.mailbox.recv()).await.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn an_expired_token_ends_its_connection_in_time() {
    let site = site().await;
    let mut first = site.connect("leaf1").await;
    let start = Instant::now();
    tokio::time::sleep(Duration::from_secs(100)).await;
    // Tokens of this site are made by the system's clock, which stands still here.
    let mut second = site.connect("leaf2").await;
    for client in [&mut first, &mut second] {
        assert_eq!(client.closed().await, CloseReason::Unauthorized);
        let held = start.elapsed().as_secs();
        assert!((HOLDS_SECS..HOLDS_SECS + 4).contains(&held), "{held}");
    }
    // A second of the system's clock may have begun since.
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(matches!(site.try_connect("leaf1", None).await, Err(LoginError::Refused(_))));
}

#[tokio::test(start_paused = true)]
async fn a_renewed_token_holds_on_under_take_over() {
    let site = site().await;
    let mut old = site.connect("leaf1").await;
    let mut new = site.connect("leaf1").await;
    assert_eq!(old.closed().await, CloseReason::TakenOver);
    drop(old);
    new.stays().await;
    assert_eq!(site.hub.status().clients.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_identity_ends_its_connection_at_once() {
    for (what, name, changed) in [
        ("disabled", "leaf1", "leaf1"),
        ("device disabled", "leaf2/mod", "leaf2"),
        ("key rolled", "leaf1", "leaf1"),
        ("key rolled", "top/mod", "top/mod"),
        ("no longer by key", "leaf1", "leaf1"),
        ("removed", "leaf1", "leaf1"),
        ("removed", "top/mod", "top/mod"),
    ] {
        let site = site().await;
        let mut client = site.connect(name).await;
        let mut other = site.connect("leaf2").await;
        let start = Instant::now();
        if what == "removed" {
            site.records.lock().remove(&id(changed));
            site.refresher.refresh_one(&id(changed), "top").await.unwrap();
        } else {
            site.change(changed, |record| match what {
                "key rolled" => {
                    let primary = Some(key("another"));
                    record.authentication = Authentication::SymmetricKey { primary, secondary: None };
                }
                "no longer by key" => record.authentication = Authentication::CertificateAuthority,
                _ => record.status = Status::Disabled,
            })
            .await;
        }
        assert_eq!(client.closed().await, CloseReason::Unauthorized, "{what} {name}");
        assert!(start.elapsed().as_secs() < 5, "{what} {name}: {:?}", start.elapsed());
        if changed != "leaf2" {
            other.stays().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_stays_as_the_second_one_ends_nothing() {
    let site = site().await;
    let mut client = site.connect("leaf1").await;
    site.change("leaf1", |record| {
        let (primary, secondary) = (Some(key("another")), Some(key("leaf1")));
        record.authentication = Authentication::SymmetricKey { primary, secondary };
    })
    .await;
    client.stays().await;
}

#[tokio::test(start_paused = true)]
async fn a_disabled_child_takes_those_with_it_for_whom_it_speaks() {
    let site = site().await;
    let mut below = site.try_connect("below", Some("below;child")).await.unwrap();
    below.stays().await;
    site.change("child", |record| record.status = Status::Disabled).await;
    assert_eq!(below.closed().await, CloseReason::Unauthorized);
}

#[tokio::test(start_paused = true)]
async fn what_was_not_announced_is_found_within_five_minutes() {
    let site = site().await;
    let mut client = site.connect("leaf1").await;
    let start = Instant::now();
    let disabled = ServiceIdentity { status: Status::Disabled, ..record("leaf1", false, Some("top")) };
    site.refresher.cache().update([disabled]).unwrap();
    assert_eq!(client.closed().await, CloseReason::Unauthorized);
    assert!((200..=301).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

/// Tokens that say when they end, in seconds of a clock that starts at 0; others are bad.
struct Spoken(Instant);

impl Authenticator for Spoken {
    fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a> {
        Box::pin(async move {
            match self.standing(login) {
                Standing::Holds { .. } => Ok(()),
                Standing::Lost(reason) => Err(LoginError::Refused(reason)),
            }
        })
    }

    fn standing(&self, login: &Login) -> Standing {
        let Credentials::SasToken(token) = &login.credentials else { return Standing::Lost("none".into()) };
        match token.parse() {
            Ok(until_secs) if until_secs > self.now_secs() => {
                Standing::Holds { until_secs: Some(until_secs) }
            }
            _ => Standing::Lost("ended".into()),
        }
    }

    fn now_secs(&self) -> i64 {
        self.0.elapsed().as_secs() as i64
    }
}

#[tokio::test(start_paused = true)]
async fn a_newer_token_takes_the_place_of_the_one_before() {
    let start = Instant::now();
    let hub = hub_with(Arc::new(Spoken(start)));
    let login = |token: &str| Login {
        identity: id("leaf1"),
        credentials: Credentials::SasToken(token.into()),
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Amqp,
        peer: None,
    };
    let (sender, mailbox) = Mailbox::channel(64);
    let mut client = Client { _client: hub.login(login("100"), sender).await.unwrap(), mailbox };
    assert_eq!(hub.reauthenticate(&client._client, login("1000")).await, Ok(()));
    // A bad one changes nothing here; the head ends the client.
    let refused = hub.reauthenticate(&client._client, login("bad")).await;
    assert!(matches!(refused, Err(LoginError::Refused(_))));
    assert_eq!(client.closed().await, CloseReason::Unauthorized);
    assert!((1_000..1_004).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());

    // What was taken over has nothing to prove any more.
    let (sender, mailbox) = Mailbox::channel(64);
    let mut old = Client { _client: hub.login(login("2000"), sender).await.unwrap(), mailbox };
    let (sender, mailbox) = Mailbox::channel(64);
    let mut new = Client { _client: hub.login(login("3000"), sender).await.unwrap(), mailbox };
    assert_eq!(old.closed().await, CloseReason::TakenOver);
    assert_eq!(hub.reauthenticate(&old._client, login("9000")).await, Ok(()));
    assert_eq!(new.closed().await, CloseReason::Unauthorized);
    assert!((3_000..3_004).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}
