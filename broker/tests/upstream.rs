//! The way up: a hub with its upstream against the hub's own AMQP head over TLS, and against peers that misbehave.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::amqp::{Condition, Error, Outcome};
use edgehub_broker::backend::{Credentials, Login, LoginError, PublishError};
use edgehub_broker::delivery::BackoffOptions;
use edgehub_broker::message::{SystemProperty, Value};
use edgehub_broker::upstream::UpstreamState;
use edgehub_storage::DeadLetterReason;
use recording::{DEADLINE, Recording, until};
use serde_json::json;
use upstream_peers::foreign::Foreign;
use upstream_peers::{SHORT, Scripted, Server, busy, silent, tls};
use upstream_site::{Knobs, QUEUE, assert_in_order, identity, site};

#[tokio::test]
async fn messages_of_several_senders_go_up_in_batches_under_their_own_identities() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut clients = Vec::new();
    for name in ["edge1/m1", "edge1/m2", "edge1/slow"] {
        clients.push((name, site.connect(name).await));
    }
    for step in 0..5 {
        for (_, client) in &mut clients {
            site.publish(client, "out", step * 40..step * 40 + 40).await;
        }
    }
    site.delivered(QUEUE, 600).await;
    for (name, _) in &clients {
        assert_eq!(cloud.numbers(name), (0..200).collect::<Vec<_>>(), "{name}");
    }
    until("shown as up", || site.upstream().state == UpstreamState::Up && site.upstream().held == 0).await;
    assert_eq!(site.upstream().reason, "");
    let state = cloud.state.lock();
    assert!(state.batches.len() < 600, "{} transfers", state.batches.len());
    // The hub itself has a twin to look after.
    let of_senders = |login: &&Login| !login.identity.to_string().ends_with("$edgeHub");
    let logins: Vec<&Login> = state.logins.iter().filter(of_senders).collect();
    assert_eq!(logins.len(), 3, "one login per sender");
    for login in logins {
        let chain = format!("{};edge1", login.identity);
        assert_eq!(login.auth_chain.as_deref(), Some(chain.as_str()));
        assert_eq!(login.model_id.as_deref(), Some("dtmi:example:model;1"));
        assert_eq!(&*login.product_info, "test");
        assert!(matches!(login.credentials, Credentials::SasToken(_)));
    }
    for message in &state.published {
        let id = message.properties.system(SystemProperty::MessageId);
        assert!(matches!(id, Value::Text(text) if text.as_bytes() == message.body));
        let own: Vec<_> = message.properties.application_properties().collect();
        assert_eq!(own, [("level", "hot")]);
        assert_eq!(message.output(), None, "the output's name stays on this hub");
    }
}

#[tokio::test]
async fn a_cut_loses_nothing_and_keeps_the_order() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let mut server = Server::head(0, server_tls.clone(), cloud.clone()).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    let mut m2 = site.connect("edge1/m2").await;
    for round in 0..4u32 {
        let (committed, commits) = tokio::sync::watch::channel(false);
        // What is published before the cut is not acknowledged.
        cloud.state.lock().commits = Some(commits);
        site.publish(&mut m1, "out", round * 100..round * 100 + 100).await;
        site.publish(&mut m2, "out", round * 100..round * 100 + 100).await;
        let seen = round as usize * 200 + 1;
        until("something is on its way", || cloud.state.lock().published.len() >= seen).await;
        let port = server.stop().await;
        until("the cut is seen", || site.upstream().state != UpstreamState::Up).await;
        assert!(!site.upstream().reason.is_empty());
        committed.send_replace(true);
        server = Server::head(port, server_tls.clone(), cloud.clone()).await;
        site.delivered(QUEUE, u64::from(round + 1) * 200).await;
    }
    assert_in_order(&cloud.numbers("edge1/m1"), 400);
    assert_in_order(&cloud.numbers("edge1/m2"), 400);
    assert!(site.upstream().failures >= 4);
}

