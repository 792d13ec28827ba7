//! What can go wrong with one of many MQTT connections up: it heals alone, nothing is lost, nothing overtakes.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use std::time::Duration;

use edgehub_broker::backend::{CloseReason, Command};
use edgehub_broker::upstream::{UpstreamKind, UpstreamState};
use recording::{Recording, until};
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
    for step in 0..5 {
        site.publish(&mut m1, "out", step * 100..step * 100 + 100).await;
        site.publish(&mut m2, "out", step * 100..step * 100 + 100).await;
        until("it is connected", || logins(&cloud, "edge1/m1") > step as usize).await;
        // As when its token has expired.
        cloud.command("edge1/m1", Command::Close(CloseReason::Unauthorized)).await;
        until("it comes back", || logins(&cloud, "edge1/m1") > step as usize + 1).await;
    }
    site.delivered(QUEUE, 1_000).await;
    assert_in_order(&cloud.numbers("edge1/m1"), 500);
    assert_eq!(cloud.numbers("edge1/m2"), (0..500).collect::<Vec<_>>());
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
    assert_eq!((site.upstream().failures, site.upstream().state), (0, UpstreamState::Up));
}

#[tokio::test]
async fn connections_are_made_anew_with_a_fresh_token_and_nothing_goes_twice() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let patient = Duration::from_secs(500);
    let site =
        site(server.port, client_tls, &Knobs { idle_timeout: patient, operation_timeout: patient, ..mqtt() });
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
    // That of the hub is made anew more often: nobody answers for its twin here.
    until("both are anew", || logins(&cloud, "edge1/m1") == 2 && logins(&cloud, OWN) >= 2).await;
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
