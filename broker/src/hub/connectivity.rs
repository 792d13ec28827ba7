//! Owns what the hub knows of its upstream: connected or not, and since when.

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

/// The state. What it costs in time is counted by whoever keeps the connection.
pub(super) struct ConnectivityBoard {
    state: watch::Sender<Connectivity>,
}

impl ConnectivityBoard {
    pub(super) fn new() -> Self {
        Self { state: watch::Sender::new(Connectivity { connected: false, since: Instant::now() }) }
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
        if connected {
            tracing::info!(offline_secs = lasted.as_secs(), "The upstream serves twins and methods");
        } else {
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
        let board = ConnectivityBoard::new();
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
