//! The stand-in as the protocol heads see it: logins against the registry, telemetry into the log, and the control
//! plane of connected clients.

mod courier;
mod invoke;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, CallId, CloseReason, Command, Feature, HeadDrop, Login, LoginError, Mailbox, MethodAnswer,
    PublishError, TwinError, TwinRequest,
};
use edgehub_broker::identity::{ClientTrust, Identity, Status, Verdict, unix_now_secs, verify};
use edgehub_broker::message::{MESSAGE_BYTES_MAX, Message, Origin, Sender};
use edgehub_broker::method::Calls;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use crate::cloud_to_device::{CloudToDevice, NewMessage, SendError};
use crate::registry::Registry;
use crate::telemetry::{Appended, TelemetryLog};
use crate::twin::{ChangeMode, Twin, TwinChange, TwinStore, TwinStoreError};

pub use invoke::InvokeError;

use courier::{Courier, Errands};

/// Stored MQTT sessions.
pub const SESSIONS_MAX: usize = 10_000;

/// Largest stored MQTT session.
pub const SESSION_BYTES_MAX: usize = 256 * 1_024;

/// How often it is looked whether another process changed twins.
const TWINS_WATCHED_EVERY: Duration = Duration::from_millis(250);

/// Serves the clients of the protocol heads. Clones share everything.
#[derive(Clone, Debug)]
pub struct CloudBackend {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    telemetry: TelemetryLog,
    twins: Arc<TwinStore>,
    messages: Arc<CloudToDevice>,
    calls: Calls,
    clients_max: usize,
    clients: Mutex<Clients>,
    sessions: Mutex<HashMap<Identity, Bytes>>,
    /// Changes when a client begins to take methods.
    methods_taken: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Clients {
    connected: HashMap<Identity, Connection>,
    last: u64,
}

/// A connected client as others reach it.
#[derive(Debug)]
struct Connection {
    number: u64,
    mailbox: Mailbox,
    errands: Arc<Errands>,
    courier: AbortHandle,
}

/// One connected identity; dropping it ends the connection.
#[derive(Debug)]
pub struct CloudClient {
    shared: Arc<Shared>,
    sender: Arc<Sender>,
    number: u64,
    errands: Arc<Errands>,
}

/// Why a service's request about an identity fails.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// There is no such identity.
    #[error("{0} is not registered")]
    Missing(Identity),
    /// The twin cannot be read or changed.
    #[error(transparent)]
    Twin(#[from] TwinStoreError),
    /// The message is not taken.
    #[error(transparent)]
    Send(#[from] SendError),
}

impl Drop for CloudClient {
    fn drop(&mut self) {
        let identity = &self.sender.identity;
        let ended = {
            let mut clients = self.shared.clients.lock();
            let current =
                clients.connected.get(identity).is_some_and(|connection| connection.number == self.number);
            if current { clients.connected.remove(identity) } else { None }
        };
        if let Some(connection) = ended {
            self.shared.ended(identity, connection, None);
        }
    }
}

impl Shared {
    /// Ends what belongs to a connection that is no longer in the map.
    fn ended(&self, identity: &Identity, connection: Connection, reason: Option<CloseReason>) {
        connection.courier.abort();
        self.calls.connection_ended(identity, connection.number);
        self.messages.connection_ended(identity, connection.number);
        if let Some(reason) = reason {
            // A full mailbox closes as well: its last sender goes with the courier.
            let _ = connection.mailbox.try_send(Command::Close(reason));
        }
    }

    fn is_current(&self, identity: &Identity, number: u64) -> bool {
        self.clients.lock().connected.get(identity).is_some_and(|connection| connection.number == number)
    }

    fn generation_id(&self, identity: &Identity) -> Option<Arc<str>> {
        self.registry.cache().get(identity).map(|entry| entry.generation_id.clone())
    }

    fn errands(&self, identity: &Identity) -> Option<Arc<Errands>> {
        self.clients.lock().connected.get(identity).map(|connection| connection.errands.clone())
    }
}

impl CloudBackend {
    /// A backend over a registry, a log and twins, for at most `clients_max` connected identities.
    pub fn new(
        registry: Arc<Registry>,
        telemetry: TelemetryLog,
        twins: Arc<TwinStore>,
        clients_max: usize,
    ) -> Self {
        let shared = Shared {
            registry,
            telemetry,
            twins,
            messages: Arc::default(),
            calls: Calls::default(),
            clients_max,
            clients: Mutex::default(),
            sessions: Mutex::default(),
            methods_taken: watch::Sender::new(()),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Number of connected identities.
    pub fn connected(&self) -> usize {
        self.shared.clients.lock().connected.len()
    }

    /// Whether an identity is connected.
    pub fn is_connected(&self, identity: &Identity) -> bool {
        self.shared.clients.lock().connected.contains_key(identity)
    }

    /// Closes all connections, as the program stops.
    pub fn close_all(&self) {
        let connected = std::mem::take(&mut self.shared.clients.lock().connected);
        for (identity, connection) in connected {
            self.shared.ended(&identity, connection, Some(CloseReason::Stopping));
        }
    }

    /// Closes the connections of identities that may not be connected any more: removed, or disabled.
    pub fn close_unauthorized(&self) {
        let cache = self.shared.registry.cache();
        let unauthorized = |identity: &Identity| {
            let disabled = |identity: &Identity| {
                cache.get(identity).is_none_or(|entry| entry.status == Status::Disabled)
            };
            disabled(identity) || disabled(&identity.of_device())
        };
        let gone: Vec<_> = {
            let mut clients = self.shared.clients.lock();
            clients.connected.extract_if(|identity, _| unauthorized(identity)).collect()
        };
        for (identity, connection) in gone {
            self.shared.ended(&identity, connection, Some(CloseReason::Unauthorized));
        }
    }

    /// The cloud-to-device messages.
    pub fn messages(&self) -> &Arc<CloudToDevice> {
        &self.shared.messages
    }

    /// The twin of an identity.
    ///
    /// # Errors
    /// When there is no such identity, or the twin cannot be read.
    pub async fn twin_of(&self, identity: &Identity) -> Result<Twin, ServiceError> {
        let generation = self.generation_id(identity)?;
        let (twins, identity) = (self.shared.twins.clone(), identity.clone());
        Ok(blocking(move || twins.read(&identity, &generation)).await?)
    }

    /// Changes tags or desired properties of an identity; its client is told. The twin after the change.
    ///
    /// # Errors
    /// When there is no such identity, or the twin does not take the change.
    pub async fn change_twin(
        &self,
        identity: &Identity,
        change: TwinChange,
        mode: ChangeMode,
        etag: Option<String>,
    ) -> Result<Twin, ServiceError> {
        let generation = self.generation_id(identity)?;
        let (twins, of) = (self.shared.twins.clone(), identity.clone());
        let changed =
            move || twins.change(&of, &generation, |twin| twin.change(change, mode, etag.as_deref()));
        let (twin, told) = blocking(changed).await?;
        if let Some(told) = told
            && let Some(errands) = self.shared.errands(identity)
        {
            errands.desired(told);
        }
        Ok(twin)
    }

    /// Tells connected clients of desired properties that another process changes; never resolves.
    pub(crate) async fn watch_twins(&self) {
        let mut seen = self.shared.twins.announced();
        loop {
            sleep(TWINS_WATCHED_EVERY).await;
            let announced = self.shared.twins.announced();
            if announced == seen {
                continue;
            }
            seen = announced;
            let all: Vec<_> = {
                let clients = self.shared.clients.lock();
                clients.connected.values().map(|connection| connection.errands.clone()).collect()
            };
            all.iter().for_each(|errands| errands.look_again());
        }
    }

    /// Puts a cloud-to-device message in line for a device.
    ///
    /// # Errors
    /// When there is no such device, or its queue does not take the message.
    pub fn send(&self, device: &Identity, message: NewMessage) -> Result<(), ServiceError> {
        let generation = self.generation_id(device)?;
        if device.module_id().is_some() {
            return Err(SendError::NoDevice.into());
        }
        self.shared.messages.send(device, &generation, message)?;
        if let Some(errands) = self.shared.errands(device) {
            errands.offer();
        }
        Ok(())
    }

    /// Forgets twin and messages of an identity that was removed, and closes its connections.
    pub async fn forget(&self, identity: &Identity) {
        self.close_unauthorized();
        self.shared.messages.purge(identity);
        let (twins, identity) = (self.shared.twins.clone(), identity.clone());
        if let Err(error) = blocking(move || twins.remove(&identity)).await {
            tracing::warn!(code = "EH7011", %error, "the twin of a removed identity stays on disk");
        }
    }

    fn generation_id(&self, identity: &Identity) -> Result<Arc<str>, ServiceError> {
        self.shared.generation_id(identity).ok_or_else(|| ServiceError::Missing(identity.clone()))
    }

    fn verdict(&self, login: &Login) -> Verdict {
        let registry = &self.shared.registry;
        // The stand-in asks nobody for a certificate.
        verify(login, registry.cache(), registry.hosts(), &ClientTrust::none(), unix_now_secs())
    }

    fn authenticate(&self, login: &Login) -> Result<(), LoginError> {
        let mut verdict = self.verdict(login);
        if !matches!(verdict, Verdict::Accepted(_)) {
            // The command line may have changed the file since.
            match self.shared.registry.reload() {
                Ok(true) => verdict = self.verdict(login),
                Ok(false) => {}
                Err(error) => tracing::warn!(code = "EH7001", %error, "the registry is not read again"),
            }
        }
        match verdict {
            Verdict::Accepted(_) => Ok(()),
            Verdict::Refused(refusal) => Err(LoginError::Refused(refusal.to_string())),
            Verdict::Unknown(identity) => {
                Err(LoginError::Refused(format!("{identity} is not in the registry")))
            }
        }
    }
}

/// Work on files, away from the threads of connections.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TwinStoreError> + Send + 'static,
) -> Result<T, TwinStoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        // The runtime is stopping, or the work panicked.
        Err(_) => Err(TwinStoreError::Interrupted),
    }
}

impl Backend for CloudBackend {
    type Client = CloudClient;
    type Commit = Appended;

