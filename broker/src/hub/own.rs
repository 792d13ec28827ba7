//! Owns what the hub does with its own twin and methods: it is a client of its own control plane.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use super::Hub;
use super::connectivity::Connectivity;
use super::methods::{Invocation, InvokeError};
use crate::backend::{MethodAnswer, TwinError};
use crate::twin::json::Object;
use crate::twin::text;

/// Desired properties at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredProperties {
    /// Their version.
    pub version: u64,
    /// The properties, with `$version`, and `$metadata` where the upstream tells it.
    pub properties: Object,
}

impl Hub {
    /// The desired properties of the hub itself, of `{edge device}/$edgeHub`: at first as they were stored, then as the
    /// upstream tells them. None until either has been read. A value is set only when it differs.
    pub fn own_twin(&self) -> watch::Receiver<Option<Arc<DesiredProperties>>> {
        self.inner.control.twins.own()
    }

    /// Reads the hub's own twin from the upstream now; [`Hub::own_twin`] has it when this resolves.
    ///
    /// # Errors
    /// [`TwinError::Failed`] when the upstream does not give it; what is stored does not count.
    pub async fn read_own_twin(&self) -> Result<(), TwinError> {
        let read = self.inner.control.twins.read_own().await;
        read.map_err(|error| TwinError::Failed(error.to_string()))
    }

    /// Changes the hub's own reported properties. It is durable when this resolves, and goes up as soon as the upstream is
    /// there, in one patch with all that waits by then.
    ///
    /// # Errors
    /// When the patch breaks a limit of [`crate::twin::json`], or the store refuses it.
    pub async fn report(&self, patch: &Object) -> Result<(), TwinError> {
        self.inner.control.twins.report_own(text(patch)).await
    }

    /// Serves a method of the hub itself from now on; a method of the same name is replaced. The case of names does not
    /// matter. Others are answered with status 404.
    pub fn serve_method<F, A>(&self, name: &str, method: F)
    where
        F: Fn(Bytes) -> A + Send + Sync + 'static,
        A: Future<Output = MethodAnswer> + Send + 'static,
    {
        self.inner.control.methods.serve_own(name, Arc::new(move |payload| Box::pin(method(payload))));
    }

    /// Calls a direct method of a connected client, or of the hub itself.
    ///
    /// # Errors
    /// When the client is not there in time, does not answer in time, or disconnects.
    pub async fn invoke(&self, invocation: Invocation) -> Result<MethodAnswer, InvokeError> {
        self.inner.control.methods.invoke(invocation).await
    }

    /// Whether the upstream serves the hub, now and later.
    pub fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.inner.control.connectivity()
    }
}
