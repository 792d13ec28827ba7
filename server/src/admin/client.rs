//! Owns the command line's side of the socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::ANSWER_BODY_BYTES_MAX;
use super::answer::ErrorAnswer;
use super::request::Request;
use super::socket::{SocketError, check_length};

/// Time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time from sending a request to the end of its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The setting switches the socket off.
    #[error("the setting admin.socket is off: the hub has no socket for its operator")]
    SwitchedOff,
    /// Nobody listens.
    #[error(
        "no hub is running at {path} ({reason}); give --config FILE or --socket PATH as the hub has them; `edgehub store \
         stat` reads the store of a stopped hub"
    )]
    NoHub {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// Only the hub's user may ask.
    #[error("the socket {path} is for the hub's user and root only; run this command as one of them")]
    Forbidden {
        /// The socket.
        path: PathBuf,
    },
    /// The path cannot be a socket's.
    #[error(transparent)]
    Path(#[from] SocketError),
    /// The hub does not answer in time.
    #[error("the hub at {path} does not answer within {limit_secs} s; look at its log")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The time it had.
        limit_secs: u64,
    },
    /// What answers is not a hub of this version.
    #[error("what answers at {path} is not a hub of this version: {reason}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The hub refuses.
    #[error("{0}")]
    Refused(String),
}

/// Asks a running hub.
#[derive(Clone, Debug)]
pub struct AdminClient {
    path: PathBuf,
}

impl AdminClient {
    /// A client of the socket at this path; it connects for each request.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Sends a request and reads its answer.
    ///
    /// # Errors
    /// [`AdminError`] says why there is none.
    pub async fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T, AdminError> {
        let late =
            |limit: Duration| AdminError::Timeout { path: self.path.clone(), limit_secs: limit.as_secs() };
        check_length(&self.path)?;
        let stream = timeout(CONNECT_TIMEOUT, UnixStream::connect(&self.path)).await;
        let stream = stream.map_err(|_| late(CONNECT_TIMEOUT))?.map_err(|error| self.unreachable(&error))?;
        let (status, body) = timeout(ANSWER_TIMEOUT, exchange(stream, request))
            .await
            .map_err(|_| late(ANSWER_TIMEOUT))?
            .map_err(|reason| AdminError::Protocol { path: self.path.clone(), reason })?;
        let strange = |error: serde_json::Error| AdminError::Protocol {
            path: self.path.clone(),
            reason: format!("{status}, {error}"),
        };
        if status == StatusCode::OK {
            serde_json::from_slice(&body).map_err(strange)
        } else {
            let refused: ErrorAnswer = serde_json::from_slice(&body).map_err(strange)?;
            Err(AdminError::Refused(refused.error))
        }
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn unreachable(&self, error: &io::Error) -> AdminError {
        match error.kind() {
            io::ErrorKind::PermissionDenied => AdminError::Forbidden { path: self.path.clone() },
            _ => AdminError::NoHub { path: self.path.clone(), reason: error.to_string() },
        }
    }
}

async fn exchange(stream: UnixStream, request: &Request) -> Result<(StatusCode, Bytes), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // Ends with the answer's body; its errors arrive there too.
    let connection = tokio::spawn(connection);
    let body = request.body().map(|body| body.to_string()).unwrap_or_default();
    let request = hyper::Request::builder()
        .method(request.method())
        .uri(request.target())
        .header(HOST, "edgehub")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BODY_BYTES_MAX).collect().await;
    connection.abort();
    Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
}
