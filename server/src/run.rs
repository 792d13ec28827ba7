//! Owns the course of `edgehub run`: settings, build, serve, drain.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::admin::server as admin_server;
use crate::admin::socket::AdminListener;
use crate::admin::verbs::{Site, Verbs};
use crate::certificate::{ServerCertificate, load_bundle};
use crate::cli::{RunOptions, SettingsOptions};
use crate::exit::Failure;
use crate::hub::{RunningHub, Source, Trust};
use crate::listen::bind;
use crate::log::{self, recent};
use crate::manifest::Manifest;
use crate::metrics::{CommonLabels, Recorder};
use crate::pages::{Health, Pages, watch};
use crate::settings::{APPSETTINGS_FILE, AdminSocket, HubProof, Notice, Settings, Sources};
use crate::workload::{Provisioned, Renewal, WorkloadClient, provision};
use crate::{stop, store};

/// Threads of the control plane: pages, signals, upstream supervision. It may be slow.
const CONTROL_THREADS: usize = 1;

/// Everything that can fail because of what the operator gave, done; no port is open yet.
pub struct Prepared {
    /// The settings.
    pub settings: Settings,
    /// Where the hub's configuration comes from.
    pub source: Source,
    /// The server certificate; present whenever a TLS listener is on. One of the workload API comes with
    /// the start.
    pub certificate: Option<Arc<ServerCertificate>>,
    /// The trust bundle, by which clients and the upstream are judged; from the same place.
    pub bundle: Vec<CertificateDer<'static>>,
    /// Asks the workload API for certificate and bundle before they are due.
    pub renewal: Renewal,
    /// The recorder, installed; `None` when metrics are switched off.
    pub recorder: Option<Recorder>,
}

impl Prepared {
    /// The workload API, for a hub that has no key of its own.
    pub fn workload(&self) -> Option<WorkloadClient> {
        match &self.settings.hub.proof {
            HubProof::Key(_) => None,
            HubProof::Workload(workload) => Some(WorkloadClient::new(workload.clone())),
        }
    }
}

/// Runs the hub until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps the hub from starting.
pub fn run(options: &RunOptions) -> Result<(), Failure> {
    let started_at = OffsetDateTime::now_utc();
    let mut prepared = prepare(options)?;
    let pages_listener = bind("pages", prepared.settings.listen.metrics, prepared.settings.listen.backlog)?;
    let control = control_plane()?;
    // From here on: a signal that comes during the start is heard as soon as the hub is ready.
    let mut signals = control.block_on(async { Signals::watch() })?;
    let pages = Pages::new(prepared.recorder.clone());
    info!(address = %pages_listener.address(), "Pages are open");
    let mut serving = control.spawn(Arc::clone(&pages).serve(pages_listener));
    if !control.block_on(provide(&mut prepared, &pages, &mut signals)) {
        info!("Shutdown complete.");
        return Ok(());
    }
    let running = RunningHub::start(&prepared, control.handle())?;
    let (hub, stored) = (running.hub().clone(), running.store().clone());
    let configuration = running.configuration();
    pages.set_status(Box::new(move || {
        // A status is plain data; it cannot fail to be JSON.
        let mut status = serde_json::to_value(hub.status()).unwrap_or_default();
        status["configuration"] = serde_json::to_value(&*configuration.borrow()).unwrap_or_default();
        store::add_to_status(status, &stored)
    }));
    let (hub, stored) = (running.hub().clone(), running.store().clone());
    let certificate = prepared.certificate.clone();
    pages.set_observer(Box::new(move || {
        hub.observe();
        store::observe(&stored);
        watch::observe_certificate(certificate.as_ref());
        recent::observe();
    }));
    let (hub, stored, certificate) =
        (running.hub().clone(), running.store().clone(), prepared.certificate.clone());
    let configuration = running.configuration();
    pages.set_conditions(Box::new(move || {
        // A copy: nothing is held while the hub is looked at.
        let state = configuration.borrow().clone();
        watch::of(&hub, &stored, &state, certificate.as_ref())
    }));
    control.spawn(Arc::clone(&pages).watch());
    let admin = control.block_on(open_admin_socket(&prepared.settings.admin))?;
    let admin = admin.map(|socket| {
        let site = Site {
            pages: Arc::clone(&pages),
            iothub: prepared.settings.hub.iothub_host.to_string(),
            configuration: running.configuration(),
            started_at,
        };
        let verbs = Arc::new(Verbs::new(running.hub().clone()).at(site));
        control.spawn(admin_server::serve(socket, verbs))
    });
    let configured = control.block_on(async {
        tokio::select! {
            () = running.configured(&pages) => Ok(true),
            ended = until_stopped(&mut signals, &mut serving, &prepared, running.trust()) => ended.map(|()| false),
        }
    });
    let ended = match configured {
        Ok(true) => running.open_heads(&prepared).and_then(|()| {
            pages.set_health(Health::Ready);
            info!("The hub is ready");
            control.block_on(until_stopped(&mut signals, &mut serving, &prepared, running.trust()))
        }),
        Ok(false) => Ok(()),
        Err(failure) => Err(failure),
    };
    pages.set_health(Health::Stopping);
    let limit = prepared.settings.shutdown_wait;
    info!(limit_secs = limit.as_secs(), "Stopping: nothing more is accepted, what is under way is finished");
    stop::drain(running.hub(), limit, control.handle(), async move { signals.stop().await });
    if let Some(admin) = admin {
        admin.abort();
        // Waits for the socket's file to be removed; that it was aborted is what we asked for.
        let _ = control.block_on(admin);
    }
    running.stop(control.handle());
    control.shutdown_background();
    ended?;
    info!("Shutdown complete.");
    Ok(())
}

