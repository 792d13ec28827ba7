//! Bytes into a live AMQP connection, with a backend in memory: from its first byte, behind the open, and with an
//! identity that is logged in by one of the ways and has a link of each function. The first byte of the input says which,
//! and where the rest is cut in two.
#![no_main]

use std::future::{Future, Ready, ready};
use std::sync::Arc;
use std::time::Instant as StdInstant;

use bytes::{BufMut, Bytes, BytesMut};
use edgehub_broker::amqp::{
    AttachOptions, Connection, Event, LinkId, MessageId, Options, PutToken, Role, SendOptions, SessionId,
    Terminus,
};
use edgehub_broker::backend::{
    Backend, CallId, Command, Deliveries, DesiredPatch, Feature, HeadDrop, Login, LoginError, Mailbox,
    MethodAnswer, MethodCall, PublishError, Settler, Target, TwinAnswer, TwinError, TwinReply, TwinRequest,
};
use edgehub_broker::head::amqp::{AmqpLimits, serve};
use edgehub_broker::head::mqtt::Peer;
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, Sender};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;

const PIPE_BYTES: usize = 1 << 22;
const TOKEN: &str = "SharedAccessSignature sr=h%2Fdevices%2Fe%2Fmodules%2Fm&sig=AAAA&se=4000000000";
const NODE: &str = "/devices/e/modules/m";

/// Lets everybody in, stores nothing, and sends something to whoever subscribes.
#[derive(Clone)]
struct Memory;

struct Client {
    sender: Arc<Sender>,
    mailbox: Mailbox,
}

impl Backend for Memory {
    type Client = Client;
    type Commit = Ready<Result<(), PublishError>>;

    async fn login(&self, login: Login, mailbox: Mailbox) -> Result<Client, LoginError> {
        let sender = Sender { identity: login.identity, origin: Origin::Internal, model_id: login.model_id };
        Ok(Client { sender: Arc::new(sender), mailbox })
    }

    fn reauthenticate(
        &self,
        _: &Client,
        _: Login,
    ) -> impl Future<Output = Result<(), LoginError>> + Send + 'static + use<> {
        ready(Ok(()))
    }

    fn sender(&self, client: &Client) -> Arc<Sender> {
        client.sender.clone()
    }

    fn check(&self, _: &Client, _: &Message) -> Result<(), PublishError> {
        Ok(())
    }

    async fn publish(&self, _: &mut Client, _: Vec<Message>) -> Result<Self::Commit, PublishError> {
        Ok(ready(Ok(())))
    }

    fn subscribe(&self, client: &mut Client, feature: Feature, on: bool) {
        let target = match feature {
            Feature::ModuleInputs => Target::Input("in1".into()),
            Feature::CloudToDevice => Target::Device,
            Feature::Methods if on => {
                let call = MethodCall { id: CallId::new(), name: "m".into(), payload: Bytes::new() };
                let _full = client.mailbox.try_send(Command::Invoke(call));
                return;
            }
            Feature::DesiredProperties if on => {
                let patch = DesiredPatch { patch: Bytes::from_static(b"{}"), version: 1 };
                let _full = client.mailbox.try_send(Command::Desired(patch));
                return;
            }
            Feature::Methods | Feature::DesiredProperties | Feature::TwinResponses => return,
        };
        if on {
            let message =
                Message::new(client.sender.clone(), Properties::empty(), Bytes::from_static(b"body"));
            let deliveries = Deliveries { target, messages: vec![(1, message)], settler: Settler::new() };
            let _full = client.mailbox.try_send(Command::Deliver(deliveries));
        }
    }

    fn twin(&self, client: &mut Client, request: TwinRequest) -> Result<(), TwinError> {
        let TwinRequest { correlation: Some(correlation), .. } = request else { return Ok(()) };
        let result = Ok(TwinReply::Document(Bytes::from_static(b"{}")));
        client
            .mailbox
            .try_send(Command::TwinAnswer(TwinAnswer { correlation, result }))
            .map_err(|_| TwinError::Busy)
    }

    fn method_answered(&self, _: &mut Client, _: CallId, _: MethodAnswer) {}

    async fn load_session(&self, _: &Identity) -> Option<Bytes> {
        None
    }

    async fn store_session(&self, _: &Identity, _: Option<Bytes>) -> Result<(), PublishError> {
        Ok(())
    }

    fn dropped(&self, _: &Client, _: HeadDrop) {}
}

/// A client that knows the protocol, for the way to where the bytes of the fuzzer begin.
struct Guide {
    engine: Connection,
    input: BytesMut,
}

impl Guide {
    async fn until<T>(&mut self, stream: &mut DuplexStream, of: impl Fn(Event) -> Option<T>) -> T {
        loop {
            let mut bytes = BytesMut::new();
            bytes.put(&mut *self.engine.output());
            stream.write_all(&bytes).await.expect("room");
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
}

async fn guide(stream: &mut DuplexStream, logged_in: bool) {
    let engine = Connection::client(Options::default(), StdInstant::now());
    let mut guide = Guide { engine, input: BytesMut::new() };
    guide.until(stream, |event| matches!(event, Event::Opened(_)).then_some(())).await;
    let session = guide.engine.begin().expect("open");
    guide.until(stream, |event| matches!(event, Event::SessionBegun { .. }).then_some(())).await;
    if !logged_in {
        return;
    }
    let up = guide.attach(stream, session, Role::Sender, "$cbs").await;
    guide.attach(stream, session, Role::Receiver, "$cbs").await;
    while guide.engine.credit(up) == 0 {
        guide.until(stream, |event| matches!(event, Event::CreditChanged { .. }).then_some(())).await;
    }
    let request = PutToken::encode(MessageId::Ulong(1), "name", TOKEN, 0);
    guide.engine.send(up, request, SendOptions { settled: true, ..SendOptions::default() }).expect("credit");
    guide.until(stream, |event| matches!(event, Event::Delivery(_)).then_some(())).await;
    for (role, function) in [
        (Role::Sender, "messages/events"),
        (Role::Receiver, "messages/events"),
        (Role::Sender, "twin"),
        (Role::Receiver, "twin"),
        (Role::Sender, "methods/deviceBound"),
        (Role::Receiver, "methods/deviceBound"),
    ] {
        guide.attach(stream, session, role, &format!("{NODE}/{function}")).await;
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
        if choice & 3 != 0 {
            guide(&mut near, choice & 3 != 1).await;
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
        assert!(answers.len() <= 65_536 + 200 * bytes.len());
        drop(near);
        serving.await.expect("no panic");
    });
});
