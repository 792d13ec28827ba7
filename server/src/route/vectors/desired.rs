//! Owns the vectors of the hub's desired properties.

use edgehub_routing::HubConfig;
use serde_json::{Map, Value, json};

use super::{Refusal, Verdict, covers, same};

/// Desired properties: the routes that they give, or the error. Conditions are not compiled.
pub(super) fn desired(vector: &Value) -> Verdict {
    let document = match (vector.get("desired"), vector["desiredText"].as_str()) {
        (Some(desired), _) => Ok(desired.clone()),
        (None, Some(text)) => {
            serde_json::from_str::<Value>(text).map_err(|error| format!("not JSON: {error}"))
        }
        (None, None) => return Err(Refusal::malformed("a vector without desired properties")),
    };
    let parsed = document.and_then(|desired| {
        HubConfig::parse(&desired)
            .and_then(HubConfig::strict)
            .map_err(|error| error.category.name().to_owned())
    });
    let expect = &vector["expect"];
    let expected_error = &expect["error"];
    let ok = match expect {
        Value::Bool(ok) => *ok,
        expect => expect["ok"].as_bool().unwrap_or(expected_error.is_null()),
    };
    let config = match parsed {
        Ok(config) => config,
        Err(_) if *expect == "any" => return Ok(()),
        Err(error) => {
            let named = expected_error.as_str().or_else(|| expected_error["category"].as_str());
            // A text that is not JSON has no category of its own.
            let open = named.is_none_or(|named| named == "any") || error.starts_with("not JSON");
            let same = !ok && (open || named == Some(error.as_str()));
            let got = json!({ "ok": false, "error": error }).to_string();
            return if same { Ok(()) } else { Err(Refusal::Failed { expected: expect.to_string(), got }) };
        }
    };
    let routes: Map<String, Value> = config
        .routes
        .iter()
        .map(|route| {
            let entry = json!({
                "name": route.name,
                "route": route.text,
                "priority": route.priority,
                "timeToLiveSecs": route.time_to_live_secs,
            });
            (route.name.clone(), entry)
        })
        .collect();
    let got = json!({ "ok": true, "count": routes.len(), "routes": routes });
    let failed = || Refusal::Failed { expected: expect.to_string(), got: got.to_string() };
    if *expect == "any" {
        return Ok(());
    }
    if !ok {
        return Err(failed());
    }
    let count = [&expect["count"], &expect["routeCount"]].into_iter().find_map(Value::as_u64);
    if count.or_else(|| expect["routes"].as_u64()).is_some_and(|count| count != routes.len() as u64) {
        return Err(failed());
    }
    match &expect["routes"] {
        Value::Object(expected) if count.is_none() && expected.len() != routes.len() => Err(failed()),
        Value::Object(expected) => {
            for (name, expected) in expected {
                let expected =
                    expected.as_str().map_or_else(|| expected.clone(), |text| json!({ "route": text }));
                same(&expected, routes.get(name).ok_or_else(failed)?)?;
            }
            Ok(())
        }
        Value::Array(expected) => {
            let there = |expected: &Value| match expected.as_str() {
                Some(name) => routes.contains_key(name),
                None => routes.values().any(|route| covers(expected, route)),
            };
            if expected.iter().all(there) { Ok(()) } else { Err(failed()) }
        }
        _ => Ok(()),
    }
}
