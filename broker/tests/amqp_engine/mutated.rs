//! Recorded conversations with random changes.

use std::time::Instant;

use bytes::{Buf, BytesMut};
use edgehub_broker::amqp::*;

use super::peers::*;

#[test]
fn random_mutations_of_a_conversation_never_panic() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    // What a client says in a short life.
    let now = Instant::now();
    let conversation = {
        let mut client = Connection::client(Options::default(), now);
        let mut listener = Connection::listener(Options::default(), now);
        let (mut all, mut to_client) = (BytesMut::new(), BytesMut::new());
        let mut session = None;
        for step in 0..12 {
            while let Some(event) = client.poll_event() {
                if let Event::Opened(_) = event {
                    session = client.begin();
                }
                if let Event::Attached { link, .. } = event {
                    let _ = client.send(link, payload("hello"), SendOptions::default());
                }
            }
            if let (3, Some(session)) = (step, session) {
                client.attach(session, options("a", Role::Sender)).expect("room");
                client.attach(session, options("b", Role::Receiver)).expect("room");
            }
            let mut said = BytesMut::new();
            drain(&mut client, &mut said, now);
            all.extend_from_slice(&said);
            listener.receive(&mut said, now);
            while let Some(event) = listener.poll_event() {
                if let Event::AttachRequested(request) = event {
                    listener.accept_attach(request.link, answer_all(&request).expect("always"));
                }
            }
            drain(&mut listener, &mut to_client, now);
            client.receive(&mut to_client, now);
        }
        all
    };
    assert!(conversation.len() > 300);
    for _ in 0..20_000 {
        let mut bytes = conversation.clone();
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(8..bytes.len());
            bytes[at] = match rng.u8(..) {
                0..128 => rng.u8(..),
                128..192 => bytes[at].wrapping_add(1),
                _ => 0xff,
            };
        }
        let mut listener = Connection::listener(Options::default(), now);
        let mut input = BytesMut::new();
        while !bytes.is_empty() {
            let cut = rng.usize(1..=bytes.len());
            input.extend_from_slice(&bytes.split_to(cut));
            listener.receive(&mut input, now);
            while let Some(event) = listener.poll_event() {
                match event {
                    Event::AttachRequested(request) => {
                        listener.accept_attach(request.link, answer_all(&request).expect("always"));
                        let _ = listener.send(request.link, payload("x"), SendOptions::default());
                    }
                    Event::Delivery(delivery) => {
                        let _ = parse_batch(delivery.format, &delivery.payload);
                        listener.settle(delivery.id, Outcome::Accepted);
                    }
                    _ => {}
                }
            }
            let output = listener.output();
            let len = output.remaining();
            output.advance(len);
            listener.written(now);
        }
    }
}
