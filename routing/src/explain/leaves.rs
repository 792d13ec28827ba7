//! Owns what a condition asks of a message when it is explained: each value once, and why it is what it is.

use std::collections::HashMap;

use serde_json::Value;

use super::reason::Reason;
use crate::body::{BodyPath, BodyPaths, BodyScratch, Slot, Step};
use crate::check::{Checked, Operation};
use crate::message::{MessageView, PropertyName, SystemProperty, Text};
use crate::text::{self, equal_names};
use crate::walker::{Leaves, Plain, of_text};

/// Members that are named where another one is missing.
const NAMED_MAX: usize = 6;

/// The values of a message.
pub(crate) struct MessageLeaves<'m, M: ?Sized> {
    message: &'m M,
    paths: BodyPaths,
    body: BodyScratch,
    /// By folded name.
    properties: HashMap<String, Plain>,
    systems: HashMap<String, Plain>,
    bodies: HashMap<u32, Plain>,
}

impl<'m, M: MessageView + ?Sized> MessageLeaves<'m, M> {
    /// The values of `message` for the names and paths of a condition.
    pub(crate) fn new(checked: &Checked, message: &'m M) -> MessageLeaves<'m, M> {
        let mut paths = BodyPaths::default();
        for node in &checked.nodes {
            if let Operation::Body { path, .. } = &node.operation {
                paths.intern(path);
            }
        }
        if let Ok(path) = BodyPath::parse(PROBE) {
            paths.intern(&path);
        }
        MessageLeaves {
            message,
            paths,
            body: BodyScratch::default(),
            properties: HashMap::new(),
            systems: HashMap::new(),
            bodies: HashMap::new(),
        }
    }

    fn slot(&mut self, path: &BodyPath) -> (u32, Slot) {
        let slot = self.paths.intern(path);
        (slot, self.body.slot(&self.paths, self.message, slot))
    }

    /// Can the body be read? Then nothing stands at a path that no sender writes.
    fn readable(&mut self) -> bool {
        BodyPath::parse(PROBE).is_ok_and(|path| self.slot(&path).1 == Slot::Absent)
    }

    /// Why a system property has no value.
    pub(crate) fn of_system(&self, name: &str) -> Reason {
        Reason::SystemPropertyAbsent { known: SystemProperty::of_name(name).is_some() }
    }

    /// Why a body value is undefined or absent.
    pub(crate) fn of_body(&mut self, path: &BodyPath) -> Option<Reason> {
        let system = |name: &str| self.message.system_property(&PropertyName::new(name));
        match system("contentType") {
            Text::Text(given) if equal_names(given, "application/json") => {}
            Text::Text(given) => return Some(Reason::ContentTypeOther(given.to_owned())),
            Text::Null | Text::Undefined => return Some(Reason::ContentTypeAbsent),
        }
        match system("contentEncoding") {
            Text::Text(given)
                if ["utf-8", "utf-16", "utf-32"].iter().any(|known| equal_names(given, known)) => {}
            Text::Text(given) => return Some(Reason::ContentEncodingOther(given.to_owned())),
            Text::Null | Text::Undefined => return Some(Reason::ContentEncodingAbsent),
        }
        if !self.readable() {
            let detail =
                serde_json::from_slice::<Value>(self.message.body()).err().map(|error| error.to_string());
            return Some(Reason::BodyUnreadable(detail));
        }
        let Some(steps) = path.steps() else { return Some(Reason::PathWithoutMeaning) };
        let plain = steps.iter().all(|step| matches!(step, Step::Member(_) | Step::Element(_)));
        // Only for the words: what the value is has been decided by the hub's own reader.
        let document = serde_json::from_slice::<Value>(self.message.body()).ok();
        match (self.slot(path).1, document) {
            (Slot::Absent, Some(document)) if plain => Some(Reason::PathNotFound(missing(&document, steps))),
            (Slot::Absent, _) => Some(Reason::PathNotFound(None)),
            (Slot::Undefined, Some(document)) if plain => Some(match found(&document, steps) {
                Some(Value::Object(_)) => Reason::NotScalar("an object"),
                Some(Value::Array(_)) => Reason::NotScalar("an array"),
                Some(Value::String(_)) => Reason::LooksLikeDate,
                _ => Reason::NotScalar("no plain value"),
            }),
            (Slot::Undefined, _) => Some(Reason::NotScalar("an object, an array, a date, or several values")),
            _ => None,
        }
    }
}

/// A path at which no sender writes anything.
const PROBE: &str = "\u{1}edgehub\u{1}";

impl<M: MessageView + ?Sized> Leaves for MessageLeaves<'_, M> {
    fn property(&mut self, name: &str) -> Plain {
        let message = self.message;
        let name = PropertyName::new(name);
        let value = || of_text(message.property(&name));
        self.properties.entry(name.folded().to_owned()).or_insert_with(value).clone()
    }

