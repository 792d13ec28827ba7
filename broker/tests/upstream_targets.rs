//! Several targets at another broker: who gets what, who holds up nobody, and what becomes of what is stored when routes
//! and settings change.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use std::sync::Arc;

use edgehub_broker::amqp::ClientSasl;
use edgehub_broker::upstream::plain::{AddressTemplate, PlainAmqp};
use edgehub_broker::upstream::targets::{RouteTargets, TargetStatus};
use edgehub_broker::upstream::{UpstreamKind, UpstreamState};
use edgehub_storage::Store;
use edgehub_storage::clock::ManualTimeSource;
use recording::until;
use serde_json::{Value, json};
use upstream_peers::broker::{ForeignBroker, Takes};
use upstream_peers::{SHORT, Server, tls};
use upstream_site::{Knobs, QUEUE, Site, assert_in_order, memory_store, site_on, upstream_options};

const ALARMS: &str = "/queue/alarms";
const PLANT: &str = "/exchange/plant/{deviceId}.{moduleId}";
const ALARM_QUEUE: &str = "iothub[/queue/alarms]";
const PLANT_QUEUE: &str = "iothub[/exchange/plant/{deviceId}.{moduleId}]";

/// Routes to all three, and one more to alarms.
fn routes() -> Value {
    json!({
        "alarms": "FROM /messages/* WHERE level = 'hot' INTO $upstream",
        "alarms2": "FROM /messages/* INTO $upstream",
        "plant": "FROM /messages/* INTO $upstream",
        "rest": "FROM /messages/* INTO $upstream",
    })
}

fn all_targets() -> Vec<(&'static str, &'static str)> {
    vec![("alarms", ALARMS), ("alarms2", ALARMS), ("plant", PLANT)]
}

struct Peer {
    broker: ForeignBroker,
    server: Server,
    tls: Arc<rustls::ClientConfig>,
}

async fn peer() -> Peer {
    let broker = ForeignBroker::default();
    let (server_tls, tls) = tls();
    let serving = broker.clone();
    let server = Server::start(0, server_tls, move |stream| serving.clone().serve(stream)).await;
    Peer { broker, server, tls }
}

impl Peer {
    /// A hub with these targets below the broker.
    fn site(&self, store: (Store, Arc<ManualTimeSource>), targets: &[(&str, &str)]) -> Site {
        let knobs = Knobs { operation_timeout: SHORT, ..Knobs::default() };
        let (mut upstream, scope) = upstream_options(self.server.port, self.tls.clone(), &knobs);
        let address: AddressTemplate = "rest".parse().unwrap();
        let of_routes = targets.iter().map(|(route, text)| ((*route).to_owned(), text.parse().unwrap()));
        let targets = RouteTargets::new(&address, of_routes).unwrap();
        upstream.kind = UpstreamKind::Amqp(PlainAmqp { sasl: ClientSasl::Anonymous, address, targets });
        site_on(store, upstream, scope)
    }
}

fn way(site: &Site, target: &str) -> TargetStatus {
    let ways = site.hub.status().upstream_targets;
    ways.into_iter().find(|way| way.target.as_str() == target).expect("there is a way")
}

#[tokio::test]
async fn a_message_goes_once_to_each_target_and_is_stored_once() {
    let peer = peer().await;
    let site = peer.site(memory_store(), &all_targets());
    assert!(site.apply(routes()).idle_targets.is_empty());
    let mut m1 = site.connect("edge1/m1").await;
    let mut m2 = site.connect("edge1/m2").await;
    for step in 0..4 {
        site.publish(&mut m1, "out", step * 50..step * 50 + 50).await;
        site.publish(&mut m2, "out", step * 50..step * 50 + 50).await;
    }
    for queue in [QUEUE, ALARM_QUEUE, PLANT_QUEUE] {
        site.delivered(queue, 400).await;
    }
    let all: Vec<u32> = (0..200).collect();
    for (module, plant) in [("m1", "/exchange/plant/edge1.m1"), ("m2", "/exchange/plant/edge1.m2")] {
        for address in ["rest", ALARMS, plant] {
            assert_eq!(peer.broker.numbers(address, &format!("edge1/{module}")), all, "{address}");
        }
    }
    let ledger = site.hub.store().hub_ledger();
    assert_eq!((ledger.records(), ledger.references()), (400, 1_200), "one body for three queues");
    assert_eq!(*peer.broker.connections.lock(), 3, "a connection for each");
    let shown = serde_json::to_value(site.hub.status()).unwrap();
    let shown: Vec<_> = shown["upstream_targets"].as_array().unwrap().iter().collect();
    assert_eq!(shown.iter().map(|way| &way["target"]).collect::<Vec<_>>(), [PLANT, ALARMS]);
    assert!(shown.iter().all(|way| way["state"] == "up"), "{shown:?}");
    tokio::time::timeout(recording::DEADLINE, site.hub.stop(recording::DEADLINE)).await.expect("in time");
}

