//! Desired properties of the hub: what of them can be put in force, and the status that is reported of them.

use edgehub_routing::{ConfigCategory, ConfigError, HubConfig, RouteError};
use serde_json::Value;

use super::broker_section;
use crate::hub::{Applied, ApplyError};

/// Longest description that is reported, in bytes: a text in a twin has 4,096 at most.
pub const DESCRIPTION_BYTES_MAX: usize = 4_096;

/// What every description of an error begins with.
const PREFIX: &str = "Error while parsing desired properties - ";

/// Why desired properties are refused as a whole; the configuration in force stays.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(String);

/// What is reported of the desired properties that came last.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    /// `$version` of the desired properties that it is about; absent if they have none.
    pub desired_version: Option<u64>,
    /// 200 when all of it is in force, else 400.
    pub code: u16,
    /// Empty with 200; else all that is wrong, at most [`DESCRIPTION_BYTES_MAX`] bytes.
    pub description: String,
}

/// Reads desired properties of schema 1.0 to 1.3. Malformed routes do not fail them; they are in
/// [`HubConfig::rejected`]. The section `integrity` is not read.
///
/// # Errors
/// What leaves nothing to put in force.
pub fn read(desired: &Value) -> Result<HubConfig, Refusal> {
    let config = HubConfig::parse(desired).map_err(|error| refusal(&error, desired))?;
    config.hub_wide_time_to_live_secs().map_err(|error| refusal(&error, desired))?;
    let section = desired.get("mqttBroker").filter(|section| !section.is_null());
    if let Some(section) = section.filter(|_| config.schema.minor >= 2) {
        broker_section::check(section).map_err(Refusal)?;
        tracing::warn!(
            code = "EH4032",
            "The section mqttBroker has no effect: there is no broker beside the routes"
        );
    }
    Ok(config)
}

/// The `$version` of desired properties.
pub(super) fn version(desired: &Value) -> Option<u64> {
    desired.get("$version").and_then(Value::as_u64)
}

/// The reference's words where it has some.
fn refusal(error: &ConfigError, desired: &Value) -> Refusal {
    Refusal(match error.category {
        ConfigCategory::SchemaVersion => schema_text(desired.get("schemaVersion")),
        ConfigCategory::RoutesMissing
        | ConfigCategory::RouteShape
        | ConfigCategory::RouteEmpty
        | ConfigCategory::RouteName
        | ConfigCategory::PriorityRange
        | ConfigCategory::TimeToLiveRange
        | ConfigCategory::Overflow
        | ConfigCategory::RouteParse
        | ConfigCategory::RouteSink
        | ConfigCategory::StoreAndForward
        | ConfigCategory::TimeToLiveMissing
        | ConfigCategory::RouteLint => match &error.route {
            Some(route) => malformed_route(route, error),
            None => error.message.clone(),
        },
    })
}

