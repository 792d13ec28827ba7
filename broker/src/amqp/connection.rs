//! One AMQP connection as a state machine without I/O: bytes and time in, events and output out.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};

use super::error::{Condition, Error, Fault};
use super::event::*;
use super::frame::*;
use super::link::HandleTable;
use super::output::Output;
use super::performative::*;
use super::put::*;
use super::session::{Counts, Session, SessionState, Shared};

/// A peer that announces no idle time-out is assumed to have this one.
pub(super) const DEFAULT_PEER_IDLE: Duration = Duration::from_secs(120);
/// Reading stops when so many events wait for the owner.
const EVENTS_MAX: usize = 4_096;
/// Room for events that a connection without any keeps for itself.
const EVENTS_KEPT: usize = 8;
/// Room for events that is passed on at most.
const EVENTS_SPARE_MAX: usize = 1_024;

thread_local! {
    /// Room for events, which the connections of a thread use in turns: an idle one holds nothing.
    static SPARE_EVENTS: RefCell<VecDeque<Event>> = const { RefCell::new(VecDeque::new()) };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waiting for the peer's protocol header.
    Header,
    /// A client, waiting for the mechanisms of its peer.
    SaslMechanisms,
    /// A client, waiting for the outcome of its response.
    SaslOutcome,
    /// Waiting for `sasl-init`.
    SaslInit,
    /// Waiting for the owner's verdict about a PLAIN password.
    SaslVerdict,
    /// Waiting for the AMQP header after SASL.
    HeaderAfterSasl,
    /// Waiting for the peer's open.
    PeerOpen,
    /// Both opens are through.
    Opened,
    /// We closed; waiting for the peer's close.
    CloseSent,
    /// Over: nothing is read any more.
    Finished,
}

/// An AMQP 1.0 connection, listener or client.
///
/// The owner feeds bytes with [`receive`](Self::receive), takes events with [`poll_event`](Self::poll_event)
/// until there is none, gives commands, writes what [`output`](Self::output) holds and reports it with
/// [`written`](Self::written), and calls [`tick`](Self::tick) when [`next_deadline`](Self::next_deadline) has
/// come. Nothing in here waits, locks or performs I/O, and nothing a peer sends makes it panic.
#[derive(Debug)]
pub struct Connection {
    pub(super) client: bool,
    pub(super) options: Options,
    pub(super) phase: Phase,
    pub(super) output: Output,
    pub(super) events: VecDeque<Event>,
    pub(super) counts: Counts,
    pub(super) open_sent: bool,

    pub(super) sessions: Vec<Option<Box<Session>>>,
    free_channels: Vec<u16>,
    pub(super) peer_channels: HandleTable,
    sessions_due: Vec<u16>,
    pub(super) peer_channel_max: u16,

    pub(super) heartbeat_every: Duration,
    last_received: Instant,
    last_sent: Instant,
    /// End of the handshake, or of the wait for the peer's close.
    pub(super) phase_deadline: Option<Instant>,
}

impl Connection {
    /// The end that waits for a peer's protocol header. Takes `AMQP 0` and, with SASL, `AMQP 3`.
    pub fn listener(options: Options, now: Instant) -> Self {
        Self::new(false, options, now)
    }

    /// The end that dials; plain AMQP header unless [`Options::sasl`] says how to authenticate. Takes no sessions
    /// and links from the peer.
    pub fn client(options: Options, now: Instant) -> Self {
        let mut connection = Self::new(true, options, now);
        let header = if connection.options.sasl.is_some() { &HEADER_SASL } else { &HEADER_AMQP };
        connection.output.tail().put_slice(header);
        connection
    }

    fn new(client: bool, options: Options, now: Instant) -> Self {
        let tag_prefix = RandomState::new().hash_one(0u8).to_be_bytes();
        Self {
            client,
            phase: Phase::Header,
            output: Output::default(),
            events: VecDeque::new(),
            counts: Counts { frame_max_bytes: FRAME_MIN_MAX_BYTES as usize, tag_prefix, ..Counts::default() },
            open_sent: false,
            sessions: Vec::new(),
            free_channels: Vec::new(),
            peer_channels: HandleTable::default(),
            sessions_due: Vec::new(),
            peer_channel_max: u16::MAX,
            heartbeat_every: DEFAULT_PEER_IDLE / 8 * 7,
            last_received: now,
            last_sent: now,
            phase_deadline: Some(now + options.handshake_timeout),
            options,
        }
    }

    // ---- input --------------------------------------------------------------------------------------------

