//! Names and topics as the upstream reads and writes them: who connects, where messages go, what comes down.

use std::sync::Arc;

use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use uuid::Uuid;

use crate::head::mqtt::bag;
use crate::head::mqtt::packet::Publish;
use crate::identity::Identity;
use crate::message::{Message, Properties, PropertyName, Sender, SystemProperty, Value};
use crate::upstream::convert::{METHOD_NAME_BYTES_MAX, SECURITY_INTERFACE};

/// Version of the service's interface that user names announce.
const API_VERSION: &str = "2021-04-12";

/// Answers to twin requests.
pub(super) const TWIN_ANSWERS: &str = "$iothub/twin/res/#";

/// Notifications of changed desired properties.
pub(super) const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";

/// Direct methods.
pub(super) const METHODS: &str = "$iothub/methods/POST/#";

/// All bytes but those that RFC 3986 §2.3 leaves as they are.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// What goes up of the system properties, and its name on the wire. Output, ids and marks of this hub stay here.
const SENT_NAMES: [(SystemProperty, &str); 9] = [
    (SystemProperty::MessageId, "$.mid"),
    (SystemProperty::CorrelationId, "$.cid"),
    (SystemProperty::UserId, "$.uid"),
    (SystemProperty::To, "$.to"),
    (SystemProperty::ContentType, "$.ct"),
    (SystemProperty::ContentEncoding, "$.ce"),
    (SystemProperty::CreationTime, "$.ctime"),
    (SystemProperty::MessageSchema, "$.schema"),
    (SystemProperty::ComponentName, "$.sub"),
];
const INTERFACE_NAME: &str = "$.ifid";

/// What the upstream publishes.
#[derive(Debug, PartialEq)]
pub(super) enum Downward {
    /// The answer to a twin request.
    TwinAnswer {
        /// As in HTTP.
        status: u16,
        /// Whose answer it is.
        request_id: String,
        /// The new version of reported properties.
        version: Option<u64>,
    },
    /// Desired properties changed.
    Desired,
    /// A direct method is called.
    Method {
        /// Its name.
        name: Arc<str>,
        /// What its answer has to name.
        request_id: String,
    },
    /// A message from the cloud, with its properties.
    CloudToDevice(Properties),
}

/// The user name of a connection. `chain` is the auth chain of one that is made on behalf of another.
pub(super) fn user_name(
    hub_host: &str,
    identity: &Identity,
    product_info: &str,
    model_id: Option<&str>,
    chain: Option<&str>,
) -> String {
    let product_info = escaped(product_info);
    let mut name =
        format!("{hub_host}/{identity}/?api-version={API_VERSION}&DeviceClientType={product_info}");
    for (key, value) in [("model-id", model_id), ("auth-chain", chain)] {
        if let Some(value) = value {
            name.extend(["&", key, "=", &escaped(value)]);
        }
    }
    name
}

/// The topic under which a message of its sender goes up.
pub(super) fn telemetry(message: &Message) -> String {
    let sender = &message.sender.identity;
    let mut topic = format!("devices/{}", sender.device_id());
    if let Some(module) = sender.module_id() {
        topic.extend(["/modules/", module]);
    }
    topic.push_str("/messages/events/");
    let bag_start = topic.len();
    let mut put = |name: &str, value: &str| {
        let separator = if topic.len() == bag_start { "" } else { "&" };
        topic.extend([separator, &escaped(name), "=", &escaped(value)]);
    };
    for (property, name) in SENT_NAMES {
        if let Value::Text(text) = message.properties.system(property) {
            put(name, text);
        }
    }
    if message.properties.system(SystemProperty::InterfaceId) == Value::Text(SECURITY_INTERFACE) {
        put(INTERFACE_NAME, SECURITY_INTERFACE);
    }
    for (name, value) in message.properties.application_properties() {
        // A name means one property only; that of the system is the one that the hub knows.
        let taken = SENT_NAMES
            .iter()
            .any(|(property, wire)| *wire == name && message.properties.system(*property) != Value::Absent);
        if !taken {
            put(name, value);
        }
    }
    topic
}

