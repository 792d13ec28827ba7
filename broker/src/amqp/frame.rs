//! The frame layer: protocol headers and the eight bytes in front of every frame (AMQP 1.0 §2.2, §2.3).

use bytes::{BufMut, BytesMut};

use super::error::{Condition, Error};
use super::wire::u32_at;

/// `AMQP 0 1 0 0`: frames follow.
pub const HEADER_AMQP: [u8; 8] = *b"AMQP\x00\x01\x00\x00";
/// `AMQP 3 1 0 0`: SASL follows.
pub const HEADER_SASL: [u8; 8] = *b"AMQP\x03\x01\x00\x00";

/// Largest frame that we accept and announce, in bytes. Also the largest that we send.
pub const FRAME_MAX_BYTES: u32 = 65_536;
/// Every implementation must take frames of this size (AMQP 1.0 §2.7.1).
pub const FRAME_MIN_MAX_BYTES: u32 = 512;
/// Bytes in front of a frame's body.
pub const FRAME_HEADER_BYTES: usize = 8;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Type 0
    Amqp,
    /// Type 1
    Sasl,
}

/// The first eight bytes of a frame, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of the whole frame.
    pub size: usize,
    /// Where the body begins; an extended header in front of it is skipped.
    pub body: usize,
    /// AMQP or SASL.
    pub kind: FrameKind,
    /// Channel (AMQP frames).
    pub channel: u16,
}

impl FrameHeader {
    /// Reads the header of the frame that `input` begins with; `None` when more bytes are needed.
    pub fn parse(input: &[u8]) -> Result<Option<Self>, Error> {
        let Some(&[s0, s1, s2, s3, doff, kind, c0, c1]) = input.first_chunk::<8>() else {
            return Ok(None);
        };
        let size = u32::from_be_bytes([s0, s1, s2, s3]);
        if !(8..=FRAME_MAX_BYTES).contains(&size) {
            return Err(Error::new(Condition::FRAMING_ERROR, format!("frame size {size}")));
        }
        let (size, body) = (size as usize, usize::from(doff) * 4);
        if body < FRAME_HEADER_BYTES || body > size {
            return Err(Error::new(Condition::FRAMING_ERROR, format!("data offset {doff}")));
        }
        let kind = match kind {
            0 => FrameKind::Amqp,
            1 => FrameKind::Sasl,
            _ => return Err(Error::new(Condition::FRAMING_ERROR, format!("frame type {kind}"))),
        };
        Ok(Some(Self { size, body, kind, channel: u16::from_be_bytes([c0, c1]) }))
    }
}

/// Appends a frame whose body `body` writes.
pub fn put_frame(out: &mut BytesMut, kind: FrameKind, channel: u16, body: impl FnOnce(&mut BytesMut)) {
    let start = begin_frame(out, kind, channel);
    body(out);
    end_frame(out, start, 0);
}

/// Appends the eight bytes of a frame header with size 0, and gives their place.
pub(super) fn begin_frame(out: &mut BytesMut, kind: FrameKind, channel: u16) -> usize {
    let start = out.len();
    let kind = match kind {
        FrameKind::Amqp => 0,
        FrameKind::Sasl => 1,
    };
    let [c0, c1] = channel.to_be_bytes();
    out.put_slice(&[0, 0, 0, 0, 2, kind, c0, c1]);
    start
}

/// Fills in the size of the frame at `start`, which `payload_bytes` more bytes follow.
pub(super) fn end_frame(out: &mut BytesMut, start: usize, payload_bytes: usize) {
    let size = u32::try_from(out.len() - start + payload_bytes).unwrap_or(u32::MAX);
    debug_assert_eq!(u32_at(out, start), Ok(0));
    out[start..start + 4].copy_from_slice(&size.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_offsets() {
        assert_eq!(FrameHeader::parse(&[0, 0, 0, 8, 2, 0, 0]), Ok(None));
        let parsed = FrameHeader::parse(&[0, 0, 0, 8, 2, 0, 1, 2]).expect("legal").expect("complete");
        assert_eq!(parsed, FrameHeader { size: 8, body: 8, kind: FrameKind::Amqp, channel: 0x102 });
        let extended = FrameHeader::parse(&[0, 0, 0, 20, 4, 1, 0, 0]).expect("legal").expect("complete");
        assert_eq!((extended.body, extended.kind), (16, FrameKind::Sasl));
        for bad in [
            [0, 0, 0, 0, 2, 0, 0, 0],
            [0, 0, 0, 4, 2, 0, 0, 0],
            [0, 0, 0, 7, 2, 0, 0, 0],
            [0, 1, 0, 1, 2, 0, 0, 0],
            [0, 0, 0, 8, 1, 0, 0, 0],
            [0, 0, 0, 8, 3, 0, 0, 0],
            [0, 0, 0, 8, 2, 2, 0, 0],
            HEADER_AMQP,
        ] {
            assert!(FrameHeader::parse(&bad).is_err(), "{bad:?}");
        }
    }
}
