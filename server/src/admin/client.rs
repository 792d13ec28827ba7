//! Owns the command line's side of the socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::StatusCode;
use hyper::body::Incoming;
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
        let stream = self.connect().await?;
        let (status, body) = timeout(ANSWER_TIMEOUT, exchange(stream, request))
            .await
            .map_err(|_| self.late(ANSWER_TIMEOUT))?
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

    /// Sends a request whose answer has many lines, and hands over each as it comes, until there are no more or
    /// `take` says that it has enough. `limit` is how long the answer may take.
    ///
    /// # Errors
    /// [`AdminError`] says why there is none.
    pub async fn follow<T: DeserializeOwned>(
        &self,
        request: &Request,
        limit: Duration,
        mut take: impl FnMut(T) -> bool,
    ) -> Result<(), AdminError> {
        let protocol = |reason: String| AdminError::Protocol { path: self.path.clone(), reason };
        let following = async {
            let (status, mut body) = send(self.connect().await?, request).await.map_err(protocol)?;
            if status != StatusCode::OK {
                let limited = Limited::new(body, ANSWER_BODY_BYTES_MAX).collect().await;
                let text = limited.map_err(|error| protocol(error.to_string()))?.to_bytes();
                let refused: ErrorAnswer =
                    serde_json::from_slice(&text).map_err(|error| protocol(format!("{status}, {error}")))?;
                return Err(AdminError::Refused(refused.error));
            }
            let mut waiting = Vec::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| protocol(error.to_string()))?;
                waiting.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
                while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = waiting.drain(..=end).collect();
                    let line = serde_json::from_slice(&line).map_err(|error| protocol(error.to_string()))?;
                    if !take(line) {
                        return Ok(());
                    }
                }
                if waiting.len() > ANSWER_BODY_BYTES_MAX {
                    return Err(protocol("a line is too long".into()));
                }
            }
            Ok(())
        };
        timeout(limit, following).await.unwrap_or_else(|_| Err(self.late(limit)))
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    async fn connect(&self) -> Result<UnixStream, AdminError> {
        check_length(&self.path)?;
        let stream = timeout(CONNECT_TIMEOUT, UnixStream::connect(&self.path)).await;
        stream.map_err(|_| self.late(CONNECT_TIMEOUT))?.map_err(|error| self.unreachable(&error))
    }

    fn late(&self, limit: Duration) -> AdminError {
        AdminError::Timeout { path: self.path.clone(), limit_secs: limit.as_secs() }
    }

    fn unreachable(&self, error: &io::Error) -> AdminError {
        match error.kind() {
            io::ErrorKind::PermissionDenied => AdminError::Forbidden { path: self.path.clone() },
            _ => AdminError::NoHub { path: self.path.clone(), reason: error.to_string() },
        }
    }
}

async fn exchange(stream: UnixStream, request: &Request) -> Result<(StatusCode, Bytes), String> {
    let (status, body) = send(stream, request).await?;
    let body = Limited::new(body, ANSWER_BODY_BYTES_MAX).collect().await;
    Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
}

/// Sends a request; its answer's body is still to come.
async fn send(stream: UnixStream, request: &Request) -> Result<(StatusCode, Incoming), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // Ends with the answer's body; its errors arrive there too.
    tokio::spawn(connection);
    let body = request.body().map(|body| body.to_string()).unwrap_or_default();
    let request = hyper::Request::builder()
        .method(request.method())
        .uri(request.target())
        .header(HOST, "edgehub")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
    Ok((answer.status(), answer.into_body()))
}
