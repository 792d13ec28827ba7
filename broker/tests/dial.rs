//! The way to the upstream: WebSocket, HTTP proxy, TLS, against servers of the same process that also misbehave.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
#[allow(unused_imports)] // a part of it is used here
mod upstream_peers;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::backend::{Backend, Credentials, Login, Mailbox, Protocol};
use edgehub_broker::delivery::{BackoffOptions, ModulePumpOptions};
use edgehub_broker::dial::{self, Carried, DialError, HttpProxy, PROXY_ANSWER_BYTES_MAX, Target, Transport};
use edgehub_broker::head::amqp::{AmqpLimits, serve};
use edgehub_broker::head::mqtt::Peer;
use edgehub_broker::head::websocket::WebSocketBytes;
use edgehub_broker::hub::{Authenticating, Authenticator, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::{
    Authentication, Identity, ScopeCache, ScopeClient, ScopeClientOptions, ScopeError, ScopeSource,
    ServiceIdentity, Status, SymmetricKey, TokenSource,
};
use edgehub_broker::message::{Message, Properties};
use edgehub_broker::upstream::{UpstreamKind, UpstreamOptions};
use edgehub_routing::{HubConfig, OverflowPolicy};
use edgehub_storage::{Store, StoreLimits, StoreOptions};
use parking_lot::Mutex;
use recording::{DEADLINE, Recording, until};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use upstream_peers::{Server, tls_for};

/// The name in the server's certificate. This machine itself is never reached through a proxy, so the dialled
/// name is another, and only the proxy knows where it is.
const HOST: &str = "upstream.test";
const HUB_HOST: &str = "hub1.example.net";

/// What a proxy does with a CONNECT.
#[derive(Clone)]
enum Manners {
    /// Connects to this port of this machine, whatever the name.
    Connects(u16),
    /// Writes this and ends the connection.
    Says(Vec<u8>),
}

struct Proxy {
    address: SocketAddr,
    /// Heads of the requests, as they came.
    asked: Arc<Mutex<Vec<String>>>,
    accepting: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Proxy {
    async fn start(manners: Manners) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let heads = asked.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(Self::connection(stream, manners.clone(), heads.clone()));
            }
        });
        Self { address, asked, accepting }
    }

    async fn connection(mut stream: TcpStream, manners: Manners, heads: Arc<Mutex<Vec<String>>>) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        heads.lock().push(String::from_utf8(head).unwrap());
        match manners {
            Manners::Connects(port) => {
                let mut far = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
                // The head in two parts: its end is not that of a read.
                stream.write_all(b"HTTP/1.1 200 OK\r\nVia: x\r").await.unwrap();
                stream.flush().await.unwrap();
                stream.write_all(b"\n\r\n").await.unwrap();
                let _ = copy_bidirectional(&mut stream, &mut far).await;
            }
            Manners::Says(answer) => {
                let _ = stream.write_all(&answer).await;
                let _ = stream.shutdown().await;
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        }
    }

    fn http(&self, user: &str) -> Arc<HttpProxy> {
        Arc::new(HttpProxy::parse(&format!("http://{user}{}", self.address), "").unwrap())
    }
}

/// What a WebSocket server saw of an upgrade: path, host and sub-protocol.
type Upgrades = Arc<Mutex<Vec<(String, String, String)>>>;

/// Lets an upgrade through and gives the bytes in it; `answers` is the sub-protocol of the answer.
// The type of the error is the library's.
#[allow(clippy::result_large_err)]
async fn upgrade(
    stream: TlsStream<TcpStream>,
    upgrades: Upgrades,
    answers: Option<&'static str>,
) -> Option<WebSocketBytes<TlsStream<TcpStream>>> {
    let header = |request: &Request, name: &str| request.headers()[name].to_str().unwrap().to_owned();
    let seen = |request: &Request, mut response: Response| -> Result<Response, ErrorResponse> {
        let wanted = header(request, "sec-websocket-protocol");
        upgrades.lock().push((request.uri().path().to_owned(), header(request, "host"), wanted));
        if let Some(answer) = answers {
            response.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static(answer));
        }
        Ok(response)
    };
    // The client says nothing before it has the answer, so nothing was read ahead.
    let socket = accept_hdr_async(stream, seen).await.ok()?;
    Some(WebSocketBytes::accepted(socket.into_inner(), Vec::new()).await)
}

