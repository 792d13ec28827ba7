//! The twin of one identity: desired and reported properties with their versions, tags, and how they change.

mod store;

use edgehub_broker::twin::json;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::cloud_to_device::{Now, time_text};

pub use store::{TwinStore, TwinStoreError};

/// Largest tags, desired or reported properties, in bytes of their JSON text.
pub const SECTION_BYTES_MAX: usize = json::PATCH_BYTES_MAX;

/// A twin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Twin {
    /// Of the identity that it was made for.
    generation_id: String,
    /// Grows with each change.
    version: u64,
    /// Grows with each change of tags or desired properties.
    etag_version: u64,
    tags: Map<String, Value>,
    desired: Section,
    reported: Section,
}

/// Desired or reported properties.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Section {
    properties: Map<String, Value>,
    version: u64,
    updated_millis: i64,
}

/// A change that a service asks for. What is absent stays.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TwinChange {
    /// Of the tags.
    pub tags: Option<Value>,
    /// Of the desired properties.
    pub desired: Option<Value>,
}

/// How a [`TwinChange`] is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeMode {
    /// Objects are merged, null deletes.
    Merge,
    /// What is given takes the place of what was there.
    Replace,
}

/// Changed desired properties, as the client is told.
#[derive(Debug, Clone, PartialEq)]
pub struct DesiredChange {
    /// What is to be merged, with its `$version`.
    pub patch: Value,
    /// The version after it.
    pub version: u64,
}

/// Why a twin does not change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TwinFault {
    /// The etag is that of another version.
    #[error("the twin has changed since it was read")]
    Precondition,
    /// The change breaks a rule of the document.
    #[error("{0}")]
    Invalid(String),
}

impl Section {
    fn new() -> Self {
        Self { properties: Map::new(), version: 1, updated_millis: Now::get().unix_millis }
    }

    /// Takes over changed properties; refuses those that are too large.
    fn set(&mut self, properties: Map<String, Value>) -> Result<(), TwinFault> {
        check_size(&properties)?;
        self.properties = properties;
        self.version += 1;
        self.updated_millis = Now::get().unix_millis;
        Ok(())
    }

    fn to_client(&self) -> Value {
        with_version(self.properties.clone(), self.version)
    }

    fn to_service(&self) -> Value {
        let mut properties = self.properties.clone();
        let updated =
            json!({ "$lastUpdated": time_text(self.updated_millis), "$lastUpdatedVersion": self.version });
        properties.insert("$metadata".into(), updated);
        with_version(properties, self.version)
    }
}

impl Twin {
    /// The empty twin of an identity of that generation.
    pub fn new(generation_id: &str) -> Self {
        Self {
            generation_id: generation_id.to_owned(),
            version: 1,
            etag_version: 1,
            tags: Map::new(),
            desired: Section::new(),
            reported: Section::new(),
        }
    }

    /// The generation of the identity that it was made for.
    pub fn generation_id(&self) -> &str {
        &self.generation_id
    }

    /// Grows with each change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Names what a service saw, without quotes.
    pub fn etag(&self) -> String {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(self.etag_version.to_be_bytes())
    }

    /// The desired properties without their version.
    pub fn desired(&self) -> &Map<String, Value> {
        &self.desired.properties
    }

    /// The version of the desired properties.
    pub fn desired_version(&self) -> u64 {
        self.desired.version
    }

    /// The tags.
    pub fn tags(&self) -> &Map<String, Value> {
        &self.tags
    }

    /// As its own client sees it: `{"desired":{..},"reported":{..}}`, each with its `$version`.
    pub fn to_client(&self) -> Value {
        json!({ "desired": self.desired.to_client(), "reported": self.reported.to_client() })
    }

    /// The member `properties` as services see it, with `$version` and `$metadata`.
    pub fn to_service(&self) -> Value {
        json!({ "desired": self.desired.to_service(), "reported": self.reported.to_service() })
    }

