//! Settings: what is published about them is true.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use edgehub::settings::show::Shown;
use edgehub::settings::{
    Effect, Notice, Settings, SettingsError, Sources, ValueKind, known, reference, schema, setting_id,
};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const MARK: &str = "<!-- From here on: the output of `edgehub config reference`. -->\n";
const KEY: &str = "cGxhbnRlZCBzZWNyZXQgbnVtYmVyIG9uZQ==";

fn file(path: &str) -> String {
    let path = Path::new(REPOSITORY).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn base() -> Vec<(String, String)> {
    [
        ("IotHubConnectionString", format!("HostName=h;DeviceId=e;ModuleId=$edgeHub;SharedAccessKey={KEY}")),
        ("EdgeHubDevServerCertificateFile", "/c/server.pem".into()),
        ("EdgeHubDevServerPrivateKeyFile", "/c/server.key".into()),
        ("StorageFolder", "/x".into()),
        ("EDGEHUB_UPSTREAM__URL", "amqps://broker".into()),
        ("EDGEHUB_UPSTREAM__ADDRESS", "telemetry".into()),
    ]
    .map(|(name, text)| (name.to_owned(), text))
    .to_vec()
}

fn load(name: &str, text: &str) -> Result<Vec<Notice>, SettingsError> {
    let mut environment = base();
    environment.retain(|(given, _)| given != name);
    environment.push((name.into(), text.into()));
    Settings::load(Sources { environment, ..Sources::default() }).map(|(_, notices)| notices)
}

#[test]
fn the_published_reference_is_the_catalog_s() {
    let published = file("docs/reference/settings.md");
    let tables = published.split_once(MARK).expect("the mark is there").1;
    assert_eq!(
        tables,
        reference::markdown().unwrap(),
        "replace what follows the mark in docs/reference/settings.md by the output of `edgehub config reference`"
    );
}

#[test]
fn the_published_schema_is_the_catalog_s() {
    let published: serde_json::Value =
        serde_json::from_str(&file("docs/reference/settings.schema.json")).unwrap();
    assert_eq!(
        published,
        schema::schema().unwrap(),
        "`edgehub config schema > docs/reference/settings.schema.json` brings it up to date"
    );
}

/// Every name of the reference hub's documentation, as it is written there.
const OF_THE_REFERENCE: &str = "
IOTEDGE_DEVICEID IOTEDGE_MODULEID IOTEDGE_IOTHUBHOSTNAME IOTEDGE_GATEWAYHOSTNAME EdgeDeviceHostName
IOTEDGE_MODULEGENERATIONID IOTEDGE_WORKLOADURI IOTEDGE_APIVERSION IOTEDGE_AUTHSCHEME RuntimeLogLevel UpstreamProtocol
IotHubConnectionString EdgeHubDevServerCertificateFile EdgeHubDevServerPrivateKeyFile EdgeHubDevTrustBundleFile
EdgeModuleHubServerCertificateFile EdgeModuleHubServerCAChainCertificateFile
mqttSettings:enabled amqpSettings:enabled amqpSettings:port amqpSettings:scheme amqpSettings:delayedBatchingEnabled
httpSettings:enabled httpSettings:port httpSettings:metrics_port ClientCertAuthEnabled SslProtocols MaxConnectedClients
MessageAckTimeoutSecs protocolTimeoutInSecs mqttSettings:MaxInboundMessageSize
mqttSettings:MaxPendingInboundAcknowledgements mqttSettings:ConnectArrivalTimeout mqttSettings:MaxKeepAliveTimeout
mqttSettings:DeviceReceiveAckTimeout mqttSettings:IotHubClient.DefaultPublishToClientQoS
mqttSettings:IotHubClient.MaxOutboundRetransmissionCount mqttSettings:IotHubClient.MaxPendingInboundMessages
mqttSettings:IotHubClient.MaxPendingOutboundMessages mqttSettings:RetainPropertyName mqttSettings:DupPropertyName
mqttSettings:QoSPropertyName mqttSettings:ThreadCount mqttSettings:ListenBacklogSize mqttSettings:EventLoopCount
mqttSettings:UsePooledBuffers mqttTopicNameConversion:InboundTemplates:0 mqttTopicNameConversion:OutboundTemplates:0
AuthenticationMode TrackDeviceState NestedEdgeEnabled CacheTokens DeviceScopeCacheRefreshRateSecs
DeviceScopeCacheRefreshDelaySecs ApiProxyModuleId ServerCertificateRenewAfterInMs MaxCheckCertExpiryInMs https_proxy
IotHubConnectionPoolSize CloudConnectionIdleTimeoutSecs CloseCloudConnectionOnIdleTimeout
CloseCloudConnectionOnDeviceDisconnect CloudOperationTimeoutSecs CloudConnectionHangingTimeoutSecs UseServerHeartbeat
ConnectivityCheckFrequencySecs MaxUpstreamBatchSize UpstreamFanOutFactor experimentalFeatures:enabled
experimentalFeatures:disableCloudSubscriptions experimentalFeatures:disableConnectivityCheck usePersistentStorage
storeAndForwardEnabled storeAndForward:timeToLiveSecs StorageFolder EnableNonPersistentStorageBackup BackupFolder
OptimizeForPerformance RocksDB_MaxTotalWalSize RocksDB_MaxManifestFileSize RocksDB_MaxOpenFiles Storage_LogLevel
CheckEntireQueueOnCleanup MessageCleanupIntervalSecs EncryptTwinStore configSource ConfigRefreshFrequencySecs
MinTwinSyncPeriodSecs ReportedPropertiesSyncFrequencySecs TwinManagerVersion EnableRoutingLogging EnableSdkDebugLogs
metrics:listener:MetricsEnabled MetricsHistogramMaxAge metrics:listener:host metrics:listener:port
metrics:listener:suffix ShutdownWaitPeriod EDGEHUBUSER_ID TARGETARCH MqttEventsProcessorThreadCount
ModuleRequestThrottleTimeout mqttBrokerSettings:enabled authAgentSettings:enabled";

#[test]
fn every_setting_of_the_reference_is_honoured_or_named() {
    for name in OF_THE_REFERENCE.split_whitespace() {
        let variable = name.replace([':', '.'], "__");
        let id = setting_id(name);
        let entry = known().iter().find(|known| {
            known.id() == id
                || known.name.strip_suffix('*').is_some_and(|section| id.starts_with(&setting_id(section)))
        });
        let entry = entry.unwrap_or_else(|| panic!("{name} is not in the catalog"));
        if entry.effect == Effect::Used {
            continue;
        }
        let notices = load(&variable, "1").unwrap_or_else(|error| panic!("{name}: {error}"));
        let named = notices.iter().any(|notice| {
            notice.to_string().starts_with(&format!("setting {}", entry.name.trim_end_matches(":*")))
                && matches!(notice, Notice::Ignored { .. } | Notice::Mapped { .. })
        });
        assert!(named, "{name} is neither honoured nor named: {notices:?}");
    }
}

#[test]
fn the_program_takes_the_values_that_are_published_and_no_others() {
    for setting in known() {
        let Some(described) = setting.description() else { continue };
        let name = setting.environment_name();
        let takes = |text: &str| match load(&name, text) {
            Ok(notices) => !notices.iter().any(|notice| matches!(notice, Notice::FellBack { .. })),
            Err(_) => false,
        };
        let (good, bad): (Vec<String>, Vec<String>) = match described.kind {
            ValueKind::Flag => (vec!["true".into(), "false".into()], vec!["maybe".into(), "1".into()]),
            ValueKind::Integer { min, max } => {
                let below = min.checked_sub(1).map_or("-1".into(), |below| below.to_string());
                (vec![min.to_string(), max.to_string()], vec![below, (max + 1).to_string(), "x".into()])
            }
            ValueKind::Span => {
                (vec!["00:10:00".into(), "1.02:03:04.5".into()], vec!["600".into(), "x".into()])
            }
            ValueKind::Choice(words) => {
                (words.iter().map(|word| (*word).to_owned()).collect(), vec!["x".into()])
            }
            ValueKind::Listener => {
                (vec!["off".into(), "1883".into(), "[::1]:1883".into()], vec!["on".into()])
            }
            ValueKind::Text => continue,
        };
        for text in good {
            assert!(takes(&text), "{name} refuses {text}, which is published: {:?}", load(&name, &text));
        }
        for text in bad {
            assert!(!takes(&text), "{name} takes {text}, which is not published");
        }
    }
}

#[test]
fn what_is_shown_has_origins_and_no_secret() {
    let folder = tempfile::tempdir().unwrap();
    let appsettings = folder.path().join("appsettings_hub.json");
    std::fs::write(
        &appsettings,
        "\u{feff}{\"MaxConnectedClients\": 7, \"mqttSettings\": {\"enabled\": false, \"nonsense\": 1}, \
         \"MessageAckTimeoutSecs\": \"8\", \"routes\": {\"a\": \"FROM\"}}",
    )
    .unwrap();
    let toml = folder.path().join("edgehub.toml");
    std::fs::write(&toml, "MessageAckTimeoutSecs = 9\nMaxUpstreamBatchSize = 9\n[listen]\nmqttport = 1\n")
        .unwrap();
    let mut environment = base();
    environment.push(("MaxUpstreamBatchSize".into(), "10".into()));
    environment.push(("https_proxy".into(), "http://me:planted@proxy:3128".into()));
    environment.push(("RuntimeLogLevel".into(), format!("HostName=h;SharedAccessKey={KEY}")));
    environment.push(("EDGEHUB_NONSENSE".into(), KEY.into()));
    let flags = vec![("--set".to_owned(), "listen.threads".to_owned(), "3".to_owned())];
    let sources = Sources { appsettings: Some(appsettings.clone()), file: Some(&toml), environment, flags };
    let shown = Shown::load(sources.clone(), false).unwrap();
    let of = |name: &str| {
        let found = shown.settings.iter().find(|setting| setting.name == name);
        let setting = found.unwrap_or_else(|| panic!("{name} is not shown"));
        (setting.value.as_str(), setting.origin.kind, setting.origin.place.clone().unwrap_or_default())
    };
    let appsettings = appsettings.display().to_string();
    assert_eq!(of("MaxConnectedClients"), ("7", "file", appsettings.clone()));
    assert_eq!(of("mqttSettings.enabled"), ("false", "file", appsettings));
    assert_eq!(of("MessageAckTimeoutSecs"), ("9", "file", toml.display().to_string()));
    assert_eq!(of("MaxUpstreamBatchSize"), ("10", "environment", "MaxUpstreamBatchSize".into()));
    assert_eq!(of("listen.threads"), ("3", "flag", "--set".into()));
    assert_eq!(of("CloudOperationTimeoutSecs"), ("20", "default", String::new()));
    assert_eq!(of("IotHubConnectionString").0, "***");
    assert_eq!(of("RuntimeLogLevel").0, "***");
    assert!(!of("https_proxy").0.contains("planted") && of("https_proxy").1 == "environment");
    let unknown: Vec<_> = shown.unknown.iter().map(|unknown| unknown.name.as_str()).collect();
    assert_eq!(unknown, ["mqttSettings:nonsense", "listen.mqttport", "EDGEHUB_NONSENSE"]);
    assert!(shown.error.is_none());
    let texts = shown.text() + &serde_json::to_string(&shown).unwrap();
    assert!(!texts.contains("planted") && !texts.contains(KEY), "{texts}");

    let given = Shown::load(sources, true).unwrap();
    assert!(given.settings.iter().all(|setting| setting.origin.kind != "default"));
}

#[test]
fn a_broken_file_of_the_reference_is_named_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("appsettings_hub.json");
    let deep = format!("{}1{}", "{\"a\":".repeat(1_000), "}".repeat(1_000));
    for (text, part) in
        [("{\n  \"a\": ,\n}", "line 2, column 8"), ("[]", "an object"), (deep.as_str(), "recursion")]
    {
        std::fs::write(&path, text).unwrap();
        let sources = Sources { appsettings: Some(path.clone()), environment: base(), ..Sources::default() };
        let line = Settings::load(sources).unwrap_err().to_string();
        assert!(line.contains(part) && line.contains("appsettings_hub.json"), "{line}");
    }
    std::fs::remove_file(&path).unwrap();
    let sources = Sources { appsettings: Some(path), environment: base(), ..Sources::default() };
    assert!(Settings::load(sources).is_ok(), "a file that is not there is no fault");
}
