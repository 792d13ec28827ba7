//! The pause before a retry.

use std::time::Duration;

/// Longest pause, unless options say otherwise.
pub const PAUSE_SECS_MAX: u64 = 60;

/// How long pauses are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackoffOptions {
    /// The first pause, and the unit in which pauses grow.
    pub first: Duration,
    /// The longest pause.
    pub max: Duration,
}

impl Default for BackoffOptions {
    fn default() -> Self {
        Self { first: Duration::from_secs(1), max: Duration::from_secs(PAUSE_SECS_MAX) }
    }
}

/// Pauses of `min((1 + (2^n − 1) × r) × first, max)`, r random in 0.8 to 1.2, for the n-th retry in a row.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    options: BackoffOptions,
    failures: u32,
}

impl Backoff {
    /// Starts with the shortest pause.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with other pauses.
    pub fn with(options: BackoffOptions) -> Self {
        Self { options, failures: 0 }
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Counts a failure and tells how long to pause.
    pub fn fail(&mut self) -> Duration {
        let growth = f64::from((1u32 << self.failures.min(16)) - 1);
        self.failures = self.failures.saturating_add(1);
        let jitter = 0.8 + 0.4 * fastrand::f64();
        let BackoffOptions { first, max } = self.options;
        Duration::from_secs_f64((first.as_secs_f64() * (1.0 + growth * jitter)).min(max.as_secs_f64()))
    }

    /// A success: the next failure starts with the shortest pause again.
    pub fn succeed(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_minute_and_start_anew_after_a_success() {
        let mut backoff = Backoff::new();
        assert_eq!(backoff.fail(), Duration::from_secs(1));
        let second = backoff.fail();
        assert!(second >= Duration::from_millis(1_800) && second <= Duration::from_millis(2_200));
        for _ in 0..100 {
            assert!(backoff.fail() <= Duration::from_secs(PAUSE_SECS_MAX));
        }
        assert_eq!(backoff.fail(), Duration::from_secs(PAUSE_SECS_MAX));
        backoff.succeed();
        assert_eq!(backoff.fail(), Duration::from_secs(1));
    }
}
