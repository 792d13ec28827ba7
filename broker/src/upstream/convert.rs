//! Messages and links of the hub as the upstream reads them.

use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use super::UpstreamOptions;
use crate::amqp::{
    AttachOptions, Condition, Error, LinkAddress, LinkKind, Message as Encoded, MessageEncoder, MessageId,
    MessageProperties, Outcome, Payload, ReceiverSettle, Role, SenderSettle, Terminus, Text, Value,
    encode_batch, put_property, tag_lock_token,
};
use crate::backend::{self, MethodAnswer};
use crate::head::amqp::convert::message;
use crate::identity::Identity;
use crate::message::{
    Message, Properties, PropertyKind, PropertyName, Sender, SystemProperty, Value as Held,
};

/// The one interface id that is passed on: security messages.
pub(super) const SECURITY_INTERFACE: &str = "urn:azureiot:Security:SecurityAgent:1";

/// Room for the sections in front of a body; larger ones grow.
const HEAD_BYTES: usize = 256;

/// Version of the service's interface that links announce.
const API_VERSION: &str = "2021-04-12";

/// Largest message that is taken on a link on which the hub receives, in bytes.
const RECEIVED_BYTES_MAX: u64 = 1 << 20;

/// Credit of the links on which the hub receives.
const RECEIVED_CREDIT: u32 = 50;

/// Longest name of a method, in bytes.
pub(super) const METHOD_NAME_BYTES_MAX: usize = 1_024;

/// A link of an identity: `chain` is its auth chain, absent when it comes with its own token; `channel` the same for all links
/// of its session.
pub(super) fn link(
    kind: LinkKind,
    identity: &Identity,
    chain: Option<&str>,
    model_id: Option<&str>,
    channel: Uuid,
    options: &UpstreamOptions,
) -> AttachOptions {
    let (name, role) = match kind {
        LinkKind::Telemetry => ("TelemetrySenderLink", Role::Sender),
        LinkKind::CloudToDevice => ("TelemetryReceiverLink", Role::Receiver),
        LinkKind::MethodCalls => ("MethodsReceiverLink", Role::Receiver),
        LinkKind::MethodResponses => ("MethodsSenderLink", Role::Sender),
        LinkKind::TwinAnswers => ("TwinReceiverLink", Role::Receiver),
        LinkKind::TwinRequests => ("TwinSenderLink", Role::Sender),
        LinkKind::Inputs => ("EventsReceiverLink", Role::Receiver),
        LinkKind::Cbs => ("cbs", Role::Sender),
    };
    let (pair, snd_settle, rcv_settle) = match kind {
        LinkKind::Telemetry | LinkKind::Inputs => (None, SenderSettle::Unsettled, ReceiverSettle::First),
        LinkKind::CloudToDevice => (None, SenderSettle::Unsettled, ReceiverSettle::Second),
        LinkKind::MethodCalls | LinkKind::MethodResponses => {
            (Some("methods"), SenderSettle::Settled, ReceiverSettle::First)
        }
        LinkKind::TwinAnswers | LinkKind::TwinRequests => {
            (Some("twin"), SenderSettle::Settled, ReceiverSettle::First)
        }
        LinkKind::Cbs => (None, SenderSettle::Settled, ReceiverSettle::First),
    };
    let node = LinkAddress::Node {
        kind,
        device_id: identity.device_id().to_owned(),
        module_id: identity.module_id().map(str::to_owned),
    };
    let node = node.to_uri(&options.host);
    let property = |name, value: &str| (Text::from_static(name), Value::String(value.into()));
    let mut properties = vec![
        property("com.microsoft:client-version", &options.product_info),
        property("com.microsoft:api-version", API_VERSION),
    ];
    properties.extend(chain.map(|chain| property("com.microsoft:auth-chain", chain)));
    if role == Role::Sender {
        properties.extend(model_id.map(|model_id| property("com.microsoft:model-id", model_id)));
    }
    let channel = |pair| property("com.microsoft:channel-correlation-id", &format!("{pair}:{channel}"));
    properties.extend(pair.map(channel));
    let (source, target, received_max, credit) = match role {
        Role::Sender => (identity.device_id(), node.as_str(), 0, 0),
        Role::Receiver => (node.as_str(), identity.device_id(), RECEIVED_BYTES_MAX, RECEIVED_CREDIT),
    };
    AttachOptions {
        name: Text::from_static(name),
        role,
        source: Terminus::source(source),
        target: Terminus::target(target),
        snd_settle: Some(snd_settle),
        rcv_settle: Some(rcv_settle),
        max_message_bytes: received_max,
        credit,
        properties,
    }
}

