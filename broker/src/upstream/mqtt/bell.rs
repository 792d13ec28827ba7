//! Which of many connections want to be looked at: one waker each, one list for all, so that the turn of a thousand idle
//! connections costs nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::upstream::lanes::LaneId;

/// The list, and the task that works through it.
#[derive(Debug, Default)]
pub(super) struct Bells {
    board: Arc<Board>,
}

/// The bell of one connection.
#[derive(Debug)]
pub(super) struct Bell {
    lane: LaneId,
    /// Whether it is on the list.
    rung: AtomicBool,
    board: Arc<Board>,
}

#[derive(Debug, Default)]
struct Board {
    rung: Mutex<Vec<Arc<Bell>>>,
    task: AtomicWaker,
}

impl Bells {
    /// A bell for the connection of a lane.
    pub(super) fn bell(&self, lane: LaneId) -> Arc<Bell> {
        Arc::new(Bell { lane, rung: AtomicBool::new(false), board: self.board.clone() })
    }

    /// Lanes whose bells rang since the last call; pending when there is none.
    pub(super) fn poll_rung(&self, cx: &mut Context<'_>) -> Poll<Vec<LaneId>> {
        // First, so that a bell that rings from here on wakes the task.
        self.board.task.register(cx.waker());
        let rung = std::mem::take(&mut *self.board.rung.lock());
        if rung.is_empty() {
            return Poll::Pending;
        }
        let take = |bell: Arc<Bell>| {
            bell.rung.store(false, Ordering::Release);
            bell.lane
        };
        Poll::Ready(rung.into_iter().map(take).collect())
    }
}

impl Bell {
    /// Its waker.
    pub(super) fn waker(self: &Arc<Self>) -> Waker {
        self.clone().into()
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            self.board.rung.lock().push(self.clone());
            self.board.task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bell_is_listed_once_until_it_is_looked_at() {
        let bells = Bells::default();
        let (one, other) = (bells.bell(LaneId::new(1)).waker(), bells.bell(LaneId::new(2)).waker());
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(bells.poll_rung(&mut cx), Poll::Pending);
        one.wake_by_ref();
        other.wake_by_ref();
        one.wake_by_ref();
        assert_eq!(bells.poll_rung(&mut cx), Poll::Ready(vec![LaneId::new(1), LaneId::new(2)]));
        assert_eq!(bells.poll_rung(&mut cx), Poll::Pending);
        one.wake();
        assert_eq!(bells.poll_rung(&mut cx), Poll::Ready(vec![LaneId::new(1)]));
    }
}
