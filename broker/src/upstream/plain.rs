//! Another AMQP 1.0 broker as the upstream: RabbitMQ, Artemis, Event Hubs and their like.
//!
//! The hub shows who it is once, by SASL. Each sender has a link of its own to the address that a template gives, so
//! order holds per sender and a refused address parks its senders alone. Messages go one by one, durable, as plain AMQP
//! messages: what the sender set, and in annotations who it was, under the names that the cloud hub uses for its readers.
//! There are no tokens, and no control plane: twins, methods and cloud-to-device messages are unsupported.

use std::fmt;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

use super::lanes::LANE_TRANSFERS_MAX;
use super::targets::RouteTargets;
use super::{UpstreamOptions, convert, mqtt};
use crate::amqp::{
    AttachOptions, ClientSasl, MessageEncoder, Outcome, Payload, ReceiverSettle, Role, Secret, SenderSettle,
    Terminus, Text, Value,
};
use crate::dial::Carried;
use crate::identity::Identity;
use crate::message::{Message, SystemProperty};

/// Longest URL, in bytes.
const URL_BYTES_MAX: usize = 4_096;

/// Longest address or template, in bytes.
pub const ADDRESS_BYTES_MAX: usize = 1_024;

/// Room for the sections in front of a body; larger ones grow.
const HEAD_BYTES: usize = 384;

/// What is up there.
#[derive(Debug, Clone)]
pub enum UpstreamKind {
    /// The cloud hub or a parent hub: a token, a session and links for each identity.
    Hub,
    /// The same over MQTT: a connection for each identity.
    MqttHub,
    /// A broker that knows nothing of devices.
    Amqp(PlainAmqp),
}

/// How another broker is used.
#[derive(Debug, Clone)]
pub struct PlainAmqp {
    /// How the hub shows who it is.
    pub sasl: ClientSasl,
    /// Where messages go whose route has no target of its own.
    pub address: AddressTemplate,
    /// The routes that have one.
    pub targets: RouteTargets,
}

/// Where a broker is, as a URL says it: `amqps://user:password@host:port`, `amqp://` without TLS. `Debug` prints no
/// password.
#[derive(Debug, Clone)]
pub struct BrokerUrl {
    /// DNS name or address.
    pub host: String,
    /// TCP port; 5671 or, without TLS, 5672 unless the URL names another.
    pub port: u16,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// User and password of the URL, or anonymous.
    pub sasl: ClientSasl,
}

/// Why a text is no URL of a broker. Holds nothing of the text, which may have a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BrokerUrlError {
    /// Another scheme.
    #[error("the URL of the broker must begin with amqps:// or amqp://")]
    Scheme,
    /// No host, a path, or characters that no host has.
    #[error("the URL of the broker has another form than amqps://[user:password@]host[:port]")]
    Host,
    /// A port that is none.
    #[error("the port in the URL of the broker must be a number from 1 to 65535")]
    Port,
    /// User or password that are no UTF-8 once decoded, or a password without a user.
    #[error("user and password in the URL of the broker must be percent-encoded text, the user not empty")]
    Credentials,
    /// Longer than any URL.
    #[error("the URL of the broker is longer than {URL_BYTES_MAX} bytes")]
    Length,
}

impl FromStr for BrokerUrl {
    type Err = BrokerUrlError;

    fn from_str(text: &str) -> Result<Self, BrokerUrlError> {
        if text.len() > URL_BYTES_MAX {
            return Err(BrokerUrlError::Length);
        }
        let (scheme, rest) = text.trim().split_once("://").ok_or(BrokerUrlError::Scheme)?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "amqps" => true,
            "amqp" => false,
            _ => return Err(BrokerUrlError::Scheme),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (user, address) = match rest.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, rest),
        };
        let (host, port) = match address.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or(BrokerUrlError::Host)?)),
            None => address.split_once(':').map_or((address, None), |(host, port)| (host, Some(port))),
        };
        let usable = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        if host.is_empty() || !host.bytes().all(usable) {
            return Err(BrokerUrlError::Host);
        }
        let port = match port {
            Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or(BrokerUrlError::Port)?,
            None if tls => 5_671,
            None => 5_672,
        };
        let sasl = match user {
            Some(user) => credentials(user).ok_or(BrokerUrlError::Credentials)?,
            None => ClientSasl::Anonymous,
        };
        Ok(Self { host: host.to_owned(), port, tls, sasl })
    }
}

fn credentials(text: &str) -> Option<ClientSasl> {
    let (user, password) = text.split_once(':').unwrap_or((text, ""));
    let decoded = |text| percent_decode_str(text).decode_utf8().ok().filter(|text| !text.contains('\0'));
    let (user, password) = (decoded(user)?, decoded(password)?);
    let password = Secret::new(password.into_owned().into());
    (!user.is_empty()).then(|| ClientSasl::Plain { user: user.into_owned().into(), password })
}

/// The address of the link of a sender, with `{deviceId}` and `{moduleId}` in it; the latter is empty for a device. The
/// ids are put in as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressTemplate {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    DeviceId,
    ModuleId,
}

