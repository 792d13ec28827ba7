//! Who is logged in on an AMQP connection, and for how long: newer tokens, SASL, certificates, take-over, limits.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod amqp_client;
mod recording;

use std::time::Duration;

use amqp_client::{Cbs, Site, head_with, identity, open, refusal, strict, telemetry, token};
use bytes::Bytes;
use edgehub_broker::backend::{CloseReason, Command, Credentials, LoginError};
use edgehub_broker::head::amqp::AmqpLimits;
use fe2o3_amqp::connection::Connection;
use fe2o3_amqp::sasl_profile::SaslProfile;
use fe2o3_amqp::session::Session;
use fe2o3_amqp::types::messaging::{Message, Outcome};
use fe2o3_amqp::types::primitives::{Binary, Symbol, Value};
use fe2o3_amqp::{Receiver, Sender};
use recording::{DEADLINE, Recording, until};
use serde_json::Value as Json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::{Instant, timeout};

fn limits() -> AmqpLimits {
    AmqpLimits { iot_hub_host: Some("hub1.example.net".into()), ..AmqpLimits::default() }
}

fn renewed(recording: &Recording) -> Vec<String> {
    let state = recording.state.lock();
    let mut of: Vec<_> = state.renewals.iter().map(|login| login.identity.to_string()).collect();
    of.sort_unstable();
    of
}

/// Another good token of the same identity.
async fn other_token(of: &str, not: &str) -> String {
    // Two tokens of the same second are equal but for their order.
    let (head, rest) = not.split_once(' ').unwrap();
    let reordered = rest.split('&').rev().collect::<Vec<_>>().join("&");
    let other = format!("{head} {reordered}");
    assert!(other != not && other.contains(of));
    other
}

#[tokio::test]
async fn a_newer_token_is_verified_and_a_bad_one_ends_its_identity_only() {
    let mut site = Site::of("d1").await;
    let first = token("d2").await;
    assert_eq!(site.cbs.put("put-token", &first).await.0, 200);
    let mut up1 = telemetry(&mut site.session, "up1", "d1").await;
    let mut up2 = telemetry(&mut site.session, "up2", "d2").await;
    // The same token again is no news.
    site.cbs.put("put-token", &first).await;
    assert_eq!(renewed(&site.recording), Vec::<String>::new());
    let second = other_token("d2", &first).await;
    site.cbs.put("put-token", &second).await;
    until("verified", || renewed(&site.recording) == ["d2"]).await;
    let proof = site.recording.state.lock().renewals[0].credentials.clone();
    assert_eq!(proof, Credentials::SasToken(second.as_str().into()));
    up2.send(Message::builder().data(Binary::from(vec![1])).build()).await.expect("answered");
    // Whether it is good may not be known now: what was proved before stands.
    let later = LoginError::Unavailable("later".into());
    site.recording.state.lock().refused.insert(identity("d2"), later);
    site.cbs.put("put-token", &first).await;
    until("verified", || renewed(&site.recording).len() == 2).await;
    up2.send(Message::builder().data(Binary::from(vec![2])).build()).await.expect("answered");
    site.recording.state.lock().refused.insert(identity("d2"), LoginError::Refused("no".into()));
    site.cbs.put("put-token", &second).await;
    let detached = timeout(DEADLINE, up2.on_detach()).await.expect("in time");
    assert!(format!("{detached:?}").contains("UnauthorizedAccess"), "{detached:?}");
    until("gone", || site.recording.state.lock().gone == [identity("d2")]).await;
    let outcome = up1.send(Message::builder().data(Binary::from(vec![3])).build()).await.expect("answered");
    assert!(matches!(outcome, Outcome::Accepted(_)));
}

#[tokio::test]
async fn a_newer_token_of_a_child_hub_counts_for_all_it_acts_for() {
    let mut site = Site::of("child/$edgeHub").await;
    let chained = |chain: &str| {
        let mut properties = fe2o3_amqp::types::definitions::Fields::new();
        properties.insert(Symbol::from("com.microsoft:auth-chain"), Value::String(chain.into()));
        properties
    };
    let mut links = Vec::new();
    for (name, chain) in [("leaf1", "leaf1;child"), ("leaf2", "leaf2;child"), ("far", "far;other")] {
        if name == "far" {
            site.cbs.put_good("other/$edgeHub").await;
        }
        let attach = Sender::builder()
            .name(name)
            .target(format!("/devices/{name}/messages/events"))
            .properties(chained(chain))
            .attach(&mut site.session);
        links.push(timeout(DEADLINE, attach).await.expect("in time").expect("attached"));
    }
    let first = token("child/$edgeHub").await;
    let second = other_token("child", &first).await;
    site.cbs.put("put-token", &second).await;
    until("verified", || renewed(&site.recording) == ["leaf1", "leaf2"]).await;
}

