//! Owns the reading of numbers out of text, as `as_number` does it.

/// The number that a text is; none if it is none.
///
/// Signs, a currency sign, grouping commas and parentheses for negative numbers are accepted as the reference does.
/// `digits` is a buffer for the number without them.
pub(crate) fn parse(text: &[u8], digits: &mut String) -> Option<f64> {
    if let Some(whole) = whole(text) {
        return Some(whole);
    }
    digits.clear();
    let mut reader =
        Reader { rest: text, signed: false, negative: false, parenthesis: false, currency: false };
    match reader.number(digits) {
        Some(magnitude) => Some(if reader.negative { -magnitude } else { magnitude }),
        None => infinity(text),
    }
}

/// The value of a text of digits only, if a double holds all such numbers exactly.
fn whole(text: &[u8]) -> Option<f64> {
    const EXACT_DIGITS: usize = 15;
    if text.is_empty() || text.len() > EXACT_DIGITS || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(text.iter().fold(0_u64, |value, digit| value * 10 + u64::from(digit - b'0')) as f64)
}

struct Reader<'t> {
    rest: &'t [u8],
    signed: bool,
    negative: bool,
    parenthesis: bool,
    currency: bool,
}

impl Reader<'_> {
    fn number(&mut self, digits: &mut String) -> Option<f64> {
        // White space may precede everything, but may follow a sign only after a currency sign.
        while self.take_sign() || self.take_currency() || self.take_open() || self.take_white() {}
        let whole = self.digits(digits, true);
        let mut any = whole > 0;
        if self.take(b".") {
            digits.push('.');
            any |= self.digits(digits, false) > 0;
        }
        if !any {
            return None;
        }
        self.exponent(digits);
        loop {
            let white = self.take_white_anywhere();
            if !(white || self.take_sign() || self.take_close() || self.take_currency()) {
                break;
            }
        }
        if self.parenthesis || self.rest.iter().any(|byte| *byte != 0) {
            return None;
        }
        if digits.starts_with('.') {
            digits.insert(0, '0');
        }
        digits.parse().ok()
    }

    /// Copies digits; behind the first, commas are skipped if `grouped`.
    fn digits(&mut self, digits: &mut String, grouped: bool) -> usize {
        let mut count = 0;
        loop {
            match self.rest {
                [digit @ b'0'..=b'9', after @ ..] => {
                    digits.push(char::from(*digit));
                    count += 1;
                    self.rest = after;
                }
                [b',', after @ ..] if grouped && count > 0 => self.rest = after,
                _ => return count,
            }
        }
    }

    /// Copies an exponent; a letter without digits behind it is left.
    fn exponent(&mut self, digits: &mut String) {
        let [b'e' | b'E', after @ ..] = self.rest else { return };
        let (negative, after) = match after {
            [b'-', after @ ..] => (true, after),
            [b'+', after @ ..] => (false, after),
            _ => (false, after),
        };
        if !after.first().is_some_and(u8::is_ascii_digit) {
            return;
        }
        digits.push_str(if negative { "e-" } else { "e" });
        self.rest = after;
        self.digits(digits, false);
    }

    fn take(&mut self, expected: &[u8]) -> bool {
        match self.rest.strip_prefix(expected) {
            Some(after) => {
                self.rest = after;
                true
            }
            None => false,
        }
    }

    fn take_white_anywhere(&mut self) -> bool {
        match self.rest {
            [b' ' | b'\t'..=b'\r', after @ ..] => {
                self.rest = after;
                true
            }
            _ => false,
        }
    }

    fn take_white(&mut self) -> bool {
        (!self.signed || self.currency) && self.take_white_anywhere()
    }

    fn take_sign(&mut self) -> bool {
        if self.signed {
            return false;
        }
        self.negative = self.rest.starts_with(b"-");
        self.signed = self.take(b"+") || self.take(b"-");
        self.signed
    }

    fn take_open(&mut self) -> bool {
        if self.signed || !self.take(b"(") {
            return false;
        }
        (self.signed, self.negative, self.parenthesis) = (true, true, true);
        true
    }

    fn take_close(&mut self) -> bool {
        let taken = self.parenthesis && self.take(b")");
        self.parenthesis &= !taken;
        taken
    }

    fn take_currency(&mut self) -> bool {
        let taken = !self.currency && self.take("¤".as_bytes());
        self.currency |= taken;
        taken
    }
}

fn infinity(text: &[u8]) -> Option<f64> {
    let word = std::str::from_utf8(text).ok()?.trim();
    let (word, value) = match word.strip_prefix('-') {
        Some(word) => (word, f64::NEG_INFINITY),
        None => (word.strip_prefix('+').unwrap_or(word), f64::INFINITY),
    };
    word.eq_ignore_ascii_case("infinity").then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_numbers() {
        let mut buffer = String::new();
        for (text, expected) in [
            ("  42\t", Some(42.0)),
            ("7-", Some(-7.0)),
            ("0", Some(0.0)),
            ("000000000000007", Some(7.0)),
            ("999999999999999", Some(999_999_999_999_999.0)),
            ("9007199254740993", Some(9_007_199_254_740_992.0)),
            ("(3)", Some(-3.0)),
            ("(3 )", Some(-3.0)),
            ("1,2,5,0.5", Some(1250.5)),
            ("1,", Some(1.0)),
            (".5", Some(0.5)),
            ("5.", Some(5.0)),
            ("2E+3", Some(2000.0)),
            ("¤9", Some(9.0)),
            ("-¤ 9", Some(-9.0)),
            ("9¤ -", Some(-9.0)),
            ("5\0\0", Some(5.0)),
            ("-infinity", Some(f64::NEG_INFINITY)),
            ("1e999", Some(f64::INFINITY)),
            ("1e-999", Some(0.0)),
            ("- 5", None),
            ("( 3)", None),
            ("(3", None),
            ("-(3)", None),
            ("(3)-", None),
            ("¤¤9", None),
            ("-5-", None),
            (",5", None),
            (".", None),
            ("", None),
            ("1.5,0", None),
            ("2e", None),
            ("5\0 ", None),
            ("nan", None),
            ("0x10", None),
            ("1 2", None),
            ("5\u{A0}", None),
        ] {
            assert_eq!(parse(text.as_bytes(), &mut buffer), expected, "{text:?}");
        }
    }
}
