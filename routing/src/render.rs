//! Owns the picture of a finding: the line of the route, what is wrong underlined, what to write instead below.

use std::fmt::Write as _;

use crate::diagnostic::{Diagnostic, Suggestion, TextRange};
use crate::lint::Lint;

/// Columns of a route that are shown; longer lines are cut around the place.
const LINE_COLUMNS_MAX: usize = 120;

/// Columns that are shown before the place in a line that is cut.
const LEAD_COLUMNS: usize = 40;

/// Characters of a text that is quoted in a help line.
const QUOTED_CHARS_MAX: usize = 80;

/// Where the text of a route stands.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Name of it, for example `manifest.json:route up`.
    pub name: &'a str,
    /// Line of the route's first character; 1 to count in the route itself.
    pub first_line: u32,
    /// Column of the route's first character; 1 to count in the route itself.
    pub first_column: u32,
}

impl<'a> Origin<'a> {
    /// Lines and columns count in the route itself.
    pub fn of_route(name: &'a str) -> Origin<'a> {
        Origin { name, first_line: 1, first_column: 1 }
    }

    /// Line and column of a place that is known by line and column in the route.
    pub fn place(&self, range: TextRange) -> (u32, u32) {
        let column = if range.line == 1 { self.first_column - 1 } else { 0 };
        (self.first_line - 1 + range.line, column + range.column)
    }
}

impl Diagnostic {
    /// The error as a compiler shows it, with the line of `text`, which is the text that was compiled.
    ///
    /// ```
    /// use edgehub_routing::{Condition, Origin};
    ///
    /// let text = "lenght(zone) = 4";
    /// let errors = Condition::compile(text).unwrap_err();
    /// assert_eq!(errors[0].render(&Origin::of_route("test"), text), "\
    /// error[unknown-function]: there is no function \"lenght\"
    ///  --> test:1:1
    ///   |
    /// 1 | lenght(zone) = 4
    ///   | ^^^^^^
    /// help: did you mean length?
    /// ");
    /// ```
    pub fn render(&self, origin: &Origin<'_>, text: &str) -> String {
        let title = format!("error[{}]: {}", self.category.name(), self.message);
        picture(&title, origin, text, self.in_route, self.hint.as_deref(), self.suggestion.as_deref())
    }
}

impl Lint {
    /// The lint as a compiler shows it, with the line of `text`, which is the text of its route. `severity` is a word such
    /// as `warning`.
    pub fn render(&self, severity: &str, origin: &Origin<'_>, text: &str) -> String {
        let title = format!("{severity}[{}]: {}", self.code.name(), self.message);
        picture(&title, origin, text, self.in_route, self.hint.as_deref(), self.suggestion.as_ref())
    }
}

fn picture(
    title: &str,
    origin: &Origin<'_>,
    text: &str,
    range: Option<TextRange>,
    hint: Option<&str>,
    suggestion: Option<&Suggestion>,
) -> String {
    let mut picture = format!("{}\n", one_line(title));
    match range {
        None => {
            let _ = writeln!(picture, " --> {}", origin.name);
        }
        Some(range) => {
            let (line, column) = origin.place(range);
            let gutter = line.to_string().len();
            let own = text.split('\n').nth(range.line as usize - 1).unwrap_or_default();
            let (shown, before, width) = excerpt(own.strip_suffix('\r').unwrap_or(own), range);
            let _ = writeln!(picture, "{:gutter$}--> {}:{line}:{column}", "", origin.name);
            let _ = writeln!(picture, "{:gutter$} |", "");
            let _ = writeln!(picture, "{line} | {shown}");
            let _ = writeln!(picture, "{:gutter$} | {:before$}{}", "", "", "^".repeat(width));
        }
    }
    if let Some(hint) = hint {
        let _ = writeln!(picture, "help: {}", one_line(hint));
    }
    if let Some(suggestion) = suggestion {
        let own = quoted(text.get(suggestion.bytes.clone()).unwrap_or_default());
        let new = quoted(&suggestion.replacement);
        let told = hint.is_some_and(|hint| hint.contains(suggestion.replacement.trim()));
        let _ = match (own.is_empty(), new.is_empty()) {
            (_, false) if told && suggestion.replacement.trim() != "" => Ok(()),
            (true, _) => writeln!(picture, "help: insert `{new}`"),
            (_, true) => writeln!(picture, "help: remove `{own}`"),
            (false, false) => writeln!(picture, "help: write `{new}` instead of `{own}`"),
        };
    }
    picture
}

/// A text without line ends and other control characters, which would spoil the picture.
fn one_line(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

fn quoted(text: &str) -> String {
    let mut quoted: String = one_line(text).trim().chars().take(QUOTED_CHARS_MAX).collect();
    if quoted.len() < text.trim().len() {
        quoted.push('…');
    }
    quoted
}

/// The part of a line that is shown, the columns before the place in it, and the columns of the place.
fn excerpt(line: &str, range: TextRange) -> (String, usize, usize) {
    let (first, end) = (range.column as usize - 1, range.end_column as usize - 1);
    let mut units = 0;
    let mut columns = 0;
    let (mut start, mut stop) = (None, None);
    let mut cells = Vec::new();
    for character in line.chars() {
        if units >= first {
            start.get_or_insert(columns);
        }
        if units >= end {
            stop.get_or_insert(columns);
        }
        let (shown, width) = cell(character);
        cells.push((shown, columns, width));
        units += character.len_utf16();
        columns += width;
    }
    let start = start.unwrap_or(columns);
    let stop = stop.unwrap_or(columns).max(start + 1);
    let from = if columns <= LINE_COLUMNS_MAX { 0 } else { start.saturating_sub(LEAD_COLUMNS) };
    let until = from + LINE_COLUMNS_MAX;
    let mut shown = String::new();
    if from > 0 {
        shown.push('…');
    }
    let cut = usize::from(from > 0);
    // A wide character may begin before the cut.
    let first_shown = cells.iter().map(|(_, at, _)| *at).find(|at| *at >= from).unwrap_or(from);
    for (character, at, width) in &cells {
        if *at >= from && at + width <= until {
            shown.push(*character);
        }
    }
    if columns > until {
        shown.push('…');
    }
    (shown, cut + start.saturating_sub(first_shown), stop.min(until.max(start + 1)) - start)
}

/// How a character is shown, and in how many columns of a terminal.
fn cell(character: char) -> (char, usize) {
    match character {
        '\t' => (' ', 1),
        _ if character.is_control() => ('·', 1),
        // Combining marks, joiners and directions take no column; directions would also turn the line around.
        '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\u{FEFF}' => ('·', 1),
        '\u{0300}'..='\u{036F}' | '\u{1AB0}'..='\u{1AFF}' | '\u{20D0}'..='\u{20FF}' => (character, 0),
        '\u{FE00}'..='\u{FE0F}' | '\u{FE20}'..='\u{FE2F}' => (character, 0),
        // East Asian wide and full-width characters, pictures.
        '\u{1100}'..='\u{115F}'
        | '\u{2E80}'..='\u{303E}'
        | '\u{3041}'..='\u{33FF}'
        | '\u{3400}'..='\u{4DBF}'
        | '\u{4E00}'..='\u{9FFF}'
        | '\u{A000}'..='\u{A4CF}'
        | '\u{AC00}'..='\u{D7A3}'
        | '\u{F900}'..='\u{FAFF}'
        | '\u{FE30}'..='\u{FE6F}'
        | '\u{FF00}'..='\u{FF60}'
        | '\u{FFE0}'..='\u{FFE6}'
        | '\u{1F300}'..='\u{1F64F}'
        | '\u{1F680}'..='\u{1F6FF}'
        | '\u{1F900}'..='\u{1F9FF}'
        | '\u{20000}'..='\u{3FFFD}' => (character, 2),
        _ => (character, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Condition;

    fn rendered(text: &str) -> String {
        let errors = Condition::compile(text).expect_err("does not compile");
        errors[0].render(&Origin::of_route("t"), text)
    }

    fn marked(text: &str) -> String {
        let picture = rendered(text);
        let lines: Vec<&str> = picture.lines().collect();
        let bars = lines[4].split_once(" | ").expect("a gutter").1;
        let own = lines[3].split_once(" | ").expect("a gutter").1;
        format!("{own}\n{bars}")
    }

    #[test]
    fn the_place_is_underlined_whatever_stands_before_it() {
        assert_eq!(marked("zone = 5"), "zone = 5\n     ^");
        assert_eq!(marked("\t\tzone = 5"), "  zone = 5\n       ^");
        assert_eq!(marked("'日本' = 5"), "'日本' = 5\n       ^");
        assert_eq!(marked("'😀e\u{301}' = 5"), "'😀e\u{301}' = 5\n      ^");
        assert_eq!(marked("a = 'x' and\r\nlen(b) = 1"), "len(b) = 1\n^^^");
        assert_eq!(marked("a ="), "a =\n   ^");
        assert_eq!(marked("'\u{202E}' = 5"), "'·' = 5\n    ^");
    }

    #[test]
    fn long_lines_are_cut_around_the_place() {
        let text = format!("{}lenght(b) = 1{}", "a = 'x' and ".repeat(40), " and a = 'x'".repeat(40));
        let picture = marked(&text);
        let (shown, bars) = picture.split_once('\n').expect("two lines");
        assert!(shown.starts_with('…') && shown.ends_with('…'), "{picture}");
        assert!(shown.chars().count() <= LINE_COLUMNS_MAX + 2, "{picture}");
        let at = bars.find('^').expect("marked");
        let place: String = shown.chars().skip(at).take(6).collect();
        assert_eq!(place, "lenght", "{picture}");
    }

    #[test]
    fn lines_count_from_where_the_route_stands() {
        let text = "a = 'x' and\n  lenght(b) = 1";
        let errors = Condition::compile(text).expect_err("does not compile");
        let picture = errors[0].render(&Origin { name: "f", first_line: 99, first_column: 7 }, text);
        assert!(picture.contains("   --> f:100:3\n    |\n100 |   lenght(b)"), "{picture}");
    }
}