    /// Merges a client's patch into the reported properties; their new version.
    ///
    /// # Errors
    /// [`TwinFault::Invalid`]: then nothing changes.
    pub fn report(&mut self, patch: &[u8]) -> Result<u64, TwinFault> {
        let patch = json::parse(patch, json::PATCH_BYTES_MAX, json::PATCH_DEPTH_MAX).map_err(invalid)?;
        let patch = section(Value::Object(patch), "the reported properties")?;
        json::validate(&patch).map_err(invalid)?;
        let mut properties = self.reported.properties.clone();
        json::merge(&mut properties, &patch, json::Nulls::Delete);
        self.reported.set(properties)?;
        self.version += 1;
        Ok(self.reported.version)
    }

    /// Applies a service's change; what the client is to be told.
    ///
    /// # Errors
    /// When `etag` is another one than [`Twin::etag`], or the change breaks a rule: then nothing changes.
    pub fn change(
        &mut self,
        change: TwinChange,
        mode: ChangeMode,
        etag: Option<&str>,
    ) -> Result<Option<DesiredChange>, TwinFault> {
        if etag.is_some_and(|etag| etag != self.etag()) {
            return Err(TwinFault::Precondition);
        }
        let mut tags = None;
        if let Some(new) = change.tags {
            let new = section(new, "tags")?;
            let changed = changed(&self.tags, &new, mode)?;
            check_size(&changed)?;
            tags = Some(changed);
        }
        let mut told = None;
        if let Some(new) = change.desired {
            let new = section(new, "properties.desired")?;
            let changed = changed(&self.desired.properties, &new, mode)?;
            let patch = match mode {
                ChangeMode::Merge => new,
                ChangeMode::Replace => json::diff(&self.desired.properties, &changed),
            };
            self.desired.set(changed)?;
            let version = self.desired.version;
            told = Some(DesiredChange { patch: with_version(patch, version), version });
        }
        if tags.is_some() || told.is_some() {
            self.version += 1;
            self.etag_version += 1;
        }
        if let Some(tags) = tags {
            self.tags = tags;
        }
        Ok(told)
    }
}

/// The object that a section is, without what the hub itself adds to it.
fn section(value: Value, name: &str) -> Result<Map<String, Value>, TwinFault> {
    match value {
        Value::Object(mut properties) => {
            properties.remove("$version");
            properties.remove("$metadata");
            Ok(properties)
        }
        _ => Err(TwinFault::Invalid(format!("{name} must be a JSON object"))),
    }
}

fn changed(
    old: &Map<String, Value>,
    new: &Map<String, Value>,
    mode: ChangeMode,
) -> Result<Map<String, Value>, TwinFault> {
    let text = serde_json::to_vec(new).map_err(invalid)?;
    if json::is_deeper_than(&text, json::PATCH_DEPTH_MAX + 1) {
        return Err(invalid(json::JsonError::TooDeep { depth_max: json::PATCH_DEPTH_MAX }));
    }
    json::validate(new).map_err(invalid)?;
    let mut properties = match mode {
        ChangeMode::Merge => old.clone(),
        ChangeMode::Replace => Map::new(),
    };
    json::merge(&mut properties, new, json::Nulls::Delete);
    Ok(properties)
}

fn check_size(properties: &Map<String, Value>) -> Result<(), TwinFault> {
    let text = serde_json::to_vec(properties).map_err(invalid)?;
    if text.len() > SECTION_BYTES_MAX {
        return Err(TwinFault::Invalid(format!(
            "the properties would be larger than {SECTION_BYTES_MAX} bytes"
        )));
    }
    Ok(())
}

fn with_version(mut properties: Map<String, Value>, version: u64) -> Value {
    properties.insert("$version".into(), version.into());
    Value::Object(properties)
}

