//! The way to a host of the upstream: TCP or the tunnel of an HTTP proxy, TLS over it, and a WebSocket in that.
//!
//! No function here has a deadline of its own: the caller knows how long it can wait. Names are resolved by whoever
//! connects, which is the proxy where there is one.

mod proxy;

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Request;
use hyper::header::{
    CONNECTION, HOST, HeaderValue, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::client_async_with_config;
use tokio_tungstenite::tungstenite::Error as WebSocketError;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;

use crate::head::websocket::{WebSocketBytes, web_socket_config};

pub use proxy::{HttpProxy, PROXY_ANSWER_BYTES_MAX, ProxyUrlError};

/// The path of the cloud hub's WebSockets.
const WEB_SOCKET_PATH: &str = "/$iothub/websocket";

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carried {
    /// AMQP 1.0.
    Amqp,
    /// MQTT 3.1.1.
    Mqtt,
}

impl Carried {
    /// The sub-protocol of its WebSockets, as the cloud hub names it.
    fn sub_protocol(self) -> &'static str {
        match self {
            Carried::Amqp => "AMQPWSB10",
            Carried::Mqtt => "mqtt",
        }
    }
}

/// A connection to a peer that says nothing, or confirms nothing, for this long is lost.
const DEAD_PEER_SECS: u64 = 60;

/// Unanswered probes after which a silent connection is lost.
const KEEPALIVE_PROBES: u32 = 3;

/// What carries AMQP or MQTT to the upstream.
#[derive(Debug, Clone, Default)]
pub enum Transport {
    /// TLS over TCP, never through a proxy: few of them let a port such as 5671 or 8883 pass.
    #[default]
    Tls,
    /// TCP in clear text: for a broker on the same machine or network segment.
    Tcp,
    /// A WebSocket in TLS.
    WebSocket {
        /// Through this proxy, but for the hosts that it excepts.
        proxy: Option<Arc<HttpProxy>>,
    },
}

/// A host to be reached.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// DNS name or address; also the name that its certificate must have.
    pub host: &'a str,
    /// TCP port.
    pub port: u16,
    /// Trust and versions of TLS.
    pub tls: &'a Arc<rustls::ClientConfig>,
    /// The proxy in between, but for the hosts that it excepts.
    pub proxy: Option<&'a HttpProxy>,
}

/// Why a host cannot be reached. No variant holds the credentials of a proxy.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Neither a DNS name nor an address.
    #[error("{0} is no host name or address")]
    Name(String),
    /// No TCP connection.
    #[error("cannot connect to {host}:{port}: {source}")]
    Tcp {
        /// The host: the target, or the proxy.
        host: String,
        /// Its port.
        port: u16,
        /// The system's reason.
        source: io::Error,
    },
    /// The proxy does not open the tunnel.
    #[error("the proxy {proxy} answers {status} to CONNECT {host}:{port}; {next}")]
    ProxyRefuses {
        /// Host and port of the proxy.
        proxy: String,
        /// Status of its answer (RFC 9110 §15).
        status: u16,
        /// The host that was asked for.
        host: String,
        /// Its port.
        port: u16,
        /// What to do.
        next: &'static str,
    },
    /// The proxy does not speak HTTP, or ends the connection.
    #[error("the proxy {proxy} gives no usable answer to CONNECT: {reason}")]
    ProxyAnswer {
        /// Host and port of the proxy.
        proxy: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// No TLS session.
    #[error("TLS with {host} fails: {source}")]
    Tls {
        /// The host.
        host: String,
        /// What failed.
        source: io::Error,
    },
    /// No WebSocket.
    #[error("{host} opens no WebSocket: {reason}")]
    WebSocket {
        /// The host.
        host: String,
        /// What it answers.
        reason: String,
    },
}

/// A connection to the upstream.
pub enum UpstreamStream {
    /// In clear text.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// In a WebSocket.
    WebSocket(Box<WebSocketBytes<TlsStream<TcpStream>>>),
}

/// Opens a connection that carries AMQP or MQTT. `target.proxy` is not asked; that of the transport is.
///
/// # Errors
/// The first step that fails: TCP, proxy, TLS, WebSocket.
pub async fn stream(
    target: Target<'_>,
    transport: &Transport,
    carried: Carried,
) -> Result<UpstreamStream, DialError> {
    stream_by(target, transport, carried, None).await
}

/// The same by way of one of [`addresses`].
pub(crate) async fn stream_by(
    target: Target<'_>,
    transport: &Transport,
    carried: Carried,
    address: Option<SocketAddr>,
) -> Result<UpstreamStream, DialError> {
    let target = Target { proxy: transport.proxy(), ..target };
    match transport {
        Transport::Tls => {
            let stream = tls_by(target, address).await?;
            Ok(UpstreamStream::Tls(Box::new(stream)))
        }
        Transport::Tcp => tcp(target.first_hop(), address).await.map(UpstreamStream::Tcp),
        Transport::WebSocket { .. } => web_socket(target, carried, address)
            .await
            .map(|stream| UpstreamStream::WebSocket(Box::new(stream))),
    }
}

