//! Acceptance of messages: size-check, decide, append; the caller acknowledges when the commit resolves.
//!
//! The routes in force are one immutable [`Routing`] behind an atomic pointer: table, queues and times to live
//! change together, so a message is decided and stored under the old routes or the new ones, never under half.
//! What a connection needs again and again (candidate routes per output, metric handles) lives in its
//! [`Publisher`], so the way of a message touches no lock and no shared map.

mod routing;
mod tap;
mod view;

use std::cell::RefCell;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use edgehub_routing::{Candidates, Decision, MessageSource, SystemProperty as Known};
use edgehub_storage::{AppendRequest, Commit, Line, Record, Store, StoreError, Target};
use metrics::{Counter, Histogram, counter, histogram};
use smallvec::SmallVec;

use crate::backend::PublishError;
use crate::delivery::Run;
use crate::head::warn_limit::WarnLimit;
use crate::message::{MESSAGE_BYTES_MAX, Message, Sender, SystemProperty, Value};

pub use tap::{TAP_MESSAGES_PER_SEC_MAX, TAPS_OPEN_MAX, Tap, TapError, TapOptions, Tapped};

pub use routing::{QueuePlan, RouteDefaults, Routing, queue_name, split_queue_name};
use tap::Taps;
use view::View;

/// Outputs of one connection whose candidate routes are kept; a client that names more pays for the look-up.
const OUTPUTS_CACHED_MAX: usize = 64;

static REFUSAL_WARNINGS: WarnLimit = WarnLimit::new();

thread_local! {
    /// Room for one decision. Connections of a thread decide one after the other, and most of them rest.
    static DECISION: RefCell<Decision> = RefCell::default();
}

/// System properties that all messages of a connection to one output have in common.
const CONSTANT: [Known; 5] = [
    Known::ConnectionDeviceId,
    Known::ConnectionModuleId,
    Known::ModelId,
    Known::EdgeHubOriginInterface,
    // Last: only if there is an output.
    Known::OutputName,
];

/// Decides and stores.
#[derive(Clone)]
pub struct Dispatch {
    routing: Arc<ArcSwap<Routing>>,
    store: Store,
    taps: Arc<Taps>,
}

/// What one connection keeps between its messages.
pub struct Publisher {
    routing: arc_swap::Cache<Arc<ArcSwap<Routing>>, Arc<Routing>>,
    store: Store,
    taps: Arc<Taps>,
    line: Option<Line>,
    id: Arc<str>,
    outputs: Vec<Output>,
    generation: u64,
    /// Made with the first message: many clients only listen.
    sizes: Option<Histogram>,
}

/// The acknowledgement of published messages: resolves when all of them are stored, or none is. Messages that could not be
/// stored are counted and warned of here.
pub struct Published {
    commit: Commit,
    from: Arc<str>,
    /// What was to be stored, in messages times queues, by output.
    references: References,
}

type References = SmallVec<[(Arc<str>, u64); 1]>;

struct Output {
    name: Option<Box<str>>,
    /// The name as metrics have it; empty without one.
    label: Arc<str>,
    candidates: Candidates,
    received: Counter,
    unrouted: Counter,
}

impl Dispatch {
    /// Dispatch without any route.
    pub fn new(store: Store) -> Self {
        let routing = Arc::new(ArcSwap::from_pointee(Routing::empty()));
        Self { routing, store, taps: Arc::default() }
    }

    /// Puts new routes in force. Messages that are being decided keep the ones they began with.
    pub fn apply(&self, routing: Routing) {
        self.routing.store(Arc::new(routing));
    }

    /// The routes in force.
    pub fn routing(&self) -> Arc<Routing> {
        self.routing.load_full()
    }

