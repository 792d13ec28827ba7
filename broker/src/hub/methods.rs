//! Owns direct methods: calls from the upstream and from local modules, to connected clients and to the hub itself.

use std::collections::hash_map::Entry;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ahash::AHashMap;
use bytes::Bytes;
use metrics::{counter, histogram};
use parking_lot::{Mutex, RwLock};
use serde_json::json;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::subscriptions::Subscriptions;
use crate::backend::{CallId, Command, Mailbox, MethodAnswer, MethodCall};
use crate::identity::Identity;
use crate::method::Calls;

/// How long a call from the upstream may take; the cloud itself waits five minutes.
const UPSTREAM_RESPONSE_SECS: u64 = 330;

/// Calls that may wait for one client to connect.
const WAITING_PER_CLIENT_MAX: usize = 64;

/// A direct method that is to be called.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// Who calls, for metrics.
    pub caller: Caller,
    /// Whose method.
    pub target: Identity,
    /// Its name.
    pub name: Arc<str>,
    /// The argument as JSON; `null` when there is none.
    pub payload: Bytes,
    /// How long to wait for the client to connect and to subscribe to methods.
    pub connect_timeout: Duration,
    /// How long to wait for its answer after that.
    pub response_timeout: Duration,
}

/// Who calls a direct method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// Somebody beyond the upstream.
    Upstream,
    /// A local client.
    Client(Identity),
}

/// Why a call has no answer of the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvokeError {
    /// The client is not connected, or takes no methods, and did not come in time.
    #[error("Client {0} not found")]
    NotFound(Identity),
    /// The client did not answer in time.
    #[error("Client {0} did not answer in time")]
    TimedOut(Identity),
    /// The client's connection ended before it answered.
    #[error("Client {0} disconnected before it answered")]
    Disconnected(Identity),
    /// Too many calls wait already.
    #[error("too many calls wait for an answer; come again")]
    Busy,
    /// The hub takes no calls any more.
    #[error("the hub is stopping; call again when it is back")]
    Stopping,
}

impl InvokeError {
    /// Its status as in HTTP: 404, 504, 429 or 503.
    pub fn status(&self) -> u16 {
        match self {
            InvokeError::NotFound(_) => 404,
            InvokeError::TimedOut(_) | InvokeError::Disconnected(_) => 504,
            InvokeError::Busy => 429,
            InvokeError::Stopping => 503,
        }
    }

    /// What the upstream's caller gets in place of the client's answer.
    fn answer(&self) -> MethodAnswer {
        answer(i32::from(self.status()), &self.to_string())
    }
}

/// The future of one of the hub's own methods.
pub type OwnMethodFuture = Pin<Box<dyn Future<Output = MethodAnswer> + Send>>;

/// One of the hub's own methods; takes the argument as JSON.
pub type OwnMethod = Arc<dyn Fn(Bytes) -> OwnMethodFuture + Send + Sync>;

/// All calls, and the hub's own methods.
pub(super) struct Methods {
    own: Identity,
    own_methods: RwLock<AHashMap<Box<str>, OwnMethod>>,
    subscriptions: Arc<Subscriptions>,
    calls: Arc<Calls>,
    /// Calls that wait for their client to connect.
    lines: Mutex<AHashMap<Identity, Arc<Line>>>,
    /// No call is taken any more.
    stopping: AtomicBool,
}

/// Those who wait for one client. They call one after the other, in the order in which they came.
struct Line {
    turn: Semaphore,
    subscribed: Notify,
    waiting: Mutex<usize>,
}

/// A place in a line; given up when it is dropped.
struct Place<'a> {
    methods: &'a Methods,
    identity: &'a Identity,
    line: Arc<Line>,
}

/// Forgets a call that nobody waits for any more.
struct GiveUp<'a>(&'a Calls, CallId);

impl Methods {
    pub(super) fn new(own: Identity, subscriptions: Arc<Subscriptions>) -> Self {
        Self {
            own,
            own_methods: RwLock::default(),
            subscriptions,
            calls: Arc::default(),
            lines: Mutex::default(),
            stopping: AtomicBool::new(false),
        }
    }

