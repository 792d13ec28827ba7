//! One connection up: sessions and links per sender, and what is on them.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use ahash::AHashMap;
use edgehub_storage::{DeadLetterReason, Store};
use metrics::counter;
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::UpstreamOptions;
use super::convert;
use super::fates::{DROP_WARNINGS, Fates, deliver};
use super::lanes::{LaneId, Lanes};
use super::remote::{Phase, Remote};
use super::tokens::{Holder, Tokens};
use super::turns::Turns;
use super::verdict::{Verdict, ended, is_throttling};
use crate::amqp::{
    CbsResponse, Condition, Connection, DeliveryId, Driver, Error, Event, LinkId, MESSAGE_FORMAT_BATCH,
    Message, Options, Outcome, SendError, SendOptions, SessionId,
};
use crate::delivery::{Losses, QueueReader, Queued, SentMetrics};
use crate::head::warn_limit::WarnLimit;

/// A transfer without an answer for this many operation time-outs means that the link is dead.
const ANSWER_TIMEOUTS: u32 = 2;

/// A session without traffic for this long is ended; the next message opens it again.
const IDLE_SECS: u64 = 3_600;

static LANE_WARNINGS: WarnLimit = WarnLimit::new();

/// One connection to the upstream.
pub(super) struct Uplink<S> {
    driver: Driver<S>,
    options: UpstreamOptions,
    store: Store,
    fates: Fates,
    tokens: Tokens,
    remotes: AHashMap<LaneId, Remote>,
    by_link: AHashMap<LinkId, LaneId>,
    by_session: AHashMap<SessionId, LaneId>,
    /// Remotes that have a session and no link yet.
    opening: usize,
    /// Lanes that may have something to send.
    turns: Turns,
    /// Nothing is sent until what waits to be written is written.
    backlogged: bool,
    opened_at: Instant,
    up: bool,
    newly_up: bool,
    delivered: bool,
    token_refused: bool,
    /// What the upstream said when it asked for a pause, and until when that counts.
    throttled: Option<(String, Instant)>,
    closed: Option<String>,
}

