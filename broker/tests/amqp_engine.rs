//! The AMQP engine against itself, and against hostile bytes; no sockets, time given by hand.

use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use edgehub_broker::amqp::encode::*;
use edgehub_broker::amqp::frame::{FrameHeader, FrameKind, put_frame};
use edgehub_broker::amqp::performative::Performative;
use edgehub_broker::amqp::*;

/// A client and a listener, joined by two pipes that cut the bytes at random places.
struct Pair {
    client: Connection,
    listener: Connection,
    to_client: BytesMut,
    to_listener: BytesMut,
    client_events: Vec<Event>,
    listener_events: Vec<Event>,
    rng: fastrand::Rng,
    now: Instant,
    /// Frames that the listener wrote.
    frames_to_client: Vec<Performative>,
    frames_to_listener: Vec<Performative>,
    answer: fn(&AttachRequest) -> Result<AttachAnswer, Error>,
}

fn answer_all(_: &AttachRequest) -> Result<AttachAnswer, Error> {
    Ok(AttachAnswer {
        snd_settle: None,
        rcv_settle: None,
        max_message_bytes: 1 << 20,
        credit: 1_000,
        properties: Vec::new(),
    })
}

impl Pair {
    fn new(seed: u64) -> Self {
        Self::with_options(seed, Options::default(), Options::default())
    }

    fn with_options(seed: u64, client: Options, listener: Options) -> Self {
        println!("seed {seed}");
        let now = Instant::now();
        Self {
            client: Connection::client(client, now),
            listener: Connection::listener(listener, now),
            to_client: BytesMut::new(),
            to_listener: BytesMut::new(),
            client_events: Vec::new(),
            listener_events: Vec::new(),
            rng: fastrand::Rng::with_seed(seed),
            now,
            frames_to_client: Vec::new(),
            frames_to_listener: Vec::new(),
            answer: answer_all,
        }
    }

    /// Moves bytes until both are quiet.
    fn run(&mut self) {
        let mut client_pipe = BytesMut::new();
        let mut listener_pipe = BytesMut::new();
        loop {
            let mut moved = false;
            while let Some(event) = self.client.poll_event() {
                self.client_events.push(event);
                moved = true;
            }
            while let Some(event) = self.listener.poll_event() {
                if let Event::AttachRequested(request) = &event {
                    match (self.answer)(request) {
                        Ok(answer) => assert!(self.listener.accept_attach(request.link, answer)),
                        Err(error) => assert!(self.listener.refuse_attach(request.link, error)),
                    }
                }
                self.listener_events.push(event);
                moved = true;
            }
            drain(&mut self.client, &mut listener_pipe, self.now);
            drain(&mut self.listener, &mut client_pipe, self.now);
            for (pipe, input, to, frames) in [
                (&mut client_pipe, &mut self.to_client, &mut self.client, &mut self.frames_to_client),
                (&mut listener_pipe, &mut self.to_listener, &mut self.listener, &mut self.frames_to_listener),
            ] {
                if !pipe.is_empty() {
                    let cut = self.rng.usize(1..=pipe.len());
                    input.extend_from_slice(&pipe.split_to(cut));
                    moved = true;
                }
                let before = input.len();
                if !to.is_finished() {
                    record(input, frames);
                }
                to.receive(input, self.now);
                moved |= input.len() != before;
            }
            if !moved {
                return;
            }
        }
    }

    fn open(mut self) -> (Self, SessionId) {
        self.run();
        let session = self.client.begin().expect("open");
        self.run();
        assert!(matches!(self.client_events[..], [Event::Opened(_), Event::SessionBegun { .. }]));
        self.client_events.clear();
        self.listener_events.clear();
        self.forget_frames();
        (self, session)
    }

    fn forget_frames(&mut self) {
        self.frames_to_client.clear();
        self.frames_to_listener.clear();
    }

    fn attach(&mut self, session: SessionId, name: &str, role: Role) -> (LinkId, LinkId) {
        let ours = self.client.attach(session, options(name, role)).expect("room");
        self.run();
        let theirs = self
            .listener_events
            .iter()
            .rev()
            .find_map(|event| match event {
                Event::AttachRequested(request) => Some(request.link),
                _ => None,
            })
            .expect("requested");
        assert!(
            self.client_events
                .iter()
                .any(|event| matches!(event, Event::Attached { link, .. } if *link == ours))
        );
        (ours, theirs)
    }