/// The filter of messages from the cloud.
pub(super) fn device_bound(device: &str) -> String {
    format!("devices/{device}/messages/devicebound/#")
}

/// The topic of a request for the whole twin.
pub(super) fn twin_get(request_id: &str) -> String {
    format!("$iothub/twin/GET/?$rid={request_id}")
}

/// The topic of a patch of reported properties.
pub(super) fn twin_patch(request_id: &str) -> String {
    format!("$iothub/twin/PATCH/properties/reported/?$rid={request_id}")
}

/// The topic of the answer of a method.
pub(super) fn method_response(status: i32, request_id: &str) -> String {
    format!("$iothub/methods/res/{status}/?$rid={request_id}")
}

/// What a PUBLISH of the upstream to `identity` is; nothing when it cannot be read.
pub(super) fn read(identity: &Identity, publish: &Publish) -> Option<Downward> {
    let topic = publish.topic.as_str();
    if let Some(rest) = topic.strip_prefix("$iothub/twin/res/") {
        let (status, rest) = rest.split_once('/')?;
        let request_id = property(rest, "$rid")?.to_owned();
        let version = property(rest, "$version").and_then(|version| version.parse().ok());
        return Some(Downward::TwinAnswer { status: status.parse().ok()?, request_id, version });
    }
    if topic.starts_with("$iothub/twin/PATCH/properties/desired/") {
        return Some(Downward::Desired);
    }
    if let Some(rest) = topic.strip_prefix("$iothub/methods/POST/") {
        let (name, rest) = rest.split_once('/')?;
        let request_id = property(rest, "$rid")?.to_owned();
        let usable = !name.is_empty() && name.len() <= METHOD_NAME_BYTES_MAX && !request_id.is_empty();
        return usable.then(|| Downward::Method { name: name.into(), request_id });
    }
    let rest = topic.strip_prefix("devices/")?.strip_prefix(identity.device_id())?;
    let rest = rest.strip_prefix("/messages/devicebound")?;
    let text = match rest.strip_prefix('/') {
        Some(text) => text,
        None if rest.is_empty() => rest,
        None => return None,
    };
    let start = topic.len() - text.len();
    bag::read(publish.topic.bytes(), start..topic.len(), &[]).ok().map(Downward::CloudToDevice)
}

/// A message from the cloud as the hub knows messages. MQTT has no lock tokens, so it gets one of its own.
pub(super) fn message(properties: &Properties, payload: Bytes, device: Arc<Sender>) -> Message {
    let token = Uuid::new_v4().to_string();
    let lock = (PropertyName::System(SystemProperty::LockToken), token.as_str());
    let all = properties.iter().map(|property| (property.name, property.value)).chain([lock]);
    Message::new(device, Properties::copied_from(all), payload)
}

