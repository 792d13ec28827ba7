//! The state of the way up, for status pages and metrics.

use std::collections::BTreeMap;

use metrics::{counter, gauge, histogram};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::failure::{Failure, UpstreamCause};
use super::targets::Target;
use super::watchdog::WatchdogStep;

/// What the supervisor is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamState {
    /// Name look-up, TCP, TLS, open, token.
    Connecting,
    /// Messages flow, or would.
    Up,
    /// Connected, but the upstream asked for a pause.
    Throttled,
    /// Waiting before the next attempt.
    BackingOff,
}

impl UpstreamState {
    /// Whether there is a connection that takes messages, or will after a pause.
    pub fn is_up(self) -> bool {
        matches!(self, UpstreamState::Up | UpstreamState::Throttled)
    }
}

/// The way up at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct UpstreamStatus {
    /// Host and port of the upstream.
    pub address: String,
    /// What the supervisor is doing.
    pub state: UpstreamState,
    /// Since when, in seconds since 1970.
    pub since_unix_secs: u64,
    /// Why it is not up; empty while it is.
    pub reason: String,
    /// What took the last connection, or kept it from coming about; stays when the next one is up.
    pub last_cause: Option<UpstreamCause>,
    /// Connections lost or refused since the start.
    pub failures: u64,
    /// The same by their cause.
    pub failures_by_cause: BTreeMap<UpstreamCause, u64>,
    /// How often something that did not get on was started anew since the start, by how far up.
    pub watchdog: BTreeMap<WatchdogStep, u64>,
    /// Identities that have a session upstream, or are getting one.
    pub sessions: usize,
    /// Transfers without an answer.
    pub in_flight: usize,
    /// Messages that were read from the queues and are not settled.
    pub held: usize,
    /// Senders that are parked after a failure of their own.
    pub parked_senders: usize,
    /// Identities whose twins, methods or cloud-to-device messages wait after a failure of their own.
    pub parked_identities: usize,
}

/// How much is under way, and who waits.
#[derive(Debug)]
pub(crate) struct Load<'a> {
    pub(crate) in_flight: usize,
    pub(crate) held: usize,
    pub(crate) sessions: usize,
    pub(crate) parked_senders: usize,
    pub(crate) parked_identities: usize,
    pub(crate) watchdog: &'a BTreeMap<WatchdogStep, u64>,
}

/// Publishes the state and counts time offline.
pub(crate) struct StatusBoard {
    sender: watch::Sender<UpstreamStatus>,
    hub_id: String,
    /// The target, if it is one of several.
    labels: Vec<(&'static str, String)>,
    offline_since: Option<Instant>,
}

impl StatusBoard {
    /// Starts offline: the time until the first contact counts too.
    pub(crate) fn new(address: String, hub_id: String, target: Option<&Target>) -> Self {
        let labels: Vec<_> = target.map(|target| ("target", target.to_string())).into_iter().collect();
        let status = UpstreamStatus {
            address,
            state: UpstreamState::Connecting,
            since_unix_secs: unix_secs(),
            reason: "starting".into(),
            last_cause: None,
            failures: 0,
            failures_by_cause: BTreeMap::new(),
            watchdog: BTreeMap::new(),
            sessions: 0,
            in_flight: 0,
            held: 0,
            parked_senders: 0,
            parked_identities: 0,
        };
        gauge!("edgehub_upstream_connected", &labels).set(0.0);
        Self { sender: watch::Sender::new(status), hub_id, labels, offline_since: Some(Instant::now()) }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<UpstreamStatus> {
        self.sender.subscribe()
    }

    /// The supervisor does something else now.
    pub(crate) fn enter(&mut self, state: UpstreamState, reason: &str) {
        let up = state.is_up();
        match (up, self.offline_since) {
            (true, Some(since)) => {
                self.offline_since = None;
                histogram!("edgehub_offline_duration_seconds", &self.labels_with("id", &self.hub_id))
                    .record(since.elapsed().as_secs_f64());
            }
            (false, None) => {
                self.offline_since = Some(Instant::now());
                counter!("edgehub_offline_count_total", &self.labels_with("id", &self.hub_id)).increment(1);
            }
            (true, None) | (false, Some(_)) => {}
        }
        gauge!("edgehub_upstream_connected", &self.labels).set(if up { 1.0 } else { 0.0 });
        let throttled = state == UpstreamState::Throttled;
        gauge!("edgehub_upstream_throttled", &self.labels).set(if throttled { 1.0 } else { 0.0 });
        self.sender.send_if_modified(|status| {
            if status.state == state && status.reason == reason {
                return false;
            }
            if status.state != state {
                status.state = state;
                status.since_unix_secs = unix_secs();
            }
            reason.clone_into(&mut status.reason);
            true
        });
    }

    /// The connection failed, or did not come about; the supervisor backs off.
    pub(crate) fn failed(&mut self, failure: &Failure) {
        let labels = self.labels_with("reason", failure.cause.as_str());
        counter!("edgehub_upstream_failures_total", &labels).increment(1);
        self.sender.send_modify(|status| {
            status.last_cause = Some(failure.cause);
            status.failures += 1;
            *status.failures_by_cause.entry(failure.cause).or_insert(0) += 1;
        });
        self.enter(UpstreamState::BackingOff, &failure.text);
    }

    /// One more label before those of the way.
    fn labels_with(&self, name: &'static str, value: &str) -> Vec<(&'static str, String)> {
        std::iter::once((name, value.to_owned())).chain(self.labels.iter().cloned()).collect()
    }

    /// How much is under way.
    pub(crate) fn load(&self, load: Load<'_>) {
        gauge!("edgehub_upstream_inflight", &self.labels).set(load.in_flight as f64);
        gauge!("edgehub_upstream_sessions", &self.labels).set(load.sessions as f64);
        gauge!("edgehub_upstream_parked", &self.labels)
            .set(load.parked_senders.max(load.parked_identities) as f64);
        self.sender.send_if_modified(|status| {
            let before = (status.in_flight, status.held, status.sessions);
            let parked = (status.parked_senders, status.parked_identities);
            let changed = before != (load.in_flight, load.held, load.sessions)
                || parked != (load.parked_senders, load.parked_identities)
                || status.watchdog != *load.watchdog;
            if changed {
                (status.in_flight, status.held, status.sessions) = (load.in_flight, load.held, load.sessions);
                status.parked_senders = load.parked_senders;
                status.parked_identities = load.parked_identities;
                status.watchdog.clone_from(load.watchdog);
            }
            changed
        });
    }
}

fn unix_secs() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