    fn deliveries(&mut self) -> Vec<Delivery> {
        let (taken, kept) = std::mem::take(&mut self.listener_events)
            .into_iter()
            .partition::<Vec<_>, _>(|event| matches!(event, Event::Delivery(_)));
        self.listener_events = kept;
        taken
            .into_iter()
            .filter_map(|event| match event {
                Event::Delivery(delivery) => Some(delivery),
                _ => None,
            })
            .collect()
    }
}

/// Complete frames that `receive` will see now (it sees each once).
fn record(input: &BytesMut, frames: &mut Vec<Performative>) {
    let mut rest = Bytes::copy_from_slice(input);
    if rest.starts_with(b"AMQP") {
        if rest.len() < 8 {
            return;
        }
        rest.advance(8);
    }
    while let Ok(Some(header)) = FrameHeader::parse(&rest) {
        if rest.len() < header.size {
            return;
        }
        let frame = rest.split_to(header.size);
        if header.kind == FrameKind::Amqp && header.body < header.size {
            frames.push(Performative::decode(&frame, header.body).expect("our own frames decode"));
        }
    }
}

fn drain(connection: &mut Connection, pipe: &mut BytesMut, now: Instant) {
    let output = connection.output();
    if output.has_remaining() {
        pipe.put(&mut *output);
        connection.written(now);
    }
}

fn options(name: &str, role: Role) -> AttachOptions {
    AttachOptions {
        name: name.into(),
        role,
        source: Terminus::source("/devices/d1/messages/events"),
        target: Terminus::target("/devices/d1/messages/events"),
        snd_settle: Some(SenderSettle::Unsettled),
        rcv_settle: None,
        max_message_bytes: 0,
        credit: 50,
        properties: vec![("com.microsoft:client-version".into(), Value::String("test/1".into()))],
    }
}

fn payload(bytes: impl Into<Bytes>) -> Payload {
    Payload::from_iter([bytes.into()])
}

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

// ---- raw bytes --------------------------------------------------------------------------------------------

/// A listener whose peer is written by hand.
struct Raw {
    listener: Connection,
    now: Instant,
}

impl Raw {
    fn new() -> Self {
        Self::with_options(Options::default())
    }

    fn with_options(options: Options) -> Self {
        let now = Instant::now();
        Self { listener: Connection::listener(options, now), now }
    }

    fn opened() -> Self {
        Self::new().open()
    }

    fn open(self) -> Self {
        let mut raw = self;
        let mut bytes = BytesMut::from(&HEADER_AMQP[..]);
        put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
            let mut list = CompoundWriter::described_list(out, 0x10);
            put_string(list.field(), "raw");
            list.finish();
        });
        put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
            let mut list = CompoundWriter::described_list(out, 0x11);
            list.null();
            for value in [0, 5_000, 5_000] {
                put_uint(list.field(), value);
            }
            list.finish();
        });
        raw.feed(&bytes);
        assert!(!raw.listener.is_finished());
        raw
    }

    fn with_link() -> Self {
        Self::opened().attach()
    }

    fn attach(self) -> Self {
        let mut raw = self;
        let mut bytes = BytesMut::new();
        put_frame(&mut bytes, FrameKind::Amqp, 0, |out| {
            let mut list = CompoundWriter::described_list(out, 0x12);
            put_string(list.field(), "l");
            put_uint(list.field(), 0);
            put_bool(list.field(), false);
            list.finish();
        });
        for event in raw.feed(&bytes) {
            if let Event::AttachRequested(request) = event {
                assert_eq!(request.address(), None);
                let answer = answer_all(&request).expect("always");
                assert!(raw.listener.accept_attach(request.link, AttachAnswer { credit: 10, ..answer }));
            }
        }
        let _ = raw.written(); // the attach and the credit are out
        raw
    }

    fn feed(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut input = BytesMut::from(bytes);
        self.listener.receive(&mut input, self.now);
        std::iter::from_fn(|| self.listener.poll_event()).collect()
    }

    fn written(&mut self) -> Bytes {
        let output = self.listener.output();
        let len = output.remaining();
        output.copy_to_bytes(len)
    }

    /// The condition of the close that the listener wrote.
    fn close_condition(&mut self) -> Option<Condition> {
        let mut frames = Vec::new();
        record(&BytesMut::from(&self.written()[..]), &mut frames);
        match frames.pop() {
            Some(Performative::Close(error)) => error.map(|error| error.condition),
            _ => None,
        }
    }
}

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
