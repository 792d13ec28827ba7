//! Owns the raw settings: text values by name, each with the place where it was given.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::catalog::{self, Effect, KnownSetting, setting_id};
use super::mask;
use super::{Notice, SettingsError, Sources};

/// Longest settings file that is read.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Sections that the program or the reference own: a variable below one of them is meant for us.
const ENVIRONMENT_PREFIXES: &[&str] = &["edgehub_", "iotedge_", "edgehubdev", "rocksdb_"];

/// Where a value was given, for messages to the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Built into the program.
    Default,
    /// The settings file.
    File(PathBuf),
    /// The environment variable of this name, as spelled there.
    Environment(String),
    /// The command line flag of this name.
    Flag(String),
}

impl Origin {
    /// The kind of place, in one word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::File(_) => "file",
            Self::Environment(_) => "environment",
            Self::Flag(_) => "flag",
        }
    }

    /// The file, variable or flag; none for a default.
    pub fn place(&self) -> Option<String> {
        match self {
            Self::Default => None,
            Self::File(path) => Some(path.display().to_string()),
            Self::Environment(name) | Self::Flag(name) => Some(name.clone()),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("the built-in defaults"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "command line flag {name}"),
        }
    }
}

/// One value as it was given.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) text: String,
    pub(super) origin: Origin,
}

/// A member of a section whose members have names of their own.
pub(super) struct Member {
    /// As it was given first, without the section.
    pub(super) name: String,
    pub(super) entry: Entry,
}

/// All values, the highest layer on top.
pub(super) struct Layers {
    entries: BTreeMap<&'static str, Entry>,
    /// The members of sections that are listed as a whole and take effect, by their compared names.
    members: BTreeMap<&'static str, BTreeMap<String, Member>>,
    pub(super) notices: Vec<Notice>,
}

impl Layers {
    /// All layers in their order.
    pub(super) fn load(sources: Sources<'_>) -> Result<Self, SettingsError> {
        let mut layers = Self::with_defaults()?;
        if let Some(path) = sources.appsettings.filter(|path| path.exists()) {
            layers.add_appsettings(&path)?;
        }
        if let Some(path) = sources.file {
            layers.add_file(path)?;
        }
        layers.add_environment(sources.environment);
        for (flag, name, text) in &sources.flags {
            layers.add_flag(flag, name, text)?;
        }
        Ok(layers)
    }

    /// Starts with the built-in defaults.
    pub(super) fn with_defaults() -> Result<Self, SettingsError> {
        let mut layers = Self { entries: BTreeMap::new(), members: BTreeMap::new(), notices: Vec::new() };
        layers.add_toml(include_str!("defaults.toml"), &Origin::Default, Path::new("defaults.toml"))?;
        Ok(layers)
    }

    /// Lays a settings file over what is there.
    pub(super) fn add_file(&mut self, path: &Path) -> Result<(), SettingsError> {
        self.add_toml(&read(path)?, &Origin::File(path.into()), path)
    }

    /// Every setting that has a value, in the order of the catalog; with its name, if it is a member of a section.
    pub(super) fn given(&self) -> impl Iterator<Item = (&'static KnownSetting, Option<&str>, &Entry)> {
        catalog::known().iter().flat_map(|known| {
            let own = self.get(known.name).map(|entry| (known, None, entry));
            let members = self.members(known.name);
            own.into_iter().chain(members.map(move |member| (known, Some(&*member.name), &member.entry)))
        })
    }

    /// The members of a section that is listed as a whole (`section:*`), but for those that were given blank.
    pub(super) fn members(&self, section: &str) -> impl Iterator<Item = &Member> {
        let members = self.members.get(section).into_iter().flat_map(BTreeMap::values);
        members.filter(|member| !member.entry.text.trim().is_empty())
    }

    /// Lays the environment over what is there. Blank variables count as absent; of the others only those
    /// that look as if they were meant for this program are reported when they are not known.
    pub(super) fn add_environment(&mut self, variables: impl IntoIterator<Item = (String, String)>) {
        let mut variables: Vec<_> = variables.into_iter().collect();
        variables.sort();
        for (name, text) in variables {
            if text.trim().is_empty() {
                continue;
            }
            match known_variable(&name) {
                Some(known) => self.put(known, &name, text, Origin::Environment(name.clone())),
                None => {
                    let suggestion = near_miss(&name);
                    if suggestion.is_some() || below_known_prefix(&name) {
                        let origin = Origin::Environment(name.clone());
                        self.notices.push(Notice::Unknown { name, origin, suggestion });
                    }
                }
            }
        }
    }

    /// Lays one command line flag over what is there. `flag` is the flag's spelling, `name` the setting's.
    pub(super) fn add_flag(&mut self, flag: &str, name: &str, text: &str) -> Result<(), SettingsError> {
        let Some(known) = catalog::find(&setting_id(name)) else {
            let name = mask::masked_name(name);
            return Err(SettingsError::UnknownFlagSetting { flag: flag.into(), name });
        };
        self.put(known, name, text.into(), Origin::Flag(flag.into()));
        Ok(())
    }

    /// The value of a setting, `None` when it has no default and was not given, or was given blank.
    pub(super) fn get(&self, name: &str) -> Option<&Entry> {
        debug_assert!(catalog::find(&setting_id(name)).is_some(), "{name} is not in the catalog");
        self.entries.get(name).filter(|entry| !entry.text.trim().is_empty())
    }

