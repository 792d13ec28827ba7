//! Owns the answers to plain requests on the HTTPS port: which path is whose, who may ask, how much and how many at a
//! time.
//!
//! | path | answer |
//! | --- | --- |
//! | `POST /twins/{device}[/modules/{module}]/methods` | a direct method of a connected client, see `method` |
//! | `POST /devices/{device}/modules/$edgeHub/{call}` | the identities below a child hub, see `scope` |
//! | `GET /metrics` | the metrics page |
//! | `GET /$iothub/websocket` | 426: it is for WebSockets |
//! | any other | 404 |

mod actor;
mod json;
mod method;
mod scope;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::hub::{Authenticator, Hub};
use edgehub_broker::identity::{Identity, ScopeCall, ScopeCalls};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, UPGRADE, X_CONTENT_TYPE_OPTIONS};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::json;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::listen::https::{Answering, PlainRequests};
use crate::metrics::{EXPOSITION_CONTENT_TYPE, Recorder};
use crate::store;

pub use method::{NAME_CHARS_MAX, PAYLOAD_BYTES_MAX};

/// Longest body of a request, bytes: a payload of the largest size, and what stands around it.
pub const BODY_BYTES_MAX: usize = 256 * 1024;
/// Requests with a body that are answered at a time; each may hold its body.
pub const REQUESTS_MAX: usize = 256;
/// Time to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest text of a request that an answer repeats, characters.
const REPEATED_CHARS_MAX: usize = 300;

/// The path that the SDKs use for their WebSockets.
const WEB_SOCKET_PATH: &str = "/$iothub/websocket";

/// Answers plain requests, from any number of connections.
pub struct Api {
    hub: Hub,
    authenticator: Arc<dyn Authenticator>,
    /// The device whose modules may call methods.
    edge_device: Identity,
    /// The module whose forwarded certificates are believed; nobody's where clients are not asked for certificates.
    proxy: Option<Identity>,
    recorder: Option<Recorder>,
    running: Semaphore,
    /// Answers child hubs, where there may be some.
    scope: Option<Arc<dyn ScopeCalls>>,
}

/// What a request meant for this hub has no good answer for.
struct Refused {
    status: StatusCode,
    message: String,
}

impl Refused {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }
}

impl Api {
    /// An API of a hub. Without a recorder there is no metrics page.
    pub fn new(
        hub: Hub,
        authenticator: Arc<dyn Authenticator>,
        edge_device: Identity,
        proxy: Option<Identity>,
        recorder: Option<Recorder>,
    ) -> Self {
        let running = Semaphore::new(REQUESTS_MAX);
        Self { hub, authenticator, edge_device, proxy, recorder, running, scope: None }
    }

    /// The same with somebody who answers the scope calls of child hubs, if there is one.
    #[must_use]
    pub fn with_scope(self, scope: Option<Arc<dyn ScopeCalls>>) -> Self {
        Self { scope, ..self }
    }

    /// The same for one connection, whose client showed these certificates (DER, its own first).
    pub fn of_connection(self: &Arc<Self>, certificates: Vec<Bytes>) -> Arc<dyn PlainRequests> {
        Arc::new(OfConnection { api: Arc::clone(self), certificates })
    }

    /// Answers one request.
    pub async fn answer<B>(&self, request: Request<B>, certificates: &[Bytes]) -> Response<Full<Bytes>>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let path = request.uri().path().to_owned();
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        let is = |text: &str, literal: &str| text.eq_ignore_ascii_case(literal);
        let target = match segments[..] {
            [twins, device, methods] if is(twins, "twins") && is(methods, "methods") => (device, None),
            [twins, device, modules, module, methods]
                if is(twins, "twins") && is(modules, "modules") && is(methods, "methods") =>
            {
                (device, Some(module))
            }
            [devices, device, modules, module, call] if is(devices, "devices") && is(modules, "modules") => {
                return match (&self.scope, ScopeCall::named(call)) {
                    (Some(_), Some(_)) if request.method() != Method::POST => not_allowed("POST"),
                    (Some(scope), Some(call)) => self.scope(&**scope, call, device, module, request).await,
                    (None, _) | (_, None) => empty(StatusCode::NOT_FOUND),
                };
            }
            [metrics] if is(metrics, "metrics") => return self.metrics(request.method()),
            _ if path == WEB_SOCKET_PATH => return web_socket_only(),
            _ => return empty(StatusCode::NOT_FOUND),
        };
        if request.method() != Method::POST {
            return not_allowed("POST");
        }
        let target = (decoded(target.0), target.1.map(decoded));
        match self.invoke(target, request, certificates).await {
            Ok(body) => with_json(StatusCode::OK, body),
            Err(refused) => failure("message", refused),
        }
    }

    /// A place for a request with a body.
    fn place(&self) -> Result<SemaphorePermit<'_>, Refused> {
        self.running.try_acquire().map_err(|_| {
            Refused::new(StatusCode::SERVICE_UNAVAILABLE, "too many requests are under way; come again")
        })
    }

    /// The body of a request, within its limits of size and time.
    async fn body<B>(&self, body: B, bytes_max: usize) -> Result<Bytes, Refused>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let reading = Limited::new(body, bytes_max).collect();
        match tokio::time::timeout(BODY_TIMEOUT, reading).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(Refused::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body is longer than {bytes_max} bytes"),
            )),
            Ok(Err(_)) => Err(Refused::new(StatusCode::BAD_REQUEST, "the body cannot be read")),
            Err(_) => Err(Refused::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
        }
    }

    fn metrics(&self, method: &Method) -> Response<Full<Bytes>> {
        let Some(recorder) = &self.recorder else { return empty(StatusCode::NOT_FOUND) };
        if !matches!(*method, Method::GET | Method::HEAD) {
            return not_allowed("GET, HEAD");
        }
        self.hub.observe();
        store::observe(self.hub.store());
        let mut response = Response::new(Full::new(Bytes::from(recorder.render())));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(EXPOSITION_CONTENT_TYPE));
        response
    }
}

/// The API as one connection sees it.
struct OfConnection {
    api: Arc<Api>,
    certificates: Vec<Bytes>,
}

impl PlainRequests for OfConnection {
    fn answer(&self, request: Request<Incoming>) -> Answering<'_> {
        let answer: Pin<Box<dyn Future<Output = _> + Send + '_>> =
            Box::pin(self.api.answer(request, &self.certificates));
        answer
    }
}

/// A segment of a path as callers mean it: decoded, and once more with `+` as a blank, for those who encode twice.
fn decoded(segment: &str) -> String {
    let once = percent_decode_str(segment).decode_utf8_lossy().replace('+', " ");
    percent_decode_str(&once).decode_utf8_lossy().into_owned()
}

fn empty(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn with_json(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = empty(status);
    *response.body_mut() = Full::new(body);
    let json = HeaderValue::from_static("application/json; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

/// A refusal whose text is in the member that the callers of a path look for.
fn failure(member: &str, refused: Refused) -> Response<Full<Bytes>> {
    let message: String = refused.message.chars().take(REPEATED_CHARS_MAX).collect();
    with_json(refused.status, json!({ member: message }).to_string().into())
}

fn not_allowed(allowed: &'static str) -> Response<Full<Bytes>> {
    let mut response = empty(StatusCode::METHOD_NOT_ALLOWED);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

fn web_socket_only() -> Response<Full<Bytes>> {
    let mut response = empty(StatusCode::UPGRADE_REQUIRED);
    *response.body_mut() = Full::from("this path is for WebSockets\n");
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    response
}
