//! Owns the reader of the lenient dialect, for bodies that are not strict JSON: comments, single quotes, bare names,
//! trailing commas, other forms of numbers. Slow, and only the second attempt.

use super::json::{JsonText, Refusal, Scalar, Visitor, escape_width, number};
use crate::limits::BODY_DEPTH_MAX;

/// Reads a document whose root is an object.
pub(super) fn scan<'t>(text: &'t str, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
    Scanner { text, at: 0, open: Vec::new() }.document(visitor)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Container {
    Object,
    Array,
    /// `new Name(…)`.
    Constructor,
}

struct Scanner<'t> {
    text: &'t str,
    at: usize,
    /// At most [`BODY_DEPTH_MAX`].
    open: Vec<Container>,
}

/// What the reader is about to see.
enum Due {
    Member,
    Value,
    AfterValue,
}

impl<'t> Scanner<'t> {
    fn document(&mut self, visitor: &mut impl Visitor<'t>) -> Result<(), Refusal> {
        self.skip()?;
        if !self.take("{") {
            return Err(Refusal::Malformed);
        }
        let mut due = self.opened(Container::Object, visitor)?;
        while let Some(innermost) = self.open.last().copied() {
            self.skip()?;
            due = match due {
                Due::Member if self.take("}") => self.closed(visitor),
                Due::Member => self.member(visitor)?,
                Due::Value => self.value(innermost, visitor)?,
                Due::AfterValue if self.take(",") => match innermost {
                    Container::Object => Due::Member,
                    Container::Array | Container::Constructor => Due::Value,
                },
                Due::AfterValue => {
                    let bracket = match innermost {
                        Container::Object => "}",
                        Container::Array => "]",
                        Container::Constructor => ")",
                    };
                    if !self.take(bracket) {
                        return Err(Refusal::Malformed);
                    }
                    self.closed(visitor)
                }
            };
        }
        self.skip()?;
        if self.rest().is_empty() { Ok(()) } else { Err(Refusal::Malformed) }
    }

