//! Owns the reader thread: everything that reads the engine after the store is open.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::clock::StoreTime;
use crate::engine::{Engine, EngineError, Family, Value, Visit};
use crate::error::StoreError;
use crate::ledger::{DropReason, Outcome};
use crate::queue::QueueShared;
use crate::record::{Entry, Offset, ReadLimit};
use crate::rows::{self, Body, ReferenceHead};

/// Questions that wait for the reader; askers beyond it wait.
const QUESTIONS_MAX: usize = 256;
/// The reader looks at this many entries for one question before it turns to the next.
const TURN_ENTRIES: usize = 16_384;
/// The reader passes this many bytes for one question before it turns to the next.
const TURN_BYTES: usize = 16 << 20;

/// What a row that is passed over counts for, beside the bodies that are taken.
const ROW_BYTES: usize = 256;

/// What a turn of the reader found in a stretch of a queue.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    pub(crate) entries: Vec<Entry>,
    pub(crate) next: u64,
    pub(crate) expired: u64,
}

/// What a read does with entries that have expired or cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// Settles them.
    Settling,
    /// Shows expired ones like others, and passes over those that cannot be read.
    Peeking,
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Question {
    Entries { queue: Arc<QueueShared>, range: Range<u64>, limit: ReadLimit, look: Look, reply: Reply<Chunk> },
    AcceptedAt { queue: Arc<QueueShared>, at: u64, reply: Reply<Option<StoreTime>> },
    Get { key: Vec<u8>, reply: Reply<Option<Bytes>> },
    Scan { from: Vec<u8>, to: Vec<u8>, count_max: usize, reply: Reply<Vec<(Bytes, Bytes)>> },
    Close,
}

/// Asks the reader thread; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct ReaderHandle {
    questions: mpsc::Sender<Question>,
    closing: Arc<AtomicBool>,
    /// For what is in memory; it ends with the store's threads.
    engine: Weak<Engine>,
}

/// The reader's end of the questions.
pub(crate) struct Reader {
    questions: mpsc::Receiver<Question>,
    closing: Arc<AtomicBool>,
    engine: Arc<Engine>,
}

pub(crate) fn channel(engine: Arc<Engine>) -> (ReaderHandle, Reader) {
    let (sender, questions) = mpsc::channel(QUESTIONS_MAX);
    let closing = Arc::new(AtomicBool::new(false));
    let handle =
        ReaderHandle { questions: sender, closing: Arc::clone(&closing), engine: Arc::downgrade(&engine) };
    (handle, Reader { questions, closing, engine })
}

impl ReaderHandle {
    pub(crate) async fn read(
        &self,
        queue: Arc<QueueShared>,
        range: Range<u64>,
        limit: ReadLimit,
    ) -> Result<Chunk, StoreError> {
        self.ask(|reply| Question::Entries { queue, range, limit, look: Look::Settling, reply }).await
    }

    /// Reads without settling anything.
    pub(crate) async fn peek(
        &self,
        queue: Arc<QueueShared>,
        range: Range<u64>,
        limit: ReadLimit,
    ) -> Result<Chunk, StoreError> {
        self.ask(|reply| Question::Entries { queue, range, limit, look: Look::Peeking, reply }).await
    }

    pub(crate) async fn accepted_at(
        &self,
        queue: Arc<QueueShared>,
        at: u64,
    ) -> Result<Option<StoreTime>, StoreError> {
        self.ask(|reply| Question::AcceptedAt { queue, at, reply }).await
    }

    pub(crate) async fn get(&self, key: Vec<u8>) -> Result<Option<Bytes>, StoreError> {
        // What each login asks for is in memory as a rule, and answered without another thread.
        let engine = self.engine.upgrade().filter(|_| !self.closing.load(Ordering::SeqCst));
        if let Some(value) = engine.and_then(|engine| engine.get_in_memory(Family::State, &key)) {
            return Ok(value);
        }
        self.ask(|reply| Question::Get { key, reply }).await
    }

    pub(crate) async fn scan(
        &self,
        from: Vec<u8>,
        to: Vec<u8>,
        count_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
        self.ask(|reply| Question::Scan { from, to, count_max, reply }).await
    }

    /// Lets the thread end after the question that it works on.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        // Only wakes a waiting thread: where the channel is full, or gone, there is none.
        let _ = self.questions.try_send(Question::Close);
    }

    async fn ask<T>(&self, question: impl FnOnce(Reply<T>) -> Question) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.questions.send(question(reply)).await.map_err(|_| StoreError::Closed)?;
        answer.await.unwrap_or(Err(StoreError::Closed))
    }
}

