//! A limit for warnings that a client can provoke, so that a log cannot be flooded from the network.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Warnings of one kind within one [`WINDOW`].
const WARNINGS_MAX: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

/// Lets a few warnings of one kind through per window and counts the others. Meant for a `static`.
pub(crate) struct WarnLimit {
    state: Mutex<State>,
}

struct State {
    window_start: Option<Instant>,
    admitted: u32,
    suppressed: u64,
}

impl WarnLimit {
    pub(crate) const fn new() -> Self {
        Self { state: Mutex::new(State { window_start: None, admitted: 0, suppressed: 0 }) }
    }

    /// Whether to warn now; the number tells how many warnings were kept back since the last one.
    pub(crate) fn admit(&self) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.state.lock();
        if state.window_start.is_none_or(|start| now.duration_since(start) >= WINDOW) {
            state.window_start = Some(now);
            state.admitted = 0;
        }
        if state.admitted == WARNINGS_MAX {
            state.suppressed += 1;
            return None;
        }
        state.admitted += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_cut() {
        let limit = WarnLimit::new();
        let admitted = (0..100).filter(|_| limit.admit().is_some()).count();
        assert_eq!(admitted, WARNINGS_MAX as usize);
        assert_eq!(limit.state.lock().suppressed, 100 - u64::from(WARNINGS_MAX));
    }
}
