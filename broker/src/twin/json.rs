//! Owns what may be done to twin documents: reading them within limits, merging a patch, telling the difference.
//!
//! Nothing here is read by a library whose nesting and length have not been checked by [`parse`].

use serde_json::{Map, Value};

/// A JSON object: a section of a twin, or a patch of one.
pub type Object = Map<String, Value>;

/// Largest patch of reported properties, in bytes of its text.
pub const PATCH_BYTES_MAX: usize = 32 * 1_024;

/// Objects and arrays inside each other below the root of a patch.
pub const PATCH_DEPTH_MAX: usize = 10;

/// Largest name of a property, in bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 1_024;

/// Largest text of a property that is neither an object nor an array, in bytes of UTF-8.
pub const VALUE_BYTES_MAX: usize = 4_096;

/// Least integer of a property: −2^52.
pub const INTEGER_MIN: i64 = -(1 << 52);

/// Greatest integer of a property: 2^52 − 1.
pub const INTEGER_MAX: i64 = (1 << 52) - 1;

/// Largest twin that is read, in bytes of its text: two sections with all their metadata.
pub const TWIN_BYTES_MAX: usize = 1_024 * 1_024;

/// Objects and arrays inside each other below the root of a twin: a section, its metadata, and a property.
pub const TWIN_DEPTH_MAX: usize = 2 * PATCH_DEPTH_MAX;

/// Characters of a foreign text that an error shows.
const SHOWN_CHARS_MAX: usize = 64;

/// Why a document is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// It is too large to be read.
    #[error("the document has {bytes} bytes; the limit is {bytes_max}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// Its objects and arrays lie too deep inside each other.
    #[error("the document is nested deeper than {depth_max} levels")]
    TooDeep {
        /// The limit.
        depth_max: usize,
    },
    /// It is not JSON.
    #[error("the document is not JSON: {0}")]
    Malformed(String),
    /// It is JSON, but no object.
    #[error("the document is not a JSON object")]
    NotAnObject,
    /// A name is longer than [`NAME_BYTES_MAX`].
    #[error("the name that begins with {0:?} is longer than {NAME_BYTES_MAX} bytes")]
    LongName(String),
    /// A name holds a control character, white space, `.`, `$` or `#`.
    #[error("the name {0:?} holds a control character, white space, '.', '$' or '#'")]
    BadName(String),
    /// A value is longer than [`VALUE_BYTES_MAX`].
    #[error("the value of {0:?} is longer than {VALUE_BYTES_MAX} bytes")]
    LongValue(String),
    /// An integer is not within [`INTEGER_MIN`] and [`INTEGER_MAX`].
    #[error("the integer {0} is not within -2^52 and 2^52-1")]
    IntegerRange(String),
    /// Null stands in an array, or in an object that is in an array.
    #[error("{0:?} holds null in an array, where it cannot delete anything")]
    NullInArray(String),
}

/// What becomes of names to which a patch gives null.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Nulls {
    /// They leave the document: the patch is carried out.
    Delete,
    /// They stay as null: the patch becomes part of a larger patch.
    Keep,
}

/// Reads a JSON object of up to `bytes_max` bytes, with up to `depth_max` levels of objects and arrays below its root.
///
/// # Errors
/// When it is larger, deeper, no JSON, or no object.
pub fn parse(text: &[u8], bytes_max: usize, depth_max: usize) -> Result<Object, JsonError> {
    if text.len() > bytes_max {
        return Err(JsonError::TooLarge { bytes: text.len(), bytes_max });
    }
    if is_deeper_than(text, depth_max + 1) {
        return Err(JsonError::TooDeep { depth_max });
    }
    match serde_json::from_slice(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(JsonError::NotAnObject),
        Err(error) => Err(JsonError::Malformed(error.to_string())),
    }
}

/// Reads a patch of reported properties as a client sends it, and checks it by all limits of this module.
///
/// # Errors
/// When it breaks one of them.
pub fn parse_patch(text: &[u8]) -> Result<Object, JsonError> {
    let patch = parse(text, PATCH_BYTES_MAX, PATCH_DEPTH_MAX)?;
    if let Some(integer) = long_integer(text) {
        return Err(JsonError::IntegerRange(shown(integer)));
    }
    validate(&patch)?;
    Ok(patch)
}

