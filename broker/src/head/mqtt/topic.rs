//! What the topic of a PUBLISH means, and the topics of what goes out.

use super::bag;
use super::packet::Text;
use crate::backend::{CallId, HeadDrop, STATUS_UNREADABLE};
use crate::identity::Identity;
use crate::message::{Message, Properties, SystemProperty, Value};

const TWIN: &str = "$iothub/twin/";
const METHOD_RESPONSE: &str = "$iothub/methods/res/";
const METHOD_CALL: &str = "$iothub/methods/POST/";
const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/";

/// Bytes of the longest topic (MQTT 3.1.1 §1.5.3).
const TOPIC_BYTES_MAX: usize = 65_535;

/// What a PUBLISH from a client is.
#[derive(Debug, Clone, PartialEq)]
pub enum Inbound<'a> {
    /// A message of the identity.
    Telemetry(Properties),
    /// The client reads its twin; the request id is echoed as it came.
    TwinGet {
        /// Request id, not empty.
        request_id: &'a str,
    },
    /// The client patches its reported properties; without a request id it gets no answer.
    TwinPatch {
        /// Request id.
        request_id: Option<&'a str>,
    },
    /// The answer to a direct method.
    MethodResponse {
        /// The method's status, or [`STATUS_UNREADABLE`].
        status: i32,
        /// Request id of the call.
        request_id: &'a str,
    },
    /// Acknowledged, counted, and dropped.
    Drop(HeadDrop),
    /// The connection must be closed.
    Close(TopicError),
}

/// Why a topic ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// The topic names another sender than the identity of the connection.
    #[error("the topic names another sender than the identity of the connection")]
    SenderMismatch,
    /// The topic begins like a twin request and is none.
    #[error("the twin topic is malformed")]
    Twin,
}

/// Reads the topic of a PUBLISH from `identity`; `added` are application properties that the head adds.
pub fn read<'a>(identity: &Identity, topic: &'a Text, added: &[(&str, &str)]) -> Inbound<'a> {
    let text = topic.as_str();
    if let Some(rest) = text.strip_prefix(TWIN) {
        return twin_request(rest).unwrap_or(Inbound::Close(TopicError::Twin));
    }
    if let Some(rest) = text.strip_prefix(METHOD_RESPONSE) {
        return method_response(rest).unwrap_or(Inbound::Drop(HeadDrop::BadTopic));
    }
    let Some(telemetry) = TelemetryTopic::read(text) else { return Inbound::Drop(HeadDrop::BadTopic) };
    if telemetry.device != identity.device_id() || telemetry.module != identity.module_id() {
        return Inbound::Close(TopicError::SenderMismatch);
    }
    let start = text.len() - telemetry.behind.len();
    match bag::read(topic.bytes(), start..start + telemetry.bag.len(), added) {
        Ok(properties) => Inbound::Telemetry(properties),
        Err(bag::BagError) => Inbound::Drop(HeadDrop::BadProperties),
    }
}

/// Appends the topic under which `message` goes to an input of the module `receiver`.
pub fn write_input(out: &mut Vec<u8>, receiver: &Identity, input: &str, message: &Message) {
    for text in [
        "devices/",
        receiver.device_id(),
        "/modules/",
        receiver.module_id().unwrap_or_default(),
        "/inputs/",
        input,
        "/",
    ] {
        out.extend_from_slice(text.as_bytes());
    }
    bag::write(out, Some(&message.sender.identity), &message.properties);
}

/// Appends the topic under which a cloud-to-device `message` goes to `device`. Its bag is never empty, because SDKs
/// take the level behind `devicebound` for granted.
pub fn write_device_bound(out: &mut Vec<u8>, device: &str, message: &Message) {
    for text in ["devices/", device, "/messages/devicebound/"] {
        out.extend_from_slice(text.as_bytes());
    }
    let named = [SystemProperty::To, SystemProperty::MessageId]
        .into_iter()
        .any(|property| message.properties.system(property) != Value::Absent);
    if !named {
        bag::write_pair(out, "$.to", &format!("/devices/{device}/messages/devicebound"));
        out.push(b'&');
    }
    let start = out.len();
    bag::write(out, None, &message.properties);
    if !named && out.len() == start {
        out.pop();
    }
}