fn invalid(error: impl std::fmt::Display) -> TwinFault {
    TwinFault::Invalid(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desired(value: Value) -> TwinChange {
        TwinChange { tags: None, desired: Some(value) }
    }

    #[test]
    fn services_merge_and_replace() {
        let mut twin = Twin::new("7");
        let etag = twin.etag();
        assert_eq!(etag, "AAAAAAAAAAE=");
        let change =
            TwinChange { tags: Some(json!({"site": "a"})), desired: Some(json!({"a": {"b": 1, "c": 2}})) };
        let told = twin.change(change, ChangeMode::Merge, Some(&etag)).unwrap().unwrap();
        assert_eq!((told.version, &told.patch), (2, &json!({"a": {"b": 1, "c": 2}, "$version": 2})));
        assert_eq!(
            twin.change(desired(json!({})), ChangeMode::Merge, Some(&etag)),
            Err(TwinFault::Precondition)
        );
        twin.change(desired(json!({"a": {"b": null}, "d": [1]})), ChangeMode::Merge, None).unwrap();
        assert_eq!(Value::Object(twin.desired().clone()), json!({"a": {"c": 2}, "d": [1]}));
        // A document that was read is written back with what the hub had added to it.
        let mut read = twin.to_service()["desired"].clone();
        read["d"] = json!([2]);
        let told = twin.change(desired(read), ChangeMode::Replace, None).unwrap().unwrap();
        assert_eq!(told.patch, json!({"d": [2], "$version": 4}));
        let tags = TwinChange { tags: Some(json!({"x": 1})), desired: None };
        assert_eq!(twin.change(tags, ChangeMode::Replace, None).unwrap(), None);
        assert_eq!(Value::Object(twin.tags().clone()), json!({"x": 1}));
        assert_eq!((twin.version(), twin.desired_version()), (5, 4));
        assert_eq!(
            twin.to_client(),
            json!({"desired": {"a": {"c": 2}, "d": [2], "$version": 4}, "reported": {"$version": 1}})
        );
        assert!(twin.to_service()["desired"]["$metadata"]["$lastUpdated"].is_string());
    }

    #[test]
    fn what_breaks_a_rule_changes_nothing() {
        let mut twin = Twin::new("7");
        let before = twin.clone();
        let large: Map<String, Value> =
            (0..20).map(|i| (format!("p{i}"), json!("x".repeat(2_000)))).collect();
        let deep = (0..11).fold(json!(1), |inner, _| json!({ "a": inner }));
        twin.clone().change(desired(deep["a"].clone()), ChangeMode::Merge, None).unwrap();
        for change in
            [json!({ "a": deep }), json!(1), json!({"a b": 1}), json!({"a": [null]}), Value::Object(large)]
        {
            let both = TwinChange { tags: Some(json!({"t": 1})), desired: Some(change) };
            assert!(matches!(twin.change(both, ChangeMode::Merge, None), Err(TwinFault::Invalid(_))));
        }
        for patch in ["", "[]", "{\"$x\":1}", "{\"a\":1"] {
            assert!(matches!(twin.report(patch.as_bytes()), Err(TwinFault::Invalid(_))), "{patch}");
        }
        assert_eq!(twin, before);
        let half = |name: &str| {
            let values: Map<String, Value> =
                (0..8).map(|i| (format!("{name}{i}"), json!("x".repeat(2_500)))).collect();
            Value::Object(values).to_string()
        };
        twin.report(half("a").as_bytes()).unwrap();
        assert!(matches!(twin.report(half("b").as_bytes()), Err(TwinFault::Invalid(_))));
    }

    #[test]
    fn clients_report() {
        let mut twin = Twin::new("7");
        let etag = twin.etag();
        assert_eq!(twin.report(br#"{"a":{"b":1},"$version":9}"#), Ok(2));
        assert_eq!(twin.report(br#"{"a":{"b":null,"c":2}}"#), Ok(3));
        assert_eq!(twin.to_client()["reported"], json!({"a": {"c": 2}, "$version": 3}));
        assert_eq!(twin.etag(), etag);
    }
}
