//! Owns the reading of the reference's settings file, `appsettings_hub.json`.
//!
//! Sections are objects; their members are named like environment variables (`mqttSettings:enabled`). A file that
//! is not there is no fault: the reference ships one, and most sites never touch it.

use std::path::Path;

use serde_json::Value;

use super::SettingsError;
use super::catalog::setting_id;
use super::layers::{Layers, Origin, read};

/// Name of the file, beside the program.
pub const FILE: &str = "appsettings_hub.json";

impl Layers {
    /// Lays the reference's settings file over what is there.
    pub(super) fn add_appsettings(&mut self, path: &Path) -> Result<(), SettingsError> {
        let text = read(path)?;
        // A byte order mark stands before the file that the reference ships.
        let text = text.trim_start_matches('\u{feff}');
        let syntax = |line, column, reason: String| SettingsError::FileSyntax {
            path: path.into(),
            line,
            column,
            reason,
        };
        let document: Value = serde_json::from_str(text)
            .map_err(|error| syntax(error.line(), error.column(), error.to_string()))?;
        if !document.is_object() {
            return Err(syntax(1, 1, "an object is expected".into()));
        }
        self.add_value(String::new(), document, &Origin::File(path.into()));
        Ok(())
    }

    fn add_value(&mut self, name: String, value: Value, origin: &Origin) {
        let below =
            |member: &str| if name.is_empty() { member.to_owned() } else { format!("{name}:{member}") };
        let text = match value {
            Value::Object(members) => {
                for (member, value) in members {
                    self.add_value(below(&member), value, origin);
                }
                return;
            }
            Value::Array(items) => {
                for (index, value) in items.into_iter().enumerate() {
                    self.add_value(below(&index.to_string()), value, origin);
                }
                return;
            }
            Value::Null => String::new(),
            Value::Bool(flag) => flag.to_string(),
            Value::Number(number) => number.to_string(),
            Value::String(text) => text,
        };
        self.add_named(&setting_id(&name), &name, text, origin);
    }
}
