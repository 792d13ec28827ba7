//! The whole way of a message inside one process: bytes of MQTT or AMQP in, decision, store, pump, bytes out, both
//! acknowledgements. Sockets are replaced by memory, so what is left is the hub's own work and the generator's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use edgehub_benches::amqp::{Access, AmqpClient, Node};
use edgehub_benches::arrivals::Arrivals;
use edgehub_benches::client::{Client, Clock, Publishing};
use edgehub_broker::amqp::Role;
use edgehub_broker::backend::Login;
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::head::amqp::{self, AmqpLimits};
use edgehub_broker::head::mqtt::{self, MqttLimits, Peer};
use edgehub_broker::hub::{Authenticating, Authenticator, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::Identity;
use edgehub_routing::{HubConfig, OverflowPolicy};
use edgehub_storage::{Durability, Store, StoreLimits, StoreOptions};
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::sync::watch;

const BODY_BYTES: usize = 256;
/// Messages of one iteration.
const MESSAGES: u64 = 1024;
const PIPE_BYTES: usize = 256 * 1024;
const ACK_TIMEOUT: Duration = Duration::from_secs(30);

/// Everybody is who they say.
struct Trusting;

impl Authenticator for Trusting {
    fn authenticate<'a>(&'a self, _login: &'a Login) -> Authenticating<'a> {
        Box::pin(async { Ok(()) })
    }
}

async fn client(hub: &Hub, client_id: &str, filter: Option<&str>) -> Client {
    let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
    let peer = Peer { address: None, certificates: Vec::new(), accepted_at: Instant::now().into() };
    tokio::spawn(mqtt::serve(theirs, hub.clone(), MqttLimits::default(), peer, std::future::pending()));
    let user_name = format!("host/{client_id}/?api-version=2021-04-12");
    let credentials = Some((user_name.as_str(), "token"));
    Client::login_over(Box::new(ours), client_id, credentials, filter.map(|filter| (filter, 1)))
        .await
        .expect("a login")
}

/// A client that sends or receives at a node by a token, which everybody has.
async fn amqp_client(hub: &Hub, identity: &str, role: Role) -> AmqpClient {
    let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
    let peer = Peer { address: None, certificates: Vec::new(), accepted_at: Instant::now().into() };
    tokio::spawn(amqp::serve(theirs, hub.clone(), AmqpLimits::default(), peer, std::future::pending()));
    let address = format!("amqps://host/devices/{identity}/messages/events");
    let resource = format!("host%2Fdevices%2F{}", identity.replace('/', "%2F"));
    let token = format!("SharedAccessSignature sr={resource}&sig=c2lnbmF0dXJl&se=4102444800");
    let node = Node { address, token: Some((format!("host/devices/{identity}"), token)) };
    let access = Access::Tokens("host".to_owned());
    AmqpClient::login_over(Box::new(ours), &access, &[node], role).await.expect("a login")
}

async fn carry_over_amqp(hub: &Hub, turns: u64) -> Duration {
    let messages = turns * MESSAGES;
    let receiver = amqp_client(hub, "edge1/modules/receiver", Role::Receiver).await;
    let sender = amqp_client(hub, "leaf1", Role::Sender).await;
    let (stop, stopped) = watch::channel(false);
    let clock = Arc::new(Clock::default());
    let begin = Instant::now();
    let sent = tokio::spawn(sender.publish(vec![publishing(messages)], clock.clone(), stopped.clone()));
    let received = receiver.receive(Arrivals::new(1, messages), messages, clock, stopped).await;
    let elapsed = begin.elapsed();
    stop.send_replace(true);
    let sent = sent.await.expect("the publisher ends");
    assert_eq!((sent.failure, received.failure), (None, None));
    assert_eq!((received.arrivals.unique, received.arrivals.order_breaks), (messages, 0));
    elapsed
}

fn publishing(messages: u64) -> Publishing {
    Publishing {
        publisher: 0,
        topic: "devices/leaf1/messages/events/".to_owned(),
        output: None,
        messages,
        payload_bytes: BODY_BYTES,
        window: Some(64),
        rate: None,
    }
}

async fn carry(hub: &Hub, turns: u64) -> Duration {
    let messages = turns * MESSAGES;
    let receiver = client(hub, "edge1/receiver", Some("devices/edge1/modules/receiver/inputs/#")).await;
    let sender = client(hub, "leaf1", None).await;
    let (stop, stopped) = watch::channel(false);
    let clock = Arc::new(Clock::default());
    let begin = Instant::now();
    let sent = tokio::spawn(sender.publish(publishing(messages), clock.clone(), stopped.clone()));
    let received = receiver.receive(Arrivals::new(1, messages), messages, clock, stopped).await;
    let elapsed = begin.elapsed();
    stop.send_replace(true);
    let sent = sent.await.expect("the publisher ends");
    assert_eq!((sent.failure, received.failure), (None, None));
    assert_eq!((received.arrivals.unique, received.arrivals.order_breaks), (messages, 0));
    elapsed
}

/// A hub with an empty store: what a receiver has not acknowledged at the end of one run must not come in the next.
fn hub(durability: Option<Durability>) -> (Hub, TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let options = match durability {
        None => StoreOptions::memory(),
        Some(durability) => StoreOptions { durability, ..StoreOptions::disk(folder.path()) },
    };
    let store = Store::open(options).expect("an empty folder");
    let options = HubOptions {
        edge_device: Identity::device("edge1").expect("a valid id"),
        clients_max: 16,
        module_pump: ModulePumpOptions {
            window: 64,
            ack_timeout: ACK_TIMEOUT,
            ..ModulePumpOptions::default()
        },
        upstream: None,
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let hub = Hub::start(options, store, Arc::new(Trusting), Handle::current());
    let config = HubConfig::parse(&json!({
        "schemaVersion": "1.1",
        "routes": {"r": "FROM /messages/* INTO BrokeredEndpoint(\"/modules/receiver/inputs/in1\")"},
        "storeAndForwardConfiguration": {"timeToLiveSecs": 3600},
    }));
    assert!(hub.apply(&config.expect("valid")).expect("room for one queue").is_complete());
    (hub, folder)
}

fn whole_way(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("whole_way");
    group.throughput(Throughput::Elements(MESSAGES));
    for (name, durability) in
        [("memory", None), ("os", Some(Durability::Os)), ("sync", Some(Durability::Sync))]
    {
        for protocol in ["mqtt", "amqp"] {
            group.bench_function(format!("{protocol} {name}"), |bencher| {
                bencher.iter_custom(|turns| {
                    runtime.block_on(async {
                        let (hub, _folder) = hub(durability);
                        let elapsed = match protocol {
                            "mqtt" => carry(&hub, turns).await,
                            _ => carry_over_amqp(&hub, turns).await,
                        };
                        assert_eq!(hub.status().gap, 0);
                        elapsed
                    })
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, whole_way);
criterion_main!(benches);
