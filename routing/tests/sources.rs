//! The vectors of sources, sinks, sets of routes and the route table of the configuration.

#[allow(dead_code)] // Each runner needs a part of it.
mod support;

use std::collections::BTreeSet;

use edgehub_routing::{
    Candidates, DEFAULT_PRIORITY, Decision, HubConfig, Route, RouteSpec, RouteTable, Sink,
};
use serde_json::{Value, json};
use support::{Message, Vectors};

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

fn same(found: &Value, expected: &Value) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("found {found}, expected {expected}")) }
}

fn sink(sink: &Sink) -> Value {
    match sink {
        Sink::Upstream => json!({ "system": "$upstream" }),
        Sink::UpstreamTarget(address) => json!({ "system": "$upstream", "address": &**address }),
        Sink::ModuleInput { module, input } => json!({ "module": &**module, "input": &**input }),
    }
}

fn candidates(table: &RouteTable, message: &Message) -> Result<Candidates, String> {
    table.candidates(&message.source()).map_err(|error| error.to_string())
}

#[test]
fn patterns_match_sources() {
    let vectors = Vectors::open("sources.json");
    vectors.check("source", 131, |vector| {
        let route = text(&vector["route"]);
        let parsed = Route::parse(route).map_err(|error| error.to_string())?;
        let spec = RouteSpec {
            name: "r",
            text: route,
            priority: DEFAULT_PRIORITY,
            time_to_live_secs: 0,
            upstream_target: None,
        };
        let (table, _) = RouteTable::compile([spec], vectors.edge_device_id());
        let matched = !candidates(&table, &vectors.message(&vector["message"]))?.is_empty();
        same(&json!({ "sourcePath": parsed.source, "matched": matched }), &vector["expect"])
    });
}

#[test]
fn messages_have_paths() {
    let vectors = Vectors::open("sources.json");
    vectors.check("message-source", 12, |vector| {
        let found = match vectors.message(&vector["message"]).source().path() {
            Ok(path) => json!({ "path": path }),
            Err(_) => json!({ "error": "message-rejected" }),
        };
        same(&found, &vector["expect"])
    });
}

#[test]
fn routes_have_parts() {
    Vectors::open("sources.json").check("route", 26, |vector| {
        let route = Route::parse(text(&vector["route"])).map_err(|error| error.to_string())?;
        let found =
            json!({ "source": route.source, "condition": route.condition, "sink": sink(&route.sink) });
        same(&found, &vector["expect"])
    });
}

#[test]
fn sets_of_routes_decide() {
    let vectors = Vectors::open("sources.json");
    vectors.check("set", 21, |vector| {
        let number = |value: &Value| value.as_u64().map(|number| number as u32);
        let routes = vector["routes"].as_array().expect("a list").iter().map(|route| RouteSpec {
            name: text(&route["name"]),
            text: text(&route["route"]),
            priority: number(&route["priority"]).unwrap_or(DEFAULT_PRIORITY),
            time_to_live_secs: number(&route["timeToLiveSecs"]).unwrap_or_default(),
            upstream_target: None,
        });
        let (table, errors) = RouteTable::compile(routes, vectors.edge_device_id());
        if let Some(error) = errors.first() {
            return Err(error.to_string());
        }
        let message = vectors.message(&vector["message"]);
        let mut decision = Decision::new();
        table.decide(&candidates(&table, &message)?, &message, &mut decision);
        let found: BTreeSet<String> = decision
            .targets
            .iter()
            .map(|target| {
                let endpoint = table.endpoint(target.endpoint).expect("of this table");
                assert_eq!(*endpoint.id, endpoint.sink.endpoint_id(vectors.edge_device_id()));
                assert!(endpoint.priorities.contains(&target.priority));
                json!({
                    "sink": sink(&endpoint.sink),
                    "priority": target.priority,
                    "timeToLiveSecs": target.time_to_live_secs,
                })
                .to_string()
            })
            .collect();
        assert_eq!(found.len(), decision.targets.len(), "each sink once");
        let expected = vector["expect"].as_array().expect("a list").iter().map(Value::to_string).collect();
        if found == expected { Ok(()) } else { Err(format!("found {found:?}, expected {expected:?}")) }
    });
}

#[test]
fn configurations_are_read() {
    Vectors::open("sources.json").check("desired", 61, |vector| {
        let found = match HubConfig::parse(&vector["desired"]).and_then(HubConfig::strict) {
            Ok(config) => {
                let routes = config.routes.iter().map(|route| {
                    let entry = json!({
                        "route": route.text,
                        "priority": route.priority,
                        "timeToLiveSecs": route.time_to_live_secs,
                    });
                    (route.name.clone(), entry)
                });
                json!({ "ok": true, "routes": Value::Object(routes.collect()) })
            }
            Err(error) => json!({ "ok": false, "error": error.category.name() }),
        };
        same(&found, &vector["expect"])
    });
}