/// Gets certificate and trust bundle from the workload API, for a hub that has them from there; the health page says
/// what it waits for. False when a signal asked to stop meanwhile.
async fn provide(prepared: &mut Prepared, pages: &Pages, signals: &mut Signals) -> bool {
    let Some(client) = prepared.workload() else { return true };
    let name = prepared.settings.hub.own_host.as_ref().map(ToString::to_string);
    let name = name.filter(|_| prepared.settings.listen.uses_tls());
    let told = |reason| pages.set_health(Health::Starting(reason));
    let Provisioned { certificate, bundle } = tokio::select! {
        provisioned = provision(&client, name.as_deref(), told) => provisioned,
        () = signals.stop() => return false,
    };
    pages.set_health(Health::Starting("the hub is starting".into()));
    prepared.certificate = certificate.map(Arc::new);
    prepared.bundle = bundle;
    true
}

/// The operator's socket, if there is to be one. A hub without it still does its work, so only one that was asked
/// for by name ends the start.
async fn open_admin_socket(setting: &AdminSocket) -> Result<Option<AdminListener>, Failure> {
    let opened = match setting {
        AdminSocket::Off => return Ok(None),
        AdminSocket::Given(path) => AdminListener::bind(path).await?,
        AdminSocket::Default(path) => match AdminListener::bind(path).await {
            Ok(opened) => opened,
            Err(error) => {
                warn!(code = "EH1001", "{error}; the verbs of the operator cannot reach this hub");
                return Ok(None);
            }
        },
    };
    info!(path = %opened.path().display(), "The admin socket is open");
    Ok(Some(opened))
}

/// Settings, log, manifest, certificate and metrics, in this order.
///
/// # Errors
/// The first that cannot be used.
pub fn prepare(options: &RunOptions) -> Result<Prepared, Failure> {
    let (settings, notices) = settings(&options.settings)?;
    if log::install(settings.log_level, settings.log_format).is_err() {
        warn!(code = "EH1002", "the log was installed already; RuntimeLogLevel has no effect");
    }
    info!("edgehub version - {}", env!("CARGO_PKG_VERSION"));
    for notice in &notices {
        if notice.is_warning() {
            warn!(code = "EH1003", "{notice}");
        } else {
            info!("{notice}");
        }
    }
    let manifest = options.manifest.as_deref().map(Manifest::read).transpose()?;
    for problem in manifest.iter().flat_map(|manifest| &manifest.warnings) {
        warn!(code = "EH1004", "manifest, {problem}");
    }
    let source = Source::choose(&settings, manifest.as_ref())?;
    let certificate = certificate(&settings)?;
    let recorder = settings.metrics.enabled.then(|| install_recorder(&settings));
    let bundle = load_bundle(settings.certificates.as_ref().and_then(|files| files.trust_bundle.as_deref()))?;
    let renewal = Renewal::default();
    Ok(Prepared { settings, source, certificate, bundle, renewal, recorder })
}

/// The settings out of file, environment and flags.
///
/// # Errors
/// The first setting that cannot be used.
pub fn settings(options: &SettingsOptions) -> Result<(Settings, Vec<Notice>), Failure> {
    Ok(Settings::load(sources(options.config.as_deref(), options.flags()))?)
}