    async fn login(&self, login: Login, mailbox: Mailbox) -> Result<CloudClient, LoginError> {
        self.authenticate(&login)?;
        let sender = Arc::new(Sender {
            identity: login.identity.clone(),
            origin: Origin::Downstream,
            model_id: login.model_id,
        });
        let mut clients = self.shared.clients.lock();
        if clients.connected.len() >= self.shared.clients_max
            && !clients.connected.contains_key(&login.identity)
        {
            return Err(LoginError::Unavailable(format!(
                "{} clients are connected",
                self.shared.clients_max
            )));
        }
        clients.last += 1;
        let number = clients.last;
        let errands = Arc::new(Errands::default());
        let courier = Courier::new(&self.shared, &login.identity, number, &mailbox, &errands);
        let courier = tokio::spawn(courier.run()).abort_handle();
        let connection = Connection { number, mailbox, errands: errands.clone(), courier };
        let older = clients.connected.insert(login.identity.clone(), connection);
        drop(clients);
        if let Some(older) = older {
            self.shared.ended(&login.identity, older, Some(CloseReason::TakenOver));
        }
        Ok(CloudClient { shared: self.shared.clone(), sender, number, errands })
    }

    fn reauthenticate(
        &self,
        _: &CloudClient,
        login: Login,
    ) -> impl Future<Output = Result<(), LoginError>> + Send + 'static + use<> {
        // The stand-in closes no connection for its age, so there is no older proof to replace.
        std::future::ready(self.authenticate(&login))
    }

