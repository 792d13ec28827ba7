//! Owns the command line of the load generator.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use edgehub_benches::scenario::Scenario;
use edgehub_benches::site::EDGE;

/// A broker to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PeerKind {
    /// Eclipse Mosquitto, as installed; speaks MQTT
    Mosquitto,
    /// RabbitMQ with its AMQP 1.0 plug-in, as installed; speaks AMQP
    #[value(name = "rabbitmq")]
    RabbitMq,
}

/// What clients speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// MQTT 3.1.1
    Mqtt,
    /// AMQP 1.0
    Amqp,
}

/// Drives a hub (or another broker) over MQTT or AMQP and prints one line of JSON.
#[derive(Debug, Parser)]
#[command(name = "load")]
pub(crate) struct Options {
    /// Pattern of load
    #[arg(long, value_enum, default_value = "fan-in")]
    pub(crate) scenario: Scenario,
    /// What publishers and receivers speak
    #[arg(long, value_enum, default_value = "mqtt")]
    pub(crate) protocol: Protocol,
    /// Publishers that share a connection (AMQP)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) per_connection: u16,
    /// Publishers (pairs: also receivers)
    #[arg(long, default_value_t = 10)]
    pub(crate) devices: usize,
    /// Receivers of fan-out
    #[arg(long, default_value_t = 100)]
    pub(crate) receivers: usize,
    /// Messages of all publishers together
    #[arg(long, default_value_t = 200_000)]
    pub(crate) messages: u64,
    /// Body size in bytes; at least 20
    #[arg(long, default_value_t = 256)]
    pub(crate) payload_bytes: usize,
    /// Quality of service: 0 or 1; AMQP: messages are sent settled or unsettled
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub(crate) qos: u8,
    /// Messages without acknowledgement per publisher (QoS 1)
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) window: u16,
    /// Messages per second of all publishers together; as fast as possible if not given
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// Speaks TLS
    #[arg(long)]
    pub(crate) tls: bool,
    /// Seconds without any progress after which the run is ended and what is missing counts as lost
    #[arg(long, default_value_t = 10)]
    pub(crate) stall_secs: u64,

    /// Starts a cloud and a hub of this program with fresh identities
    #[arg(long, value_name = "PROGRAM", conflicts_with_all = ["identities", "plain_broker"])]
    pub(crate) spawn: Option<PathBuf>,
    /// Starts this broker as well, and lets both serve the same load in turns; needs --spawn
    #[arg(long, value_enum, requires = "spawn")]
    pub(crate) peer: Option<PeerKind>,
    /// Turns of both with --peer; what is compared is the median
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) rounds: u8,
    /// Durability of the spawned hub's store: sync, os or memory
    #[arg(long, default_value = "sync")]
    pub(crate) durability: String,
    /// Further setting of the spawned hub, as environment variable (may be repeated)
    #[arg(long = "hub-setting", value_name = "NAME=VALUE", value_parser = assignment)]
    pub(crate) hub_settings: Vec<(String, String)>,
    /// Folder of the spawned hub's store; a temporary one if not given
    #[arg(long, value_name = "DIR")]
    pub(crate) storage: Option<PathBuf>,

    /// Host of a running hub
    #[arg(long, default_value = "localhost")]
    pub(crate) host: String,
    /// Port of a running hub; 1883, or 5672 for AMQP, if not given
    #[arg(long)]
    pub(crate) port: Option<u16>,
    /// PEM file with the root of a running hub's certificate
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Connection strings of a running hub's identities, one per line
    #[arg(long, value_name = "FILE")]
    pub(crate) identities: Option<PathBuf>,
    /// Process whose processor time is measured
    #[arg(long, value_name = "PID")]
    pub(crate) server_pid: Option<u32>,
    /// The server is some broker: MQTT without authentication and plain topics, AMQP as guest with queues
    #[arg(long)]
    pub(crate) plain_broker: bool,
    /// Edge device of a running hub
    #[arg(long, default_value = EDGE)]
    pub(crate) edge: String,
    /// Writes the deployment manifest with the scenario's routes and ends
    #[arg(long, value_name = "FILE")]
    pub(crate) write_manifest: Option<PathBuf>,
}

fn assignment(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}
