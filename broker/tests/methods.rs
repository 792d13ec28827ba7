//! Direct methods and cloud-to-device messages through the hub's library interface.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod control_site;
mod module_site;

use std::time::Duration;

use control_site::{command, id, memory, quick, soon, start};
use edgehub_broker::backend::{
    Backend, CloseReason, Command, Deliveries, Feature, MethodAnswer, MethodCall, Outcome, Settler, Target,
};
use edgehub_broker::hub::{COMMANDS_IN_FLIGHT_MAX, Caller, Hub, Invocation, InvokeError};
use edgehub_broker::upstream::control::Wanted;
use module_site::{DEADLINE, Module, connect, until};
use serde_json::{Value, json};

/// Longer than any test lasts.
const LONG: Duration = Duration::from_secs(3_600);

fn invocation(target: &str, connect_timeout: Duration, response_timeout: Duration) -> Invocation {
    Invocation {
        caller: Caller::Client(id("edge1/caller")),
        target: id(target),
        name: "reboot".into(),
        payload: r#"{"now":true}"#.into(),
        connect_timeout,
        response_timeout,
    }
}

fn invoke(hub: &Hub, invocation: Invocation) -> tokio::task::JoinHandle<Result<MethodAnswer, InvokeError>> {
    let hub = hub.clone();
    tokio::spawn(async move { hub.invoke(invocation).await })
}

async fn called(client: &mut Module) -> MethodCall {
    match command(client).await {
        Command::Invoke(call) => call,
        other => panic!("a call was expected, not {other:?}"),
    }
}

