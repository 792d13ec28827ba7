//! Owns what is kept of one twin, and its stored form.
//!
//! ```text
//! {"twin":{"desired":{..},"reported":{..}},"reportedPropertiesPatch":{..},"reportedPropertiesWiped":{..}}
//! {"encrypted":true,"payload":".."}          the same, sealed by a cipher
//! ```
//!
//! All parts are optional.

use bytes::Bytes;
use serde_json::Value;

use super::json::{self, JsonError, Object};
use super::pending::Pending;

/// Largest stored form that is read, in bytes.
const RECORD_BYTES_MAX: usize = 4 * json::TWIN_BYTES_MAX;

/// Largest reported properties, and largest patch that waits, in bytes of their text. The cloud takes 32 KiB of names
/// and values; brackets and quotes come on top.
pub const REPORTED_BYTES_MAX: usize = 64 * 1_024;

const VERSION: &str = "$version";
const METADATA: &str = "$metadata";

/// What is kept of one twin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TwinRecord {
    /// The desired properties with `$version`, as last heard of or as the client was told without that they are empty; none
    /// before either.
    pub desired: Option<Object>,
    /// The reported properties, those included that wait for the upstream.
    pub reported: Object,
    /// What waits for the upstream.
    pub pending: Pending,
}

/// A stored form, read.
pub(super) enum Stored {
    Plain(TwinRecord),
    /// What a cipher made of it.
    Sealed(String),
}

impl TwinRecord {
    /// The whole twin as clients read it. What is not known is empty, with version 0.
    pub fn document(&self) -> Bytes {
        let section = |object: &Object| {
            let mut object = object.clone();
            object.entry(VERSION).or_insert_with(|| 0.into());
            Value::Object(object)
        };
        let mut document = Object::new();
        let desired = self.desired.as_ref().map_or_else(|| Value::Object(unknown_section()), section);
        document.insert("desired".into(), desired);
        document.insert("reported".into(), section(&self.reported));
        text(&document)
    }

    /// The version of the desired properties; 0 when they are not known or have none.
    pub fn desired_version(&self) -> u64 {
        self.desired.as_ref().and_then(version).unwrap_or(0)
    }

    /// Takes a change of reported properties, for the document and for the upstream.
    ///
    /// # Errors
    /// When either becomes larger than [`REPORTED_BYTES_MAX`]; then the record is as it was.
    pub fn report(&mut self, patch: &Object) -> Result<(), JsonError> {
        let mut reported = self.reported.clone();
        json::merge(&mut reported, patch, json::Nulls::Delete);
        let mut pending = self.pending.clone();
        pending.add(patch);
        let without_metadata = reported.iter().filter(|(name, _)| *name != METADATA);
        let reported_bytes = without_metadata.map(|(name, value)| name.len() + text(value).len()).sum();
        let pending_bytes = pending.updates().map(|update| text(update).len()).sum();
        let bytes = usize::max(reported_bytes, pending_bytes);
        if bytes > REPORTED_BYTES_MAX {
            return Err(JsonError::TooLarge { bytes, bytes_max: REPORTED_BYTES_MAX });
        }
        (self.reported, self.pending) = (reported, pending);
        Ok(())
    }

    pub(super) fn to_text(&self) -> Bytes {
        let mut twin = Object::new();
        if let Some(desired) = &self.desired {
            twin.insert("desired".into(), Value::Object(desired.clone()));
        }
        if !self.reported.is_empty() {
            twin.insert("reported".into(), Value::Object(self.reported.clone()));
        }
        let (wiped, patch) = self.pending.parts();
        let mut record = Object::new();
        record.insert("twin".into(), Value::Object(twin));
        for (name, part) in [("reportedPropertiesPatch", patch), ("reportedPropertiesWiped", wiped)] {
            if !part.is_empty() {
                record.insert(name.into(), Value::Object(part.clone()));
            }
        }
        text(&record)
    }
}

impl Stored {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, JsonError> {
        let mut record = json::parse(bytes, RECORD_BYTES_MAX, json::TWIN_DEPTH_MAX + 2)?;
        if let (Some(Value::Bool(true)), Some(Value::String(payload))) =
            (record.get("encrypted"), record.get("payload"))
        {
            return Ok(Stored::Sealed(payload.clone()));
        }
        let mut twin = take(&mut record, "twin").unwrap_or_default();
        let pending = Pending::from_parts(
            take(&mut record, "reportedPropertiesWiped").unwrap_or_default(),
            take(&mut record, "reportedPropertiesPatch").unwrap_or_default(),
        );
        Ok(Stored::Plain(TwinRecord {
            desired: take(&mut twin, "desired"),
            reported: take(&mut twin, "reported").unwrap_or_default(),
            pending,
        }))
    }

    /// The stored form of what a cipher made.
    pub(super) fn sealed(payload: String) -> Bytes {
        let mut record = Object::new();
        record.insert("encrypted".into(), true.into());
        record.insert("payload".into(), payload.into());
        text(&record)
    }
}