/// A request for the whole twin, and its correlation id.
pub(super) fn twin_get() -> (String, Payload) {
    twin_request("Get", "GET", None, Bytes::new())
}

/// A patch of reported properties, and its correlation id.
pub(super) fn twin_patch(patch: Bytes) -> (String, Payload) {
    twin_request("Patch", "PATCH", Some("/properties/reported"), patch)
}

/// A request for notifications of changed desired properties, and its correlation id.
pub(super) fn twin_notify() -> (String, Payload) {
    twin_request("Put", "PUT", Some("/notifications/twin/properties/desired"), Bytes::new())
}

fn twin_request(prefix: &str, operation: &str, resource: Option<&str>, body: Bytes) -> (String, Payload) {
    let correlation = format!("{prefix}{}", Uuid::new_v4());
    let mut encoder = MessageEncoder::with_capacity(HEAD_BYTES);
    let annotation = |name, value: &str| (name, Value::String(value.into()));
    encoder.annotations(
        [annotation("operation", operation)]
            .into_iter()
            .chain(resource.map(|resource| annotation("resource", resource))),
    );
    encoder.properties(&MessageProperties {
        correlation_id: Some(MessageId::String(correlation.as_str().into())),
        ..MessageProperties::default()
    });
    (correlation, encoder.data(body))
}

/// The id, name and argument of a method call; none if it cannot be answered.
pub(super) fn method_call(encoded: &Encoded) -> Option<(MessageId, Arc<str>, Bytes)> {
    let correlation = encoded.properties().ok()?.correlation_id?;
    let name = encoded.application_properties().ok()?.find_map(|entry| {
        let (key, value) = entry.ok()?;
        key.eq_ignore_ascii_case("IoThub-methodname").then(|| value.as_text().cloned())?
    })?;
    if name.is_empty() || name.len() > METHOD_NAME_BYTES_MAX {
        return None;
    }
    let payload = encoded.body.data().filter(|body| !body.is_empty());
    Some((correlation, name.as_str().into(), payload.unwrap_or(Bytes::from_static(b"null"))))
}

/// The answer of a method; the id has the type that the call's had.
pub(super) fn method_response(correlation: &MessageId, answer: &MethodAnswer) -> Payload {
    let mut encoder = MessageEncoder::with_capacity(HEAD_BYTES);
    encoder
        .properties(&MessageProperties {
            correlation_id: Some(correlation.clone()),
            ..MessageProperties::default()
        })
        .application_values([("IoThub-status", Value::Int(answer.status))]);
    encoder.data(answer.payload.clone())
}

/// A cloud-to-device message as the hub knows messages; `tag` is that of its delivery, which stands for a lock token
/// where the message names none.
///
/// # Errors
/// When it cannot be read.
pub(super) fn cloud_to_device(
    encoded: &Encoded,
    tag: Option<&[u8]>,
    device: Arc<Sender>,
) -> Result<Message, Error> {
    let mut message = message(encoded, device)?;
    let token = tag.and_then(|tag| <[u8; 16]>::try_from(tag).ok()).map(tag_lock_token);
    if let (Held::Absent, Some(token)) = (message.properties.system(SystemProperty::LockToken), token) {
        let lock = (PropertyName::System(SystemProperty::LockToken), token.as_str());
        let all = message.properties.iter().map(|property| (property.name, property.value)).chain([lock]);
        message.properties = Properties::copied_from(all);
    }
    Ok(message)
}

/// What becomes of a cloud-to-device message upstream when its device said so.
pub(super) fn settlement(outcome: backend::Outcome) -> Outcome {
    match outcome {
        backend::Outcome::Accepted => Outcome::Accepted,
        backend::Outcome::Rejected => Outcome::Rejected(None),
        backend::Outcome::NotConvertible => {
            let text = "the protocol of the device cannot carry it";
            Outcome::Rejected(Some(Error::new(Condition::NOT_IMPLEMENTED, text)))
        }
        backend::Outcome::Released | backend::Outcome::NotOffered | backend::Outcome::Expired => {
            Outcome::Released
        }
    }
}

/// One transfer's payload: the message itself, or a batch of several.
pub(crate) fn payload<'a>(messages: impl ExactSizeIterator<Item = &'a Message>) -> Payload {
    let single = messages.len() == 1;
    let mut encoded = messages.map(encode);
    match (single, encoded.next()) {
        (true, Some(only)) => only,
        (_, first) => encode_batch(first.into_iter().chain(encoded)),
    }
}