impl Reader {
    /// Answers until the store closes.
    pub(crate) fn run(mut self) {
        while let Some(question) = self.questions.blocking_recv() {
            if self.closing.load(Ordering::SeqCst) {
                break;
            }
            // A reply that nobody waits for any more is dropped.
            match question {
                Question::Entries { queue, range, limit, look, reply } => {
                    if !reply.is_closed() {
                        let _ = reply.send(entries(&self.engine, &queue, range, limit, look));
                    }
                }
                Question::AcceptedAt { queue, at, reply } => {
                    let _ = reply.send(self.accepted_at(&queue, at));
                }
                Question::Get { key, reply } => {
                    let _ = reply.send(self.engine.get(Family::State, &key).map_err(StoreError::from));
                }
                Question::Scan { from, to, count_max, reply } => {
                    let _ = reply.send(self.scan(&from, &to, count_max));
                }
                Question::Close => break,
            }
        }
    }

    fn accepted_at(&self, queue: &QueueShared, at: u64) -> Result<Option<StoreTime>, StoreError> {
        let value = self.engine.get(Family::Reference, &rows::reference_key(queue.id, at))?;
        Ok(value.and_then(|value| ReferenceHead::decode(&value).map(|(head, _)| head.accepted_at)))
    }

    fn scan(&self, from: &[u8], to: &[u8], count_max: usize) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
        let mut rows = Vec::new();
        if count_max > 0 {
            self.engine.scan(Family::State, from, Some(to), &mut |key, value| {
                rows.push((rows::owned(key.get(1..).unwrap_or_default()), value.whole()));
                if rows.len() < count_max { Visit::Next } else { Visit::Stop }
            })?;
        }
        Ok(rows)
    }
}

/// One turn: live entries of `range` up to the limit. Expired ones are settled; ones that cannot be read
/// are settled as dropped, so that a damaged entry never holds up those behind it.
pub(crate) fn entries(
    engine: &Engine,
    queue: &Arc<QueueShared>,
    range: Range<u64>,
    limit: ReadLimit,
    look: Look,
) -> Result<Chunk, StoreError> {
    let mut turn = Turn::new(queue, range.start, limit, look);
    let (from, to) = (rows::reference_key(queue.id, range.start), rows::reference_key(queue.id, range.end));
    let scanned = engine.scan(Family::Reference, &from, Some(&to), &mut |key, value| turn.visit(key, &value));
    match scanned {
        Ok(()) if turn.stopped => {}
        Ok(()) => turn.pass_missing(range.end),
        Err(EngineError::Corrupt(reason)) => {
            tracing::error!(code = "EH6012", queue = %queue.name, offset = turn.next, reason, "a stored entry cannot be read");
            pass_corrupt(engine, queue, &mut turn, range.end)?;
        }
        Err(error) => return Err(error.into()),
    }
    fetch_logged(engine, &mut turn)?;
    Ok(turn.finish())
}

