//! Owns the control plane of the hub: twins, methods, commands and subscriptions, and the task that hears the upstream.

use std::sync::Arc;
use std::time::Duration;

use edgehub_storage::Store;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};

use super::commands::Commands;
use super::connectivity::{Connectivity, ConnectivityBoard};
use super::methods::Methods;
use super::subscriptions::Subscriptions;
use super::twins::{TwinParts, Twins};
use crate::backend::{Feature, Mailbox};
use crate::delivery::BackoffOptions;
use crate::dispatch::Dispatch;
use crate::identity::Identity;
use crate::method::CALLS_MAX;
use crate::twin::TwinCipher;
use crate::upstream::control::{Control, Downward};

/// How twins, methods and cloud-to-device messages are served.
#[derive(Clone)]
pub struct ControlOptions {
    /// Least time between two updates of one identity's reported properties upstream; changes within it are one update.
    pub reported_pause: Duration,
    /// Least time between two readings of one client's twin because the hub's connection to the upstream is new.
    pub twin_sync_period_min: Duration,
    /// Twins that may be held in memory, in bytes; beyond it they are read from the store each time.
    pub twin_cache_bytes_max: usize,
    /// Seals twins at rest, if anything does.
    pub twin_cipher: Option<Arc<dyn TwinCipher>>,
    /// Pauses before the upstream is asked again for something that it refused.
    pub backoff: BackoffOptions,
}

impl Default for ControlOptions {
    /// 5 s, 120 s, 16 MiB, no cipher; pauses of 1 s to 60 s.
    fn default() -> Self {
        Self {
            reported_pause: Duration::from_secs(5),
            twin_sync_period_min: Duration::from_secs(120),
            twin_cache_bytes_max: 16 << 20,
            twin_cipher: None,
            backoff: BackoffOptions::default(),
        }
    }
}

/// The control plane; whoever holds it can reach all of it.
pub(super) struct ControlPlane {
    pub(super) twins: Arc<Twins>,
    pub(super) methods: Methods,
    subscriptions: Arc<Subscriptions>,
    commands: Commands,
    connectivity: ConnectivityBoard,
    /// Calls from the upstream that are under way.
    calls: Arc<Semaphore>,
    runtime: Handle,
    stop: watch::Sender<bool>,
}

/// What clients owe the hub, and the hub somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owed {
    /// Calls of methods without an answer.
    pub(super) calls: usize,
    /// Cloud-to-device messages without an outcome.
    pub(super) commands: usize,
}

impl ControlPlane {
    /// Starts it for the hub with this identity.
    pub(super) fn start(
        own: Identity,
        options: ControlOptions,
        (control, downward): (Control, mpsc::Receiver<Downward>),
        store: &Store,
        dispatch: &Dispatch,
        runtime: &Handle,
    ) -> Arc<Self> {
        let connectivity = ConnectivityBoard::new();
        let subscriptions = Arc::new(Subscriptions::new(own.clone()));
        let twins = Twins::new(TwinParts {
            own_identity: own.clone(),
            store: store.clone(),
            control: control.clone(),
            connectivity: connectivity.subscribe(),
            subscriptions: subscriptions.clone(),
            dispatch: dispatch.clone(),
            options,
            runtime: runtime.clone(),
        });
        let plane = Arc::new(Self {
            twins,
            methods: Methods::new(own, subscriptions.clone()),
            commands: Commands::new(subscriptions.clone(), runtime.clone()),
            subscriptions,
            connectivity,
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
            runtime: runtime.clone(),
            stop: watch::Sender::new(false),
        });
        runtime.spawn(plane.clone().run(control, downward));
        plane
    }

    /// Takes no further calls, and no cloud-to-device messages; what is under way goes on.
    pub(super) fn refuse(&self) {
        self.methods.refuse();
        self.commands.refuse();
    }

    /// What is under way.
    pub(super) fn owed(&self) -> Owed {
        // Of a call from the upstream, the answer is owed until the upstream's side has it.
        let of_upstream = CALLS_MAX - self.calls.available_permits();
        Owed { calls: of_upstream.max(self.methods.under_way()), commands: self.commands.under_way() }
    }

    /// Whether a connection owes something.
    pub(super) fn owes(&self, identity: &Identity, connection: u64) -> bool {
        self.methods.is_asked(identity, connection) || self.commands.has_some(identity)
    }

    /// Ends its tasks.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    pub(super) fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.connectivity.subscribe()
    }

    /// Switches a feature of a connection on or off.
    pub(super) fn subscribe(
        &self,
        identity: &Identity,
        connection: u64,
        mailbox: &Mailbox,
        feature: Feature,
        on: bool,
    ) {
        self.subscriptions.set(identity, connection, mailbox, feature, on);
        if on && feature == Feature::Methods {
            self.methods.subscribed(identity);
        }
    }

    /// A connection has ended.
    pub(super) fn ended(&self, identity: &Identity, connection: u64) {
        self.subscriptions.ended(identity, connection);
        self.methods.ended(identity, connection);
    }

    async fn run(self: Arc<Self>, control: Control, downward: mpsc::Receiver<Downward>) {
        let mut stop = self.stop.subscribe();
        let work = async {
            self.twins.restore().await;
            tokio::join!(
                self.subscriptions.tell(&control, |identity| self.twins.in_place(identity)),
                self.twins.clone().wake_due(),
                self.twins.clone().wake_linked(),
                self.hear(downward),
            );
        };
        tokio::select! {
            () = work => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        self.connectivity.enter(false);
    }

    /// Hears the upstream, as long as there is one.
    async fn hear(self: &Arc<Self>, mut downward: mpsc::Receiver<Downward>) {
        while let Some(event) = downward.recv().await {
            match event {
                Downward::Up => {
                    if self.connectivity.enter(true) {
                        self.subscriptions.tell_all();
                        self.twins.connected();
                    }
                }
                Downward::Down => {
                    self.connectivity.enter(false);
                }
                Downward::Linked(identity) => self.twins.linked(&identity),
                Downward::Desired { identity, patch } => self.twins.pushed(&identity, patch),
                Downward::Method { identity, name, payload, answer } => {
                    // Beyond the limit the call has no answer, and its caller a time-out.
                    let Ok(permit) = self.calls.clone().try_acquire_owned() else { continue };
                    let plane = self.clone();
                    self.runtime.spawn(async move {
                        let answered = plane.methods.invoke_for_upstream(identity, name, payload).await;
                        // The upstream's connection may be gone.
                        let _ = answer.send(answered);
                        drop(permit);
                    });
                }
                Downward::CloudToDevice { identity, message, settle } => {
                    self.commands.deliver(identity, *message, settle);
                }
            }
        }
        self.connectivity.enter(false);
    }
}
