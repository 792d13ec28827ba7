//! Owns what is printed: one line of JSON per run, and one that compares.

use std::collections::BTreeMap;

use edgehub_benches::latency::Percentiles;
use serde::Serialize;
use serde_json::{Value, json};

/// Figures that are compared, as far as a run has them.
const COMPARED: [&str; 6] = [
    "messages_per_sec",
    "server_cpu_us_per_message",
    "server_resident_bytes",
    "connections_per_sec",
    "server_cpu_us_per_connection",
    "server_resident_bytes_per_connection",
];

/// What came of messages.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) server: &'static str,
    pub(crate) scenario: String,
    pub(crate) protocol: String,
    pub(crate) publishers: usize,
    pub(crate) publishers_per_connection: u16,
    pub(crate) receivers: usize,
    pub(crate) payload_bytes: usize,
    pub(crate) qos: u8,
    pub(crate) window: Option<u16>,
    pub(crate) tls: bool,
    pub(crate) durability: Option<String>,
    pub(crate) connections_per_sec: f64,
    pub(crate) sent: u64,
    pub(crate) acknowledged: u64,
    pub(crate) received: u64,
    pub(crate) seconds: f64,
    pub(crate) messages_per_sec: f64,
    pub(crate) server_cpu_us_per_message: Option<f64>,
    pub(crate) server_cpu_cores: Option<f64>,
    pub(crate) server_resident_bytes: Option<u64>,
    pub(crate) generator_cpu_us_per_message: f64,
    pub(crate) publish_to_receive: Option<Percentiles>,
    pub(crate) publish_to_acknowledge: Option<Percentiles>,
    pub(crate) lost: u64,
    pub(crate) duplicates: u64,
    pub(crate) order_breaks: u64,
    pub(crate) ledger_gap: Option<i64>,
    pub(crate) failures: Vec<String>,
}

/// What came of connections that only stay open.
#[derive(Debug, Serialize)]
pub(crate) struct IdleReport {
    pub(crate) server: &'static str,
    pub(crate) scenario: &'static str,
    pub(crate) tls: bool,
    pub(crate) connections: usize,
    pub(crate) connections_per_sec: f64,
    pub(crate) server_cpu_us_per_connection: Option<f64>,
    pub(crate) server_resident_bytes_before: Option<u64>,
    pub(crate) server_resident_bytes: Option<u64>,
    pub(crate) server_resident_bytes_per_connection: Option<f64>,
    /// Connections that did not answer a PINGREQ after all were open.
    pub(crate) lost: usize,
    pub(crate) failures: Vec<String>,
}

/// Medians of the figures of both servers, and the peer's in relation to the hub's.
pub(crate) fn comparison(hub: &[Value], peer: &[Value]) -> Value {
    let mut figures = BTreeMap::new();
    for name in COMPARED {
        if let (Some(ours), Some(theirs)) = (median(hub, name), median(peer, name)) {
            figures.insert(name, json!({"hub": ours, "peer": theirs, "peer_to_hub": theirs / ours}));
        }
    }
    let of_first = |name: &str| hub.first().map(|run| run[name].clone());
    json!({
        "compared": of_first("scenario"),
        "protocol": of_first("protocol"),
        "publishers": of_first("publishers"),
        "durability": of_first("durability"),
        "tls": of_first("tls"),
        "peer": peer.first().map(|run| run["server"].clone()),
        "rounds": hub.len(),
        "figures": figures,
    })
}

fn median(runs: &[Value], name: &str) -> Option<f64> {
    let mut values: Vec<f64> = runs.iter().filter_map(|run| run[name].as_f64()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_compared_as_far_as_there_are_figures() {
        let run =
            |rate: f64| json!({"server": "x", "messages_per_sec": rate, "server_cpu_us_per_message": null});
        let compared = comparison(&[run(1.0), run(9.0), run(2.0)], &[run(4.0), run(1.0), run(5.0)]);
        let figures = compared["figures"].as_object().expect("an object");
        assert_eq!(figures.len(), 1);
        assert_eq!(figures["messages_per_sec"], json!({"hub": 2.0, "peer": 4.0, "peer_to_hub": 2.0}));
        assert_eq!(compared["rounds"], 3);
    }
}
