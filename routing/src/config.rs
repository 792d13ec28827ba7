//! Owns the hub's desired properties: schema version, routes in both forms, store and forward.

use std::fmt;

use serde_json::{Map, Value};
use thiserror::Error;

use crate::diagnostic::{Diagnostic, Stage};
use crate::lint::lint;
use crate::route::Route;
use crate::table::{DEFAULT_PRIORITY, RouteSpec};
use crate::text::equal_names;

/// The largest priority number that a configuration may name, apart from [`DEFAULT_PRIORITY`].
pub const PRIORITY_MAX: u32 = 9;

/// The version of the document's schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SchemaVersion {
    /// Always 1.
    pub major: u32,
    /// 0 to 3.
    pub minor: u32,
}

/// What becomes of a route's message that the store has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OverflowPolicy {
    /// The sender is refused, and may send it again.
    RejectNew,
    /// The oldest messages of the route's queue are dropped to make room.
    DropOldest,
    /// The oldest messages of the route's queue are moved to the dead letters to make room.
    DeadLetter,
}

impl OverflowPolicy {
    /// All policies.
    pub const ALL: [OverflowPolicy; 3] =
        [OverflowPolicy::RejectNew, OverflowPolicy::DropOldest, OverflowPolicy::DeadLetter];

    /// The word for it in documents and settings.
    pub fn name(self) -> &'static str {
        match self {
            OverflowPolicy::RejectNew => "reject-new",
            OverflowPolicy::DropOldest => "drop-oldest",
            OverflowPolicy::DeadLetter => "dead-letter",
        }
    }

    /// The policy with this name, to the letter.
    pub fn parse(name: &str) -> Option<OverflowPolicy> {
        OverflowPolicy::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// A route of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedRouteSpec {
    /// Its name.
    pub name: String,
    /// Its text; not parsed.
    pub text: String,
    /// 0 to [`PRIORITY_MAX`] or [`DEFAULT_PRIORITY`].
    pub priority: u32,
    /// In seconds; 0 means the hub-wide value.
    pub time_to_live_secs: u32,
    /// What to do when the store is full; none means the hub-wide policy.
    pub overflow: Option<OverflowPolicy>,
}

impl OwnedRouteSpec {
    /// The form that a table is compiled from.
    pub fn as_spec(&self) -> RouteSpec<'_> {
        RouteSpec {
            name: &self.name,
            text: &self.text,
            priority: self.priority,
            time_to_live_secs: self.time_to_live_secs,
            upstream_target: None,
        }
    }
}

/// The hub's desired properties.
#[derive(Clone, Debug, PartialEq)]
pub struct HubConfig {
    /// Version of the document's schema.
    pub schema: SchemaVersion,
    /// The routes whose entries have the right shape, by name. Their texts may still not compile.
    pub routes: Vec<OwnedRouteSpec>,
    /// The entries that have not; each names its route. The other routes can run without them.
    pub rejected: Vec<ConfigError>,
    /// Hub-wide time-to-live in seconds, negative for ever. None if the document does not say: see
    /// [`HubConfig::hub_wide_time_to_live_secs`].
    pub time_to_live_secs: Option<i32>,
    /// Limit of the store in bytes, if there is one.
    pub store_limit_bytes: Option<i64>,
}

/// What is wrong with a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConfigCategory {
    /// `schemaVersion` is missing, malformed or not 1.0 to 1.3.
    SchemaVersion,
    /// `routes` is missing.
    RoutesMissing,
    /// A route, or `routes`, is neither text nor object.
    RouteShape,
    /// A route without text.
    RouteEmpty,
    /// A route without a name.
    RouteName,
    /// A priority that is not allowed.
    PriorityRange,
    /// A time-to-live that is not allowed.
    TimeToLiveRange,
    /// An overflow policy that does not exist.
    Overflow,
    /// The text of a route does not parse.
    RouteParse,
    /// The text of a route names no sink.
    RouteSink,
    /// `storeAndForwardConfiguration` is missing or malformed.
    StoreAndForward,
    /// The hub-wide time-to-live is missing.
    TimeToLiveMissing,
    /// A route has lints, and lints count as errors.
    RouteLint,
}

