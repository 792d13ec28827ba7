//! Owns the assembly of a running hub out of settings: store, identities, upstream, routes, heads.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_broker::delivery::{BackoffOptions, ModulePumpOptions};
use edgehub_broker::head::anteroom::{self, Anteroom};
use edgehub_broker::head::mqtt::{self, MqttLimits, Peer};
use edgehub_broker::hub::{Authenticator, Hub, HubOptions};
use edgehub_broker::identity::{
    ClientTrust, Hosts, Identity, RefreshOptions, ScopeCache, ScopeClient, ScopeClientOptions,
    ScopeRefresher, SymmetricKey, TokenSource,
};
use edgehub_broker::upstream::UpstreamOptions;
use edgehub_routing::HubConfig;
use edgehub_storage::{Durability, KeyedState, Store, StoreLimits, StoreOptions, Table};
use tokio::net::TcpStream;
use tokio::runtime::{Handle, Runtime};
use tokio_rustls::server::TlsStream;
use tracing::{error, info, warn};

use crate::certificate::{load_certificates, server_config, upstream_config};
use crate::exit::Failure;
use crate::listen::forwarded::{self, Forwarded};
use crate::listen::https::{self, SubProtocol, Upgraded};
use crate::listen::{ConnectionGate, ConnectionThreads, Listener, Stopping, TlsGate, bind};
use crate::run::Prepared;
use crate::settings::{self, Settings, StoreKind};

/// Key of the identity cache's snapshot in the store.
const SCOPE_KEY: &[u8] = b"scope";

/// How long the upstream connection may take to close.
const UPSTREAM_STOP_SECS: u64 = 5;

/// A hub with its threads.
pub struct RunningHub {
    hub: Hub,
    store: Store,
    threads: ConnectionThreads,
    delivery: Runtime,
    stop_timeout: Duration,
}

impl RunningHub {
    /// Builds the hub and opens its ports, last of all. `control` runs what may be slow.
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

        let (client_tls, tls_warnings) = upstream_config(trust_files(settings))?;
        tls_warnings.iter().for_each(|text| warn!("{text}"));
        let iothub = settings.hub.iothub_host.as_str();
        let key = match &settings.hub.key {
            Some(key) => SymmetricKey::from_bytes(key.expose()).map_err(|error| Failure::Identity {
                what: "the key in IotHubConnectionString",
                reason: error.to_string(),
            })?,
            None => {
                return Err(Failure::Identity {
                    what: "the hub's own key",
                    reason: "it is missing; give IotHubConnectionString with a SharedAccessKey".into(),
                });
            }
        };
        let tokens = Arc::new(TokenSource::new(iothub, &hub_module, Arc::new(key)));
        let refresher = refresher(settings, &edge_device, &scope, client_tls.clone(), tokens.clone())?;

        let delivery = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("delivery")
            .enable_all()
            .build()
            .map_err(|source| Failure::System { what: "the delivery thread cannot be started", source })?;
        let upstream = UpstreamOptions {
            host: settings.upstream.host.as_str().to_owned(),
            port: settings.upstream.amqp_port,
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
            overflow: settings.store.overflow,
            limits: limits(settings),
        };
        let hub = Hub::start(options, store.clone(), refresher.clone(), delivery.handle().clone());
        control.spawn(persist_scope(refresher.clone(), store.keyed(Table::Identities)));
        let authenticator: Arc<dyn Authenticator> = refresher.clone();
        control.spawn(async move { refresher.run().await });
        apply(&hub, &prepared.configuration, settings.routing.strict)?;

