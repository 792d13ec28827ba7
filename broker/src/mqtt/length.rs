//! Where a packet ends: its remaining length (MQTT 3.1.1 §2.2.3).

/// The remaining length breaks the protocol: it has more than four bytes, or more than it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// How far a packet reaches from its first byte on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Bytes of the fixed header.
    pub(crate) header_bytes: usize,
    /// Bytes of the whole packet.
    pub(crate) total_bytes: usize,
}

impl Extent {
    /// That of the packet at the start of `bytes`; none when its fixed header is not complete yet.
    pub(crate) fn read(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut remaining = 0usize;
        for index in 0..4 {
            let Some(&byte) = bytes.get(1 + index) else { return Ok(None) };
            remaining |= usize::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                let padded = byte == 0 && index > 0;
                let header_bytes = 2 + index;
                let extent = Self { header_bytes, total_bytes: header_bytes + remaining };
                return if padded { Err(Malformed) } else { Ok(Some(extent)) };
            }
        }
        Err(Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_one_to_four_bytes() {
        for (bytes, expected) in [
            (&[0x30][..], Ok(None)),
            (&[0x30, 0x80], Ok(None)),
            (&[0x30, 0x00], Ok(Some((2, 2)))),
            (&[0x30, 0x7f], Ok(Some((2, 129)))),
            (&[0x30, 0x80, 0x01], Ok(Some((3, 131)))),
            (&[0x30, 0xff, 0xff, 0xff, 0x7f], Ok(Some((5, 268_435_460)))),
            (&[0x30, 0x80, 0x00], Err(Malformed)),
            (&[0x30, 0x80, 0x80, 0x80, 0x80], Err(Malformed)),
        ] {
            let read = Extent::read(bytes).map(|read| read.map(|it| (it.header_bytes, it.total_bytes)));
            assert_eq!(read, expected, "{bytes:02x?}");
        }
    }
}
