//! What becomes of messages that leave the lanes: settled, said, and counted.

use std::sync::Arc;

use edgehub_storage::{DeadLetterReason, Outcome, Settlement, StoreTime};
use smallvec::SmallVec;
use tokio::time::Instant;

use super::lanes::{Chunk, LaneId};
use super::work::Work;
use crate::delivery::{Loss, Losses, QueueReader, Queued};
use crate::head::warn_limit::WarnLimit;

/// What the upstream refuses was offered once: the answer was final.
const ATTEMPTS: u32 = 1;

/// Limits the warnings about single messages.
pub(super) static DROP_WARNINGS: WarnLimit = WarnLimit::new();

/// The messages of a transfer are delivered; settles them in all the queues that they came from.
pub(super) fn deliver(chunk: &Chunk, reader: Option<&QueueReader>) {
    let Some(reader) = reader else { return };
    for of_queue in chunk.messages.chunk_by(|a, b| a.lane == b.lane) {
        let settlements: SmallVec<[Settlement; 16]> = of_queue
            .iter()
            .map(|queued| Settlement { offset: queued.entry.offset, outcome: Outcome::Delivered })
            .collect();
        reader.settle(of_queue[0].lane, &settlements);
    }
}

/// Settles what is not delivered.
pub(super) struct Fates {
    losses: Arc<Losses>,
}

impl Fates {
    pub(super) fn new(losses: Arc<Losses>) -> Self {
        Self { losses }
    }

    /// Settles those messages of all lanes whose time to live has ended by `now`.
    pub(super) fn expire_all(&self, now: StoreTime, work: &mut Work) {
        if let Some(reader) = &work.reader {
            let expired = work.lanes.expire(now, Instant::now());
            expired.iter().for_each(|queued| self.expire(queued, reader));
        }
    }

    /// Settles the first messages of a lane as far as their time to live has ended by `now`.
    pub(super) fn expire_first(&self, lane: LaneId, now: StoreTime, work: &mut Work) {
        while work.lanes.next_chunk(lane).next().is_some_and(|queued| queued.entry.is_expired(now)) {
            for queued in work.lanes.discard(lane, 1, Instant::now()) {
                if let Some(reader) = &work.reader {
                    self.expire(&queued, reader);
                }
            }
        }
    }

    /// The time to live of a message ended while it waited in its lane.
    fn expire(&self, queued: &Queued, reader: &QueueReader) {
        let message = &queued.message;
        let output = message.output().unwrap_or_default();
        self.losses.tell(Loss::Expired, &message.sender.identity, output, || {
            reader.settle_one(queued.lane, queued.entry.offset, Outcome::Expired)
        });
    }

    /// Messages of a lane go to the dead letters. Those that these cannot take now are read again after a pause of the
    /// lane; false then.
    #[must_use = "a message that was not taken is still queued"]
    pub(super) fn give_up_all(
        &self,
        lane: LaneId,
        messages: &[Queued],
        reason: DeadLetterReason,
        text: &str,
        work: &mut Work,
    ) -> bool {
        let mut taken = true;
        // Without a reader nothing was read, and there is nothing to give up.
        let Some(reader) = &work.reader else { return taken };
        for queued in messages {
            if !self.give_up(queued, reason, text, reader) {
                work.lanes.read_again(lane, queued);
                taken = false;
            }
        }
        taken
    }

    /// The upstream will never take a message: it goes to the dead letters. False if they cannot take it now.
    #[must_use = "a message that was not taken is still queued"]
    fn give_up(&self, queued: &Queued, reason: DeadLetterReason, text: &str, reader: &QueueReader) -> bool {
        let message = &queued.message;
        let from = &message.sender.identity;
        if let Some(others) = DROP_WARNINGS.admit() {
            tracing::warn!(code = "EH5005", %from, reason = text, others, "The upstream does not take a message; it goes to the dead letters");
        }
        let output = message.output().unwrap_or_default();
        self.losses.dead_letter(reason, from, output, || {
            reader.dead_letter(queued.lane, &queued.entry, reason, ATTEMPTS)
        })
    }
}
