//! Requests on the HTTPS port that become WebSockets (RFC 6455 §4.2), for AMQP and MQTT.

use std::net::SocketAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use edgehub_broker::head::mqtt::{self, MqttLimits, Peer};
use edgehub_broker::head::websocket::{WebSocketBytes, accept_key};
use hyper::header::{
    CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::backend::CloudBackend;
use crate::registry::Registry;
use crate::service::amqp;

/// What is spoken in a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SubProtocol {
    Amqp,
    Mqtt,
}

impl SubProtocol {
    /// Its registered spelling; SDKs ask for these.
    fn name(self) -> &'static str {
        match self {
            Self::Amqp => "AMQPWSB10",
            Self::Mqtt => "mqtt",
        }
    }
}

/// A request for a WebSocket that is granted.
pub(crate) struct Granted {
    pub(crate) sub_protocol: SubProtocol,
    /// Headers of the answer.
    pub(crate) headers: HeaderMap,
}

/// Reads whether a request asks for a WebSocket; nothing when it does not.
pub(crate) fn asked(method: &Method, headers: &HeaderMap) -> Option<Result<Granted, StatusCode>> {
    let is = |name, expected: &str| items(headers, name).any(|item| item.eq_ignore_ascii_case(expected));
    if !is(UPGRADE, "websocket") {
        return None;
    }
    let sub_protocol = [SubProtocol::Amqp, SubProtocol::Mqtt]
        .into_iter()
        .find(|protocol| is(SEC_WEBSOCKET_PROTOCOL, protocol.name()));
    let key = headers.get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes);
    let key = key.filter(|key| BASE64.decode(key).is_ok_and(|bytes| bytes.len() == 16));
    let (Some(sub_protocol), Some(key)) = (sub_protocol, key) else {
        return Some(Err(StatusCode::BAD_REQUEST));
    };
    if *method != Method::GET || !is(CONNECTION, "upgrade") {
        return Some(Err(StatusCode::BAD_REQUEST));
    }
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Some(Err(StatusCode::UPGRADE_REQUIRED));
    }
    let Ok(accept) = HeaderValue::try_from(accept_key(key)) else {
        return Some(Err(StatusCode::BAD_REQUEST));
    };
    let headers = HeaderMap::from_iter([
        (CONNECTION, HeaderValue::from_static("Upgrade")),
        (UPGRADE, HeaderValue::from_static("websocket")),
        (SEC_WEBSOCKET_ACCEPT, accept),
        (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(sub_protocol.name())),
    ]);
    Some(Ok(Granted { sub_protocol, headers }))
}

/// Serves a WebSocket to its end, once the answer that granted it is sent.
pub(crate) async fn serve<S>(
    upgrade: OnUpgrade,
    sub_protocol: SubProtocol,
    registry: Arc<Registry>,
    backend: CloudBackend,
    address: SocketAddr,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Ok(upgraded) = upgrade.await else { return };
    let Ok(parts) = upgraded.downcast::<TokioIo<S>>() else { return };
    let stream = WebSocketBytes::accepted(parts.io.into_inner(), parts.read_buf.to_vec()).await;
    let peer = Peer { address: Some(address), certificates: Vec::new(), accepted_at: Instant::now() };
    // When the process stops, the connection is cut as all of its port.
    let stop = std::future::pending();
    match sub_protocol {
        SubProtocol::Amqp => amqp::serve_connection(stream, registry, backend, peer, stop).await,
        SubProtocol::Mqtt => {
            let _ = mqtt::serve(stream, backend, MqttLimits::default(), peer, stop).await;
        }
    }
}

/// The items of a header that is a list.
fn items(headers: &HeaderMap, name: hyper::header::HeaderName) -> impl Iterator<Item = &str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(change: (&'static str, &'static str)) -> Option<Result<SubProtocol, StatusCode>> {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "WebSocket"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-version", "13"),
            ("sec-websocket-protocol", "other, AMQPWSB10"),
            change,
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let asked = asked(&Method::GET, &headers)?;
        Some(asked.map(|granted| {
            assert_eq!(granted.headers[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
            granted.sub_protocol
        }))
    }

    #[test]
    fn upgrades_are_read() {
        for (change, expected) in [
            (("x", ""), Some(Ok(SubProtocol::Amqp))),
            (("sec-websocket-protocol", "mqtt"), Some(Ok(SubProtocol::Mqtt))),
            (("sec-websocket-protocol", "soap"), Some(Err(StatusCode::BAD_REQUEST))),
            (("sec-websocket-key", "short"), Some(Err(StatusCode::BAD_REQUEST))),
            (("sec-websocket-version", "8"), Some(Err(StatusCode::UPGRADE_REQUIRED))),
            (("connection", "close"), Some(Err(StatusCode::BAD_REQUEST))),
            (("upgrade", "h2c"), None),
        ] {
            assert_eq!(judge(change), expected, "{change:?}");
        }
        assert!(asked(&Method::GET, &HeaderMap::new()).is_none());
    }
}
