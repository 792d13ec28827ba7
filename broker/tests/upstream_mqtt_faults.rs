//! What can go wrong with one of many MQTT connections up: it heals alone, nothing is lost, nothing overtakes.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use std::time::Duration;

use edgehub_broker::backend::{CloseReason, Command};
use edgehub_broker::upstream::{UpstreamKind, UpstreamState};
use recording::{DEADLINE, Recording, until};
use tokio::time::Instant;
use upstream_peers::faults::{Fault, Network};
use upstream_peers::{Server, tls};
use upstream_site::{Knobs, QUEUE, assert_in_order, identity, site};

const OWN: &str = "edge1/$edgeHub";

fn mqtt() -> Knobs {
    Knobs { kind: UpstreamKind::MqttHub, ..Knobs::default() }
}

fn logins(cloud: &Recording, who: &str) -> usize {
    let state = cloud.state.lock();
    state.logins.iter().filter(|login| login.identity == identity(who)).count()
}

#[tokio::test]
async fn a_connection_that_is_closed_again_and_again_heals_alone() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &mqtt());
    let mut m1 = site.connect("edge1/m1").await;
    let mut m2 = site.connect("edge1/m2").await;
    let mut count = 0;
    for step in 0..5 {
        site.publish(&mut m1, "out", count..count + 100).await;
        site.publish(&mut m2, "out", count..count + 100).await;
        count += 100;
        until("it is connected", || logins(&cloud, "edge1/m1") > step).await;
        // As when its token has expired.
        cloud.command("edge1/m1", Command::Close(CloseReason::Unauthorized)).await;
        // Whoever has nothing to send stays away.
        let deadline = Instant::now() + DEADLINE;
        while logins(&cloud, "edge1/m1") == step + 1 {
            assert!(Instant::now() < deadline, "{:?}", site.upstream());
            site.publish(&mut m1, "out", count..count + 1).await;
            site.publish(&mut m2, "out", count..count + 1).await;
            count += 1;
        }
    }
    site.delivered(QUEUE, 2 * u64::from(count)).await;
    assert_in_order(&cloud.numbers("edge1/m1"), count);
    assert_eq!(cloud.numbers("edge1/m2"), (0..count).collect::<Vec<_>>());
    assert_eq!((logins(&cloud, "edge1/m2"), logins(&cloud, OWN)), (1, 1));
    assert_eq!(site.upstream().failures, 0);
}

#[tokio::test]
async fn the_loss_of_the_hub_s_own_connection_alone_disturbs_nobody() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &mqtt());
    let mut m1 = site.connect("edge1/m1").await;
    for step in 0..5 {
        site.publish(&mut m1, "out", step * 20..step * 20 + 20).await;
        site.delivered(QUEUE, u64::from(step + 1) * 20).await;
        cloud.command(OWN, Command::Close(CloseReason::Kicked)).await;
        until("it comes back", || logins(&cloud, OWN) == step as usize + 2).await;
    }
    assert_eq!(logins(&cloud, "edge1/m1"), 1);
    assert_eq!(cloud.numbers("edge1/m1"), (0..100).collect::<Vec<_>>());
    until("up", || site.upstream().state == UpstreamState::Up).await;
    assert_eq!(site.upstream().failures, 0);
}

#[tokio::test]
async fn connections_are_made_anew_with_a_fresh_token_and_nothing_goes_twice() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    // Nobody answers for the twin of the hub here, and a ping must outlast a step.
    let (idle_timeout, operation_timeout) = (Duration::from_secs(500), Duration::from_secs(5_000));
    let site = site(server.port, client_tls, &Knobs { idle_timeout, operation_timeout, ..mqtt() });
    let mut m1 = site.connect("edge1/m1").await;
    // Half of the life of a token is half an hour; the second time would come at more than three quarters of the next.
    // In steps that are shorter than every deadline of either end.
    const STEPS: u32 = 76;
    for step in 0..STEPS {
        site.publish(&mut m1, "out", step..step + 1).await;
        site.delivered(QUEUE, u64::from(step + 1)).await;
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(25)).await;
        tokio::time::resume();
    }
    // That of the hub itself waits for the answer about its twin.
    until("it is anew", || logins(&cloud, "edge1/m1") == 2).await;
    site.publish(&mut m1, "out", STEPS..STEPS + 10).await;
    site.delivered(QUEUE, u64::from(STEPS) + 10).await;
    assert_eq!(cloud.numbers("edge1/m1"), (0..STEPS + 10).collect::<Vec<_>>());
    assert_eq!(logins(&cloud, "edge1/m1"), 2);
    assert_eq!((site.upstream().failures, site.upstream().parked_senders), (0, 0));
}

#[tokio::test]
async fn a_big_backlog_goes_up_in_order_through_a_network_that_fails_again_and_again() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let network = Network::to(server.port).await;
    network.set(Fault::Refuse);
    let site = site(network.port, client_tls, &mqtt());
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
    network.set(Fault::None);
    site.delivered(QUEUE, total).await;
    for name in ["edge1/m1", "edge1/m2", "edge1/slow"] {
        assert_in_order(&cloud.numbers(name), EACH);
    }
    assert!(site.ledger(QUEUE).dropped.is_empty());
}
