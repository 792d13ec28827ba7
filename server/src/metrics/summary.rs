//! Owns one rolling summary: sum and count since the start, quantiles over a sliding window.

use std::time::Duration;

use parking_lot::Mutex;

use super::Clock;
use super::sketch::Sketch;

/// The window is this many sub-windows, of which the oldest is forgotten at a time.
const SUB_WINDOWS: usize = 5;

/// A summary series. Recording takes one uncontended lock and no allocation in the steady state.
pub(super) struct Summary {
    clock: Clock,
    sub_window_millis: u64,
    state: Mutex<State>,
}

/// What a summary shows at a moment.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) count: u64,
    pub(super) sum: f64,
    pub(super) quantiles: Vec<(f64, f64)>,
}

struct State {
    count: u64,
    sum: f64,
    ring: [SubWindow; SUB_WINDOWS],
}

#[derive(Default)]
struct SubWindow {
    /// Number of the sub-window since the clock began, from 1; 0 = never used.
    turn: u64,
    sketch: Sketch,
}

impl Summary {
    pub(super) fn new(clock: Clock, window: Duration) -> Self {
        let sub_window_millis = (window.as_millis() as u64 / SUB_WINDOWS as u64).max(1_000);
        let state = State { count: 0, sum: 0.0, ring: std::array::from_fn(|_| SubWindow::default()) };
        Self { clock, sub_window_millis, state: Mutex::new(state) }
    }

    /// Values recorded since the start.
    pub(super) fn count(&self) -> u64 {
        self.state.lock().count
    }

    pub(super) fn snapshot(&self, quantiles: &[f64]) -> Snapshot {
        let now = self.turn();
        let state = self.state.lock();
        let mut merged = Sketch::default();
        for sub_window in &state.ring {
            if sub_window.turn + SUB_WINDOWS as u64 > now {
                merged.merge(&sub_window.sketch);
            }
        }
        let (count, sum) = (state.count, state.sum);
        drop(state);
        let quantiles = quantiles.iter().map(|quantile| (*quantile, merged.quantile(*quantile))).collect();
        Snapshot { count, sum, quantiles }
    }

    /// Number of the present sub-window, from 1.
    fn turn(&self) -> u64 {
        (self.clock)().as_millis() as u64 / self.sub_window_millis + 1
    }
}

impl metrics::HistogramFn for Summary {
    fn record(&self, value: f64) {
        self.record_many(value, 1);
    }

    fn record_many(&self, value: f64, times: usize) {
        if value.is_nan() {
            return;
        }
        let turn = self.turn();
        let mut state = self.state.lock();
        state.count += times as u64;
        state.sum += value * times as f64;
        let sub_window = &mut state.ring[(turn % SUB_WINDOWS as u64) as usize];
        if sub_window.turn != turn {
            sub_window.turn = turn;
            sub_window.sketch.clear();
        }
        sub_window.sketch.add(value, u32::try_from(times).unwrap_or(u32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use metrics::HistogramFn as _;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn values_leave_the_window_and_stay_in_sum_and_count() {
        let now_secs = Arc::new(AtomicU64::new(0));
        let hand = Arc::clone(&now_secs);
        let clock: Clock = Arc::new(move || Duration::from_secs(hand.load(Ordering::Relaxed)));
        let summary = Summary::new(clock, Duration::from_secs(600));
        let median = || summary.snapshot(&[0.5]).quantiles[0].1;
        assert!(median().is_nan());
        summary.record_many(10.0, 3);
        now_secs.store(130, Ordering::Relaxed);
        summary.record(1000.0);
        assert!((median() - 10.0).abs() <= 0.1);
        now_secs.store(599, Ordering::Relaxed);
        assert!((median() - 10.0).abs() <= 0.1, "still inside the window");
        now_secs.store(601, Ordering::Relaxed);
        assert!((median() - 1000.0).abs() <= 10.0, "the first sub-window is over");
        now_secs.store(5_000, Ordering::Relaxed);
        assert!(median().is_nan());
        summary.record(7.0);
        assert!((median() - 7.0).abs() <= 0.07, "a sub-window is reused");
        let end = summary.snapshot(&[]);
        assert_eq!((end.count, end.sum), (5, 1037.0));
        summary.record(f64::NAN);
        assert_eq!(summary.count(), 5);
    }
}
