//! Owns the assembly of a running hub out of settings: store, identities, upstream, routes, heads.

mod configuration;
mod heads;
mod identities;
mod trust;

use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::configuration::{Configuration, ConfigurationState};
use edgehub_broker::delivery::{BackoffOptions, ModulePumpOptions};
use edgehub_broker::dial::Transport;
use edgehub_broker::hub::{Authenticator, ControlOptions, Hub, HubOptions};
use edgehub_broker::identity::{
    Identity, REFRESH_METHOD, ScopeCache, ScopeCalls, ScopeService, Signer, SymmetricKey, TokenSource,
};
use edgehub_broker::twin::TwinCipher;
use edgehub_broker::upstream::plain::PlainAmqp;
use edgehub_broker::upstream::{UpstreamKind, UpstreamOptions};
use edgehub_storage::{Durability, Store, StoreLimits, StoreOptions, Table};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::certificate::{UpstreamTrust, load_bundle};
use crate::exit::Failure;
use crate::listen::ConnectionThreads;
use crate::pages::Pages;
use crate::run::Prepared;
use crate::settings::{
    self, AuthenticationMode, HubProof, Settings, StoreKind, UpstreamProtocol, UpstreamSettings,
};
use crate::stop;
use crate::workload::{Keeper, WorkloadCipher, WorkloadClient};

pub use configuration::Source;
use identities::{
    ScopeFollower, authentication_mode, authenticator, refresh_on_contact, refresher, restore_scope,
};
pub use trust::Trust;

/// How long the upstream connection may take to close.
const UPSTREAM_STOP_SECS: u64 = 5;

/// A hub with its threads.
pub struct RunningHub {
    hub: Hub,
    store: Store,
    configuration: Configuration,
    authenticator: Arc<dyn Authenticator>,
    /// None where the cloud alone decides: nothing is known then that children could be told.
    scope_calls: Option<Arc<dyn ScopeCalls>>,
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
        let mode = authentication_mode(settings);
        if mode != AuthenticationMode::Cloud {
            let known = control.block_on(restore_scope(&scope, &store.keyed(Table::Identities)));
            info!(identities = known, "Identities known from the last run");
        }

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
        let client_tokens = (mode != AuthenticationMode::Scope).then(|| Arc::new(refresher.client_tokens()));
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
            client_tokens: client_tokens.clone(),
            batch_max: usize::from(settings.upstream.batch_max),
            operation_timeout: settings.upstream.operation_timeout,
            idle_timeout: Duration::from_secs(60),
            backoff: BackoffOptions::default(),
            lower_share_percent: settings.delivery.lower_share_percent,
            gives_up_out_of_scope: settings.scope.tracks_senders && mode == AuthenticationMode::Scope,
            product_info: concat!("edgehub/", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let authenticator = authenticator(&refresher, client_tokens, mode, &upstream);
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
        let hub = Hub::start(options, store.clone(), authenticator.clone(), delivery.handle().clone());
        let follower = ScopeFollower { hub: hub.clone(), refresher: refresher.clone(), mode };
        control.spawn(follower.follow(store.keyed(Table::Identities)));
        let mut scope_calls: Option<Arc<dyn ScopeCalls>> = None;
        if mode != AuthenticationMode::Cloud {
            scope_calls = Some(Arc::new(ScopeService::new(refresher.clone())));
            let by_method = refresher.clone();
            hub.serve_method(REFRESH_METHOD, move |payload| {
                let refresher = by_method.clone();
                async move { refresher.refresh_by_method(&payload).await }
            });
            if let Some(upstream) = hub.upstream() {
                control.spawn(refresh_on_contact(refresher.clone(), upstream));
            }
            control.spawn(async move { refresher.run().await });
        }
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
