//! From the turn to connect to CONNACK, fresh tokens, and what the loss of a connection means.

use std::sync::Arc;
use std::time::Duration;

use edgehub_storage::DeadLetterReason;
use tokio::time::{Instant, timeout};

use super::super::STRANGER;
use super::super::control::ControlError;
use super::super::dial::{Dialled, dial};
use super::super::failure::{Failure, UpstreamCause};
use super::super::lanes::{LaneId, Lanes};
use super::super::tell;
use super::super::work::Work;
use super::connection::Connection;
use super::packet::{self, ConnectAnswer};
use super::remote::{Phase, Remote};
use super::{CONNECTIONS_MAX, Connections, topic};
use crate::identity::{ClientToken, Identity, OWN_TOKEN_LIFE_SECS, SasToken};

/// Connections that are being made at a time, from the name look-up to CONNACK.
const CONNECTING_MAX: usize = 32;

/// Connections that are begun in one second, in the long run; the cloud hub lets 100 in.
const CONNECTS_PER_SEC: u32 = 64;

/// Shortest time until a connection is made anew with a fresh token.
const RENEW_SECS_MIN: i64 = 60;

/// Largest keep-alive that CONNECT can state (MQTT 3.1.1 §3.1.2.10) and a gateway grants.
const KEEP_ALIVE_SECS_MAX: u64 = 600;

/// An attempt to reach the upstream for an identity.
pub(super) struct Dial {
    lane: LaneId,
    epoch: u64,
    result: Result<(Dialled, Arc<str>), Failure>,
}

/// How many connections may be begun now.
pub(super) struct Rate {
    /// In millionths of a connection.
    allowance: u64,
    counted_at: Instant,
}

impl Rate {
    const ONE: u64 = 1_000_000;

    pub(super) fn new() -> Self {
        Self { allowance: CONNECTING_MAX as u64 * Self::ONE, counted_at: Instant::now() }
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        let micros = u64::try_from(now.duration_since(self.counted_at).as_micros()).unwrap_or(u64::MAX);
        let gained = micros.saturating_mul(u64::from(CONNECTS_PER_SEC));
        self.allowance = self.allowance.saturating_add(gained).min(CONNECTING_MAX as u64 * Self::ONE);
        self.counted_at = now;
        let left = self.allowance.checked_sub(Self::ONE);
        self.allowance = left.unwrap_or(self.allowance);
        left.is_some()
    }
}

impl Connections {
    /// Asks for the connection of an identity, unless it is known to have left the scope.
    pub(super) fn open(&mut self, lane: LaneId, work: &mut Work) {
        let identity = work.identity(lane);
        if self.options.gives_up(identity) {
            self.leave_scope(lane, work);
        } else if self.options.is_stranger(identity) {
            let error = ControlError::Unauthorized(STRANGER.into());
            self.fail_remote(lane, STRANGER, Some(error), work);
        } else if let Some(remote) = self.remotes.get_mut(&lane).filter(|remote| remote.phase == Phase::New) {
            remote.enter(Phase::Waiting);
            self.waiting.push_back(lane);
        }
    }

    /// Begins to connect those whose turn it is.
    pub(in super::super) fn connect(&mut self, work: &mut Work) {
        while self.progress.is_up() && self.dials.len() + self.connecting.len() < CONNECTING_MAX {
            let Some(lane) = self.waiting.front().copied() else { return };
            if self.remotes.get(&lane).is_none_or(|remote| remote.phase != Phase::Waiting) {
                self.waiting.pop_front();
                continue;
            }
            if !self.rate.take(Instant::now()) {
                return;
            }
            self.waiting.pop_front();
            let begun = |remote: &Remote| !matches!(remote.phase, Phase::New | Phase::Waiting);
            if self.remotes.values().filter(|remote| begun(remote)).count() >= CONNECTIONS_MAX {
                // Room for the next attempt: whoever was silent longest can come back when it has something to say.
                let unused = self.remotes.iter().filter(|(other, remote)| {
                    remote.is_open() && **other != self.own && self.is_unused(**other, work)
                });
                let silent = unused.min_by_key(|(_, remote)| remote.since).map(|(other, _)| *other);
                silent.into_iter().for_each(|other| self.drop_remote(other));
                let text = format!("there are {CONNECTIONS_MAX} connections already");
                self.fail_remote(lane, &text, None, work);
                continue;
            }
            let first = work.lanes.next_chunk(lane).next();
            let model_id = first.and_then(|queued| queued.message.sender.model_id.clone());
            if let Some(remote) = self.remotes.get_mut(&lane) {
                remote.model_id = model_id.or(remote.model_id.take());
            }
            self.begin(lane, None);
        }
    }

