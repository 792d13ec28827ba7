//! Owns the vector files and the messages in them.

use base64::Engine;
use edgehub_routing::{MessageSource, MessageView, PropertyName, Text};
use serde_json::{Map, Value};

/// A file of vectors.
pub(crate) struct Vectors {
    file: Value,
}

impl Vectors {
    /// Reads one of `tests/vectors/`.
    pub(crate) fn open(name: &str) -> Vectors {
        let path = format!("{}/tests/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).expect("the vector file is there");
        Vectors { file: serde_json::from_str(&text).expect("the vector file is JSON") }
    }

    /// Checks all vectors of `kind`; a check returns what it found if that is not what is expected.
    pub(crate) fn check(
        &self,
        kind: &str,
        expected_count: usize,
        check: impl Fn(&Value) -> Result<(), String>,
    ) {
        let vectors = self.file["vectors"].as_array().expect("a list");
        let vectors: Vec<_> = vectors.iter().filter(|vector| vector["kind"] == kind).collect();
        let failures: Vec<String> = vectors
            .iter()
            .filter_map(|vector| check(vector).err().map(|error| format!("{}: {error}", vector["name"])))
            .collect();
        assert!(
            failures.is_empty(),
            "{} of {} fail:\n{}",
            failures.len(),
            vectors.len(),
            failures.join("\n")
        );
        assert_eq!(vectors.len(), expected_count, "vectors of kind {kind}");
    }

    /// The file's edge device id.
    pub(crate) fn edge_device_id(&self) -> &str {
        self.file["edgeDeviceId"].as_str().expect("a text")
    }

    /// A message, or the one of that name.
    pub(crate) fn message(&self, value: &Value) -> Message {
        match value {
            Value::String(name) => Message::new(&self.file["messages"][name]),
            other => Message::new(other),
        }
    }
}

/// The message of a vector.
#[derive(Debug, Default)]
pub(crate) struct Message {
    pub(crate) properties: Vec<(String, Option<String>)>,
    pub(crate) system: Vec<(String, Option<String>)>,
    pub(crate) body: Vec<u8>,
    twin: bool,
}

impl Message {
    fn new(message: &Value) -> Message {
        let mut system = pairs(&message["systemProperties"]);
        let source = &message["source"];
        for (member, name) in
            [("deviceId", "connectionDeviceId"), ("moduleId", "connectionModuleId"), ("output", "outputName")]
        {
            if let Some(value) = source.get(member)
                && !system.iter().any(|(known, _)| known == name)
            {
                system.push((name.to_owned(), value.as_str().map(str::to_owned)));
            }
        }
        Message {
            properties: pairs(&message["properties"]),
            system,
            body: body(&message["body"]),
            twin: source["kind"] == "twin",
        }
    }

    fn system_value(&self, name: &str) -> Option<&Option<String>> {
        self.system.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// Where the message comes from, by its system properties.
    pub(crate) fn source(&self) -> MessageSource<'_> {
        let kind = self.system_value("messageType").and_then(|kind| kind.as_deref()).unwrap_or_default();
        if self.twin || kind.eq_ignore_ascii_case("twinChangeNotification") {
            return MessageSource::TwinChange;
        }
        match self.system_value("connectionModuleId") {
            None => MessageSource::Device,
            Some(module) => MessageSource::Module {
                module: module.as_deref().unwrap_or_default(),
                output: self.system_value("outputName").map(|output| output.as_deref().unwrap_or_default()),
            },
        }
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

fn pairs(map: &Value) -> Vec<(String, Option<String>)> {
    let empty = Map::new();
    let map = map.as_object().unwrap_or(&empty);
    map.iter().map(|(name, value)| (name.clone(), value.as_str().map(str::to_owned))).collect()
}

fn body(body: &Value) -> Vec<u8> {
    if let Some(json) = body.get("json") {
        return json.to_string().into_bytes();
    }
    if let Some(encoded) = body["base64"].as_str() {
        return base64::engine::general_purpose::STANDARD.decode(encoded).expect("base64");
    }
    let text = body["text"].as_str().unwrap_or_default();
    match body["encoding"].as_str().unwrap_or("utf-8") {
        "utf-8" => text.as_bytes().to_vec(),
        "utf-16" => text.encode_utf16().flat_map(u16::to_le_bytes).collect(),
        "utf-32" => text.chars().flat_map(|character| (character as u32).to_le_bytes()).collect(),
        other => panic!("encoding {other}"),
    }
}