/// Looks up where a connection leads first: the addresses of the target, or of the proxy in between.
///
/// # Errors
/// When the name cannot be resolved.
pub(crate) async fn addresses(
    target: Target<'_>,
    transport: &Transport,
) -> io::Result<impl Iterator<Item = SocketAddr>> {
    let (host, port) = Target { proxy: transport.proxy(), ..target }.first_hop();
    lookup_host((host.to_owned(), port)).await
}

/// Opens a TLS connection.
///
/// # Errors
/// The first step that fails: TCP, proxy, TLS.
pub async fn tls(target: Target<'_>) -> Result<TlsStream<TcpStream>, DialError> {
    tls_by(target, None).await
}

async fn tls_by(target: Target<'_>, address: Option<SocketAddr>) -> Result<TlsStream<TcpStream>, DialError> {
    let Target { host, port, tls, .. } = target;
    let name = ServerName::try_from(host.to_owned()).map_err(|_| DialError::Name(host.to_owned()))?;
    let stream = tcp(target.first_hop(), address).await?;
    let stream = match target.tunnels() {
        Some(proxy) => proxy.tunnel(stream, host, port).await?,
        None => stream,
    };
    TlsConnector::from(tls.clone())
        .connect(name, stream)
        .await
        .map_err(|source| DialError::Tls { host: host.to_owned(), source })
}

impl Transport {
    fn proxy(&self) -> Option<&HttpProxy> {
        match self {
            Transport::Tls | Transport::Tcp => None,
            Transport::WebSocket { proxy } => proxy.as_deref(),
        }
    }
}

impl<'a> Target<'a> {
    /// The proxy, if the target is reached through it.
    fn tunnels(self) -> Option<&'a HttpProxy> {
        self.proxy.filter(|proxy| proxy.serves(self.host, self.port))
    }

    /// Host and port that TCP connects to.
    fn first_hop(self) -> (&'a str, u16) {
        self.tunnels().map_or((self.host, self.port), |proxy| (proxy.host(), proxy.port()))
    }
}

/// Host and port as HTTP writes them (RFC 3986 §3.2): an IPv6 address in brackets.
pub fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

async fn tcp((host, port): (&str, u16), address: Option<SocketAddr>) -> Result<TcpStream, DialError> {
    let connected = match address {
        Some(address) => TcpStream::connect(address).await,
        None => TcpStream::connect((host, port)).await,
    };
    let stream = connected.map_err(|source| DialError::Tcp { host: host.to_owned(), port, source })?;
    // Small frames must not wait for each other; a socket that cannot be told is slower, not wrong.
    let _ = stream.set_nodelay(true);
    notice_dead_peer(&stream);
    Ok(stream)
}

/// A peer that vanished without a word is noticed by the kernel: silence by keep-alive probes, bytes that nobody
/// confirms by the user time-out (RFC 5482). A socket that cannot be told is slower to notice, not wrong.
fn notice_dead_peer(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let dead_after = Duration::from_secs(DEAD_PEER_SECS);
    let interval = dead_after / (2 * KEEPALIVE_PROBES);
    let probes = TcpKeepalive::new().with_time(dead_after / 2).with_interval(interval);
    #[cfg(target_os = "linux")]
    let probes = probes.with_retries(KEEPALIVE_PROBES);
    let _ = socket.set_tcp_keepalive(&probes);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(dead_after));
}

async fn web_socket(
    target: Target<'_>,
    carried: Carried,
    address: Option<SocketAddr>,
) -> Result<WebSocketBytes<TlsStream<TcpStream>>, DialError> {
    let Target { host, port, .. } = target;
    let failed = |reason: String| DialError::WebSocket { host: host.to_owned(), reason };
    let stream = tls_by(target, address).await?;
    let authority = authority(host, port);
    let request = Request::get(format!("wss://{authority}{WEB_SOCKET_PATH}"))
        .header(HOST, if port == 443 { authority.trim_end_matches(":443") } else { &authority })
        .header(CONNECTION, HeaderValue::from_static("Upgrade"))
        .header(UPGRADE, HeaderValue::from_static("websocket"))
        .header(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"))
        .header(SEC_WEBSOCKET_KEY, generate_key())
        .header(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(carried.sub_protocol()))
        .body(())
        .map_err(|error| failed(error.to_string()))?;
    match client_async_with_config(request, stream, Some(web_socket_config())).await {
        Ok((socket, _answer)) => Ok(WebSocketBytes::requested(socket)),
        Err(WebSocketError::Http(answer)) => Err(failed(format!("it answers {}", answer.status()))),
        Err(error) => Err(failed(error.to_string())),
    }
}

impl AsyncRead for UpstreamStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::WebSocket(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::WebSocket(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::WebSocket(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
            Self::WebSocket(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Self::WebSocket(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::WebSocket(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_notice_dead_peers() {
        let listener = tokio::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stream = tcp(("somewhere.example", 1), Some(address)).await.unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(10));
        #[cfg(target_os = "linux")]
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(60)));
    }
}