/// What SASL answers: the outcome's code, or none while it thinks.
async fn sasl(stream: &mut DuplexStream, mechanism: &str, response: Option<&[u8]>) -> u8 {
    let mut fields = vec![0xa3, mechanism.len() as u8];
    fields.extend(mechanism.as_bytes());
    match response {
        Some(response) => {
            fields.extend([0xb0]);
            fields.extend((response.len() as u32).to_be_bytes());
            fields.extend(response);
        }
        None => fields.push(0x40),
    }
    let mut body = vec![0x00, 0x53, 0x41, 0xd0];
    body.extend((fields.len() as u32 + 4).to_be_bytes());
    body.extend(2u32.to_be_bytes());
    body.extend(fields);
    let mut bytes = b"AMQP\x03\x01\x00\x00".to_vec();
    bytes.extend((body.len() as u32 + 8).to_be_bytes());
    bytes.extend([2, 1, 0, 0]);
    bytes.extend(body);
    stream.write_all(&bytes).await.unwrap();
    let mut header = [0; 8];
    stream.read_exact(&mut header).await.unwrap();
    assert_eq!(&header, b"AMQP\x03\x01\x00\x00");
    let mut frame = Vec::new();
    for _mechanisms_then_outcome in 0..2 {
        let size = stream.read_u32().await.unwrap();
        frame = vec![0; size as usize - 4];
        stream.read_exact(&mut frame).await.unwrap();
    }
    let at = frame.windows(3).position(|window| window == [0x00, 0x53, 0x44]).expect("an outcome");
    let code = frame[at..].windows(2).find(|window| window[0] == 0x50).expect("a code");
    code[1]
}

#[tokio::test]
async fn sasl_answers_what_the_vectors_say() {
    let file: Json = serde_json::from_str(include_str!("vectors/amqp_sasl.json")).unwrap();
    for vector in file["vectors"].as_array().unwrap() {
        let (id, input, expected) = (&vector["id"], &vector["in"], &vector["out"]);
        let recording = strict();
        let iot_hub_host = input["hubHost"].as_str().map(Into::into);
        let limits = AmqpLimits { iot_hub_host, ..AmqpLimits::default() };
        let (mut stream, _serving) = head_with(&recording, limits, Vec::new());
        let response = input["authcid"].as_str().map(|user| format!("\0{user}\0the token").into_bytes());
        let code = sasl(&mut stream, input["mechanism"].as_str().unwrap(), response.as_deref()).await;
        let state = recording.state.lock();
        match expected["deviceId"].as_str() {
            Some(device) => {
                assert_eq!(code, 0, "{id}");
                let login = &state.logins[0];
                let found = (login.identity.device_id(), login.identity.module_id());
                assert_eq!(found, (device, expected["moduleId"].as_str()), "{id}");
                assert_eq!(login.credentials, Credentials::SasToken("the token".into()), "{id}");
            }
            None => {
                assert_eq!(u64::from(code), expected["code"].as_u64().unwrap(), "{id}");
                assert!(state.logins.is_empty(), "{id}");
            }
        }
    }
}

#[tokio::test]
async fn plain_proves_one_identity_and_others_need_tokens() {
    let recording = strict();
    let (stream, _serving) = head_with(&recording, limits(), Vec::new());
    let profile = SaslProfile::Plain { username: "d1@sas.hub1".into(), password: token("d1").await };
    let builder = Connection::builder().container_id("client").hostname("hub").sasl_profile(profile);
    let mut connection =
        timeout(DEADLINE, builder.open_with_stream(stream)).await.expect("in time").expect("opened");
    assert_eq!(recording.state.lock().logins.len(), 1);
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let up = telemetry(&mut session, "up", "d1").await;
    assert_eq!(recording.state.lock().logins.len(), 1, "no second login");
    let error = refusal(&mut connection, "/devices/d2/messages/events").await;
    assert!(error.contains("UnauthorizedAccess"), "{error}");
    // When all its links are gone it is logged out, and may come again.
    up.close().await.expect("closed");
    until("gone", || recording.state.lock().gone == [identity("d1")]).await;
    telemetry(&mut session, "up2", "d1").await;

    let recording = strict();
    recording.state.lock().refused.insert(identity("d1"), LoginError::Refused("no".into()));
    let (mut stream, serving) = head_with(&recording, limits(), Vec::new());
    assert_eq!(sasl(&mut stream, "PLAIN", Some(b"\0d1@hub1\0bad")).await, 2);
    drop(stream);
    timeout(DEADLINE, serving).await.expect("in time").expect("no panic");
    // Without a hub to name there is no such user.
    let (mut stream, _serving) = head_with(&strict(), AmqpLimits::default(), Vec::new());
    assert_eq!(sasl(&mut stream, "PLAIN", Some(b"\0d1@hub1\0good")).await, 2);
}

