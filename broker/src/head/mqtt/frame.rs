//! Where one packet ends and the next begins (MQTT 3.1.1 §2.2), decided before anything is buffered for it.

use bytes::{Bytes, BytesMut};

use crate::mqtt::{Extent, Malformed};

/// Largest packet in bytes, fixed header included (the cloud hub's limit).
pub const PACKET_BYTES_MAX: usize = 262_144;

/// The fixed header of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedHeader {
    /// Packet type and flags; one of those that a client may send.
    pub first_byte: u8,
    /// Bytes of the fixed header itself: 2 to 5.
    pub header_bytes: usize,
    /// Bytes of the whole packet, at most [`PACKET_BYTES_MAX`].
    pub total_bytes: usize,
}

/// A complete packet: its first byte, and what follows the fixed header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Packet type and flags.
    pub first_byte: u8,
    /// Variable header and payload.
    pub body: Bytes,
}

/// Why bytes do not begin a packet that a client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No packet type that a client may send, or wrong flags (MQTT 3.1.1 §2.2.2).
    #[error("the first byte {0:#04x} is no packet that a client may send")]
    FirstByte(u8),
    /// More than four length bytes, or more than the length needs (MQTT 3.1.1 §2.2.3).
    #[error("the remaining length is malformed")]
    Length,
    /// Larger than [`PACKET_BYTES_MAX`].
    #[error("the packet has {0} bytes; the limit is {PACKET_BYTES_MAX}")]
    TooLarge(usize),
}

impl FixedHeader {
    /// Reads the fixed header at the start of `bytes`; nothing when it is not complete yet.
    ///
    /// # Errors
    /// As soon as the bytes can be no packet that a client may send.
    pub fn read(bytes: &[u8]) -> Result<Option<Self>, FrameError> {
        let Some(&first_byte) = bytes.first() else { return Ok(None) };
        if !matches!(first_byte, 0x10 | 0x30..=0x3f | 0x40 | 0x82 | 0xa2 | 0xc0 | 0xe0) {
            return Err(FrameError::FirstByte(first_byte));
        }
        let Some(Extent { header_bytes, total_bytes }) =
            Extent::read(bytes).map_err(|Malformed| FrameError::Length)?
        else {
            return Ok(None);
        };
        if total_bytes > PACKET_BYTES_MAX {
            return Err(FrameError::TooLarge(total_bytes));
        }
        Ok(Some(Self { first_byte, header_bytes, total_bytes }))
    }
}

impl Frame {
    /// Takes the first packet out of `buffer`; nothing when it is not complete yet.
    ///
    /// # Errors
    /// As [`FixedHeader::read`].
    pub fn take(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(header) = FixedHeader::read(buffer)? else { return Ok(None) };
        if buffer.len() < header.total_bytes {
            return Ok(None);
        }
        let mut body = buffer.split_to(header.total_bytes);
        bytes::Buf::advance(&mut body, header.header_bytes);
        Ok(Some(Self { first_byte: header.first_byte, body: body.freeze() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_minimal_and_bounded() {
        let header = |bytes: &[u8]| FixedHeader::read(bytes);
        assert_eq!(header(&[]), Ok(None));
        assert_eq!(header(&[0xc0]), Ok(None));
        assert_eq!(header(&[0xc0, 0x80]), Ok(None));
        assert_eq!(header(&[0xc0, 0x80, 0]), Err(FrameError::Length));
        assert_eq!(header(&[0x30, 0xff, 0xff, 0xff, 0xff]), Err(FrameError::Length));
        assert_eq!(header(&[0x30, 0xfd, 0xff, 0x0f]), Err(FrameError::TooLarge(262_145)));
        let most = FixedHeader { first_byte: 0x30, header_bytes: 4, total_bytes: PACKET_BYTES_MAX };
        assert_eq!(header(&[0x30, 0xfc, 0xff, 0x0f]), Ok(Some(most)));
    }

    #[test]
    fn only_packets_of_clients_pass() {
        let passes = (0..=255u8).filter(|first| FixedHeader::read(&[*first, 0]).is_ok()).count();
        assert_eq!(passes, 6 + 16);
    }

    #[test]
    fn frames_come_out_one_by_one() {
        let mut buffer = BytesMut::from(&[0xc0, 0, 0x40, 2, 0, 7, 0xe0][..]);
        assert_eq!(Frame::take(&mut buffer).unwrap().unwrap().first_byte, 0xc0);
        assert_eq!(&Frame::take(&mut buffer).unwrap().unwrap().body[..], [0, 7]);
        assert_eq!(Frame::take(&mut buffer), Ok(None));
        assert_eq!(buffer.len(), 1);
    }
}
