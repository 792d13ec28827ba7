//! The built program: exit codes, its line on standard error, the pages and the stop.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

mod running;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Output};

use running::Running;

const IDENTITY: &str = "HostName=h.example;DeviceId=edge1;ModuleId=$edgeHub;SharedAccessKey=c2VjcmV0";

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edgehub"));
    command.env_clear();
    command
}

fn failed(output: &Output, code: i32, begins: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.starts_with(begins) && text.trim_end().lines().count() == 1, "{text}");
}

#[test]
fn failures_are_one_line_and_have_their_code() {
    failed(
        &program().output().unwrap(),
        1,
        "edgehub: nothing says who the hub is; set IotHubConnectionString",
    );
    failed(
        &program().args(["queues", "purge"]).output().unwrap(),
        1,
        "edgehub: the following required arguments were not provided: <NAME>; see edgehub --help",
    );
    failed(&program().arg("--nonsense").output().unwrap(), 1, "edgehub: unexpected argument '--nonsense'");
    let no_certificate = program().arg("run").env("IotHubConnectionString", IDENTITY).output().unwrap();
    failed(&no_certificate, 1, "edgehub: setting EdgeHubDevServerCertificateFile is missing");
    let mut local = program();
    local
        .env("IotHubConnectionString", IDENTITY)
        .env("mqttSettings__enabled", "false")
        .env("amqpSettings__enabled", "false")
        .env("httpSettings__enabled", "false");
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/tutorial-lower-layer.broken.json");
    let broken = local.args(["run", "--manifest", manifest]).output().unwrap();
    failed(&broken, 1, &format!("edgehub: manifest {manifest}, line 19, column 52: a comma directly before"));
    let no_configuration = program()
        .args(["run", "--set", "configSource=file"])
        .args(["--set", "mqttSettings.enabled=false", "--set", "httpSettings.enabled=false"])
        .args(["--set", "amqpSettings.enabled=false"])
        .env("IotHubConnectionString", IDENTITY)
        .output()
        .unwrap();
    failed(&no_configuration, 1, "edgehub: there is no configuration; give the deployment manifest");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut in_use = program();
    let good = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/module-composition-example.json");
    in_use.args(["run", "--manifest", good]);
    in_use
        .env("IotHubConnectionString", IDENTITY)
        .env("mqttSettings__enabled", "false")
        .env("amqpSettings__enabled", "false")
        .env("httpSettings__enabled", "false");
    in_use.env("EDGEHUB_LISTEN__METRICS_ADDRESS", "127.0.0.1").env("httpSettings__metrics_port", &port);
    failed(&in_use.output().unwrap(), 2, &format!("edgehub: pages: address 127.0.0.1:{port} is in use"));
}

#[test]
fn texts_are_no_failures() {
    let version = program().arg("--version").output().unwrap();
    assert!(version.status.success() && version.stdout.starts_with(b"edgehub 0."));
    assert!(program().arg("--help").output().unwrap().status.success());
    let folder = tempfile::tempdir().unwrap();
    let made = program().args(["certificate", "create-demo", "--out"]).arg(folder.path()).output().unwrap();
    assert!(made.status.success());
    assert_eq!(String::from_utf8(made.stdout).unwrap().lines().count(), 3);
    assert!(folder.path().join("server.key").is_file());
}

/// A hub with its state in memory and the manifest of an example.
fn start(environment: &[(&str, &str)]) -> Running {
    start_with(
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/module-composition-example.json"),
        environment,
    )
}

fn start_with(manifest: &str, environment: &[(&str, &str)]) -> Running {
    run(&["run", "--manifest", manifest], environment)
}

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Running {
    let mut command = program();
    command.env("IotHubConnectionString", IDENTITY);
    command.env("mqttSettings__enabled", "false").env("httpSettings__enabled", "false");
    command.env("amqpSettings__enabled", "false");
    command.env("EDGEHUB_LISTEN__METRICS_ADDRESS", "127.0.0.1").env("httpSettings__metrics_port", "0");
    // Hubs of several tests run at a time, and none but that of the verbs needs a socket.
    command.env("EDGEHUB_ADMIN__SOCKET", "off").env("usePersistentStorage", "false");
    command.envs(environment.iter().copied()).args(arguments);
    Running::spawn(command)
}