/// Why a text is no address template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressTemplateError {
    /// Nothing in it.
    #[error("the address is empty")]
    Empty,
    /// Longer than [`ADDRESS_BYTES_MAX`].
    #[error("the address is longer than {ADDRESS_BYTES_MAX} bytes")]
    TooLong,
    /// A brace without its other one.
    #[error("a brace of the address has no other one")]
    Brace,
    /// A placeholder that does not exist.
    #[error("{{{0}}} is no placeholder; there are {{deviceId}} and {{moduleId}}")]
    Placeholder(String),
}

impl FromStr for AddressTemplate {
    type Err = AddressTemplateError;

    fn from_str(text: &str) -> Result<Self, AddressTemplateError> {
        if text.trim().is_empty() {
            return Err(AddressTemplateError::Empty);
        }
        if text.len() > ADDRESS_BYTES_MAX {
            return Err(AddressTemplateError::TooLong);
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(at);
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            let inner = from.strip_prefix('{').ok_or(AddressTemplateError::Brace)?;
            let (name, after) = inner.split_once('}').ok_or(AddressTemplateError::Brace)?;
            parts.push(match name {
                "deviceId" => Part::DeviceId,
                "moduleId" => Part::ModuleId,
                other => return Err(AddressTemplateError::Placeholder(other.to_owned())),
            });
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self { parts })
    }
}

impl fmt::Display for AddressTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts.iter().try_for_each(|part| {
            f.write_str(match part {
                Part::Text(text) => text,
                Part::DeviceId => "{deviceId}",
                Part::ModuleId => "{moduleId}",
            })
        })
    }
}

impl AddressTemplate {
    /// The address for the messages of a sender.
    pub fn address_of(&self, sender: &Identity) -> String {
        let mut address = String::new();
        for part in &self.parts {
            address.push_str(match part {
                Part::Text(text) => text,
                Part::DeviceId => sender.device_id(),
                Part::ModuleId => sender.module_id().unwrap_or_default(),
            });
        }
        address
    }
}

impl UpstreamOptions {
    /// How the hub shows who it is before the open.
    pub(super) fn sasl(&self) -> Option<ClientSasl> {
        match &self.kind {
            UpstreamKind::Hub | UpstreamKind::MqttHub => None,
            UpstreamKind::Amqp(plain) => Some(plain.sasl.clone()),
        }
    }

    /// Messages in one transfer at most: only hubs know batches, and only over AMQP.
    pub(super) fn transfer_max(&self) -> usize {
        match self.kind {
            UpstreamKind::Hub => self.batch_max,
            UpstreamKind::MqttHub | UpstreamKind::Amqp(_) => 1,
        }
    }

    /// Transfers of one sender without an answer at most.
    pub(super) fn transfers_max(&self) -> usize {
        match self.kind {
            UpstreamKind::MqttHub => mqtt::WINDOW,
            UpstreamKind::Hub | UpstreamKind::Amqp(_) => LANE_TRANSFERS_MAX,
        }
    }

    /// What its connections carry.
    pub(super) fn carried(&self) -> Carried {
        match self.kind {
            UpstreamKind::MqttHub => Carried::Mqtt,
            UpstreamKind::Hub | UpstreamKind::Amqp(_) => Carried::Amqp,
        }
    }

    /// Whether the upstream knows tokens, twins, methods and cloud-to-device messages.
    pub(super) fn is_hub(&self) -> bool {
        matches!(self.kind, UpstreamKind::Hub | UpstreamKind::MqttHub)
    }

    /// One transfer's payload.
    pub(super) fn payload<'a>(&self, mut messages: impl ExactSizeIterator<Item = &'a Message>) -> Payload {
        match (&self.kind, messages.len()) {
            (UpstreamKind::Amqp(_), 1) if let Some(only) = messages.next() => encode(only),
            _ => convert::payload(messages),
        }
    }

    /// What an answer means here. A broker that rejects without a reason, as a full queue does, has no fault found with
    /// the message.
    pub(super) fn outcome(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Rejected(None) if !self.is_hub() => Outcome::Released,
            other => other,
        }
    }
}

impl PlainAmqp {
    /// The link on which the messages of a sender go up.
    pub(super) fn link(&self, sender: &Identity) -> AttachOptions {
        AttachOptions {
            name: sender.to_string().into(),
            role: Role::Sender,
            source: Terminus::source(&sender.to_string()),
            target: Terminus::target(&self.address.address_of(sender)),
            snd_settle: Some(SenderSettle::Unsettled),
            rcv_settle: Some(ReceiverSettle::First),
            max_message_bytes: 0,
            credit: 0,
            properties: Vec::new(),
        }
    }
}

