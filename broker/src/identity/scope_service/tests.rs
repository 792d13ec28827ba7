//! What child hubs are told, what is asked of the upstream for it, and what it may cost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::super::authenticate::tests::{hosts, token};
use super::super::refresh::RefreshOptions;
use super::super::scope::tests::{edge, id, key_of, leaf, module, site};
use super::super::{Authentication, FullScope, ScopeCache, ScopePage, ServiceIdentity, Status, SymmetricKey};
use super::*;

/// The whole registry, of which it tells what the first of the chain may see.
struct Upstream {
    registry: ScopeCache,
    fails: AtomicBool,
    /// Takes one for each answer, where there is one.
    gate: Option<Semaphore>,
    asked: Mutex<Vec<String>>,
}

impl Upstream {
    async fn answers(&self) -> Result<(), ScopeError> {
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        match self.fails.load(Ordering::SeqCst) {
            true => Err(ScopeError::Status(500)),
            false => Ok(()),
        }
    }
}

impl ScopeSource for Arc<Upstream> {
    async fn one(&self, identity: &Identity, chain: &str) -> Result<Vec<ServiceIdentity>, ScopeError> {
        self.asked.lock().push(format!("{identity} for {chain}"));
        self.answers().await?;
        let originator = id(chain.split(';').next().unwrap());
        let seen = self.registry.chain(identity).is_some_and(|chain| chain.contains(&originator));
        let entry = self.registry.get(identity).filter(|_| seen);
        Ok(entry.iter().map(|entry| ServiceIdentity::clone(entry)).collect())
    }

    async fn all(&self) -> Result<FullScope, ScopeError> {
        self.asked.lock().push("all".into());
        self.answers().await?;
        let identities = self.registry.all().iter().map(|entry| ServiceIdentity::clone(entry)).collect();
        Ok(FullScope { identities, complete: true })
    }
}

struct Parent {
    upstream: Arc<Upstream>,
    service: Arc<ScopeService<Arc<Upstream>>>,
}

/// `top` with a leaf and two children, `child` with a leaf and a child `low` with another.
fn tree() -> Vec<ServiceIdentity> {
    let mut identities = site();
    identities.extend([edge("other", Some("top")), module("other/$edgeHub"), leaf("leaf3", "other")]);
    identities.extend([edge("low", Some("child")), module("low/$edgeHub"), leaf("leaf4", "low")]);
    identities
}

impl Parent {
    /// Knows its whole scope.
    async fn start() -> Self {
        let parent = Self::with(None);
        parent.service.refresher.refresh_all().await.unwrap();
        parent.upstream.asked.lock().clear();
        parent
    }

    fn with(gate: Option<Semaphore>) -> Self {
        let registry = ScopeCache::of_cloud();
        registry.replace_all(tree()).unwrap();
        let upstream =
            Arc::new(Upstream { registry, fails: AtomicBool::new(false), gate, asked: Mutex::default() });
        let cache = Arc::new(ScopeCache::new(&id("top")));
        let options = RefreshOptions { delay: Duration::from_secs(3_600), ..RefreshOptions::default() };
        let refresher = Arc::new(ScopeRefresher::new(cache, upstream.clone(), hosts(), options));
        Self { upstream, service: Arc::new(ScopeService::new(refresher)) }
    }

    fn cache(&self) -> &ScopeCache {
        self.service.refresher.cache()
    }

    /// A call of the hub of `device` with its own token.
    async fn ask(&self, call: ScopeCall, device: &str, body: Value) -> Result<Bytes, ScopeRefusal> {
        let token = hub_token(device).await;
        let body = body.to_string();
        let ask = ScopeAsk {
            call,
            device,
            module: HUB_MODULE_ID,
            authorization: Some(&token),
            body: body.as_bytes(),
        };
        self.service.answer(ask).await
    }

    async fn below(&self, device: &str, chain: &str) -> Result<Bytes, ScopeRefusal> {
        self.ask(ScopeCall::Below, device, json!({"pageSize": 10, "authChain": chain})).await
    }

    async fn one(&self, device: &str, chain: &str, target: &str) -> Result<Bytes, ScopeRefusal> {
        let target = id(target);
        let body = json!({
            "targetDeviceId": target.device_id(), "targetModuleId": target.module_id(), "authChain": chain,
        });
        self.ask(ScopeCall::One, device, body).await
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.upstream.asked.lock())
    }
}

