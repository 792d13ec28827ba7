use edgehub_broker::backend::{
    CommandReceiver, Credentials, Deliveries, DesiredPatch, MAILBOX_COMMANDS_MAX, Outcome, Protocol, Target,
    TwinOperation, TwinReply,
};
use edgehub_broker::identity::{SymmetricKey, TokenSource};
use edgehub_broker::message::{Properties, PropertyName};

use super::*;
use crate::cloud_to_device::{Ack, FeedbackStatus};
use crate::registry::NewDevice;

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

struct Site {
    registry: Arc<Registry>,
    telemetry: TelemetryLog,
    backend: CloudBackend,
    _directory: tempfile::TempDir,
}

fn site() -> Site {
    let directory = tempfile::tempdir().unwrap();
    let registry =
        Arc::new(Registry::open(directory.path().join("registry.json"), "hub1.example.net").unwrap());
    for (id, edge, parent) in [("edge1", true, None), ("leaf1", false, Some("edge1")), ("solo", false, None)]
    {
        registry.create_device(NewDevice { id, edge, parent }).unwrap();
    }
    let telemetry = TelemetryLog::open(directory.path().join("telemetry.ndjson"), 1 << 30).unwrap();
    let twins = Arc::new(TwinStore::new(directory.path().join("twins")));
    let backend = CloudBackend::new(registry.clone(), telemetry.clone(), twins, 2);
    Site { registry, telemetry, backend, _directory: directory }
}

impl Site {
    async fn login(
        &self,
        identity: &str,
        chain: Option<&str>,
        signer: &str,
    ) -> (Result<CloudClient, LoginError>, CommandReceiver) {
        let key: SymmetricKey =
            self.registry.cache().get(&id(signer)).unwrap().keys().next().unwrap().clone();
        let token = TokenSource::new("hub1.example.net", &id(signer), Arc::new(key));
        let login = Login {
            identity: id(identity),
            credentials: Credentials::SasToken(token.token().await.unwrap()),
            auth_chain: chain.map(Into::into),
            product_info: "".into(),
            model_id: None,
            protocol: Protocol::Amqp,
            peer: None,
        };
        let (mailbox, commands) = Mailbox::channel(MAILBOX_COMMANDS_MAX);
        (self.backend.login(login, mailbox).await, commands)
    }
}

#[tokio::test]
async fn a_newer_login_wins_and_clients_are_counted() {
    let site = site();
    let (first, mut commands) = site.login("solo", None, "solo").await;
    let (second, _commands) = site.login("solo", None, "solo").await;
    let second = second.unwrap();
    assert!(matches!(commands.recv().await, Some(Command::Close(CloseReason::TakenOver))));
    drop(first.unwrap());
    assert_eq!(site.backend.connected(), 1);
    let (_hub, mut commands) = site.login("edge1/$edgeHub", None, "edge1/$edgeHub").await;
    let (third, _) = site.login("leaf1", Some("leaf1;edge1"), "edge1/$edgeHub").await;
    assert!(matches!(third, Err(LoginError::Unavailable(_))));
    drop(second);
    let (third, _) = site.login("leaf1", Some("leaf1;edge1"), "edge1/$edgeHub").await;
    assert!(third.is_ok());
    site.backend.close_all();
    assert!(matches!(commands.recv().await, Some(Command::Close(CloseReason::Stopping))));
}

#[tokio::test]
async fn on_behalf_of_needs_the_edge_device_above() {
    let site = site();
    for (identity, chain) in [("solo", "solo;edge1"), ("leaf1", "solo;edge1"), ("unknown", "unknown;edge1")] {
        let (client, _) = site.login(identity, Some(chain), "edge1/$edgeHub").await;
        assert!(matches!(client, Err(LoginError::Refused(_))), "{identity}");
    }
    site.registry.set_status(&id("leaf1"), Status::Disabled).unwrap();
    let (client, _) = site.login("leaf1", Some("leaf1;edge1"), "edge1/$edgeHub").await;
    assert!(matches!(client, Err(LoginError::Refused(_))));
}

