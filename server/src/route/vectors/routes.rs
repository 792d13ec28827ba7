//! Owns the vectors of routes: their parts, errors, sources, sinks, sets and deliveries.

use edgehub_routing::{
    DEFAULT_PRIORITY, Decision, Endpoint, OwnedRouteSpec, Route, RouteSpec, RouteTable, Sink, SourcePattern,
    Stage, Target, UPSTREAM_ENDPOINT,
};
use serde_json::{Map, Value, json};

use super::{File, Refusal, Verdict, covers, same, same_error, text};
use crate::route::message::{Message, escaped};
use crate::route::of_sink;

/// The parts of a route.
pub(super) fn route(vector: &Value) -> Verdict {
    let own = escaped(text(vector, "route")?);
    let expect = &vector["expect"];
    let refused = |got: String| Refusal::Failed { expected: expect.to_string(), got };
    let route = Route::parse(&own).map_err(|error| refused(error.to_string()))?;
    let mut expected = expect.clone();
    let sink = expected.as_object_mut().and_then(|expected| expected.remove("sink"));
    if let Some(sink) = sink.filter(|sink| !is_sink(sink, &route.sink, "")) {
        return Err(Refusal::Failed { expected: sink.to_string(), got: of_sink(&route.sink).to_string() });
    }
    if expected == "any" {
        return Ok(());
    }
    same(&expected, &json!({ "source": route.source, "condition": route.condition }))
}

/// A route that must be refused.
pub(super) fn route_error(vector: &Value) -> Verdict {
    let own = text(vector, "route")?;
    let spec = RouteSpec {
        name: "r",
        text: own,
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        upstream_target: None,
    };
    let (_, errors) = RouteTable::compile([spec], "edge");
    match errors.first().and_then(|error| error.diagnostics.first()) {
        Some(first) => {
            let range = if first.stage == Stage::Compile { first.in_condition } else { first.in_route };
            same_error(vector, first, range)
        }
        None => Err(Refusal::Failed { expected: vector["error"].to_string(), got: "it compiles".to_owned() }),
    }
}

/// A source pattern against the source of a message.
pub(super) fn source(file: &File<'_>, vector: &Value) -> Verdict {
    let message = file.message(vector)?;
    let path = message.path().map_err(|error| Refusal::Failed {
        expected: vector["expect"].to_string(),
        got: format!("message-rejected: {error}"),
    });
    if let Some(pattern) = vector["pattern"].as_str().filter(|_| vector.get("route").is_none()) {
        let pattern = SourcePattern::new(pattern);
        let got = json!({ "sourcePath": pattern.path(), "matched": pattern.covers(&path?) });
        return same(&vector["expect"], &got);
    }
    let own = escaped(text(vector, "route")?);
    let refused = |got: String| Refusal::Failed { expected: vector["expect"].to_string(), got };
    let parsed = Route::parse(&own).map_err(|error| refused(error.to_string()))?;
    let spec = OwnedRouteSpec {
        name: "r".to_owned(),
        text: own,
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        overflow: None,
    };
    let table = compile(&[spec], file.edge_device_id, &vector["expect"])?;
    let matched = !table.candidates_at(&path?).is_empty();
    same(&vector["expect"], &json!({ "sourcePath": parsed.source, "matched": matched }))
}

/// The path of a message's source.
pub(super) fn message_source(file: &File<'_>, vector: &Value) -> Verdict {
    let got = match file.message(vector)?.path() {
        Ok(path) => json!({ "path": path }),
        Err(_) => json!({ "error": "message-rejected" }),
    };
    same(&vector["expect"], &got)
}

/// A sink by itself.
pub(super) fn sink(vector: &Value) -> Verdict {
    let given = &vector["sink"];
    let text = match (given["system"].as_str(), given["function"].as_str()) {
        (Some(system), _) => system.to_owned(),
        (None, Some(function)) => {
            let address = given["address"].as_str().unwrap_or_default();
            // An address is not unescaped, so it stands in the quotes that it does not hold.
            let quote = if address.contains('"') { '\'' } else { '"' };
            format!("{function}({quote}{address}{quote})")
        }
        (None, None) => {
            given.as_str().ok_or_else(|| Refusal::malformed("a vector without a sink"))?.to_owned()
        }
    };
    let own = format!("FROM /messages/* INTO {text}");
    let parsed = Route::parse(&own);
    let mut got = json!({ "valid": parsed.is_ok() });
    match parsed {
        Ok(Route { sink: Sink::ModuleInput { module, input }, .. }) => {
            got["moduleId"] = (*module).into();
            got["module"] = (*module).into();
            got["input"] = (*input).into();
        }
        Ok(Route { sink: Sink::Upstream | Sink::UpstreamTarget(_), .. }) => {
            got["system"] = "$upstream".into()
        }
        Err(error) => got["error"] = error.to_string().into(),
    }
    let mut expected = match &vector["expect"] {
        Value::Bool(valid) => json!({ "valid": valid }),
        expect => expect.clone(),
    };
    if let Some(expected) = expected.as_object_mut() {
        expected.retain(|name, value| !value.is_null() && name != "error");
    }
    same(&expected, &got)
}

