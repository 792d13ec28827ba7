//! The AMQP head as an independent client sees it: tokens, logins, telemetry, take-over, refusals, hostile bytes.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod amqp_client;
mod recording;

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use amqp_client::{Cbs, encoded, head, identity, open, refusal, strict, telemetry, token};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use edgehub_broker::amqp::{MESSAGE_FORMAT_BATCH, MessageEncoder};
use edgehub_broker::backend::{CloseReason, Command, Credentials, LoginError, Protocol, PublishError};
use edgehub_broker::message::{SystemProperty, Value as PropertyValue};
use fe2o3_amqp::link::delivery::Sendable;
use fe2o3_amqp::session::Session;
use fe2o3_amqp::types::messaging::{ApplicationProperties, Data, Message, Outcome, Properties};
use fe2o3_amqp::types::primitives::{Binary, Symbol, Value as PeerValue};
use fe2o3_amqp::{Receiver, Sender};
use recording::{DEADLINE, Recording, until};
use serde_json::Value as Json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::watch;
use tokio::time::timeout;

fn bodies(recording: &Recording) -> Vec<Bytes> {
    recording.state.lock().published.iter().map(|message| message.body.clone()).collect()
}

#[tokio::test]
async fn telemetry_of_an_identity_with_a_token_is_accepted_with_and_without_sasl() {
    for sasl in [true, false] {
        let recording = strict();
        let (stream, serving) = head(&recording);
        let mut connection = open(stream, sasl).await;
        let mut session = Session::begin(&mut connection).await.expect("begun");
        let mut cbs = Cbs::attach(&mut session).await;
        cbs.put_good("d1").await;
        let mut up = telemetry(&mut session, "up", "d1").await;
        let message = Message::builder()
            .properties(Properties::builder().message_id("m-1".to_string()).build())
            .application_properties(ApplicationProperties::builder().insert("n", 5).build())
            .data(Binary::from(b"hello".to_vec()))
            .build();
        let outcome = timeout(DEADLINE, up.send(message)).await.expect("in time").expect("sent");
        assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
        {
            let state = recording.state.lock();
            let login = &state.logins[0];
            assert_eq!((&login.identity, login.protocol), (&identity("d1"), Protocol::Amqp));
            assert!(matches!(login.credentials, Credentials::SasToken(_)));
            let message = &state.published[0];
            assert_eq!(message.sender.identity, identity("d1"));
            assert_eq!(message.body, "hello");
            assert_eq!(message.properties.system(SystemProperty::MessageId), PropertyValue::Text("m-1"));
            assert_eq!(message.properties.application(|name| name == "n"), PropertyValue::Text("5"));
        }
        up.close().await.expect("closed");
        until("logged out", || recording.state.lock().gone == [identity("d1")]).await;
        cbs.put_good("d1").await;
        connection.close().await.expect("closed");
        timeout(DEADLINE, serving).await.expect("in time").expect("no panic");
    }
}

#[tokio::test]
async fn bad_tokens_are_answered_and_links_without_a_token_are_refused() {
    let recording = strict();
    let (stream, _serving) = head(&recording);
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    let expired = "SharedAccessSignature sr=hub1.example.net%2Fdevices%2Fd1&sig=AAAA&se=1";
    let policy = "SharedAccessSignature sr=hub1.example.net&sig=AAAA&se=4000000000";
    for bad in [expired, policy, "garbage", "SharedAccessSignature sr", " "] {
        let (status, description) = cbs.put("put-token", bad).await;
        assert_eq!(status, 400, "{bad}: {description}");
        assert!(!description.contains("AAAA"));
    }
    let good = token("d1").await;
    assert_eq!(cbs.put("delete-token", &good).await.0, 400);
    let error = refusal(&mut connection, "/devices/d1/messages/events").await;
    assert!(error.contains("UnauthorizedAccess"), "{error}");
    // The connection and its other links go on.
    cbs.put_good("d1").await;
    let mut up = telemetry(&mut session, "up2", "d1").await;
    up.send("text").await.expect("answered");
    let refused = LoginError::Unavailable("later".into());
    recording.state.lock().refused.insert(identity("d2"), refused);
    cbs.put_good("d2").await;
    let error = refusal(&mut connection, "/devices/d2/messages/events").await;
    assert!(error.contains("InternalError"), "{error}");
}