    /// Stores messages about changed reported properties for the routes that want them; durable when it resolves. What
    /// no route wants leaves no trace.
    ///
    /// # Errors
    /// When the store refuses them; then none is stored.
    pub async fn publish_twin_changes(&self, messages: &[Message]) -> Result<(), PublishError> {
        let routing = self.routing();
        let mut decision = Decision::default();
        let mut request = AppendRequest { records: Vec::new(), unrouted: 0 };
        for message in messages {
            let view = View::new(message);
            let candidates =
                routing.table().candidates_for(&MessageSource::TwinChange, &[], &view).unwrap_or_default();
            routing.table().decide(&candidates, &view, &mut decision);
            let targets: SmallVec<[Target; 2]> =
                decision.targets.iter().map(|target| routing.target(target)).collect();
            if !targets.is_empty() {
                request.records.push(Record { bytes: message.to_record(), targets });
            }
        }
        if !request.records.is_empty() {
            self.store.submit(request).await?.await?;
        }
        Ok(())
    }

    /// Looks at messages as they are accepted.
    ///
    /// # Errors
    /// The condition does not compile, or as many taps are open as may be.
    pub fn tap(&self, options: &TapOptions) -> Result<Tap, TapError> {
        self.taps.open(options)
    }

    /// The way in for one connection.
    pub fn publisher(&self, sender: &Sender) -> Publisher {
        let id = sender.identity.to_string();
        Publisher {
            routing: arc_swap::Cache::new(self.routing.clone()),
            store: self.store.clone(),
            taps: self.taps.clone(),
            line: None,
            outputs: Vec::new(),
            generation: 0,
            sizes: None,
            id: id.into(),
        }
    }
}

/// Whether a message may be published at all.
///
/// # Errors
/// When it is larger than [`MESSAGE_BYTES_MAX`], or names a blank output.
pub fn check(message: &Message) -> Result<(), PublishError> {
    let size_bytes = message.size_bytes();
    if size_bytes > MESSAGE_BYTES_MAX {
        return Err(PublishError::TooLarge { size_bytes, limit_bytes: MESSAGE_BYTES_MAX });
    }
    if message.sender.identity.module_id().is_some() {
        match message.properties.system(SystemProperty::OutputName) {
            Value::Null => return Err(PublishError::Malformed("the output name is empty")),
            Value::Text(name) if name.trim().is_empty() => {
                return Err(PublishError::Malformed("the output name is blank"));
            }
            Value::Text(_) | Value::Absent => {}
        }
    }
    Ok(())
}

impl Publisher {
    /// Lets nothing overtake what was refused: after a request that failed, all further ones fail too. For a connection
    /// that ends with the first message that is not stored, as one of MQTT does.
    pub fn in_line(mut self) -> Self {
        self.line = Some(Line::default());
        self
    }

    /// Decides and puts in line all of these messages. Waits while the store has no room for another request.
    ///
    /// # Errors
    /// When the store is closed or refuses the request.
    pub async fn publish(&mut self, messages: &[Message]) -> Result<Published, PublishError> {
        let (request, references) = self.decide(messages);
        let submitted = match &self.line {
            Some(line) => self.store.submit_in(line, request).await,
            None => self.store.submit(request).await,
        };
        match submitted {
            Ok(commit) => Ok(Published { commit, from: self.id.clone(), references }),
            Err(error) => {
                refused(&error, &self.id, &references);
                Err(error.into())
            }
        }
    }

    fn decide(&mut self, messages: &[Message]) -> (AppendRequest, References) {
        DECISION.with_borrow_mut(|decision| self.decide_with(decision, messages))
    }

