//! Programs against the plain walk; bodies are read here with another reader than that of the programs.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::body::Step;
use crate::check::check;
use crate::evaluate::Scratch;
use crate::message::{MessageView, PropertyName};
use crate::program::{Program, Vocabulary};
use crate::syntax::parse_condition;

#[test]
fn positions_are_the_first() {
    let units = |text: &str| text.encode_utf16().collect::<Vec<_>>();
    for (of, part) in [
        ("", ""),
        ("a", ""),
        ("", "a"),
        ("aab", "ab"),
        ("abababc", "ababc"),
        ("aaa", "b"),
        ("xab", "ab"),
        ("ab", "abc"),
    ] {
        assert_eq!(position(&units(of), &units(part)), of.find(part), "{of} {part}");
    }
}

struct Message {
    properties: Vec<(&'static str, Option<&'static str>)>,
    body: serde_json::Value,
    bytes: Vec<u8>,
}

impl Message {
    fn new() -> Message {
        let body = json!({
            "n": 12.5, "z": 0, "t": true, "f": false, "s": "lpm", "e": "", "v": null,
            "o": { "n": 1 }, "l": [4, "8", [true]], "d": "2031-07-04T10:20:30Z", "x": "a😀b", "k": "a\"b",
        });
        let properties = vec![
            ("zone", Some("north")),
            ("rpm", Some("1450")),
            ("gone", None),
            ("blank", Some("")),
            ("x", Some("a😀b")),
            ("$body.f", Some("shadow")),
        ];
        let bytes = body.to_string().into_bytes();
        Message { properties, body, bytes }
    }
}

impl MessageView for Message {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        match self.properties.iter().find(|(known, _)| name.matches(known)) {
            None => Text::Undefined,
            Some((_, None)) => Text::Null,
            Some((_, Some(value))) => Text::Text(value),
        }
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        match name.folded() {
            "CONTENTTYPE" => Text::Text("application/json"),
            "CONTENTENCODING" => Text::Text("UTF-8"),
            "SITE" => Text::Text("sys"),
            _ => Text::Undefined,
        }
    }

    fn body(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bodies are read here with another reader than that of the programs.
impl Leaves for &Message {
    fn property(&mut self, name: &str) -> Plain {
        of_text(MessageView::property(*self, &PropertyName::new(name)))
    }

    fn system(&mut self, name: &str) -> Plain {
        of_text(self.system_property(&PropertyName::new(name)))
    }

    fn body(&mut self, path: &BodyPath) -> Plain {
        of_body(&self.body, path.steps())
    }
}

/// The value of a body path without wildcards.
fn of_body(mut at: &serde_json::Value, steps: Option<&[Step]>) -> Plain {
    let Some(steps) = steps else { return Plain::Undefined };
    for step in steps {
        let next = match (step, at) {
            (Step::Member(name), serde_json::Value::Object(object)) => object.get(name),
            (Step::Element(index), serde_json::Value::Array(array)) => array.get(*index),
            _ => None,
        };
        match next {
            Some(next) => at = next,
            None => return Plain::Null { absent: true },
        }
    }
    match at {
        serde_json::Value::Null => Plain::Null { absent: false },
        serde_json::Value::Bool(value) => Plain::Bool(*value),
        serde_json::Value::Number(number) => Plain::Number(number.as_f64().expect("finite")),
        serde_json::Value::String(text) if text.contains("T10") => Plain::Undefined,
        serde_json::Value::String(text) => Plain::Text(text.encode_utf16().collect()),
        serde_json::Value::Array(_) | serde_json::Value::Object(_) => Plain::Undefined,
    }
}

/// Writes a condition whose parts have fitting types most of the time, as `choices` say.
struct Writer<'c> {
    choices: std::slice::Iter<'c, u8>,
}