    fn sender(&self, client: &CloudClient) -> Arc<Sender> {
        client.sender.clone()
    }

    fn check(&self, _client: &CloudClient, message: &Message) -> Result<(), PublishError> {
        // What a hub adds counts at the hub: what it accepted at its limit must be accepted here.
        let size_bytes = message.body.len() + message.properties.size_bytes();
        if size_bytes > MESSAGE_BYTES_MAX {
            return Err(PublishError::TooLarge { size_bytes, limit_bytes: MESSAGE_BYTES_MAX });
        }
        if message.output().is_some_and(|output| output.trim().is_empty()) {
            return Err(PublishError::Malformed("the output name is blank"));
        }
        Ok(())
    }

    async fn publish(
        &self,
        _client: &mut CloudClient,
        messages: Vec<Message>,
    ) -> Result<Appended, PublishError> {
        self.shared.telemetry.append(&messages).await
    }

    fn subscribe(&self, client: &mut CloudClient, feature: Feature, on: bool) {
        client.errands.subscribe(feature, on);
        if feature == Feature::Methods && on {
            self.shared.methods_taken.send_replace(());
        }
    }

    fn twin(&self, client: &mut CloudClient, request: TwinRequest) -> Result<(), TwinError> {
        client.errands.twin(request)
    }

