//! Twins, direct methods and cloud-to-device messages over the MQTT upstream, against the hub's own MQTT head.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod recording;
mod upstream_peers;
mod upstream_site;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{
    CallId, Command, Deliveries, DesiredPatch, Feature, LoginError, MethodAnswer, MethodCall, Outcome,
    Settler, Target, TwinAnswer, TwinError, TwinOperation, TwinReply,
};
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, PropertyName, Sender, SystemProperty};
use edgehub_broker::upstream::UpstreamKind;
use edgehub_broker::upstream::control::{ControlError, Downward, Wanted};
use recording::{Recording, until};
use upstream_peers::{SHORT, Server, tls};
use upstream_site::{Knobs, Plane, identity, plane};

const DEVICE: &str = "edge1";
const MODULE: &str = "edge1/m1";
const ALL: Wanted = Wanted { desired: true, methods: true, cloud_to_device: true };

struct Ground {
    cloud: Recording,
    plane: Plane,
    server: Server,
    tls: Arc<rustls::ServerConfig>,
}

async fn ground(knobs: Knobs) -> Ground {
    let (server_tls, client_tls) = tls();
    let cloud = Recording::default();
    let server = Server::mqtt_head(0, server_tls.clone(), cloud.clone()).await;
    let mut plane = plane(server.port, client_tls, &Knobs { kind: UpstreamKind::MqttHub, ..knobs });
    assert!(matches!(plane.hears().await, Downward::Up));
    Ground { cloud, plane, server, tls: server_tls }
}

impl Ground {
    /// The next twin request of an identity, with what its answer has to name.
    async fn asked(&self, count: usize) -> (Identity, Bytes, TwinOperation) {
        until("asked", || self.cloud.state.lock().twin_requests.len() == count).await;
        let (identity, request) = self.cloud.state.lock().twin_requests[count - 1].clone();
        (identity, request.correlation.unwrap(), request.operation)
    }

    async fn answers(&self, correlation: Bytes, result: Result<TwinReply, TwinError>) {
        self.cloud.command(MODULE, Command::TwinAnswer(TwinAnswer { correlation, result })).await;
    }

    fn has(&self, who: &str, feature: Feature, on: bool) -> bool {
        self.cloud.state.lock().features.contains(&(identity(who), feature, on))
    }

    async fn linked(&mut self, who: &str) {
        loop {
            if let Downward::Linked(linked) = self.plane.hears().await
                && linked == identity(who)
            {
                return;
            }
        }
    }

    async fn wants(&mut self, who: &str, wanted: Wanted) {
        self.plane.control.want(&identity(who), wanted).await;
        self.linked(who).await;
    }
}

