//! Bytes into a live AMQP connection, with a backend in memory: from its first byte, behind the open, with an identity that
//! is logged in by one of the ways and has a link of each function, and then also as messages on those links. The first
//! byte of the input says which, and where the rest is cut in two.
#![no_main]

mod memory;

use std::time::Instant as StdInstant;

use bytes::{BufMut, Bytes, BytesMut};
use edgehub_broker::amqp::{
    AttachOptions, Connection, Event, LinkId, MESSAGE_FORMAT_BATCH, MessageId, Options, PutToken, Role,
    SendOptions, SessionId, Terminus,
};
use edgehub_broker::head::amqp::{AmqpLimits, serve};
use edgehub_broker::head::mqtt::Peer;
use libfuzzer_sys::fuzz_target;
use memory::Memory;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;

const PIPE_BYTES: usize = 1 << 22;
const TOKEN: &str = "SharedAccessSignature sr=h%2Fdevices%2Fe%2Fmodules%2Fm&sig=AAAA&se=4000000000";
const NODE: &str = "/devices/e/modules/m";

/// A client that knows the protocol, for the way to where the bytes of the fuzzer begin.
struct Guide {
    engine: Connection,
    input: BytesMut,
}

impl Guide {
    async fn until<T>(&mut self, stream: &mut DuplexStream, of: impl Fn(Event) -> Option<T>) -> T {
        loop {
            self.flush(stream).await;
            while let Some(event) = self.engine.poll_event() {
                if let Some(found) = of(event) {
                    return found;
                }
            }
            assert!(stream.read_buf(&mut self.input).await.expect("bytes") > 0);
            self.engine.receive(&mut self.input, StdInstant::now());
        }
    }

    async fn attach(
        &mut self,
        stream: &mut DuplexStream,
        session: SessionId,
        role: Role,
        address: &str,
    ) -> LinkId {
        let (source, target) = match role {
            Role::Sender => (Terminus::source("x"), Terminus::target(address)),
            Role::Receiver => (Terminus::source(address), Terminus::target("x")),
        };
        let options = AttachOptions {
            name: address.into(),
            role,
            source,
            target,
            snd_settle: None,
            rcv_settle: None,
            max_message_bytes: 0,
            credit: 10,
            properties: Vec::new(),
        };
        let link = self.engine.attach(session, options).expect("room");
        self.until(stream, |event| {
            matches!(event, Event::Attached { link: attached, .. } if attached == link).then_some(())
        })
        .await;
        link
    }

    /// Sends what is due.
    async fn flush(&mut self, stream: &mut DuplexStream) {
        let mut bytes = BytesMut::new();
        bytes.put(&mut *self.engine.output());
        // The hub may have closed.
        let _any_end = stream.write_all(&bytes).await;
    }
}

/// A guide behind its open; when `logged_in`, with the links on which it sends, that for tokens first.
async fn guide(stream: &mut DuplexStream, logged_in: bool) -> (Guide, Vec<LinkId>) {
    let engine = Connection::client(Options::default(), StdInstant::now());
    let mut guide = Guide { engine, input: BytesMut::new() };
    guide.until(stream, |event| matches!(event, Event::Opened(_)).then_some(())).await;
    let session = guide.engine.begin().expect("open");
    guide.until(stream, |event| matches!(event, Event::SessionBegun { .. }).then_some(())).await;
    if !logged_in {
        return (guide, Vec::new());
    }
    let tokens = guide.attach(stream, session, Role::Sender, "$cbs").await;
    guide.attach(stream, session, Role::Receiver, "$cbs").await;
    while guide.engine.credit(tokens) == 0 {
        guide.until(stream, |event| matches!(event, Event::CreditChanged { .. }).then_some(())).await;
    }
    let request = PutToken::encode(MessageId::Ulong(1), "name", TOKEN, 0);
    let options = SendOptions { settled: true, ..SendOptions::default() };
    guide.engine.send(tokens, request, options).expect("credit");
    guide.until(stream, |event| matches!(event, Event::Delivery(_)).then_some(())).await;
    let mut senders = vec![tokens];
    for (role, function) in [
        (Role::Sender, "messages/events"),
        (Role::Receiver, "messages/events"),
        (Role::Sender, "twin"),
        (Role::Receiver, "twin"),
        (Role::Sender, "methods/deviceBound"),
        (Role::Receiver, "methods/deviceBound"),
    ] {
        let link = guide.attach(stream, session, role, &format!("{NODE}/{function}")).await;
        if role == Role::Sender {
            senders.push(link);
        }
    }
    (guide, senders)
}

/// Messages, each behind a byte that says on which link and in which format, and one that says how long it is.
async fn messages(guide: &mut Guide, senders: &[LinkId], stream: &mut DuplexStream, mut bytes: &[u8]) {
    while let Some((&[how, length], rest)) = bytes.split_first_chunk() {
        let (message, rest) = rest.split_at(rest.len().min(usize::from(length)));
        bytes = rest;
        let link = senders[usize::from(how) % senders.len()];
        let format = if how & 0x80 == 0 { 0 } else { MESSAGE_FORMAT_BATCH };
        let options = SendOptions { settled: how & 0x40 != 0, format, ..SendOptions::default() };
        let payload = [Bytes::copy_from_slice(message)].into_iter().collect();
        // Credit and window are not renewed: nothing of the answers is read.
        let _refused = guide.engine.send(link, payload, options);
        guide.flush(stream).await;
        tokio::task::yield_now().await;
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (mut near, far) = tokio::io::duplex(PIPE_BYTES);
        let certificates =
            if choice & 4 == 0 { Vec::new() } else { vec![Bytes::from_static(b"certificate")] };
        let peer = Peer { address: None, certificates, accepted_at: Instant::now() };
        let limits = AmqpLimits { iot_hub_host: Some("h.example.net".into()), ..AmqpLimits::default() };
        let serving = tokio::spawn(serve(far, Memory, limits, peer, std::future::pending()));
        let (mut bytes, input_bytes) = (bytes, bytes.len());
        if choice & 3 != 0 {
            let (mut guide, senders) = guide(&mut near, choice & 3 != 1).await;
            if choice & 3 == 3 {
                messages(&mut guide, &senders, &mut near, std::mem::take(&mut bytes)).await;
            }
        }
        let (first, second) = bytes.split_at(bytes.len() * usize::from(choice >> 3) / 32);
        for part in [first, second] {
            // The hub may have closed after the first part.
            let _any_end = near.write_all(part).await;
            tokio::task::yield_now().await;
        }
        let _any_end = near.shutdown().await;
        let mut answers = Vec::new();
        near.read_to_end(&mut answers).await.expect("an end");
        // No frame is answered by more than some frames.
        assert!(answers.len() <= 65_536 + 200 * input_bytes);
        drop(near);
        serving.await.expect("no panic");
    });
});