    /// Takes every complete frame out of `input`. Bytes that stay are the beginning of a frame, or wait until
    /// [`wants_input`](Self::wants_input) is true again.
    pub fn receive(&mut self, input: &mut BytesMut, now: Instant) {
        if self.events.capacity() == 0 {
            self.events = SPARE_EVENTS.take();
        }
        while self.wants_input() {
            match self.phase {
                Phase::Header | Phase::HeaderAfterSasl => {
                    let Some(header) = input.first_chunk::<8>().copied() else { return };
                    let _ = input.split_to(8);
                    self.last_received = now;
                    self.on_header(header);
                }
                Phase::SaslVerdict | Phase::Finished => return,
                Phase::SaslMechanisms
                | Phase::SaslOutcome
                | Phase::SaslInit
                | Phase::PeerOpen
                | Phase::Opened
                | Phase::CloseSent => {
                    let header = match FrameHeader::parse(input) {
                        Ok(Some(header)) if header.size <= input.len() => header,
                        Ok(_) => return,
                        Err(error) => {
                            self.fail(error);
                            continue;
                        }
                    };
                    let frame = input.split_to(header.size).freeze();
                    self.last_received = now;
                    if let Err(fault) = self.on_frame(header, frame) {
                        match fault {
                            Fault::Connection(error) | Fault::Session(error) | Fault::Link(error) => {
                                self.fail(error);
                            }
                        }
                    }
                }
            }
        }
        if self.phase == Phase::Finished {
            input.clear();
        }
    }

    /// False while the peer is to be kept from sending: too much output, too many events, or a verdict is due.
    pub fn wants_input(&self) -> bool {
        match self.phase {
            Phase::SaslVerdict | Phase::Finished => false,
            _ => self.output.len() < self.options.output_max_bytes && self.events.len() < EVENTS_MAX,
        }
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front();
        if event.is_none() && self.events.capacity() > EVENTS_KEPT {
            let events = std::mem::take(&mut self.events);
            if events.capacity() <= EVENTS_SPARE_MAX {
                SPARE_EVENTS.set(events);
            }
        }
        event
    }

    // ---- output and time ----------------------------------------------------------------------------------

    /// What is to be written, complete with the dispositions and flows that are due.
    pub fn output(&mut self) -> &mut Output {
        self.flush();
        &mut self.output
    }

    /// Bytes that wait to be written, without what [`output`](Self::output) would add.
    pub fn output_len(&self) -> usize {
        self.output.len()
    }

    /// Must be called after output was written: starts the heartbeat's time anew.
    pub fn written(&mut self, now: Instant) {
        self.last_sent = now;
        if self.counts.backlog_refused && self.output.len() <= self.options.output_max_bytes / 2 {
            self.counts.backlog_refused = false;
            if self.phase == Phase::Opened {
                self.events.push_back(Event::OutputDrained);
            }
        }
    }

