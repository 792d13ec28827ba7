//! Bytes written by hand: what is hostile, and what is at fault.

use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use edgehub_broker::amqp::encode::*;
use edgehub_broker::amqp::frame::{FrameKind, put_frame};
use edgehub_broker::amqp::*;

use super::peers::*;

fn nested_lists(levels: usize) -> Vec<u8> {
    let mut bytes = vec![0x45];
    for _ in 0..levels {
        let mut outer = vec![0xd0];
        outer.extend((4 + bytes.len() as u32).to_be_bytes());
        outer.extend(1u32.to_be_bytes());
        outer.extend(&bytes);
        bytes = outer;
    }
    bytes
}

#[test]
fn a1_nesting_does_not_reach_the_stack() {
    let mut raw = Raw::opened();
    let mut bytes = BytesMut::new();
    put_frame(&mut bytes, FrameKind::Amqp, 1, |out| {
        let mut list = CompoundWriter::described_list(out, 0x11);
        list.null();
        for value in [0, 1, 1] {
            put_uint(list.field(), value);
        }
        list.null().null().null();
        let mut map = CompoundWriter::map(list.field());
        map.entry(|out| put_symbol(out, "x"), |out| out.put_slice(&nested_lists(4_500)));
        map.finish();
        list.finish();
    });
    assert!(bytes.len() > 40_000);
    raw.feed(&bytes);
    assert_eq!(raw.close_condition(), Some(Condition::DECODE_ERROR));
    // The same as message annotations: the message is bad, not the connection.
    let mut payload = BytesMut::from(&[0x00, 0x53, 0x72][..]);
    payload.put_slice(&nested_lists(4_500));
    assert_eq!(Message::parse(&payload.freeze()), Err(WireError::TooDeep));
}

#[test]
fn a2_sizes_below_eight_and_above_the_limit() {
    for size in [0u32, 4, 5, 6, 7, 65_537, u32::MAX] {
        let mut raw = Raw::opened();
        let mut bytes = size.to_be_bytes().to_vec();
        bytes.extend([2, 0, 0, 0, 0, 0, 0, 0]);
        raw.feed(&bytes);
        assert_eq!(raw.close_condition(), Some(Condition::FRAMING_ERROR), "size {size}");
        assert!(raw.listener.is_finished());
    }
}

#[test]
fn a3_huge_disposition_ranges_cost_nothing() {
    let mut raw = Raw::with_link();
    let mut bytes = BytesMut::new();
    for role in [true, false] {
        put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
            let mut list = CompoundWriter::described_list(out, 0x15);
            put_bool(list.field(), role);
            put_uint(list.field(), 0);
            put_uint(list.field(), u32::MAX - 1);
            put_bool(list.field(), true);
            list.field().put_slice(&[0x00, 0x53, 0x24, 0x45]);
            list.finish();
        });
    }
    let started = Instant::now();
    for _ in 0..10_000 {
        assert!(raw.feed(&bytes).is_empty());
    }
    assert!(started.elapsed() < Duration::from_secs(10), "took {:?}", started.elapsed());
    assert!(!raw.listener.is_finished());
}

#[test]
fn a4_lengths_without_data() {
    for code in [0xb0u8, 0xb1, 0xb3, 0xd0, 0xd1, 0xf0] {
        let mut raw = Raw::opened();
        let mut bytes = BytesMut::new();
        put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
            out.put_slice(&[0x00, 0x53, 0x12, 0xc0, 9, 1, code, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0]);
        });
        raw.feed(&bytes);
        assert_eq!(raw.close_condition(), Some(Condition::DECODE_ERROR), "{code:02x}");
    }
}

#[test]
fn a5_a6_output_and_events_stop_the_reading() {
    let mut raw = Raw::with_link();
    // A peer that asks and asks, and never reads: every flow wants an answer.
    let mut bytes = BytesMut::new();
    put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
        let mut list = CompoundWriter::described_list(out, 0x13);
        for value in [1, 5_000, 1, 5_000] {
            put_uint(list.field(), value);
        }
        list.null().null().null().null().null();
        put_bool(list.field(), true);
        list.finish();
    });
    let mut fed = 0;
    while raw.listener.wants_input() && fed < 200_000 {
        assert!(raw.feed(&bytes).is_empty());
        raw.listener.output();
        fed += 1;
    }
    assert!(!raw.listener.wants_input(), "bounded");
    assert!(raw.listener.output().len() < 2 << 20);
    // Attach and detach over and over, with an owner that does not look at events.
    let mut raw = Raw::opened();
    let mut input = BytesMut::new();
    for _ in 0..10_000 {
        put_frame(&mut input, FrameKind::Amqp, 0, |out| {
            let mut list = CompoundWriter::described_list(out, 0x12);
            put_string(list.field(), "l");
            put_uint(list.field(), 0);
            put_bool(list.field(), false);
            list.finish();
        });
        put_frame(&mut input, FrameKind::Amqp, 0, |out| {
            let mut list = CompoundWriter::described_list(out, 0x16);
            put_uint(list.field(), 0);
            list.finish();
        });
    }
    raw.listener.receive(&mut input, raw.now);
    assert!(!raw.listener.wants_input() && !input.is_empty());
    let events = std::iter::from_fn(|| raw.listener.poll_event()).count();
    assert!((4_000..5_000).contains(&events), "{events}");
}

