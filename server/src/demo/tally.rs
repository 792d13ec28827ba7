//! Owns the account of one route by sequence numbers: what was acknowledged, what was seen, what is missing.

/// Highest sequence number that is counted; a number costs one byte.
pub(super) const SEQUENCE_MAX: u64 = 100_000_000;

const PUBLISHED: u8 = 1;
const ACKNOWLEDGED: u8 = 2;
const SEEN: u8 = 4;

/// The account of one route. Sequence numbers are those of its one sender, counted from 0.
#[derive(Debug, Default)]
pub(super) struct Tally {
    marks: Vec<u8>,
    totals: Totals,
    highest_acknowledged: Option<u64>,
    highest_seen: Option<u64>,
}

/// The totals of an account.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Totals {
    /// Messages given to the client for sending, each counted once.
    pub(super) published: u64,
    /// Messages that the hub acknowledged.
    pub(super) acknowledged: u64,
    /// Messages that arrived, each counted once.
    pub(super) seen: u64,
    /// Arrivals, repeated ones included.
    pub(super) arrivals: u64,
    /// Messages that arrived first behind a later one.
    pub(super) order_breaks: u64,
    /// Acknowledged messages that have not arrived.
    pub(super) missing: u64,
    /// Arrivals with a number that was never published.
    pub(super) strange: u64,
}

impl Totals {
    /// Arrivals beyond the first of each message.
    pub(super) fn duplicates(&self) -> u64 {
        self.arrivals - self.seen
    }

    /// Published messages that the hub has not acknowledged.
    pub(super) fn unacknowledged(&self) -> u64 {
        self.published - self.acknowledged
    }
}

impl Tally {
    /// The sender is about to publish this message.
    pub(super) fn publish(&mut self, sequence: u64) {
        if self.mark(sequence, PUBLISHED).is_some_and(|before| before & PUBLISHED == 0) {
            self.totals.published += 1;
        }
    }

    /// The hub acknowledged this message.
    pub(super) fn acknowledge(&mut self, sequence: u64) {
        let Some(before) = self.mark(sequence, ACKNOWLEDGED) else { return };
        if before & ACKNOWLEDGED == 0 {
            self.totals.acknowledged += 1;
            self.totals.missing += u64::from(before & SEEN == 0);
            self.highest_acknowledged = self.highest_acknowledged.max(Some(sequence));
        }
    }

    /// This message arrived.
    pub(super) fn see(&mut self, sequence: u64) {
        let published = usize::try_from(sequence).ok().and_then(|index| self.marks.get(index));
        if published.is_none_or(|mark| mark & PUBLISHED == 0) {
            self.totals.strange += 1;
            return;
        }
        self.totals.arrivals += 1;
        let Some(before) = self.mark(sequence, SEEN) else { return };
        if before & SEEN == 0 {
            self.totals.seen += 1;
            self.totals.missing -= u64::from(before & ACKNOWLEDGED != 0);
            self.totals.order_breaks +=
                u64::from(self.highest_seen.is_some_and(|highest| highest > sequence));
            self.highest_seen = self.highest_seen.max(Some(sequence));
        }
    }

    /// The totals so far.
    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    /// The highest number that was acknowledged.
    pub(super) fn highest_acknowledged(&self) -> Option<u64> {
        self.highest_acknowledged
    }

    /// Acknowledged messages up to and including this number that have not arrived.
    pub(super) fn missing_up_to(&self, sequence: u64) -> u64 {
        let end = usize::try_from(sequence).map_or(usize::MAX, |index| index.saturating_add(1));
        let held = |mark: &&u8| **mark & (ACKNOWLEDGED | SEEN) == ACKNOWLEDGED;
        self.marks.iter().take(end).filter(held).count() as u64
    }

    /// The first acknowledged messages that have not arrived, at most `count_max`.
    pub(super) fn first_missing(&self, count_max: usize) -> Vec<usize> {
        let held = |(_, mark): &(usize, &u8)| **mark & (ACKNOWLEDGED | SEEN) == ACKNOWLEDGED;
        self.marks.iter().enumerate().filter(held).map(|(sequence, _)| sequence).take(count_max).collect()
    }

