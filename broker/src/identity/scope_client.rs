//! The HTTPS client that asks the upstream for identities: the cloud hub, or the parent's hub; both are asked alike.

mod request;

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Body as _;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::name::Identity;
use super::record::{ScopePage, ServiceIdentity, Status};
use super::scope::{CHAIN_EDGE_DEVICES_MAX, IDENTITIES_MAX};
use super::source::{FullScope, ScopeError, ScopeSource};
use super::token::TokenSource;
use crate::dial::{self, HttpProxy, Target};
use request::{Ask, Requests};

/// Longest answer. A parent hub sends everything below one device in one page; an identity takes about 600 bytes.
pub const ANSWER_BYTES_MAX: usize = 16 * 1_024 * 1_024;

/// Longest head of an answer.
const ANSWER_HEAD_BYTES_MAX: usize = 64 * 1_024;

/// Limit of one attempt of one call, from the connection to the last byte.
pub const CALL_TIMEOUT_SECS: u64 = 120;

/// Limit of the TCP connection and the TLS handshake.
const CONNECT_TIMEOUT_SECS: u64 = 30;

/// Attempts after the first that failed.
const RETRIES_MAX: u32 = 2;

/// Longest pause between attempts.
const RETRY_PAUSE_MAX_SECS: u64 = 10;

/// Whom to ask, and as whom.
#[derive(Clone)]
pub struct ScopeClientOptions {
    /// Host of the parent's hub or of the cloud hub; its certificate must be for this name.
    pub host: String,
    /// Its HTTPS port (443).
    pub port: u16,
    /// The edge device whose scope is asked for.
    pub edge_device: Identity,
    /// Roots of trust for the upstream.
    pub tls: Arc<rustls::ClientConfig>,
    /// The proxy in between, but for the hosts that it excepts.
    pub proxy: Option<Arc<HttpProxy>>,
    /// Tokens of this edge device's hub module.
    pub tokens: Arc<TokenSource>,
    /// Whether by the nested calls (`NestedEdgeEnabled`, true). The old ones know no child edge devices.
    pub nested: bool,
    /// Identities asked for in one page, 1 to 1000.
    pub page_size: u16,
    /// Pause before the first retry (1 s), doubled for each further one up to 10 s.
    pub retry_pause: Duration,
}

impl ScopeClientOptions {
    /// The usual port, page size and pauses.
    pub fn new(
        host: impl Into<String>,
        edge_device: &Identity,
        tls: Arc<rustls::ClientConfig>,
        tokens: Arc<TokenSource>,
    ) -> Self {
        Self {
            host: host.into(),
            port: 443,
            edge_device: edge_device.of_device(),
            tls,
            proxy: None,
            tokens,
            nested: true,
            page_size: 100,
            retry_pause: Duration::from_secs(1),
        }
    }
}

impl fmt::Debug for ScopeClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScopeClientOptions")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("edge_device", &self.edge_device)
            .finish_non_exhaustive()
    }
}

/// Asks the upstream for identities. Keeps no connection between refreshes.
#[derive(Debug, Clone)]
pub struct ScopeClient {
    options: ScopeClientOptions,
}

