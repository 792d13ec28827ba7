//! What a pump reads: the queues of one endpoint, the most urgent first.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use edgehub_storage::{
    BatchEnd, DeadLetterReason, Entry, Offset, Outcome, Queue, ReadLimit, Settlement, StoreError,
};
use smallvec::SmallVec;

use super::share::Share;
use crate::message::{Message, SenderCache};

/// Messages that are read ahead.
const AHEAD_MESSAGES_MAX: usize = 256;

/// Messages that an urgent queue gives at a time while less urgent ones wait for their share.
const SHARED_MESSAGES_MAX: usize = 32;

/// Reads the queues of one endpoint in order of priority, each from a position of its own.
pub(crate) struct QueueReader {
    /// Their places stay when queues are added, so that what was read before can still be settled.
    lanes: Vec<Lane>,
    /// The lanes that are read, the most urgent first.
    order: Vec<usize>,
    senders: SenderCache,
    share: Share,
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
    /// The place among messages of other priorities: the priority, or a more urgent one that the message was read
    /// before, as the share of its queue.
    pub(crate) rank: u32,
    /// It is to be sent alone, as it was among messages that were refused together.
    pub(crate) alone: bool,
    /// The same as metrics name it.
    pub(crate) priority: Arc<str>,
    pub(crate) entry: Entry,
    pub(crate) message: Message,
}

/// What became of an entry that was to go to the dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeadLettered {
    /// It is there.
    Moved,
    /// It was settled before, or dropped for want of room for any dead letter; the ledger tells.
    Otherwise,
    /// The dead letters take nothing now; the entry is queued as before.
    Busy,
}

impl QueueReader {
    /// A reader of these queues that leaves less urgent ones a share in percent.
    pub(crate) fn new(queues: &[(u32, Queue)], lower_share_percent: u8) -> Self {
        let mut reader = Self {
            lanes: Vec::new(),
            order: Vec::new(),
            senders: SenderCache::default(),
            share: Share::new(lower_share_percent),
            fresh: true,
        };
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
        self.rewind_from(0);
    }

    /// The same for the queues that are as urgent as `level` or less.
    pub(crate) fn rewind_from(&mut self, level: u32) {
        for lane in self.lanes.iter_mut().filter(|lane| lane.level >= level) {
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

    /// The first entry of a queue that is not settled.
    pub(crate) fn checkpoint(&self, lane: usize) -> Offset {
        self.lanes.get(lane).map_or(Offset::ZERO, |lane| lane.queue.checkpoint())
    }

    /// The next messages of the most urgent queue that has any, or of a less urgent one whose share is due; empty
    /// when all were read to their ends. With `above`, only queues that are more urgent than it are read.
    pub(crate) async fn read(
        &mut self,
        limit: ReadLimit,
        above: Option<u32>,
    ) -> Result<Vec<Queued>, StoreError> {
        let readable = self.readable_count(above);
        let due = self.share.due();
        if due > 0 && readable > 1 {
            let limit = ReadLimit { count: limit.count.min(due), ..limit };
            for step in self.share.turns(readable - 1) {
                let at = step + 1;
                // The share is taken from the first more urgent queue that has something; without one there is
                // nothing to share.
                let Some(before) = (0..at).find(|other| self.has_more(self.order[*other])) else { continue };
                let rank = self.lanes[self.order[before]].level;
                let mut queued = self.read_lane(self.order[at], limit).await?;
                if !queued.is_empty() {
                    self.share.granted(queued.len());
                    queued.iter_mut().for_each(|queued| queued.rank = rank);
                    return Ok(queued);
                }
            }
        }
        for at in 0..readable {
            let lower = self.order[at + 1..readable].iter();
            let shares = self.share.is_guaranteed() && lower.copied().any(|lane| self.has_more(lane));
            let limit = match shares {
                true => ReadLimit { count: limit.count.min(SHARED_MESSAGES_MAX), ..limit },
                false => limit,
            };
            let queued = self.read_lane(self.order[at], limit).await?;
            if !queued.is_empty() {
                if shares {
                    self.share.passed_over(queued.len());
                }
                return Ok(queued);
            }
        }
        self.fresh = true;
        Ok(Vec::new())
    }

    async fn read_lane(&mut self, index: usize, limit: ReadLimit) -> Result<Vec<Queued>, StoreError> {
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
            let end = batch.end;
            let queued = self.decode(index, batch.entries);
            if !queued.is_empty() {
                return Ok(queued);
            }
            match end {
                BatchEnd::More => {}
                BatchEnd::Tail | BatchEnd::Window => return Ok(queued),
            }
        }
    }

    /// How many queues are more urgent than `above`: they come first in the order.
    fn readable_count(&self, above: Option<u32>) -> usize {
        match above {
            None => self.order.len(),
            Some(level) => self.order.partition_point(|lane| self.lanes[*lane].level < level),
        }
    }

    /// Whether a queue has entries beyond the place reached, expired ones perhaps.
    fn has_more(&self, lane: usize) -> bool {
        let lane = &self.lanes[lane];
        lane.blocked.is_none() && lane.queue.tail() > lane.next
    }

    /// Waits until there may be something to read in queues that are more urgent than `above`, or in any without
    /// it. Cancel safe.
    pub(crate) async fn readable(&self, above: Option<u32>) {
        let mut waits: SmallVec<[_; 2]> = self.order[..self.readable_count(above)]
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

    /// Settles one entry; false if it was settled before.
    pub(crate) fn settle_one(&self, lane: usize, offset: Offset, outcome: Outcome) -> bool {
        let lane = self.lanes.get(lane);
        lane.is_some_and(|lane| lane.queue.settle(&[Settlement { offset, outcome }]) > 0)
    }

    /// Moves one entry to the dead letters.
    pub(crate) fn dead_letter(
        &self,
        lane: usize,
        entry: &Entry,
        reason: DeadLetterReason,
        attempts: u32,
    ) -> DeadLettered {
        let Some(Lane { queue, .. }) = self.lanes.get(lane) else { return DeadLettered::Otherwise };
        let before = queue.ledger().dead_lettered();
        if !queue.dead_letter(entry, reason, attempts) {
            return DeadLettered::Busy;
        }
        // Were the store to move others of the queue at this moment, to make room, one of them would be taken for this.
        if queue.ledger().dead_lettered() > before { DeadLettered::Moved } else { DeadLettered::Otherwise }
    }

    fn decode(&mut self, index: usize, entries: Vec<Entry>) -> Vec<Queued> {
        let mut queued = Vec::with_capacity(entries.len());
        for entry in entries {
            match Message::from_record(&entry.bytes, &mut self.senders) {
                Ok(message) => queued.push(Queued {
                    lane: index,
                    level: self.lanes[index].level,
                    rank: self.lanes[index].level,
                    alone: false,
                    priority: self.lanes[index].priority.clone(),
                    entry,
                    message,
                }),
                Err(error) => {
                    let queue = &self.lanes[index].queue;
                    tracing::error!(
                        code = "EH4010", queue = queue.name(), offset = entry.offset.get(), %error,
                        "A stored message cannot be read and is dropped"
                    );
                    let reason = edgehub_storage::DropReason::Unreadable;
                    self.settle_one(index, entry.offset, Outcome::Dropped(reason));
                }
            }
        }
        queued
    }
}
