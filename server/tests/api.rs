//! Direct methods over HTTP, by vectors, against a hub with clients of the test's.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use edgehub::api::{Api, BODY_BYTES_MAX, REQUESTS_MAX};
use edgehub_broker::backend::{
    Backend, Command, Credentials, Feature, Login, LoginError, Mailbox, MethodAnswer, Protocol,
};
use edgehub_broker::delivery::ModulePumpOptions;
use edgehub_broker::hub::{Authenticating, Authenticator, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::{
    Answering, Identity, SCOPE_REQUEST_BYTES_MAX, ScopeAsk, ScopeCalls, ScopeRefusal,
};
use edgehub_routing::OverflowPolicy;
use edgehub_storage::{Store, StoreLimits, StoreOptions};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};

const GOOD: &str = "SharedAccessSignature valid";
const METHOD: &str = r#"{"methodName":"m","payload":1}"#;

/// Lets modules in that show the token `valid`, and devices that show a certificate.
struct ByToken;

impl Authenticator for ByToken {
    fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a> {
        let refused = Err(LoginError::Refused("secret reason".into()));
        let decided = match &login.credentials {
            Credentials::SasToken(token) if **token == *GOOD => Ok(()),
            Credentials::SasToken(token) if token.ends_with("unavailable") => {
                Err(LoginError::Unavailable("secret reason".into()))
            }
            Credentials::Certificate(_) if login.identity.module_id().is_none() => Ok(()),
            Credentials::SasToken(_) | Credentials::Certificate(_) | Credentials::None => refused,
        };
        Box::pin(std::future::ready(decided))
    }
}

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

fn hub() -> Hub {
    let options = HubOptions {
        edge_device: id("edge1"),
        clients_max: 100,
        module_pump: ModulePumpOptions::default(),
        upstream: None,
        control: ControlOptions::default(),
        overflow: OverflowPolicy::RejectNew,
        limits: StoreLimits::default(),
    };
    let store = Store::open(StoreOptions::memory()).unwrap();
    Hub::start(options, store, Arc::new(ByToken), tokio::runtime::Handle::current())
}

fn api(hub: &Hub) -> Arc<Api> {
    let proxy = Some(id("edge1/IoTEdgeAPIProxy"));
    Arc::new(Api::new(hub.clone(), Arc::new(ByToken), id("edge1"), proxy, None))
}

/// How a client of the test's behaves.
#[derive(Clone)]
enum Target {
    Unsubscribed,
    Silent,
    Answers(i32, Bytes),
}

/// Connects a client; returns when the hub knows what it takes.
async fn connect(hub: &Hub, identity: &str, target: Target) -> mpsc::Receiver<Bytes> {
    let (mailbox, mut commands) = Mailbox::channel(64);
    let login = Login {
        identity: id(identity),
        credentials: Credentials::SasToken(GOOD.into()),
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Mqtt,
        peer: None,
    };
    let mut client = hub.login(login, mailbox).await.unwrap();
    if !matches!(target, Target::Unsubscribed) {
        hub.subscribe(&mut client, Feature::Methods, true);
    }
    let (payloads, received) = mpsc::channel(64);
    let hub = hub.clone();
    tokio::spawn(async move {
        while let Some(command) = commands.recv().await {
            let Command::Invoke(call) = command else { continue };
            // Not every test looks at them.
            let _ = payloads.send(call.payload).await;
            if let Target::Answers(status, payload) = &target {
                let answer = MethodAnswer { status: *status, payload: payload.clone() };
                hub.method_answered(&mut client, call.id, answer);
            }
        }
    });
    received
}

fn request(
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::new(body.into())).unwrap()
}

async fn read(response: Response<Full<Bytes>>) -> (u16, Value) {
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    let status = response.status().as_u16();
    let json = response.headers().get("content-type").map(|kind| kind.to_str().unwrap().to_owned());
    let body = response.into_body().collect().await.unwrap().to_bytes();
    if body.is_empty() {
        return (status, Value::Null);
    }
    assert_eq!(json.as_deref(), Some("application/json; charset=utf-8"));
    (status, serde_json::from_slice(&body).unwrap())
}

