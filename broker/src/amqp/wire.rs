//! The pre-check: an iterative walk over encoded AMQP values, before anything decodes or allocates for them.
//!
//! Every value that comes from a peer is walked once by [`check_value`]: nesting is limited, every size and
//! count is compared with the bytes that are there. What passes can be decoded by slicing. AMQP 1.0 §1.2.

use super::error::WireError;

/// Deepest nesting of lists, maps, arrays and described values.
pub const NESTING_MAX: usize = 24;

/// Most elements of an array whose elements take no bytes (null, true, uint0, …): nothing else bounds them.
const ARRAY_OF_EMPTY_MAX: u32 = 64;

/// How the bytes behind a constructor are laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Unknown,
    Described,
    Fixed(u8),
    Variable8,
    Variable32,
    Compound8,
    Compound32,
    Array8,
    Array32,
}

const LAYOUTS: [Layout; 256] = layouts();

const fn layouts() -> [Layout; 256] {
    let mut table = [Layout::Unknown; 256];
    table[0x00] = Layout::Described;
    let fixed: [(usize, u8); 27] = [
        (0x40, 0),
        (0x41, 0),
        (0x42, 0),
        (0x43, 0),
        (0x44, 0),
        (0x45, 0),
        (0x50, 1),
        (0x51, 1),
        (0x52, 1),
        (0x53, 1),
        (0x54, 1),
        (0x55, 1),
        (0x56, 1),
        (0x60, 2),
        (0x61, 2),
        (0x70, 4),
        (0x71, 4),
        (0x72, 4),
        (0x73, 4),
        (0x74, 4),
        (0x80, 8),
        (0x81, 8),
        (0x82, 8),
        (0x83, 8),
        (0x84, 8),
        (0x94, 16),
        (0x98, 16),
    ];
    let mut i = 0;
    while i < fixed.len() {
        table[fixed[i].0] = Layout::Fixed(fixed[i].1);
        i += 1;
    }
    table[0xa0] = Layout::Variable8;
    table[0xa1] = Layout::Variable8;
    table[0xa3] = Layout::Variable8;
    table[0xb0] = Layout::Variable32;
    table[0xb1] = Layout::Variable32;
    table[0xb3] = Layout::Variable32;
    table[0xc0] = Layout::Compound8;
    table[0xc1] = Layout::Compound8;
    table[0xd0] = Layout::Compound32;
    table[0xd1] = Layout::Compound32;
    table[0xe0] = Layout::Array8;
    table[0xf0] = Layout::Array32;
    table
}

/// One open list, map, array or described value of the walk.
#[derive(Clone, Copy)]
struct Level {
    /// Elements that are still to come.
    left: u32,
    /// Where the content ends; it must be met exactly unless `open_ended`.
    end: usize,
    /// Constructor of every element (arrays).
    element: Option<u8>,
    /// A described value: two elements, and the size is known only when both are walked.
    open_ended: bool,
}

const EMPTY: Level = Level { left: 0, end: 0, element: None, open_ended: true };

