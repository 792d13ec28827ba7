//! The share of a reader's messages that less urgent queues are guaranteed.

/// Largest share in percent; the most urgent queue is left at least as much as the rest.
pub const LOWER_SHARE_PERCENT_MAX: u8 = 50;

/// Messages that less urgent queues may be owed, so that a long wait does not turn the order around.
const OWED_MESSAGES_MAX: u32 = 64;

/// Keeps account of what less urgent queues are owed. With a share of 0 they get what more urgent ones leave.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    percent: u32,
    /// In hundredths of a message that an urgent queue took; one message of a less urgent one costs the remainder
    /// of the percentage to a hundred.
    owed: u32,
    /// Which of the less urgent queues had its turn last.
    turn: usize,
}

impl Share {
    /// A share in percent, at most [`LOWER_SHARE_PERCENT_MAX`].
    pub(crate) fn new(percent: u8) -> Self {
        Self { percent: u32::from(percent.min(LOWER_SHARE_PERCENT_MAX)), owed: 0, turn: 0 }
    }

    /// Whether any share is guaranteed.
    pub(crate) fn is_guaranteed(&self) -> bool {
        self.percent > 0
    }

    /// How many messages less urgent queues may have before the more urgent.
    pub(crate) fn due(&self) -> usize {
        if self.percent == 0 { 0 } else { (self.owed / (100 - self.percent)) as usize }
    }

    /// An urgent queue took messages while less urgent ones had some.
    pub(crate) fn passed_over(&mut self, messages: usize) {
        let taken = u32::try_from(messages).unwrap_or(u32::MAX);
        let most = OWED_MESSAGES_MAX * (100 - self.percent);
        self.owed = self.owed.saturating_add(taken.saturating_mul(self.percent)).min(most);
    }

    /// A less urgent queue took messages that were due.
    pub(crate) fn granted(&mut self, messages: usize) {
        let taken = u32::try_from(messages).unwrap_or(u32::MAX);
        self.owed = self.owed.saturating_sub(taken.saturating_mul(100 - self.percent));
    }

    /// The order in which `queues` less urgent queues are asked now: each is first in its turn.
    pub(crate) fn turns(&mut self, queues: usize) -> impl Iterator<Item = usize> + use<> {
        self.turn = self.turn.wrapping_add(1);
        let first = self.turn;
        (0..queues).map(move |step| first.wrapping_add(step) % queues)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_kept_over_time() {
        for percent in [0, 1, 20, 33, 50] {
            let mut share = Share::new(percent);
            let (mut urgent, mut lower) = (0usize, 0usize);
            while urgent + lower < 100_000 {
                match share.due() {
                    0 => {
                        share.passed_over(1);
                        urgent += 1;
                    }
                    due => {
                        share.granted(due);
                        lower += due;
                    }
                }
            }
            assert_eq!(lower * 100 / (urgent + lower), usize::from(percent), "{percent}");
        }
    }

    #[test]
    fn what_is_owed_is_bounded() {
        let mut share = Share::new(50);
        share.passed_over(1_000_000);
        assert_eq!(share.due(), OWED_MESSAGES_MAX as usize);
    }

    #[test]
    fn queues_take_turns() {
        let mut share = Share::new(10);
        let first: Vec<usize> = share.turns(3).collect();
        let second: Vec<usize> = share.turns(3).collect();
        assert_ne!(first[0], second[0]);
        assert_eq!(first.len(), 3);
    }
}
