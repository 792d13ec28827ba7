//! Owns one HTTP request to the daemon: a connection of its own, and an answer of bounded length.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::settings::WorkloadUri;

/// Longest answer, bytes: a trust bundle of some hundred certificates.
pub const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Longest head of an answer, bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Sends a request, without a deadline. The body, if there is one, is JSON.
///
/// # Errors
/// What keeps an answer from coming; a text without keys.
pub(super) async fn send(
    uri: &WorkloadUri,
    path: &str,
    body: Option<Bytes>,
) -> Result<(StatusCode, Bytes), String> {
    match uri {
        WorkloadUri::Unix(socket) => {
            let stream = UnixStream::connect(socket).await.map_err(|error| error.to_string())?;
            let host = socket.file_name().and_then(|name| name.to_str()).unwrap_or("workload.sock");
            exchange(stream, host, path, body).await
        }
        WorkloadUri::Http { host, port } => {
            let stream =
                TcpStream::connect((host.as_str(), *port)).await.map_err(|error| error.to_string())?;
            let host = edgehub_broker::dial::authority(host.as_str(), *port);
            exchange(stream, &host, path, body).await
        }
    }
}

async fn exchange<S>(
    stream: S,
    host: &str,
    path: &str,
    body: Option<Bytes>,
) -> Result<(StatusCode, Bytes), String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // A file name may have characters that a host does not.
    let host = HeaderValue::from_str(host).unwrap_or(HeaderValue::from_static("workload"));
    let method = if body.is_some() { Method::POST } else { Method::GET };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, host)
        .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
        .body(Full::new(body.unwrap_or_default()))
        .map_err(|error| error.to_string())?;
    let (mut sender, driver) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(HEAD_BYTES_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        match Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => {
                Err(format!("its answer is longer than {ANSWER_BYTES_MAX} bytes"))
            }
            Err(error) => Err(error.to_string()),
        }
    };
    // The driver is part of this future: nothing of the connection is left when the caller gives up.
    let mut driver = std::pin::pin!(driver);
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        ended = &mut driver => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(error.to_string()),
        },
    }
}
