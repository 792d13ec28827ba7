//! Owns what the hub does with its own twin and methods: it is a client of its own control plane.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::watch;

use super::Hub;
use super::connectivity::Connectivity;
use super::methods::{Invocation, InvokeError};
use crate::backend::{MethodAnswer, TwinError};
use crate::upstream::control::ControlError;

impl Hub {
    /// The desired properties of the hub itself, of `{edge device}/$edgeHub`, with their `$version`: at first as they were
    /// stored, then as the upstream tells them. None until either has been read. A value is set only when it differs.
    pub fn own_twin(&self) -> watch::Receiver<Option<Arc<Value>>> {
        self.inner.control.twins.own()
    }

    /// Reads the hub's own twin from the upstream now; [`Hub::own_twin`] has it when this resolves.
    ///
    /// # Errors
    /// When the upstream does not give it.
    pub async fn read_own_twin(&self) -> Result<(), ControlError> {
        self.inner.control.twins.read_own().await
    }

    /// Changes the hub's own reported properties by a JSON patch. It is durable when this resolves, and goes up as soon as
    /// the upstream is there, in one patch with all that waits by then.
    ///
    /// # Errors
    /// When the patch breaks a limit of [`crate::twin::json`], or the store refuses it.
    pub async fn report(&self, patch: Bytes) -> Result<(), TwinError> {
        self.inner.control.twins.report_own(patch).await
    }

    /// Serves a method of the hub itself from now on; a method of the same name is replaced. Others are answered with
    /// status 501.
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
