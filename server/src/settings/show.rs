//! Owns what `edgehub config show` says: each setting with its value and origin, secrets masked.

use serde::Serialize;

use super::catalog::{Effect, KnownSetting};
use super::layers::{Entry, Layers, Origin};
use super::mask::{Masked, masked};
use super::{Notice, Settings, SettingsError, Sources};
use crate::admin::table::{Side, Table};

/// What stands in place of a secret.
pub const MASK: &str = "***";

/// All settings that have a value.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// In the order of the reference.
    pub settings: Vec<ShownSetting>,
    /// Names that nothing knows.
    pub unknown: Vec<UnknownSetting>,
    /// Why the hub does not start with these; absent if it would, as far as settings go.
    pub error: Option<String>,
}

/// A setting and where its value comes from.
#[derive(Clone, Debug, Serialize)]
pub struct ShownSetting {
    /// Name as in the file.
    pub name: String,
    /// Name as environment variable.
    pub environment: String,
    /// The value in force; secrets are `***`.
    pub value: String,
    /// Where it was given.
    pub origin: ShownOrigin,
    /// `used`, `mapped` or `ignored`.
    pub effect: &'static str,
    /// How it is mapped, or why it is ignored.
    pub note: Option<&'static str>,
}

/// The place where a value was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownOrigin {
    /// `default`, `file`, `environment` or `flag`.
    pub kind: &'static str,
    /// The file, variable or flag.
    pub place: Option<String>,
}

/// A name that nothing knows.
#[derive(Clone, Debug, Serialize)]
pub struct UnknownSetting {
    /// As given.
    pub name: String,
    /// Where.
    pub origin: ShownOrigin,
    /// A known name that is probably meant.
    pub suggestion: Option<String>,
}

impl Shown {
    /// Reads the settings as the hub does. With `given_only`, defaults are left out.
    ///
    /// # Errors
    /// A file or flag that is not readable as settings.
    pub fn load(sources: Sources<'_>, given_only: bool) -> Result<Self, SettingsError> {
        let layers = Layers::load(sources.clone())?;
        let settings = layers
            .given()
            .filter(|(.., entry)| !given_only || entry.origin != Origin::Default)
            .map(|(known, member, entry)| ShownSetting::new(known, member, entry))
            .collect();
        let unknown = layers.notices.iter().filter_map(UnknownSetting::of).collect();
        let error = Settings::load(sources).err().map(|error| error.to_string());
        Ok(Self { settings, unknown, error })
    }

    /// The same for people.
    pub fn text(&self) -> String {
        let mut table = Table::new([
            ("SETTING", Side::Left),
            ("VALUE", Side::Left),
            ("FROM", Side::Left),
            ("", Side::Left),
        ]);
        for setting in &self.settings {
            let note = match (setting.effect, setting.note) {
                ("ignored", Some(why)) => format!("no effect: {why}"),
                (_, Some(how)) => how.to_owned(),
                (_, None) => String::new(),
            };
            table.row([setting.name.clone(), setting.value.clone(), setting.origin.text(), note]);
        }
        let mut out = table.lines().join("\n") + "\n";
        for unknown in &self.unknown {
            let suggestion =
                unknown.suggestion.as_ref().map(|name| format!("; did you mean {name}?")).unwrap_or_default();
            out.push_str(&format!("unknown: {} ({}){suggestion}\n", unknown.name, unknown.origin.text()));
        }
        if let Some(error) = &self.error {
            out.push_str(&format!("error: {error}\n"));
        }
        out
    }
}

impl ShownSetting {
    fn new(known: &KnownSetting, member: Option<&str>, entry: &Entry) -> Self {
        let whole = |name: String| match member {
            Some(member) => name.replace('*', member),
            None => name,
        };
        let (effect, note) = match known.effect {
            Effect::Used => ("used", None),
            Effect::Mapped(how) => ("mapped", Some(how)),
            Effect::Ignored(why) => ("ignored", Some(why)),
        };
        Self {
            name: whole(known.name.replace(':', ".")),
            environment: whole(known.environment_name()),
            value: match masked(known, &entry.text) {
                Masked::Plain(text) => text,
                Masked::Hidden => MASK.to_owned(),
            },
            origin: ShownOrigin::new(&entry.origin),
            effect,
            note,
        }
    }
}

impl ShownOrigin {
    fn new(origin: &Origin) -> Self {
        Self { kind: origin.kind(), place: origin.place() }
    }

    fn text(&self) -> String {
        match &self.place {
            Some(place) => format!("{} {place}", self.kind),
            None => self.kind.to_owned(),
        }
    }
}

impl UnknownSetting {
    fn of(notice: &Notice) -> Option<Self> {
        match notice {
            Notice::Unknown { name, origin, suggestion } => Some(Self {
                name: name.clone(),
                origin: ShownOrigin::new(origin),
                suggestion: suggestion.clone(),
            }),
            Notice::Ignored { .. }
            | Notice::Mapped { .. }
            | Notice::FellBack { .. }
            | Notice::TemporaryStore(_) => None,
        }
    }
}
