//! MQTT 3.1.1 packets as the upstream end of a connection sees them: what an upstream may send, decoded strictly, and
//! what the hub sends.
//!
//! Where one packet ends is decided by a loop of ours before anything is buffered for it. PUBLISH and PUBACK look the
//! same in both directions, so the head's decoder reads them.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use mqttbytes::v4;

use crate::head::mqtt::frame::Frame;
pub(super) use crate::head::mqtt::packet::PacketId;
use crate::head::mqtt::packet::{self, DecodeError, Packet, Publish};
use crate::mqtt::{Extent, Malformed};

/// Largest packet that is taken from the upstream, in bytes: a twin of 1 MiB and its topic.
pub(super) const RECEIVED_BYTES_MAX: usize = (1 << 20) + 65_536;

/// Largest PUBLISH that is sent, fixed header included, in bytes: the limit of the cloud hub and of a parent.
pub(super) const SENT_BYTES_MAX: usize = 262_144;

/// Longest topic, in bytes (MQTT 3.1.1 §1.5.3).
const TOPIC_BYTES_MAX: usize = 65_535;

/// Most return codes of one SUBACK that are read; the hub asks for one filter at a time.
const RETURN_CODES_MAX: usize = 8;

/// What the upstream sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Received {
    /// CONNACK (§3.2).
    ConnAck(ConnectAnswer),
    /// PUBLISH (§3.3) of QoS 0 or 1.
    Publish(Publish),
    /// PUBACK (§3.4).
    PubAck(PacketId),
    /// SUBACK (§3.9): whether the filter was granted.
    SubAck(PacketId, bool),
    /// UNSUBACK (§3.11).
    UnsubAck,
    /// PINGRESP (§3.13).
    PingResp,
}

/// Return codes of CONNACK (§3.2.2.3) by what they mean for the identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectAnswer {
    /// 0.
    Accepted,
    /// 3: come again later. The cloud hub says it when it throttles.
    Unavailable,
    /// 4 and 5: the token is bad, or the identity unknown or disabled.
    Refused(u8),
    /// 1, 2 and all that the standard does not know.
    Unexpected(u8),
}

/// Why bytes are no packet that an upstream may send. All of them end the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum PacketError {
    /// No packet type that a server may send, or wrong flags (§2.2.2).
    #[error("the first byte {0:#04x} is no packet that an upstream may send")]
    FirstByte(u8),
    /// More than four length bytes, or more than the length needs (§2.2.3).
    #[error("the remaining length is malformed")]
    Length,
    /// Larger than [`RECEIVED_BYTES_MAX`].
    #[error("the packet has {0} bytes; the limit is {RECEIVED_BYTES_MAX}")]
    TooLarge(usize),
    /// A short packet with other bytes than it may have.
    #[error("the packet of type {0} is malformed")]
    Malformed(u8),
    /// PUBLISH or PUBACK that is malformed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Takes the first packet out of `buffer`; nothing when it is not complete yet.
///
/// # Errors
/// As soon as the bytes can be no packet that an upstream may send.
pub(super) fn take(buffer: &mut BytesMut) -> Result<Option<Received>, PacketError> {
    let Some(Extent { header_bytes, total_bytes }) = measure(buffer)? else { return Ok(None) };
    if buffer.len() < total_bytes {
        return Ok(None);
    }
    let first_byte = buffer[0];
    let mut body = buffer.split_to(total_bytes);
    body.advance(header_bytes);
    decode(first_byte, body.freeze()).map(Some)
}

/// How far the packet at the start of `bytes` reaches; nothing when its fixed header is not complete yet.
fn measure(bytes: &[u8]) -> Result<Option<Extent>, PacketError> {
    let Some(&first_byte) = bytes.first() else { return Ok(None) };
    if !matches!(first_byte, 0x20 | 0x30..=0x3f | 0x40 | 0x90 | 0xb0 | 0xd0) {
        return Err(PacketError::FirstByte(first_byte));
    }
    match Extent::read(bytes).map_err(|Malformed| PacketError::Length)? {
        Some(Extent { total_bytes, .. }) if total_bytes > RECEIVED_BYTES_MAX => {
            Err(PacketError::TooLarge(total_bytes))
        }
        extent => Ok(extent),
    }
}

