//! Owns the assembly of a running hub out of settings: store, identities, upstream, routes, heads.

mod configuration;
mod heads;
mod trust;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::configuration::{Configuration, ConfigurationState};
use edgehub_broker::delivery::{BackoffOptions, ModulePumpOptions};
use edgehub_broker::dial::Transport;
use edgehub_broker::hub::{Authenticator, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::{
    Hosts, Identity, REFRESH_METHOD, RefreshOptions, ScopeCache, ScopeCalls, ScopeClient, ScopeClientOptions,
    ScopeRefresher, ScopeService, Signer, SymmetricKey, TokenSource,
};
use edgehub_broker::twin::TwinCipher;
use edgehub_broker::upstream::plain::PlainAmqp;
use edgehub_broker::upstream::{UpstreamKind, UpstreamOptions, UpstreamState, UpstreamStatus};
use edgehub_storage::{Durability, KeyedState, Store, StoreLimits, StoreOptions, Table};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::certificate::{UpstreamTrust, load_bundle};
use crate::exit::Failure;
use crate::listen::ConnectionThreads;
use crate::pages::Pages;
use crate::run::Prepared;
use crate::settings::{self, HubProof, Settings, StoreKind, UpstreamProtocol, UpstreamSettings};
use crate::stop;
use crate::workload::{Keeper, WorkloadCipher, WorkloadClient};

pub use configuration::Source;
pub use trust::Trust;
use trust::client_trust;

/// Key of the identity cache's snapshot in the store.
const SCOPE_KEY: &[u8] = b"scope";

/// How long the upstream connection may take to close.
const UPSTREAM_STOP_SECS: u64 = 5;

/// A hub with its threads.
pub struct RunningHub {
    hub: Hub,
    store: Store,
    configuration: Configuration,
    authenticator: Arc<dyn Authenticator>,
    scope_calls: Arc<dyn ScopeCalls>,
    trust: Trust,
    threads: ConnectionThreads,
    delivery: Runtime,
    stop_timeout: Duration,
}

impl RunningHub {
    /// Builds the hub, its ports still closed; what it knows from its last run is in force. `control` runs what may
    /// be slow.
    ///
    /// # Errors
    /// The first part that cannot be built; nothing listens then.
    pub fn start(prepared: &Prepared, control: &Handle) -> Result<Self, Failure> {
        let settings = &prepared.settings;
        let store = open_store(settings)?;
        let edge_device = identity(settings.hub.device_id.as_str(), None)?;
        let hub_module = identity(settings.hub.device_id.as_str(), Some("$edgeHub"))?;
        let scope = Arc::new(ScopeCache::new(&edge_device));
        let known = control.block_on(restore_scope(&scope, &store.keyed(Table::Identities)));
        info!(identities = known, "Identities known from the last run");

        let bundle = &prepared.bundle;
        let upstream_file = settings.upstream.trust_file.as_deref();
        let (upstream_trust, tls_warnings) =
            UpstreamTrust::new(bundle.iter().cloned().chain(load_bundle(upstream_file)?))?;
        tls_warnings.iter().for_each(|text| warn!(code = "EH5006", "{text}"));
        let upstream_trust = Arc::new(upstream_trust);
        let client_tls = upstream_trust.config()?;
        let iothub = settings.hub.iothub_host.as_str();
        let tokens = Arc::new(TokenSource::new(iothub, &hub_module, signer(settings)?));
        let refresher = refresher(prepared, &edge_device, &scope, client_tls.clone(), tokens.clone())?;
        let trust = Trust::new(upstream_trust, upstream_file, refresher.clone());

        let delivery = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("delivery")
            .enable_all()
            .build()
            .map_err(|source| Failure::System { what: "the delivery thread cannot be started", source })?;
        let way = way_up(&settings.upstream);
        let upstream = UpstreamOptions {
            kind: way.kind,
            target: None,
            host: way.host,
            port: way.port,
            transport: way.transport,
            hub_host: iothub.to_owned(),
            identity: hub_module,
            tls: client_tls,
            tokens,
            scope: scope.clone(),
            batch_max: usize::from(settings.upstream.batch_max),
            operation_timeout: settings.upstream.operation_timeout,
            idle_timeout: Duration::from_secs(60),
            backoff: BackoffOptions::default(),
            lower_share_percent: settings.delivery.lower_share_percent,
            gives_up_out_of_scope: settings.scope.tracks_senders,
            product_info: concat!("edgehub/", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let options = HubOptions {
            edge_device,
            clients_max: settings.listen.clients_max,
            module_pump: ModulePumpOptions {
                window: usize::from(settings.delivery.module_window),
                ack_timeout: settings.delivery.ack_timeout,
                backoff: BackoffOptions::default(),
                lower_share_percent: settings.delivery.lower_share_percent,
            },
            upstream: Some(upstream),
            control: ControlOptions {
                reported_pause: settings.configuration.report_pause,
                twin_sync_period_min: settings.configuration.twin_sync_period_min,
                twin_cipher: twin_cipher(prepared),
                ..ControlOptions::default()
            },
            overflow: settings.store.overflow,
            limits: limits(settings),
        };
        let hub = Hub::start(options, store.clone(), refresher.clone(), delivery.handle().clone());
        control.spawn(follow_scope(hub.clone(), refresher.clone(), store.keyed(Table::Identities)));
        if let Some(upstream) = hub.upstream() {
            control.spawn(refresh_on_contact(refresher.clone(), upstream));
        }
        let by_method = refresher.clone();
        hub.serve_method(REFRESH_METHOD, move |payload| {
            let refresher = by_method.clone();
            async move { refresher.refresh_by_method(&payload).await }
        });
        let authenticator: Arc<dyn Authenticator> = refresher.clone();
        let scope_calls = Arc::new(ScopeService::new(refresher.clone()));
        control.spawn(async move { refresher.run().await });
        let configuration = configuration::start(&hub, &prepared.source, settings, &store, control)?;
        let threads = ConnectionThreads::start(settings.listen.threads)?;
        let stop_timeout = settings.listen.stop_timeout;
        let running = Self {
            hub,
            store,
            configuration,
            authenticator,
            scope_calls,
            trust,
            threads,
            delivery,
            stop_timeout,
        };
        running.keep_certificates(prepared, control);
        Ok(running)
    }

    /// Returns as soon as a configuration is in force; the pages say what it waits for.
    pub async fn configured(&self, pages: &Pages) {
        configuration::wait(self.configuration.state(), self.hub.upstream(), pages).await;
    }

    /// Opens the ports, to be called when a configuration is in force.
    ///
    /// # Errors
    /// The first port that cannot be had.
    pub fn open_heads(&self, prepared: &Prepared) -> Result<(), Failure> {
        heads::open(&self.hub, &self.threads, prepared, self.authenticator.clone(), self.scope_calls.clone())
    }

    /// How it stands with the configuration, for the pages.
    pub fn configuration(&self) -> watch::Receiver<ConfigurationState> {
        self.configuration.state()
    }

    /// The hub itself, for the pages.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// By whom the hub lets itself be convinced, for renewed files.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The store, for the pages.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Lets certificate and trust bundle follow the workload API, where the hub has them from there.
    fn keep_certificates(&self, prepared: &Prepared, control: &Handle) {
        let Some(client) = prepared.workload() else { return };
        let trust = self.trust.clone();
        let name = prepared.settings.hub.own_host.as_ref().map(ToString::to_string);
        let keeper = Keeper {
            client,
            certificate: prepared.certificate.clone().zip(name),
            renew_after_max: prepared.settings.tls.renew_after_max,
            bundle: Box::new(move |bundle| trust.take(bundle)),
            renewal: prepared.renewal.clone(),
        };
        control.spawn(keeper.run());
    }

    /// Closes the connections, the upstream and the store, in this order. Blocks.
    pub fn stop(self, control: &Handle) {
        drop(self.configuration);
        control.block_on(self.hub.stop(Duration::from_secs(UPSTREAM_STOP_SECS)));
        self.threads.stop(self.stop_timeout);
        self.delivery.shutdown_timeout(Duration::from_secs(UPSTREAM_STOP_SECS));
        stop::say_left(&self.hub);
        self.store.close();
    }
}

/// Where messages go up, and how.
pub(crate) struct WayUp {
    /// What is there.
    pub(crate) kind: UpstreamKind,
    /// The host that is reached.
    pub(crate) host: String,
    /// Its port.
    pub(crate) port: u16,
    /// What carries AMQP or MQTT there.
    pub(crate) transport: Transport,
}

/// The way up that the settings ask for.
pub(crate) fn way_up(settings: &UpstreamSettings) -> WayUp {
    if let Some(broker) = &settings.broker {
        let url = &broker.url;
        if !url.tls {
            warn!(
                code = "EH5013",
                host = url.host,
                "Messages and the password go up in clear text; use amqps://"
            );
        }
        let plain = PlainAmqp {
            sasl: url.sasl.clone(),
            address: broker.address.clone(),
            targets: broker.targets.clone(),
        };
        return WayUp {
            kind: UpstreamKind::Amqp(plain),
            host: url.host.clone(),
            port: url.port,
            transport: if url.tls { Transport::Tls } else { Transport::Tcp },
        };
    }
    let web_socket = || Transport::WebSocket { proxy: settings.proxy.clone() };
    let (kind, transport, port) = match settings.protocol {
        UpstreamProtocol::Amqp => (UpstreamKind::Hub, Transport::Tls, settings.amqp_port),
        UpstreamProtocol::AmqpWs => (UpstreamKind::Hub, web_socket(), settings.https_port),
        UpstreamProtocol::Mqtt => (UpstreamKind::MqttHub, Transport::Tls, settings.mqtt_port),
        UpstreamProtocol::MqttWs => (UpstreamKind::MqttHub, web_socket(), settings.https_port),
    };
    WayUp { kind, host: settings.host.as_str().to_owned(), port, transport }
}

fn open_store(settings: &Settings) -> Result<Store, Failure> {
    let options = match &settings.store.kind {
        StoreKind::Memory => {
            warn!(code = "EH1009", "Messages are stored in memory only and are lost when the process ends");
            StoreOptions::memory()
        }
        StoreKind::Persistent { folder, durability } => {
            let on_disk = StoreOptions::disk(folder);
            match *durability {
                settings::Durability::Sync => StoreOptions { durability: Durability::Sync, ..on_disk },
                settings::Durability::Interval(interval) => {
                    // The settings allow a minute at most.
                    let millis = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
                    StoreOptions { durability: Durability::Interval { millis }, ..on_disk }
                }
                settings::Durability::Os => StoreOptions { durability: Durability::Os, ..on_disk },
                settings::Durability::Memory => StoreOptions::memory(),
            }
        }
    };
    let store = Store::open(StoreOptions { limits: limits(settings), ..options })?;
    let queued = store.hub_ledger().queues().queued();
    info!(queued, durability = store.durability_level(), "The store is open");
    Ok(store)
}

/// The limits that the settings say; the configuration adds that of the whole.
fn limits(settings: &Settings) -> StoreLimits {
    StoreLimits {
        max_bytes: None,
        free_floor_bytes: settings.store.free_floor_bytes,
        dead_letters_max_bytes: settings.store.dead_letters_max_bytes,
    }
}

fn identity(device: &str, module: Option<&str>) -> Result<Identity, Failure> {
    match module {
        None => Identity::device(device),
        Some(module) => Identity::module(device, module),
    }
    .map_err(|error| Failure::Identity { what: "the device id", reason: error.to_string() })
}

/// Who signs the hub's own tokens.
fn signer(settings: &Settings) -> Result<Arc<dyn Signer>, Failure> {
    match &settings.hub.proof {
        HubProof::Key(key) => match SymmetricKey::from_bytes(key.expose()) {
            Ok(key) => Ok(Arc::new(key)),
            Err(error) => Err(Failure::Identity {
                what: "the key in IotHubConnectionString",
                reason: error.to_string(),
            }),
        },
        HubProof::Workload(workload) => Ok(Arc::new(WorkloadClient::new(workload.clone()))),
    }
}

/// Who seals stored twins. With a workload API there is always one: what was sealed before stays readable.
fn twin_cipher(prepared: &Prepared) -> Option<Arc<dyn TwinCipher>> {
    let wanted = prepared.settings.configuration.encrypts_twins;
    match prepared.workload() {
        Some(client) => Some(Arc::new(WorkloadCipher::new(client, wanted.unwrap_or(true)))),
        None => {
            if wanted == Some(true) {
                warn!(
                    code = "EH1017",
                    "EncryptTwinStore needs the workload API, which this hub does not have; twins are stored plain"
                );
            }
            None
        }
    }
}

fn refresher(
    prepared: &Prepared,
    edge_device: &Identity,
    scope: &Arc<ScopeCache>,
    tls: Arc<rustls::ClientConfig>,
    tokens: Arc<TokenSource>,
) -> Result<Arc<ScopeRefresher<ScopeClient>>, Failure> {
    let settings = &prepared.settings;
    let mut client = ScopeClientOptions::new(settings.upstream.host.as_str(), edge_device, tls, tokens);
    client.port = settings.upstream.https_port;
    client.nested = settings.scope.nested;
    client.proxy = settings.upstream.proxy.clone();
    let own_host = settings.hub.own_host.as_ref().map(settings::HostName::as_str);
    let hosts = Hosts::new(std::iter::once(settings.hub.iothub_host.as_str()).chain(own_host));
    let options = RefreshOptions {
        period: settings.scope.refresh_interval,
        delay: settings.scope.refresh_delay,
        ..RefreshOptions::default()
    };
    let refresher = ScopeRefresher::new(scope.clone(), ScopeClient::new(client), hosts, options);
    Ok(Arc::new(refresher.with_client_trust(client_trust(prepared.bundle.clone()))))
}

/// Fills the cache from the store; how many identities it had.
async fn restore_scope(scope: &ScopeCache, state: &KeyedState) -> usize {
    match state.get(SCOPE_KEY).await {
        Ok(Some(snapshot)) => match scope.restore(&snapshot) {
            Ok(_) => scope.len(),
            Err(error) => {
                warn!(code = "EH3008", %error, "The stored identities cannot be used; the upstream is asked for them");
                0
            }
        },
        Ok(None) => 0,
        Err(error) => {
            warn!(code = "EH3009", %error, "The stored identities cannot be read; the upstream is asked for them");
            0
        }
    }
}

/// Asks for everything whenever the upstream comes back: much can have changed meanwhile.
async fn refresh_on_contact(
    refresher: Arc<ScopeRefresher<ScopeClient>>,
    mut upstream: watch::Receiver<UpstreamStatus>,
) {
    let up = |status: &UpstreamStatus| matches!(status.state, UpstreamState::Up | UpstreamState::Throttled);
    while upstream.wait_for(up).await.is_ok() {
        refresher.want_full();
        if upstream.wait_for(|status| !up(status)).await.is_err() {
            return;
        }
    }
}

/// Stores the cache whenever it changed, so that clients are known after a restart without the upstream. What is kept of
/// identities that are gone is deleted before: if the process ends in between, they are found to be gone once more.
async fn follow_scope(hub: Hub, refresher: Arc<ScopeRefresher<ScopeClient>>, state: KeyedState) {
    use tokio::sync::broadcast::error::RecvError;
    let mut changes = refresher.changes();
    loop {
        match changes.recv().await {
            Ok(change) => hub.forget_removed(&change, refresher.cache()).await,
            Err(RecvError::Lagged(_)) => hub.forget_out_of_scope(refresher.cache()).await,
            Err(RecvError::Closed) => return,
        }
        let snapshot = Bytes::from(refresher.cache().snapshot());
        if let Err(error) = state.put(SCOPE_KEY, snapshot).await {
            error!(code = "EH3010", %error, "The identities in scope cannot be stored");
        }
    }
}