/// The results of a set of routes.
pub(super) fn set(file: &File<'_>, vector: &Value) -> Verdict {
    let message = file.message(vector)?;
    let expect = &vector["expect"];
    let table = compile(&specs(&vector["routes"])?, file.edge_device_id, expect)?;
    let Some(decision) = decide(&table, &message) else {
        return same(expect, &json!({ "error": "message-rejected" }));
    };
    if *expect == "any" {
        return Ok(());
    }
    let results = expect.as_array().or_else(|| expect.get("results").and_then(Value::as_array));
    let expected = results.ok_or_else(|| Refusal::malformed("a vector whose expectation is no list"))?;
    let found: Vec<(&Target, &Endpoint)> = decision
        .targets
        .iter()
        .filter_map(|target| Some((target, table.endpoint(target.endpoint)?)))
        .collect();
    let is = |expected: &Value, target: &Target, endpoint: &Endpoint| {
        let mut members = expected.clone();
        let sink = members.as_object_mut().and_then(|members| members.remove("sink"));
        let got = json!({
            "priority": target.priority,
            "timeToLiveSecs": target.time_to_live_secs,
            "route": table.route_name(target.route),
            "endpoint": &*endpoint.id,
        });
        sink.is_none_or(|sink| is_sink(&sink, &endpoint.sink, &endpoint.id)) && covers(&members, &got)
    };
    // Each sink is there at most once, so equal numbers and a place for each leave nothing over.
    let complete = expected.len() == found.len()
        && expected
            .iter()
            .all(|expected| found.iter().any(|(target, endpoint)| is(expected, target, endpoint)))
        && found
            .iter()
            .all(|(target, endpoint)| expected.iter().any(|expected| is(expected, target, endpoint)));
    if complete {
        return Ok(());
    }
    let got = found.iter().map(|(target, endpoint)| {
        json!({
            "sink": of_sink(&endpoint.sink),
            "priority": target.priority,
            "timeToLiveSecs": target.time_to_live_secs,
        })
    });
    Err(Refusal::Failed { expected: expect.to_string(), got: Value::Array(got.collect()).to_string() })
}

/// Which endpoints get the message: the upstream, and of each module any of the inputs that are listed.
pub(super) fn delivery(file: &File<'_>, vector: &Value) -> Verdict {
    let message = file.message(vector)?;
    let expect = &vector["expect"];
    let table = compile(&specs(&vector["routes"])?, file.edge_device_id, expect)?;
    let decision = decide(&table, &message).unwrap_or_default();
    if *expect == "any" {
        return Ok(());
    }
    let sinks: Vec<&Sink> = decision
        .targets
        .iter()
        .filter_map(|target| table.endpoint(target.endpoint))
        .map(|endpoint| &endpoint.sink)
        .collect();
    let mut got = Map::new();
    let mut expected = Map::new();
    let expectations =
        expect.as_object().ok_or_else(|| Refusal::malformed("a vector whose expectation is no object"))?;
    for (name, value) in expectations {
        match name.as_str() {
            "upstream" => {
                expected.insert(name.clone(), received(value));
                got.insert(name.clone(), sinks.contains(&&Sink::Upstream).into());
            }
            "modules" => {
                for (module, value) in modules(value) {
                    expected.insert(module.clone(), received(value));
                    got.insert(
                        module.clone(),
                        any_input(&sinks, &module, &inputs(vector, value, &module)).into(),
                    );
                }
            }
            "inputs" | "message" | "comment" => {}
            module => {
                expected.insert(module.to_owned(), received(value));
                got.insert(
                    module.to_owned(),
                    any_input(&sinks, module, &inputs(vector, value, module)).into(),
                );
            }
        }
    }
    same(&Value::Object(expected), &Value::Object(got))
}

