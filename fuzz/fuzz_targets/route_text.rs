//! Any text as a route: it compiles or is refused, with positions inside the text; lints and proposed changes hold.
#![no_main]

use edgehub_routing::{DEFAULT_PRIORITY, Origin, RouteSpec, RouteTable, lint};
use libfuzzer_sys::fuzz_target;

fn compiles(text: &str) -> bool {
    let route = RouteSpec {
        name: "route",
        text,
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        upstream_target: None,
    };
    RouteTable::compile([route], "edge1").1.is_empty()
}

fuzz_target!(|text: &str| {
    let route = RouteSpec {
        name: "route",
        text,
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        upstream_target: None,
    };
    let (table, errors) = RouteTable::compile([route], "edge1");
    assert_eq!(table.len() + errors.len(), 1);
    let origin = Origin::of_route("route");
    for diagnostic in errors.iter().flat_map(|error| &error.diagnostics) {
        assert!(diagnostic.in_route.is_none_or(|range| range.line >= 1 && range.column >= 1));
        assert!(diagnostic.render(&origin, text).starts_with("error["));
        if let Some(suggestion) = &diagnostic.suggestion {
            assert!(suggestion.apply(text).is_some());
        }
    }
    for lint in lint([route]) {
        assert!(lint.render("warning", &origin, text).contains('^'));
        if let Some(suggestion) = &lint.suggestion {
            assert!(compiles(&suggestion.apply(text).expect("the same text")));
        }
    }
});
