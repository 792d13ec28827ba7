//! Any JSON as the hub's desired properties.
#![no_main]

use edgehub_routing::{HubConfig, OwnedRouteSpec, RouteTable};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(desired) = serde_json::from_slice(data) else { return };
    if let Ok(config) = HubConfig::parse(&desired) {
        RouteTable::compile(config.routes.iter().map(OwnedRouteSpec::as_spec), "edge1");
    }
});
