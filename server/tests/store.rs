//! The built program and a store that cannot be opened, or that is damaged; and the commands over a stopped store.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

mod running;

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use edgehub_storage::{
    AppendRequest, Offset, Outcome, Overflow, Record, Settlement, Store, StoreOptions, Target, Ttl,
};
use running::Running;

const IDENTITY: &str = "HostName=h.example;DeviceId=edge1;ModuleId=$edgeHub;SharedAccessKey=c2VjcmV0";
/// A queue to which no route leads, so that nobody takes what is in it.
const QUEUE: &str = "edge1/later/input1";
const MANIFEST: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/module-composition-example.json");

/// The folder below `StorageFolder` that the hub uses.
fn hub_folder(folder: &Path) -> PathBuf {
    folder.join("edgeHub")
}

fn hub(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edgehub"));
    command.env_clear().env("IotHubConnectionString", IDENTITY).env("mqttSettings__enabled", "false");
    command.env("EDGEHUB_LISTEN__METRICS_ADDRESS", "127.0.0.1").env("httpSettings__metrics_port", "0");
    command.env("httpSettings__enabled", "false").env("amqpSettings__enabled", "false");
    command.env("StorageFolder", folder).args(["run", "--manifest", MANIFEST]);
    command
}

fn store(arguments: &[&str], folder: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edgehub"));
    command.env_clear().arg("store").args(arguments).arg("--path").arg(hub_folder(folder));
    command.output().unwrap()
}

/// A store with `entries` in a queue, one of them delivered.
fn fill(folder: &Path, entries: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let store = Store::open(StoreOptions::disk(hub_folder(folder))).unwrap();
    runtime.block_on(async {
        let queue = store.queue(QUEUE).unwrap();
        let target = Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew };
        for number in 0..entries {
            let bytes = format!("entry {number} {}", "x".repeat(2000)).into();
            let records = vec![Record { bytes, targets: [target].into_iter().collect() }];
            store.submit(AppendRequest { records, unrouted: 0 }).await.unwrap().await.unwrap();
        }
        queue.settle(&[Settlement { offset: Offset::ZERO, outcome: Outcome::Delivered }]);
        store.flush().await.unwrap();
    });
    store.close();
}

fn damage_log(folder: &Path) {
    let database = hub_folder(folder).join("store/db");
    let logs = fs::read_dir(database).unwrap().map(|entry| entry.unwrap().path());
    let logs = logs.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let log = logs.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let file = fs::File::options().read(true).write(true).open(log).unwrap();
    let at = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

/// Every file below a folder with its content and the time of its last change.
fn snapshot(folder: &Path) -> Vec<(PathBuf, Vec<u8>, std::time::SystemTime)> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push((
                    path.clone(),
                    fs::read(&path).unwrap(),
                    fs::metadata(&path).unwrap().modified().unwrap(),
                ));
            }
        }
    }
    files.sort();
    files
}

/// One line on standard error with these parts, and the exit code of a store that cannot be opened.
fn refused(output: &Output, parts: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part}: {text}");
    }
    let log = String::from_utf8_lossy(&output.stdout);
    assert!(!log.contains("head is open") && !log.contains("ready"), "{log}");
}

#[test]
fn a_store_that_is_in_use_stops_the_start_and_the_commands() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), 3);
    let held = Store::open(StoreOptions::disk(hub_folder(folder.path()))).unwrap();
    let path = hub_folder(folder.path()).join("store").display().to_string();
    let parts = [path.as_str(), "in use by another process", "stop that process"];
    refused(&hub(folder.path()).output().unwrap(), &parts);
    for command in ["stat", "verify", "repair", "export"] {
        refused(&store(&[command], folder.path()), &parts);
    }
    refused(&store(&["repair", "--apply"], folder.path()), &parts);
    held.close();
    assert!(store(&["verify"], folder.path()).status.success());
}

#[test]
fn what_an_operator_must_decide_stops_the_start() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), 3);
    let path = hub_folder(folder.path()).join("store");
    fs::write(path.join("FORMAT"), "edgehub-store 7 ready\n").unwrap();
    let before = snapshot(&path);
    let parts = [path.to_str().unwrap(), "format 7", "install the newer version"];
    refused(&hub(folder.path()).output().unwrap(), &parts);
    refused(&store(&["stat"], folder.path()), &parts);
    assert_eq!(snapshot(&path), before);

    let file = folder.path().join("file");
    fs::create_dir(&file).unwrap();
    fs::write(file.join("edgeHub"), "").unwrap();
    refused(&hub(&file).output().unwrap(), &["edgeHub is not a directory", "move it away"]);

    // The database of another program in our place is left alone.
    let reference = folder.path().join("reference");
    fs::create_dir_all(reference.join("edgeHub")).unwrap();
    fs::rename(path.join("db"), reference.join("edgeHub/store")).unwrap();
    let before = snapshot(&reference);
    refused(&hub(&reference).output().unwrap(), &["database of another program", "choose another"]);
    assert_eq!(snapshot(&reference), before);
}

#[test]
fn a_folder_without_rights_stops_the_start_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), 3);
    let path = hub_folder(folder.path());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // In a user namespace of its own even the superuser has only the rights that the folder gives.
    let hub = hub(folder.path());
    let mut command = Command::new("unshare");
    command.arg("--user").arg(hub.get_program()).args(hub.get_args()).env_clear();
    command.envs(hub.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = command.output().expect("this test needs the program unshare (util-linux)");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!text.starts_with("unshare:"), "this test needs user namespaces: {text}");
    refused(&output, &["edgeHub/store", "ermission denied"]);
}

