//! The HTTPS server of the stand-in: sockets, limits, paths. What scope calls and service calls mean is elsewhere.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::identity::{SCOPE_REQUEST_BYTES_MAX, ScopeCall};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, IF_MATCH};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::backend::CloudBackend;
use crate::registry::Registry;
use crate::scope_api;
use crate::service::rest::{self, Call, Resource, Service};
use crate::stall::StallGuard;
use crate::telemetry::{TelemetryLog, TelemetryReader};
use crate::upgrade::{self, Granted, SubProtocol};

/// Connections at a time; more wait in the listener's queue.
pub const CONNECTIONS_MAX: usize = 256;

/// Largest body of a scope call.
pub const BODY_BYTES_MAX: usize = SCOPE_REQUEST_BYTES_MAX;

/// Largest request head.
pub const HEAD_BYTES_MAX: usize = 32 * 1_024;

/// Limit of the TLS handshake.
const HANDSHAKE_TIMEOUT_SECS: u64 = 10;

/// Limit of a request's head; also ends idle connections.
const HEAD_TIMEOUT_SECS: u64 = 30;

/// Limit of a request's body.
const BODY_TIMEOUT_SECS: u64 = 30;

/// Longest time in which a client may take nothing of its answer.
const WRITE_TIMEOUT_SECS: u64 = 60;

/// Chunks that wait for the client of a telemetry stream.
const STREAM_CHUNKS_MAX: usize = 2;

const JSON: &str = "application/json; charset=utf-8";

const BANNER: &str = "edgehub cloud: a stand-in for the cloud hub, for local use only\n";

type AnswerBody = UnsyncBoxBody<Bytes, std::io::Error>;

/// What the server answers from.
#[derive(Debug)]
pub(crate) struct HttpState {
    pub(crate) registry: Arc<Registry>,
    pub(crate) backend: CloudBackend,
    pub(crate) telemetry: TelemetryLog,
    pub(crate) telemetry_from_anywhere: bool,
}

