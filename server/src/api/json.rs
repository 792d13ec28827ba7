//! Owns the look into a JSON object of a request: its members as the text that stands there, no value built.

use edgehub_broker::twin::json::is_deeper_than;
use serde::de::IgnoredAny;

/// Deepest nesting of a document.
pub(super) const NESTING_MAX: usize = 100;

/// Whether a text is one JSON value of bounded nesting (RFC 8259).
pub(super) fn is_json(text: &[u8]) -> bool {
    // The parser does not look at the encoding of what it skips, and goes down by itself.
    !is_deeper_than(text, NESTING_MAX)
        && std::str::from_utf8(text).is_ok()
        && serde_json::from_slice::<IgnoredAny>(text).is_ok()
}

/// The members of an object in their order, names decoded, values as they stand there. `None` for what is no JSON
/// object.
pub(super) fn members(text: &[u8]) -> Option<Vec<(String, &[u8])>> {
    if !is_json(text) {
        return None;
    }
    // From here on the text is known to be sound: only its borders are looked for.
    let mut at = skip_blanks(text, 0);
    if text.get(at) != Some(&b'{') {
        return None;
    }
    at = skip_blanks(text, at + 1);
    let mut members = Vec::new();
    while text.get(at).is_some_and(|byte| *byte != b'}') {
        let name_end = value_end(text, at);
        let name = serde_json::from_slice(text.get(at..name_end)?).ok()?;
        // Behind the name stands a colon, behind the value a comma or the end.
        let value_at = skip_blanks(text, skip_blanks(text, name_end) + 1);
        let value_ends = value_end(text, value_at);
        members.push((name, text.get(value_at..value_ends)?));
        at = skip_blanks(text, value_ends);
        if text.get(at) == Some(&b',') {
            at = skip_blanks(text, at + 1);
        }
    }
    Some(members)
}

fn skip_blanks(text: &[u8], from: usize) -> usize {
    let rest = text.get(from..).unwrap_or_default();
    from + rest.iter().take_while(|byte| b" \t\r\n".contains(byte)).count()
}

/// The end of the value that begins at a place.
fn value_end(text: &[u8], from: usize) -> usize {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for (offset, byte) in text.iter().enumerate().skip(from) {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    in_string = false;
                    if depth == 0 {
                        return offset + 1;
                    }
                }
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 0 => {
                depth -= 1;
                if depth == 0 {
                    return offset + 1;
                }
            }
            b',' | b'}' | b']' | b':' | b' ' | b'\t' | b'\r' | b'\n' if depth == 0 => return offset,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn found(text: &str) -> Option<Vec<(String, String)>> {
        let shown = |(name, value): (String, &[u8])| (name, String::from_utf8_lossy(value).into_owned());
        Some(members(text.as_bytes())?.into_iter().map(shown).collect())
    }

    #[test]
    fn members_keep_their_text() {
        let text = " { \"a\\u0062\" : {\"x\":[1, \"}\\\"\"]} ,\"n\":-1.50e3\t, \"s\" : \"\\\\\" , \"t\":true,\"a\":null } ";
        let expected = [
            ("ab", "{\"x\":[1, \"}\\\"\"]}"),
            ("n", "-1.50e3"),
            ("s", "\"\\\\\""),
            ("t", "true"),
            ("a", "null"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(found(text).unwrap(), expected);
        assert_eq!(found("{}"), Some(Vec::new()));
        for no_object in ["", "[]", "1", "{", "{\"a\"}", "{\"a\":1,}", "{not json", "{\"a\":1} x"] {
            assert_eq!(found(no_object), None, "{no_object}");
        }
    }

    #[test]
    fn nesting_and_encoding_are_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(is_json(nested(NESTING_MAX).as_bytes()));
        assert!(!is_json(nested(NESTING_MAX + 1).as_bytes()));
        assert!(!is_json(nested(1_000_000).as_bytes()));
        assert!(is_json(format!("\"{}\"", "[".repeat(10_000)).as_bytes()));
        assert!(!is_json(b"\"\xff\""));
    }

    proptest! {
        #[test]
        fn what_is_cut_out_is_what_the_parser_reads(names in proptest::collection::vec("\\PC{0,6}", 0..6), seed in any::<u64>()) {
            let mut value = serde_json::Map::new();
            for (number, name) in names.iter().enumerate() {
                let inner = serde_json::json!([seed, name, {"k": [name, null, true, -1.5], "e": {}}]);
                let member = if number % 2 == 0 { inner } else { serde_json::json!(name) };
                value.insert(name.clone(), member);
            }
            for text in [serde_json::to_string(&value).unwrap(), serde_json::to_string_pretty(&value).unwrap()] {
                let mut read = serde_json::Map::new();
                for (name, text) in members(text.as_bytes()).unwrap() {
                    read.insert(name, serde_json::from_slice(text).unwrap());
                }
                prop_assert_eq!(&read, &value);
            }
        }

        #[test]
        fn anything_is_answered(text in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _any_answer = members(&text);
        }
    }
}