/// Walks the value that starts at `start` and gives the position behind it.
///
/// Needs constant memory and time linear in the bytes walked.
pub fn check_value(bytes: &[u8], start: usize) -> Result<usize, WireError> {
    let limit = bytes.len();
    // Nearly all values are no compounds: decided without the stack.
    if let Some(end) = simple_end(bytes, start)? {
        return Ok(end);
    }

    let mut levels = [EMPTY; NESTING_MAX];
    let mut depth = 0usize; // levels in use
    let mut pos = start;
    loop {
        let (end, element) = match depth {
            0 => (limit, None),
            _ => (levels[depth - 1].end, levels[depth - 1].element),
        };
        let code = match element {
            Some(code) => code,
            None => {
                let code = *bytes.get(pos).filter(|_| pos < end).ok_or(WireError::Truncated)?;
                pos += 1;
                code
            }
        };
        let opened = match LAYOUTS[usize::from(code)] {
            Layout::Unknown => return Err(WireError::UnknownConstructor(code)),
            Layout::Described => Some(Level { left: 2, end, element: None, open_ended: true }),
            Layout::Fixed(width) => {
                pos += usize::from(width);
                None
            }
            Layout::Variable8 => {
                pos += 1 + usize::from(*bytes.get(pos).ok_or(WireError::Truncated)?);
                None
            }
            Layout::Variable32 => {
                pos = pos.saturating_add(4).saturating_add(u32_at(bytes, pos)? as usize);
                None
            }
            layout @ (Layout::Compound8 | Layout::Compound32) => {
                let (content_end, count, content) = compound_header(bytes, pos, layout == Layout::Compound8)?;
                if content_end > end || count as usize > content_end.saturating_sub(content) {
                    return Err(WireError::BadCompound);
                }
                if matches!(code, 0xc1 | 0xd1) && count % 2 != 0 {
                    return Err(WireError::BadCompound);
                }
                pos = content;
                Some(Level { left: count, end: content_end, element: None, open_ended: false })
            }
            layout @ (Layout::Array8 | Layout::Array32) => {
                let (content_end, count, content) = compound_header(bytes, pos, layout == Layout::Array8)?;
                if content_end > end {
                    return Err(WireError::BadCompound);
                }
                // Some encoders leave the element constructor of an empty array out.
                let (element, content) = match count {
                    0 if content == content_end => (0x40, content),
                    _ => array_constructor(bytes, content, content_end)?,
                };
                let room = content_end - content;
                let fits = match LAYOUTS[usize::from(element)] {
                    Layout::Fixed(0) => count <= ARRAY_OF_EMPTY_MAX,
                    Layout::Fixed(width) => (count as usize).checked_mul(usize::from(width)) == Some(room),
                    _ => count as usize <= room,
                };
                if !fits {
                    return Err(WireError::BadCompound);
                }
                pos = content;
                if let Layout::Fixed(_) = LAYOUTS[usize::from(element)] {
                    pos = content_end;
                    if room != 0 && count == 0 {
                        return Err(WireError::BadCompound);
                    }
                    None
                } else {
                    Some(Level { left: count, end: content_end, element: Some(element), open_ended: false })
                }
            }
        };
        if pos > end {
            return Err(WireError::Truncated);
        }
        if let Some(level) = opened {
            let slot = levels.get_mut(depth).ok_or(WireError::TooDeep)?;
            *slot = level;
            depth += 1;
        } else if depth == 0 {
            return Ok(pos);
        } else {
            levels[depth - 1].left -= 1;
        }
        // Closing a level is one element of the level around it.
        while depth > 0 && levels[depth - 1].left == 0 {
            if !levels[depth - 1].open_ended && levels[depth - 1].end != pos {
                return Err(WireError::BadCompound);
            }
            depth -= 1;
            if depth == 0 {
                return Ok(pos);
            }
            levels[depth - 1].left -= 1;
        }
    }
}

/// End of a value that was walked before, as part of what is around it. Checks sizes, but not the content again.
pub(super) fn walked_end(bytes: &[u8], start: usize) -> Result<usize, WireError> {
    if let Some(end) = simple_end(bytes, start)? {
        return Ok(end);
    }
    let code = bytes[start];
    let end = match LAYOUTS[usize::from(code)] {
        Layout::Compound8 | Layout::Array8 => compound_header(bytes, start + 1, true)?.0,
        Layout::Compound32 | Layout::Array32 => compound_header(bytes, start + 1, false)?.0,
        _ => check_value(bytes, start)?,
    };
    if end <= bytes.len() { Ok(end) } else { Err(WireError::Truncated) }
}

/// End of the value at `start` if it is neither compound nor described.
fn simple_end(bytes: &[u8], start: usize) -> Result<Option<usize>, WireError> {
    let code = *bytes.get(start).ok_or(WireError::Truncated)?;
    let end = match LAYOUTS[usize::from(code)] {
        Layout::Fixed(width) => start + 1 + usize::from(width),
        Layout::Variable8 => start + 2 + usize::from(*bytes.get(start + 1).ok_or(WireError::Truncated)?),
        Layout::Variable32 => (start + 5).saturating_add(u32_at(bytes, start + 1)? as usize),
        Layout::Unknown => return Err(WireError::UnknownConstructor(code)),
        Layout::Described | Layout::Compound8 | Layout::Compound32 | Layout::Array8 | Layout::Array32 => {
            return Ok(None);
        }
    };
    if end <= bytes.len() { Ok(Some(end)) } else { Err(WireError::Truncated) }
}

/// End, count and begin of the content of a compound value or array whose size field is at `pos`.
pub(super) fn compound_header(
    bytes: &[u8],
    pos: usize,
    short: bool,
) -> Result<(usize, u32, usize), WireError> {
    if short {
        let (size, count) = match bytes.get(pos..) {
            Some([size, count, ..]) => (usize::from(*size), u32::from(*count)),
            _ => return Err(WireError::Truncated),
        };
        if size < 1 {
            return Err(WireError::BadCompound);
        }
        Ok((pos + 1 + size, count, pos + 2))
    } else {
        let size = u32_at(bytes, pos)? as usize;
        let count = u32_at(bytes, pos + 4)?;
        if size < 4 {
            return Err(WireError::BadCompound);
        }
        Ok(((pos + 4).saturating_add(size), count, pos + 8))
    }
}

