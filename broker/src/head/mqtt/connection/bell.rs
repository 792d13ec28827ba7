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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_ring_is_found_by_the_next_look_and_wakes_the_task_that_looked_last() {
        let (first, second) = (Arc::new(Wakes::default()), Arc::new(Wakes::default()));
        let wakers = [Waker::from(first.clone()), Waker::from(second.clone())];
        let looks = wakers.each_ref().map(Context::from_waker);
        let wakes = || [&first, &second].map(|wakes| wakes.0.load(Ordering::SeqCst));
        let bell = Bell::new();
        assert!(bell.rang(&looks[0]), "nobody has been asked yet");
        assert!(!bell.rang(&looks[0]));
        bell.waker().wake_by_ref();
        assert_eq!(wakes(), [1, 0]);
        assert!(bell.rang(&looks[1]));
        assert!(!bell.rang(&looks[1]));
        bell.waker().wake_by_ref();
        bell.waker().wake_by_ref();
        assert_eq!(wakes(), [1, 2], "one that looks too late was woken all the same");
        assert!(bell.rang(&looks[1]) && !bell.rang(&looks[1]));
    }
}
