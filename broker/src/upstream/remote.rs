//! The far end of one lane: its session and link, and the transfers on it.

use std::collections::VecDeque;

use tokio::time::Instant;

use crate::amqp::{DeliveryId, LinkId, Outcome, SessionId};

/// The far end of a lane.
pub(super) struct Remote {
    pub(super) phase: Phase,
    /// When the phase began, or something happened on the link.
    pub(super) since: Instant,
    pub(super) session: Option<SessionId>,
    pub(super) link: Option<LinkId>,
    /// Transfers in order, and the answers of those that came early.
    pub(super) sent: VecDeque<(DeliveryId, Option<Outcome>)>,
    /// Since when messages wait for credit while nothing is under way.
    pub(super) starved_since: Option<Instant>,
}

impl Remote {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::New,
            since: Instant::now(),
            session: None,
            link: None,
            sent: VecDeque::new(),
            starved_since: None,
        }
    }

    /// The answer to the oldest transfer, once it is there.
    pub(super) fn next_answer(&mut self) -> Option<Outcome> {
        let answer = self.sent.front_mut()?.1.take()?;
        self.sent.pop_front();
        Some(answer)
    }
}

/// How far the link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was asked for yet.
    New,
    Token,
    Session,
    Attaching,
    Ready,
}
