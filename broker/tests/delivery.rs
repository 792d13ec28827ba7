//! Delivery to module inputs: refusals, dead letters, hanging modules, priorities, times to live, a full store, routes
//! that come and go.

// What a test sets up and cannot have is a failure of the test, with its place.
#![allow(clippy::unwrap_used)]

mod module_site;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::backend::{Backend, Command, Feature, Outcome, PublishError, Target};
use edgehub_broker::delivery::{ATTEMPTS_MAX, BackoffOptions, ModulePumpOptions};
use edgehub_broker::hub::Hub;
use edgehub_broker::identity::Identity;
use edgehub_routing::HubConfig;
use edgehub_storage::{DeadLetterReason, StoreLimits};
use module_site::{
    DEADLINE, Module, QUEUE, Setup, config, connect, dead_letters, ledger, numbers, pass, publish,
    publish_on, pump, receive, receive_all, setup, setup_with, to_filter, until,
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;

/// A pause that no test waits for.
const NEVER: BackoffOptions =
    BackoffOptions { first: Duration::from_secs(3_600), max: Duration::from_secs(3_600) };

async fn consumer(hub: &Hub, name: &str) -> Module {
    let mut module = connect(hub, name).await;
    hub.subscribe(&mut module.client, Feature::ModuleInputs, true);
    module
}

/// Answers every delivery as `answer` says, until `enough` of what was received.
async fn answer_until(
    module: &mut Module,
    mut answer: impl FnMut(u32) -> Outcome,
    mut enough: impl FnMut(&[u32]) -> bool,
) -> Vec<u32> {
    let mut seen = Vec::new();
    while !enough(&seen) {
        let next = tokio::time::timeout(DEADLINE, module.mailbox.recv()).await.expect("a delivery in time");
        let Some(Command::Deliver(deliveries)) = next else { panic!("a delivery was expected") };
        let outcomes: Vec<(u64, Outcome)> = numbers(&deliveries)
            .into_iter()
            .map(|(tag, number)| (tag, number, answer(number)))
            .map(|(tag, number, outcome)| {
                seen.push(number);
                (tag, outcome)
            })
            .collect();
        deliveries.settler.settle(outcomes);
    }
    seen
}

#[tokio::test]
async fn a_poison_message_among_ten_ends_in_the_dead_letters_and_the_others_are_delivered() {
    for window in [1, 16] {
        let Setup { hub, .. } = setup(window, DEADLINE);
        hub.apply(&to_filter()).unwrap();
        let mut sensor = connect(&hub, "edge1/sensor").await;
        publish(&hub, &mut sensor, 0..10).await;
        let mut filter = consumer(&hub, "edge1/filter").await;
        let poison = |number| if number == 4 { Outcome::Released } else { Outcome::Accepted };
        let offers = ATTEMPTS_MAX as usize + 9;
        let seen = answer_until(&mut filter, poison, |seen| seen.len() == offers).await;
        until(|| ledger(&hub, QUEUE).queued == 0).await;
        assert_eq!((ledger(&hub, QUEUE).delivered, ledger(&hub, QUEUE).dead_lettered), (9, 1));
        let mut others: Vec<u32> = seen.iter().copied().filter(|number| *number != 4).collect();
        if window == 1 {
            assert_eq!(others, [0, 1, 2, 3, 5, 6, 7, 8, 9]);
            assert_eq!(seen[4..14], [4; 10], "nothing overtakes it");
        }
        others.sort_unstable();
        assert_eq!(others.len(), 9);
        let letters = dead_letters(&hub, 1).await;
        assert_eq!(
            (letters[0].reason, letters[0].attempts),
            (DeadLetterReason::AttemptsExhausted, ATTEMPTS_MAX)
        );
        assert_eq!(hub.status().dead_letters.count, 1);
        // The count ends with the message: the next one has all its attempts.
        publish(&hub, &mut sensor, 10..11).await;
        let mut left = ATTEMPTS_MAX - 1;
        let late = |_| {
            left = left.saturating_sub(1);
            if left == 0 { Outcome::Accepted } else { Outcome::Released }
        };
        answer_until(&mut filter, late, |seen| seen.len() == ATTEMPTS_MAX as usize - 1).await;
        until(|| ledger(&hub, QUEUE).delivered == 10).await;
    }
}

#[tokio::test]
async fn attempts_are_counted_over_connections() {
    let Setup { hub, .. } = setup(4, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..1).await;
    for _ in 0..ATTEMPTS_MAX {
        let mut filter = consumer(&hub, "edge1/filter").await;
        let (_, tags, settler) = receive(&mut filter).await;
        settler.settle([(tags[0], Outcome::Released)]);
        // It comes again, so the refusal was counted, or it is gone for good.
        let again = receive(&mut filter);
        tokio::select! {
            _ = again => {}
            () = until(|| ledger(&hub, QUEUE).dead_lettered == 1) => {}
        }
    }
    assert_eq!(dead_letters(&hub, 1).await[0].attempts, ATTEMPTS_MAX);
}

#[tokio::test]
async fn what_is_rejected_or_cannot_be_converted_is_a_dead_letter_at_once() {
    let Setup { hub, time } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    time.advance(60_000);
    publish(&hub, &mut sensor, 0..4).await;
    let mut filter = consumer(&hub, "edge1/filter").await;
    let outcomes = [Outcome::Accepted, Outcome::Rejected, Outcome::NotConvertible, Outcome::Accepted];
    answer_until(&mut filter, |number| outcomes[number as usize], |seen| seen.len() == 4).await;
    let letters = dead_letters(&hub, 2).await;
    let shown: Vec<_> =
        letters.iter().map(|letter| (letter.reason, letter.attempts, letter.offset.get())).collect();
    assert_eq!(shown, [(DeadLetterReason::RejectedByReceiver, 1, 1), (DeadLetterReason::Conversion, 1, 2)]);
    assert!(letters.iter().all(|letter| letter.dead_lettered_at >= letter.accepted_at));
    assert_eq!(&*letters[0].queue_name, QUEUE);
    until(|| ledger(&hub, QUEUE).delivered == 2).await;
    until(|| hub.status().gap == 0).await;
}

#[tokio::test]
async fn what_expires_in_the_head_is_counted_as_expired_and_does_not_come_again() {
    let Setup { hub, time } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    publish(&hub, &mut sensor, 0..3).await;
    time.advance(600_000);
    let begun = Instant::now();
    let mut filter = consumer(&hub, "edge1/filter").await;
    let next = tokio::time::timeout(DEADLINE, filter.mailbox.recv()).await.expect("a delivery in time");
    let Some(Command::Deliver(deliveries)) = next else { panic!("a delivery was expected") };
    for (_, message) in &deliveries.messages {
        // An hour less the ten minutes that have passed.
        let left = message.expires_at.unwrap() - begun;
        assert!((3_000..3_000 + DEADLINE.as_secs()).contains(&left.as_secs()), "{left:?}");
    }
    let [expired, others @ ..] = &numbers(&deliveries)[..] else { panic!("three messages") };
    deliveries.settler.settle([(expired.0, Outcome::Expired)]);
    until(|| ledger(&hub, QUEUE).expired == 1).await;
    deliveries.settler.settle(others.iter().map(|(tag, _)| (*tag, Outcome::Accepted)));
    until(|| ledger(&hub, QUEUE).delivered == 2).await;
    assert_eq!(hub.status().gap, 0);
    publish(&hub, &mut sensor, 3..4).await;
    assert_eq!(receive_all(&mut filter, 1).await, [3]);
}

#[tokio::test]
async fn a_module_that_never_answers_loses_nothing_and_others_flow() {
    let Setup { hub, .. } = setup(4, DEADLINE);
    let route =
        |input: &str| format!("FROM /messages/* INTO BrokeredEndpoint(\"/modules/{input}/inputs/in1\")");
    hub.apply(&config(json!({ "a": route("hanging"), "b": route("flowing") }), 3600)).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut hanging = consumer(&hub, "edge1/hanging").await;
    let mut flowing = consumer(&hub, "edge1/flowing").await;
    publish(&hub, &mut sensor, 0..50).await;
    assert_eq!(receive_all(&mut flowing, 50).await, (0..50).collect::<Vec<_>>());
    // More offers than a message may be refused.
    for _ in 0..ATTEMPTS_MAX + 2 {
        assert_eq!(receive(&mut hanging).await.0, [0, 1, 2, 3]);
        pass(DEADLINE).await;
    }
    assert_eq!(ledger(&hub, "edge1/hanging/in1").queued, 50);
    let unanswered = |_| Outcome::NotOffered;
    answer_until(&mut hanging, unanswered, |seen| seen.len() > 4 * (ATTEMPTS_MAX as usize + 2)).await;
    assert_eq!(ledger(&hub, "edge1/hanging/in1").dead_lettered, 0);
    let accepted = |_| Outcome::Accepted;
    let seen = answer_until(&mut hanging, accepted, |seen| seen.last() == Some(&49)).await;
    let mut once = seen.clone();
    once.dedup();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once, (0..50).collect::<Vec<_>>());
    until(|| ledger(&hub, "edge1/hanging/in1").delivered == 50).await;
}

