//! Explanations: each reason at its place, agreement with the table, and texts that are built to be slow or deep.

use edgehub_routing::{
    Condition, DEFAULT_PRIORITY, Decision, MessageSource, MessageView, Outcome, PartValue, PropertyName,
    RouteSpec, RouteTable, Text, Truth, explain,
};

struct Message {
    content_type: Option<&'static str>,
    content_encoding: Option<&'static str>,
    body: String,
}

impl Message {
    fn json(body: &str) -> Message {
        Message {
            content_type: Some("application/json"),
            content_encoding: Some("utf-8"),
            body: body.to_owned(),
        }
    }
}

impl MessageView for Message {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        match name.as_str() {
            "level" => Text::Text("hot"),
            "gone" => Text::Null,
            _ => Text::Undefined,
        }
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        let value = match name.as_str() {
            "contentType" => self.content_type,
            "contentEncoding" => self.content_encoding,
            _ => None,
        };
        value.map_or(Text::Undefined, Text::Text)
    }

    fn body(&self) -> &[u8] {
        self.body.as_bytes()
    }
}

const BODY: &str = r#"{"t": 71, "Name": "x", "o": {"k": 1}, "l": [1], "d": "2031-07-04T10:20:30Z", "z": 0, "s": "abc", "n": null}"#;

/// The codes of the reasons of a condition's parts, operands first.
fn reasons(condition: &str, message: &Message) -> Vec<&'static str> {
    let compiled = Condition::compile(condition).unwrap_or_else(|errors| panic!("{condition}: {errors:?}"));
    let evaluation = compiled.explain(message);
    assert_eq!(evaluation.truth, compiled.evaluate(message), "{condition}");
    for part in &evaluation.parts {
        assert!(part.value != PartValue::Undefined || part.reason.is_some(), "{condition}: {part:?}");
    }
    evaluation.parts.iter().filter_map(|part| part.reason.as_ref()).map(|reason| reason.code()).collect()
}

#[test]
fn every_undefined_part_has_its_reason() {
    let message = Message::json(BODY);
    for (condition, expected) in [
        ("level = 'hot'", &[][..]),
        ("nope = 'x'", &["property-absent", "operand-undefined"]),
        ("$messageId = 'x'", &["system-property-absent", "operand-undefined"]),
        ("$nothing = 'x'", &["system-property-absent", "operand-undefined"]),
        ("gone = 'x'", &["operand-null"]),
        ("upper(gone) = 'x'", &["operand-null", "operand-undefined"]),
        ("$body.t = 71", &[]),
        ("$body.o = 1", &["not-scalar", "operand-undefined"]),
        ("$body.l = 1", &["not-scalar", "operand-undefined"]),
        ("$body.d = 'x'", &["looks-like-date", "operand-undefined"]),
        ("$body.nope = 1", &["path-not-found"]),
        ("$body.nope > 1", &["path-not-found", "ordered-by-kind"]),
        ("$body.o.k.x = 1", &["path-not-found"]),
        ("$body.l[3] = 1", &["path-not-found"]),
        ("$body.l[0]x = 1", &["path-without-meaning", "operand-undefined"]),
        ("$body.t + 1 = 72", &[]),
        ("$body.s + 1 = 72", &["type-mismatch", "operand-undefined"]),
        ("$body.t AND true", &["type-mismatch"]),
        ("NOT $body.t", &["type-mismatch"]),
        ("as_number(level) = 1", &["text-no-number", "operand-undefined"]),
        ("as_number($body.n) = 1", &["type-mismatch", "operand-undefined"]),
        ("sqrt(-1) = 1", &["no-number", "operand-undefined"]),
        ("0 / 0 = 1", &["no-number", "operand-undefined"]),
        (
            "- as_number(nope) = 1",
            &["property-absent", "operand-undefined", "operand-undefined", "operand-undefined"],
        ),
        ("substring(level, 9) = 'x'", &["outside-of-text", "operand-undefined"]),
        (
            "substring(level, 0, as_number('x')) = 'x'",
            &["text-no-number", "operand-undefined", "operand-undefined"],
        ),
        ("length($body.t) = 1", &["type-mismatch", "operand-undefined"]),
        ("is_null($body.t)", &["body-test"]),
        ("is_null($body.nope)", &["path-not-found", "body-test"]),
        ("is_defined($body.nope)", &["path-not-found", "body-test"]),
        ("is_bool($body.o)", &["not-scalar", "operand-undefined"]),
        ("undefined = undefined", &["undefined-literal", "undefined-literal", "operand-undefined"]),
        ("level", &["no-truth-value"]),
        ("nope = 'x' AND true", &["property-absent", "operand-undefined", "operand-undefined"]),
        ("(nope ?? gone) = 'x'", &["property-absent", "operand-null"]),
    ] {
        assert_eq!(reasons(condition, &message), *expected, "{condition}");
    }
}

