//! What can go wrong on the way up: each fault heals without a restart, nothing is lost, nothing overtakes, and the
//! ledger has no gap.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use std::sync::Arc;

use edgehub_broker::backend::LoginError;
use edgehub_broker::upstream::{UpstreamCause, UpstreamState, WatchdogStep};
use recording::{DEADLINE, Recording, until};
use tokio::time::Instant;
use upstream_peers::faults::{Authority, Fault, Network};
use upstream_peers::{Manners, SHORT, Scripted, Server, Transfers, tls};
use upstream_site::{Knobs, QUEUE, Site, assert_in_order, identity, site};

fn impatient() -> Knobs {
    Knobs { operation_timeout: SHORT, ..Knobs::default() }
}

/// Heals something, and tells how long it takes until the first message is settled, and until all are.
async fn heals(what: &str, site: &Site, count: u64, heal: impl FnOnce()) {
    let before = site.ledger(QUEUE).delivered;
    let healed = Instant::now();
    heal();
    let settled = || site.ledger(QUEUE).delivered;
    until("the first is settled", || settled() > before || settled() == count).await;
    let first = healed.elapsed();
    site.delivered(QUEUE, count).await;
    println!("{what}: healed after {first:?}, {} messages after {:?}", count - before, healed.elapsed());
    assert!(site.ledger(QUEUE).dropped.is_empty(), "{what}");
    assert_eq!(site.ledger(QUEUE).dead_lettered, 0, "{what}");
}

async fn scripted(peer: &Scripted) -> (Server, Arc<rustls::ClientConfig>) {
    let (server_tls, client_tls) = tls();
    let serving = peer.clone();
    let server = Server::start(0, server_tls, move |stream| serving.clone().serve(stream)).await;
    (server, client_tls)
}

#[tokio::test]
async fn networks_that_swallow_hold_reset_refuse_or_delay() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let network = Network::to(server.port).await;
    let site = site(network.port, client_tls, &impatient());
    let mut m1 = site.connect("edge1/m1").await;
    let mut m2 = site.connect("edge1/m2").await;
    let mut count = 0;
    for fault in [Fault::Swallow, Fault::Hold, Fault::Reset, Fault::Refuse, Fault::Delay] {
        site.publish(&mut m1, "out", count..count + 20).await;
        site.publish(&mut m2, "out", count..count + 20).await;
        site.delivered(QUEUE, 2 * u64::from(count + 20)).await;
        let failures = site.upstream().failures;
        network.set(fault);
        site.publish(&mut m1, "out", count + 20..count + 60).await;
        site.publish(&mut m2, "out", count + 20..count + 60).await;
        count += 60;
        if fault == Fault::Delay {
            site.delivered(QUEUE, 2 * u64::from(count)).await;
            network.set(Fault::None);
            continue;
        }
        until("it is noticed", || site.upstream().failures > failures).await;
        assert_eq!(site.ledger(QUEUE).queued, 80, "{fault:?}");
        heals(&format!("{fault:?}"), &site, 2 * u64::from(count), || network.set(Fault::None)).await;
    }
    for sender in ["edge1/m1", "edge1/m2"] {
        assert_in_order(&cloud.numbers(sender), count);
    }
}

#[tokio::test]
async fn certificates_that_have_expired_or_another_name_or_an_unknown_authority() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let cloud = Recording::default();
    let good = ours.server("localhost", false);
    let mut server = Server::head(0, good.clone(), cloud.clone()).await;
    let site = site(server.port, ours.client.clone(), &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    let mut count = 0;
    for (what, bad) in [
        ("expired", ours.server("localhost", true)),
        ("another name", ours.server("elsewhere.example", false)),
        ("unknown authority", theirs.server("localhost", false)),
    ] {
        let port = server.stop().await;
        server = Server::head(port, bad, cloud.clone()).await;
        let before = *site.upstream().failures_by_cause.get(&UpstreamCause::Tls).unwrap_or(&0);
        site.publish(&mut m1, "out", count..count + 30).await;
        count += 30;
        until(what, || {
            site.upstream().failures_by_cause.get(&UpstreamCause::Tls).is_some_and(|now| *now >= before + 2)
        })
        .await;
        let shown = site.upstream();
        assert!(shown.last_cause == Some(UpstreamCause::Tls) && shown.since_unix_secs > 0, "{shown:?}");
        assert!(shown.state == UpstreamState::Connecting || shown.reason.contains("TLS"), "{shown:?}");
        let port = server.stop().await;
        server = Server::head(port, good.clone(), cloud.clone()).await;
        heals(what, &site, u64::from(count), || {}).await;
    }
    assert_eq!(cloud.numbers("edge1/m1"), (0..count).collect::<Vec<_>>());
}

