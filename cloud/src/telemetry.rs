//! The log of received telemetry: one file, one JSON document a line, appended and never rewritten.
//!
//! ```text
//! {"sequenceNumber":1,"enqueuedTime":"2026-01-31T12:00:00Z","deviceId":"leaf1","moduleId":null,
//!  "properties":{..},"systemProperties":{..},"body":"<base64>"}      (one line in the file)
//! ```
//!
//! One thread writes: all that waits goes out in one write and one sync, then everybody who waits is told.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use edgehub_broker::backend::PublishError;
use edgehub_broker::message::{Message, Property, PropertyName};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::registry::sync_directory;

/// Bytes of lines that wait for the writer; publishers wait for room.
pub const PENDING_BYTES_MAX: usize = 16 * 1_024 * 1_024;

/// Requests that wait for the writer.
const PENDING_REQUESTS_MAX: usize = 1_024;

/// Bytes that go out in one write and one sync.
const GROUP_BYTES_MAX: usize = 4 * 1_024 * 1_024;

/// Bytes that a reader takes at a time.
const CHUNK_BYTES: usize = 64 * 1_024;

/// Longest line: a message of the largest size in base64, its properties escaped to six times their length.
const LINE_BYTES_MAX: u64 = 4 * 1_024 * 1_024;

const LINE_START: &[u8] = b"{\"sequenceNumber\":";

/// Why the log cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The file cannot be read or written.
    #[error("the telemetry log {path} cannot be {what}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The file is no telemetry log, or damaged beyond a torn last line.
    #[error("the telemetry log {0} ends with something else than telemetry; move it away to begin a new one")]
    Damaged(PathBuf),
}

/// The log. Clones share it; it closes when the last is dropped.
#[derive(Clone, Debug)]
pub struct TelemetryLog {
    path: Arc<PathBuf>,
    requests: mpsc::Sender<Request>,
    pending: Arc<Semaphore>,
    len_bytes: watch::Receiver<u64>,
}

#[derive(Debug)]
struct Request {
    /// Lines without their start, which holds the sequence number.
    lines: Vec<Vec<u8>>,
    done: oneshot::Sender<Result<(), PublishError>>,
    _room: OwnedSemaphorePermit,
}

/// Resolves when the messages are in the log, durably.
#[derive(Debug)]
pub struct Appended(oneshot::Receiver<Result<(), PublishError>>);

impl Future for Appended {
    type Output = Result<(), PublishError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|outcome| outcome.unwrap_or_else(|_| Err(closed())))
    }
}

impl TelemetryLog {
    /// Opens the log, or creates it. A last line that a crash cut is taken off.
    ///
    /// # Errors
    /// When the file cannot be opened, or holds something else.
    pub fn open(path: impl Into<PathBuf>, len_bytes_max: u64) -> Result<Self, TelemetryError> {
        let path = path.into();
        let failed = |what| {
            let path = path.clone();
            move |source| TelemetryError::File { path, what, source }
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(failed("opened"))?;
        let len_bytes = file.metadata().map_err(failed("read"))?.len();
        let (kept_bytes, last) = last_line(&mut file, len_bytes)
            .map_err(failed("read"))?
            .ok_or_else(|| TelemetryError::Damaged(path.clone()))?;
        if kept_bytes < len_bytes {
            tracing::warn!(code = "EH7006", path = %path.display(), torn_bytes = len_bytes - kept_bytes,
                "the telemetry log ended within a line; that is taken off");
            file.set_len(kept_bytes).map_err(failed("truncated"))?;
        }
        file.seek(SeekFrom::Start(kept_bytes)).map_err(failed("read"))?;
        file.sync_all().and_then(|()| sync_directory(&path)).map_err(failed("synced"))?;
        let (requests, receiver) = mpsc::channel(PENDING_REQUESTS_MAX);
        let (len_out, len_in) = watch::channel(kept_bytes);
        let writer = Writer { file, len_bytes: kept_bytes, len_bytes_max, last, failed: false, len_out };
        std::thread::Builder::new()
            .name("telemetry-log".into())
            .spawn(move || writer.run(receiver))
            .map_err(failed("opened"))?;
        Ok(Self {
            path: Arc::new(path),
            requests,
            pending: Arc::new(Semaphore::new(PENDING_BYTES_MAX)),
            len_bytes: len_in,
        })
    }

    /// Puts messages in line, in the order of the calls; waits while there is no room.
    ///
    /// # Errors
    /// When the log is closed.
    pub async fn append(&self, messages: &[Message]) -> Result<Appended, PublishError> {
        let enqueued = OffsetDateTime::now_utc().format(&Rfc3339).map_err(|_| closed())?;
        let lines: Vec<Vec<u8>> = messages
            .iter()
            .map(|message| line(message, &enqueued))
            .collect::<Result<_, _>>()
            .map_err(|error| PublishError::Store(error.to_string()))?;
        let bytes: usize = lines.iter().map(Vec::len).sum();
        let room = bytes.clamp(1, PENDING_BYTES_MAX) as u32;
        let room = self.pending.clone().acquire_many_owned(room).await.map_err(|_| closed())?;
        let (done, appended) = oneshot::channel();
        self.requests.send(Request { lines, done, _room: room }).await.map_err(|_| closed())?;
        Ok(Appended(appended))
    }

    /// Bytes in the log, durably.
    pub fn len_bytes(&self) -> u64 {
        *self.len_bytes.borrow()
    }

    /// A reader from the start.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn reader(&self) -> Result<TelemetryReader, TelemetryError> {
        let file = File::open(&*self.path).map_err(|source| TelemetryError::File {
            path: self.path.to_path_buf(),
            what: "opened",
            source,
        })?;
        Ok(TelemetryReader { file: Arc::new(file), position_bytes: 0, len_bytes: self.len_bytes.clone() })
    }
}