#[tokio::test]
async fn a_refused_sender_waits_alone_and_goes_on_when_it_is_accepted_again() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let refused = LoginError::Refused("not yet".into());
    cloud.state.lock().refused.insert(identity("edge1/m1"), refused);
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    let mut m2 = site.connect("edge1/m2").await;
    for step in 0..10 {
        site.publish(&mut m1, "out", step * 500..step * 500 + 500).await;
        site.publish(&mut m2, "out", step * 10..step * 10 + 10).await;
    }
    until("the other flows", || site.ledger(QUEUE).delivered == 100).await;
    until("it is parked", || site.upstream().parked_senders == 1).await;
    assert_eq!(cloud.numbers("edge1/m2"), (0..100).collect::<Vec<_>>());
    let tries = || {
        let state = cloud.state.lock();
        state.logins.iter().filter(|login| login.identity == identity("edge1/m1")).count()
    };
    until("it is tried again", || tries() >= 3).await;
    until("up", || site.upstream().state == UpstreamState::Up).await;
    cloud.state.lock().refused.clear();
    site.delivered(QUEUE, 5_100).await;
    assert_eq!(cloud.numbers("edge1/m1"), (0..5_000).collect::<Vec<_>>());
    until("nobody is parked", || site.upstream().parked_senders == 0).await;
}

#[tokio::test]
async fn of_a_refused_batch_only_the_guilty_message_is_a_dead_letter() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let too_large = PublishError::TooLarge { size_bytes: 2, limit_bytes: 1 };
    cloud.state.lock().bad_bodies.insert("13".into(), too_large);
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..20).await;
    site.delivered(QUEUE, 19).await;
    let others: Vec<u32> = (0..20).filter(|number| *number != 13).collect();
    assert_eq!(cloud.numbers("edge1/m1"), others);
    assert_eq!(site.ledger(QUEUE).dead_lettered, 1);
    let letters = site.dead_letters(1).await;
    assert_eq!(letters, [(DeadLetterReason::RejectedByReceiver, 1)]);
    // After it, batches again.
    site.publish(&mut m1, "out", 20..30).await;
    site.delivered(QUEUE, 29).await;
    assert_eq!(cloud.state.lock().batches.last(), Some(&10));
}

#[tokio::test]
async fn a_pause_that_the_upstream_asks_for_is_shown_and_costs_nothing() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    cloud.state.lock().full = Some(PublishError::Full("no room".into()));
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..50).await;
    until("throttled", || site.upstream().state == UpstreamState::Throttled).await;
    assert!(site.upstream().reason.contains("throttled"), "{}", site.upstream().reason);
    assert_eq!(site.ledger(QUEUE).queued, 50);
    cloud.state.lock().full = None;
    site.delivered(QUEUE, 50).await;
    assert_in_order(&cloud.numbers("edge1/m1"), 50);
    until("up again", || site.upstream().state == UpstreamState::Up).await;
    assert!(site.ledger(QUEUE).dropped.is_empty());
}

async fn scripted(peer: &Scripted) -> (Server, Arc<rustls::ClientConfig>) {
    let (server_tls, client_tls) = tls();
    let serving = peer.clone();
    let server = Server::start(0, server_tls, move |stream| serving.clone().serve(stream)).await;
    (server, client_tls)
}

#[tokio::test]
async fn released_and_busy_transfers_come_again_and_answers_may_come_in_any_order() {
    for outcome in [(|_| Outcome::Released) as fn(&[u32]) -> Outcome, busy] {
        let peer = Scripted::default();
        peer.manners.lock().outcome = outcome;
        peer.manners.lock().swapped = true;
        let (server, client_tls) = scripted(&peer).await;
        let site = site(server.port, client_tls, &Knobs::default());
        let mut m1 = site.connect("edge1/m1").await;
        site.publish(&mut m1, "out", 0..40).await;
        until("it is tried again", || peer.links_seen("m1") >= 3).await;
        assert_eq!(site.ledger(QUEUE).queued, 40);
        peer.manners.lock().outcome = |_| Outcome::Accepted;
        site.publish(&mut m1, "out", 40..80).await;
        site.delivered(QUEUE, 80).await;
        assert_in_order(&peer.numbers("m1"), 80);
        assert!(site.ledger(QUEUE).dropped.is_empty());
    }
}

#[tokio::test]
async fn an_upstream_that_says_nothing_is_given_up_and_tried_again() {
    let (port, listening) = silent().await;
    let (_, client_tls) = tls();
    let site = site(port, client_tls, &Knobs { operation_timeout: SHORT / 2, ..Knobs::default() });
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..5).await;
    until("tried again", || site.upstream().failures >= 3).await;
    until("shown", || site.upstream().reason.contains("no connection within")).await;
    assert_eq!(site.ledger(QUEUE).queued, 5);
    listening.abort();
}

