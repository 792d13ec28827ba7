//! The packets that a client may send, decoded strictly: what comes out of here cannot be wrong in form.
//!
//! One function per packet type, each walks the body once, checks what MQTT 3.1.1 demands of it, and leaves nothing
//! over. All texts and payloads are slices of the read buffer.

use std::num::NonZeroU16;

use bytes::Bytes;

use super::filter;
use super::frame::Frame;

/// Most filters in one SUBSCRIBE or UNSUBSCRIBE; bounds what a packet full of tiny filters costs.
pub const FILTERS_PER_PACKET_MAX: usize = 1_000;

/// A packet identifier; never 0 (MQTT 3.1.1 §2.3.1).
pub type PacketId = NonZeroU16;

/// A quality of service that the hub offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum QoS {
    /// QoS 0.
    AtMostOnce,
    /// QoS 1.
    AtLeastOnce,
}

/// UTF-8 text without U+0000 (MQTT 3.1.1 §1.5.3), as a slice of the buffer it came in.
#[derive(Clone, PartialEq, Eq)]
pub struct Text(Bytes);

/// A packet that a client sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// CONNECT (§3.1).
    Connect(Connect),
    /// PUBLISH (§3.3).
    Publish(Publish),
    /// PUBACK (§3.4).
    PubAck(PacketId),
    /// SUBSCRIBE (§3.8).
    Subscribe {
        /// Its packet identifier.
        packet_id: PacketId,
        /// Filters with the granted QoS (the asked one, at most 1); at least one.
        filters: Vec<(Text, QoS)>,
    },
    /// UNSUBSCRIBE (§3.10).
    Unsubscribe {
        /// Its packet identifier.
        packet_id: PacketId,
        /// Filters, at least one.
        filters: Vec<Text>,
    },
    /// PINGREQ (§3.12).
    PingReq,
    /// DISCONNECT (§3.14).
    Disconnect,
}

/// CONNECT of protocol level 4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// Client identifier; may be empty.
    pub client_id: Text,
    /// User name.
    pub user_name: Option<Text>,
    /// Password; only with a user name.
    pub password: Option<Bytes>,
    /// Whether the client wants to start without a stored session.
    pub clean_session: bool,
    /// Keep alive in seconds; 0 means none.
    pub keep_alive_secs: u16,
    /// What to publish when the connection ends without DISCONNECT.
    pub will: Option<Will>,
}

/// The will of a connection. QoS 2 counts as 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Will {
    /// Topic, not empty and without wildcards.
    pub topic: Text,
    /// Payload.
    pub payload: Bytes,
    /// Quality of service.
    pub qos: QoS,
    /// RETAIN flag.
    pub retain: bool,
}

/// PUBLISH of QoS 0 or 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Topic, not empty and without wildcards.
    pub topic: Text,
    /// Payload, may be empty.
    pub payload: Bytes,
    /// Packet identifier; present exactly for QoS 1.
    pub packet_id: Option<PacketId>,
    /// DUP flag.
    pub dup: bool,
    /// RETAIN flag.
    pub retain: bool,
}

/// Why a frame is no packet. All of them end the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A field reaches beyond the packet.
    #[error("the packet is truncated")]
    Truncated,
    /// Bytes behind the last field.
    #[error("the packet has bytes left over")]
    LeftOver,
    /// A text that is not UTF-8 or holds U+0000.
    #[error("a text is not UTF-8 or holds U+0000")]
    Text,
    /// Flags that contradict each other or are reserved.
    #[error("reserved or contradicting flags")]
    Flags,
    /// CONNECT with a protocol name other than `MQTT`.
    #[error("the protocol name is not MQTT")]
    ProtocolName,
    /// CONNECT with a protocol level other than 4; answered with CONNACK 1.
    #[error("the protocol level {0} is not served, only 4 (MQTT 3.1.1)")]
    ProtocolLevel(u8),
    /// PUBLISH of QoS 2, which is not served.
    #[error("QoS 2 is not served")]
    ExactlyOnce,
    /// Packet identifier 0.
    #[error("the packet identifier is 0")]
    PacketId,
    /// A topic that is empty or has wildcards.
    #[error("the topic is empty or has wildcards")]
    Topic,
    /// A filter that is empty, malformed, or asks for an unknown QoS; or none at all, or too many.
    #[error("a filter is malformed, or there is none, or there are more than {FILTERS_PER_PACKET_MAX}")]
    Filter,
}

