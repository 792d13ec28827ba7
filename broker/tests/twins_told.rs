//! No change of desired properties escapes a client that wants to hear of them, whatever comes first: its reading, the
//! change, the upstream's links, or their loss. Nothing waits for the period between readings, which no test lasts.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod control_site;
mod module_site;

use std::time::Duration;

use control_site::{
    Cloud, ask, command, desired, document, get, id, memory, quick, report_all, start, subscriber,
};
use edgehub_broker::backend::{Backend, Command, Feature, TwinOperation};
use edgehub_broker::hub::{ControlOptions, Hub};
use edgehub_broker::upstream::control::Downward;
use module_site::{DEADLINE, Module, connect, until};
use serde_json::{Value, json};

const NEVER: Duration = Duration::from_secs(86_400);

fn options() -> ControlOptions {
    ControlOptions { twin_sync_period_min: NEVER, ..quick() }
}

/// A client that has read its twin, `{"a":1}` in version 1, and is told of changes.
async fn told(hub: &Hub, cloud: &Cloud) -> Module {
    cloud.change("leaf", json!({ "a": 1 }));
    let mut leaf = connect(hub, "leaf").await;
    assert_eq!(get(hub, &mut leaf).await["desired"]["a"], 1);
    // By what it hears the upstream's links are known to be there.
    let patch = cloud.change("leaf", json!({ "linked": 1 }));
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, true);
    assert_eq!(desired(&mut leaf).await, patch);
    leaf
}

#[tokio::test]
async fn who_was_told_that_an_unknown_twin_is_empty_hears_what_it_holds() {
    for restarted in [false, true] {
        let store = memory();
        let (mut hub, mut cloud) = start(&store, options());
        let mut leaf = connect(&hub, "leaf").await;
        let empty = json!({ "desired": { "$version": 0 }, "reported": { "$version": 0 } });
        assert_eq!(get(&hub, &mut leaf).await, empty);
        if restarted {
            hub.stop(DEADLINE).await;
            (hub, cloud) = start(&store, options());
            leaf = connect(&hub, "leaf").await;
        }
        hub.subscribe(&mut leaf.client, Feature::DesiredProperties, true);
        until(|| cloud.wanted("leaf").is_some()).await;
        // Nobody is told of it: the upstream's links are not there yet.
        cloud.change("leaf", json!({ "a": 1 }));
        cloud.change("leaf", json!({ "b": { "c": 1 } }));
        cloud.up().await;
        assert_eq!(desired(&mut leaf).await, json!({ "a": 1, "b": { "c": 1 }, "$version": 2 }));
        let next = cloud.desire("leaf", json!({ "a": 2 })).await;
        assert_eq!(desired(&mut leaf).await, next, "restarted: {restarted}");
    }
}

#[tokio::test]
async fn a_change_while_the_links_of_one_identity_were_away_is_found_at_once() {
    let (hub, cloud) = start(&memory(), options());
    cloud.up().await;
    let mut leaf = told(&hub, &cloud).await;
    for number in 0..5 {
        let patch = cloud.change("leaf", json!({ "a": number }));
        cloud.hear(Downward::Linked(id("leaf"))).await;
        assert_eq!(desired(&mut leaf).await, patch);
    }
}

#[tokio::test]
async fn news_of_links_that_a_client_had_before_are_not_taken_for_those_of_the_next() {
    let (hub, cloud) = start(&memory(), options());
    cloud.up().await;
    drop(told(&hub, &cloud).await);
    until(|| cloud.wanted("leaf").is_none()).await;
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    let first = cloud.change("leaf", json!({ "a": 2 }));
    cloud.hear(Downward::Linked(id("leaf"))).await;
    assert_eq!(desired(&mut leaf).await, first);
    let second = cloud.change("leaf", json!({ "a": 3 }));
    cloud.hear(Downward::Linked(id("leaf"))).await;
    assert_eq!(desired(&mut leaf).await, second);
}

