//! Owns the settings: one typed value, built once from defaults, files, environment and flags.
//!
//! Each layer overrides the one before: built-in defaults, the reference's `appsettings_hub.json` beside the program,
//! the file of `--config` (TOML), environment variables, command line flags. Names are compared without regard to case; `__`, `:` and `.` separate
//! sections. The reference hub's names are kept wherever it has the setting. The program's own settings are
//! `listen.*`, `upstream.*`, `store.*`, `delivery.*`, `routing.*`, `admin.*` and `log.*` in the file, `EDGEHUB_LISTEN__…` in the
//! environment.
//!
//! What is unknown is named: in the file every key that is not in the catalog; in the environment, which
//! holds much that is none of our business, only variables that begin with a prefix or a section of ours or
//! of the reference's, and variables that differ from a known name by one or two characters. An unknown name
//! after `--set` is an error.

mod admin;
mod appsettings;
mod catalog;
pub mod command;
mod describe;
mod identity;
mod layers;
mod mask;
pub mod reference;
mod report;
pub mod schema;
pub mod show;
mod value;
mod workload;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use admin::AdminSocket;
pub use appsettings::FILE as APPSETTINGS_FILE;
pub use catalog::{Effect, KnownSetting, known, setting_id};
pub use describe::{Description, ValueKind};
pub use identity::{HostName, HubIdentity, HubProof, IdentityFault, RegistryId, SharedKey};
pub use layers::Origin;
pub use report::{Notice, SettingsError};
pub use value::{
    AuthenticationMode, Durability, ListenAddress, ListenHost, LogFormat, LogLevel, TlsVersions,
    UpstreamProtocol,
};
pub use workload::{WorkloadSettings, WorkloadUri};

use edgehub_broker::delivery::LOWER_SHARE_PERCENT_MAX;
use edgehub_broker::dial::HttpProxy;
use edgehub_broker::upstream::plain::{AddressTemplate, BrokerUrl};
use edgehub_broker::upstream::targets::RouteTargets;
use edgehub_routing::OverflowPolicy;
use layers::Layers;
use value::{Values, parse_plain_listener};

/// Largest bound of the store that can be set: 1 PiB.
const SPACE_BYTES_MAX: u64 = 1 << 50;

/// Longest time until a certificate is renewed: a year.
const RENEW_AFTER_MILLIS_MAX: u64 = 366 * 86_400_000;

/// What a listener without TLS may be set to.
const PLAIN_EXPECTED: &str = "off, a port (bound to loopback), or an address with a port";

/// Most connection threads.
const THREADS_MAX: usize = 256;

/// Everything that the program takes from outside, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who the hub is.
    pub hub: HubIdentity,
    /// Certificate files. A hub with a key has them whenever a TLS listener is on; one without gets its certificate
    /// from the workload API.
    pub certificates: Option<CertificateFiles>,
    /// TLS of the listeners.
    pub tls: TlsSettings,
    /// Ports, addresses and limits of connections.
    pub listen: ListenSettings,
    /// Limits of the MQTT head.
    pub mqtt: MqttSettings,
    /// The connection to the cloud hub or parent.
    pub upstream: UpstreamSettings,
    /// Where messages are kept.
    pub store: StoreSettings,
    /// Delivery to modules and the upstream.
    pub delivery: DeliverySettings,
    /// Routes.
    pub routing: RoutingSettings,
    /// The hub's own configuration.
    pub configuration: ConfigurationSettings,
    /// Authentication of clients.
    pub scope: ScopeSettings,
    /// The metrics page.
    pub metrics: MetricsSettings,
    /// The operator's socket.
    pub admin: AdminSocket,
    /// Least severe level that is logged.
    pub log_level: LogLevel,
    /// Form of the log's lines.
    pub log_format: LogFormat,
    /// Time that what is under way has to be finished at stop (`ShutdownWaitPeriod`).
    pub shutdown_wait: Duration,
}

