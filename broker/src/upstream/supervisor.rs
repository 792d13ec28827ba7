//! The supervisor: connects, serves, backs off, and never waits without a deadline.

use std::sync::Arc;
use std::time::Duration;

use edgehub_storage::{Queue, ReadLimit, Store};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::lanes::Lanes;
use super::status::StatusBoard;
use super::uplink::Uplink;
use super::{UpstreamOptions, UpstreamState, UpstreamStatus};
use crate::delivery::{Backoff, Losses, QueueReader, SentMetrics};
use crate::dial::{self, Target, UpstreamStream};
use crate::head::warn_limit::WarnLimit;

/// Messages that one turn reads at most, so that the socket is looked at in between.
const TURN_MESSAGES_MAX: usize = 512;

/// How often deadlines of tokens, links and transfers are looked at; more often when deadlines are short.
const LOOK_MILLIS_MAX: u64 = 500;

/// A connection that lasted this long was good: the next pause is the shortest again.
const GOOD_CONNECTION_SECS: u64 = 30;

static READ_WARNINGS: WarnLimit = WarnLimit::new();

/// Connects, serves and reconnects until it is told to stop.
pub(super) struct Supervisor {
    options: UpstreamOptions,
    store: Store,
    losses: Arc<Losses>,
    queues: watch::Receiver<Option<Vec<(u32, Queue)>>>,
    stop: watch::Receiver<bool>,
    board: StatusBoard,
    lanes: Lanes,
    sent: SentMetrics,
    backoff: Backoff,
}

/// Why serving a connection ended.
enum End {
    /// The hub is stopping.
    Stopped,
    /// The connection failed; the text says how.
    Failed(String),
}

impl Supervisor {
    pub(super) fn new(
        options: UpstreamOptions,
        store: Store,
        losses: Arc<Losses>,
        queues: watch::Receiver<Option<Vec<(u32, Queue)>>>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let address = format!("{}:{}", options.host, options.port);
        let board = StatusBoard::new(address, options.identity.to_string());
        let lanes = Lanes::new(options.batch_max, options.backoff);
        let sent = SentMetrics::new("upstream", "");
        let backoff = Backoff::with(options.backoff);
        Self { options, store, losses, queues, stop, board, lanes, sent, backoff }
    }

    pub(super) fn status(&self) -> watch::Receiver<UpstreamStatus> {
        self.board.subscribe()
    }