#[tokio::test]
async fn a_comparison_that_the_loss_of_the_upstream_ends_is_made_on_the_next_connection() {
    let (hub, cloud) = start(&memory(), options());
    cloud.up().await;
    let mut leaf = told(&hub, &cloud).await;
    // The reading that new connections ask for once in the period is over.
    cloud.down().await;
    let patch = cloud.change("leaf", json!({ "a": 2 }));
    cloud.up().await;
    assert_eq!(desired(&mut leaf).await, patch);
    cloud.hang("leaf");
    cloud.hear(Downward::Linked(id("leaf"))).await;
    until(|| cloud.held() == 1).await;
    let patch = cloud.change("leaf", json!({ "a": 3 }));
    cloud.down().await;
    // When it has its answer from the store, its worker has heard of the loss.
    assert_eq!(get(&hub, &mut leaf).await["desired"]["a"], 2);
    cloud.go_on("leaf").await;
    cloud.up().await;
    assert_eq!(desired(&mut leaf).await, patch);
}

#[tokio::test]
async fn a_reading_from_before_the_first_change_is_repeated() {
    let (hub, cloud) = start(&memory(), options());
    cloud.up().await;
    cloud.change("leaf", json!({ "a": 1 }));
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    cloud.hang("leaf");
    ask(&hub, &mut leaf, TwinOperation::Get).unwrap();
    until(|| cloud.held() == 1).await;
    let reading = cloud.take_reading();
    let patch = cloud.desire("leaf", json!({ "a": 2 })).await;
    assert_eq!(desired(&mut leaf).await, patch, "of a twin that the hub does not know");
    reading.send(Ok(r#"{"desired":{"a":1,"$version":1},"reported":{}}"#.into())).unwrap();
    until(|| cloud.held() == 1).await;
    cloud.go_on("leaf").await;
    let answer = loop {
        match command(&mut leaf).await {
            Command::TwinAnswer(answer) => break answer,
            // When its links are new while it reads, it is told all that was changed.
            Command::Desired(_) => {}
            other => panic!("an answer was expected, not {other:?}"),
        }
    };
    assert_eq!(document(answer.result)["desired"], json!({ "a": 2, "$version": 2, "$metadata": at(2) }));
}

#[tokio::test]
async fn what_an_earlier_connection_asked_for_is_told_to_the_one_that_is_there() {
    let (hub, cloud) = start(&memory(), options());
    cloud.up().await;
    let mut earlier = told(&hub, &cloud).await;
    cloud.hang("leaf");
    ask(&hub, &mut earlier, TwinOperation::Get).unwrap();
    until(|| cloud.held() == 1).await;
    let mut leaf = connect(&hub, "leaf").await;
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, true);
    let patch = cloud.change("leaf", json!({ "a": 2 }));
    cloud.go_on("leaf").await;
    assert_eq!(desired(&mut leaf).await, patch);
}

#[tokio::test]
async fn what_comes_when_the_client_has_just_gone_is_told_to_the_next_one() {
    let (hub, cloud) = start(&memory(), options());
    cloud.up().await;
    let mut leaf = told(&hub, &cloud).await;
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, false);
    until(|| cloud.wanted("leaf").is_none()).await;
    // The upstream had sent it before it knew.
    let patch = cloud.desire("leaf", json!({ "a": 2 })).await;
    // Who reports hears only when all that came before has been looked at.
    report_all(&hub, &mut leaf, [json!({ "r": 1 })]).await;
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, true);
    assert_eq!(desired(&mut leaf).await, patch);
    // The same with a comparison that is under way.
    cloud.hang("leaf");
    cloud.hear(Downward::Linked(id("leaf"))).await;
    until(|| cloud.held() == 1).await;
    let reading = cloud.take_reading();
    let patch = cloud.change("leaf", json!({ "a": 3 }));
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, false);
    until(|| cloud.wanted("leaf").is_none()).await;
    let twin = json!({ "desired": { "a": 3, "linked": 1, "$version": 4 }, "reported": { "r": 1 } });
    reading.send(Ok(twin.to_string().into())).unwrap();
    report_all(&hub, &mut leaf, [json!({ "r": 2 })]).await;
    cloud.go_on("leaf").await;
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, true);
    assert_eq!(desired(&mut leaf).await, patch);
}

fn at(version: u64) -> Value {
    json!({ "$lastUpdated": format!("at {version}") })
}
