//! A backend that records, and a client that speaks bytes.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use edgehub_broker::backend::{
    Backend, CallId, Command, Feature, HeadDrop, Login, LoginError, Mailbox, MethodAnswer, PublishError,
    TwinError, TwinRequest,
};
use edgehub_broker::head::mqtt::{ConnectionEnd, MqttLimits, Peer, serve};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Sender};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub(crate) type Commit = Pin<Box<dyn Future<Output = Result<(), PublishError>> + Send>>;

#[derive(Clone, Default)]
pub(crate) struct Mock {
    pub(crate) state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) logins: Vec<Login>,
    pub(crate) refuse: Option<LoginError>,
    pub(crate) hold_login: Option<oneshot::Receiver<()>>,
    pub(crate) hold_publish: Option<oneshot::Receiver<()>>,
    pub(crate) mailboxes: HashMap<Identity, Mailbox>,
    pub(crate) published: Vec<Message>,
    pub(crate) batches: Vec<usize>,
    pub(crate) hold_commits: bool,
    pub(crate) commits: VecDeque<oneshot::Sender<Result<(), PublishError>>>,
    pub(crate) sessions: HashMap<Identity, Bytes>,
    pub(crate) session_writes: usize,
    pub(crate) features: Vec<(Feature, bool)>,
    pub(crate) dropped: Vec<HeadDrop>,
    pub(crate) clients_gone: usize,
    /// Twin requests, and why they are refused if they are.
    pub(crate) twin_requests: Vec<(Identity, TwinRequest)>,
    pub(crate) twin_refused: Option<TwinError>,
    pub(crate) method_answers: Vec<(Identity, CallId, MethodAnswer)>,
}

pub(crate) struct MockClient {
    mock: Mock,
    sender: Arc<Sender>,
}

impl Drop for MockClient {
    fn drop(&mut self) {
        self.mock.state.lock().clients_gone += 1;
    }
}

impl Backend for Mock {
    type Client = MockClient;
    type Commit = Commit;

    async fn login(&self, login: Login, mailbox: Mailbox) -> Result<MockClient, LoginError> {
        let hold = self.state.lock().hold_login.take();
        if let Some(hold) = hold {
            let _ = hold.await;
        }
        let mut state = self.state.lock();
        state.logins.push(login.clone());
        if let Some(error) = state.refuse.clone() {
            return Err(error);
        }
        state.mailboxes.insert(login.identity.clone(), mailbox);
        let sender = Sender { identity: login.identity, origin: Origin::Internal, model_id: login.model_id };
        Ok(MockClient { mock: self.clone(), sender: Arc::new(sender) })
    }

    fn reauthenticate(
        &self,
        _: &MockClient,
        _: Login,
    ) -> impl Future<Output = Result<(), LoginError>> + Send + 'static + use<> {
        std::future::ready(Ok(()))
    }

    fn sender(&self, client: &MockClient) -> Arc<Sender> {
        client.sender.clone()
    }

    fn check(&self, _: &MockClient, message: &Message) -> Result<(), PublishError> {
        const LIMIT: usize = 100_000;
        match message.size_bytes() {
            size_bytes if size_bytes > LIMIT => {
                Err(PublishError::TooLarge { size_bytes, limit_bytes: LIMIT })
            }
            _ => Ok(()),
        }
    }

    async fn publish(&self, _: &mut MockClient, messages: Vec<Message>) -> Result<Commit, PublishError> {
        let hold = self.state.lock().hold_publish.take();
        if let Some(hold) = hold {
            let _ = hold.await;
        }
        let mut state = self.state.lock();
        state.batches.push(messages.len());
        state.published.extend(messages);
        if !state.hold_commits {
            return Ok(Box::pin(std::future::ready(Ok(()))));
        }
        let (sender, receiver) = oneshot::channel();
        state.commits.push_back(sender);
        Ok(Box::pin(async move { receiver.await.unwrap_or(Err(PublishError::Store("gone".into()))) }))
    }

    fn subscribe(&self, _: &mut MockClient, feature: Feature, on: bool) {
        self.state.lock().features.push((feature, on));
    }

    fn twin(&self, client: &mut MockClient, request: TwinRequest) -> Result<(), TwinError> {
        let mut state = self.state.lock();
        state.twin_requests.push((client.sender.identity.clone(), request));
        state.twin_refused.clone().map_or(Ok(()), Err)
    }

    fn method_answered(&self, client: &mut MockClient, call: CallId, answer: MethodAnswer) {
        self.state.lock().method_answers.push((client.sender.identity.clone(), call, answer));
    }

    async fn load_session(&self, identity: &Identity) -> Option<Bytes> {
        self.state.lock().sessions.get(identity).cloned()
    }

    async fn store_session(&self, identity: &Identity, session: Option<Bytes>) -> Result<(), PublishError> {
        let mut state = self.state.lock();
        state.session_writes += 1;
        match session {
            Some(bytes) => state.sessions.insert(identity.clone(), bytes),
            None => state.sessions.remove(identity),
        };
        Ok(())
    }

    fn dropped(&self, _: &MockClient, reason: HeadDrop) {
        self.state.lock().dropped.push(reason);
    }
}