#[tokio::test]
async fn other_addresses_and_directions_are_refused() {
    let recording = strict();
    let (stream, _serving) = head(&recording);
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    cbs.put_good("d1").await;
    for (address, condition) in [
        ("/devices/d1/messages/nowhere", "NotAllowed"),
        ("/devices/%20/messages/events", "NotAllowed"),
        ("/x/devices/d1/messages/events", "NotAllowed"),
        ("/devices/d1/messages/deviceBound", "NotAllowed"),
        ("/devices/d1/twin/reported", "NotAllowed"),
        ("/devices/d1/methods", "NotAllowed"),
    ] {
        let error = refusal(&mut connection, address).await;
        assert!(error.contains(condition), "{address}: {error}");
    }
    let attach = Receiver::attach(&mut session, "g", "/devices/d1/messages/events");
    let error = timeout(DEADLINE, attach).await.expect("in time").expect_err("refused");
    assert!(format!("{error:?}").contains("NotAllowed"), "{error:?}");
    assert!(recording.state.lock().logins.is_empty(), "nobody is logged in for nothing");
    cbs.put_good("d1").await;
}

#[tokio::test]
async fn a_message_is_accepted_only_after_it_is_stored() {
    let recording = strict();
    let (committed, commits) = watch::channel(false);
    recording.state.lock().commits = Some(commits);
    let (stream, _serving) = head(&recording);
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    cbs.put_good("d1").await;
    let mut up = telemetry(&mut session, "up", "d1").await;
    let mut outcomes = Vec::new();
    for number in 0..3 {
        let message = Message::builder().data(Binary::from(vec![number])).build();
        outcomes.push(up.send_batchable(message).await.expect("sent"));
    }
    until("published", || recording.state.lock().published.len() == 3).await;
    // The connection is served meanwhile, and none of its answers is the acceptance.
    cbs.put_good("d1").await;
    for outcome in &mut outcomes {
        let early = poll_fn(|cx| Poll::Ready(Future::poll(Pin::new(&mut *outcome), cx).is_ready())).await;
        assert!(!early, "accepted before it was stored");
    }
    committed.send_replace(true);
    for outcome in outcomes {
        let outcome = timeout(DEADLINE, outcome).await.expect("in time").expect("answered");
        assert!(matches!(outcome, Outcome::Accepted(_)));
    }
    assert_eq!(bodies(&recording), [&[0u8][..], &[1], &[2]]);
}

#[tokio::test]
async fn a_batch_is_stored_as_a_whole_or_not_at_all() {
    let recording = strict();
    let too_large = PublishError::TooLarge { size_bytes: 2, limit_bytes: 1 };
    recording.state.lock().bad_bodies.insert("big".into(), too_large);
    let (stream, _serving) = head(&recording);
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    cbs.put_good("d1").await;
    let mut up = telemetry(&mut session, "up", "d1").await;
    let batch = |bodies: &[&'static str]| {
        let inner = bodies.iter().map(|body| {
            let encoded = MessageEncoder::default().data(Bytes::from_static(body.as_bytes())).concat();
            Data(Binary::from(encoded))
        });
        let message = Message::builder().data_batch(inner).build();
        Sendable::builder().message(message).message_format(MESSAGE_FORMAT_BATCH).build()
    };
    let outcome = up.send(batch(&["a", "big", "b"])).await.expect("answered");
    let Outcome::Rejected(rejected) = outcome else { panic!("{outcome:?}") };
    let error = format!("{rejected:?}");
    assert!(error.contains("MessageSizeExceeded"), "{error}");
    assert!(bodies(&recording).is_empty());
    let outcome = up.send(batch(&["a", "b", "c"])).await.expect("answered");
    assert!(matches!(outcome, Outcome::Accepted(_)));
    assert_eq!(bodies(&recording), ["a", "b", "c"]);
    assert_eq!(recording.state.lock().batches, [3]);
    // A full store is not the message's fault.
    recording.state.lock().full = Some(PublishError::Full("no room".into()));
    let outcome = up.send(batch(&["d"])).await.expect("answered");
    assert!(format!("{outcome:?}").contains("device-container-throttled"), "{outcome:?}");
    recording.state.lock().full = None;
    // What is no data cannot be a message body.
    let outcome = up.send(Message::builder().value(7).build()).await.expect("answered");
    assert!(format!("{outcome:?}").contains("NotImplemented"), "{outcome:?}");
    assert_eq!(bodies(&recording).len(), 3);
}

