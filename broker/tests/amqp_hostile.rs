//! The AMQP head under peers that mean harm, ask for too much, or take too little; before and after their login.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod amqp_client;
mod recording;

use std::sync::Arc;

use amqp_client::{Site, data, head_with, identity, receive, strict, telemetry, token};
use bytes::{Buf, Bytes, BytesMut};
use edgehub_broker::amqp::{
    AttachOptions, CbsResponse, Connection, Event, LinkId, Message as Encoded, MessageEncoder, MessageId,
    Options, PutToken, Role, SendOptions, SessionId, Terminus, Text, Value,
};
use edgehub_broker::backend::{
    CloseReason, Command, Deliveries, DesiredPatch, Outcome, Settler, Target, TwinAnswer, TwinReply,
};
use edgehub_broker::head::amqp::AmqpLimits;
use edgehub_broker::message::{Message, Origin, Properties, Sender};
use fe2o3_amqp::Receiver;
use fe2o3_amqp::session::Session;
use fe2o3_amqp::types::messaging::Message as PeerMessage;
use fe2o3_amqp::types::primitives::Binary;
use recording::{DEADLINE, Recording, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// A peer that knows the protocol, and sends bytes of its own between.
struct Peer {
    stream: DuplexStream,
    serving: JoinHandle<()>,
    engine: Connection,
    input: BytesMut,
}

impl Peer {
    async fn open(recording: &Recording, limits: AmqpLimits) -> (Self, SessionId) {
        let (stream, serving) = head_with(recording, limits, Vec::new());
        let engine = Connection::client(Options::default(), Instant::now().into_std());
        let mut peer = Self { stream, serving, engine, input: BytesMut::new() };
        peer.event(|event| matches!(event, Event::Opened(_)).then_some(())).await;
        let session = peer.begin().await;
        (peer, session)
    }

    async fn begin(&mut self) -> SessionId {
        let session = self.engine.begin().expect("room");
        self.event(|event| matches!(event, Event::SessionBegun { .. }).then_some(())).await;
        session
    }

    async fn flush(&mut self) {
        let output = self.engine.output();
        let mut bytes = BytesMut::new();
        bytes::BufMut::put(&mut bytes, &mut *output);
        self.stream.write_all(&bytes).await.expect("taken");
        self.engine.written(Instant::now().into_std());
    }

    /// The first event of which something is made.
    async fn event<T>(&mut self, mut of: impl FnMut(Event) -> Option<T>) -> T {
        let next = async {
            loop {
                self.flush().await;
                while let Some(event) = self.engine.poll_event() {
                    if let Some(found) = of(event) {
                        return found;
                    }
                }
                let read = self.stream.read_buf(&mut self.input).await.expect("readable");
                assert!(read > 0, "the head hung up");
                self.engine.receive(&mut self.input, Instant::now().into_std());
            }
        };
        timeout(DEADLINE, next).await.expect("in time")
    }

    fn ask(&mut self, session: SessionId, name: &str, role: Role, address: &str) -> LinkId {
        self.ask_with(session, name, role, address, Vec::new())
    }

    fn ask_with(
        &mut self,
        session: SessionId,
        name: &str,
        role: Role,
        address: &str,
        properties: Vec<(Text, Value)>,
    ) -> LinkId {
        let (source, target) = match role {
            Role::Sender => (Terminus::source("here"), Terminus::target(address)),
            Role::Receiver => (Terminus::source(address), Terminus::target("here")),
        };
        let options = AttachOptions {
            name: name.into(),
            role,
            source,
            target,
            snd_settle: None,
            rcv_settle: None,
            max_message_bytes: 0,
            credit: 100,
            properties,
        };
        self.engine.attach(session, options).expect("room")
    }

    async fn attach(&mut self, session: SessionId, name: &str, role: Role, address: &str) -> LinkId {
        let link = self.ask(session, name, role, address);
        self.attached(link).await;
        link
    }

    async fn attached(&mut self, link: LinkId) {
        self.event(|event| match event {
            Event::Attached { link: attached, .. } if attached == link => Some(()),
            Event::AttachRefused { link: refused, error } if refused == link => panic!("{error:?}"),
            _ => None,
        })
        .await;
    }

    /// Has credit on a link on which it sends.
    async fn credit(&mut self, link: LinkId) {
        if self.engine.credit(link) == 0 {
            self.event(|event| {
                matches!(event, Event::CreditChanged { link: of, .. } if of == link).then_some(())
            })
            .await;
        }
    }

    async fn cbs(&mut self, session: SessionId) -> LinkId {
        let up = self.attach(session, "cbs-up", Role::Sender, "$cbs").await;
        self.attach(session, "cbs-down", Role::Receiver, "$cbs").await;
        up
    }

    fn put(&mut self, up: LinkId, token: &str) {
        let request = PutToken::encode(MessageId::Ulong(1), "name", token, 0);
        self.engine.send(up, request, SendOptions { settled: true, ..SendOptions::default() }).expect("sent");
    }

    async fn put_answered(&mut self) {
        let payload = self
            .event(|event| match event {
                Event::Delivery(delivery) => Some(delivery.payload),
                _ => None,
            })
            .await;
        let answer = CbsResponse::decode(&Encoded::parse(&payload).unwrap()).unwrap();
        assert!(answer.is_ok(), "{answer:?}");
    }

    async fn log_in(&mut self, session: SessionId, of: &str) -> LinkId {
        let up = self.cbs(session).await;
        self.credit(up).await;
        let token = token(of).await;
        self.put(up, &token);
        self.put_answered().await;
        let telemetry = format!("/devices/{of}/messages/events");
        self.attach(session, "telemetry", Role::Sender, &telemetry).await
    }

    /// Writes bytes past the engine and reads to the head's end of the stream.
    async fn ends_after(mut self, bytes: &[u8]) {
        self.flush().await;
        // The head may hang up in the middle.
        let _any_end = self.stream.write_all(bytes).await;
        let mut rest = Vec::new();
        let end = self.stream.read_to_end(&mut rest);
        timeout(DEADLINE, end).await.expect("the head hangs up").expect("in order");
        drop(self.stream);
        timeout(DEADLINE, self.serving).await.expect("in time").expect("no panic");
    }
}

fn frame(channel: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = (body.len() as u32 + 8).to_be_bytes().to_vec();
    frame.extend([2, 0]);
    frame.extend(channel.to_be_bytes());
    frame.extend(body);
    frame
}

fn list(descriptor: u8, count: u32, fields: &[u8]) -> Vec<u8> {
    let mut list = vec![0x00, 0x53, descriptor, 0xd0];
    list.extend((fields.len() as u32 + 4).to_be_bytes());
    list.extend(count.to_be_bytes());
    list.extend(fields);
    list
}

fn nested(levels: usize) -> Vec<u8> {
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

/// Frames after which a connection cannot go on.
fn fatal() -> Vec<(&'static str, Vec<u8>)> {
    let mut begin = vec![0x40, 0x43, 0x52, 1, 0x52, 1, 0x40, 0x40, 0x40];
    let map = nested(4_500);
    begin.extend([0xd1]);
    begin.extend((4 + 3 + map.len() as u32).to_be_bytes());
    begin.extend(2u32.to_be_bytes());
    begin.extend(b"\xa3\x01x");
    begin.extend(map);
    let mut all = vec![
        ("nesting", frame(7, &list(0x11, 8, &begin))),
        (
            "described nesting",
            frame(7, &[&[0x00, 0x53, 0x11][..], &[0x00, 0x53, 0x11].repeat(5_000)].concat()),
        ),
        ("a second open", frame(0, &list(0x10, 1, b"\xa1\x01x"))),
        ("no such channel", frame(900, &list(0x13, 4, &[0x43, 0x43, 0x43, 0x43]))),
        ("another protocol", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
    ];
    for size in [0u32, 4, 5, 6, 7, 65_537, u32::MAX] {
        all.push(("size", [&size.to_be_bytes()[..], &[2, 0, 0, 0, 0, 0, 0, 0]].concat()));
    }
    for code in [0xb0u8, 0xb1, 0xb3, 0xd0, 0xd1, 0xf0] {
        all.push((
            "length",
            frame(0, &[0x00, 0x53, 0x12, 0xc0, 9, 1, code, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0]),
        ));
    }
    all
}

#[tokio::test]
async fn hostile_frames_end_their_connection_before_and_after_the_login() {
    let recording = strict();
    let (mut other, session) = Peer::open(&recording, AmqpLimits::default()).await;
    other.log_in(session, "other").await;
    for (what, bytes) in fatal() {
        println!("{what}");
        let (peer, _) = Peer::open(&recording, AmqpLimits::default()).await;
        peer.ends_after(&bytes).await;
        let (mut peer, session) = Peer::open(&recording, AmqpLimits::default()).await;
        peer.log_in(session, "d1").await;
        peer.ends_after(&bytes).await;
        until("logged out", || recording.state.lock().gone.last() == Some(&identity("d1"))).await;
        recording.state.lock().gone.clear();
        // Right behind the protocol header.
        let (mut stream, serving) = head_with(&recording, AmqpLimits::default(), Vec::new());
        let _any_end = stream.write_all(&[b"AMQP\x00\x01\x00\x00", &bytes[..]].concat()).await;
        let _any_end = stream.shutdown().await;
        let mut rest = Vec::new();
        timeout(DEADLINE, stream.read_to_end(&mut rest)).await.expect("the head hangs up").expect("in order");
        drop(stream);
        timeout(DEADLINE, serving).await.expect("in time").expect("no panic");
    }
    let link = other.attach(session, "another", Role::Sender, "/devices/other/twin").await;
    other.credit(link).await;
}

#[tokio::test]
async fn hostile_frames_that_are_legal_cost_nothing() {
    let recording = strict();
    let (mut peer, session) = Peer::open(&recording, AmqpLimits::default()).await;
    for logged_in in [false, true] {
        if logged_in {
            peer.log_in(session, "d1").await;
        }
        let mut bytes = Vec::new();
        for role in [0x41, 0x42] {
            // Settles everything that there could ever be.
            let mut fields = vec![role, 0x43, 0x70];
            fields.extend((u32::MAX - 1).to_be_bytes());
            fields.extend([0x41, 0x00, 0x53, 0x24, 0x45]);
            bytes.extend(frame(0, &list(0x15, 5, &fields)));
        }
        // An empty frame with an extended header.
        bytes.extend([0, 0, 0, 16, 4, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        peer.flush().await;
        for _ in 0..1_000 {
            peer.stream.write_all(&bytes).await.expect("taken");
        }
        let (name, address) = (if logged_in { "c" } else { "b" }, "$cbs");
        peer.attach(session, name, Role::Sender, address).await;
    }
}

#[tokio::test]
async fn bad_messages_on_every_link_are_refused_one_by_one() {
    let recording = strict();
    let (mut peer, session) = Peer::open(&recording, AmqpLimits::default()).await;
    let telemetry = peer.log_in(session, "d1").await;
    let twin = peer.attach(session, "twin", Role::Sender, "/devices/d1/twin").await;
    let methods = peer.attach(session, "methods", Role::Sender, "/devices/d1/methods/deviceBound").await;
    let cbs = peer.attach(session, "cbs2", Role::Sender, "$cbs").await;
    let mut deep = vec![0x00, 0x53, 0x72];
    deep.extend(nested(4_500));
    let bad =
        [deep, vec![], vec![0x00], vec![0x00, 0x53, 0x75, 0xb0, 0xff, 0xff, 0xff, 0xf0], vec![7; 900_000]];
    for (link, accepts) in [(telemetry, false), (twin, false), (methods, true), (cbs, true)] {
        peer.credit(link).await;
        for bytes in &bad {
            // An empty message is one.
            let accepts = accepts || link == telemetry && bytes.is_empty();
            let payload = std::iter::once(Bytes::from(bytes.clone())).collect();
            peer.engine.send(link, payload, SendOptions::default()).expect("sent");
            let outcome = peer
                .event(|event| match event {
                    Event::Settled { outcome, .. } => Some(outcome),
                    _ => None,
                })
                .await;
            let accepted = outcome == edgehub_broker::amqp::Outcome::Accepted;
            // The settlement of links without outcomes says no more than that it arrived.
            assert!(accepted == accepts || link == twin, "{} bytes: {outcome:?}", bytes.len());
        }
    }
    assert!(
        recording.state.lock().method_answers.is_empty() && recording.state.lock().twin_requests.is_empty()
    );
}

#[tokio::test]
async fn links_that_go_before_they_are_answered_leave_nothing_behind() {
    let recording = strict();
    let (mut peer, session) = Peer::open(&recording, AmqpLimits::default()).await;
    let up = peer.cbs(session).await;
    peer.credit(up).await;
    let token = token("d1").await;
    peer.put(up, &token);
    peer.put_answered().await;
    for round in 0..50 {
        let kinds = [
            (Role::Sender, "/devices/d1/messages/events"),
            (Role::Receiver, "/devices/d1/twin"),
            (Role::Receiver, "/devices/d1/methods/deviceBound"),
        ];
        let (role, address) = kinds[round % 3];
        let link = peer.ask(session, &format!("hasty {round}"), role, address);
        peer.engine.detach(link, None);
        peer.flush().await;
        if round % 2 == 0 {
            let other = peer.begin().await;
            let link = peer.ask(other, "hasty", role, address);
            assert_ne!(link.session(), session);
            peer.engine.end(other, None);
            peer.flush().await;
        }
    }
    until("all are gone", || {
        let state = recording.state.lock();
        !state.logins.is_empty() && state.gone.len() == state.logins.len()
    })
    .await;
    peer.attach(session, "patient", Role::Sender, "/devices/d1/messages/events").await;
}

#[tokio::test]
async fn floods_of_links_are_bounded() {
    let recording = strict();
    let limits = AmqpLimits { links_max: 200, links_waiting_max: 4, ..AmqpLimits::default() };
    let (mut peer, session) = Peer::open(&recording, limits.clone()).await;
    let up = peer.cbs(session).await;
    peer.credit(up).await;
    let token = token("d1").await;
    peer.put(up, &token);
    peer.put_answered().await;
    // More links in line than may wait for a login.
    let links: Vec<_> = (0..20)
        .map(|number| peer.ask(session, &format!("l{number}"), Role::Sender, "/devices/d1/messages/events"))
        .collect();
    let (mut attached, mut refused) = (0, 0);
    while attached + refused < links.len() {
        peer.event(|event| match event {
            Event::Attached { .. } => {
                attached += 1;
                Some(())
            }
            Event::AttachRefused { .. } => {
                refused += 1;
                Some(())
            }
            _ => None,
        })
        .await;
    }
    assert!((1..=4).contains(&attached), "{attached}");
    assert_eq!(recording.state.lock().logins.len(), 1);
    // Each link of a function takes the place of the one before.
    for number in 0..400 {
        peer.attach(session, &format!("m{number}"), Role::Sender, "/devices/d1/messages/events").await;
    }
    assert!(recording.state.lock().gone.is_empty());
    // A peer that answers no detach holds a place for each link, up to the limit.
    let (peer, _) = Peer::open(&recording, limits).await;
    let mut bytes = Vec::new();
    for number in 0..3_000u32 {
        let mut fields = vec![0xa1, 4];
        fields.extend(format!("{number:04}").as_bytes());
        fields.push(0x70);
        fields.extend(number.to_be_bytes());
        fields.extend([0x42, 0x40, 0x40, 0x40, 0x00, 0x53, 0x29, 0xc0, 0x05, 0x01, 0xa1, 0x02]);
        fields.extend(b"/x");
        bytes.extend(frame(0, &list(0x12, 7, &fields)));
    }
    let reading = peer.ends_after(&bytes);
    timeout(DEADLINE, reading).await.expect("in time");
}

fn message(body: &str) -> Message {
    let sender = Sender { identity: identity("d9"), origin: Origin::Internal, model_id: None };
    Message::new(Arc::new(sender), Properties::empty(), Bytes::copy_from_slice(body.as_bytes()))
}

#[tokio::test]
async fn a_slow_consumer_holds_up_nobody_else() {
    let mut site = Site::of("d1/slow").await;
    site.cbs.put_good("d1/fast").await;
    let input = |module: &str| format!("/devices/d1/modules/{module}/messages/events");
    let mut slow = site.dry_receiver("slow", &input("slow")).await;
    let mut fast = site.receiver("fast", &input("fast")).await;
    let mut up = site.sender("up", &input("fast")).await;
    let settler = Settler::new();
    let body = "x".repeat(10_000);
    let target = || Target::Input("in".into());
    for first in (0..1_000).step_by(100) {
        let messages = (first..first + 100).map(|tag| (tag, message(&body))).collect();
        let deliveries = Deliveries { target: target(), messages, settler: settler.clone() };
        site.recording.command("d1/slow", Command::Deliver(deliveries)).await;
    }
    // What is more than may wait goes back, and is not lost.
    let messages = (1_000..1_100).map(|tag| (tag, message(&body))).collect();
    let deliveries = Deliveries { target: target(), messages, settler: settler.clone() };
    site.recording.command("d1/slow", Command::Deliver(deliveries)).await;
    let back = timeout(DEADLINE, settler.settled()).await.expect("in time");
    assert_eq!(back, Vec::from_iter((1_024..1_100).map(|tag| (tag, Outcome::NotOffered))));
    for number in 0..300u64 {
        let messages = vec![(number, message(&number.to_string()))];
        let deliveries = Deliveries { target: target(), messages, settler: Settler::new() };
        site.recording.command("d1/fast", Command::Deliver(deliveries)).await;
        let received = receive(&mut fast).await;
        assert_eq!(data(&received), number.to_string().into_bytes());
        fast.accept(&received).await.unwrap();
    }
    let sent = PeerMessage::builder().data(Binary::from(vec![1])).build();
    timeout(DEADLINE, up.send(sent)).await.expect("in time").expect("answered");
    site.cbs.put_good("d1/third").await;
    // And it gets its own when it wants them.
    for _ in 0..10 {
        slow.set_credit(100).await.unwrap();
        for _ in 0..100 {
            let received = receive(&mut slow).await;
            assert_eq!(data(&received).len(), body.len());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_no_bytes_is_given_up_with_all_that_waits_for_it() {
    let recording = strict();
    let (mut peer, session) = Peer::open(&recording, AmqpLimits::default()).await;
    peer.log_in(session, "d1").await;
    peer.attach(session, "down", Role::Receiver, "/devices/d1/twin").await;
    let first = DesiredPatch { patch: Bytes::from_static(b"{}"), version: 1 };
    recording.command("d1", Command::Desired(first)).await;
    peer.event(|event| matches!(event, Event::Delivery(_)).then_some(())).await;
    // From here on it reads nothing.
    let started = Instant::now();
    let patch = Bytes::from(vec![b' '; 100_000]);
    let asking = async {
        for version in 0..100 {
            let command = Command::Desired(DesiredPatch { patch: patch.clone(), version });
            let mailbox = recording.state.lock().mailboxes[&identity("d1")].clone();
            if mailbox.send(command).await.is_err() {
                return;
            }
        }
    };
    asking.await;
    let Peer { stream, serving, .. } = peer;
    serving.await.expect("no panic");
    let elapsed = started.elapsed().as_secs();
    assert!((29..61).contains(&elapsed), "{elapsed}");
    assert_eq!(recording.state.lock().gone, [identity("d1")]);
    drop(stream);
}

#[tokio::test]
async fn small_frames_and_small_windows_carry_large_messages() {
    let recording = strict();
    let (stream, _serving) = head_with(&recording, AmqpLimits::default(), Vec::new());
    let builder = fe2o3_amqp::connection::Connection::builder()
        .container_id("client")
        .hostname("hub")
        .max_frame_size(512u32);
    let mut connection = timeout(DEADLINE, builder.open_with_stream(stream)).await.unwrap().expect("opened");
    let mut tokens = Session::begin(&mut connection).await.expect("begun");
    let mut cbs = amqp_client::Cbs::attach(&mut tokens).await;
    cbs.put_good("d1/m1").await;
    let begin = Session::builder().incoming_window(16).begin(&mut connection);
    let mut session = timeout(DEADLINE, begin).await.unwrap().expect("begun");
    let address = "/devices/d1/modules/m1/messages/events";
    let mut up = telemetry(&mut session, "up", "d1/m1").await;
    let sent = PeerMessage::builder().data(Binary::from(vec![7; 100_000])).build();
    timeout(DEADLINE, up.send(sent)).await.expect("in time").expect("answered");
    assert_eq!(recording.state.lock().published[0].body.len(), 100_000);
    let mut down = Receiver::attach(&mut session, "down", address).await.expect("attached");
    let body = "y".repeat(20_000);
    let settler = Settler::new();
    let messages = (0..20).map(|tag| (tag, message(&body))).collect();
    let deliveries = Deliveries { target: Target::Input("in".into()), messages, settler: settler.clone() };
    recording.command("d1/m1", Command::Deliver(deliveries)).await;
    for _ in 0..20 {
        let received = receive(&mut down).await;
        assert_eq!(data(&received), body.as_bytes());
        down.accept(&received).await.unwrap();
    }
    let mut accepted = 0;
    while accepted < 20 {
        accepted += timeout(DEADLINE, settler.settled()).await.expect("in time").len();
    }
}

#[tokio::test]
async fn two_thousand_identities_share_a_connection() {
    const IDENTITIES: usize = 2_000;
    let recording = strict();
    // Fewer logins at a time than ask at once: the others wait for their turn.
    let limits = AmqpLimits { logins_max: 16, ..AmqpLimits::default() };
    let (mut peer, session) = Peer::open(&recording, limits).await;
    let up = peer.cbs(session).await;
    peer.credit(up).await;
    let actor = token("child/$edgeHub").await;
    peer.put(up, &actor);
    peer.put_answered().await;
    let mut sessions = Vec::new();
    // As the hub of a child device does: a session for each, the links by the same names.
    for batch in 0..IDENTITIES / 100 {
        let mut asked = Vec::new();
        for _ in 0..100 {
            sessions.push(peer.begin().await);
        }
        for (number, session) in sessions.iter().copied().enumerate().skip(batch * 100) {
            let chain = format!("leaf{number};child");
            let chain = vec![("com.microsoft:auth-chain".into(), Value::String(chain.as_str().into()))];
            let telemetry = format!("/devices/leaf{number}/messages/events");
            asked.push(peer.ask_with(
                session,
                "TelemetrySenderLink",
                Role::Sender,
                &telemetry,
                chain.clone(),
            ));
            let twin = format!("/devices/leaf{number}/twin");
            asked.push(peer.ask_with(session, "TwinReceiverLink", Role::Receiver, &twin, chain));
        }
        let mut attached = 0;
        while attached < asked.len() {
            peer.event(|event| match event {
                Event::Attached { .. } => {
                    attached += 1;
                    Some(())
                }
                Event::AttachRefused { error, .. } => panic!("{error:?}"),
                _ => None,
            })
            .await;
        }
    }
    assert_eq!(recording.state.lock().logins.len(), IDENTITIES);
    // Something for each of them.
    for number in 0..IDENTITIES {
        let correlation = MessageId::Ulong(number as u64).encoded();
        let result = Ok(TwinReply::Document(Bytes::from(number.to_string())));
        let answer = Command::TwinAnswer(TwinAnswer { correlation, result });
        recording.command(&format!("leaf{number}"), answer).await;
    }
    let mut received = 0;
    while received < IDENTITIES {
        let (id, payload) = peer
            .event(|event| match event {
                Event::Delivery(delivery) => Some((delivery.id, delivery.payload)),
                _ => None,
            })
            .await;
        peer.engine.settle(id, edgehub_broker::amqp::Outcome::Accepted);
        let message = Encoded::parse(&payload).unwrap();
        let Some(MessageId::Ulong(number)) = message.properties().unwrap().correlation_id else { panic!() };
        assert_eq!(message.body.data().unwrap(), number.to_string());
        received += 1;
    }
    // A newer token of the hub that acts for them all.
    let (head, rest) = actor.split_once(' ').unwrap();
    let reordered = rest.split('&').rev().collect::<Vec<_>>().join("&");
    peer.put(up, &format!("{head} {reordered}"));
    peer.put_answered().await;
    until("all are verified", || recording.state.lock().renewals.len() == IDENTITIES).await;
    // One goes, by each of the ways.
    recording.command("leaf7", Command::Close(CloseReason::TakenOver)).await;
    peer.engine.end(sessions[8], None);
    peer.flush().await;
    until("two are gone", || recording.state.lock().gone.len() == 2).await;
    let payload = MessageEncoder::default().data(Bytes::from_static(b"still there"));
    let link = peer.attach(session, "last", Role::Sender, "/devices/leaf9/messages/events").await;
    peer.credit(link).await;
    peer.engine.send(link, payload, SendOptions::default()).expect("sent");
    peer.event(|event| matches!(event, Event::Settled { .. }).then_some(())).await;
    assert_eq!(recording.state.lock().published[0].sender.identity, identity("leaf9"));
    assert!(!peer.engine.output().has_remaining());
}
