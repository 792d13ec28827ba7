//! What outlives a connection: the lanes, what identities want, what the hub is still to hear, and who gets nowhere.

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::control::{ControlError, Downward, Request};
use super::lanes::{LaneId, Lanes};
use super::outbox::Outbox;
use super::targets::Target;
use super::twins::{Ask, Twins};
use super::wants::Wants;
use super::watchdog::Watchdog;
use crate::delivery::{BackoffOptions, QueueReader, SentMetrics};
use crate::identity::Identity;

/// The work at hand.
pub(super) struct Work {
    pub(super) lanes: Lanes,
    /// None until queues are served on this connection.
    pub(super) reader: Option<QueueReader>,
    pub(super) sent: SentMetrics,
    pub(super) wants: Wants,
    pub(super) outbox: Outbox,
    pub(super) watchdog: Watchdog,
}

impl Work {
    pub(super) fn new(batch_max: usize, backoff: BackoffOptions, hub: mpsc::Sender<Downward>) -> Self {
        Self {
            lanes: Lanes::new(batch_max, backoff),
            reader: None,
            sent: SentMetrics::new("upstream", ""),
            wants: Wants::new(backoff),
            outbox: Outbox::new(hub),
            watchdog: Watchdog::default(),
        }
    }

    /// The same for one of several ways up, to this target.
    pub(super) fn to(mut self, target: Option<&Target>, ways: usize) -> Self {
        self.lanes = self.lanes.one_of(ways);
        self.sent = SentMetrics::new("upstream", target.map_or("", Target::as_str));
        self
    }

    /// The same with another number of transfers of one sender without an answer.
    pub(super) fn with_transfers_max(self, transfers_max: usize) -> Self {
        Self { lanes: self.lanes.with_transfers_max(transfers_max), ..self }
    }

    /// The connection is gone: all is read again, and all that is wanted is asked for again.
    pub(super) fn reset(&mut self) {
        self.lanes.reset();
        self.reader = None;
        self.wants.reset();
        self.outbox.down();
    }

    /// Takes a request while there is no connection: what is wanted holds, what is asked is answered at once.
    pub(super) fn offline(&mut self, request: Request) {
        match request {
            Request::Want { identity, wanted } => {
                let lane = self.lanes.lane_of(&identity);
                self.wants.set(lane, wanted);
            }
            Request::Twin { answer, .. } => Ask::Get(answer).fail(ControlError::Offline),
            Request::PatchReported { patch, answer, .. } => {
                Ask::Patch(patch, answer).fail(ControlError::Offline)
            }
        }
    }

    /// Takes a request to an upstream that has no control plane.
    pub(super) fn unsupported(&mut self, request: Request) {
        match request {
            Request::Want { .. } => {}
            Request::Twin { answer, .. } => Ask::Get(answer).fail(ControlError::Unsupported),
            Request::PatchReported { patch, answer, .. } => {
                Ask::Patch(patch, answer).fail(ControlError::Unsupported)
            }
        }
    }

    /// The control plane of an identity waits for the end of a pause. What is asked meanwhile hears why.
    pub(super) fn fail_control(&mut self, lane: LaneId, error: Option<ControlError>, twins: &mut Twins) {
        let error = error.unwrap_or(ControlError::Offline);
        twins.fail(lane, &error);
        self.wants.park(lane, Some(error), Instant::now());
    }

    /// The identity of a lane.
    pub(super) fn identity(&self, lane: LaneId) -> &Identity {
        self.lanes.sender(lane)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use edgehub_storage::{Entry, Offset, StoreTime, Ttl};

    use super::*;
    use crate::delivery::Queued;
    use crate::message::{Message, Origin, Properties, Sender};

    fn queued(sender: &str, offset: u64) -> Queued {
        let identity = Identity::parse(sender).unwrap();
        let sender = Sender { identity, origin: Origin::Downstream, model_id: None };
        let message = Message::new(Arc::new(sender), Properties::empty(), Bytes::new());
        let entry = Entry {
            offset: Offset::new(offset),
            bytes: message.to_record(),
            accepted_at: StoreTime::default(),
            ttl: Ttl::Infinite,
        };
        Queued { lane: 0, level: 0, rank: 0, alone: false, priority: "0".into(), entry, message }
    }

    #[test]
    fn what_a_lost_connection_left_without_an_answer_is_sent_on_the_next() {
        let mut work = Work::new(1, BackoffOptions::default(), mpsc::channel(1).0);
        work.reader = Some(QueueReader::new(&[], 0));
        let now = Instant::now();
        let sent = work.lanes.push(queued("sent", 0), now).unwrap();
        work.lanes.sent(sent, 1, now);
        let aside = work.lanes.push(queued("aside", 1), now).unwrap();
        work.lanes.sent(aside, 1, now);
        work.lanes.set_aside(aside);
        let parked = work.lanes.push(queued("parked", 2), now).unwrap();
        work.lanes.park(parked, now);
        work.lanes.push(queued("waits", 3), now).unwrap();
        work.reset();
        assert!(work.reader.is_none(), "the queues are read from their first unsettled entry on");
        assert_eq!((work.lanes.held(), work.lanes.in_flight(), work.lanes.parked()), (0, 0, 0));
        for (sender, offset) in [("sent", 0), ("aside", 1), ("parked", 2), ("waits", 3)] {
            let lane = work.lanes.push(queued(sender, offset), now).expect(sender);
            assert!(work.lanes.is_ready(lane), "{sender}");
            assert_eq!(work.lanes.next_chunk(lane).count(), 1, "{sender}");
        }
    }
}