fn with_priorities() -> HubConfig {
    let route = |output: &str| {
        format!(
            "FROM /messages/modules/sensor/outputs/{output} INTO BrokeredEndpoint(\"/modules/filter/inputs/in1\")"
        )
    };
    config(
        json!({
            "low": { "route": route("out"), "priority": 7 },
            "middle": { "route": route("middle"), "priority": 4 },
            "urgent": { "route": route("urgent"), "priority": 1 },
        }),
        3600,
    )
}

#[tokio::test]
async fn an_urgent_message_does_not_wait_for_the_pause_of_a_less_urgent_one() {
    for times_out in [false, true] {
        let options = ModulePumpOptions { backoff: NEVER, ..pump(8, DEADLINE) };
        let Setup { hub, .. } = setup_with(options, StoreLimits::default());
        hub.apply(&with_priorities()).unwrap();
        let mut sensor = connect(&hub, "edge1/sensor").await;
        let mut filter = consumer(&hub, "edge1/filter").await;
        publish_on(&hub, &mut sensor, "out", 0..1).await.unwrap();
        let (first, tags, settler) = receive(&mut filter).await;
        assert_eq!(first, [0]);
        if times_out {
            pass(DEADLINE).await;
            // What is sent before the pump has seen that is given up with it.
            until(|| settler.is_abandoned()).await;
        } else {
            settler.settle([(tags[0], Outcome::Released)]);
        }
        for number in 10..20 {
            publish_on(&hub, &mut sensor, "urgent", number..number + 1).await.unwrap();
            assert_eq!(receive_all(&mut filter, 1).await, [number]);
        }
        publish_on(&hub, &mut sensor, "middle", 20..21).await.unwrap();
        assert_eq!(receive_all(&mut filter, 1).await, [20]);
        publish_on(&hub, &mut sensor, "out", 1..2).await.unwrap();
        until(|| ledger(&hub, "edge1/filter/in1_Pri1").delivered == 10).await;
        until(|| ledger(&hub, "edge1/filter/in1_Pri4").delivered == 1).await;
        assert!(filter.mailbox.try_recv().is_err(), "equals of the refused one wait with it");
        // A new connection does not wait.
        drop(filter);
        let mut filter = consumer(&hub, "edge1/filter").await;
        assert_eq!(receive_all(&mut filter, 2).await, [0, 1]);
    }
}