    pub(super) async fn run(mut self) {
        loop {
            let reason = match self.connect_and_serve().await {
                End::Stopped => return,
                End::Failed(reason) => reason,
            };
            self.lanes.reset();
            let pause = self.backoff.fail();
            tracing::warn!(
                upstream = %self.options.host, reason, pause_secs = pause.as_secs_f32(),
                "The upstream is not reachable; messages are stored"
            );
            self.board.load(0, 0, 0);
            self.board.enter(UpstreamState::BackingOff, &reason);
            tokio::select! {
                () = sleep(pause) => {}
                _ = self.stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    async fn connect_and_serve(&mut self) -> End {
        self.board.enter(UpstreamState::Connecting, "connecting");
        let mut stop = self.stop.clone();
        let connected = tokio::select! {
            connected = timeout(self.options.operation_timeout, connect(&self.options)) => connected,
            _ = stop.wait_for(|stop| *stop) => return End::Stopped,
        };
        let stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(reason)) => return End::Failed(reason),
            Err(_) => {
                return End::Failed(format!("no connection within {:?}", self.options.operation_timeout));
            }
        };
        let mut uplink = Uplink::new(stream, self.options.clone(), self.store.clone(), self.losses.clone());
        let mut up_since = None;
        let end = self.serve(&mut uplink, &mut up_since).await;
        let lasted = |since: Instant| since.elapsed() >= Duration::from_secs(GOOD_CONNECTION_SECS);
        if uplink.has_delivered() || up_since.is_some_and(lasted) {
            self.backoff.succeed();
        }
        if uplink.is_token_refused() {
            // The clock may have been wrong when it was made. Whoever else signs at this moment makes a new one.
            let _ = timeout(self.options.operation_timeout, self.options.tokens.forget()).await;
        }
        if matches!(end, End::Stopped) {
            uplink.close().await;
        }
        end
    }

    async fn serve(&mut self, uplink: &mut Uplink<UpstreamStream>, up_since: &mut Option<Instant>) -> End {
        let look_every = (self.options.operation_timeout / 4).min(Duration::from_millis(LOOK_MILLIS_MAX));
        let mut reader: Option<QueueReader> = None;
        let mut look = Instant::now() + look_every;
        // Whether there may be something to read, and whether reading failed since the last look.
        let (mut more, mut unreadable) = (true, false);
        let mut queues_changed = true;
        loop {
            if let Err(reason) = uplink.handle_events(&mut self.lanes, reader.as_ref(), &mut self.sent) {
                return End::Failed(reason);
            }
            let now = Instant::now();
            if now >= look {
                look = now + look_every;
                unreadable = false;
                if let Err(reason) = uplink.look(&mut self.lanes, reader.as_ref(), now) {
                    return End::Failed(reason);
                }
                self.show(uplink, now);
            }
            if let Err(reason) = uplink.put_tokens(&self.lanes) {
                return End::Failed(reason);
            }
            if uplink.take_up() {
                tracing::info!(upstream = %self.options.host, "Connected to the upstream");
                *up_since = Some(now);
                self.board.enter(UpstreamState::Up, "");
            }
            if uplink.is_up()
                && std::mem::take(&mut queues_changed)
                && let Some(queues) = self.queues.borrow_and_update().as_deref()
            {
                match &mut reader {
                    Some(reader) => reader.replace(queues),
                    None => reader = Some(QueueReader::new(queues, self.options.lower_share_percent)),
                }
                more = true;
            }
            let mut may_wake = false;
            if let Some(reader) = reader.as_mut() {
                // Not before reading got on: many lanes that fail at different times would keep it in one place.
                may_wake = reader.is_fresh();
                if may_wake {
                    for (queue, offset) in self.lanes.wake(now) {
                        reader.rewind_to(queue, offset);
                        more = true;
                    }
                }
                if more && !unreadable && self.lanes.room() > 0 {
                    let limit = ReadLimit {
                        count: self.lanes.room().min(TURN_MESSAGES_MAX),
                        bytes: self.lanes.room_bytes(),
                    };
                    match reader.read(limit, None).await {
                        Ok(queued) => {
                            more = !queued.is_empty();
                            for queued in queued {
                                if let Some(lane) = self.lanes.push(queued, now) {
                                    uplink.ready(lane, &self.lanes);
                                }
                            }
                        }
                        Err(error) => {
                            if READ_WARNINGS.admit().is_some() {
                                tracing::error!(%error, "The queues of the upstream cannot be read");
                            }
                            unreadable = true;
                        }
                    }
                }
                uplink.send(&mut self.lanes, reader, &mut self.sent);
                may_wake = reader.is_fresh();
            }
            let wake = self.lanes.next_wake().filter(|_| may_wake).map_or(look, |wake| wake.min(look));
            let can_read = reader.is_some() && !unreadable && self.lanes.room() > 0;
            let idle = !(more && can_read);
            if !idle {
                // Reading from memory never waits; the other tasks of this thread have their turn here.
                tokio::task::yield_now().await;
            }
            let readable = async {
                match reader.as_ref() {
                    Some(reader) if can_read => reader.readable(None).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = uplink.turn(idle) => {}
                () = readable, if idle => more = true,
                () = sleep_until(wake), if idle => {}
                changed = self.queues.changed() => match changed {
                    Ok(()) => queues_changed = true,
                    Err(_) => return End::Stopped,
                },
                _ = self.stop.wait_for(|stop| *stop) => return End::Stopped,
            }
        }
    }

    fn show(&mut self, uplink: &Uplink<UpstreamStream>, now: Instant) {
        self.board.load(self.lanes.in_flight(), self.lanes.held(), self.lanes.parked());
        if let Some(reason) = uplink.throttled(now) {
            self.board.enter(UpstreamState::Throttled, reason);
        } else if uplink.is_up() {
            self.board.enter(UpstreamState::Up, "");
        }
    }
}

/// The way to the upstream; the caller sets the deadline.
async fn connect(options: &UpstreamOptions) -> Result<UpstreamStream, String> {
    let target = Target { host: &options.host, port: options.port, tls: &options.tls, proxy: None };
    dial::amqp(target, &options.transport).await.map_err(|error| error.to_string())
}
