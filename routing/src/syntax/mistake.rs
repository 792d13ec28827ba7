//! Owns what is said about a token that cannot stand where it stands: what was expected, or what is likely to be meant.

use super::Rule;
use crate::diagnostic::{Fault, Span, TextRange};
use crate::lexer::{Token, TokenKind, comments};
use crate::suggest::nearest;

/// Adds to a syntax error at token `at` what could have stood there, or what is likely to be meant.
pub(super) fn explained(fault: Fault, at: usize, expected: &[Rule], tokens: &[Token], text: &str) -> Fault {
    let token = |at: usize| tokens.get(at);
    let before = at.checked_sub(1).and_then(token);
    let own = token(at).map_or("", |token| token.of(text));
    if let Some(found) = token(at) {
        let keywords = expected.iter().filter_map(|rule| keyword(*rule));
        if let Some(known) = nearest(own, keywords) {
            return fault.with_guess(found.span, known);
        }
        match own {
            "&&" if expected.contains(&Rule::and) => return fault.with_guess(found.span, "AND"),
            "=" if before
                .is_some_and(|before| before.of(text) == "=" && before.span.end == found.span.start) =>
            {
                return fault.with_hint("equality is one =").with_replacement(found.span, "");
            }
            _ => {}
        }
        if own == "/" && expected.contains(&Rule::text) {
            let rest = tokens.get(at..).unwrap_or_default();
            let close = rest.iter().position(|token| token.kind == TokenKind::RightParen);
            if let Some(last) = close.and_then(|close| rest.get(close.checked_sub(1)?)) {
                let address = Span { start: found.span.start, end: last.span.end };
                let quoted = format!("\"{}\"", address.of(text));
                return fault.with_hint("the address stands in quotes").with_replacement(address, quoted);
            }
        }
    } else if let Some(open) = tokens.iter().rfind(|token| token.kind == TokenKind::Unterminated) {
        let TextRange { line, column, .. } = TextRange::of(text, open.span);
        return fault.with_hint(format!("the quote at line {line} column {column} is not closed"));
    }
    if let Some(name) = before.filter(|before| before.of(text).eq_ignore_ascii_case("upstream"))
        && expected == [Rule::left_paren]
    {
        return fault.with_guess(name.span, "$upstream");
    }
    let place = token(at).map_or(text.len() as u32, |token| token.span.start);
    if let Some(comment) = source_comment(tokens, text).filter(|comment| comment.start < place) {
        let TextRange { line, column, .. } = TextRange::of(text, comment);
        return fault.with_hint(format!("the /* at line {line} column {column} begins a comment"));
    }
    match words(expected) {
        words if words.is_empty() => fault,
        words => fault.with_hint(format!("expected {words}")),
    }
}

/// The first comment that begins in the source part of a route.
pub(crate) fn source_comment(tokens: &[Token], text: &str) -> Option<Span> {
    let from = tokens.iter().position(|token| token.kind == TokenKind::From)?;
    let start = tokens.get(from)?.span.end;
    let ends = |token: &&Token| matches!(token.kind, TokenKind::Where | TokenKind::Into);
    let end = tokens.get(from..)?.iter().find(ends).map_or(text.len() as u32, |token| token.span.start);
    comments(text).into_iter().find(|comment| comment.start >= start && comment.start < end)
}

/// A word of the language that a misspelt name may stand for.
fn keyword(rule: Rule) -> Option<&'static str> {
    match rule {
        Rule::select => Some("SELECT"),
        Rule::from => Some("FROM"),
        Rule::where_word => Some("WHERE"),
        Rule::into => Some("INTO"),
        Rule::and => Some("AND"),
        Rule::or => Some("OR"),
        _ => None,
    }
}

/// What could have stood in the place of a failure.
fn words(rules: &[Rule]) -> String {
    let mut words: Vec<&str> = rules.iter().map(|rule| word(*rule)).filter(|word| !word.is_empty()).collect();
    words.sort_unstable();
    words.dedup();
    words.join(" or ")
}

fn word(rule: Rule) -> &'static str {
    match rule {
        Rule::EOI => "the end",
        Rule::select => "SELECT",
        Rule::from => "FROM",
        Rule::where_word => "WHERE",
        Rule::into => "INTO",
        Rule::source | Rule::slash => "/",
        Rule::sink => "a sink",
        Rule::star => "*",
        Rule::left_paren => "(",
        Rule::right_paren => ")",
        Rule::left_brace => "{",
        Rule::right_brace => "}",
        Rule::comma => ",",
        Rule::text => "a text in quotes",
        Rule::name => "a name",
        Rule::system_name => "a name that begins with $",
        Rule::condition | Rule::expression | Rule::group | Rule::call | Rule::braced | Rule::symbol => {
            "an expression"
        }
        Rule::integer | Rule::real | Rule::hex => "a number",
        Rule::true_word | Rule::false_word | Rule::null_word | Rule::undefined_word => "a literal",
        Rule::plus | Rule::minus | Rule::percent | Rule::concat | Rule::coalesce | Rule::and | Rule::or => {
            "an operator"
        }
        Rule::equal | Rule::not_equal | Rule::less | Rule::less_or_equal => "an operator",
        Rule::greater | Rule::greater_or_equal => "an operator",
        Rule::negate | Rule::not => "a prefix operator",
        Rule::route | Rule::alone | Rule::unclosed | Rule::unclosed_paren | Rule::extra_paren => "",
        Rule::unterminated | Rule::unknown | Rule::prefixed | Rule::primary | Rule::literal | Rule::infix => {
            ""
        }
    }
}
