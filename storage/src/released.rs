//! Owns what was released since the engine was last compacted: per queue, and of the log, one range each.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::engine::{Family, Range};

/// Released ranges; those of one queue grow into one, which is harmless, as live keys only cost time there.
#[derive(Debug, Default)]
pub(crate) struct Released {
    ranges: Mutex<BTreeMap<(Family, Vec<u8>), Range>>,
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

    pub(crate) fn take(&self) -> Vec<Range> {
        std::mem::take(&mut *self.ranges.lock()).into_values().collect()
    }
}
