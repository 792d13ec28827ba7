//! How a connection ends, and what is told of it.

use tracing::{info, warn};

use super::deliver::TooSlow;
use super::encode::ConnectCode;
use super::frame::FrameError;
use super::packet::DecodeError;
use super::session::SessionFull;
use super::topic::TopicError;
use crate::backend::{CloseReason, PublishError};
use crate::head::warn_limit::WarnLimit;
use crate::identity::Identity;

static ENDED: WarnLimit = WarnLimit::new();

/// What a client sent against the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Bytes that begin no packet.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A malformed packet.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The first packet is not CONNECT.
    #[error("the first packet is not CONNECT")]
    ConnectExpected,
    /// CONNECT on a connection that has had one.
    #[error("a second CONNECT")]
    SecondConnect,
    /// A topic that ends the connection.
    #[error(transparent)]
    Topic(#[from] TopicError),
    /// Too many subscriptions.
    #[error(transparent)]
    SessionFull(#[from] SessionFull),
    /// A message over the size limit.
    #[error("a message has {size_bytes} bytes; the limit is {limit_bytes}")]
    TooLarge {
        /// Its size.
        size_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionEnd {
    /// The client sent DISCONNECT; the only end that drops the will, besides that of the hub itself.
    #[error("the client disconnected")]
    Disconnected,
    /// The socket was closed or failed.
    #[error("the socket was closed")]
    PeerClosed,
    /// No CONNECT in time.
    #[error("no CONNECT in time")]
    ConnectTimeout,
    /// No CONNECT yet, and too many others wait with theirs.
    #[error("no CONNECT yet, and its place was needed")]
    Crowded,
    /// CONNECT was refused.
    #[error("refused with code {}", *.0 as u8)]
    Refused(ConnectCode),
    /// The client was silent for too long.
    #[error("no packet within the keep alive time")]
    KeepAlive,
    /// The client broke the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The client does not take, or never acknowledges, what it is sent.
    #[error("the client is too slow")]
    TooSlow,
    /// Messages or the session could not be stored.
    #[error(transparent)]
    Store(PublishError),
    /// The hub closed it.
    #[error("closed by the hub: {0:?}")]
    Closed(CloseReason),
}

impl ProtocolError {
    /// A short label for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            ProtocolError::Frame(FrameError::FirstByte(_)) => "first_byte",
            ProtocolError::Frame(FrameError::Length) => "length",
            ProtocolError::Frame(FrameError::TooLarge(_)) => "packet_too_large",
            ProtocolError::Decode(error) => error.reason(),
            ProtocolError::ConnectExpected => "connect_expected",
            ProtocolError::SecondConnect => "second_connect",
            ProtocolError::Topic(TopicError::SenderMismatch) => "sender_mismatch",
            ProtocolError::Topic(TopicError::Twin) => "twin_topic",
            ProtocolError::SessionFull(_) => "session_full",
            ProtocolError::TooLarge { .. } => "message_too_large",
        }
    }
}

impl From<TooSlow> for ConnectionEnd {
    fn from(TooSlow: TooSlow) -> Self {
        ConnectionEnd::TooSlow
    }
}

impl ConnectionEnd {
    /// Whether the will of the client is published.
    pub(super) fn keeps_will(&self) -> bool {
        !matches!(self, ConnectionEnd::Disconnected | ConnectionEnd::Closed(CloseReason::Stopping))
    }

    /// Counts and logs the end of a connection; `identity` is absent before the login.
    pub(super) fn report(&self, identity: Option<&Identity>) {
        if let ConnectionEnd::Protocol(error) = self {
            metrics::counter!("edgehub_mqtt_protocol_errors_total", "reason" => error.reason()).increment(1);
        }
        let wrong = matches!(
            self,
            ConnectionEnd::Protocol(_)
                | ConnectionEnd::Store(_)
                | ConnectionEnd::TooSlow
                | ConnectionEnd::ConnectTimeout
                | ConnectionEnd::Crowded
        );
        if wrong && let Some(suppressed) = ENDED.admit() {
            match identity {
                Some(identity) => {
                    warn!(code = "EH2004", suppressed, "client {identity}: MQTT connection closed: {self}")
                }
                None => warn!(code = "EH2005", suppressed, "MQTT connection closed before its login: {self}"),
            }
        }
        if let Some(identity) = identity {
            info!("client {identity} removed: {self}");
        }
    }
}
