//! Messages as AMQP clients send and receive them, and the hub's own form.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use crate::amqp::encode::{put_string, put_value};
use crate::amqp::{
    Body, Condition, Error, Message as Encoded, MessageEncoder, MessageId, MessageProperties, Payload, Text,
    Value, kind_of, lock_token_tag, parse_timestamp, property_text, put_property, timestamp_text,
};
use crate::backend::Target;
use crate::message::{
    Message, Properties, PropertyKind, PropertyName, Sender, SystemProperty, Value as PropertyValue,
};

/// Room for the sections in front of a body; larger ones grow.
const HEAD_BYTES: usize = 256;

/// Names of application properties that stand for system properties.
const APPLICATION_NAMES: [(&str, SystemProperty); 4] = [
    ("iothub-message-schema", SystemProperty::MessageSchema),
    ("iothub-creation-time-utc", SystemProperty::CreationTime),
    ("iothub-operation", SystemProperty::Operation),
    ("iothub-outputname", SystemProperty::OutputName),
];

/// Reads one message; the body stays a slice of the transfer. Empty texts of properties and annotations count as
/// absent. Application properties that are no text keep their type beside their text form; lists and maps are left out.
///
/// # Errors
/// When a section cannot be decoded, or the body is not data.
pub(crate) fn message(encoded: &Encoded, sender: Arc<Sender>) -> Result<Message, Error> {
    let malformed =
        |error| Error::new(Condition::DECODE_ERROR, format!("the message cannot be read: {error}"));
    let mut system: SmallVec<[(SystemProperty, Text); 8]> = SmallVec::new();
    let mut add = |property, text: Option<Text>| {
        if let Some(text) = text.filter(|text| !text.as_bytes().is_empty()) {
            system.push((property, text));
        }
    };
    let properties = encoded.properties().map_err(malformed)?;
    add(SystemProperty::MessageId, properties.message_id.map(MessageId::into_text));
    add(SystemProperty::CorrelationId, properties.correlation_id.map(MessageId::into_text));
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
    let mut application: SmallVec<[(Text, Text, PropertyKind); 8]> = SmallVec::new();
    for entry in encoded.application_properties().map_err(malformed)? {
        let (key, value) = entry.map_err(malformed)?;
        let Some((text, kind)) = property_text(&value).zip(kind_of(&value)) else {
            tracing::debug!(property = key.as_str(), "A property that is a list or map is left out");
            continue;
        };
        match APPLICATION_NAMES.iter().find(|(name, _)| key == *name) {
            Some((_, property)) => system.push((*property, text)),
            None => application.push((key, text, kind)),
        }
    }
    let body: Bytes = encoded.body.data().ok_or_else(|| {
        Error::new(Condition::NOT_IMPLEMENTED, "the body must be one or more data sections")
    })?;
    let named = system
        .iter()
        .map(|(property, text)| (PropertyName::System(*property), text.as_str(), PropertyKind::Text));
    let free = application
        .iter()
        .map(|(name, text, kind)| (PropertyName::Application(name.as_str()), text.as_str(), *kind));
    Ok(Message::new(sender, Properties::copied_with_kinds(named.chain(free)), body))
}

/// The document that is the body of a twin request or a method answer: data, or a value that is text or binary.
///
/// # Errors
/// When the body is something else.
pub(super) fn document(encoded: &Encoded) -> Result<Bytes, Error> {
    if let Some(data) = encoded.body.data() {
        return Ok(data);
    }
    match (&encoded.body, encoded.value()) {
        (Body::Value(_), Ok(Some(Value::String(text)))) => Ok(text.into_bytes()),
        (Body::Value(_), Ok(Some(Value::Binary(bytes)))) => Ok(bytes),
        _ => Err(Error::new(Condition::NOT_IMPLEMENTED, "the body must be one or more data sections")),
    }
}

/// The value of an annotation, which is written where it stands.
enum Annotation<'a> {
    Text(&'a str),
    Other(Value),
}

