//! Any text as a route: it compiles or is refused, with positions inside the text.
#![no_main]

use edgehub_routing::{DEFAULT_PRIORITY, RouteSpec, RouteTable};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let route = RouteSpec { name: "route", text, priority: DEFAULT_PRIORITY, time_to_live_secs: 0 };
    let (table, errors) = RouteTable::compile([route], "edge1");
    assert_eq!(table.len() + errors.len(), 1);
    for diagnostic in errors.iter().flat_map(|error| &error.diagnostics) {
        assert!(diagnostic.in_route.is_none_or(|range| range.line >= 1 && range.column >= 1));
    }
});
