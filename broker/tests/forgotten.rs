//! What becomes of twins and sessions of identities that the scope has removed, and of those it has only lost sight of.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod control_site;
mod module_site;

use std::sync::Arc;

use bytes::Bytes;
use control_site::{OWN, get, id, memory, quick, report_all, start};
use edgehub_broker::backend::Backend as _;
use edgehub_broker::hub::Hub;
use edgehub_broker::identity::{
    Authentication, FullScope, Hosts, Identity, RefreshOptions, ScopeCache, ScopeError, ScopeRefresher,
    ScopeSource, ServiceIdentity, Status,
};
use edgehub_broker::twin::TwinStore;
use edgehub_storage::{Store, Table};
use module_site::connect;
use parking_lot::Mutex;
use serde_json::json;

/// Identities in scope, and whether these are all.
type Said = (Vec<&'static str>, bool);

/// What the upstream says of the scope; none while it is away.
#[derive(Clone, Default)]
struct Source(Arc<Mutex<Option<Said>>>);

impl Source {
    fn says(&self, identities: &[&'static str], complete: bool) {
        *self.0.lock() = Some((identities.to_vec(), complete));
    }
}

impl ScopeSource for Source {
    async fn one(&self, identity: &Identity, _: &str) -> Result<Vec<ServiceIdentity>, ScopeError> {
        let scope = self.all().await?;
        Ok(scope.identities.into_iter().filter(|entry| entry.identity == *identity).collect())
    }

    async fn all(&self) -> Result<FullScope, ScopeError> {
        let (identities, complete) = self.0.lock().clone().ok_or(ScopeError::Status(503))?;
        Ok(FullScope { identities: identities.into_iter().map(entry).collect(), complete })
    }
}

fn entry(text: &str) -> ServiceIdentity {
    let scope: Arc<str> = "ms-azure-iot-edge://edge1-1".into();
    let edge = text == "edge1";
    ServiceIdentity {
        identity: id(text),
        authentication: Authentication::CertificateAuthority,
        status: Status::Enabled,
        edge,
        device_scope: Some(scope.clone()),
        parent_scopes: if edge { Vec::new() } else { vec![scope] },
        generation_id: "1".into(),
    }
}

fn refresher(source: &Source) -> ScopeRefresher<Source> {
    let cache = Arc::new(ScopeCache::new(&id("edge1")));
    ScopeRefresher::new(cache, source.clone(), Hosts::new(["hub.example"]), RefreshOptions::default())
}

/// Leaves a twin, a patch that waits for the upstream, and a session.
async fn leave_state(hub: &Hub, identity: &str) {
    let mut client = connect(hub, identity).await;
    report_all(hub, &mut client, [json!({ "of": identity })]).await;
    hub.store_session(&id(identity), Some(Bytes::from_static(b"session"))).await.unwrap();
}

/// Whose twins, waiting patches and sessions are stored.
async fn stored(hub: &Hub, store: &Store) -> Vec<String> {
    let twins = store.keyed(Table::Twins).all().await.unwrap();
    let mut texts: Vec<String> =
        twins.iter().map(|(key, _)| String::from_utf8(key.to_vec()).unwrap()).collect();
    texts.retain(|text| !text.starts_with('\u{1}'));
    texts.sort();
    let mut pending: Vec<String> =
        TwinStore::new(store, None).pending().await.unwrap().iter().map(Identity::to_string).collect();
    pending.sort();
    assert_eq!(pending, texts, "patches that wait are listed as long as their twin is stored");
    for identity in &texts {
        assert!(hub.load_session(&id(identity)).await.is_some(), "the session of {identity}");
    }
    assert_eq!(store.keyed(Table::Sessions).all().await.unwrap().len(), texts.len());
    texts
}

#[tokio::test]
async fn only_what_the_scope_has_removed_is_deleted() {
    let store = memory();
    let (hub, cloud) = start(&store, quick());
    let source = Source::default();
    let scope = refresher(&source);
    for identity in ["leaf", "gone"] {
        leave_state(&hub, identity).await;
    }
    // Nothing is known yet.
    hub.forget_out_of_scope(scope.cache()).await;
    scope.refresh_all().await.unwrap_err();
    hub.forget_out_of_scope(scope.cache()).await;
    // All are there; then a part of them is heard of, then nothing.
    source.says(&["edge1", "leaf", "gone"], true);
    hub.forget_removed(&scope.refresh_all().await.unwrap(), scope.cache()).await;
    source.says(&["edge1", "leaf"], false);
    hub.forget_removed(&scope.refresh_all().await.unwrap(), scope.cache()).await;
    *source.0.lock() = None;
    scope.refresh_all().await.unwrap_err();
    hub.forget_out_of_scope(scope.cache()).await;
    assert_eq!(stored(&hub, &store).await, ["gone", "leaf"]);
    // It is removed, but there again before anybody looks.
    source.says(&["edge1", "leaf"], true);
    let removed = scope.refresh_all().await.unwrap();
    assert_eq!(removed.removed, [id("gone")]);
    source.says(&["edge1", "leaf", "gone"], true);
    scope.refresh_all().await.unwrap();
    hub.forget_removed(&removed, scope.cache()).await;
    assert_eq!(stored(&hub, &store).await, ["gone", "leaf"]);
    // It is removed.
    source.says(&["edge1", "leaf"], true);
    hub.forget_removed(&scope.refresh_all().await.unwrap(), scope.cache()).await;
    assert_eq!(stored(&hub, &store).await, ["leaf"]);
    // What the deleted one had reported does not go up, nor does a new one of the same name find it.
    let mut anew = connect(&hub, "gone").await;
    assert_eq!(get(&hub, &mut anew).await["reported"], json!({ "$version": 0 }));
    cloud.up().await;
    module_site::until(|| cloud.reported("leaf") == json!({ "of": "leaf" })).await;
    assert!(cloud.patches("gone").is_empty());
}

#[tokio::test]
async fn whoever_missed_changes_looks_at_everything() {
    let store = memory();
    let (hub, _cloud) = start(&store, quick());
    let source = Source::default();
    let scope = refresher(&source);
    for identity in ["leaf", "leaf/module", "gone", "gone/module", "edge1/filter", OWN] {
        leave_state(&hub, identity).await;
    }
    source.says(&["edge1", "leaf"], true);
    scope.refresh_all().await.unwrap();
    hub.forget_out_of_scope(scope.cache()).await;
    assert_eq!(stored(&hub, &store).await, [OWN, "leaf", "leaf/module"]);
}

#[tokio::test]
async fn a_reading_that_is_under_way_does_not_bring_the_twin_back() {
    let store = memory();
    let (hub, cloud) = start(&store, quick());
    let source = Source::default();
    let scope = refresher(&source);
    source.says(&["edge1", "gone"], true);
    scope.refresh_all().await.unwrap();
    cloud.up().await;
    cloud.hang("gone");
    let mut gone = connect(&hub, "gone").await;
    control_site::ask(&hub, &mut gone, edgehub_broker::backend::TwinOperation::Get).unwrap();
    module_site::until(|| cloud.held() == 1).await;
    source.says(&["edge1"], true);
    hub.forget_removed(&scope.refresh_all().await.unwrap(), scope.cache()).await;
    assert!(control_site::answer(&mut gone).await.is_err());
    cloud.go_on("gone").await;
    // Whoever still waited for it would keep it now.
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(store.keyed(Table::Twins).get(b"gone").await.unwrap(), None);
}