async fn hub_token(device: &str) -> Arc<str> {
    let hub = format!("{device}/$edgeHub");
    token(&hub, key_of(&hub)).await
}

/// The names in an answer; for a refusal its status.
fn names(answer: Result<Bytes, ScopeRefusal>) -> String {
    match answer {
        Ok(json) => {
            let page = ScopePage::from_json(&json).unwrap();
            page.identities.iter().map(|entry| entry.identity.to_string()).collect::<Vec<_>>().join(" ")
        }
        Err(refusal) => refusal.status().to_string(),
    }
}

fn error(answer: Result<Bytes, ScopeRefusal>) -> String {
    answer.unwrap_err().to_string()
}

#[tokio::test]
async fn a_child_sees_what_is_at_and_below_it_and_nothing_else() {
    let parent = Parent::start().await;
    for (device, chain, expected) in [
        ("child", "child", "child leaf2 low child/$edgeHub child/mod"),
        ("child", "child;child", "child leaf2 low child/$edgeHub child/mod"),
        ("child", "low;child", "leaf4 low low/$edgeHub"),
        ("child", "leaf2;child", "leaf2"),
        ("child", "leaf4;low;child", "leaf4"),
        ("other", "other", "leaf3 other other/$edgeHub"),
        // A sibling, what is below it, the parent itself and its own leaf, what does not exist.
        ("child", "other;child", "401"),
        ("child", "leaf3;child", "401"),
        ("child", "top;child", "401"),
        ("child", "leaf1;child", "401"),
        ("child", "stranger;child", "401"),
        // A chain that is another's, goes on above the caller, is too long, or is none.
        ("child", "other", "401"),
        ("child", "child;top", "401"),
        ("child", "child;a;b;c;d;e;f;child", "401"),
        ("child", "child;;child", "401"),
        ("child", "child/$edgeHub;child", "400"),
        ("child", "", "400"),
        ("child", " ", "400"),
        ("child", ";child", "400"),
        // The hub itself, and one that nobody knows.
        ("top", "top", "401"),
        ("stranger", "stranger", "401"),
    ] {
        assert_eq!(names(parent.below(device, chain).await), expected, "{device} {chain}");
    }
    for (device, chain, target, expected) in [
        ("child", "child", "leaf2", "leaf2"),
        ("child", "child", "leaf4", "leaf4"),
        ("child", "low;child", "leaf4", "leaf4"),
        ("child", "child/$edgeHub;child", "leaf2", "leaf2"),
        ("child", "child", "child/mod", "child child/mod"),
        ("child", "child", "child", "child"),
        ("child", "low;child", "leaf2", "401"),
        ("child", "low;child", "child", "401"),
        ("child", "other;child", "leaf3", "401"),
        ("child", "child", "leaf1", "401"),
        ("child", "child", "top", "401"),
        ("child", "child", "top/$edgeHub", "401"),
        ("child", "child", "top/filter", "401"),
        ("child", "child", "other/$edgeHub", "401"),
        ("child", "child", "stranger", "401"),
        ("child", "child", "leaf2/stranger", "401"),
    ] {
        assert_eq!(names(parent.one(device, chain, target).await), expected, "{device} {chain} {target}");
    }
    // Unknown and forbidden are answered alike.
    let said = |target: &str| format!("child/$edgeHub not authorized to get information for {target}");
    for target in ["leaf1", "stranger"] {
        assert_eq!(error(parent.one("child", "child", target).await), said(target));
        assert_eq!(error(parent.below("child", &format!("{target};child")).await), said(target));
    }
}

