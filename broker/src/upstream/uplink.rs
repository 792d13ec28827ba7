//! One connection up: what arrives on it, and the deadlines of what does not.
//!
//! | room | owns |
//! | --- | --- |
//! | `sessions` | the session and links of each identity, from the token to the end |
//! | `telemetry` | transfers of messages and what their answers mean |
//! | `requests` | twin requests, method calls, cloud-to-device messages |

mod requests;
mod sessions;
mod telemetry;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use edgehub_storage::Store;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::UpstreamOptions;
use super::answers::Answers;
use super::failure::{Failure, UpstreamCause};
use super::fates::Fates;
use super::lanes::{LaneId, Lanes};
use super::progress::Progress;
use super::remote::{Phase, Remote};
use super::targets::Target;
use super::tell;
use super::tokens::{Holder, Needed, Tokens};
use super::turns::Turns;
use super::twins::Twins;
use super::verdict::{ended, token_error};
use super::watchdog::{Stall, WatchdogStep};
use super::work::Work;
use crate::amqp::{
    By, CbsResponse, Condition, Connection, Driver, Error, Event, LinkId, LinkKind, Message, Options,
    Outcome, SessionId,
};
use crate::delivery::Losses;

/// A transfer without an answer for this many operation time-outs means that the link is dead.
const ANSWER_TIMEOUTS: u32 = 2;

/// A session without traffic and without wants for this long is ended; the next use opens it again.
const IDLE_SECS: u64 = 3_600;

