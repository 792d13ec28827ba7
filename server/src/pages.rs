//! Owns the operator's pages: metrics, health and status over plain HTTP.

pub mod condition;
pub mod watch;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use condition::{Condition, ConditionCode, Reason, Sinces};

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
/// Time between two looks at the conditions when nobody asks.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Makes the content of `/status`.
pub type StatusSource = Box<dyn Fn() -> Value + Send + Sync>;

/// Says which conditions hold of the hub.
pub type ConditionSource = Box<dyn Fn() -> Vec<Condition> + Send + Sync>;

/// Sets gauges.
pub type Observer = Box<dyn Fn() + Send + Sync>;

/// Whether the hub serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not yet, because of this.
    Starting(String),
    /// Not yet, because no configuration is in force; the text says what is waited for.
    NoConfiguration(String),
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
    conditions: RwLock<Option<ConditionSource>>,
    sinces: Sinces,
    /// The hub was ready once.
    started: AtomicBool,
}

/// The answer of the health pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthAnswer {
    /// `ready`, `starting`, `not_ready` or `stopping`.
    pub status: String,
    /// What keeps the hub from being ready.
    pub reasons: Vec<Reason>,
    /// What should be looked at although it is.
    pub warnings: Vec<Reason>,
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
            conditions: RwLock::new(None),
            sinces: Sinces::default(),
            started: AtomicBool::new(false),
        })
    }

    /// Says how the hub is from now on.
    pub fn set_health(&self, health: Health) {
        if health == Health::Ready {
            self.started.store(true, Ordering::Relaxed);
        }
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

    /// Gives what says which conditions hold. It is asked for each health page, and from time to time, so that each
    /// condition has the time of its beginning.
    pub fn set_conditions(&self, conditions: ConditionSource) {
        *self.conditions.write() = Some(conditions);
    }

    /// Looks at the conditions from time to time; never returns.
    pub async fn watch(self: Arc<Self>) {
        loop {
            self.health();
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
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
                    warn!(code = "EH1101", %error, "the pages cannot accept a connection");
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
            "/metrics" | "/healthz" | "/readyz" | "/startupz" | "/status"
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
            "/healthz" | "/readyz" => {
                let health = self.health();
                (code(health.status == "ready"), "application/json", page(&health))
            }
            "/startupz" => {
                let started = self.started.load(Ordering::Relaxed);
                (code(started), "application/json", page(&self.health()))
            }
            "/status" => match self.status.read().as_ref() {
                Some(source) => (StatusCode::OK, "application/json", format!("{}\n", source())),
                None => (StatusCode::NOT_FOUND, "text/plain", "there is no status yet\n".to_owned()),
            },
            _ => (
                StatusCode::NOT_FOUND,
                "text/plain",
                "try /metrics, /healthz, /readyz, /startupz or /status\n".to_owned(),
            ),
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

    /// How the hub is at this moment, as the health pages and the operator's verbs show it.
    pub fn health(&self) -> HealthAnswer {
        let (status, own) = match &*self.health.read() {
            Health::Ready => ("ready", None),
            Health::Starting(why) => ("starting", Some(Condition::new(ConditionCode::Starting, why))),
            Health::NoConfiguration(why) => {
                ("starting", Some(Condition::new(ConditionCode::NoConfiguration, why)))
            }
            Health::Stopping => {
                ("stopping", Some(Condition::new(ConditionCode::Stopping, "the hub is stopping")))
            }
        };
        let source = self.conditions.read();
        let found = source.as_ref().map(|source| source()).unwrap_or_default();
        let found = own.into_iter().chain(found).collect();
        let (reasons, warnings): (Vec<_>, Vec<_>) = self
            .sinces
            .look(OffsetDateTime::now_utc(), found)
            .into_iter()
            .partition(|reason| reason.code.blocks());
        let status = if status == "ready" && !reasons.is_empty() { "not_ready" } else { status };
        HealthAnswer { status: status.to_owned(), reasons, warnings }
    }
}

fn code(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn page(health: &HealthAnswer) -> String {
    // Plain data with text keys; it cannot fail to be JSON.
    serde_json::to_string(health).unwrap_or_default() + "\n"
}
