//! Bytes into a listening AMQP connection whose owner accepts whatever is asked for.
#![no_main]

use std::time::Instant;

use bytes::{Buf, BytesMut};
use edgehub_broker::amqp::{AttachAnswer, Connection, Event, Options, Outcome, SaslCode, parse_batch};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let now = Instant::now();
    let mut connection = Connection::listener(Options::default(), now);
    let mut input = BytesMut::from(data);
    for _ in 0..64 {
        connection.receive(&mut input, now);
        while let Some(event) = connection.poll_event() {
            match event {
                Event::SaslPlain { .. } => connection.sasl_outcome(SaslCode::Ok),
                Event::AttachRequested(request) => {
                    let answer = AttachAnswer {
                        snd_settle: None,
                        rcv_settle: None,
                        max_message_bytes: 1 << 20,
                        credit: 100,
                        properties: Vec::new(),
                    };
                    connection.accept_attach(request.link, answer);
                }
                Event::Delivery(delivery) => {
                    let _ = parse_batch(delivery.format, &delivery.payload);
                    connection.settle(delivery.id, Outcome::Accepted);
                }
                _ => {}
            }
        }
        let output = connection.output();
        let written = output.remaining();
        output.advance(written);
        connection.written(now);
        if input.is_empty() || connection.is_finished() {
            return;
        }
    }
});
