//! Owns the hub's side of the socket: connections, their limits, and the way from bytes to a verb and back.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::REQUEST_BODY_BYTES_MAX;
use super::answer::{ErrorAnswer, Refusal};
use super::body::AnswerBody;
use super::request::Request;
use super::socket::AdminListener;
use super::verbs::{Answer, Verbs};

/// Open connections, at most; further ones wait.
const CONNECTIONS_MAX: usize = 16;
/// Longest request head, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most header lines of a request.
const HEADERS_MAX: usize = 64;
/// Time to send a request head, and to stay idle before it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Time to send the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(15);
/// Time that a verb may take. What the store was told by then is done all the same.
const VERB_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest life of a connection.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(300);
/// Pause after the system had no room for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the socket until it is dropped, and with it the socket's file. To be run on the control plane.
pub async fn serve(listener: AdminListener, verbs: Arc<Verbs>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The semaphore is never closed, so this waits or succeeds.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(stream) => {
                let verbs = Arc::clone(&verbs);
                tokio::spawn(async move {
                    connection(stream, verbs).await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(code = "EH1205", %error, "the admin socket cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, verbs: Arc<Verbs>) {
    let service = service_fn(move |request| {
        let verbs = Arc::clone(&verbs);
        async move { Ok::<_, Infallible>(response(answer(&verbs, request).await)) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_AGE_MAX, connection).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => debug!(%error, "a connection to the admin socket ended"),
    }
}

async fn answer(verbs: &Verbs, request: hyper::Request<Incoming>) -> Result<Answer, Refusal> {
    let (head, body) = request.into_parts();
    let collected = timeout(BODY_TIMEOUT, Limited::new(body, REQUEST_BODY_BYTES_MAX).collect()).await;
    let body = match collected {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let text = format!("the body is longer than {REQUEST_BODY_BYTES_MAX} bytes");
            return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text));
        }
        Ok(Err(_)) => {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "the body does not end as announced"));
        }
        Err(_) => return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
    };
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    let request = Request::parse(&head.method, target, &body)?;
    timeout(VERB_TIMEOUT, verbs.carry_out(request)).await.unwrap_or_else(|_| {
        let text = "the hub did not get done in time; look at the queues before asking again";
        Err(Refusal::new(StatusCode::GATEWAY_TIMEOUT, text))
    })
}

fn response(answer: Result<Answer, Refusal>) -> Response<AnswerBody> {
    let whole = |value: Value| AnswerBody::Whole(Some(Bytes::from(format!("{value}\n"))));
    let (status, allow, kind, body) = match answer {
        Ok(Answer::Value(value)) => (StatusCode::OK, None, "application/json", whole(value)),
        Ok(Answer::Lines(lines)) => (StatusCode::OK, None, "application/x-ndjson", AnswerBody::Lines(lines)),
        Err(refusal) => {
            // Plain text in a plain object; it cannot fail to be JSON.
            let value = serde_json::to_value(ErrorAnswer { error: refusal.text }).unwrap_or_default();
            (refusal.status, refusal.allow, "application/json", whole(value))
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(allow) = allow {
        headers.insert(ALLOW, HeaderValue::from_static(allow));
    }
    response
}