#[tokio::test]
async fn an_upstream_that_refuses_or_ignores_tokens_is_shown_and_tried_again() {
    let ignores = "was not answered within";
    for (status, credit, reason) in [(Some(401), 100, "401"), (None, 100, ignores), (Some(200), 0, ignores)] {
        let peer = Scripted::default();
        peer.manners.lock().token_status = status;
        peer.manners.lock().token_credit = credit;
        let (server, client_tls) = scripted(&peer).await;
        let site = site(server.port, client_tls, &Knobs { operation_timeout: SHORT, ..Knobs::default() });
        let mut m1 = site.connect("edge1/m1").await;
        site.publish(&mut m1, "out", 0..5).await;
        until("tried again", || site.upstream().failures >= 2).await;
        // On a slow machine an attempt may end with another reason.
        until(reason, || {
            let status = site.upstream();
            let shown = status.reason.contains(reason) || status.reason.contains("gave no credit");
            status.state == UpstreamState::BackingOff && shown
        })
        .await;
        *peer.manners.lock() = Default::default();
        site.delivered(QUEUE, 5).await;
    }
}

#[tokio::test]
async fn a_sender_without_credit_or_link_stops_nobody_else() {
    for attaches in [true, false] {
        let peer = Scripted::default();
        peer.manners.lock().slow_credit = 0;
        peer.manners.lock().slow_attaches = attaches;
        let (server, client_tls) = scripted(&peer).await;
        let site = site(server.port, client_tls, &Knobs { operation_timeout: SHORT, ..Knobs::default() });
        let mut slow = site.connect("edge1/slow").await;
        let mut m1 = site.connect("edge1/m1").await;
        // More than all lanes hold together.
        for step in 0..12 {
            site.publish(&mut slow, "out", step * 500..step * 500 + 500).await;
        }
        site.publish(&mut m1, "out", 0..100).await;
        until("the other flows", || site.ledger(QUEUE).delivered == 100).await;
        until("parked or on probation", || site.upstream().held <= 10).await;
        assert_eq!(site.ledger(QUEUE).queued, 6_000);
        until("up", || site.upstream().state == UpstreamState::Up).await;
        *peer.manners.lock() = Default::default();
        site.delivered(QUEUE, 6_100).await;
        assert_in_order(&peer.numbers("slow"), 6_000);
        assert_in_order(&peer.numbers("m1"), 100);
    }
}

#[tokio::test]
async fn urgent_messages_go_first_after_an_outage_and_priorities_may_come_later() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::head(0, server_tls.clone(), cloud.clone()).await;
    let port = server.stop().await;
    let site = site(port, client_tls, &Knobs::default());
    let normal = "FROM /messages/modules/m1/outputs/out INTO $upstream";
    let urgent = json!({ "route": "FROM /messages/modules/m1/outputs/urgent INTO $upstream", "priority": 0 });
    site.apply(json!({ "normal": normal, "urgent": urgent }));
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 100..150).await;
    site.publish(&mut m1, "urgent", 0..20).await;
    let server = Server::head(port, server_tls, cloud.clone()).await;
    site.delivered(QUEUE, 50).await;
    site.delivered("iothub_Pri0", 20).await;
    assert_eq!(cloud.numbers("edge1/m1"), (0..20).chain(100..150).collect::<Vec<_>>());

    // A new priority takes its place between the others while messages of these wait for their answers.
    let (committed, commits) = tokio::sync::watch::channel(false);
    cloud.state.lock().commits = Some(commits);
    site.publish(&mut m1, "out", 150..170).await;
    until("on its way", || cloud.numbers("edge1/m1").len() == 90).await;
    let middle = json!({ "route": "FROM /messages/modules/m1/outputs/middle INTO $upstream", "priority": 5 });
    site.apply(json!({ "normal": normal, "urgent": urgent, "middle": middle }));
    site.publish(&mut m1, "middle", 50..60).await;
    until("it is served", || cloud.numbers("edge1/m1").len() == 100).await;
    committed.send_replace(true);
    site.delivered("iothub_Pri5", 10).await;
    site.delivered(QUEUE, 70).await;
    assert_eq!(site.ledger("iothub_Pri0").delivered, 20);
    drop(server);
}

