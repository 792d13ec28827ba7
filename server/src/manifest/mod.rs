//! Owns the reading of deployment manifests: what the hub takes from one, and what is wrong with it.
//!
//! Faults are found in two steps. A text that is not JSON gets its cause named where it can be seen. A text
//! that is JSON is checked for the sections that the hub needs; faults in the agent's section, which the hub
//! does not read, are warnings.

mod scan;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use scan::Position;

use scan::{Scan, Unclosed, scan};

/// Longest manifest that is read, bytes. IoT Hub allows less than 1 MiB for all twins of a device.
pub const MANIFEST_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Most problems that are reported of one file.
const PROBLEMS_MAX: usize = 50;
const DESIRED: &str = "properties.desired";

/// What the program takes from a manifest.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Desired properties of `$edgeHub`.
    pub hub_desired: Value,
    /// Names of the modules that the agent would start.
    pub module_names: Vec<String>,
    /// Desired properties of further modules, by module name.
    pub module_desired: BTreeMap<String, Value>,
    /// What should be corrected although the manifest can be used.
    pub warnings: Vec<Problem>,
}

/// Kind of a problem, by the codes of the manifest linter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The text is not JSON.
    JsonSyntax,
    /// The preview's name of the content member.
    LegacyContentKey,
    /// A section is not there.
    MissingSection,
    /// A required property is not there.
    MissingProperty,
    /// A property that nothing reads.
    UnknownProperty,
    /// A value of the wrong JSON type.
    WrongType,
    /// A member of `env` that is not `{"value": ..}`.
    EnvEntryNotAnObject,
    /// A patch for a layered deployment, not a manifest.
    LayeredDeployment,
}

impl Code {
    /// The code's text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::JsonSyntax => "json-syntax",
            Self::LegacyContentKey => "legacy-content-key",
            Self::MissingSection => "missing-section",
            Self::MissingProperty => "missing-property",
            Self::UnknownProperty => "unknown-property",
            Self::WrongType => "wrong-type",
            Self::EnvEntryNotAnObject => "env-entry-not-an-object",
            Self::LayeredDeployment => "layered-deployment",
        }
    }
}

/// One problem of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Kind.
    pub code: Code,
    /// Where in the file.
    pub position: Position,
    /// The member concerned, below the content member; empty for a fault of the text.
    pub path: String,
    /// One sentence that says what is wrong and what to do.
    pub sentence: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Position { line, column } = self.position;
        write!(f, "line {line}, column {column}: {} [{}]", self.sentence, self.code.as_str())
    }
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The file cannot be read.
    #[error("manifest {path} cannot be read: {reason}; check the path given with --manifest")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// The content has faults; every one is listed.
    #[error("manifest {path}, {}", join(.problems))]
    Faulty {
        /// The file.
        path: PathBuf,
        /// At least one.
        problems: Vec<Problem>,
    },
}

/// Where the members of a JSON text stand, by their paths (`a/b/c`); also of a text with faults.
pub fn member_positions(text: &str) -> HashMap<String, Position> {
    scan(text).members
}

fn join(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Manifest {
    /// Reads a manifest file.
    ///
    /// # Errors
    /// The file cannot be read, is not JSON, or lacks what the hub needs.
    pub fn read(path: &Path) -> Result<Self, ManifestError> {
        let unreadable = |reason: String| ManifestError::Unreadable { path: path.into(), reason };
        let size_bytes = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
        if size_bytes > MANIFEST_BYTES_MAX {
            return Err(unreadable(format!("it is longer than {MANIFEST_BYTES_MAX} bytes")));
        }
        let bytes = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
        let text = String::from_utf8(bytes).map_err(|_| unreadable("it is not UTF-8 text".into()))?;
        Self::parse(&text).map_err(|problems| ManifestError::Faulty { path: path.into(), problems })
    }

    /// Reads the text of a manifest.
    ///
    /// # Errors
    /// All faults for which the hub cannot use it, at most fifty, in the order of the file.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let scan = scan(text);
        let document = match serde_json::from_str::<Value>(text) {
            Ok(document) => document,
            Err(error) => return Err(syntax_problems(text, &scan, &error)),
        };
        let mut check =
            Check { scan: &scan, prefix: String::new(), errors: Vec::new(), warnings: Vec::new() };
        match check.manifest(&document) {
            Some(mut manifest) if check.errors.is_empty() => {
                check.warnings.truncate(PROBLEMS_MAX);
                manifest.warnings = check.warnings;
                Ok(manifest)
            }
            _ => {
                // Whoever corrects the errors wants to know the rest too.
                check.errors.append(&mut check.warnings);
                check.errors.sort_by_key(|problem| problem.position);
                check.errors.truncate(PROBLEMS_MAX);
                Err(check.errors)
            }
        }
    }
}

