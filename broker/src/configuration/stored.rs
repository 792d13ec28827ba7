//! The configuration in force as bytes: what the hub starts with when the upstream cannot be asked.
//!
//! It is written as desired properties of schema 1.1, of which every route compiled: also the last good version of a
//! route whose newest text is bad.

use bytes::Bytes;
use edgehub_routing::{HubConfig, OwnedRouteSpec};
use serde_json::{Map, Value, json};

/// What is in force, as bytes for the store.
pub(super) fn encode(routes: &[OwnedRouteSpec], config: &HubConfig) -> Bytes {
    let routes: Map<String, Value> = routes
        .iter()
        .map(|route| {
            let mut entry = json!({
                "route": route.text,
                "priority": route.priority,
                "timeToLiveSecs": route.time_to_live_secs,
            });
            if let Some(overflow) = route.overflow {
                entry["overflow"] = overflow.name().into();
            }
            (route.name.clone(), entry)
        })
        .collect();
    let mut store = json!({ "timeToLiveSecs": config.time_to_live_secs });
    if let Some(bytes) = config.store_limit_bytes {
        store["storeLimits"] = json!({ "maxSizeBytes": bytes });
    }
    let document = json!({ "schemaVersion": "1.1", "routes": routes, "storeAndForwardConfiguration": store });
    document.to_string().into()
}

/// The configuration that [`encode`] wrote.
///
/// # Errors
/// What is wrong with the bytes.
pub(super) fn decode(bytes: &[u8]) -> Result<HubConfig, String> {
    let document: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    HubConfig::parse(&document).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let config = HubConfig::parse(&json!({
            "schemaVersion": "1.1",
            "routes": {
                "a": "FROM /messages/* INTO $upstream",
                "b": {
                    "route": "FROM /* INTO $upstream",
                    "priority": 3,
                    "timeToLiveSecs": 60,
                    "overflow": "drop-oldest",
                },
            },
            "storeAndForwardConfiguration": {
                "timeToLiveSecs": -1,
                "storeLimits": { "maxSizeBytes": 1_000_000 },
            },
        }))
        .expect("a document");
        assert_eq!(decode(&encode(&config.routes, &config)), Ok(config.clone()));
        let unlimited = HubConfig { store_limit_bytes: None, routes: Vec::new(), ..config };
        assert_eq!(decode(&encode(&[], &unlimited)), Ok(unlimited));
        assert!(decode(b"{").is_err() && decode(b"{}").is_err());
    }
}
