//! One connection from CONNECT to its end: a single task that decodes in turns, publishes each turn as one batch,
//! acknowledges in order, and writes deliveries.

mod bell;
mod turn;
mod will;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tracing::warn;

use self::bell::Bell;
use super::control::{self, NotCalled};
use super::deliver::{Deliverer, DeliveryLimits, Notified};
use super::encode;
use super::end::ConnectionEnd;
use super::frame::FixedHeader;
use super::handshake::{self, Admitted};
use super::packet::PacketId;
use super::session::{FeatureSet, Session};
use super::wire::Wire;
use crate::backend::{Backend, CallId, CloseReason, Command, CommandReceiver, PublishError};
use crate::head::anteroom::Anteroom;
use crate::head::warn_limit::WarnLimit;
use crate::identity::Identity;
use crate::message::Sender;

/// Output beyond this is not added to by deliveries, and what the client asks is not answered until it shrinks.
const OUTPUT_BACKLOG_BYTES_MAX: usize = 1_048_576;
/// Bytes read ahead while decoding rests, so that a PINGREQ behind publishes is still seen.
const READ_AHEAD_BYTES_MAX: usize = 65_536;
/// Deliveries out at QoS 1 that the client has not acknowledged.
const IN_FLIGHT_MAX: usize = 4_096;
/// Deliveries that wait behind a full output or window; the pumps' own windows keep far below. More go back.
const WAITING_MAX: usize = 8_192;
/// Twin answers, notifications and method calls that wait behind a full output.
const NOTICES_WAITING_MAX: usize = 100;
/// Bytes of them.
const NOTICES_WAITING_BYTES_MAX: usize = 16_777_216;
/// Those out at QoS 1 that the client has not acknowledged; further ones go at QoS 0, for nobody waits for it.
const NOTICES_IN_FLIGHT_MAX: usize = 100;
/// Calls that cannot be put to the client and wait to be answered in its place.
const NOT_CALLED_MAX: usize = 1_024;
/// How long the will of an ended connection may take to get in line.
const WILL_MAX: Duration = Duration::from_secs(5);

static DROPPED: WarnLimit = WarnLimit::new();

/// Bounds of one connection.
#[derive(Debug, Clone)]
pub struct MqttLimits {
    /// CONNECT must be there this long after the socket was accepted.
    pub connect_arrival_max: Duration,
    /// Who has not sent CONNECT yet, over all connections with a clone of it.
    pub anteroom: Anteroom,
    /// A login that takes longer is refused as unavailable; SDKs wait 30 s for CONNACK.
    pub login_max: Duration,
    /// Longest silence that a client is allowed, whatever keep alive it asked for.
    pub silence_max: Duration,
    /// PUBLISH packets of a connection that wait for the store. The original waits for 16 at most; here they are
    /// stored in batches, so the limit is only there to bound memory.
    pub publishes_pending_max: usize,
    /// Bytes of those packets.
    pub publishes_pending_bytes_max: usize,
    /// Bytes of the messages that wait behind a slow client; what does not fit goes back to where it came from, and is
    /// offered again.
    pub deliveries_waiting_bytes_max: usize,
    /// A client that takes none of the bytes that wait for it for so long is cut off.
    pub write_stall_max: Duration,
    /// Whether a device may log in with a certificate.
    pub certificate_authentication: bool,
}

impl Default for MqttLimits {
    fn default() -> Self {
        Self {
            connect_arrival_max: Duration::from_secs(60),
            anteroom: Anteroom::default(),
            login_max: Duration::from_secs(25),
            silence_max: Duration::from_secs(600),
            publishes_pending_max: 1_024,
            publishes_pending_bytes_max: 1_048_576,
            deliveries_waiting_bytes_max: 16_777_216,
            write_stall_max: Duration::from_secs(60),
            certificate_authentication: true,
        }
    }
}

/// What is known of the other end of a socket.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub address: Option<SocketAddr>,
    /// The certificates it showed, leaf first, in DER.
    pub certificates: Vec<Bytes>,
    /// When the socket was accepted, before any TLS handshake.
    pub accepted_at: Instant,
}