/// Names the causes of a syntax error, or, where none can be seen, what the parser says.
fn syntax_problems(text: &str, scan: &Scan, error: &serde_json::Error) -> Vec<Problem> {
    let stopped = Position { line: error.line().max(1), column: error.column().max(1) };
    let syntax =
        |position, sentence| Problem { code: Code::JsonSyntax, position, path: String::new(), sentence };
    let mut problems = Vec::new();
    let outline = scan.comments.iter().chain(&scan.ellipses).min();
    if let Some(position) = outline {
        let what = match (scan.comments.is_empty(), scan.ellipses.is_empty()) {
            (false, false) => {
                "comments and `...`: this is an outline, not a document; replace or remove them"
            }
            (false, true) => "a comment; JSON has none, remove it",
            (true, _) => "`...` stands for something left out; write it out or remove it",
        };
        return vec![syntax(*position, what.to_owned())];
    }
    for position in &scan.trailing_commas {
        let what = "a comma directly before a closing bracket; remove it".to_owned();
        problems.push(syntax(*position, what));
    }
    if let Some(innermost) = scan.open_at_end.last() {
        let unclosed = scan.unclosed.as_ref().unwrap_or(innermost);
        problems.push(syntax(after_line(text, unclosed.last_line), unclosed_sentence(unclosed)));
    }
    if problems.is_empty() && text.trim_start().starts_with('"') && !scan.members.is_empty() {
        let what = "a member without the object around it; put the text into { }";
        problems.push(syntax(stopped, what.to_owned()));
    }
    if problems.is_empty() {
        let mut reason = error.to_string();
        if let Some(end) = reason.rfind(" at line ") {
            reason.truncate(end);
        }
        problems.push(syntax(stopped, format!("not JSON: {reason}")));
    }
    problems.sort_by_key(|problem| problem.position);
    problems.truncate(PROBLEMS_MAX);
    problems
}

fn unclosed_sentence(unclosed: &Unclosed) -> String {
    let Unclosed { member, last_line, bracket } = unclosed;
    let kind = if *bracket == '}' { "object" } else { "array" };
    if member.is_empty() {
        return format!("the outermost {kind} is not closed; a {bracket} is missing after line {last_line}");
    }
    format!("the {kind} of member {member} is not closed; a {bracket} is missing after line {last_line}")
}

/// The place behind the last character of a line.
fn after_line(text: &str, line: usize) -> Position {
    let length = text.lines().nth(line.saturating_sub(1)).map_or(0, |line| line.trim_end().chars().count());
    Position { line, column: length + 1 }
}