    /// Sets a mark and returns the marks before; `None` for a number beyond [`SEQUENCE_MAX`].
    fn mark(&mut self, sequence: u64, mark: u8) -> Option<u8> {
        if sequence > SEQUENCE_MAX {
            return None;
        }
        let index = usize::try_from(sequence).ok()?;
        if self.marks.len() <= index {
            self.marks.resize(index + 1, 0);
        }
        let before = self.marks[index];
        self.marks[index] = before | mark;
        Some(before)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn tally(published: u64) -> Tally {
        let mut tally = Tally::default();
        (0..published).for_each(|sequence| tally.publish(sequence));
        tally
    }

    #[test]
    fn an_acknowledged_message_is_missing_until_it_is_seen() {
        let mut tally = tally(4);
        [0, 1, 2].into_iter().for_each(|sequence| tally.acknowledge(sequence));
        [0, 2].into_iter().for_each(|sequence| tally.see(sequence));
        assert_eq!(tally.totals().missing, 1);
        assert_eq!(tally.totals().unacknowledged(), 1);
        assert_eq!(tally.first_missing(9), [1]);
        assert_eq!(
            (tally.missing_up_to(0), tally.missing_up_to(1), tally.missing_up_to(u64::MAX)),
            (0, 1, 1)
        );
        tally.see(1);
        assert_eq!(tally.totals().missing, 0);
        assert_eq!(tally.totals().order_breaks, 1, "1 came first behind 2");
    }

    #[test]
    fn a_message_that_is_seen_before_its_acknowledgement_is_not_missing() {
        let mut tally = tally(1);
        tally.see(0);
        tally.acknowledge(0);
        tally.acknowledge(0);
        let totals = tally.totals();
        assert_eq!((totals.acknowledged, totals.seen, totals.missing), (1, 1, 0));
    }

    #[test]
    fn repeats_are_duplicates_and_break_no_order() {
        let mut tally = tally(4);
        [0, 1, 2, 1, 2, 3].into_iter().for_each(|sequence| tally.see(sequence));
        let totals = tally.totals();
        assert_eq!((totals.seen, totals.duplicates(), totals.order_breaks), (4, 2, 0));
    }

    #[test]
    fn numbers_that_nobody_published_are_strange() {
        let mut tally = tally(1);
        [1, SEQUENCE_MAX, u64::MAX].into_iter().for_each(|sequence| tally.see(sequence));
        assert_eq!((tally.totals().strange, tally.totals().arrivals), (3, 0));
    }

    proptest! {
        #[test]
        fn the_totals_are_those_of_plain_sets(events in prop::collection::vec((any::<bool>(), 0u64..40), 0..200)) {
            let mut tally = tally(40);
            let (mut acknowledged, mut seen, mut arrivals) = (BTreeSet::new(), Vec::new(), 0);
            for (is_arrival, sequence) in events {
                if is_arrival {
                    tally.see(sequence);
                    arrivals += 1;
                    if !seen.contains(&sequence) {
                        seen.push(sequence);
                    }
                } else {
                    tally.acknowledge(sequence);
                    acknowledged.insert(sequence);
                }
            }
            let breaks = (0..seen.len()).filter(|at| seen[..*at].iter().any(|before| *before > seen[*at])).count();
            let missing: Vec<usize> =
                acknowledged.iter().filter(|sequence| !seen.contains(sequence)).map(|s| *s as usize).collect();
            let expected = Totals {
                published: 40,
                acknowledged: acknowledged.len() as u64,
                seen: seen.len() as u64,
                arrivals,
                order_breaks: breaks as u64,
                missing: missing.len() as u64,
                strange: 0,
            };
            prop_assert_eq!(tally.totals(), expected);
            prop_assert_eq!(tally.first_missing(usize::MAX), missing);
            prop_assert_eq!(tally.highest_acknowledged(), acknowledged.last().copied());
        }
    }
}