/// Both sections of a twin as an upstream sends it, desired first; a section that is missing is empty.
///
/// # Errors
/// When the text is larger or deeper than a twin may be, or no JSON object.
pub fn sections(twin: &[u8]) -> Result<(Object, Object), JsonError> {
    let mut twin = json::parse_twin(twin)?;
    let mut section = |name| take(&mut twin, name).unwrap_or_default();
    Ok((section("desired"), section("reported")))
}

/// The `$version` of a section or of a patch.
pub fn version(section: &Object) -> Option<u64> {
    section.get(VERSION)?.as_u64()
}

/// A section that is not known, as clients read it: empty, with version 0.
pub fn unknown_section() -> Object {
    Object::from_iter([(VERSION.to_owned(), Value::from(0))])
}

/// The patch that tells a client of the way from one state of desired properties to another: with their version, without
/// their metadata. Empty when nothing has changed, and when what was not known turns out to be empty.
pub fn desired_diff(from: &Object, to: &Object) -> Object {
    let mut patch = json::diff(from, to);
    patch.remove(METADATA);
    let version_only = patch.keys().all(|name| name == VERSION);
    if patch.is_empty() || (version_only && *from == unknown_section()) {
        return Object::new();
    }
    if let Some(version) = to.get(VERSION) {
        patch.insert(VERSION.into(), version.clone());
    }
    patch
}

/// The JSON text of an object or value.
pub fn text(value: &impl serde::Serialize) -> Bytes {
    // Only maps whose keys are no texts cannot be written, and ours are.
    Bytes::from(serde_json::to_vec(value).unwrap_or_default())
}

fn take(object: &mut Object, name: &str) -> Option<Object> {
    match object.remove(name) {
        Some(Value::Object(part)) => Some(part),
        Some(_) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Object {
        match value {
            Value::Object(object) => object,
            other => panic!("{other} is no object"),
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_stored() {
        let mut record = TwinRecord::default();
        assert_eq!(&record.to_text()[..], br#"{"twin":{}}"#);
        record.desired = Some(object(json!({ "a": 1.1, "$version": 3, "$metadata": { "a": {} } })));
        record.report(&object(json!({ "x": 1 }))).unwrap();
        record.report(&object(json!({ "x": { "y": [1, { "z": 2 }] }, "gone": null }))).unwrap();
        match Stored::parse(&record.to_text()).unwrap() {
            Stored::Plain(read) => assert_eq!(read, record),
            Stored::Sealed(_) => panic!("nothing was sealed"),
        }
        match Stored::parse(&Stored::sealed("abc".into())).unwrap() {
            Stored::Sealed(payload) => assert_eq!(payload, "abc"),
            Stored::Plain(_) => panic!("it was sealed"),
        }
    }

    #[test]
    fn an_unknown_twin_is_empty_with_version_0() {
        let empty = r#"{"desired":{"$version":0},"reported":{"$version":0}}"#;
        assert_eq!(TwinRecord::default().document(), empty);
        assert_eq!(TwinRecord::default().desired_version(), 0);
    }

    #[test]
    fn what_gathers_is_bounded() {
        let mut record = TwinRecord::default();
        let patch = |n: usize| object(json!({ format!("p{n}"): "x".repeat(4_000) }));
        let mut taken = 0;
        while record.report(&patch(taken)).is_ok() {
            taken += 1;
        }
        assert_eq!(taken, 16);
        let before = record.clone();
        assert!(matches!(record.report(&patch(99)), Err(JsonError::TooLarge { .. })));
        assert_eq!(record, before);
        record.report(&object(json!({ "p0": null }))).unwrap();
    }

    #[test]
    fn differences_of_desired_properties_say_their_version_and_nothing_of_metadata() {
        let from = object(json!({ "a": 1, "$version": 1, "$metadata": { "a": 1 } }));
        let to = object(json!({ "b": 1, "$version": 2, "$metadata": { "b": 1 } }));
        assert_eq!(Value::Object(desired_diff(&from, &to)), json!({ "a": null, "b": 1, "$version": 2 }));
        let same_version = object(json!({ "c": 1, "$version": 1, "$metadata": { "c": 1 } }));
        let patch = json!({ "a": null, "c": 1, "$version": 1 });
        assert_eq!(Value::Object(desired_diff(&from, &same_version)), patch);
        let same = object(json!({ "a": 1, "$version": 1 }));
        assert!(desired_diff(&from, &same).is_empty());
        // A client may wait for a version.
        let next = object(json!({ "a": 1, "$version": 2, "$metadata": {} }));
        assert_eq!(Value::Object(desired_diff(&from, &next)), json!({ "$version": 2 }));
        let patch = json!({ "a": 1, "$version": 2 });
        assert_eq!(Value::Object(desired_diff(&unknown_section(), &next)), patch);
        let empty = object(json!({ "$version": 1, "$metadata": {} }));
        assert!(desired_diff(&unknown_section(), &empty).is_empty());
    }
}