/// Reads the log from the start while it is written; shows complete lines that are durable.
#[derive(Debug)]
pub struct TelemetryReader {
    file: Arc<File>,
    position_bytes: u64,
    len_bytes: watch::Receiver<u64>,
}

impl TelemetryReader {
    /// The next bytes, at most 64 KiB, cut anywhere; nothing at the end of what is there.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        let end = *self.len_bytes.borrow_and_update();
        let wanted = end.saturating_sub(self.position_bytes).min(CHUNK_BYTES as u64) as usize;
        if wanted == 0 {
            return Ok(None);
        }
        let (file, position) = (self.file.clone(), self.position_bytes);
        let reading = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; wanted];
            let mut file = &*file;
            file.seek(SeekFrom::Start(position))?;
            file.read_exact(&mut chunk)?;
            Ok(Bytes::from(chunk))
        });
        let chunk: std::io::Result<Bytes> = reading.await.map_err(std::io::Error::other)?;
        let chunk = chunk?;
        self.position_bytes += chunk.len() as u64;
        Ok(Some(chunk))
    }

    /// As [`TelemetryReader::next`], but waits at the end; nothing when the log is closed.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn follow(&mut self) -> std::io::Result<Option<Bytes>> {
        loop {
            if let Some(chunk) = self.next().await? {
                return Ok(Some(chunk));
            }
            if self.len_bytes.changed().await.is_err() {
                return self.next().await;
            }
        }
    }
}

struct Writer {
    file: File,
    len_bytes: u64,
    len_bytes_max: u64,
    /// The last sequence number given.
    last: u64,
    /// After a failure that could not be undone nothing more is written.
    failed: bool,
    len_out: watch::Sender<u64>,
}

impl Writer {
    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        while let Some(first) = requests.blocking_recv() {
            let mut group = vec![first];
            let mut bytes: usize = group[0].lines.iter().map(Vec::len).sum();
            while bytes < GROUP_BYTES_MAX {
                let Ok(next) = requests.try_recv() else { break };
                bytes += next.lines.iter().map(Vec::len).sum::<usize>();
                group.push(next);
            }
            let outcome = self.append(&group, bytes);
            if let Err(error) = &outcome {
                tracing::error!(code = "EH7007", %error, "telemetry was not written");
            }
            for request in group {
                // Whoever went away does not want to know.
                let _ = request.done.send(outcome.clone());
            }
        }
    }

    fn append(&mut self, group: &[Request], bytes: usize) -> Result<(), PublishError> {
        if self.failed {
            return Err(PublishError::Store("the telemetry log failed before; restart".into()));
        }
        let lines = group.iter().map(|request| request.lines.len()).sum::<usize>();
        let mut out = Vec::with_capacity(bytes + lines * (LINE_START.len() + 20));
        let mut last = self.last;
        for line in group.iter().flat_map(|request| &request.lines) {
            last += 1;
            out.extend_from_slice(LINE_START);
            out.extend_from_slice(last.to_string().as_bytes());
            out.extend_from_slice(line);
        }
        if self.len_bytes.saturating_add(out.len() as u64) > self.len_bytes_max {
            let limit = self.len_bytes_max;
            return Err(PublishError::Full(format!(
                "the telemetry log has reached its limit of {limit} bytes"
            )));
        }
        if let Err(error) = self.file.write_all(&out).and_then(|()| self.file.sync_data()) {
            return Err(self.undo(error));
        }
        self.last = last;
        self.len_bytes += out.len() as u64;
        self.len_out.send_replace(self.len_bytes);
        Ok(())
    }

    /// Takes off what a failed write left, so that the next one begins at a line's start.
    fn undo(&mut self, error: std::io::Error) -> PublishError {
        let undone = self
            .file
            .set_len(self.len_bytes)
            .and_then(|()| self.file.seek(SeekFrom::Start(self.len_bytes)))
            .and_then(|_| self.file.sync_data());
        self.failed = undone.is_err();
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                PublishError::Full(error.to_string())
            }
            _ => PublishError::Store(error.to_string()),
        }
    }
}