/// Serves until `stop` resolves; then open connections are cut.
pub(crate) async fn serve(
    state: Arc<HttpState>,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    stop: impl Future<Output = ()>,
) {
    let mut stop = pin!(stop);
    let acceptor = TlsAcceptor::from(tls);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            let permit = room.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            () = &mut stop => return,
            Some(_) = connections.join_next() => continue,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (state, acceptor) = (state.clone(), acceptor.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    if let Err(error) = connection(state, acceptor, stream, peer).await {
                        tracing::debug!(%peer, %error, "HTTPS connection ended");
                    }
                });
            }
            Err(error) => {
                // Out of file descriptors, as a rule: connections that end give some back.
                tracing::warn!(code = "EH7003", %error, "accepting an HTTPS connection failed");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What HTTP is spoken over.
type Transport = TlsStream<StallGuard<TcpStream>>;

type ConnectionError = Box<dyn std::error::Error + Send + Sync>;

async fn connection(
    state: Arc<HttpState>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<(), ConnectionError> {
    stream.set_nodelay(true)?;
    // Below the encryption, so that it sees what the peer takes.
    let stream = StallGuard::new(stream, Duration::from_secs(WRITE_TIMEOUT_SECS));
    let stream = timeout(Duration::from_secs(HANDSHAKE_TIMEOUT_SECS), acceptor.accept(stream)).await??;
    let granted = Arc::new(Mutex::new(None));
    let service = service_fn(|request| {
        let (state, granted) = (state.clone(), granted.clone());
        async move { Ok::<_, Infallible>(answer(&state, request, peer, &granted).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(HEAD_TIMEOUT_SECS))
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await?;
    let granted = granted.lock().take();
    if let Some((upgrade, sub_protocol)) = granted {
        let (registry, backend) = (state.registry.clone(), state.backend.clone());
        upgrade::serve::<Transport>(upgrade, sub_protocol, registry, backend, peer).await;
    }
    Ok(())
}

async fn answer(
    state: &HttpState,
    mut request: Request<Incoming>,
    peer: SocketAddr,
    granted: &Mutex<Option<(OnUpgrade, SubProtocol)>>,
) -> Response<AnswerBody> {
    let mut answer = match upgrade::asked(request.method(), request.headers()) {
        Some(Ok(Granted { sub_protocol, headers })) => {
            *granted.lock() = Some((hyper::upgrade::on(&mut request), sub_protocol));
            let mut answer = Response::new(full(Bytes::new()));
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            *answer.headers_mut() = headers;
            answer
        }
        Some(Err(status)) => {
            text(status, "the request for a WebSocket is malformed, or for another protocol\n")
        }
        None => route(state, request, peer).await,
    };
    answer.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    answer
}

async fn route(state: &HttpState, request: Request<Incoming>, peer: SocketAddr) -> Response<AnswerBody> {
    let path: Option<Vec<String>> = request
        .uri()
        .path()
        .split('/')
        .skip(1)
        .map(|part| percent_decode_str(part).decode_utf8().ok().map(|part| part.into_owned()))
        .collect();
    let Some(path) = path else { return text(StatusCode::BAD_REQUEST, "the path is not UTF-8\n") };
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    match (request.method(), path.as_slice()) {
        (&Method::GET, [""]) => text(StatusCode::OK, BANNER),
        (&Method::GET, [name]) if name.eq_ignore_ascii_case("telemetry") => telemetry(state, &request, peer),
        (method, [devices, device, modules, module, call])
            if devices.eq_ignore_ascii_case("devices") && modules.eq_ignore_ascii_case("modules") =>
        {
            match (ScopeCall::named(call), method) {
                (None, _) => text(StatusCode::NOT_FOUND, ""),
                (Some(call), &Method::POST) => scope(state, call, device, module, request).await,
                (Some(_), _) => text(StatusCode::METHOD_NOT_ALLOWED, ""),
            }
        }
        (_, [""]) => text(StatusCode::METHOD_NOT_ALLOWED, ""),
        (_, [name]) if name.eq_ignore_ascii_case("telemetry") => text(StatusCode::METHOD_NOT_ALLOWED, ""),
        _ => match Resource::of(&path) {
            Some(resource) => service(state, resource, &path, request).await,
            None => text(StatusCode::NOT_FOUND, ""),
        },
    }
}

async fn service(
    state: &HttpState,
    resource: Resource<'_>,
    path: &[&str],
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    let (head, body) = request.into_parts();
    let body = match read(body, rest::BODY_BYTES_MAX).await {
        Ok(body) => body,
        Err((status, reason)) => return failure(status, reason),
    };
    let header = |name| head.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let call = Call {
        method: &head.method,
        path,
        query: head.uri.query().unwrap_or_default(),
        authorization: header(AUTHORIZATION),
        if_match: header(IF_MATCH),
        continuation: header(HeaderName::from_static("x-ms-continuation")),
        page_size: header(HeaderName::from_static("x-ms-max-item-count")),
    };
    let service = Service { registry: &state.registry, backend: &state.backend };
    let answer = rest::answer(service, resource, &call, &body).await;
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = with(status, JSON, full(answer.body));
    for (name, value) in answer.headers {
        // Names of identities can hold what no header can.
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// Reads a body, within a size and a time.
async fn read(body: Incoming, bytes_max: usize) -> Result<Bytes, (StatusCode, &'static str)> {
    let body = Limited::new(body, bytes_max).collect();
    match timeout(Duration::from_secs(BODY_TIMEOUT_SECS), body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err((StatusCode::PAYLOAD_TOO_LARGE, "the body is too large"))
        }
        Ok(Err(_)) => Err((StatusCode::BAD_REQUEST, "the body broke off")),
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, "the body did not come within 30 s")),
    }
}

async fn scope(
    state: &HttpState,
    call: ScopeCall,
    device: &str,
    module: &str,
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    let authorization = request.headers().get(AUTHORIZATION).cloned();
    let body = match read(request.into_body(), BODY_BYTES_MAX).await {
        Ok(body) => body,
        Err((status, reason)) => return failure(status, reason),
    };
    let authorization = authorization.as_ref().and_then(|value| value.to_str().ok());
    match scope_api::answer(&state.registry, call, device, module, authorization, &body) {
        Ok(page) => with(StatusCode::OK, JSON, full(page)),
        Err(refusal) => {
            let status = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::UNAUTHORIZED);
            failure(status, &refusal.to_string())
        }
    }
}

/// The log as it is, or with `?follow` also what comes.
fn telemetry(state: &HttpState, request: &Request<Incoming>, peer: SocketAddr) -> Response<AnswerBody> {
    if !state.telemetry_from_anywhere && !peer.ip().to_canonical().is_loopback() {
        return text(StatusCode::FORBIDDEN, "telemetry is shown to this machine only\n");
    }
    let follow = request.uri().query().unwrap_or_default().split('&').any(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, "true"));
        name == "follow" && !matches!(value, "false" | "0")
    });
    match state.telemetry.reader() {
        Ok(reader) => with(StatusCode::OK, "application/x-ndjson", stream(reader, follow)),
        Err(error) => {
            tracing::error!(code = "EH7004", %error, "telemetry cannot be shown");
            text(StatusCode::INTERNAL_SERVER_ERROR, "the telemetry log cannot be read\n")
        }
    }
}

/// A body fed by a task of its own, which ends when the connection does.
fn stream(mut reader: TelemetryReader, follow: bool) -> AnswerBody {
    let (sender, chunks) = mpsc::channel(STREAM_CHUNKS_MAX);
    tokio::spawn(async move {
        loop {
            let next = async { if follow { reader.follow().await } else { reader.next().await } };
            let chunk = tokio::select! {
                () = sender.closed() => return,
                chunk = next => chunk.transpose(),
            };
            let Some(chunk) = chunk else { return };
            let failed = chunk.is_err();
            if sender.send(chunk).await.is_err() || failed {
                return;
            }
        }
    });
    ChunkBody(chunks).boxed_unsync()
}

struct ChunkBody(mpsc::Receiver<std::io::Result<Bytes>>);

impl Body for ChunkBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(cx).map(|chunk| chunk.map(|chunk| chunk.map(Frame::data)))
    }
}

fn full(content: impl Into<Bytes>) -> AnswerBody {
    Full::new(content.into()).map_err(|never| match never {}).boxed_unsync()
}

fn with(status: StatusCode, content_type: &'static str, body: AnswerBody) -> Response<AnswerBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn text(status: StatusCode, content: &'static str) -> Response<AnswerBody> {
    with(status, "text/plain; charset=utf-8", full(content))
}

fn failure(status: StatusCode, reason: &str) -> Response<AnswerBody> {
    with(status, JSON, full(serde_json::json!({ "ErrorMessage": reason }).to_string()))
}