impl ConfigCategory {
    /// The name under which the category is reported.
    pub fn name(self) -> &'static str {
        match self {
            ConfigCategory::SchemaVersion => "schema-version",
            ConfigCategory::RoutesMissing => "routes-missing",
            ConfigCategory::RouteShape => "route-shape",
            ConfigCategory::RouteEmpty => "route-empty",
            ConfigCategory::RouteName => "route-name",
            ConfigCategory::PriorityRange => "priority-range",
            ConfigCategory::TimeToLiveRange => "ttl-range",
            ConfigCategory::Overflow => "overflow",
            ConfigCategory::RouteParse => "route-parse",
            ConfigCategory::RouteSink => "route-sink",
            ConfigCategory::StoreAndForward => "store-and-forward",
            ConfigCategory::TimeToLiveMissing => "ttl-missing",
            ConfigCategory::RouteLint => "route-lint",
        }
    }
}

/// One error in the hub's desired properties.
#[derive(Clone, Debug, PartialEq, Error)]
pub struct ConfigError {
    /// What kind of error it is.
    pub category: ConfigCategory,
    /// The route that is concerned, if it is one.
    pub route: Option<String>,
    /// What is wrong and what to write instead.
    pub message: String,
    /// The error in the route's text, for the categories that come from it.
    pub diagnostic: Option<Box<Diagnostic>>,
}

impl ConfigError {
    fn new(category: ConfigCategory, message: impl Into<String>) -> ConfigError {
        ConfigError { category, route: None, message: message.into(), diagnostic: None }
    }

    fn of_route(mut self, route: &str) -> ConfigError {
        self.route = Some(route.to_owned());
        self
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.category.name())?;
        if let Some(route) = &self.route {
            write!(formatter, " in route {route:?}")?;
        }
        write!(formatter, ": {}", self.message)
    }
}

impl HubConfig {
    /// Reads the desired properties. An entry of `routes` that is malformed does not fail the document: it is in
    /// [`HubConfig::rejected`].
    ///
    /// # Errors
    /// The first error that leaves nothing to run with.
    pub fn parse(desired: &Value) -> Result<HubConfig, ConfigError> {
        let mut errors = Vec::new();
        let config = HubConfig::read(desired, &mut |error| errors.push(error));
        match errors.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(config),
        }
    }

    /// Reads the desired properties and goes on after errors, for tools: what can be read, and all that is wrong, the
    /// missing hub-wide time-to-live and the malformed routes too.
    pub fn inspect(desired: &Value) -> (HubConfig, Vec<ConfigError>) {
        let mut errors = Vec::new();
        let config = HubConfig::read(desired, &mut |error| errors.push(error));
        let stored = errors.iter().any(|error| error.category == ConfigCategory::StoreAndForward);
        errors.extend(config.hub_wide_time_to_live_secs().err().filter(|_| !stored));
        errors.extend(config.rejected.iter().cloned());
        (config, errors)
    }

    /// Reads what can be read; `refuse` gets the errors for which the document is refused.
    fn read(desired: &Value, refuse: &mut impl FnMut(ConfigError)) -> HubConfig {
        let schema = schema_version(desired.get("schemaVersion")).unwrap_or_else(|error| {
            refuse(error);
            SchemaVersion { major: 1, minor: 3 }
        });
        let mut rejected = Vec::new();
        let mut routes = Vec::new();
        match route_entries(desired.get("routes"), schema) {
            Ok(entries) => {
                for (name, value) in entries {
                    match route_entry(name, value, schema) {
                        Ok(route) => routes.extend(route),
                        Err(error) => rejected.push(error.of_route(name)),
                    }
                }
            }
            Err(error) => refuse(error),
        }
        let (time_to_live_secs, store_limit_bytes) = store(desired.get("storeAndForwardConfiguration"))
            .unwrap_or_else(|error| {
                refuse(error);
                (None, None)
            });
        HubConfig { schema, routes, rejected, time_to_live_secs, store_limit_bytes }
    }

    /// The same document with lints as errors: routes that have any are no longer in [`HubConfig::routes`] but in
    /// [`HubConfig::rejected`].
    pub fn with_lints_as_errors(mut self) -> HubConfig {
        for lint in lint(self.routes.iter().map(OwnedRouteSpec::as_spec)) {
            let message = lint.to_string();
            self.rejected.push(ConfigError::new(ConfigCategory::RouteLint, message).of_route(&lint.route));
            self.routes.retain(|route| route.name != lint.route);
        }
        self
    }

    /// All or nothing: the document if every route has the right shape, parses and names a sink. Conditions are not
    /// compiled.
    ///
    /// # Errors
    /// The first bad route.
    pub fn strict(self) -> Result<HubConfig, ConfigError> {
        if let Some(error) = self.rejected.first() {
            return Err(error.clone());
        }
        for route in &self.routes {
            Route::parse(&route.text).map_err(|diagnostic| {
                let category = match diagnostic.stage {
                    Stage::Sink => ConfigCategory::RouteSink,
                    Stage::Parse | Stage::Compile => ConfigCategory::RouteParse,
                };
                let mut error = ConfigError::new(category, diagnostic.to_string()).of_route(&route.name);
                error.diagnostic = Some(Box::new(diagnostic));
                error
            })?;
        }
        Ok(self)
    }

    /// The hub-wide time-to-live in seconds; negative for ever.
    ///
    /// # Errors
    /// A document that does not say is refused: to take it for 0 would let every message expire at once.
    pub fn hub_wide_time_to_live_secs(&self) -> Result<i32, ConfigError> {
        self.time_to_live_secs.ok_or_else(|| {
            let message = "storeAndForwardConfiguration.timeToLiveSecs is missing; write for example 7200, or -1 for ever";
            ConfigError::new(ConfigCategory::TimeToLiveMissing, message)
        })
    }
}

