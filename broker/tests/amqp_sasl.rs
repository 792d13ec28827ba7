//! SASL as the end that dials, against the engine's own listener and against a peer that does something else.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use bytes::{Buf, BufMut, BytesMut};
use edgehub_broker::amqp::{
    By, ClientSasl, Connection, Error, Event, HEADER_AMQP, Options, SaslCode, Secret,
};

fn client(sasl: ClientSasl) -> Connection {
    let options = Options { sasl: Some(sasl), hostname: Some("broker1".into()), ..Options::default() };
    Connection::client(options, Instant::now())
}

fn plain(password: &str) -> ClientSasl {
    ClientSasl::Plain { user: "hub".into(), password: Secret::new(password.into()) }
}

/// Moves what one end has written to the other.
fn pass(from: &mut Connection, to: &mut Connection) -> bool {
    let mut moved = BytesMut::new();
    moved.put(&mut *from.output());
    from.written(Instant::now());
    let any = moved.has_remaining();
    to.receive(&mut moved, Instant::now());
    any
}

/// The events of the client after both ends are quiet; the listener lets in who has the password `right`.
fn meet(sasl: ClientSasl) -> Vec<Event> {
    let (mut client, mut listener) = (client(sasl), Connection::listener(Options::default(), Instant::now()));
    let mut events = Vec::new();
    while pass(&mut client, &mut listener) | pass(&mut listener, &mut client) {
        while let Some(event) = listener.poll_event() {
            if let Event::SaslPlain { user, password } = event {
                let known = user == "hub" && password.expose() == "right";
                listener.sasl_outcome(if known { SaslCode::Ok } else { SaslCode::Auth });
            }
        }
        events.extend(std::iter::from_fn(|| client.poll_event()));
    }
    events
}

fn refusal(events: &[Event]) -> &Error {
    match events {
        [Event::Closed { error: Some(error), by: By::Engine, .. }] => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_client_is_let_in_by_its_password_or_as_nobody() {
    for sasl in [plain("right"), ClientSasl::Anonymous] {
        let events = meet(sasl);
        assert!(matches!(events[..], [Event::Opened(_)]), "{events:?}");
    }
}

#[test]
fn a_wrong_password_ends_the_connection_and_is_not_repeated() {
    let events = meet(plain("planted"));
    let error = refusal(&events);
    assert_eq!(error.condition.as_str(), "amqp:unauthorized-access");
    assert!(error.to_string().contains("user name or password"), "{error}");
    assert!(!format!("{events:?}").contains("planted"));
}

#[test]
fn a_peer_without_sasl_gets_no_password() {
    let mut client = client(plain("planted"));
    client.receive(&mut BytesMut::from(&HEADER_AMQP[..]), Instant::now());
    let events: Vec<Event> = std::iter::from_fn(|| client.poll_event()).collect();
    assert_eq!(refusal(&events).condition.as_str(), "amqp:unauthorized-access");
    let mut written = BytesMut::new();
    written.put(&mut *client.output());
    assert!(!written.windows(7).any(|window| window == b"planted"));
}

#[test]
fn a_mechanism_that_is_not_offered_is_named() {
    let mut client = client(ClientSasl::External);
    let mechanisms =
        b"AMQP\x03\x01\0\0\0\0\0\x1a\x02\x01\0\0\0\x53\x40\xc0\x0d\x01\xe0\x0a\x01\xa3\x07ANOTHER";
    let mut bytes = BytesMut::from(&mechanisms[..]);
    bytes[11] = (mechanisms.len() - 8) as u8;
    client.receive(&mut bytes, Instant::now());
    let events: Vec<Event> = std::iter::from_fn(|| client.poll_event()).collect();
    let text = refusal(&events).to_string();
    assert!(text.contains("EXTERNAL") && text.contains("ANOTHER"), "{text}");
}

#[test]
fn frames_out_of_turn_end_it() {
    // An outcome before the mechanisms, and a challenge.
    for frame in [
        &b"AMQP\x03\x01\0\0\0\0\0\x10\x02\x01\0\0\0\x53\x44\xc0\x03\x01\x50\x00"[..],
        &b"AMQP\x03\x01\0\0\0\0\0\x10\x02\x01\0\0\0\x53\x42\xc0\x03\x01\xa0\x00"[..],
    ] {
        let mut client = client(ClientSasl::Anonymous);
        client.receive(&mut BytesMut::from(frame), Instant::now());
        let events: Vec<Event> = std::iter::from_fn(|| client.poll_event()).collect();
        refusal(&events);
    }
}
