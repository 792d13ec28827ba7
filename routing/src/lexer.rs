//! Owns the tokens: longest match, between equal lengths the kind that is listed first; no text is refused here.

use crate::diagnostic::Span;

/// The kinds of tokens that the grammar knows; white space and comments are skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    LeftBrace,
    RightBrace,
    Select,
    From,
    Where,
    Into,
    Text,
    Unterminated,
    Integer,
    Hex,
    Real,
    True,
    False,
    Null,
    Undefined,
    LeftParen,
    RightParen,
    Comma,
    Plus,
    Minus,
    Star,
    Slash,
    Percent,
    And,
    Or,
    Not,
    Equal,
    NotEqual,
    LessOrEqual,
    GreaterOrEqual,
    Greater,
    Less,
    Concat,
    Coalesce,
    SystemName,
    Name,
    PathText,
    Unknown,
}

/// One token of a route text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) kind: TokenKind,
    pub(crate) span: Span,
}

impl Token {
    /// The text of the token in `route`.
    pub(crate) fn of<'a>(&self, route: &'a str) -> &'a str {
        route.get(self.span.start as usize..self.span.end as usize).unwrap_or_default()
    }
}

/// Splits `route` into tokens; its length must fit into 32 bits.
pub(crate) fn tokens(route: &str) -> Vec<Token> {
    let mut found = Vec::with_capacity(route.len() / 4);
    scan(route, |token| found.push(token), |_| {});
    found
}

/// The comments of `route`; its length must fit into 32 bits.
pub(crate) fn comments(route: &str) -> Vec<Span> {
    let mut found = Vec::new();
    scan(route, |_| {}, |comment| found.push(comment));
    found
}

fn scan(route: &str, mut token: impl FnMut(Token), mut comment: impl FnMut(Span)) {
    // Known once, so that unclosed comments do not cost a search of the whole rest each.
    let last_close = memchr::memmem::rfind(route.as_bytes(), b"*/").unwrap_or(0);
    let mut at = 0;
    while let Some(rest) = route.get(at..).filter(|rest| !rest.is_empty()) {
        let span = |width: usize| Span { start: at as u32, end: (at + width) as u32 };
        let width = match skipped(rest, at + 2 <= last_close) {
            0 => {
                let (kind, width) = longest(rest);
                token(Token { kind, span: span(width) });
                width
            }
            width => {
                if rest.starts_with('/') {
                    comment(span(width));
                }
                width
            }
        };
        at += width;
    }
}

/// Bytes of white space or of one comment at the start of `rest`.
fn skipped(rest: &str, can_close: bool) -> usize {
    if can_close
        && let Some(body) = rest.strip_prefix("/*")
        && let Some(end) = memchr::memmem::find(body.as_bytes(), b"*/")
    {
        return 2 + end + 2;
    }
    rest.bytes().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n')).count()
}

/// Kind and width in bytes of the longest token at the start of `rest`, which is not empty.
fn longest(rest: &str) -> (TokenKind, usize) {
    let path = rest.find(|unit| !is_path_unit(unit)).unwrap_or(rest.len());
    let name = rest.get(..path).and_then(|run| run.find(['[', ']'])).unwrap_or(path);
    let by_run = match path {
        0 => None,
        _ if name < path => {
            Some(if rest.starts_with('$') && path > 1 { TokenKind::SystemName } else { TokenKind::PathText })
        }
        _ => Some(kind_of_run(rest.get(..path).unwrap_or_default())),
    };
    let by_run = by_run.map(|kind| (kind, path));
    let special = quoted(rest).or_else(|| operator(rest));
    match (special, by_run) {
        // A quoted text stands before a name of the same width in the list of tokens.
        (Some(special), Some(run)) if special.1 >= run.1 => special,
        (_, Some(run)) => run,
        (Some(special), None) => special,
        (None, None) => (TokenKind::Unknown, rest.chars().next().map_or(1, char::len_utf8)),
    }
}

/// Whether a name may go on with this character.
pub(crate) fn is_path_unit(unit: char) -> bool {
    !matches!(
        unit,
        '(' | ')'
            | '<'
            | '>'
            | '@'
            | ','
            | ';'
            | ':'
            | '\\'
            | '"'
            | '/'
            | '?'
            | '='
            | '{'
            | '}'
            | ' '
            | '\t'
            | '\n'
            | '\r'
    )
}

/// What a run of name units is when it is one token.
fn kind_of_run(run: &str) -> TokenKind {
    if let Some(kind) = number(run.as_bytes()) {
        return kind;
    }
    match run {
        "true" => return TokenKind::True,
        "false" => return TokenKind::False,
        "null" => return TokenKind::Null,
        "undefined" => return TokenKind::Undefined,
        "+" => return TokenKind::Plus,
        "-" => return TokenKind::Minus,
        "*" => return TokenKind::Star,
        "%" => return TokenKind::Percent,
        "||" => return TokenKind::Concat,
        "$" => return TokenKind::Name,
        _ if run.starts_with('$') => return TokenKind::SystemName,
        _ => {}
    }
    const KEYWORDS: [(&str, TokenKind); 7] = [
        ("select", TokenKind::Select),
        ("from", TokenKind::From),
        ("where", TokenKind::Where),
        ("into", TokenKind::Into),
        ("and", TokenKind::And),
        ("or", TokenKind::Or),
        ("not", TokenKind::Not),
    ];
    let keyword = KEYWORDS.iter().find(|(word, _)| run.eq_ignore_ascii_case(word));
    keyword.map_or(TokenKind::Name, |(_, kind)| *kind)
}

