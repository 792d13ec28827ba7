//! Owns how a worker reads the upstream's twin, and takes changes of desired properties.

use bytes::Bytes;
use metrics::{counter, histogram};
use tokio::time::Instant;

use super::{Call, Worker};
use crate::backend::{Command, DesiredPatch, TwinError, TwinReply};
use crate::hub::connectivity::lost;
use crate::hub::twins::{Asker, TWIN_REQUESTS_MAX, seconds_since};
use crate::twin::json::{self, Nulls, Object};
use crate::twin::{
    Pending, TwinRecord, TwinStoreError, desired_diff, sections, text, unknown_section, version,
};
use crate::upstream::control::ControlError;

/// Readings that are repeated because desired properties changed meanwhile.
const REPEATED_MAX: u32 = 3;

/// The upstream's twin, on its way.
pub(super) struct Reading {
    pub(super) call: Call<Bytes>,
    pub(super) start: Instant,
    /// Whether the client is told of the difference.
    pub(super) compares: bool,
    /// What was reported since the reading began, which it may not hold.
    pub(super) reported: Pending,
    /// The version of desired properties that came meanwhile, which it may not hold.
    pub(super) pushed_version: Option<u64>,
}

impl Worker {
    pub(super) async fn get(&mut self, asker: Asker, since: Instant) {
        if self.readers.len() >= TWIN_REQUESTS_MAX {
            self.answer(asker, Err(TwinError::Busy)).await;
        } else {
            self.readers.push((asker, since));
        }
    }

    /// Answers those who wait, without the upstream.
    pub(super) async fn answer_from_store(&mut self, why: &ControlError) {
        for (asker, since) in std::mem::take(&mut self.readers) {
            if let Asker::Reader(sender) = asker {
                // Whoever asked may have given up.
                let _ = sender.send(Err(why.clone()));
                continue;
            }
            let result = match self.stored_document().await {
                Ok(document) => Ok(TwinReply::Document(document)),
                Err(error) => Err(TwinError::Failed(error.to_string())),
            };
            self.count_get(since);
            self.answer(asker, result).await;
        }
    }

    /// The twin as its client reads it without the upstream. What nobody knows the client takes for empty: so it is kept,
    /// for the client to hear of the difference when the upstream's twin is known.
    async fn stored_document(&mut self) -> Result<Bytes, TwinStoreError> {
        let is_own = self.is_own();
        let record = self.load().await?;
        let document = record.document();
        if record.desired.is_none() && !is_own {
            let record = TwinRecord { desired: Some(unknown_section()), ..record.clone() };
            self.keep(record).await;
        }
        Ok(document)
    }

    pub(super) async fn begin_reading(&mut self, compares: bool) {
        let pending = match self.load().await {
            Ok(record) => record.pending.clone(),
            Err(error) => {
                tracing::error!(code = "EH4016", client = %self.identity, %error, "The twin cannot be read from the store");
                for (asker, _) in std::mem::take(&mut self.readers) {
                    self.answer(asker, Err(TwinError::Failed(error.to_string()))).await;
                }
                if compares {
                    self.compare_at = Some(Instant::now() + self.backoff.fail());
                }
                return;
            }
        };
        let (twins, identity) = (self.twins.clone(), self.identity.clone());
        // A client does not wait behind what the hub does by itself.
        let permit = self.readers.is_empty().then(|| self.permit.take());
        let call = async move {
            let _permit = match permit {
                Some(None) => twins.background.clone().acquire_owned().await.ok(),
                Some(permit) => permit,
                None => None,
            };
            let gone = lost(twins.connectivity.clone());
            tokio::select! {
                read = twins.control.twin(&identity) => read,
                () = gone => Err(ControlError::Offline),
            }
        };
        self.reading = Some(Reading {
            call: Box::pin(call),
            start: Instant::now(),
            compares,
            reported: pending,
            pushed_version: None,
        });
    }

    /// Takes the upstream's twin.
    pub(super) async fn read(&mut self, read: Result<Bytes, ControlError>) {
        let Some(reading) = self.reading.take() else { return };
        let why = match read {
            Ok(twin) => match sections(&twin) {
                Ok((desired, reported)) => {
                    if self.is_outdated(&reading, &desired) {
                        self.compare_at = self.compare_at.or(reading.compares.then(Instant::now));
                    } else {
                        self.take_twin(reading, desired, reported).await;
                    }
                    return;
                }
                Err(error) => ControlError::Refused { status: 500, text: error.to_string() },
            },
            Err(error) => error,
        };
        tracing::info!(client = %self.identity, error = %why, "The upstream does not give the twin");
        if reading.compares && why != ControlError::Unsupported {
            self.compare_at = Some(Instant::now() + self.backoff.fail());
        }
        self.answer_from_store(&why).await;
    }

