//! The way to a byte stream: name look-up, the addresses in turn, TCP that notices a dead peer, TLS.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};
use tokio_rustls::client::TlsStream;

use super::UpstreamOptions;
use super::failure::{Failure, UpstreamCause};

/// Addresses of one name that are tried at most.
const ADDRESSES_MAX: usize = 8;

/// Unanswered probes after which a silent connection is lost.
const KEEPALIVE_PROBES: u32 = 3;

/// A connection up, and where it leads.
pub(super) struct Dialled {
    pub(super) stream: TlsStream<TcpStream>,
    pub(super) address: SocketAddr,
}

/// Looks the name up, now and not from memory, and tries its addresses one after the other, each with its share of the
/// time that is left of [`UpstreamOptions::operation_timeout`]. An address to `avoid` is tried last.
pub(super) async fn dial(options: &UpstreamOptions, avoid: Option<SocketAddr>) -> Result<Dialled, Failure> {
    let (host, port) = (options.host.as_str(), options.port);
    let deadline = Instant::now() + options.operation_timeout;
    let not_found = |text: String| Failure::new(UpstreamCause::NameLookup, text);
    let addresses = match timeout(options.operation_timeout, lookup_host((host, port))).await {
        Ok(Ok(addresses)) => in_turn(addresses, avoid),
        Ok(Err(error)) => return Err(not_found(format!("the name {host} cannot be resolved: {error}"))),
        Err(_) => {
            let limit = options.operation_timeout;
            return Err(not_found(format!("the name {host} was not resolved within {limit:?}")));
        }
    };
    let mut failure = not_found(format!("the name {host} has no address"));
    for (at, address) in addresses.iter().copied().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - at).unwrap_or(1);
        match connect(options, address, share).await {
            Ok(stream) => return Ok(Dialled { stream, address }),
            Err(error) => failure = error,
        }
        tracing::debug!(%address, reason = failure.text, "An address of the upstream takes no connection");
    }
    Err(failure)
}

/// Each address once, the one to avoid last.
fn in_turn(addresses: impl Iterator<Item = SocketAddr>, avoid: Option<SocketAddr>) -> Vec<SocketAddr> {
    let mut each: Vec<SocketAddr> = Vec::new();
    for address in addresses.take(ADDRESSES_MAX) {
        if !each.contains(&address) {
            each.push(address);
        }
    }
    each.sort_by_key(|address| Some(*address) == avoid);
    each
}

/// TCP and TLS with one address.
async fn connect(
    options: &UpstreamOptions,
    address: SocketAddr,
    limit: Duration,
) -> Result<TlsStream<TcpStream>, Failure> {
    let started = Instant::now();
    let stream = match timeout(limit, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let text = format!("cannot connect to {} ({address}): {error}", options.host);
            return Err(Failure::new(UpstreamCause::Connect, text));
        }
        Err(_) => {
            let text = format!("no connection within {limit:?} to {} ({address})", options.host);
            return Err(Failure::new(UpstreamCause::Connect, text));
        }
    };
    notice_dead_peers(&stream, options.idle_timeout);
    let failed = |text: String| Failure::new(UpstreamCause::Tls, text);
    let name = rustls::pki_types::ServerName::try_from(options.host.clone())
        .map_err(|_| failed(format!("{} is no host name or address", options.host)))?;
    let shaken = tokio_rustls::TlsConnector::from(options.tls.clone()).connect(name, stream);
    match timeout(limit.saturating_sub(started.elapsed()), shaken).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(failed(format!("TLS with {} ({address}) fails: {error}", options.host))),
        Err(_) => Err(failed(format!("no TLS within {limit:?} with {} ({address})", options.host))),
    }
}

/// A peer that vanished without a word is noticed by the kernel, too: silence by keep-alive probes, bytes that nobody
/// confirms by the user time-out (RFC 5482). A socket that cannot be told is slower to notice, not wrong.
fn notice_dead_peers(stream: &TcpStream, idle: Duration) {
    // Small frames must not wait for each other.
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let interval = (idle / (2 * KEEPALIVE_PROBES)).max(Duration::from_secs(1));
    let probes = TcpKeepalive::new().with_time(idle / 2).with_interval(interval);
    #[cfg(target_os = "linux")]
    let probes = probes.with_retries(KEEPALIVE_PROBES);
    let _ = socket.set_tcp_keepalive(&probes);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(idle));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_is_tried_once_and_the_one_without_progress_last() {
        let address = |last: u8| SocketAddr::from(([192, 0, 2, last], 5671));
        let found = [1, 2, 1, 3].map(address);
        assert_eq!(in_turn(found.into_iter(), None), [1, 2, 3].map(address));
        assert_eq!(in_turn(found.into_iter(), Some(address(1))), [2, 3, 1].map(address));
        assert_eq!(in_turn(found.into_iter(), Some(address(9))), [1, 2, 3].map(address));
        assert_eq!(in_turn([1].map(address).into_iter(), Some(address(1))), [address(1)]);
        assert_eq!(in_turn((0..20).map(address), None).len(), ADDRESSES_MAX);
    }

    #[tokio::test]
    async fn sockets_notice_dead_peers() {
        let listener = tokio::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        notice_dead_peers(&stream, Duration::from_secs(60));
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(10));
        #[cfg(target_os = "linux")]
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(60)));
    }
}
