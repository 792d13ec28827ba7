//! Owns what the hub knows of its upstream: connected or not, and since when.

use metrics::{counter, histogram};
use tokio::sync::watch;
use tokio::time::Instant;

/// Whether the upstream takes the hub's own identity at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connectivity {
    /// Whether it does.
    pub connected: bool,
    /// Since when; for a hub that was never connected, since its start.
    pub since: Instant,
}

/// The state, and the metrics of its changes.
pub(super) struct ConnectivityBoard {
    state: watch::Sender<Connectivity>,
    /// The hub's own identity.
    id: String,
}

impl ConnectivityBoard {
    pub(super) fn new(id: String) -> Self {
        Self { state: watch::Sender::new(Connectivity { connected: false, since: Instant::now() }), id }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Connectivity> {
        self.state.subscribe()
    }

    /// Enters a state; false when it is the one that lasts.
    pub(super) fn enter(&self, connected: bool) -> bool {
        let now = Instant::now();
        let mut lasted = None;
        self.state.send_if_modified(|state| {
            let changed = state.connected != connected;
            if changed {
                lasted = Some(now - state.since);
                *state = Connectivity { connected, since: now };
            }
            changed
        });
        let Some(lasted) = lasted else { return false };
        let id = self.id.clone();
        if connected {
            histogram!("edgehub_offline_duration_seconds", "id" => id).record(lasted.as_secs_f64());
            tracing::info!(offline_secs = lasted.as_secs(), "The upstream serves twins and methods");
        } else {
            counter!("edgehub_offline_count_total", "id" => id).increment(1);
            tracing::info!(online_secs = lasted.as_secs(), "The upstream is lost; twins come from the store");
        }
        true
    }
}

/// Returns when the upstream is not connected, or will never be.
pub(super) async fn lost(mut state: watch::Receiver<Connectivity>) {
    // An error: the hub is gone, and nothing is connected any more.
    let _ = state.wait_for(|state| !state.connected).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_change_is_one_and_lasts_from_its_moment() {
        let board = ConnectivityBoard::new("edge1/$edgeHub".into());
        let state = board.subscribe();
        let start = state.borrow().since;
        assert!(!board.enter(false), "a hub starts without its upstream");
        tokio::time::advance(std::time::Duration::from_secs(5)).await;
        assert!(board.enter(true));
        assert!(!board.enter(true));
        let up = *state.borrow();
        assert_eq!((up.connected, up.since - start), (true, std::time::Duration::from_secs(5)));
        assert!(board.enter(false));
        lost(state).await;
    }
}
