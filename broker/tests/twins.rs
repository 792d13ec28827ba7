//! Twins of clients through the hub's library interface, with an upstream that the test plays.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod control_site;
mod module_site;

use std::time::Duration;

use control_site::{
    OWN, answer, ask, command, desired, document, get, id, memory, quick, report, report_all, start,
    subscriber,
};
use edgehub_broker::backend::{Backend, Command, Feature, TwinError, TwinOperation};
use edgehub_broker::hub::{ControlOptions, TWIN_REQUESTS_MAX};
use edgehub_broker::upstream::control::{Downward, Wanted};
use module_site::{DEADLINE, connect, until};
use serde_json::{Value, json};

/// A time that no test lasts.
const NEVER: Duration = Duration::from_secs(86_400);

#[tokio::test]
async fn a_twin_that_was_read_online_is_the_same_offline() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    cloud.change("leaf", json!({ "a": { "b": 1.1 } }));
    let mut leaf = connect(&hub, "leaf").await;
    let online = get(&hub, &mut leaf).await;
    assert_eq!(online["desired"]["a"], json!({ "b": 1.1 }));
    assert_eq!(online["desired"]["$version"], 1);
    cloud.down().await;
    cloud.change("leaf", json!({ "a": null }));
    assert_eq!(get(&hub, &mut leaf).await, online);
    assert_eq!(cloud.reads("leaf"), 1);
}

#[tokio::test]
async fn a_twin_that_was_never_seen_is_empty_and_nobody_waits_for_it() {
    let (hub, cloud) = start(&memory(), quick());
    let mut leaf = connect(&hub, "leaf").await;
    let empty = json!({ "desired": { "$version": 0 }, "reported": { "$version": 0 } });
    assert_eq!(get(&hub, &mut leaf).await, empty);
    report_all(&hub, &mut leaf, [json!({ "x": 1 })]).await;
    assert_eq!(get(&hub, &mut leaf).await["reported"], json!({ "x": 1, "$version": 0 }));
    assert_eq!(cloud.reads("leaf"), 0);
}

#[tokio::test]
async fn what_was_reported_offline_goes_up_as_one_patch_with_its_deletions() {
    let (hub, cloud) = start(&memory(), quick());
    let mut leaf = connect(&hub, "leaf").await;
    report_all(&hub, &mut leaf, [json!({ "a": 1 }), json!({ "a": null }), json!({ "b": { "c": 2 } })]).await;
    cloud.up().await;
    until(|| !cloud.patches("leaf").is_empty()).await;
    assert_eq!(cloud.patches("leaf"), [json!({ "a": null, "b": { "c": 2 } })]);
    // A value that becomes an object: what the upstream still has under it must not stay.
    cloud.down().await;
    report_all(&hub, &mut leaf, [json!({ "b": 8 }), json!({ "b": { "y": 1 } })]).await;
    cloud.up().await;
    until(|| cloud.reported("leaf") == json!({ "b": { "y": 1 } })).await;
}