#[tokio::test]
async fn what_is_published_is_in_the_log_when_the_commit_resolves() {
    let site = site();
    let (client, _commands) = site.login("leaf1", Some("leaf1;edge1"), "edge1/$edgeHub").await;
    let mut client = client.unwrap();
    let sender = site.backend.sender(&client);
    let message = |size| Message::new(sender.clone(), Properties::empty(), vec![b'x'; size].into());
    assert!(site.backend.check(&client, &message(10)).is_ok());
    let too_large = site.backend.check(&client, &message(MESSAGE_BYTES_MAX + 1));
    assert!(matches!(too_large, Err(PublishError::TooLarge { .. })));
    let commit = site.backend.publish(&mut client, vec![message(10), message(20)]).await.unwrap();
    commit.await.unwrap();
    let text = site.telemetry.reader().unwrap().next().await.unwrap().unwrap();
    assert_eq!(text.iter().filter(|byte| **byte == b'\n').count(), 2);
}

#[tokio::test]
async fn a_message_asks_for_a_fault() {
    let site = site();
    let (client, mut commands) = site.login("solo", None, "solo").await;
    let mut client = client.unwrap();
    let sender = site.backend.sender(&client);
    let asks = |kind: &str| {
        let properties = [
            (PropertyName::Application("AzIoTHub_FaultOperationType"), kind),
            (PropertyName::Application("AzIoTHub_FaultOperationDurationInSecs"), "3600"),
        ];
        vec![Message::new(sender.clone(), Properties::copied_from(properties), "x".into())]
    };
    // The message that asks is taken; those after it are not.
    for kind in ["KillTcp", "InvokeThrottling"] {
        site.backend.publish(&mut client, asks(kind)).await.unwrap().await.unwrap();
    }
    let refused = site.backend.publish(&mut client, asks("KillAmqpD2CLink")).await;
    assert!(matches!(refused, Err(PublishError::Full(_))));
    site.backend.shared.throttling.start(Instant::now(), Duration::ZERO, Duration::ZERO);
    site.backend.publish(&mut client, asks("KillAmqpD2CLink")).await.unwrap().await.unwrap();
    assert!(matches!(next(&mut commands).await, Command::Close(CloseReason::Kicked)));
}

async fn next(commands: &mut CommandReceiver) -> Command {
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, commands.recv()).await.expect("a command in time").expect("a command")
}

fn change(desired: serde_json::Value) -> TwinChange {
    TwinChange { tags: None, desired: Some(desired) }
}

