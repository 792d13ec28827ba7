//! Settings: a table of sources and what comes out of them.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use edgehub::settings::show::Shown;
use edgehub::settings::{
    AdminSocket, Durability, HubProof, LogLevel, Notice, Origin, Settings, SettingsError, Sources, StoreKind,
    TlsVersions, UpstreamProtocol, WorkloadUri, known,
};
use edgehub_routing::OverflowPolicy;

const IDENTITY: (&str, &str) = (
    "IotHubConnectionString",
    "HostName=h.example;DeviceId=edge1;ModuleId=$edgeHub;SharedAccessKey=c2VjcmV0",
);
const CERTIFICATE: (&str, &str) = ("EdgeHubDevServerCertificateFile", "/c/server.pem");
const KEY: (&str, &str) = ("EdgeHubDevServerPrivateKeyFile", "/c/server.key");

type Loaded = Result<(Settings, Vec<Notice>), SettingsError>;

fn load_bare(file: Option<&str>, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Loaded {
    let mut written = tempfile::NamedTempFile::new().unwrap();
    written.write_all(file.unwrap_or_default().as_bytes()).unwrap();
    Settings::load(Sources {
        appsettings: None,
        file: file.map(|_| written.path()),
        environment: environment.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect(),
        flags: flags.iter().map(|(name, text)| ("--set".into(), (*name).into(), (*text).into())).collect(),
    })
}

fn load_from(file: Option<&str>, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Loaded {
    let mut all = vec![IDENTITY, CERTIFICATE, KEY];
    all.extend_from_slice(environment);
    load_bare(file, &all, flags)
}

fn with_environment(environment: &[(&str, &str)]) -> (Settings, Vec<Notice>) {
    load_from(None, environment, &[]).unwrap()
}

#[test]
fn the_defaults_are_those_of_the_reference() {
    let (settings, notices) = with_environment(&[]);
    assert_eq!(settings.listen.mqtt.unwrap().to_string(), "*:8883");
    assert_eq!(settings.listen.amqp.unwrap().to_string(), "*:5671");
    assert_eq!(settings.listen.https.unwrap().to_string(), "*:443");
    assert_eq!((settings.listen.mqtt_plain, settings.listen.amqp_plain), (None, None));
    assert_eq!(settings.listen.metrics.to_string(), "*:9600");
    assert_eq!(settings.listen.clients_max, 10_000);
    assert_eq!(settings.tls.versions, TlsVersions { tls12: true, tls13: true });
    assert!(settings.tls.client_certificates);
    assert_eq!(settings.mqtt.inbound_window, 1024);
    assert_eq!(settings.mqtt.keep_alive_max, Duration::from_secs(600));
    assert_eq!(settings.upstream.host.as_str(), "h.example");
    assert_eq!((settings.upstream.amqp_port, settings.upstream.https_port), (5671, 443));
    assert_eq!(settings.upstream.mqtt_port, 8883);
    assert_eq!(settings.upstream.batch_max, 10);
    assert_eq!(settings.delivery.module_window, 16);
    assert!(!settings.routing.strict);
    assert_eq!(settings.delivery.ack_timeout, Duration::from_secs(30));
    assert_eq!(settings.delivery.lower_share_percent, 0);
    assert_eq!(settings.store.overflow, OverflowPolicy::RejectNew);
    assert_eq!(
        (settings.store.free_floor_bytes, settings.store.dead_letters_max_bytes),
        (64 << 20, 64 << 20)
    );
    assert!(settings.scope.tracks_senders);
    assert_eq!(settings.metrics.message_size_window, Duration::from_secs(3600));
    assert_eq!(settings.log_level, LogLevel::Info);
    assert!(matches!(&settings.store.kind, StoreKind::Persistent { folder, durability: Durability::Sync }
        if folder.ends_with("edgeHub")));
    assert!(matches!(notices[..], [Notice::TemporaryStore(_)]), "{notices:?}");
}

#[test]
fn delivery_and_the_store_take_their_own_settings_and_refuse_bad_ones() {
    let (settings, _) = with_environment(&[
        ("EDGEHUB_STORE__OVERFLOW", "dead-letter"),
        ("EDGEHUB_STORE__DEAD_LETTERS_MAX_BYTES", "0"),
        ("EDGEHUB_DELIVERY__LOWER_PRIORITY_SHARE_PERCENT", "20"),
        ("TrackDeviceState", "false"),
    ]);
    assert_eq!(settings.store.overflow, OverflowPolicy::DeadLetter);
    assert_eq!(settings.store.dead_letters_max_bytes, 0);
    assert_eq!(settings.delivery.lower_share_percent, 20);
    assert!(!settings.scope.tracks_senders);
    for (name, text) in [
        ("EDGEHUB_STORE__OVERFLOW", "drop"),
        ("EDGEHUB_STORE__FREE_FLOOR_BYTES", "-1"),
        ("EDGEHUB_DELIVERY__LOWER_PRIORITY_SHARE_PERCENT", "51"),
    ] {
        let error = load_from(None, &[(name, text)], &[]).expect_err(name).to_string();
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn names_may_be_in_any_case_and_with_either_separator() {
    for name in
        ["mqttSettings__enabled", "MQTTSETTINGS__ENABLED", "mqttSettings:enabled", "mqttsettings:Enabled"]
    {
        let (settings, _) = with_environment(&[(name, "False")]);
        assert!(settings.listen.mqtt.is_none(), "{name}");
    }
    for name in ["EDGEHUB_LISTEN__MQTT_PORT", "edgehub_listen:mqtt_port", "EdgeHub_Listen__Mqtt_Port"] {
        let (settings, _) = with_environment(&[(name, "1")]);
        assert_eq!(settings.listen.mqtt.unwrap().port, 1, "{name}");
    }
    let (settings, _) = with_environment(&[("metrics__listener__metricsenabled", "false")]);
    assert!(!settings.metrics.enabled);
}

#[test]
fn a_higher_layer_wins() {
    let file = Some("MessageAckTimeoutSecs = 1\nMaxConnectedClients = 1\nMaxUpstreamBatchSize = 1");
    let environment = [("MessageAckTimeoutSecs", "2"), ("maxconnectedclients", "2")];
    let (settings, _) = load_from(file, &environment, &[("MessageAckTimeoutSecs", "3")]).unwrap();
    assert_eq!(settings.delivery.ack_timeout, Duration::from_secs(3));
    assert_eq!(settings.listen.clients_max, 2);
    assert_eq!(settings.upstream.batch_max, 1);
}

#[test]
fn the_file_takes_tables_and_reference_names() {
    let file = r#"
        runtimeloglevel = "debug,mqtt=info"
        StorageFolder = "/var/lib/edgehub"
        [listen]
        mqtt_address = "[::1]"
        mqtt_plain = 1883
        threads = 3
        [store]
        durability = "interval"
        interval_millis = 20
        [storeAndForward]
        timeToLiveSecs = 7200
        [mqttSettings]
        MaxKeepAliveTimeout = "00:20:00"
        "IotHubClient.DefaultPublishToClientQoS" = 1
        [upstream]
        host = "gateway"
        amqp_port = 15671
        trust_file = "/c/roots.pem"
    "#;
    let (settings, notices) = load_from(Some(file), &[], &[]).unwrap();
    assert_eq!(settings.log_level, LogLevel::Debug);
    assert_eq!(settings.listen.mqtt.unwrap().to_string(), "[::1]:8883");
    assert_eq!(settings.listen.mqtt_plain.unwrap().to_string(), "127.0.0.1:1883");
    assert_eq!(settings.listen.threads.get(), 3);
    assert_eq!(settings.mqtt.keep_alive_max, Duration::from_secs(1200));
    assert_eq!(settings.upstream.host.as_str(), "gateway");
    assert_eq!(settings.upstream.trust_file.as_deref(), Some(Path::new("/c/roots.pem")));
    let folder = "/var/lib/edgehub/edgeHub".into();
    let durability = Durability::Interval(Duration::from_millis(20));
    assert_eq!(settings.store.kind, StoreKind::Persistent { folder, durability });
    assert!(matches!(&notices[..], [Notice::Ignored { .. }, Notice::Ignored { .. }]), "{notices:?}");
}

#[test]
fn unknown_names_are_reported_when_they_are_meant_for_us() {
    let (_, notices) = with_environment(&[
        ("PATH", "/bin"),
        ("HOME", "/root"),
        ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
        ("my__section", "x"),
        ("RuntimeLogLevle", "debug"),
        ("StorageFolders", "/x"),
        ("mqttSettings__enable", "true"),
        ("mqttSettings__nonsense", "true"),
        ("EDGEHUB_LISTEN__PORT", "1"),
        ("EDGEHUB_LISTEN__MQTTPORT", "1"),
        ("StorageFolder", "/x"),
    ]);
    let mut found: Vec<_> = notices
        .iter()
        .map(|notice| match notice {
            Notice::Unknown { name, suggestion, .. } => (name.as_str(), suggestion.as_deref()),
            other => panic!("{other:?}"),
        })
        .collect();
    found.sort_unstable();
    assert_eq!(
        found,
        [
            ("EDGEHUB_LISTEN__MQTTPORT", Some("EDGEHUB_LISTEN__MQTT_PORT")),
            ("EDGEHUB_LISTEN__PORT", None),
            ("RuntimeLogLevle", Some("RuntimeLogLevel")),
            ("StorageFolders", Some("StorageFolder")),
            ("mqttSettings__enable", Some("mqttSettings:enabled")),
            ("mqttSettings__nonsense", None),
        ]
    );
    let (_, notices) = load_from(Some("StorageFolder = '/x'\nwhatever = 1\n[a]\nb = 2"), &[], &[]).unwrap();
    let lines: Vec<_> = notices.iter().map(ToString::to_string).collect();
    assert_eq!(lines.len(), 2);
    assert!(
        lines[0].starts_with("setting a.b (file /") && lines[0].ends_with("is unknown and has no effect")
    );
}

#[test]
fn ignored_and_mapped_settings_say_why() {
    let (settings, notices) = with_environment(&[
        ("StorageFolder", "/x"),
        ("OptimizeForPerformance", "false"),
        ("mqttSettings__ThreadCount", "1"),
        ("experimentalFeatures__nestedEdgeEnabled", "true"),
        ("EnableRoutingLogging", "  "),
    ]);
    assert_eq!(settings.listen.threads.get(), 1);
    let lines: Vec<_> = notices.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        [
            "setting OptimizeForPerformance (environment variable OptimizeForPerformance) has no effect: the \
             store sizes itself",
            "setting experimentalFeatures__nestedEdgeEnabled (environment variable \
             experimentalFeatures__nestedEdgeEnabled) has no effect: what it switched on is always there or \
             does not exist",
            "setting mqttSettings:ThreadCount (environment variable mqttSettings__ThreadCount) is taken in a \
             different way: read as listen.threads where that is not given",
        ]
    );
}

#[test]
fn a_value_that_does_not_convert_names_setting_origin_and_shape() {
    for (name, text, expected) in [
        ("mqttSettings__enabled", "yes", "expected true or false"),
        ("MessageAckTimeoutSecs", "-1", "expected a whole number from 1 to"),
        ("httpSettings__metrics_port", "70000", "expected a whole number from 0 to 65535"),
        ("MetricsHistogramMaxAge", "3600", "expected a time span such as 01:30:00"),
        ("EDGEHUB_STORE__DURABILITY", "disk", "expected sync, interval, os or memory"),
        ("EDGEHUB_LISTEN__MQTT_PLAIN", "yes", "expected off, a port (bound to loopback)"),
        ("EDGEHUB_LISTEN__AMQP_PLAIN", "on", "expected off, a port (bound to loopback)"),
        ("amqpSettings__port", "65536", "expected a whole number from 0 to 65535"),
        ("EDGEHUB_LISTEN__MQTT_ADDRESS", "host", "expected any, or an IP address"),
        ("EDGEHUB_UPSTREAM__HOST", "amqps://x", "expected a DNS name or an IP address"),
        ("EDGEHUB_LISTEN__THREADS", "0", "expected a whole number from 1 to 256"),
    ] {
        let line = load_from(None, &[(name, text)], &[]).unwrap_err().to_string();
        assert!(line.contains(&format!("(environment variable {name}) = {text:?}")), "{line}");
        assert!(line.contains(expected), "{line}");
    }
    let line = load_from(Some("\n[listen]\nmqtt_port = \n"), &[], &[]).unwrap_err().to_string();
    assert!(line.contains(", line 3, column ") && !line.contains('\n'), "{line}");
    let line = load_from(None, &[], &[("no.such", "1")]).unwrap_err().to_string();
    assert_eq!(line, "command line flag --set: there is no setting no.such; see the reference of settings");
}

#[test]
fn closed_lists_fall_back_with_a_notice_and_old_tls_is_refused() {
    for (name, text, falls_back) in [
        ("RuntimeLogLevel", "loud", true),
        ("SslProtocols", "tls1.2, ssl3", true),
        ("SslProtocols", "ssl3", true),
        ("SslProtocols", "TLSv1_3", false),
    ] {
        let (_, notices) = with_environment(&[(name, text), ("StorageFolder", "/x")]);
        assert_eq!(matches!(&notices[..], [Notice::FellBack { .. }]), falls_back, "{name}: {notices:?}");
    }
    let (settings, _) = with_environment(&[("SslProtocols", "tls12")]);
    assert_eq!(settings.tls.versions, TlsVersions { tls12: true, tls13: false });
    let refused = load_from(None, &[("SslProtocols", "tls1.0,tls1.1")], &[]);
    assert!(matches!(refused, Err(SettingsError::OutdatedTls { origin: Origin::Environment(_) })));
}

#[test]
fn the_way_up_takes_websockets_and_a_proxy() {
    for (text, protocol, notices) in [
        ("Amqp", UpstreamProtocol::Amqp, 0),
        ("AMQPWS", UpstreamProtocol::AmqpWs, 0),
        ("mqtt", UpstreamProtocol::Mqtt, 0),
        ("MqttWs", UpstreamProtocol::MqttWs, 0),
        ("Http", UpstreamProtocol::Amqp, 1),
    ] {
        let (settings, told) = with_environment(&[("UpstreamProtocol", text), ("StorageFolder", "/x")]);
        assert_eq!((settings.upstream.protocol, told.len()), (protocol, notices), "{text}: {told:?}");
    }
    let proxy = ("HTTPS_PROXY", "http://user:topsecret@proxy:3128");
    let (settings, _) = with_environment(&[proxy, ("no_proxy", "h.example")]);
    let used = settings.upstream.proxy.clone().unwrap();
    assert_eq!(used.to_string(), "proxy:3128");
    assert!(used.serves("other.example", 443) && !used.serves("h.example", 443));
    assert!(!format!("{settings:?}").contains("topsecret"));
    let refused = load_from(None, &[("https_proxy", "https://user:topsecret@proxy")], &[]).unwrap_err();
    let line = format!("{refused} {refused:?}");
    assert!(line.contains("must be reached by http://") && !line.contains("topsecret"), "{line}");
}

#[test]
fn identity_comes_from_the_connection_string_or_the_environment() {
    let ids = [("IOTEDGE_DEVICEID", "e"), ("IOTEDGE_IOTHUBHOSTNAME", "h"), ("IOTEDGE_GATEWAYHOSTNAME", "up")];
    let off = ["mqttSettings__enabled", "amqpSettings__enabled", "httpSettings__enabled"]
        .map(|name| (name, "false"));
    let workload = [
        ("IOTEDGE_WORKLOADURI", "unix:///run/w.sock"),
        ("IOTEDGE_MODULEGENERATIONID", "637"),
        ("IOTEDGE_APIVERSION", "2021-12-07"),
        ("EdgeDeviceHostName", "gateway"),
    ];
    let of_daemon = [&ids[..], &workload, &[CERTIFICATE]].concat();
    let (settings, notices) = load_bare(None, &of_daemon, &[]).unwrap();
    assert_eq!(settings.hub.device_id.as_str(), "e");
    assert_eq!(settings.upstream.host.as_str(), "up");
    let HubProof::Workload(found) = &settings.hub.proof else { panic!("{:?}", settings.hub.proof) };
    assert_eq!(found.uri, WorkloadUri::Unix("/run/w.sock".into()));
    assert_eq!((&*found.generation_id, &*found.api_version), ("637", "2020-07-07"));
    // Files are for hubs with a connection string.
    assert!(settings.certificates.is_none());
    assert_eq!(notices.iter().filter(|notice| matches!(notice, Notice::Ignored { .. })).count(), 1);

    for (missing, part) in [
        ("IOTEDGE_WORKLOADURI", "nothing says who the hub is"),
        ("IOTEDGE_MODULEGENERATIONID", "setting IOTEDGE_MODULEGENERATIONID is missing"),
        ("EdgeDeviceHostName", "setting EdgeDeviceHostName is missing"),
    ] {
        let given: Vec<_> = of_daemon.iter().copied().filter(|(name, _)| *name != missing).collect();
        let line = load_bare(None, &given, &[]).unwrap_err().to_string();
        assert!(line.contains(part), "{line}");
        // A certificate's name is needed only where there is a certificate.
        let without_tls = load_bare(None, &[&given[..], &off].concat(), &[]);
        assert_eq!(without_tls.is_ok(), missing == "EdgeDeviceHostName");
    }
    let relative = ("IOTEDGE_WORKLOADURI", "run/w.sock");
    let line = load_bare(None, &[&of_daemon[..2], &of_daemon[4..], &[relative]].concat(), &[]).unwrap_err();
    assert!(line.to_string().contains("expected unix:///path"), "{line}");

    let (settings, notices) = with_environment(&[&ids[..], &workload].concat());
    assert_eq!((settings.hub.device_id.as_str(), settings.upstream.host.as_str()), ("edge1", "h.example"));
    assert!(matches!(settings.hub.proof, HubProof::Key(_)));
    assert_eq!(notices.iter().filter(|notice| matches!(notice, Notice::Ignored { .. })).count(), 4);
    assert!(matches!(load_bare(None, &off, &[]), Err(SettingsError::NoIdentity)));
}

#[test]
fn a_broken_connection_string_is_never_shown() {
    let broken = "HostName=h;DeviceId=e;ModuleId=$edgeHub;SharedAccessKey=topsecret!";
    let error = load_bare(None, &[("IotHubConnectionString", broken)], &[]).unwrap_err();
    assert!(error.to_string().ends_with("SharedAccessKey must be base64"), "{error}");
    assert!(!format!("{error} {error:?}").contains("topsecret"));
}

#[test]
fn a_tls_listener_needs_both_files() {
    for (given, missing) in [(vec![KEY], CERTIFICATE.0), (vec![CERTIFICATE], KEY.0), (vec![], CERTIFICATE.0)]
    {
        let mut environment = vec![IDENTITY];
        environment.extend(given);
        let line = load_bare(None, &environment, &[]).unwrap_err().to_string();
        assert!(line.starts_with(&format!("setting {missing} is missing")), "{line}");
    }
}

#[test]
fn every_known_setting_is_accepted_from_the_environment() {
    for known in known() {
        let name = known.environment_name().replace('*', "x");
        let (_, notices) = match load_from(None, &[(&name, "a\u{7f}b")], &[]) {
            Ok(loaded) => loaded,
            Err(SettingsError::UnknownFlagSetting { .. }) => panic!("{name}"),
            Err(_) => continue,
        };
        assert!(!notices.iter().any(|notice| matches!(notice, Notice::Unknown { .. })), "{name}");
    }
}

#[test]
fn the_admin_socket_is_found_without_the_rest_of_the_settings() {
    let found = |environment: &[(&str, &str)]| {
        let environment = environment.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
        AdminSocket::load(Sources { environment, ..Sources::default() }).unwrap()
    };
    let folder = found(&[("StorageFolder", "/var/lib/edgehub")]);
    assert_eq!(folder, AdminSocket::Default("/var/lib/edgehub/edgeHub/admin.sock".into()));
    let given = found(&[("StorageFolder", "/var/lib/edgehub"), ("EDGEHUB_ADMIN__SOCKET", "/run/edgehub/s")]);
    assert_eq!(given, AdminSocket::Given("/run/edgehub/s".into()));
    assert_eq!(found(&[("EDGEHUB_ADMIN__SOCKET", "off")]), AdminSocket::Off);
    // The hub itself reads the same.
    let (settings, _) = with_environment(&[("StorageFolder", "/var/lib/edgehub")]);
    assert_eq!(settings.admin, folder);
}

const BROKER: &str = "[upstream]\nkind = 'amqp'\nurl = 'amqp://localhost'\naddress = '/queue/rest'\n";

#[test]
fn targets_of_routes_come_from_all_layers() {
    let file = format!(
        "{BROKER}[upstream.targets]\nAlarms = '/queue/alarms'\n'plant.hot' = '/exchange/plant/{{deviceId}}'\nsame = '/queue/rest'\n"
    );
    let environment = [
        ("EDGEHUB_UPSTREAM__TARGETS__ALARMS", "/queue/newer"),
        ("EDGEHUB_UPSTREAM__TARGETS__a__b", "/queue/ab"),
    ];
    let flags = [("upstream.targets.flag", "/queue/flag"), ("upstream__targets__Same", "/queue/other")];
    let (settings, notices) = load_from(Some(&file), &environment, &flags).unwrap();
    assert!(!notices.iter().any(|notice| matches!(notice, Notice::Unknown { .. })), "{notices:?}");
    let targets = settings.upstream.broker.unwrap().targets;
    for (route, target) in [
        ("alarms", Some("/queue/newer")),
        ("plant.hot", Some("/exchange/plant/{deviceId}")),
        ("a__b", Some("/queue/ab")),
        ("flag", Some("/queue/flag")),
        ("same", Some("/queue/other")),
        ("none", None),
    ] {
        assert_eq!(targets.of(route), target, "{route}");
    }
    let (settings, _) =
        load_from(Some(&format!("{BROKER}targets = {{ same = '/queue/rest' }}\n")), &[], &[]).unwrap();
    assert_eq!(settings.upstream.broker.unwrap().targets.of("same"), None, "it is the address of all others");
}

#[test]
fn targets_that_cannot_be_are_named() {
    let long = "x".repeat(1_001);
    for (file, environment, text) in [
        (
            None,
            "/queue/a",
            "setting upstream.targets (environment variable EDGEHUB_UPSTREAM__TARGETS__a) needs another broker",
        ),
        (Some(BROKER), "/queue/{device}", "setting upstream:targets:a (environment variable"),
        (Some(BROKER), long.as_str(), "the target of route a is longer than 1000 bytes"),
    ] {
        let error = load_from(file, &[("EDGEHUB_UPSTREAM__TARGETS__a", environment)], &[]).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn each_target_is_shown_by_its_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{BROKER}targets = {{ Alarms = '/queue/alarms' }}\n")).unwrap();
    let shown = Shown::load(Sources { file: Some(file.path()), ..Sources::default() }, true).unwrap();
    let found: Vec<_> = shown.settings.iter().filter(|setting| setting.name.contains("targets")).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        (found[0].name.as_str(), found[0].environment.as_str(), found[0].value.as_str()),
        ("upstream.targets.Alarms", "EDGEHUB_UPSTREAM__TARGETS__Alarms", "/queue/alarms")
    );
}
