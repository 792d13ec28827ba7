//! Decoding of what one read of a socket brings: PUBLISH frames to typed properties and body, nothing copied.

use std::hint::black_box;
use std::num::NonZeroU16;

use bytes::BytesMut;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use edgehub_benches::wire;
use edgehub_broker::head::mqtt::frame::Frame;
use edgehub_broker::head::mqtt::packet::{Packet, decode as decode_packet};
use edgehub_broker::head::mqtt::topic::{self, Inbound};
use edgehub_broker::identity::Identity;

/// Messages that one read brings.
const MESSAGES: u16 = 64;
const BODY_BYTES: usize = 256;

const TOPICS: [(&str, &str); 3] = [
    ("no properties", "devices/leaf1/messages/events/"),
    (
        "4 properties",
        "devices/leaf1/messages/events/%24.ct=application%2Fjson&%24.ce=utf-8&level=high&line=7",
    ),
    (
        "12 properties",
        "devices/leaf1/messages/events/%24.mid=42&%24.ct=application%2Fjson&%24.ce=utf-8&a=1&b=2&c=3&d=4&e=5&f=6\
         &g=seven%20words&h=8&i=nine",
    ),
];

fn decode(criterion: &mut Criterion) {
    let identity = Identity::device("leaf1").expect("a valid id");
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(u64::from(MESSAGES)));
    for (name, topic) in TOPICS {
        let mut wire = BytesMut::new();
        for id in (1..=MESSAGES).filter_map(NonZeroU16::new) {
            wire::publish(&mut wire, topic, Some(id.get()), BODY_BYTES, |out| {
                out.resize(out.len() + BODY_BYTES, b'x')
            });
        }
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(
                || wire.clone(),
                |buffer| {
                    let mut decoded = 0;
                    while let Some(frame) = Frame::take(buffer).expect("well formed") {
                        let Packet::Publish(publish) = decode_packet(frame).expect("well formed") else {
                            unreachable!("only PUBLISH frames were written")
                        };
                        let Inbound::Telemetry(properties) = topic::read(&identity, &publish.topic, &[])
                        else {
                            unreachable!("only telemetry was written")
                        };
                        black_box((properties, &publish.payload));
                        decoded += 1;
                    }
                    assert_eq!(decoded, MESSAGES);
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
