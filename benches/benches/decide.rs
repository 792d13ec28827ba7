//! The decision where a message goes, by kind of condition and number of routes.
//!
//! Before each case is timed, what it allocates is counted over many decisions, printed, and held to nothing. Beside it
//! runs the plain evaluation of the same conditions, which walks their trees.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use edgehub_routing::{
    Condition, DEFAULT_PRIORITY, Decision, MessageSource, MessageView, PropertyName, RouteSpec, RouteTable,
    SystemProperty, Text, Truth,
};

/// A telemetry message as a gateway module sends it: four properties, and 850 bytes of JSON.
struct Message {
    properties: [(&'static str, &'static str); 4],
    json: bool,
}

const BODY: &[u8] = br#"{"machine":{"name":"press-7","line":"north","serial":"PX-200-0187","firmware":"4.12.1","state":"running"},"timestamp":"2026-01-31T12:00:00.1234567Z","sequence":184467,"readings":[{"sensor":"bearing-front","temperature":61.25,"vibration":[0.012,0.031,0.027]},{"sensor":"bearing-rear","temperature":58.5,"vibration":[0.014,0.029,0.033]},{"sensor":"gearbox","temperature":71.75,"vibration":[0.041,0.044,0.038]}],"hydraulics":{"pressure":212.5,"flow":14.75,"oil":{"temperature":48.25,"level":0.83,"filter":"ok"}},"ambient":{"temperature":21.25,"humidity":40,"note":"hall 3, gate \"B\""},"counters":{"strokes":1284467,"rejects":212,"uptime_secs":864023,"starts":17},"alarms":[{"code":"E-104","text":"guard door opened","active":false},{"code":"W-021","text":"filter change due","active":true}],"operator":null,"shift":"early","temperature":31.5,"humidity":44.5}"#;

impl MessageView for Message {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        let found = self.properties.iter().find(|(known, _)| name.matches(known));
        found.map_or(Text::Undefined, |(_, value)| Text::Text(value))
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        match name.system() {
            Some(SystemProperty::ContentType) if self.json => Text::Text("application/json"),
            Some(SystemProperty::ContentEncoding) if self.json => Text::Text("utf-8"),
            Some(SystemProperty::ConnectionDeviceId) => Text::Text("edge1"),
            Some(SystemProperty::ConnectionModuleId) => Text::Text("press"),
            Some(SystemProperty::OutputName) => Text::Text("out"),
            _ => Text::Undefined,
        }
    }

    fn body(&self) -> &[u8] {
        BODY
    }

    fn property_places(&self) -> Option<usize> {
        Some(self.properties.len())
    }

    fn property_at(&self, place: usize) -> Option<(&str, Text<'_>)> {
        self.properties.get(place).map(|(name, value)| (*name, Text::Text(value)))
    }
}

const MESSAGE: Message = Message {
    properties: [("level", "v17"), ("site", "north"), ("schema", "telemetry-2"), ("rpm", "1450")],
    json: true,
};

/// One set of routes, and how many of them a message of `press` matches.
struct Case {
    name: &'static str,
    source: &'static str,
    conditions: Vec<String>,
    message: Message,
    matches: usize,
}

/// What the routes of a case compare, in turn.
fn property_condition(n: usize) -> String {
    match n % 5 {
        0..3 => format!("level = 'v{n}'"),
        3 => format!("as_number(rpm) > {}", n * 50),
        _ => format!("site < 'p{n}'"),
    }
}

fn cases() -> Vec<Case> {
    let case = |name, conditions: Vec<String>, matches| Case {
        name,
        source: "/messages/*",
        conditions,
        message: MESSAGE,
        matches,
    };
    let many = |count: usize, condition: &dyn Fn(usize) -> String| (0..count).map(condition).collect();
    let elsewhere = Case {
        source: "/messages/modules/drill/*",
        ..case("100 routes of other sources", many(100, &|n| format!("level = 'v{n}'")), 0)
    };
    let silent = Case {
        message: Message { json: false, ..MESSAGE },
        ..case("1 route with the body, no content type", many(1, &|_| "$body.temperature > 30".into()), 0)
    };
    vec![
        case("1 route without a condition", vec![String::new()], 1),
        elsewhere,
        case("1 route with a property", many(1, &|_| "level = 'v17'".into()), 1),
        case("10 routes with a property", many(10, &property_condition), 4),
        case("100 routes with a property", many(100, &property_condition), 27),
        case("100 routes, one value each", many(100, &|n| format!("level = 'v{n}'")), 1),
        case("100 routes, one property each", many(100, &|n| format!("p{n} = 'x' OR p{n} = 'y'")), 0),
        case(
            "100 routes with two properties",
            many(100, &|n| format!("site = 'north' AND level = 'v{n}'")),
            1,
        ),
        case("1 route with the body", many(1, &|_| "$body.temperature > 30".into()), 1),
        case("100 routes with the body", many(100, &|n| format!("$body.temperature > {n}")), 32),
        case("100 routes, one path each", many(100, &|n| format!("$body.v{n} < {n}")), 0),
        case(
            "100 routes, property and body",
            many(100, &|n| format!("level = 'v17' AND $body.temperature > {n}")),
            32,
        ),
        silent,
    ]
}

fn table(case: &Case) -> RouteTable {
    let route = |n: usize, condition: &String| {
        let filter = if condition.is_empty() { String::new() } else { format!("WHERE {condition}") };
        let text =
            format!("FROM {} {filter} INTO BrokeredEndpoint(\"/modules/m{n}/inputs/in1\")", case.source);
        (format!("r{n}"), text)
    };
    let texts: Vec<_> =
        case.conditions.iter().enumerate().map(|(n, condition)| route(n, condition)).collect();
    let specs = texts.iter().map(|(name, text)| RouteSpec {
        name,
        text,
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        upstream_target: None,
    });
    let (table, errors) = RouteTable::compile(specs, "edge1");
    assert!(errors.is_empty(), "{errors:?}");
    table
}

fn condition(text: &str) -> Option<Condition> {
    (!text.is_empty()).then(|| Condition::compile(text).expect("the table took it"))
}

fn decide(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide");
    group.throughput(Throughput::Elements(1));
    for case in cases() {
        let table = table(&case);
        let press = MessageSource::Module { module: "press", output: Some("out") };
        let candidates = table.candidates(&press).expect("a sender with a name");
        let mut decision = Decision::new();
        table.decide(&candidates, &case.message, &mut decision);
        assert_eq!(decision.targets.len(), case.matches, "{}", case.name);

        const DECISIONS: u64 = 1000;
        let counted = allocation_counter::measure(|| {
            for _ in 0..DECISIONS {
                table.decide(&candidates, black_box(&case.message), &mut decision);
            }
        });
        println!("{}: {} allocations in {DECISIONS} decisions", case.name, counted.count_total);
        assert_eq!(counted.count_total, 0, "{} allocates", case.name);

        group.bench_function(case.name, |bencher| {
            bencher.iter(|| table.decide(&candidates, black_box(&case.message), &mut decision));
        });
        // The same conditions, one after the other, by walking their trees.
        let trees: Vec<Condition> = case.conditions.iter().filter_map(|text| condition(text)).collect();
        if !candidates.is_empty() && !trees.is_empty() {
            group.bench_function(format!("{}, walked", case.name), |bencher| {
                bencher.iter(|| {
                    let message = black_box(&case.message);
                    trees.iter().filter(|tree| tree.walk(message) == Truth::True).count()
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, decide);
criterion_main!(benches);
