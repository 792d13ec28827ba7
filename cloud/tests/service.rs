//! Service calls against the stand-in's HTTPS server, as the public service SDKs make them.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use edgehub_broker::backend::{
    Backend, Command, CommandReceiver, Credentials, Feature, Login, MAILBOX_COMMANDS_MAX, Mailbox,
    MethodAnswer, Protocol,
};
use edgehub_broker::identity::{Identity, SymmetricKey, TokenSource, unix_now_secs};
use edgehub_cloud::{Cloud, CloudClient, CloudOptions};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

const HOST: &str = "hub1.example.net";
const LIMIT: Duration = Duration::from_secs(60);

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
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

/// A token of a policy, as SDKs write it.
fn policy_token(host: &str, policy: &str, key: &SymmetricKey, life_secs: i64) -> String {
    let expiry = (unix_now_secs() + life_secs).to_string();
    let signature = BASE64.encode(key.sign(&[host.as_bytes(), b"\n", expiry.as_bytes()]));
    let signature = utf8_percent_encode(&signature, NON_ALPHANUMERIC);
    format!("SharedAccessSignature sr={host}&sig={signature}&se={expiry}&skn={policy}")
}

impl Site {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let options = CloudOptions::new(path("registry.json"), path("telemetry.ndjson"), HOST);
        let cloud = Cloud::open(&options).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = made.cert.der().clone();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let server_tls = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate).unwrap();
        let tls = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let serving = cloud.clone();
        let server = tokio::spawn(async move {
            serving.serve_https(listener, Arc::new(server_tls), std::future::pending()).await;
        });
        Self { cloud, port, tls: Arc::new(tls), server, _directory: directory }
    }

    fn key(&self) -> SymmetricKey {
        let text = self.cloud.registry().service_connection_string().unwrap();
        let start = format!("HostName={HOST};SharedAccessKeyName=iothubowner;SharedAccessKey=");
        SymmetricKey::from_base64(text.strip_prefix(&start).unwrap()).unwrap()
    }

    fn token(&self) -> String {
        policy_token(HOST, "iothubowner", &self.key(), 3_600)
    }

    async fn send(&self, head: &str, headers: &[(&str, &str)], body: &Value) -> Response<Value> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = TlsConnector::from(self.tls.clone()).connect(name, stream).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let (verb, path) = head.split_once(' ').unwrap();
        let mut request = Request::builder().method(verb).uri(path).header("host", HOST);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let (head, body): (_, hyper::body::Incoming) =
            sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
        Response::from_parts(head, body)
    }

    /// Status and body of a call with a good token.
    async fn call(&self, head: &str, body: Value) -> (u16, Value) {
        let answer = self.send(head, &[("authorization", &self.token())], &body).await;
        (answer.status().as_u16(), answer.into_body())
    }

    async fn call_if(&self, head: &str, etag: &str, body: Value) -> (u16, Value) {
        let headers = [("authorization", &*self.token()), ("if-match", etag)];
        let answer = self.send(head, &headers, &body).await;
        (answer.status().as_u16(), answer.into_body())
    }

    async fn connect(&self, identity: &str) -> (CloudClient, CommandReceiver) {
        let identity = id(identity);
        let entry = self.cloud.registry().cache().get(&identity).unwrap();
        let key = Arc::new(entry.keys().next().unwrap().clone());
        let token = TokenSource::new(HOST, &identity, key).token().await.unwrap();
        let login = Login {
            identity,
            credentials: Credentials::SasToken(token),
            auth_chain: None,
            product_info: "".into(),
            model_id: None,
            protocol: Protocol::Amqp,
            peer: None,
        };
        let (mailbox, commands) = Mailbox::channel(MAILBOX_COMMANDS_MAX);
        (self.cloud.backend().login(login, mailbox).await.unwrap(), commands)
    }
}

