//! Owns the readers of the hub's status page and of the cloud's telemetry log.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use http_body_util::BodyExt as _;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::sleep;

use super::board::{Board, Route};
use super::http;
use super::sensor::SEQUENCE;

const STATUS_INTERVAL: Duration = Duration::from_millis(200);
const FOLLOW_PAUSE: Duration = Duration::from_millis(200);
/// Longest line of the telemetry log.
const LINE_BYTES_MAX: usize = 2 * 1024 * 1024;

/// The part of the hub's status page that the demonstration reads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct HubStatus {
    /// Connected clients.
    #[serde(default)]
    pub(super) clients: Vec<ClientStatus>,
    /// The way up.
    pub(super) upstream: Option<UpstreamStatus>,
    /// The queues.
    pub(super) queues: Vec<QueueStatus>,
    /// Messages that no route took.
    #[serde(default)]
    pub(super) unrouted: u64,
    /// What the hub's ledger leaves unexplained.
    #[serde(default)]
    pub(super) gap: i64,
}

/// A connected client.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct ClientStatus {
    /// Its identity.
    pub(super) id: String,
}

/// The way up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct UpstreamStatus {
    /// What the supervisor is doing.
    pub(super) state: String,
}

/// A queue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct QueueStatus {
    /// The endpoint it belongs to.
    pub(super) endpoint: String,
    /// Its account.
    pub(super) ledger: Ledger,
}

/// The hub's account of a queue or of several.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Ledger {
    /// Messages taken.
    pub(super) accepted: u64,
    /// Messages delivered.
    pub(super) delivered: u64,
    /// Messages whose time to live ended.
    pub(super) expired: u64,
    /// Messages dropped, by reason.
    #[serde(default)]
    pub(super) dropped: BTreeMap<String, u64>,
    /// Messages set aside.
    #[serde(default)]
    pub(super) dead_lettered: u64,
    /// Messages that wait.
    pub(super) queued: u64,
    /// What the equation leaves unexplained.
    #[serde(default)]
    pub(super) gap: i64,
}

impl HubStatus {
    /// The sum over all queues of a route's endpoint.
    pub(super) fn ledger(&self, route: Route) -> Ledger {
        let mut sum = Ledger::default();
        for queue in self.queues.iter().filter(|queue| queue.endpoint == route.endpoint()) {
            sum.accepted += queue.ledger.accepted;
            sum.delivered += queue.ledger.delivered;
            sum.expired += queue.ledger.expired;
            sum.dead_lettered += queue.ledger.dead_lettered;
            sum.queued += queue.ledger.queued;
            sum.gap += queue.ledger.gap;
            for (reason, count) in &queue.ledger.dropped {
                *sum.dropped.entry(reason.clone()).or_default() += count;
            }
        }
        sum
    }
}

/// The last status and whether the hub still gives one.
#[derive(Debug, Clone, Default)]
pub(super) struct HubView {
    /// The last status.
    pub(super) status: HubStatus,
    /// Why there is none at present; empty while there is.
    pub(super) fault: String,
}

/// Reads the hub's status page again and again, until nobody looks any more.
pub(super) async fn watch_hub(address: SocketAddr, view: watch::Sender<HubView>) {
    while !view.is_closed() {
        match http::json::<HubStatus>(address, "/status").await {
            Ok(status) => view.send_modify(|view| *view = HubView { status, fault: String::new() }),
            // What was seen last stays on the screen.
            Err(fault) => view.send_modify(|view| view.fault = fault),
        }
        sleep(STATUS_INTERVAL).await;
    }
}

/// A line of the cloud's telemetry log, as far as it is of interest.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    device_id: String,
    #[serde(default)]
    module_id: Option<String>,
    #[serde(default)]
    properties: BTreeMap<String, serde_json::Value>,
    sequence_number: u64,
}

/// Follows the cloud's telemetry log and enters what arrives. Tells by `fault` why it cannot, empty while it can.
pub(super) async fn follow_cloud(
    address: SocketAddr,
    name: &'static str,
    tls: Arc<rustls::ClientConfig>,
    board: Board,
    fault: watch::Sender<String>,
) {
    // After a reconnection the log may begin anew: each record counts once.
    let mut known = HashSet::new();
    loop {
        match http::follow(address, name, tls.clone(), "/telemetry?follow").await {
            Ok(mut body) => {
                fault.send_replace(String::new());
                let mut buffer = BytesMut::new();
                while let Some(Ok(frame)) = body.frame().await {
                    let Ok(data) = frame.into_data() else { continue };
                    buffer.extend_from_slice(&data);
                    while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                        enter(&buffer.split_to(end + 1), &board, &mut known);
                    }
                    if buffer.len() > LINE_BYTES_MAX {
                        break;
                    }
                }
                fault.send_replace("the telemetry log ended".into());
            }
            Err(why) => {
                fault.send_replace(why);
            }
        }
        sleep(FOLLOW_PAUSE).await;
    }
}

fn enter(line: &[u8], board: &Board, known: &mut HashSet<u64>) {
    let line = line.trim_ascii();
    if line.is_empty() {
        return;
    }
    let Ok(record) = serde_json::from_slice::<Record>(line) else {
        board.lock().unreadable += 1;
        return;
    };
    if !known.insert(record.sequence_number) {
        return;
    }
    let mut accounts = board.lock();
    if record.device_id != "edge1" || record.module_id.as_deref() != Some("filtermodule") {
        accounts.others += 1;
        return;
    }
    let sequence = record.properties.get(SEQUENCE).and_then(|value| match value {
        serde_json::Value::String(text) => text.parse().ok(),
        other => other.as_u64(),
    });
    match sequence {
        Some(sequence) => {
            accounts.route(Route::FilterToCloud).see(sequence);
            accounts.end_to_end.see(sequence);
        }
        None => accounts.unreadable += 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_log_counts_once() {
        let board = Board::default();
        board.lock().route(Route::FilterToCloud).publish(7);
        let line = br#"{"deviceId":"edge1","moduleId":"filtermodule","properties":{"sequence":"7"},"sequenceNumber":1}"#;
        let mut known = HashSet::new();
        enter(line, &board, &mut known);
        enter(line, &board, &mut known);
        enter(br#"{"deviceId":"leaf","moduleId":null,"sequenceNumber":2}"#, &board, &mut known);
        enter(b"\n", &board, &mut known);
        enter(b"{}\n", &board, &mut known);
        let mut accounts = board.lock();
        assert_eq!(accounts.route(Route::FilterToCloud).totals().arrivals, 1);
        assert_eq!((accounts.others, accounts.unreadable), (1, 1));
    }

    #[test]
    fn the_queues_of_an_endpoint_are_summed() {
        let status: HubStatus = serde_json::from_str(
            r#"{"device":"edge1","clients":[{"id":"edge1/x"}],"upstream":{"state":"up","held":1},"queues":[
            {"queue":"iothub","endpoint":"iothub","ledger":{"accepted":3,"delivered":1,"expired":0,"dropped":{"a":1},"dead_lettered":0,"queued":1,"gap":0}},
            {"queue":"iothub_Pri0","endpoint":"iothub","ledger":{"accepted":2,"delivered":2,"expired":0,"dropped":{},"dead_lettered":0,"queued":0,"gap":0}}],"unrouted":0,"gap":0}"#,
        )
        .expect("valid");
        let ledger = status.ledger(Route::FilterToCloud);
        assert_eq!((ledger.accepted, ledger.delivered, ledger.queued, ledger.dropped["a"]), (5, 3, 1, 1));
    }
}
