//! Owns the course of `edgehub cloud`: the stand-in for the cloud hub, and its identities.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::head::amqp::{self, AmqpLimits};
use edgehub_broker::head::mqtt::Peer;
use edgehub_broker::identity::{Authentication, HUB_MODULE_ID, Identity};
use edgehub_cloud::{Cloud, CloudOptions as OpenOptions, NewDevice, Registry};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::info;

use crate::certificate::{ServerCertificate, server_config};
use crate::cli::{CloudCommand, CloudOptions, CreateIdentityOptions, IdentityCommand};
use crate::exit::Failure;
use crate::listen::{ConnectionGate, ConnectionThreads, TlsGate, bind};
use crate::log;
use crate::run::{control_plane, until_signal};
use crate::settings::{CertificateFiles, ListenAddress, LogLevel, TlsSettings, TlsVersions};
use crate::workload::stand_in;

/// The identities, below the data folder.
pub(crate) const REGISTRY_FILE: &str = "registry.json";
const TELEMETRY_FILE: &str = "telemetry.ndjson";

/// Connections not yet accepted.
const BACKLOG: u32 = 128;

/// Open AMQP connections.
const CONNECTIONS_MAX: usize = 1_000;

/// How long connections may take to end at stop.
const STOP_SECS: u64 = 5;

/// Does what `edgehub cloud …` asks for.
///
/// # Errors
/// What keeps it from doing so.
pub fn execute(options: &CloudOptions) -> Result<(), Failure> {
    match &options.command {
        None => serve(options),
        Some(CloudCommand::Workload(options)) => stand_in::serve(options),
        Some(CloudCommand::Identity(IdentityCommand::Create(options))) => {
            println!("{}", create_identity(options)?);
            Ok(())
        }
    }
}

/// Creates an identity; gives its connection string. For an edge device that is the string of its hub module.
///
/// # Errors
/// When it exists, its parent or device does not, or the registry cannot be written.
pub fn create_identity(options: &CreateIdentityOptions) -> Result<String, Failure> {
    let failed = |error: edgehub_cloud::RegistryError| Failure::Cloud(error.to_string());
    make_folder(&options.data_dir)?;
    let registry =
        Registry::open(options.data_dir.join(REGISTRY_FILE), &options.host_name).map_err(failed)?;
    let identity = match &options.module_id {
        Some(module) => registry.create_module(&options.device_id, module).map_err(failed)?.identity,
        None => {
            let device = NewDevice {
                id: &options.device_id,
                edge: options.edge_enabled,
                parent: options.parent.as_deref(),
            };
            let authentication = by_certificate(options)?;
            let device = registry.create_device(device).map_err(failed)?.identity;
            if let Some(authentication) = authentication {
                registry.set_authentication(&device, authentication).map_err(failed)?;
            }
            match options.edge_enabled {
                false => device,
                true => Identity::module(device.device_id(), HUB_MODULE_ID)
                    .map_err(|error| Failure::Cloud(error.to_string()))?,
            }
        }
    };
    registry.connection_string(&identity).map_err(failed)
}

/// How the device proves itself, unless it does so by keys.
fn by_certificate(options: &CreateIdentityOptions) -> Result<Option<Authentication>, Failure> {
    if options.x509_authority {
        return Ok(Some(Authentication::CertificateAuthority));
    }
    let hex =
        |text: &String| matches!(text.len(), 40 | 64) && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    match &options.x509_thumbprint[..] {
        [] => Ok(None),
        [primary, others @ ..] if others.len() < 2 && options.x509_thumbprint.iter().all(hex) => {
            Ok(Some(Authentication::CertificateThumbprint {
                primary: Some(primary.as_str().into()),
                secondary: others.first().map(|text| text.as_str().into()),
            }))
        }
        _ => Err(Failure::Cloud("--x509-thumbprint takes 40 or 64 hex digits, twice at most".into())),
    }
}

fn serve(options: &CloudOptions) -> Result<(), Failure> {
    let level = LogLevel::parse(&options.log_level)
        .ok_or_else(|| Failure::Cloud(format!("{} is no log level", options.log_level)))?;
    // Only a second call in one process could fail; the first level stays then.
    let _ = log::install(level);
    let required = |path: &Option<std::path::PathBuf>, name: &str| {
        path.clone().ok_or_else(|| Failure::Cloud(format!("{name} is missing")))
    };
    let data_dir = required(&options.data_dir, "--data-dir")?;
    let files = CertificateFiles {
        certificate: required(&options.certificate, "--certificate")?,
        private_key: required(&options.private_key, "--private-key")?,
        trust_bundle: None,
    };
    make_folder(&data_dir)?;
    let open = OpenOptions::new(
        data_dir.join(REGISTRY_FILE),
        data_dir.join(TELEMETRY_FILE),
        options.host_name.clone(),
    );
    let cloud = Cloud::open(&open).map_err(|error| Failure::Cloud(error.to_string()))?;
    let tls_settings = TlsSettings {
        versions: TlsVersions { tls12: true, tls13: true },
        client_certificates: false,
        renew_after_max: None,
        handshake_timeout: Duration::from_secs(10),
        handshakes_waiting_max: 100,
    };
    let tls = server_config(Arc::new(ServerCertificate::load(&files)?), &tls_settings)?;
    let amqp_listener = bind("cloud amqp", listen_address(options.amqp_listen), BACKLOG)?;
    let https_listener = bind("cloud https", listen_address(options.https_listen), BACKLOG)?;
    let threads = ConnectionThreads::start(NonZeroUsize::MIN)?;
    info!(
        host_name = options.host_name,
        amqp = %amqp_listener.address(), https = %https_listener.address(),
        "Stand-in for the cloud hub, for local use only"
    );

    let control = control_plane()?;
    let (stop, mut stopped) = watch::channel(false);
    let backend = cloud.backend().clone();
    let gate =
        TlsGate::new(tls.clone(), 1, tls_settings.handshake_timeout, tls_settings.handshakes_waiting_max);
    let stopping = threads.stopping();
    threads.serve_tls(
        amqp_listener,
        &ConnectionGate::new(CONNECTIONS_MAX),
        Arc::new(gate),
        move |stream, address, accepted_at| {
            let peer =
                Peer { address: Some(address), certificates: Vec::new(), accepted_at: accepted_at.into() };
            let mut stopping = stopping.clone();
            let shutdown = async move {
                stopping.wait().await;
            };
            amqp::serve(stream, backend.clone(), AmqpLimits::default(), peer, shutdown)
        },
    )?;
    let ended = control.block_on(async {
        let listener = TcpListener::from_std(https_listener.into_socket())
            .map_err(|source| Failure::System { what: "the HTTPS endpoint cannot be served", source })?;
        let https = cloud.serve_https(listener, tls, async move {
            // The sender lives until the end of this function.
            let _ = stopped.wait_for(|stop| *stop).await;
        });
        tokio::select! {
            () = https => Ok(()),
            ended = until_signal() => ended,
        }
    });
    stop.send_replace(true);
    threads.stop(Duration::from_secs(STOP_SECS));
    info!("Shutdown complete.");
    ended
}

fn listen_address(address: SocketAddr) -> ListenAddress {
    ListenAddress { host: crate::settings::ListenHost::Address(address.ip()), port: address.port() }
}

fn make_folder(path: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(path)
        .map_err(|error| Failure::Cloud(format!("the folder {} cannot be created: {error}", path.display())))
}
