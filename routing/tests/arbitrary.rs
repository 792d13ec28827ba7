//! Whatever the text and the body are: an answer, no panic.

use edgehub_routing::{
    Condition, MessageSource, MessageView, Origin, PropertyName, Route, RouteSpec, RouteTable, Text, explain,
    lint,
};
use proptest::prelude::*;

struct Message<'m> {
    encoding: &'m str,
    body: &'m [u8],
}

impl MessageView for Message<'_> {
    fn property(&self, _: &PropertyName) -> Text<'_> {
        Text::Undefined
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        if name.matches("contentType") { Text::Text("application/json") } else { Text::Text(self.encoding) }
    }

    fn body(&self) -> &[u8] {
        self.body
    }
}

/// Pieces of routes in any order.
fn route_pieces() -> impl Strategy<Value = String> {
    let pieces = [
        "FROM",
        "/messages/*",
        "WHERE",
        "INTO",
        "$upstream",
        "BrokeredEndpoint",
        "(",
        ")",
        "\"/modules/a/inputs/b\"",
        "'x'",
        "zone",
        "$body.a[0]",
        "{",
        "}",
        "=",
        "!=",
        "<",
        "AND",
        "or",
        "not",
        "-",
        "+",
        "||",
        "??",
        ",",
        "1",
        "0x1F",
        "e5",
        "true",
        "null",
        "undefined",
        "concat",
        "is_null",
        "@",
        "'\\uD83D'",
        "'open",
        "/*",
        "*/",
        "\n",
        "é",
        "😀",
        "a[1]",
    ];
    let piece = proptest::sample::select(pieces.to_vec());
    proptest::collection::vec((piece, any::<bool>()), 0..40).prop_map(|pieces| {
        pieces.iter().flat_map(|(piece, space)| [*piece, if *space { " " } else { "" }]).collect()
    })
}

fn refuse_or_compile(text: &str) {
    let _ = Route::parse(text);
    let spec = RouteSpec { name: "r", text, priority: 0, time_to_live_secs: 0, upstream_target: None };
    let (table, errors) = RouteTable::compile([spec], "edge");
    assert_eq!(table.len() + errors.len(), 1);
    assert!(errors.iter().all(|error| !error.diagnostics.is_empty()));
    let condition = Condition::compile(text);
    let message = Message { encoding: "utf-8", body: b"{\"a\":[1,\"x\"]}" };
    if let Ok(condition) = condition {
        let explained = condition.explain(&message);
        assert_eq!(condition.evaluate(&message), condition.walk(&message), "{text}");
        assert_eq!(condition.evaluate(&message), explained.truth, "{text}");
        assert!(!explained.to_string().is_empty());
    }
    for lint in lint([spec]) {
        let range = lint.in_route.expect("a place in the route");
        assert!(range.line >= 1 && range.column >= 1, "{text}: {lint}");
        assert!(lint.render("warning", &Origin::of_route("r"), text).contains('^'));
        if let Some(suggestion) = &lint.suggestion {
            let changed = suggestion.apply(text).expect("the same text");
            let (table, _) = RouteTable::compile([RouteSpec { text: &changed, ..spec }], "edge");
            assert_eq!(table.len(), 1, "{text}: {changed}");
        }
    }
    for diagnostic in errors.iter().flat_map(|error| &error.diagnostics) {
        let picture = diagnostic.render(&Origin::of_route("r"), text);
        assert_eq!(picture.contains('^'), diagnostic.in_route.is_some(), "{picture}");
        if let Some(suggestion) = &diagnostic.suggestion {
            assert!(suggestion.apply(text).is_some_and(|changed| changed != text), "{text}");
        }
    }
    explain([spec], "edge", &MessageSource::Device, &message).expect("a device has a path");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_characters_are_refused_or_compile(text in any::<String>()) {
        refuse_or_compile(&text);
    }

    #[test]
    fn any_pieces_are_refused_or_compile(text in route_pieces()) {
        refuse_or_compile(&text);
    }

    #[test]
    fn any_body_has_a_value(
        body in proptest::collection::vec(any::<u8>(), 0..60),
        encoding in proptest::sample::select(vec!["utf-8", "utf-16", "utf-32"]),
    ) {
        let condition = Condition::compile("$body.a[0] = 1 or $body.a[0][0]..b = '' or $body.* < null").expect("compiles");
        condition.evaluate(&Message { encoding, body: &body });
    }

    /// Strict JSON has to be read as a plain parser reads it.
    #[test]
    fn json_is_read_like_json(pieces in proptest::collection::vec(
        proptest::sample::select(vec![
            "{", "}", "[", "]", ",", ":", "\"a\"", "\"\\u0061\"", "\"b\"", "1", "-0.5e1", "true", "null", " ", "'a'", "a",
            "/**/", "NaN", "new X(", ")", ".5", "010", "\"\\n\"",
        ]), 0..24))
    {
        let body: String = std::iter::once("{\"a\":").chain(pieces).chain(["}"]).collect();
        let plain: Option<serde_json::Value> = serde_json::from_str(&body).ok();
        let value = |text: &str| {
            let condition = Condition::compile(text).expect("compiles");
            condition.evaluate(&Message { encoding: "utf-8", body: body.as_bytes() }) == edgehub_routing::Truth::True
        };
        if let Some(plain) = plain {
            let number = plain.get("a").and_then(serde_json::Value::as_f64);
            prop_assert_eq!(value("$body.a = 1"), number == Some(1.0), "{}", body);
            let inner = plain.get("a").and_then(|a| a.get("a")).and_then(serde_json::Value::as_f64);
            prop_assert_eq!(value("$body.a.a = 1"), inner == Some(1.0), "{}", body);
            prop_assert_eq!(value("$body.a[1] = 1"), plain["a"][1].as_f64() == Some(1.0), "{}", body);
            let scalar = match &plain["a"] {
                serde_json::Value::Array(_) | serde_json::Value::Object(_) => None,
                other => Some(other.is_null()),
            };
            prop_assert_eq!(value("$body.a = null"), scalar == Some(true), "{}", body);
        }
    }
}
