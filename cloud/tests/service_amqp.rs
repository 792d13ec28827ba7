//! A service's AMQP connection to the stand-in, played with the client side of the engine over a pipe in memory. The
//! black-box tests play it with the public SDKs.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use edgehub_broker::amqp::{
    AttachOptions, CbsResponse, Condition, Connection, Driver, Event, LinkId, Message as Encoded,
    MessageEncoder, MessageId, MessageProperties, Options, Outcome, Payload, PutToken, Role, SendOptions,
    SessionId, Terminus, Value,
};
use edgehub_broker::backend::{
    Backend, Command, Credentials, Feature, Login, MAILBOX_COMMANDS_MAX, Mailbox, Outcome as ClientOutcome,
    Protocol,
};
use edgehub_broker::head::mqtt::Peer;
use edgehub_broker::identity::{Identity, SymmetricKey, TokenSource, unix_now_secs};
use edgehub_cloud::{Cloud, CloudOptions, NewDevice};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value as Json, json};
use tokio::io::DuplexStream;
use tokio::time::{Instant, timeout};

const HOST: &str = "hub1.example.net";
const LIMIT: Duration = Duration::from_secs(60);

struct Site {
    cloud: Cloud,
    _directory: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let cloud =
            Cloud::open(&CloudOptions::new(path("registry.json"), path("telemetry.ndjson"), HOST)).unwrap();
        cloud.registry().create_device(NewDevice { id: "d1", ..NewDevice::default() }).unwrap();
        Self { cloud, _directory: directory }
    }

    fn key(&self) -> SymmetricKey {
        let text = self.cloud.registry().service_connection_string().unwrap();
        SymmetricKey::from_base64(text.rsplit_once("SharedAccessKey=").unwrap().1).unwrap()
    }

    fn token(&self, key: &SymmetricKey, life_secs: i64) -> String {
        let expiry = (unix_now_secs() + life_secs).to_string();
        let signature = BASE64.encode(key.sign(&[HOST.as_bytes(), b"\n", expiry.as_bytes()]));
        let signature = utf8_percent_encode(&signature, NON_ALPHANUMERIC);
        format!("SharedAccessSignature sr={HOST}&sig={signature}&se={expiry}&skn=iothubowner")
    }

    async fn service(&self) -> Service {
        let (near, far) = tokio::io::duplex(64 * 1_024);
        let cloud = self.cloud.clone();
        let peer = Peer { address: None, certificates: Vec::new(), accepted_at: Instant::now() };
        tokio::spawn(async move { cloud.serve_amqp(far, peer, std::future::pending()).await });
        let options = Options { hostname: Some(HOST.into()), ..Options::default() };
        let mut driver = Driver::new(near, Connection::client(options, std::time::Instant::now()));
        let session = loop {
            match next(&mut driver).await {
                Event::Opened(_) => assert!(driver.connection().begin().is_some()),
                Event::SessionBegun { session } => break session,
                other => panic!("{other:?}"),
            }
        };
        let mut service = Service { driver, session, tokens: None };
        let requests = service.attach("$cbs", Role::Sender).await.unwrap();
        service.attach("$cbs", Role::Receiver).await.unwrap();
        service.tokens = Some(requests);
        service
    }
}

struct Service {
    driver: Driver<DuplexStream>,
    session: SessionId,
    tokens: Option<LinkId>,
}

async fn next(driver: &mut Driver<DuplexStream>) -> Event {
    timeout(LIMIT, async {
        loop {
            if let Some(event) = driver.connection().poll_event() {
                return event;
            }
            driver.turn().await;
        }
    })
    .await
    .expect("an event in time")
}

impl Service {
    /// The next event that `pick` takes; the others are passed over.
    async fn until<T>(&mut self, pick: impl Fn(Event) -> Option<T>) -> T {
        loop {
            if let Some(picked) = pick(next(&mut self.driver).await) {
                return picked;
            }
        }
    }

