//! Whose turn it is to send: lanes by the rank of what they would send, in fair turns within a rank.

use std::collections::{BTreeMap, VecDeque};

use ahash::AHashMap;

use super::lanes::LaneId;

/// Lanes that may have something to send, each once.
#[derive(Debug, Default)]
pub(super) struct Turns {
    by_rank: BTreeMap<u32, VecDeque<LaneId>>,
    /// Where each lane waits. An entry of `by_rank` that differs was left behind when its lane became more urgent.
    places: AHashMap<LaneId, u32>,
}

impl Turns {
    /// The lane has something of this rank to send. One that waits already moves only to a more urgent rank.
    pub(super) fn add(&mut self, lane: LaneId, rank: u32) {
        let waits = self.places.get(&lane).is_some_and(|place| *place <= rank);
        if !waits {
            self.places.insert(lane, rank);
            self.by_rank.entry(rank).or_default().push_back(lane);
        }
    }

    /// The next lane; `rank` tells what each has to send by now, if anything.
    pub(super) fn next(&mut self, rank: impl Fn(LaneId) -> Option<u32>) -> Option<LaneId> {
        loop {
            let mut first = self.by_rank.first_entry()?;
            let place = *first.key();
            let Some(lane) = first.get_mut().pop_front() else {
                first.remove();
                continue;
            };
            if self.places.get(&lane) != Some(&place) {
                continue;
            }
            self.places.remove(&lane);
            match rank(lane) {
                Some(now) if now <= place => return Some(lane),
                // What was more urgent has gone meanwhile.
                Some(now) => self.add(lane, now),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_urgent_goes_first_and_equals_take_turns() {
        let lanes: Vec<LaneId> = (0..4).map(LaneId::new).collect();
        let ranks = |lane: LaneId| [Some(5), Some(1), Some(5), None][lane.index()];
        let mut turns = Turns::default();
        for lane in &lanes {
            turns.add(*lane, 9);
            turns.add(*lane, ranks(*lane).unwrap_or(0));
        }
        let mut order = Vec::new();
        while let Some(lane) = turns.next(ranks) {
            order.push(lane.index());
            if order.len() < 6 {
                turns.add(lane, ranks(lane).unwrap_or(0));
            }
            if order.len() == 2 {
                // The urgent one has nothing more.
                turns.places.remove(&lanes[1]);
            }
        }
        assert_eq!(order, [1, 1, 0, 2, 0, 2, 0]);
    }

    #[test]
    fn a_lane_that_became_less_urgent_waits_with_its_equals() {
        let mut turns = Turns::default();
        turns.add(LaneId::new(0), 0);
        turns.add(LaneId::new(1), 5);
        assert_eq!(turns.next(|lane| Some(if lane.index() == 0 { 9 } else { 5 })), Some(LaneId::new(1)));
        assert_eq!(turns.next(|_| Some(9)), Some(LaneId::new(0)));
        assert_eq!(turns.next(|_| Some(9)), None);
    }
}
