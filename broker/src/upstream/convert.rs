//! Messages and links of the hub as the upstream reads them.

use super::UpstreamOptions;
use crate::amqp::{
    AttachOptions, LinkAddress, LinkKind, MessageEncoder, MessageId, MessageProperties, Payload, Role,
    SenderSettle, Terminus, Text, Value, encode_batch, put_property,
};
use crate::identity::Identity;
use crate::message::{Message, PropertyKind, SystemProperty};

/// The one interface id that is passed on: security messages.
const SECURITY_INTERFACE: &str = "urn:azureiot:Security:SecurityAgent:1";

/// Room for the sections in front of a body; larger ones grow.
const HEAD_BYTES: usize = 256;

/// Version of the service's interface that links announce.
const API_VERSION: &str = "2021-04-12";

/// The link on which the messages of a sender go up; `chain` is the sender's auth chain.
pub(super) fn telemetry_link(
    sender: &Identity,
    chain: &str,
    model_id: Option<&str>,
    options: &UpstreamOptions,
) -> AttachOptions {
    let address = LinkAddress::Node {
        kind: LinkKind::Telemetry,
        device_id: sender.device_id().to_owned(),
        module_id: sender.module_id().map(str::to_owned),
    };
    let property = |name, value: &str| (Text::from_static(name), Value::String(value.into()));
    let mut properties = vec![
        property("com.microsoft:client-version", &options.product_info),
        property("com.microsoft:api-version", API_VERSION),
        property("com.microsoft:auth-chain", chain),
    ];
    properties.extend(model_id.map(|model_id| property("com.microsoft:model-id", model_id)));
    AttachOptions {
        name: Text::from_static("TelemetrySenderLink"),
        role: Role::Sender,
        source: Terminus::source(sender.device_id()),
        target: Terminus::target(&address.to_uri(&options.host)),
        snd_settle: Some(SenderSettle::Unsettled),
        rcv_settle: None,
        max_message_bytes: 0,
        credit: 0,
        properties,
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
    let mut encoder = MessageEncoder::with_capacity(HEAD_BYTES);
    let component = sent(SystemProperty::ComponentName).map(|text| ("dt-subject", Value::String(text)));
    let interface = sent(SystemProperty::InterfaceId)
        .filter(|text| text.as_str() == SECURITY_INTERFACE)
        .map(|text| ("iothub-interface-id", Value::String(text)));
    encoder.annotations(component.into_iter().chain(interface));
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