#[tokio::test]
async fn many_identities_share_a_connection_and_a_take_over_hits_one() {
    let recording = strict();
    let (stream, _serving) = head(&recording);
    let mut connection = open(stream, false).await;
    let mut tokens = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut tokens).await;
    let names = ["d1", "d2", "d1/m1"];
    let mut links = Vec::new();
    for name in names {
        cbs.put_good(name).await;
        let mut session = Session::begin(&mut connection).await.expect("begun");
        // The same name in every session.
        let link = telemetry(&mut session, "TelemetrySenderLink", name).await;
        links.push((name, session, link));
    }
    for (name, _, link) in &mut links {
        link.send(Message::builder().data(Binary::from(name.as_bytes().to_vec())).build())
            .await
            .expect("answered");
    }
    for message in &recording.state.lock().published {
        assert_eq!(message.body, message.sender.identity.to_string());
    }
    recording.command("d2", Command::Close(CloseReason::TakenOver)).await;
    let detached = timeout(DEADLINE, links[1].2.on_detach()).await.expect("in time");
    assert!(format!("{detached:?}").contains("Stolen"), "{detached:?}");
    until("only that one is gone", || recording.state.lock().gone == [identity("d2")]).await;
    for at in [0, 2] {
        let outcome = links[at].2.send("more").await.expect("answered");
        assert!(matches!(outcome, Outcome::Rejected(_)), "the body is no data");
    }
    // A second telemetry link of an identity takes the place of its first.
    let mut second = telemetry(&mut links[0].1, "another", "d1").await;
    timeout(DEADLINE, links[0].2.on_detach()).await.expect("in time");
    let body = Message::builder().data(Binary::from(b"again".to_vec())).build();
    assert!(matches!(second.send(body).await.expect("answered"), Outcome::Accepted(_)));
    assert_eq!(recording.state.lock().gone, [identity("d2")], "it stays logged in");
}

#[tokio::test]
async fn the_hub_of_a_child_device_speaks_for_those_below_it() {
    let recording = strict();
    let (stream, _serving) = head(&recording);
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    cbs.put_good("child/$edgeHub").await;
    let mut properties = fe2o3_amqp::types::definitions::Fields::new();
    let chain = PeerValue::String("leaf;child".into());
    properties.insert(Symbol::from("com.microsoft:auth-chain"), chain);
    let attach = Sender::builder()
        .name("up")
        .target("/devices/leaf/messages/events")
        .properties(properties)
        .attach(&mut session);
    timeout(DEADLINE, attach).await.expect("in time").expect("attached");
    let state = recording.state.lock();
    assert_eq!(state.logins[0].auth_chain.as_deref(), Some("leaf;child"));
    assert!(matches!(state.logins[0].credentials, Credentials::SasToken(_)));
}

#[tokio::test]
async fn a_login_that_panics_refuses_its_link_and_nothing_else() {
    let recording = strict();
    recording.state.lock().panics = Some(identity("d1"));
    let (stream, _serving) = head(&recording);
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    cbs.put_good("d1").await;
    let error = refusal(&mut connection, "/devices/d1/messages/events").await;
    assert!(error.contains("InternalError"), "{error}");
    recording.state.lock().panics = None;
    telemetry(&mut session, "up2", "d1").await;
}

