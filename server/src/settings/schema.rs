//! Owns the JSON schema of the settings file, made from the catalog (JSON Schema, draft 2020-12).

use serde_json::{Map, Value, json};

use super::SettingsError;
use super::catalog::{self, Effect, KnownSetting};
use super::describe::ValueKind;
use super::layers::Layers;

/// A time span as the reference writes it.
const SPAN_PATTERN: &str = r"^([0-9]+\.)?[0-9]{1,2}:[0-9]{1,2}(:[0-9]{1,2}(\.[0-9]{1,9})?)?$";

/// The schema of the file of `--config`.
///
/// # Errors
/// The built-in defaults cannot be read.
pub fn schema() -> Result<Value, SettingsError> {
    let defaults = Layers::with_defaults()?;
    let mut properties = Map::new();
    for known in catalog::known() {
        let default = defaults.get(known.name).map(|entry| entry.text.as_str());
        let path: Vec<&str> = known.name.split(':').collect();
        insert(&mut properties, &path, property(known, default));
    }
    Ok(json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of edgehub",
        "description": "The TOML file of --config. Names are compared without regard to case.",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    }))
}

/// Puts a setting at its place below the sections that lead there. `*` stands for any member of its section.
fn insert(properties: &mut Map<String, Value>, path: &[&str], property: Value) {
    let [first, rest @ ..] = path else { return };
    if rest.is_empty() {
        properties.insert((*first).to_owned(), property);
        return;
    }
    let section = properties
        .entry((*first).to_owned())
        .or_insert_with(|| json!({"type": "object", "properties": {}, "additionalProperties": false}));
    if rest == ["*"] {
        *section = property;
    } else if let Some(Value::Object(members)) = section.get_mut("properties") {
        insert(members, rest, property);
    }
}

fn property(known: &KnownSetting, default: Option<&str>) -> Value {
    let kind = known.description().map(|described| described.kind);
    let mut property = match kind {
        _ if known.name.ends_with('*') && known.effect == Effect::Used => {
            json!({"type": "object", "additionalProperties": {"type": "string"}})
        }
        _ if known.name.ends_with('*') => json!({"type": "object"}),
        Some(ValueKind::Flag) => json!({"type": "boolean"}),
        Some(ValueKind::Integer { min, max }) => {
            json!({"type": "integer", "minimum": min, "maximum": max})
        }
        Some(ValueKind::Span) => json!({"type": "string", "pattern": SPAN_PATTERN}),
        Some(ValueKind::Choice(words)) => json!({"type": "string", "enum": words}),
        Some(ValueKind::Listener) => json!({"type": ["string", "integer"]}),
        Some(ValueKind::Text) => json!({"type": "string"}),
        None => json!({"type": ["string", "number", "boolean", "object", "array"]}),
    };
    property["description"] = known.meaning().into();
    if let Some(text) = default {
        property["default"] = typed(kind, text);
    }
    if known.secret {
        property["writeOnly"] = true.into();
    }
    if matches!(known.effect, Effect::Ignored(_)) {
        property["deprecated"] = true.into();
    }
    property
}

fn typed(kind: Option<ValueKind>, text: &str) -> Value {
    match kind {
        Some(ValueKind::Flag) => text.parse::<bool>().map_or_else(|_| text.into(), Value::from),
        Some(ValueKind::Integer { .. }) => text.parse::<u64>().map_or_else(|_| text.into(), Value::from),
        Some(ValueKind::Span | ValueKind::Choice(_) | ValueKind::Listener | ValueKind::Text) | None => {
            text.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every leaf below a schema's properties, by its name in the catalog.
    fn leaves(properties: &Map<String, Value>, above: &str, found: &mut Vec<(String, Value)>) {
        for (name, property) in properties {
            let name = format!("{above}{name}");
            match property.get("properties").and_then(Value::as_object) {
                Some(members) => leaves(members, &format!("{name}:"), found),
                None if property["type"] == "object" => found.push((format!("{name}:*"), property.clone())),
                None => found.push((name, property.clone())),
            }
        }
    }

    #[test]
    fn schema_and_catalog_agree() {
        let schema = schema().expect("defaults are readable");
        let mut found = Vec::new();
        leaves(schema["properties"].as_object().expect("an object"), "", &mut found);
        let mut in_schema: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        let mut in_catalog: Vec<_> = catalog::known().iter().map(|known| known.name).collect();
        in_schema.sort_unstable();
        in_catalog.sort_unstable();
        assert_eq!(in_schema, in_catalog);
        for (name, property) in &found {
            let Some(default) = property.get("default") else { continue };
            let fits = match property["type"].as_str() {
                Some("boolean") => default.is_boolean(),
                Some("integer") => {
                    let number = default.as_u64().expect("a whole number");
                    property["minimum"].as_u64().is_some_and(|min| min <= number)
                        && property["maximum"].as_u64().is_some_and(|max| number <= max)
                }
                Some("string") => property
                    .get("enum")
                    .is_none_or(|words| words.as_array().is_some_and(|words| words.contains(default))),
                _ => true,
            };
            assert!(fits, "{name}: the default {default} is not of its own schema {property}");
        }
    }
}
