//! The hub through its library interface: routes, module inputs, order, windows, take-over, configuration.

// What a test sets up and cannot have is a failure of the test, with its place.
#![allow(clippy::unwrap_used)]

mod module_site;

use edgehub_broker::backend::{
    Backend, CloseReason, Command, Credentials, Feature, Login, LoginError, Mailbox, Outcome, Protocol,
};
use edgehub_broker::identity::Identity;
use edgehub_routing::HubConfig;
use module_site::{
    DEADLINE, QUEUE, Setup, config, connect, ledger, pass, publish, receive, receive_all, setup, to_filter,
    until,
};
use serde_json::json;

#[tokio::test]
async fn messages_of_an_output_reach_the_input_in_order_and_within_the_window() {
    let Setup { hub, .. } = setup(4, DEADLINE);
    assert!(hub.apply(&to_filter()).unwrap().is_complete());
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..10).await;
    let mut filter = connect(&hub, "edge1/filter").await;
    assert_eq!(ledger(&hub, QUEUE).queued, 10, "nothing goes to a module without a subscription");
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    let (first, tags, settler) = receive(&mut filter).await;
    assert_eq!(first, [0, 1, 2, 3]);
    assert!(filter.mailbox.try_recv().is_err(), "the window is full");
    settler.settle([(tags[1], Outcome::Accepted), (tags[0], Outcome::Accepted)]);
    let (next, more, _) = receive(&mut filter).await;
    assert_eq!(next, [4, 5]);
    settler.settle(tags[2..].iter().chain(&more).map(|tag| (*tag, Outcome::Accepted)));
    assert_eq!(receive_all(&mut filter, 4).await, [6, 7, 8, 9]);
    until(|| ledger(&hub, QUEUE).delivered == 10).await;
    assert_eq!(ledger(&hub, QUEUE).queued, 0);
}

#[tokio::test]
async fn what_was_not_answered_is_offered_again_in_order_to_the_next_connection() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    publish(&hub, &mut sensor, 0..5).await;
    let mut seen = Vec::new();
    let mut all = Vec::new();
    let mut last = None;
    while seen.len() < 5 {
        let (numbers, tags, settler) = receive(&mut filter).await;
        seen.extend(numbers);
        all.extend(tags);
        last = Some(settler);
    }
    last.unwrap().settle([(all[0], Outcome::Accepted), (all[3], Outcome::Accepted)]);
    until(|| ledger(&hub, QUEUE).delivered == 2).await;
    drop(filter);
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    assert_eq!(receive_all(&mut filter, 3).await, [1, 2, 4]);
    until(|| ledger(&hub, QUEUE).delivered == 5).await;
}

#[tokio::test]
async fn a_released_or_late_message_comes_again_and_a_rejected_one_is_counted() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    publish(&hub, &mut sensor, 0..1).await;
    let (_, tags, settler) = receive(&mut filter).await;
    settler.settle([(tags[0], Outcome::Released)]);
    let (again, _, _late) = receive(&mut filter).await;
    assert_eq!(again, [0]);
    pass(DEADLINE).await;
    let (after_time_out, tags, settler) = receive(&mut filter).await;
    assert_eq!(after_time_out, [0]);
    settler.settle([(tags[0], Outcome::Rejected)]);
    until(|| ledger(&hub, QUEUE).dead_lettered == 1).await;
    publish(&hub, &mut sensor, 1..3).await;
    assert_eq!(receive_all(&mut filter, 2).await, [1, 2]);
}