#[tokio::test]
async fn a_document_beyond_a_limit_is_refused_and_changes_nothing() {
    let (hub, cloud) = start(&memory(), quick());
    let mut leaf = connect(&hub, "leaf").await;
    let mut deep = json!(1);
    (0..12).for_each(|_| deep = json!({ "a": deep.take() }));
    let large: serde_json::Map<_, _> = (0..9).map(|n| (n.to_string(), "x".repeat(4_000).into())).collect();
    for bad in [deep, json!({ "a.b": 1 }), json!({ "a": 1_i64 << 52 }), Value::Object(large), json!([1])] {
        let error = report(&hub, &mut leaf, bad).await.unwrap_err();
        assert_eq!(error.status(), 400, "{error}");
    }
    // The whole is bounded, too.
    let part = |n| json!({ format!("p{n}"): "x".repeat(4_000) });
    let mut parts = 0;
    let error = loop {
        match report(&hub, &mut leaf, part(parts)).await {
            Ok(_) => parts += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((error.status(), parts), (400, 16));
    cloud.up().await;
    until(|| cloud.patches("leaf").len() == 1).await;
    assert_eq!(cloud.reported("leaf").as_object().unwrap().len(), 16);
}

#[tokio::test]
async fn changes_of_desired_properties_come_as_they_are_and_gaps_as_differences() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    cloud.change("leaf", json!({ "a": 1, "b": 1 }));
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    assert_eq!(get(&hub, &mut leaf).await["desired"]["$version"], 1);
    let next = cloud.desire("leaf", json!({ "a": null, "c": [1] })).await;
    assert_eq!(desired(&mut leaf).await, next);
    let reads = cloud.reads("leaf");
    cloud.change("leaf", json!({ "b": 2 }));
    cloud.desire("leaf", json!({ "c": [2] })).await;
    assert_eq!(desired(&mut leaf).await, json!({ "b": 2, "c": [2], "$version": 4 }));
    assert_eq!(cloud.reads("leaf"), reads + 1);
    // A repetition and an older one say nothing new.
    for version in [4, 2] {
        let patch = json!({ "c": [version], "$version": version }).to_string().into();
        cloud.hear(Downward::Desired { identity: id("leaf"), patch }).await;
    }
    until(|| cloud.reads("leaf") > reads + 1).await;
    let after = cloud.desire("leaf", json!({ "d": 1 })).await;
    assert_eq!(desired(&mut leaf).await, after);
    cloud.down().await;
    assert_eq!(get(&hub, &mut leaf).await["desired"]["d"], 1);
    // Who does not want to know hears nothing.
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, false);
    until(|| cloud.wanted("leaf").is_none()).await;
    cloud.up().await;
    cloud.desire("leaf", json!({ "d": 2 })).await;
    cloud.desire("leaf", json!({ "d": 3 })).await;
    assert_eq!(get(&hub, &mut leaf).await["desired"]["d"], 3);
}

#[tokio::test]
async fn without_a_stored_twin_a_change_is_passed_on() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    cloud.change("leaf", json!({ "a": 1 }));
    let patch = cloud.desire("leaf", json!({ "b": 1 })).await;
    assert_eq!(desired(&mut leaf).await, patch);
    assert_eq!(cloud.reads("leaf"), 0);
}

#[tokio::test]
async fn more_changes_than_can_wait_are_read_at_once() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    // Nobody takes anything while these come, and nothing of the twin is stored.
    let mut patches = Vec::new();
    for number in 1..=20 {
        patches.push(cloud.change("leaf", json!({ "n": number, format!("n{number}"): 1 })));
    }
    for patch in patches {
        cloud.tell("leaf", &patch);
    }
    let whole = desired(&mut leaf).await;
    assert_eq!((&whole["n"], &whole["n1"], &whole["$version"]), (&json!(20), &json!(1), &json!(20)));
}

#[tokio::test]
async fn after_an_outage_reports_go_first_and_then_the_difference_comes() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    cloud.change("leaf", json!({ "a": 1 }));
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    get(&hub, &mut leaf).await;
    // Links are worked through in order: when this one's has been, the leaf's has been, too.
    let mut next = subscriber(&hub, &cloud, "next").await;
    get(&hub, &mut next).await;
    cloud.down().await;
    report_all(&hub, &mut leaf, [json!({ "r": 1 })]).await;
    cloud.change("leaf", json!({ "a": { "b": 1 } }));
    cloud.change("leaf", json!({ "z": 1 }));
    cloud.hang("leaf");
    let (reads, of_next) = (cloud.reads("leaf"), cloud.reads("next"));
    cloud.up().await;
    until(|| cloud.held() == 1 && cloud.reads("next") > of_next).await;
    assert_eq!(cloud.held(), 1, "only the report is under way");
    cloud.go_on("leaf").await;
    assert_eq!(cloud.patches("leaf"), [json!({ "r": 1 })]);
    assert_eq!(cloud.reads("leaf"), reads, "the twin is read after the report has been taken");
    assert_eq!(desired(&mut leaf).await, json!({ "a": { "b": 1 }, "z": 1, "$version": 3 }));
}

