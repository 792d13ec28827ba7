//! The hub's scope client and plain requests against the stand-in's HTTPS server, over loopback TLS.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::identity::{
    Hosts, Identity, RefreshOptions, ScopeCache, ScopeClient, ScopeClientOptions, ScopeError, ScopeRefresher,
    ScopeSource, Status, SymmetricKey, TokenSource,
};
use edgehub_broker::message::{Message, Origin, Properties, Sender};
use edgehub_cloud::{Cloud, CloudOptions, NewDevice};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const HOST: &str = "hub1.example.net";

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

/// Configurations of a server for `localhost` and of a client that trusts its authority.
fn tls() -> (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>) {
    let mut authority = CertificateParams::new(Vec::<String>::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let root = authority.self_signed(&key).unwrap();
    let issuer = Issuer::new(authority, key);
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let server = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(root.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    (Arc::new(server), Arc::new(client))
}

struct Site {
    cloud: Cloud,
    port: u16,
    tls: Arc<rustls::ClientConfig>,
    server: JoinHandle<()>,
    _directory: tempfile::TempDir,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Site {
    /// edge1 with leaves and a child edge device, and a device that is below nobody.
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let options = CloudOptions::new(path("registry.json"), path("telemetry.ndjson"), HOST);
        let cloud = Cloud::open(&options).unwrap();
        let registry = cloud.registry();
        let create = |id: &str, edge, parent| registry.create_device(NewDevice { id, edge, parent }).unwrap();
        create("edge1", true, None);
        create("child", true, Some("edge1"));
        create("solo", false, None);
        create("other", true, None);
        for number in 0..7 {
            create(&format!("leaf{number}"), false, Some("edge1"));
            create(&format!("low{number}"), false, Some("child"));
        }
        registry.create_module("edge1", "filter").unwrap();
        registry.create_module("child", "filter").unwrap();
        registry.create_module("leaf0", "part").unwrap();
        registry.set_status(&id("leaf1"), Status::Disabled).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (server_tls, tls) = tls();
        let serving = cloud.clone();
        let server = tokio::spawn(async move {
            serving.serve_https(listener, server_tls, std::future::pending()).await;
        });
        Self { cloud, port, tls, server, _directory: directory }
    }

    fn key(&self, identity: &str) -> SymmetricKey {
        self.cloud.registry().cache().get(&id(identity)).unwrap().keys().next().unwrap().clone()
    }

    fn tokens(&self, identity: &str, key: SymmetricKey) -> Arc<TokenSource> {
        Arc::new(TokenSource::new(HOST, &id(identity), Arc::new(key)))
    }

    fn client(&self, edge: &str, page_size: u16) -> ScopeClient {
        let hub = format!("{edge}/$edgeHub");
        self.client_with(edge, page_size, self.key(&hub))
    }

    fn client_with(&self, edge: &str, page_size: u16, key: SymmetricKey) -> ScopeClient {
        let tokens = self.tokens(&format!("{edge}/$edgeHub"), key);
        let options = ScopeClientOptions::new("localhost", &id(edge), self.tls.clone(), tokens);
        let retry_pause = Duration::from_millis(1);
        ScopeClient::new(ScopeClientOptions { port: self.port, page_size, retry_pause, ..options })
    }

    async fn connect(&self) -> TlsStream<TcpStream> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(self.tls.clone()).connect(name, stream).await.unwrap()
    }

    /// Status and body of a request on a connection of its own.
    async fn request(&self, head: &str, body: &str) -> (u16, String) {
        let mut stream = self.connect().await;
        let length = body.len();
        let text = format!(
            "{head}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.to_ascii_lowercase().contains("x-content-type-options: nosniff"));
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }
}

#[tokio::test]
async fn a_full_refresh_walks_pages_and_child_edge_devices() {
    let site = Site::start().await;
    let mut sizes = Vec::new();
    for page_size in [1, 3, 1_000] {
        let scope = site.client("edge1", page_size).all().await.unwrap();
        assert!(scope.complete);
        let cache = ScopeCache::new(&id("edge1"));
        cache.replace_all(scope.identities).unwrap();
        sizes.push(cache.len());
        for (identity, chain) in [
            ("edge1/filter", "edge1/filter;edge1"),
            ("leaf6", "leaf6;edge1"),
            ("low0", "low0;child;edge1"),
            ("child/filter", "child/filter;child;edge1"),
        ] {
            assert_eq!(cache.chain_text(&id(identity)).as_deref(), Some(chain), "page size {page_size}");
        }
        assert_eq!(cache.get(&id("leaf1")).unwrap().status, Status::Disabled);
        assert_eq!(cache.get(&id("solo")), None);
        assert_eq!(cache.get(&id("low3")), site.cloud.registry().cache().get(&id("low3")));
    }
    // Two edge devices with three modules each, and 14 leaves; modules of leaves are not handed out.
    assert_eq!(sizes, [22, 22, 22]);
}

#[tokio::test]
async fn single_identities() {
    let site = Site::start().await;
    let client = site.client("edge1", 10);
    let names = async |identity: &str, chain: &str| -> Vec<String> {
        let found = client.one(&id(identity), chain).await.unwrap();
        found.iter().map(|entry| entry.identity.to_string()).collect()
    };
    assert_eq!(names("leaf1", "edge1").await, ["leaf1"]);
    assert_eq!(names("leaf0/part", "edge1").await, ["leaf0", "leaf0/part"]);
    assert_eq!(names("low0", "child;edge1").await, ["low0"]);
    assert_eq!(names("low0", "edge1").await, ["low0"]);
    // Unknown, below another, above the asking child, or not the caller's own chain.
    for (identity, chain) in [
        ("unknown", "edge1"),
        ("solo", "edge1"),
        ("leaf0", "child;edge1"),
        ("leaf0", "edge1;other"),
        ("other", "other;edge1"),
    ] {
        assert!(names(identity, chain).await.is_empty(), "{identity} {chain}");
    }
}

#[tokio::test]
async fn a_hub_with_the_wrong_key_is_refused() {
    let site = Site::start().await;
    let client = site.client_with("edge1", 10, SymmetricKey::from_bytes(b"wrong".to_vec()).unwrap());
    assert_eq!(client.all().await, Err(ScopeError::Refused(401)));
    assert_eq!(client.one(&id("leaf0"), "edge1").await, Ok(Vec::new()));
}

#[tokio::test]
async fn the_refresher_keeps_a_cache_of_the_cloud() {
    let site = Site::start().await;
    let cache = Arc::new(ScopeCache::new(&id("edge1")));
    let hosts = Hosts::new([HOST]);
    let client = site.client("edge1", 5);
    let refresher = ScopeRefresher::new(cache.clone(), client, hosts, RefreshOptions::default());
    assert_eq!(refresher.refresh_all().await.unwrap().changed.len(), 22);
    site.cloud.registry().remove(&id("low0")).unwrap();
    site.cloud.registry().create_device(NewDevice { id: "new", edge: false, parent: Some("child") }).unwrap();
    let change = refresher.refresh_one(&id("new"), "child;edge1").await.unwrap();
    assert_eq!(change.changed, [id("new")]);
    let change = refresher.refresh_all().await.unwrap();
    assert_eq!((&change.changed, &change.removed), (&vec![], &vec![id("low0")]));
}

#[tokio::test]
async fn a_disabled_child_keeps_nobody_in_scope_and_loses_nothing() {
    let site = Site::start().await;
    let registry = site.cloud.registry();
    registry.create_device(NewDevice { id: "deep", edge: true, parent: Some("child") }).unwrap();
    registry.create_device(NewDevice { id: "deepest", edge: false, parent: Some("deep") }).unwrap();
    let cache = Arc::new(ScopeCache::new(&id("edge1")));
    let client = site.client("edge1", 5);
    let refresher = ScopeRefresher::new(cache.clone(), client, Hosts::new([HOST]), RefreshOptions::default());
    refresher.refresh_all().await.unwrap();
    let known = cache.len();
    registry.set_status(&id("child"), Status::Disabled).unwrap();
    registry.remove(&id("leaf0")).unwrap();
    let change = refresher.refresh_all().await.unwrap();
    assert_eq!((&change.changed, &change.removed), (&vec![id("child")], &vec![id("leaf0")]));
    assert_eq!(cache.len(), known - 1);
    assert_eq!((cache.chain(&id("low0")), cache.chain(&id("deepest"))), (None, None));
    // Gone for good, once somebody tells.
    registry.remove(&id("low0")).unwrap();
    assert!(refresher.refresh_all().await.unwrap().is_empty());
    registry.set_status(&id("child"), Status::Enabled).unwrap();
    let change = refresher.refresh_all().await.unwrap();
    assert_eq!((&change.changed, &change.removed), (&vec![id("child")], &vec![id("low0")]));
    assert_eq!(cache.chain_text(&id("deepest")).as_deref(), Some("deepest;deep;child;edge1"));
}

#[tokio::test]
async fn refusals_carry_an_error_message() {
    let site = Site::start().await;
    let token = site.tokens("edge1/$edgeHub", site.key("edge1/$edgeHub")).token().await.unwrap();
    let leaf = site.tokens("leaf0", site.key("leaf0")).token().await.unwrap();
    let below = |device: &str, module: &str, token: &str| {
        format!(
            "POST /devices/{device}/modules/{module}/devicesAndModulesInTargetDeviceScope?api-version=2020-06-30-preview HTTP/1.1\r\nAuthorization: {token}"
        )
    };
    let chain = r#"{"pageSize":10,"authChain":"edge1"}"#;
    for (head, body, status) in [
        (below("edge1", "$edgeHub", &token), chain, 200),
        (below("edge1", "%24edgeHub", &token), chain, 200),
        (below("edge1", "$edgeAgent", &token), chain, 401),
        (below("edge1", "$edgeHub", &leaf), chain, 401),
        (below("edge1", "$edgeHub", "Basic x"), chain, 401),
        (below("other", "$edgeHub", &token), r#"{"authChain":"other"}"#, 401),
        (below("edge1", "$edgeHub", &token), r#"{"authChain":"other;edge1"}"#, 401),
        (below("edge1", "$edgeHub", &token), r#"{"authChain":"leaf0/part;edge1"}"#, 400),
        (below("edge1", "$edgeHub", &token), r#"{"authChain":" "}"#, 400),
        (below("edge1", "$edgeHub", &token), "not JSON", 400),
        (below("edge1", "$edgeHub", &token), r#"{"authChain":"edge1","continuationLink":"a/b/c"}"#, 400),
    ] {
        let (got, answer) = site.request(&head, body).await;
        assert_eq!(got, status, "{body}: {answer}");
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["ErrorMessage"].is_string(), status != 200, "{body}");
        assert_eq!(answer["devices"].is_array(), status == 200, "{body}");
    }
    let one = format!(
        "POST /devices/edge1/modules/$edgeHub/getDeviceAndModuleOnBehalfOf HTTP/1.1\r\nAuthorization: {token}"
    );
    let body = r#"{"targetDeviceId":"leaf9","targetModuleId":"sensor","authChain":"edge1"}"#;
    let (status, answer) = site.request(&one, body).await;
    assert_eq!(status, 401);
    assert_eq!(
        answer,
        r#"{"ErrorMessage":"edge1/$edgeHub not authorized to get information for leaf9/sensor"}"#
    );
    let large = "x".repeat(edgehub_cloud::BODY_BYTES_MAX + 1);
    assert_eq!(site.request(&one, &large).await.0, 413);
}

#[tokio::test]
async fn paths_and_verbs() {
    let site = Site::start().await;
    let (status, banner) = site.request("GET / HTTP/1.1", "").await;
    assert!(status == 200 && banner.contains("for local use"), "{banner}");
    for (head, status) in [
        ("GET /nothing HTTP/1.1", 404),
        ("POST / HTTP/1.1", 405),
        ("DELETE /telemetry HTTP/1.1", 405),
        ("GET /devices/edge1/modules/$edgeHub/getDeviceAndModuleOnBehalfOf HTTP/1.1", 405),
        ("POST /devices/edge1/modules/$edgeHub/other HTTP/1.1", 404),
        ("GET /%ff HTTP/1.1", 400),
    ] {
        assert_eq!(site.request(head, "").await.0, status, "{head}");
    }
}

#[tokio::test]
async fn telemetry_is_shown_and_followed() {
    let site = Site::start().await;
    let sender = Arc::new(Sender { identity: id("leaf0"), origin: Origin::Downstream, model_id: None });
    let publish = async |body: &'static str| {
        let message = Message::new(sender.clone(), Properties::empty(), body.into());
        site.cloud.telemetry().append(&[message]).await.unwrap().await.unwrap();
    };
    assert_eq!(site.request("GET /telemetry HTTP/1.1", "").await, (200, "0\r\n\r\n".into()));
    publish("one").await;
    let (_, shown) = site.request("GET /telemetry HTTP/1.1", "").await;
    assert!(shown.contains("\"sequenceNumber\":1") && shown.contains("\"body\":\"b25l\""), "{shown}");
    let mut stream = site.connect().await;
    stream.write_all(b"GET /telemetry?follow HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut seen = Vec::new();
    for (number, body) in [(1, None), (2, Some("two")), (3, Some("three"))] {
        if let Some(body) = body {
            publish(body).await;
        }
        let wanted = format!("\"sequenceNumber\":{number},");
        while !String::from_utf8_lossy(&seen).contains(&wanted) {
            assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
        }
    }
    assert!(String::from_utf8_lossy(&seen).contains("application/x-ndjson"));
}
