//! Owns one twin while something is to be done with it: answers its client, keeps it on disk, and keeps it and the
//! upstream's in step.
//!
//! At most one reading and one update are under way upstream at a time, side by side; meanwhile everything else goes on.
//! What waits for the upstream is sent before the twins are compared.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use metrics::{counter, histogram};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout};

use super::inbox::{Slot, Work};
use super::{Asker, TWIN_REQUESTS_MAX, Twins, seconds_since};
use crate::backend::{Command, DesiredPatch, Mailbox, TwinAnswer, TwinError, TwinReply};
use crate::delivery::Backoff;
use crate::hub::connectivity::lost;
use crate::hub::own::DesiredProperties;
use crate::identity::Identity;
use crate::message::Message;
use crate::twin::json::{self, Nulls, Object};
use crate::twin::{
    Pending, TwinRecord, TwinStoreError, change_message, desired_diff, sections, text, version,
};
use crate::upstream::control::ControlError;

/// A worker without work ends after this long.
const LINGER_SECS: u64 = 10;

/// A client that takes nothing for so long gets no answer.
const MAILBOX_SECS: u64 = 20;

/// Readings that are repeated because desired properties changed meanwhile.
const REPEATED_MAX: u32 = 3;

/// What a worker waits for upstream.
type Call<T> = Pin<Box<dyn Future<Output = Result<T, ControlError>> + Send>>;

struct Worker {
    twins: Arc<Twins>,
    identity: Identity,
    slot: Arc<Slot>,
    /// As it is on disk; none while it is not in memory.
    record: Option<TwinRecord>,
    resident_bytes: usize,
    reading: Option<Reading>,
    /// Who waits for a reading.
    readers: Vec<(Asker, Instant)>,
    /// When the upstream's twin is to be read and compared.
    compare_at: Option<Instant>,
    repeated: u32,
    reporting: Option<Reporting>,
    /// When reported properties are to be sent.
    report_at: Option<Instant>,
    reported_at: Option<Instant>,
    permit: Option<OwnedSemaphorePermit>,
    backoff: Backoff,
}

/// The upstream's twin, on its way.
struct Reading {
    call: Call<Bytes>,
    start: Instant,
    /// Whether the client is told of the difference.
    compares: bool,
    /// What was reported since the reading began, which it may not hold.
    reported: Pending,
    /// The version of desired properties that came meanwhile, which it may not hold.
    pushed_version: Option<u64>,
}

/// Reported properties, on their way.
struct Reporting {
    call: Call<()>,
    start: Instant,
    /// What was reported since.
    later: Pending,
}

/// What ends a wait.
enum Wake {
    Inbox,
    Read(Result<Bytes, ControlError>),
    Reported(Result<(), ControlError>),
    Time,
}

/// Works until there is nothing to do.
pub(super) async fn run(twins: Arc<Twins>, identity: Identity, slot: Arc<Slot>) {
    let backoff = Backoff::with(twins.options.backoff);
    let mut worker = Worker {
        twins,
        identity,
        slot,
        record: None,
        resident_bytes: 0,
        reading: None,
        readers: Vec::new(),
        compare_at: None,
        repeated: 0,
        reporting: None,
        report_at: None,
        reported_at: None,
        permit: None,
        backoff,
    };
    loop {
        worker.take_inbox().await;
        worker.begin_due().await;
        match worker.wait().await {
            Wake::Inbox => {}
            Wake::Read(read) => worker.read(read).await,
            Wake::Reported(reported) => worker.reported(reported).await,
            Wake::Time if worker.has_ended() => return,
            Wake::Time => {}
        }
    }
}

impl Worker {
    async fn wait(&mut self) -> Wake {
        let now = Instant::now();
        let due = [self.report_at, self.compare_at].into_iter().flatten().min();
        let idle = due.is_none() && self.reading.is_none() && self.reporting.is_none();
        if self.twins.is_full() {
            self.forget_record();
        }
        let until = match due {
            Some(due) => due,
            None if self.record.is_none() => now,
            None => now + Duration::from_secs(LINGER_SECS),
        };
        let reading = self.reading.as_mut().map(|reading| &mut reading.call);
        let reporting = self.reporting.as_mut().map(|reporting| &mut reporting.call);
        tokio::select! {
            () = self.slot.wake.notified() => Wake::Inbox,
            read = maybe(reading) => Wake::Read(read),
            reported = maybe(reporting) => Wake::Reported(reported),
            () = sleep_until(until), if idle || due.is_some() => Wake::Time,
        }
    }