    fn add_toml(&mut self, text: &str, origin: &Origin, path: &Path) -> Result<(), SettingsError> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let (line, column) = error.span().map_or((1, 1), |span| line_column(text, span.start));
            let reason = error.message().replace('\n', " ");
            SettingsError::FileSyntax { path: path.into(), line, column, reason }
        })?;
        for (name, value) in table {
            self.add_toml_value(name, value, origin);
        }
        Ok(())
    }

    fn add_toml_value(&mut self, name: String, value: toml::Value, origin: &Origin) {
        let text = match value {
            toml::Value::Table(table) => {
                for (member, value) in table {
                    self.add_toml_value(format!("{name}:{member}"), value, origin);
                }
                return;
            }
            toml::Value::Array(items) => {
                for (index, value) in items.into_iter().enumerate() {
                    self.add_toml_value(format!("{name}:{index}"), value, origin);
                }
                return;
            }
            toml::Value::String(text) => text,
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            toml::Value::Boolean(flag) => flag.to_string(),
            toml::Value::Datetime(time) => time.to_string(),
        };
        let id = setting_id(&name);
        self.add_named(&id, &name.replace(':', "."), text, origin);
    }

    /// Keeps a value out of a file, or says that nothing knows its name.
    pub(super) fn add_named(&mut self, id: &str, given: &str, text: String, origin: &Origin) {
        match catalog::find(id) {
            Some(known) => self.put(known, given, text, origin.clone()),
            None => {
                let suggestion = nearest(id, KnownSetting::id).map(|known| known.name.to_owned());
                let name = given.to_owned();
                self.notices.push(Notice::Unknown { name, origin: origin.clone(), suggestion });
            }
        }
    }

    /// Keeps a value. `given` is the name as spelled, for members of a section that is listed as a whole.
    pub(super) fn put(&mut self, known: &'static KnownSetting, given: &str, text: String, origin: Origin) {
        if origin != Origin::Default {
            let name = if known.name.ends_with('*') { given.to_owned() } else { known.name.to_owned() };
            match known.effect {
                Effect::Used => {}
                Effect::Mapped(how) => {
                    self.notices.push(Notice::Mapped { name, origin: origin.clone(), how });
                }
                Effect::Ignored(why) => {
                    self.notices.push(Notice::Ignored { name, origin: origin.clone(), why });
                }
            }
        }
        let entry = Entry { text, origin };
        if known.name.ends_with('*') && known.effect == Effect::Used {
            let name = member_name(known, given);
            let members = self.members.entry(known.name).or_default();
            match members.get_mut(&name.to_lowercase()) {
                Some(member) => member.entry = entry,
                None => {
                    let member = Member { name: name.to_owned(), entry };
                    members.insert(name.to_lowercase(), member);
                }
            }
            return;
        }
        self.entries.insert(known.name, entry);
    }
}

/// The text of a settings file.
pub(super) fn read(path: &Path) -> Result<String, SettingsError> {
    let unreadable = |reason: String| SettingsError::FileUnreadable { path: path.into(), reason };
    let size_bytes = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if size_bytes > FILE_BYTES_MAX {
        return Err(unreadable(format!("it is longer than {FILE_BYTES_MAX} bytes")));
    }
    std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))
}

/// One-based line and column of a byte offset.
fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |rest| rest.chars().count()) + 1;
    (line, column)
}

/// What is left of a name behind its section.
fn member_name<'a>(known: &KnownSetting, given: &'a str) -> &'a str {
    let section = setting_id(known.name.trim_end_matches('*'));
    let is_section = |text: &str| {
        let id = setting_id(text);
        id == section || id.strip_prefix("edgehub_").is_some_and(|id| id == section)
    };
    let mut ends = given.char_indices().map(|(at, _)| at);
    ends.find(|end| is_section(&given[..*end])).map_or(given, |end| &given[end..])
}

fn known_variable(name: &str) -> Option<&'static KnownSetting> {
    let id = setting_id(name);
    if let Some(known) = catalog::find(&id).filter(|known| !known.own) {
        return Some(known);
    }
    let own_id = id.strip_prefix("edgehub_")?;
    catalog::find(own_id).filter(|known| known.own)
}

fn below_known_prefix(name: &str) -> bool {
    let id = setting_id(name);
    ENVIRONMENT_PREFIXES.iter().any(|prefix| id.starts_with(prefix))
        || id.split_once(':').is_some_and(|(section, _)| {
            catalog::known()
                .iter()
                .filter(|known| !known.own)
                .any(|known| setting_id(known.name).split_once(':').is_some_and(|(own, _)| own == section))
        })
}

/// A known name that a variable most probably means: one change in a name of up to eight characters, two
/// in a longer one. Short names are left alone: the environment is full of them.
fn near_miss(name: &str) -> Option<String> {
    if name.chars().count() < 6 {
        return None;
    }
    let known = nearest(&setting_id(name), |known| setting_id(&known.environment_name()))?;
    Some(if known.own { known.environment_name() } else { known.name.to_owned() })
}

fn nearest(id: &str, spelling: impl Fn(&KnownSetting) -> String) -> Option<&'static KnownSetting> {
    let changes_max = if id.chars().count() <= 8 { 1 } else { 2 };
    catalog::known()
        .iter()
        .filter(|known| !known.name.ends_with('*'))
        .map(|known| (edit_distance(id, &spelling(known), changes_max), known))
        .filter(|(distance, _)| *distance <= changes_max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

/// Levenshtein distance; anything above `limit` is answered as `limit + 1`.
fn edit_distance(left: &str, right: &str, limit: usize) -> usize {
    if left.len().abs_diff(right.len()) > limit {
        return limit + 1;
    }
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, l) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, r) in right.iter().enumerate() {
            let substituted = diagonal + usize::from(l != *r);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[right.len()].min(limit + 1)
}
