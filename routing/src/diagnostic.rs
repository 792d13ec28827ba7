//! Owns what is said about a text that cannot be compiled: category, stage, position, words.

use std::fmt;
use std::ops::Range;

/// Where in a text something stands: `[start, end)`, lines and columns 1-based, columns in UTF-16 code units.
///
/// A range stays on its first line. A line ends at LF; the CR before it belongs to no line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextRange {
    /// First line.
    pub line: u32,
    /// First column.
    pub column: u32,
    /// The same line again.
    pub end_line: u32,
    /// The column after the last one.
    pub end_column: u32,
}

impl TextRange {
    /// The range of the bytes `[start, end)` of `text`; an empty one is given a length of one column.
    pub(crate) fn of(text: &str, span: Span) -> TextRange {
        let start = (span.start as usize).min(text.len());
        let before = text.get(..start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let rest = text.get(line_start..).unwrap_or_default();
        let line = rest.split('\n').next().unwrap_or_default();
        let line = line.strip_suffix('\r').filter(|_| rest.len() > line.len()).unwrap_or(line);
        let column = 1 + width_units(text.get(line_start..start).unwrap_or_default());
        let width = width_units(text.get(start..span.end as usize).unwrap_or_default()).max(1);
        let line_number = 1 + memchr::memchr_iter(b'\n', before.as_bytes()).count() as u32;
        TextRange {
            line: line_number,
            column,
            end_line: line_number,
            end_column: (column + width).min(width_units(line) + 2),
        }
    }

    /// The range of the bytes `[start, end)` of `text`, which may end on a later line and may be empty.
    pub(crate) fn across(text: &str, span: Span) -> TextRange {
        let place = |at: u32| {
            let before = text.get(..at as usize).unwrap_or(text);
            let line_start = before.rfind('\n').map_or(0, |at| at + 1);
            let line = 1 + memchr::memchr_iter(b'\n', before.as_bytes()).count() as u32;
            (line, 1 + width_units(before.get(line_start..).unwrap_or_default()))
        };
        let ((line, column), (end_line, end_column)) = (place(span.start), place(span.end));
        TextRange { line, column, end_line, end_column }
    }
}

fn width_units(text: &str) -> u32 {
    text.chars().map(|character| character.len_utf16() as u32).sum()
}

/// Bytes `[start, end)` of a route text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u32,
    pub(crate) end: u32,
}

impl Span {
    /// These bytes of `text`.
    pub(crate) fn of(self, text: &str) -> &str {
        text.get(self.start as usize..self.end as usize).unwrap_or_default()
    }
}

/// A change of the text that corrects it, for an editor to apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suggestion {
    /// What to write.
    pub replacement: String,
    /// In place of these bytes of the text; an empty range inserts.
    pub bytes: Range<usize>,
    /// The same place; unlike the place of an error it may end on a later line.
    pub range: TextRange,
}

impl Suggestion {
    pub(crate) fn new(text: &str, span: Span, replacement: impl Into<String>) -> Suggestion {
        Suggestion {
            replacement: replacement.into(),
            bytes: span.start as usize..span.end as usize,
            range: TextRange::across(text, span),
        }
    }

    /// `text`, which must be the text that the suggestion is about, with the change; none if it is another text.
    ///
    /// ```
    /// let error = edgehub_routing::Condition::compile("lenght(zone) = 4").unwrap_err().remove(0);
    /// let suggestion = error.suggestion.expect("one letter is out of place");
    /// assert_eq!(suggestion.apply("lenght(zone) = 4").as_deref(), Some("length(zone) = 4"));
    /// ```
    pub fn apply(&self, text: &str) -> Option<String> {
        let (before, after) = (text.get(..self.bytes.start)?, text.get(self.bytes.end..)?);
        Some([before, &self.replacement, after].concat())
    }
}

/// Which step refused the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The text is not a route.
    Parse,
    /// The route names no sink that exists.
    Sink,
    /// The condition does not compile.
    Compile,
}

/// What kind of error it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Category {
    /// A token that cannot continue.
    Syntax,
    /// No token at all.
    EmptyRoute,
    /// Not a sink.
    Sink,
    /// A string without its closing quote.
    UnterminatedString,
    /// A character that is part of nothing.
    InvalidSymbol,
    /// An open parenthesis without its close.
    MissingParen,
    /// A closing parenthesis too many.
    UnmatchedParen,
    /// An operator that does not take operands of these types.
    Operand,
    /// A function that does not take these arguments.
    Argument,
    /// No such function.
    UnknownFunction,
    /// A body path that is malformed.
    BodyPath,
    /// A combination that the language has no meaning for.
    Unsupported,
    /// A text or table over one of the limits of this implementation.
    Limit,
}

