//! Bytes into a live connection, before its login and after it, with a backend in memory. The first byte of the input
//! says which, and where the rest is cut in two.
#![no_main]

use std::future::{Future, Ready, ready};
use std::sync::Arc;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, CallId, Command, Deliveries, Feature, HeadDrop, Login, LoginError, Mailbox, MethodAnswer,
    PublishError, Settler, Target, TwinAnswer, TwinError, TwinReply, TwinRequest,
};
use edgehub_broker::head::mqtt::{MqttLimits, Peer, serve};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, Sender};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

const PIPE_BYTES: usize = 1 << 22;

/// Lets everybody in, stores nothing, and delivers one message to whoever subscribes.
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

    fn subscribe(&self, client: &mut Client, _: Feature, on: bool) {
        if on {
            let message =
                Message::new(client.sender.clone(), Properties::empty(), Bytes::from_static(b"body"));
            let deliveries =
                Deliveries { target: Target::Input("in1".into()), messages: vec![(1, message)], settler: Settler::new() };
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

fn connect() -> Vec<u8> {
    let mut packet = b"\x10\x00\x00\x04MQTT\x04\xc0\x00\x3c".to_vec();
    for text in ["e/m", "h/e/m/?api-version=1", "token"] {
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
        let logged_in = choice & 1 == 1;
        if logged_in {
            near.write_all(&connect()).await.expect("room");
            let mut connack = [0; 4];
            near.read_exact(&mut connack).await.expect("an answer");
            assert_eq!(connack, [0x20, 2, 0, 0]);
        }
        let (first, second) = bytes.split_at(bytes.len() * usize::from(choice >> 1) / 128);
        for part in [first, second] {
            // The hub may have closed after the first part.
            let _any_end = near.write_all(part).await;
            tokio::task::yield_now().await;
        }
        let _any_end = near.shutdown().await;
        let mut answers = Vec::new();
        near.read_to_end(&mut answers).await.expect("an end");
        // No packet is answered by more than some bytes and one delivery.
        assert!(answers.len() <= 1_024 + 200 * bytes.len());
        drop(near);
        serving.await.expect("no panic");
    });
});