    fn decide_with(&mut self, decision: &mut Decision, messages: &[Message]) -> (AppendRequest, References) {
        // An `Arc` for the turn: the cache cannot stay borrowed while outputs are looked up.
        let routing = self.routing.load().clone();
        if routing.generation() != self.generation {
            self.outputs.clear();
            self.generation = routing.generation();
        }
        let mut request = AppendRequest { records: Vec::with_capacity(messages.len()), unrouted: 0 };
        let mut references = References::new();
        let sizes = self
            .sizes
            .get_or_insert_with(|| histogram!("edgehub_message_size_bytes", "id" => self.id.to_string()))
            .clone();
        let mut size_run = Run::new();
        for message in messages {
            let index = self.output(&routing, message);
            if let Some((size_bytes, count)) = size_run.add(message.size_bytes()) {
                sizes.record_many(size_bytes as f64, count);
            }
            let output = &self.outputs[index];
            output.received.increment(1);
            let view = View::new(message);
            routing.table().decide(&output.candidates, &view, decision);
            let targets: SmallVec<[Target; 2]> =
                decision.targets.iter().map(|target| routing.target(target)).collect();
            if self.taps.any() {
                let endpoint = |target: &edgehub_routing::Target| {
                    routing.table().endpoint(target.endpoint).map(|endpoint| endpoint.id.clone())
                };
                let endpoints = || decision.targets.iter().filter_map(endpoint).collect();
                self.taps.show(&source(message), message, endpoints);
            }
            if targets.is_empty() {
                output.unrouted.increment(1);
                request.unrouted += 1;
            } else {
                let count = targets.len() as u64;
                match references.iter_mut().find(|(label, _)| Arc::ptr_eq(label, &output.label)) {
                    Some((_, references)) => *references += count,
                    None => references.push((output.label.clone(), count)),
                }
                request.records.push(Record { bytes: message.to_record(), targets });
            }
        }
        if let Some((size_bytes, count)) = size_run.end() {
            sizes.record_many(size_bytes as f64, count);
        }
        (request, references)
    }

    /// The cached facts about the message's source.
    fn output(&mut self, routing: &Routing, message: &Message) -> usize {
        let name = output_name(message);
        if let Some(index) = self.outputs.iter().position(|output| output.name.as_deref() == name) {
            return index;
        }
        if self.outputs.len() == OUTPUTS_CACHED_MAX {
            self.outputs.clear();
        }
        let source = source(message);
        let constant = if name.is_some() { &CONSTANT[..] } else { &CONSTANT[..CONSTANT.len() - 1] };
        let label = name.unwrap_or_default().to_owned();
        let id = self.id.to_string();
        // Most clients have one.
        self.outputs.reserve_exact(1);
        self.outputs.push(Output {
            name: name.map(Box::from),
            label: label.as_str().into(),
            // A blank output is refused by `check`; a head that does not ask gets a message without routes.
            candidates: routing
                .table()
                .candidates_for(&source, constant, &View::new(message))
                .unwrap_or_default(),
            received: counter!(
                "edgehub_messages_received_total", "route_output" => label.clone(), "id" => id.clone()
            ),
            unrouted: counter!(
                "edgehub_messages_dropped_total",
                "reason" => "no_route", "from" => id, "from_route_output" => label
            ),
        });
        self.outputs.len() - 1
    }
}

impl Future for Published {
    type Output = Result<(), PublishError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let stored = std::task::ready!(Pin::new(&mut self.commit).poll(context));
        if let Err(error) = &stored {
            refused(error, &self.from, &self.references);
        }
        Poll::Ready(stored.map_err(PublishError::from))
    }
}

/// The output that a module sends to; a device has none.
fn output_name(message: &Message) -> Option<&str> {
    message.output().filter(|_| message.sender.identity.module_id().is_some())
}

fn source(message: &Message) -> MessageSource<'_> {
    match message.sender.identity.module_id() {
        None => MessageSource::Device,
        Some(module) => MessageSource::Module { module, output: output_name(message) },
    }
}

/// Counts messages that are not stored, and says why.
fn refused(error: &StoreError, from: &str, references: &References) {
    for (output, count) in references {
        counter!(
            "edgehub_messages_unack_total",
            "reason" => "storage_failure", "from" => from.to_owned(), "from_route_output" => output.to_string()
        )
        .increment(*count);
    }
    if let Some(others) = REFUSAL_WARNINGS.admit() {
        tracing::warn!(code = "EH4006", from, reason = %error, others, "Messages are not stored and not acknowledged");
    }
}

