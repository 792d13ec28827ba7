//! How often the cloud is asked to judge tokens: anybody can come with a wrong one, and each question is a connection.
//!
//! Questions of one identity take turns, so that one token is asked for once. A token that was refused is remembered for a
//! while, and an identity that came with several wrong ones is not asked for again until then. Over all identities the
//! refused questions are bounded per time; those that end well cost nothing of that, so that many good clients may come at
//! once. After a question without an answer nobody asks for a moment.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::super::client_tokens::Digest;
use super::ProofError;
use crate::backend::LoginError;
use crate::identity::Identity;

/// Questions under way at a time.
pub const QUESTIONS_MAX: usize = 8;

/// Logins that wait for an answer at a time; more are told to come again.
pub const WAITING_QUESTIONS_MAX: usize = 64;

/// Questions about one identity that end without success, within [`ATTEMPTS_SECS`].
pub const ATTEMPTS_MAX: usize = 5;

/// How long a refused token is remembered, in seconds.
pub const ATTEMPTS_SECS: u64 = 60;

/// Refused questions per second, over all identities, in the long run.
pub const REFUSED_PER_SEC_MAX: u32 = 2;

/// Refused questions that may come at once, over all identities.
pub const REFUSED_BURST_MAX: u32 = 32;

/// Nobody asks for so many seconds after a question without an answer.
pub const UNREACHABLE_SECS: u64 = 3;

/// Identities whose questions are remembered.
pub const ASKED_IDENTITIES_MAX: usize = 4_096;

/// The turns of all identities, and what is left of the bounds.
///
/// Locks: an identity's turn (asynchronous) is held while the cloud is asked; the others for single statements.
pub(super) struct Questions {
    turns: DashMap<Identity, Arc<Turn>, ahash::RandomState>,
    waiting: Semaphore,
    asking: Semaphore,
    rate: Mutex<Rate>,
    /// When the last question ended without an answer.
    unreachable_at: Mutex<Option<Instant>>,
}

/// What became of the last questions about one identity.
type Turn = tokio::sync::Mutex<SmallVec<[Attempt; ATTEMPTS_MAX]>>;

struct Attempt {
    token: Digest,
    at: Instant,
    /// Whether the cloud refused it; otherwise nobody waited for its answer.
    refused: bool,
}

/// How many questions may be refused now.
struct Rate {
    left: f64,
    counted_at: Instant,
}

impl Questions {
    pub(super) fn new() -> Self {
        Self {
            turns: DashMap::default(),
            waiting: Semaphore::new(WAITING_QUESTIONS_MAX),
            asking: Semaphore::new(QUESTIONS_MAX),
            rate: Mutex::new(Rate { left: f64::from(REFUSED_BURST_MAX), counted_at: Instant::now() }),
            unreachable_at: Mutex::new(None),
        }
    }

    /// Asks the question when it is its turn, unless it is `answered` by then.
    pub(super) async fn ask(
        &self,
        identity: &Identity,
        token: &str,
        limit: Duration,
        answered: impl Fn() -> bool,
        question: impl Future<Output = Result<(), ProofError>>,
    ) -> Result<(), LoginError> {
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return later("too many logins wait for the cloud's answer");
        };
        let Some(turn) = self.turn_of(identity) else {
            return later("the cloud was asked for too many identities");
        };
        let asked = self.ask_in_turn(&turn, token, answered, question);
        timeout(limit, asked).await.unwrap_or_else(|_| later("the cloud did not answer in time"))
    }

    async fn ask_in_turn(
        &self,
        turn: &Turn,
        token: &str,
        answered: impl Fn() -> bool,
        question: impl Future<Output = Result<(), ProofError>>,
    ) -> Result<(), LoginError> {
        let mut attempts = turn.lock().await;
        if answered() {
            return Ok(());
        }
        let token = Digest::of(token);
        attempts.retain(|attempt| is_recent(attempt));
        if attempts.iter().any(|attempt| attempt.refused && attempt.token == token) {
            return Err(LoginError::Refused("the cloud refused the same token just now".into()));
        }
        if attempts.len() >= ATTEMPTS_MAX {
            return later("the cloud refused too many tokens of this identity just now");
        }
        let Ok(_asking) = self.asking.acquire().await else { return later("the hub is stopping") };
        let pause = Duration::from_secs(UNREACHABLE_SECS);
        if self.unreachable_at.lock().is_some_and(|at| at.elapsed() < pause) {
            return later("the cloud could not be asked just now");
        }
        if !self.rate.lock().take(Instant::now()) {
            return later("the cloud refused too many tokens just now");
        }
        // It counts also when nobody waits for the answer any more.
        attempts.push(Attempt { token, at: Instant::now(), refused: false });
        let answer = question.await;
        match answer {
            Ok(()) => {
                attempts.clear();
                self.rate.lock().give_back();
                Ok(())
            }
            Err(ProofError::Refused(reason)) => {
                if let Some(attempt) = attempts.last_mut() {
                    attempt.refused = true;
                }
                Err(LoginError::Refused(ProofError::Refused(reason).to_string()))
            }
            Err(error @ ProofError::Unavailable(_)) => {
                attempts.pop();
                self.rate.lock().give_back();
                self.unreachable_at.lock().replace(Instant::now());
                later(&error.to_string())
            }
        }
    }

    /// The turn of an identity; absent when too many are remembered.
    fn turn_of(&self, identity: &Identity) -> Option<Arc<Turn>> {
        if let Some(turn) = self.turns.get(identity) {
            return Some(turn.value().clone());
        }
        if self.turns.len() >= ASKED_IDENTITIES_MAX {
            // One that is held by somebody else is in use.
            self.turns.retain(|_, turn| match turn.try_lock() {
                Ok(attempts) => Arc::strong_count(turn) > 1 || attempts.iter().any(is_recent),
                Err(_) => true,
            });
            if self.turns.len() >= ASKED_IDENTITIES_MAX {
                return None;
            }
        }
        Some(self.turns.entry(identity.clone()).or_default().value().clone())
    }
}

impl Rate {
    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        let gained = now.duration_since(self.counted_at).as_secs_f64() * f64::from(REFUSED_PER_SEC_MAX);
        self.left = (self.left + gained).min(f64::from(REFUSED_BURST_MAX));
        self.counted_at = now;
        let may = self.left >= 1.0;
        self.left -= f64::from(u8::from(may));
        may
    }

    fn give_back(&mut self) {
        self.left += 1.0;
    }
}

fn is_recent(attempt: &Attempt) -> bool {
    attempt.at.elapsed() < Duration::from_secs(ATTEMPTS_SECS)
}

fn later(reason: &str) -> Result<(), LoginError> {
    Err(LoginError::Unavailable(reason.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn refused_questions_are_bounded_per_time() {
        let start = Instant::now();
        let mut rate = Rate { left: f64::from(REFUSED_BURST_MAX), counted_at: start };
        let taken = |rate: &mut Rate, at| (0..1_000).filter(|_| rate.take(at)).count();
        assert_eq!(taken(&mut rate, start), 32);
        assert_eq!(taken(&mut rate, start + Duration::from_secs(3)), 6);
        rate.give_back();
        assert_eq!(taken(&mut rate, start + Duration::from_secs(3)), 1);
        assert_eq!(taken(&mut rate, start + Duration::from_secs(9_000)), 32);
    }
}
