//! Tables of many routes against each condition evaluated alone: the same routes match, the same are undefined.
//!
//! The conditions are made of few subjects and of literals that nearly are each other, so that subjects and parts are
//! shared, values fall on literals and beside them, and clauses of all forms meet.

use std::collections::HashMap;

use edgehub_routing::{
    Condition, DEFAULT_PRIORITY, Decision, MessageSource, MessageView, PropertyName, RouteSpec, RouteTable,
    SystemProperty, Text, Truth,
};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Debug)]
struct Message {
    properties: Vec<(&'static str, Option<&'static str>)>,
    content_type: bool,
    body: &'static str,
    /// Lets its properties be gone through.
    places: bool,
}

fn text(value: Option<&'static str>) -> Text<'static> {
    value.map_or(Text::Null, Text::Text)
}

impl MessageView for Message {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        let found = self.properties.iter().find(|(known, _)| name.matches(known));
        found.map_or(Text::Undefined, |(_, value)| text(*value))
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        match name.folded() {
            "CONTENTTYPE" if self.content_type => Text::Text("application/json"),
            "CONTENTENCODING" => Text::Text("utf-8"),
            "SITE" => Text::Text("b"),
            "CONNECTIONDEVICEID" => Text::Text("a"),
            _ => Text::Undefined,
        }
    }

    fn body(&self) -> &[u8] {
        self.body.as_bytes()
    }

    fn property_places(&self) -> Option<usize> {
        self.places.then_some(2 * self.properties.len())
    }

    fn property_at(&self, place: usize) -> Option<(&str, Text<'_>)> {
        // Something that is no application property stands at every other place.
        let at = (place % 2 == 1).then_some(place / 2)?;
        self.properties.get(at).map(|(name, value)| (*name, text(*value)))
    }
}

const NAMES: [&str; 9] = ["$connectionDeviceId", "a", "A", "b", "é", "É", "n", "$site", "$body.x"];

const VALUES: [&str; 15] = [
    "",
    "a",
    "A",
    "a ",
    "b",
    "é",
    "\u{E000}",
    "\u{1F600}",
    "0",
    "-0",
    "3",
    "3.0000000000000004",
    "9007199254740993",
    "1e999",
    "x",
];

const BODIES: [&str; 14] = [
    r#"{"x":3,"y":"a","z":{"x":[3,"b"]},"t":true}"#,
    r#"{"x":-0.0,"y":null,"z":{"x":["3",-1e999]},"t":false}"#,
    r#"{"x":3.0000000000000004,"y":"\u0061","z":{"x":[9007199254740993]},"t":"true"}"#,
    r#"{"x":true,"y":{"x":1},"z":{"x":[]},"t":null,"x":"a"}"#,
    r#"{"x":"2031-07-04T10:20:30Z","y":"","z":[{"x":[1]}],"t":[true]}"#,
    r#"{"other":{"x":[1,{"y":"}]"}]},"y":"\ud83d\ude00","z":{"other":"\"","x":[0,[1],"a"]}}"#,
    "{x: NaN, y: 'a', /* c */ z: {x: [Infinity, 010]}, t: true}",
    "{x: undefined, y: new Date(3), z: {x: [,2]},}",
    r#"{"x":3,"y":"a","z":{"x":[3,"b"]},"t":true"#,
    r#"{"x":3,"skipped":{"a":[1,2,}}"#,
    r#"{"x":3,"skipped":{"a":[1,2,]}}"#,
    r#"{"x":3,"skipped":[{"a":01}]}"#,
    "{}",
    "[3]",
];

fn message() -> impl Strategy<Value = Message> {
    let name = select(NAMES.to_vec());
    let value = proptest::option::weighted(0.9, select(VALUES.to_vec()));
    let properties = proptest::collection::vec((name, value), 0..6);
    let body = select(BODIES.to_vec());
    (properties, proptest::bool::weighted(0.9), body, any::<bool>()).prop_map(
        |(properties, content_type, body, places)| Message { properties, content_type, body, places },
    )
}

/// A subject, and a literal that it may be compared with.
fn comparison() -> impl Strategy<Value = String> {
    let texts = [
        "a",
        "A",
        "é",
        "$site",
        "{$site}",
        "{$connectionDeviceId}",
        "lower({$connectionDeviceId})",
        "{$modelId}",
        "lower(a)",
        "(a || b)",
        "(a ?? 'b')",
        "substring(a, 0)",
    ];
    let numbers =
        ["as_number(n)", "length(a)", "(as_number(n) + 0)", "(- as_number(n))", "abs($body.x)", "3"];
    let bodies =
        ["$body.x", "$body.y", "$body.z.x[0]", "{$body.x}", "$body.none", "($body.x + 0)", "$body.z"];
    let truths = ["is_defined(a)", "starts_with(a, b)", "(a = b)", "is_null($body.x)"];
    let text_literals = ["''", "'a'", "'A'", "'a '", "'b'", "'é'", "'\u{E000}'", "'\u{1F600}'", "'\\uD83D'"];
    let number_literals =
        ["0", "-0", "3", "3.0000000000000004", "9007199254740992", "1e999", "-1e999", "0x3"];
    let any_literals = ["null", "true", "false", "'a'", "''", "3", "-0", "1e999"];
    let pair = |subjects: &[&'static str], literals: &[&'static str]| {
        (select(subjects.to_vec()), select(literals.to_vec()))
    };
    let sides = prop_oneof![
        3 => pair(&texts, &text_literals),
        3 => pair(&numbers, &number_literals),
        4 => pair(&bodies, &any_literals),
        1 => pair(&truths, &["true", "false"]),
    ];
    let operator = select(vec!["=", "=", "!=", "<>", "<", "<=", ">", ">="]);
    (sides, operator, any::<bool>()).prop_map(|((subject, literal), operator, mirrored)| {
        if mirrored {
            format!("({literal} {operator} {subject})")
        } else {
            format!("({subject} {operator} {literal})")
        }
    })
}