#[tokio::test]
async fn priorities_are_strict_unless_less_urgent_ones_have_a_share() {
    for (lower_share_percent, expected) in [(0, 0), (20, 10), (50, 25)] {
        let options = ModulePumpOptions { lower_share_percent, ..pump(1, DEADLINE) };
        let Setup { hub, .. } = setup_with(options, StoreLimits::default());
        hub.apply(&with_priorities()).unwrap();
        let mut sensor = connect(&hub, "edge1/sensor").await;
        publish_on(&hub, &mut sensor, "out", 1000..1100).await.unwrap();
        publish_on(&hub, &mut sensor, "middle", 2000..2100).await.unwrap();
        publish_on(&hub, &mut sensor, "urgent", 0..100).await.unwrap();
        let mut filter = consumer(&hub, "edge1/filter").await;
        let seen = receive_all(&mut filter, 300).await;
        let lower = seen[..50].iter().filter(|number| **number >= 1000).count();
        assert!(lower.abs_diff(expected) <= 1, "{lower} of 50 with {lower_share_percent} %");
        for start in [0, 1000, 2000] {
            let of_one: Vec<u32> =
                seen.iter().copied().filter(|number| (start..start + 100).contains(number)).collect();
            assert_eq!(of_one, (start..start + 100).collect::<Vec<_>>(), "each priority keeps its order");
        }
        if lower_share_percent == 0 {
            let strict: Vec<u32> = (0..100).chain(2000..2100).chain(1000..1100).collect();
            assert_eq!(seen, strict);
        } else {
            let of_share = &seen[..100];
            assert!(of_share.iter().any(|number| (1000..1100).contains(number)), "the least urgent as well");
        }
    }
}

