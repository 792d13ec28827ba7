//! The supervisor: connects, serves, backs off, and never waits for the network without a deadline.
//!
//! | wait | deadline | what then |
//! | --- | --- | --- |
//! | name look-up, TCP, TLS | the operation time-out, shared by all addresses | back off |
//! | open of the upstream | the operation time-out, by the engine | back off |
//! | the hub's own token: to be made, to be put, to be answered | the operation time-out each, twice it from TCP on | back off |
//! | token of an identity | the operation time-out | the connection |
//! | session, link of an identity | the operation time-out | watchdog, from the session on |
//! | answer to a transfer | twice the operation time-out | watchdog, from the link on |
//! | credit for what waits | the operation time-out | watchdog, from the link on |
//! | answer to a twin request | the operation time-out | the request fails; watchdog, from the link on |
//! | answer of a method by its client | 630 s | the call is forgotten |
//! | detach that is to be answered before a link is made anew | the operation time-out | watchdog, from the session on |
//! | bytes that the peer takes | 30 s, by the driver; the idle time-out, by the kernel | back off |
//! | bytes of the peer | the idle time-out, by the engine and by keep-alive probes | back off |
//! | close of the upstream, end of its stream | 5 s each | the process ends |
//!
//! What the rest of the hub does not take stops nobody here: see `outbox`. A cloud-to-device message that no client has
//! settled waits without an end, as its sender wants it; it takes up credit of its own link only.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use edgehub_storage::{Queue, ReadLimit, Store};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::control::{ControlPeer, Request};
use super::dial::dial;
use super::failure::{Failure, UpstreamCause};
use super::status::{Load, StatusBoard};
use super::targets::Target;
use super::way::Way;
use super::work::Work;
use super::{UpstreamOptions, UpstreamState, UpstreamStatus};
use crate::delivery::{Backoff, Losses, QueueReader};
use crate::head::warn_limit::WarnLimit;

/// Messages that one turn reads at most, so that the socket is looked at in between.
const TURN_MESSAGES_MAX: usize = 512;

/// Requests of the hub that one turn takes at most.
const REQUESTS_TURN_MAX: usize = 64;

/// How often deadlines of tokens, links and transfers are looked at; more often when deadlines are short.
const LOOK_MILLIS_MAX: u64 = 500;

/// A connection that lasted this long was good: the next pause is the shortest again.
const GOOD_CONNECTION_SECS: u64 = 30;

/// One on which requests were answered needs to last only as long as this many of the shortest pauses: every connection
/// begins with requests, so answers alone do not tell it from one that ends at once, again and again.
const WORKING_CONNECTION_PAUSES: u32 = 3;

static READ_WARNINGS: WarnLimit = WarnLimit::new();

/// Connects, serves and reconnects until it is told to stop.
pub(super) struct Supervisor {
    options: UpstreamOptions,
    store: Store,
    losses: Arc<Losses>,
    requests: mpsc::Receiver<Request>,
    queues: watch::Receiver<Option<Vec<(u32, Queue)>>>,
    stop: watch::Receiver<bool>,
    board: StatusBoard,
    work: Work,
    backoff: Backoff,
    /// An address on which nothing got on.
    avoid: Option<SocketAddr>,
}

/// Why serving a connection ended.
enum End {
    /// The hub is stopping.
    Stopped,
    /// The connection failed.
    Failed(Failure),
}

impl Supervisor {
    pub(super) fn new(
        options: UpstreamOptions,
        store: Store,
        losses: Arc<Losses>,
        control: ControlPeer,
        queues: watch::Receiver<Option<Vec<(u32, Queue)>>>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let address = format!("{}:{}", options.host, options.port);
        let board = StatusBoard::new(address, options.identity.to_string(), options.target.as_ref());
        let work = Work::new(options.transfer_max(), options.backoff, control.downward)
            .with_transfers_max(options.transfers_max())
            .to(options.target.as_ref(), options.ways());
        let backoff = Backoff::with(options.backoff);
        Self {
            options,
            store,
            losses,
            requests: control.requests,
            queues,
            stop,
            board,
            work,
            backoff,
            avoid: None,
        }
    }