/// Runs a script in a mount namespace of its own, where a small file system lies over `$1`.
fn in_own_mounts(script: &str, over: &Path, then: &Command) -> Output {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--map-root-user", "sh", "-c", &format!("{script}\nshift; exec \"$@\""), "sh"]);
    command.arg(over).arg(then.get_program()).args(then.get_args()).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    for (name, value) in then.get_envs() {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    let output = command.output().expect("this test needs the program unshare (util-linux)");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !text.starts_with("unshare:") && !text.starts_with("mount:"),
        "this test needs mount namespaces: {text}"
    );
    output
}

#[test]
fn a_read_only_or_full_file_system_stops_the_start_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), 3);
    let read_only = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" || exit 99";
    let output = in_own_mounts(read_only, folder.path(), &hub(folder.path()));
    refused(&output, &["edgeHub/store", "is read-only", "mount it for writing"]);
    let mut stat = Command::new(env!("CARGO_BIN_EXE_edgehub"));
    stat.args(["store", "verify", "--path"]).arg(hub_folder(folder.path()));
    let output = in_own_mounts(read_only, folder.path(), &stat);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let full = "mount -t tmpfs -o size=64k tmpfs \"$1\" && mkdir -p \"$1/edgeHub/store\" \
                && dd if=/dev/zero of=\"$1/full\" 2>/dev/null; [ -e \"$1/full\" ] || exit 99";
    let output = in_own_mounts(full, folder.path(), &hub(folder.path()));
    refused(&output, &["edgeHub/store", "is full", "free space"]);
}

fn start(folder: &Path) -> Running {
    let mut running = Running::spawn(hub(folder));
    running.until_ready();
    running
}

#[test]
fn a_damaged_store_is_told_by_log_pages_and_metric_and_not_again() {
    for (kind, harm) in [
        ("log", damage_log as fn(&Path)),
        ("marker", |folder| fs::write(hub_folder(folder).join("store/FORMAT"), "?").unwrap()),
    ] {
        let folder = tempfile::tempdir().unwrap();
        fill(folder.path(), 200);
        harm(folder.path());
        let running = start(folder.path());
        assert!(running.log.contains("[ERR] - the store is damaged kind="), "{}", running.log);
        let metrics = running.ask("GET /metrics");
        let counted = metrics.lines().find(|line| {
            line.starts_with("edgehub_store_damage_total") && line.contains(&format!("kind=\"{kind}\""))
        });
        assert!(counted.is_some_and(|line| line.ends_with(" 1")), "{metrics}");
        let health = running.ask("GET /healthz");
        assert!(health.starts_with("HTTP/1.1 200 ") && health.contains("the store is damaged: "), "{health}");
        let status = running.ask("GET /status");
        assert!(status.contains(&format!("\"kind\":\"{kind}\"")), "{status}");
        assert!(status.contains("\"gap\":0") && status.contains("damaged-"), "{status}");
        let lost = status.contains("\"unreadable\":");
        assert_eq!(lost, kind == "log", "{status}");
        drop(running);

        let stat = store(&["stat", "--format", "json"], folder.path());
        let text = String::from_utf8(stat.stdout).unwrap();
        assert!(text.contains("\"set_aside\":[\"") && text.contains("\"gap\":0"), "{text}");
        let running = start(folder.path());
        assert!(!running.log.contains("damaged"), "{}", running.log);
        assert!(!running.ask("GET /healthz").contains("the store is damaged"));
        drop(running);
    }
}

#[test]
fn the_commands_read_without_changing_anything_and_repair_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    assert!(
        String::from_utf8_lossy(&store(&["stat"], folder.path()).stderr).contains("there is no store in")
    );
    fill(folder.path(), 200);
    let path = hub_folder(folder.path()).join("store");
    let before = snapshot(&path);
    let text = |output: Output| {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let stat = text(store(&["stat"], folder.path()));
    let ledger = "queue edge1/later/input1: accepted 200 = delivered 1 + expired 0 + dropped 0 + dead-lettered 0 + queued 199; gap 0";
    assert!(stat.contains(ledger), "{stat}");
    assert_eq!(text(store(&["verify"], folder.path())), "the store is sound\n");
    let export = text(store(&["export", "--queue", QUEUE], folder.path()));
    assert_eq!(export.lines().count(), 199);
    let first: serde_json::Value = serde_json::from_str(export.lines().next().unwrap()).unwrap();
    assert_eq!((first["queue"].as_str(), first["offset"].as_u64()), (Some(QUEUE), Some(1)));
    assert!(first["bytes"].as_str().unwrap().starts_with("ZW50cnkgMS"), "{first}");
    assert_eq!(text(store(&["export", "--queue", "other"], folder.path())), "");
    assert_eq!(snapshot(&path), before, "a command that reads has changed something");

    damage_log(folder.path());
    let before = snapshot(&path);
    for command in ["verify", "repair"] {
        let found = store(&[command], folder.path());
        let lines = String::from_utf8_lossy(&found.stdout).into_owned();
        assert_eq!((found.status.code(), lines.starts_with("file: ")), (Some(1), true), "{lines}");
    }
    assert_eq!(snapshot(&path), before);
    let repaired = text(store(&["repair", "--apply"], folder.path()));
    assert!(repaired.starts_with("repaired: log: ") && repaired.contains("lost: "), "{repaired}");
    assert_eq!(text(store(&["verify"], folder.path())), "the store is sound\n");
    let again = text(store(&["repair", "--apply"], folder.path()));
    assert_eq!(again, "the store is sound; nothing was changed\n");
}
