//! Owns what was released since the engine was last compacted: per queue, and of the log, one range each.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::engine::{Engine, Family, Range};

/// Released ranges; those of one queue grow into one, which is harmless, as live keys only cost time there.
#[derive(Debug, Default)]
pub(crate) struct Released {
    ranges: Mutex<BTreeMap<(Family, Vec<u8>), Range>>,
    /// Held while the engine is compacted; the only lock of the store that is held during I/O.
    compacting: Mutex<()>,
}

impl Released {
    pub(crate) fn add(&self, range: Range) {
        let queue = match range.family {
            Family::Reference => range.from.get(..4).unwrap_or_default().to_vec(),
            Family::Log | Family::Meta | Family::State => Vec::new(),
        };
        let mut ranges = self.ranges.lock();
        match ranges.get_mut(&(range.family, queue.clone())) {
            Some(known) => {
                known.from = std::mem::take(&mut known.from).min(range.from);
                known.to = std::mem::take(&mut known.to).max(range.to);
            }
            None => {
                ranges.insert((range.family, queue), range);
            }
        }
    }

    /// Lets the engine give back what was released, also in the log ahead of the tables. Waits for another thread
    /// that does so. False if nothing was released, and nobody was at it.
    pub(crate) fn give_back(&self, engine: &Engine, always: bool) -> bool {
        let (_held, waited) = match self.compacting.try_lock() {
            Some(held) => (held, false),
            None => (self.compacting.lock(), true),
        };
        let ranges: Vec<Range> = std::mem::take(&mut *self.ranges.lock()).into_values().collect();
        if ranges.is_empty() && !always {
            return waited;
        }
        engine.compact(&ranges);
        true
    }
}