/// All vectors travel as one batch per link, so that their bytes arrive as they are.
#[tokio::test]
async fn messages_become_what_the_vectors_say() {
    let file: Json = serde_json::from_str(include_str!("vectors/amqp_messages_in.json")).unwrap();
    let vectors = file["vectors"].as_array().unwrap();
    let recording = strict();
    let (stream, _serving) = head(&recording);
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    let mut checked = 0;
    for (name, of) in [("up1", "d1"), ("up2", "d1/m1")] {
        cbs.put_good(of).await;
        let own: Vec<&Json> = vectors
            .iter()
            .filter(|vector| vector["in"]["link"]["moduleId"].is_string() == of.contains('/'))
            .collect();
        let inner = own.iter().map(|vector| Data(Binary::from(encoded(&vector["in"]["message"]))));
        let message = Message::builder().data_batch(inner).build();
        let batch = Sendable::builder().message(message).message_format(MESSAGE_FORMAT_BATCH).build();
        let mut up = telemetry(&mut session, name, of).await;
        let outcome = timeout(DEADLINE, up.send(batch)).await.expect("in time").expect("answered");
        assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
        let published = std::mem::take(&mut recording.state.lock().published);
        assert_eq!(published.len(), own.len());
        for (vector, message) in own.iter().zip(published) {
            let (id, output) = (&vector["id"], &vector["out"]);
            assert_eq!(message.body, STANDARD.decode(output["body"].as_str().unwrap()).unwrap(), "{id}");
            assert_eq!(message.sender.identity, identity(of), "{id}");
            for property in SystemProperty::ALL {
                let found = match message.properties.system(*property) {
                    PropertyValue::Text(text) => Some(text),
                    PropertyValue::Null => Some(""),
                    PropertyValue::Absent => None,
                };
                assert_eq!(found, output["system"][property.name()].as_str(), "{id} {}", property.name());
            }
            let mut found: Vec<_> = message.properties.application_properties().collect();
            found.sort_unstable();
            let expected = output["properties"].as_object().unwrap();
            let mut expected: Vec<_> =
                expected.iter().map(|(name, text)| (name.as_str(), text.as_str().unwrap())).collect();
            expected.sort_unstable();
            assert_eq!(found, expected, "{id}");
            checked += 1;
        }
    }
    assert_eq!(checked, vectors.len());
}

/// What a client sends in a whole conversation, as bytes.
async fn conversation() -> Vec<u8> {
    let recording = strict();
    let (mut to_head, _serving) = head(&recording);
    let (client, mut from_client) = duplex(64 * 1_024);
    let relay = tokio::spawn(async move {
        let (mut seen, mut up, mut down) = (Vec::new(), vec![0; 4_096], vec![0; 4_096]);
        loop {
            tokio::select! {
                read = from_client.read(&mut up) => match read.unwrap_or(0) {
                    0 => return seen,
                    read => {
                        seen.extend_from_slice(&up[..read]);
                        to_head.write_all(&up[..read]).await.unwrap();
                    }
                },
                read = to_head.read(&mut down) => match read.unwrap_or(0) {
                    0 => return seen,
                    read => from_client.write_all(&down[..read]).await.unwrap(),
                },
            }
        }
    });
    let mut connection = open(client, true).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    cbs.put_good("d1").await;
    let mut up = telemetry(&mut session, "up", "d1").await;
    for size in [0, 10, 1_000] {
        up.send(Message::builder().data(Binary::from(vec![7; size])).build()).await.expect("answered");
    }
    up.send(Message::builder().value("x").build()).await.expect("answered");
    up.close().await.expect("closed");
    connection.close().await.expect("closed");
    relay.await.unwrap()
}

#[tokio::test]
async fn hostile_bytes_end_the_connection_and_nothing_else() {
    let good = conversation().await;
    assert!(good.len() > 1_500);
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..400 {
        let mut bytes = good.clone();
        match round % 4 {
            0 => bytes.truncate(random.usize(..bytes.len())),
            1 => bytes = (0..random.usize(1..2_000)).map(|_| random.u8(..)).collect(),
            _ => {
                for _ in 0..random.usize(1..6) {
                    let at = random.usize(..bytes.len());
                    bytes[at] = random.u8(..);
                }
            }
        }
        let (mut stream, serving) = head(&strict());
        // The head may hang up in the middle.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = timeout(DEADLINE, stream.read_to_end(&mut rest)).await.expect("the head hangs up");
        drop(stream);
        timeout(DEADLINE, serving).await.expect("in time").expect("no panic");
    }
}
