//! The packets that the hub sends: `mqttbytes` writes all but PUBLISH, whose payload is not to be copied.

use bytes::{BufMut, BytesMut};
use mqttbytes::v4;

use super::packet::{PacketId, QoS};

/// Largest remaining length that a packet can state (MQTT 3.1.1 §2.2.3).
pub(super) const REMAINING_BYTES_MAX: usize = 268_435_455;

/// CONNACK return codes that the hub sends (§3.2.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectCode {
    /// 0: accepted.
    Accepted = 0,
    /// 1: protocol level not served.
    ProtocolLevel = 1,
    /// 3: come again; also sent for user names that do not parse, because SDKs stop for good on the others.
    Unavailable = 3,
    /// 5: the credentials are bad.
    NotAuthorized = 5,
}

impl From<ConnectCode> for v4::ConnectReturnCode {
    fn from(code: ConnectCode) -> Self {
        match code {
            ConnectCode::Accepted => Self::Success,
            ConnectCode::ProtocolLevel => Self::RefusedProtocolVersion,
            ConnectCode::Unavailable => Self::ServiceUnavailable,
            ConnectCode::NotAuthorized => Self::NotAuthorized,
        }
    }
}

pub(super) fn connack(out: &mut BytesMut, session_present: bool, code: ConnectCode) {
    complete(v4::ConnAck::new(code.into(), session_present).write(out));
}

pub(super) fn puback(out: &mut BytesMut, packet_id: PacketId) {
    complete(v4::PubAck::new(packet_id.get()).write(out));
}

pub(super) fn suback(out: &mut BytesMut, packet_id: PacketId, granted: impl ExactSizeIterator<Item = QoS>) {
    let codes = granted.map(|qos| match qos {
        QoS::AtMostOnce => v4::SubscribeReasonCode::Success(mqttbytes::QoS::AtMostOnce),
        QoS::AtLeastOnce => v4::SubscribeReasonCode::Success(mqttbytes::QoS::AtLeastOnce),
    });
    complete(v4::SubAck::new(packet_id.get(), codes.collect()).write(out));
}

pub(super) fn unsuback(out: &mut BytesMut, packet_id: PacketId) {
    complete(v4::UnsubAck::new(packet_id.get()).write(out));
}

pub(super) fn pingresp(out: &mut BytesMut) {
    complete(v4::PingResp.write(out));
}

/// `mqttbytes` refuses lengths beyond four bytes and the packet id 0; neither can be made from our types.
fn complete(written: Result<usize, mqttbytes::Error>) {
    debug_assert!(written.is_ok(), "{written:?}");
}

/// Everything of a PUBLISH in front of its payload. False, and nothing is written, when it would be too large.
pub(super) fn publish_header(
    out: &mut BytesMut,
    topic: &[u8],
    packet_id: Option<PacketId>,
    dup: bool,
    payload_bytes: usize,
) -> bool {
    let remaining = 2 + topic.len() + if packet_id.is_some() { 2 } else { 0 } + payload_bytes;
    let Ok(topic_bytes) = u16::try_from(topic.len()) else { return false };
    if remaining > REMAINING_BYTES_MAX {
        return false;
    }
    let qos = if packet_id.is_some() { 0x02 } else { 0 };
    out.put_u8(0x30 | qos | if dup { 0x08 } else { 0 });
    remaining_length(out, remaining);
    out.put_u16(topic_bytes);
    out.put_slice(topic);
    if let Some(packet_id) = packet_id {
        out.put_u16(packet_id.get());
    }
    true
}

fn remaining_length(out: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}