    fn system(&mut self, name: &str) -> Plain {
        let message = self.message;
        let name = PropertyName::new(name);
        let value = || of_text(message.system_property(&name));
        self.systems.entry(name.folded().to_owned()).or_insert_with(value).clone()
    }

    fn body(&mut self, path: &BodyPath) -> Plain {
        let (number, slot) = self.slot(path);
        if let Some(known) = self.bodies.get(&number) {
            return known.clone();
        }
        let value = match slot {
            Slot::Absent => Plain::Null { absent: true },
            Slot::Null => Plain::Null { absent: false },
            Slot::Bool(value) => Plain::Bool(value),
            Slot::Number(number) => Plain::Number(number),
            Slot::Text(place) => {
                Plain::Text(text::units(self.body.text(self.message.body(), place)).collect())
            }
            Slot::Undefined => Plain::Undefined,
        };
        self.bodies.insert(number, value.clone());
        value
    }
}

fn next<'v>(value: &'v Value, step: &Step) -> Option<&'v Value> {
    match (step, value) {
        (Step::Member(name), Value::Object(object)) => object.get(name),
        (Step::Element(index), Value::Array(array)) => array.get(*index),
        _ => None,
    }
}

fn found<'v>(document: &'v Value, steps: &[Step]) -> Option<&'v Value> {
    steps.iter().try_fold(document, next)
}

/// Where the way ends, and what there is instead.
fn missing(document: &Value, steps: &[Step]) -> Option<String> {
    let mut at = document;
    for (count, step) in steps.iter().enumerate() {
        let Some(inner) = next(at, step) else {
            let place = match steps.get(..count) {
                None | Some([]) => "the body".to_owned(),
                Some(before) => format!("{:?}", written(before)),
            };
            return Some(match (step, at) {
                (Step::Member(name), Value::Object(object)) => {
                    let mut names: Vec<String> =
                        object.keys().take(NAMED_MAX).map(|known| format!("{known:?}")).collect();
                    if object.len() > NAMED_MAX {
                        names.push("…".to_owned());
                    }
                    match object.keys().find(|known| equal_names(known, name)) {
                        Some(other) => format!("{place} has a member {other:?}, in other letters"),
                        None if names.is_empty() => format!("{place} is empty"),
                        None => format!("{place} has no member {name:?}, only {}", names.join(", ")),
                    }
                }
                (Step::Member(_), Value::Array(_)) => format!("{place} is an array: name an element, [0]"),
                (Step::Element(_), Value::Array(array)) => format!("{place} has {} elements", array.len()),
                (Step::Element(_), Value::Object(_)) => format!("{place} is an object, not an array"),
                _ => format!("{place} is a plain value"),
            });
        };
        at = inner;
    }
    None
}

fn written(steps: &[Step]) -> String {
    let mut path = String::new();
    for step in steps {
        match step {
            Step::Member(name) if path.is_empty() => path.push_str(name),
            Step::Member(name) => path.extend([".", name]),
            Step::Element(index) => path.push_str(&format!("[{index}]")),
            _ => {}
        }
    }
    path
}
