//! A hub whose upstream is played by the test: twins, methods and commands, over the seam of the control plane.
#![allow(dead_code)] // each test program uses a part of it

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::backend::{
    Backend, Command, Feature, MethodAnswer, Outcome, TwinAnswer, TwinError, TwinOperation, TwinReply,
    TwinRequest,
};
use edgehub_broker::hub::{Connectivity, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, PropertyName, Sender, SystemProperty};
use edgehub_broker::twin::json::{self, Nulls, Object};
use edgehub_broker::upstream::control::{ControlError, ControlPeer, Downward, Request, Wanted, channel};
use edgehub_routing::OverflowPolicy;
use edgehub_storage::{Store, StoreLimits, StoreOptions};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};

use crate::module_site::{DEADLINE, Module, QUICK, Trusting, connect, pump};

/// The hub's own identity.
pub(crate) const OWN: &str = "edge1/$edgeHub";

pub(crate) fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

pub(crate) fn object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        other => panic!("{other} is no object"),
    }
}

/// Nothing waits for time to pass.
pub(crate) fn quick() -> ControlOptions {
    ControlOptions {
        reported_pause: Duration::ZERO,
        twin_sync_period_min: Duration::ZERO,
        backoff: QUICK,
        ..ControlOptions::default()
    }
}

pub(crate) fn memory() -> Store {
    Store::open(StoreOptions::memory()).unwrap()
}

pub(crate) fn start(store: &Store, control: ControlOptions) -> (Hub, Cloud) {
    start_within(store, control, StoreLimits::default())
}

pub(crate) fn start_within(store: &Store, control: ControlOptions, limits: StoreLimits) -> (Hub, Cloud) {
    let options = HubOptions {
        edge_device: id("edge1"),
        clients_max: 64,
        module_pump: pump(16, DEADLINE),
        upstream: None,
        control,
        overflow: OverflowPolicy::RejectNew,
        limits,
    };
    let (seam, downward, peer) = channel(DEADLINE);
    let runtime = tokio::runtime::Handle::current();
    let hub = Hub::start_with_control(options, store.clone(), Arc::new(Trusting), runtime, seam, downward);
    let cloud = Cloud::start(peer, hub.connectivity());
    (hub, cloud)
}

/// The upstream: keeps twins, and notes what it is asked for.
#[derive(Clone)]
pub(crate) struct Cloud {
    state: Arc<Mutex<CloudState>>,
    downward: mpsc::Sender<Downward>,
    connectivity: watch::Receiver<Connectivity>,
}

#[derive(Default)]
struct CloudState {
    online: bool,
    twins: BTreeMap<Identity, (Object, Object)>,
    /// Reported properties as they came.
    patches: Vec<(Identity, Value)>,
    /// Twins that were read.
    reads: Vec<Identity>,
    wants: Vec<(Identity, Wanted)>,
    wanted: BTreeMap<Identity, Wanted>,
    hanging: BTreeSet<Identity>,
    refusing: BTreeSet<Identity>,
    held: Vec<Request>,
}

impl Cloud {
    fn start(peer: ControlPeer, connectivity: watch::Receiver<Connectivity>) -> Self {
        let ControlPeer { mut requests, downward } = peer;
        let cloud = Self { state: Arc::default(), downward, connectivity };
        let serving = cloud.clone();
        tokio::spawn(async move {
            while let Some(request) = requests.recv().await {
                serving.serve(request).await;
            }
        });
        cloud
    }

    async fn serve(&self, request: Request) {
        let linked = {
            let mut state = self.state.lock();
            let state = &mut *state;
            match request {
                Request::Want { identity, wanted } => {
                    state.wants.push((identity.clone(), wanted));
                    if wanted.is_nothing() {
                        state.wanted.remove(&identity);
                        None
                    } else {
                        let before = state.wanted.insert(identity.clone(), wanted);
                        (state.online && before != Some(wanted)).then_some(identity)
                    }
                }
                Request::Twin { .. } | Request::PatchReported { .. } if !state.online => None,
                Request::Twin { ref identity, .. } | Request::PatchReported { ref identity, .. }
                    if state.hanging.contains(identity) =>
                {
                    state.held.push(request);
                    None
                }
                Request::Twin { identity, answer } => {
                    state.reads.push(identity.clone());
                    let _ = answer.send(Ok(state.document(&identity)));
                    None
                }
                Request::PatchReported { identity, patch, answer } => {
                    let _ = answer.send(state.report(&identity, &patch));
                    None
                }
            }
        };
        if let Some(identity) = linked {
            self.hear(Downward::Linked(identity)).await;
        }
    }