impl From<StoreError> for PublishError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full { .. } | StoreError::Behind => PublishError::Full(error.to_string()),
            other => PublishError::Store(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bytes::Bytes;
    use edgehub_routing::{OverflowPolicy, RouteSpec, RouteTable};
    use edgehub_storage::{StoreOptions, Ttl};

    use super::*;
    use crate::identity::Identity;
    use crate::message::{Origin, Properties, PropertyName};

    /// Routes to these inputs, half of them for hot messages only, all with that time to live.
    fn routing(inputs: &[&str], time_to_live_secs: u32, store: &Store) -> Routing {
        let texts: Vec<String> = inputs
            .iter()
            .enumerate()
            .map(|(n, input)| {
                let filter = if n % 2 == 0 { "" } else { "WHERE level = 'hot' AND site <> 'x'" };
                format!("FROM /messages/* {filter} INTO BrokeredEndpoint(\"/modules/m/inputs/{input}\")")
            })
            .collect();
        let specs = inputs.iter().zip(&texts).map(|(name, text)| RouteSpec {
            name,
            text,
            priority: 0,
            time_to_live_secs,
            upstream_target: None,
        });
        let (table, errors) = RouteTable::compile(specs, "edge1");
        assert!(errors.is_empty());
        let defaults = RouteDefaults { time_to_live_secs: -1, overflow: OverflowPolicy::RejectNew };
        Routing::open(table, defaults, |_| None, store).unwrap()
    }

    #[test]
    fn while_tables_change_a_message_is_decided_by_one_of_them() {
        const SWAPS: usize = 500;
        let store = Store::open(StoreOptions::memory()).unwrap();
        let tables = [(&["a", "b", "c", "d"][..], 10), (&["b", "d", "e", "f", "a"][..], 20)];
        let dispatch = Dispatch::new(store.clone());
        let apply = |at: usize| {
            let (inputs, secs) = tables[at % tables.len()];
            dispatch.apply(routing(inputs, secs, &store));
        };
        apply(0);
        let expected = tables.map(|(inputs, secs)| {
            let queue = |input: &&str| store.queue(&queue_name(&format!("edge1/m/{input}"), 0)).unwrap().id();
            let ttl = Ttl::Millis(u64::from(secs) * 1_000);
            let targets = inputs.iter().map(|input| (queue(input), ttl));
            targets.map(|(queue, ttl)| format!("{queue:?} {ttl:?}")).collect::<BTreeSet<_>>()
        });

        let identity = Identity::parse("edge1/press").unwrap();
        let sender = Arc::new(Sender { identity, origin: Origin::Internal, model_id: None });
        let message = || {
            let own = [(PropertyName::Application("level"), "hot"), (PropertyName::Application("site"), "n")];
            Message::new(sender.clone(), Properties::copied_from(own), Bytes::new())
        };
        let messages = [message(), message(), message()];
        let mut publisher = dispatch.publisher(&sender);
        let mut decided = || {
            let (request, _) = publisher.decide(&messages);
            let targets = request.records.iter().map(|record| {
                let targets = record.targets.iter();
                targets.map(|target| format!("{:?} {:?}", target.queue, target.ttl)).collect::<BTreeSet<_>>()
            });
            let targets: Vec<_> = targets.collect();
            assert_eq!(targets.len(), messages.len());
            let table = expected.iter().position(|expected| *expected == targets[0]);
            let table =
                table.unwrap_or_else(|| panic!("neither the old nor the new table: {:?}", targets[0]));
            assert!(targets.iter().all(|own| *own == targets[0]), "one turn, one table");
            table
        };
        assert_eq!(decided(), 0);
        std::thread::scope(|scope| {
            let swaps = scope.spawn(|| (0..=SWAPS).for_each(apply));
            while !swaps.is_finished() {
                decided();
            }
        });
        apply(1);
        assert_eq!(decided(), 1);
    }
}