    /// Whether nothing is left; then nothing can come any more.
    fn has_ended(&mut self) -> bool {
        let busy = self.reading.is_some()
            || self.reporting.is_some()
            || self.report_at.is_some()
            || self.compare_at.is_some();
        if busy {
            return false;
        }
        {
            let mut inbox = self.slot.inbox.lock();
            if !inbox.is_empty() {
                return false;
            }
            inbox.ended = true;
        }
        self.twins.forget(&self.identity, &self.slot);
        true
    }

    async fn take_inbox(&mut self) {
        let (requests, pushes, load, report, compare, permit) = {
            let mut inbox = self.slot.inbox.lock();
            (
                std::mem::take(&mut inbox.requests),
                std::mem::take(&mut inbox.pushes),
                std::mem::take(&mut inbox.load),
                std::mem::take(&mut inbox.report),
                std::mem::take(&mut inbox.compare),
                inbox.permit.take(),
            )
        };
        if permit.is_some() {
            self.permit = permit;
        }
        if (load || report || compare)
            && let Err(error) = self.load().await
        {
            tracing::error!(code = "EH4015", client = %self.identity, %error, "The twin cannot be read from the store");
        }
        let now = Instant::now();
        if report || compare {
            // The links are new: what was refused before may be taken now.
            self.backoff.succeed();
            if self.record.as_ref().is_some_and(|record| !record.pending.is_empty()) {
                self.report_at = Some(now);
            }
        }
        if compare && (self.is_own() || self.record.as_ref().is_some_and(|record| record.desired.is_some())) {
            self.compare_at = Some(now);
        }
        for patch in pushes {
            self.pushed(patch).await;
        }
        let mut reports = Vec::new();
        for request in requests {
            match request {
                Work::Report { patch, text, routed, asker, since } => {
                    reports.push(Report { patch, text, routed, asker, since });
                }
                Work::Get { asker, since } => {
                    self.take_reports(std::mem::take(&mut reports)).await;
                    self.get(asker, since).await;
                }
            }
        }
        self.take_reports(reports).await;
    }
}

// Reading
impl Worker {
    async fn get(&mut self, asker: Asker, since: Instant) {
        if !self.twins.is_connected() {
            self.answer_from_store(asker, since).await;
        } else if self.readers.len() >= TWIN_REQUESTS_MAX {
            self.answer(asker, Err(TwinError::Busy)).await;
        } else {
            self.readers.push((asker, since));
        }
    }

    async fn answer_from_store(&mut self, asker: Asker, since: Instant) {
        let result = match self.load().await {
            Ok(record) => Ok(TwinReply::Document(record.document())),
            Err(error) => Err(TwinError::Failed(error.to_string())),
        };
        self.count_get(since);
        self.answer(asker, result).await;
    }

