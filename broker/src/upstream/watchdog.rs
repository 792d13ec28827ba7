//! The watchdog over progress: who gets on, who does not, and how far up to start anew: the link, the session, the
//! connection, and at last the connection by way of another address of the name.
//!
//! One identity that gets nowhere climbs as far as its session. Only when nothing on the whole connection got on since
//! it began to stall is the connection given up, and when the next one gets on no better, so is its address.

use std::collections::BTreeMap;

use ahash::AHashMap;
use metrics::counter;
use serde::Serialize;
use tokio::time::Instant;

use super::lanes::LaneId;

/// What is done anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WatchdogStep {
    /// The link of an identity.
    Link,
    /// The session of an identity, with all its links.
    Session,
    /// The connection.
    Connection,
    /// The connection, to another address of the name if it has one.
    Name,
}

impl WatchdogStep {
    /// Its name in metrics, as in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            WatchdogStep::Link => "link",
            WatchdogStep::Session => "session",
            WatchdogStep::Connection => "connection",
            WatchdogStep::Name => "name",
        }
    }
}

/// What did not get on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stall {
    /// The upstream does not answer a transfer.
    Unanswered,
    /// The upstream gives no credit to what waits.
    NoCredit,
    /// The upstream does not answer the begin of a session or the attach of a link.
    NotAttached,
    /// The upstream does not answer twin requests.
    TwinUnanswered,
}

impl Stall {
    /// Its name in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Stall::Unanswered => "transfer_unanswered",
            Stall::NoCredit => "no_credit",
            Stall::NotAttached => "link_unanswered",
            Stall::TwinUnanswered => "twin_unanswered",
        }
    }

    /// A sentence for people.
    pub(super) fn text(self) -> &'static str {
        match self {
            Stall::Unanswered => "a transfer was not answered",
            Stall::NoCredit => "the link gives no credit",
            Stall::NotAttached => "the link was not attached",
            Stall::TwinUnanswered => "a twin request was not answered",
        }
    }

    /// The smallest step that can help.
    fn first_step(self) -> WatchdogStep {
        match self {
            Stall::Unanswered | Stall::NoCredit | Stall::TwinUnanswered => WatchdogStep::Link,
            Stall::NotAttached => WatchdogStep::Session,
        }
    }
}

/// Watches all identities, over all connections.
#[derive(Debug, Default)]
pub(super) struct Watchdog {
    /// Steps taken for an identity since it last got on, and when the first was.
    strikes: AHashMap<LaneId, (u32, Instant)>,
    /// When anything on the connection last got on.
    progressed_at: Option<Instant>,
    /// Connections given up since then.
    connections: u32,
    steps: BTreeMap<WatchdogStep, u64>,
}

impl Watchdog {
    /// Something of an identity was settled or answered.
    pub(super) fn progressed(&mut self, lane: LaneId, now: Instant) {
        self.strikes.remove(&lane);
        self.progressed_at = Some(now);
        self.connections = 0;
    }

    /// Something of an identity did not get on for as long as it may take; says what to do anew.
    pub(super) fn stalled(&mut self, lane: LaneId, stall: Stall, now: Instant) -> WatchdogStep {
        let (strikes, since) = self.strikes.entry(lane).or_insert((0, now));
        *strikes += 1;
        let nothing_since = self.progressed_at.is_none_or(|at| at < *since);
        let climbed = match *strikes {
            1 => WatchdogStep::Link,
            2 => WatchdogStep::Session,
            _ if !nothing_since => WatchdogStep::Session,
            _ if self.connections == 0 => WatchdogStep::Connection,
            _ => WatchdogStep::Name,
        };
        let step = climbed.max(stall.first_step());
        if step >= WatchdogStep::Connection {
            self.connections += 1;
            self.strikes.clear();
        }
        *self.steps.entry(step).or_insert(0) += 1;
        counter!(
            "edgehub_upstream_watchdog_total", "step" => step.as_str(), "reason" => stall.as_str()
        )
        .increment(1);
        step
    }

    /// How often each step was taken since the start.
    pub(super) fn steps(&self) -> &BTreeMap<WatchdogStep, u64> {
        &self.steps
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn seconds(at: Instant, secs: u64) -> Instant {
        at + Duration::from_secs(secs)
    }

    #[test]
    fn what_gets_nowhere_climbs_to_the_name() {
        let (mut dog, start, lane) = (Watchdog::default(), Instant::now(), LaneId::new(0));
        let steps: Vec<WatchdogStep> =
            (0..6).map(|at| dog.stalled(lane, Stall::Unanswered, seconds(start, at))).collect();
        use WatchdogStep::{Connection, Link, Name, Session};
        assert_eq!(steps, [Link, Session, Connection, Link, Session, Name]);
        assert_eq!(dog.steps()[&Link], 2);
        dog.progressed(lane, seconds(start, 7));
        let steps: Vec<WatchdogStep> =
            (8..11).map(|at| dog.stalled(lane, Stall::NotAttached, seconds(start, at))).collect();
        assert_eq!(steps, [Session, Session, Connection], "a link that is not there cannot be made anew");
    }

    #[test]
    fn an_identity_that_stalls_alone_keeps_the_connection_of_the_others() {
        let (mut dog, start) = (Watchdog::default(), Instant::now());
        let (dead, alive) = (LaneId::new(0), LaneId::new(1));
        dog.stalled(dead, Stall::NoCredit, start);
        for at in 1..50 {
            dog.progressed(alive, seconds(start, at));
            assert_eq!(dog.stalled(dead, Stall::NoCredit, seconds(start, at)), WatchdogStep::Session);
        }
    }
}