/// PEM files of the hub's own certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// Server certificate, followed by its chain.
    pub certificate: PathBuf,
    /// Private key of the server certificate.
    pub private_key: PathBuf,
    /// Roots that clients, and a parent, are trusted by.
    pub trust_bundle: Option<PathBuf>,
}

/// TLS of the listeners.
#[derive(Clone, Copy, Debug)]
pub struct TlsSettings {
    /// Versions offered (`SslProtocols`).
    pub versions: TlsVersions,
    /// Ask clients for a certificate (`ClientCertAuthEnabled`).
    pub client_certificates: bool,
    /// Longest time until the workload API is asked for another certificate (`ServerCertificateRenewAfterInMs`).
    pub renew_after_max: Option<Duration>,
    /// Time from accepting a connection to the end of its TLS handshake.
    pub handshake_timeout: Duration,
    /// Connections whose handshake is not finished, at most.
    pub handshakes_waiting_max: usize,
}

/// Ports, addresses and limits of connections.
#[derive(Clone, Copy, Debug)]
pub struct ListenSettings {
    /// MQTT over TLS.
    pub mqtt: Option<ListenAddress>,
    /// AMQP over TLS.
    pub amqp: Option<ListenAddress>,
    /// HTTPS and WebSockets.
    pub https: Option<ListenAddress>,
    /// MQTT without TLS.
    pub mqtt_plain: Option<ListenAddress>,
    /// AMQP without TLS.
    pub amqp_plain: Option<ListenAddress>,
    /// `/metrics`, `/healthz` and `/status`, plain HTTP.
    pub metrics: ListenAddress,
    /// Length of the queue of connections not yet accepted.
    pub backlog: u32,
    /// Threads that own connections.
    pub threads: NonZeroUsize,
    /// Open client connections, at most (`MaxConnectedClients`).
    pub clients_max: usize,
    /// Time that closing the connections may take at stop.
    pub stop_timeout: Duration,
}

/// Limits of the MQTT head.
#[derive(Clone, Copy, Debug)]
pub struct MqttSettings {
    /// Messages of one connection that are not yet acknowledged, at most.
    pub inbound_window: u16,
    /// Time from connection to CONNECT.
    pub connect_timeout: Duration,
    /// Longest keep-alive granted.
    pub keep_alive_max: Duration,
}

/// The connection to the cloud hub or parent.
#[derive(Clone, Debug)]
pub struct UpstreamSettings {
    /// Host to connect to; tokens are made for the cloud hub's name in any case.
    pub host: HostName,
    /// Port of AMQP over TLS.
    pub amqp_port: u16,
    /// Port of MQTT over TLS.
    pub mqtt_port: u16,
    /// Port of HTTPS, and of AMQP and MQTT in WebSockets.
    pub https_port: u16,
    /// What carries messages (`UpstreamProtocol`).
    pub protocol: UpstreamProtocol,
    /// The proxy of HTTPS and WebSockets (`https_proxy`, `no_proxy`).
    pub proxy: Option<Arc<HttpProxy>>,
    /// Another broker that takes the messages in the place of the hub above; identities still come from the latter.
    pub broker: Option<BrokerSettings>,
    /// PEM file with further roots for the upstream's certificate.
    pub trust_file: Option<PathBuf>,
    /// Messages per transfer at most.
    pub batch_max: u16,
    /// Deadline of one operation.
    pub operation_timeout: Duration,
}

/// A broker that messages go up to (`upstream.kind` = `amqp`).
#[derive(Clone, Debug)]
pub struct BrokerSettings {
    /// Where it is, and how the hub shows who it is.
    pub url: BrokerUrl,
    /// The address that messages go to.
    pub address: AddressTemplate,
    /// The routes whose messages go to addresses of their own.
    pub targets: RouteTargets,
}

/// The section of addresses by the names of routes.
const TARGETS: &str = "upstream:targets:*";

