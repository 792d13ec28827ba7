//! The re-check of what open connections have proved: at the expiry of their tokens, whenever an identity changes, and
//! every five minutes in any case.
//!
//! One task per hub does it, from what the authenticator knows without asking anybody. A connection whose credentials no
//! longer hold is closed; its client may come again with better ones.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use metrics::counter;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::authenticator::Standing;
use super::{Inner, close};
use crate::backend::{CloseReason, Login, Mailbox};
use crate::identity::Identity;

/// All connections are checked again after this long, whatever happened. A clock that was set is noticed by then.
const PERIOD: Duration = Duration::from_secs(300);
/// Least time between two checks of all connections: changes that come together are one.
const PAUSE: Duration = Duration::from_millis(500);
/// Connections that are checked without giving way to other tasks.
const CHECKED_AT_A_TIME_MAX: usize = 64;

/// What an open connection has proved.
pub(super) struct Proved {
    login: Login,
    /// Seconds since 1970 at which it holds no longer; absent when only a change can end it.
    until_secs: Option<i64>,
}

impl Proved {
    /// What it was proved with.
    pub(super) fn login(&self) -> &Login {
        &self.login
    }

    /// Seconds since 1970 at which it holds no longer; absent when only a change can end it.
    pub(super) fn until_secs(&self) -> Option<i64> {
        self.until_secs
    }
}

/// Wakes the task when a connection comes whose credentials end before those of all others.
pub(super) struct Expiries {
    /// Seconds since 1970.
    next_secs: AtomicI64,
    sooner: Notify,
}

impl Default for Expiries {
    fn default() -> Self {
        Self { next_secs: AtomicI64::new(i64::MAX), sooner: Notify::new() }
    }
}

/// One connection, copied out of the table.
struct Open {
    identity: Identity,
    connection: u64,
    mailbox: Mailbox,
    proved: Arc<Proved>,
}

impl Inner {
    /// What an accepted login has proved, and for how long.
    pub(super) fn proved(&self, login: &Login) -> Arc<Proved> {
        let until_secs = match self.authenticator.standing(login) {
            Standing::Holds { until_secs } => until_secs,
            // Changed between the login and now: looked at again at once.
            Standing::Lost(_) => Some(self.authenticator.now_secs()),
        };
        Arc::new(Proved { login: login.clone(), until_secs })
    }

    /// To be called when what was proved is in the table.
    pub(super) fn expects(&self, proved: &Proved) {
        if let Some(until_secs) = proved.until_secs
            && self.expiries.next_secs.fetch_min(until_secs, Ordering::Relaxed) > until_secs
        {
            self.expiries.sooner.notify_one();
        }
    }

    /// Checks the open connections: all of them, or only those that have come to their time.
    async fn check_open(&self, all: bool) {
        // Whatever connects from here on counts by itself.
        self.expiries.next_secs.store(i64::MAX, Ordering::Relaxed);
        let open: Vec<Open> = self
            .clients
            .iter()
            .map(|entry| Open {
                identity: entry.key().clone(),
                connection: entry.connection,
                mailbox: entry.mailbox.clone(),
                proved: entry.proved.clone(),
            })
            .collect();
        let now_secs = self.authenticator.now_secs();
        let mut next_secs = i64::MAX;
        for (index, open) in open.into_iter().enumerate() {
            let due = open.proved.until_secs.is_some_and(|until_secs| until_secs <= now_secs);
            if !all && !due {
                next_secs = next_secs.min(open.proved.until_secs.unwrap_or(i64::MAX));
                continue;
            }
            match self.authenticator.standing(&open.proved.login) {
                // A clock that was set back: what was due is not.
                Standing::Holds { until_secs } => next_secs = next_secs.min(until_secs.unwrap_or(i64::MAX)),
                Standing::Lost(reason) => self.end(open, &reason),
            }
            if (index + 1) % CHECKED_AT_A_TIME_MAX == 0 {
                tokio::task::yield_now().await;
            }
        }
        self.expiries.next_secs.fetch_min(next_secs, Ordering::Relaxed);
    }

    fn end(&self, open: Open, reason: &str) {
        let Open { identity, connection, mailbox, .. } = open;
        tracing::info!(client = %identity, connection, reason, "Client not authenticated any more");
        counter!("edgehub_credentials_ended_total", "id" => identity.to_string()).increment(1);
        close(mailbox, CloseReason::Unauthorized, &self.delivery);
    }

    /// How long until the next credentials end.
    fn until_next(&self) -> Duration {
        let next_secs = self.expiries.next_secs.load(Ordering::Relaxed);
        let secs = next_secs.saturating_sub(self.authenticator.now_secs()).max(0);
        Duration::from_secs(secs.unsigned_abs()).min(PERIOD)
    }
}

/// Checks until the hub is gone.
pub(super) async fn watch(
    hub: Weak<Inner>,
    expiries: Arc<Expiries>,
    mut changed: Option<watch::Receiver<u64>>,
) {
    let mut period_end = Instant::now() + PERIOD;
    loop {
        let Some(until_next) = hub.upgrade().map(|hub| hub.until_next()) else { return };
        let all = tokio::select! {
            () = sleep_until(period_end) => true,
            () = change(&mut changed) => true,
            () = sleep(until_next) => false,
            () = expiries.sooner.notified() => continue,
        };
        let Some(hub) = hub.upgrade() else { return };
        hub.check_open(all).await;
        drop(hub);
        if all {
            period_end = Instant::now() + PERIOD;
        }
        sleep(PAUSE).await;
    }
}

/// Returns at the next change; never when there can be none.
async fn change(changed: &mut Option<watch::Receiver<u64>>) {
    if let Some(receiver) = changed {
        if receiver.changed().await.is_ok() {
            return;
        }
        *changed = None;
    }
    std::future::pending().await
}
