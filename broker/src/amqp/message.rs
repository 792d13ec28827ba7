//! The sections of an AMQP message (AMQP 1.0 §3.2): found by one walk, decoded only when asked for.

use std::cell::RefCell;

use bytes::{BufMut, Bytes, BytesMut};
use smallvec::SmallVec;

use super::encode::*;
use super::error::WireError;
use super::event::Payload;
use super::text::MessageId;
use super::value::{Fields, Reader, Text, Value};
use super::wire::check_value;
use super::{BATCH_MESSAGES_MAX, MESSAGE_FORMAT_BATCH};

const ANNOTATIONS: u64 = 0x72;
const HEADER: u64 = 0x70;
const PROPERTIES: u64 = 0x73;
const APPLICATION_PROPERTIES: u64 = 0x74;
const DATA: u64 = 0x75;
const SEQUENCE: u64 = 0x76;
const VALUE: u64 = 0x77;

/// The body of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// Data sections, in order; none for a message without a body.
    Data(SmallVec<[Bytes; 1]>),
    /// An amqp-value section; its encoding.
    Value(Bytes),
    /// One or more amqp-sequence sections.
    Sequence,
}

impl Body {
    /// The data sections as one: a slice when there is one, a copy when there are more; `None` for other bodies.
    pub fn data(&self) -> Option<Bytes> {
        match self {
            Self::Data(sections) => Some(match &sections[..] {
                [] => Bytes::new(),
                [one] => one.clone(),
                more => {
                    let mut joined = BytesMut::with_capacity(more.iter().map(Bytes::len).sum());
                    more.iter().for_each(|section| joined.put_slice(section));
                    joined.freeze()
                }
            }),
            Self::Value(_) | Self::Sequence => None,
        }
    }
}

/// A received message. Sections are checked slices of the payload; header, delivery annotations and footer are
/// skipped.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    annotations: Option<Bytes>,
    properties: Option<Bytes>,
    application: Option<Bytes>,
    /// The body.
    pub body: Body,
}

impl Message {
    /// Finds the sections of an encoded message, and checks all of it.
    pub fn parse(payload: &Bytes) -> Result<Self, WireError> {
        let mut message = Self {
            annotations: None,
            properties: None,
            application: None,
            body: Body::Data(SmallVec::new()),
        };
        let mut pos = 0;
        let mut previous = 0;
        while pos < payload.len() {
            let (section, start) = match payload[pos..] {
                [0x00, 0x53, code, ..] => (u64::from(code), pos + 3),
                _ => {
                    let mut reader = Reader::new(payload, pos);
                    let code = reader.descriptor()?;
                    (code, reader.position())
                }
            };
            // Sections have an order; only data and sequence may repeat.
            let repeats = section == previous && matches!(section, DATA | SEQUENCE);
            if !(0x70..=0x78).contains(&section) || (section <= previous && !repeats) {
                return Err(WireError::UnexpectedDescriptor);
            }
            let body_before = matches!(previous, DATA | SEQUENCE | VALUE);
            if body_before && matches!(section, SEQUENCE | VALUE) && !repeats {
                return Err(WireError::UnexpectedDescriptor);
            }
            previous = section;
            let end = check_value(payload, start)?;
            match section {
                ANNOTATIONS => message.annotations = Some(payload.slice(start..end)),
                PROPERTIES => message.properties = Some(payload.slice(start..end)),
                APPLICATION_PROPERTIES => message.application = Some(payload.slice(start..end)),
                DATA => {
                    let content = match payload[start] {
                        0xa0 => start + 2,
                        0xb0 => start + 5,
                        _ => return Err(WireError::WrongType),
                    };
                    if let Body::Data(sections) = &mut message.body {
                        sections.push(payload.slice(content..end));
                    }
                }
                SEQUENCE => message.body = Body::Sequence,
                VALUE => message.body = Body::Value(payload.slice(start..end)),
                _ => {} // header, delivery annotations, footer
            }
            pos = end;
        }
        Ok(message)
    }