impl Category {
    /// The name under which the category is reported.
    pub fn name(self) -> &'static str {
        match self {
            Category::Syntax => "syntax",
            Category::EmptyRoute => "empty-route",
            Category::Sink => "sink",
            Category::UnterminatedString => "unterminated-string",
            Category::InvalidSymbol => "invalid-symbol",
            Category::MissingParen => "missing-paren",
            Category::UnmatchedParen => "unmatched-paren",
            Category::Operand => "operand",
            Category::Argument => "argument",
            Category::UnknownFunction => "unknown-function",
            Category::BodyPath => "body-path",
            Category::Unsupported => "unsupported",
            Category::Limit => "limit",
        }
    }
}

impl Stage {
    /// The name under which the stage is reported.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Parse => "parse",
            Stage::Sink => "sink",
            Stage::Compile => "compile",
        }
    }
}

/// One error in a route or in a condition.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnostic {
    /// What kind of error it is.
    pub category: Category,
    /// Which step found it.
    pub stage: Stage,
    /// What is wrong, in words.
    pub message: String,
    /// Where, counted from the first character of the condition; only for errors of stage [`Stage::Compile`].
    pub in_condition: Option<TextRange>,
    /// Where, counted from the first character of the whole text.
    pub in_route: Option<TextRange>,
    /// What to write instead, in words, if that can be said.
    pub hint: Option<String>,
    /// The same as a change of the text, if one is likely to be meant.
    pub suggestion: Option<Box<Suggestion>>,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.category.name())?;
        if let Some(range) = self.in_route {
            write!(formatter, " at line {} column {}", range.line, range.column)?;
        }
        write!(formatter, ": {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(formatter, " ({hint})")?;
        }
        Ok(())
    }
}

/// An error before it is known where the condition begins.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) category: Category,
    pub(crate) stage: Stage,
    pub(crate) span: Option<Span>,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    /// What to write in place of which part of the text.
    pub(crate) replacement: Option<(Span, String)>,
}

impl Fault {
    pub(crate) fn new(category: Category, stage: Stage, span: Span, message: impl Into<String>) -> Fault {
        Fault { category, stage, span: Some(span), message: message.into(), hint: None, replacement: None }
    }

    pub(crate) fn without_place(category: Category, stage: Stage, message: impl Into<String>) -> Fault {
        Fault { category, stage, span: None, message: message.into(), hint: None, replacement: None }
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Fault {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn with_replacement(mut self, span: Span, replacement: impl Into<String>) -> Fault {
        self.replacement = Some((span, replacement.into()));
        self
    }

    /// Adds the most likely meaning of a misspelt word.
    pub(crate) fn with_guess(self, span: Span, guess: &str) -> Fault {
        self.with_hint(format!("did you mean {guess}?")).with_replacement(span, guess)
    }

    /// Finds lines and columns; `condition` is the part of `text` that compile errors count from.
    pub(crate) fn locate(self, text: &str, condition: Span) -> Diagnostic {
        let in_condition = match (self.stage, self.span) {
            (Stage::Compile, Some(span)) => {
                let part = text.get(condition.start as usize..condition.end as usize).unwrap_or_default();
                let start = span.start.saturating_sub(condition.start);
                let end = span.end.saturating_sub(condition.start);
                Some(TextRange::of(part, Span { start, end }))
            }
            _ => None,
        };
        Diagnostic {
            category: self.category,
            stage: self.stage,
            message: self.message,
            in_condition,
            in_route: self.span.map(|span| TextRange::of(text, span)),
            hint: self.hint,
            suggestion: self
                .replacement
                .map(|(span, replacement)| Box::new(Suggestion::new(text, span, replacement))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_count_units_and_stay_on_their_line() {
        let at = |text, start, end| {
            let range = TextRange::of(text, Span { start, end });
            (range.line, range.column, range.end_line, range.end_column)
        };
        assert_eq!(at("a😀b", 5, 6), (1, 4, 1, 5));
        assert_eq!(at("ab\r\ncd", 1, 6), (1, 2, 1, 4));
        assert_eq!(at("ab\n", 3, 3), (2, 1, 2, 2));
        assert_eq!(at("ab", 2, 2), (1, 3, 1, 4));
    }
}
