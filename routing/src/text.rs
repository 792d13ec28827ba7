//! Owns the text semantics of the language: strings are sequences of UTF-16 code units.
//!
//! Text is held as WTF-8 bytes: UTF-8 that may also hold unpaired surrogates, which string escapes and `substring` can
//! make. A surrogate pair is always one four-byte sequence, so equal texts have equal bytes, and message text, which is
//! UTF-8 already, is used where it lies. Lengths, positions and the order are those of the code units.

use std::cmp::Ordering;
use std::ops::Range;

use memchr::memmem;

/// The UTF-16 code units of a WTF-8 text.
pub(crate) struct Units<'a> {
    bytes: &'a [u8],
    low: u16,
}

/// Iterates over the code units of `bytes`.
pub(crate) fn units(bytes: &[u8]) -> Units<'_> {
    Units { bytes, low: 0 }
}

impl Iterator for Units<'_> {
    type Item = u16;

    fn next(&mut self) -> Option<u16> {
        if self.low != 0 {
            return Some(std::mem::take(&mut self.low));
        }
        let (point, width) = decode(self.bytes)?;
        self.bytes = self.bytes.get(width..).unwrap_or_default();
        if point < 0x1_0000 {
            return Some(point as u16);
        }
        self.low = 0xDC00 | ((point - 0x1_0000) & 0x3FF) as u16;
        Some(0xD800 | ((point - 0x1_0000) >> 10) as u16)
    }
}

/// The first code point, which may be a surrogate, and its width in bytes.
fn decode(bytes: &[u8]) -> Option<(u32, usize)> {
    let first = u32::from(*bytes.first()?);
    let rest = |at: usize| bytes.get(at).map_or(0, |byte| u32::from(*byte) & 0x3F);
    Some(match first {
        0..0x80 => (first, 1),
        0x80..0xE0 => ((first & 0x1F) << 6 | rest(1), 2),
        0xE0..0xF0 => ((first & 0x0F) << 12 | rest(1) << 6 | rest(2), 3),
        _ => ((first & 0x07) << 18 | rest(1) << 12 | rest(2) << 6 | rest(3), 4),
    })
}

/// Length in UTF-16 code units.
pub(crate) fn length_units(bytes: &[u8]) -> usize {
    bytes.iter().map(|byte| usize::from(byte & 0xC0 != 0x80) + usize::from(*byte >= 0xF0)).sum()
}

/// Ordinal order: by code units.
pub(crate) fn compare(left: &[u8], right: &[u8]) -> Ordering {
    let same = left.iter().zip(right).take_while(|(a, b)| a == b).count();
    match (left.get(same), right.get(same)) {
        (None, None) => Ordering::Equal,
        (None, Some(_)) if starts_character(right, same) => Ordering::Less,
        (Some(_), None) if starts_character(left, same) => Ordering::Greater,
        // Below U+D800 the order of bytes is the order of units.
        (Some(a), Some(b)) if *a < 0xED && *b < 0xED && !continues(*a) && !continues(*b) => a.cmp(b),
        _ => {
            let start =
                (0..=same).rev().find(|at| starts_character(left, *at) && starts_character(right, *at));
            let start = start.unwrap_or_default();
            units(left.get(start..).unwrap_or_default()).cmp(units(right.get(start..).unwrap_or_default()))
        }
    }
}

fn continues(byte: u8) -> bool {
    byte & 0xC0 == 0x80
}

fn starts_character(bytes: &[u8], at: usize) -> bool {
    bytes.get(at).is_none_or(|byte| !continues(*byte))
}

/// Does `text` begin with the units of `part`?
pub(crate) fn starts_with(text: &[u8], part: &[u8]) -> bool {
    if !ends_with_high_surrogate(part) {
        return text.starts_with(part);
    }
    let mut units_of_text = units(text);
    units(part).all(|unit| units_of_text.next() == Some(unit))
}

/// Does `text` end with the units of `part`?
pub(crate) fn ends_with(text: &[u8], part: &[u8]) -> bool {
    if !starts_with_low_surrogate(part) {
        return text.ends_with(part);
    }
    match length_units(text).checked_sub(length_units(part)) {
        Some(skipped) => units(text).skip(skipped).eq(units(part)),
        None => false,
    }
}

/// Does `text` hold the units of `part`?
pub(crate) fn contains(text: &[u8], part: &[u8]) -> bool {
    index_of(text, part).is_some()
}