    pub(crate) async fn hear(&self, event: Downward) {
        self.downward.send(event).await.unwrap();
    }

    /// The connection is there, then what is wanted.
    pub(crate) async fn up(&self) {
        self.state.lock().online = true;
        self.hear(Downward::Up).await;
        self.connectivity.clone().wait_for(|state| state.connected).await.unwrap();
        let wanted: Vec<Identity> = self.state.lock().wanted.keys().cloned().collect();
        for identity in wanted {
            self.hear(Downward::Linked(identity)).await;
        }
    }

    pub(crate) async fn down(&self) {
        {
            let mut state = self.state.lock();
            state.online = false;
            state.held.clear();
        }
        self.hear(Downward::Down).await;
        self.connectivity.clone().wait_for(|state| !state.connected).await.unwrap();
    }

    /// Changes desired properties without telling anybody; the patch with its version.
    pub(crate) fn change(&self, identity: &str, patch: Value) -> Value {
        let mut state = self.state.lock();
        let (desired, _) = state.twins.entry(id(identity)).or_default();
        let version = desired.get("$version").and_then(Value::as_u64).unwrap_or(0) + 1;
        let mut patch = object(patch);
        patch.insert("$version".into(), version.into());
        json::merge(desired, &patch, Nulls::Delete);
        desired.insert("$metadata".into(), json!({ "$lastUpdated": format!("at {version}") }));
        Value::Object(patch)
    }

    /// Changes desired properties and tells the hub.
    pub(crate) async fn desire(&self, identity: &str, patch: Value) -> Value {
        let patch = self.change(identity, patch);
        self.hear(Downward::Desired { identity: id(identity), patch: patch.to_string().into() }).await;
        patch
    }

    /// Tells the hub of a change, without giving way to anybody.
    pub(crate) fn tell(&self, identity: &str, patch: &Value) {
        let patch = patch.to_string().into();
        self.downward.try_send(Downward::Desired { identity: id(identity), patch }).unwrap();
    }

    /// What is asked for this identity gets no answer from now on.
    pub(crate) fn hang(&self, identity: &str) {
        self.state.lock().hanging.insert(id(identity));
    }

    /// What was asked for this identity is answered, and all that comes.
    pub(crate) async fn go_on(&self, identity: &str) {
        let held = {
            let mut state = self.state.lock();
            state.hanging.remove(&id(identity));
            std::mem::take(&mut state.held)
        };
        for request in held {
            self.serve(request).await;
        }
    }

    /// Reported properties of this identity are refused, or no longer.
    pub(crate) fn refuse(&self, identity: &str, refuses: bool) {
        let mut state = self.state.lock();
        if refuses {
            state.refusing.insert(id(identity));
        } else {
            state.refusing.remove(&id(identity));
        }
    }

    /// Takes the one reading that hangs out, to answer it later.
    pub(crate) fn take_reading(&self) -> oneshot::Sender<Result<bytes::Bytes, ControlError>> {
        match self.state.lock().held.pop() {
            Some(Request::Twin { answer, .. }) => answer,
            other => panic!("a reading was expected, not {other:?}"),
        }
    }

    pub(crate) fn held(&self) -> usize {
        self.state.lock().held.len()
    }

    /// The patches of reported properties of an identity, in order.
    pub(crate) fn patches(&self, identity: &str) -> Vec<Value> {
        let state = self.state.lock();
        let of_identity = state.patches.iter().filter(|(whose, _)| *whose == id(identity));
        of_identity.map(|(_, patch)| patch.clone()).collect()
    }

    pub(crate) fn reported(&self, identity: &str) -> Value {
        let state = self.state.lock();
        let mut reported = state.twins.get(&id(identity)).map(|(_, reported)| reported.clone());
        reported.iter_mut().for_each(|reported| drop(reported.remove("$version")));
        Value::Object(reported.unwrap_or_default())
    }

    /// How often the twin of an identity was read.
    pub(crate) fn reads(&self, identity: &str) -> usize {
        self.state.lock().reads.iter().filter(|whose| **whose == id(identity)).count()
    }

    /// What an identity was last said to want.
    pub(crate) fn wanted(&self, identity: &str) -> Option<Wanted> {
        self.state.lock().wanted.get(&id(identity)).copied()
    }

    /// How often the hub said what an identity wants.
    pub(crate) fn wants(&self, identity: &str) -> usize {
        self.state.lock().wants.iter().filter(|(whose, _)| *whose == id(identity)).count()
    }

