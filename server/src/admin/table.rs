//! Owns how numbers, spans and rows are printed for people.

use std::fmt::Write as _;

/// On which side of its column a text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Names.
    Left,
    /// Numbers.
    Right,
}

/// Rows of text in aligned columns.
#[derive(Clone, Debug)]
pub struct Table {
    sides: Vec<Side>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new<T: Into<String>>(columns: impl IntoIterator<Item = (T, Side)>) -> Self {
        let (header, sides) = columns.into_iter().map(|(name, side)| (name.into(), side)).unzip();
        Self { sides, rows: vec![header] }
    }

    /// Adds a row; it has a text for every column.
    pub fn row(&mut self, texts: impl IntoIterator<Item = String>) {
        self.rows.push(texts.into_iter().map(|text| printable(&text)).collect());
    }

    /// The lines, header first, without blanks at their ends.
    pub fn lines(&self) -> Vec<String> {
        let width = |column: usize| {
            let texts = self.rows.iter().filter_map(|row| row.get(column));
            texts.map(|text| text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.sides.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let mut line = String::new();
            for ((text, side), width) in row.iter().zip(&self.sides).zip(&widths) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                let pad = " ".repeat(width.saturating_sub(text.chars().count()));
                match side {
                    Side::Left => line.extend([text.as_str(), &pad]),
                    Side::Right => line.extend([&pad, text.as_str()]),
                }
            }
            line.truncate(line.trim_end().len());
            line
        };
        self.rows.iter().map(line).collect()
    }
}

/// The text with control characters, and those that turn the direction of writing, escaped: what devices send
/// must not steer a terminal.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        let turns =
            matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if character.is_control() || turns {
            // Writing into a string does not fail.
            let _ = write!(out, "{}", character.escape_default());
        } else {
            out.push(character);
        }
    }
    out
}

/// The first characters of a text, with a mark when there are more.
pub fn shortened(text: &str, characters_max: usize) -> String {
    match text.char_indices().nth(characters_max) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// A number of bytes, readable: `312 B`, `12.3 KiB`.
pub fn bytes(count: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut size = count as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    format!("{size:.1} {}", units[unit])
}

/// A span, readable, in its two largest units: `0.4 s`, `3 min 12 s`, `2 d 5 h`.
pub fn span(millis: u64) -> String {
    let secs = millis / 1_000;
    let (minutes, hours, days) = (secs / 60, secs / 3_600, secs / 86_400);
    match () {
        () if secs < 10 => format!("{}.{} s", secs, millis % 1_000 / 100),
        () if minutes == 0 => format!("{secs} s"),
        () if hours == 0 => format!("{minutes} min {} s", secs % 60),
        () if days == 0 => format!("{hours} h {} min", minutes % 60),
        () => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new([("QUEUE", Side::Left), ("QUEUED", Side::Right), ("STATE", Side::Left)]);
        table.row(["ü".into(), "7".into(), "attached".into()]);
        table.row(["iothub_Pri0".into(), "12345678".into(), String::new()]);
        assert_eq!(
            table.lines(),
            ["QUEUE          QUEUED  STATE", "ü                   7  attached", "iothub_Pri0  12345678"]
        );
    }

    #[test]
    fn numbers_are_readable() {
        for (count, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (u64::MAX, "16.0 EiB")]
        {
            assert_eq!(bytes(count), text);
        }
        for (millis, text) in [
            (0, "0.0 s"),
            (450, "0.4 s"),
            (5_250, "5.2 s"),
            (59_999, "59 s"),
            (192_000, "3 min 12 s"),
            (7_260_000, "2 h 1 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(span(millis), text);
        }
        assert_eq!((shortened("äöü", 3), shortened("äöü", 2)), ("äöü".to_owned(), "äö…".to_owned()));
    }

    #[test]
    fn what_devices_send_does_not_steer_a_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n\u{9b}\u{202e}é"), "a\\u{1b}[2Jb\\n\\u{9b}\\u{202e}é");
    }
}