/// A check of one document.
struct Check<'a> {
    scan: &'a Scan,
    /// Path of the content member, with a slash at its end.
    prefix: String,
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Check<'_> {
    fn manifest(&mut self, document: &Value) -> Option<Manifest> {
        let Some(mut outer) = document.as_object() else {
            self.error(Code::WrongType, "", "the document must be an object".into());
            return None;
        };
        if let Some(inner) = outer.get("content").and_then(Value::as_object) {
            self.prefix = "content/".into();
            outer = inner;
        }
        let content = match (outer.get("modulesContent"), outer.get("moduleContent")) {
            (Some(content), _) => {
                self.prefix.push_str("modulesContent");
                content
            }
            (None, Some(content)) => {
                self.prefix.push_str("moduleContent");
                let what = "moduleContent is the preview's name; write modulesContent";
                self.warning(Code::LegacyContentKey, "", what.into());
                content
            }
            (None, None) => {
                let what = "the member modulesContent is missing; a manifest is \
                            {\"modulesContent\": {\"$edgeAgent\": {..}, \"$edgeHub\": {..}}}";
                self.error(Code::MissingSection, "modulesContent", what.into());
                return None;
            }
        };
        self.prefix.push('/');
        let content = self.object(content, "")?;
        let hub = self.hub(content);
        let (mut module_names, mut module_desired) = (Vec::new(), BTreeMap::new());
        for (name, section) in content {
            if name == "$edgeHub" {
                continue;
            }
            let Some(desired) = self.desired(name, section) else { continue };
            if name == "$edgeAgent" {
                module_names = self.agent(desired);
            } else {
                module_desired.insert(name.clone(), Value::Object(desired.clone()));
            }
        }
        if !content.contains_key("$edgeAgent") {
            let what = "the section $edgeAgent is missing; no module is known from this manifest";
            self.warning(Code::MissingSection, "$edgeAgent", what.into());
        }
        Some(Manifest { hub_desired: hub?, module_names, module_desired, warnings: Vec::new() })
    }

    fn hub(&mut self, content: &Map<String, Value>) -> Option<Value> {
        let Some(section) = content.get("$edgeHub") else {
            self.missing_hub();
            return None;
        };
        let desired = self.desired("$edgeHub", section)?;
        let path = |name: &str| format!("$edgeHub/{DESIRED}/{name}");
        self.require(desired, &path("schemaVersion"), "schemaVersion", Value::is_string, "a text");
        let old = desired.get("schemaVersion").and_then(Value::as_str).is_some_and(|version| {
            let mut parts = version.trim().split('.');
            (parts.next(), parts.next()) == (Some("1"), Some("0"))
        });
        match desired.get("routes") {
            None | Some(Value::Null) if old => {}
            _ => self.require(desired, &path("routes"), "routes", Value::is_object, "an object"),
        }
        let store = "storeAndForwardConfiguration";
        self.require(desired, &path(store), store, Value::is_object, "an object");
        if let Some(store_value) = desired.get(store).and_then(Value::as_object) {
            let ttl = "timeToLiveSecs";
            let path = path(&format!("{store}/{ttl}"));
            let whole = |value: &Value| value.as_i64().is_some_and(|secs| i32::try_from(secs).is_ok());
            self.require(store_value, &path, ttl, whole, "a whole number of seconds, -1 for ever");
        }
        Some(Value::Object(desired.clone()))
    }

    /// The section `$edgeHub` is not where it belongs: says where it is instead, and why.
    fn missing_hub(&mut self) {
        let elsewhere = self.scan.members.iter().find(|(path, _)| path.ends_with("/$edgeHub"));
        let mut sentence = "the section $edgeHub is missing".to_owned();
        if let Some((path, position)) = elsewhere {
            let inside = path.strip_prefix(&self.prefix).unwrap_or(path).trim_end_matches("/$edgeHub");
            sentence = format!(
                "the section $edgeHub is missing: it stands inside of {inside} (line {}) instead of beside it",
                position.line
            );
        }
        if let Some(Unclosed { member, last_line, bracket }) = &self.scan.unclosed {
            let hint = format!(
                "; the indentation says that a {bracket} is missing after line {last_line}, at the end of \
                 {member}"
            );
            sentence.push_str(&hint);
        }
        self.error(Code::MissingSection, "$edgeHub", sentence);
    }

    /// The desired properties of one section.
    fn desired<'v>(&mut self, name: &str, section: &'v Value) -> Option<&'v Map<String, Value>> {
        let section = self.object(section, name)?;
        if let Some(desired) = section.get(DESIRED) {
            return self.object(desired, &format!("{name}/{DESIRED}"));
        }
        let layered = section.keys().find(|key| key.starts_with("properties.desired."));
        let (code, sentence) = match layered {
            Some(key) => (
                Code::LayeredDeployment,
                format!("{name} has {key}: a part for a layered deployment, not a full manifest"),
            ),
            None => (Code::MissingSection, format!("{name} has no member {DESIRED}")),
        };
        let path = layered.map_or_else(|| name.to_owned(), |key| format!("{name}/{key}"));
        if name == "$edgeHub" || code == Code::LayeredDeployment {
            self.error(code, &path, sentence);
        } else {
            self.warning(code, &path, sentence);
        }
        None
    }

    /// Looks through the agent's section and answers the names of its modules.
    fn agent(&mut self, desired: &Map<String, Value>) -> Vec<String> {
        let base = format!("$edgeAgent/{DESIRED}");
        for name in ["schemaVersion", "runtime", "systemModules"] {
            if !desired.contains_key(name) {
                let sentence = format!("$edgeAgent lacks {name}");
                self.warning(Code::MissingProperty, &format!("{base}/{name}"), sentence);
            }
        }
        let system = desired.get("systemModules").and_then(Value::as_object);
        for (name, module) in system.into_iter().flatten() {
            self.module(&format!("{base}/systemModules/{name}"), module);
        }
        let modules = desired.get("modules").and_then(Value::as_object);
        let mut names = Vec::new();
        for (name, module) in modules.into_iter().flatten() {
            self.module(&format!("{base}/modules/{name}"), module);
            names.push(name.clone());
        }
        names
    }

    fn module(&mut self, path: &str, module: &Value) {
        const MEMBERS: [&str; 9] = [
            "type",
            "status",
            "restartPolicy",
            "imagePullPolicy",
            "startupOrder",
            "version",
            "env",
            "settings",
            "configuration",
        ];
        let Some(module) = module.as_object() else {
            self.warning(Code::WrongType, path, "a module must be an object".into());
            return;
        };
        for name in module.keys().filter(|name| !MEMBERS.contains(&name.as_str())) {
            let sentence = format!("{name} is no property of a module and is not read");
            self.warning(Code::UnknownProperty, &format!("{path}/{name}"), sentence);
        }
        for (name, entry) in module.get("env").and_then(Value::as_object).into_iter().flatten() {
            if entry.get("value").is_none() {
                let sentence =
                    format!("env entry {name} must be {{\"value\": ..}}; is a closing brace misplaced?");
                self.warning(Code::EnvEntryNotAnObject, &format!("{path}/env/{name}"), sentence);
            }
        }
    }

    fn require(
        &mut self,
        object: &Map<String, Value>,
        path: &str,
        name: &str,
        fits: impl FnOnce(&Value) -> bool,
        expected: &str,
    ) {
        match object.get(name) {
            None | Some(Value::Null) => {
                let sentence = format!("{name} is missing: expected {expected}");
                self.error(Code::MissingProperty, path, sentence);
            }
            Some(value) if !fits(value) => {
                self.error(Code::WrongType, path, format!("{name} must be {expected}"));
            }
            Some(_) => {}
        }
    }

    fn object<'v>(&mut self, value: &'v Value, path: &str) -> Option<&'v Map<String, Value>> {
        let object = value.as_object();
        if object.is_none() {
            self.error(Code::WrongType, path, "this must be an object".into());
        }
        object
    }

    fn error(&mut self, code: Code, path: &str, sentence: String) {
        let problem = self.problem(code, path, sentence);
        self.errors.push(problem);
    }

    fn warning(&mut self, code: Code, path: &str, sentence: String) {
        let problem = self.problem(code, path, sentence);
        self.warnings.push(problem);
    }

    /// A problem at its member or, when that is not there, at the nearest member around it.
    fn problem(&self, code: Code, path: &str, sentence: String) -> Problem {
        let full = format!("{}{path}", self.prefix);
        let mut around = full.trim_end_matches('/');
        let position = loop {
            if let Some(position) = self.scan.members.get(around) {
                break *position;
            }
            match around.rsplit_once('/') {
                Some((outer, _)) => around = outer,
                None => break Position { line: 1, column: 1 },
            }
        };
        Problem { code, position, path: path.to_owned(), sentence }
    }
}