    /// Begins to connect, with a stream or without.
    pub(super) fn begin(&mut self, lane: LaneId, ready: Option<Dialled>) {
        self.epoch += 1;
        let (options, avoid, epoch) = (self.options.clone(), self.avoid, self.epoch);
        let mut own = None;
        if let Some(remote) = self.remotes.get_mut(&lane) {
            remote.epoch = epoch;
            remote.own = options.own_token(&remote.device.identity);
            own = remote.own.clone();
            remote.enter(Phase::Dialling);
        }
        self.dials.push(Box::pin(async move {
            let result = async {
                let limit = options.operation_timeout;
                let failed = |text: String| Failure::new(UpstreamCause::Token, text);
                let token = match own {
                    Some(own) => own.text().clone(),
                    None => match timeout(limit, options.tokens.token()).await {
                        Ok(Ok(token)) => token,
                        Ok(Err(error)) => {
                            return Err(failed(format!("the hub's own token cannot be made: {error}")));
                        }
                        Err(_) => {
                            return Err(failed(format!("the hub's own token was not made within {limit:?}")));
                        }
                    },
                };
                let dialled = match ready {
                    Some(dialled) => dialled,
                    None => dial(&options, avoid).await?,
                };
                Ok((dialled, token))
            };
            Dial { lane, epoch, result: result.await }
        }));
    }

    /// The stream of a connection is there, or not.
    pub(super) fn dialled(&mut self, dial: Dial, work: &mut Work) -> Result<(), Failure> {
        let Dial { lane, epoch, result } = dial;
        // It may have been given up meanwhile.
        let Some(remote) = self.remotes.get_mut(&lane).filter(|remote| remote.epoch == epoch) else {
            return Ok(());
        };
        let (dialled, token) = match result {
            Ok(done) => done,
            Err(failure) => {
                // Whether that is the fate of all shows on the hub's own connection.
                self.ask_all();
                return self.lost(lane, failure, work);
            }
        };
        let identity = work.identity(lane);
        let chain = match lane == self.own || remote.own.is_some() {
            true => None,
            false => match self.options.scope.chain_text(identity) {
                Some(chain) => Some(chain),
                None if self.options.gives_up(identity) => {
                    self.leave_scope(lane, work);
                    return Ok(());
                }
                None => {
                    let text = "it is not in the scope of this hub at present";
                    self.fail_remote(lane, text, Some(ControlError::Unauthorized(text.into())), work);
                    return Ok(());
                }
            },
        };
        let options = &self.options;
        let user_name = topic::user_name(
            &options.hub_host,
            identity,
            &options.product_info,
            remote.model_id.as_deref(),
            chain.as_deref(),
        );
        let mut connection = Connection::new(dialled.stream, &self.bells.bell(lane));
        let keep_alive_secs = options.idle_timeout.as_secs().clamp(1, KEEP_ALIVE_SECS_MAX) as u16;
        connection.put(|out| {
            packet::connect(out, &identity.to_string(), &user_name, &token, keep_alive_secs);
        });
        let now_secs = options.tokens.now_secs();
        let expires_at_secs =
            SasToken::parse(&token, now_secs).map_or(now_secs, |token| token.expires_at_secs());
        // A newer token of its own comes with the client.
        let is_hubs = remote.own.is_none();
        remote.renewal = is_hubs.then(|| renewal(expires_at_secs - now_secs, Instant::now()));
        remote.connection = Some(connection);
        remote.enter(Phase::Connecting);
        self.connecting.insert(lane);
        Ok(())
    }

    /// CONNECT was answered.
    pub(super) fn connected(
        &mut self,
        lane: LaneId,
        answer: ConnectAnswer,
        work: &mut Work,
    ) -> Result<(), Failure> {
        self.connecting.remove(&lane);
        let own = lane == self.own;
        match answer {
            ConnectAnswer::Accepted => {
                if let Some(remote) = self.remotes.get_mut(&lane) {
                    remote.enter(Phase::Open);
                }
                if own {
                    (self.own_lost, self.own_retry_at) = (None, None);
                    self.own_backoff.succeed();
                    self.progress.rise();
                }
                tracing::debug!(identity = %work.identity(lane), "Connected to the upstream over MQTT");
                self.ready(lane, &work.lanes);
                self.arrange(lane, work);
                Ok(())
            }
            ConnectAnswer::Refused(code) if own => {
                self.progress.token_refused = true;
                let text = format!("the upstream refuses the hub's own token: CONNACK {code}");
                Err(Failure::new(UpstreamCause::Token, text))
            }
            ConnectAnswer::Refused(code) => {
                let reason = format!("the upstream refuses the identity: CONNACK {code}");
                let error = ControlError::Unauthorized(reason.clone());
                self.fail_remote(lane, &reason, Some(error), work);
                Ok(())
            }
            ConnectAnswer::Unavailable => {
                let reason = "the upstream asks to come again later: CONNACK 3";
                if own {
                    return self.lost(lane, Failure::new(UpstreamCause::Closed, reason), work);
                }
                let error = ControlError::Refused { status: 429, text: reason.into() };
                let pause = self.fail_remote(lane, reason, Some(error), work);
                self.throttled_for(reason.into(), pause);
                Ok(())
            }
            ConnectAnswer::Unexpected(code) => {
                let text = format!("the upstream takes no connection: CONNACK {code}");
                self.lost(lane, Failure::new(UpstreamCause::Closed, text), work)
            }
        }
    }

