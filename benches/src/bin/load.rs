//! The load generator: drives a hub over MQTT and prints one line of JSON with what it measured.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::Parser;
use edgehub_benches::arrivals::Arrivals;
use edgehub_benches::client::{Client, Clock, Publishing, STAMP_BYTES, Target};
use edgehub_benches::identity::Identity;
use edgehub_benches::latency::{Histogram, Percentiles};
use edgehub_benches::process::{Usage, usage};
use edgehub_benches::scenario::{Hears, Party, Plan, Scenario};
use edgehub_benches::site::{EDGE, HubOptions, Site};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde::Serialize;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

/// Logins that are under way at the same time.
const LOGINS_AT_ONCE: usize = 64;
/// Pause between looks at the progress.
const WATCH: Duration = Duration::from_millis(20);

/// Drives a hub (or another broker) over MQTT and prints one line of JSON.
#[derive(Debug, Parser)]
#[command(name = "load")]
struct Options {
    /// Pattern of load
    #[arg(long, value_enum, default_value = "fan-in")]
    scenario: Scenario,
    /// Publishers (pairs: also receivers)
    #[arg(long, default_value_t = 10)]
    devices: usize,
    /// Receivers of fan-out
    #[arg(long, default_value_t = 100)]
    receivers: usize,
    /// Messages of all publishers together
    #[arg(long, default_value_t = 200_000)]
    messages: u64,
    /// Body size in bytes; at least 20
    #[arg(long, default_value_t = 256)]
    payload_bytes: usize,
    /// Quality of service: 0 or 1
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    qos: u8,
    /// Messages without acknowledgement per publisher (QoS 1)
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    window: u16,
    /// Messages per second of all publishers together; as fast as possible if not given
    #[arg(long)]
    rate: Option<f64>,
    /// Speaks TLS
    #[arg(long)]
    tls: bool,
    /// Seconds without any progress after which the run is ended and what is missing counts as lost
    #[arg(long, default_value_t = 10)]
    stall_secs: u64,

    /// Starts a cloud and a hub of this program with fresh identities
    #[arg(long, value_name = "PROGRAM", conflicts_with_all = ["identities", "plain_broker"])]
    spawn: Option<PathBuf>,
    /// Durability of the spawned hub's store: sync, os or memory
    #[arg(long, default_value = "sync")]
    durability: String,
    /// Further setting of the spawned hub, as environment variable (may be repeated)
    #[arg(long = "hub-setting", value_name = "NAME=VALUE", value_parser = assignment)]
    hub_settings: Vec<(String, String)>,
    /// Folder of the spawned hub's store; a temporary one if not given
    #[arg(long, value_name = "DIR")]
    storage: Option<PathBuf>,

    /// Host of a running hub
    #[arg(long, default_value = "localhost")]
    host: String,
    /// Port of a running hub
    #[arg(long, default_value_t = 1883)]
    port: u16,
    /// PEM file with the root of a running hub's certificate
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Connection strings of a running hub's identities, one per line
    #[arg(long, value_name = "FILE")]
    identities: Option<PathBuf>,
    /// Process whose processor time is measured
    #[arg(long, value_name = "PID")]
    server_pid: Option<u32>,
    /// The server is some MQTT broker without authentication: plain topics, for comparison
    #[arg(long)]
    plain_broker: bool,
    /// Edge device of a running hub
    #[arg(long, default_value = EDGE)]
    edge: String,
    /// Writes the deployment manifest with the scenario's routes and ends
    #[arg(long, value_name = "FILE")]
    write_manifest: Option<PathBuf>,
}