    /// Begins what is due, as far as the upstream is there.
    async fn begin_due(&mut self) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if !self.twins.is_connected() {
            // The next connection asks for both again.
            (self.report_at, self.compare_at, self.permit) = (None, None, None);
            if self.reading.is_none() {
                for (asker, since) in std::mem::take(&mut self.readers) {
                    self.answer_from_store(asker, since).await;
                }
            }
            return;
        }
        if self.reporting.is_none() && is_due(self.report_at) {
            self.report_at = None;
            self.begin_reporting().await;
        }
        let compares = is_due(self.compare_at) && self.reporting.is_none();
        if self.reading.is_none() && (compares || !self.readers.is_empty()) {
            if compares {
                self.compare_at = None;
            }
            self.begin_reading(compares).await;
        } else if is_due(self.compare_at) {
            // It follows what is under way, whose end wakes the worker.
            self.compare_at = Some(now + Duration::from_secs(MAILBOX_SECS));
        }
        if self.reading.is_none() && self.reporting.is_none() {
            self.permit = None;
        }
    }

    async fn begin_reading(&mut self, compares: bool) {
        let pending = match self.load().await {
            Ok(record) => record.pending.clone(),
            Err(error) => {
                tracing::error!(code = "EH4016", client = %self.identity, %error, "The twin cannot be read from the store");
                for (asker, _) in std::mem::take(&mut self.readers) {
                    self.answer(asker, Err(TwinError::Failed(error.to_string()))).await;
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
    async fn read(&mut self, read: Result<Bytes, ControlError>) {
        let Some(reading) = self.reading.take() else { return };
        let labels = self.labels("source", "upstream");
        counter!("edgehub_gettwin_total", &labels).increment(1);
        histogram!("edgehub_gettwin_duration_seconds", &labels).record(seconds_since(reading.start));
        let failed = match read {
            Ok(twin) => match sections(&twin) {
                Ok((desired, reported)) => {
                    if self.is_outdated(&reading, &desired) {
                        self.compare_at = self.compare_at.or(reading.compares.then(Instant::now));
                        return;
                    }
                    self.take_twin(reading, desired, reported).await;
                    return;
                }
                Err(error) => {
                    tracing::warn!(code = "EH4017", client = %self.identity, %error, "The upstream's twin cannot be read");
                    true
                }
            },
            Err(ControlError::Offline | ControlError::Unsupported) => false,
            Err(error) => {
                tracing::info!(client = %self.identity, %error, "The upstream does not give the twin");
                true
            }
        };
        if failed && reading.compares {
            self.compare_at = Some(Instant::now() + self.backoff.fail());
        }
        for (asker, since) in std::mem::take(&mut self.readers) {
            self.answer_from_store(asker, since).await;
        }
    }

    /// Whether desired properties that came during the reading are newer than what was read.
    fn is_outdated(&mut self, reading: &Reading, desired: &Object) -> bool {
        let pushed = reading.pushed_version.unwrap_or(0);
        let outdated = version(desired).unwrap_or(0) < pushed && self.repeated < REPEATED_MAX;
        self.repeated = if outdated { self.repeated + 1 } else { 0 };
        outdated
    }

    async fn take_twin(&mut self, reading: Reading, desired: Object, mut reported: Object) {
        reading.reported.apply_to(&mut reported);
        let mut record = match self.load().await {
            Ok(record) => record.clone(),
            Err(error) => {
                tracing::error!(code = "EH4018", client = %self.identity, %error, "The twin cannot be read from the store");
                TwinRecord::default()
            }
        };
        let before = record.desired.replace(desired);
        record.reported = reported;
        let document = record.document();
        let difference = match (&before, &record.desired) {
            (Some(before), Some(after)) if reading.compares => desired_diff(before, after),
            _ => Object::new(),
        };
        let current_version = record.desired_version();
        self.keep(record).await;
        self.twins.subscriptions.twin_read(&self.identity);
        if !difference.is_empty() {
            self.forward(text(&difference), current_version).await;
        }
        for (asker, since) in std::mem::take(&mut self.readers) {
            self.count_get(since);
            self.answer(asker, Ok(TwinReply::Document(document.clone()))).await;
        }
    }

    /// Takes a change of desired properties.
    async fn pushed(&mut self, patch: Bytes) {
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

    fn count_get(&self, since: Instant) {
        let labels = self.labels("source", "edge_hub");
        counter!("edgehub_gettwin_total", &labels).increment(1);
        histogram!("edgehub_gettwin_duration_seconds", &labels).record(seconds_since(since));
    }
}

/// A change of reported properties that a client asks for.
struct Report {
    patch: Object,
    text: Bytes,
    routed: bool,
    asker: Asker,
    since: Instant,
}

// Reporting
impl Worker {
    /// Takes changes of reported properties: routes hear of them, then they are kept, then they are answered.
    async fn take_reports(&mut self, reports: Vec<Report>) {
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
        let kept = match self.route(&taken).await {
            Ok(()) => self.save(record).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
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

    async fn route(&mut self, reports: &[Report]) -> Result<(), crate::backend::PublishError> {
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

    async fn begin_reporting(&mut self) {
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
    async fn reported(&mut self, reported: Result<(), ControlError>) {
        let Some(reporting) = self.reporting.take() else { return };
        // A comparison that waited for it.
        if self.compare_at.is_some() {
            self.compare_at = Some(Instant::now());
        }
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
            // The next connection sends it.
            Err(ControlError::Offline | ControlError::Unsupported) => {}
            Err(error) => {
                let pause = self.backoff.fail();
                tracing::warn!(
                    code = "EH4024", client = %self.identity, %error, pause_secs = pause.as_secs_f32(),
                    "The upstream does not take reported properties; they are sent again"
                );
                self.report_at = Some(Instant::now() + pause);
            }
        }
    }
}

// Keeping and answering
impl Worker {
    fn is_own(&self) -> bool {
        self.identity == *self.twins.own_identity()
    }

    async fn load(&mut self) -> Result<&TwinRecord, TwinStoreError> {
        let record = match self.record.take() {
            Some(record) => record,
            None => {
                let record = self.twins.store.load(&self.identity).await?;
                self.hold(&record);
                record
            }
        };
        Ok(self.record.insert(record))
    }

    /// Keeps a record; when the store does not, it holds until the worker ends, and the upstream is asked again.
    async fn keep(&mut self, record: TwinRecord) {
        if let Err(error) = self.save(record.clone()).await {
            tracing::error!(code = "EH4025", client = %self.identity, %error, "The twin cannot be stored");
            self.hold(&record);
            self.record = Some(record);
        }
    }

    async fn save(&mut self, record: TwinRecord) -> Result<(), TwinStoreError> {
        self.twins.store.save(&self.identity, &record).await?;
        if record.pending.is_empty() {
            self.twins.pending.lock().remove(&self.identity);
        } else {
            self.twins.pending.lock().insert(self.identity.clone());
        }
        self.hold(&record);
        self.record = Some(record);
        Ok(())
    }

    /// Counts a record as being in memory, and shows the hub its own.
    fn hold(&mut self, record: &TwinRecord) {
        let bytes = record.document().len();
        self.twins.resident_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.twins.resident_bytes.fetch_sub(self.resident_bytes, Ordering::Relaxed);
        self.resident_bytes = bytes;
        if self.is_own()
            && let Some(properties) = &record.desired
        {
            let own = DesiredProperties { version: record.desired_version(), properties: properties.clone() };
            self.twins.own.send_if_modified(|current| {
                let differs = current.as_deref() != Some(&own);
                if differs {
                    *current = Some(Arc::new(own));
                }
                differs
            });
        }
    }

    fn forget_record(&mut self) {
        self.record = None;
        self.twins.resident_bytes.fetch_sub(self.resident_bytes, Ordering::Relaxed);
        self.resident_bytes = 0;
    }

    async fn answer(&mut self, asker: Asker, result: Result<TwinReply, TwinError>) {
        match asker {
            Asker::Client { mailbox, correlation: Some(correlation) } => {
                self.send(mailbox, Command::TwinAnswer(TwinAnswer { correlation, result })).await;
            }
            Asker::Client { correlation: None, .. } => {}
            // Whoever asked may have given up.
            Asker::Hub(sender) => drop(sender.send(result)),
        }
    }

    /// Hands a command to a connection, which may have ended.
    async fn send(&mut self, mailbox: Mailbox, command: Command) {
        let sent = timeout(Duration::from_secs(MAILBOX_SECS), mailbox.send(command)).await;
        if sent.is_err() {
            tracing::warn!(code = "EH4026", client = %self.identity, "The client takes no answers; one is dropped");
        }
    }

    fn labels(&self, name: &'static str, value: &'static str) -> [(&'static str, String); 2] {
        [(name, value.to_owned()), ("id", self.identity.to_string())]
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.twins.resident_bytes.fetch_sub(self.resident_bytes, Ordering::Relaxed);
    }
}

/// The end of a call; never without one.
async fn maybe<T>(call: Option<&mut Call<T>>) -> Result<T, ControlError> {
    match call {
        Some(call) => call.await,
        None => std::future::pending().await,
    }
}