        let threads = ConnectionThreads::start(settings.listen.threads)?;
        let running = Self { hub, store, threads, delivery, stop_timeout: settings.listen.stop_timeout };
        running.open_heads(prepared, authenticator)?;
        Ok(running)
    }

    /// The hub itself, for the pages.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// The store, for the pages.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Closes the connections, the upstream and the store, in this order. Blocks.
    pub fn stop(self, control: &Handle) {
        control.block_on(self.hub.stop(Duration::from_secs(UPSTREAM_STOP_SECS)));
        self.threads.stop(self.stop_timeout);
        self.delivery.shutdown_timeout(Duration::from_secs(UPSTREAM_STOP_SECS));
        let waiting: u64 = self.hub.status().queues.iter().map(|queue| queue.ledger.queued).sum();
        info!(queued = waiting, "What is queued stays stored");
        self.store.close();
    }

    fn open_heads(&self, prepared: &Prepared, authenticator: Arc<dyn Authenticator>) -> Result<(), Failure> {
        let settings = &prepared.settings;
        let limits = mqtt_limits(settings);
        let gate = ConnectionGate::new(settings.listen.clients_max.saturating_mul(2));
        if let Some(certificate) = &prepared.certificate {
            let tls = server_config(certificate.clone(), &settings.tls)?;
            // Each listener has a gate of its own, so that a storm at one does not close the other.
            let tls_gate = || {
                Arc::new(TlsGate::new(
                    tls.clone(),
                    settings.listen.threads.get(),
                    settings.tls.handshake_timeout,
                    settings.tls.handshakes_waiting_max,
                ))
            };
            if let Some(address) = settings.listen.mqtt {
                let listener = bind("mqtt", address, settings.listen.backlog)?;
                info!(address = %listener.address(), "MQTT head is open (TLS)");
                self.open_mqtt(listener, &gate, tls_gate(), limits.clone())?;
            }
            if let Some(address) = settings.listen.https {
                let listener = bind("https", address, settings.listen.backlog)?;
                info!(address = %listener.address(), "HTTPS is open, for WebSockets");
                let device_id = settings.hub.device_id.as_str();
                let https = Arc::new(Https {
                    hub: self.hub.clone(),
                    limits: limits.clone(),
                    offered: settings.listen.mqtt.map(|_| SubProtocol::Mqtt).into_iter().collect(),
                    proxy: identity(device_id, Some(&settings.scope.api_proxy_module_id))?,
                    authenticator,
                });
                let stopping = self.threads.stopping();
                self.threads.serve_tls(
                    listener,
                    &gate,
                    tls_gate(),
                    move |stream, address, accepted_at| {
                        let peer = peer(&stream, address, accepted_at);
                        Arc::clone(&https).serve(stream, peer, stopping.clone())
                    },
                )?;
            }
        }
        if let Some(address) = settings.listen.mqtt_plain {
            let listener = bind("mqtt_plain", address, settings.listen.backlog)?;
            warn!(address = %listener.address(), "MQTT head is open without TLS");
            let (hub, stopping) = (self.hub.clone(), self.threads.stopping());
            self.threads.serve(listener, &gate, move |stream, address, accepted_at| {
                let peer = Peer {
                    address: Some(address),
                    certificates: Vec::new(),
                    accepted_at: accepted_at.into(),
                };
                serve_mqtt(stream, hub.clone(), limits.clone(), peer, stopping.clone())
            })?;
        }
        Ok(())
    }

    fn open_mqtt(
        &self,
        listener: Listener,
        gate: &ConnectionGate,
        tls: Arc<TlsGate>,
        limits: MqttLimits,
    ) -> Result<(), Failure> {
        let (hub, stopping) = (self.hub.clone(), self.threads.stopping());
        self.threads.serve_tls(listener, gate, tls, move |stream, address, accepted_at| {
            let peer = peer(&stream, address, accepted_at);
            serve_mqtt(stream, hub.clone(), limits.clone(), peer, stopping.clone())
        })?;
        Ok(())
    }
}

/// What the connections of the HTTPS port have in common.
struct Https {
    hub: Hub,
    limits: MqttLimits,
    offered: Arc<[SubProtocol]>,
    /// The module whose forwarded certificates are believed.
    proxy: Identity,
    authenticator: Arc<dyn Authenticator>,
}

impl Https {
    async fn serve(self: Arc<Self>, stream: TlsStream<TcpStream>, peer: Peer, mut stopping: Stopping) {
        let upgrading = async {
            let upgraded = https::serve(stream, peer.accepted_at.into_std(), self.offered.clone()).await?;
            let forwarded = match peer.certificates.is_empty() && self.limits.certificate_authentication {
                true => forwarded::judge(&upgraded.headers, &self.proxy, &*self.authenticator).await,
                false => Forwarded::Nothing,
            };
            Some((upgraded, forwarded))
        };
        let upgraded = tokio::select! {
            upgraded = upgrading => upgraded,
            _deadline = stopping.wait() => None,
        };
        let Some((Upgraded { sub_protocol, stream, .. }, forwarded)) = upgraded else { return };
        let peer = match forwarded {
            Forwarded::Nothing => Ok(peer),
            Forwarded::Certificate(certificate) => Ok(Peer { certificates: vec![certificate], ..peer }),
            Forwarded::Refused(reason) => Err((peer, reason)),
        };
        match (sub_protocol, peer) {
            (SubProtocol::Mqtt, Ok(peer)) => {
                serve_mqtt(stream, self.hub.clone(), self.limits.clone(), peer, stopping).await;
            }
            (SubProtocol::Mqtt, Err((peer, reason))) => {
                // The end was logged by the head itself.
                let _ = mqtt::refuse(stream, &self.limits, &peer, reason).await;
            }
        }
    }
}

fn peer(stream: &TlsStream<TcpStream>, address: SocketAddr, accepted_at: Instant) -> Peer {
    Peer { address: Some(address), certificates: peer_certificates(stream), accepted_at: accepted_at.into() }
}

async fn serve_mqtt<S>(stream: S, hub: Hub, limits: MqttLimits, peer: Peer, mut stopping: Stopping)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send,
{
    // The end was logged by the head itself.
    let _ = mqtt::serve(stream, hub, limits, peer, async move {
        stopping.wait().await;
    })
    .await;
}