#[test]
fn bodies_that_cannot_be_read_say_why() {
    let of = |content_type, content_encoding, body: &str| {
        let message = Message { content_type, content_encoding, body: body.to_owned() };
        reasons("$body.t = 1", &message)[0]
    };
    assert_eq!(of(None, None, BODY), "content-type-absent");
    assert_eq!(of(Some("application/json; charset=utf-8"), None, BODY), "content-type-not-json");
    assert_eq!(of(Some("application/json"), None, BODY), "content-encoding-absent");
    assert_eq!(of(Some("Application/JSON"), Some("utf8"), BODY), "content-encoding-not-supported");
    assert_eq!(of(Some("application/json"), Some("UTF-8"), "[1]"), "body-unreadable");
    assert_eq!(of(Some("application/json"), Some("utf-8"), ""), "body-unreadable");
}

#[test]
fn words_name_what_is_there_instead() {
    let message = Message::json(BODY);
    let words = |condition: &str| {
        let evaluation = Condition::compile(condition).expect("compiles").explain(&message);
        evaluation.parts[0].reason.as_ref().expect("a reason").to_string()
    };
    assert!(words("$body.name = 'x'").ends_with("the body has a member \"Name\", in other letters"));
    assert!(words("$body.o.x = 1").ends_with("\"o\" has no member \"x\", only \"k\""));
    assert!(words("$body.l.x = 1").ends_with("\"l\" is an array: name an element, [0]"));
    assert!(words("$body.l[1] = 1").ends_with("\"l\" has 1 elements"));
    assert!(words("$body.t.x = 1").ends_with("\"t\" is a plain value"));
}

#[test]
fn explanations_agree_with_the_table() {
    let message = Message::json(BODY);
    let texts = [
        ("a", "FROM /messages/* WHERE $body.t > 70 INTO $upstream", 3),
        ("b", "FROM /messages/* INTO $upstream", 3),
        ("c", "FROM /messages/* INTO $upstream", 5),
        ("d", "FROM /messages/modules/m INTO $upstream", 1),
        (
            "e",
            "FROM /messages/* WHERE level = 'cold' INTO BrokeredEndpoint('/modules/m/inputs/i')",
            DEFAULT_PRIORITY,
        ),
        (
            "f",
            "FROM /messages/* WHERE nope = 'x' INTO BrokeredEndpoint('/modules/m/inputs/i')",
            DEFAULT_PRIORITY,
        ),
        ("g", "FROM /messages/* WHERE nope = 5 INTO $upstream", DEFAULT_PRIORITY),
    ];
    let specs = || {
        texts.iter().map(|(name, text, priority)| RouteSpec {
            name,
            text,
            priority: *priority,
            time_to_live_secs: 0,
            upstream_target: None,
        })
    };
    let explanation =
        explain(specs(), "edge", &MessageSource::Device, &message).expect("a device has a path");
    let outcomes: Vec<_> = explanation.routes.iter().map(|route| route.outcome.clone()).collect();
    assert_eq!(
        outcomes,
        [
            Outcome::Won,
            Outcome::LostByName("a".to_owned()),
            Outcome::LostByPriority("a".to_owned()),
            Outcome::OtherSource,
            Outcome::False,
            Outcome::Undefined,
            Outcome::Broken,
        ]
    );
    let (table, _) = RouteTable::compile(specs(), "edge");
    let mut decision = Decision::new();
    table.decide(&table.candidates(&MessageSource::Device).expect("a path"), &message, &mut decision);
    assert_eq!(explanation.targets.len(), decision.targets.len());
    assert_eq!(explanation.targets[0].endpoint_id, "iothub");
}

#[test]
fn routes_to_different_targets_do_not_compete() {
    let specs = [("a", Some("/queue/a")), ("b", Some("/queue/b")), ("c", Some("/queue/a")), ("d", None)];
    let specs = specs.map(|(name, upstream_target)| RouteSpec {
        name,
        text: "FROM /messages/* INTO $upstream",
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        upstream_target,
    });
    let explanation =
        explain(specs, "edge", &MessageSource::Device, &Message::json(BODY)).expect("a device has a path");
    let outcomes: Vec<_> = explanation.routes.iter().map(|route| route.outcome.clone()).collect();
    assert_eq!(outcomes, [Outcome::Won, Outcome::Won, Outcome::LostByName("a".to_owned()), Outcome::Won]);
    let targets: Vec<_> = explanation.targets.iter().map(|target| target.endpoint_id.as_str()).collect();
    assert_eq!(targets, ["iothub[/queue/a]", "iothub[/queue/b]", "iothub"]);
}

#[test]
fn long_and_deep_conditions_are_explained_in_bounded_time() {
    let message = Message::json(BODY);
    let thread = std::thread::Builder::new().stack_size(2 << 20);
    let check = move || {
        for (item, operator, end) in [
            ("true", " AND ", ""),
            ("1", " - ", " < 1"),
            ("$body.t", " + ", " > 0"),
            ("true", " = ", ""),
            ("'x'", " || ", " = 'x'"),
        ] {
            let text = format!("{}{end}", vec![item; 60_000 / (item.len() + operator.len())].join(operator));
            let condition = Condition::compile(&text).expect("compiles");
            let picture = condition.explain(&message).to_string();
            assert!(picture.lines().count() > 1_000 && picture.len() < 16 << 20, "{operator}");
        }
        let deep = format!("{}true{}", "NOT (".repeat(128), ")".repeat(128));
        assert_eq!(Condition::compile(&deep).expect("compiles").explain(&message).truth, Truth::True);
    };
    thread.spawn(check).expect("a thread").join().expect("the check holds");
}
