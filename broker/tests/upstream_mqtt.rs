//! The upstream over MQTT against the hub's own MQTT head: messages, logins, losses, and whom they concern.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use edgehub_broker::backend::{Credentials, LoginError, PublishError};
use edgehub_broker::message::{SystemProperty, Value};
use edgehub_broker::upstream::{UpstreamCause, UpstreamKind, UpstreamState};
use edgehub_storage::DeadLetterReason;
use recording::{Recording, until};
use tokio::sync::watch;
use upstream_peers::faults::{Fault, Network};
use upstream_peers::{SHORT, Server, tls};
use upstream_site::{Knobs, QUEUE, assert_in_order, identity, site};

fn mqtt() -> Knobs {
    Knobs { kind: UpstreamKind::MqttHub, ..Knobs::default() }
}

fn impatient() -> Knobs {
    Knobs { operation_timeout: SHORT, ..mqtt() }
}

#[tokio::test]
async fn messages_of_each_sender_go_up_in_order_on_a_connection_of_its_own() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &mqtt());
    for sender in ["edge1/m1", "edge1/m2"] {
        let mut client = site.connect(sender).await;
        for step in 0..10 {
            site.publish(&mut client, "out", step * 50..step * 50 + 50).await;
        }
    }
    site.delivered(QUEUE, 1_000).await;
    for sender in ["edge1/m1", "edge1/m2"] {
        assert_eq!(cloud.numbers(sender), (0..500).collect::<Vec<_>>());
    }
    {
        let state = cloud.state.lock();
        let message = &state.published[0];
        assert_eq!(
            message.properties.system(SystemProperty::MessageId),
            Value::Text(&message_number(message))
        );
        assert_eq!(message.properties.system(SystemProperty::OutputName), Value::Absent);
        assert_eq!(message.properties.application(|name| name == "level"), Value::Text("hot"));
        let mut logins: Vec<_> = state
            .logins
            .iter()
            .map(|login| (login.identity.to_string(), login.auth_chain.as_deref().map(str::to_owned)))
            .collect();
        logins.sort();
        let chain = |text: &str| Some(text.to_owned());
        assert_eq!(
            logins,
            [
                ("edge1/$edgeHub".to_owned(), None),
                ("edge1/m1".to_owned(), chain("edge1/m1;edge1")),
                ("edge1/m2".to_owned(), chain("edge1/m2;edge1")),
            ]
        );
        for login in &state.logins {
            let Credentials::SasToken(token) = &login.credentials else { panic!("{login:?}") };
            assert!(token.contains("%2524edgeHub"), "it is the hub's own token");
            let model = (login.identity != identity("edge1/$edgeHub")).then_some("dtmi:example:model;1");
            assert_eq!(login.model_id.as_deref(), model);
        }
    }
    until("three are shown", || site.upstream().sessions == 3).await;
    let status = site.upstream();
    assert_eq!((status.state, status.failures), (UpstreamState::Up, 0), "{status:?}");
}

fn message_number(message: &edgehub_broker::message::Message) -> String {
    String::from_utf8(message.body.to_vec()).unwrap()
}

#[tokio::test]
async fn nothing_is_settled_before_its_acknowledgement_and_no_more_than_the_window_is_out() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let (commit, commits) = watch::channel(false);
    cloud.state.lock().commits = Some(commits);
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &mqtt());
    let mut m1 = site.connect("edge1/m1").await;
    for step in 0..6 {
        site.publish(&mut m1, "out", step * 50..step * 50 + 50).await;
    }
    until("the window is out", || site.upstream().in_flight == 128).await;
    let ledger = site.ledger(QUEUE);
    assert_eq!((ledger.delivered, ledger.queued), (0, 300));
    commit.send_replace(true);
    site.delivered(QUEUE, 300).await;
    assert_eq!(cloud.numbers("edge1/m1"), (0..300).collect::<Vec<_>>());
}

#[tokio::test]
async fn held_acknowledgements_are_asked_for_anew_and_what_was_not_acknowledged_goes_again_in_order() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let (commit, commits) = watch::channel(false);
    cloud.state.lock().commits = Some(commits);
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &impatient());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..50).await;
    until("it is started anew", || !site.upstream().watchdog.is_empty()).await;
    until("it comes again", || cloud.numbers("edge1/m1").len() > 50).await;
    assert_eq!(site.ledger(QUEUE).queued, 50);
    commit.send_replace(true);
    site.delivered(QUEUE, 50).await;
    assert_in_order(&cloud.numbers("edge1/m1"), 50);
}

#[tokio::test]
async fn a_cut_loses_nothing_and_the_way_up_heals_by_itself() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls.clone(), cloud.clone()).await;
    let site = site(server.port, client_tls, &mqtt());
    let mut m1 = site.connect("edge1/m1").await;
    let mut m2 = site.connect("edge1/m2").await;
    site.publish(&mut m1, "out", 0..50).await;
    site.publish(&mut m2, "out", 0..50).await;
    let port = server.stop().await;
    site.publish(&mut m1, "out", 50..150).await;
    site.publish(&mut m2, "out", 50..150).await;
    until("it is noticed", || site.upstream().failures > 0).await;
    let _server = Server::mqtt_head(port, server_tls, cloud.clone()).await;
    site.publish(&mut m1, "out", 150..200).await;
    site.delivered(QUEUE, 350).await;
    assert_in_order(&cloud.numbers("edge1/m1"), 200);
    assert_in_order(&cloud.numbers("edge1/m2"), 150);
}