fn closed() -> PublishError {
    PublishError::Store("the telemetry log is closed".into())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    enqueued_time: &'a str,
    device_id: &'a str,
    module_id: Option<&'a str>,
    properties: Properties<'a>,
    system_properties: Properties<'a>,
    body: String,
}

struct Properties<'a> {
    message: &'a Message,
    system: bool,
}

impl Serialize for Properties<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for Property { name, value, null, .. } in self.message.properties.iter() {
            let name = match (name, self.system) {
                (PropertyName::System(property), true) => property.name(),
                (PropertyName::Application(name), false) => name,
                (PropertyName::System(_), false) | (PropertyName::Application(_), true) => continue,
            };
            map.serialize_entry(name, &(!null).then_some(value))?;
        }
        map.end()
    }
}

/// The line without its start: `,"enqueuedTime":..}` and the line feed.
fn line(message: &Message, enqueued_time: &str) -> serde_json::Result<Vec<u8>> {
    let identity = &message.sender.identity;
    let mut line = serde_json::to_vec(&Line {
        enqueued_time,
        device_id: identity.device_id(),
        module_id: identity.module_id(),
        properties: Properties { message, system: false },
        system_properties: Properties { message, system: true },
        body: BASE64.encode(&message.body),
    })?;
    line[0] = b',';
    line.push(b'\n');
    Ok(line)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LineNumber {
    sequence_number: u64,
}

/// Bytes up to the end of the last complete line, and its number; nothing when the file is no log.
fn last_line(file: &mut File, len_bytes: u64) -> std::io::Result<Option<(u64, u64)>> {
    let Some(end) = behind_last_line_feed(file, len_bytes)? else {
        // No complete line: the first one, torn, or zeros that a power cut left.
        let mut start = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        Read::by_ref(file).take(LINE_START.len() as u64).read_to_end(&mut start)?;
        let torn = LINE_START.starts_with(&start) || start.iter().all(|byte| *byte == 0);
        return Ok(torn.then_some((0, 0)));
    };
    let start = behind_last_line_feed(file, end - 1)?.unwrap_or(0);
    if end - start > LINE_BYTES_MAX {
        return Ok(None);
    }
    let mut line = vec![0; (end - start) as usize];
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(&mut line)?;
    Ok(serde_json::from_slice::<LineNumber>(&line).ok().map(|line| (end, line.sequence_number)))
}

/// The place behind the last line feed before `end`.
fn behind_last_line_feed(file: &mut File, mut end: u64) -> std::io::Result<Option<u64>> {
    let mut block = vec![0; CHUNK_BYTES];
    while end > 0 {
        let size = end.min(CHUNK_BYTES as u64);
        let block = &mut block[..size as usize];
        file.seek(SeekFrom::Start(end - size))?;
        file.read_exact(block)?;
        if let Some(index) = block.iter().rposition(|byte| *byte == b'\n') {
            return Ok(Some(end - size + index as u64 + 1));
        }
        end -= size;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use edgehub_broker::identity::Identity;
    use edgehub_broker::message::{Origin, Properties, Sender, SystemProperty};

    use super::*;

    fn message(body: &[u8]) -> Message {
        let sender = Sender {
            identity: Identity::parse("edge1/filter").unwrap(),
            origin: Origin::Downstream,
            model_id: None,
        };
        let properties = Properties::copied_from([
            (PropertyName::Application("a\"b"), "1"),
            (PropertyName::System(SystemProperty::ContentType), "application/json"),
        ]);
        Message::new(Arc::new(sender), properties, Bytes::copy_from_slice(body))
    }

    async fn content(log: &TelemetryLog) -> Vec<serde_json::Value> {
        let mut reader = log.reader().unwrap();
        let mut text = Vec::new();
        while let Some(chunk) = reader.next().await.unwrap() {
            text.extend_from_slice(&chunk);
        }
        text.split_inclusive(|byte| *byte == b'\n')
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect()
    }

    async fn append(log: &TelemetryLog, messages: &[Message]) -> Result<(), PublishError> {
        log.append(messages).await.unwrap().await
    }

    #[tokio::test]
    async fn the_log_survives_reopening_and_a_torn_last_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("telemetry.ndjson");
        let log = TelemetryLog::open(&path, 1 << 30).unwrap();
        append(&log, &[message(b"one"), message(&[0xff; 100_000])]).await.unwrap();
        drop(log);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"sequenceNumber\":3,\"enqueued").unwrap();
        let log = TelemetryLog::open(&path, 1 << 30).unwrap();
        append(&log, &[message(b"three")]).await.unwrap();
        let lines = content(&log).await;
        assert_eq!(lines.len(), 3);
        for (index, line) in lines.iter().enumerate() {
            assert_eq!(line["sequenceNumber"], index + 1);
        }
        let line = &lines[0];
        assert_eq!((&line["deviceId"], &line["moduleId"]), (&"edge1".into(), &"filter".into()));
        assert_eq!(line["properties"], serde_json::json!({"a\"b": "1"}));
        assert_eq!(line["systemProperties"], serde_json::json!({"contentType": "application/json"}));
        assert_eq!(line["body"], "b25l");
        let enqueued = line["enqueuedTime"].as_str().unwrap();
        assert!(OffsetDateTime::parse(enqueued, &Rfc3339).is_ok(), "{enqueued}");
    }

    #[tokio::test]
    async fn any_cut_of_the_file_opens_to_its_complete_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("telemetry.ndjson");
        let log = TelemetryLog::open(&path, 1 << 30).unwrap();
        append(&log, &[message(b"one"), message(b"two")]).await.unwrap();
        drop(log);
        let whole = fs::read(&path).unwrap();
        let cut_path = directory.path().join("cut.ndjson");
        for cut in 0..=whole.len() {
            let complete = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
            fs::write(&cut_path, &whole[..cut]).unwrap();
            let log = TelemetryLog::open(&cut_path, 1 << 30).unwrap();
            assert_eq!(content(&log).await.len(), complete, "cut at {cut}");
        }
        fs::write(&cut_path, [0; 9]).unwrap();
        assert_eq!(TelemetryLog::open(&cut_path, 1 << 30).unwrap().len_bytes(), 0);
    }

    #[tokio::test]
    async fn a_reader_follows() {
        let directory = tempfile::tempdir().unwrap();
        let log = TelemetryLog::open(directory.path().join("telemetry.ndjson"), 1 << 30).unwrap();
        let mut reader = log.reader().unwrap();
        assert_eq!(reader.next().await.unwrap(), None);
        let messages = [message(b"later")];
        let (chunk, appended) = tokio::join!(reader.follow(), append(&log, &messages));
        appended.unwrap();
        assert!(chunk.unwrap().unwrap().ends_with(b"\n"));
        drop(log);
        assert_eq!(reader.follow().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_full_log_refuses_and_a_foreign_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("telemetry.ndjson");
        let log = TelemetryLog::open(&path, 400).unwrap();
        append(&log, &[message(b"one")]).await.unwrap();
        assert!(matches!(append(&log, &[message(&[0; 500])]).await, Err(PublishError::Full(_))));
        append(&log, &[]).await.unwrap();
        let foreign = directory.path().join("letter.txt");
        for text in ["dear all", "dear all\n"] {
            fs::write(&foreign, text).unwrap();
            assert!(matches!(TelemetryLog::open(&foreign, 400), Err(TelemetryError::Damaged(_))));
            assert_eq!(fs::read_to_string(&foreign).unwrap(), text);
        }
    }
}