/// Where messages are kept.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// Kind of store.
    pub kind: StoreKind,
    /// What becomes of messages that find it full, where their route does not say.
    pub overflow: OverflowPolicy,
    /// What stays free in its file system, in bytes; of a small one, less.
    pub free_floor_bytes: u64,
    /// What the dead letters may take up, in bytes; 0 keeps none.
    pub dead_letters_max_bytes: u64,
}

/// Kind of store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// In memory: everything is lost when the process ends.
    Memory,
    /// On disk.
    Persistent {
        /// The store's own folder, below `StorageFolder`.
        folder: PathBuf,
        /// What an acknowledgement promises.
        durability: Durability,
    },
}

/// Delivery to modules and the upstream.
#[derive(Clone, Copy, Debug)]
pub struct DeliverySettings {
    /// Wait for a module's acknowledgement.
    pub ack_timeout: Duration,
    /// Messages of one consumer that are not yet acknowledged, at most.
    pub module_window: u16,
    /// The part of the messages that less urgent priorities are guaranteed, in percent.
    pub lower_share_percent: u8,
}

/// Routes.
#[derive(Clone, Copy, Debug)]
pub struct RoutingSettings {
    /// Whether lints are errors.
    pub strict: bool,
}

/// Where the hub's own configuration comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// The twin of `$edgeHub`.
    Twin,
    /// The manifest of `--manifest`.
    File,
}

impl ConfigSource {
    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "twin" => Some(Self::Twin),
            "file" => Some(Self::File),
            _ => None,
        }
    }
}

/// The hub's own configuration, and twins.
#[derive(Clone, Copy, Debug)]
pub struct ConfigurationSettings {
    /// Where it comes from; not given: the manifest if there is one, else the twin.
    pub source: Option<ConfigSource>,
    /// Between two reads of the whole twin.
    pub refresh_period: Duration,
    /// Least time between two updates of an identity's reported properties.
    pub report_pause: Duration,
    /// Least time between two reads of a client's twin after the upstream came back.
    pub twin_sync_period_min: Duration,
    /// Whether stored twins are encrypted (`EncryptTwinStore`); not given: where there is a workload API.
    pub encrypts_twins: Option<bool>,
}

impl ConfigurationSettings {
    fn read(values: &Values<'_>) -> Result<Self, SettingsError> {
        Ok(Self {
            source: values.optional("configSource", "twin or file", ConfigSource::parse)?,
            refresh_period: values.seconds("ConfigRefreshFrequencySecs", 1)?,
            report_pause: values.seconds("ReportedPropertiesSyncFrequencySecs", 1)?,
            twin_sync_period_min: values.seconds("MinTwinSyncPeriodSecs", 0)?,
            encrypts_twins: values.optional_flag("EncryptTwinStore")?,
        })
    }
}

/// Authentication of clients.
#[derive(Clone, Debug)]
pub struct ScopeSettings {
    /// Who decides on logins (`AuthenticationMode`).
    pub mode: AuthenticationMode,
    /// Ask by the nested calls (`NestedEdgeEnabled`).
    pub nested: bool,
    /// Time between two full refreshes.
    pub refresh_interval: Duration,
    /// Least pause between refreshes of one identity.
    pub refresh_delay: Duration,
    /// Messages of senders that left the scope go to the dead letters (`TrackDeviceState`).
    pub tracks_senders: bool,
    /// The module on this device whose forwarded client certificates are believed.
    pub api_proxy_module_id: String,
}

/// The metrics page.
#[derive(Clone, Copy, Debug)]
pub struct MetricsSettings {
    /// Whether anything is recorded.
    pub enabled: bool,
    /// Window of the quantiles of message sizes.
    pub message_size_window: Duration,
}