#[tokio::test]
async fn only_the_hub_s_own_token_counts() {
    let parent = Parent::start().await;
    let below = json!({"authChain": "child"}).to_string();
    for (device, module, authorization, status) in [
        ("child", "$edgeHub", Some(hub_token("child").await), 200),
        ("child", "$edgeAgent", Some(hub_token("child").await), 401),
        ("child", "$edgehub", Some(hub_token("child").await), 401),
        ("other", "$edgeHub", Some(hub_token("child").await), 401),
        ("child", "$edgeHub", Some(hub_token("other").await), 401),
        ("child", "$edgeHub", Some(hub_token("top").await), 401),
        ("child", "$edgeHub", Some(token("child", key_of("child")).await), 401),
        ("child", "$edgeHub", Some(token("child/$edgeHub", key_of("child")).await), 401),
        ("child", "$edgeHub", Some(token("child/mod", key_of("child/mod")).await), 401),
        ("child", "$edgeHub", Some(token("leaf2", key_of("leaf2")).await), 401),
        ("child", "$edgeHub", Some("Basic Y2hpbGQ6eA==".into()), 401),
        ("child", "$edgeHub", Some("".into()), 401),
        ("child", "$edgeHub", None, 401),
        (" ", "$edgeHub", Some(hub_token("child").await), 400),
    ] {
        let authorization = authorization.as_deref();
        let ask = ScopeAsk { call: ScopeCall::Below, device, module, authorization, body: below.as_bytes() };
        let got = parent.service.answer(ask).await.map_or_else(|refusal| refusal.status(), |_| 200);
        assert_eq!(got, status, "{device} {module} {authorization:?}");
    }
    let off = ServiceIdentity { status: Status::Disabled, ..edge("other", Some("top")) };
    parent.upstream.registry.update([off.clone()]).unwrap();
    parent.cache().update([off]).unwrap();
    assert_eq!(names(parent.below("other", "other").await), "401");
}

