//! Owns the course of `edgehub cloud workload`: a local stand-in for the security daemon.
//!
//! It serves the workload API for the modules of one device, with the keys of the stand-in cloud's registry and an
//! authority of its own. Whoever may open the socket may sign for every module of the device: it is for tests and
//! development.

mod answer;

use std::convert::Infallible;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub_cloud::Registry;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::{debug, info, warn};

use crate::certificate::authority::Authority;
use crate::certificate::load_bundle;
use crate::cli::WorkloadOptions;
use crate::cloud::REGISTRY_FILE;
use crate::exit::Failure;
use crate::log;
use crate::run::{control_plane, until_signal};
use crate::settings::{LogFormat, LogLevel};

use answer::Daemon;

/// Folder of the authority, below the data folder.
const AUTHORITY_FOLDER: &str = "workload";
/// Connections at a time; further ones wait.
const CONNECTIONS_MAX: usize = 64;
/// Longest request head, bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Time to send a request head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest life of a connection.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);
/// Pause after the system had no room for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from serving.
pub fn serve(options: &WorkloadOptions) -> Result<(), Failure> {
    let level = LogLevel::parse(&options.log_level)
        .ok_or_else(|| Failure::Cloud(format!("{} is no log level", options.log_level)))?;
    // Only a second call in one process could fail; the first level stays then.
    let _ = log::install(level, LogFormat::Text);
    let registry = Registry::open(options.data_dir.join(REGISTRY_FILE), &options.host_name)
        .map_err(|error| Failure::Cloud(error.to_string()))?;
    let authority = Authority::open(&options.data_dir.join(AUTHORITY_FOLDER), "edgehub workload stand-in")?;
    // They are only passed on, but what cannot be read is better said here than by each client.
    load_bundle(options.trust_file.iter().map(std::path::PathBuf::as_path))?;
    let daemon = Arc::new(Daemon {
        registry,
        authority,
        device_id: options.device_id.clone(),
        trust_files: options.trust_file.clone(),
        certificate_life: Duration::from_secs(options.certificate_life_secs),
    });
    let control = control_plane()?;
    let ended = control.block_on(async {
        let listener = listen(&options.socket)?;
        info!(
            socket = %options.socket.display(), device = options.device_id,
            "Stand-in for the security daemon, for local use only"
        );
        tokio::select! {
            () = accept(listener, daemon) => Ok(()),
            ended = until_signal() => ended,
        }
    });
    // A client that finds no socket knows that nobody listens.
    let _ = std::fs::remove_file(&options.socket);
    info!("Shutdown complete.");
    ended
}

/// Opens the socket, for this user only. A file of the last run is replaced; one that somebody listens at is not.
fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let failed = |error: std::io::Error| {
        Failure::Cloud(format!("the socket {} cannot be opened: {error}", path.display()))
    };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(failed(std::io::ErrorKind::AddrInUse.into()));
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        Ok(_) => return Err(failed(std::io::ErrorKind::AlreadyExists.into())),
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

async fn accept(listener: UnixListener, daemon: Arc<Daemon>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _peer)) => {
                let daemon = Arc::clone(&daemon);
                tokio::spawn(async move {
                    connection(stream, daemon).await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(code = "EH7015", %error, "The socket cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, daemon: Arc<Daemon>) {
    let service = service_fn(move |request| {
        let daemon = Arc::clone(&daemon);
        async move { Ok::<_, Infallible>(daemon.answer(request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_AGE_MAX, connection).await {
        debug!(%error, "A connection ended");
    }
}
