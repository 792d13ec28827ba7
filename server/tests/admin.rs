//! The operator's socket: golden answers, nothing without `apply`, bounds, and what must never be shown.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub::admin::IDS_MAX;
use edgehub::admin::client::{AdminClient, AdminError};
use edgehub::admin::clients::Kick;
use edgehub::admin::request::{Letters, Page, Purge, Request, Select};
use edgehub::admin::server;
use edgehub::admin::socket::AdminListener;
use edgehub::admin::tap::{TapLine, TapOrder};
use edgehub::admin::verbs::Verbs;
use edgehub_broker::backend::{Backend, Command, Credentials, Login, Mailbox, Protocol};
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::hub::{Authenticating, Authenticator, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, PropertyName, Sender, SystemProperty};
use edgehub_routing::{HubConfig, OverflowPolicy};
use edgehub_storage::clock::ManualTimeSource;
use edgehub_storage::{
    AppendRequest, DeadLetterReason, Offset, Overflow, Queue, Record, Store, StoreLimits, StoreOptions,
    Target, Ttl,
};
use serde_json::{Value, json};
use uuid::Uuid;

const ROUTED: &str = "edge1/filter/in1";
const ORPHAN: &str = "edge1/gone/in1";
const START_MS: i64 = 1_800_000_000_000;

struct Trusting;

impl Authenticator for Trusting {
    fn authenticate<'a>(&'a self, _: &'a Login) -> Authenticating<'a> {
        Box::pin(async { Ok(()) })
    }
}