/// What became of a lane's turn.
enum Turn {
    /// It may have another one.
    More,
    /// An event brings it back.
    Waits,
    /// Nobody can send now.
    Backlog,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Uplink<S> {
    pub(super) fn new(stream: S, options: UpstreamOptions, store: Store, losses: Arc<Losses>) -> Self {
        let now = Instant::now();
        let engine = Connection::client(
            Options {
                container_id: uuid::Uuid::new_v4().to_string().into(),
                hostname: Some(options.host.as_str().into()),
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
            opening: 0,
            turns: Turns::default(),
            backlogged: false,
            opened_at: now,
            up: false,
            newly_up: false,
            delivered: false,
            token_refused: false,
            throttled: None,
            closed: None,
        }
    }

    /// Whether the upstream has accepted the hub's own token.
    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    /// Whether it has just done so.
    pub(super) fn take_up(&mut self) -> bool {
        std::mem::take(&mut self.newly_up)
    }

    /// Whether a message was delivered.
    pub(super) fn has_delivered(&self) -> bool {
        self.delivered
    }

    /// Whether the upstream refused the hub's own token.
    pub(super) fn is_token_refused(&self) -> bool {
        self.token_refused
    }

    /// Why the upstream asked for a pause, while it does.
    pub(super) fn throttled(&self, now: Instant) -> Option<&str> {
        self.throttled.as_ref().filter(|(_, until)| now < *until).map(|(reason, _)| reason.as_str())
    }

    /// A lane may have something to send.
    pub(super) fn ready(&mut self, lane: LaneId, lanes: &Lanes) {
        let Some(rank) = lanes.rank(lane) else { return };
        self.remotes.entry(lane).or_insert_with(Remote::new);
        self.turns.add(lane, rank);
    }

    /// Writes and reads once. With `wait` it returns when something happened, otherwise at once. Cancel safe.
    pub(super) async fn turn(&mut self, wait: bool) {
        poll_fn(|cx| {
            let signed = match self.tokens.poll_signing(cx) {
                Poll::Ready(Ok(())) => true,
                Poll::Ready(Err(reason)) => {
                    self.closed = Some(reason);
                    true
                }
                Poll::Pending => false,
            };
            match self.driver.poll_turn(cx) {
                Poll::Pending if wait && !signed => Poll::Pending,
                Poll::Pending | Poll::Ready(()) => Poll::Ready(()),
            }
        })
        .await;
    }

    /// Closes the connection in order.
    pub(super) async fn close(mut self) {
        self.driver.connection().close(None, std::time::Instant::now());
        // The process ends anyway; what the peer has not read by now it will see as a lost connection.
        let _ = self.driver.shutdown().await;
    }

    /// Works through what arrived.
    pub(super) fn handle_events(
        &mut self,
        lanes: &mut Lanes,
        reader: Option<&QueueReader>,
        sent: &mut SentMetrics,
    ) -> Result<(), String> {
        while let Some(event) = self.driver.connection().poll_event() {
            match event {
                Event::Opened(_) => self.tokens.begin(self.driver.connection())?,
                Event::SessionBegun { session } => {
                    let engine = self.driver.connection();
                    if !self.tokens.session_begun(session, &self.options.host, engine)?
                        && let Some(lane) = self.by_session.get(&session).copied()
                    {
                        self.attach(lane, session, lanes);
                    }
                }
                Event::Attached { link, .. } => self.attached(link, lanes),
                Event::AttachRefused { link, error } => self.link_lost(link, error.as_ref(), lanes)?,
                Event::Detached { link, error, .. } => self.link_lost(link, error.as_ref(), lanes)?,
                Event::SessionEnded { session, error, .. } => {
                    self.tokens.session_lost(session, error.as_ref())?;
                    if let Some(lane) = self.by_session.get(&session).copied() {
                        self.fail_lane(lane, &ended("the session", error.as_ref()), lanes);
                    }
                }
                Event::Delivery(delivery) => {
                    self.driver.connection().settle(delivery.id, Outcome::Accepted);
                    if self.tokens.is_receiver(delivery.link) {
                        let response = Message::parse(&delivery.payload)
                            .and_then(|message| CbsResponse::decode(&message))
                            .map_err(|error| format!("the answer to a token cannot be read: {error}"))?;
                        self.token_answered(&response, lanes)?;
                    }
                }
                Event::Settled { link, delivery, outcome } => {
                    if let Some(lane) = self.by_link.get(&link).copied() {
                        self.answered(lane, delivery, outcome, lanes, reader, sent);
                    }
                }
                Event::CreditChanged { link, .. } => {
                    if let Some(lane) = self.by_link.get(&link).copied() {
                        self.ready(lane, lanes);
                    }
                }
                Event::WindowOpened { session } => {
                    if let Some(lane) = self.by_session.get(&session).copied() {
                        self.ready(lane, lanes);
                    }
                }
                Event::OutputDrained => self.backlogged = false,
                Event::AttachRequested(request) => {
                    let text = "this connection carries the hub's own links only";
                    let error = Error::new(Condition::NOT_ALLOWED, text);
                    self.driver.connection().refuse_attach(request.link, error);
                }
                Event::SaslPlain { .. } => {}
                Event::Closed { error, .. } => self.closed = Some(ended("the connection", error.as_ref())),
            }
        }
        match self.closed.take() {
            Some(reason) => Err(reason),
            None => Ok(()),
        }
    }

    /// Looks at deadlines, and at the age of the tokens.
    pub(super) fn look(
        &mut self,
        lanes: &mut Lanes,
        reader: Option<&QueueReader>,
        now: Instant,
    ) -> Result<(), String> {
        let limit = self.options.operation_timeout;
        if let Some(reader) = reader {
            let expired = lanes.expire(self.store.now(), now);
            expired.iter().for_each(|queued| self.fates.expire(queued, reader));
        }
        let idle_now = self.remotes.iter_mut().filter(|(lane, _)| lanes.is_idle(**lane));
        idle_now.for_each(|(_, remote)| remote.starved_since = None);
        let since = |since: Instant| now.duration_since(since);
        if !self.up && since(self.opened_at) > limit * 2 {
            return Err(format!("the hub's own token was not answered within {:?}", 2 * limit));
        }
        self.tokens.look(now, limit)?;
        let mut late: Vec<(LaneId, &'static str)> = Vec::new();
        let mut idle: Vec<LaneId> = Vec::new();
        for (lane, remote) in &self.remotes {
            match remote.phase {
                Phase::New | Phase::Token => {}
                Phase::Session | Phase::Attaching if since(remote.since) > limit => {
                    late.push((*lane, "the link was not attached"));
                }
                Phase::Session | Phase::Attaching => {}
                Phase::Ready => {
                    let answer_due = lanes.oldest_sent_at(*lane);
                    if answer_due.is_some_and(|sent_at| since(sent_at) > limit * ANSWER_TIMEOUTS) {
                        late.push((*lane, "a transfer was not answered"));
                    } else if remote.starved_since.is_some_and(|starved| since(starved) > limit) {
                        late.push((*lane, "the link gives no credit"));
                    } else if since(remote.since) > Duration::from_secs(IDLE_SECS) && lanes.is_idle(*lane) {
                        idle.push(*lane);
                    }
                }
            }
        }
        for (lane, reason) in late {
            self.fail_lane(lane, reason, lanes);
        }
        idle.into_iter().for_each(|lane| self.drop_remote(lane));
        if self.up && self.tokens.take_renewal(now) {
            self.tokens.want(Holder::Hub);
            let ready =
                self.remotes.iter().filter(|(_, remote)| !matches!(remote.phase, Phase::New | Phase::Token));
            ready.for_each(|(lane, _)| self.tokens.want(Holder::Lane(*lane)));
        }
        Ok(())
    }

    /// Puts the tokens that wait.
    pub(super) fn put_tokens(&mut self, lanes: &Lanes) -> Result<(), String> {
        let (remotes, own) = (&self.remotes, &self.options.identity);
        self.tokens.put(self.driver.connection(), &self.options, self.opening, |holder| match holder {
            Holder::Hub => Some(own),
            Holder::Lane(lane) => remotes.contains_key(&lane).then(|| lanes.sender(lane)),
        })
    }

    /// Sends what the credit of the links allows, a transfer per lane and turn.
    pub(super) fn send(&mut self, lanes: &mut Lanes, reader: &QueueReader, sent: &mut SentMetrics) {
        // Lanes that cannot go on now leave the queue; the event that lets them go on brings them back.
        while !self.backlogged
            && let Some(lane) = self.turns.next(|lane| lanes.rank(lane))
        {
            match self.remotes.get(&lane).map(|remote| remote.phase) {
                Some(Phase::Ready) => {}
                Some(Phase::New) => {
                    self.open(lane, lanes, reader);
                    continue;
                }
                Some(Phase::Token | Phase::Session | Phase::Attaching) | None => continue,
            }
            match self.send_one(lane, lanes, reader, sent) {
                Turn::More => self.ready(lane, lanes),
                Turn::Waits => {}
                Turn::Backlog => {
                    self.backlogged = true;
                    self.ready(lane, lanes);
                }
            }
        }
    }

    /// Asks for the link of a lane, unless its sender is known to have left the scope.
    fn open(&mut self, lane: LaneId, lanes: &mut Lanes, reader: &QueueReader) {
        let out_of_scope =
            self.options.gives_up_out_of_scope && self.options.scope.is_out_of_scope(lanes.sender(lane));
        if out_of_scope {
            let text = "its sender is no longer in the scope of this hub";
            let messages = lanes.discard_all(lane, Instant::now());
            self.give_up(lane, &messages, DeadLetterReason::OutOfScope, text, lanes, reader);
            self.drop_remote(lane);
        } else if let Some(remote) = self.remotes.get_mut(&lane) {
            remote.phase = Phase::Token;
            self.tokens.want(Holder::Lane(lane));
        }
    }

    /// Messages of a lane go to the dead letters. Those that these cannot take now are read again after a pause of the
    /// lane; false then.
    fn give_up(
        &mut self,
        lane: LaneId,
        messages: &[Queued],
        reason: DeadLetterReason,
        text: &str,
        lanes: &mut Lanes,
        reader: &QueueReader,
    ) -> bool {
        let mut taken = true;
        for queued in messages {
            if !self.fates.give_up(queued, reason, text, reader) {
                lanes.read_again(lane, queued);
                taken = false;
            }
        }
        if !taken {
            self.fail_lane(lane, "the dead letters take no message at present", lanes);
        }
        taken
    }

    /// Sends one transfer.
    fn send_one(
        &mut self,
        lane: LaneId,
        lanes: &mut Lanes,
        reader: &QueueReader,
        sent: &mut SentMetrics,
    ) -> Turn {
        let now = self.store.now();
        while lanes.next_chunk(lane).next().is_some_and(|queued| queued.entry.is_expired(now)) {
            for queued in lanes.discard(lane, 1, Instant::now()) {
                self.fates.expire(&queued, reader);
            }
        }
        let Some(remote) = self.remotes.get_mut(&lane) else { return Turn::Waits };
        let Some(link) = remote.link else { return Turn::Waits };
        if lanes.is_idle(lane) {
            remote.starved_since = None;
        }
        if !lanes.is_ready(lane) {
            return Turn::Waits;
        }
        if self.driver.connection().credit(link) == 0 {
            if remote.sent.is_empty() {
                remote.starved_since.get_or_insert_with(Instant::now);
            }
            return Turn::Waits;
        }
        let chunk: SmallVec<[&crate::message::Message; 16]> = lanes
            .next_chunk(lane)
            .take_while(|queued| !queued.entry.is_expired(now))
            .map(|queued| &queued.message)
            .collect();
        let count = chunk.len();
        let payload = convert::payload(chunk.into_iter());
        let format = if count > 1 { MESSAGE_FORMAT_BATCH } else { 0 };
        let options = SendOptions { format, ..SendOptions::default() };
        match self.driver.connection().send(link, payload, options) {
            Ok(delivery) => {
                for queued in lanes.next_chunk(lane).take(count) {
                    let route = sent.route(&queued.message, &queued.priority);
                    sent.sent(route, now.millis_since(queued.entry.accepted_at));
                }
                lanes.sent(lane, count, Instant::now());
                remote.sent.push_back((delivery, None));
                remote.starved_since = None;
                Turn::More
            }
            Err(SendError::Backlog) => Turn::Backlog,
            Err(SendError::NoCredit | SendError::NoWindow | SendError::TooManyUnsettled) => {
                if remote.sent.is_empty() {
                    remote.starved_since.get_or_insert_with(Instant::now);
                }
                Turn::Waits
            }
            Err(SendError::NotAttached) => {
                self.fail_lane(lane, "the link is gone", lanes);
                Turn::Waits
            }
            Err(SendError::TooLarge { limit_bytes }) if count == 1 => {
                let reason = format!("it is larger than the {limit_bytes} bytes that the upstream takes");
                let messages = lanes.discard(lane, 1, Instant::now());
                self.give_up(lane, &messages, DeadLetterReason::RejectedByReceiver, &reason, lanes, reader);
                Turn::More
            }
            Err(SendError::TooLarge { .. }) => {
                lanes.go_single(lane, count);
                Turn::More
            }
        }
    }

    fn answered(
        &mut self,
        lane: LaneId,
        delivery: DeliveryId,
        outcome: Outcome,
        lanes: &mut Lanes,
        reader: Option<&QueueReader>,
        sent: &mut SentMetrics,
    ) {
        let now = Instant::now();
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        remote.since = now;
        if let Some(slot) = remote.sent.iter_mut().find(|(id, _)| *id == delivery) {
            slot.1 = Some(outcome);
        }
        while let Some(outcome) = self.remotes.get_mut(&lane).and_then(Remote::next_answer) {
            match Verdict::of(&outcome) {
                Verdict::Delivered => {
                    self.delivered = true;
                    self.throttled = None;
                    let Some(chunk) = lanes.settled(lane, now) else { break };
                    deliver(&chunk, reader);
                    let seconds = now.duration_since(chunk.sent_at).as_secs_f64();
                    if let Some(first) = chunk.messages.first() {
                        let route = sent.route(&first.message, &first.priority);
                        sent.answered(route, seconds);
                    }
                }
                Verdict::Refused(reason) if lanes.oldest_len(lane) > 1 => {
                    // One message of the batch may be at fault: each is judged on its own.
                    if DROP_WARNINGS.admit().is_some() {
                        let sender = lanes.sender(lane);
                        tracing::warn!(%sender, reason, "A batch was refused; its messages go one by one");
                    }
                    lanes.set_aside(lane);
                }
                Verdict::Refused(reason) => {
                    let Some(chunk) = lanes.settled(lane, now) else { break };
                    let Some(reader) = reader else { break };
                    let why = DeadLetterReason::RejectedByReceiver;
                    if !self.give_up(lane, &chunk.messages, why, &reason, lanes, reader) {
                        return;
                    }
                }
                Verdict::Later { reason, throttled } => {
                    let pause = self.fail_lane(lane, &reason, lanes);
                    if throttled {
                        self.throttled_for(reason, pause);
                    }
                    return;
                }
            }
        }
        self.ready(lane, lanes);
    }

    fn attach(&mut self, lane: LaneId, session: SessionId, lanes: &mut Lanes) {
        let sender = lanes.sender(lane).clone();
        let Some(chain) = self.options.scope.chain_text(&sender) else {
            self.fail_lane(lane, "the sender is not in scope of this hub at present", lanes);
            return;
        };
        let model = lanes.next_chunk(lane).next().and_then(|queued| queued.message.sender.model_id.clone());
        let options = convert::telemetry_link(&sender, &chain, model.as_deref(), &self.options);
        match self.driver.connection().attach(session, options) {
            Some(link) => {
                self.by_link.insert(link, lane);
                if let Some(remote) = self.remotes.get_mut(&lane) {
                    remote.link = Some(link);
                    remote.phase = Phase::Attaching;
                    remote.since = Instant::now();
                }
            }
            None => {
                self.fail_lane(lane, "the upstream allows no more links", lanes);
            }
        }
    }

    fn attached(&mut self, link: LinkId, lanes: &Lanes) {
        self.tokens.attached(link);
        let Some(lane) = self.by_link.get(&link).copied() else { return };
        if let Some(remote) = self.remotes.get_mut(&lane) {
            tracing::debug!(sender = %lanes.sender(lane), "The upstream link of the sender is attached");
            remote.phase = Phase::Ready;
            remote.since = Instant::now();
            self.opening -= 1;
            self.ready(lane, lanes);
        }
    }

    fn link_lost(&mut self, link: LinkId, error: Option<&Error>, lanes: &mut Lanes) -> Result<(), String> {
        self.tokens.link_lost(link, error)?;
        if let Some(lane) = self.by_link.get(&link).copied() {
            let reason = ended("the link", error);
            let pause = self.fail_lane(lane, &reason, lanes);
            if error.is_some_and(|error| is_throttling(error.condition.as_str())) {
                self.throttled_for(reason, pause);
            }
        }
        Ok(())
    }

    /// The upstream asked for a pause. That counts until a message is delivered, or the next attempt had its time.
    fn throttled_for(&mut self, reason: String, pause: Duration) {
        let until = Instant::now() + pause + self.options.operation_timeout * ANSWER_TIMEOUTS;
        self.throttled = Some((reason, until));
    }

    /// Parks a lane; its session is ended, and built anew when the lane goes on.
    fn fail_lane(&mut self, lane: LaneId, reason: &str, lanes: &mut Lanes) -> Duration {
        let pause = lanes.park(lane, Instant::now());
        counter!("edgehub_operation_retry_total", "id" => "iothub", "operation" => "SendMessageToCloud")
            .increment(1);
        if let Some(others) = LANE_WARNINGS.admit() {
            tracing::warn!(
                sender = %lanes.sender(lane), reason, pause_secs = pause.as_secs_f32(), others,
                "Messages of one sender cannot go up and are offered again after a pause"
            );
        }
        self.drop_remote(lane);
        pause
    }

    /// Forgets the far end of a lane. Its turns and tokens that wait find nothing and pass.
    fn drop_remote(&mut self, lane: LaneId) {
        let Some(remote) = self.remotes.remove(&lane) else { return };
        self.opening -= usize::from(matches!(remote.phase, Phase::Session | Phase::Attaching));
        if let Some(link) = remote.link {
            self.by_link.remove(&link);
        }
        if let Some(session) = remote.session {
            self.by_session.remove(&session);
            self.driver.connection().end(session, None);
        }
    }

    fn token_answered(&mut self, response: &CbsResponse, lanes: &mut Lanes) -> Result<(), String> {
        let Some(holder) = self.tokens.answered(response) else { return Ok(()) };
        let refusal = || format!("{} {}", response.status_code, &*response.description);
        match holder {
            Holder::Hub if response.is_ok() => {
                self.newly_up |= !self.up;
                self.up = true;
            }
            Holder::Hub => {
                self.token_refused = true;
                return Err(format!("the upstream refuses the hub's own token: {}", refusal()));
            }
            Holder::Lane(lane) => match self.remotes.get(&lane).map(|remote| remote.phase) {
                // The lane failed meanwhile.
                None => {}
                Some(_) if !response.is_ok() => {
                    self.fail_lane(lane, &format!("the upstream refuses the token: {}", refusal()), lanes);
                }
                Some(Phase::Token) => self.begin(lane, lanes),
                Some(Phase::New | Phase::Session | Phase::Attaching | Phase::Ready) => {}
            },
        }
        Ok(())
    }

    fn begin(&mut self, lane: LaneId, lanes: &mut Lanes) {
        let Some(session) = self.driver.connection().begin() else {
            // Room for the next attempt: whoever was silent longest can come back when it has something to say.
            let idle = self.remotes.iter().filter(|(other, _)| lanes.is_idle(**other));
            let silent = idle.min_by_key(|(_, remote)| remote.since).map(|(other, _)| *other);
            silent.into_iter().for_each(|other| self.drop_remote(other));
            self.fail_lane(lane, "the upstream allows no more sessions", lanes);
            return;
        };
        self.by_session.insert(session, lane);
        if let Some(remote) = self.remotes.get_mut(&lane) {
            remote.session = Some(session);
            remote.phase = Phase::Session;
            remote.since = Instant::now();
            self.opening += 1;
        }
    }
}