impl Writer<'_> {
    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[usize::from(*self.choices.next().unwrap_or(&0)) % from.len()]
    }

    fn write(&mut self, wanted: char, depth: u32) -> String {
        let form = self.pick(match (wanted, depth) {
            ('N', 0) => &["0", "3", "2.5", "-1", "1e999", "0x1F", "-0"],
            ('S', 0) => &[
                "zone",
                "rpm",
                "gone",
                "nope",
                "x",
                "blank",
                "$site",
                "'a'",
                "'\\uD83D'",
                "'\\uDE00b'",
                "''",
            ],
            ('B', 0) => &["true", "false", "true", "is_null(null)"],
            ('L', 0) => &["null"],
            ('U', 0) => &["undefined"],
            (_, 0) => &[
                "$body.n",
                "$body.z",
                "$body.t",
                "$body.f",
                "{$body.f}",
                "$body.s",
                "$body.e",
                "$body.v",
                "$body.o",
                "$body.o.n",
                "$body.l[0]",
                "$body.l[1]",
                "$body.l[2][0]",
                "$body.d",
                "$body.x",
                "$body.k",
                "$body.no",
            ],
            ('N', _) => &[
                "(N + N)",
                "(N - N)",
                "(N * N)",
                "(N / N)",
                "(N % N)",
                "- N",
                "abs(Q)",
                "floor(N)",
                "sign(N)",
                "power(N, N)",
                "sqrt(N)",
                "length(S)",
                "length(Q)",
                "as_number(S)",
                "as_number(Q)",
                "index_of(S, S)",
                "(N ?? N)",
                "square(N)",
                "ceiling(N)",
                "exp(N)",
            ],
            ('S', _) => &[
                "(S || S)",
                "concat(S, Q, S)",
                "lower(S)",
                "upper(Q)",
                "substring(S, N)",
                "substring(S, N, N)",
                "substring(Q, 1, 2)",
                "(S ?? S)",
                "lower(upper(S))",
                "(S || (S || S))",
                "substring((S || S), 1)",
            ],
            ('B', _) => &[
                "(S = S)",
                "(S < S)",
                "(N >= N)",
                "(N != N)",
                "(B = B)",
                "(B <= B)",
                "(Q = S)",
                "(Q < N)",
                "(N > Q)",
                "(Q <> Q)",
                "(Q >= L)",
                "(B <= Q)",
                "(B AND B)",
                "(B OR B)",
                "NOT B",
                "NOT Q",
                "(Q AND B)",
                "(Q OR B)",
                "(Q AND Q)",
                "(B OR U)",
                "(U AND B)",
                "(B OR L)",
                "is_bool(B)",
                "is_bool(Q)",
                "is_number(N)",
                "is_number(Q)",
                "is_string(S)",
                "is_string(Q)",
                "is_defined(N)",
                "is_defined(S)",
                "is_defined(B)",
                "is_defined(Q)",
                "is_null(S)",
                "is_null(Q)",
                "is_null(L)",
                "starts_with(S, S)",
                "ends_with(S, S)",
                "contains(S, Q)",
                "(B ?? B)",
                "(L = L)",
                "(U = U)",
                "(S = 'a')",
                "('lpm' = Q)",
                "NOT L",
            ],
            ('L', _) => &["(L AND B)", "(L OR L)", "(L ?? L)", "null"],
            ('U', _) => &["(U ?? U)", "undefined"],
            (_, _) => {
                &["(Q + N)", "(N - Q)", "(Q * Q)", "(Q / Q)", "(Q ?? N)", "(S ?? Q)", "(Q ?? Q)", "(L ?? Q)"]
            }
        });
        if depth == 0 {
            return form.to_owned();
        }
        let mut written = String::new();
        // Only letters that stand alone are places to fill; names of more letters are kept.
        for (at, letter) in form.char_indices() {
            let alone = |other: Option<char>| !other.is_some_and(|other| other.is_alphanumeric());
            let before = form[..at].chars().next_back();
            let after = form[at + letter.len_utf8()..].chars().next();
            if matches!(letter, 'N' | 'S' | 'B' | 'L' | 'U' | 'Q') && alone(before) && alone(after) {
                let depth = depth - 1 - u32::from(self.pick(&["", "x"]).len() as u32 > 0 && depth > 1);
                written.push_str(&self.write(letter, depth));
            } else {
                written.push(letter);
            }
        }
        written
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn programs_equal_the_plain_walk(choices in proptest::collection::vec(any::<u8>(), 0..80), root in 0..5) {
        let root = if root == 0 { 'Q' } else { 'B' };
        let text = Writer { choices: choices.iter() }.write(root, 4);
        let tree = parse_condition(&text).expect("parses").expect("not empty");
        let checked = check(&text, &tree).unwrap_or_else(|faults| panic!("{text}: {faults:?}"));
        let message = Message::new();
        let mut vocabulary = Vocabulary::default();
        let program = Program::new(&checked, &mut vocabulary);
        let mut scratch = Scratch::default();
        let found = program.evaluate(&vocabulary, &message, &mut scratch);
        prop_assert_eq!(found, truth(&checked, &values(&checked, &mut &message)), "{}", text);
    }
}
