//! Owns the opening of the heads: which listener serves which protocol, and to whom its connections go.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use edgehub_broker::head::amqp::{self, AmqpLimits};
use edgehub_broker::head::anteroom::{self, Anteroom};
use edgehub_broker::head::mqtt::{self, MqttLimits, Peer};
use edgehub_broker::hub::{Authenticator, Hub};
use edgehub_broker::identity::{Identity, ScopeCalls};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tracing::{info, warn};

use super::identity;
use crate::api::Api;
use crate::certificate::server_config;
use crate::exit::Failure;
use crate::listen::forwarded::{self, Forwarded};
use crate::listen::https::{self, SubProtocol, Upgraded};
use crate::listen::{ConnectionGate, ConnectionThreads, Stopping, TlsGate, bind};
use crate::run::Prepared;
use crate::settings::{ListenAddress, Settings};

/// Opens every listener that the settings switch on. The TLS ones need the certificate of `prepared`.
///
/// # Errors
/// The first port that cannot be had; those before it are open.
pub(super) fn open(
    hub: &Hub,
    threads: &ConnectionThreads,
    prepared: &Prepared,
    authenticator: Arc<dyn Authenticator>,
    scope_calls: Option<Arc<dyn ScopeCalls>>,
) -> Result<(), Failure> {
    let settings = &prepared.settings;
    let device_id = settings.hub.device_id.as_str();
    let proxy = identity(device_id, Some(&settings.scope.api_proxy_module_id))?;
    let api = Api::new(
        hub.clone(),
        authenticator.clone(),
        identity(device_id, None)?,
        settings.tls.client_certificates.then(|| proxy.clone()),
        prepared.recorder.clone(),
    )
    .with_scope(scope_calls);
    let heads = Arc::new(Heads {
        hub: hub.clone(),
        mqtt: mqtt_limits(settings),
        amqp: AmqpLimits {
            iot_hub_host: Some(settings.hub.iothub_host.as_str().into()),
            ..AmqpLimits::default()
        },
        offered: [
            settings.listen.mqtt.map(|_| SubProtocol::Mqtt),
            settings.listen.amqp.map(|_| SubProtocol::Amqp),
        ]
        .into_iter()
        .flatten()
        .collect(),
        api: Arc::new(api),
        proxy,
        authenticator,
    });
    let opening = Opening {
        threads,
        gate: ConnectionGate::new(settings.listen.clients_max.saturating_mul(2)),
        backlog: settings.listen.backlog,
    };
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
            let at = opening.tls("mqtt", address, tls_gate(), &heads, Heads::mqtt)?;
            info!(address = %at, "MQTT head is open (TLS)");
        }
        if let Some(address) = settings.listen.amqp {
            let at = opening.tls("amqp", address, tls_gate(), &heads, Heads::amqp)?;
            info!(address = %at, "AMQP head is open (TLS)");
        }
        if let Some(address) = settings.listen.https {
            let at = opening.tls("https", address, tls_gate(), &heads, Heads::https)?;
            info!(address = %at, "HTTPS is open, for WebSockets, direct methods and child hubs");
        }
    }
    if let Some(address) = settings.listen.mqtt_plain {
        let at = opening.plain("mqtt_plain", address, &heads, Heads::mqtt)?;
        warn!(code = "EH1008", address = %at, "MQTT head is open without TLS");
    }
    if let Some(address) = settings.listen.amqp_plain {
        let at = opening.plain("amqp_plain", address, &heads, Heads::amqp)?;
        warn!(code = "EH1010", address = %at, "AMQP head is open without TLS");
    }
    Ok(())
}

/// What all listeners share.
struct Opening<'a> {
    threads: &'a ConnectionThreads,
    gate: ConnectionGate,
    backlog: u32,
}

impl Opening<'_> {
    /// A listener whose connections begin with a TLS handshake; its address.
    fn tls<H, F>(
        &self,
        name: &'static str,
        address: ListenAddress,
        gate: Arc<TlsGate>,
        heads: &Arc<Heads>,
        serve: H,
    ) -> Result<SocketAddr, Failure>
    where
        H: Fn(Arc<Heads>, TlsStream<TcpStream>, Peer, Stopping) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = bind(name, address, self.backlog)?;
        let at = listener.address();
        let (heads, stopping) = (Arc::clone(heads), self.threads.stopping());
        self.threads.serve_tls(listener, &self.gate, gate, move |stream, address, accepted_at| {
            let peer = peer(address, peer_certificates(&stream), accepted_at);
            serve(Arc::clone(&heads), stream, peer, stopping.clone())
        })?;
        Ok(at)
    }

    /// A listener without TLS; its address.
    fn plain<H, F>(
        &self,
        name: &'static str,
        address: ListenAddress,
        heads: &Arc<Heads>,
        serve: H,
    ) -> Result<SocketAddr, Failure>
    where
        H: Fn(Arc<Heads>, TcpStream, Peer, Stopping) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = bind(name, address, self.backlog)?;
        let at = listener.address();
        let (heads, stopping) = (Arc::clone(heads), self.threads.stopping());
        self.threads.serve(listener, &self.gate, move |stream, address, accepted_at| {
            serve(Arc::clone(&heads), stream, peer(address, Vec::new(), accepted_at), stopping.clone())
        })?;
        Ok(at)
    }
}

/// What the connections of all listeners have in common.
struct Heads {
    hub: Hub,
    mqtt: MqttLimits,
    amqp: AmqpLimits,
    /// What is spoken in WebSockets: the protocols whose own listeners are on.
    offered: Arc<[SubProtocol]>,
    /// Plain requests on the HTTPS port.
    api: Arc<Api>,
    /// The module whose forwarded certificates are believed.
    proxy: Identity,
    authenticator: Arc<dyn Authenticator>,
}

impl Heads {
    async fn mqtt<S>(self: Arc<Self>, stream: S, peer: Peer, mut stopping: Stopping)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        // The end was logged by the head itself.
        let _ = mqtt::serve(stream, self.hub.clone(), self.mqtt.clone(), peer, async move {
            stopping.wait().await;
        })
        .await;
    }

    async fn amqp<S>(self: Arc<Self>, stream: S, peer: Peer, mut stopping: Stopping)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        amqp::serve(stream, self.hub.clone(), self.amqp.clone(), peer, async move {
            stopping.wait().await;
        })
        .await;
    }

    async fn https(self: Arc<Self>, stream: TlsStream<TcpStream>, peer: Peer, mut stopping: Stopping) {
        let upgrading = async {
            let api = self.api.of_connection(peer.certificates.clone());
            let accepted_at = peer.accepted_at.into_std();
            let upgraded = https::serve(stream, accepted_at, self.offered.clone(), api).await?;
            let forwarded = match peer.certificates.is_empty() && self.mqtt.certificate_authentication {
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
            (SubProtocol::Mqtt, Ok(peer)) => self.mqtt(stream, peer, stopping).await,
            (SubProtocol::Amqp, Ok(peer)) => self.amqp(stream, peer, stopping).await,
            (SubProtocol::Mqtt, Err((peer, reason))) => {
                // The end was logged by the head itself.
                let _ = mqtt::refuse(stream, &self.mqtt, &peer, reason).await;
            }
            // Nothing in AMQP says this before a login: the connection ends.
            (SubProtocol::Amqp, Err((peer, reason))) => {
                warn!(code = "EH2010", peer = ?peer.address, reason, "An AMQP connection is refused");
            }
        }
    }
}

fn peer(address: SocketAddr, certificates: Vec<Bytes>, accepted_at: Instant) -> Peer {
    Peer { address: Some(address), certificates, accepted_at: accepted_at.into() }
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