#[tokio::test]
async fn what_was_sent_behind_a_refused_batch_and_accepted_is_not_sent_again() {
    let refuses_13 = |numbers: &[u32]| match numbers.contains(&13) {
        true => {
            Outcome::Rejected(Some(Error::new(Condition::of("amqp:link:message-size-exceeded"), "large")))
        }
        false => Outcome::Accepted,
    };
    let peer = Scripted::default();
    peer.manners.lock().outcome = refuses_13;
    let (server, client_tls) = scripted(&peer).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..100).await;
    site.delivered(QUEUE, 99).await;
    let mut numbers = peer.numbers("m1");
    numbers.sort_unstable();
    assert_eq!(numbers, (0..100).filter(|number| *number != 13).collect::<Vec<_>>(), "each once");
    assert_eq!(site.dead_letters(1).await, [(DeadLetterReason::RejectedByReceiver, 1)]);
    assert_eq!(site.upstream().failures, 0);
    assert_eq!(peer.links_seen("m1"), 1, "the link stays");
}

#[tokio::test]
async fn messages_of_senders_that_left_the_scope_are_dead_letters_and_others_flow() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let refused = LoginError::Refused("not yet".into());
    cloud.state.lock().refused.insert(identity("edge1/m1"), refused);
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    let mut m2 = site.connect("edge1/m2").await;
    site.publish(&mut m1, "out", 0..30).await;
    site.publish(&mut m2, "out", 0..10).await;
    until("the other flows", || site.ledger(QUEUE).delivered == 10).await;
    assert_eq!(site.ledger(QUEUE).queued, 30, "in scope, whatever the upstream says");
    site.scope.remove(&identity("edge1/m1"));
    let letters = site.dead_letters(30).await;
    assert_eq!(letters, [(DeadLetterReason::OutOfScope, 1); 30]);
    site.publish(&mut m2, "out", 10..20).await;
    site.delivered(QUEUE, 20).await;
    until("nobody is parked", || site.upstream().parked_senders == 0).await;
    drop(server);
}

#[tokio::test]
async fn an_urgent_message_does_not_wait_for_the_pause_of_a_less_urgent_one() {
    let busy_from_100 = |numbers: &[u32]| match numbers.iter().any(|number| *number >= 100) {
        true => Outcome::Released,
        false => Outcome::Accepted,
    };
    let peer = Scripted::default();
    peer.manners.lock().outcome = busy_from_100;
    let (server, client_tls) = scripted(&peer).await;
    let never = BackoffOptions { first: Duration::from_secs(3_600), max: Duration::from_secs(3_600) };
    let site = site(server.port, client_tls, &Knobs { backoff: never, ..Knobs::default() });
    let urgent = json!({ "route": "FROM /messages/modules/m1/outputs/urgent INTO $upstream", "priority": 0 });
    site.apply(json!({ "normal": "FROM /messages/modules/m1/outputs/out INTO $upstream", "urgent": urgent }));
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 100..150).await;
    until("parked", || site.upstream().parked_senders == 1).await;
    for number in 0..5 {
        site.publish(&mut m1, "urgent", number..number + 1).await;
        until("sent", || site.ledger("iothub_Pri0").delivered == u64::from(number) + 1).await;
        until("parked again", || site.upstream().parked_senders == 1).await;
    }
    assert_eq!(peer.numbers("m1"), [0, 1, 2, 3, 4]);
    assert_eq!(site.ledger(QUEUE).queued, 50);
}

#[tokio::test]
async fn less_urgent_messages_have_their_share_upstream() {
    for (lower_share_percent, expected) in [(0, 0..=0), (50, 20..=90)] {
        let (server_tls, client_tls) = tls();
        let cloud = Recording::default();
        let server = Server::head(0, server_tls.clone(), cloud.clone()).await;
        let port = server.stop().await;
        let site = site(port, client_tls, &Knobs { lower_share_percent, ..Knobs::default() });
        let urgent =
            json!({ "route": "FROM /messages/modules/m1/outputs/urgent INTO $upstream", "priority": 0 });
        site.apply(
            json!({ "normal": "FROM /messages/modules/m1/outputs/out INTO $upstream", "urgent": urgent }),
        );
        let mut m1 = site.connect("edge1/m1").await;
        site.publish(&mut m1, "out", 1000..1300).await;
        site.publish(&mut m1, "urgent", 0..300).await;
        let server = Server::head(port, server_tls, cloud.clone()).await;
        site.delivered(QUEUE, 300).await;
        site.delivered("iothub_Pri0", 300).await;
        let numbers = cloud.numbers("edge1/m1");
        let lower = numbers[..150].iter().filter(|number| **number >= 1000).count();
        assert!(expected.contains(&lower), "{lower} of 150 with {lower_share_percent} %");
        let (low, urgent): (Vec<u32>, Vec<u32>) = numbers.into_iter().partition(|number| *number >= 1000);
        assert_eq!(low, (1000..1300).collect::<Vec<_>>());
        assert_eq!(urgent, (0..300).collect::<Vec<_>>());
        drop(server);
    }
}