impl DecodeError {
    /// A short label for metrics.
    pub fn reason(self) -> &'static str {
        match self {
            DecodeError::Truncated => "truncated",
            DecodeError::LeftOver => "left_over",
            DecodeError::Text => "text",
            DecodeError::Flags => "flags",
            DecodeError::ProtocolName => "protocol_name",
            DecodeError::ProtocolLevel(_) => "protocol_level",
            DecodeError::ExactlyOnce => "qos_2",
            DecodeError::PacketId => "packet_id",
            DecodeError::Topic => "topic",
            DecodeError::Filter => "filter",
        }
    }
}

impl Text {
    /// Checks the bytes.
    ///
    /// # Errors
    /// [`DecodeError::Text`] when they are not UTF-8 or hold U+0000.
    pub fn new(bytes: Bytes) -> Result<Self, DecodeError> {
        match std::str::from_utf8(&bytes) {
            Ok(_) if memchr::memchr(0, &bytes).is_none() => Ok(Self(bytes)),
            _ => Err(DecodeError::Text),
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        // Checked when it was made, so the fallback is never taken; without unsafe code it must be checked again.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// The bytes that the text is a view of.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// A copy that does not keep the read buffer alive.
    pub fn detached(&self) -> Self {
        Self(Bytes::copy_from_slice(&self.0))
    }
}

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self.as_str(), f)
    }
}

/// Decodes a frame.
///
/// # Errors
/// When the frame is not exactly one packet that a client may send.
pub fn decode(frame: Frame) -> Result<Packet, DecodeError> {
    let flags = frame.first_byte & 0x0f;
    let reader = Reader { body: frame.body, at: 0 };
    match (frame.first_byte >> 4, flags) {
        (1, 0) => decode_connect(reader).map(Packet::Connect),
        (3, _) => decode_publish(flags, reader).map(Packet::Publish),
        (4, 0) => decode_puback(reader).map(Packet::PubAck),
        (8, 2) => decode_subscribe(reader),
        (10, 2) => decode_unsubscribe(reader),
        (12, 0) => reader.end().map(|()| Packet::PingReq),
        (14, 0) => reader.end().map(|()| Packet::Disconnect),
        _ => Err(DecodeError::Flags),
    }
}

fn decode_connect(mut reader: Reader) -> Result<Connect, DecodeError> {
    const USER_NAME: u8 = 0x80;
    const PASSWORD: u8 = 0x40;
    const WILL_RETAIN: u8 = 0x20;
    const WILL_QOS: u8 = 0x18;
    const WILL: u8 = 0x04;
    const CLEAN_SESSION: u8 = 0x02;
    const RESERVED: u8 = 0x01;

    // Name and level first: another level has another layout.
    if reader.binary()?[..] != *b"MQTT" {
        return Err(DecodeError::ProtocolName);
    }
    let level = reader.byte()?;
    if level != 4 {
        return Err(DecodeError::ProtocolLevel(level));
    }
    let flags = reader.byte()?;
    let has = |flag: u8| flags & flag != 0;
    if has(RESERVED)
        || (has(PASSWORD) && !has(USER_NAME))
        || (!has(WILL) && has(WILL_RETAIN | WILL_QOS))
        || flags & WILL_QOS == WILL_QOS
    {
        return Err(DecodeError::Flags);
    }
    let keep_alive_secs = reader.number()?;
    let client_id = reader.text()?;
    let will = if has(WILL) {
        let topic = reader.topic()?;
        let payload = reader.binary()?;
        let qos = if has(WILL_QOS) { QoS::AtLeastOnce } else { QoS::AtMostOnce };
        Some(Will { topic, payload, qos, retain: has(WILL_RETAIN) })
    } else {
        None
    };
    let user_name = if has(USER_NAME) { Some(reader.text()?) } else { None };
    let password = if has(PASSWORD) { Some(reader.binary()?) } else { None };
    reader.end()?;
    let clean_session = has(CLEAN_SESSION);
    Ok(Connect { client_id, user_name, password, clean_session, keep_alive_secs, will })
}

