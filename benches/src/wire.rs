//! Owns the generator's side of MQTT 3.1.1: packets appended to a buffer, packets taken out of one.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Largest packet that is read.
const PACKET_BYTES_MAX: usize = 1024 * 1024;

/// A PINGREQ (§3.12).
pub const PINGREQ: [u8; 2] = [0xC0, 0];

/// A packet from the server.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// CONNACK with its return code (§3.2).
    ConnAck(u8),
    /// SUBACK (§3.9).
    SubAck,
    /// PUBACK with its packet id (§3.4).
    PubAck(u16),
    /// PUBLISH: packet id unless QoS 0, and the payload (§3.3).
    Publish(Option<u16>, Bytes),
    /// PINGRESP (§3.13).
    PingResp,
}

/// The server sent something that is no MQTT, or none that a client may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent a malformed packet (first byte {0:#04x})")]
pub struct Malformed(u8);

/// Appends a CONNECT with a clean session (§3.1).
pub fn connect(out: &mut BytesMut, client_id: &str, credentials: Option<(&str, &str)>) {
    let strings =
        2 + client_id.len() + credentials.map_or(0, |(user, password)| 4 + user.len() + password.len());
    head(out, 0x10, 10 + strings);
    text(out, "MQTT");
    out.put_u8(4);
    out.put_u8(0x02 | if credentials.is_some() { 0xC0 } else { 0 });
    out.put_u16(0);
    text(out, client_id);
    if let Some((user, password)) = credentials {
        text(out, user);
        text(out, password);
    }
}

/// Appends a SUBSCRIBE with one filter (§3.8).
pub fn subscribe(out: &mut BytesMut, filter: &str, qos: u8) {
    head(out, 0x82, 5 + filter.len());
    out.put_u16(1);
    text(out, filter);
    out.put_u8(qos);
}

/// Appends a PUBLISH (§3.3); QoS 1 with a packet id, else QoS 0. `body` appends exactly `body_bytes` bytes.
pub fn publish(
    out: &mut BytesMut,
    topic: &str,
    packet_id: Option<u16>,
    body_bytes: usize,
    body: impl FnOnce(&mut BytesMut),
) {
    let id_bytes = if packet_id.is_some() { 2 } else { 0 };
    head(out, if packet_id.is_some() { 0x32 } else { 0x30 }, 2 + topic.len() + id_bytes + body_bytes);
    text(out, topic);
    if let Some(id) = packet_id {
        out.put_u16(id);
    }
    body(out);
}

/// Appends a PUBACK (§3.4).
pub fn puback(out: &mut BytesMut, packet_id: u16) {
    out.put_slice(&[0x40, 2]);
    out.put_u16(packet_id);
}

/// Takes the next whole packet out of the buffer; `None` when it is not complete yet.
///
/// # Errors
/// The packet is malformed or larger than one MiB.
pub fn take(buffer: &mut BytesMut) -> Result<Option<Incoming>, Malformed> {
    let Some(&first) = buffer.first() else { return Ok(None) };
    let (mut length, mut header_bytes) = (0_usize, 1_usize);
    loop {
        let Some(&byte) = buffer.get(header_bytes) else { return Ok(None) };
        length |= usize::from(byte & 0x7F) << (7 * (header_bytes - 1));
        header_bytes += 1;
        if byte & 0x80 == 0 {
            break;
        }
        if header_bytes == 5 {
            return Err(Malformed(first));
        }
    }
    if length > PACKET_BYTES_MAX {
        return Err(Malformed(first));
    }
    if buffer.len() < header_bytes + length {
        buffer.reserve(header_bytes + length - buffer.len());
        return Ok(None);
    }
    let mut packet = buffer.split_to(header_bytes + length);
    packet.advance(header_bytes);
    decode(first, packet.freeze()).map(Some)
}

fn decode(first: u8, mut packet: Bytes) -> Result<Incoming, Malformed> {
    let malformed = Malformed(first);
    Ok(match first >> 4 {
        2 if packet.len() == 2 => Incoming::ConnAck(packet[1]),
        4 if packet.len() == 2 => Incoming::PubAck(packet.get_u16()),
        9 => Incoming::SubAck,
        13 => Incoming::PingResp,
        3 => {
            let id_bytes = if first & 0x06 == 0 { 0 } else { 2 };
            let topic_bytes = usize::from(packet.try_get_u16().map_err(|_short| malformed)?);
            if packet.len() < topic_bytes + id_bytes {
                return Err(malformed);
            }
            packet.advance(topic_bytes);
            let id = (id_bytes > 0).then(|| packet.get_u16());
            Incoming::Publish(id, packet)
        }
        _ => return Err(malformed),
    })
}

fn head(out: &mut BytesMut, first: u8, mut length: usize) {
    out.reserve(5 + length);
    out.put_u8(first);
    loop {
        let digit = (length % 128) as u8;
        length /= 128;
        out.put_u8(if length > 0 { digit | 0x80 } else { digit });
        if length == 0 {
            break;
        }
    }
}

fn text(out: &mut BytesMut, value: &str) {
    let length = u16::try_from(value.len()).expect("topics, ids and tokens of the generator are short");
    out.put_u16(length);
    out.put_slice(value.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use mqttbytes::v4;

    #[test]
    fn packets_read_as_an_independent_decoder_reads_them() {
        let mut out = BytesMut::new();
        connect(&mut out, "id", Some(("user", "password")));
        subscribe(&mut out, "a/#", 1);
        publish(&mut out, "a/b", Some(7), 300, |out| out.put_bytes(b'x', 300));
        publish(&mut out, "a/b", None, 0, |_| {});
        puback(&mut out, 9);
        let mut next = || v4::read(&mut out, PACKET_BYTES_MAX).expect("well formed");
        assert!(matches!(next(), v4::Packet::Connect(c) if c.client_id == "id" && c.login.is_some()));
        assert!(matches!(next(), v4::Packet::Subscribe(s) if s.filters[0].path == "a/#"));
        assert!(matches!(next(), v4::Packet::Publish(p) if p.pkid == 7 && p.payload.len() == 300));
        assert!(matches!(next(), v4::Packet::Publish(p) if p.pkid == 0 && p.payload.is_empty()));
        assert!(matches!(next(), v4::Packet::PubAck(p) if p.pkid == 9));
    }

    #[test]
    fn packets_are_taken_whole_and_one_by_one() {
        let mut wire = BytesMut::new();
        publish(&mut wire, "t", Some(5), 200, |out| out.put_bytes(b'y', 200));
        wire.put_slice(&[0x20, 2, 0, 5, 0x40, 2, 1, 0]);
        let (whole, mut buffer) = (wire.clone(), BytesMut::new());
        let mut taken = Vec::new();
        for byte in whole {
            buffer.put_u8(byte);
            taken.extend(take(&mut buffer).expect("well formed"));
        }
        let body = Bytes::from(vec![b'y'; 200]);
        assert_eq!(taken, [Incoming::Publish(Some(5), body), Incoming::ConnAck(5), Incoming::PubAck(256)]);
        assert_eq!(take(&mut BytesMut::from(&[0x30, 0xFF, 0xFF, 0xFF, 0xFF, 1][..])), Err(Malformed(0x30)));
        assert_eq!(take(&mut BytesMut::from(&[0x30, 2, 0, 9][..])), Err(Malformed(0x30)));
    }
}
