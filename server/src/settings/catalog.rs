//! Owns the list of every setting that the program knows: the reference hub's names and its own.

/// What the program does with a setting that is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Takes effect as documented.
    Used,
    /// Takes effect through another setting or with a narrower meaning; the text says how.
    Mapped(&'static str),
    /// Accepted so that existing deployments start, without effect; the text says why.
    Ignored(&'static str),
}

/// One known setting.
#[derive(Clone, Copy, Debug)]
pub struct KnownSetting {
    /// Documented spelling; `:` separates sections. A name that ends in `:*` covers a whole section.
    pub name: &'static str,
    /// What giving it does.
    pub effect: Effect,
    /// The program's own setting: its environment spelling is `EDGEHUB_` + the name with `__` for `:`.
    pub own: bool,
    /// The value must never be printed.
    pub secret: bool,
}

impl KnownSetting {
    /// The name in the form in which names are compared: lower case, `:` between sections.
    pub fn id(&self) -> String {
        setting_id(self.name)
    }

    /// The spelling for an environment variable.
    pub fn environment_name(&self) -> String {
        let name = self.name.replace(':', "__");
        if self.own { format!("EDGEHUB_{}", name.to_uppercase()) } else { name }
    }
}

/// Brings a name into the form in which names are compared: lower case, and `__`, `:` and `.` all separate
/// sections (`mqttSettings__enabled` = `mqttSettings:enabled` = `mqttSettings.enabled` in a file).
pub fn setting_id(name: &str) -> String {
    name.trim().to_lowercase().replace("__", ":").replace('.', ":")
}

/// Finds a known setting by its compared form.
pub(super) fn find(id: &str) -> Option<&'static KnownSetting> {
    KNOWN.iter().find(|known| match known.name.strip_suffix('*') {
        Some(section) => {
            let section = setting_id(section);
            id.len() > section.len() && id.starts_with(&section)
        }
        None => known.id() == id,
    })
}

/// Every known setting, by the chapters of the reference's documentation, the program's own ones last.
pub fn known() -> &'static [KnownSetting] {
    KNOWN
}

const fn used(name: &'static str) -> KnownSetting {
    KnownSetting { name, effect: Effect::Used, own: false, secret: false }
}
const fn own(name: &'static str) -> KnownSetting {
    KnownSetting { name, effect: Effect::Used, own: true, secret: false }
}
const fn mapped(name: &'static str, how: &'static str) -> KnownSetting {
    KnownSetting { name, effect: Effect::Mapped(how), own: false, secret: false }
}
const fn ignored(name: &'static str, why: &'static str) -> KnownSetting {
    KnownSetting { name, effect: Effect::Ignored(why), own: false, secret: false }
}

const RENEWAL: &str = "the expiry is looked at every minute, and a certificate of the workload API is renewed without a restart";
const OWN_THREADS: &str = "connection threads are set by listen.threads";
const OWN_WINDOW: &str = "the window towards a module is set by delivery.module_window";
const OWN_STORE: &str = "the store sizes itself";
const NO_BACKUP: &str = "the store in memory has no backup; use the persistent store";
const NO_EXPERIMENT: &str = "what it switched on is always there or does not exist";
const NO_TEMPLATES: &str = "the topic names of the protocol are fixed";
const NO_BROKER: &str = "left over from a feature that the reference removed";

