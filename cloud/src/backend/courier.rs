//! What goes to one connected client beside method calls, in order: answers to its twin requests, changes of its
//! desired properties, cloud-to-device messages.
//!
//! Whoever has something to send leaves it with [`Errands`], which never blocks; the [`Courier`] is a task that reads
//! files, waits for room in the mailbox, and takes the outcomes of deliveries back.

use std::collections::VecDeque;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{
    Command, Deliveries, DesiredPatch, Feature, Mailbox, Outcome, Settler, Target, TwinAnswer, TwinError,
    TwinOperation, TwinReply, TwinRequest,
};
use edgehub_broker::identity::Identity;
use edgehub_broker::twin::json;
use parking_lot::Mutex;
use serde_json::{Map, Value};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::{Shared, blocking};
use crate::twin::{DesiredChange, Twin, TwinFault, TwinStoreError};

/// Twin requests of one client that wait.
pub(super) const TWIN_REQUESTS_MAX: usize = 64;

/// Changes of desired properties that wait for one client; with more, it is told the difference of the documents.
const CHANGES_MAX: usize = 16;

/// How long a client that did not take messages is left alone, unless it subscribes again.
const NOT_TAKEN_PAUSE: Duration = Duration::from_secs(1);

/// Longest sleep; the look after it is cheap.
const SLEEP_MAX: Duration = Duration::from_secs(60);

/// What waits for the courier of one connection.
#[derive(Debug, Default)]
pub(super) struct Errands {
    inner: Mutex<Inner>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    requests: VecDeque<TwinRequest>,
    changes: VecDeque<DesiredChange>,
    /// The document is to be compared with what the client knows.
    look_again: bool,
    offer: bool,
    desired: bool,
    methods: bool,
    messages: bool,
}

/// One thing to do.
enum Errand {
    Request(TwinRequest),
    /// The client wants to hear of changes: of these, or of the whole document, and of all that follow.
    Remember {
        told: Vec<DesiredChange>,
        everything: bool,
    },
    /// It does not any more.
    Forget,
    Change(DesiredChange),
    LookAgain,
    Offer,
}

impl Errands {
    pub(super) fn twin(&self, request: TwinRequest) -> Result<(), TwinError> {
        let mut inner = self.inner.lock();
        if inner.requests.len() >= TWIN_REQUESTS_MAX {
            return Err(TwinError::Busy);
        }
        inner.requests.push_back(request);
        drop(inner);
        self.wake.notify_one();
        Ok(())
    }

    pub(super) fn subscribe(&self, feature: Feature, on: bool) {
        let mut inner = self.inner.lock();
        match feature {
            Feature::DesiredProperties => inner.desired = on,
            Feature::Methods => inner.methods = on,
            Feature::CloudToDevice => {
                inner.messages = on;
                inner.offer = on;
            }
            Feature::ModuleInputs | Feature::TwinResponses => return,
        }
        drop(inner);
        self.wake.notify_one();
    }

    pub(super) fn takes(&self, feature: Feature) -> bool {
        let inner = self.inner.lock();
        match feature {
            Feature::DesiredProperties => inner.desired,
            Feature::Methods => inner.methods,
            Feature::CloudToDevice => inner.messages,
            Feature::ModuleInputs | Feature::TwinResponses => false,
        }
    }

    pub(super) fn desired(&self, change: DesiredChange) {
        let mut inner = self.inner.lock();
        if !inner.desired {
            return;
        }
        if inner.changes.len() >= CHANGES_MAX {
            inner.changes.clear();
            inner.look_again = true;
        } else {
            inner.changes.push_back(change);
        }
        drop(inner);
        self.wake.notify_one();
    }

    pub(super) fn look_again(&self) {
        let mut inner = self.inner.lock();
        inner.look_again = inner.desired;
        drop(inner);
        self.wake.notify_one();
    }

    pub(super) fn offer(&self) {
        let mut inner = self.inner.lock();
        inner.offer = inner.messages;
        drop(inner);
        self.wake.notify_one();
    }

