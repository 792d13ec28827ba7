//! Owns the twins of all identities: one worker per identity that has something to do, and what wakes the workers.
//!
//! A worker alone reads and changes its twin, so nothing is locked, and a slow upstream holds up one identity at most:
//! requests of a client are served while its upstream is asked. A worker ends when it has nothing to do; what it
//! remembers is on disk.

mod inbox;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ahash::AHashSet;
use bytes::Bytes;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use edgehub_storage::Store;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::Instant;

use super::ControlOptions;
use super::connectivity::Connectivity;
use super::identity_queue::IdentityQueue;
use super::own::DesiredProperties;
use super::subscriptions::{RefreshTime, Subscriptions};
use crate::backend::{Mailbox, TwinError, TwinOperation, TwinRequest};
use crate::dispatch::Dispatch;
use crate::identity::Identity;
use crate::message::{Origin, Sender};
use crate::twin::{TwinStore, TwinStoreError, json};
use crate::upstream::control::{Control, ControlError};
use inbox::{Inbox, Slot, Work};

/// Requests of one client that may wait.
pub const TWIN_REQUESTS_MAX: usize = 32;

/// Twins that are read from the upstream, or reported to it, at a time, unless a client waits for it.
const BACKGROUND_MAX: usize = 64;

/// All twins.
pub(super) struct Twins {
    store: TwinStore,
    clock: Store,
    control: Control,
    connectivity: watch::Receiver<Connectivity>,
    subscriptions: Arc<Subscriptions>,
    dispatch: Dispatch,
    /// The sender of messages about changed reported properties: the hub.
    sender: Arc<Sender>,
    own: watch::Sender<Option<Arc<DesiredProperties>>>,
    options: ControlOptions,
    slots: DashMap<Identity, Arc<Slot>, ahash::RandomState>,
    /// Identities whose reported properties wait for the upstream.
    pending: Mutex<AHashSet<Identity>>,
    /// Those of them that are to try it.
    due: IdentityQueue,
    /// Identities whose links are in place.
    linked: IdentityQueue,
    background: Arc<Semaphore>,
    /// Twins that workers hold in memory, in bytes.
    resident_bytes: AtomicUsize,
    runtime: Handle,
}

/// Who gets an answer.
pub(super) enum Asker {
    /// A client, through its mailbox; without a correlation it gets none.
    Client { mailbox: Mailbox, correlation: Option<Bytes> },
    /// The hub, which reports.
    Reporter(oneshot::Sender<Result<(), TwinError>>),
    /// The hub, which wants what the upstream has and nothing else.
    Reader(oneshot::Sender<Result<(), ControlError>>),
}

/// What the twins need of the hub.
pub(super) struct TwinParts {
    pub(super) own_identity: Identity,
    pub(super) store: Store,
    pub(super) control: Control,
    pub(super) connectivity: watch::Receiver<Connectivity>,
    pub(super) subscriptions: Arc<Subscriptions>,
    pub(super) dispatch: Dispatch,
    pub(super) options: ControlOptions,
    pub(super) runtime: Handle,
}

impl Twins {
    pub(super) fn new(parts: TwinParts) -> Arc<Self> {
        let sender = Sender { identity: parts.own_identity, origin: Origin::Internal, model_id: None };
        Arc::new(Self {
            store: TwinStore::new(&parts.store, parts.options.twin_cipher.clone()),
            clock: parts.store,
            control: parts.control,
            connectivity: parts.connectivity,
            subscriptions: parts.subscriptions,
            dispatch: parts.dispatch,
            sender: Arc::new(sender),
            own: watch::Sender::new(None),
            options: parts.options,
            slots: DashMap::default(),
            pending: Mutex::default(),
            due: IdentityQueue::default(),
            linked: IdentityQueue::default(),
            background: Arc::new(Semaphore::new(BACKGROUND_MAX)),
            resident_bytes: AtomicUsize::new(0),
            runtime: parts.runtime,
        })
    }

    /// The hub's own desired properties.
    pub(super) fn own(&self) -> watch::Receiver<Option<Arc<DesiredProperties>>> {
        self.own.subscribe()
    }

    pub(super) fn own_identity(&self) -> &Identity {
        &self.sender.identity
    }

    /// Takes a client's request.
    pub(super) fn request(
        self: &Arc<Self>,
        identity: &Identity,
        mailbox: &Mailbox,
        request: TwinRequest,
    ) -> Result<(), TwinError> {
        let asker = Asker::Client { mailbox: mailbox.clone(), correlation: request.correlation };
        let work = match request.operation {
            TwinOperation::Get => Work::Get { asker, since: Instant::now() },
            TwinOperation::PatchReported(text) => {
                let patch =
                    json::parse_patch(&text).map_err(|error| TwinError::Invalid(error.to_string()))?;
                Work::Report { patch, text, routed: true, asker, since: Instant::now() }
            }
        };
        self.post(identity, |inbox| inbox.put(work, TWIN_REQUESTS_MAX).map_err(|_| TwinError::Busy))
    }

    /// Reads the hub's own twin from the upstream.
    pub(super) async fn read_own(self: &Arc<Self>) -> Result<(), ControlError> {
        let (sender, answer) = oneshot::channel();
        let work = Work::Get { asker: Asker::Reader(sender), since: Instant::now() };
        // A full inbox drops the request, and with it the place for its answer.
        self.post(self.own_identity(), |inbox| inbox.put(work, TWIN_REQUESTS_MAX).ok());
        answer.await.unwrap_or(Err(ControlError::Timeout))
    }

