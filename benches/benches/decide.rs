//! The decision where a message goes, by kind of condition and number of routes.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use edgehub_routing::{
    DEFAULT_PRIORITY, Decision, MessageSource, MessageView, PropertyName, RouteSpec, RouteTable, Text,
};

/// A message with one property and a JSON body.
struct Message;

const BODY: &[u8] = br#"{"machine":{"name":"press-7","temperature":31.5,"parts":[1,2,3,4]},"ambient":{"temperature":21.25,"humidity":40},"at":"2026-01-31T12:00:00Z"}"#;

impl MessageView for Message {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        if name.matches("level") { Text::Text("high") } else { Text::Undefined }
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        if name.matches("contentType") {
            Text::Text("application/json")
        } else if name.matches("contentEncoding") {
            Text::Text("utf-8")
        } else {
            Text::Undefined
        }
    }

    fn body(&self) -> &[u8] {
        BODY
    }
}

fn decide(criterion: &mut Criterion) {
    let upstream = |condition: &str| format!("FROM /messages/modules/press/* {condition} INTO $upstream");
    let to_module = |n: usize, condition: &str| {
        format!("FROM /messages/* {condition} INTO BrokeredEndpoint(\"/modules/m{n}/inputs/in1\")")
    };
    let body = "WHERE $body.machine.temperature > 30";
    let cases: [(&str, Vec<String>); 6] = [
        ("no condition", vec![upstream("")]),
        ("property", vec![upstream("WHERE level = 'high'")]),
        ("body", vec![upstream(body)]),
        ("property and body", vec![upstream("WHERE level = 'high' AND $body.ambient.humidity < 50")]),
        ("10 routes with properties", (0..10).map(|n| to_module(n, "WHERE level = 'high'")).collect()),
        ("10 routes with the body", (0..10).map(|n| to_module(n, body)).collect()),
    ];
    let mut group = criterion.benchmark_group("decide");
    group.throughput(Throughput::Elements(1));
    for (name, texts) in &cases {
        let names: Vec<String> = (0..texts.len()).map(|n| format!("r{n}")).collect();
        let specs = names.iter().zip(texts).map(|(name, text)| RouteSpec {
            name,
            text,
            priority: DEFAULT_PRIORITY,
            time_to_live_secs: 0,
        });
        let (table, errors) = RouteTable::compile(specs, "edge1");
        assert!(errors.is_empty(), "{errors:?}");
        let press = MessageSource::Module { module: "press", output: Some("out") };
        let candidates = table.candidates(&press).expect("a sender with a name");
        let mut decision = Decision::new();
        group.bench_function(*name, |bencher| {
            bencher.iter(|| {
                table.decide(&candidates, black_box(&Message), &mut decision);
                assert_eq!(decision.targets.len(), texts.len());
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decide);
criterion_main!(benches);
