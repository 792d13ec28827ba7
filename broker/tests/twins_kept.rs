//! What of twins outlives the hub, what routes hear of them, and the hub's own twin.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod control_site;
mod module_site;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use control_site::{
    OWN, command, desired, get, id, memory, object, quick, report, report_all, start, start_within,
    subscriber,
};
use edgehub_broker::backend::{Backend, Command, Feature, Outcome};
use edgehub_broker::hub::ControlOptions;
use edgehub_broker::message::{SystemProperty, Value as Property};
use edgehub_broker::twin::{CipherError, Ciphering, TwinCipher, TwinStore};
use edgehub_broker::upstream::control::ControlError;
use edgehub_routing::HubConfig;
use edgehub_storage::{Store, StoreLimits, StoreOptions, Table};
use module_site::{DEADLINE, config, connect, ledger, publish_on, until};
use serde_json::{Value, json};

fn disk(folder: &Path) -> Store {
    Store::open(StoreOptions::disk(folder)).unwrap()
}

/// What a process that ends at this moment leaves behind.
fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[tokio::test]
async fn what_was_accepted_survives_the_process_and_goes_up_without_its_client() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let store = disk(&first);
    {
        let (hub, cloud) = start(&store, quick());
        cloud.up().await;
        cloud.change("leaf", json!({ "a": 1 }));
        let mut leaf = connect(&hub, "leaf").await;
        get(&hub, &mut leaf).await;
        cloud.down().await;
        report_all(&hub, &mut leaf, [json!({ "b": 1, "old": 1 }), json!({ "b": { "c": 2 }, "old": null })])
            .await;
        copy_folder(&first, &second);
        hub.stop(DEADLINE).await;
    }
    let store = disk(&second);
    let (hub, cloud) = start(&store, quick());
    let mut other = connect(&hub, "other").await;
    get(&hub, &mut other).await;
    cloud.up().await;
    until(|| cloud.reported("leaf") == json!({ "b": { "c": 2 } })).await;
    assert_eq!(cloud.patches("leaf"), [json!({ "b": null }), json!({ "b": { "c": 2 }, "old": null })]);
    let twins = TwinStore::new(&store, None);
    until_empty(&twins).await;
    cloud.down().await;
    let mut leaf = connect(&hub, "leaf").await;
    let twin = get(&hub, &mut leaf).await;
    assert_eq!((&twin["desired"]["a"], &twin["reported"]["b"]["c"]), (&json!(1), &json!(2)));
    hub.stop(DEADLINE).await;
    drop((hub, leaf, other));
    // And nothing is sent a second time.
    let (hub, cloud) = start(&store, quick());
    cloud.up().await;
    until(|| cloud.reads(OWN) == 1).await;
    let mut leaf = connect(&hub, "leaf").await;
    get(&hub, &mut leaf).await;
    assert!(cloud.patches("leaf").is_empty());
}

async fn until_empty(twins: &TwinStore) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !twins.pending().await.unwrap().is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "reported properties still wait");
    }
}

/// Turns every byte around; cannot be asked, or has forgotten its key, when it is told so.
#[derive(Default)]
struct Mirror {
    error: parking_lot::Mutex<Option<CipherError>>,
}

impl Mirror {
    fn fail(&self, error: Option<CipherError>) {
        *self.error.lock() = error;
    }
}

impl TwinCipher for Mirror {
    fn seal<'a>(&'a self, plain: &'a [u8]) -> Ciphering<'a, String> {
        Box::pin(async move {
            match self.error.lock().clone() {
                None => Ok(plain.iter().map(|byte| char::from(!byte)).collect()),
                Some(error) => Err(error),
            }
        })
    }

    fn open<'a>(&'a self, sealed: &'a str) -> Ciphering<'a, Bytes> {
        Box::pin(async move {
            match self.error.lock().clone() {
                None => Ok(sealed.chars().map(|c| !(c as u32 as u8)).collect()),
                Some(error) => Err(error),
            }
        })
    }
}