fn schema_text(version: Option<&Value>) -> String {
    let text = match version {
        None | Some(Value::Null) => return "EdgeHub config missing SchemaVersion".into(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let mut parts = text.split('.');
    let number = |part: Option<&str>| part.is_some_and(|part| part.trim().parse::<u32>().is_ok());
    if number(parts.next()) && number(parts.next()) && parts.all(|part| number(Some(part))) {
        format!("EdgeHub config contains unsupported SchemaVersion: {text}; write one from 1.0 to 1.3")
    } else {
        let why = "it must be two numbers with a dot between them, such as 1.1";
        format!("Error parsing schema version string: {text}, Exception: {why}")
    }
}

fn malformed_route(route: &str, error: &ConfigError) -> String {
    match error.category {
        ConfigCategory::PriorityRange => format!(
            "Error parsing route {route} - Invalid priority for route: {route}, priority can only be between 0-9"
        ),
        _ => format!("Error parsing route {route} - {}", error.message),
    }
}

fn bad_route(error: &RouteError) -> String {
    let faults: Vec<String> = error.diagnostics.iter().map(ToString::to_string).collect();
    format!("Error parsing route {} - {}", error.name, faults.join(", "))
}

impl Status {
    /// What came of desired properties that were put in force, as far as they could be.
    pub(super) fn of_applied(desired_version: Option<u64>, applied: &Applied) -> Self {
        if applied.is_complete() {
            return Self { desired_version, code: 200, description: String::new() };
        }
        let mut faults: Vec<(&str, String)> = Vec::new();
        for error in &applied.malformed {
            let route = error.route.as_deref().unwrap_or_default();
            faults.push((route, malformed_route(route, error)));
        }
        faults.extend(applied.rejected.iter().map(|error| (error.name.as_str(), bad_route(error))));
        faults.sort();
        Self { desired_version, code: 400, description: joined(faults.into_iter().map(|(_, fault)| fault)) }
    }

    /// Desired properties that were refused.
    pub(super) fn of_refusal(desired_version: Option<u64>, refusal: &Refusal) -> Self {
        Self { desired_version, code: 400, description: joined([refusal.0.clone()]) }
    }

    /// Desired properties that the hub could not put in force.
    pub(super) fn of_error(desired_version: Option<u64>, error: &ApplyError) -> Self {
        Self { desired_version, code: 400, description: joined([error.to_string()]) }
    }
}

/// All faults, or as many as there is room for and how many are left out. A fault that has no room alone is cut.
fn joined(faults: impl IntoIterator<Item = String>) -> String {
    /// Room for the words that tell of what is left out.
    const REST_BYTES: usize = 32;
    let faults: Vec<String> = faults.into_iter().collect();
    let mut text = PREFIX.to_owned();
    for (index, fault) in faults.iter().enumerate() {
        let separator = if index == 0 { "" } else { "; " };
        let room = DESCRIPTION_BYTES_MAX - REST_BYTES - text.len();
        if separator.len() + fault.len() > room {
            if index == 0 {
                let end = (0..=room).rev().find(|end| fault.is_char_boundary(*end)).unwrap_or_default();
                text.push_str(fault.get(..end).unwrap_or_default());
                text.push('…');
            }
            let left_out = faults.len() - index.max(1);
            if left_out > 0 {
                text.push_str(&format!("; and {left_out} more"));
            }
            return text;
        }
        text.push_str(separator);
        text.push_str(fault);
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document(schema: &Value, routes: &Value) -> Value {
        json!({
            "$version": 7,
            "schemaVersion": schema,
            "routes": routes,
            "storeAndForwardConfiguration": { "timeToLiveSecs": 7200 },
        })
    }

    const UP: &str = "FROM /messages/* INTO $upstream";

    #[test]
    fn every_schema_version_is_read() {
        for schema in ["1.0", "1.1", "1.1.0", "1.2", "1.3"] {
            let config = read(&document(&json!(schema), &json!({ "up": UP }))).expect(schema);
            assert_eq!(config.routes.len(), 1, "{schema}");
        }
    }

    #[test]
    fn what_leaves_nothing_to_run_is_refused_in_the_words_of_the_reference() {
        let mut no_store = document(&json!("1.1"), &json!({}));
        no_store["storeAndForwardConfiguration"] = json!({});
        let mut none = document(&json!("1.1"), &json!({}));
        none.as_object_mut().expect("an object").remove("schemaVersion");
        let number = "Error parsing schema version string";
        for (desired, begins) in [
            (none, "EdgeHub config missing SchemaVersion"),
            (document(&json!(null), &json!({})), "EdgeHub config missing SchemaVersion"),
            (document(&json!("1"), &json!({})), number),
            (document(&json!("one.1"), &json!({})), number),
            (document(&json!([]), &json!({})), number),
            (document(&json!("2.0"), &json!({})), "EdgeHub config contains unsupported SchemaVersion: 2.0"),
            (document(&json!("1.4"), &json!({})), "EdgeHub config contains unsupported SchemaVersion: 1.4"),
            (document(&json!("1.1"), &json!(null)), ""),
            (document(&json!("1.1"), &json!([])), "routes must be an object"),
            (no_store, "storeAndForwardConfiguration.timeToLiveSecs is missing"),
        ] {
            match read(&desired) {
                Ok(_) => assert_eq!(begins, "", "{desired}"),
                Err(refusal) => assert!(
                    !begins.is_empty() && refusal.to_string().starts_with(begins),
                    "{desired}: {refusal}"
                ),
            }
        }
    }

    #[test]
    fn the_status_lists_every_bad_route_by_name() {
        let config = read(&document(
            &json!("1.1"),
            &json!({ "b": { "route": UP, "priority": 10 }, "c": 5, "good": UP }),
        ))
        .expect("readable");
        let (_, rejected) = edgehub_routing::RouteTable::compile(
            [edgehub_routing::RouteSpec {
                name: "a",
                text: "FROM /messages/* WHERE level = INTO $upstream",
                priority: 0,
                time_to_live_secs: 0,
                upstream_target: None,
            }],
            "edge1",
        );
        let applied = Applied { malformed: config.rejected, rejected, ..Applied::default() };
        let status = Status::of_applied(Some(7), &applied);
        assert_eq!((status.code, status.desired_version), (400, Some(7)));
        let faults: Vec<&str> =
            status.description.strip_prefix(PREFIX).expect("the prefix").split("; ").collect();
        assert!(faults[0].starts_with("Error parsing route a - "), "{faults:?}");
        assert!(faults[0].contains("line 1 column "), "{faults:?}");
        assert!(faults[1].contains("Invalid priority for route: b, priority can only be between 0-9"));
        assert!(faults[2].starts_with("Error parsing route c - "), "{faults:?}");
        assert_eq!(faults.len(), 3);
        let clean = Status::of_applied(None, &Applied::default());
        assert_eq!(clean, Status { desired_version: None, code: 200, description: String::new() });
    }

    #[test]
    fn a_description_has_its_limit_and_tells_what_is_left_out() {
        let long = joined((0..1_000).map(|number| format!("Error parsing route r{number} - é")));
        assert!(long.len() <= DESCRIPTION_BYTES_MAX && long.len() > DESCRIPTION_BYTES_MAX - 100);
        assert!(long.ends_with(" more"), "{long}");
        let one = joined(["é".repeat(5_000)]);
        assert!(one.len() <= DESCRIPTION_BYTES_MAX && one.ends_with('…'), "{}", one.len());
        let two = joined(["x".repeat(5_000), "y".into()]);
        assert!(two.len() <= DESCRIPTION_BYTES_MAX && two.ends_with("…; and 1 more"), "{}", two.len());
    }

    #[test]
    fn the_section_of_the_broker_counts_from_schema_1_2_on() {
        let with = |schema: &str| {
            let mut desired = document(&json!(schema), &json!({}));
            desired["mqttBroker"] = json!({ "authorizations": [{ "identities": [] }] });
            desired["integrity"] = json!("unread");
            read(&desired)
        };
        assert!(with("1.0").is_ok() && with("1.1").is_ok());
        for schema in ["1.2", "1.3"] {
            let refusal = with(schema).expect_err(schema).to_string();
            assert!(refusal.starts_with("Error validating authorization policy: "), "{refusal}");
        }
    }
}