#[test]
fn the_pages_answer_and_a_signal_stops_the_program() {
    let mut running = start(&[("RuntimeLogLevle", "debug")]);
    running.until_ready();
    let health = running.ask("GET /healthz");
    assert!(health.starts_with("HTTP/1.1 200 ") && health.contains(r#""status":"ready""#), "{health}");
    assert!(health.contains(r#""code":"upstream_unreachable""#), "{health}");
    for page in ["GET /readyz", "GET /startupz"] {
        assert!(running.ask(page).starts_with("HTTP/1.1 200 "), "{page}");
    }
    let metrics = running.ask("GET /metrics");
    assert!(
        metrics.starts_with("HTTP/1.1 200 ") && metrics.contains("edgehub_connected_clients"),
        "{metrics}"
    );
    let status = running.ask("GET /status");
    assert!(status.starts_with("HTTP/1.1 200 ") && status.contains(r#""device":"edge1""#), "{status}");
    assert!(running.ask("GET /").starts_with("HTTP/1.1 404 "));
    let wrong = running.ask("POST /metrics");
    assert!(wrong.starts_with("HTTP/1.1 405 ") && wrong.contains("allow: GET, HEAD\r\n"), "{wrong}");
    let long = format!("GET /{}", "x".repeat(100_000));
    let mut stream = TcpStream::connect(running.pages).unwrap();
    let _refused_while_writing = write!(stream, "{long} HTTP/1.1\r\n\r\n");
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));

    running.signal("-TERM");
    assert!(running.child.wait().unwrap().success());
    let mut rest = String::new();
    running.lines.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with(" [INF] - Shutdown complete.\n"), "{rest}");
}

#[test]
fn without_a_configuration_it_waits_for_the_twin_with_its_ports_closed() {
    // Whoever listens here answers nothing, and nothing else can take the port while the test runs.
    let upstream = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = upstream.local_addr().unwrap().port().to_string();
    let mqtt = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    // In use: a hub that opened its ports would end.
    let mqtt_plain = mqtt.local_addr().unwrap().to_string();
    let mut running = run(
        &["run"],
        &[
            ("EDGEHUB_UPSTREAM__HOST", "127.0.0.1"),
            ("EDGEHUB_UPSTREAM__AMQP_PORT", &port),
            ("EDGEHUB_UPSTREAM__HTTPS_PORT", &port),
            ("EDGEHUB_LISTEN__MQTT_PLAIN", &mqtt_plain),
        ],
    );
    running.until("The ports stay closed: no configuration is stored");
    let health = running.ask("GET /healthz");
    assert!(health.starts_with("HTTP/1.1 503 ") && health.contains(r#""status":"starting""#), "{health}");
    assert!(health.contains("give a manifest with --manifest FILE"), "{health}");
    let status = running.ask("GET /status");
    assert!(status.contains(r#""configuration":{"desired":null,"in_force":null"#), "{status}");
    running.signal("-TERM");
    assert!(running.child.wait().unwrap().success());
}

#[test]
fn renewed_certificate_files_are_put_in_force_by_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let create = || {
        let made = program().args(["certificate", "create-demo", "--out"]).arg(folder.path()).output();
        assert!(made.unwrap().status.success());
    };
    create();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key) = (file("server.pem"), file("server.key"));
    let mut running = start(&[
        ("mqttSettings__enabled", "true"),
        ("EDGEHUB_LISTEN__MQTT_ADDRESS", "127.0.0.1"),
        ("EDGEHUB_LISTEN__MQTT_PORT", "0"),
        ("EdgeHubDevServerCertificateFile", &certificate),
        ("EdgeHubDevServerPrivateKeyFile", &key),
    ]);
    running.until_ready();
    create();
    running.signal("-HUP");
    running.until("The renewed server certificate is in force");
    std::fs::write(&certificate, "no certificate").unwrap();
    running.signal("-HUP");
    running.until("the certificate before stays in force");
    assert!(running.ask("GET /healthz").starts_with("HTTP/1.1 200 "));
    running.signal("-TERM");
    assert!(running.child.wait().unwrap().success());
}

#[test]
fn lints_are_logged_and_refuse_a_route_only_in_strict_mode() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("manifest.json");
    let text = r#"{"modulesContent": {"$edgeAgent": {"properties.desired": {}}, "$edgeHub": {"properties.desired": {
        "schemaVersion": "1.1", "storeAndForwardConfiguration": {"timeToLiveSecs": 60},
        "routes": {"late": "FROM /messages/* INTO $upstream WHERE a = 'x'", "up": "FROM /messages INTO $upstream"}}}}}"#;
    std::fs::write(&manifest, text).unwrap();
    let manifest = manifest.to_str().unwrap();
    let mut running = start_with(manifest, &[]);
    running.until("A route may not mean what it says: trailing-text at line 1 column 33");
    running.until("Routes in force routes=late, up");
    let mut strict = start_with(manifest, &[("EDGEHUB_ROUTING__STRICT", "true")]);
    strict.until("Routes in force routes=up");
    strict.until("route-lint in route \"late\": trailing-text at line 1 column 33");
}

