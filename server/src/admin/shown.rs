//! Owns how a stored message is shown to an operator.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use edgehub_broker::message::{Message, PropertyName, SenderCache, SystemProperty};
use edgehub_storage::StoreTime;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A message as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ShownMessage {
    /// The stored bytes are a message.
    Read(Box<ReadMessage>),
    /// They are not.
    Unreadable {
        /// Why not.
        unreadable: String,
        /// Length of the stored bytes.
        stored_bytes: u64,
    },
}

/// The parts of a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadMessage {
    /// The hub's own id of the message.
    pub id: String,
    /// Who sent it: `device` or `device/module`.
    pub sender: String,
    /// The output of the module that sent it.
    pub output: Option<String>,
    /// Size as it counts against the limit, in bytes.
    pub size_bytes: u64,
    /// Length of the body, in bytes.
    pub body_bytes: u64,
    /// System properties by their internal names.
    pub system: BTreeMap<String, Option<String>>,
    /// Application properties, in the order in which they were sent.
    pub properties: Vec<ShownProperty>,
    /// The body, if it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<ShownBody>,
}

/// An application property.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownProperty {
    /// Its name.
    pub name: String,
    /// Its text; `null` when it was sent without one.
    pub value: Option<String>,
}

/// A body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShownBody {
    /// It is UTF-8.
    Text(String),
    /// It is not (base64, RFC 4648 §4).
    Base64(String),
}

impl ShownMessage {
    /// Reads a stored record. Damage is shown, not hidden.
    pub fn from_record(record: &Bytes, bodies: bool, senders: &mut SenderCache) -> Self {
        match Message::from_record(record, senders) {
            Ok(message) => Self::Read(Box::new(ReadMessage::new(&message, bodies))),
            Err(error) => {
                Self::Unreadable { unreadable: error.to_string(), stored_bytes: record.len() as u64 }
            }
        }
    }
}

impl ReadMessage {
    fn new(message: &Message, bodies: bool) -> Self {
        let mut system = BTreeMap::new();
        let mut properties = Vec::new();
        for property in message.properties.iter() {
            let value = (!property.null).then(|| property.value.to_owned());
            match property.name {
                // It stands apart, as `output`.
                PropertyName::System(SystemProperty::OutputName) => {}
                PropertyName::System(known) => {
                    system.insert(known.name().to_owned(), value);
                }
                PropertyName::Application(name) => {
                    properties.push(ShownProperty { name: name.to_owned(), value });
                }
            }
        }
        Self {
            id: message.id.to_string(),
            sender: message.sender.identity.to_string(),
            output: message.output().map(str::to_owned),
            size_bytes: message.size_bytes() as u64,
            body_bytes: message.body.len() as u64,
            system,
            properties,
            body: bodies.then(|| ShownBody::new(&message.body)),
        }
    }

    /// The content type, if the sender gave one.
    pub fn content_type(&self) -> Option<&str> {
        self.system.get(SystemProperty::ContentType.name())?.as_deref()
    }
}

impl ShownBody {
    fn new(body: &[u8]) -> Self {
        match std::str::from_utf8(body) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Base64(STANDARD.encode(body)),
        }
    }
}

/// A time on the store's clock in RFC 3339, to the millisecond.
pub fn shown_time(at: StoreTime) -> String {
    let nanos = i128::from(at.as_millis()) * 1_000_000;
    let shown = OffsetDateTime::from_unix_timestamp_nanos(nanos).ok().and_then(|at| at.format(&Rfc3339).ok());
    // Years beyond 9999 have no such form.
    shown.unwrap_or_else(|| format!("{} ms since 1970", at.as_millis()))
}
