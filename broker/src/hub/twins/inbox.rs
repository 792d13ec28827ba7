//! Owns what waits for one worker.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::Asker;
use crate::twin::TwinStoreError;
use crate::twin::json::Object;

/// Changes of desired properties that may wait for a worker; beyond it the whole twin is read.
const PUSHES_MAX: usize = 16;

/// The place of one identity among the twins.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) inbox: Mutex<Inbox>,
    pub(super) wake: Notify,
}

/// What waits for a worker. One lock, held for single statements.
#[derive(Default)]
pub(super) struct Inbox {
    /// Requests, in the order in which they came.
    pub(super) requests: VecDeque<Work>,
    /// Changes of desired properties, in the order in which they came.
    pub(super) pushes: VecDeque<Bytes>,
    /// The twin is to be read from the store.
    pub(super) load: bool,
    /// What waits for the upstream is to be sent now.
    pub(super) report: bool,
    /// The twin is to be compared with the upstream's.
    pub(super) compare: bool,
    /// Too many changes came; the twin is to be read in their place.
    pub(super) missed: bool,
    /// The twin is to be deleted; bounded by those who wait for it.
    pub(super) deletions: Vec<oneshot::Sender<Result<(), TwinStoreError>>>,
    /// The right to ask the upstream for one of them.
    pub(super) permit: Option<OwnedSemaphorePermit>,
    /// The worker is gone.
    pub(super) ended: bool,
}

/// A request.
pub(super) enum Work {
    /// Read the whole twin.
    Get { asker: Asker, since: Instant },
    /// Change reported properties.
    Report {
        patch: Object,
        /// The patch as it came.
        text: Bytes,
        /// Whether routes get to know of it.
        routed: bool,
        asker: Asker,
        since: Instant,
    },
}

/// There is no room for another request.
#[derive(Debug)]
pub(super) struct Full;

impl Inbox {
    pub(super) fn put(&mut self, work: Work, requests_max: usize) -> Result<(), Full> {
        if self.requests.len() >= requests_max {
            return Err(Full);
        }
        self.requests.push_back(work);
        Ok(())
    }

    pub(super) fn push(&mut self, patch: Bytes) {
        if self.pushes.len() >= PUSHES_MAX {
            // All that they say is in the twin that is read.
            self.pushes.clear();
            self.missed = true;
        } else if !self.missed {
            self.pushes.push_back(patch);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        let asked = self.load || self.report || self.compare || self.missed;
        self.requests.is_empty() && self.pushes.is_empty() && self.deletions.is_empty() && !asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_that_are_too_many_become_one_reading() {
        let mut inbox = Inbox { compare: true, ..Inbox::default() };
        (0..PUSHES_MAX).for_each(|_| inbox.push("{}".into()));
        assert_eq!((inbox.pushes.len(), inbox.missed), (PUSHES_MAX, false));
        (0..3).for_each(|_| inbox.push("{}".into()));
        assert_eq!((inbox.pushes.len(), inbox.missed, inbox.is_empty()), (0, true, false));
    }
}
