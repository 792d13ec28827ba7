//! What a way up has come to so far, as the supervisor asks it at each turn and at its end.

use std::time::Duration;

use tokio::time::Instant;

/// How far one way up has come, from its first stream to its end.
#[derive(Debug, Default)]
pub(super) struct Progress {
    up: bool,
    newly_up: bool,
    /// A message was delivered.
    pub(super) delivered: bool,
    /// A request was answered, or something came from the cloud.
    pub(super) worked: bool,
    /// The upstream refused the hub's own token.
    pub(super) token_refused: bool,
    /// The watchdog wants another address of the name for the next way.
    pub(super) other_address: bool,
    /// What the upstream said when it asked for a pause, and until when that counts.
    throttled: Option<(String, Instant)>,
}

impl Progress {
    /// Whether the upstream has accepted the hub's own token.
    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    /// The upstream accepts the hub's own token.
    pub(super) fn rise(&mut self) {
        self.newly_up |= !self.up;
        self.up = true;
    }

    /// Whether it has come up since this was asked last.
    pub(super) fn take_up(&mut self) -> bool {
        std::mem::take(&mut self.newly_up)
    }

    /// A message was delivered: whatever pause was asked for is over.
    pub(super) fn delivered(&mut self) {
        self.delivered = true;
        self.throttled = None;
    }

    /// The upstream asked for a pause of this length. That counts until a message is delivered, or the next attempt had
    /// its time, which is `answer_max`.
    pub(super) fn throttled_for(&mut self, reason: String, pause: Duration, answer_max: Duration) {
        self.throttled = Some((reason, Instant::now() + pause + answer_max));
    }

    /// Why the upstream asked for a pause, while it does.
    pub(super) fn throttled(&self, now: Instant) -> Option<&str> {
        self.throttled.as_ref().filter(|(_, until)| now < *until).map(|(reason, _)| reason.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pause_counts_until_the_next_attempt_had_its_time_or_a_message_is_delivered() {
        let (pause, answer_max) = (Duration::from_secs(10), Duration::from_secs(5));
        let mut progress = Progress::default();
        progress.throttled_for("quota".into(), pause, answer_max);
        let asked_at = Instant::now();
        assert_eq!(progress.throttled(asked_at + Duration::from_secs(14)), Some("quota"));
        assert_eq!(progress.throttled(asked_at + Duration::from_secs(15)), None);
        progress.delivered();
        assert_eq!(progress.throttled(asked_at), None);
    }

    #[test]
    fn it_comes_up_once() {
        let mut progress = Progress::default();
        assert!(!progress.take_up());
        progress.rise();
        progress.rise();
        assert!(progress.is_up() && progress.take_up() && !progress.take_up() && progress.is_up());
    }
}
