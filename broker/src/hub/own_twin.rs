//! Owns the hub's twin as its configuration sees it.

use std::sync::Arc;

use tokio::sync::watch;

use super::Hub;
use super::own::DesiredProperties;
use crate::backend::TwinError;
use crate::configuration::OwnTwin;
use crate::twin::json::Object;

impl OwnTwin for Hub {
    fn desired(&self) -> watch::Receiver<Option<Arc<DesiredProperties>>> {
        self.own_twin()
    }

    async fn reachable(&self) {
        if self.connectivity().wait_for(|connectivity| connectivity.connected).await.is_err() {
            // The hub is gone, and its upstream with it.
            std::future::pending().await
        }
    }

    async fn pull(&self) -> Result<(), TwinError> {
        self.read_own_twin().await
    }

    async fn report(&self, patch: &Object) -> Result<(), TwinError> {
        Hub::report(self, patch).await
    }
}