#[tokio::test]
async fn what_expires_while_it_waits_for_a_retry_is_not_sent() {
    let Setup { hub, time } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = consumer(&hub, "edge1/filter").await;
    publish(&hub, &mut sensor, 0..1).await;
    let (_, tags, settler) = receive(&mut filter).await;
    time.advance(3_600_000);
    settler.settle([(tags[0], Outcome::Released)]);
    publish(&hub, &mut sensor, 1..2).await;
    assert_eq!(receive_all(&mut filter, 1).await, [1]);
    until(|| ledger(&hub, QUEUE).expired == 1).await;
    assert_eq!(ledger(&hub, QUEUE).dead_lettered, 0);
}

#[tokio::test]
async fn what_expires_while_the_mailbox_is_full_is_not_sent() {
    let Setup { hub, time } = setup(1, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = consumer(&hub, "edge1/filter").await;
    // Whoever else speaks to this connection fills its mailbox.
    let mailbox = filter.client_mailbox();
    while mailbox.try_send(Command::Deliver(module_site::nothing())).is_ok() {}
    publish(&hub, &mut sensor, 0..3).await;
    until(|| ledger(&hub, QUEUE).accepted == 3).await;
    tokio::task::yield_now().await;
    time.advance(3_600_000);
    publish(&hub, &mut sensor, 3..4).await;
    let accepted = |_| Outcome::Accepted;
    assert_eq!(answer_until(&mut filter, accepted, |seen| !seen.is_empty()).await, [3]);
    until(|| ledger(&hub, QUEUE).expired == 3).await;
}

/// Random answers and connections: each message ends once, as the model says, and first offers are in order.
#[tokio::test]
async fn each_message_ends_exactly_once() {
    for seed in [1_u64, 2, 3, 5, 8, 13] {
        eprintln!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let window = [1, 3, 16][random.usize(..3)];
        let Setup { hub, .. } = setup(window, DEADLINE);
        hub.apply(&to_filter()).unwrap();
        let mut sensor = connect(&hub, "edge1/sensor").await;
        let total = 200;
        let mut published = 0;
        let (mut accepted, mut dead) = (BTreeSet::new(), BTreeSet::new());
        let mut releases: BTreeMap<u32, u32> = BTreeMap::new();
        let mut first_offers = Vec::new();
        let poison: BTreeSet<u32> = (0..6).map(|_| random.u32(0..total)).collect();
        let mut filter = consumer(&hub, "edge1/filter").await;
        while accepted.len() + dead.len() < total as usize {
            if published < total && random.u32(..3) == 0 {
                let next = (published + random.u32(1..20)).min(total);
                publish(&hub, &mut sensor, published..next).await;
                published = next;
            }
            if accepted.len() + dead.len() == published as usize {
                continue;
            }
            let next =
                tokio::time::timeout(DEADLINE, filter.mailbox.recv()).await.expect("a delivery in time");
            let Some(Command::Deliver(deliveries)) = next else { panic!("a delivery was expected") };
            let mut outcomes = Vec::new();
            for (tag, number) in numbers(&deliveries) {
                assert!(!accepted.contains(&number) && !dead.contains(&number), "{number} had ended");
                if !first_offers.contains(&number) {
                    first_offers.push(number);
                }
                let outcome = match random.u32(..20) {
                    _ if poison.contains(&number) => Outcome::Released,
                    0 => Outcome::Rejected,
                    1 | 2 => Outcome::Released,
                    3 => Outcome::NotOffered,
                    _ => Outcome::Accepted,
                };
                match outcome {
                    Outcome::Accepted => assert!(accepted.insert(number)),
                    Outcome::Rejected => assert!(dead.insert(number)),
                    Outcome::Released => {
                        let count = releases.entry(number).or_default();
                        *count += 1;
                        if *count == ATTEMPTS_MAX {
                            assert!(dead.insert(number));
                        }
                    }
                    Outcome::NotOffered | Outcome::NotConvertible | Outcome::Expired => {}
                }
                outcomes.push((tag, outcome));
            }
            random.shuffle(&mut outcomes);
            // Only when the account can tell that the answers arrived.
            let visible = outcomes.iter().any(|(_, outcome)| *outcome == Outcome::Accepted);
            let cut = visible && random.u32(..12) == 0;
            deliveries.settler.settle(outcomes);
            if cut {
                let ended = (accepted.len() + dead.len()) as u64;
                until(|| ledger(&hub, QUEUE).delivered + ledger(&hub, QUEUE).dead_lettered == ended).await;
                drop(filter);
                filter = consumer(&hub, "edge1/filter").await;
            }
        }
        assert_eq!(first_offers, (0..total).collect::<Vec<_>>());
        until(|| ledger(&hub, QUEUE).queued == 0).await;
        let account = ledger(&hub, QUEUE);
        assert_eq!((account.delivered, account.dead_lettered), (accepted.len() as u64, dead.len() as u64));
        let letters: BTreeSet<u32> =
            dead_letters(&hub, dead.len()).await.iter().map(|letter| letter.offset.get() as u32).collect();
        assert_eq!(letters, dead);
    }
}

/// Accepts everything, and notes it under its input.
fn collect(
    mut module: Module,
    into: Arc<Mutex<BTreeMap<String, BTreeSet<u32>>>>,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        // The whole of it: the client must live as long as this task.
        let module = &mut module;
        while let Some(command) = module.mailbox.recv().await {
            if let Command::Deliver(deliveries) = command {
                let Target::Input(input) = &deliveries.target else { panic!("{deliveries:?}") };
                let taken = numbers(&deliveries);
                let mut noted = into.lock();
                noted.entry(input.to_string()).or_default().extend(taken.iter().map(|(_, number)| *number));
                drop(noted);
                deliveries.settler.settle(taken.into_iter().map(|(tag, _)| (tag, Outcome::Accepted)));
            }
        }
    })
}

