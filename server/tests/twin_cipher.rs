//! Twins sealed by a hub with a workload API, against a daemon that can lose its key, fail and fall silent.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use edgehub::settings::{WorkloadSettings, WorkloadUri};
use edgehub::workload::{WorkloadCipher, WorkloadClient};
use edgehub_broker::twin::{CipherError, TwinCipher as _};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

const SECRET: &[u8] = b"{\"twin\":{\"desired\":{\"password\":\"planted\"}}}";

/// Wraps by turning bits, and marks what it wraps with the number of its key.
struct Daemon {
    state: Arc<Mutex<State>>,
    settings: WorkloadSettings,
    serving: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

#[derive(Default)]
struct State {
    key: u8,
    fails: bool,
    calls: usize,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Daemon {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("workload.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let state: Arc<Mutex<State>> = Arc::default();
        let answering = state.clone();
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                serve(stream, &answering).await;
            }
        });
        let settings = WorkloadSettings {
            uri: WorkloadUri::Unix(socket),
            generation_id: "1".into(),
            api_version: "2019-01-30".into(),
        };
        Self { state, settings, serving, _folder: folder }
    }

    /// The cipher of a new run of the hub.
    fn cipher(&self) -> WorkloadCipher {
        let client = WorkloadClient::new(self.settings.clone());
        WorkloadCipher::new(client.with_retry_pause(Duration::from_millis(1)), true)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
    }

    fn calls(&self) -> usize {
        self.state.lock().calls
    }
}

async fn serve(mut stream: UnixStream, state: &Mutex<State>) {
    let mut request = Vec::new();
    let body = loop {
        stream.read_buf(&mut request).await.unwrap();
        let text = String::from_utf8_lossy(&request);
        let Some((_, body)) = text.split_once("\r\n\r\n") else { continue };
        if let Ok(body) = serde_json::from_str::<Value>(body) {
            break body;
        }
    };
    let (status, answer) = answer(&body, &mut state.lock());
    let text = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{answer}", answer.len());
    stream.write_all(text.as_bytes()).await.unwrap();
}

fn answer(body: &Value, state: &mut State) -> (&'static str, String) {
    state.calls += 1;
    let bytes = |name: &str| body[name].as_str().map(|text| BASE64.decode(text).unwrap());
    let turned = |bytes: &[u8]| bytes.iter().map(|byte| !byte).collect::<Vec<u8>>();
    let failed = ("500 Internal Server Error", json!({ "message": "failed" }).to_string());
    match (bytes("plaintext"), bytes("ciphertext")) {
        _ if state.fails => failed,
        (Some(plain), _) => {
            let wrapped = [vec![state.key], turned(&plain)].concat();
            ("200 OK", json!({ "ciphertext": BASE64.encode(wrapped) }).to_string())
        }
        // As the daemon does it: another key is an error like any other.
        (None, Some(wrapped)) if wrapped[0] != state.key => failed,
        (None, Some(wrapped)) => {
            ("200 OK", json!({ "plaintext": BASE64.encode(turned(&wrapped[1..])) }).to_string())
        }
        (None, None) => panic!("{body} is no call of a cipher"),
    }
}

#[tokio::test]
async fn what_is_sealed_shows_nothing_and_is_opened_by_the_next_run() {
    let daemon = Daemon::start();
    let cipher = daemon.cipher();
    let sealed = cipher.seal(SECRET).await.unwrap();
    let again = cipher.seal(SECRET).await.unwrap();
    assert_ne!(sealed, again, "equal twins must not look equal");
    for part in sealed.split('.').map(|part| BASE64.decode(part).unwrap_or_default()) {
        assert!(!String::from_utf8_lossy(&part).contains("planted"));
    }
    let asked = daemon.calls();
    for _ in 0..100 {
        let sealed = cipher.seal(SECRET).await.unwrap();
        assert_eq!(cipher.open(&sealed).await.unwrap(), SECRET);
    }
    assert_eq!(daemon.calls(), asked, "one key for all");
    let next = daemon.cipher();
    assert_eq!(next.open(&sealed).await.unwrap(), SECRET);
    assert_eq!(next.open(&again).await.unwrap(), SECRET);
    assert_eq!(daemon.calls(), asked + 1);
}

#[tokio::test]
async fn twins_go_on_while_the_daemon_is_away() {
    let daemon = Daemon::start();
    let cipher = daemon.cipher();
    cipher.seal(SECRET).await.unwrap();
    daemon.set(|state| state.fails = true);
    let sealed = cipher.seal(SECRET).await.unwrap();
    assert_eq!(cipher.open(&sealed).await.unwrap(), SECRET);
}

#[tokio::test]
async fn a_daemon_in_trouble_loses_nothing() {
    let daemon = Daemon::start();
    let sealed = daemon.cipher().seal(SECRET).await.unwrap();
    daemon.set(|state| state.fails = true);
    let next = daemon.cipher();
    assert!(matches!(next.open(&sealed).await, Err(CipherError::Unavailable(_))));
    let asked = daemon.calls();
    assert!(matches!(next.seal(SECRET).await, Err(CipherError::Unavailable(_))));
    assert_eq!(daemon.calls(), asked, "it is left alone for a while");
    daemon.set(|state| state.fails = false);
    assert_eq!(daemon.cipher().open(&sealed).await.unwrap(), SECRET);
}

#[tokio::test]
async fn what_another_key_sealed_is_refused_and_not_asked_for_again() {
    let daemon = Daemon::start();
    let sealed = daemon.cipher().seal(SECRET).await.unwrap();
    daemon.set(|state| state.key = 1);
    let next = daemon.cipher();
    assert!(matches!(next.open(&sealed).await, Err(CipherError::Refused(_))));
    let asked = daemon.calls();
    assert!(matches!(next.open(&sealed).await, Err(CipherError::Refused(_))));
    assert_eq!(daemon.calls(), asked);
    let fresh = next.seal(SECRET).await.unwrap();
    assert_eq!(next.open(&fresh).await.unwrap(), SECRET);
}

#[tokio::test]
async fn what_is_damaged_or_of_another_form_is_refused() {
    let daemon = Daemon::start();
    let cipher = daemon.cipher();
    let sealed = cipher.seal(SECRET).await.unwrap();
    let parts: Vec<&str> = sealed.split('.').collect();
    let body = BASE64.decode(parts[3]).unwrap();
    for at in 0..body.len() {
        let mut damaged = body.clone();
        damaged[at] ^= 1;
        let damaged = format!("{}.{}.{}.{}", parts[0], parts[1], parts[2], BASE64.encode(damaged));
        assert!(matches!(cipher.open(&damaged).await, Err(CipherError::Refused(_))), "byte {at}");
    }
    for other in ["", "1", "2.AA==.AA==.AA==", "1.?.AA==.AA==", &format!("{sealed}.")] {
        assert!(matches!(cipher.open(other).await, Err(CipherError::Refused(_))), "{other}");
    }
    let short = format!("{}.{}.{}.AA==", parts[0], parts[1], parts[2]);
    assert!(matches!(cipher.open(&short).await, Err(CipherError::Refused(_))));
}