fn condition() -> impl Strategy<Value = String> {
    let whole = select(vec![
        "true",
        "false",
        "(a = b)",
        "(b < a)",
        "is_bool($body.t)",
        "(as_number(n) * 2 > as_number(n) + 3)",
        "(length(a) + length(a) = 2)",
        "(undefined = undefined)",
        "contains(lower(a), 'a')",
    ]);
    let leaf = prop_oneof![5 => comparison(), 1 => whole.prop_map(str::to_owned)];
    let part = leaf.prop_recursive(4, 12, 3, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(left, right)| format!("({left} AND {right})")),
            (inner.clone(), inner.clone()).prop_map(|(left, right)| format!("({left} OR {right})")),
            inner.clone().prop_map(|inner| format!("(NOT {inner})")),
            (inner.clone(), inner).prop_map(|(left, right)| format!("({left} = {right})")),
        ]
    });
    // Some are of another type than a truth value.
    let odd = select(vec![
        "$body.t",
        "NOT $body.t",
        "$body.t AND a = 'a'",
        "a",
        "null",
        "undefined",
        "a = 'a' AND null",
    ]);
    prop_oneof![8 => part, 1 => odd.prop_map(str::to_owned)]
}

#[derive(Clone, Debug)]
struct Route {
    condition: String,
    sink: u8,
    priority: u32,
}

fn route() -> impl Strategy<Value = Route> {
    let priority = select(vec![0, 1, DEFAULT_PRIORITY]);
    (condition(), 0..6_u8, priority).prop_map(|(condition, sink, priority)| Route {
        condition,
        sink,
        priority,
    })
}

/// The names of the routes that win, and how many conditions that had to be looked at are undefined.
fn expected(routes: &[(String, Route)], truth: impl Fn(&str) -> Truth) -> (Vec<String>, u32) {
    let (mut winners, mut undefined) = (Vec::new(), 0);
    for sink in 0..6 {
        let mut own: Vec<_> = routes.iter().filter(|(_, route)| route.sink == sink).collect();
        own.sort_by_key(|(name, route)| (route.priority, name));
        for (name, route) in own {
            match truth(&route.condition) {
                Truth::True => {
                    winners.push(name.clone());
                    break;
                }
                Truth::False => {}
                Truth::Undefined => undefined += 1,
            }
        }
    }
    winners.sort();
    (winners, undefined)
}

fn compare(routes: &[Route], messages: &[Message]) -> Result<(), TestCaseError> {
    let routes: Vec<(String, Route)> =
        routes.iter().enumerate().map(|(n, route)| (format!("r{n:03}"), route.clone())).collect();
    let texts: Vec<String> = routes
        .iter()
        .map(|(_, Route { condition, sink, .. })| {
            format!("FROM /messages/* WHERE {condition} INTO BrokeredEndpoint('/modules/m/inputs/i{sink}')")
        })
        .collect();
    let specs = routes.iter().zip(&texts).map(|((name, route), text)| RouteSpec {
        name,
        text,
        priority: route.priority,
        time_to_live_secs: 0,
        upstream_target: None,
    });
    let (table, errors) = RouteTable::compile(specs, "edge");
    prop_assert!(errors.is_empty(), "{:?}", errors);
    let compile = |text: &str| Condition::compile(text).expect("it compiles in its route, too");
    let alone: HashMap<&str, Condition> =
        routes.iter().map(|(_, route)| (&*route.condition, compile(&route.condition))).collect();
    let plain = table.candidates(&MessageSource::Device).expect("a device has a path");
    let constant = [SystemProperty::ConnectionDeviceId, SystemProperty::ModelId];
    let source = MessageSource::Device;
    let folded = table.candidates_for(&source, &constant, &messages[0]).expect("a device has a path");
    // One for all messages, so that what one leaves behind would be seen by the next.
    let mut decision = Decision::new();
    for message in messages {
        let mut decide = |candidates| {
            table.decide(candidates, message, &mut decision);
            let names = decision.targets.iter().filter_map(|target| table.route_name(target.route));
            let mut found: Vec<String> = names.map(str::to_owned).collect();
            found.sort();
            (found, decision.undefined)
        };
        let found = decide(&plain);
        prop_assert_eq!(&decide(&folded), &found, "with constants, {:?}\n{:#?}", message, routes);
        let (winners, undefined) = expected(&routes, |condition| alone[condition].walk(message));
        prop_assert_eq!(found, (winners, undefined), "{:?}\n{:#?}", message, routes);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tables_decide_as_their_conditions_do_alone(
        routes in proptest::collection::vec(route(), 1..40),
        messages in proptest::collection::vec(message(), 1..8),
    ) {
        compare(&routes, &messages)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    /// Sets of routes that need several words.
    #[test]
    fn large_tables_decide_as_their_conditions_do_alone(
        conditions in proptest::collection::vec(condition(), 20),
        places in proptest::collection::vec((0..20_usize, 0..6_u8, 0..3_u32), 100..300),
        message in message(),
    ) {
        let route = |(condition, sink, priority): &(usize, u8, u32)| {
            Route { condition: conditions[*condition].clone(), sink: *sink, priority: *priority }
        };
        compare(&places.iter().map(route).collect::<Vec<_>>(), &[message])?;
    }
}