#[tokio::test]
async fn routes_that_come_and_go_under_load_lose_nothing() {
    for seed in [1_u64, 7, 42] {
        eprintln!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let Setup { hub, .. } = setup(8, DEADLINE);
        let mut sensor = connect(&hub, "edge1/sensor").await;
        let inputs = ["in1", "in2", "in3"];
        let received = Arc::new(Mutex::new(BTreeMap::new()));
        let mut expected: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
        let mut consuming: Option<tokio::task::JoinHandle<()>> = None;
        let configure = |chosen: &[&str], random: &mut fastrand::Rng| {
            let mut routes = serde_json::Map::new();
            for input in chosen {
                // Names change, priorities change, and more than one route may lead to an input.
                for _ in 0..random.u32(1..3) {
                    let name = format!("r{}", random.u32(..1_000));
                    let text = format!("FROM /* INTO BrokeredEndpoint(\"/modules/filter/inputs/{input}\")");
                    routes.insert(name, json!({ "route": text, "priority": random.u32(..4) }));
                }
            }
            config(routes.into(), 3600)
        };
        let mut routed: Vec<&str> = Vec::new();
        let mut number = 0;
        for _ in 0..150 {
            match random.u32(..10) {
                0..3 => {
                    let chosen: Vec<&str> = inputs.into_iter().filter(|_| random.bool()).collect();
                    let document = configure(&chosen, &mut random);
                    // Two routes by chance of one name are one route.
                    routed = inputs
                        .into_iter()
                        .filter(|input| document.routes.iter().any(|route| route.text.contains(*input)))
                        .collect();
                    assert!(hub.apply(&document).unwrap().is_complete());
                }
                3 => match consuming.take() {
                    // An outage of the consumer, and its end.
                    Some(task) => {
                        task.abort();
                        let _ = task.await;
                    }
                    None => {
                        let filter = consumer(&hub, "edge1/filter").await;
                        consuming = Some(collect(filter, received.clone()));
                    }
                },
                _ => {
                    let count = random.u32(1..10);
                    publish(&hub, &mut sensor, number..number + count).await;
                    for input in &routed {
                        expected.entry((*input).into()).or_default().extend(number..number + count);
                    }
                    number += count;
                }
            }
        }
        hub.apply(&config(json!({}), 3600)).unwrap();
        let waiting = |detached: bool| -> u64 {
            let status = hub.status();
            let queues = status.queues.iter().filter(|queue| queue.detached == detached);
            queues.map(|queue| queue.ledger.queued).sum()
        };
        assert_eq!(waiting(false), 0, "all queues are detached");
        let before = waiting(true);
        hub.apply(&configure(&inputs, &mut random)).unwrap();
        assert!(waiting(false) <= before, "and attached again");
        if consuming.is_none() {
            let filter = consumer(&hub, "edge1/filter").await;
            consuming = Some(collect(filter, received.clone()));
        }
        until(|| hub.status().queues.iter().all(|queue| queue.ledger.queued == 0)).await;
        until(|| *received.lock() == expected).await;
        let status = hub.status();
        assert_eq!(status.gap, 0);
        let delivered: u64 = status.queues.iter().map(|queue| queue.ledger.delivered).sum();
        let wanted: usize = expected.values().map(BTreeSet::len).sum();
        assert_eq!(delivered, wanted as u64);
        consuming.into_iter().for_each(|task| task.abort());
    }
}

