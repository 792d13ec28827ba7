//! The stand-in as the protocol heads see it: logins against the registry, telemetry into the log, and the control
//! plane of connected clients.

mod courier;
mod fault;
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
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use crate::cloud_to_device::{CloudToDevice, NewMessage, SendError};
use crate::registry::Registry;
use crate::telemetry::{Appended, TelemetryLog};
use crate::twin::{ChangeMode, Twin, TwinChange, TwinStore, TwinStoreError};

pub use fault::FAULT_SECS_MAX;
pub use invoke::InvokeError;

use courier::{Courier, Errands};
use fault::{DETACHING_MAX, Fault, Throttling};

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
    throttling: Throttling,
    detaching: Arc<Semaphore>,
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

    /// Does what a message of a client asked for.
    fn fail_with(self: &Arc<Self>, client: &CloudClient, fault: Fault) {
        let identity = client.sender.identity.clone();
        tracing::info!(%identity, ?fault, "A message asks for a fault");
        match fault {
            Fault::Throttle { delay, duration } => self.throttling.start(Instant::now(), delay, duration),
            Fault::Detach { delay } => {
                let Ok(waiting) = self.detaching.clone().try_acquire_owned() else { return };
                let shared = self.clone();
                tokio::spawn(async move {
                    let _waiting = waiting;
                    sleep(delay).await;
                    let ended = shared.clients.lock().connected.remove(&identity);
                    if let Some(connection) = ended {
                        shared.ended(&identity, connection, Some(CloseReason::Kicked));
                    }
                });
            }
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
            throttling: Throttling::default(),
            detaching: Arc::new(Semaphore::new(DETACHING_MAX)),
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
        client: &mut CloudClient,
        messages: Vec<Message>,
    ) -> Result<Appended, PublishError> {
        if self.shared.throttling.is_on(Instant::now()) {
            return Err(PublishError::Full("throttled, as a message asked for".into()));
        }
        let appended = self.shared.telemetry.append(&messages).await?;
        messages.iter().filter_map(Fault::of).for_each(|fault| self.shared.fail_with(client, fault));
        Ok(appended)
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
mod tests;
