//! What the engine tells its owner, and the names it gives to sessions, links and deliveries.

use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;

use super::error::Error;
use super::performative::{
    Attach, DeliveryTag, Open, Outcome, Properties, ReceiverSettle, Role, SenderSettle, Terminus,
};
use super::sasl::ClientSasl;
use super::value::Text;

/// A session of one connection. Stays unique when its channel is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId {
    pub(super) channel: u16,
    pub(super) epoch: u32,
}

/// A link of one connection. Stays unique when its handle is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkId {
    pub(super) session: SessionId,
    pub(super) handle: u32,
    pub(super) epoch: u32,
}

impl LinkId {
    /// The session of the link.
    pub fn session(self) -> SessionId {
        self.session
    }
}

/// A delivery that was received or sent on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeliveryId {
    pub(super) session: SessionId,
    pub(super) number: u32,
    pub(super) sent: bool,
}

/// Who caused something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The other end.
    Peer,
    /// This engine, answering a fault of the peer or a time-out.
    Engine,
}

/// The pieces of a message to be sent; they are not copied when they are large.
pub type Payload = SmallVec<[Bytes; 3]>;

/// A password as a client sent it; never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(super) Text);

impl Secret {
    /// Keeps a password.
    pub fn new(password: Text) -> Self {
        Self(password)
    }

    /// The password.
    pub fn expose(&self) -> &str {
        self.0.as_str()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Outcome codes of SASL (AMQP 1.0 §5.3.3.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaslCode {
    /// Authenticated.
    Ok,
    /// Refused for the credentials.
    Auth,
    /// Refused for a fault of the system.
    Sys,
}

/// A link that the peer wants to attach.
#[derive(Debug, Clone, PartialEq)]
pub struct AttachRequest {
    /// The link; answer with `accept_attach` or `refuse_attach`.
    pub link: LinkId,
    /// What the peer sent. `attach.role` is the role of the **peer**.
    pub attach: Box<Attach>,
}

impl AttachRequest {
    /// Address of our node: the target's when the peer sends, the source's when the peer receives.
    pub fn address(&self) -> Option<Text> {
        match self.attach.role {
            Role::Sender => self.attach.target.as_ref()?.address(),
            Role::Receiver => self.attach.source.as_ref()?.address(),
        }
    }
}

/// How a requested link is accepted.
#[derive(Debug, Clone, PartialEq)]
pub struct AttachAnswer {
    /// Settlement by the sending end; `None` leaves the field out.
    pub snd_settle: Option<SenderSettle>,
    /// Settlement by the receiving end; `None` leaves the field out.
    pub rcv_settle: Option<ReceiverSettle>,
    /// Largest message we announce, in bytes; also enforced on links on which we receive.
    pub max_message_bytes: u64,
    /// Credit granted at once and renewed as deliveries are settled; for links on which we receive.
    pub credit: u32,
    /// Link properties of the answer.
    pub properties: Properties,
}

/// A link that we want to attach.
#[derive(Debug, Clone, PartialEq)]
pub struct AttachOptions {
    /// Name, unique for the role in the session.
    pub name: Text,
    /// Our role.
    pub role: Role,
    /// Source.
    pub source: Terminus,
    /// Target.
    pub target: Terminus,
    /// Settlement by the sending end; `None` leaves the field out.
    pub snd_settle: Option<SenderSettle>,
    /// Settlement by the receiving end; `None` leaves the field out.
    pub rcv_settle: Option<ReceiverSettle>,
    /// Largest message, in bytes, on links on which we receive.
    pub max_message_bytes: u64,
    /// Credit granted when the link is attached and renewed as deliveries are settled.
    pub credit: u32,
    /// Link properties.
    pub properties: Properties,
}

/// How a message is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SendOptions {
    /// Message format: 0, or [`super::MESSAGE_FORMAT_BATCH`].
    pub format: u32,
    /// Wanted settlement; the settle mode of the link wins.
    pub settled: bool,
    /// The delivery tag; a unique one is made when absent.
    pub tag: Option<[u8; 16]>,
}

/// Why a message could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The link is gone, not yet attached, or one on which we receive.
    #[error("the link cannot send")]
    NotAttached,
    /// No credit: wait for [`Event::CreditChanged`].
    #[error("the link has no credit")]
    NoCredit,
    /// The session's window is used up: wait for [`Event::WindowOpened`].
    #[error("the session's window is used up")]
    NoWindow,
    /// Too much waits to be written: wait for [`Event::OutputDrained`].
    #[error("too much output waits to be written")]
    Backlog,
    /// Too many deliveries of the session are unsettled: wait for settlements.
    #[error("too many deliveries are unsettled")]
    TooManyUnsettled,
    /// The peer does not take messages of this size on this link.
    #[error("the message is larger than the {limit_bytes} bytes that the receiver takes")]
    TooLarge {
        /// The receiver's limit, in bytes.
        limit_bytes: u64,
    },
}

/// A complete message that arrived.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The link.
    pub link: LinkId,
    /// Its name for `settle`. Settle every delivery, also one that was sent settled: this renews the credit.
    pub id: DeliveryId,
    /// Delivery tag, if the sender gave one.
    pub tag: Option<DeliveryTag>,
    /// Message format: 0, or [`super::MESSAGE_FORMAT_BATCH`].
    pub format: u32,
    /// Sent settled: no answer is due.
    pub settled: bool,
    /// The encoded message, not checked: see [`super::Message::parse`]. A slice of the receive buffer unless
    /// the message came in several frames.
    pub payload: Bytes,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A client authenticates with PLAIN: answer with `sasl_outcome`. Nothing is read until then.
    SaslPlain {
        /// The user name (authcid).
        user: Text,
        /// The password.
        password: Secret,
    },
    /// The peer's open arrived; the connection can be used.
    Opened(Box<Open>),
    /// A session is there: begun by the peer, or our own answered.
    SessionBegun {
        /// The session.
        session: SessionId,
    },
    /// A session has ended, and with it its links and deliveries.
    SessionEnded {
        /// The session.
        session: SessionId,
        /// Why.
        error: Option<Error>,
        /// Who ended it.
        by: By,
    },
    /// The peer wants to attach a link.
    AttachRequested(AttachRequest),
    /// Our attach was accepted.
    Attached {
        /// The link.
        link: LinkId,
        /// Link properties of the answer.
        properties: Properties,
    },
    /// Our attach was refused.
    AttachRefused {
        /// The link; it is gone.
        link: LinkId,
        /// Why.
        error: Option<Error>,
    },
    /// A link has ended. Its unsettled deliveries are void.
    Detached {
        /// The link.
        link: LinkId,
        /// Why.
        error: Option<Error>,
        /// Who ended it.
        by: By,
    },
    /// A message arrived.
    Delivery(Delivery),
    /// A delivery that we sent was settled; it is forgotten, and an answer that is due is on its way.
    Settled {
        /// The link.
        link: LinkId,
        /// The delivery.
        delivery: DeliveryId,
        /// What became of it.
        outcome: Outcome,
    },
    /// The credit of a link on which we send has changed.
    CreditChanged {
        /// The link.
        link: LinkId,
        /// Deliveries that may be sent.
        credit: u32,
        /// What is not used before the next look at the output is given back.
        drain: bool,
    },
    /// A session whose window stopped `send` takes transfers again.
    WindowOpened {
        /// The session.
        session: SessionId,
    },
    /// Output that stopped `send` has been written.
    OutputDrained,
    /// The connection is over; no further event follows. Write what the output still holds, then close.
    Closed {
        /// Why.
        error: Option<Error>,
        /// Who closed it.
        by: By,
    },
}