#[tokio::test]
async fn identities_are_created_read_changed_and_deleted() {
    let site = Site::start().await;
    let (status, edge) = site
        .call("PUT /devices/edge1", json!({"deviceId": "edge1", "capabilities": {"iotEdge": true}}))
        .await;
    assert_eq!(status, 200, "{edge}");
    let scope = edge["deviceScope"].as_str().unwrap().to_owned();
    assert!(scope.starts_with("ms-azure-iot-edge://edge1-"), "{scope}");
    let (_, modules) = site.call("GET /devices/edge1/modules", Value::Null).await;
    let names: Vec<_> = modules.as_array().unwrap().iter().map(|module| &module["moduleId"]).collect();
    assert_eq!(names, ["$edgeAgent", "$edgeHub"]);
    let key = "c2VjcmV0";
    let leaf = json!({
        "deviceId": "leaf", "status": "enabled", "deviceScope": scope,
        "authentication": {"type": "sas", "symmetricKey": {"primaryKey": key, "secondaryKey": null}},
    });
    let (status, made) = site.call("PUT /devices/leaf?api-version=2021-04-12", leaf.clone()).await;
    assert_eq!((status, &made["authentication"]["symmetricKey"]["primaryKey"]), (200, &key.into()));
    assert!(made["authentication"]["symmetricKey"]["secondaryKey"].is_string());
    assert_eq!(site.cloud.registry().cache().chain_text(&id("leaf")).as_deref(), Some("leaf;edge1"));
    assert_eq!(made["parentScopes"], json!([scope]));
    let (status, refused) = site.call("PUT /devices/leaf", leaf).await;
    assert_eq!(status, 409);
    assert!(refused["Message"].as_str().unwrap().starts_with("ErrorCode:DeviceAlreadyExists;"), "{refused}");
    // A change keeps what it does not name; its etag must fit.
    let disabled = json!({"deviceId": "leaf", "status": "disabled", "deviceScope": scope});
    assert_eq!(site.call_if("PUT /devices/leaf", "\"AAAA\"", disabled.clone()).await.0, 412);
    let etag = format!("\"{}\"", made["etag"].as_str().unwrap());
    let (status, changed) = site.call_if("PUT /devices/leaf", &etag, disabled).await;
    assert_eq!((status, &changed["status"]), (200, &"disabled".into()));
    assert_eq!(changed["authentication"], made["authentication"]);
    assert_ne!(changed["etag"], made["etag"]);
    assert_eq!(site.call("GET /devices/leaf", Value::Null).await.1, changed);
    let (_, statistics) = site.call("GET /statistics/devices", Value::Null).await;
    assert_eq!(statistics, json!({"totalDeviceCount": 2, "enabledDeviceCount": 1, "disabledDeviceCount": 1}));
    let (_, list) = site.call("GET /devices?top=1&api-version=x", Value::Null).await;
    assert_eq!(list.as_array().unwrap().len(), 1);
    for (head, body, status) in [
        ("PUT /devices/edge1/modules/filter", json!({"moduleId": "filter"}), 200),
        ("PUT /devices/edge1/modules/filter", json!({"moduleId": "filter"}), 409),
        ("PUT /devices/none/modules/filter", json!({}), 404),
        ("GET /devices/edge1/modules/filter", Value::Null, 200),
        ("GET /devices/edge1/modules/none", Value::Null, 404),
        ("DELETE /devices/edge1/modules/filter", Value::Null, 204),
        ("PUT /devices/x", json!({"authentication": {"type": "selfSigned"}}), 400),
        ("PUT /devices/x", json!({"authentication": {"symmetricKey": {"primaryKey": "?"}}}), 400),
        ("PUT /devices/x", json!({"deviceScope": "ms-azure-iot-edge://none-1"}), 400),
        ("PUT /devices/x", json!({"status": 1}), 400),
        ("PUT /devices/x", json!([]), 400),
        ("PUT /devices/%20", json!({}), 400),
        ("GET /devices?top=0", Value::Null, 400),
        ("POST /devices", json!({}), 405),
        ("PATCH /devices/leaf", json!({}), 405),
        ("GET /jobs/v2/j1", Value::Null, 404),
        ("DELETE /devices/edge1", Value::Null, 400),
    ] {
        let (got, answer) = site.send_any(head, &body).await;
        assert_eq!(got, status, "{head}: {answer}");
    }
    assert_eq!(site.call_if("DELETE /devices/leaf", &etag, Value::Null).await.0, 412);
    assert_eq!(site.call_if("DELETE /devices/leaf", "*", Value::Null).await.0, 204);
    assert_eq!(site.call("DELETE /devices/edge1", Value::Null).await.0, 204);
    assert!(site.cloud.registry().list().is_empty());
}

impl Site {
    /// The same for answers that may hold no JSON.
    async fn send_any(&self, head: &str, body: &Value) -> (u16, Value) {
        let answer = self.send(head, &[("authorization", &self.token())], body).await;
        (answer.status().as_u16(), answer.into_body())
    }
}