#[tokio::test]
async fn a_newer_connection_takes_over_and_strangers_are_refused() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut old = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut old.client, Feature::ModuleInputs, true);
    let mut new = connect(&hub, "edge1/filter").await;
    assert!(matches!(old.mailbox.recv().await, Some(Command::Close(CloseReason::TakenOver))));
    hub.subscribe(&mut new.client, Feature::ModuleInputs, true);
    drop(old);
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..2).await;
    assert_eq!(receive_all(&mut new, 2).await, [0, 1]);
    assert_eq!(hub.status().clients.len(), 2);

    let (sender, _mailbox) = Mailbox::channel(1);
    let login = Login {
        identity: Identity::device("stranger").unwrap(),
        credentials: Credentials::None,
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Mqtt,
        peer: None,
    };
    assert!(matches!(hub.login(login.clone(), sender.clone()).await, Err(LoginError::Refused(_))));
    let _others = [connect(&hub, "leaf1").await, connect(&hub, "leaf2").await];
    let one_more = Login { identity: Identity::device("leaf3").unwrap(), ..login };
    assert!(matches!(hub.login(one_more, sender).await, Err(LoginError::Unavailable(_))));
}

#[tokio::test]
async fn what_waits_too_long_expires_and_is_counted() {
    let Setup { hub, time } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..3).await;
    time.advance(3_600_000);
    publish(&hub, &mut sensor, 3..4).await;
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    assert_eq!(receive_all(&mut filter, 1).await, [3]);
    until(|| ledger(&hub, QUEUE).delivered == 1 && ledger(&hub, QUEUE).expired == 3).await;
}

#[tokio::test]
async fn what_no_route_takes_is_accepted_and_counted() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&config(json!({}), 10)).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..7).await;
    assert_eq!(hub.status().unrouted, 7);
    assert!(hub.status().queues.is_empty());
}

#[tokio::test]
async fn a_bad_route_keeps_its_last_good_version_and_a_removed_one_keeps_its_messages() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..2).await;

    let broken =
        config(json!({ "toFilter": "FROM /messages/* INTO nowhere", "up": "FROM /* INTO $upstream" }), 10);
    let applied = hub.apply(&broken).unwrap();
    assert_eq!(applied.kept, ["toFilter"]);
    assert_eq!(applied.routes, ["toFilter", "up"]);
    assert_eq!(applied.rejected.len(), 1);
    publish(&hub, &mut sensor, 2..3).await;
    assert_eq!(ledger(&hub, QUEUE).queued, 3);

    hub.apply(&config(json!({}), 10)).unwrap();
    publish(&hub, &mut sensor, 3..4).await;
    let detached = hub.status().queues.into_iter().find(|status| status.queue == QUEUE).unwrap();
    assert!(detached.detached);
    assert_eq!(detached.ledger.queued, 3);
    until(|| {
        let queues = hub.status().queues;
        queues.iter().any(|status| status.queue == QUEUE && status.oldest_age_secs.is_some())
    })
    .await;

    hub.apply(&to_filter()).unwrap();
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    assert_eq!(receive_all(&mut filter, 3).await, [0, 1, 2]);

    let no_ttl = HubConfig::parse(&json!({
        "schemaVersion": "1.0", "routes": {}, "storeAndForwardConfiguration": {}
    }));
    assert!(hub.apply(&no_ttl.unwrap()).is_err());
}

#[tokio::test]
async fn lints_come_with_the_configuration_and_refuse_routes_only_when_they_are_errors() {
    let Setup { hub, .. } = setup(1, DEADLINE);
    let document = config(
        json!({
            "late": "FROM /messages/* INTO $upstream WHERE level = 'hot'",
            "sound": "FROM /messages/* INTO $upstream",
        }),
        60,
    );
    let applied = hub.apply(&document).unwrap();
    assert_eq!(applied.routes, ["late", "sound"]);
    let lints: Vec<_> = applied.lints.iter().map(|lint| (lint.route.as_str(), lint.code.name())).collect();
    assert_eq!(lints, [("late", "trailing-text")]);
    // The version before was good, so it stays.
    let applied = hub.apply(&document.clone().with_lints_as_errors()).unwrap();
    assert_eq!((applied.routes.len(), applied.kept, applied.lints.len()), (2, vec!["late".to_owned()], 0));
    assert_eq!(applied.malformed[0].category.name(), "route-lint");

    let Setup { hub, .. } = setup(1, DEADLINE);
    let applied = hub.apply(&document.with_lints_as_errors()).unwrap();
    assert_eq!(applied.routes, ["sound"]);
}
