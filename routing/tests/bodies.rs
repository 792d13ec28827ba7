//! Body values beyond the vectors: the lenient dialect, repeated members, paths with wildcards, encodings.

use edgehub_routing::{Condition, MessageView, PropertyName, Text, Truth};

struct Message<'m> {
    encoding: &'m str,
    body: &'m [u8],
}

impl MessageView for Message<'_> {
    fn property(&self, _: &PropertyName) -> Text<'_> {
        Text::Undefined
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        match name.as_str() {
            "contentType" => Text::Text("application/json"),
            "contentEncoding" => Text::Text(self.encoding),
            _ => Text::Undefined,
        }
    }

    fn body(&self) -> &[u8] {
        self.body
    }
}

fn value(condition: &str, encoding: &str, body: &[u8]) -> Truth {
    let condition = Condition::compile(condition).unwrap_or_else(|errors| panic!("{condition}: {errors:?}"));
    condition.evaluate(&Message { encoding, body })
}

fn holds(condition: &str, body: &str) {
    assert_eq!(value(condition, "utf-8", body.as_bytes()), Truth::True, "{condition} on {body}");
}

#[test]
fn the_lenient_dialect_is_accepted() {
    for (body, condition) in [
        ("// c\r{'a': 1} /* end */ // more", "$body.a = 1"),
        ("{a_$1: 1}", "$body.a_$1 = 1"),
        ("{né : 'x'}", "$body.né = 'x'"),
        ("{\"a\": 1,}", "$body.a = 1"),
        ("{\"a\": [1, 2,], b: 3}", "$body.a[1] = 2 and $body.a[2] = null and $body.b = 3"),
        ("{\"a\": [,], b: 3}", "not is_defined($body.a[0]) and $body.a[1] = null and $body.b = 3"),
        ("{a: [1,,2]}", "$body.a[2] = 2"),
        (
            "{a: .5, b: 5., c: 0x1F, d: 010, e: -010}",
            "$body.a = .5 and $body.b = 5 and $body.c = 31 and $body.d = 8",
        ),
        ("{e: -010, f: 0xFFFFFFFFFFFFFFFF}", "$body.e = -10 and $body.f = -1"),
        (
            "{a: NaN, b: Infinity, c: -Infinity}",
            "is_defined($body.a) and $body.b = 1 / 0 and $body.c = -1 / 0",
        ),
        ("{\"a\": \"x\ny\"}", "$body.a = 'x\ny'"),
        ("{a: 'it\\'s', b: undefined}", "$body.a = \"it's\" and not is_defined($body.b)"),
        ("{a: new Date(1, 2), b: 3}", "not is_defined($body.a) and $body.b = 3"),
        ("{a: new X(), b: true}", "$body.b"),
        ("{a: 1/* c */, b: null// d\n}", "$body.a = 1 and $body.b = null"),
        ("{a:\u{A0}1}", "$body.a = 1"),
    ] {
        holds(condition, body);
    }
}

#[test]
fn what_no_dialect_has_is_refused() {
    for body in [
        "",
        " ",
        "{",
        "{'a'}",
        "{'a':}",
        "{'a':,}",
        "{,}",
        "{a:1,,b:2}",
        "{a:+1}",
        "{a:1d}",
        "{a:1_0}",
        "{a:-}",
        "{a:True}",
        "{a:'\\q'}",
        "{a:'\\u12'}",
        "{a=1}",
        "{a:1} {}",
        "{a:1}}",
        "[1]",
        "1",
        "{a:1",
        "{a:[1}",
        "{a:(1)}",
        "{a:08}",
        "{a:0x}",
        "{a:-0x1}",
        "{a:.}",
        "{a:1 2}",
        "{a:'x}",
        "{a-b:1}",
        "{a:truex}",
        "{a:1 /* c}",
        "\u{FEFF}{\"a\":1}",
        "{a:new}",
        "{a:new X}",
        "{\"a\":1}\"",
        "{a:)}",
        "{a:nul}",
        "{a:--1}",
    ] {
        assert_eq!(value("is_defined($body.a)", "utf-8", body.as_bytes()), Truth::False, "{body}");
    }
}

