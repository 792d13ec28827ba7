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
                Ok(found) => *self.found.lock() = found,
                Err(StoreError::Closed) => return,
                Err(error) => tracing::debug!(%error, "The age of the oldest message cannot be read"),
            }
            let pause = tokio::time::timeout(Duration::from_secs(LOOK_SECS), stop.wait_for(|stop| *stop));
            if pause.await.is_ok() {
                return;
            }
        }
    }
}

async fn look(store: &Store) -> Result<Found, StoreError> {
    let mut found = Found::default();
    for queue in store.queues() {
        if let Some(at) = queue.oldest_accepted_at().await? {
            found.queues.insert(queue.id(), at);
        }
    }
    let oldest = store.dead_letters().list(None, ReadLimit { count: 1, bytes: 1 }, None).await?;
    found.dead_letter = oldest.first().map(|letter| letter.dead_lettered_at);
    Ok(found)
}
