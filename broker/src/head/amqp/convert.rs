//! Messages as AMQP clients send them, read into the hub's own form.

use std::sync::Arc;

use bytes::Bytes;

use crate::amqp::{Condition, Error, Message as Encoded, Text, Value, property_text, timestamp_text};
use crate::message::{Message, Properties, PropertyName, Sender, SystemProperty};

/// Names of application properties that stand for system properties.
const APPLICATION_NAMES: [(&str, SystemProperty); 4] = [
    ("iothub-message-schema", SystemProperty::MessageSchema),
    ("iothub-creation-time-utc", SystemProperty::CreationTime),
    ("iothub-operation", SystemProperty::Operation),
    ("iothub-outputname", SystemProperty::OutputName),
];

/// Reads one message; the body stays a slice of the transfer. Empty texts of properties and annotations count as
/// absent. Application properties that are no text get their text form; lists and maps are left out.
///
/// # Errors
/// When a section cannot be decoded, or the body is not data.
pub(crate) fn message(encoded: &Encoded, sender: Arc<Sender>) -> Result<Message, Error> {
    let malformed =
        |error| Error::new(Condition::DECODE_ERROR, format!("the message cannot be read: {error}"));
    let mut system: Vec<(SystemProperty, Text)> = Vec::new();
    let mut add = |property, text: Option<Text>| {
        system.extend(text.filter(|text| !text.as_str().is_empty()).map(|text| (property, text)));
    };
    let properties = encoded.properties().map_err(malformed)?;
    add(SystemProperty::MessageId, properties.message_id.map(|id| id.to_string().into()));
    add(SystemProperty::CorrelationId, properties.correlation_id.map(|id| id.to_string().into()));
    add(SystemProperty::ContentType, properties.content_type);
    add(SystemProperty::ContentEncoding, properties.content_encoding);
    add(SystemProperty::To, properties.to);
    add(SystemProperty::UserId, properties.user_id.and_then(|bytes| Text::new(bytes).ok()));
    let expiry = properties.absolute_expiry_time_millis.and_then(timestamp_text);
    add(SystemProperty::AbsoluteExpiryTime, expiry.map(Text::from));
    for entry in encoded.annotations().map_err(malformed)? {
        let (key, value) = entry.map_err(malformed)?;
        match (key.as_str(), value) {
            ("iothub-enqueuedtime", Value::TimestampMillis(millis)) => {
                add(SystemProperty::EnqueuedTime, timestamp_text(millis).map(Text::from));
            }
            ("iothub-deliverycount", Value::Ubyte(count)) => {
                add(SystemProperty::DeliveryCount, Some(count.to_string().into()));
            }
            ("x-opt-sequence-number", Value::Ulong(number)) if number > 0 => {
                add(SystemProperty::SequenceNumber, Some(number.to_string().into()));
            }
            ("x-opt-lock-token", Value::String(text)) => add(SystemProperty::LockToken, Some(text)),
            ("iothub-interface-id", Value::String(text)) => add(SystemProperty::InterfaceId, Some(text)),
            ("dt-subject", Value::String(text)) => add(SystemProperty::ComponentName, Some(text)),
            _ => {}
        }
    }
    let mut application: Vec<(Text, Text)> = Vec::new();
    for entry in encoded.application_properties().map_err(malformed)? {
        let (key, value) = entry.map_err(malformed)?;
        let Some(text) = property_text(&value) else {
            tracing::debug!(property = key.as_str(), "A property that is a list or map is left out");
            continue;
        };
        match APPLICATION_NAMES.iter().find(|(name, _)| key.as_str() == *name) {
            Some((_, property)) => system.push((*property, text)),
            None => application.push((key, text)),
        }
    }
    let body: Bytes = encoded.body.data().ok_or_else(|| {
        Error::new(Condition::NOT_IMPLEMENTED, "the body must be one or more data sections")
    })?;
    let named = system.iter().map(|(property, text)| (PropertyName::System(*property), text.as_str()));
    let free =
        application.iter().map(|(name, text)| (PropertyName::Application(name.as_str()), text.as_str()));
    Ok(Message::new(sender, Properties::copied_from(named.chain(free)), body))
}
