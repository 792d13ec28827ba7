//! Both ends of a conversation are the engine.

use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use edgehub_broker::amqp::encode::*;
use edgehub_broker::amqp::frame::{FrameKind, put_frame};
use edgehub_broker::amqp::performative::Performative;
use edgehub_broker::amqp::*;

use super::peers::*;

#[test]
fn sends_and_settles_in_ranges() {
    for seed in 0..20 {
        let (mut pair, session) = Pair::new(seed).open();
        let (link, _) = pair.attach(session, "TelemetrySenderLink", Role::Sender);
        assert_eq!(pair.client.credit(link), 1_000);
        let mut sent = Vec::new();
        for n in 0..500u32 {
            let body = Bytes::from(vec![n as u8; 1 + (n as usize * 7) % 300]);
            sent.push(pair.client.send(link, payload(body), SendOptions::default()).expect("credit"));
        }
        pair.run();
        let deliveries = pair.deliveries();
        assert_eq!(deliveries.len(), 500);
        pair.forget_frames();
        for (n, delivery) in deliveries.iter().enumerate() {
            assert_eq!(delivery.payload, vec![n as u8; 1 + (n * 7) % 300]);
            assert_eq!(delivery.tag.as_ref().expect("tag").as_bytes().len(), 16);
            assert!(!delivery.settled);
            assert!(pair.listener.settle(delivery.id, Outcome::Accepted));
            assert!(!pair.listener.settle(delivery.id, Outcome::Accepted));
        }
        pair.run();
        let settled: Vec<_> = pair
            .client_events
            .iter()
            .filter_map(|event| match event {
                Event::Settled { delivery, outcome, .. } => Some((*delivery, outcome.clone())),
                _ => None,
            })
            .collect();
        assert_eq!(settled, sent.iter().map(|id| (*id, Outcome::Accepted)).collect::<Vec<_>>());
        // One disposition for all, one flow for the credit.
        let kinds: Vec<_> = pair.frames_to_client.iter().map(std::mem::discriminant).collect();
        assert_eq!(kinds.len(), 2, "{:?}", pair.frames_to_client);
        assert_eq!(pair.client.credit(link), 1_000);
    }
}

#[test]
fn what_was_received_is_settled_before_what_is_sent_after_it() {
    for seed in 0..20 {
        let (mut pair, session) = Pair::new(seed).open();
        let (up, _) = pair.attach(session, "requests", Role::Sender);
        let (_, down) = pair.attach(session, "answers", Role::Receiver);
        for _ in 0..3 {
            pair.client.send(up, payload("request"), SendOptions::default()).expect("credit");
        }
        pair.run();
        pair.forget_frames();
        let requests = pair.deliveries();
        for request in &requests[..2] {
            assert!(pair.listener.settle(request.id, Outcome::Accepted));
        }
        for _ in 0..2 {
            pair.listener.send(down, payload("answer"), SendOptions::default()).expect("credit");
        }
        assert!(pair.listener.settle(requests[2].id, Outcome::Accepted));
        pair.run();
        let settled = |frame: &Performative| match frame {
            Performative::Disposition(disposition) => Some((disposition.first, disposition.last)),
            _ => None,
        };
        let frames = &pair.frames_to_client;
        // Those before the answers are settled together, and that once.
        let (first, last) = settled(&frames[0]).expect("a disposition");
        assert_eq!(last, first + 1, "{frames:?}");
        assert!(
            matches!(frames[1..3], [Performative::Transfer(..), Performative::Transfer(..)]),
            "{frames:?}"
        );
        assert_eq!(settled(&frames[3]), Some((first + 2, first + 2)), "{frames:?}");
        assert_eq!(frames[4..].iter().filter_map(settled).count(), 0, "{frames:?}");
    }
}

