//! Reporting: the hub's own reported properties, one update at a time, each repeated until it is taken.
//!
//! What comes while the upstream is away is not lined up: statuses and clients are told in their newest state.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::OwnTwin;
use super::clients::{Batch, ClientRoll};
use super::document::Status;
use crate::backend::TwinError;
use crate::delivery::{Backoff, BackoffOptions};
use crate::twin::json::Object;

/// The schema of the reported properties, whatever that of the desired ones.
const SCHEMA_VERSION: &str = "1.0";

/// Pauses after an update that was not taken.
pub const REPORT_RETRY: BackoffOptions =
    BackoffOptions { first: Duration::from_secs(1), max: Duration::from_secs(60) };

/// The program's version as it is reported; empty texts where it is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProgramVersion {
    /// The release.
    pub version: String,
    /// The build.
    pub build: String,
    /// The commit it was built from.
    pub commit: String,
}

/// Reports until it is dropped.
pub(super) struct Reporter<T> {
    twin: Arc<T>,
    roll: Arc<ClientRoll>,
    version: ProgramVersion,
    status: watch::Receiver<Option<Status>>,
    /// Least time between two updates that tell of clients only.
    pause: Duration,
    /// Whether the clients of the last run have been cleared.
    cleared: bool,
    told: Option<Status>,
    clients_from: Instant,
}

/// One update of the reported properties.
struct Update {
    patch: Object,
    status: Option<Status>,
    /// None clears all clients.
    clients: Option<Batch>,
}

impl<T: OwnTwin> Reporter<T> {
    pub(super) fn new(
        twin: Arc<T>,
        roll: Arc<ClientRoll>,
        version: ProgramVersion,
        status: watch::Receiver<Option<Status>>,
        pause: Duration,
    ) -> Self {
        roll.keep();
        let clients_from = Instant::now();
        Self { twin, roll, version, status, pause, cleared: false, told: None, clients_from }
    }

    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::with(REPORT_RETRY);
        loop {
            self.something().await;
            self.twin.reachable().await;
            let update = self.update();
            match self.twin.report(&update.patch).await {
                Ok(()) => {
                    backoff = Backoff::with(REPORT_RETRY);
                    self.done(update);
                }
                Err(TwinError::Invalid(reason)) => {
                    tracing::warn!(code = "EH4033", reason, "Reported properties of the hub are left out");
                    self.done(update);
                }
                Err(error @ (TwinError::Busy | TwinError::Failed(_))) => {
                    tracing::debug!(%error, "The hub's reported properties are not taken yet");
                    if let Some(batch) = update.clients {
                        self.roll.failed(batch);
                    }
                    sleep(backoff.fail()).await;
                }
            }
        }
    }

    /// Returns when there is something to report.
    async fn something(&mut self) {
        loop {
            if !self.cleared || self.untold_status().is_some() {
                return;
            }
            let clients_due = async {
                while !self.roll.has_untold() {
                    self.roll.changed().await;
                }
                sleep_until(self.clients_from).await;
            };
            tokio::select! {
                () = clients_due => return,
                changed = self.status.changed() => if changed.is_err() {
                    // The configuration is gone, and this task with it.
                    return std::future::pending().await;
                },
            }
        }
    }

    fn untold_status(&self) -> Option<Status> {
        let status = self.status.borrow();
        if *status == self.told { None } else { status.clone() }
    }

    fn update(&self) -> Update {
        let ProgramVersion { version, build, commit } = &self.version;
        let mut patch = Object::new();
        patch.insert("schemaVersion".into(), SCHEMA_VERSION.into());
        patch.insert("version".into(), json!({ "version": version, "build": build, "commit": commit }));
        if !self.cleared {
            patch.insert("clients".into(), Value::Null);
            return Update { patch, status: None, clients: None };
        }
        let status = self.untold_status();
        if let Some(Status { desired_version, code, description }) = &status {
            patch.insert("lastDesiredVersion".into(), json!(desired_version));
            let status = json!({ "code": code, "description": description });
            patch.insert("lastDesiredStatus".into(), status);
        }
        let batch = self.roll.take();
        patch.insert("clients".into(), Value::Object(batch.clients()));
        Update { patch, status, clients: Some(batch) }
    }

    fn done(&mut self, update: Update) {
        match update.clients {
            None => self.cleared = true,
            Some(batch) => {
                self.roll.done(batch);
                self.clients_from = Instant::now() + self.pause;
            }
        }
        if let Some(status) = update.status {
            self.told = Some(status);
        }
    }
}
