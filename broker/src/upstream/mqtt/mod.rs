//! The way up over MQTT 3.1.1: a connection for each identity, because MQTT carries one identity per connection.
//!
//! The hub's own connection comes first: it says whether the upstream is there, and whether it lets this hub in. The others
//! are made on behalf of their identity, with the hub's own token, when it has something to send or wants something.
//!
//! ```text
//!             queues ─▶ QueueReader ─▶ Lanes ─▶ Remote (edge1/$edgeHub) ─▶ Connection ─▶ TLS
//!                ▲                       │  ▲ └▶ Remote (leaf1, for edge1) ─▶ Connection ─▶ TLS
//!                └────── settle ─────────┘  └──── PUBACK ───────────────────┘
//! ```
//!
//! | room | owns |
//! | --- | --- |
//! | `packet` | packets as this end reads and writes them |
//! | `topic` | names, topics and property bags |
//! | `bell` | which of many connections want to be looked at |
//! | `connection` | one socket: buffers, packet identifiers, whether the peer answers |
//! | `remote` | one identity: its connection, subscriptions, publishes without an answer |
//! | `connect` | from the turn to connect to CONNACK; fresh tokens; what a loss means |
//! | `proof` | whether the upstream lets an identity in with a token of its own |
//! | `telemetry` | publishes and their acknowledgements |
//! | `requests` | twin requests, method calls, cloud-to-device messages |
//!
//! What MQTT has not, and what stands for it:
//!
//! * No answer refuses a message: a PUBACK takes it, silence and a closed connection do not. What cannot be a packet
//!   goes to the dead letters before it is sent; everything else is tried again until its time to live ends.
//! * A token holds for its connection. At half its life the connection is made anew, when nothing is under way on it.
//! * The session is clean. A message that was not acknowledged goes again, in its order, on the next connection, as a
//!   new packet: its DUP flag is not set, as the upstream keeps nothing that it could be compared with (§4.4).
//! * An answer to a message from the cloud can only take it. What its device refuses is taken too; what it gives back
//!   stays unanswered, and comes again when the upstream's lock on it ends or with the next connection.
//!
//! | wait | deadline | what then |
//! | --- | --- | --- |
//! | token, name look-up, TCP, TLS | the operation time-out each | the identity waits for the end of a pause |
//! | CONNACK | the operation time-out | the same |
//! | SUBACK, answer to a twin request | the operation time-out | watchdog: the connection of the identity, then all |
//! | PUBACK | twice the operation time-out | the same |
//! | PINGRESP | the operation time-out, at most half the idle time-out | the connection is lost |
//! | bytes that the peer takes | 30 s | the connection is lost |
//! | answer of a method by its client | 630 s | the call is forgotten |
//! | good-bye | 2 s | the connection is cut |
//!
//! One connection that is lost is made anew after a pause of its identity's own; that of the hub too, as long as another
//! is heard. When nothing is heard, the way up as a whole is lost, and the supervisor backs off.

mod bell;
mod connect;
mod connection;
mod packet;
mod proof;
mod remote;
mod requests;
mod telemetry;
mod topic;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use edgehub_storage::Store;
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::Instant;

use super::UpstreamOptions;
use super::answers::Answers;
use super::dial::Dialled;
use super::failure::{Failure, UpstreamCause};
use super::fates::Fates;
use super::lanes::LaneId;
use super::progress::Progress;
use super::tell;
use super::turns::Turns;
use super::twins::Twins;
use super::watchdog::{Stall, WatchdogStep};
use super::work::Work;
use crate::delivery::{Backoff, Losses};

use bell::Bells;
use connect::{Dial, Rate};
use packet::{PacketId, Received};
pub(super) use proof::prove;
use remote::{Phase, Remote};

/// Publishes of one identity without an answer.
pub(super) const WINDOW: usize = 128;

/// Connections at a time. Beyond, those that nobody uses make room, and identities that want one wait.
pub(super) const CONNECTIONS_MAX: usize = 1_024;

/// A publish without an answer for this many operation time-outs means that the connection is dead.
const ANSWER_TIMEOUTS: u32 = 2;

/// A connection without traffic and without wants for this long is closed; the next use opens it again.
const IDLE_SECS: u64 = 3_600;

/// A method call is named by its `$rid`; a message by its connection and packet identifier.
type Owed = Answers<String, (LaneId, u64, PacketId)>;

