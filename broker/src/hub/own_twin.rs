//! The hub's own twin, as the configuration reads and reports it.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::watch;

use super::Hub;
use crate::configuration::OwnTwin;
use crate::upstream::UpstreamState;
use crate::upstream::control::ControlError;

impl OwnTwin for Hub {
    fn desired(&self) -> watch::Receiver<Option<Arc<Value>>> {
        self.inner.own_desired.subscribe()
    }

    async fn reachable(&self) {
        let Some(mut status) = self.upstream() else { return std::future::pending().await };
        let up = |state| matches!(state, UpstreamState::Up | UpstreamState::Throttled);
        if status.wait_for(|status| up(status.state)).await.is_err() {
            // The hub is stopping.
            std::future::pending().await
        }
    }

    async fn pull(&self) -> Result<(), ControlError> {
        Err(ControlError::Unsupported)
    }

    async fn report(&self, _: Bytes) -> Result<(), ControlError> {
        Err(ControlError::Unsupported)
    }
}
