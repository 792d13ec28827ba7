//! Owns the requests on the HTTPS port: which one becomes a WebSocket and for which protocol, which one is answered.
//!
//! A connection speaks HTTP/1.1 until its first upgrade. WebSockets are accepted on any path; plain requests go to
//! whoever serves the port, through [`PlainRequests`].

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use edgehub_broker::head::websocket::{WebSocketBytes, accept_key};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout_at;
use tracing::debug;

/// Longest request head, bytes. A forwarded client certificate has to fit in.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Longest value of one header line, bytes.
const VALUE_BYTES_MAX: usize = 16 * 1024;
/// Most header lines of a request.
const HEADERS_MAX: usize = 64;
/// Time to send a request head, and to stay idle before it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest life of a connection that is not upgraded. A method call may take half of it.
const HTTP_AGE_MAX: Duration = Duration::from_secs(1_200);
/// The version of RFC 6455.
const WEBSOCKET_VERSION: &str = "13";

/// A protocol that is carried in WebSockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubProtocol {
    /// MQTT 3.1.1.
    Mqtt,
    /// AMQP 1.0 (OASIS AMQP WebSocket Binding 1.0 §2.1, by the name that SDKs ask for).
    Amqp,
}

impl SubProtocol {
    /// Its registered spelling.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mqtt => "mqtt",
            Self::Amqp => "AMQPWSB10",
        }
    }
}

/// An answer that is being made.
pub type Answering<'a> = Pin<Box<dyn Future<Output = Response<Full<Bytes>>> + Send + 'a>>;

/// Answers the requests of one connection that are no upgrades.
pub trait PlainRequests: Send + Sync + 'static {
    /// Answers a request. Given up when its connection ends.
    fn answer(&self, request: Request<Incoming>) -> Answering<'_>;
}

/// A WebSocket that was accepted.
pub struct Upgraded<S> {
    /// What is spoken in it.
    pub sub_protocol: SubProtocol,
    /// The headers of its request.
    pub headers: HeaderMap,
    /// Its bytes.
    pub stream: WebSocketBytes<S>,
}

/// What a request asks for.
enum Asked {
    WebSocket { sub_protocol: SubProtocol, accept: String },
    Plain,
}

/// A request that is refused.
struct Refused {
    status: StatusCode,
    text: &'static str,
    header: Option<(HeaderName, HeaderValue)>,
}

struct Accepted {
    sub_protocol: SubProtocol,
    headers: HeaderMap,
    upgrade: OnUpgrade,
}