#[test]
fn large_messages_in_both_directions_respect_frame_sizes() {
    for seed in 0..10 {
        let (mut pair, session) = Pair::new(seed).open();
        let (up, _) = pair.attach(session, "up", Role::Sender);
        let (_, down) = pair.attach(session, "down", Role::Receiver);
        let sizes = [0usize, 1, 65_000, 65_536, 70_000, 262_144, 1 << 20];
        let bodies: Vec<Bytes> = sizes.iter().map(|size| (0..*size).map(|n| n as u8).collect()).collect();
        for body in &bodies {
            let head = Bytes::from_static(b"head");
            let pieces = Payload::from_iter([head, body.slice(..body.len().min((1 << 20) - 4))]);
            pair.client.send(up, pieces.clone(), SendOptions::default()).expect("credit");
            pair.run(); // a megabyte of output stops the next
            pair.listener
                .send(down, pieces, SendOptions { settled: true, ..Default::default() })
                .expect("credit");
            pair.run();
        }
        let received = pair.deliveries();
        for (delivery, body) in received.iter().zip(&bodies) {
            assert_eq!(delivery.payload[..4], b"head"[..]);
            assert_eq!(delivery.payload[4..], body[..body.len().min((1 << 20) - 4)]);
        }
        let down: Vec<_> =
            pair.client_events.iter().filter(|event| matches!(event, Event::Delivery(_))).collect();
        assert_eq!((received.len(), down.len()), (sizes.len(), sizes.len()));
        assert_eq!(
            pair.client.send(up, payload(vec![0; (1 << 20) + 1]), SendOptions::default()),
            Err(SendError::TooLarge { limit_bytes: 1 << 20 })
        );
    }
}

#[test]
fn credit_is_obeyed_and_renewed() {
    let (mut pair, session) = Pair::new(1).open();
    pair.answer = |request| answer_all(request).map(|answer| AttachAnswer { credit: 3, ..answer });
    let (link, _) = pair.attach(session, "a", Role::Sender);
    for _ in 0..3 {
        pair.client.send(link, payload("x"), SendOptions::default()).expect("credit");
    }
    assert_eq!(pair.client.send(link, payload("x"), SendOptions::default()), Err(SendError::NoCredit));
    pair.run();
    let deliveries = pair.deliveries();
    pair.listener.settle(deliveries[0].id, Outcome::Released);
    pair.run();
    assert_eq!(pair.client.credit(link), 0, "two thirds are not settled yet");
    pair.client_events.clear();
    pair.listener.settle(deliveries[1].id, Outcome::Accepted);
    pair.run();
    assert_eq!(pair.client.credit(link), 2);
    assert!(pair.client_events.iter().any(|event| matches!(event, Event::CreditChanged { credit: 2, .. })));
}

#[test]
fn windows_are_replenished_and_waited_for() {
    let listener = Options { incoming_window: 4, ..Options::default() };
    let (mut pair, session) = Pair::with_options(7, Options::default(), listener).open();
    let (link, _) = pair.attach(session, "a", Role::Sender);
    // Sixteen frames through a window of four.
    let body: Bytes = (0..1_000_000u32).map(|n| n as u8).collect();
    pair.client.send(link, payload(body.clone()), SendOptions::default()).expect("credit");
    assert_eq!(pair.client.send(link, payload("x"), SendOptions::default()), Err(SendError::NoWindow));
    pair.run();
    assert!(pair.client_events.iter().any(|event| matches!(event, Event::WindowOpened { .. })));
    pair.client.send(link, payload("x"), SendOptions::default()).expect("window");
    pair.run();
    let deliveries = pair.deliveries();
    assert_eq!((deliveries.len(), &deliveries[0].payload), (2, &body));
}

#[test]
fn drain_and_echo_are_answered() {
    let (mut pair, session) = Pair::new(3).open();
    let (_, theirs) = pair.attach(session, "in", Role::Receiver);
    assert_eq!(pair.listener.credit(theirs), 50);
    // The engine offers no drain of its own: speak for the client.
    let mut raw = BytesMut::new();
    put_frame(&mut raw, FrameKind::Amqp, 0, |out| {
        let mut list = CompoundWriter::described_list(out, 0x13);
        for value in [1, 5_000, 1, 5_000, 0, 0, 50] {
            put_uint(list.field(), value);
        }
        list.null();
        put_bool(list.field(), true);
        list.finish();
    });
    pair.forget_frames();
    pair.listener.receive(&mut raw, pair.now);
    pair.run();
    assert_eq!(pair.listener.credit(theirs), 0);
    let flow = pair.frames_to_client.iter().find_map(|frame| match frame {
        Performative::Flow(flow) => Some(*flow),
        _ => None,
    });
    let flow = flow.expect("answered");
    assert_eq!((flow.link_credit, flow.delivery_count, flow.drain), (Some(0), Some(50), true));

    put_frame(&mut raw, FrameKind::Amqp, 0, |out| {
        let mut list = CompoundWriter::described_list(out, 0x13);
        for value in [1, 5_000, 1, 5_000] {
            put_uint(list.field(), value);
        }
        list.null().null().null().null().null();
        put_bool(list.field(), true);
        list.finish();
    });
    pair.forget_frames();
    pair.listener.receive(&mut raw, pair.now);
    pair.run();
    // An echo without a link goes out with the next look at the output.
    assert!(matches!(pair.frames_to_client[..], [Performative::Flow(_)]), "{:?}", pair.frames_to_client);
}