#[tokio::test]
async fn a_sealed_twin_shows_nothing_and_is_read_again() {
    let store = memory();
    let cipher = Arc::new(Mirror::default());
    let options = || ControlOptions {
        twin_cipher: Some(cipher.clone()),
        // Every request reads the store.
        twin_cache_bytes_max: 0,
        ..quick()
    };
    {
        // Twins of a hub without a cipher stay readable.
        let (hub, _cloud) = start(&store, quick());
        let mut leaf = connect(&hub, "leaf").await;
        report_all(&hub, &mut leaf, [json!({ "plain": "text" })]).await;
        hub.stop(DEADLINE).await;
    }
    let (hub, cloud) = start(&store, options());
    hub.apply(&config(json!({ "changes": CHANGES }), 3_600)).unwrap();
    let mut leaf = connect(&hub, "leaf").await;
    report_all(&hub, &mut leaf, [json!({ "secret": "text" })]).await;
    let stored = store.keyed(Table::Twins).get(b"leaf").await.unwrap().unwrap();
    let record: Value = serde_json::from_slice(&stored).unwrap();
    assert_eq!(record["encrypted"], true);
    assert!(record["payload"].is_string());
    assert!(!String::from_utf8_lossy(&stored).contains("secret"));
    let twin = get(&hub, &mut leaf).await;
    assert_eq!(twin["reported"], json!({ "plain": "text", "secret": "text", "$version": 0 }));
    // While the cipher cannot be asked nothing is lost, and nobody is told that anything was kept.
    cipher.fail(Some(CipherError::Unavailable("starting".into())));
    assert_eq!(report(&hub, &mut leaf, json!({ "x": 1 })).await.unwrap_err().status(), 500);
    assert_eq!(ledger(&hub, "edge1/filter/changes").queued, 1, "routes did not hear of it either");
    cipher.fail(None);
    assert_eq!(get(&hub, &mut leaf).await, twin);
    cloud.up().await;
    until(|| cloud.reported("leaf") == json!({ "plain": "text", "secret": "text" })).await;
    cloud.down().await;
    // What can never be opened again is as if it had not been.
    cipher.fail(Some(CipherError::Refused("another key".into())));
    assert!(
        TwinStore::new(&store, Some(cipher.clone())).load(&id("leaf")).await.unwrap().reported.is_empty()
    );
    // Without a cipher it is an error, not a loss.
    assert!(TwinStore::new(&store, None).load(&id("leaf")).await.is_err());
}

const CHANGES: &str =
    r#"FROM /twinChangeNotifications INTO BrokeredEndpoint("/modules/filter/inputs/changes")"#;

