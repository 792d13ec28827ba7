//! The vectors of conditions that compile: each value holds on its own and inside a route.

#[allow(dead_code)] // Each runner needs a part of it.
mod support;

use edgehub_routing::{Condition, DEFAULT_PRIORITY, Decision, MessageSource, RouteSpec, RouteTable, Truth};
use serde_json::Value;
use support::Vectors;

#[test]
fn conditions_have_their_values() {
    let vectors = Vectors::open("conditions.json");
    vectors.check("condition", 477, |vector| check(&vectors, vector));
}

fn check(vectors: &Vectors, vector: &Value) -> Result<(), String> {
    let text = vector["condition"].as_str().expect("a text");
    let message = vectors.message(&vector["message"]);
    let expected = match vector["expect"].as_str() {
        Some("true") => Truth::True,
        Some("false") => Truth::False,
        Some("undefined") => Truth::Undefined,
        other => panic!("expectation {other:?}"),
    };
    let condition = Condition::compile(text).map_err(|errors| format!("{text}: {errors:?}"))?;
    let alone = condition.evaluate(&message);

    let route = format!("FROM /messages WHERE {text} INTO $upstream");
    let spec = RouteSpec {
        name: "r",
        text: &route,
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        upstream_target: None,
    };
    let (table, errors) = RouteTable::compile([spec], "edge-9");
    if let Some(error) = errors.first() {
        return Err(error.to_string());
    }
    let candidates = table.candidates(&MessageSource::Device).expect("a device has a path");
    let mut decision = Decision::new();
    table.decide(&candidates, &message, &mut decision);
    let in_route = match (decision.targets.len(), decision.undefined) {
        (1, 0) => Truth::True,
        (0, 0) => Truth::False,
        _ => Truth::Undefined,
    };
    if alone == expected && in_route == expected {
        Ok(())
    } else {
        Err(format!("{text}: {alone:?} alone, {in_route:?} in a route, expected {expected:?}"))
    }
}