#[test]
fn a7_extended_headers_are_skipped() {
    let mut raw = Raw::with_link();
    let mut body = BytesMut::new();
    body.put_slice(&[0x00, 0x53, 0x14, 0xc0, 6, 3, 0x43, 0x43, 0xa0, 1, 9]);
    body.put_slice(b"payload");
    let mut frame = BytesMut::new();
    frame.put_u32(16 + body.len() as u32);
    frame.put_slice(&[4, 0, 0, 0]);
    frame.put_slice(&[0xee; 8]);
    frame.put_slice(&body);
    match &raw.feed(&frame)[..] {
        [Event::Delivery(delivery)] => assert_eq!(delivery.payload[..], b"payload"[..]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn transfers_without_credit_or_beyond_the_size_detach_the_link() {
    let transfer = |id: u32, size: usize, more: bool| {
        let mut bytes = BytesMut::new();
        put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
            let mut list = CompoundWriter::described_list(out, 0x14);
            put_uint(list.field(), 0);
            put_uint(list.field(), id);
            put_binary(list.field(), &[1]);
            list.null().null();
            put_bool(list.field(), more);
            list.finish();
            out.put_bytes(7, size);
        });
        bytes
    };
    let condition = |events: Vec<Event>| match events.last() {
        Some(Event::Detached { error: Some(error), by: By::Engine, .. }) => Some(error.condition.clone()),
        _ => None,
    };
    let mut raw = Raw::with_link();
    let _ = raw.written();
    for id in 0..10 {
        assert_eq!(raw.feed(&transfer(id, 5, false)).len(), 1);
    }
    assert_eq!(condition(raw.feed(&transfer(10, 5, false))), Some(Condition::TRANSFER_LIMIT_EXCEEDED));
    assert!(raw.feed(&transfer(11, 5, false)).is_empty(), "ignored until the peer detaches");
    assert!(!raw.listener.is_finished());

    let mut raw = Raw::with_link();
    let _ = raw.written();
    let mut events = Vec::new();
    for _ in 0..20 {
        events.extend(raw.feed(&transfer(0, 60_000, true)));
    }
    assert_eq!(condition(events), Some(Condition::MESSAGE_SIZE_EXCEEDED));
}

#[test]
fn sasl_and_headers() {
    let init = |mechanism: &str, response: Option<&[u8]>| {
        let mut bytes = BytesMut::from(&HEADER_SASL[..]);
        put_frame(&mut bytes, FrameKind::Sasl, 0, |out| {
            let mut list = CompoundWriter::described_list(out, 0x41);
            put_symbol(list.field(), mechanism);
            list.optional(response, put_binary);
            list.finish();
        });
        bytes
    };
    let code = |raw: &mut Raw| raw.written().last().copied();
    for (mechanism, response, expected) in [
        ("ANONYMOUS", None, 0),
        ("MSSBCBS", Some(&b""[..]), 0),
        ("EXTERNAL", None, 2),
        ("PLAIN", None, 1),
        ("PLAIN", Some(&b"user"[..]), 1),
        ("PLAIN", Some(&b"\0\0password"[..]), 1),
        ("PLAIN", Some(&b"\0us\xffer\0password"[..]), 1),
    ] {
        let mut raw = Raw::new();
        raw.feed(&init(mechanism, response));
        assert_eq!(code(&mut raw), Some(expected), "{mechanism}");
        assert_eq!(raw.listener.is_finished(), expected != 0);
    }
    let mut raw = Raw::new();
    match &raw.feed(&init("PLAIN", Some(b"x\0d1@sas.hub1\0secret")))[..] {
        [Event::SaslPlain { user, password }] => {
            assert_eq!((user.as_str(), password.expose()), ("d1@sas.hub1", "secret"));
            assert!(!format!("{password:?}").contains("secret"));
        }
        other => panic!("{other:?}"),
    }
    assert!(!raw.listener.wants_input());
    let written = raw.written();
    assert_eq!(written[..8], HEADER_SASL);
    assert!(written.ends_with(b"\x09ANONYMOUS\x07MSSBCBS\x05PLAIN"));
    raw.listener.sasl_outcome(SaslCode::Ok);
    assert!(raw.listener.wants_input());
    raw.feed(&HEADER_AMQP);
    assert!(raw.written().ends_with(&HEADER_AMQP));
    // A second SASL header is one too many.
    let mut raw = Raw::new();
    raw.feed(&init("ANONYMOUS", None));
    raw.feed(&HEADER_SASL);
    assert!(raw.listener.is_finished());
    // Another protocol gets our header and nothing else.
    let mut raw = Raw::new();
    raw.feed(b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(raw.written()[..], HEADER_SASL);
    assert!(raw.listener.is_finished());
}

#[test]
fn credit_before_the_attach_is_answered_counts() {
    let mut raw = Raw::opened();
    let mut bytes = BytesMut::new();
    put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
        let mut list = CompoundWriter::described_list(out, 0x12);
        put_string(list.field(), "eager");
        put_uint(list.field(), 0);
        put_bool(list.field(), true);
        list.finish();
    });
    put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
        let mut list = CompoundWriter::described_list(out, 0x13);
        for value in [1, 5_000, 1, 5_000, 0, 0, 7] {
            put_uint(list.field(), value);
        }
        list.finish();
    });
    let events = raw.feed(&bytes);
    let [Event::AttachRequested(request)] = &events[..] else { panic!("{events:?}") };
    assert_eq!(raw.listener.credit(request.link), 0);
    assert!(raw.listener.accept_attach(request.link, answer_all(request).expect("always")));
    assert!(matches!(raw.listener.poll_event(), Some(Event::CreditChanged { credit: 7, drain: false, .. })));
    assert_eq!(raw.listener.credit(request.link), 7);
}