/// All connections to the upstream.
pub(super) struct Connections {
    options: Arc<UpstreamOptions>,
    store: Store,
    fates: Fates,
    avoid: Option<SocketAddr>,
    /// The hub's own lane.
    own: LaneId,
    remotes: AHashMap<LaneId, Remote>,
    bells: Bells,
    /// Lanes whose connections did something.
    rung: Vec<LaneId>,
    /// Identities that wait for their turn to connect.
    waiting: VecDeque<LaneId>,
    rate: Rate,
    dials: FuturesUnordered<Pin<Box<dyn Future<Output = Dial> + Send>>>,
    dialled: Vec<Dial>,
    /// Connections that wait for CONNACK.
    connecting: AHashSet<LaneId>,
    /// Connections that say good-bye.
    closing: FuturesUnordered<Pin<Box<dyn Future<Output = ()> + Send>>>,
    epoch: u64,
    turns: Turns,
    /// Lanes whose connection has enough to write.
    blocked: AHashSet<LaneId>,
    twins: Twins,
    next_request: u64,
    answers: Owed,
    /// Why the hub's own connection was lost and when, while another is heard, and when it is tried again.
    own_lost: Option<(Failure, Instant)>,
    own_retry_at: Option<Instant>,
    own_backoff: Backoff,
    progress: Progress,
}

impl Connections {
    /// Begins with the hub's own connection, for which a stream is there; the address to `avoid` is the last of the
    /// others too.
    pub(super) fn new(
        dialled: Dialled,
        avoid: Option<SocketAddr>,
        options: UpstreamOptions,
        store: Store,
        losses: Arc<Losses>,
        work: &mut Work,
    ) -> Self {
        let own = work.lanes.lane_of(&options.identity);
        let mut connections = Self {
            own_backoff: Backoff::with(options.backoff),
            options: Arc::new(options),
            store,
            fates: Fates::new(losses),
            avoid,
            own,
            remotes: AHashMap::new(),
            bells: Bells::default(),
            rung: Vec::new(),
            waiting: VecDeque::new(),
            rate: Rate::new(),
            dials: FuturesUnordered::new(),
            dialled: Vec::new(),
            connecting: AHashSet::new(),
            closing: FuturesUnordered::new(),
            epoch: 0,
            turns: Turns::default(),
            blocked: AHashSet::new(),
            twins: Twins::default(),
            next_request: 0,
            answers: Owed::default(),
            own_lost: None,
            own_retry_at: None,
            progress: Progress::default(),
        };
        connections.remotes.insert(own, Remote::new(work.identity(own)));
        connections.begin(own, Some(dialled));
        connections
    }

    /// What it has come to so far.
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    pub(super) fn progress_mut(&mut self) -> &mut Progress {
        &mut self.progress
    }

    /// Identities that have a connection, or are getting one.
    pub(super) fn sessions(&self) -> usize {
        self.remotes.values().filter(|remote| remote.phase != Phase::New).count()
    }

