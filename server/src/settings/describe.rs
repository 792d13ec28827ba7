//! Owns what each setting means and which values it takes: the source of the reference and of the JSON schema.

use super::catalog::{Effect, KnownSetting};

/// Longest time in seconds that a setting takes: a year.
const YEAR_SECS: u64 = 366 * 86_400;
/// Most bytes that a setting takes: 1 PiB.
const PIB: u64 = 1 << 50;

/// Which values a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// `true` or `false`.
    Flag,
    /// A whole number in a range, both ends included.
    Integer {
        /// Least.
        min: u64,
        /// Greatest.
        max: u64,
    },
    /// `[days.]hours:minutes[:seconds[.fraction]]`.
    Span,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// `off`, a port, or an address with a port.
    Listener,
    /// Any text that the setting's own rules allow.
    Text,
}

/// The words about one setting.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// As in the catalog.
    pub name: &'static str,
    /// Its values.
    pub kind: ValueKind,
    /// Meaning, unit, range, and what holds when it is not given. Markdown.
    pub text: &'static str,
}

impl KnownSetting {
    /// What the setting means; none for those without effect.
    pub fn description(&self) -> Option<&'static Description> {
        DESCRIPTIONS.iter().find(|described| described.name == self.name)
    }

    /// Meaning and effect in one Markdown text.
    pub fn meaning(&self) -> String {
        match self.effect {
            Effect::Ignored(why) => format!("No effect: {why}."),
            Effect::Mapped(how) => format!("Taken differently: {how}."),
            Effect::Used => {
                let secret = if self.secret { "Secret. " } else { "" };
                format!("{secret}{}", self.description().map_or("", |described| described.text))
            }
        }
    }
}

/// Every description, for tests.
#[cfg(test)]
pub(super) fn descriptions() -> &'static [Description] {
    DESCRIPTIONS
}