    fn method_answered(&self, client: &mut CloudClient, call: CallId, answer: MethodAnswer) {
        let identity = &client.sender.identity;
        if !self.shared.calls.answered(identity, client.number, call, answer) {
            tracing::debug!(%identity, %call, "nobody waits for the answer of a method");
        }
    }

    async fn load_session(&self, identity: &Identity) -> Option<Bytes> {
        self.shared.sessions.lock().get(identity).cloned()
    }

    /// Sessions live as long as the process.
    async fn store_session(&self, identity: &Identity, session: Option<Bytes>) -> Result<(), PublishError> {
        let mut sessions = self.shared.sessions.lock();
        let Some(session) = session else {
            sessions.remove(identity);
            return Ok(());
        };
        if session.len() > SESSION_BYTES_MAX {
            return Err(PublishError::Full(format!("a session is larger than {SESSION_BYTES_MAX} bytes")));
        }
        if sessions.len() >= SESSIONS_MAX && !sessions.contains_key(identity) {
            return Err(PublishError::Full(format!("{SESSIONS_MAX} sessions are stored")));
        }
        // A slice may hold a much larger receive buffer alive.
        sessions.insert(identity.clone(), Bytes::copy_from_slice(&session));
        Ok(())
    }

    fn dropped(&self, client: &CloudClient, reason: HeadDrop) {
        tracing::warn!(code = "EH7002", identity = %client.sender.identity, ?reason, "a message is dropped");
    }
}

#[cfg(test)]
mod tests {
    use edgehub_broker::backend::{
        CommandReceiver, Credentials, Deliveries, DesiredPatch, MAILBOX_COMMANDS_MAX, Outcome, Protocol,
        Target, TwinOperation, TwinReply,
    };
    use edgehub_broker::identity::{SymmetricKey, TokenSource};
    use edgehub_broker::message::Properties;

    use super::*;
    use crate::cloud_to_device::{Ack, FeedbackStatus};
    use crate::registry::NewDevice;

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    struct Site {
        registry: Arc<Registry>,
        telemetry: TelemetryLog,
        backend: CloudBackend,
        _directory: tempfile::TempDir,
    }

    fn site() -> Site {
        let directory = tempfile::tempdir().unwrap();
        let registry =
            Arc::new(Registry::open(directory.path().join("registry.json"), "hub1.example.net").unwrap());
        for (id, edge, parent) in
            [("edge1", true, None), ("leaf1", false, Some("edge1")), ("solo", false, None)]
        {
            registry.create_device(NewDevice { id, edge, parent }).unwrap();
        }
        let telemetry = TelemetryLog::open(directory.path().join("telemetry.ndjson"), 1 << 30).unwrap();
        let twins = Arc::new(TwinStore::new(directory.path().join("twins")));
        let backend = CloudBackend::new(registry.clone(), telemetry.clone(), twins, 2);
        Site { registry, telemetry, backend, _directory: directory }
    }

    impl Site {
        async fn login(
            &self,
            identity: &str,
            chain: Option<&str>,
            signer: &str,
        ) -> (Result<CloudClient, LoginError>, CommandReceiver) {
            let key: SymmetricKey =
                self.registry.cache().get(&id(signer)).unwrap().keys().next().unwrap().clone();
            let token = TokenSource::new("hub1.example.net", &id(signer), Arc::new(key));
            let login = Login {
                identity: id(identity),
                credentials: Credentials::SasToken(token.token().await.unwrap()),
                auth_chain: chain.map(Into::into),
                product_info: "".into(),
                model_id: None,
                protocol: Protocol::Amqp,
                peer: None,
            };
            let (mailbox, commands) = Mailbox::channel(MAILBOX_COMMANDS_MAX);
            (self.backend.login(login, mailbox).await, commands)
        }
    }