/// A transfer of one byte on handle `handle`.
fn small_transfer(handle: u32, id: Option<u32>, more: bool, aborted: bool) -> BytesMut {
    let mut bytes = BytesMut::new();
    put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
        let mut list = CompoundWriter::described_list(out, 0x14);
        put_uint(list.field(), handle);
        list.optional(id, put_uint);
        list.null().null().null();
        put_bool(list.field(), more);
        list.null().null().null();
        put_bool(list.field(), aborted);
        list.finish();
        out.put_u8(b'x');
    });
    bytes
}

#[test]
fn aborted_deliveries_leave_nothing_behind() {
    let mut raw = Raw::with_link();
    assert!(raw.feed(&small_transfer(0, Some(0), true, false)).is_empty());
    assert!(raw.feed(&small_transfer(0, None, true, false)).is_empty());
    assert!(raw.feed(&small_transfer(0, None, false, true)).is_empty());
    assert!(raw.feed(&small_transfer(0, Some(1), true, false)).is_empty());
    match &raw.feed(&small_transfer(0, Some(1), false, false))[..] {
        [Event::Delivery(delivery)] => assert_eq!(delivery.payload[..], b"xx"[..]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn faults_end_what_they_concern() {
    let ended = |events: Vec<Event>| match events.last() {
        Some(Event::SessionEnded { error: Some(error), by: By::Engine, .. }) => Some(error.condition.clone()),
        _ => None,
    };
    let mut raw = Raw::with_link();
    assert_eq!(
        ended(raw.feed(&small_transfer(5, Some(0), false, false))),
        Some(Condition::UNATTACHED_HANDLE)
    );
    assert!(!raw.listener.is_finished());

    let mut raw = Raw::with_link();
    assert_eq!(raw.feed(&small_transfer(0, Some(7), false, false)).len(), 1);
    assert_eq!(ended(raw.feed(&small_transfer(0, Some(7), false, false))), Some(Condition::INVALID_FIELD));

    // Frames on a channel without a session end the connection.
    let mut raw = Raw::opened();
    let mut stray = small_transfer(0, Some(0), false, false);
    stray[7] = 9;
    raw.feed(&stray);
    assert_eq!(raw.close_condition(), Some(Condition::NOT_ALLOWED));
}

#[test]
fn windows_are_enforced() {
    let mut raw = Raw::with_options(Options { incoming_window: 2, ..Options::default() }).open().attach();
    // Two in flight are allowed; the third comes before the listener could write its flow.
    let mut burst = BytesMut::new();
    for id in 0..3 {
        burst.extend_from_slice(&small_transfer(0, Some(id), false, false));
    }
    match raw.feed(&burst).last() {
        Some(Event::SessionEnded { error: Some(error), .. }) => {
            assert_eq!(error.condition, Condition::WINDOW_VIOLATION);
        }
        other => panic!("{other:?}"),
    }
}