const fn flag(name: &'static str, text: &'static str) -> Description {
    Description { name, kind: ValueKind::Flag, text }
}
const fn integer(name: &'static str, min: u64, max: u64, text: &'static str) -> Description {
    Description { name, kind: ValueKind::Integer { min, max }, text }
}
const fn span(name: &'static str, text: &'static str) -> Description {
    Description { name, kind: ValueKind::Span, text }
}
const fn text(name: &'static str, text: &'static str) -> Description {
    Description { name, kind: ValueKind::Text, text }
}
const fn choice(name: &'static str, of: &'static [&'static str], text: &'static str) -> Description {
    Description { name, kind: ValueKind::Choice(of), text }
}

const DESCRIPTIONS: &[Description] = &[
    text("IOTEDGE_DEVICEID", "Id of the edge device. Used when there is no `IotHubConnectionString`."),
    text("IOTEDGE_MODULEID", "Must be `$edgeHub`."),
    text(
        "IOTEDGE_IOTHUBHOSTNAME",
        "Host name of the cloud hub. Used when there is no `IotHubConnectionString`.",
    ),
    text("IOTEDGE_GATEWAYHOSTNAME", "Parent of a nested hub: its upstream."),
    text("EdgeDeviceHostName", "Name under which clients reach this hub; accepted in token audiences."),
    text(
        "IOTEDGE_WORKLOADURI",
        "`unix:///path` or `http://host:port`. Without `IotHubConnectionString` the [workload API](../how-to/workload-api.md) gives certificate, trust bundle and signatures.",
    ),
    text("IOTEDGE_MODULEGENERATIONID", "Part of the calls of the workload API, which need it."),
    text(
        "IOTEDGE_APIVERSION",
        "Version of the workload API that the daemon offers; the older of it and `2020-07-07` is spoken.",
    ),
    text(
        "IotHubConnectionString",
        "`HostName=..;DeviceId=..;ModuleId=$edgeHub;SharedAccessKey=..[;GatewayHostName=..]`. Goes before all `IOTEDGE_` names; with it certificates come from files.",
    ),
    text(
        "EdgeHubDevServerCertificateFile",
        "PEM file: server certificate, then its chain. Needed for every TLS listener.",
    ),
    text("EdgeHubDevServerPrivateKeyFile", "PEM file: its private key."),
    text(
        "EdgeHubDevTrustBundleFile",
        "PEM file: further roots for the upstream and for client certificates.",
    ),
    flag("mqttSettings:enabled", "MQTT over TLS on or off."),
    flag("amqpSettings:enabled", "AMQP over TLS on or off."),
    integer("amqpSettings:port", 0, 65_535, "Port of AMQP over TLS; 0 lets the system choose."),
    flag(
        "httpSettings:enabled",
        "HTTPS on or off: MQTT and AMQP over WebSocket, each if its own listener is on.",
    ),
    integer(
        "httpSettings:port",
        0,
        65_535,
        "Port of HTTPS. SDKs always use 443; below 1024 the process needs `CAP_NET_BIND_SERVICE`.",
    ),
    integer("httpSettings:metrics_port", 0, 65_535, "Port of the pages."),
    flag(
        "ClientCertAuthEnabled",
        "Clients are asked for a certificate. Devices registered for it log in without a password.",
    ),
    text("SslProtocols", "TLS versions: `tls1.2`, `tls1.3`, separated by commas."),
    integer("MaxConnectedClients", 1, 10_000_000, "Open client connections, at most (1 to 10,000,000)."),
    integer("MessageAckTimeoutSecs", 1, YEAR_SECS, "Seconds to wait for a module's acknowledgement."),
    integer("protocolTimeoutInSecs", 1, YEAR_SECS, "Seconds that closing the connections may take at stop."),
    integer(
        "mqttSettings:MaxPendingInboundAcknowledgements",
        1,
        65_535,
        "Messages of one connection that wait for the store, at most (1 to 65,535).",
    ),
    span("mqttSettings:ConnectArrivalTimeout", "`hh:mm:ss`; from accepting the socket to CONNECT."),
    span("mqttSettings:MaxKeepAliveTimeout", "`hh:mm:ss`; longest silence of a client."),
    integer(
        "mqttSettings:ListenBacklogSize",
        1,
        65_535,
        "Connections not yet accepted, at most (1 to 65,535).",
    ),
    choice(
        "AuthenticationMode",
        &["Scope", "CloudAndScope", "Cloud"],
        "Who decides on logins: the scope of this device; with `CloudAndScope` the cloud, by the client's own token, for those that are \
         not in it; with `Cloud` the cloud alone. See [identities](configuration.md#identities).",
    ),
    flag(
        "TrackDeviceState",
        "Messages upstream whose sender left the scope go to the dead letters; with `false`, or another `AuthenticationMode` than \
         `Scope`, they wait until their time to live ends.",
    ),
    integer(
        "DeviceScopeCacheRefreshRateSecs",
        1,
        YEAR_SECS,
        "Seconds between two full refreshes of the identities.",
    ),
    integer(
        "DeviceScopeCacheRefreshDelaySecs",
        0,
        YEAR_SECS,
        "Least seconds between two refreshes of one identity.",
    ),
    flag(
        "NestedEdgeEnabled",
        "Asks the upstream for identities by the nested calls. `false`: by the old ones, which know no child edge devices.",
    ),
    choice(
        "configSource",
        &["twin", "file"],
        "Where routes and times to live come from: the `twin` of `$edgeHub`, or the `file` of `--manifest`. Not given: \
         the file if there is one, else the twin. With `twin`, the file counts until a twin is known.",
    ),
    integer(
        "ConfigRefreshFrequencySecs",
        1,
        YEAR_SECS,
        "Seconds between two reads of the whole twin of `$edgeHub`.",
    ),
    integer(
        "ReportedPropertiesSyncFrequencySecs",
        1,
        YEAR_SECS,
        "Least seconds between two updates of one identity's reported properties upstream; changes within it are one.",
    ),
    integer(
        "MinTwinSyncPeriodSecs",
        0,
        YEAR_SECS,
        "Least seconds between two reads of one client's twin because the upstream came back.",
    ),
    flag(
        "EncryptTwinStore",
        "Stored twins are encrypted with keys that the workload API wraps. Not given: where there is a workload API. Without one \
         they are stored plain, with a warning if `true`. What is stored is read either way.",
    ),
    text(
        "ApiProxyModuleId",
        "Module whose forwarded client certificates (`x-ms-edge-clientcert`) are believed.",
    ),
    choice(
        "UpstreamProtocol",
        &["Amqp", "AmqpWs", "Mqtt", "MqttWs"],
        "`Amqp` (TLS on `upstream.amqp_port`), `Mqtt` (TLS on `upstream.mqtt_port`), `AmqpWs` or `MqttWs` (WebSocket on `upstream.https_port`). AMQP has one \
         connection for all identities, MQTT one for each.",
    ),
    text(
        "https_proxy",
        "`http://[user:password@]host:port`; proxy for HTTPS and WebSockets to the upstream. See [proxies](../how-to/proxy.md).",
    ),
    text(
        "no_proxy",
        "Hosts that are reached without it: names (and all below them), addresses, separated by commas; `*` for all.",
    ),
    integer(
        "ServerCertificateRenewAfterInMs",
        1,
        YEAR_SECS * 1_000,
        "Milliseconds after which the workload API is asked for another certificate at the latest. Not given: at 80 % of its life.",
    ),
    integer(
        "CloudOperationTimeoutSecs",
        1,
        YEAR_SECS,
        "Seconds; deadline of one operation towards the upstream.",
    ),
    integer("MaxUpstreamBatchSize", 1, 500, "Messages per transfer to the upstream, at most (1 to 500)."),
    flag("usePersistentStorage", "`false`: the store is in memory."),
    text(
        "StorageFolder",
        "Folder; messages are in `edgeHub/store` below it. Not given: the temporary folder, with a warning.",
    ),
    text("RuntimeLogLevel", "`verbose`, `debug`, `info`, `warning`, `error`, `fatal`."),
    flag("metrics:listener:MetricsEnabled", "`false`: nothing is recorded, the metrics page is empty."),
    span("MetricsHistogramMaxAge", "`hh:mm:ss`; window of the quantiles of message sizes."),
    integer(
        "ShutdownWaitPeriod",
        0,
        YEAR_SECS,
        "Seconds that deliveries and method calls under way, and what the upstream still takes, have at stop. 0 does not wait.",
    ),
    text("listen:mqtt_address", "`any` (IPv6 and IPv4) or an IP address."),
    integer("listen:mqtt_port", 0, 65_535, "Port of MQTT over TLS; 0 lets the system choose."),
    Description {
        name: "listen:mqtt_plain",
        kind: ValueKind::Listener,
        text: "MQTT without TLS: `off`, a port (loopback), or an address with a port. Passwords cross it in clear text.",
    },
    text("listen:amqp_address", "Address of AMQP over TLS: `any` or an IP address."),
    Description {
        name: "listen:amqp_plain",
        kind: ValueKind::Listener,
        text: "AMQP without TLS: `off`, a port (loopback; 5672 is usual), or an address with a port. Tokens cross it in clear text.",
    },
    text("listen:https_address", "Address of HTTPS and WebSockets: `any` or an IP address."),
    text("listen:metrics_address", "Address of the pages: `any` or an IP address."),
    integer("listen:threads", 1, 256, "Threads that own connections (1 to 256). Not given: one per core."),
    integer(
        "listen:handshake_timeout_secs",
        1,
        YEAR_SECS,
        "Seconds from accepting a connection to the end of its TLS handshake.",
    ),
    integer(
        "listen:handshakes_waiting_max",
        1,
        1_000_000,
        "Connections in their handshake, at most; further ones wait.",
    ),
    text("upstream:host", "Host to connect to. Not given: the parent, or the cloud hub."),
    choice(
        "upstream:kind",
        &["hub", "amqp"],
        "What messages go up to. `hub`: the cloud hub or a parent hub. `amqp`: another AMQP 1.0 broker.",
    ),
    text(
        "upstream:url",
        "Of kind `amqp`: `amqps://user:password@host:port`, or `amqp://` without TLS. User and password percent-encoded.",
    ),
    text(
        "upstream:address",
        "Of kind `amqp`: the address that messages go to; `{deviceId}` and `{moduleId}` are those of the sender.",
    ),
    text(
        "upstream:targets:*",
        "Of kind `amqp`: an address of its own for the messages of the route of this name, as `upstream.address`; \
         see [several targets](../how-to/amqp-broker.md#several-targets).",
    ),
    integer("upstream:amqp_port", 1, 65_535, "Port of AMQP over TLS."),
    integer("upstream:mqtt_port", 1, 65_535, "Port of MQTT over TLS."),
    integer("upstream:https_port", 1, 65_535, "Port of HTTPS, for identities, `AmqpWs` and `MqttWs`."),
    text("upstream:trust_file", "PEM file with further roots for the upstream."),
    choice(
        "store:durability",
        &["sync", "interval", "os", "memory"],
        "`sync`, `interval`, `os` or `memory`.",
    ),
    integer(
        "store:interval_millis",
        1,
        60_000,
        "Milliseconds (1 to 60,000); with `interval`: longest wait of an acknowledgement.",
    ),
    choice(
        "store:overflow",
        &["reject-new", "drop-oldest", "dead-letter"],
        "What becomes of messages that find the store full, where their route does not say: `reject-new`, `drop-oldest`, `dead-letter`.",
    ),
    integer(
        "store:free_floor_bytes",
        0,
        PIB,
        "Bytes that stay free in the file system; a 16th of it, if that is less.",
    ),
    integer(
        "store:dead_letters_max_bytes",
        0,
        PIB,
        "Bytes that the dead letters may take up; an eighth of the store's limit, if that is less. The oldest go first. 0 keeps none.",
    ),
    integer(
        "delivery:module_window",
        1,
        10_000,
        "Unacknowledged messages towards one module input (1 to 10,000); up to 8 times as many while it answers fast, \
         unless it is 1.",
    ),
    flag(
        "routing:strict",
        "Refuses routes that have a [lint](route-tools.md#lints), as if they did not compile.",
    ),
    integer(
        "delivery:lower_priority_share_percent",
        0,
        50,
        "Part of the messages to an endpoint that less urgent priorities are guaranteed (0 to 50). 0 is strict.",
    ),
    text(
        "admin:socket",
        "Path of the [admin socket](admin-socket.md), or `off`. Not given: `edgeHub/admin.sock` below `StorageFolder`.",
    ),
    choice(
        "log:format",
        &["text", "json"],
        "Form of the [log](pages-and-log.md#log): `text`, the reference's line, or `json`.",
    ),
];

#[cfg(test)]
mod tests {
    use super::super::catalog::known;
    use super::*;

    #[test]
    fn what_takes_effect_is_described_and_nothing_else() {
        for setting in known() {
            let described = setting.description().is_some();
            let used = setting.effect == Effect::Used;
            assert!(
                described || !used,
                "{} has an effect; describe it in settings/describe.rs",
                setting.name
            );
        }
        for described in descriptions() {
            let found = known().iter().find(|setting| setting.name == described.name);
            assert!(found.is_some(), "{} is described and not in the catalog", described.name);
            assert!(described.text.ends_with(['.', ')']), "{}", described.name);
        }
    }
}