#[tokio::test]
async fn a_target_that_takes_nothing_holds_up_no_other() {
    for takes in [Takes::Released, Takes::Closed, Takes::Cut, Takes::Ignored] {
        let peer = peer().await;
        peer.broker.set(ALARMS, takes);
        let site = peer.site(memory_store(), &all_targets());
        site.apply(routes());
        let mut m1 = site.connect("edge1/m1").await;
        let mut m2 = site.connect("edge1/m2").await;
        // More than one way holds in memory.
        for step in 0..3 {
            site.publish(&mut m1, "out", step * 500..step * 500 + 500).await;
        }
        site.publish(&mut m2, "out", 0..20).await;
        for queue in [QUEUE, PLANT_QUEUE] {
            until("the others flow", || site.ledger(queue).delivered == 1_520).await;
        }
        assert_eq!(site.ledger(ALARM_QUEUE).queued, 1_520, "{takes:?}");
        let troubled = || {
            let way = way(&site, ALARMS).way;
            way.parked_senders > 0 || way.failures > 0 || !way.watchdog.is_empty()
        };
        until("the trouble is seen", troubled).await;
        for other in [site.upstream(), way(&site, PLANT).way] {
            assert_eq!((other.state, other.failures, other.parked_senders), (UpstreamState::Up, 0, 0));
        }
        peer.broker.set(ALARMS, Takes::Accepted);
        site.delivered(ALARM_QUEUE, 1_520).await;
        for (sender, count) in [("edge1/m1", 1_500), ("edge1/m2", 20)] {
            assert_in_order(&peer.broker.numbers(ALARMS, sender), count);
            assert_eq!(peer.broker.numbers("rest", sender), (0..count).collect::<Vec<_>>(), "{takes:?}");
        }
    }
}

#[tokio::test]
async fn the_time_to_live_ends_in_the_queue_of_one_target_alone() {
    let peer = peer().await;
    peer.broker.set(ALARMS, Takes::Released);
    let site = peer.site(memory_store(), &all_targets());
    site.apply(routes());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..30).await;
    for queue in [QUEUE, PLANT_QUEUE] {
        site.delivered(queue, 30).await;
    }
    site.time.advance(3_601_000);
    until("they expire", || site.ledger(ALARM_QUEUE).expired == 30).await;
    peer.broker.set(ALARMS, Takes::Accepted);
    site.publish(&mut m1, "out", 30..40).await;
    until("what is new goes", || site.ledger(ALARM_QUEUE).delivered == 10).await;
    assert_eq!(peer.broker.numbers(ALARMS, "edge1/m1"), (30..40).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_is_stored_for_a_target_is_sent_there_after_routes_settings_and_hub_changed() {
    let peer = peer().await;
    let memory = memory_store();
    peer.broker.set(ALARMS, Takes::Released);
    peer.broker.set("/exchange/plant/edge1.m1", Takes::Released);
    let site = peer.site(memory.clone(), &all_targets());
    site.apply(routes());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..40).await;
    site.delivered(QUEUE, 40).await;
    // The routes change while the hub runs.
    site.apply(json!({ "rest": "FROM /messages/* INTO $upstream" }));
    site.publish(&mut m1, "out", 40..50).await;
    site.delivered(QUEUE, 50).await;
    peer.broker.set(ALARMS, Takes::Accepted);
    site.delivered(ALARM_QUEUE, 40).await;
    assert!(site.hub.status().queues.iter().all(|queue| !queue.detached));
    assert_eq!(site.ledger(PLANT_QUEUE).queued, 40);
    assert_in_order(&peer.broker.numbers(ALARMS, "edge1/m1"), 40);
    site.hub.stop(recording::DEADLINE).await;

    // And after a restart the settings name other targets.
    let site = peer.site(memory, &[("alarms", "/queue/elsewhere")]);
    let applied = site.apply(json!({ "rest": "FROM /messages/* INTO $upstream" }));
    assert_eq!(applied.idle_targets, ["alarms"]);
    assert_eq!(site.ledger(PLANT_QUEUE).queued, 40);
    peer.broker.set("/exchange/plant/edge1.m1", Takes::Accepted);
    site.delivered(PLANT_QUEUE, 40).await;
    assert_in_order(&peer.broker.numbers("/exchange/plant/edge1.m1", "edge1/m1"), 40);
    let ways: Vec<String> =
        site.hub.upstream_targets().iter().map(|way| way.target.as_str().to_owned()).collect();
    assert_eq!(ways, [PLANT], "nothing waits for the other one");
}

#[tokio::test]
async fn below_a_hub_again_what_waits_for_a_target_is_shown_and_kept() {
    let peer = peer().await;
    let memory = memory_store();
    peer.broker.set(ALARMS, Takes::Released);
    let site = peer.site(memory.clone(), &all_targets());
    site.apply(routes());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..10).await;
    site.delivered(QUEUE, 10).await;
    site.hub.stop(recording::DEADLINE).await;

    let cloud = recording::Recording::default();
    let (server_tls, client_tls) = tls();
    let server = Server::head(0, server_tls, cloud.clone()).await;
    let (upstream, scope) = upstream_options(server.port, client_tls, &Knobs::default());
    let site = site_on(memory, upstream, scope);
    site.apply(routes());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 10..20).await;
    site.delivered(QUEUE, 20).await;
    assert_eq!(cloud.numbers("edge1/m1"), (10..20).collect::<Vec<_>>());
    let queues = site.hub.status().queues;
    let of_target = queues.iter().find(|queue| queue.queue == ALARM_QUEUE).unwrap();
    assert!(of_target.detached && of_target.ledger.queued == 10, "{of_target:?}");
}
