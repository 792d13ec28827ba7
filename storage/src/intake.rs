//! Owns the way of work to the writer thread: a bounded queue of requests, and the queues with new settlements.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Semaphore, oneshot};

use crate::error::StoreError;
use crate::keyed::Change;
use crate::letters::{DeadLetter, LetterWork};
use crate::queue::QueueShared;
use crate::record::AppendRequest;

/// The writer joins at most this many requests into one write.
pub(crate) const GROUP_REQUESTS_MAX: usize = 4096;
/// The writer joins requests into one write until they have this many bytes.
pub(crate) const GROUP_BYTES: usize = 1 << 20;
/// A settlement waits at most this long for an append to ride on.
pub(crate) const SETTLE_DELAY: Duration = Duration::from_millis(5);

/// A submit waits while this many requests, or as many times [`PERMIT_BYTES`], are ahead of the writer.
const PERMITS_MAX: u32 = 4096;
const PERMIT_BYTES: usize = 4096;

/// What is asked of the writer.
#[derive(Debug)]
pub(crate) enum Work {
    Append(AppendRequest),
    Keyed(Vec<Change>),
    /// Dead letters that go back to their queues, and how many did.
    Redrive(Vec<DeadLetter>, Arc<AtomicU64>),
    /// Dead letters that are removed.
    Discard(LetterWork),
    /// Nothing but the promise that all before it is durable.
    Barrier,
}

/// Appends that keep their order also when one of them fails: after that, all further ones of the line are refused
/// with [`StoreError::Behind`]. For a sender whose messages come again from the first that was not acknowledged.
#[derive(Clone, Debug, Default)]
pub struct Line {
    broken: Arc<AtomicBool>,
}

/// Who waits for work, and the line that it belongs to.
#[derive(Debug)]
pub(crate) struct Done {
    sender: oneshot::Sender<Result<(), StoreError>>,
    line: Option<Line>,
}

impl Done {
    /// Whether an earlier request of the line has failed.
    pub(crate) fn is_behind(&self) -> bool {
        // Only the writer's thread reads and writes it.
        self.line.as_ref().is_some_and(|line| line.broken.load(Ordering::Relaxed))
    }

    /// Answers; a failure ends the line.
    pub(crate) fn send(self, result: Result<(), StoreError>) {
        if let (Err(_), Some(line)) = (&result, &self.line) {
            line.broken.store(true, Ordering::Relaxed);
        }
        // Who does not wait any more needs no answer.
        let _ = self.sender.send(result);
    }
}

/// Work, its size, and who waits for it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) work: Work,
    bytes: usize,
    permits: u32,
    pub(crate) done: Done,
}

/// What the writer does next.
#[derive(Debug, Default)]
pub(crate) struct Group {
    pub(crate) requests: Vec<Request>,
    pub(crate) bytes: usize,
    pub(crate) settled: Vec<Arc<QueueShared>>,
    /// No more requests will come; this group is the last one if it holds none.
    pub(crate) closing: bool,
}

#[derive(Debug)]
pub(crate) struct Intake {
    permits: Semaphore,
    state: Mutex<IntakeState>,
    ready: Condvar,
}

#[derive(Debug, Default)]
struct IntakeState {
    requests: VecDeque<Request>,
    settled: Vec<Arc<QueueShared>>,
    /// When the oldest settlement, or a new queue's name, began to wait.
    lazy_since: Option<Instant>,
    closing: bool,
    abandoned: bool,
}

impl Intake {
    pub(crate) fn new() -> Self {
        Self {
            permits: Semaphore::new(PERMITS_MAX as usize),
            state: Mutex::new(IntakeState::default()),
            ready: Condvar::new(),
        }
    }

    /// Hands work over; waits while too much is ahead of it. Nothing is handed over if the future is dropped.
    pub(crate) async fn submit(
        &self,
        work: Work,
        bytes: usize,
        line: Option<Line>,
    ) -> Result<oneshot::Receiver<Result<(), StoreError>>, StoreError> {
        let permits = u32::try_from(1 + bytes / PERMIT_BYTES).unwrap_or(u32::MAX).min(PERMITS_MAX);
        let permit = self.permits.acquire_many(permits).await.map_err(|_| StoreError::Closed)?;
        let (sender, commit) = oneshot::channel();
        let done = Done { sender, line };
        let mut state = self.state.lock();
        if state.closing {
            return Err(StoreError::Closed);
        }
        permit.forget();
        let wake = state.requests.is_empty();
        state.requests.push_back(Request { work, bytes, permits, done });
        drop(state);
        if wake {
            self.ready.notify_one();
        }
        Ok(commit)
    }

    /// Tells the writer that a queue has new settlements.
    pub(crate) fn settled(&self, queue: Arc<QueueShared>) {
        let mut state = self.state.lock();
        if !state.abandoned {
            state.settled.push(queue);
            self.wake_lazily(&mut state);
        }
    }

    /// Tells the writer that there is a new queue.
    pub(crate) fn named(&self) {
        let mut state = self.state.lock();
        self.wake_lazily(&mut state);
    }

    fn wake_lazily(&self, state: &mut IntakeState) {
        if state.lazy_since.is_none() {
            state.lazy_since = Some(Instant::now());
            self.ready.notify_one();
        }
    }

    /// Refuses new work; what was handed over is still done.
    pub(crate) fn close(&self) {
        self.permits.close();
        self.state.lock().closing = true;
        self.ready.notify_one();
    }

    /// Answers all that waits, because nobody will do it.
    pub(crate) fn abandon(&self) {
        self.close();
        let mut state = self.state.lock();
        state.abandoned = true;
        let requests = std::mem::take(&mut state.requests);
        let settled = std::mem::take(&mut state.settled);
        drop(state);
        drop(settled);
        for request in requests {
            request.done.send(Err(StoreError::Closed));
        }
    }

    /// The next group: what has gathered while the last one was written, or the first that comes until
    /// `deadline`. The group is empty at the deadline, or for names of new queues alone.
    pub(crate) fn next(&self, deadline: Instant) -> Group {
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            let lazy_due = state.lazy_since.map(|since| since + SETTLE_DELAY);
            if !state.requests.is_empty()
                || state.closing
                || now >= deadline
                || lazy_due.is_some_and(|due| now >= due)
            {
                break;
            }
            let until = lazy_due.map_or(deadline, |due| due.min(deadline));
            self.ready.wait_until(&mut state, until);
        }
        let mut group =
            Group { settled: std::mem::take(&mut state.settled), closing: state.closing, ..Group::default() };
        state.lazy_since = None;
        let mut permits = 0;
        while group.requests.len() < GROUP_REQUESTS_MAX && group.bytes < GROUP_BYTES {
            let Some(request) = state.requests.pop_front() else { break };
            permits += request.permits as usize;
            group.bytes += request.bytes;
            group.requests.push(request);
        }
        drop(state);
        if permits > 0 {
            self.permits.add_permits(permits);
        }
        group
    }
}