/// Reads a whole twin, or one of its sections, as an upstream sends it.
///
/// # Errors
/// When it is larger than [`TWIN_BYTES_MAX`], deeper than [`TWIN_DEPTH_MAX`], or no JSON object.
pub fn parse_twin(text: &[u8]) -> Result<Object, JsonError> {
    parse(text, TWIN_BYTES_MAX, TWIN_DEPTH_MAX)
}

/// Checks names and values of a patch; [`parse`] has checked its size and depth.
///
/// # Errors
/// When a name or a value breaks a limit of this module.
pub fn validate(patch: &Object) -> Result<(), JsonError> {
    validate_object(patch, false)
}

/// Merges a patch into a document: objects member by member, every other value, arrays included, as a whole.
pub fn merge(base: &mut Object, patch: &Object, nulls: Nulls) {
    for (name, value) in patch {
        match value {
            Value::Null if nulls == Nulls::Delete => {
                base.remove(name);
            }
            Value::Object(changes) => match base.get_mut(name) {
                Some(Value::Object(members)) => merge(members, changes, nulls),
                _ => {
                    let mut members = Object::new();
                    merge(&mut members, changes, nulls);
                    base.insert(name.clone(), Value::Object(members));
                }
            },
            other => {
                base.insert(name.clone(), other.clone());
            }
        }
    }
}

/// The patch that makes `to` out of `from`: what is new or changed, and null for what is gone.
pub fn diff(from: &Object, to: &Object) -> Object {
    let mut patch = Object::new();
    for (name, value) in to {
        match (from.get(name), value) {
            (Some(before), after) if before == after => {}
            (Some(Value::Object(before)), Value::Object(after)) => {
                patch.insert(name.clone(), Value::Object(diff(before, after)));
            }
            (_, after) => {
                patch.insert(name.clone(), after.clone());
            }
        }
    }
    for name in from.keys().filter(|name| !to.contains_key(*name)) {
        patch.insert(name.clone(), Value::Null);
    }
    patch
}