    #[tokio::test]
    async fn a_newer_login_wins_and_clients_are_counted() {
        let site = site();
        let (first, mut commands) = site.login("solo", None, "solo").await;
        let (second, _commands) = site.login("solo", None, "solo").await;
        let second = second.unwrap();
        assert!(matches!(commands.recv().await, Some(Command::Close(CloseReason::TakenOver))));
        drop(first.unwrap());
        assert_eq!(site.backend.connected(), 1);
        let (_hub, mut commands) = site.login("edge1/$edgeHub", None, "edge1/$edgeHub").await;
        let (third, _) = site.login("leaf1", Some("leaf1;edge1"), "edge1/$edgeHub").await;
        assert!(matches!(third, Err(LoginError::Unavailable(_))));
        drop(second);
        let (third, _) = site.login("leaf1", Some("leaf1;edge1"), "edge1/$edgeHub").await;
        assert!(third.is_ok());
        site.backend.close_all();
        assert!(matches!(commands.recv().await, Some(Command::Close(CloseReason::Stopping))));
    }

    #[tokio::test]
    async fn on_behalf_of_needs_the_edge_device_above() {
        let site = site();
        for (identity, chain) in
            [("solo", "solo;edge1"), ("leaf1", "solo;edge1"), ("unknown", "unknown;edge1")]
        {
            let (client, _) = site.login(identity, Some(chain), "edge1/$edgeHub").await;
            assert!(matches!(client, Err(LoginError::Refused(_))), "{identity}");
        }
        site.registry.set_status(&id("leaf1"), Status::Disabled).unwrap();
        let (client, _) = site.login("leaf1", Some("leaf1;edge1"), "edge1/$edgeHub").await;
        assert!(matches!(client, Err(LoginError::Refused(_))));
    }

    #[tokio::test]
    async fn what_is_published_is_in_the_log_when_the_commit_resolves() {
        let site = site();
        let (client, _commands) = site.login("leaf1", Some("leaf1;edge1"), "edge1/$edgeHub").await;
        let mut client = client.unwrap();
        let sender = site.backend.sender(&client);
        let message = |size| Message::new(sender.clone(), Properties::empty(), vec![b'x'; size].into());
        assert!(site.backend.check(&client, &message(10)).is_ok());
        let too_large = site.backend.check(&client, &message(MESSAGE_BYTES_MAX + 1));
        assert!(matches!(too_large, Err(PublishError::TooLarge { .. })));
        let commit = site.backend.publish(&mut client, vec![message(10), message(20)]).await.unwrap();
        commit.await.unwrap();
        let text = site.telemetry.reader().unwrap().next().await.unwrap().unwrap();
        assert_eq!(text.iter().filter(|byte| **byte == b'\n').count(), 2);
    }