#[tokio::test]
async fn a_twin_is_compared_once_in_its_period() {
    let options = ControlOptions { twin_sync_period_min: NEVER, ..quick() };
    let (hub, cloud) = start(&memory(), options);
    cloud.up().await;
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    get(&hub, &mut leaf).await;
    // The first new connection begins the period.
    cloud.down().await;
    let patch = cloud.change("leaf", json!({ "a": 1 }));
    cloud.up().await;
    assert_eq!(desired(&mut leaf).await, patch);
    let reads = cloud.reads("leaf");
    for _ in 0..3 {
        cloud.down().await;
        cloud.up().await;
    }
    // Links are worked through in order, so those of the leaf are behind us when another one's has been.
    let mut other = connect(&hub, "other").await;
    get(&hub, &mut other).await;
    hub.subscribe(&mut other.client, Feature::DesiredProperties, true);
    cloud.change(OWN, json!({}));
    let own = cloud.reads(OWN);
    cloud.down().await;
    cloud.up().await;
    until(|| cloud.reads(OWN) > own).await;
    assert_eq!(cloud.reads("leaf"), reads);
}

#[tokio::test]
async fn a_change_before_the_upstream_tells_of_changes_is_found_within_the_period() {
    let options = ControlOptions { twin_sync_period_min: NEVER, ..quick() };
    let (hub, cloud) = start(&memory(), options);
    cloud.up().await;
    cloud.change("leaf", json!({ "a": 1 }));
    let mut leaf = connect(&hub, "leaf").await;
    // The hub remembers when the twin of a client that wants anything was read.
    hub.subscribe(&mut leaf.client, Feature::Methods, true);
    until(|| cloud.wanted("leaf").is_some()).await;
    assert_eq!(get(&hub, &mut leaf).await["desired"]["a"], 1);
    cloud.change("leaf", json!({ "a": 2 }));
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, true);
    assert_eq!(desired(&mut leaf).await, json!({ "a": 2, "$version": 2 }));
    // So does one that comes before the client subscribes anew.
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, false);
    cloud.change("leaf", json!({ "a": 3 }));
    hub.subscribe(&mut leaf.client, Feature::DesiredProperties, true);
    assert_eq!(desired(&mut leaf).await, json!({ "a": 3, "$version": 3 }));
    // New connections to the upstream are a reason to read once in the period, however many there are.
    cloud.down().await;
    let patch = cloud.change("leaf", json!({ "a": 4 }));
    cloud.up().await;
    assert_eq!(desired(&mut leaf).await, patch);
    let reads = cloud.reads("leaf");
    for _ in 0..3 {
        cloud.down().await;
        cloud.up().await;
    }
    // Links are worked through in order.
    let mut last = connect(&hub, "zzz").await;
    get(&hub, &mut last).await;
    cloud.change("zzz", json!({ "c": 1 }));
    hub.subscribe(&mut last.client, Feature::DesiredProperties, true);
    assert_eq!(desired(&mut last).await, json!({ "c": 1, "$version": 1 }));
    assert_eq!(cloud.reads("leaf"), reads);
}

