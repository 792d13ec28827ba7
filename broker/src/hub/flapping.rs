//! Notices identities whose connections take over from each other again and again: two clients that use the same one.

use std::time::Duration;

use tokio::time::Instant;

/// So many take-overs within the window are no renewal of tokens or change of networks.
const TAKE_OVERS_MAX: u32 = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// The take-overs of one identity; handed from each connection to the one that replaces it.
#[derive(Debug, Clone, Copy)]
pub(super) struct TakeOvers {
    window_start: Instant,
    count: u32,
}

impl TakeOvers {
    /// Of a connection that replaced none.
    pub(super) fn none() -> Self {
        Self { window_start: Instant::now(), count: 0 }
    }

    /// Of the connection that replaces the one of `self`, and whether that is the one too many, once per window.
    pub(super) fn and_one(self) -> (Self, bool) {
        if self.window_start.elapsed() > WINDOW {
            return (Self { count: 1, ..Self::none() }, false);
        }
        let count = self.count.saturating_add(1);
        (Self { count, ..self }, count == TAKE_OVERS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn many_in_short_time_are_told_once() {
        let mut take_overs = TakeOvers::none();
        let mut told = Vec::new();
        for number in 1..=20 {
            let tell;
            (take_overs, tell) = take_overs.and_one();
            if tell {
                told.push(number);
            }
            tokio::time::advance(Duration::from_secs(5)).await;
        }
        // One window of 60 s holds twelve; the next begins with the thirteenth or fourteenth.
        assert_eq!(told, [5, 18]);
        for _ in 0..20 {
            tokio::time::advance(Duration::from_secs(20)).await;
            let tell;
            (take_overs, tell) = take_overs.and_one();
            assert!(!tell, "three in a minute are none too many");
        }
    }
}