/// An open connection; its task ends with it, also when the peer stalls.
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ScopeClient {
    /// A client; connects when asked.
    pub fn new(options: ScopeClientOptions) -> Self {
        Self { options }
    }

    /// Whom it asks, and as whom.
    pub fn options(&self) -> &ScopeClientOptions {
        &self.options
    }

    /// All pages of what is immediately below the first device of the chain.
    async fn below(
        &self,
        connection: &mut Option<Connection>,
        auth_chain: &str,
        room: usize,
    ) -> Result<Vec<ServiceIdentity>, ScopeError> {
        let mut identities = Vec::new();
        let mut continuation: Option<String> = None;
        let mut links = HashSet::new();
        loop {
            let page_size = self.options.page_size.clamp(1, 1_000);
            let ask = self.requests().all(page_size, continuation.as_deref(), auth_chain)?;
            let body = self.call(connection, &ask).await?;
            let page = page(&body)?;
            identities.extend(page.identities);
            if identities.len() > room {
                return Err(ScopeError::Answer(format!("more than {IDENTITIES_MAX} identities")));
            }
            match page.continuation {
                None => return Ok(identities),
                Some(link) if !links.insert(link.clone()) || links.len() > IDENTITIES_MAX => {
                    return Err(ScopeError::Answer("its pages do not end".into()));
                }
                next => continuation = next,
            }
        }
    }

    /// One call with its retries. The body of a 200.
    async fn call(&self, connection: &mut Option<Connection>, ask: &Ask) -> Result<Bytes, ScopeError> {
        let mut attempt = 0;
        loop {
            let limit = Duration::from_secs(CALL_TIMEOUT_SECS);
            let outcome = match timeout(limit, self.attempt(connection, ask)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(ScopeError::Timeout(self.options.host.clone(), CALL_TIMEOUT_SECS)),
            };
            match outcome {
                Ok(answer) => return Ok(answer),
                Err(error) if attempt < RETRIES_MAX && is_transient(&error) => {
                    tracing::debug!(%error, attempt, "asking for identities again");
                    *connection = None;
                    self.pause(attempt).await;
                    attempt += 1;
                }
                Err(error) => {
                    if matches!(error, ScopeError::Status(401 | 403)) {
                        self.options.tokens.forget().await;
                    }
                    return Err(error);
                }
            }
        }
    }

    async fn attempt(&self, connection: &mut Option<Connection>, ask: &Ask) -> Result<Bytes, ScopeError> {
        let token = self.options.tokens.token().await?;
        let unreachable =
            |error: &dyn fmt::Display| ScopeError::Unreachable(self.options.host.clone(), error.to_string());
        let mut authorization = HeaderValue::from_str(&token).map_err(|error| unreachable(&error))?;
        authorization.set_sensitive(true);
        let mut request = Request::builder()
            .method(ask.method.clone())
            .uri(&ask.path)
            .header(HOST, self.host_header())
            .header(AUTHORIZATION, authorization)
            .header(USER_AGENT, concat!("edgehub/", env!("CARGO_PKG_VERSION")));
        if !ask.body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json; charset=utf-8");
        }
        let request = request.body(Full::new(ask.body.clone())).map_err(|error| unreachable(&error))?;

        // Back into its place only when it is usable for the next call.
        let mut open = match connection.take() {
            Some(open) if open.sender.is_ready() => open,
            _ => self.connect().await?,
        };
        let answer = open.sender.send_request(request).await.map_err(|error| unreachable(&error))?;
        let status = answer.status();
        let too_large = || ScopeError::Answer(format!("it is longer than {ANSWER_BYTES_MAX} bytes"));
        if answer.body().size_hint().lower() > ANSWER_BYTES_MAX as u64 {
            return Err(too_large());
        }
        let limited = Limited::new(answer.into_body(), ANSWER_BYTES_MAX);
        let body = match limited.collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => return Err(too_large()),
            Err(error) => return Err(unreachable(&error)),
        };
        *connection = Some(open);
        if status == StatusCode::OK { Ok(body) } else { Err(ScopeError::Status(status.as_u16())) }
    }

    async fn connect(&self) -> Result<Connection, ScopeError> {
        let host = &self.options.host;
        let unreachable = |error: &dyn fmt::Display| ScopeError::Unreachable(host.clone(), error.to_string());
        let target = Target {
            host,
            port: self.options.port,
            tls: &self.options.tls,
            proxy: self.options.proxy.as_deref(),
        };
        let stream = timeout(Duration::from_secs(CONNECT_TIMEOUT_SECS), dial::tls(target))
            .await
            .map_err(|_| ScopeError::Timeout(host.clone(), CONNECT_TIMEOUT_SECS))?
            .map_err(|error| unreachable(&error))?;
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(ANSWER_HEAD_BYTES_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| unreachable(&error))?;
        let task = tokio::spawn(async move {
            // Its failures reach whoever waits for an answer.
            let _ = driver.await;
        });
        Ok(Connection { sender, task: task.abort_handle() })
    }

    fn host_header(&self) -> String {
        match (self.options.host.contains(':'), self.options.port) {
            (false, 443) => self.options.host.clone(),
            (false, port) => format!("{}:{port}", self.options.host),
            (true, port) => format!("[{}]:{port}", self.options.host),
        }
    }

    fn requests(&self) -> Requests<'_> {
        Requests { edge_device: &self.options.edge_device, nested: self.options.nested }
    }

    async fn pause(&self, attempt: u32) {
        let base = self.options.retry_pause.saturating_mul(1 << attempt.min(8));
        let base = base.min(Duration::from_secs(RETRY_PAUSE_MAX_SECS));
        // A tenth of chance, so that a site does not ask in step.
        sleep(base + base.mul_f64(fastrand::f64() / 10.0)).await;
    }
}

