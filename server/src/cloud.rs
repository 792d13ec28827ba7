//! Owns the course of `edgehub cloud`: the stand-in for the cloud hub, its identities and twins.

mod twin;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::head::mqtt::{self, MqttLimits, Peer};
use edgehub_broker::identity::{Authentication, HUB_MODULE_ID, Identity};
use edgehub_cloud::{Cloud, CloudOptions as OpenOptions, NewDevice, Registry};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::info;

use crate::certificate::{ServerCertificate, server_config};
use crate::cli::{
    CloudCommand, CloudOptions, ConnectionStringOptions, CreateIdentityOptions, IdentityCommand,
};
use crate::exit::Failure;
use crate::listen::{ConnectionGate, ConnectionThreads, TlsGate, bind};
use crate::log;
use crate::run::{control_plane, until_signal};
use crate::settings::{CertificateFiles, ListenAddress, LogFormat, LogLevel, TlsSettings, TlsVersions};
use crate::workload::stand_in;

/// The identities, below the data folder.
pub(crate) const REGISTRY_FILE: &str = "registry.json";
const TELEMETRY_FILE: &str = "telemetry.ndjson";
const TWINS_FOLDER: &str = "twins";

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
        Some(CloudCommand::ConnectionString(options)) => {
            println!("{}", connection_string(options)?);
            Ok(())
        }
        Some(CloudCommand::Twin(command)) => {
            println!("{}", twin::execute(command)?);
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

/// The connection string of services, or of an identity.
fn connection_string(options: &ConnectionStringOptions) -> Result<String, Failure> {
    let failed = |error: edgehub_cloud::RegistryError| Failure::Cloud(error.to_string());
    make_folder(&options.data_dir)?;
    let registry =
        Registry::open(options.data_dir.join(REGISTRY_FILE), &options.host_name).map_err(failed)?;
    match &options.device_id {
        None => registry.service_connection_string().map_err(failed),
        Some(device) => {
            let identity = named(device, options.module_id.as_deref())?;
            registry.connection_string(&identity).map_err(failed)
        }
    }
}

fn named(device: &str, module: Option<&str>) -> Result<Identity, Failure> {
    let identity = match module {
        None => Identity::device(device),
        Some(module) => Identity::module(device, module),
    };
    identity.map_err(|error| Failure::Cloud(error.to_string()))
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
    let _ = log::install(level, LogFormat::Text);
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
    let open = OpenOptions { twins_path: data_dir.join(TWINS_FOLDER), ..open };
    let cloud = Cloud::open(&open).map_err(|error| Failure::Cloud(error.to_string()))?;
    // So that services find their key.
    cloud.registry().service_connection_string().map_err(|error| Failure::Cloud(error.to_string()))?;
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
    let mqtt_listener = options
        .mqtt_listen
        .map(|address| bind("cloud mqtt", listen_address(address), BACKLOG))
        .transpose()?;
    let threads = ConnectionThreads::start(NonZeroUsize::MIN)?;
    info!(
        host_name = options.host_name,
        amqp = %amqp_listener.address(), https = %https_listener.address(),
        "Stand-in for the cloud hub, for local use only"
    );

    let control = control_plane()?;
    let (stop, mut stopped) = watch::channel(false);
    let connections = ConnectionGate::new(CONNECTIONS_MAX);
    let gate =
        TlsGate::new(tls.clone(), 1, tls_settings.handshake_timeout, tls_settings.handshakes_waiting_max);
    let gate = Arc::new(gate);
    let stopping = threads.stopping();
    let serving = cloud.clone();
    threads.serve_tls(amqp_listener, &connections, gate.clone(), move |stream, address, accepted_at| {
        let peer = peer(address, accepted_at.into());
        let (cloud, mut stopping) = (serving.clone(), stopping.clone());
        let stop = async move {
            stopping.wait().await;
        };
        async move { cloud.serve_amqp(stream, peer, stop).await }
    })?;
    if let Some(listener) = mqtt_listener {
        info!(mqtt = %listener.address(), "Devices may connect directly");
        let (backend, stopping) = (cloud.backend().clone(), threads.stopping());
        threads.serve_tls(listener, &connections, gate, move |stream, address, accepted_at| {
            let peer = peer(address, accepted_at.into());
            let (backend, mut stopping) = (backend.clone(), stopping.clone());
            let stop = async move {
                stopping.wait().await;
            };
            async move {
                let _ = mqtt::serve(stream, backend, MqttLimits::default(), peer, stop).await;
            }
        })?;
    }
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

fn peer(address: SocketAddr, accepted_at: tokio::time::Instant) -> Peer {
    Peer { address: Some(address), certificates: Vec::new(), accepted_at }
}

fn listen_address(address: SocketAddr) -> ListenAddress {
    ListenAddress { host: crate::settings::ListenHost::Address(address.ip()), port: address.port() }
}

fn make_folder(path: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(path)
        .map_err(|error| Failure::Cloud(format!("the folder {} cannot be created: {error}", path.display())))
}
