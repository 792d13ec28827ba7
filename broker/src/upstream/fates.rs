//! What becomes of messages that leave the lanes: settled, said, and counted.

use edgehub_storage::{DropReason, Outcome, Settlement};
use smallvec::SmallVec;

use super::lanes::Chunk;
use crate::delivery::{QueueReader, Queued, SentMetrics};
use crate::head::warn_limit::WarnLimit;

/// Limits the warnings about single messages.
pub(super) static DROP_WARNINGS: WarnLimit = WarnLimit::new();

/// The messages of a transfer are settled, in all the queues that they came from.
pub(super) fn settle(chunk: &Chunk, fate: Outcome, reader: Option<&QueueReader>) {
    let Some(reader) = reader else { return };
    for of_queue in chunk.messages.chunk_by(|a, b| a.lane == b.lane) {
        let settlements: SmallVec<[Settlement; 16]> =
            of_queue.iter().map(|queued| Settlement { offset: queued.entry.offset, outcome: fate }).collect();
        reader.settle(of_queue[0].lane, &settlements);
    }
}

/// Says and counts that a message is given up because the upstream will never take it.
pub(super) fn refuse(queued: &Queued, reason: &str, sent: &SentMetrics) {
    if let Some(others) = DROP_WARNINGS.admit() {
        let from = &queued.message.sender.identity;
        tracing::warn!(%from, reason, others, "The upstream refuses a message; it is dropped");
    }
    count_drop(queued, DropReason::RejectedByReceiver.as_str(), sent);
}

/// Counts a message that is given up.
pub(super) fn count_drop(queued: &Queued, reason: &'static str, sent: &SentMetrics) {
    let message = &queued.message;
    sent.dropped(&message.sender.identity, message.output().unwrap_or_default(), reason);
}
