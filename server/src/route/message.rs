//! Owns messages as files of vectors describe them: source, properties, body.
//!
//! Texts in vectors are sequences of UTF-16 code units that JSON escapes can leave unpaired. JSON readers refuse those,
//! so [`parse_json`] sets a stand-in of plane 16 for each; whoever uses a text decides what becomes of it.

use base64::Engine as _;
use edgehub_routing::{MessageRejected, MessageSource, MessageView, PropertyName, Text};
use serde_json::{Map, Value};

/// The first of the 2,048 stand-ins for unpaired surrogates.
const STAND_IN_FIRST: u32 = 0x10_F800;

/// Where a message comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    /// Its system properties say it.
    System,
    Twin,
    /// A path that no sender needs to have.
    Path(String),
}

/// A message out of a file.
#[derive(Clone, Debug)]
pub(super) struct Message {
    properties: Vec<(String, Option<String>)>,
    system: Vec<(String, Option<String>)>,
    body: Vec<u8>,
    origin: Origin,
}

impl Message {
    /// Reads the message of a vector. Everything in it is optional.
    ///
    /// # Errors
    /// What is not as it has to be, in words.
    pub(super) fn parse(message: &Value) -> Result<Message, String> {
        if !message.is_object() && !message.is_null() {
            return Err(format!("a message must be an object, not {message}"));
        }
        let mut system = pairs(&message["systemProperties"], "systemProperties")?;
        let source = &message["source"];
        for (member, name) in
            [("deviceId", "connectionDeviceId"), ("moduleId", "connectionModuleId"), ("output", "outputName")]
        {
            if let Some(value) = source.get(member)
                && !system.iter().any(|(known, _)| known.eq_ignore_ascii_case(name))
            {
                system.push((name.to_owned(), value.as_str().map(str::to_owned)));
            }
        }
        let origin = match source["kind"].as_str() {
            Some("twin") => Origin::Twin,
            Some("path") => Origin::Path(source["path"].as_str().unwrap_or_default().to_owned()),
            Some("device" | "module") | None => Origin::System,
            Some(other) => return Err(format!("there is no kind of source {other:?}")),
        };
        Ok(Message {
            properties: pairs(&message["properties"], "properties")?,
            system,
            body: body(&message["body"])?,
            origin,
        })
    }

    /// The path of the message's source.
    ///
    /// # Errors
    /// A message that has to be refused.
    pub(super) fn path(&self) -> Result<String, MessageRejected> {
        match &self.origin {
            Origin::Path(path) => Ok(format!("{}/", path.trim().trim_end_matches('/'))),
            Origin::System | Origin::Twin => self.source().path(),
        }
    }

    /// Where the message comes from, by its system properties.
    pub(super) fn source(&self) -> MessageSource<'_> {
        let kind = self.system_value("messageType").flatten().unwrap_or_default();
        if self.origin == Origin::Twin || kind.eq_ignore_ascii_case("twinChangeNotification") {
            return MessageSource::TwinChange;
        }
        match self.system_value("connectionModuleId") {
            None => MessageSource::Device,
            Some(module) => MessageSource::Module {
                module: module.unwrap_or_default(),
                output: self.system_value("outputName").map(Option::unwrap_or_default),
            },
        }
    }

    /// Whether its source is a path that no sender needs to have.
    pub(super) fn is_path(&self) -> bool {
        matches!(self.origin, Origin::Path(_))
    }

    /// Whether a property holds what no message from the network can hold: an unpaired surrogate.
    pub(super) fn is_impossible(&self) -> bool {
        let all = self.properties.iter().chain(&self.system);
        all.into_iter().any(|(name, value)| {
            name.chars()
                .chain(value.iter().flat_map(|value| value.chars()))
                .any(|unit| surrogate(unit).is_some())
        })
    }

    fn system_value(&self, name: &str) -> Option<Option<&str>> {
        let found = self.system.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_deref())
    }
}

impl MessageView for Message {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        look_up(&self.properties, name)
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        look_up(&self.system, name)
    }

    fn body(&self) -> &[u8] {
        &self.body
    }
}

fn look_up<'m>(properties: &'m [(String, Option<String>)], name: &PropertyName) -> Text<'m> {
    match properties.iter().find(|(known, _)| name.matches(known)) {
        None => Text::Undefined,
        Some((_, None)) => Text::Null,
        Some((_, Some(value))) => Text::Text(value),
    }
}

fn pairs(map: &Value, member: &str) -> Result<Vec<(String, Option<String>)>, String> {
    let empty = Map::new();
    let map = match map {
        Value::Null => &empty,
        Value::Object(map) => map,
        other => return Err(format!("{member} must be an object, not {other}")),
    };
    let pair = |(name, value): (&String, &Value)| match value {
        Value::Null => Ok((name.clone(), None)),
        Value::String(value) => Ok((name.clone(), Some(value.clone()))),
        other => Err(format!("{member}.{name} must be a text or null, not {other}")),
    };
    map.iter().map(pair).collect()
}

fn body(body: &Value) -> Result<Vec<u8>, String> {
    if let Some(json) = body.get("json") {
        return Ok(written_json(json).into_bytes());
    }
    if let Some(encoded) = body.get("base64") {
        let encoded = encoded.as_str().unwrap_or_default();
        return base64::engine::general_purpose::STANDARD
            .decode(encoded)
            .map_err(|error| format!("body.base64: {error}"));
    }
    let text = body["text"].as_str().unwrap_or_default();
    match body["encoding"].as_str().unwrap_or("utf-8") {
        "utf-8" => Ok(replaced(text).into_bytes()),
        "utf-16" => Ok(units(text).into_iter().flat_map(u16::to_le_bytes).collect()),
        "utf-32" => {
            Ok(replaced(text).chars().flat_map(|character| u32::from(character).to_le_bytes()).collect())
        }
        other => Err(format!("body.encoding must be utf-8, utf-16 or utf-32, not {other:?}")),
    }
}