    /// The next errand of a courier that remembers desired properties, or not.
    fn next(&self, remembers: bool) -> Option<Errand> {
        let mut inner = self.inner.lock();
        if inner.desired && !remembers {
            // What has been left here since the client subscribed is to be told, whatever the twin holds by now.
            let everything = std::mem::take(&mut inner.look_again);
            return Some(Errand::Remember { told: inner.changes.drain(..).collect(), everything });
        }
        if !inner.desired && remembers {
            inner.changes.clear();
            inner.look_again = false;
            return Some(Errand::Forget);
        }
        if let Some(request) = inner.requests.pop_front() {
            return Some(Errand::Request(request));
        }
        if let Some(change) = inner.changes.pop_front() {
            return Some(Errand::Change(change));
        }
        if std::mem::take(&mut inner.look_again) {
            return Some(Errand::LookAgain);
        }
        std::mem::take(&mut inner.offer).then_some(Errand::Offer)
    }
}

/// The task of one connection; it is aborted when the connection ends.
pub(super) struct Courier {
    shared: Arc<Shared>,
    identity: Identity,
    number: u64,
    mailbox: Mailbox,
    errands: Arc<Errands>,
    settler: Settler,
    /// What the client knows of its desired properties, while it wants to hear of changes.
    known: Option<Known>,
    /// When to offer messages without an errand.
    offer_at: Option<Instant>,
}

#[derive(Debug)]
struct Known {
    version: u64,
    desired: Map<String, Value>,
}

/// The mailbox is closed: the connection is about to end.
struct Closed;

impl Courier {
    pub(super) fn new(
        shared: &Arc<Shared>,
        identity: &Identity,
        number: u64,
        mailbox: &Mailbox,
        errands: &Arc<Errands>,
    ) -> Self {
        Self {
            shared: shared.clone(),
            identity: identity.clone(),
            number,
            mailbox: mailbox.clone(),
            errands: errands.clone(),
            settler: Settler::new(),
            known: None,
            offer_at: None,
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            let done = match self.errands.next(self.known.is_some()) {
                Some(errand) => self.run_errand(errand).await,
                None => {
                    self.wait().await;
                    Ok(())
                }
            };
            if done.is_err() {
                return;
            }
        }
    }

