//! The workload API's client against the stand-in's authority and against a daemon that misbehaves.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub::certificate::authority::Authority;
use edgehub::settings::{WorkloadSettings, WorkloadUri};
use edgehub::workload::{ANSWER_BYTES_MAX, WorkloadClient, WorkloadError};
use parking_lot::Mutex;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

/// Answers each connection with the next of its texts, and keeps the requests.
struct Daemon {
    requests: Arc<Mutex<Vec<String>>>,
    client: WorkloadClient,
    serving: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn client(socket: &Path) -> WorkloadClient {
    let settings = WorkloadSettings {
        uri: WorkloadUri::Unix(socket.into()),
        generation_id: "63 7/1".into(),
        api_version: "2019-01-30".into(),
    };
    WorkloadClient::new(settings).with_retry_pause(Duration::from_millis(1))
}

fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

impl Daemon {
    fn start(answers: impl IntoIterator<Item = String>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("workload.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let kept = requests.clone();
        let mut answers: VecDeque<String> = answers.into_iter().collect();
        let serving = tokio::spawn(async move {
            while let Some(answer) = answers.pop_front() {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !complete(&request) {
                    stream.read_buf(&mut request).await.unwrap();
                }
                kept.lock().push(String::from_utf8(request).unwrap());
                // A client that gives up early is what some answers are for.
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        Self { requests, client: client(&socket), serving, _folder: folder }
    }
}

/// Whether head and body are there.
fn complete(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().unwrap())
}

#[tokio::test]
async fn calls_are_written_as_the_daemon_reads_them() {
    let digest = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let daemon = Daemon::start([
        answer("200 OK", &json!({ "digest": digest }).to_string()),
        answer("200 OK", &json!({ "ciphertext": "AAA=" }).to_string()),
        answer("200 OK", &json!({ "plaintext": "AQE=" }).to_string()),
    ]);
    let expected: Vec<u8> = (0..32).collect();
    assert_eq!(daemon.client.sign(b"sr\n1").await.unwrap().as_slice(), expected);
    assert_eq!(daemon.client.encrypt(b"a", b"b").await.unwrap(), [0, 0]);
    assert_eq!(daemon.client.decrypt(b"a", b"b").await.unwrap(), [1, 1]);
    let requests = daemon.requests.lock().clone();
    let body = |call: usize| {
        let text = requests[call].split_once("\r\n\r\n").unwrap().1;
        serde_json::from_str::<serde_json::Value>(text).unwrap()
    };
    let path = "/modules/%24edgeHub/genid/63%207%2F1";
    for (request, call) in requests.iter().zip(["sign", "encrypt", "decrypt"]) {
        assert!(request.starts_with(&format!("POST {path}/{call}?api-version=2019-01-30 HTTP/1.1\r\n")));
        assert!(request.contains("host: workload.sock\r\n"), "{request}");
    }
    assert_eq!(body(0), json!({ "keyId": "primary", "algo": "HMACSHA256", "data": "c3IKMQ==" }));
    assert_eq!(body(1), json!({ "plaintext": "YQ==", "initializationVector": "Yg==" }));
    assert_eq!(body(2), json!({ "ciphertext": "YQ==", "initializationVector": "Yg==" }));
}

#[tokio::test]
async fn certificate_and_bundle_are_read() {
    let authority = Authority::new("root").unwrap();
    let issued = authority.issue_server(&["gateway".into()]).unwrap();
    let certificate = json!({
        "privateKey": { "type": "key", "ref": null, "bytes": issued.key_pem },
        "certificate": issued.chain_pem,
        "expiration": "2026-11-19T10:57:24Z",
    });
    let without_key = json!({ "privateKey": { "type": "ref", "ref": "k" }, "certificate": issued.chain_pem });
    let two_roots = format!("{0}\n{0}", authority.root_pem());
    let daemon = Daemon::start([
        answer("201 Created", &certificate.to_string()),
        answer("201 Created", &without_key.to_string()),
        answer("200 OK", &json!({ "certificate": two_roots }).to_string()),
        answer("200 OK", &json!({ "certificate": "no PEM" }).to_string()),
    ]);
    let got = daemon.client.server_certificate("gateway").await.unwrap();
    assert_eq!((&got.chain_pem, &got.key_pem), (&issued.chain_pem, &issued.key_pem));
    assert!(!format!("{got:?}").contains("PRIVATE KEY"));
    let refused = daemon.client.server_certificate("gateway").await;
    assert!(matches!(refused, Err(WorkloadError::Answer { .. })));
    assert_eq!(daemon.client.trust_bundle().await.unwrap().len(), 2);
    assert!(matches!(daemon.client.trust_bundle().await, Err(WorkloadError::Answer { .. })));
    let body = daemon.requests.lock()[0].clone();
    assert!(body.contains("\"commonName\":\"gateway\"") && body.contains("\"expiration\":\"20"), "{body}");
}

#[tokio::test]
async fn only_what_may_be_better_next_time_is_asked_again() {
    let refused = || answer("403 Forbidden", "{\"message\":\"not\\nyours\"}");
    let failed = || answer("500 Internal Server Error", "oops");
    let good = || answer("200 OK", "{\"digest\":\"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\"}");
    let too_long = || answer("200 OK", &" ".repeat(ANSWER_BYTES_MAX + 1));
    for (answers, asked, expected) in [
        (vec![failed(), String::new(), "nonsense\r\n\r\n".into(), good()], 4, None),
        (vec![failed(), failed(), failed(), failed(), good()], 4, Some("with 500: no reason is given")),
        (vec![refused(), good()], 1, Some("with 403: not yours")),
        (vec![answer("200 OK", "{}"), good()], 1, Some("not the JSON that was expected")),
        (vec![answer("200 OK", "{\"digest\":\"AAA=\"}"), good()], 1, Some("has 2 bytes, not 32")),
        (vec![answer("200 OK", "{\"digest\":\"?\"}"), good()], 1, Some("not base64")),
        (vec![too_long(), too_long(), too_long(), too_long()], 4, Some("longer than 1048576 bytes")),
    ] {
        let daemon = Daemon::start(answers);
        let text = daemon.client.sign(b"data").await.map(drop).map_err(|error| error.to_string());
        assert_eq!(daemon.requests.lock().len(), asked, "{text:?}");
        match expected {
            None => assert_eq!(text, Ok(())),
            Some(part) => assert!(text.as_ref().unwrap_err().contains(part), "{text:?}"),
        }
    }
}

#[tokio::test]
async fn a_socket_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = client(&folder.path().join("no.sock"));
    let text = missing.trust_bundle().await.unwrap_err().to_string();
    assert!(text.contains("no.sock gives no answer to trust-bundle"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_daemon_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("workload.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let text = client(&socket).sign(b"data").await.unwrap_err().to_string();
    assert!(text.contains("it took longer than 10 s"), "{text}");
}

#[test]
fn an_authority_that_is_kept_is_the_same_again() {
    let folder = tempfile::tempdir().unwrap();
    let first = Authority::open(folder.path(), "root").unwrap();
    let second = Authority::open(folder.path(), "root").unwrap();
    assert_eq!(first.root_pem(), second.root_pem());
    let issued = second.issue_server(&["localhost".into()]).unwrap();
    let certificate = edgehub::certificate::ServerCertificate::from_pem(&issued.chain_pem, &issued.key_pem);
    assert!(certificate.unwrap().validity().is_some());
    let (trust, unusable) = edgehub_broker::identity::ClientTrust::new(
        edgehub::certificate::certificates_of_pem(first.root_pem().as_bytes()).unwrap(),
    );
    assert_eq!((unusable, format!("{trust:?}").contains("anchors: 1")), (0, true));
}