fn decode_publish(flags: u8, mut reader: Reader) -> Result<Publish, DecodeError> {
    let (dup, qos, retain) = (flags & 8 != 0, (flags >> 1) & 3, flags & 1 != 0);
    let topic = match qos {
        0 if dup => return Err(DecodeError::Flags),
        0 | 1 => reader.topic()?,
        2 => return Err(DecodeError::ExactlyOnce),
        _ => return Err(DecodeError::Flags),
    };
    let packet_id = if qos == 1 { Some(reader.packet_id()?) } else { None };
    Ok(Publish { topic, payload: reader.rest(), packet_id, dup, retain })
}

fn decode_puback(mut reader: Reader) -> Result<PacketId, DecodeError> {
    let packet_id = reader.packet_id()?;
    reader.end()?;
    Ok(packet_id)
}

fn decode_subscribe(mut reader: Reader) -> Result<Packet, DecodeError> {
    let packet_id = reader.packet_id()?;
    let mut filters = Vec::new();
    while !reader.is_empty() {
        let filter = reader.filter(filters.len())?;
        let qos = match reader.byte()? {
            0 => QoS::AtMostOnce,
            1 | 2 => QoS::AtLeastOnce,
            _ => return Err(DecodeError::Filter),
        };
        filters.push((filter, qos));
    }
    if filters.is_empty() { Err(DecodeError::Filter) } else { Ok(Packet::Subscribe { packet_id, filters }) }
}

fn decode_unsubscribe(mut reader: Reader) -> Result<Packet, DecodeError> {
    let packet_id = reader.packet_id()?;
    let mut filters = Vec::new();
    while !reader.is_empty() {
        filters.push(reader.filter(filters.len())?);
    }
    if filters.is_empty() { Err(DecodeError::Filter) } else { Ok(Packet::Unsubscribe { packet_id, filters }) }
}

struct Reader {
    body: Bytes,
    at: usize,
}

impl Reader {
    fn is_empty(&self) -> bool {
        self.at == self.body.len()
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        let byte = *self.body.get(self.at).ok_or(DecodeError::Truncated)?;
        self.at += 1;
        Ok(byte)
    }

    fn number(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_be_bytes([self.byte()?, self.byte()?]))
    }

    fn packet_id(&mut self) -> Result<PacketId, DecodeError> {
        PacketId::new(self.number()?).ok_or(DecodeError::PacketId)
    }

    fn binary(&mut self) -> Result<Bytes, DecodeError> {
        let len = usize::from(self.number()?);
        let end = self.at + len;
        if end > self.body.len() {
            return Err(DecodeError::Truncated);
        }
        let bytes = self.body.slice(self.at..end);
        self.at = end;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<Text, DecodeError> {
        Text::new(self.binary()?)
    }

    fn topic(&mut self) -> Result<Text, DecodeError> {
        let topic = self.text()?;
        if topic.0.is_empty() || memchr::memchr2(b'#', b'+', &topic.0).is_some() {
            return Err(DecodeError::Topic);
        }
        Ok(topic)
    }

    fn filter(&mut self, filters_before: usize) -> Result<Text, DecodeError> {
        let filter = self.text()?;
        if filters_before >= FILTERS_PER_PACKET_MAX || !filter::is_valid(filter.as_str()) {
            return Err(DecodeError::Filter);
        }
        Ok(filter)
    }

    fn rest(mut self) -> Bytes {
        self.body.split_off(self.at)
    }

    fn end(self) -> Result<(), DecodeError> {
        if self.is_empty() { Ok(()) } else { Err(DecodeError::LeftOver) }
    }
}
