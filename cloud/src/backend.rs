//! The stand-in as the protocol heads see it: logins against the registry, telemetry into the log.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, CallId, CloseReason, Command, Feature, HeadDrop, Login, LoginError, Mailbox, MethodAnswer,
    PublishError, TwinError, TwinRequest,
};
use edgehub_broker::identity::{ClientTrust, Identity, Verdict, unix_now_secs, verify};
use edgehub_broker::message::{MESSAGE_BYTES_MAX, Message, Origin, Sender};
use parking_lot::Mutex;

use crate::registry::Registry;
use crate::telemetry::{Appended, TelemetryLog};

/// Stored MQTT sessions.
pub const SESSIONS_MAX: usize = 10_000;

/// Largest stored MQTT session.
pub const SESSION_BYTES_MAX: usize = 256 * 1_024;

/// Serves the clients of the protocol heads. Clones share everything.
#[derive(Clone, Debug)]
pub struct CloudBackend {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    telemetry: TelemetryLog,
    clients_max: usize,
    clients: Mutex<Clients>,
    sessions: Mutex<HashMap<Identity, Bytes>>,
}

#[derive(Debug, Default)]
struct Clients {
    connected: HashMap<Identity, (u64, Mailbox)>,
    last: u64,
}

/// One connected identity; dropping it ends the connection.
#[derive(Debug)]
pub struct CloudClient {
    shared: Arc<Shared>,
    sender: Arc<Sender>,
    number: u64,
}

impl Drop for CloudClient {
    fn drop(&mut self) {
        let mut clients = self.shared.clients.lock();
        let identity = &self.sender.identity;
        if clients.connected.get(identity).is_some_and(|(number, _)| *number == self.number) {
            clients.connected.remove(identity);
        }
    }
}

impl CloudBackend {
    /// A backend over a registry and a log, for at most `clients_max` connected identities.
    pub fn new(registry: Arc<Registry>, telemetry: TelemetryLog, clients_max: usize) -> Self {
        let shared = Shared {
            registry,
            telemetry,
            clients_max,
            clients: Mutex::default(),
            sessions: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Number of connected identities.
    pub fn connected(&self) -> usize {
        self.shared.clients.lock().connected.len()
    }

    /// Closes all connections, as the program stops.
    pub fn close_all(&self) {
        for (_, (_, mailbox)) in std::mem::take(&mut self.shared.clients.lock().connected) {
            // A full mailbox closes as well: this was its last sender.
            let _ = mailbox.try_send(Command::Close(CloseReason::Stopping));
        }
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
                Err(error) => tracing::warn!(%error, "the registry is not read again"),
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
        let older = clients.connected.insert(login.identity, (number, mailbox));
        drop(clients);
        if let Some((_, older)) = older {
            // A full mailbox closes as well: this was its last sender.
            let _ = older.try_send(Command::Close(CloseReason::TakenOver));
        }
        Ok(CloudClient { shared: self.shared.clone(), sender, number })
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
        // Nothing is sent down, so there is nothing to switch.
        tracing::debug!(identity = %client.sender.identity, ?feature, on, "subscription");
    }

    fn twin(&self, _: &mut CloudClient, _: TwinRequest) -> Result<(), TwinError> {
        Err(TwinError::Failed("twins are not served".into()))
    }

    fn method_answered(&self, _: &mut CloudClient, _: CallId, _: MethodAnswer) {}

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
        tracing::warn!(identity = %client.sender.identity, ?reason, "a message is dropped");
    }
}

#[cfg(test)]
mod tests {
    use edgehub_broker::backend::{Credentials, MAILBOX_COMMANDS_MAX, Protocol};
    use edgehub_broker::identity::{Status, SymmetricKey, TokenSource};
    use edgehub_broker::message::Properties;
    use tokio::sync::mpsc;

    use super::*;
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
        let backend = CloudBackend::new(registry.clone(), telemetry.clone(), 2);
        Site { registry, telemetry, backend, _directory: directory }
    }

    impl Site {
        async fn login(
            &self,
            identity: &str,
            chain: Option<&str>,
            signer: &str,
        ) -> (Result<CloudClient, LoginError>, mpsc::Receiver<Command>) {
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
            let (mailbox, commands) = mpsc::channel(MAILBOX_COMMANDS_MAX);
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