#[tokio::test]
async fn a_comparison_begins_when_the_reading_of_the_client_ends() {
    let options = ControlOptions { twin_sync_period_min: NEVER, ..quick() };
    let (hub, cloud) = start(&memory(), options);
    cloud.up().await;
    for known in [false, true] {
        let name = if known { "known" } else { "new" };
        cloud.change(name, json!({ "a": 1 }));
        let mut client = connect(&hub, name).await;
        if known {
            get(&hub, &mut client).await;
        }
        cloud.hang(name);
        ask(&hub, &mut client, TwinOperation::Get).unwrap();
        until(|| cloud.held() == 1).await;
        let reading = cloud.take_reading();
        // The upstream has answered; then comes a change, and then it begins to tell of changes.
        cloud.change(name, json!({ "a": 2 }));
        hub.subscribe(&mut client.client, Feature::DesiredProperties, true);
        until(|| cloud.wanted(name).is_some_and(|wanted| wanted.desired)).await;
        // Links are worked through in order: when another one's has been, this one's has been, too.
        let other = format!("next-to-{name}");
        let mut next = connect(&hub, &other).await;
        get(&hub, &mut next).await;
        cloud.change(&other, json!({ "b": 1 }));
        hub.subscribe(&mut next.client, Feature::DesiredProperties, true);
        desired(&mut next).await;
        // The worker has heard of it once it has served this report.
        report_all(&hub, &mut client, [json!({ "r": 1 })]).await;
        cloud.go_on(name).await;
        let begun = std::time::Instant::now();
        reading.send(Ok(r#"{"desired":{"a":1,"$version":1},"reported":{}}"#.into())).unwrap();
        let mut commands = Vec::new();
        while commands.len() < 2 {
            commands.push(command(&mut client).await);
        }
        let took = begun.elapsed();
        let [Command::TwinAnswer(first), Command::Desired(change)] = &commands[..] else {
            panic!("an answer and a change, not {commands:?}")
        };
        assert_eq!(document(first.result.clone())["desired"]["a"], 1);
        assert_eq!(serde_json::from_slice::<Value>(&change.patch).unwrap(), json!({ "a": 2, "$version": 2 }));
        assert!(took < DEADLINE / 2, "{name}: {took:?}");
    }
}

#[tokio::test]
async fn a_hanging_link_delays_its_own_identity_only() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    cloud.change("slow", json!({ "a": 1 }));
    cloud.hang("slow");
    let mut slow = connect(&hub, "slow").await;
    ask(&hub, &mut slow, TwinOperation::Get).unwrap();
    until(|| cloud.held() == 1).await;
    // Not even its own reports wait.
    report_all(&hub, &mut slow, [json!({ "r": 1 }), json!({ "r": 2 })]).await;
    until(|| cloud.held() == 2).await;
    let mut quick = subscriber(&hub, &cloud, "quick").await;
    get(&hub, &mut quick).await;
    report_all(&hub, &mut quick, [json!({ "q": 1 })]).await;
    until(|| !cloud.patches("quick").is_empty()).await;
    cloud.go_on("slow").await;
    // What it has not read yet is in the answer all the same.
    let twin = document(answer(&mut slow).await);
    assert_eq!((&twin["reported"]["r"], &twin["desired"]["a"]), (&json!(2), &json!(1)));
    until(|| cloud.reported("slow") == json!({ "r": 2 })).await;
}

#[tokio::test]
async fn a_reading_from_before_a_report_does_not_undo_it() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let mut leaf = connect(&hub, "leaf").await;
    report_all(&hub, &mut leaf, [json!({ "r": 1 })]).await;
    until(|| cloud.patches("leaf").len() == 1).await;
    cloud.hang("leaf");
    ask(&hub, &mut leaf, TwinOperation::Get).unwrap();
    until(|| cloud.held() == 1).await;
    let old = cloud.take_reading();
    cloud.go_on("leaf").await;
    report_all(&hub, &mut leaf, [json!({ "r": 2 })]).await;
    until(|| cloud.reported("leaf") == json!({ "r": 2 })).await;
    old.send(Ok(r#"{"desired":{"$version":1},"reported":{"r":1,"$version":1}}"#.into())).unwrap();
    assert_eq!(document(answer(&mut leaf).await)["reported"]["r"], 2);
    cloud.down().await;
    assert_eq!(get(&hub, &mut leaf).await["reported"]["r"], 2);
}

#[tokio::test]
async fn a_reading_from_before_a_change_is_repeated() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    cloud.change("leaf", json!({ "a": 1 }));
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    let old = get(&hub, &mut leaf).await;
    cloud.hang("leaf");
    ask(&hub, &mut leaf, TwinOperation::Get).unwrap();
    until(|| cloud.held() == 1).await;
    let reading = cloud.take_reading();
    let patch = cloud.desire("leaf", json!({ "a": 2 })).await;
    assert_eq!(desired(&mut leaf).await, patch);
    reading.send(Ok(old.to_string().into())).unwrap();
    until(|| cloud.held() == 1).await;
    cloud.go_on("leaf").await;
    assert_eq!(document(answer(&mut leaf).await)["desired"]["a"], 2);
}

#[tokio::test]
async fn requests_of_one_client_are_bounded() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    cloud.hang("leaf");
    let mut leaf = connect(&hub, "leaf").await;
    for _ in 0..TWIN_REQUESTS_MAX {
        ask(&hub, &mut leaf, TwinOperation::Get).unwrap();
    }
    until(|| cloud.held() == 1).await;
    ask(&hub, &mut leaf, TwinOperation::Get).unwrap();
    assert_eq!(answer(&mut leaf).await, Err(TwinError::Busy));
    cloud.go_on("leaf").await;
    for _ in 0..TWIN_REQUESTS_MAX {
        document(answer(&mut leaf).await);
    }
    assert_eq!(cloud.reads("leaf"), 1, "who waits at the same time shares one reading");
}

