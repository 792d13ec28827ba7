//! One connection from CONNECT to its end: a single task that decodes in turns, publishes each turn as one batch,
//! acknowledges in order, and writes deliveries.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tracing::warn;

use super::deliver::{Deliverer, DeliveryLimits, TooSlow};
use super::encode;
use super::end::{ConnectionEnd, ProtocolError};
use super::frame::{FixedHeader, Frame};
use super::handshake::{self, Admitted};
use super::packet::{self, Packet, PacketId, Publish, QoS, Will};
use super::session::{FeatureSet, Session};
use super::topic::{self, Inbound};
use super::wire::Wire;
use crate::backend::{Backend, CloseReason, Command, HeadDrop, PublishError};
use crate::head::warn_limit::WarnLimit;
use crate::identity::Identity;
use crate::message::{Message, Sender};

/// Output beyond this is not added to by deliveries, and what the client asks is not answered until it shrinks.
const OUTPUT_BACKLOG_BYTES_MAX: usize = 1_048_576;
/// Bytes read ahead while decoding rests, so that a PINGREQ behind publishes is still seen.
const READ_AHEAD_BYTES_MAX: usize = 65_536;
/// Deliveries out at QoS 1 that the client has not acknowledged.
const IN_FLIGHT_MAX: usize = 4_096;
/// Deliveries that wait behind a full output or window; the pumps' own windows keep far below.
const WAITING_MAX: usize = 8_192;
/// How long the will of an ended connection may take to get in line.
const WILL_MAX: Duration = Duration::from_secs(5);

static DROPPED: WarnLimit = WarnLimit::new();

/// Bounds of one connection.
#[derive(Debug, Clone)]
pub struct MqttLimits {
    /// CONNECT must be there this long after the socket was accepted.
    pub connect_arrival_max: Duration,
    /// A login that takes longer is refused as unavailable; SDKs wait 30 s for CONNACK.
    pub login_max: Duration,
    /// Longest silence that a client is allowed, whatever keep alive it asked for.
    pub silence_max: Duration,
    /// PUBLISH packets of a connection that wait for the store. The original waits for 16 at most; here they are
    /// stored in batches, so the limit is only there to bound memory.
    pub publishes_pending_max: usize,
    /// Bytes of those packets.
    pub publishes_pending_bytes_max: usize,
    /// A client that takes none of the bytes that wait for it for so long is cut off.
    pub write_stall_max: Duration,
    /// Whether a device may log in with a certificate.
    pub certificate_authentication: bool,
}

