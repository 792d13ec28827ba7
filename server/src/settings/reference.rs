//! Owns the reference of the settings as Markdown, made from the catalog.

use std::fmt::Write as _;

use super::SettingsError;
use super::catalog;
use super::layers::Layers;

/// Chapters, each with the setting that it begins with.
const CHAPTERS: [(&str, &str); 9] = [
    ("Identity and environment", "IOTEDGE_DEVICEID"),
    ("Listeners", "mqttSettings:enabled"),
    ("Authentication and scope", "AuthenticationMode"),
    ("Upstream", "UpstreamProtocol"),
    ("Store", "usePersistentStorage"),
    ("Twins and configuration", "configSource"),
    ("Diagnostics", "RuntimeLogLevel"),
    ("Container", "EDGEHUBUSER_ID"),
    ("The program's own", "listen:mqtt_address"),
];

/// One table per chapter.
///
/// # Errors
/// The built-in defaults cannot be read.
pub fn markdown() -> Result<String, SettingsError> {
    let defaults = Layers::with_defaults()?;
    let mut out = String::new();
    for known in catalog::known() {
        if let Some((title, _)) = CHAPTERS.iter().find(|(_, first)| *first == known.name) {
            let _infallible = write!(
                out,
                "\n## {title}\n\n| name | environment | default | effect |\n| --- | --- | --- | --- |\n"
            );
        }
        let default = defaults.get(known.name).map(|entry| format!("`{}`", entry.text)).unwrap_or_default();
        let _infallible = writeln!(
            out,
            "| `{}` | `{}` | {default} | {} |",
            known.name.replace(':', "."),
            known.environment_name(),
            known.meaning().replace('|', "\\|")
        );
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chapter_is_there() {
        let text = markdown().expect("defaults are readable");
        assert_eq!(text.matches("\n## ").count(), CHAPTERS.len());
    }
}