#[tokio::test]
async fn only_good_tokens_of_the_policy_are_taken() {
    let site = Site::start().await;
    let key = site.key();
    let other = SymmetricKey::from_bytes(b"other".to_vec()).unwrap();
    let of_device = TokenSource::new(HOST, &id("d1"), Arc::new(key.clone())).token().await.unwrap();
    let good = policy_token(HOST, "iothubowner", &key, 60);
    let tokens = [
        (good.clone(), 200),
        (good.replace(HOST, "HUB1.example.net"), 401),
        (policy_token("HUB1.example.net", "iothubowner", &key, 60), 200),
        (policy_token("other.example.net", "iothubowner", &key, 60), 401),
        (policy_token(HOST, "service", &key, 60), 401),
        (policy_token(HOST, "iothubowner", &other, 60), 401),
        (policy_token(HOST, "iothubowner", &key, -3_600), 401),
        (of_device.to_string(), 401),
        ("Bearer x".into(), 401),
        (String::new(), 401),
    ];
    for (token, status) in tokens {
        let answer = site.send("GET /devices", &[("authorization", &token)], &Value::Null).await;
        assert_eq!(answer.status().as_u16(), status, "{token}");
        if status == 401 {
            assert_eq!(answer.headers()["iothub-errorcode"], "IotHubUnauthorizedAccess");
            assert!(answer.body()["Message"].as_str().unwrap().starts_with("ErrorCode:IotHubUnauthorized"));
        }
    }
    let without = site.send("GET /devices", &[], &Value::Null).await;
    assert_eq!(without.status().as_u16(), 401);
}