#[tokio::test]
async fn a_twin_is_read_and_reported_and_refusals_keep_their_status() {
    let ground = ground(Knobs::default()).await;
    let control = ground.plane.control.clone();
    let asking = tokio::spawn(async move { control.twin(&identity(MODULE)).await });
    let (of, correlation, operation) = ground.asked(1).await;
    assert_eq!((of, operation), (identity(MODULE), TwinOperation::Get));
    // Larger than what clients may send.
    let twin = Bytes::from(format!(r#"{{"desired":{{"a":"{}"}},"reported":{{}}}}"#, "x".repeat(400_000)));
    ground.answers(correlation, Ok(TwinReply::Document(twin.clone()))).await;
    assert_eq!(asking.await.unwrap(), Ok(twin));

    let control = ground.plane.control.clone();
    let patch = Bytes::from_static(b"{\"level\":7}");
    let patched = patch.clone();
    let asking = tokio::spawn(async move { control.patch_reported(&identity(MODULE), patched).await });
    let (_, correlation, operation) = ground.asked(2).await;
    assert_eq!(operation, TwinOperation::PatchReported(patch));
    ground.answers(correlation, Ok(TwinReply::Patched { version: Some(9) })).await;
    assert_eq!(asking.await.unwrap(), Ok(Some(9)));

    let control = ground.plane.control.clone();
    let asking = tokio::spawn(async move { control.twin(&identity(MODULE)).await });
    let (_, correlation, _) = ground.asked(3).await;
    ground.answers(correlation, Err(TwinError::Busy)).await;
    assert!(matches!(asking.await.unwrap(), Err(ControlError::Refused { status: 429, .. })));
    until("shown", || ground.plane.status().reason.contains("429")).await;
}

#[tokio::test]
async fn desired_changes_calls_and_messages_come_down_and_answers_go_up() {
    let mut ground = ground(Knobs::default()).await;
    ground.wants(DEVICE, ALL).await;
    for feature in [Feature::DesiredProperties, Feature::Methods, Feature::CloudToDevice] {
        assert!(ground.has(DEVICE, feature, true), "{feature:?}");
    }
    let patch = Bytes::from_static(b"{\"a\":1,\"$version\":4}");
    let command = Command::Desired(DesiredPatch { patch: patch.clone(), version: 4 });
    ground.cloud.command(DEVICE, command).await;
    match ground.plane.hears().await {
        Downward::Desired { identity: of, patch: heard } => {
            assert_eq!((of, heard), (identity(DEVICE), patch))
        }
        other => panic!("{other:?}"),
    }

    let call = MethodCall { id: CallId::new(), name: "reboot".into(), payload: Bytes::from_static(b"[1]") };
    ground.cloud.command(DEVICE, Command::Invoke(call.clone())).await;
    match ground.plane.hears().await {
        Downward::Method { name, payload, answer, .. } => {
            assert_eq!((&*name, &payload[..]), ("reboot", &b"[1]"[..]));
            answer.send(MethodAnswer { status: 207, payload: Bytes::from_static(b"{}") }).unwrap();
        }
        other => panic!("{other:?}"),
    }
    until("answered", || !ground.cloud.state.lock().method_answers.is_empty()).await;
    let (of, id, answer) = ground.cloud.state.lock().method_answers[0].clone();
    assert_eq!((of, id, answer.status, &answer.payload[..]), (identity(DEVICE), call.id, 207, &b"{}"[..]));

    // What the device takes or refuses is acknowledged; what it gives back is not.
    for (number, outcome) in [Outcome::Accepted, Outcome::Rejected, Outcome::Released].into_iter().enumerate()
    {
        let settler = Settler::new();
        ground.cloud.command(DEVICE, to_device(number, &settler)).await;
        match ground.plane.hears().await {
            Downward::CloudToDevice { message, settle, .. } => {
                assert_eq!(message.body, number.to_string());
                assert!(message.properties.system_bytes(SystemProperty::LockToken).is_some());
                settle.send(outcome).unwrap();
            }
            other => panic!("{other:?}"),
        }
        if outcome == Outcome::Released {
            // Everything behind it is answered.
            let control = ground.plane.control.clone();
            tokio::spawn(async move { control.twin(&identity(DEVICE)).await });
            ground.asked(1).await;
            assert!(settler.take().is_empty());
        } else {
            assert_eq!(settler.settled().await, [(number as u64, Outcome::Accepted)]);
        }
    }
    ground.plane.control.want(&identity(DEVICE), Wanted { methods: true, ..Wanted::default() }).await;
    for feature in [Feature::CloudToDevice, Feature::DesiredProperties] {
        until("let go", || ground.has(DEVICE, feature, false)).await;
    }
    assert!(!ground.has(DEVICE, Feature::Methods, false));
}

fn to_device(number: usize, settler: &Settler) -> Command {
    let sender = Sender { identity: identity(DEVICE), origin: Origin::Internal, model_id: None };
    let id = number.to_string();
    let properties =
        Properties::copied_from([(PropertyName::System(SystemProperty::MessageId), id.as_str())]);
    let message = Message::new(Arc::new(sender), properties, Bytes::from(id.clone()));
    let messages = vec![(number as u64, message)];
    Command::Deliver(Deliveries { target: Target::Device, messages, settler: settler.clone() })
}

#[tokio::test]
async fn what_is_wanted_is_in_place_again_after_a_loss_and_a_refused_identity_hears_why() {
    let mut ground = ground(Knobs::default()).await;
    ground.wants(MODULE, ALL).await;
    assert!(!ground.has(MODULE, Feature::CloudToDevice, true), "modules have no messages from the cloud");
    ground.cloud.state.lock().features.clear();
    let port = ground.server.stop().await;
    loop {
        if matches!(ground.plane.hears().await, Downward::Down) {
            break;
        }
    }
    assert_eq!(ground.plane.control.twin(&identity(MODULE)).await, Err(ControlError::Offline));
    let refused = LoginError::Refused("disabled".into());
    ground.cloud.state.lock().refused.insert(identity("edge1/m2"), refused);
    ground.server = Server::mqtt_head(port, ground.tls.clone(), ground.cloud.clone()).await;
    ground.linked(MODULE).await;
    assert!(
        ground.has(MODULE, Feature::Methods, true) && ground.has(MODULE, Feature::DesiredProperties, true)
    );
    let answer = ground.plane.control.twin(&identity("edge1/m2")).await;
    assert!(matches!(&answer, Err(ControlError::Unauthorized(_))), "{answer:?}");
}

#[tokio::test]
async fn a_twin_request_without_an_answer_fails_in_time_and_its_connection_is_made_anew() {
    let mut ground = ground(Knobs { operation_timeout: SHORT, ..Knobs::default() }).await;
    ground.wants(MODULE, Wanted { methods: true, ..Wanted::default() }).await;
    let answer = ground.plane.control.twin(&identity(MODULE)).await;
    assert_eq!(answer, Err(ControlError::Timeout));
    ground.linked(MODULE).await;
    let logins = {
        let state = ground.cloud.state.lock();
        state.logins.iter().filter(|login| login.identity == identity(MODULE)).count()
    };
    assert_eq!(logins, 2);
    assert_eq!(ground.plane.status().failures, 0);
    ground.plane.handle.stop(Duration::from_secs(5)).await;
}