    pub(super) fn status(&self) -> watch::Receiver<UpstreamStatus> {
        self.board.subscribe()
    }

    pub(super) async fn run(mut self) {
        loop {
            let failure = match self.connect_and_serve().await {
                End::Stopped => return,
                End::Failed(failure) => failure,
            };
            // A broker that closes for one transfer resets what it has not read, so that its close may be lost.
            let cut = matches!(failure.cause, UpstreamCause::Closed | UpstreamCause::Lost);
            if cut && !self.options.is_hub() {
                self.work.lanes.narrow();
            }
            self.work.reset();
            let pause = self.backoff.fail();
            tracing::warn!(
                code = "EH5001", upstream = %self.options.host, to = self.options.target.as_ref().map(Target::as_str), cause = failure.cause.as_str(), reason = failure.text,
                pause_secs = pause.as_secs_f32(), "The upstream is not reachable; messages are stored"
            );
            self.show_load(0);
            self.board.failed(&failure);
            let until = Instant::now() + pause;
            if self.offline(sleep_until(until)).await.is_none() {
                return;
            }
        }
    }

    /// Waits for something while there is no connection; none when the hub is stopping.
    async fn offline<T>(&mut self, waits_for: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(waits_for);
        loop {
            tokio::select! {
                done = &mut waits_for => return Some(done),
                _ = self.stop.wait_for(|stop| *stop) => return None,
                Some(request) = self.requests.recv() => self.work.offline(request),
                () = self.work.outbox.turn(), if !self.work.outbox.is_empty() => {}
            }
        }
    }

    async fn connect_and_serve(&mut self) -> End {
        self.board.enter(UpstreamState::Connecting, "connecting");
        let (options, avoid) = (self.options.clone(), self.avoid);
        let dialled = match self.offline(dial(&options, avoid)).await {
            None => return End::Stopped,
            Some(Err(failure)) => return End::Failed(failure),
            Some(Ok(dialled)) => dialled,
        };
        let address = dialled.address;
        let (store, losses) = (self.store.clone(), self.losses.clone());
        let mut way = Way::new(dialled, avoid, self.options.clone(), store, losses, &mut self.work);
        let mut up_since = None;
        let end = self.serve(&mut way, &mut up_since).await;
        let needed = match way.progress().worked {
            true => self.options.backoff.first * WORKING_CONNECTION_PAUSES,
            false => Duration::from_secs(GOOD_CONNECTION_SECS),
        };
        if way.progress().delivered || up_since.is_some_and(|since| since.elapsed() >= needed) {
            self.backoff.succeed();
        }
        self.avoid = match end {
            _ if way.progress().other_address => Some(address),
            // It works as well as the others.
            _ if way.progress().delivered && self.avoid == Some(address) => None,
            End::Stopped | End::Failed(_) => self.avoid,
        };
        if way.progress().token_refused {
            // The clock may have been wrong when it was made. Whoever else signs at this moment makes a new one.
            let _ = timeout(self.options.operation_timeout, self.options.tokens.forget()).await;
        }
        if matches!(end, End::Stopped) {
            way.close(&self.work).await;
        }
        end
    }

