//! The builder and the handle that an embedder holds.
//!
//! Locks, and how they may be held: `clients` and [`Presence`] are sharded maps, touched when a client connects,
//! subscribes or leaves; no guard of one is held while the other is touched, or across an await. `pumps` is a mutex
//! around what [`Hub::apply`] changes; besides it, only those take it who ask for the states of targets. The way of a
//! message takes none.

mod ages;
mod authenticator;
mod client;
mod clients;
mod commands;
mod config;
mod connectivity;
mod control;
mod credentials;
mod drain;
mod flapping;
mod forget;
mod identity_queue;
mod methods;
mod own;
mod own_twin;
mod status;
mod subscriptions;
mod targets;
mod twins;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use ahash::AHashMap;
use bytes::Bytes;
use dashmap::DashMap;
use edgehub_routing::OverflowPolicy;
use edgehub_storage::{Queue, Store, StoreError, StoreLimits, Table};
use metrics::{counter, gauge};
use parking_lot::Mutex;
use time::OffsetDateTime;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use crate::backend::{
    Backend, CallId, CloseReason, Command, Feature, HeadDrop, Login, LoginError, Mailbox, MethodAnswer,
    Protocol, PublishError, TwinError, TwinRequest,
};
use crate::configuration::ClientRoll;
use crate::delivery::{Consumer, Losses, ModulePump, ModulePumpOptions, Presence};
use crate::dispatch::{self, Dispatch};
use crate::identity::Identity;
use crate::message::{Message, Origin, Sender};
use crate::upstream::control::{Control, ControlPeer, Downward, channel as control_channel};
use crate::upstream::targets::{Target, TargetStatus};
use crate::upstream::{self, UpstreamOptions, UpstreamStatus};
use control::ControlPlane;
use credentials::{Expiries, Proved};
use flapping::TakeOvers;

use ages::Ages;
pub use authenticator::{Authenticating, Authenticator, Standing};
pub use client::HubClient;
pub use client::HubCommit;
pub use clients::Client;
pub use commands::COMMANDS_IN_FLIGHT_MAX;
pub use config::{Applied, ApplyError};
pub use connectivity::Connectivity;
pub use control::ControlOptions;
pub use drain::Remainder;
pub use methods::{Caller, Invocation, InvokeError, OwnMethod, OwnMethodFuture};
pub use own::DesiredProperties;
pub use status::{ClientStatus, DeadLetterStatus, LedgerStatus, QueueStatus, SpaceStatus, Status};
pub use twins::TWIN_REQUESTS_MAX;

/// The module id of the hub itself.
const OWN_MODULE: &str = "$edgeHub";

/// How a hub is set up. All parts have a meaning of their own; there is no hidden default.
pub struct HubOptions {
    /// The edge device that this hub is the hub of.
    pub edge_device: Identity,
    /// Connections that may be open at a time.
    pub clients_max: usize,
    /// How module inputs are served.
    pub module_pump: ModulePumpOptions,
    /// The way up, if there is one.
    pub upstream: Option<UpstreamOptions>,
    /// How twins, methods and cloud-to-device messages are served.
    pub control: ControlOptions,
    /// What becomes of a route's messages when the store is full, if the route does not say.
    pub overflow: OverflowPolicy,
    /// How much room the store may take; the configuration says [`StoreLimits::max_bytes`], see [`Hub::apply`].
    pub limits: StoreLimits,
}

/// A running hub. Cheap to clone; it stops with [`Hub::stop`].
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Inner>,
}

struct Inner {
    edge_device: Identity,
    clients_max: usize,
    module_pump: ModulePumpOptions,
    overflow: OverflowPolicy,
    limits: StoreLimits,
    store: Store,
    losses: Arc<Losses>,
    ages: Ages,
    dispatch: Dispatch,
    authenticator: Arc<dyn Authenticator>,
    client_roll: Arc<ClientRoll>,
    clients: DashMap<Identity, Connected, ahash::RandomState>,
    clients_open: AtomicUsize,
    /// No message is accepted any more, and no client.
    stopping: AtomicBool,
    connections: AtomicU64,
    expiries: Arc<Expiries>,
    presence: Presence,
    pumps: Mutex<Pumps>,
    upstream: Option<upstream::Handle>,
    /// How it is reached, for further targets there.
    upstream_options: Option<UpstreamOptions>,
    control: Arc<ControlPlane>,
    delivery: Handle,
}

/// The open connection of an identity.
struct Connected {
    connection: u64,
    since: SystemTime,
    mailbox: Mailbox,
    proved: Arc<Proved>,
    take_overs: TakeOvers,
}

