//! Owns the reader of JSON as RFC 8259 has it: no recursion, no allocation, everything is checked.

use super::json::{JsonText, Refusal, Scalar, Visitor, escape_width};
use crate::limits::BODY_DEPTH_MAX;

/// Reads a document whose root is an object.
pub(super) fn scan<'t>(text: &'t str, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
    Scanner { bytes: text.as_bytes(), at: 0, arrays: 0, depth: 0 }.document(visitor)
}

struct Scanner<'t> {
    bytes: &'t [u8],
    at: usize,
    /// The open containers, the innermost in the lowest bit: 1 for an array.
    arrays: u64,
    depth: usize,
}

// The open containers have room in the word that holds their kinds.
const _: () = assert!(BODY_DEPTH_MAX <= u64::BITS as usize);

impl<'t> Scanner<'t> {
    fn document(&mut self, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
        if self.next_token() != Some(b'{') {
            return Err(Refusal::Malformed);
        }
        self.container(visitor)?;
        if self.next_token().is_none() { Ok(()) } else { Err(Refusal::Malformed) }
    }

    /// The container whose bracket is next, with all that is in it.
    fn container(&mut self, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
        let outside = self.depth;
        self.open(visitor)?;
        while self.depth > outside {
            match self.next_token() {
                Some(b',') => {
                    self.at += 1;
                    self.element(visitor)?;
                }
                Some(b'}') if self.arrays & 1 == 0 => self.close(visitor),
                Some(b']') if self.arrays & 1 == 1 => self.close(visitor),
                _ => return Err(Refusal::Malformed),
            }
        }
        Ok(())
    }

    /// The next byte that is no white space.
    #[inline(always)]
    fn next_token(&mut self) -> Option<u8> {
        while let Some(byte) = self.bytes.get(self.at) {
            match byte {
                b' ' | b'\t' | b'\n' | b'\r' => self.at += 1,
                other => return Some(*other),
            }
        }
        None
    }

    /// The container whose bracket is next, and its first element; all that is in it, if nobody asks for that.
    fn open(&mut self, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
        loop {
            let array = self.bytes.get(self.at) == Some(&b'[');
            visitor.open(array);
            if !visitor.looks_inside() {
                self.container(&mut Nobody)?;
                visitor.close();
                return Ok(());
            }
            self.at += 1;
            if self.depth == BODY_DEPTH_MAX {
                return Err(Refusal::TooDeep);
            }
            self.depth += 1;
            self.arrays = self.arrays << 1 | u64::from(array);
            let first = self.next_token();
            if first == Some(if array { b']' } else { b'}' }) {
                self.close(visitor);
                return Ok(());
            }
            if !array {
                self.name(visitor)?;
            }
            if !matches!(self.next_token(), Some(b'{' | b'[')) {
                return self.scalar(visitor);
            }
        }
    }

    #[inline(always)]
    fn close(&mut self, visitor: &mut impl Visitor<'t>) {
        self.at += 1;
        self.depth -= 1;
        self.arrays >>= 1;
        visitor.close();
    }

    /// What follows a comma.
    #[inline(always)]
    fn element(&mut self, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
        if self.arrays & 1 == 0 {
            self.next_token();
            self.name(visitor)?;
        }
        match self.next_token() {
            Some(b'{' | b'[') => self.open(visitor),
            _ => self.scalar(visitor),
        }
    }

    #[inline(always)]
    fn name(&mut self, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
        let name = self.quoted()?;
        visitor.member(name);
        if self.next_token() != Some(b':') {
            return Err(Refusal::Malformed);
        }
        self.at += 1;
        Ok(())
    }

    #[inline(always)]
    fn scalar(&mut self, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let (value, width) = match rest {
            [b'"', ..] => {
                let text = self.quoted()?;
                visitor.value(Scalar::Text(text));
                return Ok(());
            }
            [b't', b'r', b'u', b'e', ..] => (Scalar::Bool(true), 4),
            [b'f', b'a', b'l', b's', b'e', ..] => (Scalar::Bool(false), 5),
            [b'n', b'u', b'l', b'l', ..] => (Scalar::Null, 4),
            _ => {
                let width = number_width(rest).ok_or(Refusal::Malformed)?;
                (Scalar::Digits(rest.get(..width).unwrap_or_default()), width)
            }
        };
        self.at += width;
        visitor.value(value);
        Ok(())
    }