fn number(run: &[u8]) -> Option<TokenKind> {
    let digits = |from: &[u8]| from.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if let [b'0', b'x' | b'X', hex @ ..] = run
        && !hex.is_empty()
        && hex.iter().all(u8::is_ascii_hexdigit)
    {
        return Some(TokenKind::Hex);
    }
    let run = run.strip_prefix(b"-").unwrap_or(run);
    let whole = digits(run);
    let (_, run) = run.split_at(whole);
    if run.is_empty() {
        return (whole > 0).then_some(TokenKind::Integer);
    }
    let run = match run.strip_prefix(b".") {
        Some(fraction) => match digits(fraction) {
            0 => return None,
            width => fraction.get(width..)?,
        },
        None => run,
    };
    let exponent = match run {
        [] => return Some(TokenKind::Real),
        [b'e' | b'E', b'+' | b'-', exponent @ ..] | [b'e' | b'E', exponent @ ..] => exponent,
        _ => return None,
    };
    (!exponent.is_empty() && digits(exponent) == exponent.len()).then_some(TokenKind::Real)
}

/// A text in quotes, or the beginning of one up to where it cannot go on.
fn quoted(rest: &str) -> Option<(TokenKind, usize)> {
    let bytes = rest.as_bytes();
    let quote = *bytes.first().filter(|first| matches!(first, b'"' | b'\''))?;
    let mut at = 1;
    loop {
        at += match bytes.get(at..).unwrap_or_default() {
            [] => return Some((TokenKind::Unterminated, at)),
            [byte, ..] if *byte == quote => return Some((TokenKind::Text, at + 1)),
            [b'\\', b'"' | b'\'' | b'\\', ..] => 2,
            [b'\\', b'u', a, b, c, d, ..] if [a, b, c, d].iter().all(|digit| digit.is_ascii_hexdigit()) => 6,
            [b'\\', ..] => return Some((TokenKind::Unterminated, at)),
            // The bytes of a longer character are none of the above.
            [_, ..] => 1,
        };
    }
}

fn operator(rest: &str) -> Option<(TokenKind, usize)> {
    let bytes = rest.as_bytes();
    Some(match bytes {
        [b'!', b'=', ..] | [b'<', b'>', ..] => (TokenKind::NotEqual, 2),
        [b'<', b'=', ..] => (TokenKind::LessOrEqual, 2),
        [b'>', b'=', ..] => (TokenKind::GreaterOrEqual, 2),
        [b'?', b'?', ..] => (TokenKind::Coalesce, 2),
        [b'>', ..] => (TokenKind::Greater, 1),
        [b'<', ..] => (TokenKind::Less, 1),
        [b'=', ..] => (TokenKind::Equal, 1),
        [b'{', ..] => (TokenKind::LeftBrace, 1),
        [b'}', ..] => (TokenKind::RightBrace, 1),
        [b'(', ..] => (TokenKind::LeftParen, 1),
        [b')', ..] => (TokenKind::RightParen, 1),
        [b',', ..] => (TokenKind::Comma, 1),
        [b'/', ..] => (TokenKind::Slash, 1),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::TokenKind::*;
    use super::*;

    fn kinds(text: &str) -> Vec<TokenKind> {
        tokens(text).iter().map(|token| token.kind).collect()
    }

    #[test]
    fn longest_match_decides() {
        let cases: &[(&str, &[TokenKind])] = &[
            ("a=1", &[Name, Equal, Integer]),
            ("a<>'x'", &[Name, NotEqual, Text]),
            ("a!='x'", &[Name, Equal, Text]),
            ("a != 'x'", &[Name, NotEqual, Text]),
            ("1+1", &[Name]),
            ("8/2", &[Integer, Slash, Integer]),
            ("3 -4", &[Integer, Integer]),
            ("- 1", &[Minus, Integer]),
            ("'a'b", &[Name]),
            ("'it''s'", &[Name]),
            ("-'a'", &[Name]),
            ("\"a\"b", &[Text, Name]),
            ("'a\\nb'", &[Unterminated, Unknown, Name]),
            ("5.", &[Name]),
            ("0xZZ", &[Name]),
            ("5e+", &[Name]),
            ("e5", &[Real]),
            ("-E10", &[Real]),
            ("-.5e-3", &[Real]),
            ("a[0]", &[PathText]),
            ("$a-b+c*2", &[SystemName]),
            ("$a[0]", &[SystemName]),
            ("$", &[Name]),
            ("&&", &[Name]),
            ("||", &[Concat]),
            ("!!=", &[Name, Equal]),
            ("@?;:\\", &[Unknown, Unknown, Unknown, Unknown, Unknown]),
            ("a ?? b", &[Name, Coalesce, Name]),
            ("TRUE true", &[Name, True]),
            ("sElEcT selector", &[Select, Name]),
            ("/*/ x /*/ 12", &[Integer]),
            ("/* no end", &[Slash, Star, Name, Name]),
            ("/messages/**", &[Slash, Name, Slash, Name]),
        ];
        for (text, expected) in cases {
            assert_eq!(kinds(text), *expected, "{text}");
        }
    }
}