async fn call(api: &Api, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, Value) {
    read(api.answer(request("POST", path, headers, body.to_owned()), &[]).await).await
}

#[tokio::test(start_paused = true)]
async fn every_vector_is_answered_as_it_says() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/http_methods.json");
    let vectors: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let vectors = vectors["vectors"].as_array().unwrap();
    assert_eq!(vectors.len(), 24);
    for vector in vectors {
        let (id, given, expected) = (&vector["id"], &vector["in"], &vector["out"]);
        let hub = hub();
        let state = &given["state"];
        let target = match state["target"].as_str().unwrap() {
            "answers" => {
                let status = i32::try_from(state["answerStatus"].as_i64().unwrap()).unwrap();
                let payload = state["answerBody"].as_str().unwrap().to_owned();
                Some(Target::Answers(status, payload.into()))
            }
            "connected-not-subscribed" => Some(Target::Unsubscribed),
            "silent" => Some(Target::Silent),
            "offline" => None,
            other => panic!("{other}"),
        };
        if let Some(target) = target {
            for identity in ["edge1/target", "leaf1"] {
                connect(&hub, identity, target.clone()).await;
            }
        }
        let mut headers = Vec::new();
        for (name, value) in given["headers"].as_object().unwrap() {
            headers.push((
                name.as_str(),
                match value.as_str().unwrap() {
                    "valid" => GOOD,
                    "invalid" => "SharedAccessSignature invalid",
                    text => text,
                },
            ));
        }
        let path = given["path"].as_str().unwrap();
        let (status, body) = call(&api(&hub), path, &headers, given["body"].as_str().unwrap()).await;
        assert_eq!(status, expected["status"], "{id}: {body}");
        let wanted = &expected["body"];
        if wanted["message"] == "*" {
            assert!(body["message"].as_str().is_some_and(|text| !text.is_empty()), "{id}: {body}");
        } else {
            assert_eq!(&body, wanted, "{id}");
        }
    }
}

