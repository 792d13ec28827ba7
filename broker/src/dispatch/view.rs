//! What conditions see of a message.

use std::cell::OnceCell;

use edgehub_routing::{MessageView, PropertyName, SystemProperty as Known, Text};

use crate::message::{Message, SystemProperty, Value};

/// A message as conditions see it: its own properties, and those that the hub adds.
pub(super) struct View<'a> {
    message: &'a Message,
    id: OnceCell<String>,
}

impl<'a> View<'a> {
    pub(super) fn new(message: &'a Message) -> Self {
        Self { message, id: OnceCell::new() }
    }

    /// The message's id as text. Written only when a condition asks for it, which no sensible one does.
    fn id(&self) -> &str {
        self.id.get_or_init(|| self.message.id.hyphenated().to_string())
    }
}

impl MessageView for View<'_> {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        text(self.message.properties.application(|candidate| name.matches(candidate)))
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        let sender = &self.message.sender;
        let sent = match name.system() {
            None => return Text::Undefined,
            Some(Known::ConnectionDeviceId) => return Text::Text(sender.identity.device_id()),
            Some(Known::ConnectionModuleId) => return present(sender.identity.module_id()),
            Some(Known::ModelId) => return present(sender.model_id.as_deref()),
            Some(Known::EdgeHubOriginInterface) => return Text::Text(sender.origin.as_str()),
            Some(Known::EdgeMessageId) => return Text::Text(self.id()),
            Some(Known::OutputName) => SystemProperty::OutputName,
            Some(Known::MessageId) => SystemProperty::MessageId,
            Some(Known::CorrelationId) => SystemProperty::CorrelationId,
            Some(Known::UserId) => SystemProperty::UserId,
            Some(Known::To) => SystemProperty::To,
            Some(Known::ContentType) => SystemProperty::ContentType,
            Some(Known::ContentEncoding) => SystemProperty::ContentEncoding,
            Some(Known::AbsoluteExpiryTime) => SystemProperty::AbsoluteExpiryTime,
            Some(Known::MessageSchema) => SystemProperty::MessageSchema,
            Some(Known::CreationTime) => SystemProperty::CreationTime,
            Some(Known::Operation) => SystemProperty::Operation,
            Some(Known::Ack) => SystemProperty::Ack,
            Some(Known::InterfaceId) => SystemProperty::InterfaceId,
            Some(Known::DigitalTwinSubject) => SystemProperty::ComponentName,
            Some(Known::EnqueuedTime) => SystemProperty::EnqueuedTime,
            Some(Known::DeliveryCount) => SystemProperty::DeliveryCount,
            Some(Known::SequenceNumber) => SystemProperty::SequenceNumber,
            Some(Known::LockToken) => SystemProperty::LockToken,
            Some(Known::ReportedPropertiesSenderDeviceId) => SystemProperty::OriginalSenderDeviceId,
            Some(Known::ReportedPropertiesSenderModuleId) => SystemProperty::OriginalSenderModuleId,
            Some(Known::MessageType) => SystemProperty::MessageType,
        };
        text(self.message.properties.system(sent))
    }

    fn body(&self) -> &[u8] {
        &self.message.body
    }

    fn property_places(&self) -> Option<usize> {
        Some(self.message.properties.len())
    }

    fn property_at(&self, place: usize) -> Option<(&str, Text<'_>)> {
        let (name, value) = self.message.properties.application_at(place)?;
        Some((name, text(value)))
    }
}

fn present(value: Option<&str>) -> Text<'_> {
    value.map_or(Text::Undefined, Text::Text)
}

fn text(value: Value<'_>) -> Text<'_> {
    match value {
        Value::Absent => Text::Undefined,
        Value::Null => Text::Null,
        Value::Text(text) => Text::Text(text),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::identity::Identity;
    use crate::message::{Origin, Properties, PropertyName as Named, Sender};

    #[test]
    fn every_system_property_is_found_under_its_name_in_any_case() {
        let identity = Identity::parse("edge1/m").unwrap();
        let sender = Sender { identity, origin: Origin::Internal, model_id: Some("dtmi:x;1".into()) };
        let own = SystemProperty::ALL.iter().map(|known| (Named::System(*known), known.name()));
        let message = Message::new(Arc::new(sender), Properties::copied_from(own), Bytes::new());
        let view = View::new(&message);
        for known in SystemProperty::ALL {
            let asked = PropertyName::new(&known.name().to_uppercase());
            assert_eq!(view.system_property(&asked), Text::Text(known.name()));
        }
        let text = |name: &str| match view.system_property(&PropertyName::new(name)) {
            Text::Text(text) => text.to_owned(),
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(text("connectionDeviceId"), "edge1");
        assert_eq!(text("connectionModuleId"), "m");
        assert_eq!(text("modelId"), "dtmi:x;1");
        assert_eq!(text("edgeHubOriginInterface"), "internal");
        assert_eq!(text("edgeMessageId"), message.id.to_string());
        assert_eq!(view.system_property(&PropertyName::new("correlationId")), Text::Undefined);
    }

    #[test]
    fn properties_at_their_places_are_those_that_their_names_lead_to() {
        let identity = Identity::parse("edge1/m").unwrap();
        let sender = Sender { identity, origin: Origin::Internal, model_id: None };
        let own = [
            (Named::Application("level"), "hot"),
            (Named::System(SystemProperty::ContentType), "application/json"),
            (Named::Application("site"), "north"),
        ];
        let message = Message::new(Arc::new(sender), Properties::copied_from(own), Bytes::new());
        let view = View::new(&message);
        let places = 0..view.property_places().unwrap();
        let found: Vec<_> = places.filter_map(|place| view.property_at(place)).collect();
        assert_eq!(found, [("level", Text::Text("hot")), ("site", Text::Text("north"))]);
        for (name, value) in found {
            assert_eq!(view.property(&PropertyName::new(name)), value);
        }
    }
}