/// Reads JSON whose texts may hold unpaired surrogates, which become stand-ins.
///
/// # Errors
/// The text is not JSON.
pub(super) fn parse_json(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).or_else(|error| match with_stand_ins(text) {
        Some(text) => serde_json::from_str(&text),
        None => Err(error),
    })
}

/// The text with stand-ins for the escapes of unpaired surrogates; none if there is no such escape.
fn with_stand_ins(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let escape = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u32::from_str_radix(digits, 16).ok().filter(|_| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
    };
    let mut written = String::with_capacity(text.len());
    let mut copied = 0;
    let mut at = 0;
    while let Some(step) = memchr(bytes, at) {
        at = step;
        let unit = escape(at);
        let paired = matches!(unit, Some(0xD800..=0xDBFF)) && matches!(escape(at + 6), Some(0xDC00..=0xDFFF));
        match unit {
            Some(_) if paired => at += 12,
            Some(unit @ 0xD800..=0xDFFF) => {
                written.push_str(text.get(copied..at)?);
                written.push(char::from_u32(STAND_IN_FIRST + (unit - 0xD800))?);
                at += 6;
                copied = at;
            }
            Some(_) => at += 6,
            None => at += 2,
        }
    }
    if copied == 0 {
        return None;
    }
    written.push_str(text.get(copied..)?);
    Some(written)
}

fn memchr(bytes: &[u8], from: usize) -> Option<usize> {
    let rest = bytes.get(from..)?;
    rest.iter().position(|byte| *byte == b'\\').map(|place| from + place)
}

fn surrogate(character: char) -> Option<u16> {
    let unit = u32::from(character).checked_sub(STAND_IN_FIRST)?;
    u16::try_from(0xD800 + unit).ok()
}

/// The code units of a text, stand-ins as what they stand for.
pub(super) fn units(text: &str) -> Vec<u16> {
    let mut units = Vec::with_capacity(text.len());
    for character in text.chars() {
        match surrogate(character) {
            Some(unit) => units.push(unit),
            None => units.extend_from_slice(character.encode_utf16(&mut [0; 2])),
        }
    }
    units
}

/// A text with each stand-in as the escape of a condition's or of JSON's text.
pub(super) fn escaped(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    for character in text.chars() {
        match surrogate(character) {
            Some(unit) => written.push_str(&format!("\\u{unit:04X}")),
            None => written.push(character),
        }
    }
    written
}

/// A text with the replacement character for each stand-in, as encoders write it.
fn replaced(text: &str) -> String {
    let replace =
        |character| if surrogate(character).is_some() { char::REPLACEMENT_CHARACTER } else { character };
    text.chars().map(replace).collect()
}

fn written_json(json: &Value) -> String {
    escaped(&json.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpaired_surrogates_come_through() {
        let value = parse_json(r#"{"a": "x\ud83d", "b": "\ud83d\ude00\\ud83d", "c": "\uDE00"}"#).unwrap();
        assert_eq!(units(value["a"].as_str().unwrap()), [0x78, 0xD83D]);
        assert_eq!(value["b"], "😀\\ud83d");
        assert_eq!(escaped(value["c"].as_str().unwrap()), "\\uDE00");
        assert!(parse_json(r#"{"a": "\ud83d" "#).is_err());
        let message = Message::parse(&parse_json(r#"{"body": {"json": {"s": "\ud83d"}}}"#).unwrap()).unwrap();
        assert_eq!(message.body, br#"{"s":"\uD83D"}"#);
        assert!(!message.is_impossible());
        let message = Message::parse(&parse_json(r#"{"properties": {"s": "\ud83d"}}"#).unwrap()).unwrap();
        assert!(message.is_impossible());
    }

    #[test]
    fn messages_have_sources_and_bodies() {
        let parse = |text: &str| Message::parse(&serde_json::from_str(text).unwrap());
        let path = |text: &str| parse(text).unwrap().path();
        assert_eq!(path("{}").as_deref(), Ok("/messages/"));
        assert_eq!(path(r#"{"source": {"kind": "twin"}}"#).as_deref(), Ok("/twinChangeNotifications/"));
        assert_eq!(path(r#"{"source": {"kind": "path", "path": "/a/b"}}"#).as_deref(), Ok("/a/b/"));
        let module = r#"{"source": {"kind": "module", "moduleId": "m", "output": "o"}}"#;
        assert_eq!(path(module).as_deref(), Ok("/messages/modules/m/outputs/o/"));
        assert!(path(r#"{"source": {"kind": "module", "moduleId": " "}}"#).is_err());
        assert_eq!(parse(r#"{"body": {"text": "é", "encoding": "utf-16"}}"#).unwrap().body, [0xE9, 0]);
        assert_eq!(parse(r#"{"body": {"base64": "AQI="}}"#).unwrap().body, [1, 2]);
        for wrong in [
            "5",
            r#"{"properties": 1}"#,
            r#"{"properties": {"a": 1}}"#,
            r#"{"body": {"text": "", "encoding": "x"}}"#,
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