#[tokio::test]
async fn a_certificate_proves_with_and_without_sasl_and_then_tokens_are_not_taken() {
    let certificate = || vec![Bytes::from_static(b"certificate")];
    for anonymous in [false, true] {
        let recording = strict();
        let (stream, _serving) = head_with(&recording, limits(), certificate());
        let mut connection = open(stream, anonymous).await;
        let mut session = Session::begin(&mut connection).await.expect("begun");
        telemetry(&mut session, "up", "d1").await;
        let login = recording.state.lock().logins[0].credentials.clone();
        assert_eq!(login, Credentials::Certificate(certificate()));
        let error = refusal(&mut connection, "$cbs").await;
        assert!(error.contains("NotAllowed"), "{error}");
    }
    // A token is worth more than a certificate that came by the way.
    let recording = strict();
    let (stream, _serving) = head_with(&recording, limits(), certificate());
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = Cbs::attach(&mut session).await;
    cbs.put_good("d1").await;
    telemetry(&mut session, "up", "d1").await;
    assert!(matches!(recording.state.lock().logins[0].credentials, Credentials::SasToken(_)));
    // EXTERNAL is offered to those who showed one.
    let (mut stream, _serving) = head_with(&strict(), limits(), certificate());
    assert_eq!(sasl(&mut stream, "EXTERNAL", None).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_last_identity_was_taken_over_has_time_to_close_itself() {
    let mut site = Site::of("d1").await;
    let mut up = telemetry(&mut site.session, "up", "d1").await;
    site.recording.command("d1", Command::Close(CloseReason::TakenOver)).await;
    let detached = timeout(DEADLINE, up.on_detach()).await.expect("in time");
    assert!(format!("{detached:?}").contains("Stolen"), "{detached:?}");
    let told_at = Instant::now();
    timeout(DEADLINE, site.connection.on_close()).await.expect("in time").expect_err("with a reason");
    assert!(told_at.elapsed() >= AmqpLimits::default().vacant_max / 2, "{:?}", told_at.elapsed());
}

#[tokio::test]
async fn a_stop_ends_sessions_before_the_connection_and_detaches_no_link() {
    let mut site = Site::of("d1").await;
    let mut up = telemetry(&mut site.session, "up", "d1").await;
    site.recording.command("d1", Command::Close(CloseReason::Stopping)).await;
    timeout(DEADLINE, site.connection.on_close()).await.expect("in time").expect_err("with a reason");
    let detached = timeout(DEADLINE, up.on_detach()).await.expect("in time");
    assert!(format!("{detached:?}").contains("SessionStopped"), "{detached:?}");
}

#[tokio::test]
async fn expired_credentials_detach_all_links_and_leave_the_connection() {
    let mut site = Site::of("d1").await;
    let mut up = telemetry(&mut site.session, "up", "d1").await;
    let mut down = site.receiver("down", "/devices/d1/twin").await;
    site.recording.command("d1", Command::Close(CloseReason::Unauthorized)).await;
    let detached = timeout(DEADLINE, up.on_detach()).await.expect("in time");
    assert!(format!("{detached:?}").contains("UnauthorizedAccess"), "{detached:?}");
    let detached = amqp_client::detached(&mut down).await;
    assert!(detached.contains("UnauthorizedAccess"), "{detached}");
    site.cbs.put_good("d2").await;
    let mut session = Session::begin(&mut site.connection).await.expect("begun");
    telemetry(&mut session, "up", "d2").await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_on_which_nobody_logs_in_is_closed() {
    let recording = strict();
    let first_login_max = Duration::from_secs(100);
    let (stream, serving) = head_with(&recording, AmqpLimits { first_login_max, ..limits() }, Vec::new());
    let started = tokio::time::Instant::now();
    let mut connection = open(stream, false).await;
    let mut session = Session::begin(&mut connection).await.expect("begun");
    let _down = Receiver::attach(&mut session, "down", "$cbs").await.expect("attached");
    serving.await.expect("no panic");
    let elapsed = started.elapsed().as_secs();
    assert!((100..110).contains(&elapsed), "{elapsed}");
}

#[tokio::test]
async fn too_many_identities_are_refused_and_those_that_are_there_go_on() {
    let limits = AmqpLimits { identities_max: 2, ..limits() };
    let mut site = Site::with(strict(), limits, "d1").await;
    for name in ["d2", "d3"] {
        site.cbs.put_good(name).await;
    }
    let mut up = telemetry(&mut site.session, "up", "d1").await;
    let second = telemetry(&mut site.session, "up2", "d2").await;
    let error = refusal(&mut site.connection, "/devices/d3/messages/events").await;
    assert!(error.contains("InternalError"), "{error}");
    second.close().await.expect("closed");
    until("gone", || site.recording.state.lock().gone == [identity("d2")]).await;
    telemetry(&mut site.session, "up3", "d3").await;
    up.send(Message::builder().data(Binary::from(vec![3])).build()).await.expect("answered");
}