fn store_and_forward(message: &str) -> ConfigError {
    ConfigError::new(ConfigCategory::StoreAndForward, message)
}

/// The hub-wide time-to-live and the limit of the store.
fn store(value: Option<&Value>) -> Result<(Option<i32>, Option<i64>), ConfigError> {
    let Some(Value::Object(store)) = value else {
        return Err(store_and_forward("storeAndForwardConfiguration is missing; it must be an object"));
    };
    let time_to_live_secs = match store.get("timeToLiveSecs") {
        None => None,
        Some(value) => match whole_number(value).map(i32::try_from) {
            Some(Ok(seconds)) => Some(seconds),
            _ => return Err(store_and_forward("timeToLiveSecs must be a 32-bit signed number of seconds")),
        },
    };
    let limit_bytes = match store.get("storeLimits").and_then(|limits| limits.get("maxSizeBytes")) {
        None | Some(Value::Null) => None,
        Some(limit) => match whole_number(limit).map(i64::try_from) {
            Some(Ok(bytes)) => Some(bytes),
            _ => return Err(store_and_forward("storeLimits.maxSizeBytes must be a 64-bit number of bytes")),
        },
    };
    Ok((time_to_live_secs, limit_bytes))
}

fn schema_version(value: Option<&Value>) -> Result<SchemaVersion, ConfigError> {
    let text = match value {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        _ => String::new(),
    };
    let numbers: Option<Vec<u32>> = text.split('.').map(|part| decimal(part.trim())).collect();
    match numbers.as_deref() {
        Some([1, minor @ 0..=3, rest @ ..]) if rest.len() <= 2 => {
            Ok(SchemaVersion { major: 1, minor: *minor })
        }
        _ => {
            let message =
                format!("schemaVersion {text:?} is not supported; write one from \"1.0\" to \"1.3\"");
            Err(ConfigError::new(ConfigCategory::SchemaVersion, message))
        }
    }
}

fn decimal(digits: &str) -> Option<u32> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn route_entries(
    routes: Option<&Value>,
    schema: SchemaVersion,
) -> Result<impl Iterator<Item = (&String, &Value)>, ConfigError> {
    let entries = match routes {
        Some(Value::Object(entries)) => Some(entries),
        Some(Value::Null) => None,
        None if schema.minor == 0 => None,
        None => {
            return Err(ConfigError::new(
                ConfigCategory::RoutesMissing,
                "routes is missing; write {} for none",
            ));
        }
        Some(_) => return Err(ConfigError::new(ConfigCategory::RouteShape, "routes must be an object")),
    };
    Ok(entries.into_iter().flatten())
}