/// The topic of the answer to a twin request; `version` is that of the changed reported properties.
pub fn twin_response(status: u16, request_id: &str, version: Option<u64>) -> String {
    match version {
        None => format!("{TWIN}res/{status}/?$rid={request_id}"),
        Some(version) => format!("{TWIN}res/{status}/?$rid={request_id}&$version={version}"),
    }
}

/// The topic that tells of desired properties which changed to `version`.
pub fn desired(version: u64) -> String {
    format!("{DESIRED}?$version={version}")
}

/// The topic of a method call; nothing when no topic can carry the method's name, which is written as it is.
pub fn method_call(name: &str, call: CallId) -> Option<String> {
    if name.contains(['/', '+', '#', '\0']) {
        return None;
    }
    let topic = format!("{METHOD_CALL}{name}/?$rid={call}");
    (topic.len() <= TOPIC_BYTES_MAX).then_some(topic)
}

/// `devices/{device}[/modules/{module}]/messages/events[/[{bag}[/]]]`
struct TelemetryTopic<'a> {
    device: &'a str,
    module: Option<&'a str>,
    bag: &'a str,
    /// The bag and all that is behind it.
    behind: &'a str,
}

impl<'a> TelemetryTopic<'a> {
    fn read(text: &'a str) -> Option<Self> {
        let (device, rest) = text.strip_prefix("devices/")?.split_once('/')?;
        let (module, rest) = match rest.strip_prefix("modules/") {
            Some(rest) => {
                let (module, rest) = rest.split_once('/')?;
                (Some(module), rest)
            }
            None => (None, rest),
        };
        let rest = rest.strip_prefix("messages/events")?;
        let behind = match rest.strip_prefix('/') {
            Some(behind) => behind,
            None if rest.is_empty() => rest,
            None => return None,
        };
        let bag = behind.strip_suffix('/').unwrap_or(behind);
        (!bag.contains('/')).then_some(Self { device, module, bag, behind })
    }
}

fn twin_request(text: &str) -> Option<Inbound<'_>> {
    if let Some(rest) = text.strip_prefix("GET/") {
        let request_id = request_id(rest)?.filter(|id| !id.is_empty())?;
        return Some(Inbound::TwinGet { request_id });
    }
    let rest = text.strip_prefix("PATCH/properties/reported/")?;
    Some(Inbound::TwinPatch { request_id: request_id(rest)?.filter(|id| !id.is_empty()) })
}

/// The value of `$rid` behind a `?`; nothing at all when the text is malformed. Values are opaque: not decoded.
fn request_id(text: &str) -> Option<Option<&str>> {
    if text.is_empty() {
        return Some(None);
    }
    let properties = text.strip_prefix('?')?;
    let mut names: Vec<&str> = Vec::new();
    let mut request_id = None;
    for part in properties.split('&') {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        if names.contains(&name) || names.len() == TWIN_PROPERTIES_MAX {
            return None;
        }
        names.push(name);
        if name == "$rid" {
            request_id = Some(value);
        }
    }
    Some(request_id)
}

/// Most properties in the topic of a twin request; two are known.
const TWIN_PROPERTIES_MAX: usize = 64;

fn method_response(text: &str) -> Option<Inbound<'_>> {
    let (status, rest) = text.split_once('/')?;
    let request_id = rest.strip_prefix("?$rid=")?;
    if memchr::memchr2(b'/', b'&', request_id.as_bytes()).is_some() {
        return None;
    }
    Some(Inbound::MethodResponse { status: status.parse().unwrap_or(STATUS_UNREADABLE), request_id })
}
