//! A local stand-in for the cloud hub: identity registry, endpoint for edge hubs and devices, telemetry log.
//!
//! It is for local use: demonstrations, tests, and sites without a cloud. Edge hubs and devices talk to it as to the
//! cloud hub. The crate names no environment variable and opens no files but those in [`CloudOptions`].

pub mod backend;
pub mod cloud_to_device;
mod http;
pub mod registry;
mod scope_api;
mod service;
mod stall;
pub mod telemetry;
pub mod twin;
mod upgrade;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use edgehub_broker::head::mqtt::Peer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;

pub use backend::{CloudBackend, CloudClient};
pub use http::{BODY_BYTES_MAX, CONNECTIONS_MAX, HEAD_BYTES_MAX};
pub use registry::{NewDevice, Registry, RegistryError};
pub use telemetry::{TelemetryError, TelemetryLog, TelemetryReader};
pub use twin::{Twin, TwinStore};

/// What the stand-in needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudOptions {
    /// The file of the identities; created by the first change.
    pub registry_path: PathBuf,
    /// The file of the telemetry; created when missing.
    pub telemetry_path: PathBuf,
    /// The folder of the twins; created by the first change.
    pub twins_path: PathBuf,
    /// The name that clients call the cloud hub by, and that their tokens are made for.
    pub host_name: String,
    /// Largest telemetry file; at the limit publishers are refused.
    pub telemetry_bytes_max: u64,
    /// Whether `GET /telemetry` answers other machines than this one. It asks for no credentials.
    pub telemetry_from_anywhere: bool,
    /// Most identities connected at a time.
    pub clients_max: usize,
}

impl CloudOptions {
    /// Twins beside the registry, and the usual limits: 16 GiB of telemetry, shown to this machine only, 10,000 clients.
    pub fn new(
        registry_path: impl Into<PathBuf>,
        telemetry_path: impl Into<PathBuf>,
        host_name: impl Into<String>,
    ) -> Self {
        let registry_path = registry_path.into();
        Self {
            twins_path: registry_path.with_file_name("twins"),
            registry_path,
            telemetry_path: telemetry_path.into(),
            host_name: host_name.into(),
            telemetry_bytes_max: 16 * 1_024 * 1_024 * 1_024,
            telemetry_from_anywhere: false,
            clients_max: 10_000,
        }
    }
}

/// Why the stand-in cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    /// The identities.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The telemetry.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
}

/// The stand-in, opened. Clones share it.
#[derive(Debug, Clone)]
pub struct Cloud {
    state: Arc<http::HttpState>,
    backend: CloudBackend,
}

impl Cloud {
    /// Opens registry and log.
    ///
    /// # Errors
    /// When a file cannot be opened or is damaged.
    pub fn open(options: &CloudOptions) -> Result<Self, CloudError> {
        let registry = Arc::new(Registry::open(&options.registry_path, &options.host_name)?);
        let telemetry = TelemetryLog::open(&options.telemetry_path, options.telemetry_bytes_max)?;
        let twins = Arc::new(TwinStore::new(&options.twins_path));
        let backend = CloudBackend::new(registry.clone(), telemetry.clone(), twins, options.clients_max);
        let state = http::HttpState {
            registry,
            backend: backend.clone(),
            telemetry,
            telemetry_from_anywhere: options.telemetry_from_anywhere,
        };
        Ok(Self { state: Arc::new(state), backend })
    }

    /// The identities.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.state.registry
    }

    /// The telemetry.
    pub fn telemetry(&self) -> &TelemetryLog {
        &self.state.telemetry
    }

    /// Who serves the clients of the protocol heads.
    pub fn backend(&self) -> &CloudBackend {
        &self.backend
    }

    /// Serves one AMQP connection to its end, of a device or hub, or of a service. `stop` resolves when the process stops.
    pub async fn serve_amqp<S>(&self, stream: S, peer: Peer, stop: impl Future<Output = ()> + Send)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let (registry, backend) = (self.state.registry.clone(), self.backend.clone());
        service::amqp::serve_connection(stream, registry, backend, peer, stop).await;
    }

    /// Serves HTTPS (scope calls, service calls, WebSockets, telemetry, banner) on a listener until `stop` resolves; then open connections are cut.
    /// Meanwhile clients are told of twins that another process changes.
    pub async fn serve_https(
        &self,
        listener: TcpListener,
        tls: Arc<rustls::ServerConfig>,
        stop: impl Future<Output = ()>,
    ) {
        tokio::select! {
            () = http::serve(self.state.clone(), listener, tls, stop) => {}
            () = self.backend.watch_twins() => {}
        }
    }
}
