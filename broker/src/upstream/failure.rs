//! Why the way up failed: a closed list of causes with stable names for metrics and alerts, and a sentence for people.

use serde::Serialize;

/// What kept the hub from its upstream, or took it away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamCause {
    /// The name of the upstream cannot be resolved.
    NameLookup,
    /// No address of the upstream takes a connection in time.
    Connect,
    /// The HTTP proxy opens no tunnel.
    Proxy,
    /// TLS fails: the certificate has expired, has another name or an unknown authority, or nobody speaks TLS.
    Tls,
    /// The upstream opens no WebSocket.
    WebSocket,
    /// The hub's own token cannot be made, is refused, or is not answered.
    Token,
    /// The upstream closed the connection, or does not let it work.
    Closed,
    /// The connection was lost, or nothing was heard on it for too long.
    Lost,
    /// The connection stands, and nothing on it gets on.
    NoProgress,
}

impl UpstreamCause {
    /// Its name in metrics, as in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            UpstreamCause::NameLookup => "name_lookup",
            UpstreamCause::Connect => "connect",
            UpstreamCause::Proxy => "proxy",
            UpstreamCause::Tls => "tls",
            UpstreamCause::WebSocket => "web_socket",
            UpstreamCause::Token => "token",
            UpstreamCause::Closed => "closed",
            UpstreamCause::Lost => "lost",
            UpstreamCause::NoProgress => "no_progress",
        }
    }
}

/// The end of a connection, or of an attempt to get one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) cause: UpstreamCause,
    pub(super) text: String,
}

impl Failure {
    pub(super) fn new(cause: UpstreamCause, text: impl Into<String>) -> Self {
        Self { cause, text: text.into() }
    }
}