/// What [`Hub::apply`] changes besides the routes themselves.
#[derive(Default)]
struct Pumps {
    /// The queues of each module endpoint, by its id; dropping the sender stops the pump.
    modules: AHashMap<Arc<str>, watch::Sender<Vec<(u32, Queue)>>>,
    /// The ways to targets of their own at the upstream.
    targets: BTreeMap<Target, upstream::Handle>,
    /// The last good version of each route by name.
    good_routes: AHashMap<String, edgehub_routing::OwnedRouteSpec>,
}

impl Hub {
    /// Starts a hub without routes: it accepts and counts messages, and delivers nothing until
    /// [`Hub::apply`]. Pumps and the upstream run on `delivery`.
    pub fn start(
        options: HubOptions,
        store: Store,
        authenticator: Arc<dyn Authenticator>,
        delivery: Handle,
    ) -> Self {
        let (seam, peer) = match &options.upstream {
            Some(upstream) => {
                let (control, downward, peer) = control_channel(upstream.operation_timeout);
                ((control, downward), Some(peer))
            }
            None => ((Control::none(), mpsc::channel(1).1), None),
        };
        Self::start_parts(options, store, authenticator, delivery, seam, peer)
    }

    /// As [`Hub::start`], but twins, methods and cloud-to-device messages go up another way than messages: to whoever
    /// holds the other end of [`control::channel`](crate::upstream::control::channel).
    pub fn start_with_control(
        options: HubOptions,
        store: Store,
        authenticator: Arc<dyn Authenticator>,
        delivery: Handle,
        control: Control,
        downward: mpsc::Receiver<Downward>,
    ) -> Self {
        Self::start_parts(options, store, authenticator, delivery, (control, downward), None)
    }

    fn start_parts(
        options: HubOptions,
        store: Store,
        authenticator: Arc<dyn Authenticator>,
        delivery: Handle,
        seam: (Control, mpsc::Receiver<Downward>),
        peer: Option<ControlPeer>,
    ) -> Self {
        let losses = Arc::new(Losses::new(&store));
        let upstream = options.upstream.as_ref().map(|upstream_options| {
            upstream::start(upstream_options.clone(), peer, store.clone(), losses.clone(), &delivery)
        });
        store.set_limits(options.limits);
        let ages = Ages::new();
        delivery.spawn(ages.clone().watch(store.clone()));
        let dispatch = Dispatch::new(store.clone());
        let own = Identity::module(options.edge_device.device_id(), OWN_MODULE).expect("a legal name"); // the device's id was checked when it became an identity
        let control = ControlPlane::start(own, options.control, seam, &store, &dispatch, &delivery);
        let hub = Self {
            inner: Arc::new(Inner {
                client_roll: Arc::new(ClientRoll::new(options.edge_device.clone())),
                edge_device: options.edge_device,
                clients_max: options.clients_max,
                module_pump: options.module_pump,
                overflow: options.overflow,
                limits: options.limits,
                losses,
                ages,
                dispatch,
                store,
                authenticator,
                clients: DashMap::default(),
                clients_open: AtomicUsize::new(0),
                stopping: AtomicBool::new(false),
                connections: AtomicU64::new(0),
                expiries: Arc::default(),
                presence: Presence::new(),
                pumps: Mutex::new(Pumps::default()),
                upstream,
                upstream_options: options.upstream,
                control,
                delivery,
            }),
        };
        let inner = &hub.inner;
        let changed = inner.authenticator.changed();
        inner.delivery.spawn(credentials::watch(Arc::downgrade(inner), inner.expiries.clone(), changed));
        hub
    }

    /// Which clients are connected, as the hub's reported properties show it.
    pub fn client_roll(&self) -> &Arc<ClientRoll> {
        &self.inner.client_roll
    }

    /// The state of the way up; none without an upstream.
    pub fn upstream(&self) -> Option<watch::Receiver<UpstreamStatus>> {
        self.inner.upstream.as_ref().map(upstream::Handle::status)
    }

    /// The ways to targets of their own at the upstream, by target.
    pub fn upstream_targets(&self) -> Vec<TargetStatus> {
        self.inner.target_statuses()
    }