/// Answers the requests of a connection until one of them becomes a WebSocket for one of the protocols `offered`;
/// nothing when the connection ends before that.
pub async fn serve<S>(
    stream: S,
    accepted_at: Instant,
    offered: Arc<[SubProtocol]>,
    plain: Arc<dyn PlainRequests>,
) -> Option<Upgraded<S>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let slot: Arc<Mutex<Option<Accepted>>> = Arc::default();
    let accepted = Arc::clone(&slot);
    let service = service_fn(move |request| {
        let (offered, accepted, plain) = (offered.clone(), accepted.clone(), plain.clone());
        async move { Ok::<_, Infallible>(respond(request, &offered, &accepted, &*plain).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    match timeout_at((accepted_at + HTTP_AGE_MAX).into(), connection).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => debug!(%error, "an HTTPS connection ended"),
    }
    let Accepted { sub_protocol, headers, upgrade } = slot.lock().take()?;
    // The response is sent and the connection's future has ended: nothing is left to wait for.
    let parts = upgrade.await.ok()?.downcast::<TokioIo<S>>().ok()?;
    let stream = WebSocketBytes::accepted(parts.io.into_inner(), parts.read_buf.to_vec()).await;
    Some(Upgraded { sub_protocol, headers, stream })
}

async fn respond(
    mut request: Request<Incoming>,
    offered: &[SubProtocol],
    slot: &Mutex<Option<Accepted>>,
    plain: &dyn PlainRequests,
) -> Response<Full<Bytes>> {
    match asked(&request, offered) {
        Ok(Asked::Plain) => plain.answer(request).await,
        Ok(Asked::WebSocket { sub_protocol, accept }) => {
            let Ok(accept) = HeaderValue::from_str(&accept) else {
                return text(StatusCode::BAD_REQUEST, "the key of the upgrade is malformed\n");
            };
            let upgrade = hyper::upgrade::on(&mut request);
            let headers = std::mem::take(request.headers_mut());
            *slot.lock() = Some(Accepted { sub_protocol, headers, upgrade });
            let mut response = Response::new(Full::default());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = response.headers_mut();
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
            headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(sub_protocol.name()));
            response
        }
        Err(Refused { status, text: reason, header }) => {
            let mut response = text(status, reason);
            response.headers_mut().extend(header);
            response
        }
    }
}

/// Reads what a request asks for (RFC 6455 §4.2.1).
fn asked<B>(request: &Request<B>, offered: &[SubProtocol]) -> Result<Asked, Refused> {
    let refused = |status, text, header| Err(Refused { status, text, header });
    let headers = request.headers();
    if headers.values().any(|value| value.len() > VALUE_BYTES_MAX) {
        return refused(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "a header is longer than 16 KiB\n",
            None,
        );
    }
    if !headers.contains_key(UPGRADE) {
        return Ok(Asked::Plain);
    }
    if !items(headers, &UPGRADE).any(|item| item.eq_ignore_ascii_case("websocket")) {
        let header = (UPGRADE, HeaderValue::from_static("websocket"));
        return refused(StatusCode::UPGRADE_REQUIRED, "only WebSockets are spoken here\n", Some(header));
    }
    let upgrades = request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && items(headers, &CONNECTION).any(|item| item.eq_ignore_ascii_case("upgrade"));
    if !upgrades {
        return refused(StatusCode::BAD_REQUEST, "this is no upgrade to a WebSocket\n", None);
    }
    if !items(headers, &SEC_WEBSOCKET_VERSION).any(|item| item == WEBSOCKET_VERSION) {
        let header = (SEC_WEBSOCKET_VERSION, HeaderValue::from_static(WEBSOCKET_VERSION));
        return refused(StatusCode::UPGRADE_REQUIRED, "only version 13 is spoken here\n", Some(header));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes).unwrap_or_default();
    if BASE64.decode(key).map_or(true, |key| key.len() != 16) {
        return refused(StatusCode::BAD_REQUEST, "the key of the upgrade is malformed\n", None);
    }
    let sub_protocol = items(headers, &SEC_WEBSOCKET_PROTOCOL).find_map(|wanted| {
        offered.iter().copied().find(|offered| offered.name().eq_ignore_ascii_case(wanted))
    });
    match sub_protocol {
        Some(sub_protocol) => Ok(Asked::WebSocket { sub_protocol, accept: accept_key(key) }),
        None => refused(StatusCode::BAD_REQUEST, "no sub-protocol that is spoken here\n", None),
    }
}

/// The members of a comma-separated header, over all its lines.
fn items<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

fn text(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Has nothing.
    struct Nothing;

    impl PlainRequests for Nothing {
        fn answer(&self, _: Request<Incoming>) -> Answering<'_> {
            Box::pin(std::future::ready(text(StatusCode::NOT_FOUND, "")))
        }
    }

    const GOOD: &str = "GET /$iothub/websocket?iothub-no-client-cert=true HTTP/1.1\r\nHost: h\r\n\
        Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: AMQPWSB10, MQTT\r\n\r\n";

    /// The head of the answer to a request where MQTT is offered, and the sub-protocol that followed.
    async fn ask(request: &str) -> (String, Option<SubProtocol>) {
        ask_of(&[SubProtocol::Mqtt], request).await
    }

    async fn ask_of(offered: &[SubProtocol], request: &str) -> (String, Option<SubProtocol>) {
        let (mut near, far) = tokio::io::duplex(65_536);
        let serving = tokio::spawn(serve(far, Instant::now(), offered.into(), Arc::new(Nothing)));
        near.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(near.read_u8().await.unwrap());
        }
        drop(near);
        let upgraded = serving.await.unwrap();
        (String::from_utf8(head).unwrap().to_lowercase(), upgraded.map(|upgraded| upgraded.sub_protocol))
    }

    #[tokio::test]
    async fn an_upgrade_is_accepted_on_any_path_and_the_name_is_ours() {
        for request in
            [GOOD.to_owned(), GOOD.replace("/$iothub/websocket?iothub-no-client-cert=true", "/any")]
        {
            let (head, sub_protocol) = ask(&request).await;
            assert!(head.starts_with("http/1.1 101 "), "{head}");
            assert!(head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
            assert!(head.contains("sec-websocket-protocol: mqtt\r\n"), "{head}");
            assert_eq!(sub_protocol, Some(SubProtocol::Mqtt));
        }
    }

    #[tokio::test]
    async fn the_client_s_order_decides_among_what_is_offered() {
        for (asked, chosen) in [
            ("AMQPWSB10, MQTT", SubProtocol::Amqp),
            ("amqpwsb10", SubProtocol::Amqp),
            ("other, mqtt, AMQPWSB10", SubProtocol::Mqtt),
        ] {
            let request = GOOD.replace("AMQPWSB10, MQTT", asked);
            let (head, sub_protocol) = ask_of(&[SubProtocol::Mqtt, SubProtocol::Amqp], &request).await;
            let named = format!("sec-websocket-protocol: {}\r\n", chosen.name().to_lowercase());
            assert!(head.contains(&named), "{asked}: {head}");
            assert_eq!(sub_protocol, Some(chosen), "{asked}");
        }
    }

    #[tokio::test]
    async fn everything_else_has_its_status() {
        let without = |line: &str| {
            GOOD.lines()
                .filter(|known| !known.starts_with(line))
                .fold(String::new(), |text, line| text + line + "\r\n")
        };
        for (request, status, contains) in [
            ("GET / HTTP/1.1\r\nHost: h\r\n\r\n".to_owned(), 404, ""),
            ("POST /twins/d/methods HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}".to_owned(), 404, ""),
            (without("Connection"), 400, ""),
            (without("Sec-WebSocket-Key"), 400, ""),
            (without("Sec-WebSocket-Protocol"), 400, ""),
            (without("Sec-WebSocket-Version"), 426, "sec-websocket-version: 13"),
            (GOOD.replace("GET", "POST"), 400, ""),
            (GOOD.replace("WebSocket\r\n", "h2c\r\n"), 426, "upgrade: websocket"),
            (GOOD.replace("Version: 13", "Version: 8"), 426, "sec-websocket-version: 13"),
            (GOOD.replace("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ="), 400, ""),
            (GOOD.replace("AMQPWSB10, MQTT", "AMQPWSB10, mqttv3.1"), 400, ""),
            (GOOD.replace("Host: h", &format!("Host: h\r\nX: {}", "x".repeat(16_385))), 431, ""),
            (GOOD.replace("Host: h", &format!("Host: h\r\nX: {}", "x".repeat(33_000))), 431, ""),
            (GOOD.replace("Host: h", &format!("Host: h{}", "\r\nX: x".repeat(65))), 431, ""),
        ] {
            let (head, sub_protocol) = ask(&request).await;
            assert!(head.starts_with(&format!("http/1.1 {status} ")), "{request}: {head}");
            assert!(head.contains(contains), "{request}: {head}");
            assert_eq!(sub_protocol, None, "{request}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_come_is_given_up() {
        for part in ["", "GET / HTTP/1.1\r\nHost: h\r\n"] {
            let (mut near, far) = tokio::io::duplex(1_024);
            let serving =
                tokio::spawn(serve(far, Instant::now(), Arc::new([SubProtocol::Mqtt]), Arc::new(Nothing)));
            near.write_all(part.as_bytes()).await.unwrap();
            let started = tokio::time::Instant::now();
            assert!(serving.await.unwrap().is_none());
            assert!(started.elapsed() <= HEAD_TIMEOUT + Duration::from_secs(1), "{:?}", started.elapsed());
        }
    }
}
