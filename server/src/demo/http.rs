//! Owns HTTP towards the hub's status page and the cloud's telemetry log.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The JSON document at this address, plain HTTP.
pub(super) async fn json<T: DeserializeOwned>(address: SocketAddr, path: &str) -> Result<T, String> {
    let fetch = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let response = get(stream, "localhost", path).await?;
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX);
        let body = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| error.to_string())
    };
    timeout(ANSWER_TIMEOUT, fetch).await.unwrap_or_else(|_| Err("no answer in time".into()))
}

/// Whether a page answers 200; else what it answered.
pub(super) async fn ready(address: SocketAddr, path: &str) -> Result<(), String> {
    let fetch = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        get(stream, "localhost", path).await.map(drop)
    };
    timeout(ANSWER_TIMEOUT, fetch).await.unwrap_or_else(|_| Err("no answer in time".into()))
}

/// Begins to read a page that does not end, over TLS.
pub(super) async fn follow(
    address: SocketAddr,
    name: &str,
    tls: Arc<rustls::ClientConfig>,
    path: &str,
) -> Result<Incoming, String> {
    let fetch = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let server_name = ServerName::try_from(name.to_owned()).map_err(|error| error.to_string())?;
        let stream = TlsConnector::from(tls).connect(server_name, stream).await;
        get(stream.map_err(|error| error.to_string())?, name, path).await.map(Response::into_body)
    };
    timeout(ANSWER_TIMEOUT, fetch).await.unwrap_or_else(|_| Err("no answer in time".into()))
}

async fn get<S>(stream: S, host: &str, path: &str) -> Result<Response<Incoming>, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // Ends with the answer's body; its errors arrive there too.
    tokio::spawn(connection);
    let request = Request::get(path)
        .header(hyper::header::HOST, host)
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    match response.status() {
        StatusCode::OK => Ok(response),
        status => Err(format!("{path} answered {status}")),
    }
}
