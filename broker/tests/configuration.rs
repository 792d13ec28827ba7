//! The hub's configuration from its own twin: what is in force, what is reported, what outlives a restart.

// What a test sets up and cannot have is a failure of the test, with its place.
#![allow(clippy::unwrap_used)]

mod module_site;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::TwinError;
use edgehub_broker::configuration::{
    Configuration, ConfigurationOptions, ConfigurationState, Origin, OwnTwin, ProgramVersion,
};
use edgehub_broker::hub::{DesiredProperties, Hub};
use edgehub_broker::twin::json::Object;
use edgehub_routing::HubConfig;
use edgehub_storage::{Store, StoreOptions, Table};
use module_site::{DEADLINE, Setup, connect, setup};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::timeout;

const UP: &str = "FROM /messages/* INTO $upstream";
const BAD: &str = "FROM /messages/* WHERE level = INTO $upstream";

/// A cloud with the hub's twin: merges reported patches, answers pulls, or is away.
#[derive(Clone)]
struct Cloud {
    desired: watch::Sender<Option<Arc<DesiredProperties>>>,
    online: watch::Sender<bool>,
    upstream: Arc<Mutex<Upstream>>,
}

#[derive(Default)]
struct Upstream {
    desired: Option<Value>,
    reported: Vec<Value>,
    pulls: usize,
    refuses: Option<TwinError>,
}

impl Cloud {
    fn new(online: bool) -> Self {
        Self {
            desired: watch::Sender::default(),
            online: watch::Sender::new(online),
            upstream: Arc::default(),
        }
    }

    /// The desired properties change, as the hub's twin shows it.
    fn push(&self, desired: Value) {
        let Value::Object(properties) = desired else { panic!("{desired} is no object") };
        let version = properties["$version"].as_u64().unwrap();
        self.desired.send_replace(Some(Arc::new(DesiredProperties { version, properties })));
    }

    fn reported(&self) -> Vec<Value> {
        self.upstream.lock().reported.clone()
    }

    /// Waits for the first update after `seen` that fits.
    async fn update(&self, seen: usize, fits: impl Fn(&Value) -> bool) -> Value {
        until(|| self.reported().get(seen..).unwrap_or_default().iter().any(&fits)).await;
        self.reported().into_iter().skip(seen).find(fits).unwrap()
    }
}

impl OwnTwin for Cloud {
    fn desired(&self) -> watch::Receiver<Option<Arc<DesiredProperties>>> {
        self.desired.subscribe()
    }

    async fn reachable(&self) {
        self.online.subscribe().wait_for(|online| *online).await.unwrap();
    }

    async fn pull(&self) -> Result<(), TwinError> {
        let mut upstream = self.upstream.lock();
        upstream.pulls += 1;
        if let Some(desired) = &upstream.desired {
            self.push(desired.clone());
        }
        Ok(())
    }

    async fn report(&self, patch: &Object) -> Result<(), TwinError> {
        let mut upstream = self.upstream.lock();
        if let Some(error) = upstream.refuses.take() {
            return Err(error);
        }
        upstream.reported.push(Value::Object(patch.clone()));
        Ok(())
    }
}

async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(DEADLINE, waiting).await.expect("it comes true in time");
}

fn options() -> ConfigurationOptions {
    ConfigurationOptions {
        strict: false,
        refresh_period: Duration::from_secs(3_600),
        report_pause: Duration::from_millis(1),
        version: ProgramVersion { version: "1.2.3".into(), ..ProgramVersion::default() },
    }
}

fn document(version: u64, routes: Value) -> Value {
    json!({
        "$version": version,
        "$metadata": { "$lastUpdated": "2026-08-21T10:57:24Z" },
        "schemaVersion": "1.1",
        "routes": routes,
        "storeAndForwardConfiguration": { "timeToLiveSecs": 7200 },
    })
}

struct Site {
    hub: Hub,
    cloud: Cloud,
    configuration: Configuration,
    state: watch::Receiver<ConfigurationState>,
}

impl Site {
    async fn start(cloud: Cloud, store: &Store, first: Option<&HubConfig>) -> Self {
        Self::start_with(cloud, store, first, &options()).await
    }

    async fn start_with(
        cloud: Cloud,
        store: &Store,
        first: Option<&HubConfig>,
        options: &ConfigurationOptions,
    ) -> Self {
        let Setup { hub, .. } = setup(4, DEADLINE);
        let runtime = Handle::current();
        let configuration = Configuration::from_twin(
            &hub,
            cloud.clone(),
            first,
            store.keyed(Table::Configuration),
            options,
            &runtime,
        )
        .await
        .unwrap();
        let state = configuration.state();
        Self { hub, cloud, configuration, state }
    }

    /// The desired properties change; returns when that was taken notice of.
    async fn desired(&mut self, desired: Value) -> (u16, String) {
        let version = desired["$version"].as_u64();
        self.cloud.push(desired);
        let told = |state: &ConfigurationState| {
            state.desired.as_ref().is_some_and(|status| status.desired_version == version)
        };
        let state = timeout(DEADLINE, self.state.wait_for(told)).await.unwrap().unwrap();
        let status = state.desired.clone().unwrap();
        (status.code, status.description)
    }

