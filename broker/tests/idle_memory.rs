//! What an idle connection keeps in memory: bytes that its tasks hold, counted by the allocator.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::backend::Login;
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::head::mqtt::{self, MqttLimits, Peer};
use edgehub_broker::hub::{Authenticating, Authenticator, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::Identity;
use edgehub_broker::wake::WakeRelay;
use edgehub_routing::OverflowPolicy;
use edgehub_storage::{Store, StoreLimits, StoreOptions};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Connections that are counted together, so that what tables reserve falls on many.
const CONNECTIONS: usize = 256;

/// What one may keep: its task, its socket's registration, its mailbox, and what the hub knows of it. Memory of the
/// kernel, series of metrics, and what the allocator adds do not count here.
const BYTES_MAX: i64 = 7_000;

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
        clients_max: 2 * CONNECTIONS,
        module_pump: ModulePumpOptions::default(),
        upstream: None,
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let store = Store::open(StoreOptions::memory()).expect("a store in memory");
    Hub::start(options, store, Arc::new(Trusting), Handle::current())
}

/// Logs in as `load-d<number>` and sends one message; returns when both are acknowledged.
fn client(address: SocketAddr, number: usize) -> StdTcpStream {
    let id = format!("load-d{number:04}");
    let user = format!("host/{id}/?api-version=2021-04-12");
    let token = "SharedAccessSignature sr=x".repeat(6);
    let text = |text: &str| [&(text.len() as u16).to_be_bytes(), text.as_bytes()].concat();
    let body = [&b"\0\x04MQTT\x04\xc2\0\0"[..], &text(&id), &text(&user), &text(&token)].concat();
    let mut packet = vec![0x10, body.len() as u8 | 0x80, (body.len() >> 7) as u8];
    packet.extend(body);
    let publish = [&text(&format!("devices/{id}/messages/events/"))[..], &[0, 1], &[b'x'; 40]].concat();
    packet.extend([0x32, publish.len() as u8]);
    packet.extend(publish);
    let mut stream = StdTcpStream::connect(address).expect("the listener is open");
    stream.write_all(&packet).expect("the hub reads");
    let mut answers = [0; 8];
    stream.read_exact(&mut answers).expect("CONNACK and PUBACK");
    assert_eq!(answers, [0x20, 2, 0, 0, 0x40, 2, 0, 1]);
    stream
}

#[test]
fn an_idle_connection_keeps_few_bytes() {
    let relay = WakeRelay::new();
    relay.adopt_thread();
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = relay.install(&mut builder).enable_all().build().expect("a runtime");
    let (hub, listener) =
        runtime.block_on(async { (hub(), TcpListener::bind("127.0.0.1:0").await.expect("a free port")) });
    let address = listener.local_addr().expect("it is bound");
    let mut tasks = JoinSet::new();
    let mut serve = |first: usize, count: usize| {
        let clients = std::thread::spawn(move || {
            (first..first + count).map(|n| client(address, n)).collect::<Vec<_>>()
        });
        runtime.block_on(async {
            for _ in 0..count {
                let (stream, peer) = listener.accept().await.expect("a client");
                let peer =
                    Peer { address: Some(peer), certificates: Vec::new(), accepted_at: Instant::now() };
                let shutdown = std::future::pending();
                let task = mqtt::serve(stream, hub.clone(), MqttLimits::default(), peer, shutdown);
                tasks.spawn(relay.wrap(task));
            }
            while !clients.is_finished() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        clients.join().expect("all log in")
    };
    // What is made once, and the tables' first growth.
    let warm = serve(0, CONNECTIONS);
    let mut open = Vec::new();
    let counted = allocation_counter::measure(|| open = serve(CONNECTIONS, CONNECTIONS));
    let each = counted.bytes_current / CONNECTIONS as i64;
    println!(
        "an idle connection keeps {each} bytes in {} pieces",
        counted.count_current / CONNECTIONS as i64
    );
    drop((warm, open));
    assert!(each <= BYTES_MAX, "an idle connection keeps {each} bytes; the limit is {BYTES_MAX}");
}