    /// Closes all client connections, then the ways up. Messages stay in the store, which the embedder closes.
    pub async fn stop(&self, limit: Duration) {
        let mailboxes: Vec<Mailbox> =
            self.inner.clients.iter().map(|entry| entry.value().mailbox.clone()).collect();
        let closing = async {
            for mailbox in mailboxes {
                // A connection that is gone already has no use for the command.
                let _ = mailbox.send(Command::Close(CloseReason::Stopping)).await;
            }
        };
        let _ = tokio::time::timeout(limit, closing).await;
        let targets = {
            let mut pumps = self.inner.pumps.lock();
            pumps.modules.clear();
            std::mem::take(&mut pumps.targets)
        };
        self.inner.ages.stop();
        self.inner.control.stop();
        let ways = self.inner.upstream.iter().chain(targets.values());
        futures_util::future::join_all(ways.map(|way| way.stop(limit))).await;
    }

    fn spawn_pump(
        &self,
        pumps: &mut Pumps,
        endpoint_id: &Arc<str>,
        module: Identity,
        input: &str,
        queues: Vec<(u32, Queue)>,
    ) {
        let (sender, receiver) = watch::channel(queues);
        let pump = ModulePump::new(
            module.clone(),
            input.into(),
            endpoint_id.clone(),
            self.inner.store.clone(),
            self.inner.module_pump,
            self.inner.presence.watch(&module),
            receiver,
            self.inner.losses.clone(),
        );
        self.inner.delivery.spawn(pump.run());
        pumps.modules.insert(endpoint_id.clone(), sender);
    }
}

impl Backend for Hub {
    type Client = HubClient;
    type Commit = HubCommit;

    async fn login(&self, login: Login, mailbox: Mailbox) -> Result<HubClient, LoginError> {
        let identity = login.identity.clone();
        if let Err(error) = self.inner.authenticator.authenticate(&login).await {
            if let LoginError::Refused(reason) = &error {
                tracing::info!(client = %identity, reason, "Client not authenticated");
                counter!(
                    "edgehub_client_connect_failed_total",
                    "id" => identity.to_string(), "reason" => "not_authenticated"
                )
                .increment(1);
            }
            return Err(error);
        }
        self.connect(login, mailbox)
    }

    fn reauthenticate(
        &self,
        client: &HubClient,
        login: Login,
    ) -> impl Future<Output = Result<(), LoginError>> + Send + 'static + use<> {
        let (inner, connection) = (self.inner.clone(), client.connection);
        async move { inner.reauthenticate(connection, login).await }
    }

    fn sender(&self, client: &HubClient) -> Arc<Sender> {
        client.sender.clone()
    }

    fn check(&self, _: &HubClient, message: &Message) -> Result<(), PublishError> {
        dispatch::check(message)
    }

    async fn publish(
        &self,
        client: &mut HubClient,
        messages: Vec<Message>,
    ) -> Result<HubCommit, PublishError> {
        if self.inner.stopping.load(Ordering::Relaxed) {
            return Err(PublishError::Store("the hub is stopping; publish again when it is back".into()));
        }
        client.publisher.publish(&messages).await.map(HubCommit::new)
    }

    fn subscribe(&self, client: &mut HubClient, feature: Feature, on: bool) {
        if feature == Feature::ModuleInputs && client.sender.identity.module_id().is_some() {
            client.set_inputs(on);
        }
        let identity = &client.sender.identity;
        self.inner.control.subscribe(identity, client.connection, &client.mailbox, feature, on);
    }

    fn twin(&self, client: &mut HubClient, request: TwinRequest) -> Result<(), TwinError> {
        self.inner.control.twins.request(&client.sender.identity, &client.mailbox, request)
    }

    fn method_answered(&self, client: &mut HubClient, call: CallId, answer: MethodAnswer) {
        self.inner.control.methods.answered(&client.sender.identity, client.connection, call, answer);
    }

    async fn load_session(&self, identity: &Identity) -> Option<Bytes> {
        let sessions = self.inner.store.keyed(Table::Sessions);
        match sessions.get(identity.to_string().as_bytes()).await {
            Ok(session) => session,
            Err(error) => {
                tracing::error!(code = "EH2008", client = %identity, %error, "The stored session cannot be read");
                None
            }
        }
    }

    async fn store_session(&self, identity: &Identity, session: Option<Bytes>) -> Result<(), PublishError> {
        let sessions = self.inner.store.keyed(Table::Sessions);
        let key = identity.to_string();
        let stored = match session {
            Some(session) => sessions.put(key.as_bytes(), session).await,
            None => sessions.delete(key.as_bytes()).await,
        };
        stored.map_err(PublishError::from)
    }

    fn dropped(&self, client: &HubClient, reason: HeadDrop) {
        let reason = match reason {
            HeadDrop::BadTopic => "bad_topic",
            HeadDrop::BadProperties => "bad_properties",
        };
        counter!(
            "edgehub_messages_dropped_total",
            "reason" => reason, "from" => client.sender.identity.to_string(), "from_route_output" => ""
        )
        .increment(1);
    }
}

