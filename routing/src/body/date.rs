//! Owns the texts that look like dates: the reference's reader makes dates of them, and dates have no value.

use crate::text::length_units;

/// Does a text look like a date?
pub(super) fn looks_like_date(text: &[u8]) -> bool {
    match text {
        [b'/', ..] => milliseconds(text),
        [b'0'..=b'9', ..] if (19..=40).contains(&length_units(text)) => calendar(text),
        _ => false,
    }
}

/// `/Date(n)/`, with an offset behind the number or not.
fn milliseconds(text: &[u8]) -> bool {
    let Some(inner) = text.strip_prefix(b"/Date(").and_then(|rest| rest.strip_suffix(b")/")) else {
        return false;
    };
    let Ok(inner) = std::str::from_utf8(inner) else { return false };
    let offset = inner.get(1..).and_then(|rest| rest.find(['+', '-'])).map(|at| at + 1);
    let (number, offset) = inner.split_at(offset.unwrap_or(inner.len()));
    let digits = offset.get(1..).unwrap_or_default();
    let good_offset = offset.is_empty()
        || ((2..=4).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit()));
    good_offset && !number.starts_with('+') && number.parse::<i64>().is_ok()
}

/// `YYYY-MM-DDTHH:MM:SS`, a fraction or not, a zone or not.
fn calendar(text: &[u8]) -> bool {
    const PUNCTUATION: [(usize, u8); 5] = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if PUNCTUATION.iter().any(|(at, expected)| text.get(*at) != Some(expected)) {
        return false;
    }
    let fields =
        (two(text, 0), two(text, 2), two(text, 5), two(text, 8), two(text, 11), two(text, 14), two(text, 17));
    let (Some(century), Some(year), Some(month), Some(day), Some(hour), Some(minute), Some(second)) = fields
    else {
        return false;
    };
    let (fraction, end) = match fraction(text) {
        Some(found) => found,
        None => return false,
    };
    let year = century * 100 + year;
    let midnight = hour == 24 && minute == 0 && second == 0 && !fraction;
    let day_exists = year >= 1 && (1..=12).contains(&month) && (1..=days(year, month)).contains(&day);
    day_exists && (hour < 24 || midnight) && minute < 60 && second < 60 && zone_end(text, end) == text.len()
}

fn two(text: &[u8], at: usize) -> Option<u32> {
    match text.get(at..at + 2)? {
        [a @ b'0'..=b'9', b @ b'0'..=b'9'] => Some(u32::from(a - b'0') * 10 + u32::from(b - b'0')),
        _ => None,
    }
}

fn days(year: u32, month: u32) -> u32 {
    match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Is there a fraction other than zero, and where does it end? At most 7 digits are taken.
fn fraction(text: &[u8]) -> Option<(bool, usize)> {
    if text.get(19) != Some(&b'.') {
        return Some((false, 19));
    }
    let digits = text.get(20..).unwrap_or_default().iter().take(7).take_while(|byte| byte.is_ascii_digit());
    let (count, zero) = digits.fold((0, true), |(count, zero), digit| (count + 1, zero && *digit == b'0'));
    (count > 0).then_some((!zero, 20 + count))
}

/// Where the zone that begins at `at` ends: `Z`, or hours with a sign, then minutes with or without a colon.
fn zone_end(text: &[u8], mut at: usize) -> usize {
    match text.get(at) {
        Some(b'Z' | b'z') => return at + 1,
        Some(b'+' | b'-') if two(text, at + 1).is_some() => at += 3,
        _ => {}
    }
    if text.get(at) == Some(&b':') {
        at += 1;
    }
    if two(text, at).is_some() { at + 2 } else { at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_told_from_texts() {
        for date in [
            "2031-07-04T10:20:30",
            "2031-07-04T10:20:30z",
            "2031-07-04T10:20:30+02:",
            "2031-07-04T10:20:30:30",
            "2031-07-04T10:20:3012",
            "2031-07-04T10:20:30.123456789",
            "2032-02-29T24:00:00.000Z",
            "/Date(-5)/",
            "/Date(5+0200)/",
            "/Date(-9223372036854775808-02)/",
        ] {
            assert!(looks_like_date(date.as_bytes()), "{date}");
        }
        for text in [
            "2031-02-29T10:20:30",
            "0000-01-01T00:00:00",
            "2031-07-04T24:00:01",
            "2031-07-04T24:00:00.1",
            "2031-07-04T10:20:60",
            "2031-07-04T10:20:30.",
            "2031-07-04T10:20:30.12345678",
            "2031-07-04T10:20:30 ",
            "2031-07-04T10:20:30+2",
            "/Date(+5)/",
            "/Date()/",
            "/Date(9223372036854775808)/",
            "/Date(5+2)/",
        ] {
            assert!(!looks_like_date(text.as_bytes()), "{text}");
        }
    }
}