/// Serves one connection until it ends; `shutdown` resolves when the hub stops.
pub async fn serve<S, B>(
    stream: S,
    backend: B,
    limits: MqttLimits,
    peer: Peer,
    shutdown: impl Future<Output = ()> + Send,
) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    B: Backend,
{
    let mut shutdown = pin!(shutdown);
    let mut wire = Wire::new(stream);
    // What is done once has memory of its own, which an open connection does not keep.
    let admitted = tokio::select! {
        biased;
        () = shutdown.as_mut() => Err(ConnectionEnd::Closed(CloseReason::Stopping)),
        admitted = Box::pin(handshake::admit(&mut wire, &backend, &limits, peer)) => admitted,
    };
    let (end, identity) = match admitted {
        Err(end) => (end, None),
        Ok(admitted) => {
            let identity = admitted.identity.clone();
            (run(&mut wire, &backend, limits, admitted, shutdown).await, Some(identity))
        }
    };
    end.report(identity.as_ref());
    if end == ConnectionEnd::Crowded {
        // There is no time for an orderly end: the place is needed.
        return end;
    }
    Box::pin(wire.close(matches!(end, ConnectionEnd::Refused(_) | ConnectionEnd::PeerClosed))).await;
    end
}

/// Answers the CONNECT of a connection that may not log in as anybody with code 5, and ends it.
pub async fn refuse<S>(stream: S, limits: &MqttLimits, peer: &Peer, reason: &str) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut wire = Wire::new(stream);
    let end = handshake::refuse_any(&mut wire, limits, peer, reason).await;
    end.report(None);
    wire.close(matches!(end, ConnectionEnd::Refused(_))).await;
    end
}

async fn run<S, B, F>(
    wire: &mut Wire<S>,
    backend: &B,
    limits: MqttLimits,
    admitted: Box<Admitted<B::Client>>,
    shutdown: Pin<&mut F>,
) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    B: Backend,
    F: Future<Output = ()> + Send,
{
    let Admitted {
        mut client,
        mailbox,
        identity,
        session,
        stored_session,
        persistent,
        keep_alive_secs,
        will,
    } = *admitted;
    let sender = backend.sender(&client);
    let silence_max = match keep_alive_secs {
        0 => limits.silence_max,
        secs => limits.silence_max.min(Duration::from_millis(u64::from(secs) * 1_500)),
    };
    let now = Instant::now();
    let delivery_limits = DeliveryLimits {
        in_flight_max: IN_FLIGHT_MAX,
        waiting_max: WAITING_MAX,
        waiting_bytes_max: limits.deliveries_waiting_bytes_max,
        notices_waiting_max: NOTICES_WAITING_MAX,
        notices_waiting_bytes_max: NOTICES_WAITING_BYTES_MAX,
        notices_in_flight_max: NOTICES_IN_FLIGHT_MAX,
        output_backlog_bytes_max: OUTPUT_BACKLOG_BYTES_MAX,
    };
    let mut connection = Connection {
        wire,
        limits,
        mailbox,
        shutdown,
        deliverer: Deliverer::new(identity.clone(), delivery_limits),
        identity,
        session,
        stored_session,
        features: FeatureSet::default(),
        not_called: Vec::new(),
        publishes: VecDeque::new(),
        packet_ids: VecDeque::new(),
        pending: 0,
        pending_bytes: 0,
        looked_ahead_bytes: 0,
        pings_answered_ahead: 0,
        silence_max,
        last_packet: now,
        timer: Box::pin(sleep_until(now + silence_max)),
        bell: Bell::new(),
        timer_rang: true,
    };
    let end = connection.work(backend, &mut client, &sender, persistent).await;
    if let Some(will) = will.filter(|_| end.keeps_will()) {
        let published = Box::pin(will::publish_will(backend, &mut client, &sender, will));
        if timeout(WILL_MAX, published).await.is_err() {
            warn!(code = "EH2001", "client {}: its will could not be stored in time", sender.identity);
        }
    }
    end
}

struct Connection<'a, S, F, C> {
    wire: &'a mut Wire<S>,
    limits: MqttLimits,
    mailbox: CommandReceiver,
    shutdown: Pin<&'a mut F>,
    deliverer: Deliverer,
    identity: Identity,
    session: Session,
    /// The session as the store has it; empty when it has none.
    stored_session: Bytes,
    features: FeatureSet,
    /// Calls that did not reach the client, to be answered in its place.
    not_called: Vec<(CallId, NotCalled)>,
    /// Turns whose messages are not stored yet, oldest first.
    publishes: VecDeque<Publishes<C>>,
    /// The packet ids of all of them, in the order of the PUBLISH packets.
    packet_ids: VecDeque<PacketId>,
    pending: usize,
    pending_bytes: usize,
    /// How far the input was searched for PINGREQ while decoding rests.
    looked_ahead_bytes: usize,
    pings_answered_ahead: usize,
    silence_max: Duration,
    last_packet: Instant,
    timer: Pin<Box<Sleep>>,
    /// Rings for the end of the hub, the mailbox and the timer: what most packets do not concern.
    bell: Bell,
    /// Whether the timer is to be looked at.
    timer_rang: bool,
}