/// The position in units of the first `part` in `text`.
pub(crate) fn index_of(text: &[u8], part: &[u8]) -> Option<usize> {
    if !starts_with_low_surrogate(part) && !ends_with_high_surrogate(part) {
        return memmem::find(text, part).map(|at| length_units(text.get(..at).unwrap_or_default()));
    }
    // A lone surrogate can match half of a pair, which bytes cannot show.
    let (text, part): (Vec<u16>, Vec<u16>) = (units(text).collect(), units(part).collect());
    text.windows(part.len()).position(|window| window == part)
}

fn starts_with_low_surrogate(bytes: &[u8]) -> bool {
    matches!(bytes, [0xED, 0xB0..=0xBF, ..])
}

fn ends_with_high_surrogate(bytes: &[u8]) -> bool {
    matches!(bytes, [.., 0xED, 0xA0..=0xAF, _])
}

/// What `substring` selects.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Whole characters: these bytes of the text.
    Bytes(Range<usize>),
    /// The selection splits a surrogate pair: the units have to be copied.
    Split,
}

/// The part of `text` of `length` units from unit `start`; both must lie within the text.
pub(crate) fn part(text: &[u8], start: usize, length: usize) -> Part {
    let Some(from) = byte_of_unit(text, start) else { return Part::Split };
    match byte_of_unit(text.get(from..).unwrap_or_default(), length) {
        Some(width) => Part::Bytes(from..from + width),
        None => Part::Split,
    }
}

/// The byte at which unit `unit` begins; none in the middle of a pair or past the end.
fn byte_of_unit(text: &[u8], unit: usize) -> Option<usize> {
    let mut seen = 0;
    let mut at = 0;
    while seen < unit {
        let (point, width) = decode(text.get(at..)?)?;
        seen += if point < 0x1_0000 { 1 } else { 2 };
        at += width;
    }
    (seen == unit).then_some(at)
}

/// Appends one unit to the text that begins at `start` in `buffer`; joins a low surrogate to the high one before it.
pub(crate) fn push_unit(buffer: &mut Vec<u8>, start: usize, unit: u16) {
    let own = buffer.get(start..).unwrap_or_default();
    if (0xDC00..0xE000).contains(&unit)
        && ends_with_high_surrogate(own)
        && let Some((high, _)) = decode(own.get(own.len() - 3..).unwrap_or_default())
    {
        buffer.truncate(buffer.len() - 3);
        push_point(buffer, 0x1_0000 + ((high - 0xD800) << 10) + u32::from(unit - 0xDC00));
        return;
    }
    push_point(buffer, u32::from(unit));
}

/// Appends `text` to the text that begins at `start` in `buffer`.
pub(crate) fn push_text(buffer: &mut Vec<u8>, start: usize, text: &[u8]) {
    if starts_with_low_surrogate(text)
        && let Some((low, width)) = decode(text)
    {
        push_unit(buffer, start, low as u16);
        buffer.extend_from_slice(text.get(width..).unwrap_or_default());
        return;
    }
    buffer.extend_from_slice(text);
}

fn push_point(buffer: &mut Vec<u8>, point: u32) {
    let tail = |shift: u32| 0x80 | ((point >> shift) & 0x3F) as u8;
    match point {
        0..0x80 => buffer.push(point as u8),
        0x80..0x800 => buffer.extend([0xC0 | (point >> 6) as u8, tail(0)]),
        0x800..0x1_0000 => buffer.extend([0xE0 | (point >> 12) as u8, tail(6), tail(0)]),
        _ => buffer.extend([0xF0 | (point >> 18) as u8, tail(12), tail(6), tail(0)]),
    }
}

/// Appends `text` in which each character is replaced by `map`; unpaired surrogates stay.
pub(crate) fn push_mapped(buffer: &mut Vec<u8>, text: &[u8], map: fn(char) -> char) {
    let mut rest = text;
    while let Some((point, width)) = decode(rest) {
        push_point(buffer, mapped(point, map));
        rest = rest.get(width..).unwrap_or_default();
    }
}

/// The same for a text that lies in the buffer itself.
pub(crate) fn push_mapped_within(buffer: &mut Vec<u8>, text: Range<usize>, map: fn(char) -> char) {
    let mut at = text.start;
    while at < text.end
        && let Some((point, width)) = decode(buffer.get(at..).unwrap_or_default())
    {
        push_point(buffer, mapped(point, map));
        at += width;
    }
}

fn mapped(point: u32, map: fn(char) -> char) -> u32 {
    char::from_u32(point).map_or(point, |character| map(character) as u32)
}

