//! Owns the names of the system properties that a device-to-cloud message can have.

use crate::text::equal_names;

/// A system property that the hub knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SystemProperty {
    /// The device that sent the message.
    ConnectionDeviceId,
    /// The module that sent it, if one did.
    ConnectionModuleId,
    /// The output that the module sent it to.
    OutputName,
    /// The id that the sender gave it.
    MessageId,
    /// The correlation id.
    CorrelationId,
    /// The user id.
    UserId,
    /// The destination that the sender named.
    To,
    /// The media type of the body.
    ContentType,
    /// The encoding of the body.
    ContentEncoding,
    /// When it expires, ISO 8601 with 7 fraction digits.
    AbsoluteExpiryTime,
    /// The schema of the body.
    MessageSchema,
    /// When the sender made it.
    CreationTime,
    /// The operation that it is about.
    Operation,
    /// Which feedback the sender asks for.
    Ack,
    /// The interface that it belongs to.
    InterfaceId,
    /// The component that it belongs to.
    DigitalTwinSubject,
    /// The model that the sender announced when it connected.
    ModelId,
    /// When it was enqueued.
    EnqueuedTime,
    /// How often it was delivered.
    DeliveryCount,
    /// Its number in its queue.
    SequenceNumber,
    /// The lock that it is held by.
    LockToken,
    /// The id that the hub gave it.
    EdgeMessageId,
    /// `internal` or `downstream`.
    EdgeHubOriginInterface,
    /// The device whose reported properties changed.
    ReportedPropertiesSenderDeviceId,
    /// The module whose reported properties changed.
    ReportedPropertiesSenderModuleId,
    /// `twinChangeNotification`, or nothing.
    MessageType,
}

impl SystemProperty {
    /// All of them.
    pub const ALL: [SystemProperty; 26] = [
        SystemProperty::ConnectionDeviceId,
        SystemProperty::ConnectionModuleId,
        SystemProperty::OutputName,
        SystemProperty::MessageId,
        SystemProperty::CorrelationId,
        SystemProperty::UserId,
        SystemProperty::To,
        SystemProperty::ContentType,
        SystemProperty::ContentEncoding,
        SystemProperty::AbsoluteExpiryTime,
        SystemProperty::MessageSchema,
        SystemProperty::CreationTime,
        SystemProperty::Operation,
        SystemProperty::Ack,
        SystemProperty::InterfaceId,
        SystemProperty::DigitalTwinSubject,
        SystemProperty::ModelId,
        SystemProperty::EnqueuedTime,
        SystemProperty::DeliveryCount,
        SystemProperty::SequenceNumber,
        SystemProperty::LockToken,
        SystemProperty::EdgeMessageId,
        SystemProperty::EdgeHubOriginInterface,
        SystemProperty::ReportedPropertiesSenderDeviceId,
        SystemProperty::ReportedPropertiesSenderModuleId,
        SystemProperty::MessageType,
    ];

    /// The name in conditions.
    pub const fn as_str(self) -> &'static str {
        match self {
            SystemProperty::ConnectionDeviceId => "connectionDeviceId",
            SystemProperty::ConnectionModuleId => "connectionModuleId",
            SystemProperty::OutputName => "outputName",
            SystemProperty::MessageId => "messageId",
            SystemProperty::CorrelationId => "cid",
            SystemProperty::UserId => "userId",
            SystemProperty::To => "to",
            SystemProperty::ContentType => "contentType",
            SystemProperty::ContentEncoding => "contentEncoding",
            SystemProperty::AbsoluteExpiryTime => "absolute-expiry-time",
            SystemProperty::MessageSchema => "messageSchema",
            SystemProperty::CreationTime => "creationTime",
            SystemProperty::Operation => "operation",
            SystemProperty::Ack => "ack",
            SystemProperty::InterfaceId => "iothub-interface-id",
            SystemProperty::DigitalTwinSubject => "dt-subject",
            SystemProperty::ModelId => "modelId",
            SystemProperty::EnqueuedTime => "enqueuedTime",
            SystemProperty::DeliveryCount => "deliveryCount",
            SystemProperty::SequenceNumber => "sequenceNumber",
            SystemProperty::LockToken => "lockToken",
            SystemProperty::EdgeMessageId => "edgeMessageId",
            SystemProperty::EdgeHubOriginInterface => "edgeHubOriginInterface",
            SystemProperty::ReportedPropertiesSenderDeviceId => "rpSenderDeviceId",
            SystemProperty::ReportedPropertiesSenderModuleId => "rpSenderModuleId",
            SystemProperty::MessageType => "messageType",
        }
    }

    /// The property of that name, in any case.
    pub fn of_name(name: &str) -> Option<SystemProperty> {
        SystemProperty::ALL.into_iter().find(|known| equal_names(known.as_str(), name))
    }
}

#[cfg(test)]
mod tests {
    use super::SystemProperty;

    #[test]
    fn names_lead_back() {
        for known in SystemProperty::ALL {
            assert_eq!(SystemProperty::of_name(&known.as_str().to_uppercase()), Some(known));
        }
        assert_eq!(SystemProperty::of_name("correlationId"), None);
    }
}
