//! The control plane upstream: twins, methods and cloud-to-device messages of local identities over one connection.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::amqp::{
    Condition, Error, LinkKind, MessageId, Outcome as Settled, ReceiverSettle, SenderSettle, Value,
};
use edgehub_broker::backend::{
    CallId, CloseReason, Command, Deliveries, DesiredPatch, Feature, MethodAnswer, MethodCall, Outcome,
    Settler, Target, TwinAnswer, TwinError, TwinOperation, TwinReply,
};
use edgehub_broker::delivery::BackoffOptions;
use edgehub_broker::message::{Message, Origin, Properties, Sender, SystemProperty, Value as Held};
use edgehub_broker::upstream::control::{ControlError, Downward, Wanted};
use edgehub_broker::upstream::{UpstreamState, WatchdogStep};
use recording::{DEADLINE, Recording, until};
use tokio::time::Instant;
use upstream_peers::cloud::{Cloud, Push};
use upstream_peers::foreign::Foreign;
use upstream_peers::{SHORT, Server, silent, tls};
use upstream_site::{Knobs, Plane, identity, plane};

const ALL: Wanted = Wanted { desired: true, methods: true, cloud_to_device: true };
const TAG: [u8; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

async fn cloud(cloud: &Cloud, knobs: &Knobs) -> (Server, Plane) {
    let (server_tls, client_tls) = tls();
    let serving = cloud.clone();
    let server = Server::start(0, server_tls, move |stream| serving.clone().serve(stream)).await;
    let mut plane = plane(server.port, client_tls, knobs);
    assert!(matches!(plane.hears().await, Downward::Up));
    (server, plane)
}

/// Waits until it is said that what an identity wants is in place.
async fn linked(plane: &mut Plane, name: &str) {
    loop {
        match plane.hears().await {
            Downward::Linked(linked) if linked == identity(name) => return,
            Downward::Linked(_) | Downward::Up | Downward::Down => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn twins_are_read_and_patched_over_one_session_that_is_opened_when_it_is_needed() {
    let peer = Cloud::default();
    let (_server, plane) = cloud(&peer, &Knobs::default()).await;
    let m1 = identity("edge1/m1");
    assert_eq!(peer.state.lock().sessions, 1, "for tokens only");
    let patch = Bytes::from_static(br#"{"a":1}"#);
    let (twin, version) =
        tokio::join!(plane.control.twin(&m1), plane.control.patch_reported(&m1, patch.clone()));
    assert_eq!(twin.unwrap(), r#"{"desired":{"$version":1},"reported":{"$version":1}}"#);
    assert_eq!(version.unwrap(), Some(7));
    let state = peer.state.lock();
    assert_eq!(state.sessions, 2);
    let asked: Vec<_> =
        state.asked.iter().map(|asked| (asked.1.as_str(), asked.2.as_deref(), &asked.4[..])).collect();
    assert_eq!(asked, [("GET", None, &b""[..]), ("PATCH", Some("/properties/reported"), &patch[..])]);
    for (operation, correlation) in state.asked.iter().map(|asked| (&asked.1, &asked.3)) {
        let prefix = if operation == "GET" { "Get" } else { "Patch" };
        let id = correlation.strip_prefix(prefix).unwrap();
        assert!(uuid::Uuid::try_parse(id).is_ok(), "{correlation}");
    }
    let links: Vec<_> = state.attaches.iter().filter(|(of, _, _)| of == "edge1/m1").collect();
    let names: Vec<&str> = links.iter().map(|(_, _, attach)| attach.name.as_str()).collect();
    assert_eq!(names, ["TwinReceiverLink", "TwinSenderLink"]);
    let property = |at: usize, name: &str| {
        let found = links[at].2.properties.iter().find(|(key, _)| key.as_str() == name);
        found.and_then(|(_, value)| Some(value.as_text()?.to_string())).unwrap()
    };
    let channel = property(0, "com.microsoft:channel-correlation-id");
    assert!(channel.starts_with("twin:") && channel == property(1, "com.microsoft:channel-correlation-id"));
    assert_eq!(property(0, "com.microsoft:auth-chain"), "edge1/m1;edge1");
    assert_eq!(property(1, "com.microsoft:client-version"), "test");
    assert!(links.iter().all(|(_, _, attach)| attach.snd_settle == Some(SenderSettle::Settled)));
}

#[tokio::test]
async fn what_an_identity_wants_is_put_in_place_told_and_let_go() {
    let peer = Cloud::default();
    let (_server, mut plane) = cloud(&peer, &Knobs::default()).await;
    let (edge, m1) = (identity("edge1"), identity("edge1/m1"));
    plane.control.want(&edge, ALL).await;
    linked(&mut plane, "edge1").await;
    assert_eq!(peer.operations("edge1"), ["PUT"], "notifications are asked for once");
    let asked = peer.state.lock().asked[0].clone();
    assert_eq!(asked.2.as_deref(), Some("/notifications/twin/properties/desired"));
    {
        let state = peer.state.lock();
        let of = |kind| &state.attaches.iter().find(|attach| attach.1 == kind).unwrap().2;
        let modes = |kind| (of(kind).snd_settle, of(kind).rcv_settle, of(kind).name.to_string());
        let (settled, first) = (Some(SenderSettle::Settled), Some(ReceiverSettle::First));
        assert_eq!(modes(LinkKind::MethodCalls), (settled, first, "MethodsReceiverLink".into()));
        assert_eq!(modes(LinkKind::MethodResponses), (settled, first, "MethodsSenderLink".into()));
        let second = (Some(SenderSettle::Unsettled), Some(ReceiverSettle::Second));
        let (snd, rcv, name) = modes(LinkKind::CloudToDevice);
        assert_eq!(((snd, rcv), name.as_str()), (second, "TelemetryReceiverLink"));
    }
    // A module has no messages from the cloud.
    plane.control.want(&m1, ALL).await;
    linked(&mut plane, "edge1/m1").await;
    assert_eq!(peer.attached("edge1/m1", LinkKind::CloudToDevice), 0);
    // Less is wanted, then more, then nothing.
    let methods = Wanted { methods: true, ..Wanted::default() };
    plane.control.want(&edge, methods).await;
    linked(&mut plane, "edge1").await;
    plane.control.want(&edge, ALL).await;
    linked(&mut plane, "edge1").await;
    assert_eq!(peer.operations("edge1"), ["PUT", "PUT"]);
    assert_eq!(peer.attached("edge1", LinkKind::MethodCalls), 1, "what stays is not touched");
    assert_eq!(peer.attached("edge1", LinkKind::CloudToDevice), 2, "what was let go comes anew");
    until("two sessions", || plane.status().sessions == 2).await;
    plane.control.want(&edge, Wanted::default()).await;
    until("its session is let go", || plane.status().sessions == 1).await;
}

#[tokio::test]
async fn what_the_cloud_sends_reaches_the_hub_and_its_answers_the_cloud() {
    let peer = Cloud::default();
    let (_server, mut plane) = cloud(&peer, &Knobs::default()).await;
    plane.control.want(&identity("edge1"), ALL).await;
    linked(&mut plane, "edge1").await;

    peer.push(Push::Desired("edge1", r#"{"a":1,"$version":2}"#));
    let Downward::Desired { identity: of, patch } = plane.hears().await else { panic!("desired") };
    assert_eq!((of, &patch[..]), (identity("edge1"), &br#"{"a":1,"$version":2}"#[..]));

    // Ids keep their type; an argument that is missing is null.
    let ids = [MessageId::Uuid([7; 16]), MessageId::String("call-2".into())];
    for (id, payload, argument) in [(&ids[0], "{\"x\":1}", "{\"x\":1}"), (&ids[1], "", "null")] {
        peer.push(Push::Call("edge1", id.clone(), "reboot", payload));
        let Downward::Method { name, payload, answer, .. } = plane.hears().await else { panic!("method") };
        assert_eq!((&*name, &payload[..]), ("reboot", argument.as_bytes()));
        answer.send(MethodAnswer { status: -3, payload: Bytes::from_static(b"[1]") }).unwrap();
        until("answered", || peer.state.lock().answered.iter().any(|answered| answered.1 == *id)).await;
    }
    // Nobody answers the third, which holds nothing up.
    peer.push(Push::Call("edge1", ids[0].clone(), "mute", ""));
    drop(plane.hears().await);
    assert_eq!(peer.state.lock().answered[0].2, Value::Int(-3));
    assert_eq!(peer.state.lock().answered[1].3, "[1]");

    for (outcome, seen) in [
        (Outcome::Accepted, Settled::Accepted),
        (Outcome::Rejected, Settled::Rejected(None)),
        (Outcome::Released, Settled::Released),
        (Outcome::NotOffered, Settled::Released),
    ] {
        peer.push(Push::ToDevice("edge1", TAG, "hello"));
        let Downward::CloudToDevice { message, settle, .. } = plane.hears().await else { panic!("message") };
        assert_eq!((&message.body[..], &message.sender.identity), (&b"hello"[..], &identity("edge1")));
        let held = |property| message.properties.system(property);
        assert_eq!(held(SystemProperty::MessageId), Held::Text("c2d-1"));
        assert_eq!(held(SystemProperty::SequenceNumber), Held::Text("9"));
        assert_eq!(held(SystemProperty::LockToken), Held::Text("00010203-0405-0607-0809-0a0b0c0d0e0f"));
        let free: Vec<_> = message.properties.application_properties().collect();
        assert_eq!(free, [("level", "hot")]);
        settle.send(outcome).unwrap();
        until("settled", || peer.state.lock().outcomes.last().is_some_and(|(_, last)| *last == seen)).await;
        peer.state.lock().outcomes.clear();
    }
    // More than the link's credit, one after the other: settling renews it.
    for _ in 0..120 {
        peer.push(Push::ToDevice("edge1", TAG, "hello"));
        let Downward::CloudToDevice { settle, .. } = plane.hears().await else { panic!("message") };
        settle.send(Outcome::Accepted).unwrap();
    }
    until("all settled", || peer.state.lock().outcomes.len() == 120).await;
    assert_eq!(peer.attached("edge1", LinkKind::CloudToDevice), 1);
}

#[tokio::test]
async fn without_a_connection_what_is_asked_fails_at_once_and_what_is_wanted_holds() {
    let (port, listening) = silent().await;
    let (server_tls, client_tls) = tls();
    let mut plane = plane(port, client_tls, &Knobs::default());
    let edge = identity("edge1");
    for _ in 0..3 {
        assert_eq!(plane.control.twin(&edge).await, Err(ControlError::Offline));
        let patched = plane.control.patch_reported(&edge, "{}".into()).await;
        assert_eq!(patched, Err(ControlError::Offline));
    }
    plane.control.want(&edge, ALL).await;
    listening.abort();
    let _ = listening.await;
    let peer = Cloud::default();
    let serving = peer.clone();
    let server = Server::start(port, server_tls.clone(), move |stream| serving.clone().serve(stream)).await;
    assert!(matches!(plane.hears().await, Downward::Up));
    linked(&mut plane, "edge1").await;
    // The connection is lost while a request waits.
    peer.state.lock().twin_status.insert("edge1".into(), 0);
    let control = plane.control.clone();
    let asking = tokio::spawn(async move { control.twin(&identity("edge1")).await });
    until("asked", || peer.operations("edge1").contains(&"GET".to_owned())).await;
    let port = server.stop().await;
    assert_eq!(asking.await.unwrap(), Err(ControlError::Offline));
    assert!(matches!(plane.hears().await, Downward::Down));
    peer.state.lock().twin_status.clear();
    let serving = peer.clone();
    let _server = Server::start(port, server_tls, move |stream| serving.clone().serve(stream)).await;
    assert!(matches!(plane.hears().await, Downward::Up));
    linked(&mut plane, "edge1").await;
    assert!(plane.control.twin(&edge).await.is_ok());
}

/// Starts the peer anew at a port that was just closed; returns when it is connected.
async fn again(peer: &Cloud, port: u16, server_tls: &Arc<rustls::ServerConfig>, plane: &mut Plane) -> Server {
    let serving = peer.clone();
    let server = Server::start(port, server_tls.clone(), move |stream| serving.clone().serve(stream)).await;
    while !matches!(plane.hears().await, Downward::Up) {}
    server
}

#[tokio::test]
async fn answered_requests_make_the_next_pause_the_shortest_again() {
    let (peer, (server_tls, client_tls)) = (Cloud::default(), tls());
    let serving = peer.clone();
    let mut server = Server::start(0, server_tls.clone(), move |stream| serving.clone().serve(stream)).await;
    let first = Duration::from_millis(20);
    let backoff = BackoffOptions { first, max: Duration::from_secs(600) };
    let mut plane = plane(server.port, client_tls, &Knobs { backoff, ..Knobs::default() });
    let m1 = identity("edge1/m1");
    while !matches!(plane.hears().await, Downward::Up) {}
    // If pauses went on growing, the last would be longer than a minute.
    for _ in 0..13 {
        let up = Instant::now();
        plane.control.twin(&m1).await.unwrap();
        until("it stands for a while", || up.elapsed() > 4 * first).await;
        let failures = plane.status().failures;
        let port = server.stop().await;
        until("the loss is seen", || plane.status().failures > failures).await;
        server = again(&peer, port, &server_tls, &mut plane).await;
    }
}

#[tokio::test]
async fn connections_that_end_at_once_are_made_less_and_less_often_whatever_they_answered() {
    let (peer, (server_tls, client_tls)) = (Cloud::default(), tls());
    let serving = peer.clone();
    let mut server = Server::start(0, server_tls.clone(), move |stream| serving.clone().serve(stream)).await;
    let first = Duration::from_secs(1);
    let backoff = BackoffOptions { first, max: Duration::from_secs(600) };
    let mut plane = plane(server.port, client_tls, &Knobs { backoff, ..Knobs::default() });
    while !matches!(plane.hears().await, Downward::Up) {}
    let mut pauses = Vec::new();
    for _ in 0..2 {
        plane.control.twin(&identity("edge1/m1")).await.unwrap();
        let ends = Instant::now();
        let port = server.stop().await;
        server = again(&peer, port, &server_tls, &mut plane).await;
        pauses.push(ends.elapsed());
    }
    assert!(pauses[1] >= first * 18 / 10, "{pauses:?}");
}

#[tokio::test]
async fn errors_of_the_upstream_reach_who_asked_and_a_429_is_a_state() {
    let peer = Cloud::default();
    let (_server, plane) = cloud(&peer, &Knobs { operation_timeout: SHORT * 2, ..Knobs::default() }).await;
    let m1 = identity("edge1/m1");
    for (status, error) in [
        (400, ControlError::Refused { status: 400, text: r#"{"message":"no"}"#.into() }),
        (401, ControlError::Unauthorized(r#"401 {"message":"no"}"#.into())),
        (429, ControlError::Refused { status: 429, text: r#"{"message":"no"}"#.into() }),
    ] {
        peer.state.lock().twin_status.insert("edge1/m1".into(), status);
        assert_eq!(plane.control.twin(&m1).await, Err(error));
    }
    until("throttled", || plane.status().state == UpstreamState::Throttled).await;
    assert!(plane.status().reason.contains("429"));
    peer.state.lock().twin_status.clear();
    assert!(plane.control.twin(&m1).await.is_ok());
    until("up again", || plane.status().state == UpstreamState::Up).await;
    assert_eq!(plane.status().failures, 0);
}

#[tokio::test]
async fn requests_are_bounded_per_identity_and_what_is_never_answered_is_started_anew() {
    let peer = Cloud::default();
    let (_server, plane) = cloud(&peer, &Knobs { operation_timeout: SHORT, ..Knobs::default() }).await;
    // Its links are there, so that all who ask have their whole time.
    assert!(plane.control.twin(&identity("edge1/m1")).await.is_ok());
    peer.state.lock().twin_status.insert("edge1/m1".into(), 0);
    let mut asking = Vec::new();
    for _ in 0..20 {
        let control = plane.control.clone();
        asking.push(tokio::spawn(async move { control.twin(&identity("edge1/m1")).await }));
    }
    for one in asking {
        assert_eq!(one.await.unwrap(), Err(ControlError::Timeout));
    }
    assert_eq!(peer.operations("edge1/m1").len(), 1 + 16);
    assert!(plane.control.twin(&identity("edge1/m2")).await.is_ok(), "others go on");
    until("counted", || plane.status().watchdog.contains_key(&WatchdogStep::Link)).await;
    peer.state.lock().twin_status.clear();
    let deadline = Instant::now() + DEADLINE;
    while plane.control.twin(&identity("edge1/m1")).await.is_err() {
        assert!(Instant::now() < deadline, "it heals");
        tokio::task::yield_now().await;
    }
    assert!(peer.attached("edge1/m1", LinkKind::TwinRequests) >= 2, "over a link that was made anew");
    assert_eq!(plane.status().failures, 0);
}

#[tokio::test]
async fn one_refused_identity_among_fifty_is_parked_alone_and_comes_back() {
    let peer = Cloud::default();
    let gone = Error::new(Condition::NOT_FOUND, "no such module");
    peer.state.lock().refuses.insert(("edge1/n7".into(), LinkKind::MethodCalls), gone);
    peer.state.lock().token_status.insert("/modules/n9".into(), 401);
    let (_server, mut plane) = cloud(&peer, &Knobs { senders: 50, ..Knobs::default() }).await;
    let wanted = Wanted { methods: true, desired: true, cloud_to_device: false };
    for number in 0..50 {
        plane.control.want(&identity(&format!("edge1/n{number}")), wanted).await;
    }
    let mut in_place = Vec::new();
    while in_place.len() < 48 {
        let Downward::Linked(of) = plane.hears().await else { panic!("linked") };
        in_place.push(of);
    }
    let (n7, n9) = (identity("edge1/n7"), identity("edge1/n9"));
    assert!(!in_place.contains(&n7) && !in_place.contains(&n9));
    until("both are parked", || plane.status().parked_identities == 2).await;
    assert!(plane.control.twin(&identity("edge1/n8")).await.is_ok());
    let refused = plane.control.twin(&n9).await;
    assert!(matches!(&refused, Err(ControlError::Unauthorized(text)) if text.contains("401")), "{refused:?}");
    until("it is tried again", || peer.attached("edge1/n7", LinkKind::MethodCalls) >= 3).await;
    peer.state.lock().refuses.clear();
    peer.state.lock().token_status.clear();
    let mut back = Vec::new();
    while back.len() < 2 {
        let Downward::Linked(of) = plane.hears().await else { panic!("linked") };
        back.push(of);
    }
    assert!(back.contains(&n7) && back.contains(&n9), "nobody else had to be told: {back:?}");
    until("nobody is parked", || plane.status().parked_identities == 0).await;
    assert_eq!(plane.status().failures, 0);
}

#[tokio::test]
async fn a_feature_that_the_upstream_lacks_does_not_take_the_others_with_it() {
    let peer = Cloud::default();
    let lacks = Error::from(Condition::NOT_IMPLEMENTED);
    peer.state.lock().refuses.insert(("edge1".into(), LinkKind::CloudToDevice), lacks.clone());
    let (_server, mut plane) = cloud(&peer, &Knobs::default()).await;
    plane.control.want(&identity("edge1"), ALL).await;
    linked(&mut plane, "edge1").await;
    peer.push(Push::Call("edge1", MessageId::String("1".into()), "reboot", "1"));
    assert!(matches!(plane.hears().await, Downward::Method { .. }));
    until("it is asked for again", || peer.attached("edge1", LinkKind::CloudToDevice) >= 3).await;
    assert_eq!(peer.attached("edge1", LinkKind::MethodCalls), 1);
    peer.state.lock().refuses.clear();
    peer.push(Push::ToDevice("edge1", TAG, "hello"));
    let heard = plane.hears().await;
    assert!(matches!(heard, Downward::CloudToDevice { .. }), "what is in place is told once: {heard:?}");
    // No twins at all.
    peer.state.lock().refuses.insert(("edge1/m1".into(), LinkKind::TwinAnswers), lacks);
    assert_eq!(plane.control.twin(&identity("edge1/m1")).await, Err(ControlError::Unsupported));
}

#[tokio::test]
async fn identities_that_get_nothing_keep_no_place_from_others() {
    let peer = Cloud::default();
    for number in 0..70 {
        let lacks = Error::from(Condition::NOT_IMPLEMENTED);
        peer.state.lock().refuses.insert((format!("edge1/n{number}"), LinkKind::MethodCalls), lacks);
    }
    let never = BackoffOptions { first: Duration::from_secs(3_600), max: Duration::from_secs(3_600) };
    let knobs = Knobs { senders: 71, backoff: never, ..Knobs::default() };
    let (_server, mut plane) = cloud(&peer, &knobs).await;
    let methods = Wanted { methods: true, ..Wanted::default() };
    for number in 0..71 {
        plane.control.want(&identity(&format!("edge1/n{number}")), methods).await;
    }
    linked(&mut plane, "edge1/n70").await;
    until("all others wait", || plane.status().parked_identities == 70).await;
    assert_eq!(plane.status().failures, 0);
}

#[tokio::test]
async fn lost_links_and_sessions_are_made_anew_and_the_hub_is_told() {
    let peer = Cloud::default();
    let (_server, mut plane) = cloud(&peer, &Knobs::default()).await;
    plane.control.want(&identity("edge1"), ALL).await;
    linked(&mut plane, "edge1").await;
    for kind in [LinkKind::TwinAnswers, LinkKind::CloudToDevice, LinkKind::MethodResponses] {
        peer.push(Push::Detach("edge1", kind));
        linked(&mut plane, "edge1").await;
    }
    peer.push(Push::End("edge1"));
    linked(&mut plane, "edge1").await;
    peer.state.lock().drops = 1;
    assert_eq!(plane.control.twin(&identity("edge1")).await, Err(ControlError::Offline));
    linked(&mut plane, "edge1").await;
    assert!(plane.control.twin(&identity("edge1")).await.is_ok());
    assert_eq!(plane.status().failures, 0, "the connection stayed");
    // A message that was not settled when its link went is void.
    peer.push(Push::ToDevice("edge1", TAG, "hello"));
    let Downward::CloudToDevice { settle, .. } = plane.hears().await else { panic!("message") };
    peer.push(Push::End("edge1"));
    linked(&mut plane, "edge1").await;
    let _ = settle.send(Outcome::Accepted);
    peer.push(Push::ToDevice("edge1", TAG, "again"));
    let Downward::CloudToDevice { settle, .. } = plane.hears().await else { panic!("message") };
    settle.send(Outcome::Rejected).unwrap();
    until("only the second is settled", || !peer.state.lock().outcomes.is_empty()).await;
    assert_eq!(peer.state.lock().outcomes, [("edge1".to_owned(), Settled::Rejected(None))]);
}

#[tokio::test]
async fn a_hub_above_serves_the_control_plane_of_a_hub_below() {
    let (server_tls, client_tls) = tls();
    let parent = Recording::default();
    let server = Server::head(0, server_tls, parent.clone()).await;
    let mut plane = plane(server.port, client_tls, &Knobs::default());
    let edge = identity("edge1");
    plane.control.want(&identity("edge1/m1"), ALL).await;
    linked(&mut plane, "edge1/m1").await;
    plane.control.want(&edge, ALL).await;
    linked(&mut plane, "edge1").await;
    for feature in [Feature::DesiredProperties, Feature::Methods, Feature::CloudToDevice] {
        assert!(parent.state.lock().features.contains(&(edge.clone(), feature, true)), "{feature:?}");
    }
    {
        let state = parent.state.lock();
        let login = state.logins.iter().find(|login| login.identity == edge).unwrap();
        assert_eq!(login.auth_chain.as_deref(), Some("edge1"));
    }
    // Twins: answers come by the mailbox, the second before the first.
    let ask = |at: usize| parent.state.lock().twin_requests[at].1.correlation.clone().unwrap();
    let control = plane.control.clone();
    let reading = tokio::spawn(async move { control.twin(&identity("edge1")).await });
    until("read", || parent.state.lock().twin_requests.len() == 1).await;
    let control = plane.control.clone();
    let patching =
        tokio::spawn(async move { control.patch_reported(&identity("edge1"), r#"{"a":1}"#.into()).await });
    until("patched", || parent.state.lock().twin_requests.len() == 2).await;
    let patch = TwinOperation::PatchReported(r#"{"a":1}"#.into());
    assert_eq!(parent.state.lock().twin_requests[1].1.operation, patch);
    let answer = |at, result| Command::TwinAnswer(TwinAnswer { correlation: ask(at), result });
    parent.command("edge1", answer(1, Ok(TwinReply::Patched { version: Some(3) }))).await;
    assert_eq!(patching.await.unwrap(), Ok(Some(3)));
    parent.command("edge1", answer(0, Err(TwinError::Busy))).await;
    let refused = reading.await.unwrap();
    assert!(matches!(refused, Err(ControlError::Refused { status: 429, .. })), "{refused:?}");
    // Down: a notification, a call and a message.
    let changed = DesiredPatch { patch: r#"{"$version":2}"#.into(), version: 2 };
    parent.command("edge1", Command::Desired(changed)).await;
    let Downward::Desired { patch, .. } = plane.hears().await else { panic!("desired") };
    assert_eq!(patch, r#"{"$version":2}"#);
    let call = MethodCall { id: CallId::new(), name: "reboot".into(), payload: "5".into() };
    parent.command("edge1", Command::Invoke(call.clone())).await;
    let Downward::Method { name, payload, answer, .. } = plane.hears().await else { panic!("method") };
    assert_eq!((&*name, &payload[..]), ("reboot", &b"5"[..]));
    let answered = MethodAnswer { status: 207, payload: "[]".into() };
    answer.send(answered.clone()).unwrap();
    until("answered", || !parent.state.lock().method_answers.is_empty()).await;
    assert_eq!(parent.state.lock().method_answers, [(edge.clone(), call.id, answered)]);
    let sender = Sender { identity: edge.clone(), origin: Origin::Downstream, model_id: None };
    let message = |tag, body: &'static str| {
        (
            tag,
            Message::new(Arc::new(sender.clone()), Properties::empty(), Bytes::from_static(body.as_bytes())),
        )
    };
    let settler = Settler::new();
    let messages = vec![message(1, "one"), message(2, "two"), message(3, "three")];
    let deliveries = Deliveries { target: Target::Device, messages, settler: settler.clone() };
    parent.command("edge1", Command::Deliver(deliveries)).await;
    let outcomes = [Outcome::Accepted, Outcome::Rejected, Outcome::Released];
    for (body, outcome) in ["one", "two", "three"].into_iter().zip(outcomes) {
        let Downward::CloudToDevice { message, settle, .. } = plane.hears().await else { panic!("message") };
        assert_eq!(message.body, body);
        settle.send(outcome).unwrap();
    }
    let mut settled = Vec::new();
    while settled.len() < 3 {
        settled.extend(settler.settled().await);
    }
    assert_eq!(settled, [1, 2, 3].into_iter().zip(outcomes).collect::<Vec<_>>());
    // Whoever takes the identity over takes its links; they come back.
    parent.command("edge1", Command::Close(CloseReason::TakenOver)).await;
    linked(&mut plane, "edge1").await;
    assert_eq!(plane.status().failures, 0);
}

#[tokio::test]
async fn an_independent_implementation_serves_the_control_plane() {
    let (server_tls, client_tls) = tls();
    let peer = Foreign::default();
    let serving = peer.clone();
    let server = Server::start(0, server_tls, move |stream| serving.clone().serve(stream)).await;
    let mut plane = plane(server.port, client_tls, &Knobs::default());
    assert!(matches!(plane.hears().await, Downward::Up));
    let edge = identity("edge1");
    assert_eq!(plane.control.twin(&edge).await.unwrap(), r#"{"desired":{},"reported":{}}"#);
    assert_eq!(plane.control.patch_reported(&edge, "{}".into()).await.unwrap(), Some(5));
    plane.control.want(&edge, ALL).await;
    linked(&mut plane, "edge1").await;
    // It calls a method and sends a message as soon as it can.
    let (mut called, mut told) = (false, false);
    while !(called && told) {
        match plane.hears().await {
            Downward::Method { name, answer, .. } => {
                assert_eq!(&*name, "foreign");
                answer.send(MethodAnswer { status: 201, payload: "7".into() }).unwrap();
                called = true;
            }
            Downward::CloudToDevice { message, settle, .. } => {
                assert_eq!(message.body, "from afar");
                settle.send(Outcome::Accepted).unwrap();
                told = true;
            }
            Downward::Up | Downward::Linked(_) => {}
            other => panic!("{other:?}"),
        }
    }
    until("answered", || peer.control.lock().len() == 4).await;
    let mut control = peer.control.lock().clone();
    control.sort();
    assert_eq!(control, ["GET", "PATCH", "PUT", "answer 201 7"]);
    until("settled", || *peer.settled.lock() == 1).await;
}

#[tokio::test]
async fn identities_outside_the_scope_hear_it_at_once() {
    let peer = Cloud::default();
    let (_server, plane) = cloud(&peer, &Knobs::default()).await;
    let refused = plane.control.twin(&identity("stranger")).await;
    assert!(
        matches!(&refused, Err(ControlError::Unauthorized(text)) if text.contains("scope")),
        "{refused:?}"
    );
    assert!(plane.control.twin(&identity("edge1/m1")).await.is_ok());
}