    fn routes(&self) -> Vec<String> {
        self.state.borrow().in_force.as_ref().map(|in_force| in_force.routes.clone()).unwrap_or_default()
    }

    fn count(&self) -> u64 {
        self.state.borrow().in_force.as_ref().map_or(0, |in_force| in_force.count)
    }
}

fn store() -> Store {
    Store::open(StoreOptions::memory()).unwrap()
}

#[tokio::test]
async fn desired_properties_come_into_force_and_bad_ones_leave_what_was() {
    let mut site = Site::start(Cloud::new(true), &store(), None).await;
    assert_eq!(site.state.borrow().in_force, None);
    assert_eq!(site.desired(document(1, json!({ "a": UP, "b": UP }))).await, (200, String::new()));
    assert_eq!(site.routes(), ["a", "b"]);
    assert_eq!(site.state.borrow().in_force.as_ref().unwrap().origin, Origin::Twin);
    // A route that was removed is gone.
    assert_eq!(site.desired(document(2, json!({ "b": UP }))).await.0, 200);
    assert_eq!(site.routes(), ["b"]);
    // The document cannot be read: all stays.
    let mut refused = document(3, json!({ "c": UP }));
    refused["schemaVersion"] = json!("1.4");
    let (code, text) = site.desired(refused).await;
    assert_eq!(code, 400);
    let expected =
        "Error while parsing desired properties - EdgeHub config contains unsupported SchemaVersion: 1.4";
    assert!(text.starts_with(expected), "{text}");
    assert_eq!((site.routes(), site.count()), (vec!["b".to_owned()], 2));
    // A bad route keeps its last good version, or is left out; the good ones run.
    let (code, text) = site.desired(document(4, json!({ "b": BAD, "c": UP, "d": BAD }))).await;
    assert_eq!(code, 400);
    assert!(
        text.contains("route b - ") && text.contains("route d - ") && text.contains("line 1 column"),
        "{text}"
    );
    assert_eq!(site.routes(), ["b", "c"]);
    assert_eq!(site.desired(document(5, json!({ "b": UP, "c": UP, "d": UP }))).await, (200, String::new()));
    assert_eq!(site.routes(), ["b", "c", "d"]);
}

#[tokio::test]
async fn the_same_configuration_again_changes_nothing_but_the_version_told() {
    let mut site = Site::start(Cloud::new(true), &store(), None).await;
    site.desired(document(1, json!({ "a": UP, "b": BAD }))).await;
    let (code, text) = site.desired(document(2, json!({ "a": UP, "b": BAD }))).await;
    assert_eq!((code, site.count()), (400, 1));
    assert!(text.contains("route b - "), "{text}");
    let told = |update: &Value| update["lastDesiredVersion"] == 2;
    assert_eq!(site.cloud.update(0, told).await["lastDesiredStatus"]["code"], 400);
}

#[tokio::test]
async fn the_limit_of_the_store_comes_and_goes_with_the_configuration() {
    let mut site = Site::start(Cloud::new(true), &store(), None).await;
    let mut limited = document(1, json!({}));
    limited["storeAndForwardConfiguration"]["storeLimits"] = json!({ "maxSizeBytes": 1_000_000 });
    site.desired(limited).await;
    assert_eq!(site.hub.status().space.max_bytes, Some(1_000_000));
    site.desired(document(2, json!({}))).await;
    assert_eq!(site.hub.status().space.max_bytes, None);
}

#[tokio::test]
async fn what_was_in_force_is_in_force_at_once_after_a_restart_without_upstream() {
    let store = store();
    let mut site = Site::start(Cloud::new(true), &store, None).await;
    site.desired(document(1, json!({ "a": UP, "b": UP }))).await;
    site.desired(document(2, json!({ "a": UP, "b": BAD }))).await;
    drop(site);
    let manifest = module_site::config(json!({ "other": UP }), 1);
    let mut site = Site::start(Cloud::new(false), &store, Some(&manifest)).await;
    assert_eq!(site.routes(), ["a", "b"]);
    assert_eq!(site.state.borrow().in_force.as_ref().unwrap().origin, Origin::Store);
    site.configuration.in_force().await;
    // The twin that is as bad as before the restart keeps the good version from before it.
    assert_eq!(site.desired(document(2, json!({ "a": UP, "b": BAD }))).await.0, 400);
    assert_eq!(site.routes(), ["a", "b"]);
}