    async fn serve(&mut self, way: &mut Way, up_since: &mut Option<Instant>) -> End {
        let look_every = (self.options.operation_timeout / 4).min(Duration::from_millis(LOOK_MILLIS_MAX));
        let mut look = Instant::now() + look_every;
        // Whether there may be something to read, and whether reading failed since the last look.
        let (mut more, mut unreadable) = (true, false);
        let mut queues_changed = true;
        let (mut requests, mut listens) = (Vec::new(), true);
        loop {
            if let Err(failure) = way.handle_events(&mut self.work) {
                return End::Failed(failure);
            }
            let now = Instant::now();
            if now >= look {
                look = now + look_every;
                unreadable = false;
                if let Err(failure) = way.look(&mut self.work, now) {
                    return End::Failed(failure);
                }
                self.show(way, now);
            }
            if way.progress_mut().take_up() {
                tracing::info!(upstream = %self.options.host, to = self.options.target.as_ref().map(Target::as_str), "Connected to the upstream");
                *up_since = Some(now);
                self.board.enter(UpstreamState::Up, "");
                self.work.outbox.up();
                way.arrange_all(&mut self.work);
            }
            if way.progress().is_up() {
                let awake = self.work.wants.wake(now);
                way.resume(awake, &mut self.work);
            }
            if way.progress().is_up()
                && std::mem::take(&mut queues_changed)
                && let Some(queues) = self.queues.borrow_and_update().as_deref()
            {
                match &mut self.work.reader {
                    Some(reader) => reader.replace(queues),
                    None => {
                        let share = self.options.lower_share_percent;
                        self.work.reader = Some(QueueReader::new(queues, share));
                    }
                }
                more = true;
            }
            let mut may_wake = false;
            if let Some(reader) = self.work.reader.as_mut() {
                // Not before reading got on: many lanes that fail at different times would keep it in one place.
                may_wake = reader.is_fresh();
                if may_wake {
                    for (queue, offset) in self.work.lanes.wake(now) {
                        reader.rewind_to(queue, offset);
                        more = true;
                    }
                }
                if more && !unreadable && self.work.lanes.room() > 0 {
                    let limit = ReadLimit {
                        count: self.work.lanes.room().min(TURN_MESSAGES_MAX),
                        bytes: self.work.lanes.room_bytes(),
                    };
                    match reader.read(limit, None).await {
                        Ok(queued) => {
                            more = !queued.is_empty();
                            for queued in queued {
                                if let Some(lane) = self.work.lanes.push(queued, now) {
                                    way.ready(lane, &self.work.lanes);
                                }
                            }
                        }
                        Err(error) => {
                            if READ_WARNINGS.admit().is_some() {
                                tracing::error!(code = "EH5002", %error, "The queues of the upstream cannot be read");
                            }
                            unreadable = true;
                        }
                    }
                }
                way.send(&mut self.work);
                may_wake = self.work.reader.as_ref().is_some_and(QueueReader::is_fresh);
            }
            // Last, so that nothing of this turn waits for the next one to be asked for.
            if let Err(failure) = way.log_in(&mut self.work) {
                return End::Failed(failure);
            }
            let wake = self.work.lanes.next_wake().filter(|_| may_wake).map_or(look, |wake| wake.min(look));
            let wake = self.work.wants.next_wake().map_or(wake, |at| at.min(wake));
            let can_read = self.work.reader.is_some() && !unreadable && self.work.lanes.room() > 0;
            let idle = !(more && can_read);
            if !idle {
                // Reading from memory never waits; the other tasks of this thread have their turn here.
                tokio::task::yield_now().await;
            }
            let readable = async {
                match self.work.reader.as_ref() {
                    Some(reader) if can_read => reader.readable(None).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = way.turn(idle) => {}
                () = readable, if idle => more = true,
                () = sleep_until(wake), if idle => {}
                changed = self.queues.changed() => match changed {
                    Ok(()) => queues_changed = true,
                    Err(_) => return End::Stopped,
                },
                received = self.requests.recv_many(&mut requests, REQUESTS_TURN_MAX), if listens => {
                    // The hub let go of its end: nobody asks any more.
                    listens = received > 0;
                    // Whoever answers and leaves has answered.
                    way.take_answered(&self.work);
                    requests.drain(..).for_each(|request| way.request(request, &mut self.work));
                }
                () = self.work.outbox.turn(), if !self.work.outbox.is_empty() => {}
                _ = self.stop.wait_for(|stop| *stop) => return End::Stopped,
            }
        }
    }

    fn show(&mut self, way: &Way, now: Instant) {
        self.show_load(way.sessions());
        if let Some(reason) = way.progress().throttled(now) {
            self.board.enter(UpstreamState::Throttled, reason);
        } else if way.progress().is_up() {
            self.board.enter(UpstreamState::Up, "");
        }
    }

    fn show_load(&mut self, sessions: usize) {
        let lanes = &self.work.lanes;
        self.board.load(Load {
            in_flight: lanes.in_flight(),
            held: lanes.held(),
            sessions,
            parked_senders: lanes.parked(),
            parked_identities: self.work.wants.parked_count(),
            watchdog: self.work.watchdog.steps(),
        });
    }
}
