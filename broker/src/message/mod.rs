//! The one message type: sender, properties and body as slices of the buffer they arrived in.

mod properties;
mod record;

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;
use uuid::Uuid;

use crate::identity::Identity;

pub use properties::{
    PROPERTIES_MAX, Properties, PropertiesBuilder, PropertiesError, Property, PropertyKind, PropertyName,
    SystemProperty, Value,
};
pub use record::{RecordError, SenderCache};

/// Largest message in bytes: body, names and values of all properties, counted as [`Message::size_bytes`] says.
pub const MESSAGE_BYTES_MAX: usize = 262_144;

/// Who sent a message, as far as every message of a connection has it in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sender {
    /// The authenticated identity of the connection.
    pub identity: Identity,
    /// Whether the sender is this edge device or one of its modules, or something below it.
    pub origin: Origin,
    /// The plug-and-play model that the connection announced.
    pub model_id: Option<Arc<str>>,
}

/// Where a message entered (`edgeHubOriginInterface`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From this edge device or a module on it.
    Internal,
    /// From a leaf device or a child hub.
    Downstream,
}

impl Origin {
    /// The text form of the system property.
    pub const fn as_str(self) -> &'static str {
        match self {
            Origin::Internal => "internal",
            Origin::Downstream => "downstream",
        }
    }
}

/// A message between its arrival and its delivery.
///
/// Cloning is cheap: all bytes are shared.
#[derive(Debug, Clone)]
pub struct Message {
    /// Who sent it.
    pub sender: Arc<Sender>,
    /// The hub's own id of the message (`edgeMessageId`), new for every accepted message.
    pub id: Uuid,
    /// System and application properties, as sent.
    pub properties: Properties,
    /// The body, unchanged.
    pub body: Bytes,
    /// When it is not to be sent any more, set for each delivery; not part of the stored message.
    pub expires_at: Option<Instant>,
}

impl Message {
    /// A message as a head makes it; the id is new.
    pub fn new(sender: Arc<Sender>, properties: Properties, body: Bytes) -> Self {
        let id = uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid();
        Self { sender, id, properties, body, expires_at: None }
    }

    /// Whether it is not to be sent any more at this time.
    pub fn is_expired(&self, now: Instant) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }

    /// The output of the module that sent it (`$.on`), if it named one.
    pub fn output(&self) -> Option<&str> {
        match self.properties.system(SystemProperty::OutputName) {
            Value::Text(text) => Some(text),
            Value::Null | Value::Absent => None,
        }
    }

    /// The size that counts against [`MESSAGE_BYTES_MAX`]: bytes of the body, and of the names and values of all
    /// properties, those included that the hub adds. Texts count in UTF-8 bytes.
    ///
    /// Where the message entered counts the same on every hub, whichever it was, so that a parent takes all that its
    /// child has accepted.
    pub fn size_bytes(&self) -> usize {
        const ADDED: usize = "edgeMessageId".len()
            + 36
            + "edgeHubOriginInterface".len()
            + Origin::Internal.as_str().len()
            + "connectionDeviceId".len();
        let identity = &self.sender.identity;
        let module = identity.module_id().map_or(0, |id| "connectionModuleId".len() + id.len());
        let model = self.sender.model_id.as_ref().map_or(0, |id| "modelId".len() + id.len());
        self.body.len() + self.properties.size_bytes() + ADDED + identity.device_id().len() + module + model
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_counts_a_message_as_its_child_did() {
        let of = |origin| {
            let identity = Identity::parse("edge1/m1").unwrap();
            let sender = Arc::new(Sender { identity, origin, model_id: Some("dtmi:example:model;1".into()) });
            let properties = Properties::copied_from([(PropertyName::Application("level"), "hot")]);
            Message::new(sender, properties, Bytes::from_static(b"{}")).size_bytes()
        };
        assert_eq!(of(Origin::Internal), of(Origin::Downstream));
        let names = "edgeMessageIdedgeHubOriginInterfaceconnectionDeviceIdconnectionModuleIdmodelIdlevel";
        let values = 36 + "internaledge1m1dtmi:example:model;1hot".len();
        assert_eq!(of(Origin::Internal), names.len() + values + 2);
    }
}
