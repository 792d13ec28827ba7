//! Owns the operator's pages: metrics, health and status over plain HTTP.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::RwLock;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::listen::Listener;
use crate::metrics::{EXPOSITION_CONTENT_TYPE, Recorder};

/// Open connections, at most; further ones wait.
const CONNECTIONS_MAX: usize = 64;
/// Longest request head, bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most header lines of a request.
const HEADERS_MAX: usize = 64;
/// Time to send a request head, and to stay idle before it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest life of a connection; a scraper opens another.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(300);
/// Pause after the system had no room for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Makes the content of `/status`.
pub type StatusSource = Box<dyn Fn() -> Value + Send + Sync>;

/// Sets gauges.
pub type Observer = Box<dyn Fn() + Send + Sync>;

/// Says what is damaged, one line each.
pub type DamageSource = Box<dyn Fn() -> Vec<String> + Send + Sync>;

/// Whether the hub serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not yet, because of this.
    Starting(String),
    /// The heads are open.
    Ready,
    /// Not any more.
    Stopping,
}

/// What the pages show.
pub struct Pages {
    recorder: Option<Recorder>,
    health: RwLock<Health>,
    status: RwLock<Option<StatusSource>>,
    observer: RwLock<Option<Observer>>,
    damage: RwLock<Option<DamageSource>>,
}

impl Pages {
    /// Pages of a hub that is starting. Without a recorder the metrics page is empty.
    pub fn new(recorder: Option<Recorder>) -> Arc<Self> {
        let health = RwLock::new(Health::Starting("the hub is starting".into()));
        Arc::new(Self {
            recorder,
            health,
            status: RwLock::new(None),
            observer: RwLock::new(None),
            damage: RwLock::new(None),
        })
    }

    /// Says how the hub is from now on.
    pub fn set_health(&self, health: Health) {
        *self.health.write() = health;
    }

    /// Gives `/status` its content; until then it answers 404. The source is called on the control plane and
    /// must not block.
    pub fn set_status(&self, source: StatusSource) {
        *self.status.write() = Some(source);
    }

    /// Gives what sets the gauges that are read off the hub; called before the metrics page is made.
    pub fn set_observer(&self, observer: Observer) {
        *self.observer.write() = Some(observer);
    }

    /// Lets `/healthz` tell of damage. A hub with a damaged store serves all the same.
    pub fn set_damage(&self, source: DamageSource) {
        *self.damage.write() = Some(source);
    }

    /// Serves the pages until it is dropped, so that they tell of a stop as well. To be run on the control
    /// plane's runtime.
    ///
    /// # Errors
    /// The socket cannot be watched.
    pub async fn serve(self: Arc<Self>, listener: Listener) -> std::io::Result<()> {
        let listener = TcpListener::from_std(listener.into_socket())?;
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let permit = Arc::clone(&permits).acquire_owned().await.map_err(std::io::Error::other)?;
            match listener.accept().await {
                Ok((stream, _peer)) => {
                    let pages = Arc::clone(&self);
                    tokio::spawn(async move {
                        pages.connection(stream).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    warn!(%error, "the pages cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let service = service_fn(move |request| {
            let response = self.answer(&request);
            async move { Ok::<_, Infallible>(response) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service);
        match tokio::time::timeout(CONNECTION_AGE_MAX, connection).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(error)) => debug!(%error, "a connection to the pages ended"),
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, kind, body) = match request.uri().path() {
            "/metrics" | "/healthz" | "/status"
                if !matches!(*request.method(), Method::GET | Method::HEAD) =>
            {
                (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET is allowed\n".to_owned())
            }
            "/metrics" => {
                if let Some(observe) = self.observer.read().as_ref() {
                    observe();
                }
                let page = self.recorder.as_ref().map(Recorder::render).unwrap_or_default();
                (StatusCode::OK, EXPOSITION_CONTENT_TYPE, page)
            }
            "/healthz" => {
                let (status, content) = self.health();
                (status, "application/json", format!("{content}\n"))
            }
            "/status" => match self.status.read().as_ref() {
                Some(source) => (StatusCode::OK, "application/json", format!("{}\n", source())),
                None => (StatusCode::NOT_FOUND, "text/plain", "there is no status yet\n".to_owned()),
            },
            _ => (StatusCode::NOT_FOUND, "text/plain", "try /metrics, /healthz or /status\n".to_owned()),
        };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
        headers.insert(CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        }
        response
    }

    fn health(&self) -> (StatusCode, Value) {
        match &*self.health.read() {
            Health::Ready => {
                let damage = self.damage.read().as_ref().map(|source| source()).unwrap_or_default();
                if damage.is_empty() {
                    (StatusCode::OK, json!({"status": "ready"}))
                } else {
                    (StatusCode::OK, json!({"status": "ready", "store_damage": damage}))
                }
            }
            Health::Starting(reason) => {
                (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "starting", "reason": reason}))
            }
            Health::Stopping => (
                StatusCode::SERVICE_UNAVAILABLE,
                json!({"status": "stopping", "reason": "the hub is stopping"}),
            ),
        }
    }
}
