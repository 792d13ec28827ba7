//! Owns keyed changes in a write, and those that wait for the end of a full disk: the reserve is given back when a
//! write finds the disk full, but the engine comes to use it within seconds only.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Writer;
use super::stage::Draft;
use crate::engine::Family;
use crate::error::StoreError;
use crate::intake::Done;
use crate::keyed::Change;

/// Keyed changes wait at most this long for room; then they are refused.
const PATIENCE: Duration = if cfg!(test) { Duration::from_millis(600) } else { Duration::from_secs(15) };
/// Keys and values that wait, in bytes; beyond it changes are refused at once.
const WAITING_BYTES_MAX: usize = 16 << 20;

/// Changes that are made together, and who waits for them.
#[derive(Debug)]
pub(super) struct KeyedWork {
    changes: Vec<Change>,
    since: Instant,
    done: Done,
}

impl KeyedWork {
    pub(super) fn new(changes: Vec<Change>, done: Done) -> Self {
        Self { changes, since: Instant::now(), done }
    }

    fn bytes(&self) -> usize {
        let bytes = |change: &Change| change.key.len() + change.value.as_ref().map_or(0, Bytes::len);
        self.changes.iter().map(bytes).sum()
    }
}

impl Writer {
    pub(super) fn stage_keyed(&self, draft: &mut Draft, works: &[KeyedWork]) {
        draft.awaited |= !works.is_empty();
        for change in works.iter().flat_map(|work| &work.changes) {
            draft.changed = true;
            match &change.value {
                Some(value) => self.engine.put(&mut draft.batch, Family::State, &change.key, &[], value),
                None => self.engine.delete(&mut draft.batch, Family::State, &change.key),
            }
        }
    }

    /// Answers what was written; what met a full disk is tried again, in its order, before anything newer.
    pub(super) fn complete_keyed(&mut self, works: Vec<KeyedWork>, written: Result<(), StoreError>) {
        let full = matches!(written, Err(StoreError::Full { .. }));
        let (mut answered, mut waiting_bytes) = (Vec::new(), 0);
        for work in works {
            waiting_bytes += work.bytes();
            if full && work.since.elapsed() < PATIENCE && waiting_bytes <= WAITING_BYTES_MAX {
                self.keyed_waiting.push(work);
            } else {
                answered.push(work.done);
            }
        }
        let done = written.is_ok();
        self.complete(answered, written, done);
    }
}