    /// Message annotations, one by one.
    pub fn annotations(&self) -> Result<Entries<'_>, WireError> {
        Entries::new(self.annotations.as_ref())
    }

    /// Application properties, one by one.
    pub fn application_properties(&self) -> Result<Entries<'_>, WireError> {
        Entries::new(self.application.as_ref())
    }

    /// The annotation of this name; `None` when absent.
    pub fn annotation(&self, name: &str) -> Result<Option<Value>, WireError> {
        find(self.annotations()?, name)
    }

    /// The application property of this name; `None` when absent.
    pub fn application_property(&self, name: &str) -> Result<Option<Value>, WireError> {
        find(self.application_properties()?, name)
    }

    /// The properties section; empty when absent.
    pub fn properties(&self) -> Result<MessageProperties, WireError> {
        let Some(section) = &self.properties else { return Ok(MessageProperties::default()) };
        let mut list = Reader::walked(section).list()?;
        let f = &mut list;
        Ok(MessageProperties {
            message_id: MessageId::of(f.value()?)?,
            user_id: f.binary()?,
            to: f.text()?,
            subject: f.text()?,
            reply_to: f.text()?,
            correlation_id: MessageId::of(f.value()?)?,
            content_type: f.text()?,
            content_encoding: f.text()?,
            absolute_expiry_time_millis: f.timestamp_millis()?,
            creation_time_millis: f.timestamp_millis()?,
        })
    }

    /// The value of an amqp-value body; `None` for other bodies.
    pub fn value(&self) -> Result<Option<Value>, WireError> {
        match &self.body {
            Body::Value(encoded) => Reader::walked(encoded).value().map(Some),
            Body::Data(_) | Body::Sequence => Ok(None),
        }
    }
}