#[tokio::test]
async fn links_sessions_and_connections_that_the_upstream_ends_with_an_error() {
    use Transfers::{Close, Detach, End};
    let peer = Scripted::default();
    let (server, client_tls) = scripted(&peer).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    let mut count = 0;
    for (what, transfers, throttled) in [
        ("link detached", Detach("amqp:internal-error"), false),
        ("link stolen", Detach("amqp:link:stolen"), false),
        ("link throttled", Detach("com.microsoft:device-container-throttled"), true),
        ("quota", End("com.microsoft:iot-hub-quota-exceeded"), true),
        ("session ended", End("amqp:internal-error"), false),
        ("connection closed", Close("amqp:connection:forced"), false),
    ] {
        peer.manners.lock().transfers = transfers;
        let (links, failures) = (peer.links_seen("m1"), site.upstream().failures);
        site.publish(&mut m1, "out", count..count + 50).await;
        count += 50;
        until("it is tried again", || peer.links_seen("m1") > links + 1).await;
        if throttled {
            until("shown", || site.upstream().state == UpstreamState::Throttled).await;
            assert!(site.upstream().reason.contains("com.microsoft"), "{}", site.upstream().reason);
        }
        assert_eq!(site.ledger(QUEUE).queued, 50, "{what}");
        let closes = matches!(transfers, Close(_));
        assert_eq!(site.upstream().failures > failures, closes, "{what}: only what failed is made anew");
        heals(what, &site, u64::from(count), || *peer.manners.lock() = Manners::default()).await;
        until("up", || site.upstream().state == UpstreamState::Up).await;
    }
    assert_in_order(&peer.numbers("m1"), count);
}

#[tokio::test]
async fn what_is_never_answered_climbs_from_the_link_to_the_name_and_is_counted() {
    let peer = Scripted::default();
    peer.manners.lock().transfers = Transfers::Ignored;
    let (server, client_tls) = scripted(&peer).await;
    let site = site(server.port, client_tls, &Knobs { operation_timeout: SHORT / 2, ..Knobs::default() });
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..100).await;
    for step in [WatchdogStep::Link, WatchdogStep::Session, WatchdogStep::Connection, WatchdogStep::Name] {
        until(step.as_str(), || site.upstream().watchdog.contains_key(&step)).await;
    }
    until("counted", || {
        site.upstream().failures_by_cause.get(&UpstreamCause::NoProgress).is_some_and(|count| *count >= 2)
    })
    .await;
    assert_eq!(site.ledger(QUEUE).queued, 100);
    heals("never answered", &site, 100, || *peer.manners.lock() = Manners::default()).await;
    assert_in_order(&peer.numbers("m1"), 100);
}

#[tokio::test]
async fn credit_that_is_never_given_to_one_costs_the_others_nothing() {
    let peer = Scripted::default();
    peer.manners.lock().slow_credit = 0;
    let (server, client_tls) = scripted(&peer).await;
    let site = site(server.port, client_tls, &impatient());
    let mut slow = site.connect("edge1/slow").await;
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut slow, "out", 0..50).await;
    let mut sent = 0;
    // While the other gets on, the connection stays, however often the one is started anew.
    let deadline = Instant::now() + 2 * DEADLINE;
    while site.upstream().watchdog.get(&WatchdogStep::Session).is_none_or(|count| *count < 3) {
        assert!(Instant::now() < deadline, "{:?}", site.upstream());
        site.publish(&mut m1, "out", sent..sent + 1).await;
        sent += 1;
        until("the other flows", || site.ledger(QUEUE).delivered == u64::from(sent)).await;
    }
    assert_eq!(site.upstream().failures, 0);
    assert_eq!(site.upstream().state, UpstreamState::Up);
    let count = 50 + u64::from(sent);
    heals("no credit", &site, count, || *peer.manners.lock() = Manners::default()).await;
    assert_in_order(&peer.numbers("slow"), 50);
    assert_in_order(&peer.numbers("m1"), sent);
}

