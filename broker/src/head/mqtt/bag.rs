//! The property bag: properties of a message as `name=value` pairs in the last level of its topic.

use std::ops::Range;

use bytes::Bytes;
use smallvec::SmallVec;

use super::percent;
use crate::identity::Identity;
use crate::message::{Properties, PropertiesBuilder, PropertyName, SystemProperty, Value};

/// Wire names of the system properties: what comes in under the name is this property, and the reverse.
const WIRE_NAMES: [(&str, SystemProperty); 14] = [
    ("$.mid", SystemProperty::MessageId),
    ("$.cid", SystemProperty::CorrelationId),
    ("$.uid", SystemProperty::UserId),
    ("$.to", SystemProperty::To),
    ("$.exp", SystemProperty::AbsoluteExpiryTime),
    ("$.ct", SystemProperty::ContentType),
    ("$.ce", SystemProperty::ContentEncoding),
    ("$.schema", SystemProperty::MessageSchema),
    ("$.ctime", SystemProperty::CreationTime),
    ("$.on", SystemProperty::OutputName),
    ("$.ifid", SystemProperty::InterfaceId),
    ("$.sub", SystemProperty::ComponentName),
    ("ack", SystemProperty::Ack),
    ("iothub-operation", SystemProperty::Operation),
];
const SENDER_DEVICE: &str = "$.cdid";
const SENDER_MODULE: &str = "$.cmid";

/// The text is no property bag, or holds too many properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the property bag is malformed")]
pub struct BagError;

/// Reads the bag at `range` of `source` and adds application properties of the head's own.
///
/// The properties are slices of `source` as long as nothing is percent-encoded but the `$` of known names; otherwise
/// they share one decoded buffer.
///
/// # Errors
/// When a name is missing, a value holds `=`, or there are too many properties.
pub fn read(source: &Bytes, range: Range<usize>, added: &[(&str, &str)]) -> Result<Properties, BagError> {
    let text = source.get(range.clone()).and_then(|bytes| std::str::from_utf8(bytes).ok()).ok_or(BagError)?;
    let mut pairs: SmallVec<[Pair<'_>; 8]> = SmallVec::new();
    if !text.trim().is_empty() {
        for part in text.split('&') {
            pairs.push(Pair::read(part)?);
        }
    }
    if pairs.is_empty() && added.is_empty() {
        return Ok(Properties::empty());
    }
    let properties = if added.is_empty() && !pairs.iter().any(Pair::needs_decoding) {
        in_place(source, range, text, &pairs)
    } else {
        decoded(text, &pairs, added)
    };
    properties.finish().map_err(|_| BagError)
}

/// Appends the bag of an outgoing message: system properties first, then application properties, all percent-encoded.
///
/// `sender` becomes `$.cdid` and `$.cmid` unless the message says on whose behalf it was relayed.
pub fn write(out: &mut Vec<u8>, sender: Option<&Identity>, properties: &Properties) {
    let mut separator = Separator { first: true };
    let relayed = |property| match properties.system(property) {
        Value::Text(text) => Some(text),
        Value::Null | Value::Absent => None,
    };
    let relayed_device = relayed(SystemProperty::OriginalSenderDeviceId);
    let relayed_module = relayed(SystemProperty::OriginalSenderModuleId);
    let device = relayed_device.or(sender.map(Identity::device_id));
    let module = relayed_module.or(sender.and_then(Identity::module_id));
    for (name, value) in [(SENDER_DEVICE, device), (SENDER_MODULE, module)] {
        if let Some(value) = value {
            separator.pair(out, name, value);
        }
    }
    for property in properties.iter() {
        if let PropertyName::System(system) = property.name
            && let Some(name) = outgoing_name(system)
        {
            separator.pair(out, name, property.value);
        }
    }
    for (name, value) in properties.application_properties() {
        let hidden = match name {
            SENDER_DEVICE => device.is_some(),
            SENDER_MODULE => module.is_some(),
            name => system_property(name).is_some_and(|system| {
                outgoing_name(system).is_some() && properties.system(system) != Value::Absent
            }),
        };
        if !hidden {
            separator.pair(out, name, value);
        }
    }
}

/// Appends one property alone.
pub(super) fn write_pair(out: &mut Vec<u8>, name: &str, value: &str) {
    Separator { first: true }.pair(out, name, value);
}

struct Pair<'a> {
    name: &'a str,
    value: Option<&'a str>,
    system: Option<SystemProperty>,
}

impl<'a> Pair<'a> {
    fn read(part: &'a str) -> Result<Self, BagError> {
        let (name, value) = match part.split_once('=') {
            Some((name, value)) => (name, Some(value).filter(|value| !value.is_empty())),
            None => (part, None),
        };
        if name.is_empty() || value.is_some_and(|value| value.contains('=')) {
            return Err(BagError);
        }
        Ok(Self { name, value, system: system_property(name) })
    }

    fn needs_decoding(&self) -> bool {
        let escaped = |text: &str| memchr::memchr(b'%', text.as_bytes()).is_some();
        (self.system.is_none() && escaped(self.name)) || self.value.is_some_and(escaped)
    }
}

