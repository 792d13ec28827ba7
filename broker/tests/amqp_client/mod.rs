//! An independent client of the AMQP head, at one end of a pipe, with the steps that all tests share.
#![allow(dead_code)] // each test program uses a part of it

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use edgehub_broker::amqp::{MessageEncoder, MessageId, MessageProperties, Value};
use edgehub_broker::head::amqp::{AmqpLimits, serve};
use edgehub_broker::head::mqtt::Peer;
use edgehub_broker::identity::{Identity, SymmetricKey, TokenSource};
use fe2o3_amqp::connection::{Connection, ConnectionHandle};
use fe2o3_amqp::link::delivery::Delivery;
use fe2o3_amqp::link::receiver::CreditMode;
use fe2o3_amqp::sasl_profile::SaslProfile;
use fe2o3_amqp::session::{Session, SessionHandle};
use fe2o3_amqp::types::messaging::{ApplicationProperties, Body, Message, Outcome, Properties};
use fe2o3_amqp::types::primitives::{SimpleValue, Value as PeerValue};
use fe2o3_amqp::{Receiver, Sender};
use serde_json::Value as Json;
use tokio::io::{DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::recording::{DEADLINE, Recording};

pub(crate) const HOST: &str = "hub1.example.net";

pub(crate) fn identity(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

/// A head on one end of a pipe.
pub(crate) fn head(recording: &Recording) -> (DuplexStream, JoinHandle<()>) {
    head_with(recording, AmqpLimits::default(), Vec::new())
}

/// The same with other limits, for a client that showed certificates.
pub(crate) fn head_with(
    recording: &Recording,
    limits: AmqpLimits,
    certificates: Vec<Bytes>,
) -> (DuplexStream, JoinHandle<()>) {
    let (near, far) = duplex(64 * 1_024);
    let peer = Peer { address: None, certificates, accepted_at: tokio::time::Instant::now() };
    let serving = serve(far, recording.clone(), limits, peer, std::future::pending());
    (near, tokio::spawn(serving))
}

pub(crate) async fn open(stream: DuplexStream, sasl: bool) -> ConnectionHandle<()> {
    let builder = Connection::builder().container_id("client").hostname("hub").idle_time_out(60_000u32);
    let opening = async {
        match sasl {
            true => builder.sasl_profile(SaslProfile::Anonymous).open_with_stream(stream).await,
            false => builder.open_with_stream(stream).await,
        }
    };
    timeout(DEADLINE, opening).await.expect("in time").expect("opened")
}

pub(crate) async fn token(of: &str) -> String {
    let key = SymmetricKey::from_bytes(*b"0123456789abcdef0123456789abcdef").unwrap();
    let source = TokenSource::new(HOST, &identity(of), Arc::new(key));
    source.token().await.unwrap().to_string()
}

/// The token links of a connection.
pub(crate) struct Cbs {
    sender: Sender,
    receiver: Receiver,
    asked: u64,
}

impl Cbs {
    pub(crate) async fn attach(session: &mut SessionHandle<()>) -> Self {
        let sender = Sender::attach(session, "cbs-up", "$cbs").await.expect("attached");
        let receiver = Receiver::attach(session, "cbs-down", "$cbs").await.expect("attached");
        Self { sender, receiver, asked: 0 }
    }

    /// Puts a token; gives status and description.
    pub(crate) async fn put(&mut self, operation: &str, token: &str) -> (i32, String) {
        self.asked += 1;
        let request = Message::builder()
            .properties(Properties::builder().message_id(self.asked).build())
            .application_properties(
                ApplicationProperties::builder()
                    .insert("operation", operation)
                    .insert("type", "azure-devices.net:sastoken")
                    .insert("name", "whatever")
                    .build(),
            )
            .value(token.to_owned())
            .build();
        let talk = async {
            let outcome = self.sender.send(request).await.expect("sent");
            assert!(matches!(outcome, Outcome::Accepted(_)), "the request itself is always accepted");
            self.receiver.recv::<Body<PeerValue>>().await.expect("answered")
        };
        let delivery = timeout(DEADLINE, talk).await.expect("in time");
        let answer = delivery.message();
        let correlation_id = answer.properties.as_ref().and_then(|found| found.correlation_id.clone());
        assert_eq!(correlation_id, Some(self.asked.into()), "the type of the id is kept");
        let properties = answer.application_properties.as_ref().unwrap();
        let status = match properties.0.get("status-code") {
            Some(SimpleValue::Int(status)) => *status,
            other => panic!("{other:?}"),
        };
        let description = match properties.0.get("status-description") {
            Some(SimpleValue::String(text)) => text.clone(),
            other => panic!("{other:?}"),
        };
        (status, description)
    }

    pub(crate) async fn put_good(&mut self, of: &str) {
        let token = token(of).await;
        assert_eq!(self.put("put-token", &token).await, (200, "OK".into()));
    }
}

pub(crate) async fn telemetry(session: &mut SessionHandle<()>, name: &str, of: &str) -> Sender {
    let address = match of.split_once('/') {
        None => format!("amqps://hub/devices/{of}/messages/events"),
        Some((device, module)) => format!("/devices/{device}/modules/{module}/messages/events"),
    };
    timeout(DEADLINE, Sender::attach(session, name, address)).await.expect("in time").expect("attached")
}

/// The error of an attach that must fail, as the client words it. In a session of its own: those of this client
/// do not survive a refused link reliably.
pub(crate) async fn refusal(connection: &mut ConnectionHandle<()>, address: &str) -> String {
    let mut session = Session::begin(connection).await.expect("begun");
    let attach = Sender::attach(&mut session, "up", address);
    let attach = timeout(DEADLINE, attach).await.expect("in time");
    format!("{:?}", attach.expect_err("refused"))
}

/// Refused if no token names the identity.
pub(crate) fn strict() -> Recording {
    let recording = Recording::default();
    recording.state.lock().needs_token = true;
    recording
}

/// A typed AMQP value of a vector.
pub(crate) fn amqp(json: &Json) -> Value {
    let value = &json["value"];
    let text = || value.as_str().unwrap().to_owned();
    match json["type"].as_str().unwrap() {
        "null" => Value::Null,
        "boolean" => Value::Bool(value.as_bool().unwrap()),
        "ubyte" => Value::Ubyte(value.as_u64().unwrap() as u8),
        "int" => Value::Int(value.as_i64().unwrap() as i32),
        "uint" => Value::Uint(value.as_u64().unwrap() as u32),
        "long" => Value::Long(value.as_i64().unwrap()),
        "ulong" => Value::Ulong(value.as_u64().unwrap()),
        "double" => Value::Double(value.as_f64().unwrap()),
        "timestamp" => Value::TimestampMillis(value.as_i64().unwrap()),
        "uuid" => match MessageId::uuid_or_string(&text()) {
            MessageId::Uuid(bytes) => Value::Uuid(bytes),
            other => panic!("{other}"),
        },
        "binary" => Value::Binary(STANDARD.decode(text()).unwrap().into()),
        "string" => Value::String(text().into()),
        "symbol" => Value::Symbol(text().into()),
        other => panic!("type {other}"),
    }
}

/// The encoded message of a vector.
pub(crate) fn encoded(message: &Json) -> Vec<u8> {
    let field = |name: &str| message["properties"].get(name).map(amqp).unwrap_or(Value::Null);
    let id = |name: &str| match field(name) {
        Value::String(text) => Some(MessageId::String(text)),
        Value::Uuid(bytes) => Some(MessageId::Uuid(bytes)),
        Value::Ulong(number) => Some(MessageId::Ulong(number)),
        Value::Binary(bytes) => Some(MessageId::Binary(bytes)),
        _ => None,
    };
    let entries = |map: &str| -> Vec<(String, Value)> {
        message[map].as_object().unwrap().iter().map(|(key, value)| (key.clone(), amqp(value))).collect()
    };
    let (annotations, application) = (entries("annotations"), entries("application"));
    let mut encoder = MessageEncoder::default();
    encoder
        .annotations(annotations.iter().map(|(key, value)| (key.as_str(), value.clone())))
        .properties(&MessageProperties {
            message_id: id("message-id"),
            correlation_id: id("correlation-id"),
            to: field("to").as_text().cloned(),
            user_id: match field("user-id") {
                Value::Binary(bytes) => Some(bytes),
                _ => None,
            },
            content_type: field("content-type").as_text().cloned(),
            content_encoding: field("content-encoding").as_text().cloned(),
            absolute_expiry_time_millis: match field("absolute-expiry-time") {
                Value::TimestampMillis(millis) => Some(millis),
                _ => None,
            },
            ..Default::default()
        })
        .application_values(application.iter().map(|(key, value)| (key.as_str(), value.clone())));
    let mut payload = encoder.no_body().concat();
    for data in message["data"].as_array().unwrap() {
        let data = STANDARD.decode(data.as_str().unwrap()).unwrap();
        payload.extend(MessageEncoder::default().data(data.into()).concat());
    }
    payload
}

/// A connection on which an identity has put its token, and a session for its links.
pub(crate) struct Site {
    pub(crate) recording: Recording,
    pub(crate) connection: ConnectionHandle<()>,
    pub(crate) session: SessionHandle<()>,
    pub(crate) cbs: Cbs,
    _tokens: SessionHandle<()>,
}

impl Site {
    pub(crate) async fn of(identity: &str) -> Self {
        Self::with(strict(), AmqpLimits::default(), identity).await
    }

    pub(crate) async fn with(recording: Recording, limits: AmqpLimits, identity: &str) -> Self {
        let (stream, _serving) = head_with(&recording, limits, Vec::new());
        let mut connection = open(stream, false).await;
        let mut tokens = Session::begin(&mut connection).await.expect("begun");
        let mut cbs = Cbs::attach(&mut tokens).await;
        cbs.put_good(identity).await;
        let session = Session::begin(&mut connection).await.expect("begun");
        Self { recording, connection, session, cbs, _tokens: tokens }
    }

    /// Attaches a link on which the client sends.
    pub(crate) async fn sender(&mut self, name: &str, address: &str) -> Sender {
        let attach = Sender::attach(&mut self.session, name, address);
        timeout(DEADLINE, attach).await.expect("in time").expect("attached")
    }

    /// Attaches a link on which the client receives, with credit that renews itself.
    pub(crate) async fn receiver(&mut self, name: &str, address: &str) -> Receiver {
        let attach = Receiver::attach(&mut self.session, name, address);
        timeout(DEADLINE, attach).await.expect("in time").expect("attached")
    }

    /// The same without credit.
    pub(crate) async fn dry_receiver(&mut self, name: &str, address: &str) -> Receiver {
        let builder = Receiver::builder().name(name).source(address).credit_mode(CreditMode::Manual);
        timeout(DEADLINE, builder.attach(&mut self.session)).await.expect("in time").expect("attached")
    }
}

/// What a link receives next.
pub(crate) async fn receive(receiver: &mut Receiver) -> Delivery<Body<PeerValue>> {
    timeout(DEADLINE, receiver.recv::<Body<PeerValue>>()).await.expect("in time").expect("received")
}

/// The data section of what was received.
pub(crate) fn data(delivery: &Delivery<Body<PeerValue>>) -> Vec<u8> {
    match &delivery.message().body {
        Body::Data(batch) => batch.iter().flat_map(|data| data.0.to_vec()).collect(),
        other => panic!("{other:?}"),
    }
}

/// How a link on which the client receives was ended by the head.
pub(crate) async fn detached(receiver: &mut Receiver) -> String {
    let received = timeout(DEADLINE, receiver.recv::<Body<PeerValue>>()).await.expect("in time");
    format!("{:?}", received.expect_err("detached"))
}