fn reply(status: i32) -> MethodAnswer {
    MethodAnswer { status, payload: r#"{"done":1}"#.into() }
}

async fn server(hub: &Hub, identity: &str) -> Module {
    let mut client = connect(hub, identity).await;
    hub.subscribe(&mut client.client, Feature::Methods, true);
    client
}

#[tokio::test]
async fn a_call_reaches_a_subscribed_client_and_its_answer_the_caller() {
    let (hub, _cloud) = start(&memory(), quick());
    let mut leaf = server(&hub, "leaf").await;
    let answered = invoke(&hub, invocation("leaf", Duration::ZERO, DEADLINE));
    let call = called(&mut leaf).await;
    assert_eq!((&*call.name, &call.payload[..]), ("reboot", &br#"{"now":true}"#[..]));
    hub.method_answered(&mut leaf.client, call.id, reply(-3));
    assert_eq!(soon(answered).await.unwrap(), Ok(reply(-3)));
    // An answer that nobody waits for is of no harm.
    hub.method_answered(&mut leaf.client, call.id, reply(1));
}

#[tokio::test]
async fn an_absent_client_is_not_found_at_once_or_after_the_time_to_connect() {
    let (hub, _cloud) = start(&memory(), quick());
    let not_found = Err(InvokeError::NotFound(id("leaf")));
    // It is connected, but takes no methods.
    let mut leaf = connect(&hub, "leaf").await;
    assert_eq!(hub.invoke(invocation("leaf", Duration::ZERO, DEADLINE)).await, not_found);
    let short = Duration::from_millis(20);
    assert_eq!(hub.invoke(invocation("leaf", short, DEADLINE)).await, not_found);
    let waiting = invoke(&hub, invocation("leaf", DEADLINE, DEADLINE));
    tokio::task::yield_now().await;
    hub.subscribe(&mut leaf.client, Feature::Methods, true);
    let call = called(&mut leaf).await;
    hub.method_answered(&mut leaf.client, call.id, reply(200));
    assert_eq!(soon(waiting).await.unwrap(), Ok(reply(200)));
    hub.subscribe(&mut leaf.client, Feature::Methods, false);
    assert_eq!(hub.invoke(invocation("leaf", Duration::ZERO, DEADLINE)).await, not_found);
}

#[tokio::test]
async fn those_who_wait_call_one_after_the_other_in_their_order() {
    let (hub, _cloud) = start(&memory(), quick());
    let mut waiting = Vec::new();
    for number in 0..5 {
        let payload = number.to_string().into();
        waiting.push(invoke(&hub, Invocation { payload, ..invocation("leaf", DEADLINE, DEADLINE) }));
        tokio::task::yield_now().await;
    }
    let mut leaf = server(&hub, "leaf").await;
    for number in 0..5 {
        let call = called(&mut leaf).await;
        assert_eq!(call.payload, number.to_string());
        // A second one would be there by now, if it did not wait for this answer.
        (0..20).for_each(|_| assert!(leaf.mailbox.try_recv().is_err()));
        hub.method_answered(&mut leaf.client, call.id, reply(number));
        assert_eq!(soon(waiting.remove(0)).await.unwrap(), Ok(reply(number)));
    }
}

#[tokio::test]
async fn a_client_that_does_not_answer_times_out_and_one_that_leaves_does_at_once() {
    let (hub, _cloud) = start(&memory(), quick());
    let mut leaf = server(&hub, "leaf").await;
    let late = hub.invoke(invocation("leaf", Duration::ZERO, Duration::from_millis(20))).await;
    assert_eq!(late, Err(InvokeError::TimedOut(id("leaf"))));
    assert_eq!(late.unwrap_err().status(), 504);
    called(&mut leaf).await;
    let answered = invoke(&hub, invocation("leaf", Duration::ZERO, Duration::from_secs(86_400)));
    called(&mut leaf).await;
    drop(leaf);
    let gone = soon(answered).await.unwrap().unwrap_err();
    assert_eq!((gone.status(), &gone), (504, &InvokeError::Disconnected(id("leaf"))));
}

#[tokio::test]
async fn the_upstream_gets_an_answer_to_every_call() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let absent = soon(cloud.call("leaf", "reboot", "null").await).await.unwrap();
    assert_eq!(absent.status, 404);
    let text: Value = serde_json::from_slice(&absent.payload).unwrap();
    assert_eq!(text, json!({ "message": "Client leaf not found" }));
    let mut leaf = server(&hub, "leaf").await;
    until(|| cloud.wanted("leaf") == Some(Wanted { methods: true, ..Wanted::default() })).await;
    let answered = cloud.call("leaf", "reboot", "7").await;
    let call = called(&mut leaf).await;
    assert_eq!(call.payload, "7");
    hub.method_answered(&mut leaf.client, call.id, reply(200));
    assert_eq!(soon(answered).await.unwrap(), reply(200));
    let answered = cloud.call("leaf", "reboot", "7").await;
    called(&mut leaf).await;
    drop(leaf);
    assert_eq!(soon(answered).await.unwrap().status, 504);
}

#[tokio::test]
async fn the_hub_has_methods_of_its_own() {
    let (hub, cloud) = start(&memory(), quick());
    hub.serve_method("Echo", |payload| async move { MethodAnswer { status: 200, payload } });
    let answer = soon(cloud.call("edge1/$edgeHub", "Echo", "[1]").await).await.unwrap();
    assert_eq!(answer, MethodAnswer { status: 200, payload: "[1]".into() });
    assert_eq!(soon(cloud.call("edge1/$edgeHub", "Nothing", "null").await).await.unwrap().status, 404);
}

async fn device(hub: &Hub, identity: &str) -> Module {
    let mut client = connect(hub, identity).await;
    hub.subscribe(&mut client.client, Feature::CloudToDevice, true);
    client
}

/// The next message, as its body, with what settles it.
async fn delivered(client: &mut Module) -> (String, u64, Settler) {
    match command(client).await {
        Command::Deliver(Deliveries { target, messages, settler }) => {
            assert_eq!((target, messages.len()), (Target::Device, 1));
            let (tag, message) = &messages[0];
            (String::from_utf8(message.body.to_vec()).unwrap(), *tag, settler)
        }
        other => panic!("a message was expected, not {other:?}"),
    }
}

#[tokio::test]
async fn what_a_device_does_with_a_message_is_told_upstream() {
    let (hub, cloud) = start(&memory(), quick());
    let mut leaf = device(&hub, "leaf").await;
    for (outcome, told) in [
        (Outcome::Accepted, Ok(Outcome::Accepted)),
        (Outcome::Rejected, Ok(Outcome::Rejected)),
        (Outcome::Released, Ok(Outcome::Released)),
        (Outcome::NotConvertible, Ok(Outcome::Rejected)),
        (Outcome::NotOffered, Err(())),
        (Outcome::Expired, Ok(Outcome::Released)),
    ] {
        let settled = cloud.command("leaf", "t1").await;
        let (_, tag, settler) = delivered(&mut leaf).await;
        settler.settle([(tag, outcome)]);
        assert_eq!(soon(settled).await.map_err(drop), told, "{outcome:?}");
    }
    // A module has no such messages, and who is away gets none.
    let mut module = connect(&hub, "edge1/m").await;
    hub.subscribe(&mut module.client, Feature::CloudToDevice, true);
    assert!(soon(cloud.command("edge1/m", "t1").await).await.is_err());
    let unanswered = cloud.command("leaf", "t2").await;
    delivered(&mut leaf).await;
    drop(leaf);
    assert!(soon(unanswered).await.is_err());
    assert!(soon(cloud.command("leaf", "t3").await).await.is_err());
}

#[tokio::test]
async fn a_device_may_unsubscribe_and_subscribe_again() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let mut leaf = device(&hub, "leaf").await;
    let wants = || cloud.wanted("leaf").is_some_and(|wanted| wanted.cloud_to_device);
    for round in 0..3 {
        until(wants).await;
        let settled = cloud.command("leaf", &round.to_string()).await;
        let (body, tag, settler) = delivered(&mut leaf).await;
        assert_eq!(body, round.to_string());
        hub.subscribe(&mut leaf.client, Feature::CloudToDevice, false);
        until(|| !wants()).await;
        assert!(soon(cloud.command("leaf", "unwanted").await).await.is_err());
        // What it had before, it may still answer.
        settler.settle([(tag, Outcome::Accepted)]);
        assert_eq!(soon(settled).await, Ok(Outcome::Accepted));
        hub.subscribe(&mut leaf.client, Feature::CloudToDevice, true);
    }
}

#[tokio::test]
async fn a_device_that_answers_nothing_has_a_bounded_number_and_none_twice() {
    let (hub, cloud) = start(&memory(), quick());
    let mut leaf = device(&hub, "leaf").await;
    let mut under_way = Vec::new();
    for number in 0..COMMANDS_IN_FLIGHT_MAX {
        let settled = cloud.command("leaf", &number.to_string()).await;
        let (_, tag, settler) = delivered(&mut leaf).await;
        under_way.push((settled, tag, settler));
        assert!(soon(cloud.command("leaf", "0").await).await.is_err(), "the device has it already");
    }
    assert!(soon(cloud.command("leaf", "more").await).await.is_err());
    // Others are not concerned.
    let mut other = device(&hub, "other").await;
    let settled = cloud.command("other", "0").await;
    let (_, tag, settler) = delivered(&mut other).await;
    settler.settle([(tag, Outcome::Accepted)]);
    assert_eq!(soon(settled).await, Ok(Outcome::Accepted));
    let (settled, tag, settler) = under_way.remove(0);
    settler.settle([(tag, Outcome::Accepted)]);
    assert_eq!(soon(settled).await, Ok(Outcome::Accepted));
    let again = cloud.command("leaf", "0").await;
    let (body, tag, settler) = delivered(&mut leaf).await;
    assert_eq!(body, "0");
    settler.settle([(tag, Outcome::Accepted)]);
    assert_eq!(soon(again).await, Ok(Outcome::Accepted));
}

#[tokio::test]
async fn a_stop_waits_for_the_answers_of_methods_and_takes_no_new_calls() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let mut leaf = server(&hub, "leaf").await;
    let mut idle = server(&hub, "idle").await;
    let answered = cloud.call("leaf", "reboot", "7").await;
    let call = called(&mut leaf).await;
    let stopping = hub.clone();
    let mut draining = tokio::spawn(async move { stopping.drain(LONG).await });
    assert!(matches!(command(&mut idle).await, Command::Close(CloseReason::Stopping)));
    let refused = soon(cloud.call("idle", "reboot", "7").await).await.unwrap();
    assert_eq!(refused.status, 503);
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut draining).await.is_err());
    assert!(leaf.mailbox.try_recv().is_err(), "it may answer");
    hub.method_answered(&mut leaf.client, call.id, reply(200));
    assert_eq!(soon(answered).await.unwrap(), reply(200));
    assert!(soon(draining).await.unwrap().complete);
}