#[test]
fn depth_is_bounded_in_both_dialects() {
    for open in ["{\"a\":", "{a:"] {
        let nested =
            |depth: usize| format!("{{\"b\":1,\"c\":{}1{}}}", open.repeat(depth - 1), "}".repeat(depth - 1));
        holds("$body.b = 1", &nested(64));
        assert_eq!(value("$body.b = 1", "utf-8", nested(65).as_bytes()), Truth::Undefined);
        assert_eq!(value("$body.b = 1", "utf-8", nested(20_000).as_bytes()), Truth::Undefined);
    }
    assert_eq!(
        value("$body.b = 1", "utf-8", format!("{{\"b\":{}", "[".repeat(200_000)).as_bytes()),
        Truth::Undefined
    );
}

#[test]
fn the_last_of_repeated_members_counts_with_all_that_is_in_it() {
    holds("$body.a.b = null", r#"{"a":{"b":1},"a":{"c":2}}"#);
    holds("$body.a.b = null and $body.a = 5", r#"{"a":{"b":1},"\u0061":5}"#);
    holds("$body.a[0] = 2", r#"{"a":[1],"a":[2]}"#);
    holds("$body.a.* = 3", r#"{"a":{"x":1,"x":3}}"#);
}

#[test]
fn wildcards_find_one_value_or_none() {
    let body = r#"{"a":[{"k":[7],"z":1},{"k":[8,9],"y":{"z":2}}],"o":{"p":{"only":true}},"e":{},"w":["x"]}"#;
    holds("$body.a[0]['k'][*] = 7", body);
    holds("not is_defined($body.a[1]['k'][*])", body);
    holds("$body.a[0]['k'].* = null", body);
    holds("$body.o.*.only", body);
    holds("$body.e.* = null", body);
    holds("$body.w[0] = 'x' and $body.w[0][*] = null", body);
    holds("$body.a[1]['y']..z = 2", body);
    holds("$body.a[1]['y']..q = null", body);
    holds("not is_defined($body.a[1]['k']..*)", body);
    holds("$body.w[0]['q']..* = null", body);
    holds("not is_defined($body.$)", body);
    holds("$body.$[0] = null or true", body);
}

#[test]
fn wildcards_over_large_bodies_end() {
    let body = format!("{{\"a\":[[{}]]}}", vec!["[[]]"; 30_000].join(","));
    let path = "..*".repeat(40);
    assert_eq!(value(&format!("is_defined($body.a[0][0]{path})"), "utf-8", body.as_bytes()), Truth::False);
}

#[test]
fn encodings_are_decoded_with_replacements() {
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    assert_eq!(value("$body.é = '😀'", "UTF-16", &utf16("{\"é\":\"😀\"}")), Truth::True);
    assert_eq!(value("$body.a = 'x\\uFFFD'", "utf-8", b"{\"a\":\"x\xFF\"}"), Truth::True);
    let mut lone = utf16("{\"a\":\"");
    lone.extend(0xD83D_u16.to_le_bytes());
    lone.extend(utf16("\"}"));
    assert_eq!(value("$body.a = '\\uFFFD'", "utf-16", &lone), Truth::True);
    lone.push(0);
    assert_eq!(value("$body.a = '\\uFFFD'", "utf-16", &lone), Truth::Undefined);
    let utf32: Vec<u8> = "{\"a\":1}".chars().flat_map(|unit| (unit as u32).to_le_bytes()).collect();
    assert_eq!(value("$body.a = 1", "utf-32", &utf32), Truth::True);
    assert_eq!(value("$body.a = 1", "utf-32", &utf32[..utf32.len() - 1]), Truth::Undefined);
}