/// The outside world that the settings come from.
#[derive(Clone, Debug, Default)]
pub struct Sources<'a> {
    /// The reference's settings file, `appsettings_hub.json`; it is read where it exists.
    pub appsettings: Option<PathBuf>,
    /// The file of `--config`.
    pub file: Option<&'a Path>,
    /// The environment.
    pub environment: Vec<(String, String)>,
    /// Flags: spelling of the flag, name of the setting, value.
    pub flags: Vec<(String, String, String)>,
}

impl Settings {
    /// Builds the settings. The notices are for the log, one line each.
    ///
    /// # Errors
    /// The first setting that cannot be used, with its name, origin and the value expected.
    pub fn load(sources: Sources<'_>) -> Result<(Self, Vec<Notice>), SettingsError> {
        let layers = Layers::load(sources)?;
        let mut values = Values::new(&layers);
        let settings = Self::read(&mut values)?;
        let read_notices = values.notices;
        let mut notices = layers.notices;
        notices.extend(read_notices);
        Ok((settings, notices))
    }

    fn read(values: &mut Values<'_>) -> Result<Self, SettingsError> {
        let hub = HubIdentity::read(values)?;
        let listen = ListenSettings::read(values)?;
        let renew_expected = format!("a whole number from 1 to {RENEW_AFTER_MILLIS_MAX}");
        let certificates = match &hub.proof {
            HubProof::Key(_) => CertificateFiles::read(values, listen.uses_tls())?,
            HubProof::Workload(_) => {
                CertificateFiles::ignore(values);
                if listen.uses_tls() && hub.own_host.is_none() {
                    return Err(SettingsError::Missing {
                        name: "EdgeDeviceHostName".into(),
                        expected: "the name under which clients reach this hub, for its certificate".into(),
                    });
                }
                None
            }
        };
        Ok(Self {
            certificates,
            tls: TlsSettings {
                versions: values.tls_versions()?,
                client_certificates: values.flag("ClientCertAuthEnabled")?,
                renew_after_max: values
                    .optional("ServerCertificateRenewAfterInMs", &renew_expected, |text| {
                        text.parse().ok().filter(|millis| (1..=RENEW_AFTER_MILLIS_MAX).contains(millis))
                    })?
                    .map(Duration::from_millis),
                handshake_timeout: values.seconds("listen:handshake_timeout_secs", 1)?,
                handshakes_waiting_max: values.integer("listen:handshakes_waiting_max", 1..=1_000_000)?,
            },
            listen,
            mqtt: MqttSettings {
                inbound_window: values
                    .integer("mqttSettings:MaxPendingInboundAcknowledgements", 1..=u16::MAX)?,
                connect_timeout: values.span("mqttSettings:ConnectArrivalTimeout")?,
                keep_alive_max: values.span("mqttSettings:MaxKeepAliveTimeout")?,
            },
            upstream: UpstreamSettings::read(values, &hub)?,
            store: StoreSettings::read(values)?,
            delivery: DeliverySettings {
                ack_timeout: values.seconds("MessageAckTimeoutSecs", 1)?,
                module_window: values.integer("delivery:module_window", 1..=10_000)?,
                lower_share_percent: values
                    .integer("delivery:lower_priority_share_percent", 0..=LOWER_SHARE_PERCENT_MAX)?,
            },
            routing: RoutingSettings { strict: values.flag("routing:strict")? },
            configuration: ConfigurationSettings::read(values)?,
            scope: ScopeSettings::read(values)?,
            metrics: MetricsSettings {
                enabled: values.flag("metrics:listener:MetricsEnabled")?,
                message_size_window: values.span("MetricsHistogramMaxAge")?.max(Duration::from_secs(5)),
            },
            admin: AdminSocket::read(values),
            log_level: values.choice("RuntimeLogLevel", LogLevel::Info, "info", LogLevel::parse),
            log_format: values.required("log:format", "text or json", LogFormat::parse)?,
            shutdown_wait: values.seconds("ShutdownWaitPeriod", 0)?,
            hub,
        })
    }
}