fn in_place(source: &Bytes, range: Range<usize>, text: &str, pairs: &[Pair<'_>]) -> PropertiesBuilder {
    let mut builder = PropertiesBuilder::over(source.slice(range));
    let mut at = 0;
    for pair in pairs {
        let name = at..at + pair.name.len();
        let value = match pair.value {
            Some(value) => name.end + 1..name.end + 1 + value.len(),
            None => name.end..name.end,
        };
        // `name=` has one byte more than its name and value.
        let equals = text.as_bytes().get(name.end) == Some(&b'=') && pair.value.is_none();
        at = value.end + usize::from(equals) + 1;
        add(&mut builder, pair.system, name, value, pair.value.is_none());
    }
    builder
}

fn decoded(text: &str, pairs: &[Pair<'_>], added: &[(&str, &str)]) -> PropertiesBuilder {
    let added_bytes: usize = added.iter().map(|(name, value)| name.len() + value.len()).sum();
    let mut buffer = Vec::with_capacity(text.len() + added_bytes);
    let mut spans: SmallVec<[_; 8]> = SmallVec::new();
    for pair in pairs {
        let start = buffer.len();
        if pair.system.is_none() {
            percent::decode_into(pair.name, &mut buffer);
        }
        let middle = buffer.len();
        percent::decode_into(pair.value.unwrap_or_default(), &mut buffer);
        let system = pair
            .system
            .or_else(|| std::str::from_utf8(&buffer[start..middle]).ok().and_then(system_property));
        spans.push((system, start..middle, middle..buffer.len(), pair.value.is_none()));
    }
    for (name, value) in added {
        let start = buffer.len();
        buffer.extend_from_slice(name.as_bytes());
        let middle = buffer.len();
        buffer.extend_from_slice(value.as_bytes());
        spans.push((None, start..middle, middle..buffer.len(), false));
    }
    let mut builder = PropertiesBuilder::over(Bytes::from(buffer));
    for (system, name, value, null) in spans {
        add(&mut builder, system, name, value, null);
    }
    builder
}

fn add(
    builder: &mut PropertiesBuilder,
    system: Option<SystemProperty>,
    name: Range<usize>,
    value: Range<usize>,
    null: bool,
) {
    match system {
        Some(property) => builder.system(property, value, null),
        None => builder.application(name, value, null),
    }
}

/// The system property behind a name on the wire; its `$` may be escaped.
fn system_property(name: &str) -> Option<SystemProperty> {
    let suffix = name.strip_prefix("$.").or_else(|| name.strip_prefix("%24."));
    WIRE_NAMES.iter().find_map(|(wire, property)| {
        let same = match (suffix, wire.strip_prefix("$.")) {
            (Some(suffix), Some(wire)) => suffix == wire,
            (None, None) => name == *wire,
            _ => false,
        };
        same.then_some(*property)
    })
}

/// The wire name of a system property that clients get to see.
fn outgoing_name(property: SystemProperty) -> Option<&'static str> {
    if matches!(property, SystemProperty::OutputName | SystemProperty::InterfaceId) {
        return None;
    }
    WIRE_NAMES.iter().find(|(_, known)| *known == property).map(|(wire, _)| *wire)
}

struct Separator {
    first: bool,
}

impl Separator {
    fn pair(&mut self, out: &mut Vec<u8>, name: &str, value: &str) {
        if !std::mem::replace(&mut self.first, false) {
            out.push(b'&');
        }
        percent::encode_into(name, out);
        out.push(b'=');
        percent::encode_into(value, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(bag: &str) -> Result<Properties, BagError> {
        let source = Bytes::copy_from_slice(bag.as_bytes());
        read(&source, 0..bag.len(), &[])
    }

    #[test]
    fn plain_bags_are_read_in_place() {
        let source = Bytes::from_static(b"topic/%24.on=out&a=1&b&c=&d=4");
        let properties = read(&source, 6..source.len(), &[]).unwrap();
        assert_eq!(properties.system(SystemProperty::OutputName), Value::Text("out"));
        assert_eq!(properties.application(|name| name == "a"), Value::Text("1"));
        assert_eq!(properties.application(|name| name == "b"), Value::Null);
        assert_eq!(properties.application(|name| name == "c"), Value::Null);
        assert_eq!(properties.application(|name| name == "d"), Value::Text("4"));
        let Value::Text(value) = properties.application(|name| name == "d") else { panic!("no value") };
        assert!(source.as_ptr_range().contains(&value.as_ptr()));
    }

    #[test]
    fn added_properties_win_over_those_of_the_bag() {
        let source = Bytes::from_static(b"mqtt-dup=no&a=1");
        let properties = read(&source, 0..source.len(), &[("mqtt-dup", "true")]).unwrap();
        assert_eq!(properties.len(), 2);
        assert_eq!(properties.application(|name| name == "mqtt-dup"), Value::Text("true"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            names in proptest::collection::btree_map("[^\u{0}]{1,20}", ".{0,30}", 0..10),
            content_type in proptest::option::of(".{1,20}"),
        ) {
            let application = names
                .iter()
                .filter(|(name, _)| system_property(name).is_none())
                .map(|(name, value)| (PropertyName::Application(name), value.as_str()));
            let system = content_type
                .iter()
                .map(|value| (PropertyName::System(SystemProperty::ContentType), value.as_str()));
            let before = Properties::copied_from(system.chain(application));
            let mut bag = Vec::new();
            write(&mut bag, None, &before);
            let after = parse(std::str::from_utf8(&bag).unwrap()).unwrap();
            prop_assert_eq!(after.len(), before.len());
            for (one, other) in before.iter().zip(after.iter()) {
                prop_assert_eq!((one.name, one.value), (other.name, other.value));
            }
        }

        #[test]
        fn both_ways_of_reading_agree(bag in "[a-c$.%24=&on]{0,30}") {
            let source = Bytes::copy_from_slice(bag.as_bytes());
            let one = read(&source, 0..bag.len(), &[]);
            let other = read(&source, 0..bag.len(), &[("z", "")]);
            prop_assert_eq!(one.is_ok(), other.is_ok());
            if let (Ok(one), Ok(other)) = (one, other) {
                prop_assert!(one.iter().eq(other.iter().take(one.len())));
            }
        }
    }
}