/// The hub's own AMQP head behind WebSockets.
async fn head(tls: Arc<rustls::ServerConfig>, recording: Recording, upgrades: Upgrades) -> Server {
    Server::start(0, tls, move |stream| {
        let (recording, upgrades) = (recording.clone(), upgrades.clone());
        async move {
            let Some(stream) = upgrade(stream, upgrades, Some("AMQPWSB10")).await else { return };
            let accepted_at = tokio::time::Instant::now();
            let peer = Peer { address: None, certificates: Vec::new(), accepted_at };
            serve(stream, recording, AmqpLimits::default(), peer, std::future::pending()).await;
        }
    })
    .await
}

struct Trusting;

impl Authenticator for Trusting {
    fn authenticate<'a>(&'a self, _: &'a Login) -> Authenticating<'a> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn tokens() -> Arc<TokenSource> {
    let own = Identity::parse("edge1/$edgeHub").unwrap();
    Arc::new(TokenSource::new(HUB_HOST, &own, Arc::new(SymmetricKey::from_bytes([1; 32]).unwrap())))
}

/// A hub whose upstream is dialled so.
fn hub(host: &str, port: u16, tls: Arc<rustls::ClientConfig>, transport: Transport) -> Hub {
    let edge = Identity::parse("edge1").unwrap();
    let scope = ScopeCache::new(&edge);
    let known = |text: &str| ServiceIdentity {
        identity: Identity::parse(text).unwrap(),
        authentication: Authentication::None,
        status: Status::Enabled,
        edge: text == "edge1",
        device_scope: (text == "edge1").then(|| "scope1".into()),
        parent_scopes: Vec::new(),
        generation_id: "1".into(),
    };
    scope.replace_all(vec![known("edge1"), known("edge1/m1")]).unwrap();
    let upstream = UpstreamOptions {
        kind: UpstreamKind::Hub,
        target: None,
        host: host.into(),
        port,
        transport,
        hub_host: HUB_HOST.into(),
        tokens: tokens(),
        identity: Identity::parse("edge1/$edgeHub").unwrap(),
        tls,
        scope: Arc::new(scope),
        batch_max: 10,
        operation_timeout: DEADLINE,
        idle_timeout: Duration::from_secs(60),
        backoff: BackoffOptions { first: Duration::from_millis(20), max: Duration::from_millis(100) },
        lower_share_percent: 0,
        client_tokens: None,
        gives_up_out_of_scope: true,
        product_info: "test".into(),
    };
    let options = HubOptions {
        edge_device: edge,
        clients_max: 10,
        module_pump: ModulePumpOptions::default(),
        upstream: Some(upstream),
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let store = Store::open(StoreOptions::memory()).unwrap();
    let hub = Hub::start(options, store, Arc::new(Trusting), tokio::runtime::Handle::current());
    let config = HubConfig::parse(&json!({
        "schemaVersion": "1.1",
        "routes": { "up": "FROM /messages/* INTO $upstream" },
        "storeAndForwardConfiguration": { "timeToLiveSecs": 3600 }
    }));
    assert!(hub.apply(&config.unwrap()).unwrap().is_complete());
    hub
}

async fn publish(hub: &Hub, count: u32) {
    let (mailbox, _mailbox) = Mailbox::channel(64);
    let login = Login {
        identity: Identity::parse("edge1/m1").unwrap(),
        credentials: Credentials::None,
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Mqtt,
        peer: None,
    };
    let mut client = hub.login(login, mailbox).await.unwrap();
    let sender = hub.sender(&client);
    let message =
        |number: u32| Message::new(sender.clone(), Properties::copied_from([]), number.to_string().into());
    let messages = (0..count).map(message).collect();
    hub.publish(&mut client, messages).await.unwrap().await.unwrap();
}

#[tokio::test]
async fn messages_go_up_in_a_websocket_with_and_without_a_proxy() {
    for through_proxy in [false, true] {
        let (server_tls, client_tls) = tls_for(&["localhost", HOST]);
        let (recording, upgrades) = (Recording::default(), Upgrades::default());
        let server = head(server_tls, recording.clone(), upgrades.clone()).await;
        let proxy = Proxy::start(Manners::Connects(server.port)).await;
        // Without a proxy the name must be one that this machine knows.
        let host = if through_proxy { HOST } else { "localhost" };
        let used = through_proxy.then(|| proxy.http("user:pa%3Ass@"));
        let hub = hub(host, server.port, client_tls, Transport::WebSocket { proxy: used });
        publish(&hub, 100).await;
        let all: Vec<u32> = (0..100).collect();
        until("all messages are there", || recording.numbers("edge1/m1") == all).await;
        let seen = upgrades.lock().clone();
        let authority = format!("{host}:{}", server.port);
        assert_eq!(seen, [("/$iothub/websocket".into(), authority.clone(), "AMQPWSB10".into())]);
        let asked = proxy.asked.lock().clone();
        // `user:pa:ss` in base64.
        let head = format!(
            "CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\nProxy-Authorization: Basic dXNlcjpwYTpzcw==\r\n\r\n"
        );
        assert_eq!(asked, if through_proxy { vec![head] } else { Vec::new() });
        hub.stop(DEADLINE).await;
        // The connection ended in order: the head saw its client leave.
        until("the sender is gone", || !recording.state.lock().gone.is_empty()).await;
    }
}

#[tokio::test]
async fn what_a_proxy_answers_instead_of_a_tunnel_is_told_without_credentials() {
    let (_, client_tls) = tls_for(&["localhost", HOST]);
    let endless = vec![b'x'; PROXY_ANSWER_BYTES_MAX + 4_096];
    for (answer, expected) in [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n".to_vec(), "answers 407"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno\n".to_vec(), "answers 403"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly".to_vec(), "bytes come before the tunnel is used"),
        (b"SSH-2.0-OpenSSH\r\n\r\n".to_vec(), "it is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n".to_vec(), "it ends the connection"),
        (Vec::new(), "it ends the connection"),
        (endless, "is longer than 16384 bytes"),
    ] {
        let proxy = Proxy::start(Manners::Says(answer)).await;
        let http = proxy.http("user:topsecret@");
        let target = Target { host: HOST, port: 443, tls: &client_tls, proxy: Some(&http) };
        let failed = tokio::time::timeout(DEADLINE, dial::tls(target)).await.unwrap();
        let text = failed.map(drop).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains(&proxy.address.to_string()), "{text}");
        assert!(!text.contains("topsecret") && !text.contains("dXNlc"), "{text}");
    }
}

#[tokio::test]
async fn a_server_that_opens_no_websocket_is_told() {
    let (server_tls, client_tls) = tls_for(&["localhost", HOST]);
    // An answer without the sub-protocol, one with another, and no HTTP at all.
    for (answers, expected) in [(None, "opens no WebSocket"), (Some("mqtt"), "opens no WebSocket")] {
        let server = Server::start(0, server_tls.clone(), move |stream| async move {
            let _ended = upgrade(stream, Upgrades::default(), answers).await;
        })
        .await;
        let target = Target { host: "localhost", port: server.port, tls: &client_tls, proxy: None };
        let failed =
            dial::stream(target, &Transport::WebSocket { proxy: None }, Carried::Amqp).await.map(drop);
        assert!(failed.unwrap_err().to_string().contains(expected));
    }
    for answer in ["HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n", "nonsense\r\n\r\n", ""] {
        let server = Server::start(0, server_tls.clone(), move |mut stream| async move {
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        })
        .await;
        let target = Target { host: "localhost", port: server.port, tls: &client_tls, proxy: None };
        let failed =
            dial::stream(target, &Transport::WebSocket { proxy: None }, Carried::Amqp).await.map(drop);
        assert!(matches!(failed, Err(DialError::WebSocket { .. })), "{answer:?}: {failed:?}");
    }
}

#[tokio::test]
async fn identities_are_asked_for_through_the_proxy() {
    let (server_tls, client_tls) = tls_for(&["localhost", HOST]);
    let server = Server::start(0, server_tls, |mut stream| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let proxy = Proxy::start(Manners::Connects(server.port)).await;
    let edge = Identity::parse("edge1").unwrap();
    let options = ScopeClientOptions::new(HOST, &edge, client_tls, tokens());
    let client = ScopeClient::new(ScopeClientOptions { proxy: Some(proxy.http("")), ..options });
    assert!(matches!(client.all().await, Err(ScopeError::Refused(403))));
    let head = format!("CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n");
    assert_eq!(*proxy.asked.lock(), [head]);
}