impl CertificateFiles {
    /// Says that the files have no effect.
    fn ignore(values: &mut Values<'_>) {
        for name in
            ["EdgeHubDevServerCertificateFile", "EdgeHubDevServerPrivateKeyFile", "EdgeHubDevTrustBundleFile"]
        {
            if let Some(entry) = values.entry(name) {
                let why = "without IotHubConnectionString certificates come from the workload API";
                values.notices.push(Notice::Ignored { name: name.into(), origin: entry.origin.clone(), why });
            }
        }
    }

    fn read(values: &Values<'_>, needed: bool) -> Result<Option<Self>, SettingsError> {
        let file = |name| values.text(name).map(PathBuf::from);
        let trust_bundle = file("EdgeHubDevTrustBundleFile");
        match (file("EdgeHubDevServerCertificateFile"), file("EdgeHubDevServerPrivateKeyFile")) {
            (Some(certificate), Some(private_key)) => {
                Ok(Some(Self { certificate, private_key, trust_bundle }))
            }
            (None, None) if !needed => Ok(None),
            (None, _) => Err(SettingsError::NoCertificate { missing: "EdgeHubDevServerCertificateFile" }),
            (Some(_), None) => {
                Err(SettingsError::NoCertificate { missing: "EdgeHubDevServerPrivateKeyFile" })
            }
        }
    }
}

impl ListenSettings {
    /// Whether a listener is on that needs a certificate.
    pub fn uses_tls(&self) -> bool {
        self.mqtt.is_some() || self.amqp.is_some() || self.https.is_some()
    }

    fn read(values: &Values<'_>) -> Result<Self, SettingsError> {
        let mqtt = values.listen("listen:mqtt_address", "listen:mqtt_port")?;
        let amqp = values.listen("listen:amqp_address", "amqpSettings:port")?;
        let https = values.listen("listen:https_address", "httpSettings:port")?;
        let threads_expected = format!("a whole number from 1 to {THREADS_MAX}");
        let parse_threads =
            |text: &str| text.parse::<NonZeroUsize>().ok().filter(|threads| threads.get() <= THREADS_MAX);
        let threads = match values.optional("listen:threads", &threads_expected, parse_threads)? {
            Some(threads) => Some(threads),
            None => values.optional("mqttSettings:ThreadCount", &threads_expected, parse_threads)?,
        };
        Ok(Self {
            mqtt: values.flag("mqttSettings:enabled")?.then_some(mqtt),
            amqp: values.flag("amqpSettings:enabled")?.then_some(amqp),
            https: values.flag("httpSettings:enabled")?.then_some(https),
            mqtt_plain: values.required("listen:mqtt_plain", PLAIN_EXPECTED, parse_plain_listener)?,
            amqp_plain: values.required("listen:amqp_plain", PLAIN_EXPECTED, parse_plain_listener)?,
            metrics: values.listen("listen:metrics_address", "httpSettings:metrics_port")?,
            backlog: values.integer("mqttSettings:ListenBacklogSize", 1..=65_535)?,
            threads: threads
                .or_else(|| std::thread::available_parallelism().ok())
                .unwrap_or(NonZeroUsize::MIN),
            clients_max: values.integer("MaxConnectedClients", 1..=10_000_000)?,
            stop_timeout: values.seconds("protocolTimeoutInSecs", 1)?,
        })
    }
}

impl UpstreamSettings {
    fn read(values: &mut Values<'_>, hub: &HubIdentity) -> Result<Self, SettingsError> {
        Ok(Self {
            host: values.host("upstream:host")?.unwrap_or_else(|| hub.upstream_host().clone()),
            amqp_port: values.integer("upstream:amqp_port", 1..=u16::MAX)?,
            mqtt_port: values.integer("upstream:mqtt_port", 1..=u16::MAX)?,
            https_port: values.integer("upstream:https_port", 1..=u16::MAX)?,
            protocol: values.upstream_protocol(),
            proxy: values.proxy()?,
            broker: BrokerSettings::read(values)?,
            trust_file: values.text("upstream:trust_file").map(PathBuf::from),
            batch_max: values.integer("MaxUpstreamBatchSize", 1..=500)?,
            operation_timeout: values.seconds("CloudOperationTimeoutSecs", 1)?,
        })
    }
}