impl ScopeSource for ScopeClient {
    async fn one(&self, identity: &Identity, auth_chain: &str) -> Result<Vec<ServiceIdentity>, ScopeError> {
        let ask = self.requests().one(identity, auth_chain)?;
        match self.call(&mut None, &ask).await {
            Ok(body) => Ok(page(&body)?.identities),
            // Not found, or not in scope.
            Err(ScopeError::Status(400 | 401 | 403 | 404)) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Breadth first: what is below this edge device, then below each edge device found. A device whose pages fail
    /// makes the answer incomplete; the first device's failure fails the whole. One that is disabled is not asked for: it is
    /// told of to nobody.
    async fn all(&self) -> Result<FullScope, ScopeError> {
        let own = self.options.edge_device.clone();
        let mut scope = FullScope { identities: Vec::new(), complete: true };
        let mut seen = HashSet::from([own.clone()]);
        let mut waiting = VecDeque::from([(own.clone(), own.to_string(), 1)]);
        let mut connection = None;
        while let Some((device, chain, depth)) = waiting.pop_front() {
            let room = IDENTITIES_MAX - scope.identities.len();
            let found = match self.below(&mut connection, &chain, room).await {
                Ok(found) => found,
                Err(ScopeError::Status(status @ (401 | 403))) if device == own => {
                    return Err(ScopeError::Refused(status));
                }
                Err(error) if device == own => return Err(error),
                Err(error) => {
                    tracing::warn!(code = "EH3005", %device, %error, "the identities below an edge device are not refreshed");
                    scope.complete = false;
                    continue;
                }
            };
            for entry in found {
                let child = &entry.identity;
                if self.options.nested
                    && entry.edge
                    && entry.status == Status::Enabled
                    && depth < CHAIN_EDGE_DEVICES_MAX
                    && seen.insert(child.clone())
                {
                    waiting.push_back((child.clone(), format!("{child};{chain}"), depth + 1));
                }
                scope.identities.push(entry);
            }
        }
        Ok(scope)
    }
}

fn page(body: &[u8]) -> Result<ScopePage, ScopeError> {
    let page = ScopePage::from_json(body).map_err(|error| ScopeError::Answer(error.to_string()))?;
    if page.unreadable > 0 {
        tracing::warn!(
            code = "EH3006",
            count = page.unreadable,
            "identities with impossible ids are left out"
        );
    }
    Ok(page)
}

fn is_transient(error: &ScopeError) -> bool {
    match error {
        ScopeError::Status(status) => !matches!(status, 400 | 401 | 403 | 404 | 405 | 406),
        ScopeError::Unreachable(..) | ScopeError::Timeout(..) | ScopeError::Token(_) => true,
        ScopeError::Refused(_) | ScopeError::Answer(_) | ScopeError::Cache(_) => false,
    }
}
