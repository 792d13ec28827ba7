//! What local identities want of the upstream, over all connections, and when those whose links failed come back.

use std::collections::BTreeSet;

use ahash::AHashMap;
use tokio::time::Instant;

use super::control::{ControlError, Wanted};
use super::lanes::LaneId;
use crate::delivery::{Backoff, BackoffOptions};

/// What is kept of one identity.
struct Standing {
    wanted: Wanted,
    backoff: Backoff,
    /// Until when what failed is not tried again; with a reason when nothing at all is.
    parked: Option<(Instant, Option<ControlError>)>,
}

/// The wants of all identities. Bounded by the identities that the hub lets in.
pub(super) struct Wants {
    standings: AHashMap<LaneId, Standing>,
    /// When parked identities come back, in order of time.
    wakes: BTreeSet<(Instant, LaneId)>,
    backoff: BackoffOptions,
}

impl Wants {
    pub(super) fn new(backoff: BackoffOptions) -> Self {
        Self { standings: AHashMap::new(), wakes: BTreeSet::new(), backoff }
    }

    /// What an identity wants from now on; whether that is something else than before.
    pub(super) fn set(&mut self, lane: LaneId, wanted: Wanted) -> bool {
        let standing = self.standing(lane);
        let changed = standing.wanted != wanted;
        standing.wanted = wanted;
        self.forget_if_plain(lane);
        changed
    }

    /// What an identity wants.
    pub(super) fn of(&self, lane: LaneId) -> Wanted {
        self.standings.get(&lane).map_or_else(Wanted::default, |standing| standing.wanted)
    }

    /// All that want something.
    pub(super) fn all(&self) -> Vec<LaneId> {
        let wanting = self.standings.iter().filter(|(_, standing)| !standing.wanted.is_nothing());
        wanting.map(|(lane, _)| *lane).collect()
    }

    /// The links of an identity failed: they are tried again after a pause. Without a reason only what failed waits,
    /// and the rest goes on.
    pub(super) fn park(&mut self, lane: LaneId, why: Option<ControlError>, now: Instant) {
        let standing = self.standing(lane);
        let until = now + standing.backoff.fail();
        if let Some((before, _)) = standing.parked.replace((until, why)) {
            self.wakes.remove(&(before, lane));
        }
        self.wakes.insert((until, lane));
    }

    /// What an identity failed for has changed: its pause ends.
    pub(super) fn end_pause(&mut self, lane: LaneId, now: Instant) {
        let parked = self.standings.get_mut(&lane).and_then(|standing| standing.parked.as_mut());
        if let Some((until, _)) = parked {
            self.wakes.remove(&(*until, lane));
            *until = now;
            self.wakes.insert((now, lane));
        }
    }

    /// Why nothing is tried for an identity at present.
    pub(super) fn parked(&self, lane: LaneId) -> Option<&ControlError> {
        self.standings.get(&lane)?.parked.as_ref()?.1.as_ref()
    }

    /// The links of an identity work: the next pause is the shortest again.
    pub(super) fn succeeded(&mut self, lane: LaneId) {
        if let Some(standing) = self.standings.get_mut(&lane) {
            standing.backoff.succeed();
            self.forget_if_plain(lane);
        }
    }

    /// When the next identity comes back.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// Identities whose pause is over.
    pub(super) fn wake(&mut self, now: Instant) -> Vec<LaneId> {
        let mut awake = Vec::new();
        while let Some((_, lane)) = self.wakes.first().filter(|(at, _)| *at <= now).copied() {
            self.wakes.pop_first();
            if let Some(standing) = self.standings.get_mut(&lane) {
                standing.parked = None;
                awake.push(lane);
            }
        }
        awake
    }

    /// How many are parked.
    pub(super) fn parked_count(&self) -> usize {
        self.wakes.len()
    }

    /// The connection is gone or new: nobody is parked any more.
    pub(super) fn reset(&mut self) {
        self.wakes.clear();
        self.standings.values_mut().for_each(|standing| standing.parked = None);
    }

    fn standing(&mut self, lane: LaneId) -> &mut Standing {
        let backoff = self.backoff;
        self.standings.entry(lane).or_insert_with(|| Standing {
            wanted: Wanted::default(),
            backoff: Backoff::with(backoff),
            parked: None,
        })
    }

    /// Who wants nothing and never failed needs no place.
    fn forget_if_plain(&mut self, lane: LaneId) {
        let plain = self.standings.get(&lane).is_some_and(|standing| {
            standing.wanted.is_nothing() && standing.parked.is_none() && standing.backoff.failures() == 0
        });
        if plain {
            self.standings.remove(&lane);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_failed_comes_back_after_its_pause_or_with_a_new_connection() {
        let mut wants = Wants::new(BackoffOptions::default());
        let (now, lane) = (Instant::now(), LaneId::new(3));
        let methods = Wanted { methods: true, ..Wanted::default() };
        assert!(wants.set(lane, methods));
        assert!(!wants.set(lane, methods));
        wants.park(lane, Some(ControlError::Offline), now);
        assert_eq!(wants.parked(lane), Some(&ControlError::Offline));
        let first = wants.next_wake().unwrap();
        wants.park(lane, None, first);
        assert_eq!(wants.parked(lane), None);
        assert_eq!(wants.parked_count(), 1);
        assert!(wants.wake(first).is_empty());
        let second = wants.next_wake().unwrap();
        assert_eq!(wants.wake(second), [lane]);
        wants.park(lane, Some(ControlError::Timeout), now);
        wants.reset();
        assert_eq!((wants.parked(lane), wants.parked_count()), (None, 0));
        assert_eq!(wants.all(), [lane]);
        wants.succeeded(lane);
        assert!(wants.set(lane, Wanted::default()));
        assert!(wants.standings.is_empty() && wants.all().is_empty());
    }
}