#[tokio::test]
async fn without_anything_it_waits_for_the_twin_and_a_file_counts_until_then() {
    let store = store();
    let cloud = Cloud::new(false);
    cloud.upstream.lock().desired = Some(document(1, json!({ "fromTwin": UP })));
    let site = Site::start(cloud.clone(), &store, None).await;
    assert_eq!(site.state.borrow().in_force, None);
    cloud.online.send_replace(true);
    timeout(DEADLINE, site.configuration.in_force()).await.unwrap();
    assert_eq!(site.routes(), ["fromTwin"]);

    let manifest = module_site::config(json!({ "fromFile": UP }), 1);
    let away = Cloud::new(false);
    let site = Site::start(away, &self::store(), Some(&manifest)).await;
    assert_eq!(site.routes(), ["fromFile"]);
    assert_eq!(site.state.borrow().in_force.as_ref().unwrap().origin, Origin::File);

    let Setup { hub, .. } = setup(4, DEADLINE);
    let configuration = Configuration::from_file(&hub, &manifest, false).unwrap();
    timeout(DEADLINE, configuration.in_force()).await.unwrap();
    assert_eq!(configuration.state().borrow().desired, None);
}

#[tokio::test]
async fn a_damaged_stored_configuration_is_as_none() {
    let store = store();
    let table = store.keyed(Table::Configuration);
    table.put(b"in-force", Bytes::from_static(b"{\"schemaVersion\":")).await.unwrap();
    let mut site = Site::start(Cloud::new(false), &store, None).await;
    assert_eq!(site.state.borrow().in_force, None);
    assert_eq!(site.desired(document(1, json!({ "a": UP }))).await.0, 200);
}

#[tokio::test]
async fn a_strict_hub_refuses_routes_with_lints() {
    let strict = ConfigurationOptions { strict: true, ..options() };
    let mut site = Site::start_with(Cloud::new(true), &store(), None, &strict).await;
    let hardly_meant = "FROM /messages/* WHERE 1 = 1 INTO $upstream and more";
    let (code, text) = site.desired(document(1, json!({ "a": UP, "b": hardly_meant }))).await;
    assert_eq!(code, 400, "{text}");
    assert_eq!(site.routes(), ["a"]);
}

#[tokio::test]
async fn the_first_update_clears_the_clients_of_the_last_run_and_the_next_tell_the_status() {
    let cloud = Cloud::new(false);
    let mut site = Site::start(cloud.clone(), &store(), None).await;
    // All while the upstream is away: only the newest is told.
    for version in 1..=20 {
        site.desired(document(version, json!({ "a": UP }))).await;
    }
    let filter = connect(&site.hub, "edge1/filter").await;
    for _ in 0..100 {
        drop(connect(&site.hub, "leaf1").await);
    }
    let leaf = connect(&site.hub, "leaf.2").await;
    cloud.online.send_replace(true);
    cloud.update(0, |update| update["clients"]["leaf%2E2"].is_object()).await;
    let reported = cloud.reported();
    let program = json!({ "version": "1.2.3", "build": "", "commit": "" });
    assert_eq!(reported[0], json!({ "schemaVersion": "1.0", "version": program, "clients": null }));
    assert_eq!(reported.len(), 2, "{reported:?}");
    let second = &reported[1];
    assert_eq!((&second["schemaVersion"], &second["version"]), (&json!("1.0"), &program));
    assert_eq!(second["lastDesiredVersion"], 20);
    assert_eq!(second["lastDesiredStatus"], json!({ "code": 200, "description": "" }));
    assert_eq!(second["clients"]["edge1/filter"]["status"], "Connected");
    assert!(second["clients"]["edge1/filter"]["lastConnectedTimeUtc"].is_string());
    assert_eq!(second["clients"].as_object().unwrap().get("leaf1"), Some(&Value::Null));

    drop((filter, leaf));
    let gone = |update: &Value| update["clients"]["edge1/filter"]["status"] == "Disconnected";
    let update = cloud.update(2, gone).await;
    assert!(update["clients"]["edge1/filter"]["lastDisconnectedTimeUtc"].is_string());
    assert!(update.get("lastDesiredVersion").is_none());
    until(|| {
        cloud.reported()[2..].iter().any(|update| update["clients"].get("leaf%2E2") == Some(&Value::Null))
    })
    .await;
}

#[tokio::test]
async fn an_update_that_can_never_be_taken_is_given_up_and_others_are_repeated() {
    let cloud = Cloud::new(true);
    cloud.upstream.lock().refuses = Some(TwinError::Invalid("no null, please".into()));
    let mut site = Site::start(cloud.clone(), &store(), None).await;
    until(|| cloud.upstream.lock().refuses.is_none()).await;
    cloud.upstream.lock().refuses = Some(TwinError::Busy);
    site.desired(document(1, json!({}))).await;
    let update = cloud.update(0, |update| update["lastDesiredVersion"] == 1).await;
    assert_eq!(update["clients"], json!({}));
    assert_eq!(cloud.reported().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_twin_is_read_at_the_start_and_once_per_period() {
    let cloud = Cloud::new(true);
    let twin = cloud.clone();
    let Setup { hub, .. } = setup(4, DEADLINE);
    let runtime = Handle::current();
    let _configuration =
        Configuration::from_twin(&hub, twin, None, store().keyed(Table::Configuration), &options(), &runtime)
            .await
            .unwrap();
    let at = tokio::time::Instant::now();
    while cloud.upstream.lock().pulls < 3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let elapsed = at.elapsed();
    assert!((7_200..7_210).contains(&elapsed.as_secs()), "{elapsed:?}");
}