fn find(entries: Entries<'_>, name: &str) -> Result<Option<Value>, WireError> {
    for entry in entries {
        let (key, value) = entry?;
        if key == name {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// Keys and values of a map section. Keys that are no text are passed over.
#[derive(Debug, Clone)]
pub struct Entries<'a>(Option<Fields<'a>>);

impl<'a> Entries<'a> {
    fn new(section: Option<&'a Bytes>) -> Result<Self, WireError> {
        match section {
            // A null section is an empty one.
            Some(encoded) if encoded[..] != [0x40] => Ok(Self(Some(Reader::walked(encoded).map()?))),
            _ => Ok(Self(None)),
        }
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<(Text, Value), WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        let fields = self.0.as_mut()?;
        while !fields.is_empty() {
            let entry = fields.key().and_then(|key| Ok((key, fields.value()?)));
            match entry {
                Ok((Some(key), value)) => return Some(Ok((key, value))),
                Ok((None, _)) => {}
                Err(error) => {
                    self.0 = None;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

/// The properties section, without the group fields.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MessageProperties {
    /// `message-id`
    pub message_id: Option<MessageId>,
    /// `user-id`
    pub user_id: Option<Bytes>,
    /// `to`
    pub to: Option<Text>,
    /// `subject`
    pub subject: Option<Text>,
    /// `reply-to`
    pub reply_to: Option<Text>,
    /// `correlation-id`
    pub correlation_id: Option<MessageId>,
    /// `content-type`, a symbol
    pub content_type: Option<Text>,
    /// `content-encoding`, a symbol
    pub content_encoding: Option<Text>,
    /// `absolute-expiry-time`, milliseconds since 1970
    pub absolute_expiry_time_millis: Option<i64>,
    /// `creation-time`, milliseconds since 1970
    pub creation_time_millis: Option<i64>,
}

impl MessageProperties {
    fn is_empty(&self) -> bool {
        let Self {
            message_id: None,
            user_id: None,
            to: None,
            subject: None,
            reply_to: None,
            correlation_id: None,
            content_type: None,
            content_encoding: None,
            absolute_expiry_time_millis: None,
            creation_time_millis: None,
        } = self
        else {
            return false;
        };
        true
    }
}

/// Size of the blocks that messages for at once are cut from, in bytes.
const BLOCK_BYTES: usize = 16_384;

thread_local! {
    /// The rest of the block that the next message for at once is cut from.
    static BLOCK: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Writes a message; call in the order of the methods. Empty sections are left out.
#[derive(Debug, Default)]
pub struct MessageEncoder {
    out: BytesMut,
    /// `out` is the thread's block.
    of_block: bool,
}

impl MessageEncoder {
    /// An empty message with place for `capacity_bytes` in front of the body.
    pub fn with_capacity(capacity_bytes: usize) -> Self {
        Self { out: BytesMut::with_capacity(capacity_bytes), of_block: false }
    }

    /// An empty message that is sent before the next one is written, or soon after. It shares a block of memory with
    /// others of this thread: whoever keeps it long keeps all of the block.
    pub fn for_at_once(capacity_bytes: usize) -> Self {
        let mut out = BLOCK.take();
        if out.capacity() < capacity_bytes && !out.try_reclaim(BLOCK_BYTES) {
            out = BytesMut::with_capacity(BLOCK_BYTES.max(capacity_bytes));
        }
        Self { out, of_block: true }
    }

    /// What was written.
    fn take(mut self) -> Bytes {
        if !self.of_block {
            return self.out.freeze();
        }
        let written = self.out.split().freeze();
        BLOCK.set(self.out);
        written
    }

    /// A header that asks the receiver to keep the message over its own end.
    pub fn durable(&mut self) -> &mut Self {
        let mut list = CompoundWriter::described_list(&mut self.out, HEADER);
        put_bool(list.field(), true);
        list.finish();
        self
    }

    /// Message annotations; keys are symbols.
    pub fn annotations<'v>(&mut self, entries: impl IntoIterator<Item = (&'v str, Value)>) -> &mut Self {
        self.annotations_by(entries, |out, value| put_value(out, &value))
    }

    /// Message annotations, each written by `put` as exactly one value; keys are symbols.
    pub(crate) fn annotations_by<'v, V>(
        &mut self,
        entries: impl IntoIterator<Item = (&'v str, V)>,
        put: impl Fn(&mut BytesMut, V),
    ) -> &mut Self {
        self.map(ANNOTATIONS, put_symbol, entries, put)
    }

    /// The properties section.
    pub fn properties(&mut self, properties: &MessageProperties) -> &mut Self {
        if properties.is_empty() {
            return self;
        }
        let timestamp = |out: &mut BytesMut, millis| put_value(out, &Value::TimestampMillis(millis));
        let mut list = CompoundWriter::described_list(&mut self.out, PROPERTIES);
        list.optional(properties.message_id.as_ref(), |out, id| id.put(out));
        list.optional(properties.user_id.as_deref(), put_binary);
        list.optional(properties.to.as_deref(), put_string);
        list.optional(properties.subject.as_deref(), put_string);
        list.optional(properties.reply_to.as_deref(), put_string);
        list.optional(properties.correlation_id.as_ref(), |out, id| id.put(out));
        list.optional(properties.content_type.as_deref(), put_symbol);
        list.optional(properties.content_encoding.as_deref(), put_symbol);
        list.optional(properties.absolute_expiry_time_millis, timestamp);
        list.optional(properties.creation_time_millis, timestamp);
        list.finish();
        self
    }

    /// Application properties whose values are strings.
    pub fn application_strings<'v>(
        &mut self,
        entries: impl IntoIterator<Item = (&'v str, &'v str)>,
    ) -> &mut Self {
        self.application(entries, put_string)
    }

    /// Application properties of any type.
    pub fn application_values<'v>(
        &mut self,
        entries: impl IntoIterator<Item = (&'v str, Value)>,
    ) -> &mut Self {
        self.application(entries, |out, value| put_value(out, &value))
    }

    /// Application properties, each written by `put` as exactly one value.
    pub(crate) fn application<'v, V>(
        &mut self,
        entries: impl IntoIterator<Item = (&'v str, V)>,
        put: impl Fn(&mut BytesMut, V),
    ) -> &mut Self {
        self.map(APPLICATION_PROPERTIES, put_string, entries, put)
    }

    /// A section that is a map; without entries there is none.
    fn map<'v, V>(
        &mut self,
        section: u64,
        put_key: impl Fn(&mut BytesMut, &str),
        entries: impl IntoIterator<Item = (&'v str, V)>,
        put: impl Fn(&mut BytesMut, V),
    ) -> &mut Self {
        let mut entries = entries.into_iter().peekable();
        if entries.peek().is_some() {
            let mut map = CompoundWriter::described_map(&mut self.out, section);
            for (key, value) in entries {
                map.entry(|out| put_key(out, key), |out| put(out, value));
            }
            map.finish();
        }
        self
    }

    /// Ends with one data section that is `body`, not copied.
    pub fn data(mut self, body: Bytes) -> Payload {
        put_descriptor(&mut self.out, DATA);
        put_binary_header(&mut self.out, body.len());
        let mut payload = Payload::new();
        payload.push(self.take());
        if !body.is_empty() {
            payload.push(body);
        }
        payload
    }

    /// Ends with an amqp-value section.
    pub fn value(mut self, value: &Value) -> Payload {
        put_descriptor(&mut self.out, VALUE);
        put_value(&mut self.out, value);
        Payload::from_iter([self.take()])
    }

    /// Ends without a body.
    pub fn no_body(self) -> Payload {
        Payload::from_iter([self.take()])
    }
}

/// Puts messages into one of format [`MESSAGE_FORMAT_BATCH`]; their bodies are not copied.
pub fn encode_batch(messages: impl IntoIterator<Item = Payload>) -> Payload {
    let mut batch = Payload::new();
    for message in messages {
        let len = message.iter().map(Bytes::len).sum();
        let mut head = BytesMut::with_capacity(8 + message.first().map_or(0, Bytes::len));
        put_descriptor(&mut head, DATA);
        put_binary_header(&mut head, len);
        let mut pieces = message.into_iter();
        if let Some(first) = pieces.next() {
            head.put_slice(&first); // sections in front of the body: short, and saves a piece
        }
        batch.push(head.freeze());
        batch.extend(pieces);
    }
    batch
}

/// The messages of a transfer: one, or those of a batch. All are checked before the first is given.
pub fn parse_batch(format: u32, payload: &Bytes) -> Result<SmallVec<[Message; 1]>, WireError> {
    let outer = Message::parse(payload)?;
    if format != MESSAGE_FORMAT_BATCH {
        return Ok(SmallVec::from_iter([outer]));
    }
    match &outer.body {
        Body::Data(sections) if sections.len() <= BATCH_MESSAGES_MAX => {
            sections.iter().map(Message::parse).collect()
        }
        Body::Data(_) => Err(WireError::TooManyMessages),
        Body::Value(_) | Body::Sequence => Err(WireError::WrongType),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(payload: Payload) -> Bytes {
        Bytes::from(payload.concat())
    }

    fn sample() -> Payload {
        let mut encoder = MessageEncoder::with_capacity(64);
        encoder
            .annotations([
                ("x-opt-input-name", Value::String("in1".into())),
                ("iothub-deliverycount", Value::Ubyte(3)),
            ])
            .properties(&MessageProperties {
                message_id: Some(MessageId::Uuid([0x6f; 16])),
                user_id: Some(Bytes::from_static(b"u")),
                content_type: Some("application/json".into()),
                absolute_expiry_time_millis: Some(1_893_456_000_123),
                ..MessageProperties::default()
            })
            .application_strings([("a", "1"), ("b", "")]);
        encoder.data(Bytes::from_static(b"{}"))
    }

    #[test]
    fn sections_survive() {
        let payload = sample();
        assert_eq!(payload.len(), 2);
        let message = Message::parse(&joined(payload)).expect("legal");
        assert_eq!(message.annotation("iothub-deliverycount"), Ok(Some(Value::Ubyte(3))));
        let properties = message.properties().expect("legal");
        assert_eq!(
            properties.message_id.map(|id| id.to_string()).as_deref(),
            Some("6f6f6f6f-6f6f-6f6f-6f6f-6f6f6f6f6f6f")
        );
        assert_eq!(properties.content_type.as_deref(), Some("application/json"));
        assert_eq!(properties.absolute_expiry_time_millis, Some(1_893_456_000_123));
        let user: Vec<_> =
            message.application_properties().expect("legal").map(|entry| entry.expect("legal")).collect();
        assert_eq!(user, [("a".into(), Value::String("1".into())), ("b".into(), Value::String("".into()))]);
        assert_eq!(message.body.data().as_deref(), Some(&b"{}"[..]));
    }

    #[test]
    fn messages_for_at_once_share_a_block_and_not_their_bytes() {
        let write = |text: &str| {
            let mut encoder = MessageEncoder::for_at_once(64);
            encoder.application_strings([("text", text)]);
            joined(encoder.data(Bytes::from_static(b"{}")))
        };
        let text = |payload: &Bytes| {
            let message = Message::parse(payload).expect("legal");
            message.application_property("text").expect("legal").expect("present")
        };
        let long = "x".repeat(2 * BLOCK_BYTES);
        let all = ["first", "second", &long, "third", &"y".repeat(BLOCK_BYTES - 10), "fourth"];
        let payloads: Vec<Bytes> = all.iter().map(|text| write(text)).collect();
        for (wanted, payload) in all.iter().zip(&payloads) {
            assert_eq!(text(payload), Value::String((*wanted).into()));
        }
    }

    #[test]
    fn batches() {
        let batch = joined(encode_batch([sample(), sample(), MessageEncoder::default().no_body()]));
        let messages = parse_batch(MESSAGE_FORMAT_BATCH, &batch).expect("legal");
        assert_eq!(messages.len(), 3);
        assert_eq!(messages[1].body.data().as_deref(), Some(&b"{}"[..]));
        assert_eq!(messages[2].body.data().as_deref(), Some(&b""[..]));
        // One bad message spoils the batch.
        let bad = Payload::from_iter([Bytes::from_static(&[0x00, 0x53, 0x99, 0x40])]);
        let batch = joined(encode_batch([sample(), bad]));
        assert!(parse_batch(MESSAGE_FORMAT_BATCH, &batch).is_err());
    }

    #[test]
    fn other_bodies_and_wrong_orders() {
        let value = MessageEncoder::default().value(&Value::String("token".into()));
        let message = Message::parse(&joined(value)).expect("legal");
        assert_eq!(message.value(), Ok(Some(Value::String("token".into()))));
        assert_eq!(message.body.data(), None);
        // Symbolic descriptor of a data section.
        let mut bytes = BytesMut::new();
        bytes.put_slice(&[0x00]);
        put_symbol(&mut bytes, "amqp:data:binary");
        put_binary(&mut bytes, b"xy");
        let message = Message::parse(&bytes.freeze()).expect("legal");
        assert_eq!(message.body.data().as_deref(), Some(&b"xy"[..]));
        for bad in [
            &[0x00u8, 0x53, 0x75, 0xa1, 0][..],
            &[0x00, 0x53, 0x75, 0xa0, 1],
            &[0x00, 0x53, 0x75, 0xa0, 0, 0x00, 0x53, 0x73, 0x45],
            &[0x00, 0x53, 0x77, 0x40, 0x00, 0x53, 0x77, 0x40],
            &[0x00, 0x53, 0x75, 0xa0, 0, 0x00, 0x53, 0x77, 0x40],
            &[0x40],
            &[0x00],
        ] {
            assert!(Message::parse(&Bytes::from_static(bad)).is_err(), "{bad:02x?}");
        }
    }

    proptest! {
        #[test]
        fn mutations_never_panic(at in 0usize..120, byte in any::<u8>(), cut in 0usize..120) {
            let mut bytes = joined(sample()).to_vec();
            let len = bytes.len();
            bytes[at % len] = byte;
            bytes.truncate(len - cut % len);
            let bytes = Bytes::from(bytes);
            for format in [0, MESSAGE_FORMAT_BATCH] {
                if let Ok(messages) = parse_batch(format, &bytes) {
                    for message in messages {
                        let _ = message.properties();
                        let _ = message.value();
                        if let Ok(entries) = message.application_properties() { let _ = entries.count(); }
                        if let Ok(entries) = message.annotations() { let _ = entries.count(); }
                    }
                }
            }
        }
    }
}
