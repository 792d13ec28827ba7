//! The load generator: drives a hub over MQTT or AMQP, alone or in turns with a peer, and prints one line of JSON per run.

mod drive;
mod options;
mod report;

use std::error::Error;
use std::fs;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser as _;
use edgehub_benches::amqp::Access;
use edgehub_benches::client::{STAMP_BYTES, Target};
use edgehub_benches::identity::Identity;
use edgehub_benches::peer::Peer;
use edgehub_benches::rabbitmq::{GUEST, RabbitMq};
use edgehub_benches::scenario::{Plan, Scenario};
use edgehub_benches::site::{CLOUD_HOST, HubOptions, Site};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio_rustls::TlsConnector;

use drive::Server;
use options::{Options, PeerKind, Protocol};

/// What one run brought.
struct Outcome {
    report: Value,
    /// Nothing was lost, repeated out of order, or unaccounted for.
    good: bool,
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
    let plan = options.scenario.plan(&options.edge, options.devices, options.receivers);
    if options.protocol == Protocol::Mqtt && options.per_connection > 1 {
        return Err("--per-connection: an MQTT connection has one client; use --protocol amqp".into());
    }
    if options.protocol == Protocol::Amqp && options.scenario == Scenario::Idle {
        return Err("--scenario idle speaks MQTT".into());
    }
    if let Some(file) = &options.write_manifest {
        fs::write(file, format!("{:#}\n", plan.manifest()))?;
        return Ok(true);
    }
    match (&options.spawn, options.peer) {
        (Some(program), Some(kind)) => in_turns(options, &plan, program, kind),
        (Some(program), None) => Ok(spawned_hub(options, &plan, program)?.good),
        (None, _) => Ok(running(options, plan)?.good),
    }
}

/// Hub and peer in turns, each started anew, so that what else the machine does falls on both.
fn in_turns(options: &Options, plan: &Plan, program: &Path, kind: PeerKind) -> Result<bool, Box<dyn Error>> {
    if matches!(options.scenario, Scenario::Upstream | Scenario::Store) {
        return Err(
            "--peer: a plain broker has no upstream and keeps nothing for who never subscribed".into()
        );
    }
    let plain_plan = match (kind, options.protocol) {
        (PeerKind::Mosquitto, Protocol::Mqtt) => plan.clone().for_plain_broker(),
        (PeerKind::RabbitMq, Protocol::Amqp) if !options.tls => plan.clone().for_rabbitmq(),
        (PeerKind::RabbitMq, Protocol::Amqp) => return Err("--peer rabbitmq is without --tls".into()),
        (PeerKind::Mosquitto, Protocol::Amqp) | (PeerKind::RabbitMq, Protocol::Mqtt) => {
            return Err(
                "--peer mosquitto needs --protocol mqtt, --peer rabbitmq needs --protocol amqp".into()
            );
        }
    };
    let (mut of_hub, mut of_peer, mut good) = (Vec::new(), Vec::new(), true);
    for _ in 0..options.rounds {
        let hub = spawned_hub(options, plan, program)?;
        let peer = match kind {
            PeerKind::Mosquitto => {
                let peer = Peer::mosquitto(options.tls)?;
                let target = target(options.tls, peer.address, Some(&peer.root_file), None)?;
                serve(options, &plain_plan, &plain_server("mosquitto", target, Some(peer.pid())))?
            }
            PeerKind::RabbitMq => {
                let peer = RabbitMq::start()?;
                let target = target(false, peer.address, None, None)?;
                serve(options, &plain_plan, &plain_server("rabbitmq", target, Some(peer.pid())))?
            }
        };
        good &= hub.good && peer.good;
        of_hub.push(hub.report);
        of_peer.push(peer.report);
    }
    println!("{}", report::comparison(&of_hub, &of_peer));
    Ok(good)
}