    async fn attach(&mut self, address: &str, role: Role) -> Result<LinkId, Condition> {
        let options = AttachOptions {
            name: format!("{address}-{role:?}-{}", fastrand::u32(..)).into(),
            role,
            source: Terminus::source(address),
            target: Terminus::target(address),
            snd_settle: None,
            rcv_settle: None,
            max_message_bytes: 65_536,
            credit: 10,
            properties: Vec::new(),
        };
        let link = self.driver.connection().attach(self.session, options).unwrap();
        self.until(move |event| match event {
            Event::Attached { link: attached, .. } if attached == link => Some(Ok(link)),
            Event::AttachRefused { link: refused, error } if refused == link => {
                Some(Err(error.unwrap().condition))
            }
            _ => None,
        })
        .await
    }

    /// The status of the answer.
    async fn put(&mut self, token: &str) -> i32 {
        let payload = PutToken::encode(MessageId::String("id".into()), HOST, token, 0);
        self.send_when_possible(self.tokens.unwrap(), payload).await;
        let payload = self.delivery().await;
        CbsResponse::decode(&Encoded::parse(&payload).unwrap()).unwrap().status_code
    }

    async fn send_when_possible(&mut self, link: LinkId, payload: Payload) {
        while self.driver.connection().send(link, payload.clone(), SendOptions::default()).is_err() {
            self.until(|event| matches!(event, Event::CreditChanged { .. }).then_some(())).await;
        }
    }

    async fn delivery(&mut self) -> Bytes {
        self.delivery_settled(Outcome::Accepted).await
    }

    async fn delivery_settled(&mut self, outcome: Outcome) -> Bytes {
        let delivery = self
            .until(|event| match event {
                Event::Delivery(delivery) => Some(delivery),
                _ => None,
            })
            .await;
        self.driver.connection().settle(delivery.id, outcome);
        delivery.payload
    }

    async fn send(&mut self, link: LinkId, to: &str, ack: &str, body: &'static str) -> Outcome {
        let properties = MessageProperties {
            to: Some(to.into()),
            message_id: Some(MessageId::String(body.into())),
            ..MessageProperties::default()
        };
        let mut encoder = MessageEncoder::with_capacity(64);
        encoder.properties(&properties).application_values([("iothub-ack", Value::String(ack.into()))]);
        self.send_when_possible(link, encoder.data(body.into())).await;
        self.until(|event| match event {
            Event::Settled { outcome, .. } => Some(outcome),
            _ => None,
        })
        .await
    }
}

fn condition(outcome: Outcome) -> Condition {
    let Outcome::Rejected(Some(error)) = outcome else { panic!("{outcome:?}") };
    error.condition
}

#[tokio::test]
async fn nothing_is_served_before_a_good_token() {
    let site = Site::new();
    let mut service = site.service().await;
    let other = SymmetricKey::from_bytes(b"other".to_vec()).unwrap();
    assert_eq!(service.put(&site.token(&other, 60)).await, 401);
    assert_eq!(service.put(&site.token(&site.key(), -3_600)).await, 401);
    for (address, role) in
        [("/messages/devicebound", Role::Sender), ("/messages/serviceBound/feedback", Role::Receiver)]
    {
        assert_eq!(service.attach(address, role).await, Err(Condition::UNAUTHORIZED_ACCESS), "{address}");
    }
    assert_eq!(service.put(&site.token(&site.key(), 60)).await, 200);
    assert!(service.attach("amqps://h/messages/deviceBound?x=1", Role::Sender).await.is_ok());
    for (address, role) in [
        ("/messages/devicebound", Role::Receiver),
        ("/messages/serviceBound/filenotifications", Role::Receiver),
        ("/devices/d1/messages/events", Role::Sender),
    ] {
        assert_eq!(service.attach(address, role).await, Err(Condition::NOT_FOUND), "{address}");
    }
}

