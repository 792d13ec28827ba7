//! Owns lists of identities for which something is to be done, each in the list once.

use std::collections::VecDeque;

use ahash::AHashSet;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::identity::Identity;

/// Identities in the order in which they came; bounded by the identities that there are.
#[derive(Default)]
pub(super) struct IdentityQueue {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Default)]
struct Waiting {
    order: VecDeque<Identity>,
    known: AHashSet<Identity>,
}

impl IdentityQueue {
    /// Appends an identity, unless it waits already.
    pub(super) fn push(&self, identity: &Identity) {
        {
            let mut waiting = self.waiting.lock();
            if !waiting.known.insert(identity.clone()) {
                return;
            }
            waiting.order.push_back(identity.clone());
        }
        self.wake.notify_one();
    }

    /// Waits for the next identity and takes it. For one task; cancel safe.
    pub(super) async fn next(&self) -> Identity {
        loop {
            if let Some(identity) = self.take() {
                return identity;
            }
            self.wake.notified().await;
        }
    }

    fn take(&self) -> Option<Identity> {
        let mut waiting = self.waiting.lock();
        let identity = waiting.order.pop_front()?;
        waiting.known.remove(&identity);
        Some(identity)
    }
}
