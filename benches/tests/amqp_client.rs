//! The generator's AMQP clients against a hub in memory: many identities on one connection, nothing lost, order kept.

use std::sync::Arc;
use std::time::Duration;

use edgehub_benches::amqp::{Access, AmqpClient, Node};
use edgehub_benches::arrivals::Arrivals;
use edgehub_benches::client::{ClientError, Clock, Publishing};
use edgehub_broker::amqp::Role;
use edgehub_broker::backend::Login;
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::head::amqp::{self, AmqpLimits};
use edgehub_broker::head::mqtt::Peer;
use edgehub_broker::hub::{Authenticating, Authenticator, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::Identity;
use edgehub_routing::{HubConfig, OverflowPolicy};
use edgehub_storage::{Store, StoreLimits, StoreOptions};
use serde_json::json;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::timeout;

const DEVICES: usize = 20;
const MESSAGES_EACH: u64 = 300;
const DEADLINE: Duration = Duration::from_secs(120);

/// Everybody is who they say.
struct Trusting;

impl Authenticator for Trusting {
    fn authenticate<'a>(&'a self, _login: &'a Login) -> Authenticating<'a> {
        Box::pin(async { Ok(()) })
    }
}

fn hub() -> Hub {
    let options = HubOptions {
        edge_device: Identity::device("edge1").expect("a valid id"),
        clients_max: 64,
        module_pump: ModulePumpOptions::default(),
        upstream: None,
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let store = Store::open(StoreOptions::memory()).expect("an empty store");
    let hub = Hub::start(options, store, Arc::new(Trusting), Handle::current());
    let config = HubConfig::parse(&json!({
        "schemaVersion": "1.1",
        "routes": {"r": "FROM /messages/* INTO BrokeredEndpoint(\"/modules/receiver/inputs/in1\")"},
        "storeAndForwardConfiguration": {"timeToLiveSecs": 3600},
    }));
    assert!(hub.apply(&config.expect("valid")).expect("room for one queue").is_complete());
    hub
}

async fn client(hub: &Hub, identities: &[String], role: Role) -> Result<AmqpClient, ClientError> {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let peer =
        Peer { address: None, certificates: Vec::new(), accepted_at: std::time::Instant::now().into() };
    tokio::spawn(amqp::serve(theirs, hub.clone(), AmqpLimits::default(), peer, std::future::pending()));
    let node = |identity: &String| {
        let resource = format!("host%2Fdevices%2F{}", identity.replace('/', "%2F"));
        let token = format!("SharedAccessSignature sr={resource}&sig=c2lnbmF0dXJl&se=4102444800");
        Node {
            address: format!("amqps://host/devices/{identity}/messages/events"),
            token: Some((format!("host/devices/{identity}"), token)),
        }
    };
    let nodes: Vec<Node> = identities.iter().map(node).collect();
    let access = Access::Tokens("host".to_owned());
    let login = AmqpClient::login_over(Box::new(ours), &access, &nodes, role);
    timeout(DEADLINE, login).await.expect("a login in time")
}

fn plans(window: Option<u16>) -> Vec<Publishing> {
    (0..DEVICES)
        .map(|number| Publishing {
            publisher: number as u32,
            topic: String::new(),
            output: None,
            messages: MESSAGES_EACH,
            payload_bytes: 64,
            window,
            rate: None,
        })
        .collect()
}

async fn nothing_is_lost(window: Option<u16>) {
    let hub = hub();
    let all = DEVICES as u64 * MESSAGES_EACH;
    let receiver = client(&hub, &["edge1/modules/receiver".to_owned()], Role::Receiver).await;
    let receiver = receiver.expect("the module's login");
    let devices: Vec<String> = (0..DEVICES).map(|number| format!("leaf{number}")).collect();
    let sender = client(&hub, &devices, Role::Sender).await.expect("the devices' login");
    let (stop, stopped) = watch::channel(false);
    let clock = Arc::new(Clock::default());
    let sending = tokio::spawn(sender.publish(plans(window), clock.clone(), stopped.clone()));
    let receiving = receiver.receive(Arrivals::new(DEVICES, MESSAGES_EACH), all, clock, stopped);
    let received = timeout(DEADLINE, receiving).await.expect("all messages in time");
    stop.send_replace(true);
    let sent = sending.await.expect("the sender ends");
    assert_eq!((sent.failure, received.failure), (None, None));
    assert_eq!(sent.sent, all);
    let seen = &received.arrivals;
    assert_eq!((seen.unique, seen.duplicates, seen.order_breaks, seen.foreign), (all, 0, 0, 0));
    if window.is_some() {
        assert_eq!((sent.acknowledged, sent.order_breaks), (all, 0));
    }
}

#[tokio::test]
async fn identities_that_share_a_connection_send_unsettled_within_their_windows() {
    nothing_is_lost(Some(16)).await;
}

#[tokio::test]
async fn identities_that_share_a_connection_send_settled() {
    nothing_is_lost(None).await;
}

#[tokio::test]
async fn a_refused_login_is_told() {
    let hub = hub();
    let Err(error) = client(&hub, &["edge1/modules/a/b".to_owned()], Role::Sender).await else {
        panic!("an address that names nothing was accepted")
    };
    assert!(matches!(error, ClientError::Ended(_)), "{error}");
}