impl Annotation<'_> {
    fn put(out: &mut BytesMut, value: Self) {
        match value {
            Self::Text(text) => put_string(out, text),
            Self::Other(value) => put_value(out, &value),
        }
    }
}

/// Writes a message for a client, and the delivery tag of its lock token, if it has one that is a GUID. The body is not
/// copied. Values that cannot be written in their type are left out.
pub(super) fn encode(message: &Message, target: &Target) -> (Payload, Option<[u8; 16]>) {
    let properties = &message.properties;
    let text = |property| properties.system_bytes(property).and_then(|bytes| Text::new(bytes).ok());
    let held = |property| match properties.system(property) {
        PropertyValue::Text(text) => Some(text),
        PropertyValue::Absent | PropertyValue::Null => None,
    };
    let lock_token = held(SystemProperty::LockToken);
    let lock = lock_token.and_then(lock_token_tag);
    let mut annotations: SmallVec<[(&str, Annotation<'_>); 8]> = SmallVec::new();
    let mut annotate = |name, value| {
        if let Some(value) = value {
            annotations.push((name, value));
        }
    };
    let enqueued = held(SystemProperty::EnqueuedTime).and_then(parse_timestamp);
    annotate("iothub-enqueuedtime", enqueued.map(|millis| Annotation::Other(Value::TimestampMillis(millis))));
    let count = held(SystemProperty::DeliveryCount).and_then(|text| text.parse().ok());
    annotate("iothub-deliverycount", count.map(|count| Annotation::Other(Value::Ubyte(count))));
    annotate("x-opt-lock-token", lock_token.map(Annotation::Text));
    let number = held(SystemProperty::SequenceNumber).and_then(|text| text.parse().ok());
    annotate("x-opt-sequence-number", number.map(|number| Annotation::Other(Value::Ulong(number))));
    match target {
        Target::Input(input) => {
            annotate("x-opt-input-name", Some(Annotation::Text(input)));
            let identity = &message.sender.identity;
            let device = held(SystemProperty::OriginalSenderDeviceId).unwrap_or(identity.device_id());
            annotate("iothub-connection-device-id", Some(Annotation::Text(device)));
            let module = held(SystemProperty::OriginalSenderModuleId).or(identity.module_id());
            annotate("iothub-connection-module-id", module.map(Annotation::Text));
        }
        // The device is the sender of what is sent to itself, which tells it nothing.
        Target::Device => {}
    }
    annotate("dt-subject", held(SystemProperty::ComponentName).map(Annotation::Text));

    // What finds no credit is written anew.
    let mut encoder = MessageEncoder::for_at_once(HEAD_BYTES);
    encoder.annotations_by(annotations, Annotation::put).properties(&MessageProperties {
        message_id: text(SystemProperty::MessageId).map(MessageId::String),
        correlation_id: text(SystemProperty::CorrelationId).map(MessageId::String),
        user_id: properties.system_bytes(SystemProperty::UserId),
        to: text(SystemProperty::To),
        content_type: text(SystemProperty::ContentType),
        content_encoding: text(SystemProperty::ContentEncoding),
        absolute_expiry_time_millis: text(SystemProperty::AbsoluteExpiryTime)
            .and_then(|text| parse_timestamp(&text)),
        ..MessageProperties::default()
    });
    let own = APPLICATION_NAMES.iter().filter(|(_, property)| *property != SystemProperty::OutputName);
    let own: SmallVec<[(&str, Text); 3]> = own
        .filter_map(|(name, property)| Some((*name, text(*property)?)))
        // A property that the sender named like one of ours wins.
        .filter(|(name, _)| properties.application(|sent| sent == *name) == PropertyValue::Absent)
        .collect();
    let own = own.iter().map(|(name, text)| (*name, (text.as_str(), PropertyKind::Text)));
    let sent = properties.typed_properties().map(|(name, text, kind)| (name, (text, kind)));
    encoder.application(sent.chain(own), put_property);
    (encoder.data(message.body.clone()), lock)
}