/// Whether objects and arrays lie more than `depth_max` levels inside each other, the outermost counted. Text that is no
/// JSON gets some answer.
pub fn is_deeper_than(text: &[u8], depth_max: usize) -> bool {
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut escaped = false;
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > depth_max {
                    return true;
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

fn validate_object(object: &Object, in_array: bool) -> Result<(), JsonError> {
    for (name, value) in object {
        if name.len() > NAME_BYTES_MAX {
            return Err(JsonError::LongName(shown(name)));
        }
        let bad = |c: char| c.is_control() || c.is_whitespace() || matches!(c, '.' | '$' | '#');
        if name.contains(bad) {
            return Err(JsonError::BadName(shown(name)));
        }
        validate_value(name, value, in_array)?;
    }
    Ok(())
}

fn validate_value(name: &str, value: &Value, in_array: bool) -> Result<(), JsonError> {
    match value {
        Value::Null if in_array => Err(JsonError::NullInArray(shown(name))),
        Value::Null | Value::Bool(_) => Ok(()),
        Value::Number(number) if number.is_f64() => Ok(()),
        Value::Number(number) => match number.as_i64() {
            Some(INTEGER_MIN..=INTEGER_MAX) => Ok(()),
            Some(_) | None => Err(JsonError::IntegerRange(number.to_string())),
        },
        Value::String(text) if text.len() > VALUE_BYTES_MAX => Err(JsonError::LongValue(shown(name))),
        Value::String(_) => Ok(()),
        Value::Array(items) => items.iter().try_for_each(|item| validate_value(name, item, true)),
        Value::Object(object) => validate_object(object, in_array),
    }
}

/// An integer in JSON text that 64 bits may not hold, so that a library reads it as a float.
fn long_integer(text: &[u8]) -> Option<&str> {
    const DIGITS_MAX: usize = 16;
    let is_of_number = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E');
    let mut in_string = false;
    let mut escaped = false;
    let mut at = 0;
    while at < text.len() {
        match text[at] {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'0'..=b'9' if !in_string => {
                let length = text[at..].iter().take_while(|byte| is_of_number(byte)).count();
                let number = &text[at..at + length];
                if length > DIGITS_MAX && number.iter().all(u8::is_ascii_digit) {
                    return std::str::from_utf8(number).ok();
                }
                at += length;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// The beginning of a text that somebody else wrote.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Object {
        match value {
            Value::Object(object) => object,
            other => panic!("{other} is no object"),
        }
    }

    fn nested(depth: usize) -> String {
        format!("{}1{}", "{\"a\":".repeat(depth + 1), "}".repeat(depth + 1))
    }

    #[test]
    fn patches_merge_member_by_member_and_null_deletes_or_stays() {
        let base = object(json!({ "a": { "b": 1, "c": 2 }, "d": [1, 2], "e": 5, "n": null }));
        for (patch, deleting, keeping) in [
            (json!({}), json!({ "a": { "b": 1, "c": 2 }, "d": [1, 2], "e": 5, "n": null }), None),
            (
                json!({ "a": { "b": null }, "d": [3], "n": 1 }),
                json!({ "a": { "c": 2 }, "d": [3], "e": 5, "n": 1 }),
                Some(json!({ "a": { "b": null, "c": 2 }, "d": [3], "e": 5, "n": 1 })),
            ),
            (
                json!({ "a": null, "e": { "x": null, "y": [null] }, "gone": null, "n": null }),
                json!({ "d": [1, 2], "e": { "y": [null] } }),
                Some(json!({
                    "a": null, "d": [1, 2], "e": { "x": null, "y": [null] }, "gone": null, "n": null
                })),
            ),
            (json!({ "a": 1, "d": { "x": 1 } }), json!({ "a": 1, "d": { "x": 1 }, "e": 5, "n": null }), None),
        ] {
            let patch = object(patch);
            let mut merged = base.clone();
            merge(&mut merged, &patch, Nulls::Delete);
            assert_eq!(Value::Object(merged), deleting, "{patch:?}");
            let mut merged = base.clone();
            merge(&mut merged, &patch, Nulls::Keep);
            assert_eq!(Value::Object(merged), keeping.unwrap_or(deleting), "{patch:?}");
        }
    }

    #[test]
    fn differences_are_the_smallest_patches() {
        for (from, to, patch) in [
            (json!({}), json!({}), json!({})),
            (json!({ "a": 1 }), json!({ "a": 1 }), json!({})),
            (json!({ "a": 1 }), json!({ "a": 1.5, "b": {} }), json!({ "a": 1.5, "b": {} })),
            (json!({ "a": 1, "b": 2 }), json!({ "b": 2 }), json!({ "a": null })),
            (
                json!({ "a": { "b": 1, "c": { "d": 1 } } }),
                json!({ "a": { "c": { "d": 1 } } }),
                json!({ "a": { "b": null } }),
            ),
            (json!({ "a": [1, 2] }), json!({ "a": [1, 2, 3] }), json!({ "a": [1, 2, 3] })),
            (json!({ "a": { "b": 1 } }), json!({ "a": [] }), json!({ "a": [] })),
            (json!({ "a": 7 }), json!({ "a": { "b": 1 } }), json!({ "a": { "b": 1 } })),
        ] {
            assert_eq!(Value::Object(diff(&object(from), &object(to))), patch);
        }
    }

    #[test]
    fn every_limit_of_a_patch_is_its_own_error() {
        let name = |text: &str| json!({ text: 1 }).to_string();
        let value = |value: Value| json!({ "a": value }).to_string();
        let text = |length| Value::String("x".repeat(length));
        let accepted = [
            "{}".to_owned(),
            nested(PATCH_DEPTH_MAX),
            name(&"n".repeat(NAME_BYTES_MAX)),
            name(""),
            value(text(VALUE_BYTES_MAX)),
            value(json!(INTEGER_MAX)),
            value(json!(INTEGER_MIN)),
            value(json!(1e300)),
            value(json!({ "b": null })),
            value(json!([1, [2, "x"], { "b": true }])),
            r#"{"a":"12345678901234567890\"12345678901234567890"}"#.to_owned(),
            r#"{"a":"{[{[{[{[{[{[{[{["}"#.to_owned(),
        ];
        for patch in accepted {
            assert!(parse_patch(patch.as_bytes()).is_ok(), "{patch}");
        }
        let refused = |patch: String| parse_patch(patch.as_bytes()).unwrap_err();
        let long = "n".repeat(SHOWN_CHARS_MAX);
        assert_eq!(refused(nested(11)), JsonError::TooDeep { depth_max: 10 });
        assert_eq!(
            refused("[".repeat(100_000).drain(..32_000).collect()),
            JsonError::TooDeep { depth_max: 10 }
        );
        let many: serde_json::Map<_, _> = (0..9).map(|n| (n.to_string(), text(VALUE_BYTES_MAX))).collect();
        assert!(matches!(refused(Value::Object(many).to_string()), JsonError::TooLarge { .. }));
        assert_eq!(refused("[]".into()), JsonError::NotAnObject);
        assert!(matches!(refused("{\"a\":}".into()), JsonError::Malformed(_)));
        assert!(matches!(refused("{\"a\":1} x".into()), JsonError::Malformed(_)));
        assert_eq!(refused(name(&"n".repeat(NAME_BYTES_MAX + 1))), JsonError::LongName(long));
        for bad in ["a.b", "$version", "a#", "a b", "a\u{a0}", "a\u{7f}", "a\tb"] {
            assert_eq!(refused(name(bad)), JsonError::BadName(bad.into()));
            assert_eq!(refused(value(json!([{ bad: 1 }]))), JsonError::BadName(bad.into()));
        }
        assert_eq!(refused(value(text(VALUE_BYTES_MAX + 1))), JsonError::LongValue("a".into()));
        assert_eq!(refused(value(json!([text(VALUE_BYTES_MAX + 1)]))), JsonError::LongValue("a".into()));
        for integer in ["4503599627370496", "-4503599627370497", "18446744073709551615"] {
            let text = format!("{{\"a\":{integer}}}");
            assert!(matches!(refused(text), JsonError::IntegerRange(_)), "{integer}");
        }
        let huge = refused(format!("{{\"a\":[1.5,-{}]}}", "9".repeat(40)));
        assert_eq!(huge, JsonError::IntegerRange("9".repeat(40)));
        assert_eq!(refused(value(json!([null]))), JsonError::NullInArray("a".into()));
        assert_eq!(refused(value(json!([{ "b": null }]))), JsonError::NullInArray("b".into()));
    }

    #[test]
    fn a_twin_may_be_as_deep_as_its_metadata() {
        let metadata = format!(r#"{{"desired":{{"$metadata":{}}}}}"#, nested(PATCH_DEPTH_MAX));
        assert!(parse_twin(metadata.as_bytes()).is_ok());
        assert_eq!(parse_twin(nested(TWIN_DEPTH_MAX + 1).as_bytes()).unwrap_err(), {
            JsonError::TooDeep { depth_max: TWIN_DEPTH_MAX }
        });
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            (-3_i64..3).prop_map(Value::from),
            "[ab]{0,2}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::Array),
                members(inner).prop_map(Value::Object),
            ]
        })
    }

    fn members(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Object> {
        prop::collection::btree_map("[a-d]", value, 0..4).prop_map(|members| members.into_iter().collect())
    }

    proptest! {
        #[test]
        fn a_difference_merged_makes_the_document(from in members(value()), to in members(value())) {
            let mut merged = from.clone();
            merge(&mut merged, &diff(&from, &to), Nulls::Delete);
            prop_assert_eq!(merged, to);
        }

        #[test]
        fn equal_documents_differ_in_nothing(document in members(value())) {
            prop_assert!(diff(&document, &document).is_empty());
        }

        #[test]
        fn any_text_gets_an_answer(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_patch(&text);
        }

        #[test]
        fn the_depth_that_is_counted_is_the_depth_that_is_there(depth in 0_usize..30, max in 0_usize..30) {
            prop_assert_eq!(is_deeper_than(nested(depth).as_bytes(), max), depth + 1 > max);
        }
    }
}
