//! Since when the oldest message of each queue waits, and the oldest dead letter.

use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use edgehub_storage::{QueueId, ReadLimit, Store, StoreError, StoreTime};
use parking_lot::Mutex;
use tokio::sync::watch;

/// How often the oldest entries are looked up, which may cost a read from disk per queue that is behind.
const LOOK_SECS: u64 = 5;

/// What was found at the last look. Cheap to clone.
#[derive(Clone)]
pub(super) struct Ages {
    found: Arc<Mutex<Found>>,
    stop: watch::Sender<bool>,
}

#[derive(Default)]
struct Found {
    queues: AHashMap<QueueId, StoreTime>,
    dead_letter: Option<StoreTime>,
}

impl Ages {
    pub(super) fn new() -> Self {
        Self { found: Arc::default(), stop: watch::Sender::new(false) }
    }

    /// When the oldest entry of a queue was accepted.
    pub(super) fn of_queue(&self, queue: QueueId) -> Option<StoreTime> {
        self.found.lock().queues.get(&queue).copied()
    }

    /// When the oldest dead letter was moved there.
    pub(super) fn of_dead_letters(&self) -> Option<StoreTime> {
        self.found.lock().dead_letter
    }

    /// Ends the watch.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Looks again and again, until it is stopped or the store is closed.
    pub(super) async fn watch(self, store: Store) {
        let mut stop = self.stop.subscribe();
        loop {
            match look(&store).await {
                Some(found) => *self.found.lock() = found,
                None => return,
            }
            let pause = tokio::time::timeout(Duration::from_secs(LOOK_SECS), stop.wait_for(|stop| *stop));
            if pause.await.is_ok() {
                return;
            }
        }
    }
}

/// Looks at everything once; none when the store is closed.
async fn look(store: &Store) -> Option<Found> {
    let mut found = Found::default();
    for queue in store.queues() {
        match queue.oldest_accepted_at().await {
            Ok(Some(at)) => {
                found.queues.insert(queue.id(), at);
            }
            Ok(None) => {}
            Err(StoreError::Closed) => return None,
            Err(error) => {
                tracing::debug!(queue = queue.name(), %error, "The age of the oldest message cannot be read");
            }
        }
    }
    match store.dead_letters().list(None, ReadLimit { count: 1, bytes: 1 }, None).await {
        Ok(letters) => found.dead_letter = letters.first().map(|letter| letter.dead_lettered_at),
        Err(StoreError::Closed) => return None,
        Err(error) => tracing::debug!(%error, "The age of the oldest dead letter cannot be read"),
    }
    Some(found)
}