#[tokio::test]
async fn twin_requests_are_answered_in_order() {
    let site = site();
    let (client, mut commands) = site.login("solo", None, "solo").await;
    let mut client = client.unwrap();
    let operations = [
        TwinOperation::PatchReported(r#"{"a":1,"b":{"c":"x"}}"#.into()),
        TwinOperation::PatchReported(r#"{"a.b":1}"#.into()),
        TwinOperation::PatchReported(r#"{"a":null}"#.into()),
        TwinOperation::Get,
    ];
    for (number, operation) in operations.into_iter().enumerate() {
        let correlation = Some(number.to_string().into());
        site.backend.twin(&mut client, TwinRequest { correlation, operation }).unwrap();
    }
    let mut results = Vec::new();
    for number in 0..4 {
        let Command::TwinAnswer(answer) = next(&mut commands).await else { panic!("no answer") };
        assert_eq!(answer.correlation, number.to_string());
        results.push(answer.result);
    }
    assert_eq!(results[0], Ok(TwinReply::Patched { version: Some(2) }));
    assert_eq!(results[1].as_ref().unwrap_err().status(), 400);
    assert_eq!(results[2], Ok(TwinReply::Patched { version: Some(3) }));
    let document = r#"{"desired":{"$version":1},"reported":{"$version":3,"b":{"c":"x"}}}"#;
    assert_eq!(results[3], Ok(TwinReply::Document(document.into())));
    for _ in 0..courier::TWIN_REQUESTS_MAX {
        let request = TwinRequest { correlation: None, operation: TwinOperation::Get };
        site.backend.twin(&mut client, request).unwrap();
    }
    let request = TwinRequest { correlation: None, operation: TwinOperation::Get };
    assert_eq!(site.backend.twin(&mut client, request), Err(TwinError::Busy));
}

#[tokio::test]
async fn subscribed_clients_hear_of_desired_properties() {
    let site = site();
    let solo = id("solo");
    let (client, mut commands) = site.login("solo", None, "solo").await;
    let mut client = client.unwrap();
    let apply = async |desired| {
        site.backend.change_twin(&solo, change(desired), ChangeMode::Merge, None).await.unwrap();
    };
    apply(serde_json::json!({"before": 1})).await;
    site.backend.subscribe(&mut client, Feature::DesiredProperties, true);
    // The courier has not run yet: what comes from now on is told, exactly as it was given.
    apply(serde_json::json!({"a": {"b": 1}, "none": null})).await;
    let Command::Desired(told) = next(&mut commands).await else { panic!("no patch") };
    assert_eq!(told, DesiredPatch { patch: r#"{"$version":3,"a":{"b":1},"none":null}"#.into(), version: 3 });
    let replaced = change(serde_json::json!({"c": 1}));
    site.backend.change_twin(&solo, replaced, ChangeMode::Replace, None).await.unwrap();
    let Command::Desired(told) = next(&mut commands).await else { panic!("no patch") };
    assert_eq!(told.patch, r#"{"$version":4,"a":null,"before":null,"c":1}"#);
    // Another process makes two changes.
    let other = TwinStore::new(site._directory.path().join("twins"));
    let generation = site.registry.cache().get(&solo).unwrap().generation_id.clone();
    for desired in [serde_json::json!({"c": null, "d": 1}), serde_json::json!({"d": 2})] {
        other
            .change(&solo, &generation, |twin| twin.change(change(desired), ChangeMode::Merge, None))
            .unwrap();
    }
    let watch = site.backend.watch_twins();
    let told = async {
        // Let the watcher see the state before.
        tokio::task::yield_now().await;
        other.announce().unwrap();
        next(&mut commands).await
    };
    let told = tokio::select! {
        biased;
        () = watch => panic!("the watcher ended"),
        told = told => told,
    };
    let Command::Desired(told) = told else { panic!("no patch") };
    assert_eq!(told, DesiredPatch { patch: r#"{"$version":6,"c":null,"d":2}"#.into(), version: 6 });
    site.backend.subscribe(&mut client, Feature::DesiredProperties, false);
    apply(serde_json::json!({"e": 1})).await;
    site.backend
        .twin(&mut client, TwinRequest { correlation: Some("x".into()), operation: TwinOperation::Get })
        .unwrap();
    assert!(matches!(next(&mut commands).await, Command::TwinAnswer(_)));
}

#[tokio::test]
async fn methods_wait_for_the_client_and_its_answer() {
    let site = site();
    let (solo, second) = (id("solo"), Duration::from_secs(60));
    let invoke = |connect_max| site.backend.invoke(&solo, "reboot".into(), "1".into(), connect_max, second);
    assert_eq!(invoke(Duration::ZERO).await, Err(InvokeError::NotConnected));
    let (client, mut commands) = site.login("solo", None, "solo").await;
    let mut client = client.unwrap();
    assert_eq!(invoke(Duration::ZERO).await, Err(InvokeError::NotConnected));
    let answer = MethodAnswer { status: 201, payload: "2".into() };
    let serve = async {
        site.backend.subscribe(&mut client, Feature::Methods, true);
        let Command::Invoke(call) = next(&mut commands).await else { panic!("no call") };
        assert_eq!((&*call.name, &call.payload[..]), ("reboot", &b"1"[..]));
        site.backend.method_answered(&mut client, call.id, answer.clone());
    };
    let (answered, ()) = tokio::join!(invoke(second), serve);
    assert_eq!(answered, Ok(answer));
    // The connection ends instead of an answer.
    let end = async {
        assert!(matches!(next(&mut commands).await, Command::Invoke(_)));
        drop(client);
    };
    let (answered, ()) = tokio::join!(invoke(second), end);
    assert_eq!(answered, Err(InvokeError::NoAnswer));
}

#[tokio::test]
async fn messages_wait_for_the_device_and_are_offered_until_settled() {
    let site = site();
    let solo = id("solo");
    let message = |text: &'static str| NewMessage {
        message_id: Some(text.into()),
        ack: Ack::Full,
        expires_millis: None,
        properties: Properties::empty(),
        body: text.into(),
    };
    let missing = site.backend.send(&id("unknown"), message("x"));
    assert!(matches!(missing, Err(ServiceError::Missing(_))));
    site.backend.send(&solo, message("one")).unwrap();
    let (client, mut commands) = site.login("solo", None, "solo").await;
    let mut first = client.unwrap();
    site.backend.subscribe(&mut first, Feature::CloudToDevice, true);
    let deliveries = async |commands: &mut CommandReceiver| {
        let Command::Deliver(deliveries) = next(commands).await else { panic!("no delivery") };
        assert_eq!(deliveries.target, Target::Device);
        deliveries
    };
    let bodies = |deliveries: &Deliveries| -> Vec<Bytes> {
        deliveries.messages.iter().map(|(_, message)| message.body.clone()).collect()
    };
    assert_eq!(bodies(&deliveries(&mut commands).await), ["one"]);
    site.backend.send(&solo, message("two")).unwrap();
    assert_eq!(bodies(&deliveries(&mut commands).await), ["two"]);
    // What the first connection did not settle goes to the next.
    let (client, mut commands) = site.login("solo", None, "solo").await;
    let mut second = client.unwrap();
    site.backend.subscribe(&mut second, Feature::CloudToDevice, true);
    let both = deliveries(&mut commands).await;
    assert_eq!(bodies(&both), ["one", "two"]);
    both.settler.settle([(both.messages[0].0, Outcome::Accepted), (both.messages[1].0, Outcome::Released)]);
    let again = deliveries(&mut commands).await;
    assert_eq!(bodies(&again), ["two"]);
    again.settler.settle([(again.messages[0].0, Outcome::Rejected)]);
    let mut feedback = Vec::new();
    while feedback.len() < 2 {
        tokio::time::timeout(Duration::from_secs(60), site.backend.messages().feedback().arrived())
            .await
            .unwrap();
        feedback.extend(site.backend.messages().feedback().take(9));
    }
    let statuses: Vec<_> = feedback.iter().map(|record| record.status).collect();
    assert_eq!(statuses, [FeedbackStatus::Success, FeedbackStatus::Rejected]);
    assert_eq!(site.backend.messages().waiting(&solo), 0);
}

#[tokio::test]
async fn removed_and_disabled_identities_are_closed() {
    let site = site();
    let (client, mut commands) = site.login("solo", None, "solo").await;
    let _client = client.unwrap();
    site.backend.close_unauthorized();
    assert_eq!(site.backend.connected(), 1);
    site.registry.set_status(&id("solo"), Status::Disabled).unwrap();
    site.backend.close_unauthorized();
    assert!(matches!(next(&mut commands).await, Command::Close(CloseReason::Unauthorized)));
    assert_eq!(site.backend.connected(), 0);
}

#[tokio::test]
async fn sessions_are_kept_and_bounded() {
    let site = site();
    let leaf = id("leaf1");
    site.backend.store_session(&leaf, Some(Bytes::from_static(b"s"))).await.unwrap();
    assert_eq!(site.backend.load_session(&leaf).await.as_deref(), Some(&b"s"[..]));
    let large = Bytes::from(vec![0; SESSION_BYTES_MAX + 1]);
    assert!(matches!(site.backend.store_session(&leaf, Some(large)).await, Err(PublishError::Full(_))));
    site.backend.store_session(&leaf, None).await.unwrap();
    assert_eq!(site.backend.load_session(&leaf).await, None);
}