#[tokio::test]
async fn paths_are_decoded_and_the_payload_is_passed_on_as_it_stands() {
    let hub = hub();
    let mut received = connect(&hub, "edge1/my target", Target::Answers(200, Bytes::new())).await;
    let headers = [("x-ms-edge-moduleId", "edge1/caller"), ("authorization", GOOD)];
    let api = api(&hub);
    for path in [
        "/twins/edge1/modules/my%20target/methods",
        "/twins/edge1/modules/my%2520target/methods",
        "/twins/edge1/modules/my+target/methods?api-version=1",
    ] {
        let body = r#"{"methodName":"m","payload":{"a" :  1.0}}"#;
        assert_eq!(call(&api, path, &headers, body).await, (200, json!({ "status": 200, "payload": null })));
        assert_eq!(received.recv().await.unwrap(), r#"{"a" :  1.0}"#);
    }
    assert_eq!(
        call(&api, "/twins/edge1/modules/my%20target/methods", &headers, r#"{"methodName":"m"}"#).await.0,
        200
    );
    assert_eq!(received.recv().await.unwrap(), "null");
}

#[tokio::test]
async fn who_may_call() {
    let hub = hub();
    connect(&hub, "edge1/target", Target::Answers(200, Bytes::new())).await;
    let api = api(&hub);
    let path = "/twins/edge1/modules/target/methods";
    let caller = ("x-ms-edge-moduleid", "edge1/caller");
    let message = |text: &str| json!({ "message": text });
    for (headers, status, body) in [
        (vec![caller], 401, message("Authorization header missing")),
        (
            vec![caller, ("authorization", "Basic eA==")],
            401,
            message("Invalid Authorization header. Only SharedAccessSignature is supported."),
        ),
        (
            vec![caller, ("authorization", "SharedAccessSignature x")],
            401,
            message("edge1/caller is not authenticated"),
        ),
        (
            vec![caller, ("authorization", "SharedAccessSignature unavailable")],
            503,
            message("whether edge1/caller may call cannot be told now; come again"),
        ),
        (
            vec![("x-ms-edge-moduleid", "edge1/a/b"), ("authorization", GOOD)],
            400,
            message("Invalid header value for x-ms-edge-moduleId"),
        ),
        // A certificate is forwarded that cannot be read, with a token that is the proxy's.
        (
            vec![caller, ("authorization", GOOD), ("x-ms-edge-clientcert", "no PEM")],
            401,
            message("the forwarded certificate cannot be read"),
        ),
        (
            vec![caller, ("authorization", "SharedAccessSignature x"), ("x-ms-edge-clientcert", "no PEM")],
            401,
            message("a certificate is forwarded with a token that is not the proxy's"),
        ),
    ] {
        assert_eq!(call(&api, path, &headers, METHOD).await, (status, body), "{headers:?}");
    }
    // The query is no place for a token.
    let in_query = format!("{path}?Authorization=SharedAccessSignature%20valid");
    assert_eq!(call(&api, &in_query, &[caller], METHOD).await.0, 401);
    // With a certificate the token is not looked at, and modules have none.
    let shown = [Bytes::from_static(b"der")];
    let headers = [caller, ("authorization", GOOD)];
    assert_eq!(read(api.answer(request("POST", path, &headers, METHOD), &shown).await).await.0, 401);
}

#[tokio::test]
async fn verbs_paths_and_sizes() {
    let hub = hub();
    let api = api(&hub);
    let path = "/twins/edge1/modules/target/methods";
    let headers = [("x-ms-edge-moduleId", "edge1/caller"), ("authorization", GOOD)];
    for verb in ["GET", "PUT", "DELETE", "PATCH"] {
        let response = api.answer(request(verb, path, &headers, METHOD), &[]).await;
        assert_eq!(response.headers()["allow"], "POST");
        assert_eq!(read(response).await, (405, Value::Null));
    }
    for path in ["/", "/twins", "/twins/edge1/modules/target", "/twins/a/modules/b/methods/c", "/metrics"] {
        assert_eq!(call(&api, path, &headers, METHOD).await, (404, Value::Null), "{path}");
    }
    let upgrade = api.answer(request("GET", "/$iothub/websocket", &[], ""), &[]).await;
    assert_eq!(
        (upgrade.status().as_u16(), upgrade.headers()["upgrade"].to_str().unwrap()),
        (426, "websocket")
    );
    let (status, body) = call(&api, path, &headers, &" ".repeat(BODY_BYTES_MAX + 1)).await;
    assert_eq!((status, body["message"].as_str().unwrap().contains("262144")), (413, true));
    // A name that nobody can have is that of nobody.
    let (status, _) = call(&api, "/twins/edge1/modules/a%2Fb/methods", &headers, METHOD).await;
    assert_eq!(status, 404);
}

#[tokio::test]
async fn calls_at_a_time_are_bounded() {
    let hub = hub();
    let mut received = connect(&hub, "edge1/target", Target::Silent).await;
    let api = api(&hub);
    let path = "/twins/edge1/modules/target/methods";
    let headers = [("x-ms-edge-moduleId", "edge1/caller"), ("authorization", GOOD)];
    let calls: Vec<_> = (0..REQUESTS_MAX)
        .map(|_| {
            let api = api.clone();
            tokio::spawn(async move { call(&api, path, &headers, METHOD).await })
        })
        .collect();
    for _ in 0..REQUESTS_MAX {
        tokio::time::timeout(Duration::from_secs(60), received.recv()).await.unwrap().unwrap();
    }
    assert_eq!(call(&api, path, &headers, METHOD).await.0, 503);
    calls.into_iter().for_each(|call| call.abort());
}

/// Answers with what it was asked; refuses devices called `refused`, and waits for those called `slow`.
struct Echo {
    waiting: AtomicUsize,
    go: Semaphore,
}

impl Default for Echo {
    fn default() -> Self {
        Self { waiting: AtomicUsize::new(0), go: Semaphore::new(0) }
    }
}

impl ScopeCalls for Echo {
    fn answer<'a>(&'a self, ask: ScopeAsk<'a>) -> Answering<'a> {
        Box::pin(async move {
            if ask.device == "slow" {
                self.waiting.fetch_add(1, Ordering::SeqCst);
                self.go.acquire().await.unwrap().forget();
            }
            if ask.device == "refused" {
                return Err(ScopeRefusal::Unauthorized("x".repeat(1_000)));
            }
            let (call, body) = (ask.call.name(), String::from_utf8_lossy(ask.body));
            Ok(json!([call, ask.device, ask.module, ask.authorization, body]).to_string().into())
        })
    }
}

const BELOW: &str = "devicesAndModulesInTargetDeviceScope";

#[tokio::test]
async fn scope_calls_reach_whoever_answers_them() {
    let hub = hub();
    let without = api(&hub);
    let with = Api::new(hub.clone(), Arc::new(ByToken), id("edge1"), None, None);
    let with = with.with_scope(Some(Arc::new(Echo::default())));
    let headers = [("authorization", GOOD)];
    for (path, device) in [
        (format!("/devices/child/modules/$edgeHub/{BELOW}?api-version=2020-06-30-preview"), "child"),
        (format!("/Devices/a%2Bb%2525/Modules/%24edgeHub/{}", BELOW.to_uppercase()), "a+b%25"),
        (format!("/devices/a+b/modules/$edgeHub/{BELOW}"), "a+b"),
    ] {
        let expected = json!([BELOW, device, "$edgeHub", GOOD, "{}"]);
        assert_eq!(call(&with, &path, &headers, "{}").await, (200, expected), "{path}");
        assert_eq!(call(&without, &path, &headers, "{}").await, (404, Value::Null), "{path}");
    }
    let path = "/devices/child/modules/$edgeHub/getDeviceAndModuleOnBehalfOf";
    let (status, answer) = call(&with, path, &[], "").await;
    assert_eq!((status, &answer[0]), (200, &json!("getDeviceAndModuleOnBehalfOf")));
    let other = "/devices/child/modules/$edgeHub/putModuleOnBehalfOf";
    assert_eq!(call(&with, other, &headers, "{}").await, (404, Value::Null));
    let got = with.answer(request("GET", path, &headers, ""), &[]).await;
    assert_eq!((got.status().as_u16(), &got.headers()["allow"]), (405, &"POST".parse().unwrap()));
    let message = |answer: &Value| answer["ErrorMessage"].as_str().map(str::len);
    let (status, answer) = call(&with, &path.replace("child", "refused"), &headers, "{}").await;
    assert_eq!((status, message(&answer)), (401, Some(300)));
    let (status, answer) = call(&with, &path.replace("child", "%ff"), &headers, "{}").await;
    assert!(status == 400 && message(&answer).is_some(), "{answer}");
    let (status, answer) = call(&with, path, &headers, &" ".repeat(SCOPE_REQUEST_BYTES_MAX + 1)).await;
    assert!(status == 413 && message(&answer).is_some(), "{answer}");
}

#[tokio::test]
async fn scope_calls_at_a_time_are_bounded() {
    let echo = Arc::new(Echo::default());
    let api = Api::new(hub(), Arc::new(ByToken), id("edge1"), None, None);
    let api = Arc::new(api.with_scope(Some(echo.clone())));
    let path = |device: &str| format!("/devices/{device}/modules/$edgeHub/{BELOW}");
    let calls: Vec<_> = (0..REQUESTS_MAX)
        .map(|_| {
            let (api, path) = (api.clone(), path("slow"));
            tokio::spawn(async move { call(&api, &path, &[], "{}").await.0 })
        })
        .collect();
    while echo.waiting.load(Ordering::SeqCst) < REQUESTS_MAX {
        tokio::task::yield_now().await;
    }
    let (status, answer) = call(&api, &path("child"), &[], "{}").await;
    assert!(status == 503 && answer["ErrorMessage"].is_string(), "{answer}");
    echo.go.add_permits(REQUESTS_MAX);
    for call in calls {
        assert_eq!(call.await.unwrap(), 200);
    }
    assert_eq!(call(&api, &path("child"), &[], "{}").await.0, 200);
}