#[tokio::test]
async fn a_method_that_is_never_answered_holds_a_stop_up_to_its_limit() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let mut leaf = server(&hub, "leaf").await;
    let _unanswered = cloud.call("leaf", "reboot", "7").await;
    called(&mut leaf).await;
    let begun = std::time::Instant::now();
    // Longer than queues are waited for in which nothing moves.
    let limit = Duration::from_secs(7);
    assert!(!soon(hub.drain(limit)).await.complete);
    assert!(begun.elapsed() >= limit);
}

#[tokio::test]
async fn a_stop_waits_for_messages_that_devices_have_as_long_as_they_answer() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let mut leaf = device(&hub, "leaf").await;
    let settled = cloud.command("leaf", "t1").await;
    let (_, tag, settler) = delivered(&mut leaf).await;
    let mut idle = connect(&hub, "idle").await;
    let stopping = hub.clone();
    let mut draining = tokio::spawn(async move { stopping.drain(LONG).await });
    assert!(matches!(command(&mut idle).await, Command::Close(CloseReason::Stopping)));
    let late = cloud.command("leaf", "t2").await;
    assert!(soon(late).await.is_err(), "the upstream keeps it");
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut draining).await.is_err());
    settler.settle([(tag, Outcome::Accepted)]);
    assert_eq!(soon(settled).await, Ok(Outcome::Accepted));
    assert!(soon(draining).await.unwrap().complete);
    assert!(leaf.mailbox.try_recv().is_err(), "neither closed nor given the second message");
}

#[tokio::test]
async fn a_message_that_a_device_never_answers_does_not_hold_a_stop() {
    let (hub, cloud) = start(&memory(), quick());
    cloud.up().await;
    let mut leaf = device(&hub, "leaf").await;
    let _unsettled = cloud.command("leaf", "t1").await;
    delivered(&mut leaf).await;
    assert!(!soon(hub.drain(LONG)).await.complete, "it comes again");
}