    /// Writes and reads once. With `wait` it returns when something happened, otherwise at once. Cancel safe.
    pub(super) async fn turn(&mut self, wait: bool) {
        poll_fn(|cx| {
            let mut happened = self.answers.poll(cx).is_ready();
            while let Poll::Ready(Some(dial)) = self.dials.poll_next_unpin(cx) {
                self.dialled.push(dial);
                happened = true;
            }
            while let Poll::Ready(Some(())) = self.closing.poll_next_unpin(cx) {}
            if let Poll::Ready(rung) = self.bells.poll_rung(cx) {
                for lane in rung {
                    let remote = self.remotes.get_mut(&lane);
                    if let Some(connection) = remote.and_then(|remote| remote.connection.as_mut()) {
                        connection.poll();
                        self.rung.push(lane);
                        happened = true;
                    }
                }
            }
            if happened || !wait { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Closes all connections in order.
    pub(super) async fn close(mut self, work: &Work) {
        self.take_answered(work);
        let open = self.remotes.drain().filter_map(|(_, remote)| remote.connection);
        join_all(open.map(|connection| connection.close())).await;
    }

    /// Works through what arrived.
    pub(super) fn handle_events(&mut self, work: &mut Work) -> Result<(), Failure> {
        for dial in std::mem::take(&mut self.dialled) {
            self.dialled(dial, work)?;
        }
        for lane in std::mem::take(&mut self.rung) {
            self.serve(lane, work)?;
        }
        self.take_paid(work);
        Ok(())
    }

    /// Works through what one connection brought.
    fn serve(&mut self, lane: LaneId, work: &mut Work) -> Result<(), Failure> {
        loop {
            let remote = self.remotes.get_mut(&lane);
            let Some(connection) = remote.and_then(|remote| remote.connection.as_mut()) else {
                return Ok(());
            };
            if let Some(received) = connection.next() {
                self.received(lane, received, work)?;
                continue;
            }
            if let Some(reason) = connection.take_end() {
                return self.lost(lane, Failure::new(UpstreamCause::Lost, reason), work);
            }
            if connection.backlog_bytes() < connection::BACKLOG_BYTES_MAX && self.blocked.remove(&lane) {
                self.ready(lane, &work.lanes);
            }
            return Ok(());
        }
    }

    fn received(&mut self, lane: LaneId, received: Received, work: &mut Work) -> Result<(), Failure> {
        let phase = self.remotes.get(&lane).map(|remote| remote.phase);
        match (phase, received) {
            (Some(Phase::Connecting), Received::ConnAck(answer)) => {
                return self.connected(lane, answer, work);
            }
            (Some(Phase::Open), Received::PubAck(packet_id)) => self.acknowledged(lane, packet_id, work),
            (Some(Phase::Open), Received::SubAck(packet_id, granted)) => {
                self.subscribed(lane, packet_id, granted, work);
            }
            (Some(Phase::Open), Received::Publish(publish)) => self.downward(lane, publish, work),
            (Some(Phase::Open), Received::UnsubAck | Received::PingResp) => {}
            (_, received) => {
                let text = format!("the upstream breaks the protocol: {received:?} comes out of its turn");
                return self.lost(lane, Failure::new(UpstreamCause::Closed, text), work);
            }
        }
        Ok(())
    }

    /// Looks at deadlines, and at the age of the tokens.
    pub(super) fn look(&mut self, work: &mut Work, now: Instant) -> Result<(), Failure> {
        let limit = self.options.operation_timeout;
        self.fates.expire_all(self.store.now(), work);
        self.look_at_own(work, now)?;
        if self.progress.is_up() {
            let renewed = self.options.take_renewed();
            renewed.iter().for_each(|identity| self.renew_own(identity, work));
        }
        let mut late: Vec<(LaneId, Stall)> = Vec::new();
        let mut gone: Vec<(LaneId, String)> = Vec::new();
        let (mut idle, mut renewing) = (Vec::new(), Vec::new());
        for (lane, remote) in &mut self.remotes {
            let (lane, over) = (*lane, |since: Instant, limit| now.duration_since(since) > limit);
            let Some(connection) = &mut remote.connection else { continue };
            if remote.phase == Phase::Connecting {
                if over(remote.since, limit) {
                    gone.push((lane, format!("CONNECT was not answered within {limit:?}")));
                }
                continue;
            }
            if let Some(reason) = connection.look(now, self.options.idle_timeout, limit) {
                gone.push((lane, reason));
                continue;
            }
            let unanswered = work.lanes.oldest_sent_at(lane);
            let unused =
                work.lanes.is_idle(lane) && work.wants.of(lane).is_nothing() && !self.twins.has(lane);
            if remote.unsubscribed_since().is_some_and(|since| over(since, limit)) {
                late.push((lane, Stall::NotAttached));
            } else if unanswered.is_some_and(|since| over(since, limit * ANSWER_TIMEOUTS)) {
                late.push((lane, Stall::Unanswered));
            } else if unused && lane != self.own && over(remote.since, Duration::from_secs(IDLE_SECS)) {
                idle.push(lane);
            } else if let Some((at, latest)) = remote.renewal.filter(|(at, _)| now >= *at) {
                let quiet = remote.sent.is_empty() && remote.calls.is_empty() && !self.twins.has(lane);
                tracing::trace!(?at, quiet, "A connection is due for a fresh token");
                if quiet || now >= latest {
                    renewing.push(lane);
                }
            }
        }
        late.extend(self.twins.look(now, limit).into_iter().map(|lane| (lane, Stall::TwinUnanswered)));
        for (lane, reason) in gone {
            self.lost(lane, Failure::new(UpstreamCause::Lost, reason), work)?;
        }
        for (lane, stall) in late {
            self.start_anew(lane, stall, work, now)?;
        }
        idle.into_iter().for_each(|lane| self.drop_remote(lane));
        renewing.into_iter().for_each(|lane| self.renew(lane, work));
        Ok(())
    }

    /// Something of an identity does not get on: takes the step that the watchdog says. Its link and its session are
    /// its connection here.
    fn start_anew(
        &mut self,
        lane: LaneId,
        stall: Stall,
        work: &mut Work,
        now: Instant,
    ) -> Result<(), Failure> {
        let step = work.watchdog.stalled(lane, stall, now);
        let identity = work.identity(lane);
        tell::stalled(identity, None, stall, step);
        let text = format!("nothing gets on: {} ({identity})", stall.text());
        let failure = Failure::new(UpstreamCause::NoProgress, text);
        match step {
            WatchdogStep::Link | WatchdogStep::Session => self.lost(lane, failure, work),
            WatchdogStep::Connection | WatchdogStep::Name => {
                self.progress.other_address = step == WatchdogStep::Name;
                Err(failure)
            }
        }
    }

    /// The upstream asked for a pause.
    fn throttled_for(&mut self, reason: String, pause: Duration) {
        self.progress.throttled_for(reason, pause, self.options.operation_timeout * ANSWER_TIMEOUTS);
    }
}
