//! Owns how a worker takes reported properties, and sends them up.

use bytes::Bytes;
use metrics::{counter, histogram};
use tokio::time::Instant;

use super::{Call, Worker};
use crate::backend::{PublishError, TwinError, TwinReply};
use crate::hub::connectivity::lost;
use crate::hub::twins::{Asker, seconds_since};
use crate::message::Message;
use crate::twin::json::Object;
use crate::twin::{Pending, TwinRecord, change_message, text};
use crate::upstream::control::ControlError;

/// Reported properties, on their way.
pub(super) struct Reporting {
    pub(super) call: Call<()>,
    pub(super) start: Instant,
    /// What was reported since.
    pub(super) later: Pending,
}

/// A change of reported properties that a client asks for.
pub(super) struct Report {
    pub(super) patch: Object,
    pub(super) text: Bytes,
    pub(super) routed: bool,
    pub(super) asker: Asker,
    pub(super) since: Instant,
}

impl Worker {
    /// Takes changes of reported properties: routes hear of them, then they are kept, then they are answered.
    pub(super) async fn take_reports(&mut self, reports: Vec<Report>) {
        if reports.is_empty() {
            return;
        }
        let mut record = match self.load().await {
            Ok(record) => record.clone(),
            Err(error) => {
                let error = TwinError::Failed(error.to_string());
                for report in reports {
                    self.answer(report.asker, Err(error.clone())).await;
                }
                return;
            }
        };
        let mut taken = Vec::with_capacity(reports.len());
        for report in reports {
            match record.report(&report.patch) {
                Ok(()) => taken.push(report),
                Err(error) => self.answer(report.asker, Err(TwinError::Invalid(error.to_string()))).await,
            }
        }
        let kept = self.route_and_keep(&taken, record).await;
        let result = match kept {
            Ok(()) => {
                for report in &taken {
                    for of_call in [
                        self.reading.as_mut().map(|reading| &mut reading.reported),
                        self.reporting.as_mut().map(|reporting| &mut reporting.later),
                    ] {
                        of_call.into_iter().for_each(|pending| pending.add(&report.patch));
                    }
                }
                self.plan_report();
                Ok(TwinReply::Patched { version: None })
            }
            Err(reason) => {
                tracing::error!(code = "EH4021", client = %self.identity, reason, "Reported properties cannot be kept");
                Err(TwinError::Failed(reason))
            }
        };
        for report in taken {
            if result.is_ok() {
                let labels = self.labels("target", "edge_hub");
                counter!("edgehub_reported_properties_total", &labels).increment(1);
                histogram!("edgehub_reported_properties_update_duration_seconds", &labels)
                    .record(seconds_since(report.since));
            }
            self.answer(report.asker, result.clone()).await;
        }
    }

    /// Both or neither, as far as the store lets it: what may well fail comes first, and a client whose hub ends in between
    /// has no answer and reports again.
    async fn route_and_keep(&mut self, reports: &[Report], record: TwinRecord) -> Result<(), String> {
        let sealed =
            self.twins.store.seal(&self.identity, &record).await.map_err(|error| error.to_string())?;
        self.route(reports).await.map_err(|error| error.to_string())?;
        self.put(record, sealed).await.map_err(|error| error.to_string())
    }

    async fn route(&mut self, reports: &[Report]) -> Result<(), PublishError> {
        let now = self.twins.clock.now();
        let message = |report: &Report| {
            change_message(self.twins.sender.clone(), &self.identity, now, report.text.clone())
        };
        let messages: Vec<Message> = reports.iter().filter(|report| report.routed).map(message).collect();
        self.twins.dispatch.publish_twin_changes(&messages).await
    }

    /// Changes go up at once if none went a short while ago.
    fn plan_report(&mut self) {
        if self.report_at.is_none() && self.reporting.is_none() {
            self.report_at = Some(self.next_report());
        }
    }

    fn next_report(&self) -> Instant {
        let now = Instant::now();
        self.reported_at.map_or(now, |at| now.max(at + self.twins.options.reported_pause))
    }

    pub(super) async fn begin_reporting(&mut self) {
        let updates: Vec<Bytes> = match self.load().await {
            Ok(record) => record.pending.updates().map(text).collect(),
            Err(error) => {
                tracing::error!(code = "EH4022", client = %self.identity, %error, "The twin cannot be read from the store");
                self.report_at = Some(Instant::now() + self.backoff.fail());
                return;
            }
        };
        if updates.is_empty() {
            return;
        }
        if self.backoff.failures() > 0 {
            counter!(
                "edgehub_operation_retry_total",
                "id" => self.identity.to_string(), "operation" => "UpdateReportedPropertiesAsync"
            )
            .increment(1);
        }
        let (twins, identity, permit) = (self.twins.clone(), self.identity.clone(), self.permit.take());
        let call = async move {
            let _permit = match permit {
                Some(permit) => Some(permit),
                None => twins.background.clone().acquire_owned().await.ok(),
            };
            let all = async {
                for update in updates {
                    twins.control.patch_reported(&identity, update).await?;
                }
                Ok(())
            };
            tokio::select! {
                sent = all => sent,
                () = lost(twins.connectivity.clone()) => Err(ControlError::Offline),
            }
        };
        let start = Instant::now();
        self.reported_at = Some(start);
        self.reporting = Some(Reporting { call: Box::pin(call), start, later: Pending::default() });
    }

    /// Takes the upstream's answer to reported properties.
    pub(super) async fn reported(&mut self, reported: Result<(), ControlError>) {
        let Some(reporting) = self.reporting.take() else { return };
        match reported {
            Ok(()) => {
                let labels = self.labels("target", "upstream");
                counter!("edgehub_reported_properties_total", &labels).increment(1);
                histogram!("edgehub_reported_properties_update_duration_seconds", &labels)
                    .record(seconds_since(reporting.start));
                self.backoff.succeed();
                let mut record = match self.load().await {
                    Ok(record) => record.clone(),
                    Err(error) => {
                        tracing::error!(code = "EH4023", client = %self.identity, %error, "The twin cannot be read from the store");
                        self.report_at = Some(Instant::now() + self.backoff.fail());
                        return;
                    }
                };
                record.pending = reporting.later;
                let more = !record.pending.is_empty();
                self.keep(record).await;
                if more {
                    self.report_at = Some(self.next_report());
                }
            }
            Err(ControlError::Unsupported) => {}
            // Offline, too: if it is so for all identities, the next connection sends it.
            Err(error) => {
                let pause = self.backoff.fail();
                tracing::info!(
                    client = %self.identity, %error, pause_secs = pause.as_secs_f32(),
                    "The upstream does not take reported properties; they are sent again"
                );
                self.report_at = Some(Instant::now() + pause);
            }
        }
    }
}
