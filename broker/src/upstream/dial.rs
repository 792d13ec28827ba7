//! The way to a byte stream: the name is looked up anew each time, and its addresses are tried one after the other.

use std::net::SocketAddr;

use tokio::time::{Instant, timeout};

use super::UpstreamOptions;
use super::failure::{Failure, UpstreamCause};
use crate::dial::{DialError, Target, UpstreamStream, addresses, stream_by};

/// Addresses of one name that are tried at most.
const ADDRESSES_MAX: usize = 8;

/// A connection up, and where it leads.
pub(super) struct Dialled {
    pub(super) stream: UpstreamStream,
    pub(super) address: SocketAddr,
}

/// Looks the name up, now and not from memory, and tries its addresses one after the other, each with its share of the
/// time that is left of [`UpstreamOptions::operation_timeout`]. An address to `avoid` is tried last.
pub(super) async fn dial(options: &UpstreamOptions, avoid: Option<SocketAddr>) -> Result<Dialled, Failure> {
    let host = options.host.as_str();
    let target = Target { host, port: options.port, tls: &options.tls, proxy: None };
    let limit = options.operation_timeout;
    let deadline = Instant::now() + limit;
    let not_found = |text: String| Failure::new(UpstreamCause::NameLookup, text);
    let found = match timeout(limit, addresses(target, &options.transport)).await {
        Ok(Ok(found)) => in_turn(found, avoid),
        Ok(Err(error)) => return Err(not_found(format!("the way to {host} cannot be looked up: {error}"))),
        Err(_) => return Err(not_found(format!("the way to {host} was not looked up within {limit:?}"))),
    };
    let mut failure = not_found(format!("there is no address on the way to {host}"));
    for (at, address) in found.iter().copied().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(found.len() - at).unwrap_or(1);
        let connected =
            timeout(share, stream_by(target, &options.transport, options.carried(), Some(address))).await;
        failure = match connected {
            Ok(Ok(stream)) => return Ok(Dialled { stream, address }),
            Ok(Err(error)) => Failure::new(cause(&error), format!("{error} ({address})")),
            Err(_) => {
                let text = format!("no connection within {share:.1?} to {host} ({address})");
                Failure::new(UpstreamCause::Connect, text)
            }
        };
        tracing::debug!(%address, reason = failure.text, "An address of the upstream takes no connection");
    }
    Err(failure)
}

fn cause(error: &DialError) -> UpstreamCause {
    match error {
        DialError::Name(_) | DialError::Tls { .. } => UpstreamCause::Tls,
        DialError::Tcp { .. } => UpstreamCause::Connect,
        DialError::ProxyRefuses { .. } | DialError::ProxyAnswer { .. } => UpstreamCause::Proxy,
        DialError::WebSocket { .. } => UpstreamCause::WebSocket,
    }
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
}