fn peer_certificates(stream: &TlsStream<TcpStream>) -> Vec<Bytes> {
    let (_, session) = stream.get_ref();
    let chain = session.peer_certificates().unwrap_or_default();
    chain.iter().map(|certificate| Bytes::copy_from_slice(certificate)).collect()
}

fn mqtt_limits(settings: &Settings) -> MqttLimits {
    MqttLimits {
        connect_arrival_max: settings.mqtt.connect_timeout,
        // Silent connections leave room for those that log in, however low the limit is.
        anteroom: Anteroom::new((settings.listen.clients_max / 2).clamp(1, anteroom::WAITING_MAX)),
        silence_max: settings.mqtt.keep_alive_max,
        publishes_pending_max: usize::from(settings.mqtt.inbound_window),
        certificate_authentication: settings.tls.client_certificates,
        ..MqttLimits::default()
    }
}

fn open_store(settings: &Settings) -> Result<Store, Failure> {
    let options = match &settings.store.kind {
        StoreKind::Memory => {
            warn!("Messages are stored in memory only and are lost when the process ends");
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

fn apply(hub: &Hub, config: &HubConfig, strict: bool) -> Result<(), Failure> {
    let checked = if strict { config.clone().with_lints_as_errors() } else { config.clone() };
    let applied = hub.apply(&checked).map_err(|error| Failure::Configuration(error.to_string()))?;
    info!(routes = applied.routes.join(", "), "Routes in force");
    if let Some(bytes) = hub.status().space.max_bytes {
        info!(bytes, "The store is limited");
    }
    for error in &applied.malformed {
        error!("{error}; the other routes run");
    }
    for error in &applied.rejected {
        error!("{error}; the other routes run");
    }
    Ok(())
}

fn identity(device: &str, module: Option<&str>) -> Result<Identity, Failure> {
    match module {
        None => Identity::device(device),
        Some(module) => Identity::module(device, module),
    }
    .map_err(|error| Failure::Identity { what: "the device id", reason: error.to_string() })
}

fn trust_files(settings: &Settings) -> impl Iterator<Item = &std::path::Path> {
    let bundle = settings.certificates.as_ref().and_then(|files| files.trust_bundle.as_deref());
    bundle.into_iter().chain(settings.upstream.trust_file.as_deref())
}

fn refresher(
    settings: &Settings,
    edge_device: &Identity,
    scope: &Arc<ScopeCache>,
    tls: Arc<rustls::ClientConfig>,
    tokens: Arc<TokenSource>,
) -> Result<Arc<ScopeRefresher<ScopeClient>>, Failure> {
    let mut client = ScopeClientOptions::new(settings.upstream.host.as_str(), edge_device, tls, tokens);
    client.port = settings.upstream.https_port;
    let own_host = settings.hub.own_host.as_ref().map(settings::HostName::as_str);
    let hosts = Hosts::new(std::iter::once(settings.hub.iothub_host.as_str()).chain(own_host));
    let options = RefreshOptions {
        period: settings.scope.refresh_interval,
        delay: settings.scope.refresh_delay,
        ..RefreshOptions::default()
    };
    let refresher = ScopeRefresher::new(scope.clone(), ScopeClient::new(client), hosts, options);
    Ok(Arc::new(refresher.with_client_trust(client_trust(settings)?)))
}

/// The trust bundle, as it judges the certificates of clients.
fn client_trust(settings: &Settings) -> Result<ClientTrust, Failure> {
    let Some(bundle) = settings.certificates.as_ref().and_then(|files| files.trust_bundle.as_deref()) else {
        return Ok(ClientTrust::none());
    };
    let (trust, unusable) = ClientTrust::new(load_certificates("trust bundle", bundle)?);
    if unusable > 0 {
        warn!(unusable, "Certificates of the trust bundle cannot be used for those of clients");
    }
    Ok(trust)
}

/// Fills the cache from the store; how many identities it had.
async fn restore_scope(scope: &ScopeCache, state: &KeyedState) -> usize {
    match state.get(SCOPE_KEY).await {
        Ok(Some(snapshot)) => match scope.restore(&snapshot) {
            Ok(_) => scope.len(),
            Err(error) => {
                warn!(%error, "The stored identities cannot be used; the upstream is asked for them");
                0
            }
        },
        Ok(None) => 0,
        Err(error) => {
            warn!(%error, "The stored identities cannot be read; the upstream is asked for them");
            0
        }
    }
}

/// Stores the cache whenever it changed, so that clients are known after a restart without the upstream.
async fn persist_scope(refresher: Arc<ScopeRefresher<ScopeClient>>, state: KeyedState) {
    let mut changes = refresher.changes();
    loop {
        match changes.recv().await {
            Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {
                let snapshot = Bytes::from(refresher.cache().snapshot());
                if let Err(error) = state.put(SCOPE_KEY, snapshot).await {
                    error!(%error, "The identities in scope cannot be stored");
                }
            }
            Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
        }
    }
}
