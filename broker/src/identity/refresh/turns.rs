//! The last single refresh of each identity: logins of one identity take turns, and ask once per interval.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::super::name::Identity;

/// Identities whose last single refresh is remembered.
pub const REMEMBERED_REFRESHES_MAX: usize = 4_096;

/// The turns of all identities that were asked for not long ago.
#[derive(Default)]
pub(super) struct Turns {
    turns: DashMap<Identity, Arc<Turn>, ahash::RandomState>,
}

/// The turn of one identity; held while the upstream is asked.
#[derive(Default)]
pub(super) struct Turn {
    pub(super) last: Mutex<Option<Last>>,
}

/// A single refresh.
#[derive(Debug, Clone, Copy)]
pub(super) struct Last {
    pub(super) at: Instant,
    /// Whether the upstream gave no answer, or not yet.
    pub(super) failed: bool,
}

impl Turns {
    /// The turn of an identity; absent when too many are remembered that were asked for less than `delay` ago.
    pub(super) fn of(&self, identity: &Identity, delay: Duration) -> Option<Arc<Turn>> {
        if let Some(turn) = self.turns.get(identity) {
            return Some(turn.value().clone());
        }
        if self.turns.len() >= REMEMBERED_REFRESHES_MAX {
            self.turns.retain(|_, turn| match turn.last.try_lock() {
                Ok(last) => last.is_some_and(|last| last.at.elapsed() < delay),
                Err(_) => true,
            });
            if self.turns.len() >= REMEMBERED_REFRESHES_MAX {
                return None;
            }
        }
        Some(self.turns.entry(identity.clone()).or_default().value().clone())
    }
}