#[test]
fn the_verbs_of_the_operator_reach_a_running_hub() {
    let folder = tempfile::tempdir().unwrap();
    let storage = folder.path().to_str().unwrap();
    let verb = |arguments: &[&str]| {
        program().args(arguments).args(["--set", &format!("StorageFolder={storage}")]).output().unwrap()
    };
    let socket = folder.path().join("edgeHub/admin.sock");
    failed(&verb(&["ledger"]), 5, &format!("edgehub: no hub is running at {}", socket.display()));
    let mut running = start(&[("StorageFolder", storage), ("EDGEHUB_ADMIN__SOCKET", "")]);
    running.until_ready();
    let ledger = verb(&["ledger"]);
    let text = String::from_utf8(ledger.stdout).unwrap();
    assert!(ledger.status.success() && text.contains("the ledger adds up"), "{text}");
    let status = String::from_utf8(verb(&["status"]).stdout).unwrap();
    for part in
        ["edge1 of h.example, edgehub ", "ready", "upstream_unreachable since ", "routes in force, from "]
    {
        assert!(status.contains(part), "{part}: {status}");
    }
    let clients = String::from_utf8(verb(&["clients", "list"]).stdout).unwrap();
    assert_eq!(clients, "No client is connected.\n");
    failed(&verb(&["clients", "kick", "leaf1"]), 1, "edgehub: no client of this id is connected");
    failed(&verb(&["tap", "--where", "a ="]), 1, "edgehub: the condition or source cannot be used: ");
    let json = verb(&["queues", "list", "--format", "json"]);
    let queues: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(!queues["queues"].as_array().unwrap().is_empty(), "{queues}");
    failed(&verb(&["queues", "show", "nobody"]), 1, "edgehub: there is no queue of this name");
    failed(&verb(&["queues", "purge", "nobody", "--apply"]), 1, "edgehub: there is no queue of this name");
    running.signal("-TERM");
    assert!(running.child.wait().unwrap().success());
    assert!(!socket.exists());
    let off = program().args(["ledger", "--set", "admin.socket=off"]).output().unwrap();
    failed(&off, 5, "edgehub: the setting admin.socket is off");
    let long = format!("--socket=/{}", "x".repeat(200));
    failed(&program().args(["ledger", &long]).output().unwrap(), 1, "edgehub: admin socket /xxx");
}