fn assignment(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    scenario: String,
    publishers: usize,
    receivers: usize,
    payload_bytes: usize,
    qos: u8,
    window: Option<u16>,
    tls: bool,
    durability: Option<String>,
    connections_per_sec: f64,
    sent: u64,
    acknowledged: u64,
    received: u64,
    seconds: f64,
    messages_per_sec: f64,
    server_cpu_us_per_message: Option<f64>,
    server_cpu_cores: Option<f64>,
    server_resident_bytes: Option<u64>,
    generator_cpu_us_per_message: f64,
    publish_to_receive: Option<Percentiles>,
    publish_to_acknowledge: Option<Percentiles>,
    lost: u64,
    duplicates: u64,
    order_breaks: u64,
    ledger_gap: Option<i64>,
    failures: Vec<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(good) => ExitCode::from(u8::from(!good)),
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<bool, Box<dyn Error>> {
    if options.payload_bytes < STAMP_BYTES {
        return Err(format!("--payload-bytes must be at least {STAMP_BYTES}").into());
    }
    let mut plan = options.scenario.plan(&options.edge, options.devices, options.receivers);
    if let Some(file) = &options.write_manifest {
        fs::write(file, format!("{:#}\n", plan.manifest()))?;
        return Ok(true);
    }
    if options.plain_broker {
        plan = plan.for_plain_broker();
    }
    let hub = || HubOptions {
        tls: options.tls,
        durability: options.durability.clone(),
        settings: options.hub_settings.clone(),
        storage: options.storage.clone(),
    };
    let site = options.spawn.as_ref().map(|program| Site::start(program, &plan, &hub())).transpose()?;
    let identities = match (&site, &options.identities) {
        (Some(site), _) => site.identities.clone(),
        (None, Some(file)) => fs::read_to_string(file)?
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(Identity::parse)
            .collect::<Result<_, _>>()?,
        (None, None) if options.plain_broker => Vec::new(),
        (None, None) => return Err("give --spawn, --identities or --plain-broker".into()),
    };
    let target = target(options, site.as_ref())?;
    let server = site.as_ref().map(Site::hub_pid).or(options.server_pid);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(drive(options, &plan, &identities, target, server, site.as_ref()))?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(report.lost == 0
        && report.order_breaks == 0
        && report.failures.is_empty()
        && report.ledger_gap.unwrap_or(0) == 0)
}

fn target(options: &Options, site: Option<&Site>) -> Result<Target, Box<dyn Error>> {
    let address: SocketAddr = match site {
        Some(site) => site.mqtt,
        None => (options.host.as_str(), options.port)
            .to_socket_addrs()?
            .next()
            .ok_or("the host has no address")?,
    };
    if !options.tls {
        return Ok(Target { address, tls: None });
    }
    let root_file = site.map(|site| &site.root_file).or(options.ca.as_ref()).ok_or("--tls needs --ca")?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(root_file)? {
        roots.add(certificate?)?;
    }
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = match site {
        Some(site) => ServerName::from(site.mqtt.ip()),
        None => ServerName::try_from(options.host.clone())?,
    };
    Ok(Target { address, tls: Some((TlsConnector::from(Arc::new(config)), name)) })
}

/// Logs all parties in, a bounded number at the same time, in their order.
async fn login_all(
    target: &Target,
    parties: &[Party],
    identities: &[Identity],
    subscribe_qos: Option<u8>,
) -> Result<Vec<Client>, Box<dyn Error>> {
    let by_name: HashMap<_, _> = identities
        .iter()
        .map(|identity| ((&*identity.device, identity.module.as_deref()), identity))
        .collect();
    let gate = Arc::new(Semaphore::new(LOGINS_AT_ONCE));
    let mut logins = JoinSet::new();
    for (number, party) in parties.iter().enumerate() {
        let identity = by_name.get(&(&*party.device, party.module.as_deref()));
        if identity.is_none() && !identities.is_empty() {
            return Err(format!(
                "no connection string for {} {}",
                party.device,
                party.module.as_deref().unwrap_or("")
            )
            .into());
        }
        let (client_id, credentials) = match identity {
            Some(identity) => (identity.client_id(), Some((identity.user_name(), identity.token()))),
            None => (format!("{}-{}", party.device, party.module.as_deref().unwrap_or("d")), None),
        };
        let (target, gate, filter) = (target.clone(), Arc::clone(&gate), party.topic.clone());
        logins.spawn(async move {
            let _permit = gate.acquire().await;
            let credentials = credentials.as_ref().map(|(user, password)| (&**user, &**password));
            let subscription = subscribe_qos.map(|qos| (&*filter, qos));
            (number, Client::login(&target, &client_id, credentials, subscription).await)
        });
    }
    let mut clients: Vec<Option<Client>> = parties.iter().map(|_| None).collect();
    while let Some(done) = logins.join_next().await {
        let (number, client) = done?;
        clients[number] = Some(client.map_err(|error| format!("{}: {error}", parties[number].device))?);
    }
    Ok(clients.into_iter().flatten().collect())
}

async fn drive(
    options: &Options,
    plan: &Plan,
    identities: &[Identity],
    target: Target,
    server: Option<u32>,
    site: Option<&Site>,
) -> Result<Report, Box<dyn Error>> {
    let begin = Instant::now();
    let receivers = login_all(&target, &plan.receivers, identities, Some(options.qos)).await?;
    let publishers = login_all(&target, &plan.publishers, identities, None).await?;
    let connections = (receivers.len() + publishers.len()) as f64;
    let connections_per_sec = connections / begin.elapsed().as_secs_f64();

    let each = options.messages / plan.publishers.len() as u64;
    let all = each * plan.publishers.len() as u64;
    let wanted_each = if plan.hears == Hears::All { all } else { each };
    let (stop, stopped) = watch::channel(false);
    let clock = Arc::new(Clock::default());
    let (begin, usage_before, own_before) = (Instant::now(), measured(server)?, usage(std::process::id())?);
    let mut receiving = JoinSet::new();
    for client in receivers {
        let arrivals = Arrivals::new(plan.publishers.len(), each);
        receiving.spawn(client.receive(arrivals, wanted_each, Arc::clone(&clock), stopped.clone()));
    }
    let mut publishing = JoinSet::new();
    for (number, client) in publishers.into_iter().enumerate() {
        let publish = Publishing {
            publisher: u32::try_from(number)?,
            topic: plan.publishers[number].topic.clone(),
            messages: each,
            payload_bytes: options.payload_bytes,
            window: (options.qos == 1).then_some(options.window),
            rate: options.rate.map(|rate| rate / plan.publishers.len() as f64),
        };
        publishing.spawn(client.publish(publish, Arc::clone(&clock), stopped.clone()));
    }

    // Publishers keep their connections until told to stop, so the receivers say when all is done; without
    // receivers the acknowledgements do, and upstream the hub's own ledger.
    let (mut got, mut latency) = (Vec::new(), Histogram::default());
    let mut failures = Vec::new();
    let (mut last, mut last_at) = (0, Instant::now());
    let expected_progress = if plan.receivers.is_empty() { all } else { u64::MAX };
    let mut upstream_left = None;
    loop {
        tokio::select! {
            Some(done) = receiving.join_next() => {
                let done = done?;
                latency.merge(&done.latency);
                failures.extend(done.failure);
                got.push(done.arrivals);
                if receiving.is_empty() {
                    break;
                }
            }
            Some(done) = publishing.join_next() => {
                let done = done?;
                return Err(format!("a publisher ended early: {}", done.failure.unwrap_or_default()).into());
            }
            () = tokio::time::sleep(WATCH) => {}
        }
        let progress = clock.progress.load(Ordering::Relaxed);
        if progress >= expected_progress {
            match (options.scenario, site) {
                (Scenario::Upstream, Some(site)) => {
                    let left = site.queued()?;
                    if left == 0 {
                        upstream_left = Some(0);
                        break;
                    }
                    if upstream_left != Some(left) {
                        (upstream_left, last_at) = (Some(left), Instant::now());
                    }
                }
                _ => break,
            }
        }
        if progress != last {
            (last, last_at) = (progress, Instant::now());
        }
        if last_at.elapsed() > Duration::from_secs(options.stall_secs) {
            failures.push(format!("no progress for {} s", options.stall_secs));
            break;
        }
    }
    let elapsed = begin.elapsed();
    let (usage_after, own_after) = (measured(server)?, usage(std::process::id())?);
    stop.send_replace(true);
    while let Some(done) = receiving.join_next().await {
        let done = done?;
        latency.merge(&done.latency);
        failures.extend(done.failure);
        got.push(done.arrivals);
    }
    let (mut sent, mut acknowledged, mut order_breaks, mut acknowledge_latency) =
        (0, 0, 0, Histogram::default());
    while let Some(done) = publishing.join_next().await {
        let done = done?;
        sent += done.sent;
        acknowledged += done.acknowledged;
        order_breaks += done.order_breaks;
        acknowledge_latency.merge(&done.latency);
        failures.extend(done.failure);
    }

    let received: u64 = got.iter().map(|arrivals| arrivals.unique).sum();
    let lost = match (options.scenario, plan.receivers.is_empty()) {
        (Scenario::Upstream, _) => upstream_left.unwrap_or(0).unsigned_abs(),
        (_, true) => 0,
        (_, false) => wanted_each * plan.receivers.len() as u64 - received,
    };
    let handled = if plan.receivers.is_empty() { acknowledged.max(sent) - lost } else { received };
    let per_message = |cpu: Duration| cpu.as_secs_f64() * 1e6 / handled.max(1) as f64;
    let server_cpu = usage_before.zip(usage_after).map(|(before, after)| after.cpu - before.cpu);
    Ok(Report {
        scenario: format!("{:?}", options.scenario),
        publishers: plan.publishers.len(),
        receivers: plan.receivers.len(),
        payload_bytes: options.payload_bytes,
        qos: options.qos,
        window: (options.qos == 1).then_some(options.window),
        tls: options.tls,
        durability: site.map(|_| options.durability.clone()),
        connections_per_sec,
        sent,
        acknowledged,
        received: handled,
        seconds: elapsed.as_secs_f64(),
        messages_per_sec: handled as f64 / elapsed.as_secs_f64(),
        server_cpu_us_per_message: server_cpu.map(per_message),
        server_cpu_cores: server_cpu.map(|cpu| cpu.as_secs_f64() / elapsed.as_secs_f64()),
        server_resident_bytes: usage_after.map(|usage| usage.resident_bytes),
        generator_cpu_us_per_message: per_message(own_after.cpu - own_before.cpu),
        publish_to_receive: latency.percentiles(),
        publish_to_acknowledge: acknowledge_latency.percentiles(),
        lost,
        duplicates: got.iter().map(|arrivals| arrivals.duplicates).sum(),
        order_breaks: order_breaks
            + got.iter().map(|arrivals| arrivals.order_breaks + arrivals.foreign).sum::<u64>(),
        ledger_gap: site.map(Site::gap).transpose()?,
        failures,
    })
}

fn measured(server: Option<u32>) -> std::io::Result<Option<Usage>> {
    server.map(usage).transpose()
}