    /// Takes no further calls; those that are under way go on.
    pub(super) fn refuse(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Calls that clients have not answered.
    pub(super) fn under_way(&self) -> usize {
        self.calls.under_way()
    }

    /// Whether a connection owes an answer.
    pub(super) fn is_asked(&self, identity: &Identity, connection: u64) -> bool {
        self.calls.is_asked(identity, connection)
    }

    pub(super) fn serve_own(&self, name: &str, method: OwnMethod) {
        self.own_methods.write().insert(name.to_ascii_lowercase().into(), method);
    }

    /// Calls a method, and counts it.
    pub(super) async fn invoke(&self, invocation: Invocation) -> Result<MethodAnswer, InvokeError> {
        let from = match &invocation.caller {
            Caller::Upstream => "upstream".to_owned(),
            Caller::Client(identity) => identity.to_string(),
        };
        let labels = [("from", from), ("to", invocation.target.to_string())];
        counter!("edgehub_direct_methods_total", &labels).increment(1);
        let start = Instant::now();
        let answered = self.call(invocation).await;
        histogram!("edgehub_direct_method_duration_seconds", &labels).record(start.elapsed().as_secs_f64());
        answered
    }

    /// A call from the upstream; every one has an answer.
    pub(super) async fn invoke_for_upstream(
        &self,
        target: Identity,
        name: Arc<str>,
        payload: Bytes,
    ) -> MethodAnswer {
        let invocation = Invocation {
            caller: Caller::Upstream,
            target,
            name,
            payload,
            connect_timeout: Duration::ZERO,
            response_timeout: Duration::from_secs(UPSTREAM_RESPONSE_SECS),
        };
        let method = invocation.name.clone();
        let to = invocation.target.clone();
        self.invoke(invocation).await.unwrap_or_else(|error| {
            tracing::info!(client = %to, method = &*method, %error, "A direct method has no answer");
            error.answer()
        })
    }

    /// Takes a client's answer.
    pub(super) fn answered(&self, identity: &Identity, connection: u64, call: CallId, answer: MethodAnswer) {
        if !self.calls.answered(identity, connection, call, answer) {
            tracing::debug!(client = %identity, %call, "Nobody waits for this answer of a direct method");
        }
    }

    /// A client takes methods from now on. Its acknowledgement of that goes before the calls, which come through its
    /// mailbox.
    pub(super) fn subscribed(&self, identity: &Identity) {
        let line = self.lines.lock().get(identity).cloned();
        if let Some(line) = line {
            line.subscribed.notify_waiters();
        }
    }

    /// A connection has ended, and with it the calls that it was asked for.
    pub(super) fn ended(&self, identity: &Identity, connection: u64) {
        self.calls.connection_ended(identity, connection);
    }

    async fn call(&self, invocation: Invocation) -> Result<MethodAnswer, InvokeError> {
        let Invocation { caller: _, target, name, payload, connect_timeout, response_timeout } = invocation;
        if self.stopping.load(Ordering::Relaxed) {
            return Err(InvokeError::Stopping);
        }
        if target == self.own {
            return self.call_own(&name, payload, response_timeout).await;
        }
        let client = match self.client(&target) {
            Some(client) => client,
            None if connect_timeout.is_zero() => return Err(InvokeError::NotFound(target)),
            None => {
                let place = self.place(&target)?;
                let connect_by = Instant::now() + connect_timeout;
                let (client, _turn) = place.wait(connect_by, connect_by + response_timeout).await?;
                // The turn is held until the answer is there, so that the next in line comes after it.
                return self.ask(&target, client, name, payload, response_timeout).await;
            }
        };
        self.ask(&target, client, name, payload, response_timeout).await
    }

    async fn call_own(
        &self,
        name: &str,
        payload: Bytes,
        response_timeout: Duration,
    ) -> Result<MethodAnswer, InvokeError> {
        let Some(method) = self.own_methods.read().get(&*name.to_ascii_lowercase()).cloned() else {
            return Ok(answer(404, "the hub has no such method"));
        };
        let answered = tokio::time::timeout(response_timeout, method(payload)).await;
        answered.map_err(|_| InvokeError::TimedOut(self.own.clone()))
    }

    /// Asks a connected client.
    async fn ask(
        &self,
        target: &Identity,
        (connection, mailbox): (u64, Mailbox),
        name: Arc<str>,
        payload: Bytes,
        response_timeout: Duration,
    ) -> Result<MethodAnswer, InvokeError> {
        let answer_by = Instant::now() + response_timeout;
        let (id, answered) = self.calls.begin(target, connection).ok_or(InvokeError::Busy)?;
        let _given_up = GiveUp(&self.calls, id);
        let gone = || InvokeError::Disconnected(target.clone());
        let late = |_| InvokeError::TimedOut(target.clone());
        // A connection that ended before the call was noted has ended no call.
        if self.client(target).is_none_or(|(current, _)| current != connection) {
            return Err(gone());
        }
        let command = Command::Invoke(MethodCall { id, name, payload });
        timeout_at(answer_by, mailbox.send(command)).await.map_err(late)?.map_err(|_| gone())?;
        timeout_at(answer_by, answered).await.map_err(late)?.map_err(|_| gone())
    }

    fn client(&self, identity: &Identity) -> Option<(u64, Mailbox)> {
        self.subscriptions.client(identity, |wanted| wanted.methods)
    }

    fn place<'a>(&'a self, identity: &'a Identity) -> Result<Place<'a>, InvokeError> {
        let mut lines = self.lines.lock();
        let line = lines.entry(identity.clone()).or_insert_with(|| {
            Arc::new(Line { turn: Semaphore::new(1), subscribed: Notify::new(), waiting: Mutex::new(0) })
        });
        let mut waiting = line.waiting.lock();
        if *waiting >= WAITING_PER_CLIENT_MAX {
            return Err(InvokeError::Busy);
        }
        *waiting += 1;
        Ok(Place { methods: self, identity, line: line.clone() })
    }
}

impl Place<'_> {
    /// Waits for the turn of this place and for the client, which has to connect by one moment; those ahead have to be
    /// done by the other.
    async fn wait(
        &self,
        connect_by: Instant,
        done_by: Instant,
    ) -> Result<((u64, Mailbox), tokio::sync::SemaphorePermit<'_>), InvokeError> {
        let not_found = || InvokeError::NotFound(self.identity.clone());
        let turn = match timeout_at(connect_by, self.line.turn.acquire()).await {
            Ok(turn) => turn,
            // The client has come in time; only those ahead are not done.
            Err(_) if self.methods.client(self.identity).is_some() => {
                timeout_at(done_by, self.line.turn.acquire())
                    .await
                    .map_err(|_| InvokeError::TimedOut(self.identity.clone()))?
            }
            Err(_) => return Err(not_found()),
        };
        // Nobody closes the semaphore; if somebody did, there were no line to wait in.
        let turn = turn.map_err(|_| not_found())?;
        loop {
            let subscribed = self.line.subscribed.notified();
            tokio::pin!(subscribed);
            subscribed.as_mut().enable();
            if let Some(client) = self.methods.client(self.identity) {
                return Ok((client, turn));
            }
            timeout_at(connect_by, subscribed).await.map_err(|_| not_found())?;
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut lines = self.methods.lines.lock();
        let left = {
            let mut waiting = self.line.waiting.lock();
            *waiting -= 1;
            *waiting
        };
        if left == 0
            && let Entry::Occupied(entry) = lines.entry(self.identity.clone())
        {
            entry.remove();
        }
    }
}

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        self.0.give_up(self.1);
    }
}

/// An answer of the hub itself.
fn answer(status: i32, message: &str) -> MethodAnswer {
    MethodAnswer { status, payload: json!({ "message": message }).to_string().into() }
}
