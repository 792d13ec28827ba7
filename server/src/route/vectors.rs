//! Owns `edgehub route test`: files of routing vectors, run against the compiled table that the hub uses.
//!
//! What a file leaves out has a default, what it has too much is ignored; only what a vector expects is compared.

mod conditions;
mod desired;
mod routes;

use std::fmt::Write as _;

use serde_json::Value;

use super::message::{Message, parse_json};
use super::{read, shown};
use crate::cli::RouteTestOptions;
use crate::exit::Failure;

/// The edge device of a file that names none.
const EDGE_DEVICE_ID: &str = "edge";

/// Characters of an expectation or a result that are shown.
const SHOWN_CHARS_MAX: usize = 400;

/// Why a vector has not passed.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// It asks for something else than was found.
    Failed { expected: String, got: String },
    /// It is about something that the language does not have.
    Skipped,
}

impl Refusal {
    /// The vector itself cannot be used.
    fn malformed(got: impl Into<String>) -> Refusal {
        Refusal::Failed { expected: "a vector of its kind".to_owned(), got: got.into() }
    }
}

/// What became of one vector.
type Verdict = Result<(), Refusal>;

/// What a vector can refer to in its file.
struct File<'f> {
    messages: &'f Value,
    edge_device_id: &'f str,
}

impl File<'_> {
    /// The message of a vector: an object, or the name of one of the file's.
    fn message(&self, vector: &Value) -> Result<Message, Refusal> {
        let given = &vector["message"];
        let value = match given.as_str() {
            Some(name) => self
                .messages
                .get(name)
                .ok_or_else(|| Refusal::malformed(format!("the file has no message {name:?}")))?,
            None => given,
        };
        let message = Message::parse(value).map_err(Refusal::malformed)?;
        // No client can send one, so there is nothing to test.
        if message.is_impossible() { Err(Refusal::Skipped) } else { Ok(message) }
    }
}

/// The report, and whether no vector failed.
///
/// # Errors
/// A file cannot be read, or holds no vectors.
pub(super) fn report(options: &RouteTestOptions) -> Result<(String, bool), Failure> {
    let mut report = String::new();
    let (mut passed, mut failed, mut skipped) = (0_usize, 0_usize, 0_usize);
    for path in &options.files {
        let unreadable = |reason: String| Failure::RouteFile { path: shown(path).to_owned(), reason };
        let file =
            parse_json(&read(path)?).map_err(|error| unreadable(format!("it is not JSON: {error}")))?;
        let vectors = file
            .as_array()
            .or_else(|| file.get("vectors").and_then(Value::as_array))
            .ok_or_else(|| unreadable("it has no list of vectors".to_owned()))?;
        let context = File {
            messages: file.get("messages").unwrap_or(&Value::Null),
            edge_device_id: file.get("edgeDeviceId").and_then(Value::as_str).unwrap_or(EDGE_DEVICE_ID),
        };
        for (number, vector) in vectors.iter().enumerate() {
            match run(&context, vector) {
                Ok(()) => passed += 1,
                Err(Refusal::Skipped) => skipped += 1,
                Err(Refusal::Failed { expected, got }) => {
                    failed += 1;
                    let name =
                        vector["name"].as_str().map_or_else(|| format!("#{}", number + 1), str::to_owned);
                    let _ = writeln!(report, "FAILED {}: {}", shown(path), cut(&name));
                    let _ = writeln!(report, "  expected: {}", cut(&expected));
                    let _ = writeln!(report, "  got:      {}", cut(&got));
                }
            }
        }
    }
    let _ = writeln!(report, "{passed} passed, {failed} failed, {skipped} skipped");
    Ok((report, failed == 0))
}

fn run(file: &File<'_>, vector: &Value) -> Verdict {
    let given = |member: &str| vector.get(member).is_some_and(|value| !value.is_null());
    if given("requires") || vector["features"] == "none" {
        return Err(Refusal::Skipped);
    }
    match vector["kind"].as_str() {
        Some("condition") => conditions::condition(file, vector),
        Some("condition-error") => conditions::condition_error(vector),
        Some("value") => conditions::value(vector),
        Some("body-path") => conditions::body_path(vector),
        Some("route") => routes::route(vector),
        Some("route-error") => routes::route_error(vector),
        Some("source") => routes::source(file, vector),
        Some("message-source") => routes::message_source(file, vector),
        Some("sink") => routes::sink(vector),
        Some("set") => routes::set(file, vector),
        Some("delivery") => routes::delivery(file, vector),
        Some("desired") => desired::desired(vector),
        Some(other) => Err(Refusal::Failed {
            expected: "a kind of vector that this program knows".to_owned(),
            got: format!("the unknown kind {other:?}"),
        }),
        None => Err(Refusal::malformed("a vector without a kind")),
    }
}

/// A text member that a vector of this kind must have.
fn text<'v>(vector: &'v Value, member: &str) -> Result<&'v str, Refusal> {
    vector[member].as_str().ok_or_else(|| Refusal::malformed(format!("a vector without the text {member:?}")))
}

/// Compares what was found with what is expected.
fn same(expected: &Value, got: &Value) -> Verdict {
    if covers(expected, got) {
        return Ok(());
    }
    Err(Refusal::Failed { expected: expected.to_string(), got: got.to_string() })
}

/// Is everything that is expected there? Members that are not expected do not count; numbers are equal by their value.
fn covers(expected: &Value, got: &Value) -> bool {
    match (expected, got) {
        (Value::Object(expected), Value::Object(got)) => {
            expected.iter().all(|(name, value)| got.get(name).is_some_and(|got| covers(value, got)))
        }
        (Value::Number(expected), Value::Number(got)) => expected == got || expected.as_f64() == got.as_f64(),
        (expected, got) => expected == got,
    }
}

/// Compares an error's category and place with the `error` of a vector.
fn same_error(
    vector: &Value,
    found: &edgehub_routing::Diagnostic,
    range: Option<edgehub_routing::TextRange>,
) -> Verdict {
    let mut expected = vector["error"].clone();
    let mut got = range.map_or_else(|| Value::Object(serde_json::Map::new()), super::of_range);
    got["category"] = found.category.name().into();
    got["stage"] = found.stage.name().into();
    got["message"] = found.message.clone().into();
    if let Some(expected) = expected.as_object_mut() {
        // Words are ours to choose, and "any" leaves everything open.
        expected.retain(|name, value| {
            name != "message" && *value != "any" && !(value.is_null() && got.get(name).is_none())
        });
    }
    if expected.is_null() || expected == "any" {
        return Ok(());
    }
    same(&expected, &got)
}

fn cut(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown.replace(['\n', '\r'], " ")
}