/// The simple upper-case mapping, invariant: one character for one, and none for `ı` and `ſ`, so that no other letter
/// becomes an ASCII one.
pub(crate) fn upper(character: char) -> char {
    match character {
        'a'..='z' => character.to_ascii_uppercase(),
        '\0'..='\u{7F}' | 'ı' | 'ſ' => character,
        // Their full mapping is two characters; the simple one is the title-case letter.
        '\u{1F80}'..='\u{1F87}' | '\u{1F90}'..='\u{1F97}' | '\u{1FA0}'..='\u{1FA7}' => offset(character, 8),
        '\u{1FB3}' | '\u{1FC3}' | '\u{1FF3}' => offset(character, 9),
        _ => single(character, character.to_uppercase()),
    }
}

/// The simple lower-case mapping, invariant: one character for one, and none for `İ`.
pub(crate) fn lower(character: char) -> char {
    match character {
        'A'..='Z' => character.to_ascii_lowercase(),
        '\0'..='\u{7F}' | 'İ' => character,
        _ => single(character, character.to_lowercase()),
    }
}

fn offset(character: char, by: u32) -> char {
    char::from_u32(character as u32 + by).unwrap_or(character)
}

fn single(character: char, mut mapped: impl Iterator<Item = char>) -> char {
    match (mapped.next(), mapped.next()) {
        (Some(only), None) => only,
        _ => character,
    }
}

/// The letter by which names are compared ignoring case: the upper-case mapping of each code unit, so characters of two
/// units stay as they are.
pub(crate) fn fold(character: char) -> char {
    if (character as u32) < 0x1_0000 { upper(character) } else { character }
}

/// A name with case folded away.
pub(crate) fn folded(name: &str) -> String {
    name.chars().map(fold).collect()
}

/// Are two names equal, ignoring case?
pub(crate) fn equal_names(left: &str, right: &str) -> bool {
    left.eq_ignore_ascii_case(right)
        || (!left.is_ascii() && !right.is_ascii() && left.chars().map(fold).eq(right.chars().map(fold)))
}

/// `name` without `prefix`, ignoring case.
pub(crate) fn strip_prefix<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let head = name.get(..prefix.len())?;
    equal_names(head, prefix).then(|| name.get(prefix.len()..)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_units(all: &[u16]) -> Vec<u8> {
        let mut buffer = Vec::new();
        all.iter().for_each(|unit| push_unit(&mut buffer, 0, *unit));
        buffer
    }

    #[test]
    fn units_survive_a_round_trip_and_pairs_join() {
        let all = [0x41, 0xD83D, 0xDE00, 0xD83D, 0x42, 0xDE00, 0xE000, 0x7FF];
        assert_eq!(units(&from_units(&all)).collect::<Vec<_>>(), all);
        assert_eq!(from_units(&[0xD83D, 0xDE00]), "😀".as_bytes());
        assert_eq!(length_units("a😀b".as_bytes()), 4);
    }

    #[test]
    fn order_is_that_of_code_units() {
        let samples: [&[u16]; 10] = [
            &[],
            &[0x61],
            &[0x61, 0x62],
            &[0xD7FF],
            &[0xD800],
            &[0xD800, 0x61],
            &[0xD800, 0xDC00],
            &[0xDC00],
            &[0xE000],
            &[0xFFFF, 0x61],
        ];
        for left in samples {
            for right in samples {
                assert_eq!(
                    compare(&from_units(left), &from_units(right)),
                    left.cmp(right),
                    "{left:X?} {right:X?}"
                );
            }
        }
    }

    #[test]
    fn searches_see_halves_of_pairs() {
        let (text, high, low) =
            (from_units(&[0x61, 0xD83D, 0xDE00]), from_units(&[0xD83D]), from_units(&[0xDE00]));
        assert_eq!(index_of(&text, &high), Some(1));
        assert_eq!(index_of(&text, &low), Some(2));
        assert!(ends_with(&text, &low) && !ends_with(&text, &high));
        assert!(starts_with(&text, &from_units(&[0x61, 0xD83D])));
        assert_eq!((part(&text, 0, 2), part(&text, 1, 2)), (Part::Split, Part::Bytes(1..5)));
    }

    #[test]
    fn case_is_simple_and_invariant() {
        assert_eq!((upper('ß'), upper('ı'), lower('İ'), upper('ᾳ')), ('ß', 'ı', 'İ', 'ᾼ'));
        assert!(('\u{80}'..=char::MAX).all(|character| !fold(character).is_ascii()));
        assert!(equal_names("PRÉS", "prés") && !equal_names("k", "\u{212A}"));
        assert_eq!(strip_prefix("$BODY.x", "$body."), Some("x"));
    }
}
