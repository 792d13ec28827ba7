//! The compilation of a route table: a thousand routes of the kinds that deployments have.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use edgehub_routing::{DEFAULT_PRIORITY, RouteSpec, RouteTable};

const ROUTES: usize = 1000;

fn condition(n: usize) -> String {
    match n % 5 {
        0 => format!("level = 'v{n}'"),
        1 => format!("$body.machine.temperature >= {n}.5 AND site = 's{}'", n % 40),
        2 => format!("as_number(rpm) > {n} OR NOT starts_with(lower(kind), 'k{n}')"),
        3 => format!("$connectionDeviceId = 'device-{n}' AND (p{n} = 'a' OR p{n} = 'b')"),
        _ => format!("$body.readings[{}].value * 2 < {n} AND is_defined($body.readings[0].unit)", n % 7),
    }
}

fn compile(criterion: &mut Criterion) {
    let texts: Vec<_> = (0..ROUTES)
        .map(|n| {
            let text = format!(
                "FROM /messages/modules/m{}/* WHERE {} INTO BrokeredEndpoint(\"/modules/m{}/inputs/in1\")",
                n % 50,
                condition(n),
                n % 100
            );
            (format!("route-{n}"), text)
        })
        .collect();
    let mut group = criterion.benchmark_group("compile");
    group.sample_size(20).throughput(Throughput::Elements(ROUTES as u64));
    group.bench_function("1000 routes", |bencher| {
        bencher.iter(|| {
            let specs = texts.iter().map(|(name, text)| RouteSpec {
                name,
                text,
                priority: DEFAULT_PRIORITY,
                time_to_live_secs: 0,
                upstream_target: None,
            });
            let (table, errors) = RouteTable::compile(black_box(specs), "edge1");
            assert!(errors.is_empty(), "{errors:?}");
            table
        });
    });
    group.finish();
}

criterion_group!(benches, compile);
criterion_main!(benches);