const KNOWN: &[KnownSetting] = &[
    // Identity and environment
    used("IOTEDGE_DEVICEID"),
    used("IOTEDGE_MODULEID"),
    used("IOTEDGE_IOTHUBHOSTNAME"),
    used("IOTEDGE_GATEWAYHOSTNAME"),
    used("EdgeDeviceHostName"),
    used("IOTEDGE_WORKLOADURI"),
    used("IOTEDGE_MODULEGENERATIONID"),
    used("IOTEDGE_APIVERSION"),
    ignored("IOTEDGE_AUTHSCHEME", "the reference does not evaluate it either"),
    ignored("IOTEDGE_MANAGEMENTURI", "it belongs to the agent"),
    KnownSetting { name: "IotHubConnectionString", effect: Effect::Used, own: false, secret: true },
    used("EdgeHubDevServerCertificateFile"),
    used("EdgeHubDevServerPrivateKeyFile"),
    used("EdgeHubDevTrustBundleFile"),
    ignored("EdgeModuleHubServerCertificateFile", "PFX is not read; use the three EdgeHubDev… PEM files"),
    ignored("EdgeModuleHubServerCAChainCertificateFile", "use the three EdgeHubDev… PEM files"),
    // Listeners
    used("mqttSettings:enabled"),
    used("amqpSettings:enabled"),
    used("amqpSettings:port"),
    ignored("amqpSettings:scheme", "the port speaks TLS; listen.amqp_plain opens one without"),
    ignored("amqpSettings:delayedBatchingEnabled", "dispositions of one turn are always sent together"),
    used("httpSettings:enabled"),
    used("httpSettings:port"),
    used("httpSettings:metrics_port"),
    used("ClientCertAuthEnabled"),
    used("SslProtocols"),
    used("MaxConnectedClients"),
    used("MessageAckTimeoutSecs"),
    used("protocolTimeoutInSecs"),
    ignored("mqttSettings:MaxInboundMessageSize", "a packet has at most 262144 bytes"),
    used("mqttSettings:MaxPendingInboundAcknowledgements"),
    used("mqttSettings:ConnectArrivalTimeout"),
    used("mqttSettings:MaxKeepAliveTimeout"),
    mapped("mqttSettings:DeviceReceiveAckTimeout", "MessageAckTimeoutSecs decides for every consumer"),
    used("mqttSettings:ListenBacklogSize"),
    mapped("mqttSettings:ThreadCount", "read as listen.threads where that is not given"),
    ignored("mqttSettings:EventLoopCount", OWN_THREADS),
    ignored("MqttEventsProcessorThreadCount", OWN_THREADS),
    ignored("mqttSettings:UsePooledBuffers", "buffers are slices of the receive buffer"),
    ignored("mqttSettings:IotHubClient:DefaultPublishToClientQoS", "deliveries use the quality subscribed"),
    ignored("mqttSettings:IotHubClient:MaxOutboundRetransmissionCount", OWN_WINDOW),
    ignored("mqttSettings:IotHubClient:MaxPendingInboundMessages", OWN_WINDOW),
    ignored("mqttSettings:IotHubClient:MaxPendingOutboundMessages", OWN_WINDOW),
    ignored("mqttSettings:RetainPropertyName", NO_TEMPLATES),
    ignored("mqttSettings:DupPropertyName", NO_TEMPLATES),
    ignored("mqttSettings:QoSPropertyName", NO_TEMPLATES),
    ignored("mqttTopicNameConversion:*", NO_TEMPLATES),
    // Authentication and scope
    used("AuthenticationMode"),
    used("TrackDeviceState"),
    used("NestedEdgeEnabled"),
    ignored("CacheTokens", "accepted tokens are always kept in memory, and never on disk"),
    used("DeviceScopeCacheRefreshRateSecs"),
    used("DeviceScopeCacheRefreshDelaySecs"),
    used("ApiProxyModuleId"),
    used("ServerCertificateRenewAfterInMs"),
    ignored("MaxCheckCertExpiryInMs", RENEWAL),
    // Upstream
    used("UpstreamProtocol"),
    used("https_proxy"),
    used("no_proxy"),
    ignored("IotHubConnectionPoolSize", "one connection carries all identities"),
    ignored("CloudConnectionIdleTimeoutSecs", "links follow their clients"),
    ignored("CloseCloudConnectionOnIdleTimeout", "links follow their clients"),
    ignored("CloseCloudConnectionOnDeviceDisconnect", "links follow their clients"),
    used("CloudOperationTimeoutSecs"),
    ignored("CloudConnectionHangingTimeoutSecs", "every network wait has a deadline of its own"),
    ignored("UseServerHeartbeat", "the connection always has a heartbeat"),
    ignored("ConnectivityCheckFrequencySecs", "the connection's heartbeat is the check"),
    used("MaxUpstreamBatchSize"),
    ignored("UpstreamFanOutFactor", "one connection carries all senders"),
    ignored("experimentalFeatures:*", NO_EXPERIMENT),
    // Store
    used("usePersistentStorage"),
    ignored("storeAndForwardEnabled", "messages are always stored before they are acknowledged"),
    ignored("storeAndForward:timeToLiveSecs", "the configuration says it"),
    used("StorageFolder"),
    ignored("EnableNonPersistentStorageBackup", NO_BACKUP),
    ignored("BackupFolder", NO_BACKUP),
    ignored("OptimizeForPerformance", OWN_STORE),
    ignored("RocksDB_MaxTotalWalSize", OWN_STORE),
    ignored("RocksDB_MaxManifestFileSize", OWN_STORE),
    ignored("RocksDB_MaxOpenFiles", OWN_STORE),
    ignored("Storage_LogLevel", "the store reports through RuntimeLogLevel"),
    ignored("CheckEntireQueueOnCleanup", "cleanup always covers the entire queue"),
    ignored("MessageCleanupIntervalSecs", "settled messages give their space back at once"),
    used("EncryptTwinStore"),
    // Twins and configuration
    used("configSource"),
    ignored("routes:*", "routes come from the twin or from --manifest"),
    used("ConfigRefreshFrequencySecs"),
    used("MinTwinSyncPeriodSecs"),
    used("ReportedPropertiesSyncFrequencySecs"),
    ignored("TwinManagerVersion", "there is one implementation"),
    // Diagnostics
    used("RuntimeLogLevel"),
    ignored("EnableRoutingLogging", "set RuntimeLogLevel=debug"),
    ignored("EnableSdkDebugLogs", "there is no SDK inside"),
    used("metrics:listener:MetricsEnabled"),
    used("MetricsHistogramMaxAge"),
    ignored("metrics:listener:host", "the reference does not evaluate it either"),
    ignored("metrics:listener:port", "the reference does not evaluate it either"),
    ignored("metrics:listener:suffix", "the reference does not evaluate it either"),
    used("ShutdownWaitPeriod"),
    // Container
    ignored("EDGEHUBUSER_ID", "the program does not change its user"),
    ignored("TARGETARCH", "the program does not depend on it"),
    ignored("mqttBrokerSettings:*", NO_BROKER),
    ignored("authAgentSettings:*", NO_BROKER),
    ignored("ModuleRequestThrottleTimeout", "it belongs to the daemon"),
    // The program's own
    own("listen:mqtt_address"),
    own("listen:mqtt_port"),
    own("listen:mqtt_plain"),
    own("listen:amqp_address"),
    own("listen:amqp_plain"),
    own("listen:https_address"),
    own("listen:metrics_address"),
    own("listen:threads"),
    own("listen:handshake_timeout_secs"),
    own("listen:handshakes_waiting_max"),
    own("upstream:host"),
    own("upstream:kind"),
    KnownSetting { name: "upstream:url", effect: Effect::Used, own: true, secret: true },
    own("upstream:address"),
    own("upstream:targets:*"),
    own("upstream:amqp_port"),
    own("upstream:mqtt_port"),
    own("upstream:https_port"),
    own("upstream:trust_file"),
    own("store:durability"),
    own("store:interval_millis"),
    own("store:overflow"),
    own("store:free_floor_bytes"),
    own("store:dead_letters_max_bytes"),
    own("delivery:module_window"),
    own("routing:strict"),
    own("delivery:lower_priority_share_percent"),
    own("admin:socket"),
    own("log:format"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_found_by_their_own_id() {
        let mut seen = BTreeSet::new();
        for known in known() {
            assert!(seen.insert(known.id()), "{} is listed twice", known.name);
            let probe = known.id().replace('*', "x");
            assert_eq!(find(&probe).map(|found| found.name), Some(known.name));
        }
    }

    #[test]
    fn section_wildcards_need_a_member() {
        assert!(find("routes:").is_none());
        assert!(find("routes:a").is_some());
        assert!(find("routes").is_none());
    }

    #[test]
    fn own_names_have_a_prefix_in_the_environment() {
        let port = find("listen:mqtt_port").expect("listed");
        assert_eq!(port.environment_name(), "EDGEHUB_LISTEN__MQTT_PORT");
        assert_eq!(find("mqttsettings:enabled").expect("listed").environment_name(), "mqttSettings__enabled");
    }
}