#[tokio::test]
async fn a_new_priority_does_not_repeat_what_is_under_way() {
    let Setup { hub, .. } = setup(8, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = consumer(&hub, "edge1/filter").await;
    publish(&hub, &mut sensor, 0..3).await;
    let mut under_way = Vec::new();
    let mut settlers = Vec::new();
    while under_way.len() < 3 {
        let (numbers, tags, settler) = receive(&mut filter).await;
        under_way.extend(numbers);
        settlers.push((tags, settler));
    }
    hub.apply(&with_priorities()).unwrap();
    publish_on(&hub, &mut sensor, "urgent", 10..11).await.unwrap();
    assert_eq!(receive_all(&mut filter, 1).await, [10]);
    for (tags, settler) in settlers {
        settler.settle(tags.into_iter().map(|tag| (tag, Outcome::Accepted)));
    }
    until(|| ledger(&hub, QUEUE).delivered == 3).await;
    assert!(filter.mailbox.try_recv().is_err());
}

#[tokio::test]
async fn an_idle_pump_sends_at_once() {
    let Setup { hub, .. } = setup(16, DEADLINE);
    hub.apply(&to_filter()).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut filter = consumer(&hub, "edge1/filter").await;
    let (mut storing, mut took) = (Vec::new(), Vec::new());
    for number in 0..30 {
        let begun = std::time::Instant::now();
        publish(&hub, &mut sensor, number..number + 1).await;
        let stored = std::time::Instant::now();
        assert_eq!(receive_all(&mut filter, 1).await, [number]);
        storing.push(stored - begun);
        took.push(stored.elapsed());
        until(|| ledger(&hub, QUEUE).queued == 0).await;
    }
    // A pump that polls would delay most; a loaded machine does as well, and storing with them.
    let median = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2]
    };
    let limit = Duration::from_millis(5) + 10 * median(&mut storing);
    assert!(median(&mut took) < limit, "{took:?} of {limit:?}");
}