#[tokio::test]
async fn a_device_on_the_same_port_stays_with_the_head() {
    let site = Site::new();
    let mut device = site.service().await;
    let key = site.cloud.registry().cache().get(&id("d1")).unwrap().keys().next().unwrap().clone();
    let token = TokenSource::new(HOST, &id("d1"), Arc::new(key)).token().await.unwrap();
    assert_eq!(device.put(&token).await, 200);
    assert!(device.attach("/devices/d1/messages/events", Role::Sender).await.is_ok());
    // Who is logged in as a device does not become a service.
    assert_eq!(device.put(&site.token(&site.key(), 60)).await, 400);
    assert!(device.attach("/messages/devicebound", Role::Sender).await.is_err());
}

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

#[tokio::test]
async fn messages_go_to_devices_and_feedback_comes_back() {
    let site = Site::new();
    let mut service = site.service().await;
    assert_eq!(service.put(&site.token(&site.key(), 60)).await, 200);
    let link = service.attach("/messages/devicebound", Role::Sender).await.unwrap();
    let to = "/devices/d1/messages/deviceBound";
    for (to, ack, expected) in [
        ("/devices/none/messages/devicebound", "none", Condition::NOT_FOUND),
        ("/devices/d1/modules/m/messages/devicebound", "none", Condition::INVALID_FIELD),
        ("d1", "none", Condition::INVALID_FIELD),
        (to, "maybe", Condition::INVALID_FIELD),
    ] {
        assert_eq!(condition(service.send(link, to, ack, "x").await), expected, "{to} {ack}");
    }
    assert_eq!(service.send(link, to, "full", "one").await, Outcome::Accepted);
    assert_eq!(service.send(link, to, "negative", "two").await, Outcome::Accepted);

    let key = site.cloud.registry().cache().get(&id("d1")).unwrap().keys().next().unwrap().clone();
    let token = TokenSource::new(HOST, &id("d1"), Arc::new(key)).token().await.unwrap();
    let login = Login {
        identity: id("d1"),
        credentials: Credentials::SasToken(token),
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Amqp,
        peer: None,
    };
    let (mailbox, mut commands) = Mailbox::channel(MAILBOX_COMMANDS_MAX);
    let backend = site.cloud.backend();
    let mut device = backend.login(login, mailbox).await.unwrap();
    backend.subscribe(&mut device, Feature::CloudToDevice, true);
    let Some(Command::Deliver(deliveries)) = timeout(LIMIT, commands.recv()).await.unwrap() else {
        panic!("no delivery")
    };
    let bodies: Vec<_> = deliveries.messages.iter().map(|(_, message)| message.body.clone()).collect();
    assert_eq!(bodies, ["one", "two"]);
    let tags: Vec<u64> = deliveries.messages.iter().map(|(tag, _)| *tag).collect();
    deliveries.settler.settle([(tags[0], ClientOutcome::Accepted), (tags[1], ClientOutcome::Rejected)]);

    service.attach("/messages/serviceBound/feedback", Role::Receiver).await.unwrap();
    let mut seen = Vec::new();
    let read = |payload: &Bytes| -> Vec<Json> {
        let message = Encoded::parse(payload).unwrap();
        let kind = message.properties().unwrap().content_type.unwrap();
        assert_eq!(kind.as_str(), "application/vnd.microsoft.iothub.feedback.json");
        serde_json::from_slice(&message.body.data().unwrap()).unwrap()
    };
    // What the service gives back comes again, and what it leaves unsettled comes to the next.
    while seen.len() < 2 {
        seen.extend(read(&service.delivery_settled(Outcome::Released).await));
    }
    let told: Vec<_> = seen.iter().map(|record| &record["statusCode"]).collect();
    assert_eq!(told, ["Success", "Rejected"]);
    assert_eq!(seen[0]["originalMessageId"], "one");
    assert_eq!(seen[0]["deviceId"], json!("d1"));
    service.until(|event| matches!(event, Event::Delivery(_)).then_some(())).await;
    drop(service);
    let mut other = site.service().await;
    assert_eq!(other.put(&site.token(&site.key(), 60)).await, 200);
    other.attach("/messages/serviceBound/feedback", Role::Receiver).await.unwrap();
    let mut again = Vec::new();
    while again.len() < 2 {
        again.extend(read(&other.delivery().await));
    }
    assert_eq!(again, seen);
}