#[tokio::test]
async fn bodies_that_cannot_be_are_refused() {
    let parent = Parent::start().await;
    let token = hub_token("child").await;
    let long = format!(r#"{{"authChain":"child","x":"{}"}}"#, "x".repeat(16_384));
    let deep = format!(r#"{{"authChain":"child","x":{}{}}}"#, "[".repeat(9), "]".repeat(9));
    for (call, body) in [
        (ScopeCall::Below, ""),
        (ScopeCall::Below, "[]"),
        (ScopeCall::Below, "{}"),
        (ScopeCall::Below, r#"{"authChain":null}"#),
        (ScopeCall::Below, r#"{"authChain":["child"]}"#),
        (ScopeCall::Below, r#"{"authChain":"child","pageSize":"10"}"#),
        (ScopeCall::Below, r#"{"authChain":"child","continuationLink":"a/b/c"}"#),
        (ScopeCall::Below, &long),
        (ScopeCall::Below, &deep),
        (ScopeCall::One, r#"{"authChain":"child"}"#),
        (ScopeCall::One, r#"{"authChain":"child","targetDeviceId":" "}"#),
        (ScopeCall::One, r#"{"authChain":"child","targetDeviceId":"a/b"}"#),
        (ScopeCall::One, r#"{"targetDeviceId":"leaf2"}"#),
    ] {
        let authorization = Some(&*token);
        let ask =
            ScopeAsk { call, device: "child", module: HUB_MODULE_ID, authorization, body: body.as_bytes() };
        assert_eq!(parent.service.answer(ask).await.unwrap_err().status(), 400, "{body}");
    }
    assert!(parent.asked().is_empty());
    for body in [
        json!({"authChain": "child", "pageSize": -1, "continuationLink": null, "other": {"a": [1]}}),
        json!({"authChain": "child", "pageSize": 1_000_000, "continuationLink": ""}),
    ] {
        assert!(parent.ask(ScopeCall::Below, "child", body).await.is_ok());
    }
}

#[tokio::test]
async fn an_answer_has_the_shape_that_every_reader_takes() {
    let parent = Parent::start().await;
    let thumbprints = Authentication::CertificateThumbprint {
        primary: Some("AA11".into()),
        secondary: Some("BB22".into()),
    };
    parent
        .cache()
        .update([ServiceIdentity {
            authentication: thumbprints,
            status: Status::Disabled,
            ..leaf("leaf2", "child")
        }])
        .unwrap();
    for gone in ["child/mod", "low"] {
        parent.cache().remove(&id(gone));
    }
    let key = |of: &str| key_of(of).to_base64();
    let (device, hub) = (key("child"), key("child/$edgeHub"));
    let expected = format!(
        "{{\"devices\":[\
         {{\"deviceId\":\"child\",\"generationId\":\"1\",\"status\":\"enabled\",\"authentication\":\
         {{\"symmetricKey\":{{\"primaryKey\":\"{device}\",\"secondaryKey\":null}},\
         \"x509Thumbprint\":{{\"primaryThumbprint\":null,\"secondaryThumbprint\":null}},\"type\":\"sas\"}},\
         \"capabilities\":{{\"iotEdge\":true}},\"deviceScope\":\"ms-azure-iot-edge://child-1\",\
         \"parentScopes\":[\"ms-azure-iot-edge://top-1\"]}},\
         {{\"deviceId\":\"leaf2\",\"generationId\":\"1\",\"status\":\"disabled\",\"authentication\":\
         {{\"symmetricKey\":{{\"primaryKey\":null,\"secondaryKey\":null}},\
         \"x509Thumbprint\":{{\"primaryThumbprint\":\"AA11\",\"secondaryThumbprint\":\"BB22\"}},\"type\":\"selfSigned\"}},\
         \"capabilities\":{{\"iotEdge\":false}},\"deviceScope\":\"ms-azure-iot-edge://child-1\",\
         \"parentScopes\":[\"ms-azure-iot-edge://child-1\"]}}],\
         \"modules\":[{{\"moduleId\":\"$edgeHub\",\"deviceId\":\"child\",\"generationId\":\"1\",\"authentication\":\
         {{\"symmetricKey\":{{\"primaryKey\":\"{hub}\",\"secondaryKey\":null}},\
         \"x509Thumbprint\":{{\"primaryThumbprint\":null,\"secondaryThumbprint\":null}},\"type\":\"sas\"}}}}],\
         \"continuationLink\":null}}"
    );
    assert_eq!(parent.below("child", "child").await.unwrap(), expected);
}

#[tokio::test]
async fn large_scopes_come_in_pages() {
    let parent = Parent::start().await;
    let many = (0..2_500).map(|number| leaf(&format!("m{number:04}"), "low"));
    parent.cache().update(many).unwrap();
    let (mut sizes, mut names, mut link) = (Vec::new(), Vec::new(), None);
    loop {
        // The size that a child would like does not matter.
        let body = json!({"pageSize": 10, "continuationLink": link, "authChain": "low;child"});
        let page = ScopePage::from_json(&parent.ask(ScopeCall::Below, "child", body).await.unwrap()).unwrap();
        sizes.push(page.identities.len());
        names.extend(page.identities.into_iter().map(|entry| entry.identity));
        link = page.continuation;
        if link.is_none() {
            break;
        }
    }
    assert_eq!(sizes, [1_000, 1_000, 503]);
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 2_503);
}

#[tokio::test]
async fn the_upstream_is_asked_first_on_behalf_of_whoever_asks() {
    let parent = Parent::start().await;
    let rolled = Authentication::SymmetricKey { primary: Some(key_of("new")), secondary: None };
    let registry = &parent.upstream.registry;
    registry
        .update([
            ServiceIdentity { authentication: rolled.clone(), ..leaf("leaf4", "low") },
            leaf("new", "low"),
        ])
        .unwrap();
    let page = ScopePage::from_json(&parent.one("child", "low;child", "leaf4").await.unwrap()).unwrap();
    assert_eq!(page.identities[0].authentication, rolled);
    assert_eq!(names(parent.one("child", "low;child", "new").await), "new");
    assert_eq!(parent.asked(), ["leaf4 for low;child;top", "new for low;child;top"]);
    registry.remove(&id("leaf4"));
    assert_eq!(names(parent.one("child", "child", "leaf4").await), "401");
    assert_eq!(parent.cache().get(&id("leaf4")), None);
    assert_eq!(parent.asked(), ["leaf4 for child;top", "leaf4 for top"]);
}

#[tokio::test]
async fn what_a_child_may_not_see_is_not_taken_for_gone() {
    let parent = Parent::start().await;
    for target in ["leaf1", "leaf3", "top/filter", "other", "other/$edgeHub"] {
        assert_eq!(names(parent.one("child", "child", target).await), "401", "{target}");
        assert!(parent.cache().get(&id(target)).is_some(), "{target}");
    }
    // The same by a login on behalf of another's device.
    let login =
        super::super::authenticate::tests::login("leaf3", Some("leaf3;child"), hub_token("child").await);
    assert!(matches!(parent.service.refresher.authenticate(&login).await, Err(LoginError::Refused(_))));
    assert!(parent.cache().get(&id("leaf3")).is_some());
    assert!(parent.asked().contains(&"leaf3 for top".into()));
}

#[tokio::test]
async fn without_the_upstream_the_cache_answers_and_nothing_is_denied() {
    let parent = Parent::start().await;
    parent.upstream.fails.store(true, Ordering::SeqCst);
    assert_eq!(names(parent.below("child", "child").await), "child leaf2 low child/$edgeHub child/mod");
    assert_eq!(names(parent.one("child", "child", "leaf4").await), "leaf4");
    // Unknown and forbidden still look the same.
    for target in ["stranger", "leaf1"] {
        assert_eq!(names(parent.one("child", "child", target).await), "503", "{target}");
    }
    // Nothing is known yet: who asks may well be a child.
    let empty = Parent::with(None);
    empty.upstream.fails.store(true, Ordering::SeqCst);
    let running = empty.service.refresher.clone();
    let run = tokio::spawn(async move { running.run().await });
    assert_eq!(names(empty.below("child", "child").await), "503");
    run.abort();
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_the_bound() {
    let parent = Parent::with(Some(Semaphore::new(0)));
    parent.cache().replace_all(tree()).unwrap();
    let limit = parent.service.refresher.login_wait() + Duration::from_secs(1);
    for (target, expected) in [("leaf2", "leaf2"), ("stranger", "503")] {
        let began = Instant::now();
        assert_eq!(names(parent.one("child", "child", target).await), expected);
        assert!(began.elapsed() <= limit, "{target}: {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn calls_are_bounded_until_their_answers_are_gone() {
    let parent = Parent::start().await;
    let mut kept = Vec::new();
    for _ in 0..CALLS_OF_CHILD_MAX {
        kept.push(parent.below("child", "child").await.unwrap());
    }
    assert_eq!(names(parent.below("child", "child").await), "503");
    assert_eq!(names(parent.one("child", "child", "leaf2").await), "503");
    // Another child does not notice.
    assert_eq!(names(parent.below("other", "other").await), "leaf3 other other/$edgeHub");
    // As a connection does that has sent it.
    kept.pop();
    assert_eq!(names(parent.one("child", "child", "leaf2").await), "leaf2");
    kept.clear();
    assert!(parent.service.places.lock().of_child.is_empty());
    let of_another = |number: usize| Place::take(&parent.service.places, &id(&format!("e{number}")));
    let all: Vec<Place> = (0..CALLS_MAX).map(|number| of_another(number).unwrap()).collect();
    assert_eq!(names(parent.below("child", "child").await), "503");
    drop(all);
    assert_eq!(parent.service.places.lock().all, 0);
}

#[tokio::test]
async fn refreshes_for_children_are_bounded_and_leave_room_for_logins() {
    let parent = Parent::with(Some(Semaphore::new(0)));
    parent.cache().replace_all(tree()).unwrap();
    let calls: Vec<_> = (0..CALLS_OF_CHILD_MAX)
        .map(|_| {
            let service = parent.service.clone();
            tokio::spawn(async move {
                let token = hub_token("child").await;
                let body = json!({"targetDeviceId": "leaf2", "authChain": "child"}).to_string();
                let (authorization, body) = (Some(&*token), body.as_bytes());
                let ask = ScopeAsk {
                    call: ScopeCall::One,
                    device: "child",
                    module: HUB_MODULE_ID,
                    authorization,
                    body,
                };
                service.answer(ask).await.unwrap();
            })
        })
        .collect();
    while parent.service.places.lock().all < CALLS_OF_CHILD_MAX {
        tokio::task::yield_now().await;
    }
    assert_eq!(parent.upstream.asked.lock().len(), CHILD_REFRESHES_MAX);
    // A login of this hub's own is behind none of them.
    let wrong = SymmetricKey::from_bytes(b"wrong".to_vec()).unwrap();
    let login = super::super::authenticate::tests::login("leaf1", None, token("leaf1", wrong).await);
    let refresher = parent.service.refresher.clone();
    let asking = tokio::spawn(async move { refresher.authenticate(&login).await });
    while !parent.upstream.asked.lock().contains(&"leaf1 for top".into()) {
        tokio::task::yield_now().await;
    }
    parent.upstream.gate.as_ref().unwrap().add_permits(1_000);
    for call in calls {
        call.await.unwrap();
    }
    assert!(matches!(asking.await.unwrap(), Err(LoginError::Refused(_))));
}