/// One connection to the upstream.
pub(super) struct Uplink<S> {
    driver: Driver<S>,
    options: UpstreamOptions,
    store: Store,
    fates: Fates,
    tokens: Tokens,
    remotes: AHashMap<LaneId, Remote>,
    by_link: AHashMap<LinkId, (LaneId, LinkKind)>,
    by_session: AHashMap<SessionId, LaneId>,
    /// Identities whose session or links were asked for and are not there.
    opening: AHashSet<LaneId>,
    /// Lanes that may have something to send.
    turns: Turns,
    /// Nothing is sent until what waits to be written is written.
    backlogged: bool,
    twins: Twins,
    answers: Answers,
    /// Identities whose requests or answers found no room on the connection.
    blocked: AHashSet<LaneId>,
    opened_at: Instant,
    progress: Progress,
    closed: Option<Failure>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Uplink<S> {
    pub(super) fn new(stream: S, options: UpstreamOptions, store: Store, losses: Arc<Losses>) -> Self {
        let now = Instant::now();
        let engine = Connection::client(
            Options {
                container_id: uuid::Uuid::new_v4().to_string().into(),
                hostname: Some(options.host.as_str().into()),
                sasl: options.sasl(),
                idle_timeout: options.idle_timeout,
                handshake_timeout: options.operation_timeout,
                ..Options::default()
            },
            now.into_std(),
        );
        Self {
            driver: Driver::new(stream, engine),
            options,
            store,
            fates: Fates::new(losses),
            tokens: Tokens::new(),
            remotes: AHashMap::new(),
            by_link: AHashMap::new(),
            by_session: AHashMap::new(),
            opening: AHashSet::new(),
            turns: Turns::default(),
            backlogged: false,
            twins: Twins::default(),
            answers: Answers::default(),
            blocked: AHashSet::new(),
            opened_at: now,
            progress: Progress::default(),
            closed: None,
        }
    }

    /// What it has come to so far.
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    pub(super) fn progress_mut(&mut self) -> &mut Progress {
        &mut self.progress
    }

    /// Identities that have a session, or are getting one.
    pub(super) fn sessions(&self) -> usize {
        self.by_session.len()
    }

    /// Writes and reads once. With `wait` it returns when something happened, otherwise at once. Cancel safe.
    pub(super) async fn turn(&mut self, wait: bool) {
        poll_fn(|cx| {
            let signed = match self.tokens.poll_signing(cx) {
                Poll::Ready(Ok(())) => true,
                Poll::Ready(Err(failure)) => {
                    self.closed = Some(failure);
                    true
                }
                Poll::Pending => false,
            };
            let paid = self.answers.poll(cx).is_ready();
            match self.driver.poll_turn(cx) {
                Poll::Pending if wait && !signed && !paid => Poll::Pending,
                Poll::Pending | Poll::Ready(()) => Poll::Ready(()),
            }
        })
        .await;
    }

    /// Closes the connection in order.
    pub(super) async fn close(mut self, work: &Work) {
        self.take_answered(work);
        self.driver.connection().close(None, std::time::Instant::now());
        // The process ends anyway; what the peer has not read by now it will see as a lost connection.
        let _ = self.driver.shutdown().await;
    }

    /// Sends what the hub has answered by now, before anything else is done that the answers could fall victim to.
    pub(super) fn take_answered(&mut self, work: &Work) {
        // The next turn waits for what is not there yet.
        let _ = self.answers.poll(&mut Context::from_waker(Waker::noop()));
        self.take_paid(work);
    }

    /// Works through what arrived.
    pub(super) fn handle_events(&mut self, work: &mut Work) -> Result<(), Failure> {
        while let Some(event) = self.driver.connection().poll_event() {
            match event {
                Event::Opened(_) if self.options.is_hub() => self.tokens.begin(self.driver.connection())?,
                Event::Opened(_) => self.progress.rise(),
                Event::SessionBegun { session } => {
                    let engine = self.driver.connection();
                    if !self.tokens.session_begun(session, &self.options.host, engine)? {
                        self.session_begun(session, work);
                    }
                }
                Event::Attached { link, .. } => self.attached(link, work),
                Event::AttachRefused { link, error } => self.link_refused(link, error.as_ref(), work)?,
                Event::Detached { link, error, .. } => self.link_lost(link, error.as_ref(), work)?,
                Event::SessionEnded { session, error, .. } => {
                    self.tokens.session_lost(session, error.as_ref())?;
                    self.session_lost(session, error.as_ref(), work);
                }
                Event::Delivery(delivery) => match self.by_link.get(&delivery.link).copied() {
                    Some((lane, LinkKind::TwinAnswers)) => self.twin_answered(lane, &delivery, work),
                    Some((lane, LinkKind::MethodCalls)) => self.called(lane, &delivery, work),
                    Some((lane, LinkKind::CloudToDevice)) => self.cloud_to_device(lane, &delivery, work),
                    Some(_) | None => {
                        self.driver.connection().settle(delivery.id, Outcome::Accepted);
                        if self.tokens.is_receiver(delivery.link) {
                            let response = Message::parse(&delivery.payload)
                                .and_then(|message| CbsResponse::decode(&message));
                            let unreadable = |error| format!("the answer to a token cannot be read: {error}");
                            let response = response
                                .map_err(|error| Failure::new(UpstreamCause::Token, unreadable(error)))?;
                            self.token_answered(&response, work)?;
                        }
                    }
                },
                Event::Settled { link, delivery, outcome } => {
                    if let Some((lane, LinkKind::Telemetry)) = self.by_link.get(&link).copied() {
                        self.answered(lane, delivery, outcome, work);
                    }
                }
                Event::CreditChanged { link, .. } => match self.by_link.get(&link).copied() {
                    Some((lane, LinkKind::Telemetry)) => self.ready(lane, &work.lanes),
                    Some((lane, _)) => self.flush(lane),
                    None => {}
                },
                Event::WindowOpened { session } => {
                    if let Some(lane) = self.by_session.get(&session).copied() {
                        self.flush(lane);
                        self.ready(lane, &work.lanes);
                    }
                }
                Event::OutputDrained => {
                    self.backlogged = false;
                    std::mem::take(&mut self.blocked).into_iter().for_each(|lane| self.flush(lane));
                }
                Event::AttachRequested(request) => {
                    let text = "this connection carries the hub's own links only";
                    let error = Error::new(Condition::NOT_ALLOWED, text);
                    self.driver.connection().refuse_attach(request.link, error);
                }
                Event::SaslPlain { .. } => {}
                Event::Closed { error, by } => {
                    self.closed = Some(match (by, error) {
                        (By::Peer, error) => {
                            Failure::new(UpstreamCause::Closed, ended("the connection", error.as_ref()))
                        }
                        (By::Engine, Some(error)) => {
                            Failure::new(UpstreamCause::Lost, format!("the connection is lost: {error}"))
                        }
                        (By::Engine, None) => Failure::new(UpstreamCause::Lost, "the connection is lost"),
                    });
                }
            }
        }
        self.take_paid(work);
        match self.closed.take() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    /// Looks at deadlines, and at the age of the tokens.
    pub(super) fn look(&mut self, work: &mut Work, now: Instant) -> Result<(), Failure> {
        let limit = self.options.operation_timeout;
        self.fates.expire_all(self.store.now(), work);
        let idle_now = self.remotes.iter_mut().filter(|(lane, _)| work.lanes.is_idle(**lane));
        idle_now.for_each(|(_, remote)| remote.starved_since = None);
        if !self.progress.is_up() && now.duration_since(self.opened_at) > limit * 2 {
            let text = format!("the hub's own token was not answered within {:?}", 2 * limit);
            return Err(Failure::new(UpstreamCause::Token, text));
        }
        self.tokens.look(now, limit, self.progress.is_up())?;
        let mut late: Vec<(LaneId, Stall)> = Vec::new();
        let (mut idle, mut lacking) = (Vec::new(), Vec::new());
        for (lane, remote) in &self.remotes {
            match self.state(*lane, remote, work, now) {
                State::Fine => {}
                State::Lacking => lacking.push(*lane),
                State::Idle => idle.push(*lane),
                State::Stalled(stall) => late.push((*lane, stall)),
            }
        }
        late.extend(self.twins.look(now, limit).into_iter().map(|lane| (lane, Stall::TwinUnanswered)));
        for (lane, stall) in late {
            self.start_anew(lane, stall, work, now)?;
        }
        idle.into_iter().for_each(|lane| self.drop_remote(lane));
        lacking.into_iter().for_each(|lane| self.arrange(lane, work));
        if self.progress.is_up() {
            let renewed = self.options.take_renewed();
            renewed.iter().for_each(|identity| self.renew_own(identity, work));
        }
        if self.progress.is_up() && self.tokens.take_renewal(now) {
            self.tokens.want(Holder::Hub);
            let ready =
                self.remotes.iter().filter(|(_, remote)| !matches!(remote.phase, Phase::New | Phase::Token));
            ready.for_each(|(lane, _)| self.tokens.want(Holder::Lane(*lane)));
        }
        Ok(())
    }

    fn state(&self, lane: LaneId, remote: &Remote, work: &Work, now: Instant) -> State {
        let limit = self.options.operation_timeout;
        let late = |since: Instant| now.duration_since(since) > limit;
        match remote.phase {
            Phase::New | Phase::Token => return State::Fine,
            Phase::Session if late(remote.since) => return State::Stalled(Stall::NotAttached),
            Phase::Session => return State::Fine,
            Phase::Ready => {}
        }
        let unattached = remote.links().iter().any(|link| !link.attached && late(link.since));
        let unanswered = work.lanes.oldest_sent_at(lane);
        let silent = now.duration_since(remote.since) > Duration::from_secs(IDLE_SECS);
        if unattached || remote.lacking_since.is_some_and(late) {
            State::Stalled(Stall::NotAttached)
        } else if unanswered.is_some_and(|sent_at| now.duration_since(sent_at) > limit * ANSWER_TIMEOUTS) {
            State::Stalled(Stall::Unanswered)
        } else if remote.starved_since.is_some_and(late) {
            State::Stalled(Stall::NoCredit)
        } else if remote.lacking_since.is_some() {
            State::Lacking
        } else if silent && self.is_unused(lane, work) {
            State::Idle
        } else {
            State::Fine
        }
    }

    /// Something of an identity does not get on: takes the step that the watchdog says.
    fn start_anew(
        &mut self,
        lane: LaneId,
        stall: Stall,
        work: &mut Work,
        now: Instant,
    ) -> Result<(), Failure> {
        let step = work.watchdog.stalled(lane, stall, now);
        let identity = work.identity(lane);
        tell::stalled(identity, self.to(), stall, step);
        match (step, stall) {
            (WatchdogStep::Link, Stall::TwinUnanswered) => {
                self.close_link(lane, LinkKind::TwinRequests);
                self.close_link(lane, LinkKind::TwinAnswers);
                self.arrange(lane, work);
            }
            (WatchdogStep::Link, _) => {
                self.fail_lane(lane, stall.text(), work);
            }
            (WatchdogStep::Session, _) => {
                self.fail_remote(lane, stall.text(), None, work);
            }
            (WatchdogStep::Connection | WatchdogStep::Name, _) => {
                self.progress.other_address = step == WatchdogStep::Name;
                let text = format!("nothing gets on: {} ({identity})", stall.text());
                return Err(Failure::new(UpstreamCause::NoProgress, text));
            }
        }
        Ok(())
    }

    /// Puts the tokens that wait.
    pub(super) fn put_tokens(&mut self, lanes: &Lanes) -> Result<(), Failure> {
        let (remotes, hub) = (&self.remotes, &self.options.identity);
        self.tokens.put(self.driver.connection(), &self.options, self.opening.len(), |holder| match holder {
            Holder::Hub => Some(Needed { identity: hub, own: None }),
            Holder::Lane(lane) => {
                let remote = remotes.get(&lane)?;
                Some(Needed { identity: lanes.sender(lane), own: remote.own.clone() })
            }
        })
    }

    fn token_answered(&mut self, response: &CbsResponse, work: &mut Work) -> Result<(), Failure> {
        let Some(holder) = self.tokens.answered(response) else { return Ok(()) };
        let refusal = || format!("{} {}", response.status_code, &*response.description);
        match holder {
            Holder::Hub if response.is_ok() => {
                self.progress.rise();
            }
            Holder::Hub => {
                self.progress.token_refused = true;
                let text = format!("the upstream refuses the hub's own token: {}", refusal());
                return Err(Failure::new(UpstreamCause::Token, text));
            }
            Holder::Lane(lane) => match self.remotes.get(&lane).map(|remote| remote.phase) {
                // The lane failed meanwhile.
                None => {}
                Some(_) if !response.is_ok() => {
                    let reason = format!("the upstream refuses the token: {}", refusal());
                    let error = token_error(response.status_code, &reason);
                    let pause = self.fail_remote(lane, &reason, Some(error), work);
                    if response.status_code == 429 {
                        self.throttled_for(reason, pause);
                    }
                }
                Some(Phase::Token) => self.begin(lane, work),
                Some(Phase::New | Phase::Session | Phase::Ready) => {}
            },
        }
        Ok(())
    }

    /// The target that the connection is for, if it is one of several.
    fn to(&self) -> Option<&str> {
        self.options.target.as_ref().map(Target::as_str)
    }

    /// The upstream asked for a pause.
    fn throttled_for(&mut self, reason: String, pause: Duration) {
        self.progress.throttled_for(reason, pause, self.options.operation_timeout * ANSWER_TIMEOUTS);
    }
}

/// How an identity is doing.
enum State {
    Fine,
    /// A link is missing that could not be asked for.
    Lacking,
    /// Nobody used it for long.
    Idle,
    Stalled(Stall),
}