/// Where settings come from: the files, the environment of this process, and flags.
pub fn sources(file: Option<&Path>, flags: Vec<(String, String, String)>) -> Sources<'_> {
    // Variables that are not text are none of ours: all our values are.
    let environment = std::env::vars_os()
        .filter_map(|(name, text)| Some((name.into_string().ok()?, text.into_string().ok()?)))
        .collect();
    let program = std::env::current_exe().ok();
    let appsettings = program.and_then(|program| Some(program.parent()?.join(APPSETTINGS_FILE)));
    Sources { appsettings, file, environment, flags }
}

/// The runtime of everything that is not a connection.
///
/// # Errors
/// The system gives no thread or no event queue.
pub fn control_plane() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(|source| Failure::System { what: "the control plane cannot be started", source })
}

fn certificate(settings: &Settings) -> Result<Option<Arc<ServerCertificate>>, Failure> {
    let Some(files) = &settings.certificates else { return Ok(None) };
    let certificate = ServerCertificate::load(files)?;
    if let Some(validity) = certificate.validity() {
        match validity.warning(OffsetDateTime::now_utc()) {
            Some(text) => warn!(code = "EH1005", "{text}"),
            None => info!("the server certificate expires at {}", validity.not_after),
        }
    }
    Ok(Some(Arc::new(certificate)))
}

fn install_recorder(settings: &Settings) -> Recorder {
    let common = CommonLabels {
        iothub: settings.hub.iothub_host.to_string(),
        edge_device: settings.hub.device_id.to_string(),
        instance_number: uuid::Uuid::new_v4(),
    };
    let recorder = Recorder::new(&common, settings.metrics.message_size_window);
    if recorder.install().is_err() {
        warn!(code = "EH1006", "a metrics recorder was installed already; the metrics page stays empty");
    }
    recorder
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// Signals cannot be watched.
pub async fn until_signal() -> Result<(), Failure> {
    Signals::watch()?.stop().await;
    Ok(())
}

/// The signals that the program knows, watched from here on: one that comes while nobody waits is not lost.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn watch() -> Result<Self, Failure> {
        let unwatched = |source| Failure::System { what: "signals cannot be watched", source };
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(unwatched)?,
            interrupt: signal(SignalKind::interrupt()).map_err(unwatched)?,
            hangup: signal(SignalKind::hangup()).map_err(unwatched)?,
        })
    }

    /// Waits for one that asks to stop.
    async fn stop(&mut self) {
        tokio::select! {
            _received = self.terminate.recv() => {}
            _received = self.interrupt.recv() => {}
        }
    }
}

/// Waits for a signal that asks to stop, or for the end of the pages. SIGHUP puts renewed certificate files in
/// force, or asks the workload API for renewed ones: new handshakes get the new certificate, open connections stay.
async fn until_stopped(
    signals: &mut Signals,
    serving: &mut JoinHandle<std::io::Result<()>>,
    prepared: &Prepared,
    trust: &Trust,
) -> Result<(), Failure> {
    let Signals { terminate, interrupt, hangup } = signals;
    loop {
        tokio::select! {
            _received = terminate.recv() => return Ok(()),
            _received = interrupt.recv() => return Ok(()),
            _received = hangup.recv() => reload_certificates(prepared, trust),
            served = &mut *serving => return match served {
                Ok(Err(source)) => Err(Failure::System { what: "the pages cannot be served", source }),
                Ok(Ok(())) | Err(_) => Ok(()),
            },
        }
    }
}

fn reload_certificates(prepared: &Prepared, trust: &Trust) {
    prepared.renewal.want();
    let (Some(certificate), Some(files)) = (&prepared.certificate, &prepared.settings.certificates) else {
        return;
    };
    if files.trust_bundle.is_some()
        && let Err(error) = load_bundle(files.trust_bundle.as_deref()).and_then(|bundle| trust.take(bundle))
    {
        warn!(code = "EH1016", "{error}; the trust bundle before stays in force");
    }
    match certificate.reload(files) {
        Ok(()) => {
            let expiry = certificate.validity().map(|validity| validity.not_after.to_string());
            info!(expires_at = expiry.unwrap_or_default(), "The renewed server certificate is in force");
        }
        Err(error) => warn!(code = "EH1007", "{error}; the certificate before stays in force"),
    }
}