#[test]
fn outcomes_are_answered_with_accepted() {
    let (mut pair, session) = Pair::new(4).open();
    let (link, theirs) = {
        let options =
            AttachOptions { rcv_settle: Some(ReceiverSettle::Second), ..options("c2d", Role::Receiver) };
        let ours = pair.client.attach(session, options).expect("room");
        pair.run();
        let theirs = pair.listener_events.iter().find_map(|event| match event {
            Event::AttachRequested(request) => Some(request.link),
            _ => None,
        });
        (ours, theirs.expect("requested"))
    };
    let tag = *b"0123456789abcdef";
    let id = pair
        .listener
        .send(theirs, payload("m"), SendOptions { tag: Some(tag), ..Default::default() })
        .expect("credit");
    pair.run();
    let delivery = pair.client_events.iter().find_map(|event| match event {
        Event::Delivery(delivery) => Some(delivery.clone()),
        _ => None,
    });
    let delivery = delivery.expect("delivered");
    assert_eq!((delivery.link, delivery.tag.as_ref().map(DeliveryTag::as_bytes)), (link, Some(&tag[..])));
    pair.forget_frames();
    let reject = Outcome::Rejected(Some(Error::new(Condition::NOT_ALLOWED, "no")));
    pair.client.settle(delivery.id, reject.clone());
    pair.run();
    assert!(pair.listener_events.iter().any(
        |event| matches!(event, Event::Settled { delivery, outcome, .. } if *delivery == id && *outcome == reject)
    ));
    match &pair.frames_to_listener[..] {
        [Performative::Disposition(d)] => assert!(!d.settled && d.role == Role::Receiver),
        other => panic!("{other:?}"),
    }
    match &pair.frames_to_client[..] {
        [Performative::Disposition(d)] => {
            assert!(d.settled && d.role == Role::Sender && d.outcome == Some(Outcome::Accepted));
        }
        other => panic!("{other:?}"),
    }
    // Given up by the sender: a later disposition changes nothing.
    let id = pair.listener.send(theirs, payload("n"), SendOptions::default()).expect("credit");
    assert!(pair.listener.settle(id, Outcome::Released));
    assert!(!pair.listener.settle(id, Outcome::Released));
    pair.run();
}

#[test]
fn refusal_is_null_attach_then_detach() {
    let (mut pair, session) = Pair::new(5).open();
    pair.answer = |_| Err(Error::new(Condition::UNAUTHORIZED_ACCESS, "who are you"));
    for role in [Role::Sender, Role::Receiver] {
        let link = pair.client.attach(session, options("x", role)).expect("room");
        pair.run();
        match &pair.client_events[..] {
            [Event::AttachRefused { link: refused, error: Some(error) }] => {
                assert_eq!((refused, &error.condition), (&link, &Condition::UNAUTHORIZED_ACCESS));
            }
            other => panic!("{other:?}"),
        }
        match &pair.frames_to_client[..] {
            [Performative::Attach(attach), Performative::Detach(detach)] => {
                assert!(attach.source.is_none() && attach.target.is_none() && detach.closed);
            }
            other => panic!("{other:?}"),
        }
        pair.client_events.clear();
        pair.listener_events.clear();
        pair.forget_frames();
    }
}

#[test]
fn names_are_unique_for_session_and_role() {
    let (mut pair, session) = Pair::new(6).open();
    let second = pair.client.begin().expect("room");
    for session in [session, second] {
        pair.attach(session, "same", Role::Sender);
        pair.attach(session, "same", Role::Receiver);
        assert_eq!(pair.client.attach(session, options("same", Role::Sender)), None);
    }
    // A peer that does it nevertheless gets a refusal, and its session lives on.
    let mut raw = BytesMut::new();
    put_frame(&mut raw, FrameKind::Amqp, 0, |out| {
        let mut list = CompoundWriter::described_list(out, 0x12);
        put_string(list.field(), "same");
        put_uint(list.field(), 77);
        put_bool(list.field(), false);
        list.finish();
    });
    pair.forget_frames();
    pair.listener.receive(&mut raw, pair.now);
    let mut out = BytesMut::new();
    drain(&mut pair.listener, &mut out, pair.now);
    let mut frames = Vec::new();
    record(&out, &mut frames);
    match &frames[..] {
        [Performative::Attach(attach), Performative::Detach(detach)] => {
            assert!(attach.target.is_none());
            assert_eq!(detach.error.as_ref().map(|e| &e.condition), Some(&Condition::RESOURCE_LOCKED));
        }
        other => panic!("{other:?}"),
    }
    assert!(!pair.listener.is_finished());
}

