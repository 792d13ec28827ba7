//! Cloud-to-device messages as services send them over AMQP.

use bytes::Bytes;
use edgehub_broker::amqp::{
    Body, Condition, Delivery, Error, Message as Encoded, Text, Value, parse_batch, property_text,
};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Properties, PropertyName, SystemProperty};
use percent_encoding::percent_decode_str;

use crate::cloud_to_device::{Ack, NewMessage};

/// The application property that asks for feedback.
const ACK: &str = "iothub-ack";

/// Reads a message, and for which device it is.
pub(super) fn read(delivery: &Delivery) -> Result<(Identity, NewMessage), Error> {
    let malformed =
        |error| Error::new(Condition::DECODE_ERROR, format!("the message cannot be read: {error}"));
    let batch = parse_batch(delivery.format, &delivery.payload).map_err(malformed)?;
    let [encoded] = &batch[..] else {
        return Err(Error::new(Condition::NOT_IMPLEMENTED, "batches of messages are not served"));
    };
    let given = encoded.properties().map_err(malformed)?;
    let device = given.to.as_ref().and_then(|to| device(to.as_str())).ok_or_else(|| {
        Error::new(Condition::INVALID_FIELD, "the property to must be /devices/{id}/messages/devicebound")
    })?;
    let mut properties: Vec<(PropertyName<'_>, Text)> = Vec::new();
    let mut add = |name, text: Option<Text>| {
        let text = text.filter(|text| !text.as_str().is_empty());
        properties.extend(text.map(|text| (PropertyName::System(name), text)));
    };
    add(SystemProperty::CorrelationId, given.correlation_id.map(|id| id.to_string().into()));
    add(SystemProperty::ContentType, given.content_type);
    add(SystemProperty::ContentEncoding, given.content_encoding);
    add(SystemProperty::UserId, given.user_id.and_then(|bytes| Text::new(bytes).ok()));
    let mut ack = Ack::None;
    let mut application: Vec<(Text, Text)> = Vec::new();
    for entry in encoded.application_properties().map_err(malformed)? {
        let (name, value) = entry.map_err(malformed)?;
        // Lists and maps have no text.
        let Some(text) = property_text(&value) else { continue };
        if name.as_str() == ACK {
            ack = Ack::named(text.as_str()).ok_or_else(|| {
                Error::new(Condition::INVALID_FIELD, "iothub-ack must be none, positive, negative or full")
            })?;
            add(SystemProperty::Ack, Some(text));
        } else {
            application.push((name, text));
        }
    }
    let named = properties.iter().map(|(name, text)| (*name, text.as_str()));
    let free =
        application.iter().map(|(name, text)| (PropertyName::Application(name.as_str()), text.as_str()));
    let message = NewMessage {
        message_id: given.message_id.map(|id| id.to_string()).filter(|id| !id.is_empty()),
        ack,
        expires_millis: given.absolute_expiry_time_millis,
        properties: Properties::copied_from(named.chain(free)),
        body: body(encoded)?,
    };
    Ok((device, message))
}

/// Data, or a value that is text or binary.
fn body(encoded: &Encoded) -> Result<Bytes, Error> {
    if let Some(data) = encoded.body.data() {
        return Ok(data);
    }
    match (&encoded.body, encoded.value()) {
        (Body::Value(_), Ok(Some(Value::String(text)))) => Ok(text.into_bytes()),
        (Body::Value(_), Ok(Some(Value::Binary(bytes)))) => Ok(bytes),
        _ => Err(Error::new(Condition::NOT_IMPLEMENTED, "the body must be data, text or binary")),
    }
}

/// The device of `/devices/{id}/messages/devicebound`; words ignore case, the id may be escaped.
fn device(to: &str) -> Option<Identity> {
    let segments: Vec<&str> = to.split('/').collect();
    match segments[..] {
        ["", devices, device, messages, bound]
            if devices.eq_ignore_ascii_case("devices")
                && messages.eq_ignore_ascii_case("messages")
                && bound.eq_ignore_ascii_case("devicebound") =>
        {
            Identity::device(&percent_decode_str(device).decode_utf8().ok()?).ok()
        }
        _ => None,
    }
}