#[tokio::test]
async fn twins_are_read_patched_replaced_and_queried() {
    let site = Site::start().await;
    for device in ["d1", "d2", "d3"] {
        assert_eq!(site.call(&format!("PUT /devices/{device}"), json!({})).await.0, 200);
    }
    site.call("PUT /devices/d1/modules/m1", json!({})).await;
    let (mut client, mut commands) = site.connect("d1/m1").await;
    site.cloud.backend().subscribe(&mut client, Feature::DesiredProperties, true);
    let (status, twin) = site.call("GET /twins/d1/modules/m1", Value::Null).await;
    assert_eq!((status, &twin["connectionState"]), (200, &"Connected".into()));
    assert_eq!(twin["properties"]["desired"]["$version"], 1);
    let patch = json!({"tags": {"a": 1}, "properties": {"desired": {"x": {"y": 1}}}});
    let etag = format!("\"{}\"", twin["etag"].as_str().unwrap());
    let (status, twin) = site.call_if("PATCH /twins/d1/modules/m1", &etag, patch.clone()).await;
    assert_eq!((status, &twin["tags"], &twin["version"]), (200, &json!({"a": 1}), &2.into()));
    let Some(Command::Desired(told)) = timeout(LIMIT, commands.recv()).await.unwrap() else {
        panic!("not told")
    };
    assert_eq!(serde_json::from_slice::<Value>(&told.patch).unwrap(), json!({"x": {"y": 1}, "$version": 2}));
    assert_eq!(site.call_if("PATCH /twins/d1/modules/m1", &etag, patch).await.0, 412);
    let (_, twin) = site.call("PUT /twins/d1/modules/m1", json!({"properties": {"desired": {"z": 1}}})).await;
    assert_eq!((&twin["tags"], &twin["properties"]["desired"]["z"]), (&json!({}), &1.into()));
    assert!(twin["properties"]["desired"]["x"].is_null());
    for (head, body, status) in [
        ("PATCH /twins/none", json!({}), 404),
        ("PATCH /twins/d1", json!({"tags": []}), 400),
        ("PATCH /twins/d1", json!({"properties": {"desired": {"a.b": 1}}}), 400),
        ("DELETE /twins/d1", Value::Null, 405),
    ] {
        assert_eq!(site.call(head, body).await.0, status, "{head}");
    }
    for device in ["d1", "d3"] {
        site.call(&format!("PATCH /twins/{device}"), json!({"tags": {"site": "s1"}})).await;
    }
    let query = json!({"query": "SELECT * FROM devices WHERE tags.site = 's1'"});
    let headers = [("authorization", &*site.token()), ("x-ms-max-item-count", "1")];
    let first = site.send("POST /devices/query", &headers, &query).await;
    assert_eq!(first.headers()["x-ms-item-type"], "Twin");
    let continuation = first.headers()["x-ms-continuation"].to_str().unwrap().to_owned();
    assert_eq!((first.body()[0]["deviceId"].as_str(), first.body()[1].is_null()), (Some("d1"), true));
    let headers = [headers[0], headers[1], ("x-ms-continuation", &*continuation)];
    let second = site.send("POST /devices/query", &headers, &query).await;
    assert_eq!(second.body()[0]["deviceId"], "d3");
    assert!(second.headers().get("x-ms-continuation").is_none());
    let (status, _) = site.call("POST /devices/query", json!({"query": "SELECT x FROM y"})).await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn methods_are_called() {
    let site = Site::start().await;
    site.call("PUT /devices/d1", json!({})).await;
    let call =
        |name: &str| json!({"methodName": name, "payload": {"a": [1]}, "responseTimeoutInSeconds": 30});
    for (body, status) in [
        (call("reboot"), 404),
        (call(""), 400),
        (call(&"x".repeat(101)), 400),
        (json!({"methodName": "x", "responseTimeoutInSeconds": 4}), 400),
        (json!({"methodName": "x", "connectTimeoutInSeconds": 301}), 400),
        (json!({"methodName": "x", "payload": "y".repeat(128 * 1024)}), 400),
    ] {
        assert_eq!(site.call("POST /twins/d1/methods", body.clone()).await.0, status, "{body}");
    }
    assert_eq!(site.call("POST /twins/none/methods", call("x")).await.0, 404);
    let (mut client, mut commands) = site.connect("d1").await;
    site.cloud.backend().subscribe(&mut client, Feature::Methods, true);
    let (_, statistics) = site.call("GET /statistics/service", Value::Null).await;
    assert_eq!(statistics, json!({"connectedDeviceCount": 1}));
    for (payload, shown) in
        [("{\"b\":1.5}", json!({"b": 1.5})), ("", Value::Null), ("{", Value::Null), ("null", Value::Null)]
    {
        let serve = async {
            let Some(Command::Invoke(call)) = timeout(LIMIT, commands.recv()).await.unwrap() else {
                panic!("no call")
            };
            assert_eq!((&*call.name, &call.payload[..]), ("reboot", &br#"{"a":[1]}"#[..]));
            let answer = MethodAnswer { status: 202, payload: payload.into() };
            site.cloud.backend().method_answered(&mut client, call.id, answer);
        };
        let (answer, ()) = tokio::join!(site.call("POST /twins/d1/methods", call("reboot")), serve);
        assert_eq!(answer, (200, json!({"status": 202, "payload": shown})));
    }
    let end = async {
        assert!(matches!(timeout(LIMIT, commands.recv()).await.unwrap(), Some(Command::Invoke(_))));
        drop(client);
    };
    let (answer, ()) = tokio::join!(site.call("POST /twins/d1/methods", call("reboot")), end);
    assert_eq!(answer.0, 504);
}

#[tokio::test]
async fn a_deployment_sets_the_desired_properties_of_modules() {
    let site = Site::start().await;
    site.call("PUT /devices/edge1", json!({"capabilities": {"iotEdge": true}})).await;
    site.call("PUT /devices/leaf", json!({})).await;
    let routes = json!({"schemaVersion": "1.1", "routes": {"all": "FROM /* INTO $upstream"}});
    let content = json!({"modulesContent": {
        "$edgeHub": {"properties.desired": routes},
        "filter": {"properties.desired": {"on": true}},
    }});
    let head = "POST /devices/edge1/applyConfigurationContent";
    assert_eq!(site.call(head, content.clone()).await.0, 204);
    assert_eq!(site.call(head, content.clone()).await.0, 204);
    let twin = site.cloud.backend().twin_of(&id("edge1/$edgeHub")).await.unwrap();
    assert_eq!(Value::Object(twin.desired().clone()), routes);
    let twin = site.cloud.backend().twin_of(&id("edge1/filter")).await.unwrap();
    assert_eq!(twin.desired_version(), 3);
    assert_eq!(site.call("POST /devices/leaf/applyConfigurationContent", content).await.0, 400);
    let other = json!({"modulesContent": {"m": {"properties.desired.a": 1}}});
    assert_eq!(site.call(head, other).await.0, 400);
}

#[tokio::test]
async fn what_is_removed_or_disabled_loses_its_connection_twin_and_messages() {
    let site = Site::start().await;
    site.call("PUT /devices/d1", json!({})).await;
    site.call("PATCH /twins/d1", json!({"tags": {"a": 1}})).await;
    let (_client, mut commands) = site.connect("d1").await;
    assert_eq!(site.call_if("PUT /devices/d1", "*", json!({"status": "disabled"})).await.0, 200);
    let closed = timeout(LIMIT, commands.recv()).await.unwrap();
    assert!(matches!(closed, Some(Command::Close(_))));
    assert_eq!(site.call("DELETE /devices/d1", Value::Null).await.0, 204);
    site.call("PUT /devices/d1", json!({})).await;
    assert_eq!(site.call("GET /twins/d1", Value::Null).await.1["tags"], json!({}));
    let (status, purged) = site.call("DELETE /devices/d1/commands", Value::Null).await;
    assert_eq!((status, &purged["totalMessagesPurged"]), (200, &0.into()));
}