#[tokio::test]
async fn refused_reports_are_sent_again_until_they_are_taken() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    cloud.refuse("leaf", true);
    let mut leaf = connect(&hub, "leaf").await;
    report_all(&hub, &mut leaf, [json!({ "r": 1 })]).await;
    drop(leaf);
    tokio::task::yield_now().await;
    cloud.refuse("leaf", false);
    until(|| cloud.reported("leaf") == json!({ "r": 1 })).await;
}

#[tokio::test]
async fn reports_within_a_pause_are_one_update() {
    let options = ControlOptions { reported_pause: NEVER, ..quick() };
    let (hub, cloud) = start(&memory(), options);
    cloud.up().await;
    let mut leaf = connect(&hub, "leaf").await;
    report_all(&hub, &mut leaf, [json!({ "n": 0 })]).await;
    until(|| cloud.patches("leaf").len() == 1).await;
    report_all(&hub, &mut leaf, (1..10).map(|n| json!({ "n": n }))).await;
    assert_eq!(cloud.patches("leaf").len(), 1);
    // A new connection does not wait for the pause.
    cloud.down().await;
    cloud.up().await;
    until(|| cloud.patches("leaf").len() == 2).await;
    assert_eq!(cloud.patches("leaf")[1], json!({ "n": 9 }));
}

#[tokio::test]
async fn an_outage_is_one_and_everything_is_told_again() {
    let (hub, cloud) = start(&memory(), quick());
    let mut states = hub.connectivity();
    assert!(!states.borrow_and_update().connected);
    cloud.up().await;
    assert!(states.wait_for(|state| state.connected).await.is_ok());
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    hub.subscribe(&mut leaf.client, Feature::Methods, true);
    hub.subscribe(&mut leaf.client, Feature::CloudToDevice, true);
    let all = Wanted { desired: true, methods: true, cloud_to_device: true };
    until(|| cloud.wanted("leaf") == Some(all)).await;
    assert_eq!(cloud.wanted(OWN), Some(Wanted { cloud_to_device: false, ..all }));
    let told = cloud.wants("leaf");
    states.borrow_and_update();
    cloud.down().await;
    cloud.down().await;
    assert!(!states.wait_for(|state| !state.connected).await.unwrap().connected);
    cloud.up().await;
    assert!(states.wait_for(|state| state.connected).await.unwrap().connected);
    until(|| cloud.wants("leaf") == told + 1).await;
    drop(leaf);
    until(|| cloud.wanted("leaf").is_none()).await;
}