    /// Calls a method; none when the hub drops the call.
    pub(crate) async fn call(
        &self,
        identity: &str,
        name: &str,
        payload: &str,
    ) -> oneshot::Receiver<MethodAnswer> {
        let (answer, receiver) = oneshot::channel();
        let payload = payload.to_owned().into();
        self.hear(Downward::Method { identity: id(identity), name: name.into(), payload, answer }).await;
        receiver
    }

    /// Sends a cloud-to-device message; its body is its lock token.
    pub(crate) async fn command(&self, device: &str, token: &str) -> oneshot::Receiver<Outcome> {
        let (settle, receiver) = oneshot::channel();
        let sender = Sender { identity: id(device), origin: Origin::Downstream, model_id: None };
        let own = [(PropertyName::System(SystemProperty::LockToken), token)];
        let message = Message::new(Arc::new(sender), Properties::copied_from(own), token.to_owned().into());
        let message = Box::new(message);
        self.hear(Downward::CloudToDevice { identity: id(device), message, settle }).await;
        receiver
    }
}

impl CloudState {
    fn document(&mut self, identity: &Identity) -> bytes::Bytes {
        let (desired, reported) = self.twins.entry(identity.clone()).or_default();
        json!({ "desired": desired, "reported": reported }).to_string().into()
    }

    fn report(&mut self, identity: &Identity, patch: &[u8]) -> Result<Option<u64>, ControlError> {
        if self.refusing.contains(identity) {
            return Err(ControlError::Refused { status: 429, text: "too many".into() });
        }
        let patch: Value = serde_json::from_slice(patch).unwrap();
        self.patches.push((identity.clone(), patch.clone()));
        let (_, reported) = self.twins.entry(identity.clone()).or_default();
        json::merge(reported, &object(patch), Nulls::Delete);
        let version = reported.get("$version").and_then(Value::as_u64).unwrap_or(0) + 1;
        reported.insert("$version".into(), version.into());
        Ok(Some(version))
    }
}

/// A client that wants to hear of its desired properties.
pub(crate) async fn subscriber(hub: &Hub, cloud: &Cloud, identity: &str) -> Module {
    let mut client = connect(hub, identity).await;
    hub.subscribe(&mut client.client, Feature::DesiredProperties, true);
    crate::module_site::until(|| cloud.wanted(identity).is_some_and(|wanted| wanted.desired)).await;
    client
}

pub(crate) async fn command(client: &mut Module) -> Command {
    tokio::time::timeout(DEADLINE, client.mailbox.recv())
        .await
        .expect("a command in time")
        .expect("the hub holds the mailbox")
}

pub(crate) fn ask(hub: &Hub, client: &mut Module, operation: TwinOperation) -> Result<(), TwinError> {
    hub.twin(&mut client.client, TwinRequest { correlation: Some("r".into()), operation })
}

pub(crate) async fn answer(client: &mut Module) -> Result<TwinReply, TwinError> {
    match command(client).await {
        Command::TwinAnswer(TwinAnswer { correlation, result }) => {
            assert_eq!(correlation, "r");
            result
        }
        other => panic!("an answer was expected, not {other:?}"),
    }
}

/// Reads the client's twin.
pub(crate) async fn get(hub: &Hub, client: &mut Module) -> Value {
    ask(hub, client, TwinOperation::Get).unwrap();
    document(answer(client).await)
}

pub(crate) fn document(result: Result<TwinReply, TwinError>) -> Value {
    match result {
        Ok(TwinReply::Document(document)) => serde_json::from_slice(&document).unwrap(),
        other => panic!("a twin was expected, not {other:?}"),
    }
}

/// Changes the client's reported properties.
pub(crate) async fn report(hub: &Hub, client: &mut Module, patch: Value) -> Result<TwinReply, TwinError> {
    ask(hub, client, TwinOperation::PatchReported(patch.to_string().into()))?;
    answer(client).await
}

pub(crate) async fn report_all(hub: &Hub, client: &mut Module, patches: impl IntoIterator<Item = Value>) {
    for patch in patches {
        assert_eq!(report(hub, client, patch).await, Ok(TwinReply::Patched { version: None }));
    }
}

/// The next change of desired properties that the client hears of.
pub(crate) async fn desired(client: &mut Module) -> Value {
    match command(client).await {
        Command::Desired(desired) => {
            let patch: Value = serde_json::from_slice(&desired.patch).unwrap();
            assert_eq!(patch["$version"], desired.version);
            patch
        }
        other => panic!("desired properties were expected, not {other:?}"),
    }
}