/// One entry of `routes`; none if the schema lets it be skipped.
fn route_entry(
    name: &str,
    value: &Value,
    schema: SchemaVersion,
) -> Result<Option<OwnedRouteSpec>, ConfigError> {
    let old = schema.minor == 0;
    if name.is_empty() || (old && name.trim().is_empty()) {
        return Err(ConfigError::new(ConfigCategory::RouteName, "a route must have a name"));
    }
    let plain = |text: &str| {
        Ok(Some(OwnedRouteSpec {
            name: name.to_owned(),
            text: text.to_owned(),
            priority: DEFAULT_PRIORITY,
            time_to_live_secs: 0,
            overflow: None,
        }))
    };
    match value {
        Value::String(text) if !text.trim().is_empty() => plain(text),
        Value::String(_) | Value::Null if old => Ok(None),
        Value::String(_) => {
            Err(ConfigError::new(ConfigCategory::RouteEmpty, "the text of the route is blank"))
        }
        Value::Object(entry) if !old => object_form(name, entry).map(Some),
        // They cannot parse, but it is the text that is wrong then, not the document.
        Value::Number(number) if old => plain(&number.to_string()),
        Value::Bool(value) if old => plain(if *value { "True" } else { "False" }),
        _ => {
            let message =
                if old { "a route is a text in schema 1.0" } else { "a route is a text or an object" };
            Err(ConfigError::new(ConfigCategory::RouteShape, message))
        }
    }
}

fn object_form(name: &str, entry: &Map<String, Value>) -> Result<OwnedRouteSpec, ConfigError> {
    let member =
        |wanted: &str| entry.iter().find(|(name, _)| equal_names(name, wanted)).map(|(_, value)| value);
    let text = match member("route") {
        Some(Value::String(text)) if !text.trim().is_empty() => text.clone(),
        _ => {
            return Err(ConfigError::new(
                ConfigCategory::RouteEmpty,
                "the object has no text in its member route",
            ));
        }
    };
    let priority = match member("priority") {
        None => DEFAULT_PRIORITY,
        Some(value) => match whole_number(value).map(u32::try_from) {
            Some(Ok(priority)) if priority <= PRIORITY_MAX || priority == DEFAULT_PRIORITY => priority,
            _ => {
                let message = format!("priority must be 0 to {PRIORITY_MAX}, 0 the highest");
                return Err(ConfigError::new(ConfigCategory::PriorityRange, message));
            }
        },
    };
    let time_to_live_secs = match member("timeToLiveSecs") {
        None => 0,
        Some(value) => match whole_number(value).map(u32::try_from) {
            Some(Ok(seconds)) => seconds,
            _ => {
                let message = format!("timeToLiveSecs must be 0 to {}", u32::MAX);
                return Err(ConfigError::new(ConfigCategory::TimeToLiveRange, message));
            }
        },
    };
    let overflow = match member("overflow") {
        None => None,
        Some(value) => match value.as_str().and_then(OverflowPolicy::parse) {
            Some(policy) => Some(policy),
            None => {
                let names = OverflowPolicy::ALL.map(OverflowPolicy::name).join(", ");
                let message = format!("overflow must be one of {names}");
                return Err(ConfigError::new(ConfigCategory::Overflow, message));
            }
        },
    };
    Ok(OwnedRouteSpec { name: name.to_owned(), text, priority, time_to_live_secs, overflow })
}

/// A whole number, also as a text or as a real without a fraction.
fn whole_number(value: &Value) -> Option<i128> {
    match value {
        Value::Number(number) => match (number.as_i128(), number.as_f64()) {
            (Some(whole), _) => Some(whole),
            (None, Some(real)) if real.fract() == 0.0 && real.abs() < 1e18 => Some(real as i128),
            _ => None,
        },
        Value::String(text) => text.trim().parse().ok(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(route: Value) -> HubConfig {
        HubConfig::parse(&json!({
            "schemaVersion": "1.1",
            "routes": { "r": route },
            "storeAndForwardConfiguration": { "timeToLiveSecs": 1 }
        }))
        .expect("a document")
    }

    #[test]
    fn a_route_may_say_what_becomes_of_its_messages_when_the_store_is_full() {
        let text = "FROM /* INTO $upstream";
        assert_eq!(parse(json!(text)).routes[0].overflow, None);
        assert_eq!(parse(json!({ "route": text })).routes[0].overflow, None);
        for policy in OverflowPolicy::ALL {
            let config = parse(json!({ "route": text, "overflow": policy.name() }));
            assert_eq!(config.routes[0].overflow, Some(policy));
        }
        for bad in [json!("Drop-Oldest"), json!(""), json!(1), json!(null)] {
            let config = parse(json!({ "route": text, "overflow": bad }));
            assert!(config.routes.is_empty());
            let error = &config.rejected[0];
            assert_eq!(error.category, ConfigCategory::Overflow);
            let message =
                "overflow in route \"r\": overflow must be one of reject-new, drop-oldest, dead-letter";
            assert_eq!(error.to_string(), message);
        }
    }
}
