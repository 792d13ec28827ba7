//! Bytes into a live connection, before its login and after it, with a backend in memory. The first byte of the input
//! says which, as what kind of client, and where the rest is cut in two. Whoever subscribes to something is sent some
//! of it: messages, changed desired properties, a call.
#![no_main]

use std::future::{Future, Ready, ready};
use std::sync::Arc;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, CallId, Command, DesiredPatch, Deliveries, Feature, HeadDrop, Login, LoginError, Mailbox,
    MethodAnswer, MethodCall, PublishError, Settler, Target, TwinAnswer, TwinError, TwinOperation, TwinReply,
    TwinRequest,
};
use edgehub_broker::head::mqtt::{MqttLimits, Peer, serve};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, Sender};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

const PIPE_BYTES: usize = 1 << 22;

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
        if !on {
            return;
        }
        let deliver = |target| {
            let message =
                Message::new(client.sender.clone(), Properties::empty(), Bytes::from_static(b"body"));
            Command::Deliver(Deliveries { target, messages: vec![(1, message)], settler: Settler::new() })
        };
        let command = match feature {
            Feature::ModuleInputs => deliver(Target::Input("in1".into())),
            Feature::CloudToDevice => deliver(Target::Device),
            Feature::DesiredProperties => {
                Command::Desired(DesiredPatch { patch: Bytes::from_static(b"{}"), version: 1 })
            }
            Feature::Methods => {
                Command::Invoke(MethodCall { id: CallId::new(), name: "m".into(), payload: Bytes::new() })
            }
            Feature::TwinResponses => return,
        };
        let _full = client.mailbox.try_send(command);
    }

    fn twin(&self, client: &mut Client, request: TwinRequest) -> Result<(), TwinError> {
        let TwinRequest { correlation: Some(correlation), operation } = request else { return Ok(()) };
        let result = match operation {
            TwinOperation::Get => Ok(TwinReply::Document(Bytes::from_static(b"{}"))),
            TwinOperation::PatchReported(patch) if patch.is_empty() => Err(TwinError::Invalid("empty".into())),
            TwinOperation::PatchReported(_) => Ok(TwinReply::Patched { version: Some(1) }),
        };
        client
            .mailbox
            .try_send(Command::TwinAnswer(TwinAnswer { correlation, result }))
            .map_err(|_| TwinError::Busy)
    }

    fn method_answered(&self, client: &mut Client, _: CallId, answer: MethodAnswer) {
        // An answer makes the hub say something more, whatever the connection does at the moment.
        let patch = DesiredPatch { patch: answer.payload, version: 2 };
        let _full = client.mailbox.try_send(Command::Desired(patch));
    }

    async fn load_session(&self, _: &Identity) -> Option<Bytes> {
        None
    }

    async fn store_session(&self, _: &Identity, _: Option<Bytes>) -> Result<(), PublishError> {
        Ok(())
    }

    fn dropped(&self, _: &Client, _: HeadDrop) {}
}

fn connect(client_id: &str) -> Vec<u8> {
    let mut packet = b"\x10\x00\x00\x04MQTT\x04\xc0\x00\x3c".to_vec();
    for text in [client_id, &format!("h/{client_id}/?api-version=1"), "token"] {
        packet.extend((text.len() as u16).to_be_bytes());
        packet.extend(text.as_bytes());
    }
    packet[1] = (packet.len() - 2) as u8;
    packet
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (mut near, far) = tokio::io::duplex(PIPE_BYTES);
        let peer = Peer { address: None, certificates: Vec::new(), accepted_at: Instant::now() };
        let serving = tokio::spawn(serve(far, Memory, MqttLimits::default(), peer, std::future::pending()));
        let client_id = if choice & 2 == 0 { "e/m" } else { "e" };
        if choice & 1 == 1 {
            near.write_all(&connect(client_id)).await.expect("room");
            let mut connack = [0; 4];
            near.read_exact(&mut connack).await.expect("an answer");
            assert_eq!(connack, [0x20, 2, 0, 0]);
        }
        let (first, second) = bytes.split_at(bytes.len() * usize::from(choice >> 2) / 64);
        for part in [first, second] {
            // The hub may have closed after the first part.
            let _any_end = near.write_all(part).await;
            tokio::task::yield_now().await;
        }
        let _any_end = near.shutdown().await;
        let mut answers = Vec::new();
        near.read_to_end(&mut answers).await.expect("an end");
        // No packet is answered by more than some bytes and one delivery; a request id comes back with its answer.
        assert!(answers.len() <= 1_024 + 200 * bytes.len());
        drop(near);
        serving.await.expect("no panic");
    });
});
