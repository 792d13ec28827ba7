//! Owns the tolerant reading of JSON text: where members stand, and what keeps the text from being JSON.
//!
//! `serde_json` says where it stopped, which is often far from the fault. This scan goes on over comments,
//! `...` and commas too many, notes them, and compares the indentation of closing with opening lines to find
//! the object that was never closed.

use std::collections::HashMap;

/// Deepest nesting that is looked at; `serde_json` stops at the same depth.
const DEPTH_MAX: usize = 127;

/// A place in the text, both from 1; the column counts characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

/// What a scan found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Where each member's name stands, by its path (`a/b/c`).
    pub(super) members: HashMap<String, Position>,
    /// Commas directly before a closing bracket.
    pub(super) trailing_commas: Vec<Position>,
    /// Comments.
    pub(super) comments: Vec<Position>,
    /// `...` in place of a value or member.
    pub(super) ellipses: Vec<Position>,
    /// The first container that looks as if its closing bracket was forgotten.
    pub(super) unclosed: Option<Unclosed>,
    /// Containers still open at the end, the innermost last.
    pub(super) open_at_end: Vec<Unclosed>,
}

/// A container without its closing bracket.
#[derive(Clone, Debug)]
pub(super) struct Unclosed {
    /// Name of the member whose value it is, empty for the document itself.
    pub(super) member: String,
    /// Last line of its content: the bracket belongs behind it.
    pub(super) last_line: usize,
    /// The bracket that is missing.
    pub(super) bracket: char,
}

struct Container {
    member: String,
    path: String,
    bracket: char,
    opened_line: usize,
    indent: usize,
}

impl Container {
    fn unclosed(&self, last_line: usize) -> Unclosed {
        Unclosed { member: self.member.clone(), last_line, bracket: self.bracket }
    }
}

struct Scanner<'a> {
    text: &'a str,
    at: usize,
    line: usize,
    line_start: usize,
    /// A place in the present line and its column, so that no character is counted twice.
    counted: (usize, usize),
    found: Scan,
    open: Vec<Container>,
    /// A string just read that may be a member name.
    pending: Option<(String, Position)>,
    /// The member whose value comes next.
    member: Option<String>,
    /// A comma after which nothing has come yet.
    comma: Option<Position>,
    /// Line of the last thing that was neither space nor comment.
    content_line: usize,
}

/// Scans a text of any kind; a text that is JSON yields members only.
pub(super) fn scan(text: &str) -> Scan {
    let mut scanner = Scanner {
        text,
        at: 0,
        line: 1,
        line_start: 0,
        counted: (0, 1),
        found: Scan::default(),
        open: Vec::new(),
        pending: None,
        member: None,
        comma: None,
        content_line: 1,
    };
    while scanner.step() {}
    scanner.finish()
}

impl Scanner<'_> {
    /// Reads one token; false at the end of the text or when it is too deep.
    fn step(&mut self) -> bool {
        let rest = &self.text[self.at..];
        let Some(first) = rest.chars().next() else { return false };
        if first == '\n' {
            self.at += 1;
            self.line += 1;
            self.line_start = self.at;
            return true;
        }
        if first.is_whitespace() {
            self.at += first.len_utf8();
            return true;
        }
        let position = self.position();
        if rest.starts_with("//") || rest.starts_with("/*") {
            self.found.comments.push(position);
            let length = if rest.starts_with("//") {
                rest.find('\n').unwrap_or(rest.len())
            } else {
                rest.find("*/").map_or(rest.len(), |end| end + 2)
            };
            self.skip(length);
            return true;
        }
        let comma = self.comma.take();
        match first {
            '{' | '[' => {
                if self.open.len() >= DEPTH_MAX {
                    return false;
                }
                self.open_container(first);
            }
            '}' | ']' => {
                self.found.trailing_commas.extend(comma);
                self.close_container();
            }
            ',' => {
                self.comma = Some(position);
                self.pending = None;
                self.member = None;
                self.at += 1;
            }
            ':' => {
                if let Some((name, position)) = self.pending.take() {
                    self.found.members.entry(self.path_of(&name)).or_insert(position);
                    self.member = Some(name);
                }
                self.at += 1;
            }
            '"' => {
                let name = self.string();
                self.pending = self.member.is_none().then_some((name, position));
            }
            _ if rest.starts_with("...") => {
                self.found.ellipses.push(position);
                self.at += 3;
            }
            other => self.at += other.len_utf8(),
        }
        self.content_line = self.line;
        true
    }

    fn finish(mut self) -> Scan {
        let last_line = self.content_line;
        self.found.open_at_end = self.open.iter().map(|container| container.unclosed(last_line)).collect();
        self.found
    }

    fn position(&mut self) -> Position {
        let (from, column) =
            if self.counted.0 < self.line_start { (self.line_start, 1) } else { self.counted };
        let column = column + self.text[from..self.at].chars().count();
        self.counted = (self.at, column);
        Position { line: self.line, column }
    }

    /// Advances over text that may hold line ends.
    fn skip(&mut self, length: usize) {
        for (offset, _) in self.text[self.at..self.at + length].match_indices('\n') {
            self.line += 1;
            self.line_start = self.at + offset + 1;
        }
        self.at += length;
    }

    /// Reads a string and answers its text, escapes as written. A line end closes it: no JSON string has one.
    fn string(&mut self) -> String {
        let start = self.at + 1;
        let mut escaped = false;
        let closing = self.text[start..].char_indices().find(|(_, character)| {
            let ends = *character == '\n' || (*character == '"' && !escaped);
            escaped = *character == '\\' && !escaped;
            ends
        });
        let end = closing.map_or(self.text.len(), |(offset, _)| start + offset);
        self.at = if self.text[end..].starts_with('"') { end + 1 } else { end };
        self.text[start..end].to_owned()
    }

    fn path_of(&self, name: &str) -> String {
        match self.open.last().map(|container| container.path.as_str()) {
            None | Some("") => name.to_owned(),
            Some(path) => format!("{path}/{name}"),
        }
    }

    fn open_container(&mut self, bracket: char) {
        let member = self.member.take().unwrap_or_default();
        let path = if member.is_empty() {
            self.open.last().map(|container| container.path.clone()).unwrap_or_default()
        } else {
            self.path_of(&member)
        };
        let bracket = if bracket == '{' { '}' } else { ']' };
        self.open.push(Container { member, path, bracket, opened_line: self.line, indent: self.indent() });
        self.at += 1;
    }

    fn close_container(&mut self) {
        let first_in_line = self.text[self.line_start..self.at].trim().is_empty();
        if let Some(container) = self.open.pop()
            && first_in_line
            && container.opened_line < self.line
            && self.indent() < container.indent
            && self.open.iter().any(|outer| outer.indent == self.indent())
            && self.found.unclosed.is_none()
        {
            self.found.unclosed = Some(container.unclosed(self.content_line));
        }
        self.pending = None;
        self.member = None;
        self.at += 1;
    }

    /// Columns of white space at the beginning of the present line.
    fn indent(&self) -> usize {
        let line = &self.text[self.line_start..];
        line.chars().take_while(|character| matches!(character, ' ' | '\t')).count()
    }
}