fn limited(max_bytes: u64, overflow: Option<&str>) -> HubConfig {
    let mut route = json!({
        "route": "FROM /messages/* INTO BrokeredEndpoint(\"/modules/filter/inputs/in1\")"
    });
    if let Some(overflow) = overflow {
        route["overflow"] = overflow.into();
    }
    HubConfig::parse(&json!({
        "schemaVersion": "1.1",
        "routes": { "r": route },
        "storeAndForwardConfiguration": { "timeToLiveSecs": 3600, "storeLimits": { "maxSizeBytes": max_bytes } }
    }))
    .unwrap()
}

const LIMIT_BYTES: u64 = 1 << 20;

#[tokio::test]
async fn a_full_store_refuses_new_messages_and_everything_else_goes_on() {
    let Setup { hub, .. } = setup(64, DEADLINE);
    hub.apply(&limited(LIMIT_BYTES, None)).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut number = 0;
    let error = loop {
        match publish_on(&hub, &mut sensor, "out", number..number + 500).await {
            Ok(()) => number += 500,
            Err(error) => break error,
        }
        assert!(number < 100_000, "the limit holds");
    };
    assert!(matches!(error, PublishError::Full(_)), "{error}");
    assert!(number > 0);
    let status = hub.status();
    assert_eq!(status.space.max_bytes, Some(LIMIT_BYTES));
    assert!(status.space.full.is_some_and(|text| text.contains("raise the limit")));
    assert_eq!(hub.warnings().len(), 1);
    hub.store_session(&Identity::parse("edge1/sensor").unwrap(), Some("session".into())).await.unwrap();
    // Deliveries go on, and make room.
    let mut filter = consumer(&hub, "edge1/filter").await;
    let seen = receive_all(&mut filter, number as usize).await;
    assert_eq!(seen, (0..number).collect::<Vec<_>>());
    let mut tries = 0;
    while publish_on(&hub, &mut sensor, "out", number..number + 1).await.is_err() {
        tries += 1;
        assert!(tries < 10_000, "there is room again");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(receive_all(&mut filter, 1).await, [number]);
    until(|| hub.status().space.full.is_none()).await;
}

#[tokio::test]
async fn the_limit_may_change_while_the_hub_runs() {
    let Setup { hub, .. } = setup(64, DEADLINE);
    hub.apply(&limited(LIMIT_BYTES, None)).unwrap();
    let mut sensor = connect(&hub, "edge1/sensor").await;
    let mut number = 0;
    while publish_on(&hub, &mut sensor, "out", number..number + 500).await.is_ok() {
        number += 500;
    }
    hub.apply(&limited(4 * LIMIT_BYTES, None)).unwrap();
    publish_on(&hub, &mut sensor, "out", number..number + 500).await.unwrap();
    hub.apply(&to_filter()).unwrap();
    assert_eq!(hub.status().space.max_bytes, None);
    hub.apply(&limited(LIMIT_BYTES, None)).unwrap();
    assert!(publish_on(&hub, &mut sensor, "out", 0..500).await.is_err());
}

#[tokio::test]
async fn a_route_may_make_room_by_its_oldest_messages() {
    for (policy, counted) in [("drop-oldest", "overflow"), ("dead-letter", "dead_lettered")] {
        let Setup { hub, .. } = setup(64, DEADLINE);
        hub.apply(&limited(LIMIT_BYTES, Some(policy))).unwrap();
        let mut sensor = connect(&hub, "edge1/sensor").await;
        let mut number = 0;
        let lost = |hub: &Hub| {
            let account = ledger(hub, QUEUE);
            if counted == "overflow" {
                account.dropped.get("overflow").copied().unwrap_or_default()
            } else {
                account.dead_lettered
            }
        };
        while lost(&hub) == 0 {
            publish_on(&hub, &mut sensor, "out", number..number + 100).await.unwrap();
            number += 100;
            assert!(number < 200_000, "{policy}");
        }
        let account = ledger(&hub, QUEUE);
        assert_eq!(account.accepted, u64::from(number));
        assert_eq!(account.queued + lost(&hub), u64::from(number));
        let mut filter = consumer(&hub, "edge1/filter").await;
        let seen = receive_all(&mut filter, account.queued as usize).await;
        assert_eq!(seen, (number - account.queued as u32..number).collect::<Vec<_>>(), "the oldest went");
    }
}