impl Default for MqttLimits {
    fn default() -> Self {
        Self {
            connect_arrival_max: Duration::from_secs(60),
            login_max: Duration::from_secs(25),
            silence_max: Duration::from_secs(600),
            publishes_pending_max: 1_024,
            publishes_pending_bytes_max: 1_048_576,
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
    let admitted = tokio::select! {
        biased;
        () = shutdown.as_mut() => Err(ConnectionEnd::Closed(CloseReason::Stopping)),
        admitted = handshake::admit(&mut wire, &backend, &limits, peer) => admitted,
    };
    let (end, identity) = match admitted {
        Err(end) => (end, None),
        Ok(admitted) => {
            let identity = admitted.identity.clone();
            (run(&mut wire, &backend, limits, admitted, shutdown).await, Some(identity))
        }
    };
    end.report(identity.as_ref());
    wire.close(matches!(end, ConnectionEnd::Refused(_) | ConnectionEnd::PeerClosed)).await;
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
    admitted: Admitted<B::Client>,
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
    } = admitted;
    let sender = backend.sender(&client);
    let silence_max = match keep_alive_secs {
        0 => limits.silence_max,
        secs => limits.silence_max.min(Duration::from_millis(u64::from(secs) * 1_500)),
    };
    let now = Instant::now();
    let delivery_limits = DeliveryLimits {
        in_flight_max: IN_FLIGHT_MAX,
        waiting_max: WAITING_MAX,
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
        publishes: VecDeque::new(),
        packet_ids: VecDeque::new(),
        pending: 0,
        pending_bytes: 0,
        looked_ahead_bytes: 0,
        pings_answered_ahead: 0,
        silence_max,
        last_packet: now,
        timer: Box::pin(sleep_until(now + silence_max)),
    };
    let end = connection.work(backend, &mut client, &sender, persistent).await;
    if let Some(will) = will.filter(|_| end.keeps_will()) {
        let published = publish_will(backend, &mut client, &sender, will);
        if timeout(WILL_MAX, published).await.is_err() {
            warn!("client {}: its will could not be stored in time", sender.identity);
        }
    }
    end
}

struct Connection<'a, S, F, C> {
    wire: &'a mut Wire<S>,
    limits: MqttLimits,
    mailbox: mpsc::Receiver<Command>,
    shutdown: Pin<&'a mut F>,
    deliverer: Deliverer,
    identity: Identity,
    session: Session,
    /// The session as the store has it; empty when it has none.
    stored_session: Bytes,
    features: FeatureSet,
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

/// What one turn of decoding brought.
#[derive(Default)]
struct Turn {
    messages: Vec<Message>,
    acknowledged: usize,
    count: usize,
    bytes: usize,
    /// SUBACKs and UNSUBACKs, sent when the session is stored.
    answers: BytesMut,
    end: Option<ConnectionEnd>,
}

/// How far a connection may go while a future runs that needs its client.
enum Progress {
    Input,
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
            let turn = self.turn(backend, client, sender);
            if let Err(end) = self.finish_turn(backend, client, persistent, turn).await {
                return end;
            }
            match poll_fn(|cx| self.poll_progress(cx, false)).await {
                Progress::Input => {}
                Progress::End(end) => return end,
            }
        }
    }

    /// Decodes every complete packet of the input, unless too much waits already.
    fn turn<B: Backend>(&mut self, backend: &B, client: &B::Client, sender: &Arc<Sender>) -> Turn {
        let mut turn = Turn::default();
        let before = self.wire.input.len();
        while turn.end.is_none() && !self.rests(turn.count, turn.bytes) {
            let frame = match Frame::take(&mut self.wire.input) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => {
                    turn.end = Some(ProtocolError::Frame(error).into());
                    break;
                }
            };
            turn.end = match packet::decode(frame) {
                Err(error) => Some(ProtocolError::Decode(error).into()),
                Ok(packet) => self.packet(backend, client, sender, &mut turn, packet).err(),
            };
        }
        let consumed = before - self.wire.input.len();
        if consumed > 0 {
            self.last_packet = Instant::now();
            self.looked_ahead_bytes = self.looked_ahead_bytes.saturating_sub(consumed);
        }
        if self.wire.input.is_empty() {
            // Even an empty buffer would keep the whole of the last read alive.
            self.wire.input = BytesMut::new();
        }
        // What a client acknowledged in front of its DISCONNECT counts; from one that broke the protocol nothing does.
        if !matches!(turn.end, Some(ConnectionEnd::Protocol(_))) {
            self.deliverer.settle_acknowledged();
        }
        turn
    }

    fn packet<B: Backend>(
        &mut self,
        backend: &B,
        client: &B::Client,
        sender: &Arc<Sender>,
        turn: &mut Turn,
        packet: Packet,
    ) -> Result<(), ConnectionEnd> {
        match packet {
            Packet::Connect(_) => return Err(ProtocolError::SecondConnect.into()),
            Packet::Publish(publish) => self.publish(backend, client, sender, turn, publish)?,
            Packet::PubAck(packet_id) => {
                if !self.deliverer.acknowledge(packet_id) {
                    tracing::debug!("client {}: PUBACK of the unknown id {packet_id}", self.identity);
                }
            }
            Packet::Subscribe { packet_id, filters } => {
                for (filter, granted) in &filters {
                    let subscribed = self.session.subscribe(&self.identity, filter.as_str(), *granted);
                    subscribed.map_err(ProtocolError::SessionFull)?;
                }
                encode::suback(&mut turn.answers, packet_id, filters.iter().map(|(_, granted)| *granted));
            }
            Packet::Unsubscribe { packet_id, filters } => {
                for filter in &filters {
                    self.session.unsubscribe(filter.as_str());
                }
                encode::unsuback(&mut turn.answers, packet_id);
            }
            Packet::PingReq => match self.pings_answered_ahead.checked_sub(1) {
                Some(left) => self.pings_answered_ahead = left,
                None => encode::pingresp(&mut self.wire.output),
            },
            Packet::Disconnect => return Err(ConnectionEnd::Disconnected),
        }
        Ok(())
    }

    fn publish<B: Backend>(
        &mut self,
        backend: &B,
        client: &B::Client,
        sender: &Arc<Sender>,
        turn: &mut Turn,
        publish: Publish,
    ) -> Result<(), ConnectionEnd> {
        const RETAIN: (&str, &str) = ("mqtt-retain", "true");
        const DUP: (&str, &str) = ("mqtt-dup", "true");
        let Publish { topic, payload, packet_id, dup, retain } = publish;
        let added: &[_] = match (retain, dup) {
            (false, false) => &[],
            (true, false) => &[RETAIN],
            (false, true) => &[DUP],
            (true, true) => &[RETAIN, DUP],
        };
        turn.count += 1;
        turn.bytes += topic.bytes().len() + payload.len();
        match topic::read(&self.identity, &topic, added) {
            Inbound::Telemetry(properties) => {
                let message = Message::new(sender.clone(), properties, payload);
                match backend.check(client, &message) {
                    Ok(()) => turn.messages.push(message),
                    Err(PublishError::TooLarge { size_bytes, limit_bytes }) => {
                        return Err(ProtocolError::TooLarge { size_bytes, limit_bytes }.into());
                    }
                    Err(PublishError::Malformed(_)) => self.dropped(backend, client, HeadDrop::BadProperties),
                    Err(error) => return Err(ConnectionEnd::Store(error)),
                }
            }
            Inbound::TwinGet { request_id } | Inbound::TwinPatch { request_id: Some(request_id) } => {
                self.answer_twin_request(request_id);
            }
            // Without a request id nobody waits for an answer, and no method was called.
            Inbound::TwinPatch { request_id: None } | Inbound::MethodResponse { .. } => {}
            Inbound::Drop(reason) => self.dropped(backend, client, reason),
            Inbound::Close(error) => return Err(ProtocolError::Topic(error).into()),
        }
        if let Some(packet_id) = packet_id {
            self.packet_ids.push_back(packet_id);
            turn.acknowledged += 1;
        }
        Ok(())
    }

    /// Publishes and stores what a turn brought, and only then answers.
    async fn finish_turn<B>(
        &mut self,
        backend: &B,
        client: &mut B::Client,
        persistent: bool,
        turn: Turn,
    ) -> Result<(), ConnectionEnd>
    where
        B: Backend<Commit = C>,
    {
        let Turn { messages, acknowledged, count, bytes, answers, end } = turn;
        if count > 0 {
            let commit = if messages.is_empty() {
                None
            } else {
                Some(self.drive(backend.publish(client, messages)).await?.map_err(ConnectionEnd::Store)?)
            };
            self.pending += count;
            self.pending_bytes += bytes;
            self.publishes.push_back(Publishes { commit, acknowledged, count, bytes });
        }
        if !answers.is_empty() {
            if persistent {
                self.store_session(backend).await?;
            }
            self.switch_features(backend, client);
            self.wire.output.extend_from_slice(&answers);
        }
        match end {
            None => Ok(()),
            Some(end) => Err(end),
        }
    }

    /// Stores the session unless it is what is stored already: SDKs subscribe again and again to the same.
    async fn store_session<B: Backend>(&mut self, backend: &B) -> Result<(), ConnectionEnd> {
        let bytes = self.session.to_bytes();
        if self.stored_session != bytes {
            let identity = self.identity.clone();
            let stored = self.drive(backend.store_session(&identity, Some(bytes.clone()))).await?;
            stored.map_err(ConnectionEnd::Store)?;
            self.stored_session = bytes;
        }
        Ok(())
    }

    /// Runs a future that needs the client; meanwhile everything goes on but decoding.
    async fn drive<T: Future>(&mut self, future: T) -> Result<T::Output, ConnectionEnd> {
        let mut future = pin!(future);
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            match self.poll_progress(cx, true) {
                // A broken socket must not tear a batch from the client's last words: the loop finds it later.
                Poll::Ready(Progress::End(end)) => Poll::Ready(Err(end)),
                Poll::Ready(Progress::Input) | Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// Does all that needs no client, until there is a packet to decode or the connection ends. With `driving`,
    /// only the hub, the store or a stalled peer can end it.
    fn poll_progress(&mut self, cx: &mut Context<'_>, driving: bool) -> Poll<Progress> {
        if self.shutdown.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Progress::End(ConnectionEnd::Closed(CloseReason::Stopping)));
        }
        while let Poll::Ready(command) = self.mailbox.poll_recv(cx) {
            let end = match command {
                Some(Command::Deliver(deliveries)) => {
                    match self.deliverer.deliver(self.wire, &self.session, deliveries) {
                        Ok(()) => continue,
                        Err(TooSlow) => ConnectionEnd::TooSlow,
                    }
                }
                Some(Command::TwinAnswer(_) | Command::Desired(_) | Command::Invoke(_)) => continue,
                Some(Command::Close(reason)) => ConnectionEnd::Closed(reason),
                // A backend that lets go of the mailbox will never deliver or close again.
                None => ConnectionEnd::Closed(CloseReason::TakenOver),
            };
            return Poll::Ready(Progress::End(end));
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
        loop {
            let rests = driving || self.rests(0, 0);
            if rests {
                self.answer_pings_ahead(cx);
            } else if self.has_packet() {
                return Poll::Ready(Progress::Input);
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
        self.poll_timer(cx, driving).map(Progress::End)
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
                encode::puback(&mut self.wire.output, packet_id);
            }
            self.pending -= front.count;
            self.pending_bytes -= front.bytes;
            self.publishes.pop_front();
        }
        Ok(())
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>, driving: bool) -> Poll<ConnectionEnd> {
        let stall_deadline = self.wire.stalled_since().map(|since| since + self.limits.write_stall_max);
        if let Some(deadline) = stall_deadline
            && deadline < self.timer.deadline()
        {
            self.timer.as_mut().reset(deadline);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
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
            || self.wire.backlog_bytes() >= OUTPUT_BACKLOG_BYTES_MAX
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
        while self.wire.backlog_bytes() < OUTPUT_BACKLOG_BYTES_MAX
            && let Some(bytes) = self.wire.input.get(self.looked_ahead_bytes..)
            && let Ok(Some(header)) = FixedHeader::read(bytes)
            && header.total_bytes <= bytes.len()
        {
            if header.first_byte == 0xc0 && header.total_bytes == 2 {
                encode::pingresp(&mut self.wire.output);
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
        self.deliverer.settle_written(self.wire.written_position());
    }

    fn switch_features<B: Backend>(&mut self, backend: &B, client: &mut B::Client) {
        let features = self.session.features();
        for (feature, on) in features.changes_since(self.features) {
            backend.subscribe(client, feature, on);
        }
        self.features = features;
    }

    fn answer_twin_request(&mut self, request_id: &str) {
        const STATUS: u16 = 501;
        let now = time::OffsetDateTime::now_utc();
        let body = format!(
            "{{\"errorCode\":{}000,\"message\":\"twins are not served by this hub\",\"trackingId\":\"\",\
             \"timestampUtc\":\"{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z\"}}",
            STATUS,
            now.year(),
            u8::from(now.month()),
            now.day(),
            now.hour(),
            now.minute(),
            now.second(),
        );
        let topic = topic::twin_response(STATUS, request_id);
        self.deliverer.publish(self.wire, &self.session, &topic, &Bytes::from(body));
    }

    fn dropped<B: Backend>(&self, backend: &B, client: &B::Client, reason: HeadDrop) {
        backend.dropped(client, reason);
        if let Some(suppressed) = DROPPED.admit() {
            warn!(suppressed, "client {}: a message was dropped: {reason:?}", self.identity);
        }
    }
}

/// Publishes the will as if the client had sent it; a will that is no message of the client's is dropped.
async fn publish_will<B: Backend>(backend: &B, client: &mut B::Client, sender: &Arc<Sender>, will: Will) {
    const WILL: (&str, &str) = ("MessageType", "Will");
    const RETAIN: (&str, &str) = ("mqtt-retain", "true");
    let added: &[_] = if will.retain { &[WILL, RETAIN] } else { &[WILL] };
    let published = match topic::read(&sender.identity, &will.topic, added) {
        Inbound::Telemetry(properties) => {
            let message = Message::new(sender.clone(), properties, will.payload);
            match backend.check(client, &message) {
                Ok(()) => match backend.publish(client, vec![message]).await {
                    Ok(commit) if will.qos == QoS::AtLeastOnce => commit.await,
                    Ok(_) => Ok(()),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            }
        }
        _ => Err(PublishError::Malformed("its topic is no telemetry topic of the client")),
    };
    if let Err(error) = published
        && let Some(suppressed) = DROPPED.admit()
    {
        warn!(suppressed, "client {}: its will was dropped: {error}", sender.identity);
    }
}