#[tokio::test]
async fn a_token_that_is_refused_after_an_outage() {
    let peer = Scripted::default();
    let (server_tls, client_tls) = tls();
    let serve = |peer: &Scripted| {
        let peer = peer.clone();
        move |stream| peer.clone().serve(stream)
    };
    let server = Server::start(0, server_tls.clone(), serve(&peer)).await;
    let site = site(server.port, client_tls, &Knobs::default());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..10).await;
    site.delivered(QUEUE, 10).await;
    let port = server.stop().await;
    until("the cut is seen", || site.upstream().failures > 0).await;
    site.publish(&mut m1, "out", 10..40).await;
    peer.manners.lock().token_status = Some(401);
    let _server = Server::start(port, server_tls, serve(&peer)).await;
    until("refused", || site.upstream().failures_by_cause.contains_key(&UpstreamCause::Token)).await;
    assert_eq!(site.ledger(QUEUE).queued, 30);
    heals("token refused", &site, 40, || *peer.manners.lock() = Manners::default()).await;
    assert_in_order(&peer.numbers("m1"), 40);
}

#[tokio::test]
async fn a_token_that_is_not_answered_tells_of_the_way_once_the_upstream_was_up() {
    let peer = Scripted::default();
    let (server, client_tls) = scripted(&peer).await;
    let site = site(server.port, client_tls, &impatient());
    until("up", || site.upstream().state == UpstreamState::Up).await;
    peer.manners.lock().token_status = None;
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..20).await;
    until("noticed", || site.upstream().failures > 0).await;
    let shown = site.upstream();
    assert_eq!(shown.failures_by_cause.into_keys().next(), Some(UpstreamCause::NoProgress));
    until("the hub's own is not answered either", || {
        site.upstream().failures_by_cause.contains_key(&UpstreamCause::Token)
    })
    .await;
    heals("tokens not answered", &site, 20, || *peer.manners.lock() = Manners::default()).await;
    assert_in_order(&peer.numbers("m1"), 20);
}

#[tokio::test]
async fn one_refused_sender_among_fifty() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let refused = LoginError::Refused("disabled".into());
    cloud.state.lock().refused.insert(identity("edge1/n7"), refused);
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &Knobs { senders: 50, ..Knobs::default() });
    for number in 0..50 {
        let mut client = site.connect(&format!("edge1/n{number}")).await;
        site.publish(&mut client, "out", 0..40).await;
    }
    until("the others flow", || site.ledger(QUEUE).delivered == 49 * 40).await;
    until("it is parked", || site.upstream().parked_senders == 1).await;
    assert_eq!((site.upstream().failures, site.upstream().state), (0, UpstreamState::Up));
    heals("one of fifty", &site, 50 * 40, || cloud.state.lock().refused.clear()).await;
    for number in 0..50 {
        assert_eq!(cloud.numbers(&format!("edge1/n{number}")), (0..40).collect::<Vec<_>>(), "n{number}");
    }
    assert_eq!(site.upstream().failures, 0);
}

#[tokio::test]
async fn a_big_backlog_goes_up_in_order_through_a_network_that_fails_again_and_again() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let network = Network::to(server.port).await;
    network.set(Fault::Refuse);
    let site = site(network.port, client_tls, &Knobs::default());
    const EACH: u32 = 2_000;
    for name in ["edge1/m1", "edge1/m2", "edge1/slow"] {
        let mut client = site.connect(name).await;
        for step in 0..EACH / 500 {
            site.publish(&mut client, "out", step * 500..step * 500 + 500).await;
        }
    }
    until("it is noticed", || site.upstream().failures > 0).await;
    let total = 3 * u64::from(EACH);
    for cut in 1..4 {
        network.set(Fault::None);
        until("a part is there", || site.ledger(QUEUE).delivered >= cut * total / 8).await;
        network.set(Fault::Reset);
    }
    heals("big backlog", &site, total, || network.set(Fault::None)).await;
    for name in ["edge1/m1", "edge1/m2", "edge1/slow"] {
        assert_in_order(&cloud.numbers(name), EACH);
    }
}