    /// Whether desired properties that came during the reading are newer than what was read.
    fn is_outdated(&mut self, reading: &Reading, desired: &Object) -> bool {
        let pushed = reading.pushed_version.unwrap_or(0);
        let outdated = version(desired).unwrap_or(0) < pushed && self.repeated < REPEATED_MAX;
        self.repeated = if outdated { self.repeated + 1 } else { 0 };
        outdated
    }

    async fn take_twin(&mut self, reading: Reading, desired: Object, mut reported: Object) {
        let labels = self.labels("source", "upstream");
        counter!("edgehub_gettwin_total", &labels).increment(1);
        histogram!("edgehub_gettwin_duration_seconds", &labels).record(seconds_since(reading.start));
        reading.reported.apply_to(&mut reported);
        let mut record = match self.load().await {
            Ok(record) => record.clone(),
            Err(error) => {
                tracing::error!(code = "EH4018", client = %self.identity, %error, "The twin cannot be read from the store");
                TwinRecord::default()
            }
        };
        if self.readers.is_empty() && !self.is_heard() {
            // As with a change that is pushed.
            return;
        }
        let before = record.desired.replace(desired);
        record.reported = reported;
        let document = record.document();
        let difference = match (&before, &record.desired) {
            (Some(before), Some(after)) if reading.compares || self.is_client_left_out() => {
                desired_diff(before, after)
            }
            // Changes were missed of which none was kept.
            (None, Some(after)) if reading.compares => desired_diff(&Object::new(), after),
            _ => Object::new(),
        };
        let current_version = record.desired_version();
        self.keep(record).await;
        if !difference.is_empty() {
            self.forward(text(&difference), current_version).await;
        }
        for (asker, since) in std::mem::take(&mut self.readers) {
            if !matches!(asker, Asker::Reader(_)) {
                self.count_get(since);
            }
            self.answer(asker, Ok(TwinReply::Document(document.clone()))).await;
        }
    }

    /// Takes a change of desired properties. One that came when its client had just gone is left to the comparison with
    /// which the next one begins: what is kept is what clients were told.
    pub(super) async fn pushed(&mut self, patch: Bytes) {
        if !self.is_heard() {
            return;
        }
        let changes = match json::parse_twin(&patch) {
            Ok(changes) => changes,
            Err(error) => {
                tracing::warn!(
                    code = "EH4019", client = %self.identity, %error,
                    "A change of desired properties cannot be read; the whole twin is read instead"
                );
                self.compare_at = Some(Instant::now());
                return;
            }
        };
        let record = match self.load().await {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(code = "EH4020", client = %self.identity, %error, "The twin cannot be read from the store");
                self.compare_at = Some(Instant::now());
                return;
            }
        };
        let next_version = record.desired_version() + 1;
        match (&record.desired, version(&changes)) {
            (None, pushed_version) => {
                if self.is_own() {
                    self.compare_at = Some(Instant::now());
                } else {
                    if let Some(reading) = &mut self.reading {
                        reading.pushed_version = pushed_version.or(reading.pushed_version);
                    }
                    self.forward(patch, pushed_version.unwrap_or(0)).await;
                }
            }
            (Some(desired), Some(pushed_version)) if pushed_version == next_version => {
                let mut record = record.clone();
                let mut desired = desired.clone();
                json::merge(&mut desired, &changes, Nulls::Delete);
                record.desired = Some(desired);
                self.keep(record).await;
                if let Some(reading) = &mut self.reading {
                    reading.pushed_version = Some(pushed_version);
                }
                self.forward(patch, pushed_version).await;
            }
            // A gap, a repetition, or an older one.
            (Some(_), _) => self.compare_at = Some(Instant::now()),
        }
    }

    /// Tells the client of changed desired properties, if it wants to know.
    async fn forward(&mut self, patch: Bytes, version: u64) {
        let client = self.twins.subscriptions.client(&self.identity, |wanted| wanted.desired);
        if let Some((_, mailbox)) = client {
            self.send(mailbox, Command::Desired(DesiredPatch { patch, version })).await;
        }
    }

    /// Whether anybody hears of changes: a client that wants to, or the hub itself of its own.
    fn is_heard(&self) -> bool {
        let wants = || self.twins.subscriptions.client(&self.identity, |wanted| wanted.desired).is_some();
        self.is_own() || wants()
    }

    /// Whether the client that wants to hear of changes is none of those who wait for a reading: an earlier connection of
    /// the identity asked for it.
    fn is_client_left_out(&self) -> bool {
        let client = self.twins.subscriptions.client(&self.identity, |wanted| wanted.desired);
        let Some((_, client)) = client else { return false };
        !self.readers.iter().any(|(asker, _)| match asker {
            Asker::Client { mailbox, correlation } => correlation.is_some() && mailbox.is_same(&client),
            Asker::Reporter(_) | Asker::Reader(_) => false,
        })
    }

    fn count_get(&self, since: Instant) {
        let labels = self.labels("source", "edge_hub");
        counter!("edgehub_gettwin_total", &labels).increment(1);
        histogram!("edgehub_gettwin_duration_seconds", &labels).record(seconds_since(since));
    }
}