impl Mock {
    pub(crate) fn open(&self) -> Wire {
        self.open_with(65_536, Vec::new(), MqttLimits::default())
    }

    pub(crate) fn open_with(&self, pipe_bytes: usize, certificates: Vec<Bytes>, limits: MqttLimits) -> Wire {
        let (near, far) = tokio::io::duplex(pipe_bytes);
        let (stop, stopped) = oneshot::channel::<()>();
        let peer = Peer { address: None, certificates, accepted_at: Instant::now() };
        let shutdown = async move {
            if stopped.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let end = tokio::spawn(serve(far, self.clone(), limits, peer, shutdown));
        Wire { stream: near, end, stop }
    }

    pub(crate) async fn connected(&self, client_id: &str) -> Wire {
        let mut wire = self.open();
        wire.send(&connect(client_id, false, 60)).await;
        let (first, body) = wire.packet().await.unwrap();
        assert_eq!((first, body[1]), (0x20, 0));
        wire
    }

    pub(crate) async fn until(&self, condition: impl Fn(&State) -> bool) {
        for _ in 0..1_000_000 {
            if condition(&self.state.lock()) {
                return;
            }
            tokio::task::yield_now().await;
        }
        panic!("the condition never came true");
    }

    pub(crate) async fn command(&self, client_id: &str, command: Command) {
        let mailbox = self.state.lock().mailboxes[&Identity::parse(client_id).unwrap()].clone();
        mailbox.send(command).await.unwrap();
    }
}

pub(crate) struct Wire {
    pub(crate) stream: DuplexStream,
    pub(crate) end: JoinHandle<ConnectionEnd>,
    pub(crate) stop: oneshot::Sender<()>,
}

impl Wire {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next packet, or nothing when the hub closed.
    pub(crate) async fn packet(&mut self) -> Option<(u8, Vec<u8>)> {
        tokio::time::timeout(Duration::from_secs(100_000), async {
            let first = self.stream.read_u8().await.ok()?;
            let (mut len, mut shift) = (0usize, 0);
            loop {
                let byte = self.stream.read_u8().await.ok()?;
                len |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    break;
                }
            }
            let mut body = vec![0; len];
            self.stream.read_exact(&mut body).await.ok()?;
            Some((first, body))
        })
        .await
        .unwrap()
    }

    pub(crate) async fn expect(&mut self, bytes: &[u8]) {
        let mut read = vec![0; bytes.len()];
        self.stream.read_exact(&mut read).await.unwrap();
        assert_eq!(read, bytes);
    }

    /// All bytes up to the end, and how the connection ended.
    pub(crate) async fn ended(mut self) -> (Vec<u8>, ConnectionEnd) {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).await.unwrap();
        drop(self.stream);
        (rest, self.end.await.unwrap())
    }
}

pub(crate) fn connect(client_id: &str, clean_session: bool, keep_alive_secs: u16) -> Vec<u8> {
    connect_with(client_id, &format!("hub/{client_id}/?api-version=1"), clean_session, keep_alive_secs, None)
}

pub(crate) fn connect_with(
    client_id: &str,
    user_name: &str,
    clean_session: bool,
    keep_alive_secs: u16,
    will: Option<(&str, &str)>,
) -> Vec<u8> {
    let mut body = b"\x00\x04MQTT\x04".to_vec();
    body.push(0xc0 | u8::from(clean_session) << 1 | if will.is_some() { 0x0c } else { 0 });
    body.extend(keep_alive_secs.to_be_bytes());
    let (topic, payload) = will.unzip();
    for text in [Some(client_id), topic, payload, Some(user_name), Some("token")].into_iter().flatten() {
        body.extend((text.len() as u16).to_be_bytes());
        body.extend(text.as_bytes());
    }
    packet(0x10, &body)
}

pub(crate) fn publish(topic: &str, packet_id: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = (topic.len() as u16).to_be_bytes().to_vec();
    body.extend(topic.as_bytes());
    if packet_id > 0 {
        body.extend(packet_id.to_be_bytes());
    }
    body.extend(payload);
    packet(if packet_id > 0 { 0x32 } else { 0x30 }, &body)
}

pub(crate) fn subscribe(packet_id: u16, filters: &[(&str, u8)]) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    for (filter, qos) in filters {
        body.extend((filter.len() as u16).to_be_bytes());
        body.extend(filter.as_bytes());
        body.push(*qos);
    }
    packet(0x82, &body)
}

pub(crate) fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::from(&[first][..]);
    let mut len = body.len();
    while len >= 0x80 {
        out.extend_from_slice(&[len as u8 | 0x80]);
        len >>= 7;
    }
    out.extend_from_slice(&[len as u8]);
    out.extend_from_slice(body);
    out.to_vec()
}