    /// Waits for an errand, an outcome, or the time to offer messages again.
    async fn wait(&mut self) {
        let offer_at = self.offer_at;
        let timer = async move {
            match offer_at {
                Some(at) => sleep_until(at).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = self.errands.wake.notified() => {}
            outcomes = self.settler.settled() => {
                self.shared.messages.settle(&self.identity, self.number, &outcomes);
                if outcomes.iter().any(|(_, outcome)| *outcome == Outcome::NotOffered) {
                    self.offer_at = Some(Instant::now() + NOT_TAKEN_PAUSE);
                } else {
                    self.errands.offer();
                }
            }
            () = timer => {
                self.offer_at = None;
                self.errands.offer();
            }
        }
    }

    async fn run_errand(&mut self, errand: Errand) -> Result<(), Closed> {
        match errand {
            Errand::Request(request) => self.answer(request).await,
            Errand::Remember { told, everything } => self.remember(told, everything).await,
            Errand::Forget => {
                self.known = None;
                Ok(())
            }
            Errand::Change(change) => self.change(change).await,
            Errand::LookAgain => self.compare().await,
            Errand::Offer => self.offer().await,
        }
    }

    async fn remember(&mut self, told: Vec<DesiredChange>, everything: bool) -> Result<(), Closed> {
        // If it cannot be read, whatever it is compared with later is new.
        self.known = Some(Known { version: 0, desired: Map::new() });
        if everything {
            return self.compare().await;
        }
        if let Some(twin) = self.read().await {
            self.known = Some(Known::of(&twin));
        }
        let version = self.known.as_ref().map_or(0, |known| known.version);
        for change in told {
            if change.version <= version {
                self.tell(&change.patch, change.version).await?;
            } else {
                self.change(change).await?;
            }
        }
        Ok(())
    }

    async fn answer(&mut self, request: TwinRequest) -> Result<(), Closed> {
        let TwinRequest { correlation, operation } = request;
        let result = match self.shared.generation_id(&self.identity) {
            None => Err(TwinError::Failed(format!("{} is not in the registry", self.identity))),
            Some(generation) => {
                let (twins, identity) = (self.shared.twins.clone(), self.identity.clone());
                let outcome = match operation {
                    TwinOperation::Get => blocking(move || twins.read(&identity, &generation))
                        .await
                        .map(|twin| TwinReply::Document(twin.to_client().to_string().into())),
                    TwinOperation::PatchReported(patch) => {
                        blocking(move || twins.change(&identity, &generation, |twin| twin.report(&patch)))
                            .await
                            .map(|(_, version)| TwinReply::Patched { version: Some(version) })
                    }
                };
                outcome.map_err(|error| match error {
                    TwinStoreError::Fault(TwinFault::Invalid(text)) => TwinError::Invalid(text),
                    other => {
                        tracing::error!(code = "EH7009", error = %other, identity = %self.identity, "a twin request failed");
                        TwinError::Failed(other.to_string())
                    }
                })
            }
        };
        match correlation {
            None => Ok(()),
            Some(correlation) => self.send(Command::TwinAnswer(TwinAnswer { correlation, result })).await,
        }
    }

    /// A change in turn goes out as it is; after a gap the client is told the difference.
    async fn change(&mut self, change: DesiredChange) -> Result<(), Closed> {
        let Some(known) = &mut self.known else { return Ok(()) };
        if change.version <= known.version {
            return Ok(());
        }
        if change.version != known.version + 1 {
            return self.compare().await;
        }
        if let Value::Object(patch) = &change.patch {
            let mut patch = patch.clone();
            patch.remove("$version");
            json::merge(&mut known.desired, &patch, json::Nulls::Delete);
        }
        known.version = change.version;
        self.tell(&change.patch, change.version).await
    }

    async fn compare(&mut self) -> Result<(), Closed> {
        let Some(twin) = self.read().await else { return Ok(()) };
        let Some(known) = self.known.replace(Known::of(&twin)) else {
            self.known = None;
            return Ok(());
        };
        if known.version == twin.desired_version() {
            return Ok(());
        }
        let mut patch = json::diff(&known.desired, twin.desired());
        patch.insert("$version".into(), twin.desired_version().into());
        self.tell(&Value::Object(patch), twin.desired_version()).await
    }

    async fn tell(&self, patch: &Value, version: u64) -> Result<(), Closed> {
        let patch = Bytes::from(patch.to_string());
        self.send(Command::Desired(DesiredPatch { patch, version })).await
    }

    async fn offer(&mut self) -> Result<(), Closed> {
        let Some(generation) = self.shared.generation_id(&self.identity) else { return Ok(()) };
        let messages = self.shared.messages.take(&self.identity, &generation, self.number);
        if !self.shared.is_current(&self.identity, self.number) {
            // Its end may have been before the messages were taken.
            self.shared.messages.connection_ended(&self.identity, self.number);
            return Err(Closed);
        }
        let next = self.shared.messages.next_sweep(&self.identity);
        // A little later, so that what is due then is due.
        let later = |wait: Duration| Instant::now() + wait.min(SLEEP_MAX) + Duration::from_millis(1);
        self.offer_at = next.map(later);
        if messages.is_empty() {
            return Ok(());
        }
        let deliveries = Deliveries { target: Target::Device, messages, settler: self.settler.clone() };
        self.send(Command::Deliver(deliveries)).await
    }

    async fn read(&self) -> Option<Twin> {
        let generation = self.shared.generation_id(&self.identity)?;
        let (twins, identity) = (self.shared.twins.clone(), self.identity.clone());
        match blocking(move || twins.read(&identity, &generation)).await {
            Ok(twin) => Some(twin),
            Err(error) => {
                tracing::error!(code = "EH7010", %error, identity = %self.identity, "a twin cannot be read");
                None
            }
        }
    }

    async fn send(&self, command: Command) -> Result<(), Closed> {
        self.mailbox.send(command).await.map_err(|_| Closed)
    }
}

impl Known {
    fn of(twin: &Twin) -> Self {
        Self { version: twin.desired_version(), desired: twin.desired().clone() }
    }
}