impl Hub {
    fn connect(&self, login: Login, mailbox: Mailbox) -> Result<HubClient, LoginError> {
        let inner = &self.inner;
        if inner.stopping.load(Ordering::Relaxed) {
            return Err(LoginError::Unavailable("the hub is stopping".into()));
        }
        let proved = inner.proved(&login);
        let identity = login.identity;
        let connection = inner.connections.fetch_add(1, Ordering::Relaxed);
        // Counted first, so that two logins at the limit cannot both pass.
        let open = inner.clients_open.fetch_add(1, Ordering::Relaxed);
        let (replaced, too_many) = {
            let before = inner.clients.get(&identity).map(|connected| connected.take_overs);
            if open >= inner.clients_max && before.is_none() {
                inner.clients_open.fetch_sub(1, Ordering::Relaxed);
                let max = inner.clients_max;
                return Err(LoginError::Unavailable(format!(
                    "{max} clients are connected, which is the limit; raise MaxConnectedClients"
                )));
            }
            let (take_overs, too_many) =
                before.map_or((TakeOvers::none(), false), |take_overs| take_overs.and_one());
            let (mailbox, proved) = (mailbox.clone(), proved.clone());
            let since = SystemTime::now();
            let connected = Connected { connection, since, mailbox, proved, take_overs };
            (inner.clients.insert(identity.clone(), connected), too_many)
        };
        inner.client_roll.connected(&identity, connection, OffsetDateTime::now_utc());
        inner.expects(&proved);
        if let Some(old) = replaced {
            tracing::info!(client = %identity, "A newer connection takes over");
            counter!("edgehub_client_take_overs_total", "id" => identity.to_string()).increment(1);
            if too_many {
                tracing::warn!(
                    code = "EH2009", client = %identity,
                    "Its connections take over from each other again and again: two clients use the same \
                     identity; give each its own"
                );
            }
            close(old.mailbox, CloseReason::TakenOver, &inner.delivery);
        }
        let id = identity.to_string();
        counter!("edgehub_client_connect_success_total", "id" => id).increment(1);
        gauge!("edgehub_connected_clients").set(inner.clients.len() as f64);
        let origin = if identity.device_id() == inner.edge_device.device_id() {
            Origin::Internal
        } else {
            Origin::Downstream
        };
        let sender = Arc::new(Sender { identity, origin, model_id: login.model_id });
        let publisher = inner.dispatch.publisher(&sender);
        let publisher = match login.protocol {
            Protocol::Mqtt => publisher.in_line(),
            // Each transfer has its own answer, and the link goes on after a refusal.
            Protocol::Amqp => publisher,
        };
        Ok(HubClient { hub: self.clone(), connection, sender, publisher, mailbox, inputs: false })
    }

    fn disconnected(&self, identity: &Identity, connection: u64) {
        let inner = &self.inner;
        inner.clients_open.fetch_sub(1, Ordering::Relaxed);
        inner.clients.remove_if(identity, |_, connected| connected.connection == connection);
        inner.client_roll.disconnected(identity, connection, OffsetDateTime::now_utc());
        inner.presence.leave(identity, connection);
        inner.control.ended(identity, connection);
        counter!("edgehub_client_disconnect_total", "id" => identity.to_string()).increment(1);
        gauge!("edgehub_connected_clients").set(inner.clients.len() as f64);
    }

    fn arrive(&self, identity: &Identity, consumer: Consumer) {
        self.inner.presence.arrive(identity, consumer);
    }

    fn leave(&self, identity: &Identity, connection: u64) {
        self.inner.presence.leave(identity, connection);
    }

    /// The store below, for pages and tools.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }
}

/// Asks a connection to close; waits in the background when its mailbox is full.
fn close(mailbox: Mailbox, reason: CloseReason, runtime: &Handle) {
    if let Err(mpsc::error::TrySendError::Full(command)) = mailbox.try_send(Command::Close(reason)) {
        runtime.spawn(async move {
            // The connection may end meanwhile; then the command has come true by itself.
            let _ = mailbox.send(command).await;
        });
    }
}

/// A queue cannot be opened, or the store is closed.
impl From<StoreError> for ApplyError {
    fn from(error: StoreError) -> Self {
        ApplyError::Store(error.to_string())
    }
}
