//! The scope client against an upstream that misbehaves, over loopback TLS.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use edgehub_broker::identity::{
    ANSWER_BYTES_MAX, Identity, ScopeClient, ScopeClientOptions, ScopeError, ScopeSource, SymmetricKey,
    TokenSource,
};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

const EMPTY: &str = r#"{"devices":[],"modules":[],"continuationLink":null}"#;

/// Answers each request with a status and a body, and counts them.
struct Upstream {
    client: ScopeClient,
    requests: Arc<AtomicUsize>,
    server: JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Upstream {
    /// `answer` gets the number of the request (from 0) and its body; the text it gives is the answer behind `HTTP/1.1 `.
    async fn start(answer: impl Fn(usize, &str) -> String + Send + Sync + 'static) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
        let tls = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = requests.clone();
        let server = tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(Arc::new(tls));
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let Ok(stream) = acceptor.accept(stream).await else { continue };
                let mut stream = BufReader::new(stream);
                while let Some(body) = request(&mut stream).await {
                    let text = answer(counter.fetch_add(1, Ordering::SeqCst), &body);
                    if stream.write_all(format!("HTTP/1.1 {text}").as_bytes()).await.is_err() {
                        break;
                    }
                    if text.is_empty() {
                        break;
                    }
                }
            }
        });
        let edge = Identity::device("edge1").unwrap();
        let tls = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let key = SymmetricKey::from_bytes(b"a dummy key".to_vec()).unwrap();
        let tokens = Arc::new(TokenSource::new("hub1.example.net", &edge, Arc::new(key)));
        let options = ScopeClientOptions::new("localhost", &edge, Arc::new(tls), tokens);
        let retry_pause = Duration::from_millis(1);
        let client = ScopeClient::new(ScopeClientOptions { port, retry_pause, ..options });
        Self { client, requests, server }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

async fn request(stream: &mut (impl AsyncBufReadExt + AsyncReadExt + Unpin)) -> Option<String> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line == "\r\n" {
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.ok()?;
            return String::from_utf8(body).ok();
        }
    }
}

fn answer(status: &str, body: &str) -> String {
    format!("{status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn page(edge_devices: &[&str], link: &str) -> String {
    let devices: Vec<String> = edge_devices
        .iter()
        .map(|id| format!(r#"{{"deviceId":"{id}","capabilities":{{"iotEdge":true}},"authentication":{{}}}}"#))
        .collect();
    format!(r#"{{"devices":[{}],"modules":[],"continuationLink":{link}}}"#, devices.join(","))
}

#[tokio::test]
async fn failures_of_the_upstream_are_tried_again_and_definite_answers_are_not() {
    let upstream = Upstream::start(|number, _| match number {
        0 => answer("500 no", ""),
        1 => String::new(),
        _ => answer("200 OK", EMPTY),
    })
    .await;
    assert!(upstream.client.all().await.unwrap().complete);
    assert_eq!(upstream.requests(), 3);
    let upstream = Upstream::start(|_, _| answer("503 no", "")).await;
    assert_eq!(upstream.client.all().await, Err(ScopeError::Status(503)));
    assert_eq!(upstream.requests(), 3);
    for (status, error) in [
        ("401 no", ScopeError::Refused(401)),
        ("403 no", ScopeError::Refused(403)),
        ("404 no", ScopeError::Status(404)),
        ("406 no", ScopeError::Status(406)),
    ] {
        let upstream = Upstream::start(move |_, _| answer(status, "")).await;
        assert_eq!(upstream.client.all().await, Err(error));
        assert_eq!(upstream.requests(), 1);
    }
}

#[tokio::test]
async fn a_child_that_fails_makes_the_answer_incomplete_and_spares_the_others() {
    let upstream = Upstream::start(|_, body| {
        let chain = |text| body.contains(&format!(r#""authChain":"{text}""#));
        if chain("edge1") {
            answer("200 OK", &page(&["edge1", "bad", "good"], "null"))
        } else if chain("good;edge1") {
            answer("200 OK", &page(&["good", "deep"], "null"))
        } else if chain("deep;good;edge1") {
            answer("200 OK", EMPTY)
        } else {
            answer("404 no", "")
        }
    })
    .await;
    let scope = upstream.client.all().await.unwrap();
    assert!(!scope.complete);
    let names: Vec<_> = scope.identities.iter().map(|entry| entry.identity.to_string()).collect();
    assert_eq!(names, ["edge1", "bad", "good", "good", "deep"]);
    assert_eq!(upstream.requests(), 4);
}

#[tokio::test]
async fn pages_that_do_not_end_and_answers_that_are_too_large_are_refused() {
    let upstream = Upstream::start(|_, _| answer("200 OK", &page(&[], "\"again\""))).await;
    assert!(matches!(upstream.client.all().await, Err(ScopeError::Answer(_))));
    assert_eq!(upstream.requests(), 2);
    let upstream =
        Upstream::start(|_, _| format!("200 OK\r\nContent-Length: {}\r\n\r\n{EMPTY}", ANSWER_BYTES_MAX + 1))
            .await;
    assert!(matches!(upstream.client.all().await, Err(ScopeError::Answer(_))));
    let upstream = Upstream::start(|_, _| answer("200 OK", "{}")).await;
    assert!(matches!(upstream.client.all().await, Err(ScopeError::Answer(_))));
}

#[tokio::test]
async fn an_upstream_that_is_not_trusted_is_not_asked() {
    let upstream = Upstream::start(|_, _| answer("200 OK", EMPTY)).await;
    let other = Upstream::start(|_, _| answer("200 OK", EMPTY)).await;
    let client = ScopeClient::new(ScopeClientOptions {
        tls: other.client.options().tls.clone(),
        ..upstream.client.options().clone()
    });
    assert!(matches!(client.all().await, Err(ScopeError::Unreachable(..))));
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn the_old_calls_ask_page_after_page_and_for_no_children() {
    let upstream = Upstream::start(|number, body| {
        assert_eq!(body, "");
        match number {
            0 => answer("200 OK", &page(&["edge1", "child"], "\"more\"")),
            1 => answer("200 OK", &page(&["leaf1"], "null")),
            _ => answer("404 no", ""),
        }
    })
    .await;
    let options = ScopeClientOptions { nested: false, ..upstream.client.options().clone() };
    let client = ScopeClient::new(options);
    let scope = client.all().await.unwrap();
    let names: Vec<_> = scope.identities.iter().map(|entry| entry.identity.to_string()).collect();
    assert_eq!((scope.complete, names), (true, vec!["edge1".into(), "child".into(), "leaf1".into()]));
    assert_eq!(client.one(&Identity::device("gone").unwrap(), "edge1").await, Ok(Vec::new()));
    assert_eq!(upstream.requests(), 3);
}
