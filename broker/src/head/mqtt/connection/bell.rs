//! Owns the mark that something rare has happened to a connection: a waker of its own for what most packets do not
//! concern, so that not all of it is asked each time the task is polled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

use parking_lot::Mutex;

/// Wakes a task, and remembers that it did.
pub(super) struct Bell {
    ringing: Arc<Ringing>,
    waker: Waker,
}

struct Ringing {
    rang: AtomicBool,
    task: Mutex<Waker>,
}

impl Bell {
    /// A bell that rings at once: whoever is to ring it has not been asked yet.
    pub(super) fn new() -> Self {
        let ringing =
            Arc::new(Ringing { rang: AtomicBool::new(true), task: Mutex::new(Waker::noop().clone()) });
        Self { waker: ringing.clone().into(), ringing }
    }

    /// Whether it rang since the last look; then all that has its waker is to be polled. From now on it wakes the
    /// task that looks.
    pub(super) fn rang(&self, cx: &Context<'_>) -> bool {
        {
            let mut task = self.ringing.task.lock();
            if !task.will_wake(cx.waker()) {
                task.clone_from(cx.waker());
            }
        }
        // After the task is known: whoever rings from here on wakes it.
        self.ringing.rang.load(Ordering::SeqCst) && self.ringing.rang.swap(false, Ordering::SeqCst)
    }

    /// What rings it.
    pub(super) fn waker(&self) -> &Waker {
        &self.waker
    }
}

impl Wake for Ringing {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rang.store(true, Ordering::SeqCst);
        let task = self.task.lock().clone();
        task.wake();
    }
}