    #[inline(always)]
    fn quoted(&mut self) -> Result<JsonText<'t>, Refusal> {
        if self.bytes.get(self.at) != Some(&b'"') {
            return Err(Refusal::Malformed);
        }
        let start = self.at + 1;
        let mut at = plain_end(self.bytes, start);
        let mut escaped = false;
        while self.bytes.get(at) != Some(&b'"') {
            let rest = self.bytes.get(at..).unwrap_or_default();
            if rest.first() != Some(&b'\\') {
                return Err(Refusal::Malformed);
            }
            escaped = true;
            at = plain_end(self.bytes, at + escape_width(rest, false).ok_or(Refusal::Malformed)?);
        }
        self.at = at + 1;
        Ok(JsonText { raw: self.bytes.get(start..at).unwrap_or_default(), at: start, escaped })
    }
}

/// Is told what nobody asks for, which is checked all the same; to the end, so that nothing recurses.
struct Nobody;

impl<'t> Visitor<'t> for Nobody {
    fn begin(&mut self) {}
    fn open(&mut self, _array: bool) {}
    fn looks_inside(&self) -> bool {
        true
    }
    fn close(&mut self) {}
    fn member(&mut self, _name: JsonText<'t>) {}
    fn value(&mut self, _value: Scalar<'t>) {}
}

/// Where from `at` on the first quote, backslash or control character stands; eight bytes are looked at in one step.
#[inline(always)]
fn plain_end(bytes: &[u8], mut at: usize) -> usize {
    const LOW: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    // The highest bit of each byte that is zero, or below the limit. Bits above the first that is set may be wrong.
    let zero = |word: u64| word.wrapping_sub(LOW) & !word & HIGH;
    let below = |word: u64, limit: u8| word.wrapping_sub(LOW * u64::from(limit)) & !word & HIGH;
    while let Some(word) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let word = u64::from_le_bytes(*word);
        let special =
            zero(word ^ (LOW * u64::from(b'"'))) | zero(word ^ (LOW * u64::from(b'\\'))) | below(word, 0x20);
        if special != 0 {
            return at + special.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    while bytes.get(at).is_some_and(|byte| !matches!(byte, b'"' | b'\\' | 0..0x20)) {
        at += 1;
    }
    at
}

/// Width of the number at the start of `bytes`. What follows it is checked by whoever expects a comma or a bracket.
#[inline(always)]
fn number_width(bytes: &[u8]) -> Option<usize> {
    let digits = |mut at: usize| {
        while bytes.get(at).is_some_and(u8::is_ascii_digit) {
            at += 1;
        }
        at
    };
    let start = usize::from(bytes.first() == Some(&b'-'));
    let mut at = digits(start);
    if at == start || (bytes.get(start) == Some(&b'0') && at > start + 1) {
        return None;
    }
    if bytes.get(at) == Some(&b'.') {
        let end = digits(at + 1);
        if end == at + 1 {
            return None;
        }
        at = end;
    }
    if matches!(bytes.get(at), Some(b'e' | b'E')) {
        let start = at + 1 + usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
        at = digits(start);
        if at == start {
            return None;
        }
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use super::plain_end;

    #[test]
    fn special_bytes_are_found_wherever_they_stand() {
        for width in 0..40 {
            for special in [b'"', b'\\', 0, 0x1F] {
                for filler in [b' ', b'!', b'#', b'[', b']', 0x7F, 0x80, 0xA2, 0xDC, 0xFF] {
                    let mut bytes = vec![filler; width];
                    assert_eq!(plain_end(&bytes, 0), width);
                    bytes.extend([special, special, filler, special]);
                    assert_eq!(plain_end(&bytes, 0), width, "{special} after {filler}");
                }
            }
        }
    }
}