#[test]
fn detach_end_close_from_both_sides() {
    let (mut pair, session) = Pair::new(8).open();
    let (ours, theirs) = pair.attach(session, "a", Role::Sender);
    let sent = pair.client.send(ours, payload("x"), SendOptions::default()).expect("credit");
    pair.run();
    let delivery = pair.deliveries().remove(0);
    assert!(pair.listener.detach(theirs, Some(Condition::STOLEN.into())));
    assert!(!pair.listener.settle(delivery.id, Outcome::Accepted), "void");
    pair.client_events.clear();
    pair.run();
    match &pair.client_events[..] {
        [Event::Detached { link, error: Some(error), by: By::Peer }] => {
            assert_eq!((link, &error.condition), (&ours, &Condition::STOLEN));
        }
        other => panic!("{other:?}"),
    }
    assert!(!pair.client.settle(sent, Outcome::Released));
    assert!(!pair.client.detach(ours, None));

    let (ours, theirs) = pair.attach(session, "a", Role::Sender);
    pair.listener_events.clear();
    assert!(pair.client.detach(ours, None));
    pair.run();
    assert!(matches!(pair.listener_events[..], [Event::Detached { link, .. }] if link == theirs));

    pair.attach(session, "b", Role::Receiver);
    pair.listener_events.clear();
    assert!(pair.client.end(session, None));
    pair.run();
    assert!(matches!(pair.listener_events[..], [Event::SessionEnded { by: By::Peer, .. }]));
    assert_eq!(pair.client.attach(session, options("c", Role::Sender)), None);

    let again = pair.client.begin().expect("open");
    pair.run();
    pair.attach(again, "b", Role::Receiver);
    pair.client_events.clear();
    pair.listener
        .close(Some(Error::new(Condition::DETACH_FORCED, "Server busy, please retry operation")), pair.now);
    pair.run();
    match &pair.client_events[..] {
        // Sessions hear of it first: SDKs wait for answers on those that are open.
        [
            Event::SessionEnded { session, error: Some(of_session), by: By::Peer },
            Event::Closed { error: Some(error), by: By::Peer },
        ] => {
            assert_eq!((*session, of_session), (again, error));
            assert_eq!(error.condition, Condition::DETACH_FORCED);
        }
        other => panic!("{other:?}"),
    }
    assert!(pair.client.is_finished() && pair.listener.is_finished());
    assert_eq!(pair.client.begin(), None);
}

#[test]
fn heartbeats_idle_peers_and_short_timeouts() {
    let client = Options { idle_timeout: Duration::from_secs(60), ..Options::default() };
    let (mut pair, _) = Pair::with_options(9, client, Options::default()).open();
    let start = pair.now;
    // Seven eighths of the 60 s that the client announced.
    assert_eq!(pair.listener.next_deadline(), Some(start + Duration::from_millis(52_500)));
    pair.listener.tick(start + Duration::from_millis(52_499));
    assert!(pair.listener.output().is_empty());
    pair.listener.tick(start + Duration::from_millis(52_500));
    assert_eq!(pair.listener.output().copy_to_bytes(8)[..], [0, 0, 0, 8, 2, 0, 0, 0]);
    // The client hears nothing for its 60 s.
    pair.client.tick(start + Duration::from_secs(60));
    assert!(pair.client.is_finished());
    let closed = std::iter::from_fn(|| pair.client.poll_event()).last();
    assert!(
        matches!(closed, Some(Event::Closed { error: Some(error), by: By::Engine }) if error.condition == Condition::CONNECTION_FORCED)
    );

    let client = Options { idle_timeout: Duration::from_millis(4_999), ..Options::default() };
    let mut pair = Pair::with_options(10, client, Options::default());
    pair.run();
    match &pair.frames_to_client[..] {
        [Performative::Open(_), Performative::Close(Some(error))] => {
            assert_eq!(error.condition, Condition::NOT_ALLOWED);
        }
        other => panic!("{other:?}"),
    }
    // A handshake that does not come.
    let now = Instant::now();
    let mut listener = Connection::listener(Options::default(), now);
    let deadline = listener.next_deadline().expect("has one");
    listener.tick(deadline);
    assert!(listener.is_finished());
}