    /// A connection is lost, or did not come about: its identity waits for the end of a pause. The hub's own takes the
    /// others with it unless one of them is heard.
    pub(super) fn lost(&mut self, lane: LaneId, failure: Failure, work: &mut Work) -> Result<(), Failure> {
        if lane != self.own {
            self.fail_remote(lane, &failure.text, None, work);
            return Ok(());
        }
        let before = self.own_lost.as_ref().map(|(_, at)| *at);
        let heard = |(other, remote): (&LaneId, &Remote)| {
            let heard_at = remote.connection.as_ref().map(Connection::heard_at);
            *other != self.own && remote.is_open() && before.is_none_or(|at| heard_at > Some(at))
        };
        if !self.progress.is_up() || !self.remotes.iter().any(heard) {
            return Err(failure);
        }
        self.fail_remote(lane, &failure.text, None, work);
        let now = Instant::now();
        self.own_lost = Some((failure, now));
        self.own_retry_at = Some(now + self.own_backoff.fail());
        self.ask_all();
        Ok(())
    }

    /// Tries the hub's own connection again, or gives up when it is the last.
    pub(super) fn look_at_own(&mut self, work: &Work, now: Instant) -> Result<(), Failure> {
        let Some((failure, _)) = &self.own_lost else { return Ok(()) };
        if !self.remotes.iter().any(|(lane, remote)| *lane != self.own && remote.is_open()) {
            return Err(failure.clone());
        }
        if self.own_retry_at.is_some_and(|at| now >= at) {
            self.own_retry_at = None;
            let identity = work.identity(self.own);
            let remote = self.remotes.entry(self.own).or_insert_with(|| Remote::new(identity));
            if matches!(remote.phase, Phase::New | Phase::Waiting) {
                self.begin(self.own, None);
            }
        }
        Ok(())
    }

    /// The token of a connection is half its age: the connection is made anew.
    pub(super) fn renew(&mut self, lane: LaneId, work: &mut Work) {
        let Some(remote) = self.remotes.get(&lane) else { return };
        if !remote.sent.is_empty() {
            self.fail_remote(lane, "its token is about to expire", None, work);
        } else {
            self.reconnect(lane, work);
        }
        if lane == self.own && !self.remotes.contains_key(&lane) {
            self.remotes.insert(lane, Remote::new(work.identity(lane)));
            self.begin(lane, None);
        }
    }

    /// An identity came with a newer token of its own: its connection is made anew with it as soon as nothing is under way,
    /// and what failed is tried again.
    pub(super) fn renew_own(&mut self, identity: &Identity, work: &mut Work) {
        let Some(lane) = work.lanes.find(identity) else { return };
        let now = Instant::now();
        work.lanes.end_pause(lane, now);
        work.wants.end_pause(lane, now);
        let newer = self.options.own_token(identity);
        let text = |token: &Option<ClientToken>| token.as_ref().map(|token| token.text().clone());
        if let Some(remote) = self.remotes.get_mut(&lane)
            && remote.own.is_some()
            && newer.is_some()
            && text(&remote.own) != text(&newer)
        {
            remote.renewal = Some((now, now + Duration::from_secs(RENEW_SECS_MIN.unsigned_abs())));
        }
    }

    /// Makes the connection of an identity anew at once. Nothing of its messages may be under way.
    pub(super) fn reconnect(&mut self, lane: LaneId, work: &mut Work) {
        self.twins.fail(lane, &ControlError::Offline);
        let model_id = self.remotes.get(&lane).and_then(|remote| remote.model_id.clone());
        self.drop_remote(lane);
        let mut remote = Remote::new(work.identity(lane));
        remote.model_id = model_id;
        self.remotes.insert(lane, remote);
        if lane == self.own {
            self.begin(lane, None);
        } else {
            self.open(lane, work);
        }
    }

