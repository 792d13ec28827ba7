//! Who the engine speaks with: itself, or somebody who writes bytes by hand.

use std::time::Instant;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use edgehub_broker::amqp::encode::*;
use edgehub_broker::amqp::frame::{FrameHeader, FrameKind, put_frame};
use edgehub_broker::amqp::performative::Performative;
use edgehub_broker::amqp::*;

/// A client and a listener, joined by two pipes that cut the bytes at random places.
pub(crate) struct Pair {
    pub(crate) client: Connection,
    pub(crate) listener: Connection,
    pub(crate) to_client: BytesMut,
    pub(crate) to_listener: BytesMut,
    pub(crate) client_events: Vec<Event>,
    pub(crate) listener_events: Vec<Event>,
    pub(crate) rng: fastrand::Rng,
    pub(crate) now: Instant,
    /// Frames that the listener wrote.
    pub(crate) frames_to_client: Vec<Performative>,
    pub(crate) frames_to_listener: Vec<Performative>,
    pub(crate) answer: fn(&AttachRequest) -> Result<AttachAnswer, Error>,
}

pub(crate) fn answer_all(_: &AttachRequest) -> Result<AttachAnswer, Error> {
    Ok(AttachAnswer {
        snd_settle: None,
        rcv_settle: None,
        max_message_bytes: 1 << 20,
        credit: 1_000,
        properties: Vec::new(),
    })
}

impl Pair {
    pub(crate) fn new(seed: u64) -> Self {
        Self::with_options(seed, Options::default(), Options::default())
    }

    pub(crate) fn with_options(seed: u64, client: Options, listener: Options) -> Self {
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
    pub(crate) fn run(&mut self) {
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

    pub(crate) fn open(mut self) -> (Self, SessionId) {
        self.run();
        let session = self.client.begin().expect("open");
        self.run();
        assert!(matches!(self.client_events[..], [Event::Opened(_), Event::SessionBegun { .. }]));
        self.client_events.clear();
        self.listener_events.clear();
        self.forget_frames();
        (self, session)
    }

    pub(crate) fn forget_frames(&mut self) {
        self.frames_to_client.clear();
        self.frames_to_listener.clear();
    }

    pub(crate) fn attach(&mut self, session: SessionId, name: &str, role: Role) -> (LinkId, LinkId) {
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

    pub(crate) fn deliveries(&mut self) -> Vec<Delivery> {
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
pub(crate) fn record(input: &BytesMut, frames: &mut Vec<Performative>) {
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

pub(crate) fn drain(connection: &mut Connection, pipe: &mut BytesMut, now: Instant) {
    let output = connection.output();
    if output.has_remaining() {
        pipe.put(&mut *output);
        connection.written(now);
    }
}

pub(crate) fn options(name: &str, role: Role) -> AttachOptions {
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

pub(crate) fn payload(bytes: impl Into<Bytes>) -> Payload {
    Payload::from_iter([bytes.into()])
}

/// A listener whose peer is written by hand.
pub(crate) struct Raw {
    pub(crate) listener: Connection,
    pub(crate) now: Instant,
}

impl Raw {
    pub(crate) fn new() -> Self {
        Self::with_options(Options::default())
    }

    pub(crate) fn with_options(options: Options) -> Self {
        let now = Instant::now();
        Self { listener: Connection::listener(options, now), now }
    }

    pub(crate) fn opened() -> Self {
        Self::new().open()
    }

    pub(crate) fn open(self) -> Self {
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

    pub(crate) fn with_link() -> Self {
        Self::opened().attach()
    }

    pub(crate) fn attach(self) -> Self {
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

    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut input = BytesMut::from(bytes);
        self.listener.receive(&mut input, self.now);
        std::iter::from_fn(|| self.listener.poll_event()).collect()
    }

    pub(crate) fn written(&mut self) -> Bytes {
        let output = self.listener.output();
        let len = output.remaining();
        output.copy_to_bytes(len)
    }

    /// The condition of the close that the listener wrote.
    pub(crate) fn close_condition(&mut self) -> Option<Condition> {
        let mut frames = Vec::new();
        record(&BytesMut::from(&self.written()[..]), &mut frames);
        match frames.pop() {
            Some(Performative::Close(error)) => error.map(|error| error.condition),
            _ => None,
        }
    }
}