#[tokio::test]
async fn routes_hear_of_reported_properties_with_the_client_as_sender() {
    let (hub, _cloud) = start(&memory(), quick());
    hub.apply(&config(json!({ "changes": CHANGES }), 3_600)).unwrap();
    let mut filter = connect(&hub, "edge1/filter").await;
    hub.subscribe(&mut filter.client, Feature::ModuleInputs, true);
    for (sender, module) in [("leaf", None), ("edge1/press", Some("press"))] {
        let mut sender = connect(&hub, sender).await;
        assert_eq!(report(&hub, &mut sender, json!({ "a.b": 1 })).await.unwrap_err().status(), 400);
        report_all(&hub, &mut sender, [json!({ "a": { "b": 1 } })]).await;
        let Command::Deliver(deliveries) = command(&mut filter).await else {
            panic!("a message was expected")
        };
        deliveries.settler.settle(deliveries.messages.iter().map(|(tag, _)| (*tag, Outcome::Accepted)));
        let [(_, message)] = &deliveries.messages[..] else { panic!("one message, and none of the bad one") };
        assert_eq!(&message.body[..], br#"{"a":{"b":1}}"#);
        assert_eq!(message.sender.identity, id(OWN));
        let text = |name| match message.properties.system(name) {
            Property::Text(text) => Some(text),
            Property::Null | Property::Absent => None,
        };
        assert_eq!(text(SystemProperty::OriginalSenderModuleId), module);
        assert_eq!(text(SystemProperty::MessageType), Some("twinChangeNotification"));
        assert_eq!(text(SystemProperty::MessageSchema), Some("twinChangeNotification"));
    }
    // What no route wants, and what the hub reports of itself, leaves no trace.
    hub.report(json!({ "own": 1 }).to_string().into()).await.unwrap();
    hub.apply(&config(json!({}), 3_600)).unwrap();
    let mut leaf = connect(&hub, "leaf").await;
    report_all(&hub, &mut leaf, [json!({ "c": 1 })]).await;
    assert_eq!(hub.status().unrouted, 0);
    assert!(filter.mailbox.try_recv().is_err());
}

#[tokio::test]
async fn a_report_that_routes_cannot_hear_of_is_not_kept() {
    let (hub, cloud) = start_within(&memory(), quick(), StoreLimits::default());
    let full = HubConfig::parse(&json!({
        "schemaVersion": "1.1",
        "routes": {
            "changes": CHANGES,
            "all": r#"FROM /messages/* INTO BrokeredEndpoint("/modules/filter/inputs/in")"#,
        },
        "storeAndForwardConfiguration": { "timeToLiveSecs": 3600, "storeLimits": { "maxSizeBytes": 1 << 20 } }
    }));
    hub.apply(&full.unwrap()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut number = 0;
    // What has no room for many may have room for one.
    for step in [500, 1] {
        while publish_on(&hub, &mut sensor, "out", number..number + step).await.is_ok() {
            number += step;
            assert!(number < 100_000, "the limit holds");
        }
    }
    let mut leaf = connect(&hub, "leaf").await;
    assert_eq!(report(&hub, &mut leaf, json!({ "a": 1 })).await.unwrap_err().status(), 500);
    assert_eq!(get(&hub, &mut leaf).await["reported"], json!({ "$version": 0 }));
    hub.apply(&config(json!({}), 3_600)).unwrap();
    report_all(&hub, &mut leaf, [json!({ "b": 1 })]).await;
    cloud.up().await;
    until(|| cloud.reported("leaf") == json!({ "b": 1 })).await;
}

#[tokio::test]
async fn the_hubs_own_twin_is_one_like_any_other() {
    let store = memory();
    {
        let (hub, cloud) = start(&store, quick());
        let mut own = hub.own_twin();
        assert!(own.borrow_and_update().is_none());
        assert_eq!(hub.read_own_twin().await, Err(ControlError::Offline));
        hub.report(json!({ "version": "1" }).to_string().into()).await.unwrap();
        assert_eq!(hub.report("[]".into()).await.unwrap_err().status(), 400);
        cloud.change(OWN, json!({ "routes": { "a": 1 } }));
        cloud.up().await;
        let first = own.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert_eq!(first["routes"], json!({ "a": 1 }));
        until(|| cloud.reported(OWN) == json!({ "version": "1" })).await;
        // The next version, a gap, and what nobody told of.
        cloud.desire(OWN, json!({ "routes": { "b": 2 } })).await;
        let routes = json!({ "a": 1, "b": 2 });
        own.wait_for(|twin| twin.as_ref().is_some_and(|twin| twin["routes"] == routes)).await.unwrap();
        cloud.change(OWN, json!({ "routes": { "a": null } }));
        cloud.desire(OWN, json!({ "x": 1 })).await;
        let last =
            own.wait_for(|twin| twin.as_ref().is_some_and(|twin| twin["x"] == 1)).await.unwrap().clone();
        assert_eq!(last.unwrap()["routes"], json!({ "b": 2 }));
        cloud.change(OWN, json!({ "x": 2 }));
        hub.read_own_twin().await.unwrap();
        assert_eq!(own.borrow_and_update().as_ref().unwrap()["x"], 2);
        hub.read_own_twin().await.unwrap();
        assert!(!own.has_changed().unwrap(), "nothing new is nothing to act on");
        hub.stop(DEADLINE).await;
    }
    let (hub, _cloud) = start(&store, quick());
    let stored = hub.own_twin().wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert_eq!((&stored["x"], &stored["$version"]), (&json!(2), &json!(5)));
}

#[tokio::test]
async fn a_stored_twin_is_compared_after_a_restart() {
    let store = memory();
    {
        let (hub, cloud) = start(&store, quick());
        cloud.up().await;
        cloud.change("leaf", json!({ "a": 1, "b": 1 }));
        let mut leaf = connect(&hub, "leaf").await;
        get(&hub, &mut leaf).await;
        hub.stop(DEADLINE).await;
    }
    let (hub, cloud) = start(&store, quick());
    cloud.change("leaf", json!({ "a": 2 }));
    cloud.up().await;
    let mut leaf = subscriber(&hub, &cloud, "leaf").await;
    // Another cloud, whose twin is younger than the stored one: an identity that was made anew.
    assert_eq!(desired(&mut leaf).await, json!({ "a": 2, "b": null, "$version": 1 }));
    assert_eq!(object(get(&hub, &mut leaf).await)["desired"]["$version"], 1);
}
