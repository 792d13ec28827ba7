//! Owns the simulated filter: module `filtermodule`, lets warm readings pass from `input1` to `output1`.
//!
//! A reading is acknowledged only after the hub has acknowledged what became of it, so nothing can be lost in here;
//! acknowledgements go back in the order of arrival (MQTT 3.1.1 §4.6).

use std::collections::VecDeque;

use tokio::sync::oneshot;

use super::board::{Board, Route};
use super::client::{Delivery, Inbox, Publisher, Receipt};
use super::connection_string::ConnectionString;
use super::sensor::{SEQUENCE, THRESHOLD_CELSIUS};

/// Readings under way at most.
const UNDER_WAY_MAX: usize = 256;

struct Pending {
    receipt: Receipt,
    forwarded: Option<oneshot::Receiver<()>>,
}

/// Filters until the client ends.
pub(super) async fn run(identity: ConnectionString, publisher: Publisher, mut inbox: Inbox, board: Board) {
    let mut pending = VecDeque::new();
    loop {
        tokio::select! {
            delivery = inbox.receive(), if pending.len() < UNDER_WAY_MAX => {
                let Some(delivery) = delivery else { return };
                let Some(forwarded) = forward(&identity, &publisher, &board, &delivery).await else { return };
                pending.push_back(Pending { receipt: delivery.receipt, forwarded });
            }
            receipt = first_done(&mut pending), if !pending.is_empty() => {
                pending.pop_front();
                if !inbox.acknowledge(receipt).await {
                    return;
                }
            }
        }
    }
}

/// Counts a reading and passes it on when it is warm. `None`: the client has ended.
async fn forward(
    identity: &ConnectionString,
    publisher: &Publisher,
    board: &Board,
    delivery: &Delivery,
) -> Option<Option<oneshot::Receiver<()>>> {
    let temperature = serde_json::from_slice::<serde_json::Value>(&delivery.body)
        .ok()
        .and_then(|reading| reading["machine"]["temperature"].as_f64());
    let (Some(sequence), Some(temperature)) = (sequence(&delivery.topic), temperature) else {
        board.lock().unreadable += 1;
        return Some(None);
    };
    board.lock().route(Route::SensorToFilter).see(sequence);
    if temperature <= THRESHOLD_CELSIUS {
        return Some(None);
    }
    board.lock().route(Route::FilterToCloud).publish(sequence);
    let (done, forwarded) = oneshot::channel();
    let acknowledged = board.clone();
    let on_acknowledged = Box::new(move || {
        acknowledged.lock().route(Route::FilterToCloud).acknowledge(sequence);
        // The filter may have ended; then nobody waits.
        let _ = done.send(());
    });
    let topic = identity.output_topic(
        "output1",
        &[("$.ct", "application/json"), ("$.ce", "utf-8"), (SEQUENCE, &sequence.to_string())],
    );
    publisher.publish(topic, delivery.body.to_vec(), on_acknowledged).await.then_some(Some(forwarded))
}

/// Waits until the first reading is done. May be cancelled.
async fn first_done(pending: &mut VecDeque<Pending>) -> Receipt {
    match pending.front_mut() {
        Some(first) => {
            if let Some(forwarded) = &mut first.forwarded {
                if forwarded.await.is_err() {
                    return std::future::pending().await;
                }
                first.forwarded = None;
            }
            first.receipt
        }
        None => std::future::pending().await,
    }
}

/// The sequence number in a topic `devices/{d}/modules/{m}/inputs/{input}/{properties}`.
fn sequence(topic: &str) -> Option<u64> {
    let properties = topic.splitn(7, '/').nth(6)?;
    let value = |part: &str| part.strip_prefix(SEQUENCE)?.strip_prefix('=')?.parse().ok();
    properties.trim_end_matches('/').split('&').find_map(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_a_property_of_the_topic() {
        let topic = "devices/edge1/modules/filtermodule/inputs/input1/%24.cdid=edge1&sequence=42";
        assert_eq!(sequence(topic), Some(42));
        assert_eq!(sequence(&format!("{topic}/")), Some(42));
        assert_eq!(sequence("devices/edge1/modules/f/inputs/input1/"), None);
        assert_eq!(sequence("devices/sequence=1"), None);
        assert_eq!(sequence("devices/d/modules/m/inputs/i/sequence=-1"), None);
    }
}
