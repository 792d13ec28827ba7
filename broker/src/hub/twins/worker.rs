//! Owns one twin while something is to be done with it: answers its client, keeps it on disk, and keeps it and the
//! upstream's in step.
//!
//! At most one reading and one update are under way upstream at a time, side by side; meanwhile everything else goes on.
//! What waits for the upstream is sent before the twins are compared; a comparison that falls due while a reading or an
//! update is under way begins with its end.

mod reading;
mod reporting;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout};

use super::inbox::{Slot, Work};
use super::{Asker, Twins};
use crate::backend::{Command, Mailbox, TwinAnswer, TwinError, TwinReply};
use crate::delivery::Backoff;
use crate::hub::own::DesiredProperties;
use crate::identity::Identity;
use crate::twin::{SealedTwin, TwinRecord, TwinStoreError};
use crate::upstream::control::ControlError;
use reading::Reading;
use reporting::{Report, Reporting};

/// A worker without work ends after this long.
const LINGER_SECS: u64 = 10;

/// A client that takes nothing for so long gets no answer.
const MAILBOX_SECS: u64 = 20;

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
        // What waits for the end of something under way is woken by it.
        let report_at = self.report_at.filter(|_| self.reporting.is_none());
        let compare_at = self.compare_at.filter(|_| self.reading.is_none() && self.reporting.is_none());
        let due = [report_at, compare_at].into_iter().flatten().min();
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
        let (requests, pushes, load, report, compare, missed, deletions, permit) = {
            let mut inbox = self.slot.inbox.lock();
            (
                std::mem::take(&mut inbox.requests),
                std::mem::take(&mut inbox.pushes),
                std::mem::take(&mut inbox.load),
                std::mem::take(&mut inbox.report),
                std::mem::take(&mut inbox.compare),
                std::mem::take(&mut inbox.missed),
                std::mem::take(&mut inbox.deletions),
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
        // What is being read may be older than the links; what is read from now on is not. A twin that nobody was told of,
        // not even as an empty one, is not compared; one that cannot be read now may be another.
        let untold = self.record.as_ref().is_some_and(|record| record.desired.is_none());
        let older = self.reading.is_some() || !untold;
        if compare && (self.is_own() || older) {
            self.compare_at = Some(now);
        }
        if missed {
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
        if !deletions.is_empty() {
            let deleted = self.delete().await;
            // Whoever asked may have given up.
            deletions.into_iter().for_each(|asker| drop(asker.send(deleted.clone())));
        }
    }

    /// Begins what is due, as far as the upstream is there.
    async fn begin_due(&mut self) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if !self.twins.is_connected() {
            // The next connection asks for both again.
            if self.compare_at.is_some() {
                self.twins.subscriptions.twin_missed(&self.identity);
            }
            (self.report_at, self.compare_at, self.permit) = (None, None, None);
            if self.reading.is_none() {
                self.answer_from_store(&ControlError::Offline).await;
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
        }
        if self.reading.is_none() && self.reporting.is_none() {
            self.permit = None;
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
        let sealed = self.twins.store.seal(&self.identity, &record).await?;
        self.put(record, sealed).await
    }

    async fn put(&mut self, record: TwinRecord, sealed: SealedTwin) -> Result<(), TwinStoreError> {
        self.twins.store.put(sealed).await?;
        if record.pending.is_empty() {
            self.twins.pending.lock().remove(&self.identity);
        } else {
            self.twins.pending.lock().insert(self.identity.clone());
        }
        self.hold(&record);
        self.record = Some(record);
        Ok(())
    }

    /// Deletes the twin, and gives up what is under way: its end would keep the twin again.
    async fn delete(&mut self) -> Result<(), TwinStoreError> {
        (self.reading, self.reporting) = (None, None);
        (self.report_at, self.compare_at, self.permit) = (None, None, None);
        for (asker, _) in std::mem::take(&mut self.readers) {
            self.answer(asker, Err(TwinError::Failed("the identity is no longer in scope".into()))).await;
        }
        self.twins.store.delete(&self.identity).await?;
        self.twins.pending.lock().remove(&self.identity);
        self.forget_record();
        Ok(())
    }

    /// Counts a record as being in memory, and shows the hub its own.
    fn hold(&mut self, record: &TwinRecord) {
        let bytes = record.document().len();
        self.twins.resident_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.twins.resident_bytes.fetch_sub(self.resident_bytes, Ordering::Relaxed);
        self.resident_bytes = bytes;
        if self.is_own()
            && let Some(desired) = &record.desired
        {
            let version = record.desired_version();
            self.twins.own.send_if_modified(|current| {
                let differs = current.as_ref().is_none_or(|current| current.properties != *desired);
                if differs {
                    *current = Some(Arc::new(DesiredProperties { version, properties: desired.clone() }));
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
            Asker::Reporter(sender) => drop(sender.send(result.map(drop))),
            Asker::Reader(sender) => {
                let why = |error: TwinError| ControlError::Refused {
                    status: error.status(),
                    text: error.to_string(),
                };
                let _ = sender.send(result.map(drop).map_err(why));
            }
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
