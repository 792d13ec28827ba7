//! Owns what the two readers of JSON have in common: what they report, texts with escapes, numbers.

/// A text as it stands between its quotes.
#[derive(Clone, Copy, Debug)]
pub(super) struct JsonText<'t> {
    pub(super) raw: &'t [u8],
    /// Where `raw` begins in the body's text, in bytes.
    pub(super) at: usize,
    /// Holds a backslash.
    pub(super) escaped: bool,
}

/// A value that is no container.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scalar<'t> {
    Null,
    Bool(bool),
    Number(f64),
    /// The text of a number, whose value is not needed by everyone.
    Digits(&'t [u8]),
    Text(JsonText<'t>),
    Undefined,
}

/// Is told what a document holds, in order.
pub(super) trait Visitor<'t> {
    /// A document begins; what was told before is void.
    fn begin(&mut self);
    /// The value that is due is an object or an array.
    fn open(&mut self, array: bool);
    /// Does it matter what is in the container that has just been opened? If not, nothing more need be told of it than
    /// its end.
    fn looks_inside(&self) -> bool;
    /// The innermost container ends.
    fn close(&mut self);
    /// The next value is that member of the innermost object.
    fn member(&mut self, name: JsonText<'t>);
    /// The value that is due.
    fn value(&mut self, value: Scalar<'t>);
}

/// Why a text is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Malformed,
    /// In every dialect.
    TooDeep,
}

/// The value of the bytes of a JSON number.
pub(super) fn number_of(digits: &[u8]) -> f64 {
    std::str::from_utf8(digits).map_or(f64::NAN, number)
}

/// The value of a JSON number; a whole number has no negative zero.
pub(super) fn number(digits: &str) -> f64 {
    let value = digits.parse().unwrap_or(f64::NAN);
    if value == 0.0 && !digits.contains(['.', 'e', 'E']) { 0.0 } else { value }
}

/// Width in bytes of the escape at the start of `bytes`, its backslash included; none if it is malformed.
pub(super) fn escape_width(bytes: &[u8], apostrophe: bool) -> Option<usize> {
    match bytes.get(1)? {
        b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Some(2),
        b'\'' if apostrophe => Some(2),
        b'u' => bytes.get(2..6)?.iter().all(u8::is_ascii_hexdigit).then_some(6),
        _ => None,
    }
}

/// Appends the value of a text; surrogates without a partner become U+FFFD.
pub(super) fn unescape(raw: &[u8], buffer: &mut Vec<u8>) {
    let mut rest = raw;
    while let Some(at) = memchr::memchr(b'\\', rest) {
        buffer.extend_from_slice(rest.get(..at).unwrap_or_default());
        rest = rest.get(at..).unwrap_or_default();
        let (character, width) = match rest.get(1) {
            Some(b'b') => ('\u{8}', 2),
            Some(b'f') => ('\u{C}', 2),
            Some(b'n') => ('\n', 2),
            Some(b'r') => ('\r', 2),
            Some(b't') => ('\t', 2),
            Some(b'u') => numbered(rest),
            Some(other) => (char::from(*other), 2),
            None => return,
        };
        super::push(buffer, character);
        rest = rest.get(width..).unwrap_or_default();
    }
    buffer.extend_from_slice(rest);
}

/// The character of `\uXXXX`, or of two of them that are a pair.
fn numbered(bytes: &[u8]) -> (char, usize) {
    let unit = |at: usize| {
        let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let (first, second) = (unit(0).unwrap_or(0xFFFD), unit(6).unwrap_or_default());
    match char::decode_utf16([first, second]).next() {
        Some(Ok(character)) => (character, if character.len_utf16() == 2 { 12 } else { 6 }),
        _ => (char::REPLACEMENT_CHARACTER, 6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_replaced() {
        let value = |raw: &str| {
            let mut buffer = Vec::new();
            unescape(raw.as_bytes(), &mut buffer);
            String::from_utf8(buffer).expect("UTF-8")
        };
        assert_eq!(value(r#"a\n\"\\\/\u0041"#), "a\n\"\\/A");
        assert_eq!(value(r"\uD83D\uDE00 \uD83D \uDE00 \uD83Dx"), "😀 \u{FFFD} \u{FFFD} \u{FFFD}x");
        assert_eq!(value(r"\uD83D\uD83D\uDE00"), "\u{FFFD}😀");
    }

    #[test]
    fn whole_numbers_have_one_zero() {
        assert!(number("-0").is_sign_positive() && number("-0.0").is_sign_negative());
        assert_eq!((number("1e999"), number("12.5")), (f64::INFINITY, 12.5));
    }
}