/// Reads the bodies that several queues share. Done after the scan, which may hold a lock.
fn fetch_logged(engine: &Engine, turn: &mut Turn<'_>) -> Result<(), StoreError> {
    for (index, sequence) in std::mem::take(&mut turn.logged) {
        match engine.get(Family::Log, &rows::log_key(sequence)) {
            Ok(Some(body)) => turn.entries[index].bytes = body,
            Ok(None) | Err(EngineError::Corrupt(_)) => {
                let offset = turn.entries[index].offset.get();
                turn.unreadable.push(offset..offset + 1);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Looks for the next entry that can be read, one by one, and gives up those before it.
fn pass_corrupt(
    engine: &Engine,
    queue: &QueueShared,
    turn: &mut Turn<'_>,
    end: u64,
) -> Result<(), StoreError> {
    for _ in 0..TURN_ENTRIES {
        if turn.next >= end || turn.stopped || turn.is_full() {
            break;
        }
        match engine.get(Family::Reference, &rows::reference_key(queue.id, turn.next)) {
            Ok(Some(value)) => {
                let key = rows::reference_key(queue.id, turn.next);
                turn.visit(&key, &Value::Borrowed(&value));
            }
            Ok(None) | Err(EngineError::Corrupt(_)) => turn.pass_missing(turn.next + 1),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What one turn has gathered.
struct Turn<'a> {
    queue: &'a Arc<QueueShared>,
    now: StoreTime,
    limit: ReadLimit,
    look: Look,
    next: u64,
    seen: usize,
    passed_bytes: usize,
    bytes: usize,
    stopped: bool,
    entries: Vec<Entry>,
    /// Entries whose body is in the log: their index, and where.
    logged: Vec<(usize, u64)>,
    expired: Vec<u64>,
    unreadable: Vec<Range<u64>>,
}

impl<'a> Turn<'a> {
    fn new(queue: &'a Arc<QueueShared>, next: u64, limit: ReadLimit, look: Look) -> Self {
        Self {
            queue,
            now: queue.now(),
            limit,
            look,
            next,
            seen: 0,
            passed_bytes: 0,
            bytes: 0,
            stopped: false,
            entries: Vec::new(),
            logged: Vec::new(),
            expired: Vec::new(),
            unreadable: Vec::new(),
        }
    }

    fn is_full(&self) -> bool {
        !self.entries.is_empty() && (self.entries.len() >= self.limit.count || self.bytes >= self.limit.bytes)
    }

    fn stop(&mut self) -> Visit {
        self.stopped = true;
        Visit::Stop
    }

    fn visit(&mut self, key: &[u8], value: &Value<'_>) -> Visit {
        let Some(offset) = rows::reference_offset(key) else { return Visit::Next };
        if self.is_full() || self.seen >= TURN_ENTRIES || self.passed_bytes >= TURN_BYTES {
            return self.stop();
        }
        self.pass_missing(offset);
        self.seen += 1;
        self.passed_bytes += ROW_BYTES;
        if self.queue.with(|state| state.cursor.next_open(offset)) != offset {
            self.next = offset + 1;
            return Visit::Next;
        }
        let Some((head, body)) = ReferenceHead::decode(value.head()) else {
            self.unreadable.push(offset..offset + 1);
            self.next = offset + 1;
            return Visit::Next;
        };
        let over = head.ttl.expires_at(head.accepted_at).is_some_and(|end| self.now >= end);
        if over && self.look == Look::Settling {
            self.expired.push(offset);
            self.next = offset + 1;
            return Visit::Next;
        }
        let length_bytes = match body {
            Body::Inline(inline) => inline_length(value, inline),
            Body::Logged(logged) => logged.length_bytes as usize,
        };
        if !self.entries.is_empty() && self.bytes + length_bytes > self.limit.bytes {
            return self.stop();
        }
        let bytes = match body {
            Body::Inline(inline) => value.body(value.head().len() - inline.len()),
            Body::Logged(logged) => {
                self.logged.push((self.entries.len(), logged.sequence));
                Bytes::new()
            }
        };
        self.bytes += length_bytes;
        self.passed_bytes += length_bytes;
        self.entries.push(Entry {
            offset: Offset::new(offset),
            bytes,
            accepted_at: head.accepted_at,
            ttl: head.ttl,
        });
        self.next = offset + 1;
        Visit::Next
    }

    /// Goes on to `offset`; what should lie before it is not there.
    fn pass_missing(&mut self, offset: u64) {
        if self.next < offset {
            self.unreadable.push(self.next..offset);
            self.next = offset;
        }
    }

    fn finish(self) -> Chunk {
        let Self { queue, look, next, mut entries, expired, unreadable, .. } = self;
        let mut chunk = Chunk { next, ..Chunk::default() };
        entries.retain(|entry| !unreadable.iter().any(|range| range.contains(&entry.offset.get())));
        if look == Look::Settling && (!expired.is_empty() || !unreadable.is_empty()) {
            let mut dropped = 0;
            queue.settle_with(|state| {
                for offset in &expired {
                    chunk.expired += u64::from(state.settle(*offset, Outcome::Expired));
                }
                for range in &unreadable {
                    // Entries that were settled and released meanwhile are not missing, and not counted.
                    let outcome = Outcome::Dropped(DropReason::Unreadable);
                    dropped += state.settle_range(range.start, range.end, outcome);
                }
                chunk.expired + dropped > 0
            });
            if dropped > 0 {
                tracing::error!(code = "EH6013", queue = %queue.name, entries = dropped, "entries cannot be read and were dropped");
            }
        }
        chunk.entries = entries;
        chunk
    }
}

/// The length of a body that the engine may keep apart from the head.
fn inline_length(value: &Value<'_>, inline: &[u8]) -> usize {
    match value {
        Value::Borrowed(_) => inline.len(),
        Value::Shared { body, .. } => body.len(),
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::directory;
    use crate::engine::DiskBudget;

    /// What a question is answered with at once, if it is.
    fn at_once<T>(answer: impl Future<Output = T>) -> Option<T> {
        match pin!(answer).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answer) => Some(answer),
            Poll::Pending => None,
        }
    }

    #[test]
    fn what_is_in_memory_needs_no_reader_and_what_is_not_is_never_read_by_the_asker() {
        let folder = tempfile::tempdir().unwrap();
        let budget =
            DiskBudget { cache_bytes: 1 << 20, write_buffer_bytes: 4 << 20, capacity_bytes: 1 << 30 };
        for engine in [Engine::memory(), directory::open(folder.path(), budget).unwrap()] {
            let engine = Arc::new(engine);
            let mut batch = engine.batch(64);
            engine.put(&mut batch, Family::State, b"known", &[], &Bytes::from_static(b"value"));
            engine.write(batch, true).unwrap();
            let (handle, reader) = channel(Arc::clone(&engine));
            let ask = |key: &str| at_once(handle.get(key.into())).map(Result::unwrap);
            assert_eq!(ask("known"), Some(Some(Bytes::from_static(b"value"))));
            assert_eq!(ask("unknown"), Some(None));
            if engine.sizes().is_some() {
                // The row goes from the write buffer to a table.
                engine.compact(&[]);
                assert_eq!(ask("known"), None, "the reader is asked");
                assert!(engine.get(Family::State, b"known").unwrap().is_some());
                assert_eq!(ask("known"), Some(Some(Bytes::from_static(b"value"))), "now it is in the cache");
            }
            handle.close();
            assert_eq!(ask("known"), None, "nothing is read while the store closes");
            drop(reader);
        }
    }
}
