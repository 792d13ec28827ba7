//! Parts of the AMQP engine: what a receiving end and a sending end cost per transfer with its disposition, the check of
//! a frame before anything reads it, and the sections of a message. No sockets, no hub.

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes, BytesMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use edgehub_broker::amqp::{
    AttachAnswer, AttachOptions, ClientSasl, Connection, Event, LinkId, Message, MessageEncoder, MessageId,
    MessageProperties, Options, Outcome, Payload, Role, SendOptions, Terminus, wire,
};

/// Messages of one turn: what one read of a socket brings.
const MESSAGES: u32 = 64;
const BODY_BYTES: usize = 256;
const CREDIT: u32 = 1_000;
const FRAME_HEADER_BYTES: usize = 8;

/// Both ends of a connection with one link, in memory.
struct Pair {
    sender: Connection,
    receiver: Connection,
    link: LinkId,
    now: Instant,
}

impl Pair {
    fn new() -> Self {
        let now = Instant::now();
        let sasl = Some(ClientSasl::Anonymous);
        let mut sender = Connection::client(Options { sasl, ..Options::default() }, now);
        let mut receiver = Connection::listener(Options::default(), now);
        while !matches!(sender.poll_event(), Some(Event::Opened(_))) {
            carry(&mut sender, &mut receiver, now);
            carry(&mut receiver, &mut sender, now);
        }
        let session = sender.begin().expect("the connection is open");
        let options = AttachOptions {
            name: "telemetry".into(),
            role: Role::Sender,
            source: Terminus::source("d1"),
            target: Terminus::target("amqps://hub/devices/d1/messages/events"),
            snd_settle: None,
            rcv_settle: None,
            max_message_bytes: 0,
            credit: 0,
            properties: Vec::new(),
        };
        let link = sender.attach(session, options).expect("the session takes links");
        while sender.credit(link) == 0 {
            carry(&mut sender, &mut receiver, now);
            while let Some(event) = receiver.poll_event() {
                if let Event::AttachRequested(request) = event {
                    let answer = AttachAnswer {
                        snd_settle: None,
                        rcv_settle: None,
                        max_message_bytes: 1 << 20,
                        credit: CREDIT,
                        properties: Vec::new(),
                    };
                    receiver.accept_attach(request.link, answer);
                }
            }
            carry(&mut receiver, &mut sender, now);
        }
        while sender.poll_event().is_some() {}
        Self { sender, receiver, link, now }
    }

    /// One turn: messages there, dispositions back. What the sending end took, and what the receiving end took.
    fn turn(&mut self, message: &Payload) -> (Duration, Duration) {
        let Self { sender, receiver, link, now } = self;
        let begin = Instant::now();
        for _ in 0..MESSAGES {
            sender.send(*link, message.clone(), SendOptions::default()).expect("credit for a turn");
        }
        let mut there = taken(sender);
        let sent = begin.elapsed();

        let begin = Instant::now();
        receiver.receive(&mut there, *now);
        let mut received = 0;
        while let Some(event) = receiver.poll_event() {
            let Event::Delivery(delivery) = event else { continue };
            black_box(&delivery.payload);
            receiver.settle(delivery.id, Outcome::Accepted);
            received += 1;
        }
        let mut back = taken(receiver);
        let receiving = begin.elapsed();
        assert_eq!(received, MESSAGES);

        let begin = Instant::now();
        sender.receive(&mut back, *now);
        let mut settled = 0;
        while let Some(event) = sender.poll_event() {
            settled += u32::from(matches!(event, Event::Settled { outcome: Outcome::Accepted, .. }));
        }
        let settling = begin.elapsed();
        assert_eq!(settled, MESSAGES);
        (sent + settling, receiving)
    }
}

/// What an end has to write.
fn taken(from: &mut Connection) -> BytesMut {
    let output = from.output();
    let mut bytes = BytesMut::with_capacity(output.len());
    while output.has_remaining() {
        let chunk = output.chunk();
        let size = chunk.len();
        bytes.extend_from_slice(chunk);
        output.advance(size);
    }
    bytes
}

fn carry(from: &mut Connection, to: &mut Connection, now: Instant) {
    to.receive(&mut taken(from), now);
}

/// A message as SDKs send them: an id, a content type and two properties of the application.
fn message() -> Payload {
    let mut encoder = MessageEncoder::with_capacity(256);
    encoder
        .properties(&MessageProperties {
            message_id: Some(MessageId::String("8f1e5c52-4b7a-4b7e-9a53-6f7f0f9d8e11".into())),
            content_type: Some("application/json".into()),
            content_encoding: Some("utf-8".into()),
            ..MessageProperties::default()
        })
        .application_strings([("level", "high"), ("line", "7")]);
    encoder.data(Bytes::from(vec![b'x'; BODY_BYTES]))
}

fn ends(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("amqp");
    group.throughput(Throughput::Elements(u64::from(MESSAGES)));
    let message = message();
    let mut pair = Pair::new();
    type Part = fn((Duration, Duration)) -> Duration;
    let parts: [(&str, Part); 2] =
        [("receive and settle", |(_, receiving)| receiving), ("send and be settled", |(sending, _)| sending)];
    for (name, part) in parts {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|turns| (0..turns).map(|_| part(pair.turn(&message))).sum());
        });
    }
    group.finish();
}

fn parts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("amqp parts");
    group.throughput(Throughput::Elements(1));
    let message = message();
    let mut pair = Pair::new();
    pair.sender.send(pair.link, message.clone(), SendOptions::default()).expect("credit");
    let frame = taken(&mut pair.sender);
    group.bench_function("check of a transfer's performative", |bencher| {
        bencher.iter(|| wire::check_value(black_box(&frame), FRAME_HEADER_BYTES).expect("well formed"));
    });
    let encoded = Bytes::from(message.concat());
    group.bench_function("message read", |bencher| {
        bencher.iter(|| {
            let message = Message::parse(black_box(&encoded)).expect("well formed");
            let properties = message.properties().expect("well formed");
            let application = message.application_properties().expect("well formed").count();
            black_box((properties, application, message.body.data()))
        });
    });
    group.finish();
}

criterion_group!(benches, ends, parts);
criterion_main!(benches);