/// The sender is not in the message: it is the identity of the link. Output, ids and marks of this hub stay here.
fn encode(message: &Message) -> Payload {
    let sent = |property| message.properties.system_bytes(property).and_then(|bytes| Text::new(bytes).ok());
    let mut encoder = MessageEncoder::for_at_once(HEAD_BYTES);
    let component = sent(SystemProperty::ComponentName).map(|text| ("dt-subject", Value::String(text)));
    let interface = sent(SystemProperty::InterfaceId)
        .filter(|text| text.as_str() == SECURITY_INTERFACE)
        .map(|text| ("iothub-interface-id", Value::String(text)));
    encoder.annotations(component.into_iter().chain(interface));
    encode_sent(encoder, message)
}

/// The sections behind the annotations: what the sender set.
pub(super) fn encode_sent(mut encoder: MessageEncoder, message: &Message) -> Payload {
    let sent = |property| message.properties.system_bytes(property).and_then(|bytes| Text::new(bytes).ok());
    encoder.properties(&MessageProperties {
        message_id: sent(SystemProperty::MessageId).map(MessageId::String),
        correlation_id: sent(SystemProperty::CorrelationId).map(MessageId::String),
        user_id: message.properties.system_bytes(SystemProperty::UserId),
        to: sent(SystemProperty::To),
        content_type: sent(SystemProperty::ContentType),
        content_encoding: sent(SystemProperty::ContentEncoding),
        ..MessageProperties::default()
    });
    let created = sent(SystemProperty::CreationTime);
    let schema = sent(SystemProperty::MessageSchema);
    let application = message.properties.typed_properties().map(|(name, text, kind)| (name, (text, kind)));
    let own = [("iothub-creation-time-utc", &created), ("iothub-message-schema", &schema)];
    // A property that the sender named like one of ours wins.
    let own = own
        .into_iter()
        .filter_map(|(name, value)| value.as_ref().map(|text| (name, (text.as_str(), PropertyKind::Text))))
        .filter(|(name, _)| !message.properties.application_properties().any(|(sent, _)| sent == *name));
    encoder.application(application.chain(own), put_property);
    encoder.data(message.body.clone())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::{Bytes, BytesMut};

    use super::*;
    use crate::amqp::{MESSAGE_FORMAT_BATCH, parse_batch};
    use crate::identity::Identity;
    use crate::message::{Origin, Properties, PropertyName, Sender};

    fn message(body: &'static str) -> Message {
        let identity = Identity::parse("edge1/m").unwrap();
        let sender = Sender { identity, origin: Origin::Internal, model_id: None };
        let properties = Properties::copied_from([
            (PropertyName::System(SystemProperty::MessageId), "7"),
            (PropertyName::System(SystemProperty::OutputName), "out"),
            (PropertyName::System(SystemProperty::InterfaceId), "other"),
            (PropertyName::System(SystemProperty::CreationTime), "2026-01-01T00:00:00Z"),
            (PropertyName::Application("level"), "hot"),
        ]);
        Message::new(Arc::new(sender), properties, Bytes::from_static(body.as_bytes()))
    }

    fn joined(payload: Payload) -> Bytes {
        let mut out = BytesMut::new();
        payload.iter().for_each(|piece| out.extend_from_slice(piece));
        out.freeze()
    }

    #[test]
    fn what_belongs_to_this_hub_stays_here() {
        let sent = message("{}");
        let bytes = joined(payload([&sent].into_iter()));
        let read = &parse_batch(0, &bytes).unwrap()[0];
        assert_eq!(read.body.data().unwrap(), "{}");
        let properties = read.properties().unwrap();
        assert_eq!(properties.message_id, Some(MessageId::String(Text::from_static("7"))));
        let text = |name| read.application_property(name).unwrap().and_then(|v| v.as_text().cloned());
        assert_eq!(text("level"), Some(Text::from_static("hot")));
        assert_eq!(text("iothub-creation-time-utc"), Some(Text::from_static("2026-01-01T00:00:00Z")));
        assert_eq!(text("iothub-outputname"), None);
        assert_eq!(read.annotation("iothub-interface-id").unwrap(), None);
    }

    #[test]
    fn several_messages_travel_as_a_batch_in_order() {
        let (a, b) = (message("1"), message("2"));
        let bytes = joined(payload([&a, &b].into_iter()));
        let bodies: Vec<Bytes> = parse_batch(MESSAGE_FORMAT_BATCH, &bytes)
            .unwrap()
            .iter()
            .map(|message| message.body.data().unwrap())
            .collect();
        assert_eq!(bodies, ["1", "2"]);
    }
}