/// A broker that knows nothing of devices.
fn plain_server(name: &'static str, target: Target, pid: Option<u32>) -> Server<'static> {
    let access = Access::Plain { user: GUEST, password: GUEST };
    Server { name, target, access, identities: Vec::new(), pid, site: None }
}

fn spawned_hub(options: &Options, plan: &Plan, program: &Path) -> Result<Outcome, Box<dyn Error>> {
    let hub = HubOptions {
        tls: options.tls,
        amqp: options.protocol == Protocol::Amqp,
        durability: options.durability.clone(),
        settings: options.hub_settings.clone(),
        storage: options.storage.clone(),
    };
    let site = Site::start(program, plan, &hub)?;
    let address = match options.protocol {
        Protocol::Mqtt => site.mqtt,
        Protocol::Amqp => site.amqp,
    };
    let server = Server {
        name: "hub",
        target: target(options.tls, address, Some(&site.root_file), None)?,
        access: Access::Tokens(CLOUD_HOST.to_owned()),
        identities: site.identities.clone(),
        pid: Some(site.hub_pid()),
        site: Some(&site),
    };
    serve(options, &plan_of(options.protocol, plan, CLOUD_HOST), &server)
}

fn running(options: &Options, plan: Plan) -> Result<Outcome, Box<dyn Error>> {
    let identities = match &options.identities {
        Some(file) => fs::read_to_string(file)?
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(Identity::parse)
            .collect::<Result<_, _>>()?,
        None if options.plain_broker => Vec::new(),
        None => return Err("give --spawn, --identities or --plain-broker".into()),
    };
    let port = options.port.unwrap_or(match options.protocol {
        Protocol::Mqtt => 1883,
        Protocol::Amqp => 5672,
    });
    let address = (options.host.as_str(), port).to_socket_addrs()?.next().ok_or("the host has no address")?;
    let target = target(options.tls, address, options.ca.as_ref(), Some(&options.host))?;
    let pid = options.server_pid;
    if options.plain_broker {
        let plan = match options.protocol {
            Protocol::Mqtt => plan.for_plain_broker(),
            Protocol::Amqp => plan.for_rabbitmq(),
        };
        return serve(options, &plan, &plain_server("broker", target, pid));
    }
    let access = Access::Tokens(options.host.clone());
    let plan = plan_of(options.protocol, &plan, &options.host);
    serve(options, &plan, &Server { name: "hub", target, access, identities, pid, site: None })
}

/// A plan in the words of a protocol, for a hub.
fn plan_of(protocol: Protocol, plan: &Plan, host: &str) -> Plan {
    match protocol {
        Protocol::Mqtt => plan.clone(),
        Protocol::Amqp => plan.clone().for_amqp(host),
    }
}

/// One run, printed.
fn serve(options: &Options, plan: &Plan, server: &Server<'_>) -> Result<Outcome, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (text, good) = if options.scenario == Scenario::Idle {
        let report = runtime.block_on(drive::idle(options, plan, server))?;
        (serde_json::to_string(&report)?, report.lost == 0)
    } else {
        let report = runtime.block_on(drive::drive(options, plan, server))?;
        let good = report.lost == 0
            && report.order_breaks == 0
            && report.failures.is_empty()
            && report.ledger_gap.unwrap_or(0) == 0;
        (serde_json::to_string(&report)?, good)
    };
    println!("{text}");
    Ok(Outcome { report: serde_json::from_str(&text)?, good })
}

/// How to reach a server; its certificate is for its address if it has no name.
fn target(
    tls: bool,
    address: SocketAddr,
    root_file: Option<&PathBuf>,
    name: Option<&str>,
) -> Result<Target, Box<dyn Error>> {
    if !tls {
        return Ok(Target { address, tls: None });
    }
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(root_file.ok_or("--tls needs --ca")?)? {
        roots.add(certificate?)?;
    }
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = match name {
        None => ServerName::from(address.ip()),
        Some(name) => ServerName::try_from(name.to_owned())?,
    };
    Ok(Target { address, tls: Some((TlsConnector::from(Arc::new(config)), name)) })
}