fn decode(first_byte: u8, body: Bytes) -> Result<Received, PacketError> {
    let kind = first_byte >> 4;
    let malformed = PacketError::Malformed(kind);
    let packet_id = |high: u8, low: u8| PacketId::new(u16::from_be_bytes([high, low])).ok_or(malformed);
    match (kind, &body[..]) {
        (2, [0 | 1, 0]) => Ok(Received::ConnAck(ConnectAnswer::Accepted)),
        (2, [0, 3]) => Ok(Received::ConnAck(ConnectAnswer::Unavailable)),
        (2, [0, code @ (4 | 5)]) => Ok(Received::ConnAck(ConnectAnswer::Refused(*code))),
        (2, [0, code]) => Ok(Received::ConnAck(ConnectAnswer::Unexpected(*code))),
        (3 | 4, _) => match packet::decode(Frame { first_byte, body })? {
            Packet::Publish(publish) => Ok(Received::Publish(publish)),
            Packet::PubAck(packet_id) => Ok(Received::PubAck(packet_id)),
            _ => Err(malformed),
        },
        (9, [high, low, codes @ ..]) if (1..=RETURN_CODES_MAX).contains(&codes.len()) => {
            match codes.iter().find(|code| !matches!(code, 0..=2 | 0x80)) {
                None => Ok(Received::SubAck(packet_id(*high, *low)?, !codes.contains(&0x80))),
                Some(_) => Err(malformed),
            }
        }
        (11, [high, low]) => packet_id(*high, *low).map(|_| Received::UnsubAck),
        (13, []) => Ok(Received::PingResp),
        _ => Err(malformed),
    }
}

/// CONNECT (§3.1) with a clean session: what is wanted is subscribed to anew on each connection.
pub(super) fn connect(
    out: &mut BytesMut,
    client_id: &str,
    user_name: &str,
    token: &str,
    keep_alive_secs: u16,
) {
    let mut connect = v4::Connect::new(client_id);
    connect.clean_session = true;
    connect.keep_alive = keep_alive_secs;
    connect.set_login(user_name, token);
    complete(connect.write(out));
}