/// The value of a property behind a `?`; values are opaque, not decoded.
fn property<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let properties = text.strip_prefix('?')?;
    let mut pairs = properties.split('&').filter_map(|part| part.split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

fn escaped(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::mqtt::packet::Text;
    use crate::head::mqtt::topic::{self as head, Inbound};
    use crate::head::mqtt::username::UserName;
    use crate::message::Origin;

    fn sender(identity: &str) -> Arc<Sender> {
        let identity = Identity::parse(identity).unwrap();
        Arc::new(Sender { identity, origin: Origin::Downstream, model_id: None })
    }

    fn publish(topic: &str) -> Publish {
        let topic = Text::new(Bytes::copy_from_slice(topic.as_bytes())).unwrap();
        Publish { topic, payload: Bytes::new(), packet_id: None, dup: false, retain: false }
    }

    #[test]
    fn a_parent_reads_the_user_name() {
        let leaf = Identity::parse("leaf 1").unwrap_or_else(|_| Identity::parse("leaf1").unwrap());
        let chain = format!("{leaf};edge1");
        let text = user_name("hub.example", &leaf, "edgehub 1.0 (x&y)", Some("dtmi:a;1"), Some(&chain));
        assert!(text.starts_with(&format!("hub.example/{leaf}/?api-version=")), "{text}");
        let read = UserName::parse(&text).unwrap();
        assert_eq!(read.identity, leaf);
        assert_eq!(&*read.product_info, "edgehub 1.0 (x&y)");
        assert_eq!(read.model_id.as_deref(), Some("dtmi:a;1"));
        assert_eq!(read.on_behalf_of(), Some(true));
        let own = Identity::parse("edge1/$edgeHub").unwrap();
        let text = user_name("hub.example", &own, "", None, None);
        assert_eq!(UserName::parse(&text).unwrap().on_behalf_of(), None);
    }

    #[test]
    fn a_parent_reads_what_the_sender_set_and_nothing_of_this_hub() {
        let properties = Properties::copied_from([
            (PropertyName::System(SystemProperty::MessageId), "7/é"),
            (PropertyName::System(SystemProperty::OutputName), "out"),
            (PropertyName::System(SystemProperty::InterfaceId), "other"),
            (PropertyName::System(SystemProperty::ContentType), "application/json"),
            (PropertyName::Application("le=vel"), "h&t #+/ %20"),
            (PropertyName::Application("$.mid"), "not this one"),
        ]);
        let sent = Message::new(sender("edge1/m"), properties, Bytes::new());
        let text = publish(&telemetry(&sent)).topic;
        let Inbound::Telemetry(read) = head::read(&sent.sender.identity, &text, &[]) else {
            panic!("{} is no telemetry", text.as_str())
        };
        assert_eq!(read.system(SystemProperty::MessageId), Value::Text("7/é"));
        assert_eq!(read.system(SystemProperty::ContentType), Value::Text("application/json"));
        assert_eq!(read.system(SystemProperty::OutputName), Value::Absent);
        assert_eq!(read.system(SystemProperty::InterfaceId), Value::Absent);
        assert_eq!(read.application_properties().collect::<Vec<_>>(), [("le=vel", "h&t #+/ %20")]);
        let bare = Message::new(sender("d"), Properties::empty(), Bytes::new());
        assert_eq!(telemetry(&bare), "devices/d/messages/events/");
    }

    #[test]
    fn what_comes_down_is_told_apart() {
        let device = Identity::parse("d").unwrap();
        let read = |topic: &str| read(&device, &publish(topic));
        let answer =
            |status, version| Some(Downward::TwinAnswer { status, request_id: "a1".into(), version });
        assert_eq!(read("$iothub/twin/res/200/?$rid=a1"), answer(200, None));
        assert_eq!(read("$iothub/twin/res/204/?$rid=a1&$version=9"), answer(204, Some(9)));
        assert_eq!(read("$iothub/twin/PATCH/properties/desired/?$version=3"), Some(Downward::Desired));
        let call = Downward::Method { name: "reboot".into(), request_id: "7".into() };
        assert_eq!(read("$iothub/methods/POST/reboot/?$rid=7"), Some(call));
        let Some(Downward::CloudToDevice(properties)) = read("devices/d/messages/devicebound/%24.mid=5&a=b")
        else {
            panic!("no message")
        };
        assert_eq!(properties.system(SystemProperty::MessageId), Value::Text("5"));
        assert!(matches!(read("devices/d/messages/devicebound"), Some(Downward::CloudToDevice(_))));
        for topic in [
            "$iothub/twin/res/x/?$rid=1",
            "$iothub/twin/res/200/",
            "$iothub/methods/POST//?$rid=1",
            "$iothub/methods/POST/m/?$rid=",
            "$iothub/methods/POST/m",
            "devices/d2/messages/devicebound/",
            "devices/d/messages/devicebound/a=b=c",
            "devices/d/messages/events/",
        ] {
            assert_eq!(read(topic), None, "{topic}");
        }
    }

    #[test]
    fn each_message_from_the_cloud_has_a_lock_token_of_its_own() {
        let token = || {
            let message = message(&Properties::empty(), Bytes::new(), sender("d"));
            message.properties.system_bytes(SystemProperty::LockToken).unwrap()
        };
        assert_ne!(token(), token());
    }
}
