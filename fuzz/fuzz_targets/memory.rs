//! The backend of the targets that serve a live connection: lets everybody in, stores nothing, and sends something to
//! whoever subscribes: messages, changed desired properties, a call.

use std::future::{Future, Ready, ready};
use std::sync::Arc;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, CallId, Command, Deliveries, DesiredPatch, Feature, HeadDrop, Login, LoginError, Mailbox,
    MethodAnswer, MethodCall, PublishError, Settler, Target, TwinAnswer, TwinError, TwinOperation, TwinReply,
    TwinRequest,
};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, Sender};

/// See the head of this file.
#[derive(Clone)]
pub struct Memory;

/// Somebody who is logged in.
pub struct Client {
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
            TwinOperation::PatchReported(patch) if patch.is_empty() => {
                Err(TwinError::Invalid("empty".into()))
            }
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