impl BrokerSettings {
    fn read(values: &Values<'_>) -> Result<Option<Self>, SettingsError> {
        let wanted = values.required("upstream:kind", "hub or amqp", |text| match text {
            "hub" => Some(false),
            "amqp" => Some(true),
            _ => None,
        })?;
        if !wanted {
            return match values.members(TARGETS).next() {
                Some(member) => Err(SettingsError::TargetsOfHub { origin: member.entry.origin.clone() }),
                None => Ok(None),
            };
        }
        let template = "an address, in which {deviceId} and {moduleId} may stand";
        let url = values.broker_url("upstream:url")?;
        let address = values.required("upstream:address", template, |text| text.parse().ok())?;
        let targets: Result<Vec<(String, AddressTemplate)>, SettingsError> = values
            .members(TARGETS)
            .map(|member| {
                let name = || format!("upstream:targets:{}", member.name);
                let target = member.entry.text.trim().parse();
                let target = target.map_err(|_| SettingsError::value(&name(), &member.entry, template))?;
                Ok((member.name.clone(), target))
            })
            .collect();
        let targets = RouteTargets::new(&address, targets?).map_err(SettingsError::Targets)?;
        Ok(Some(Self { url, address, targets }))
    }
}

impl StoreSettings {
    fn read(values: &mut Values<'_>) -> Result<Self, SettingsError> {
        let interval = Duration::from_millis(values.integer("store:interval_millis", 1..=60_000)?);
        let durability = values.required("store:durability", "sync, interval, os or memory", |text| {
            match text.trim() {
                "sync" => Some(Durability::Sync),
                "interval" => Some(Durability::Interval(interval)),
                "os" => Some(Durability::Os),
                "memory" => Some(Durability::Memory),
                _ => None,
            }
        })?;
        let kind = if values.flag("usePersistentStorage")? {
            let folder = hub_folder(values);
            if values.text("StorageFolder").is_none() {
                values.notices.push(Notice::TemporaryStore(folder.clone()));
            }
            StoreKind::Persistent { folder, durability }
        } else {
            StoreKind::Memory
        };
        Ok(Self {
            kind,
            overflow: values.required(
                "store:overflow",
                "reject-new, drop-oldest or dead-letter",
                OverflowPolicy::parse,
            )?,
            free_floor_bytes: values.integer("store:free_floor_bytes", 0..=SPACE_BYTES_MAX)?,
            dead_letters_max_bytes: values.integer("store:dead_letters_max_bytes", 0..=SPACE_BYTES_MAX)?,
        })
    }
}

/// The folder of everything that the hub keeps.
fn hub_folder(values: &Values<'_>) -> PathBuf {
    values.text("StorageFolder").map_or_else(std::env::temp_dir, PathBuf::from).join("edgeHub")
}

impl ScopeSettings {
    fn read(values: &mut Values<'_>) -> Result<Self, SettingsError> {
        Ok(Self {
            mode: values.authentication_mode(),
            nested: values.flag("NestedEdgeEnabled")?,
            refresh_interval: values.seconds("DeviceScopeCacheRefreshRateSecs", 1)?,
            refresh_delay: values.seconds("DeviceScopeCacheRefreshDelaySecs", 0)?,
            tracks_senders: values.flag("TrackDeviceState")?,
            api_proxy_module_id: values.required("ApiProxyModuleId", "a module id", |text| {
                (!text.is_empty()).then(|| text.to_owned())
            })?,
        })
    }
}