/// The modules of an expectation: by name, or in a list.
fn modules(value: &Value) -> Vec<(String, &Value)> {
    match value {
        Value::Object(modules) => modules.iter().map(|(name, value)| (name.clone(), value)).collect(),
        Value::Array(modules) => {
            let name = |module: &Value| {
                let names = ["module", "moduleId", "name", "id"];
                names.into_iter().find_map(|name| module[name].as_str()).unwrap_or_default().to_owned()
            };
            modules.iter().map(|module| (name(module), module)).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether something is expected to arrive: a boolean, or an object or a list that says so.
fn received(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let names = ["received", "delivered", "expect", "expected", "matched", "any"];
            let found = names.into_iter().find_map(|name| members.get(name));
            found.cloned().unwrap_or(Value::Bool(true))
        }
        Value::Array(inputs) => (!inputs.is_empty()).into(),
        other => other.clone(),
    }
}

/// The inputs of a module that a vector lists; none for all.
fn inputs(vector: &Value, value: &Value, module: &str) -> Vec<String> {
    let own = match value {
        Value::Array(_) => value,
        _ if value.get("inputs").is_some() => &value["inputs"],
        _ if value.get("input").is_some() => &value["input"],
        _ => [&vector["inputs"], &vector["expect"]["inputs"]]
            .into_iter()
            .find(|inputs| !inputs.is_null())
            .unwrap_or(&Value::Null),
    };
    let own = if own.is_object() { &own[module] } else { own };
    match own {
        Value::String(input) => vec![input.clone()],
        Value::Array(inputs) => inputs.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

fn any_input(sinks: &[&Sink], module: &str, inputs: &[String]) -> bool {
    sinks.iter().any(|sink| match sink {
        Sink::ModuleInput { module: own, input } => {
            **own == *module && (inputs.is_empty() || inputs.iter().any(|listed| *listed == **input))
        }
        Sink::Upstream | Sink::UpstreamTarget(_) => false,
    })
}

/// The routes of a vector: a list of texts or objects, or an object by name.
fn specs(routes: &Value) -> Result<Vec<OwnedRouteSpec>, Refusal> {
    let number = |value: &Value, name: &str| match &value[name] {
        Value::Null => Ok(None),
        number => number
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| Refusal::malformed(format!("a route whose {name} is {number}"))),
    };
    let spec = |name: String, value: &Value| {
        let own = value.as_str().or_else(|| value["route"].as_str());
        Ok(OwnedRouteSpec {
            name: value["name"].as_str().map_or(name, str::to_owned),
            text: escaped(own.ok_or_else(|| Refusal::malformed("a route without a text"))?),
            priority: number(value, "priority")?.unwrap_or(DEFAULT_PRIORITY),
            time_to_live_secs: number(value, "timeToLiveSecs")?.unwrap_or_default(),
            overflow: None,
        })
    };
    match routes {
        Value::Array(routes) => {
            routes.iter().enumerate().map(|(number, value)| spec(format!("route{number}"), value)).collect()
        }
        Value::Object(routes) => routes.iter().map(|(name, value)| spec(name.clone(), value)).collect(),
        _ => Err(Refusal::malformed("a vector without routes")),
    }
}

fn compile(specs: &[OwnedRouteSpec], edge_device_id: &str, expect: &Value) -> Result<RouteTable, Refusal> {
    let (table, errors) = RouteTable::compile(specs.iter().map(OwnedRouteSpec::as_spec), edge_device_id);
    match errors.first() {
        None => Ok(table),
        Some(error) => Err(Refusal::Failed { expected: expect.to_string(), got: error.to_string() }),
    }
}

/// The decision; none if the message is to be refused.
fn decide(table: &RouteTable, message: &Message) -> Option<Decision> {
    let mut decision = Decision::new();
    table.decide(&table.candidates_at(&message.path().ok()?), message, &mut decision);
    Some(decision)
}

/// Is it the sink that is expected, as an object or by the id of its endpoint?
fn is_sink(expected: &Value, sink: &Sink, endpoint_id: &str) -> bool {
    let upstream = |name: &str| name.eq_ignore_ascii_case("$upstream") || name == UPSTREAM_ENDPOINT;
    match (expected, sink) {
        (Value::String(name), Sink::Upstream) => upstream(name),
        (Value::String(name), Sink::UpstreamTarget(_) | Sink::ModuleInput { .. }) => name == endpoint_id,
        (expected, Sink::Upstream) => expected["system"].as_str().is_some_and(upstream),
        (expected, Sink::UpstreamTarget(address)) => expected["address"] == **address,
        (expected, Sink::ModuleInput { module, input }) => {
            let own = expected["module"].as_str().or_else(|| expected["moduleId"].as_str());
            own == Some(&**module) && expected["input"] == **input
        }
    }
}
