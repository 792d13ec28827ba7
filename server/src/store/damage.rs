//! Owns how a running hub tells of damage to its store: status, health, metric.

use edgehub_storage::{DamageKind, Store};
use metrics::counter;
use serde_json::{Value, json};

/// What is damaged, one sentence each.
pub fn texts(store: &Store) -> Vec<String> {
    store.damage().iter().map(|damage| format!("the store is damaged: {damage}")).collect()
}

/// Adds the member `damage` to a status.
pub fn add_to_status(mut status: Value, store: &Store) -> Value {
    let damage: Vec<Value> = store
        .damage()
        .iter()
        .map(|damage| {
            let entries: Vec<Value> = damage
                .lost
                .entries
                .iter()
                .map(|lost| json!({"queue": lost.queue, "first": lost.first, "last": lost.last}))
                .collect();
            json!({
                "kind": damage.kind.as_str(),
                "reason": damage.reason,
                "set_aside": damage.set_aside,
                "lost": {
                    "entries": entries,
                    "entries_count": damage.lost.entries_count,
                    "unknown": damage.lost.unknown,
                },
            })
        })
        .collect();
    if let Some(members) = status.as_object_mut() {
        members.insert("damage".to_owned(), damage.into());
    }
    status
}

/// Sets the counters of damage; call it before the metrics are rendered.
pub fn observe(store: &Store) {
    for kind in DamageKind::ALL {
        counter!("edgehub_store_damage_total", "kind" => kind.as_str()).absolute(store.damage_count(kind));
    }
}