    /// Changes the hub's own reported properties; routes do not hear of it.
    pub(super) async fn report_own(self: &Arc<Self>, text: Bytes) -> Result<(), TwinError> {
        let patch = json::parse_patch(&text).map_err(|error| TwinError::Invalid(error.to_string()))?;
        let (sender, answer) = oneshot::channel();
        let (asker, since) = (Asker::Reporter(sender), Instant::now());
        let work = Work::Report { patch, text, routed: false, asker, since };
        self.post(self.own_identity(), |inbox| {
            inbox.put(work, TWIN_REQUESTS_MAX).map_err(|_| TwinError::Busy)
        })?;
        answer.await.unwrap_or_else(|_| Err(TwinError::Failed("the hub is stopping".into())))
    }

    /// Deletes the twin of an identity that is no longer in scope. Whatever is under way for it is given up.
    pub(super) async fn delete(self: &Arc<Self>, identity: &Identity) -> Result<(), TwinStoreError> {
        let (sender, deleted) = oneshot::channel();
        self.post(identity, |inbox| inbox.deletions.push(sender));
        deleted.await.unwrap_or_else(|_| Err(TwinStoreError::Store("the hub is stopping".into())))
    }

    /// Desired properties of an identity changed upstream.
    pub(super) fn pushed(self: &Arc<Self>, identity: &Identity, patch: Bytes) {
        self.post(identity, |inbox| inbox.push(patch));
    }

    /// What an identity wants of the upstream is in place.
    pub(super) fn linked(&self, identity: &Identity) {
        self.subscriptions.linked(identity);
        self.in_place(identity);
    }

    /// The twin of an identity may have to be compared.
    pub(super) fn in_place(&self, identity: &Identity) {
        self.linked.push(identity);
    }

    /// The upstream is back: whatever waits for it is sent.
    pub(super) fn connected(&self) {
        let pending: Vec<Identity> = self.pending.lock().iter().cloned().collect();
        pending.iter().for_each(|identity| self.due.push(identity));
    }

    /// Reads the hub's own twin and the list of what waits, as they were stored. To be called before the upstream is heard.
    pub(super) async fn restore(self: &Arc<Self>) {
        let own = self.own_identity().clone();
        self.post(&own, |inbox| inbox.load = true);
        match self.store.pending().await {
            Ok(pending) => self.pending.lock().extend(pending),
            Err(error) => {
                tracing::error!(code = "EH4014", %error, "Reported properties that wait for the upstream cannot be read")
            }
        }
    }

    /// Wakes the workers of identities that are to report, as many at a time as the upstream may be asked; for ever.
    pub(super) async fn wake_due(self: Arc<Self>) {
        loop {
            let identity = self.due.next().await;
            let Ok(permit) = self.background.clone().acquire_owned().await else { return };
            self.post(&identity, |inbox| {
                inbox.report = true;
                inbox.permit = Some(permit);
            });
        }
    }

    /// Wakes the workers of identities whose links are in place: they report, then compare; for ever.
    pub(super) async fn wake_linked(self: Arc<Self>) {
        loop {
            let identity = self.linked.next().await;
            match self.subscriptions.refresh_time(&identity, self.options.twin_sync_period_min) {
                RefreshTime::Never => continue,
                RefreshTime::Now => {}
                RefreshTime::After(pause) => {
                    let twins = self.clone();
                    self.runtime.spawn(async move {
                        tokio::time::sleep(pause).await;
                        twins.linked.push(&identity);
                    });
                    continue;
                }
            }
            let Ok(permit) = self.background.clone().acquire_owned().await else { return };
            self.post(&identity, |inbox| {
                inbox.compare = true;
                inbox.permit = Some(permit);
            });
        }
    }

    /// Puts something into the inbox of an identity's worker, which is started if there is none.
    fn post<T>(self: &Arc<Self>, identity: &Identity, put: impl FnOnce(&mut Inbox) -> T) -> T {
        loop {
            let slot = match self.slots.entry(identity.clone()) {
                Entry::Occupied(entry) => (entry.get().clone(), false),
                Entry::Vacant(entry) => (entry.insert(Arc::default()).clone(), true),
            };
            let (slot, new) = slot;
            if new {
                self.runtime.spawn(worker::run(self.clone(), identity.clone(), slot.clone()));
            }
            let mut inbox = slot.inbox.lock();
            if inbox.ended {
                drop(inbox);
                self.forget(identity, &slot);
                continue;
            }
            let result = put(&mut inbox);
            drop(inbox);
            slot.wake.notify_one();
            return result;
        }
    }

    fn forget(&self, identity: &Identity, slot: &Arc<Slot>) {
        self.slots.remove_if(identity, |_, current| Arc::ptr_eq(current, slot));
    }

    fn is_connected(&self) -> bool {
        self.connectivity.borrow().connected
    }

    /// Whether workers hold as many twins in memory as they may.
    fn is_full(&self) -> bool {
        self.resident_bytes.load(Ordering::Relaxed) > self.options.twin_cache_bytes_max
    }
}

/// The time that passed, for a metric.
fn seconds_since(start: Instant) -> f64 {
    Instant::now().saturating_duration_since(start).max(Duration::ZERO).as_secs_f64()
}
