//! What a pump reads: the queues of one endpoint, the most urgent first.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use edgehub_storage::{BatchEnd, Entry, Offset, Outcome, Queue, ReadLimit, Settlement, StoreError};
use metrics::counter;

use crate::message::{Message, SenderCache};

/// Messages that are read ahead.
const AHEAD_MESSAGES_MAX: usize = 256;

/// Reads the queues of one endpoint in order of priority, each from a position of its own.
pub(crate) struct QueueReader {
    /// Their places stay when queues are added, so that what was read before can still be settled.
    lanes: Vec<Lane>,
    /// The lanes that are read, the most urgent first.
    order: Vec<usize>,
    senders: SenderCache,
    /// Something was read that had never been read, or there was nothing, since the last rewind.
    fresh: bool,
}

struct Lane {
    level: u32,
    priority: Arc<str>,
    queue: Queue,
    next: Offset,
    /// The furthest place that reading reached.
    reached: Offset,
    /// The queue's checkpoint before a read that could not go on without a later one.
    blocked: Option<Offset>,
}

/// A message that was read, and where it came from.
pub(crate) struct Queued {
    pub(crate) lane: usize,
    /// The queue's priority; 0 is the most urgent.
    pub(crate) level: u32,
    /// The same as metrics name it.
    pub(crate) priority: Arc<str>,
    pub(crate) entry: Entry,
    pub(crate) message: Message,
}

impl QueueReader {
    pub(crate) fn new(queues: &[(u32, Queue)]) -> Self {
        let mut reader =
            Self { lanes: Vec::new(), order: Vec::new(), senders: SenderCache::default(), fresh: true };
        reader.replace(queues);
        reader
    }

    /// Reads these queues from now on. Those that were read before go on where they are.
    pub(crate) fn replace(&mut self, queues: &[(u32, Queue)]) {
        self.order.clear();
        for (level, queue) in queues {
            let known = self.lanes.iter().position(|lane| lane.queue.id() == queue.id());
            let lane = known.unwrap_or_else(|| {
                let next = queue.checkpoint();
                self.lanes.push(Lane {
                    level: *level,
                    priority: level.to_string().into(),
                    queue: queue.clone(),
                    next,
                    reached: next,
                    blocked: None,
                });
                self.lanes.len() - 1
            });
            self.order.push(lane);
        }
    }

    /// How many messages to read when `wanted` are. With one queue it pays to read ahead; with several, what is more
    /// urgent must not wait behind what was read ahead.
    pub(crate) fn count(&self, wanted: usize) -> usize {
        if self.order.len() == 1 { wanted.max(AHEAD_MESSAGES_MAX) } else { wanted }
    }

    /// Reads on from the first entry of each queue that is not settled.
    pub(crate) fn rewind(&mut self) {
        for lane in &mut self.lanes {
            lane.next = lane.queue.checkpoint();
            lane.blocked = None;
        }
    }

    /// Reads on in one queue from this entry, if it lies before the place reached.
    pub(crate) fn rewind_to(&mut self, lane: usize, offset: Offset) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.next = lane.next.min(offset);
            lane.blocked = None;
            self.fresh = false;
        }
    }

    /// Whether reading got further than ever, or to the ends, since the last [`QueueReader::rewind_to`]. Who waits
    /// for it before the next rewind cannot read the same stretch for ever.
    pub(crate) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// The next messages of the most urgent queue that has any; empty when all were read to their ends.
    pub(crate) async fn read(&mut self, limit: ReadLimit) -> Result<Vec<Queued>, StoreError> {
        for at in 0..self.order.len() {
            let index = self.order[at];
            loop {
                let lane = &mut self.lanes[index];
                // Taken before the read, so that a step of it in between is not missed.
                let checkpoint = lane.queue.checkpoint();
                let batch = lane.queue.read(lane.next, limit).await?;
                lane.next = batch.next;
                lane.blocked = (batch.end == BatchEnd::Window).then_some(checkpoint);
                if lane.next > lane.reached {
                    lane.reached = lane.next;
                    self.fresh = true;
                }
                if batch.expired > 0 {
                    counter!(
                        "edgehub_messages_dropped_total",
                        "reason" => "ttl_expiry", "from" => "", "from_route_output" => ""
                    )
                    .increment(batch.expired);
                }
                let end = batch.end;
                let queued = self.decode(index, batch.entries);
                if !queued.is_empty() {
                    return Ok(queued);
                }
                match end {
                    BatchEnd::More => {}
                    BatchEnd::Tail | BatchEnd::Window => break,
                }
            }
        }
        self.fresh = true;
        Ok(Vec::new())
    }

    /// Waits until there may be something to read. Cancel safe.
    pub(crate) async fn readable(&self) {
        let mut waits: Vec<_> = self
            .order
            .iter()
            .map(|index| {
                let lane = &self.lanes[*index];
                Box::pin(async move {
                    match lane.blocked {
                        Some(checkpoint) => lane.queue.checkpointed(checkpoint).await,
                        None => lane.queue.appended(lane.next).await,
                    }
                })
            })
            .collect();
        let mut any = pin!(poll_fn(move |cx| {
            let ready = waits.iter_mut().any(|wait| wait.as_mut().poll(cx).is_ready());
            if ready { Poll::Ready(()) } else { Poll::Pending }
        }));
        any.as_mut().await;
    }

    pub(crate) fn settle(&self, lane: usize, settlements: &[Settlement]) {
        if let Some(lane) = self.lanes.get(lane) {
            lane.queue.settle(settlements);
        }
    }

    pub(crate) fn settle_one(&self, lane: usize, offset: Offset, outcome: Outcome) {
        self.settle(lane, &[Settlement { offset, outcome }]);
    }

    fn decode(&mut self, index: usize, entries: Vec<Entry>) -> Vec<Queued> {
        let mut queued = Vec::with_capacity(entries.len());
        for entry in entries {
            match Message::from_record(&entry.bytes, &mut self.senders) {
                Ok(message) => queued.push(Queued {
                    lane: index,
                    level: self.lanes[index].level,
                    priority: self.lanes[index].priority.clone(),
                    entry,
                    message,
                }),
                Err(error) => {
                    let queue = &self.lanes[index].queue;
                    tracing::error!(
                        queue = queue.name(), offset = entry.offset.get(), %error,
                        "A stored message cannot be read and is dropped"
                    );
                    let reason = edgehub_storage::DropReason::Unreadable;
                    counter!(
                        "edgehub_messages_dropped_total",
                        "reason" => reason.as_str(), "from" => "", "from_route_output" => ""
                    )
                    .increment(1);
                    self.settle_one(index, entry.offset, Outcome::Dropped(reason));
                }
            }
        }
        queued
    }
}