    /// Asks all peers whether they are there.
    fn ask_all(&mut self) {
        let now = Instant::now();
        for remote in self.remotes.values_mut().filter(|remote| remote.is_open()) {
            if let Some(connection) = &mut remote.connection {
                connection.ping(now);
            }
        }
    }

    /// What waits for an identity that has left the scope goes to the dead letters.
    fn leave_scope(&mut self, lane: LaneId, work: &mut Work) {
        let text = "its sender is no longer in the scope of this hub";
        let messages = work.lanes.discard_all(lane, Instant::now());
        self.give_up(lane, &messages, DeadLetterReason::OutOfScope, text, work);
        let error = ControlError::Unauthorized("it is no longer in the scope of this hub".into());
        work.fail_control(lane, Some(error), &mut self.twins);
        self.drop_remote(lane);
    }

    /// The connection of an identity failed: all that it holds waits for the end of a pause, and no other identity does.
    pub(super) fn fail_remote(
        &mut self,
        lane: LaneId,
        reason: &str,
        error: Option<ControlError>,
        work: &mut Work,
    ) -> Duration {
        let pause = match work.lanes.is_idle(lane) {
            true => Duration::ZERO,
            false => work.lanes.park(lane, Instant::now()),
        };
        let identity = work.identity(lane);
        tell::failed(identity, None, reason, pause);
        if let Some(ControlError::Unauthorized(_)) = &error {
            let remote = self.remotes.get(&lane);
            self.options.refused(identity, remote.and_then(|remote| remote.own.as_ref()));
        }
        work.fail_control(lane, error, &mut self.twins);
        self.drop_remote(lane);
        pause
    }

    /// Forgets the far end of an identity; its connection is closed. Its turns and dials find nothing and pass.
    pub(super) fn drop_remote(&mut self, lane: LaneId) {
        let Some(remote) = self.remotes.remove(&lane) else { return };
        self.connecting.remove(&lane);
        self.blocked.remove(&lane);
        self.answers.forget(lane);
        if remote.phase == Phase::Waiting {
            self.waiting.retain(|waits| *waits != lane);
        }
        if let Some(connection) = remote.connection
            && remote.phase == Phase::Open
            && self.closing.len() < CONNECTIONS_MAX
        {
            self.closing.push(Box::pin(connection.close()));
        }
    }

    /// Whether nobody wants anything of an identity, or asks or sends anything.
    pub(super) fn is_unused(&self, lane: LaneId, work: &Work) -> bool {
        work.lanes.is_idle(lane) && work.wants.of(lane).is_nothing() && !self.twins.has(lane)
    }

    /// A lane may have something to send.
    pub(in super::super) fn ready(&mut self, lane: LaneId, lanes: &Lanes) {
        let Some(rank) = lanes.rank(lane) else { return };
        self.remotes.entry(lane).or_insert_with(|| Remote::new(lanes.sender(lane)));
        self.turns.add(lane, rank);
    }
}

/// When a connection whose token lives for `left_secs` is made anew: at half of that, a little earlier by chance so that
/// not all are at once; and at the latest.
fn renewal(left_secs: i64, now: Instant) -> (Instant, Instant) {
    let half_secs = (left_secs / 2).clamp(RENEW_SECS_MIN, OWN_TOKEN_LIFE_SECS / 2).unsigned_abs();
    let half = Duration::from_secs(half_secs);
    (now + half.mul_f64(0.8 + 0.2 * fastrand::f64()), now + half + half / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_begun_at_a_bounded_rate() {
        let mut rate = Rate::new();
        let start = Instant::now();
        let taken = |rate: &mut Rate, at| (0..1_000).filter(|_| rate.take(at)).count();
        assert_eq!(taken(&mut rate, start), CONNECTING_MAX);
        assert_eq!(taken(&mut rate, start + Duration::from_millis(250)), CONNECTS_PER_SEC as usize / 4);
        assert_eq!(taken(&mut rate, start + Duration::from_secs(100)), CONNECTING_MAX);
    }

    #[test]
    fn a_connection_is_made_anew_well_before_its_token_expires() {
        let now = Instant::now();
        for _ in 0..100 {
            let (at, latest) = renewal(3_600, now);
            assert!(at >= now + Duration::from_secs(1_440) && at <= now + Duration::from_secs(1_800));
            assert_eq!(latest, now + Duration::from_secs(2_700));
        }
        assert!(renewal(0, now).0 >= now + Duration::from_secs(48), "not in a loop");
    }
}
