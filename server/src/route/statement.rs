//! Owns the plain text form of routes: one statement after the other, `NAME: FROM …` or `FROM …`.
//!
//! A statement begins at the left edge, or with `SELECT` or `FROM`; it goes on over lines that are indented or begin
//! with `WHERE`, `AND`, `OR`, `NOT` or `INTO`. Lines that begin with `#` or `//` are comments. A semicolon may end it.

/// A route as it stands in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Statement {
    /// Its name; none if it has none.
    pub(super) name: Option<String>,
    pub(super) text: String,
    /// Where the text of the route begins, both from 1, in UTF-16 code units.
    pub(super) line: u32,
    pub(super) column: u32,
}

/// Characters of a name; what is longer is no name.
const NAME_CHARS_MAX: usize = 256;

struct Open {
    name: Option<String>,
    start: usize,
    end: usize,
    line: u32,
    column: u32,
}

/// The statements of a text.
pub(super) fn statements(text: &str) -> Vec<Statement> {
    let mut found = Vec::new();
    let mut open: Option<Open> = None;
    let mut at = 0;
    for (number, line) in text.split('\n').enumerate() {
        let start = at;
        at += line.len() + 1;
        let content = line.trim_start();
        let indent = line.len() - content.len();
        if content.is_empty() {
            continue;
        }
        if content.starts_with('#') || content.starts_with("//") {
            found.extend(open.take().map(|open| close(open, text)));
            continue;
        }
        let end = start + line.trim_end().len();
        match &mut open {
            Some(open) if continues(open, text, content, indent > 0) => {
                if text.get(open.start..open.end).is_none_or(|own| own.trim().is_empty()) {
                    (open.start, open.line, open.column) =
                        (start + indent, number as u32 + 1, column(line, indent));
                }
                open.end = end;
            }
            _ => {
                found.extend(open.take().map(|open| close(open, text)));
                let (name, skipped) = name(content);
                let place = indent + skipped;
                open = Some(Open {
                    name,
                    start: start + place,
                    end: end.max(start + place),
                    line: number as u32 + 1,
                    column: column(line, place),
                });
            }
        }
    }
    found.extend(open.map(|open| close(open, text)));
    found
}

fn column(line: &str, place: usize) -> u32 {
    1 + line.get(..place).unwrap_or(line).encode_utf16().count() as u32
}

fn close(open: Open, text: &str) -> Statement {
    let own = text.get(open.start..open.end).unwrap_or_default();
    let own = own.trim_end().trim_end_matches(';').trim_end();
    Statement { name: open.name, text: own.to_owned(), line: open.line, column: open.column }
}

fn continues(open: &Open, text: &str, content: &str, indented: bool) -> bool {
    let own = text.get(open.start..open.end).unwrap_or_default();
    if own.trim().is_empty() {
        return true;
    }
    if own.trim_end().ends_with(';') || is_word(name_and_rest(content).1, &["FROM", "SELECT"]) {
        return false;
    }
    indented || is_word(content, &["WHERE", "AND", "OR", "NOT", "INTO"])
}

fn is_word(text: &str, words: &[&str]) -> bool {
    let word = text
        .split(|unit: char| unit.is_whitespace() || unit == '(' || unit == '/')
        .next()
        .unwrap_or_default();
    words.iter().any(|known| known.eq_ignore_ascii_case(word))
}

fn name_and_rest(content: &str) -> (Option<&str>, &str) {
    let Some((name, rest)) = content.split_once(':') else { return (None, content) };
    let name = name.trim_end();
    let fits = !name.is_empty()
        && name.chars().count() <= NAME_CHARS_MAX
        && !name.contains(|unit: char| unit.is_whitespace() || matches!(unit, '/' | '\'' | '"' | '(' | '='));
    if fits { (Some(name), rest.trim_start()) } else { (None, content) }
}

/// The name of a statement, and the bytes before its route.
fn name(content: &str) -> (Option<String>, usize) {
    let (name, rest) = name_and_rest(content);
    (name.map(str::to_owned), content.len() - rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<(Option<String>, String, u32, u32)> {
        let found = statements(text).into_iter();
        found.map(|statement| (statement.name, statement.text, statement.line, statement.column)).collect()
    }

    fn one(name: &str, text: &str, line: u32, column: u32) -> (Option<String>, String, u32, u32) {
        (Some(name.to_owned()).filter(|name| !name.is_empty()), text.to_owned(), line, column)
    }

    #[test]
    fn statements_are_told_apart() {
        assert_eq!(read(""), []);
        assert_eq!(
            read("# all\nup: FROM /* INTO $upstream\n\nFROM /* INTO $upstream;\r\n"),
            [one("up", "FROM /* INTO $upstream", 2, 5), one("", "FROM /* INTO $upstream", 4, 1)]
        );
        assert_eq!(
            read("hot:\n  FROM /*\n  WHERE a = 'x:y'\n  INTO $upstream\n// end\n"),
            [one("hot", "FROM /*\n  WHERE a = 'x:y'\n  INTO $upstream", 2, 3)]
        );
        assert_eq!(
            read("select * from /*\nwhere a = 'x'\ninto $upstream\nFORM /* INTO $upstream\né : FROM /a"),
            [
                one("", "select * from /*\nwhere a = 'x'\ninto $upstream", 1, 1),
                one("", "FORM /* INTO $upstream", 4, 1),
                one("é", "FROM /a", 5, 5)
            ]
        );
        assert_eq!(
            read("  FROM /a\n  FROM /b\nx:"),
            [one("", "FROM /a", 1, 3), one("", "FROM /b", 2, 3), one("x", "", 3, 3)]
        );
        assert_eq!(read("FROM /* WHERE a = 'b:c' INTO $upstream").len(), 1);
    }
}
