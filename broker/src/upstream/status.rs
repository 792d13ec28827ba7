//! The state of the way up, for status pages and metrics.

use metrics::{counter, gauge, histogram};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

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
    /// Connections lost or refused since the start.
    pub failures: u64,
    /// Transfers without an answer.
    pub in_flight: usize,
    /// Messages that were read from the queues and are not settled.
    pub held: usize,
    /// Senders that are parked after a failure of their own.
    pub parked_senders: usize,
}

/// Publishes the state and counts time offline.
pub(crate) struct StatusBoard {
    sender: watch::Sender<UpstreamStatus>,
    hub_id: String,
    offline_since: Option<Instant>,
}

impl StatusBoard {
    /// Starts offline: the time until the first contact counts too.
    pub(crate) fn new(address: String, hub_id: String) -> Self {
        let status = UpstreamStatus {
            address,
            state: UpstreamState::Connecting,
            since_unix_secs: unix_secs(),
            reason: "starting".into(),
            failures: 0,
            in_flight: 0,
            held: 0,
            parked_senders: 0,
        };
        gauge!("edgehub_upstream_connected").set(0.0);
        Self { sender: watch::Sender::new(status), hub_id, offline_since: Some(Instant::now()) }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<UpstreamStatus> {
        self.sender.subscribe()
    }

    /// The supervisor does something else now.
    pub(crate) fn enter(&mut self, state: UpstreamState, reason: &str) {
        let up = matches!(state, UpstreamState::Up | UpstreamState::Throttled);
        match (up, self.offline_since) {
            (true, Some(since)) => {
                self.offline_since = None;
                histogram!("edgehub_offline_duration_seconds", "id" => self.hub_id.clone())
                    .record(since.elapsed().as_secs_f64());
            }
            (false, None) => {
                self.offline_since = Some(Instant::now());
                counter!("edgehub_offline_count_total", "id" => self.hub_id.clone()).increment(1);
            }
            (true, None) | (false, Some(_)) => {}
        }
        gauge!("edgehub_upstream_connected").set(if up { 1.0 } else { 0.0 });
        self.sender.send_if_modified(|status| {
            if status.state == state && status.reason == reason && state != UpstreamState::BackingOff {
                return false;
            }
            if status.state != state {
                status.state = state;
                status.since_unix_secs = unix_secs();
            }
            if state == UpstreamState::BackingOff {
                status.failures += 1;
            }
            reason.clone_into(&mut status.reason);
            true
        });
    }

    /// How much is under way.
    pub(crate) fn load(&self, in_flight: usize, held: usize, parked_senders: usize) {
        gauge!("edgehub_upstream_inflight").set(in_flight as f64);
        self.sender.send_if_modified(|status| {
            let changed =
                (status.in_flight, status.held, status.parked_senders) != (in_flight, held, parked_senders);
            status.in_flight = in_flight;
            status.held = held;
            status.parked_senders = parked_senders;
            changed
        });
    }
}

fn unix_secs() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