struct Setup {
    hub: Hub,
    store: Store,
    time: Arc<ManualTimeSource>,
    client: AdminClient,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

/// A hub with one route, and its socket.
async fn setup() -> Setup {
    let time = Arc::new(ManualTimeSource::new(START_MS));
    let store = Store::open(StoreOptions { time: time.clone(), ..StoreOptions::memory() }).unwrap();
    let options = HubOptions {
        edge_device: Identity::device("edge1").unwrap(),
        clients_max: 4,
        module_pump: ModulePumpOptions::default(),
        upstream: None,
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let hub = Hub::start(options, store.clone(), Arc::new(Trusting), tokio::runtime::Handle::current());
    let route = r#"FROM /messages/* INTO BrokeredEndpoint("/modules/filter/inputs/in1")"#;
    let config = json!({
        "schemaVersion": "1.1",
        "routes": { "toFilter": route },
        "storeAndForwardConfiguration": { "timeToLiveSecs": 3600 }
    });
    hub.apply(&HubConfig::parse(&config).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let listener = AdminListener::bind(&path).await.unwrap();
    tokio::spawn(server::serve(listener, Arc::new(Verbs::new(hub.clone()))));
    Setup { hub, store, time, client: AdminClient::new(&path), path, _folder: folder }
}

fn message(number: u128, body: &[u8]) -> Message {
    let sender = Sender {
        identity: Identity::parse("edge1/sensor").unwrap(),
        origin: Origin::Internal,
        model_id: None,
    };
    let properties = Properties::copied_from([
        (PropertyName::System(SystemProperty::OutputName), "out"),
        (PropertyName::System(SystemProperty::ContentType), "application/json"),
        (PropertyName::Application("level"), "hot"),
    ]);
    Message {
        sender: Arc::new(sender),
        id: Uuid::from_u128(number),
        properties,
        body: Bytes::copy_from_slice(body),
        expires_at: None,
    }
}

impl Setup {
    async fn append(&self, queue: &str, records: impl IntoIterator<Item = Bytes>) -> Queue {
        let queue = self.store.queue(queue).unwrap();
        let target = Target { queue: queue.id(), ttl: Ttl::Millis(3_600_000), overflow: Overflow::RejectNew };
        let records =
            records.into_iter().map(|bytes| Record { bytes, targets: [target].into_iter().collect() });
        let request = AppendRequest { records: records.collect(), unrouted: 0 };
        self.store.submit(request).await.unwrap().await.unwrap();
        queue
    }

    async fn ask(&self, request: Request) -> Value {
        self.client.ask(&request).await.unwrap()
    }

    async fn refused(&self, request: Request) -> String {
        match self.client.ask::<Value>(&request).await {
            Err(AdminError::Refused(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    async fn purge(&self, before: Option<u64>, apply: bool) -> Value {
        self.ask(Request::Purge { queue: ROUTED.into(), order: Purge { before, apply } }).await
    }

    async fn queued(&self) -> u64 {
        self.ask(Request::Queue { name: ROUTED.into() }).await["queued"].as_u64().unwrap()
    }

    /// What the socket answers to these very bytes, until it closes.
    fn raw(&self, request: Vec<u8>) -> tokio::task::JoinHandle<String> {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        tokio::task::spawn_blocking(move || {
            use std::io::{Read as _, Write as _};
            // The hub may answer and close before it has read all.
            let _ = stream.write_all(&request);
            let mut answer = Vec::new();
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut piece) {
                answer.extend_from_slice(&piece[..length]);
            }
            String::from_utf8_lossy(&answer).into_owned()
        })
    }
}

fn account(accepted: u64, purged: u64, dead_lettered: u64, queued: u64) -> Value {
    let dropped = if purged == 0 { json!({}) } else { json!({ "purged": purged }) };
    json!({
        "accepted": accepted, "delivered": 0, "expired": 0, "dropped": dropped,
        "dead_lettered": dead_lettered, "queued": queued, "gap": 0
    })
}

fn queue(name: &str, state: &str, queued: u64, age: Value) -> Value {
    json!({
        "queue": name, "endpoint": name, "priority": 2_000_000_000u32, "state": state, "queued": queued,
        "oldest_age_ms": age, "checkpoint": 0, "tail": queued, "ledger": account(queued, 0, 0, queued)
    })
}

#[tokio::test]
async fn queues_are_listed_and_a_detached_one_says_so() {
    let hub = setup().await;
    hub.append(ORPHAN, [message(1, b"a").to_record()]).await;
    hub.time.advance(5_250);
    let expected = [queue(ROUTED, "attached", 0, Value::Null), queue(ORPHAN, "detached", 1, json!(5_250))];
    assert_eq!(hub.ask(Request::Queues).await, json!({ "queues": expected }));
    assert_eq!(hub.ask(Request::Queue { name: ORPHAN.into() }).await, expected[1]);
    let refused = hub.refused(Request::Queue { name: "nobody".into() }).await;
    assert!(refused.contains("no queue"), "{refused}");
    assert_eq!(hub.store.queues().len(), 2, "asking for a queue must not make one");
}

#[tokio::test]
async fn waiting_messages_are_shown_and_bodies_only_when_asked_for() {
    let hub = setup().await;
    let records = [
        message(1, b"{\"t\": 21}").to_record(),
        message(2, &[0xff, 0x00]).to_record(),
        Bytes::from_static(b"\x01damaged"),
    ];
    hub.append(ROUTED, records).await;
    hub.time.advance(1_000);
    let show = async |from, limit, bodies| {
        hub.ask(Request::Messages { queue: ROUTED.into(), page: Page { from, limit, bodies } }).await
    };
    let shown = show(None, 1, false).await;
    let read = |number: u128, body_bytes: u64| {
        let size = message(number, &vec![0; body_bytes as usize]).size_bytes();
        json!({
            "id": Uuid::from_u128(number).to_string(), "sender": "edge1/sensor", "output": "out",
            "size_bytes": size, "body_bytes": body_bytes, "system": { "contentType": "application/json" },
            "properties": [{ "name": "level", "value": "hot" }]
        })
    };
    let first = json!({
        "offset": 0, "accepted_at": "2027-01-15T08:00:00Z", "age_ms": 1_000, "time_left_ms": 3_599_000,
        "message": read(1, 9)
    });
    assert_eq!(shown, json!({ "queue": ROUTED, "messages": [first], "next": 1 }));
    let rest = show(Some(0), 10, true).await;
    assert_eq!(rest["next"], Value::Null);
    assert_eq!(rest["messages"][0]["message"]["body"], json!({ "text": "{\"t\": 21}" }));
    assert_eq!(rest["messages"][1]["message"]["body"], json!({ "base64": "/wA=" }));
    let damaged = &rest["messages"][2]["message"];
    assert!(damaged["unreadable"].as_str().unwrap().contains("damaged"), "{damaged}");
    assert_eq!(damaged["stored_bytes"], 8);
    assert_eq!(hub.queued().await, 3, "looking changes nothing");
}

#[tokio::test]
async fn looking_does_not_expire_and_purging_counts() {
    let hub = setup().await;
    hub.append(ROUTED, (0..5).map(|number| message(number, b"x").to_record())).await;
    let before = hub.ask(Request::Ledger).await;
    let dry = hub.purge(None, false).await;
    assert_eq!(dry, json!({ "queue": ROUTED, "applied": false, "messages": 5, "before": 5 }));
    assert_eq!(hub.ask(Request::Ledger).await, before, "a dry run changes nothing");
    let dry = hub.purge(Some(2), false).await;
    assert_eq!(dry, json!({ "queue": ROUTED, "applied": false, "messages": 2, "before": 2 }));
    let done = hub.purge(Some(2), true).await;
    assert_eq!(done, json!({ "queue": ROUTED, "applied": true, "messages": 2, "before": 2 }));
    let done = hub.purge(None, true).await;
    assert_eq!(done, json!({ "queue": ROUTED, "applied": true, "messages": 3, "before": 5 }));
    let expected = json!({
        "queues": [{ "queue": ROUTED, "ledger": account(5, 5, 0, 0) }],
        "total": account(5, 5, 0, 0), "dead_letters": account(0, 0, 0, 0), "unrouted": 0, "gap": 0
    });
    assert_eq!(hub.ask(Request::Ledger).await, expected);
}

/// Appends messages to a queue and moves them to the dead letters.
async fn dead_letters(hub: &Setup, queue: &str, numbers: std::ops::Range<u128>) {
    let queue = hub.append(queue, numbers.map(|number| message(number, b"x").to_record())).await;
    let limit = edgehub_storage::ReadLimit { count: 2 * IDS_MAX, bytes: usize::MAX };
    for entry in queue.peek(Offset::ZERO, limit).await.unwrap().entries {
        assert!(queue.dead_letter(&entry, DeadLetterReason::Conversion, 3));
    }
    hub.store.flush().await.unwrap();
}

#[tokio::test]
async fn dead_letters_are_listed_by_queue_and_in_pages() {
    let hub = setup().await;
    dead_letters(&hub, ROUTED, 0..2).await;
    dead_letters(&hub, ORPHAN, 2..3).await;
    hub.time.advance(2_000);
    let one = hub.ask(Request::DeadLetter { id: 0, bodies: true }).await;
    let expected = json!({
        "id": 0, "queue": ROUTED, "offset": 0, "reason": "conversion", "attempts": 3,
        "accepted_at": "2027-01-15T08:00:00Z", "dead_lettered_at": "2027-01-15T08:00:00Z", "age_ms": 2_000,
        "message": {
            "id": Uuid::nil().to_string(), "sender": "edge1/sensor", "output": "out",
            "size_bytes": message(0, b"x").size_bytes(), "body_bytes": 1,
            "system": { "contentType": "application/json" },
            "properties": [{ "name": "level", "value": "hot" }], "body": { "text": "x" }
        }
    });
    assert_eq!(one, expected);
    let list = async |queue: Option<&str>, from, limit| {
        let page = Page { from, limit, bodies: false };
        let answer = hub.ask(Request::DeadLetters { queue: queue.map(Into::into), page }).await;
        let letters = answer["dead_letters"].as_array().unwrap();
        let ids: Vec<u64> = letters.iter().map(|letter| letter["id"].as_u64().unwrap()).collect();
        (ids, answer["next"].as_u64())
    };
    assert_eq!(list(None, None, 2).await, (vec![0, 1], Some(2)));
    assert_eq!(list(None, Some(2), 2).await, (vec![2], None));
    assert_eq!(list(Some(ROUTED), None, 1).await, (vec![0], Some(1)));
    assert_eq!(list(Some(ROUTED), Some(1), 1).await, (vec![1], None));
    assert_eq!(list(Some(ORPHAN), None, 1).await, (vec![2], None));
    assert!(hub.refused(Request::DeadLetter { id: 9, bodies: false }).await.contains("no dead letter 9"));
}

#[tokio::test]
async fn dead_letters_are_put_back_or_dropped_and_counted() {
    let hub = setup().await;
    dead_letters(&hub, ROUTED, 0..3).await;
    dead_letters(&hub, ORPHAN, 3..5).await;
    let ids = |ids: &[u64], apply| Letters { select: Select::Ids(ids.to_vec()), apply };
    let before = hub.ask(Request::Ledger).await;
    let expected = |applied, queues: Value, missing: Value| json!({ "applied": applied, "queues": queues, "missing": missing, "next": null, "below": null });
    let expected_all = |applied, queues: Value| json!({ "applied": applied, "queues": queues, "missing": [], "next": null, "below": 5 });
    for request in [Request::Redrive(ids(&[0, 0, 99, 3], false)), Request::Drop(ids(&[0, 0, 99, 3], false))] {
        assert_eq!(hub.ask(request).await, expected(false, json!({ ROUTED: 1, ORPHAN: 1 }), json!([99])));
    }
    let all = |apply| Letters { select: Select::All { from: 0, below: None }, apply };
    let dry = hub.ask(Request::Drop(all(false))).await;
    assert_eq!(dry, expected_all(false, json!({ ROUTED: 3, ORPHAN: 2 })));
    assert_eq!(hub.ask(Request::Ledger).await, before, "a dry run changes nothing");

    let done = hub.ask(Request::Redrive(ids(&[0, 99], true))).await;
    assert_eq!(done, expected(true, json!({ ROUTED: 1 }), json!([99])));
    assert_eq!(hub.queued().await, 1);
    let of_queue = Select::Queue { name: ORPHAN.into(), from: 4, below: None };
    let done = hub.ask(Request::Drop(Letters { select: of_queue, apply: true })).await;
    assert_eq!(done, expected_all(true, json!({ ORPHAN: 1 })));
    let ledger = hub.ask(Request::Ledger).await;
    let letters = json!({
        "accepted": 5, "delivered": 1, "expired": 0, "dropped": { "purged": 1 }, "dead_lettered": 0,
        "queued": 3, "gap": 0
    });
    assert_eq!((&ledger["dead_letters"], &ledger["gap"]), (&letters, &json!(0)));
    assert_eq!(ledger["queues"][0], json!({ "queue": ROUTED, "ledger": account(4, 0, 3, 1) }));
    let done = hub.ask(Request::Drop(all(true))).await;
    assert_eq!(done, expected_all(true, json!({ ROUTED: 2, ORPHAN: 1 })));
    assert_eq!(hub.ask(Request::Redrive(all(true))).await, expected_all(true, json!({})));
}

#[tokio::test]
async fn a_way_through_all_does_not_meet_what_came_meanwhile() {
    let hub = setup().await;
    let count = IDS_MAX as u64 + 1;
    dead_letters(&hub, ROUTED, 0..u128::from(count)).await;
    let drop = async |from, below| {
        let letters = Letters { select: Select::All { from, below }, apply: true };
        let answer = hub.ask(Request::Drop(letters)).await;
        (answer["queues"][ROUTED].as_u64(), answer["next"].as_u64(), answer["below"].as_u64())
    };
    assert_eq!(drop(0, None).await, (Some(count - 1), Some(count - 1), Some(count)));
    dead_letters(&hub, ROUTED, 0..1).await;
    assert_eq!(drop(count - 1, Some(count)).await, (Some(1), None, Some(count)));
    assert_eq!(hub.store.dead_letters().ledger().queued(), 1);
}

#[tokio::test]
async fn what_is_sent_is_bounded() {
    let hub = setup().await;
    let post = "POST /v1/queues/x/purge HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
    for (request, status) in [
        (format!("{post}Content-Length: 70000\r\n\r\n{}", " ".repeat(70_000)), "413"),
        (format!("{post}Content-Length: 2\r\n\r\n{{}}"), "404"),
        (format!("GET /{} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "x".repeat(9_000)), "414"),
        (format!("GET /v1/ledger HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(40_000)), "431"),
        ("nonsense\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = hub.raw(request.into_bytes()).await.unwrap();
        let head = &answer[..answer.len().min(200)];
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {head:?}");
    }
    let wrong =
        hub.raw(b"PUT /v1/ledger HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_vec()).await.unwrap();
    assert!(wrong.starts_with("HTTP/1.1 405 ") && wrong.contains("allow: GET\r\n"), "{wrong}");
    assert!(wrong.ends_with("{\"error\":\"this path takes GET only\"}\n"), "{wrong}");
    // However many connections are opened and say nothing, those that are served go on.
    let silent: Vec<_> = (0..15).map(|_| UnixStream::connect(&hub.path).unwrap()).collect();
    assert_eq!(hub.queued().await, 0);
    drop(silent);
}

#[tokio::test]
async fn where_no_hub_runs_that_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let ask = async || AdminClient::new(&path).ask::<Value>(&Request::Ledger).await.unwrap_err();
    let absent = ask().await;
    assert!(matches!(absent, AdminError::NoHub { .. }), "{absent}");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let stale = ask().await;
    assert!(matches!(stale, AdminError::NoHub { .. }), "{stale}");
    assert!(stale.to_string().contains(path.to_str().unwrap()), "{stale}");
}

#[tokio::test]
async fn clients_and_the_screen_are_shown_and_a_client_is_sent_away_only_when_told() {
    let setup = setup().await;
    let (mailbox, mut commands) = Mailbox::channel(8);
    let login = Login {
        identity: Identity::parse("edge1/sensor").unwrap(),
        credentials: Credentials::SasToken("SharedAccessSignature sig=planted".into()),
        auth_chain: None,
        product_info: "sdk/1.0".into(),
        model_id: None,
        protocol: Protocol::Amqp,
        peer: Some(([10, 0, 0, 1], 4711).into()),
    };
    let connected = setup.hub.login(login, mailbox).await.unwrap();
    let answer = setup.ask(Request::Client { id: "edge1/sensor".into() }).await;
    assert_eq!(
        (&answer["protocol"], &answer["peer"], &answer["product"], &answer["takes_inputs"]),
        (&json!("amqp"), &json!("10.0.0.1:4711"), &json!("sdk/1.0"), &json!(false))
    );
    let all = setup.ask(Request::Clients).await;
    assert_eq!((&all["clients"], &all["max"]), (&json!([answer]), &json!(4)));
    let status = setup.ask(Request::Status).await;
    assert_eq!(
        (&status["clients"], &status["device"]),
        (&json!({"connected": 1, "max": 4}), &json!("edge1"))
    );
    assert_eq!(status["configuration"]["routes"], 1);
    assert!(!format!("{all}{status}").contains("planted"));

    let kick = |apply| Request::Kick { id: "edge1/sensor".into(), order: Kick { apply } };
    assert_eq!(setup.ask(kick(false)).await, json!({"id": "edge1/sensor", "applied": false}));
    assert!(commands.try_recv().is_err());
    assert_eq!(setup.ask(kick(true)).await["applied"], true);
    assert!(matches!(commands.recv().await, Some(Command::Close(_))));
    drop(connected);
    assert!(setup.refused(kick(true)).await.contains("no client of this id"));
    assert!(setup.refused(Request::Client { id: "a/b/c".into() }).await.contains("no id"));
}

#[tokio::test]
async fn a_tap_shows_what_passes_until_it_has_enough() {
    let setup = setup().await;
    let (mailbox, _commands) = Mailbox::channel(8);
    let login = Login {
        identity: Identity::parse("edge1/sensor").unwrap(),
        credentials: Credentials::None,
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Mqtt,
        peer: None,
    };
    let mut sensor = setup.hub.login(login, mailbox).await.unwrap();
    let bad = TapOrder { condition: Some("level =".into()), ..TapOrder::default() };
    let error = setup.client.follow::<Value>(&Request::Tap(bad), Duration::from_secs(60), |_| true).await;
    assert!(matches!(error, Err(AdminError::Refused(text)) if text.contains("condition")));
    for bodies in [false, true] {
        let order =
            TapOrder { condition: Some("level = 'hot'".into()), limit: 2, bodies, ..TapOrder::default() };
        let (client, request) = (setup.client.clone(), Request::Tap(order));
        let following = tokio::spawn(async move {
            let mut lines = Vec::new();
            let taken = client
                .follow(&request, Duration::from_secs(60), |line: TapLine| {
                    lines.push(line);
                    true
                })
                .await;
            taken.map(|()| lines)
        });
        // The tap opens at some moment; what passes before it is not seen.
        let mut number = 0;
        while !following.is_finished() {
            number += 1;
            setup
                .hub
                .publish(&mut sensor, vec![message(number, b"planted body")])
                .await
                .unwrap()
                .await
                .unwrap();
        }
        let lines = following.await.unwrap().unwrap();
        assert!(
            matches!(&lines[..], [TapLine::Message(_), TapLine::Message(_), TapLine::End(end)]
            if end.end == "limit" && end.matched >= 2),
            "{lines:?}"
        );
        let TapLine::Message(first) = &lines[0] else { panic!() };
        assert_eq!(first.endpoints, [ROUTED]);
        assert_eq!(serde_json::to_string(&lines).unwrap().contains("planted"), bodies);
    }
}