/// Limits and names of a connection. Every table and buffer of the engine has its bound here.
#[derive(Debug, Clone)]
pub struct Options {
    /// Container id of our open.
    pub container_id: Text,
    /// Host name of our open: the dialled host for a client.
    pub hostname: Option<Text>,
    /// Properties of our open.
    pub properties: Properties,
    /// How a client authenticates; without it the client sends no SASL header.
    pub sasl: Option<ClientSasl>,
    /// The idle time-out that we announce and enforce.
    pub idle_timeout: Duration,
    /// A peer's idle time-out below this is refused (listener).
    pub peer_idle_timeout_min: Duration,
    /// SASL EXTERNAL is offered besides the mechanisms without proof: the peer has proved who it is by the transport.
    pub sasl_external: bool,
    /// Time from the first byte to the peer's open.
    pub handshake_timeout: Duration,
    /// Time to wait for the peer's close after our own.
    pub close_timeout: Duration,
    /// Transfer frames that a session may have on the way to us.
    pub incoming_window: u32,
    /// Sessions of the connection; channel-max of our open is one less.
    pub sessions_max: u16,
    /// Highest handle of a session.
    pub handle_max: u32,
    /// Links of the connection.
    pub links_max: u32,
    /// Received deliveries of the connection that are not settled yet.
    pub unsettled_max: usize,
    /// Bytes of incomplete messages of the connection.
    pub partial_max_bytes: usize,
    /// Output at which `send` refuses and reading stops, in bytes.
    pub output_max_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            container_id: Text::from_static("edgehub"),
            hostname: None,
            properties: Vec::new(),
            sasl: None,
            idle_timeout: Duration::from_secs(240),
            peer_idle_timeout_min: Duration::from_secs(5),
            sasl_external: false,
            handshake_timeout: Duration::from_secs(60),
            close_timeout: Duration::from_secs(5),
            incoming_window: 5_000,
            sessions_max: 8_192,
            handle_max: 262_143,
            links_max: 65_536,
            unsettled_max: 262_144,
            partial_max_bytes: 16 << 20,
            output_max_bytes: 1 << 20,
        }
    }
}
