//! One lane: the messages of one sender that are held, in their order.

use std::collections::VecDeque;

use edgehub_storage::Offset;
use tokio::time::Instant;

use crate::delivery::{Backoff, Queued};
use crate::identity::Identity;

/// A place in the queues of the endpoint: which queue, which entry.
pub(crate) type Place = (usize, Offset);

/// Messages that are sent together and answered together.
pub(crate) struct Chunk {
    /// The messages in order.
    pub(crate) messages: Vec<Queued>,
    /// When it was sent.
    pub(crate) sent_at: Instant,
}

/// What is held of one sender.
pub(super) struct Lane {
    pub(super) sender: Identity,
    /// What is to be sent: the more urgent first, each priority in the order of its queue.
    pub(super) pending: VecDeque<Queued>,
    pub(super) sent: VecDeque<Chunk>,
    /// Messages of transfers that were refused as a whole, until those sent behind them are answered.
    pub(super) set_aside: Vec<Queued>,
    pub(super) backoff: Backoff,
    /// When the lane is to be read again; it takes nothing until then.
    pub(super) wake_at: Option<Instant>,
    /// The most urgent priority of what failed, while the lane is parked for it.
    pub(super) parked_level: Option<u32>,
    /// The first entry of each queue that was read while the lane could not hold it. While there is one, the lane
    /// takes nothing, or later messages would overtake.
    pub(super) skipped: Vec<Place>,
}

impl Lane {
    pub(super) fn skip(&mut self, place: Place) {
        match self.skipped.iter_mut().find(|(queue, _)| *queue == place.0) {
            Some((_, first)) => *first = place.1.min(*first),
            None => self.skipped.push(place),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.pending.len()
            + self.set_aside.len()
            + self.sent.iter().map(|chunk| chunk.messages.len()).sum::<usize>()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.len() == 0
    }

    /// Places a message behind the last one of its rank; mostly that is the end.
    pub(super) fn insert(&mut self, queued: Queued) {
        let behind = self.pending.iter().rposition(|other| other.rank <= queued.rank);
        self.pending.insert(behind.map_or(0, |at| at + 1), queued);
    }

    /// Takes a message in. One that comes before its turn, as the share of its queue, gives that to the first of
    /// its queue that waits here, so that none is overtaken.
    pub(super) fn take(&mut self, mut queued: Queued) {
        if queued.rank < queued.level {
            let waits = |other: &Queued| other.lane == queued.lane && other.rank == other.level;
            if let Some(at) = self.pending.iter().position(waits)
                && let Some(mut first) = self.pending.remove(at)
            {
                first.rank = queued.rank;
                queued.rank = queued.level;
                self.insert(first);
            }
        }
        self.insert(queued);
    }

    /// The messages that were set aside go again, one by one, before all others of their rank.
    pub(super) fn take_up(&mut self) {
        for mut queued in std::mem::take(&mut self.set_aside).into_iter().rev() {
            queued.alone = true;
            let before = self.pending.iter().position(|other| other.rank >= queued.rank);
            self.pending.insert(before.unwrap_or(self.pending.len()), queued);
        }
    }
}