#[tokio::test]
async fn networks_that_swallow_hold_reset_refuse_or_delay() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
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
        if fault != Fault::Delay {
            until("it is noticed", || site.upstream().failures > failures).await;
            assert_eq!(site.ledger(QUEUE).queued, 80, "{fault:?}");
            network.set(Fault::None);
        }
        site.delivered(QUEUE, 2 * u64::from(count)).await;
        network.set(Fault::None);
        assert!(site.ledger(QUEUE).dropped.is_empty(), "{fault:?}");
    }
    for sender in ["edge1/m1", "edge1/m2"] {
        assert_in_order(&cloud.numbers(sender), count);
    }
}

#[tokio::test]
async fn one_refused_identity_among_fifty_waits_alone_and_comes_back() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let refused = LoginError::Refused("disabled".into());
    cloud.state.lock().refused.insert(identity("edge1/n7"), refused);
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &Knobs { senders: 50, ..mqtt() });
    for number in 0..50 {
        let mut client = site.connect(&format!("edge1/n{number}")).await;
        site.publish(&mut client, "out", 0..40).await;
    }
    until("the others flow", || site.ledger(QUEUE).delivered == 49 * 40).await;
    until("it is parked", || site.upstream().parked_senders == 1).await;
    assert_eq!((site.upstream().failures, site.upstream().state), (0, UpstreamState::Up));
    let unavailable = LoginError::Unavailable("busy".into());
    cloud.state.lock().refused.insert(identity("edge1/n7"), unavailable);
    until("a pause that is asked for is shown", || site.upstream().state == UpstreamState::Throttled).await;
    cloud.state.lock().refused.clear();
    site.delivered(QUEUE, 50 * 40).await;
    for number in 0..50 {
        assert_eq!(cloud.numbers(&format!("edge1/n{number}")), (0..40).collect::<Vec<_>>(), "n{number}");
    }
    assert_eq!(site.upstream().failures, 0);
}

#[tokio::test]
async fn connections_that_break_with_their_messages_disturb_no_other() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    cloud.state.lock().full = Some(PublishError::Full("full".into()));
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &mqtt());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..50).await;
    let logins = |cloud: &Recording| {
        let state = cloud.state.lock();
        state.logins.iter().filter(|login| login.identity == identity("edge1/m1")).count()
    };
    until("it is tried again", || logins(&cloud) > 2).await;
    assert_eq!((site.upstream().failures, site.ledger(QUEUE).queued), (0, 50));
    cloud.state.lock().full = None;
    site.delivered(QUEUE, 50).await;
    assert_eq!(cloud.numbers("edge1/m1"), (0..50).collect::<Vec<_>>());
    let hub_logins = cloud.state.lock().logins.iter().filter(|login| login.auth_chain.is_none()).count();
    assert_eq!(hub_logins, 1, "the hub's own connection stays");
}

#[tokio::test]
async fn a_token_of_the_hub_that_is_refused_is_shown_and_tried_again() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let refused = LoginError::Refused("the token has expired".into());
    cloud.state.lock().refused.insert(identity("edge1/$edgeHub"), refused);
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &mqtt());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish(&mut m1, "out", 0..10).await;
    until("refused twice", || {
        site.upstream().failures_by_cause.get(&UpstreamCause::Token).is_some_and(|count| *count > 1)
    })
    .await;
    assert_eq!(cloud.state.lock().published.len(), 0);
    cloud.state.lock().refused.clear();
    site.delivered(QUEUE, 10).await;
}

#[tokio::test]
async fn an_upstream_that_never_answers_connect_is_given_up() {
    let (server_tls, client_tls) = tls();
    let server = Server::start(0, server_tls, |stream| async move {
        let _open = stream;
        std::future::pending().await
    })
    .await;
    let site = site(server.port, client_tls, &impatient());
    until("it is noticed twice", || site.upstream().failures > 1).await;
    assert!(site.upstream().failures_by_cause.contains_key(&UpstreamCause::Lost));
}

#[tokio::test]
async fn what_can_be_no_packet_goes_to_the_dead_letters_and_the_next_goes_up() {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls, cloud.clone()).await;
    let site = site(server.port, client_tls, &mqtt());
    let mut m1 = site.connect("edge1/m1").await;
    site.publish_large(&mut m1, 262_000, 100).await;
    site.publish(&mut m1, "out", 0..5).await;
    until("the others are there", || site.ledger(QUEUE).delivered == 5).await;
    assert_eq!(site.dead_letters(1).await, [(DeadLetterReason::RejectedByReceiver, 1)]);
    assert_eq!(cloud.numbers("edge1/m1"), (0..5).collect::<Vec<_>>());
    assert_eq!(site.upstream().failures, 0);
}