/// Element constructor of an array; a descriptor in front of it must be a simple value.
fn array_constructor(bytes: &[u8], pos: usize, end: usize) -> Result<(u8, usize), WireError> {
    let at = |pos: usize| bytes.get(pos).filter(|_| pos < end).copied().ok_or(WireError::Truncated);
    let mut code = at(pos)?;
    let mut next = pos + 1;
    if code == 0x00 {
        let width = match LAYOUTS[usize::from(at(next)?)] {
            Layout::Fixed(width) => 1 + usize::from(width),
            Layout::Variable8 => 2 + usize::from(at(next + 1)?),
            _ => return Err(WireError::BadCompound),
        };
        next += width;
        code = at(next)?;
        next += 1;
    }
    match LAYOUTS[usize::from(code)] {
        Layout::Unknown => Err(WireError::UnknownConstructor(code)),
        Layout::Described => Err(WireError::BadCompound),
        _ if next > end => Err(WireError::Truncated),
        _ => Ok((code, next)),
    }
}

/// Four bytes as a number in network order.
pub(super) fn u32_at(bytes: &[u8], pos: usize) -> Result<u32, WireError> {
    let four = bytes.get(pos..).and_then(|rest| rest.first_chunk::<4>()).ok_or(WireError::Truncated)?;
    Ok(u32::from_be_bytes(*four))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simple_values() {
        for (bytes, end) in [
            (&[0x40u8][..], 1),
            (&[0x53, 7], 2),
            (&[0x70, 0, 0, 0, 1], 5),
            (&[0x98, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], 17),
            (&[0xa1, 2, b'a', b'b'], 4),
            (&[0xb0, 0, 0, 0, 1, 9], 6),
            (&[0x45], 1),
            (&[0xc0, 3, 2, 0x40, 0x41], 5),
            (&[0xc1, 3, 2, 0x40, 0x41], 5),
            (&[0xd0, 0, 0, 0, 5, 0, 0, 0, 1, 0x40], 10),
            (&[0x00, 0x53, 0x10, 0xc0, 1, 0], 6),
            (&[0xe0, 4, 2, 0x50, 1, 2], 6),
            (&[0xe0, 6, 2, 0xa3, 1, b'x', 1, b'y'], 8),
            (&[0xe0, 2, 5, 0x41], 4),
        ] {
            assert_eq!(check_value(bytes, 0), Ok(end), "{bytes:02x?}");
            for cut in 0..bytes.len() {
                assert!(check_value(&bytes[..cut], 0).is_err(), "{bytes:02x?} cut at {cut}");
            }
        }
    }

    #[test]
    fn lies_about_sizes_and_counts() {
        for bytes in [
            &[0xb1u8, 0xff, 0xff, 0xff, 0xf0][..],
            &[0xd0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[0xd0, 0, 0, 0, 5, 0xff, 0xff, 0xff, 0xff, 0x40],
            &[0xc0, 3, 1, 0x40, 0x40],
            &[0xc0, 2, 2, 0x40],
            &[0xc1, 2, 1, 0x40],
            &[0xc0, 0],
            &[0xf0, 0, 0, 0, 5, 0xff, 0xff, 0xff, 0xff, 0x40],
            &[0xf0, 0, 0, 0, 9, 0xff, 0xff, 0xff, 0xff, 0x70, 0, 0, 0, 1],
            &[0xe0, 3, 2, 0x50, 1],
            &[0xe0, 3, 0, 0x50, 1],
            &[0x3f],
            &[0xc0, 2, 1, 0x4f],
        ] {
            assert!(check_value(bytes, 0).is_err(), "{bytes:02x?}");
        }
    }

    #[test]
    fn nesting_is_limited() {
        // Innermost first: list32 around list32 …
        let nested = |levels: usize| {
            let mut bytes = vec![0x45];
            for _ in 0..levels {
                let mut outer = vec![0xd0];
                outer.extend((4 + bytes.len() as u32).to_be_bytes());
                outer.extend(1u32.to_be_bytes());
                outer.extend(&bytes);
                bytes = outer;
            }
            bytes
        };
        assert!(check_value(&nested(NESTING_MAX), 0).is_ok());
        assert_eq!(check_value(&nested(NESTING_MAX + 1), 0), Err(WireError::TooDeep));
        assert_eq!(check_value(&nested(4500), 0), Err(WireError::TooDeep));
        let described: Vec<u8> = std::iter::repeat_n([0x00, 0x53, 0x01], 20_000).flatten().collect();
        assert_eq!(check_value(&described, 0), Err(WireError::TooDeep));
        assert_eq!(check_value(&[0u8; 60_000], 0), Err(WireError::TooDeep));
    }

    proptest::proptest! {
        #[test]
        fn never_panics_and_never_leaves_the_slice(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            if let Ok(end) = check_value(&bytes, 0) {
                proptest::prop_assert!(end <= bytes.len());
            }
        }
    }
}