/// The publishes of one turn.
struct Publishes<C> {
    /// Nothing when all of them were dropped or are no messages.
    commit: Option<C>,
    /// How many of them are acknowledged.
    acknowledged: usize,
    count: usize,
    bytes: usize,
}

/// How far a connection may go while a future runs that needs its client.
enum Progress {
    /// There is something to do that needs the client.
    Turn,
    End(ConnectionEnd),
}

impl<S, F, C> Connection<'_, S, F, C>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    F: Future<Output = ()> + Send,
    C: Future<Output = Result<(), PublishError>> + Send + Unpin,
{
    async fn work<B>(
        &mut self,
        backend: &B,
        client: &mut B::Client,
        sender: &Arc<Sender>,
        persistent: bool,
    ) -> ConnectionEnd
    where
        B: Backend<Commit = C>,
    {
        self.switch_features(backend, client);
        loop {
            for (call, not_called) in self.not_called.drain(..) {
                backend.method_answered(client, call, not_called.answer());
            }
            let turn = self.turn(backend, client, sender);
            if let Err(end) = self.finish_turn(backend, client, persistent, turn).await {
                return end;
            }
            match poll_fn(|cx| self.poll_progress(cx, false)).await {
                Progress::Turn => {}
                Progress::End(end) => return end,
            }
        }
    }

    /// Runs a future that needs the client; meanwhile everything goes on but decoding.
    async fn drive<T: Future>(&mut self, mut future: Pin<&mut T>) -> Result<T::Output, ConnectionEnd> {
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            match self.poll_progress(cx, true) {
                // A broken socket must not tear a batch from the client's last words: the loop finds it later.
                Poll::Ready(Progress::End(end)) => Poll::Ready(Err(end)),
                Poll::Ready(Progress::Turn) | Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// Does all that needs no client, until there is a packet to decode or the connection ends. With `driving`,
    /// only the hub, the store or a stalled peer can end it.
    fn poll_progress(&mut self, cx: &mut Context<'_>, driving: bool) -> Poll<Progress> {
        if self.bell.rang(cx) {
            self.timer_rang = true;
            let waker = self.bell.waker().clone();
            let mut bell = Context::from_waker(&waker);
            if self.shutdown.as_mut().poll(&mut bell).is_ready() {
                return Poll::Ready(Progress::End(ConnectionEnd::Closed(CloseReason::Stopping)));
            }
            while let Poll::Ready(command) = self.mailbox.poll_recv(&mut bell) {
                // A backend that lets go of the mailbox will never deliver or close again.
                let command = command.unwrap_or(Command::Close(CloseReason::TakenOver));
                if let Err(end) = self.obey(command) {
                    return Poll::Ready(Progress::End(end));
                }
            }
        }
        if let Err(error) = self.acknowledge_stored(cx) {
            return Poll::Ready(Progress::End(ConnectionEnd::Store(error)));
        }
        self.poll_write(cx);
        // Room that the write made is used at once: nothing else would wake this task for what waits.
        while self.deliverer.resume(self.wire, &self.session) {
            self.poll_write(cx);
        }
        if self.wire.broken() && !driving {
            return Poll::Ready(Progress::End(ConnectionEnd::PeerClosed));
        }
        if !self.not_called.is_empty() && !driving {
            return Poll::Ready(Progress::Turn);
        }
        loop {
            let rests = driving || self.rests(0, 0);
            if rests {
                self.answer_pings_ahead(cx);
            } else if self.has_packet() {
                return Poll::Ready(Progress::Turn);
            } else if self.wire.peer_closed() {
                return Poll::Ready(Progress::End(ConnectionEnd::PeerClosed));
            }
            let wants_bytes = !rests || self.wire.input.len() < READ_AHEAD_BYTES_MAX;
            if !wants_bytes
                || self.wire.peer_closed()
                || self.wire.broken()
                || self.wire.poll_read(cx).is_pending()
            {
                break;
            }
            if self.wire.broken() && !driving {
                return Poll::Ready(Progress::End(ConnectionEnd::PeerClosed));
            }
        }
        self.poll_timer(driving).map(Progress::End)
    }

    /// Does what the hub asks for.
    fn obey(&mut self, command: Command) -> Result<(), ConnectionEnd> {
        match command {
            Command::Deliver(deliveries) => {
                self.deliverer.deliver(self.wire, &self.session, deliveries);
            }
            Command::TwinAnswer(answer) => {
                if let Some(notice) = control::twin_answer(&answer) {
                    self.deliverer.notify(self.wire, &self.session, notice)?;
                }
            }
            Command::Desired(patch) => {
                self.deliverer.notify(self.wire, &self.session, control::desired(patch))?;
            }
            Command::Invoke(call) => {
                let id = call.id;
                let called = match control::call(call) {
                    Ok(notice) => match self.deliverer.notify(self.wire, &self.session, notice)? {
                        Notified::Taken => Ok(()),
                        Notified::NotSubscribed => Err(NotCalled::NotSubscribed),
                    },
                    Err(not_called) => Err(not_called),
                };
                // Beyond the bound the caller hears of it by its own time limit.
                if let Err(not_called) = called
                    && self.not_called.len() < NOT_CALLED_MAX
                {
                    self.not_called.push((id, not_called));
                }
            }
            Command::Close(reason) => return Err(ConnectionEnd::Closed(reason)),
        }
        Ok(())
    }

    /// Puts out the PUBACKs of all turns that are stored, in order.
    fn acknowledge_stored(&mut self, cx: &mut Context<'_>) -> Result<(), PublishError> {
        while let Some(front) = self.publishes.front_mut() {
            if let Some(commit) = front.commit.as_mut() {
                match Pin::new(commit).poll(cx) {
                    Poll::Pending => break,
                    Poll::Ready(stored) => stored?,
                }
            }
            for packet_id in self.packet_ids.drain(..front.acknowledged) {
                encode::puback(&mut self.wire.outlet.buffer, packet_id);
            }
            self.pending -= front.count;
            self.pending_bytes -= front.bytes;
            self.publishes.pop_front();
        }
        Ok(())
    }

    fn poll_timer(&mut self, driving: bool) -> Poll<ConnectionEnd> {
        let stall_deadline = self.wire.stalled_since().map(|since| since + self.limits.write_stall_max);
        if let Some(deadline) = stall_deadline
            && deadline < self.timer.deadline()
        {
            self.timer.as_mut().reset(deadline);
            self.timer_rang = true;
        }
        if !std::mem::take(&mut self.timer_rang) {
            return Poll::Pending;
        }
        let mut bell = Context::from_waker(self.bell.waker());
        while self.timer.as_mut().poll(&mut bell).is_ready() {
            let now = Instant::now();
            if stall_deadline.is_some_and(|deadline| deadline <= now) {
                return Poll::Ready(ConnectionEnd::TooSlow);
            }
            if driving || self.rests(0, 0) {
                // It is the hub that does not listen.
                self.last_packet = now;
            }
            let silence_deadline = self.last_packet + self.silence_max;
            if silence_deadline <= now {
                return Poll::Ready(ConnectionEnd::KeepAlive);
            }
            let next = stall_deadline.map_or(silence_deadline, |deadline| deadline.min(silence_deadline));
            self.timer.as_mut().reset(next);
        }
        Poll::Pending
    }

    /// Whether decoding rests because too much waits for the store or for the client.
    fn rests(&self, more: usize, more_bytes: usize) -> bool {
        self.pending + more >= self.limits.publishes_pending_max
            || self.pending_bytes + more_bytes >= self.limits.publishes_pending_bytes_max
            || self.wire.outlet.backlog_bytes() >= OUTPUT_BACKLOG_BYTES_MAX
    }

    fn has_packet(&self) -> bool {
        match FixedHeader::read(&self.wire.input) {
            Ok(Some(header)) => header.total_bytes <= self.wire.input.len(),
            Ok(None) => false,
            Err(_) => true,
        }
    }

    /// Answers the PINGREQs among packets that are not decoded yet.
    fn answer_pings_ahead(&mut self, cx: &mut Context<'_>) {
        let answered_before = self.pings_answered_ahead;
        while self.wire.outlet.backlog_bytes() < OUTPUT_BACKLOG_BYTES_MAX
            && let Some(bytes) = self.wire.input.get(self.looked_ahead_bytes..)
            && let Ok(Some(header)) = FixedHeader::read(bytes)
            && header.total_bytes <= bytes.len()
        {
            if header.first_byte == 0xc0 && header.total_bytes == 2 {
                encode::pingresp(&mut self.wire.outlet.buffer);
                self.pings_answered_ahead += 1;
            }
            self.looked_ahead_bytes += header.total_bytes;
        }
        if self.pings_answered_ahead > answered_before {
            self.poll_write(cx);
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) {
        self.wire.poll_write(cx);
        self.deliverer.settle_written(self.wire.outlet.written_position());
    }
}