#[tokio::test]
async fn what_expires_while_the_upstream_is_away_is_counted_and_never_sent() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::head(0, server_tls.clone(), cloud.clone()).await;
    let port = server.stop().await;
    let site = site(port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..30).await;
    until("away", || site.upstream().failures > 0).await;
    site.time.advance(3_600_000);
    site.publish(&mut m1, "out", 30..40).await;
    until("counted before anybody is there", || site.ledger(QUEUE).expired == 30).await;
    let server = Server::head(port, server_tls, cloud.clone()).await;
    site.delivered(QUEUE, 10).await;
    assert_eq!(cloud.numbers("edge1/m1"), (30..40).collect::<Vec<_>>());
    drop(server);
}

#[tokio::test]
async fn what_expires_in_a_lane_is_not_sent() {
    let peer = Scripted::default();
    peer.manners.lock().slow_credit = 0;
    let (server, client_tls) = scripted(&peer).await;
    let site = site(server.port, client_tls, &Knobs { operation_timeout: SHORT, ..Knobs::default() });
    let mut slow = site.connect("edge1/slow").await;
    site.publish(&mut slow, "out", 0..5).await;
    until("they wait in the lane", || site.upstream().held == 5).await;
    site.time.advance(3_600_000);
    peer.manners.lock().slow_credit = 100;
    until("expired", || site.ledger(QUEUE).expired == 5).await;
    site.publish(&mut slow, "out", 5..8).await;
    site.delivered(QUEUE, 3).await;
    assert_eq!(peer.numbers("slow"), [5, 6, 7]);
}

#[tokio::test]
async fn many_senders_come_back_after_an_outage() {
    const SENDERS: usize = 600;
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::head(0, server_tls.clone(), cloud.clone()).await;
    let port = server.stop().await;
    let site = site(port, client_tls, &Knobs { senders: SENDERS, ..Knobs::default() });
    for number in 0..SENDERS {
        let mut client = site.connect(&format!("edge1/n{number}")).await;
        site.publish(&mut client, "out", 0..3).await;
    }
    let server = Server::head(port, server_tls, cloud.clone()).await;
    site.delivered(QUEUE, 3 * SENDERS as u64).await;
    for number in 0..SENDERS {
        assert_eq!(cloud.numbers(&format!("edge1/n{number}")), [0, 1, 2]);
    }
    drop(server);
}

#[tokio::test]
async fn the_hub_closes_the_connection_in_order_when_it_stops() {
    let peer = Scripted::default();
    let (server, client_tls) = scripted(&peer).await;
    let site = site(server.port, client_tls, &Knobs::default());
    until("up", || site.upstream().state == UpstreamState::Up).await;
    tokio::time::timeout(DEADLINE, site.hub.stop(DEADLINE)).await.expect("in time");
}

#[tokio::test]
async fn an_independent_implementation_takes_tokens_messages_and_batches() {
    let peer = Foreign::default();
    let (server_tls, client_tls) = tls();
    let serving = peer.clone();
    let server = Server::start(0, server_tls, move |stream| serving.clone().serve(stream)).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    let mut m2 = site.connect("edge1/m2").await;
    for step in 0..5 {
        site.publish(&mut m1, "out", step * 50..step * 50 + 50).await;
        site.publish(&mut m2, "out", step..step + 1).await;
    }
    site.delivered(QUEUE, 255).await;
    assert_eq!(peer.numbers("m1"), (0..250).collect::<Vec<_>>());
    assert_eq!(peer.numbers("m2"), (0..5).collect::<Vec<_>>());
    assert!(*peer.batches.lock() >= 25, "batches are used");
    assert_eq!(site.upstream().failures, 0);
}