    async fn next(commands: &mut CommandReceiver) -> Command {
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, commands.recv()).await.expect("a command in time").expect("a command")
    }

    fn change(desired: serde_json::Value) -> TwinChange {
        TwinChange { tags: None, desired: Some(desired) }
    }

    #[tokio::test]
    async fn twin_requests_are_answered_in_order() {
        let site = site();
        let (client, mut commands) = site.login("solo", None, "solo").await;
        let mut client = client.unwrap();
        let operations = [
            TwinOperation::PatchReported(r#"{"a":1,"b":{"c":"x"}}"#.into()),
            TwinOperation::PatchReported(r#"{"a.b":1}"#.into()),
            TwinOperation::PatchReported(r#"{"a":null}"#.into()),
            TwinOperation::Get,
        ];
        for (number, operation) in operations.into_iter().enumerate() {
            let correlation = Some(number.to_string().into());
            site.backend.twin(&mut client, TwinRequest { correlation, operation }).unwrap();
        }
        let mut results = Vec::new();
        for number in 0..4 {
            let Command::TwinAnswer(answer) = next(&mut commands).await else { panic!("no answer") };
            assert_eq!(answer.correlation, number.to_string());
            results.push(answer.result);
        }
        assert_eq!(results[0], Ok(TwinReply::Patched { version: Some(2) }));
        assert_eq!(results[1].as_ref().unwrap_err().status(), 400);
        assert_eq!(results[2], Ok(TwinReply::Patched { version: Some(3) }));
        let document = r#"{"desired":{"$version":1},"reported":{"$version":3,"b":{"c":"x"}}}"#;
        assert_eq!(results[3], Ok(TwinReply::Document(document.into())));
        for _ in 0..courier::TWIN_REQUESTS_MAX {
            let request = TwinRequest { correlation: None, operation: TwinOperation::Get };
            site.backend.twin(&mut client, request).unwrap();
        }
        let request = TwinRequest { correlation: None, operation: TwinOperation::Get };
        assert_eq!(site.backend.twin(&mut client, request), Err(TwinError::Busy));
    }

    #[tokio::test]
    async fn subscribed_clients_hear_of_desired_properties() {
        let site = site();
        let solo = id("solo");
        let (client, mut commands) = site.login("solo", None, "solo").await;
        let mut client = client.unwrap();
        let apply = async |desired| {
            site.backend.change_twin(&solo, change(desired), ChangeMode::Merge, None).await.unwrap();
        };
        apply(serde_json::json!({"before": 1})).await;
        site.backend.subscribe(&mut client, Feature::DesiredProperties, true);
        // The courier has not run yet: what comes from now on is told, exactly as it was given.
        apply(serde_json::json!({"a": {"b": 1}, "none": null})).await;
        let Command::Desired(told) = next(&mut commands).await else { panic!("no patch") };
        assert_eq!(
            told,
            DesiredPatch { patch: r#"{"$version":3,"a":{"b":1},"none":null}"#.into(), version: 3 }
        );
        let replaced = change(serde_json::json!({"c": 1}));
        site.backend.change_twin(&solo, replaced, ChangeMode::Replace, None).await.unwrap();
        let Command::Desired(told) = next(&mut commands).await else { panic!("no patch") };
        assert_eq!(told.patch, r#"{"$version":4,"a":null,"before":null,"c":1}"#);
        // Another process makes two changes.
        let other = TwinStore::new(site._directory.path().join("twins"));
        let generation = site.registry.cache().get(&solo).unwrap().generation_id.clone();
        for desired in [serde_json::json!({"c": null, "d": 1}), serde_json::json!({"d": 2})] {
            other
                .change(&solo, &generation, |twin| twin.change(change(desired), ChangeMode::Merge, None))
                .unwrap();
        }
        let watch = site.backend.watch_twins();
        let told = async {
            // Let the watcher see the state before.
            tokio::task::yield_now().await;
            other.announce().unwrap();
            next(&mut commands).await
        };
        let told = tokio::select! {
            biased;
            () = watch => panic!("the watcher ended"),
            told = told => told,
        };
        let Command::Desired(told) = told else { panic!("no patch") };
        assert_eq!(told, DesiredPatch { patch: r#"{"$version":6,"c":null,"d":2}"#.into(), version: 6 });
        site.backend.subscribe(&mut client, Feature::DesiredProperties, false);
        apply(serde_json::json!({"e": 1})).await;
        site.backend
            .twin(&mut client, TwinRequest { correlation: Some("x".into()), operation: TwinOperation::Get })
            .unwrap();
        assert!(matches!(next(&mut commands).await, Command::TwinAnswer(_)));
    }

    #[tokio::test]
    async fn methods_wait_for_the_client_and_its_answer() {
        let site = site();
        let (solo, second) = (id("solo"), Duration::from_secs(20));
        let invoke =
            |connect_max| site.backend.invoke(&solo, "reboot".into(), "1".into(), connect_max, second);
        assert_eq!(invoke(Duration::ZERO).await, Err(InvokeError::NotConnected));
        let (client, mut commands) = site.login("solo", None, "solo").await;
        let mut client = client.unwrap();
        assert_eq!(invoke(Duration::ZERO).await, Err(InvokeError::NotConnected));
        let answer = MethodAnswer { status: 201, payload: "2".into() };
        let serve = async {
            site.backend.subscribe(&mut client, Feature::Methods, true);
            let Command::Invoke(call) = next(&mut commands).await else { panic!("no call") };
            assert_eq!((&*call.name, &call.payload[..]), ("reboot", &b"1"[..]));
            site.backend.method_answered(&mut client, call.id, answer.clone());
        };
        let (answered, ()) = tokio::join!(invoke(second), serve);
        assert_eq!(answered, Ok(answer));
        // The connection ends instead of an answer.
        let end = async {
            assert!(matches!(next(&mut commands).await, Command::Invoke(_)));
            drop(client);
        };
        let (answered, ()) = tokio::join!(invoke(second), end);
        assert_eq!(answered, Err(InvokeError::NoAnswer));
    }

    #[tokio::test]
    async fn messages_wait_for_the_device_and_are_offered_until_settled() {
        let site = site();
        let solo = id("solo");
        let message = |text: &'static str| NewMessage {
            message_id: Some(text.into()),
            ack: Ack::Full,
            expires_millis: None,
            properties: Properties::empty(),
            body: text.into(),
        };
        let missing = site.backend.send(&id("unknown"), message("x"));
        assert!(matches!(missing, Err(ServiceError::Missing(_))));
        site.backend.send(&solo, message("one")).unwrap();
        let (client, mut commands) = site.login("solo", None, "solo").await;
        let mut first = client.unwrap();
        site.backend.subscribe(&mut first, Feature::CloudToDevice, true);
        let deliveries = async |commands: &mut CommandReceiver| {
            let Command::Deliver(deliveries) = next(commands).await else { panic!("no delivery") };
            assert_eq!(deliveries.target, Target::Device);
            deliveries
        };
        let bodies = |deliveries: &Deliveries| -> Vec<Bytes> {
            deliveries.messages.iter().map(|(_, message)| message.body.clone()).collect()
        };
        assert_eq!(bodies(&deliveries(&mut commands).await), ["one"]);
        site.backend.send(&solo, message("two")).unwrap();
        assert_eq!(bodies(&deliveries(&mut commands).await), ["two"]);
        // What the first connection did not settle goes to the next.
        let (client, mut commands) = site.login("solo", None, "solo").await;
        let mut second = client.unwrap();
        site.backend.subscribe(&mut second, Feature::CloudToDevice, true);
        let both = deliveries(&mut commands).await;
        assert_eq!(bodies(&both), ["one", "two"]);
        both.settler
            .settle([(both.messages[0].0, Outcome::Accepted), (both.messages[1].0, Outcome::Released)]);
        let again = deliveries(&mut commands).await;
        assert_eq!(bodies(&again), ["two"]);
        again.settler.settle([(again.messages[0].0, Outcome::Rejected)]);
        let mut feedback = Vec::new();
        while feedback.len() < 2 {
            tokio::time::timeout(Duration::from_secs(20), site.backend.messages().feedback().arrived())
                .await
                .unwrap();
            feedback.extend(site.backend.messages().feedback().take(9));
        }
        let statuses: Vec<_> = feedback.iter().map(|record| record.status).collect();
        assert_eq!(statuses, [FeedbackStatus::Success, FeedbackStatus::Rejected]);
        assert_eq!(site.backend.messages().waiting(&solo), 0);
    }

    #[tokio::test]
    async fn removed_and_disabled_identities_are_closed() {
        let site = site();
        let (client, mut commands) = site.login("solo", None, "solo").await;
        let _client = client.unwrap();
        site.backend.close_unauthorized();
        assert_eq!(site.backend.connected(), 1);
        site.registry.set_status(&id("solo"), Status::Disabled).unwrap();
        site.backend.close_unauthorized();
        assert!(matches!(next(&mut commands).await, Command::Close(CloseReason::Unauthorized)));
        assert_eq!(site.backend.connected(), 0);
    }

    #[tokio::test]
    async fn sessions_are_kept_and_bounded() {
        let site = site();
        let leaf = id("leaf1");
        site.backend.store_session(&leaf, Some(Bytes::from_static(b"s"))).await.unwrap();
        assert_eq!(site.backend.load_session(&leaf).await.as_deref(), Some(&b"s"[..]));
        let large = Bytes::from(vec![0; SESSION_BYTES_MAX + 1]);
        assert!(matches!(site.backend.store_session(&leaf, Some(large)).await, Err(PublishError::Full(_))));
        site.backend.store_session(&leaf, None).await.unwrap();
        assert_eq!(site.backend.load_session(&leaf).await, None);
    }
}