    fn rest(&self) -> &'t str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn take(&mut self, expected: &str) -> bool {
        let found = self.rest().starts_with(expected);
        if found {
            self.at += expected.len();
        }
        found
    }

    /// Skips white space of any script, and comments.
    fn skip(&mut self) -> Result<(), Refusal> {
        loop {
            self.skip_white();
            let rest = self.rest();
            if let Some(comment) = rest.strip_prefix("/*") {
                self.at += 2 + comment.find("*/").ok_or(Refusal::Malformed)? + 2;
            } else if let Some(comment) = rest.strip_prefix("//") {
                self.at += 2 + comment.find(['\r', '\n']).unwrap_or(comment.len());
            } else {
                return Ok(());
            }
        }
    }

    fn skip_white(&mut self) {
        let rest = self.rest();
        self.at +=
            rest.len() - rest.trim_start_matches(|unit: char| unit.is_whitespace() || unit == '\0').len();
    }

    fn opened(&mut self, container: Container, visitor: &mut impl Visitor<'t>) -> Result<Due, Refusal> {
        if self.open.len() == BODY_DEPTH_MAX {
            return Err(Refusal::TooDeep);
        }
        self.open.push(container);
        visitor.open(container != Container::Object);
        Ok(if container == Container::Object { Due::Member } else { Due::Value })
    }

    fn closed(&mut self, visitor: &mut impl Visitor<'t>) -> Due {
        self.open.pop();
        visitor.close();
        Due::AfterValue
    }

    fn member(&mut self, visitor: &mut impl Visitor<'t>) -> Result<Due, Refusal> {
        let rest = self.rest();
        let name = match rest.chars().next() {
            Some(quote @ ('"' | '\'')) => self.quoted(quote)?,
            _ => {
                let bare = |unit: char| unit.is_alphanumeric() || unit == '_' || unit == '$';
                let width = rest.find(|unit| !bare(unit)).unwrap_or(rest.len());
                let after = rest.get(width..).and_then(|after| after.chars().next());
                if width == 0 || !after.is_some_and(|after| after == ':' || after.is_whitespace()) {
                    return Err(Refusal::Malformed);
                }
                let raw = rest.get(..width).unwrap_or_default().as_bytes();
                let name = JsonText { raw, at: self.at, escaped: false };
                self.at += width;
                name
            }
        };
        visitor.member(name);
        self.skip_white();
        if self.take(":") { Ok(Due::Value) } else { Err(Refusal::Malformed) }
    }

    fn value(&mut self, innermost: Container, visitor: &mut impl Visitor<'t>) -> Result<Due, Refusal> {
        let rest = self.rest();
        let value = match rest.chars().next() {
            Some('{') => {
                self.at += 1;
                return self.opened(Container::Object, visitor);
            }
            Some('[') => {
                self.at += 1;
                return self.opened(Container::Array, visitor);
            }
            // A comma may stand before the bracket, also alone.
            Some(']') if innermost == Container::Array => {
                self.at += 1;
                return Ok(self.closed(visitor));
            }
            Some(')') if innermost == Container::Constructor => {
                self.at += 1;
                return Ok(self.closed(visitor));
            }
            Some(',') if innermost != Container::Object => Scalar::Undefined,
            Some(quote @ ('"' | '\'')) => Scalar::Text(self.quoted(quote)?),
            Some('n') if rest.starts_with("new") => return self.constructor(visitor),
            Some('-') if self.word("-Infinity") => Scalar::Number(f64::NEG_INFINITY),
            Some('-' | '.' | '0'..='9') => Scalar::Number(self.number()?),
            _ => {
                const WORDS: [(&str, Scalar<'static>); 6] = [
                    ("true", Scalar::Bool(true)),
                    ("false", Scalar::Bool(false)),
                    ("null", Scalar::Null),
                    ("undefined", Scalar::Undefined),
                    ("NaN", Scalar::Number(f64::NAN)),
                    ("Infinity", Scalar::Number(f64::INFINITY)),
                ];
                let known = WORDS.iter().find(|(word, _)| self.word(word)).map(|(_, value)| *value);
                known.ok_or(Refusal::Malformed)?
            }
        };
        visitor.value(value);
        Ok(Due::AfterValue)
    }

    /// Takes a word that something follows that ends words.
    fn word(&mut self, word: &str) -> bool {
        let Some(after) = self.rest().strip_prefix(word) else { return false };
        let ends = match after.chars().next() {
            None | Some('}' | ']' | ',') => true,
            Some(')') => self.open.contains(&Container::Constructor),
            Some('/') => after.starts_with("//") || after.starts_with("/*"),
            Some(other) => other.is_whitespace(),
        };
        if ends {
            self.at += word.len();
        }
        ends
    }

    fn constructor(&mut self, visitor: &mut impl Visitor<'t>) -> Result<Due, Refusal> {
        if !self.word("new") {
            return Err(Refusal::Malformed);
        }
        self.skip_white();
        let rest = self.rest();
        self.at += rest.find(|unit: char| !unit.is_alphanumeric()).unwrap_or(rest.len());
        self.skip_white();
        if !self.take("(") {
            return Err(Refusal::Malformed);
        }
        self.opened(Container::Constructor, visitor)
    }

    fn quoted(&mut self, quote: char) -> Result<JsonText<'t>, Refusal> {
        let bytes = self.text.as_bytes();
        let start = self.at + 1;
        let mut at = start;
        let mut escaped = false;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            at += memchr::memchr2(quote as u8, b'\\', rest).ok_or(Refusal::Malformed)?;
            if bytes.get(at) != Some(&b'\\') {
                break;
            }
            escaped = true;
            at += escape_width(bytes.get(at..).unwrap_or_default(), true).ok_or(Refusal::Malformed)?;
        }
        self.at = at + 1;
        Ok(JsonText { raw: bytes.get(start..at).unwrap_or_default(), at: start, escaped })
    }

    fn number(&mut self) -> Result<f64, Refusal> {
        let rest = self.rest();
        let part = |unit: char| unit.is_ascii_hexdigit() || matches!(unit, '-' | '+' | '.' | 'x' | 'X');
        let width = rest.find(|unit| !part(unit)).unwrap_or(rest.len());
        let (own, after) = rest.split_at(width);
        let ends = |unit: char| unit.is_whitespace() || matches!(unit, ',' | '}' | ']' | ')' | '/');
        if !after.chars().next().is_none_or(ends) {
            return Err(Refusal::Malformed);
        }
        self.at += width;
        let based = |digits: &str, radix| match digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            // 64 bits, of which the first is the sign.
            true => u64::from_str_radix(digits, radix).ok().map(|bits| bits as i64 as f64),
            false => None,
        };
        let value = match own.as_bytes() {
            [b'0', b'x' | b'X', ..] => based(own.get(2..).unwrap_or_default(), 16),
            [b'0', b'.' | b'e' | b'E', ..] | [b'0'] => Some(number(own)),
            [b'0', ..] => based(own, 8),
            _ => own.parse::<f64>().ok().map(|_| number(own)),
        };
        value.filter(|value| !value.is_nan()).ok_or(Refusal::Malformed)
    }
}
