//! Owns how many messages a module may have without having answered: more while it answers fast.
//!
//! A small window keeps few messages under way to a module that is slow, or that a restart would send again. To one
//! that answers at once it costs a wake-up of both sides for each handful of messages.

use std::time::Duration;

/// The window grows while answers come this fast.
const QUICK_ANSWER_MAX: Duration = Duration::from_millis(250);
/// An answer that takes longer brings the window back to what it began with.
const SLOW_ANSWER_MIN: Duration = Duration::from_secs(2);
/// A window grows to so many times what it began with. One message at a time stays one at a time.
const GROWTH_MAX: usize = 8;
/// Beyond the window that it began with, messages are sent only while those without an answer have fewer bytes.
const GROWN_BYTES_MAX: usize = 1 << 20;

/// The window of one connection.
#[derive(Debug)]
pub(super) struct Pace {
    first: usize,
    window: usize,
    /// Quick answers since the window changed last, or since one was not quick.
    quick: usize,
    /// Bytes of the messages without an answer.
    bytes: usize,
}

impl Pace {
    /// A window that begins with this many messages, at least one.
    pub(super) fn new(first: usize) -> Self {
        Self { first: first.max(1), window: first.max(1), quick: 0, bytes: 0 }
    }

    /// How many more messages may be sent when this many have no answer. A window that is nearly full is not topped up
    /// message by message: each time costs a wake-up of two threads.
    pub(super) fn room(&self, unanswered: usize) -> usize {
        let window = if self.bytes < GROWN_BYTES_MAX { self.window } else { self.first };
        let room = window.saturating_sub(unanswered);
        if room < (window / 4).max(1) { 0 } else { room }
    }

    /// A message was sent.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.bytes += bytes;
    }

    /// A message was answered after this time, whatever the answer.
    pub(super) fn answered(&mut self, bytes: usize, after: Duration) {
        self.bytes -= bytes;
        if after > SLOW_ANSWER_MIN {
            self.window = self.first;
        }
        self.quick = if after <= QUICK_ANSWER_MAX { self.quick + 1 } else { 0 };
        if self.quick >= self.window && self.first > 1 && self.window < self.first * GROWTH_MAX {
            self.window *= 2;
            self.quick = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_millis(1);

    /// Lets the module answer so many messages of 100 bytes, each after `after`.
    fn answer(pace: &mut Pace, count: usize, after: Duration) {
        for _ in 0..count {
            pace.sent(100);
            pace.answered(100, after);
        }
    }

    #[test]
    fn the_window_follows_the_answers() {
        let mut pace = Pace::new(16);
        assert_eq!(pace.room(0), 16);
        answer(&mut pace, 15, QUICK);
        assert_eq!(pace.room(0), 16);
        answer(&mut pace, 1, QUICK);
        assert_eq!(pace.room(0), 32, "a whole window was answered fast");
        assert_eq!((pace.room(24), pace.room(25)), (8, 0), "not topped up message by message");
        answer(&mut pace, 10_000, QUICK);
        assert_eq!(pace.room(0), 128, "it has an end");
        answer(&mut pace, 1, Duration::from_secs(1));
        assert_eq!(pace.room(0), 128);
        answer(&mut pace, 1, Duration::from_secs(3));
        assert_eq!(pace.room(0), 16);
        answer(&mut pace, 10_000, Duration::from_secs(1));
        assert_eq!(pace.room(0), 16, "a module that takes its time has no more than at first");
    }

    #[test]
    fn one_at_a_time_stays_so() {
        let mut pace = Pace::new(1);
        answer(&mut pace, 1_000, QUICK);
        assert_eq!((pace.room(0), pace.room(1)), (1, 0));
    }

    #[test]
    fn a_grown_window_is_bounded_in_bytes() {
        let mut pace = Pace::new(4);
        answer(&mut pace, 1_000, QUICK);
        assert_eq!(pace.room(0), 32);
        pace.sent(GROWN_BYTES_MAX);
        assert_eq!((pace.room(1), pace.room(4)), (3, 0), "as at first");
        pace.answered(GROWN_BYTES_MAX, QUICK);
        assert_eq!(pace.room(0), 32);
    }
}
