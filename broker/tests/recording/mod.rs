//! A backend that records what the AMQP head brings it, and refuses what it is told to refuse.
#![allow(dead_code)] // each test program uses a part of it

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, CallId, Command, Credentials, Feature, HeadDrop, Login, LoginError, Mailbox, MethodAnswer,
    PublishError, TwinError, TwinRequest,
};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Sender};
use parking_lot::Mutex;
use tokio::sync::watch;

pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

#[derive(Clone, Default)]
pub(crate) struct Recording {
    pub(crate) state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) logins: Vec<Login>,
    /// Newer credentials of clients that are logged in; refused like logins.
    pub(crate) renewals: Vec<Login>,
    /// Logins without a token fail.
    pub(crate) needs_token: bool,
    /// Identities whose logins fail.
    pub(crate) refused: HashMap<Identity, LoginError>,
    /// An identity whose login panics.
    pub(crate) panics: Option<Identity>,
    pub(crate) mailboxes: HashMap<Identity, Mailbox>,
    /// Bodies that are refused by the check of a single message.
    pub(crate) bad_bodies: HashMap<Bytes, PublishError>,
    /// Everything is refused when it is published.
    pub(crate) full: Option<PublishError>,
    /// Commits resolve when this turns true; at once without it.
    pub(crate) commits: Option<watch::Receiver<bool>>,
    pub(crate) published: Vec<Message>,
    pub(crate) batches: Vec<usize>,
    pub(crate) gone: Vec<Identity>,
    /// Twin requests, and why they are refused if they are.
    pub(crate) twin_requests: Vec<(Identity, TwinRequest)>,
    pub(crate) twin_refused: Option<TwinError>,
    /// What was switched on and off.
    pub(crate) features: Vec<(Identity, Feature, bool)>,
    pub(crate) method_answers: Vec<(Identity, CallId, MethodAnswer)>,
}

pub(crate) struct Client {
    recording: Recording,
    sender: Arc<Sender>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.recording.state.lock().gone.push(self.sender.identity.clone());
    }
}

impl Recording {
    /// The bodies that an identity published, as numbers, in order.
    pub(crate) fn numbers(&self, identity: &str) -> Vec<u32> {
        let identity = Identity::parse(identity).unwrap();
        let state = self.state.lock();
        let own = state.published.iter().filter(|message| message.sender.identity == identity);
        own.map(|message| std::str::from_utf8(&message.body).unwrap().parse().unwrap()).collect()
    }

    pub(crate) async fn command(&self, identity: &str, command: Command) {
        let mailbox = self.state.lock().mailboxes[&Identity::parse(identity).unwrap()].clone();
        mailbox.send(command).await.unwrap();
    }
}

/// Waits until a condition is true.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

impl Backend for Recording {
    type Client = Client;
    type Commit = Pin<Box<dyn Future<Output = Result<(), PublishError>> + Send>>;

    async fn login(&self, login: Login, mailbox: Mailbox) -> Result<Client, LoginError> {
        let mut state = self.state.lock();
        state.logins.push(login.clone());
        if state.panics.as_ref() == Some(&login.identity) {
            drop(state);
            panic!("as the test asked");
        }
        if state.needs_token && login.credentials == Credentials::None {
            return Err(LoginError::Refused("no credentials".into()));
        }
        if let Some(error) = state.refused.get(&login.identity) {
            return Err(error.clone());
        }
        state.mailboxes.insert(login.identity.clone(), mailbox);
        let sender =
            Sender { identity: login.identity, origin: Origin::Downstream, model_id: login.model_id };
        Ok(Client { recording: self.clone(), sender: Arc::new(sender) })
    }

    fn reauthenticate(
        &self,
        _: &Client,
        login: Login,
    ) -> impl Future<Output = Result<(), LoginError>> + Send + 'static + use<> {
        let mut state = self.state.lock();
        let result = state.refused.get(&login.identity).cloned().map_or(Ok(()), Err);
        state.renewals.push(login);
        std::future::ready(result)
    }

    fn sender(&self, client: &Client) -> Arc<Sender> {
        client.sender.clone()
    }

    fn check(&self, _: &Client, message: &Message) -> Result<(), PublishError> {
        match self.state.lock().bad_bodies.get(&message.body) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    async fn publish(&self, _: &mut Client, messages: Vec<Message>) -> Result<Self::Commit, PublishError> {
        let mut state = self.state.lock();
        if let Some(error) = &state.full {
            return Err(error.clone());
        }
        state.batches.push(messages.len());
        state.published.extend(messages);
        let commits = state.commits.clone();
        Ok(Box::pin(async move {
            if let Some(mut commits) = commits {
                let _ = commits.wait_for(|committed| *committed).await;
            }
            Ok(())
        }))
    }

    fn subscribe(&self, client: &mut Client, feature: Feature, on: bool) {
        self.state.lock().features.push((client.sender.identity.clone(), feature, on));
    }

    fn twin(&self, client: &mut Client, request: TwinRequest) -> Result<(), TwinError> {
        let mut state = self.state.lock();
        state.twin_requests.push((client.sender.identity.clone(), request));
        state.twin_refused.clone().map_or(Ok(()), Err)
    }

    fn method_answered(&self, client: &mut Client, call: CallId, answer: MethodAnswer) {
        self.state.lock().method_answers.push((client.sender.identity.clone(), call, answer));
    }

    async fn load_session(&self, _: &Identity) -> Option<Bytes> {
        None
    }

    async fn store_session(&self, _: &Identity, _: Option<Bytes>) -> Result<(), PublishError> {
        Ok(())
    }

    fn dropped(&self, _: &Client, _: HeadDrop) {}
}
