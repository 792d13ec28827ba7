//! The load generator: drives a hub over MQTT, alone or in turns with a peer, and prints one line of JSON per run.

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
use edgehub_benches::client::{STAMP_BYTES, Target};
use edgehub_benches::identity::Identity;
use edgehub_benches::peer::Peer;
use edgehub_benches::scenario::{Plan, Scenario};
use edgehub_benches::site::{HubOptions, Site};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio_rustls::TlsConnector;

use drive::Server;
use options::{Options, PeerKind};

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
    let PeerKind::Mosquitto = kind;
    let plain_plan = plan.clone().for_plain_broker();
    let (mut of_hub, mut of_peer, mut good) = (Vec::new(), Vec::new(), true);
    for _ in 0..options.rounds {
        let hub = spawned_hub(options, plan, program)?;
        let peer = Peer::mosquitto(options.tls)?;
        let server = Server {
            name: "mosquitto",
            target: target(options.tls, peer.address, Some(&peer.root_file), None)?,
            identities: Vec::new(),
            pid: Some(peer.pid()),
            site: None,
        };
        let peer = serve(options, &plain_plan, &server)?;
        good &= hub.good && peer.good;
        of_hub.push(hub.report);
        of_peer.push(peer.report);
    }
    println!("{}", report::comparison(&of_hub, &of_peer));
    Ok(good)
}

fn spawned_hub(options: &Options, plan: &Plan, program: &Path) -> Result<Outcome, Box<dyn Error>> {
    let hub = HubOptions {
        tls: options.tls,
        durability: options.durability.clone(),
        settings: options.hub_settings.clone(),
        storage: options.storage.clone(),
    };
    let site = Site::start(program, plan, &hub)?;
    let server = Server {
        name: "hub",
        target: target(options.tls, site.mqtt, Some(&site.root_file), None)?,
        identities: site.identities.clone(),
        pid: Some(site.hub_pid()),
        site: Some(&site),
    };
    serve(options, plan, &server)
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
    let plan = if options.plain_broker { plan.for_plain_broker() } else { plan };
    let address =
        (options.host.as_str(), options.port).to_socket_addrs()?.next().ok_or("the host has no address")?;
    let server = Server {
        name: if options.plain_broker { "broker" } else { "hub" },
        target: target(options.tls, address, options.ca.as_ref(), Some(&options.host))?,
        identities,
        pid: options.server_pid,
        site: None,
    };
    serve(options, &plan, &server)
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
