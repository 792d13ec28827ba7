//! Reporting: the hub's own reported properties, one update at a time, each sent until the upstream has taken it.
//!
//! What comes while the upstream is away is not lined up: statuses and clients are told in their newest state.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::OwnTwin;
use super::clients::{Batch, ClientRoll};
use super::document::Status;
use crate::delivery::{Backoff, BackoffOptions};
use crate::upstream::control::ControlError;

/// The schema of the reported properties, whatever that of the desired ones.
const SCHEMA_VERSION: &str = "1.0";

/// Pauses after an update that the upstream did not take.
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
    patch: Bytes,
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
            match self.twin.report(update.patch.clone()).await {
                Ok(()) => {
                    backoff = Backoff::with(REPORT_RETRY);
                    self.done(update);
                }
                Err(ControlError::Refused { status, text }) if matches!(status, 400 | 413) => {
                    tracing::warn!(status, text, "The upstream does not take the hub's reported properties");
                    self.done(update);
                }
                Err(error) => {
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
        let mut patch = json!({
            "schemaVersion": SCHEMA_VERSION,
            "version": { "version": version, "build": build, "commit": commit },
        });
        if !self.cleared {
            patch["clients"] = Value::Null;
            return Update { patch: patch.to_string().into(), status: None, clients: None };
        }
        let status = self.untold_status();
        if let Some(Status { desired_version, code, description }) = &status {
            patch["lastDesiredVersion"] = json!(desired_version);
            patch["lastDesiredStatus"] = json!({ "code": code, "description": description });
        }
        let batch = self.roll.take();
        patch["clients"] = Value::Object(batch.clients());
        Update { patch: patch.to_string().into(), status, clients: Some(batch) }
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