/// Everything of a PUBLISH in front of its payload (§3.3), of QoS 1 with a packet id. False, and nothing is written,
/// when it would be larger than [`SENT_BYTES_MAX`], or its topic than a topic can be.
pub(super) fn publish_header(
    out: &mut BytesMut,
    topic: &str,
    packet_id: Option<PacketId>,
    dup: bool,
    payload_bytes: usize,
) -> bool {
    let remaining = 2 + topic.len() + if packet_id.is_some() { 2 } else { 0 } + payload_bytes;
    // The length takes four bytes at most.
    if topic.len() > TOPIC_BYTES_MAX || 1 + 4 + remaining > SENT_BYTES_MAX {
        return false;
    }
    let qos = if packet_id.is_some() { 0x02 } else { 0 };
    out.put_u8(0x30 | qos | if dup { 0x08 } else { 0 });
    let mut rest = remaining;
    while rest >= 0x80 {
        out.put_u8((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    out.put_u8(rest as u8);
    out.put_u16(topic.len() as u16);
    out.put_slice(topic.as_bytes());
    if let Some(packet_id) = packet_id {
        out.put_u16(packet_id.get());
    }
    true
}

/// PUBACK (§3.4).
pub(super) fn puback(out: &mut BytesMut, packet_id: PacketId) {
    complete(v4::PubAck::new(packet_id.get()).write(out));
}

/// SUBSCRIBE (§3.8) to one filter.
pub(super) fn subscribe(out: &mut BytesMut, packet_id: PacketId, filter: &str, at_least_once: bool) {
    let qos = if at_least_once { mqttbytes::QoS::AtLeastOnce } else { mqttbytes::QoS::AtMostOnce };
    let mut subscribe = v4::Subscribe::new(filter, qos);
    subscribe.pkid = packet_id.get();
    complete(subscribe.write(out));
}

/// UNSUBSCRIBE (§3.10) from one filter.
pub(super) fn unsubscribe(out: &mut BytesMut, packet_id: PacketId, filter: &str) {
    let mut unsubscribe = v4::Unsubscribe::new(filter);
    unsubscribe.pkid = packet_id.get();
    complete(unsubscribe.write(out));
}

/// PINGREQ (§3.12).
pub(super) fn ping(out: &mut BytesMut) {
    complete(v4::PingReq.write(out));
}

/// DISCONNECT (§3.14).
pub(super) fn disconnect(out: &mut BytesMut) {
    complete(v4::Disconnect.write(out));
}

/// `mqttbytes` refuses lengths beyond four bytes and the packet id 0; neither can be made from our types.
fn complete(written: Result<usize, mqttbytes::Error>) {
    debug_assert!(written.is_ok(), "{written:?}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn taken(bytes: &[u8]) -> Result<Option<Received>, PacketError> {
        take(&mut BytesMut::from(bytes))
    }

    #[test]
    fn what_a_server_may_send_is_read_and_nothing_else() {
        use ConnectAnswer::{Accepted, Refused, Unavailable, Unexpected};
        let id = |number| PacketId::new(number).unwrap();
        for (bytes, expected) in [
            (&[0x20, 2, 0, 0][..], Received::ConnAck(Accepted)),
            (&[0x20, 2, 1, 0], Received::ConnAck(Accepted)),
            (&[0x20, 2, 0, 3], Received::ConnAck(Unavailable)),
            (&[0x20, 2, 0, 4], Received::ConnAck(Refused(4))),
            (&[0x20, 2, 0, 5], Received::ConnAck(Refused(5))),
            (&[0x20, 2, 0, 2], Received::ConnAck(Unexpected(2))),
            (&[0x40, 2, 1, 2], Received::PubAck(id(258))),
            (&[0x90, 3, 0, 7, 1], Received::SubAck(id(7), true)),
            (&[0x90, 3, 0, 7, 0x80], Received::SubAck(id(7), false)),
            (&[0xb0, 2, 0, 7], Received::UnsubAck),
            (&[0xd0, 0], Received::PingResp),
        ] {
            assert_eq!(taken(bytes), Ok(Some(expected)), "{bytes:02x?}");
            for end in 0..bytes.len() {
                assert_eq!(taken(&bytes[..end]), Ok(None), "{:02x?}", &bytes[..end]);
            }
        }
        let publish = [0x32, 7, 0, 1, b't', 0, 9, b'x', b'y'];
        let Ok(Some(Received::Publish(publish))) = taken(&publish) else { panic!("no PUBLISH") };
        assert_eq!((publish.topic.as_str(), publish.packet_id), ("t", Some(id(9))));
        assert_eq!(publish.payload, "xy");
    }

    #[test]
    fn what_no_server_may_send_ends_the_connection() {
        for first_byte in (0..=255u8).filter(|byte| !matches!(byte, 0x20 | 0x30..=0x40 | 0x90 | 0xb0 | 0xd0))
        {
            assert_eq!(taken(&[first_byte]), Err(PacketError::FirstByte(first_byte)));
        }
        for bytes in [
            &[0x20, 1, 0][..],
            &[0x20, 2, 1, 5],
            &[0x20, 3, 0, 0, 0],
            &[0x34, 5, 0, 1, b't', 0, 9],
            &[0x32, 5, 0, 1, b't', 0, 0],
            &[0x32, 2, 0, 9],
            &[0x40, 2, 0, 0],
            &[0x40, 3, 0, 1, 0],
            &[0x90, 2, 0, 1],
            &[0x90, 3, 0, 1, 3],
            &[0x90, 3, 0, 0, 0],
            &[0xb0, 2, 0, 0],
            &[0xd0, 1, 0],
            &[0xd0, 0x80, 0],
            &[0x30, 0xff, 0xff, 0xff, 0xff],
            &[0x30, 0xff, 0xff, 0xff, 0x7f],
        ] {
            taken(bytes).expect_err(&format!("{bytes:02x?}"));
        }
    }

    #[test]
    fn a_packet_that_is_too_large_is_not_begun() {
        let mut out = BytesMut::new();
        let most = SENT_BYTES_MAX - 5 - 2 - 1 - 2;
        let id = PacketId::new(1);
        assert!(!publish_header(&mut out, "t", id, false, most + 1) && out.is_empty());
        assert!(!publish_header(&mut out, &"t".repeat(65_536), id, false, 0) && out.is_empty());
        assert!(publish_header(&mut out, "t", id, false, most));
    }

    proptest! {
        #[test]
        fn what_is_published_is_read_as_a_server_reads_it(
            topic in "[a-z/]{1,200}", body in proptest::collection::vec(any::<u8>(), 0..300),
            id in proptest::option::of(1..u16::MAX), dup: bool,
        ) {
            let packet_id = id.and_then(PacketId::new);
            let dup = dup && packet_id.is_some();
            let mut out = BytesMut::new();
            prop_assert!(publish_header(&mut out, &topic, packet_id, dup, body.len()));
            out.extend_from_slice(&body);
            let frame = Frame::take(&mut out).unwrap().unwrap();
            let Packet::Publish(read) = packet::decode(frame).unwrap() else { panic!("no PUBLISH") };
            prop_assert_eq!((read.topic.as_str(), &read.payload[..], read.dup), (&*topic, &body[..], dup));
            prop_assert_eq!(read.packet_id, packet_id);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take(&mut buffer) {}
        }
    }
}