/// A message with its sender.
fn encode(message: &Message) -> Payload {
    let identity = &message.sender.identity;
    let sent = |property| message.properties.system_bytes(property).and_then(|bytes| Text::new(bytes).ok());
    let mut encoder = MessageEncoder::for_at_once(HEAD_BYTES);
    let annotations = [
        ("iothub-connection-device-id", Some(identity.device_id().into())),
        ("iothub-connection-module-id", identity.module_id().map(Into::into)),
        ("iothub-output-name", sent(SystemProperty::OutputName)),
        ("dt-subject", sent(SystemProperty::ComponentName)),
        ("dt-dataschema", message.sender.model_id.as_deref().map(Into::into)),
    ];
    encoder.durable().annotations(
        annotations.into_iter().filter_map(|(name, text)| text.map(|text| (name, Value::String(text)))),
    );
    convert::encode_sent(encoder, message)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::{Bytes, BytesMut};

    use super::*;
    use crate::amqp::parse_batch;
    use crate::message::{Origin, Properties, PropertyName, Sender};

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    #[test]
    fn addresses_of_templates() {
        for (template, device, module) in [
            ("telemetry", "telemetry", "telemetry"),
            ("/exchange/plant/{deviceId}.{moduleId}", "/exchange/plant/d1.", "/exchange/plant/e1.m"),
            ("{moduleId}{deviceId}", "d1", "me1"),
        ] {
            let parsed: AddressTemplate = template.parse().unwrap();
            assert_eq!(parsed.address_of(&id("d1")), device);
            assert_eq!(parsed.address_of(&id("e1/m")), module);
            assert_eq!(parsed.to_string(), template);
        }
        for (bad, error) in [
            (" ", AddressTemplateError::Empty),
            ("a{deviceId", AddressTemplateError::Brace),
            ("a}b", AddressTemplateError::Brace),
            ("{device}", AddressTemplateError::Placeholder("device".into())),
        ] {
            assert_eq!(bad.parse::<AddressTemplate>(), Err(error), "{bad}");
        }
        assert_eq!("x".repeat(1_025).parse::<AddressTemplate>(), Err(AddressTemplateError::TooLong));
    }

    #[test]
    fn urls_of_brokers() {
        for (text, host, port, tls) in [
            ("amqps://broker.example", "broker.example", 5_671, true),
            ("AMQP://192.0.2.1/", "192.0.2.1", 5_672, false),
            ("amqps://[2001:db8::1]:15671", "2001:db8::1", 15_671, true),
            ("amqp://u:p@h:1", "h", 1, false),
        ] {
            let url: BrokerUrl = text.parse().unwrap();
            assert_eq!((url.host.as_str(), url.port, url.tls), (host, port, tls), "{text}");
        }
        let url: BrokerUrl = "amqps://a%40b:planted%3A@h".parse().unwrap();
        let ClientSasl::Plain { user, password } = &url.sasl else { panic!("{url:?}") };
        assert_eq!((user.as_str(), password.expose()), ("a@b", "planted:"));
        assert!(!format!("{url:?}").contains("planted"));
        for (text, error) in [
            ("broker", BrokerUrlError::Scheme),
            ("http://broker", BrokerUrlError::Scheme),
            ("amqps://", BrokerUrlError::Host),
            ("amqps://[::1]x", BrokerUrlError::Host),
            ("amqps://h/path", BrokerUrlError::Host),
            ("amqps://h:0", BrokerUrlError::Port),
            ("amqps://:p@h", BrokerUrlError::Credentials),
            ("amqps://%ff:p@h", BrokerUrlError::Credentials),
            ("amqps://u%00:p@h", BrokerUrlError::Credentials),
        ] {
            assert_eq!(text.parse::<BrokerUrl>().map(|url| url.host), Err(error), "{text}");
        }
    }

    #[test]
    fn a_message_is_durable_and_tells_its_sender() {
        let sender = Sender { identity: id("e1/m"), origin: Origin::Internal, model_id: None };
        let properties = Properties::copied_from([
            (PropertyName::System(SystemProperty::OutputName), "out"),
            (PropertyName::System(SystemProperty::ContentType), "text/plain"),
            (PropertyName::Application("level"), "hot"),
        ]);
        let message = Message::new(Arc::new(sender), properties, Bytes::from_static(b"body"));
        let mut bytes = BytesMut::new();
        encode(&message).iter().for_each(|piece| bytes.extend_from_slice(piece));
        assert_eq!(bytes[..13], *b"\x00\x53\x70\xd0\0\0\0\x05\0\0\0\x01\x41", "header: durable");
        let read = &parse_batch(0, &bytes.freeze()).unwrap()[0];
        let annotation = |name| read.annotation(name).unwrap().and_then(|value| value.as_text().cloned());
        assert_eq!(annotation("iothub-connection-device-id"), Some("e1".into()));
        assert_eq!(annotation("iothub-connection-module-id"), Some("m".into()));
        assert_eq!(annotation("iothub-output-name"), Some("out".into()));
        assert_eq!(annotation("dt-subject"), None);
        let level = read.application_property("level").unwrap();
        assert_eq!(level.and_then(|value| value.as_text().cloned()), Some("hot".into()));
        assert_eq!(read.properties().unwrap().content_type, Some("text/plain".into()));
        assert_eq!(read.body.data().unwrap(), "body");
    }
}