    /// True when the connection is over: write what is left, then close the transport.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    /// When [`tick`](Self::tick) must be called, unless something else happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Finished => None,
            Phase::Opened => {
                let heartbeat = self.last_sent + self.heartbeat_every;
                Some(heartbeat.min(self.last_received + self.options.idle_timeout))
            }
            _ => self.phase_deadline,
        }
    }

    /// Sends a heartbeat, or gives a silent peer up, when it is time.
    pub fn tick(&mut self, now: Instant) {
        match self.phase {
            Phase::Finished => {}
            Phase::Opened => {
                if now >= self.last_received + self.options.idle_timeout {
                    let text = format!("nothing received for {:?}", self.options.idle_timeout);
                    self.fail(Error::new(Condition::CONNECTION_FORCED, text));
                } else if now >= self.last_sent + self.heartbeat_every {
                    // Output that waits is traffic enough; its write deadline is the driver's.
                    if self.output().is_empty() {
                        put_frame(self.output.tail(), FrameKind::Amqp, 0, |_| {});
                    }
                    self.last_sent = now;
                }
            }
            _ => {
                if self.phase_deadline.is_some_and(|deadline| now >= deadline) {
                    let text = "the handshake took too long";
                    match self.phase {
                        Phase::CloseSent => self.finish(None, By::Engine),
                        _ => self.fail(Error::new(Condition::CONNECTION_FORCED, text)),
                    }
                }
            }
        }
    }

    // ---- commands -----------------------------------------------------------------------------------------

    /// The verdict about a PLAIN password.
    pub fn sasl_outcome(&mut self, code: SaslCode) {
        if self.phase == Phase::SaslVerdict {
            self.write_sasl_outcome(code);
        }
    }

    /// Begins a session; `None` before the peer's open, or when there are too many. Links may be attached at
    /// once.
    pub fn begin(&mut self) -> Option<SessionId> {
        if self.phase != Phase::Opened {
            return None;
        }
        let id = self.place_session(SessionState::BeginSent)?;
        let (session, shared) = self.session_mut(id)?;
        session.write_begin(&mut { shared });
        Some(id)
    }

    /// Attaches a link; `None` when the session is gone, the name is taken (also by a link whose detach the peer
    /// has not answered), or there are too many links.
    pub fn attach(&mut self, session: SessionId, options: AttachOptions) -> Option<LinkId> {
        let (session, mut shared) = self.session_mut(session)?;
        session.attach(&mut shared, options)
    }

    /// Accepts a link that the peer asked for; false when it is gone.
    pub fn accept_attach(&mut self, link: LinkId, answer: AttachAnswer) -> bool {
        self.with_link(link, |session, shared| session.accept(shared, link, answer))
    }

    /// Refuses a link that the peer asked for (attach with null source and target, then detach); false when it
    /// is gone.
    pub fn refuse_attach(&mut self, link: LinkId, error: Error) -> bool {
        self.with_link(link, |session, shared| session.refuse(shared, link, error))
    }

    /// Changes the credit that a receiving link is kept at; 0 stops it after what was already granted.
    pub fn set_credit(&mut self, link: LinkId, credit: u32) -> bool {
        self.with_link(link, |session, shared| {
            let _ = shared;
            session.set_credit(link, credit)
        })
    }

    /// Deliveries that may be sent on a link now.
    pub fn credit(&self, link: LinkId) -> u32 {
        self.session(link.session)
            .and_then(|session| session.link(link))
            .filter(|link| link.is_attached() && link.role == Role::Sender)
            .map_or(0, |link| link.credit)
    }

    /// Largest message that the peer takes on a link on which we send, in bytes; `None` = no limit.
    pub fn max_message_bytes(&self, link: LinkId) -> Option<u64> {
        let limit = self.session(link.session)?.link(link)?.max_message_bytes;
        (limit != u64::MAX).then_some(limit)
    }

    /// Sends a message. Large pieces are queued without a copy.
    pub fn send(
        &mut self,
        link: LinkId,
        payload: Payload,
        options: SendOptions,
    ) -> Result<DeliveryId, SendError> {
        let (session, mut shared) = self.session_mut(link.session).ok_or(SendError::NotAttached)?;
        session.send(&mut shared, link, payload, options)
    }

    /// Settles a delivery: a received one with its outcome (nothing is written if it came settled), a sent one
    /// to give it up. False when it is settled already or its link is gone.
    pub fn settle(&mut self, delivery: DeliveryId, outcome: Outcome) -> bool {
        let Some((session, mut shared)) = self.session_mut(delivery.session) else { return false };
        let known = match delivery.sent {
            true => session.settle_sent(&mut shared, delivery.number, outcome),
            false => session.settle_received(&mut shared, delivery.number, outcome),
        };
        self.list_due(delivery.session.channel);
        known
    }

    /// Ends a link (closed = true). Its deliveries are void; no event follows.
    pub fn detach(&mut self, link: LinkId, error: Option<Error>) -> bool {
        self.with_link(link, |session, shared| {
            use super::link::LinkState;
            match session.link(link).map(|link| &link.state) {
                Some(LinkState::Attached | LinkState::AttachSent { .. }) => {
                    session.write_detach(shared, link.handle, true, error);
                    true
                }
                Some(LinkState::Requested(_)) => {
                    session.refuse(shared, link, error.unwrap_or(Condition::DETACH_FORCED.into()))
                }
                Some(LinkState::Refused | LinkState::DetachSent) | None => false,
            }
        })
    }

    /// Ends a session with all its links; no event follows.
    pub fn end(&mut self, session: SessionId, error: Option<Error>) -> bool {
        let Some((session, mut shared)) = self.session_mut(session) else { return false };
        session.write_end(&mut shared, error.as_ref());
        true
    }

    /// Closes the connection. [`Event::Closed`] follows when the peer has answered or did not in time.
    ///
    /// An error is told to each session first: client libraries that hear of it by the close alone wait for answers of
    /// their links which never come.
    pub fn close(&mut self, error: Option<Error>, now: Instant) {
        match self.phase {
            Phase::Opened | Phase::PeerOpen if self.open_sent => {
                self.flush();
                if let Some(error) = &error {
                    self.end_all(error);
                }
                self.write_close(error.as_ref());
                self.phase = Phase::CloseSent;
                self.phase_deadline = Some(now + self.options.close_timeout);
            }
            Phase::CloseSent | Phase::Finished => {}
            _ => self.fail(error.unwrap_or(Condition::CONNECTION_FORCED.into())),
        }
    }

    // ---- inner workings -----------------------------------------------------------------------------------

    fn end_all(&mut self, error: &Error) {
        let running: Vec<SessionId> = self
            .sessions
            .iter()
            .flatten()
            .filter(|session| session.state == SessionState::Mapped)
            .map(|session| session.id)
            .collect();
        for session in running {
            self.end(session, Some(error.clone()));
        }
    }

    pub(super) fn write_close(&mut self, error: Option<&Error>) {
        put_frame(self.output.tail(), FrameKind::Amqp, 0, |out| put_close(out, error));
    }

    /// Closes for a fault of the peer.
    fn fail(&mut self, error: Error) {
        match self.phase {
            Phase::PeerOpen | Phase::Opened => {
                if !self.open_sent {
                    self.write_open();
                }
                self.flush();
                self.write_close(Some(&error));
            }
            Phase::Header
            | Phase::SaslMechanisms
            | Phase::SaslOutcome
            | Phase::SaslInit
            | Phase::SaslVerdict
            | Phase::HeaderAfterSasl
            | Phase::CloseSent
            | Phase::Finished => {}
        }
        self.finish(Some(error), By::Engine);
    }

    pub(super) fn finish(&mut self, error: Option<Error>, by: By) {
        if self.phase == Phase::Finished {
            return;
        }
        self.phase = Phase::Finished;
        self.sessions = Vec::new();
        self.sessions_due = Vec::new();
        self.peer_channels = HandleTable::default();
        self.events.push_back(Event::Closed { error, by });
    }

    /// Tells the engine that the transport failed: no more output, [`Event::Closed`] follows.
    pub fn transport_lost(&mut self, text: &str) {
        self.output.clear();
        self.finish(Some(Error::new(Condition::CONNECTION_FORCED, text)), By::Engine);
    }

    fn flush(&mut self) {
        while let Some(channel) = self.sessions_due.pop() {
            if let Some((session, mut shared)) = self.any_session_mut(channel) {
                session.listed = false;
                session.flush(&mut shared);
            }
        }
    }

    pub(super) fn list_due(&mut self, channel: u16) {
        if let Some(Some(session)) = self.sessions.get_mut(usize::from(channel))
            && !session.listed
            && session.has_due()
        {
            session.listed = true;
            self.sessions_due.push(channel);
        }
    }

    pub(super) fn place_session(&mut self, state: SessionState) -> Option<SessionId> {
        let free = self.free_channels.pop();
        let channel = free.or_else(|| u16::try_from(self.sessions.len()).ok())?;
        if channel > self.peer_channel_max || channel >= self.options.sessions_max {
            return None;
        }
        let id = SessionId { channel, epoch: self.counts.next_epoch() };
        let session = Some(Box::new(Session::new(id, state, &self.options)));
        match self.sessions.get_mut(usize::from(channel)) {
            Some(place) => *place = session,
            None => self.sessions.push(session),
        }
        Some(id)
    }

    pub(super) fn drop_session(&mut self, peer_channel: u16, channel: u16) {
        self.peer_channels.remove(peer_channel.into());
        if let Some(place) = self.sessions.get_mut(usize::from(channel))
            && place.take().is_some()
        {
            self.free_channels.push(channel);
        }
    }

    fn session(&self, id: SessionId) -> Option<&Session> {
        let session = self.sessions.get(usize::from(id.channel))?.as_deref()?;
        (session.id == id).then_some(session)
    }

    fn session_mut(&mut self, id: SessionId) -> Option<(&mut Session, Shared<'_>)> {
        if self.phase != Phase::Opened {
            return None;
        }
        let (session, shared) = self.any_session_mut(id.channel)?;
        (session.id == id && session.state != SessionState::EndSent).then_some((session, shared))
    }

    pub(super) fn any_session_mut(&mut self, channel: u16) -> Option<(&mut Session, Shared<'_>)> {
        let session = self.sessions.get_mut(usize::from(channel))?.as_deref_mut()?;
        let shared = Shared {
            output: &mut self.output,
            events: &mut self.events,
            options: &self.options,
            counts: &mut self.counts,
            client: self.client,
        };
        Some((session, shared))
    }

    fn with_link(
        &mut self,
        link: LinkId,
        command: impl FnOnce(&mut Session, &mut Shared<'_>) -> bool,
    ) -> bool {
        let Some((session, mut shared)) = self.session_mut(link.session) else { return false };
        let done = command(session, &mut shared);
        self.list_due(link.session.channel);
        done
    }
}
