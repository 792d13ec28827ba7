//! What outlives a connection: the lanes, what identities want, what the hub is still to hear, and who gets nowhere.

use tokio::sync::mpsc;

use super::control::{ControlError, Downward, Request};
use super::lanes::{LaneId, Lanes};
use super::outbox::Outbox;
use super::twins::Ask;
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

    /// The identity of a lane.
    pub(super) fn identity(&self, lane: LaneId) -> &Identity {
        self.lanes.sender(lane)
    }
}
