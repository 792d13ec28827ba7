//! Owns the throw-away site: its folder, certificates, ports, identities and configuration files.

use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::connection_string::ConnectionString;
use super::error::DemoError;
use super::processes::Program;
use crate::certificate::authority::Authority;

/// The name of the cloud stand-in, for tokens and certificates.
pub(super) const CLOUD_NAME: &str = "demo-cloud.example";
/// The name under which the hub is reached.
pub(super) const HUB_NAME: &str = "localhost";
/// The only port that SDKs know for MQTT.
const SDK_PORT: u16 = 8883;
/// Ports below the range that systems take for outgoing connections, so that a restarted hub finds its own free.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
const PORT_TRIES_MAX: usize = 200;
/// Long enough that an outage of the demonstration expires nothing.
pub(super) const TIME_TO_LIVE_SECS: u32 = 7_200;

const MANIFEST: &str = include_str!("module-composition-example.json");

/// Ports on 127.0.0.1.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ports {
    /// The cloud's AMQP over TLS.
    pub(super) cloud_amqp: SocketAddr,
    /// The cloud's HTTPS.
    pub(super) cloud_https: SocketAddr,
    /// The proxy in front of the cloud's AMQP.
    pub(super) link_amqp: SocketAddr,
    /// The proxy in front of the cloud's HTTPS.
    pub(super) link_https: SocketAddr,
    /// The hub's MQTT over TLS.
    pub(super) hub_mqtt: SocketAddr,
    /// The hub's pages.
    pub(super) hub_pages: SocketAddr,
}

/// Everything that is prepared before anything runs.
pub(super) struct Site {
    folder: TempDir,
    /// Starts children.
    pub(super) program: Program,
    /// Ports.
    pub(super) ports: Ports,
    /// TLS that trusts the site's authority alone.
    pub(super) tls: Arc<rustls::ClientConfig>,
    /// The sensor module.
    pub(super) sensor: ConnectionString,
    /// The filter module.
    pub(super) filter: ConnectionString,
    /// Own device and own module of the visitor, with `--stay`.
    pub(super) own: Option<(ConnectionString, ConnectionString)>,
    hub: ConnectionString,
}

impl Site {
    /// Makes folder, certificates, ports, files and identities.
    pub(super) async fn prepare(stay: bool) -> Result<Self, DemoError> {
        let folder = tempfile::Builder::new()
            .prefix("edgehub-demo-")
            .tempdir()
            .map_err(DemoError::io("making a folder for the demonstration"))?;
        let tls = certificates(&folder)?;
        let ports = Ports::choose(stay)?;
        let program = Program::current(folder.path())?;
        let create = async |arguments: &[&str]| identity(&program, &folder, arguments).await;
        // An edge device comes with its hub module, whose connection string is printed.
        let hub = create(&["--device-id", "edge1", "--edge-enabled"]).await?;
        let sensor = create(&["--device-id", "edge1", "--module-id", "tempSensor"]).await?;
        let filter = create(&["--device-id", "edge1", "--module-id", "filtermodule"]).await?;
        let own = if stay {
            let device = create(&["--device-id", "owndevice", "--parent", "edge1"]).await?;
            Some((device, create(&["--device-id", "edge1", "--module-id", "ownmodule"]).await?))
        } else {
            None
        };
        let site = Self { folder, program, ports, tls, sensor, filter, own, hub };
        site.write("manifest.json", &manifest(stay)?)?;
        site.write("hub.toml", &site.hub_settings())?;
        Ok(site)
    }

    /// A file of the site.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Keeps the folder and names it.
    pub(super) fn keep(mut self) -> PathBuf {
        self.folder.disable_cleanup(true);
        self.folder.path().to_owned()
    }

    /// Arguments of the cloud stand-in.
    pub(super) fn cloud_arguments(&self) -> Vec<OsString> {
        let mut arguments = words(&["cloud", "--host-name", CLOUD_NAME]);
        for (flag, file) in
            [("--data-dir", "cloud"), ("--certificate", "cloud.pem"), ("--private-key", "cloud.key")]
        {
            arguments.extend([flag.into(), self.file(file).into()]);
        }
        for (flag, address) in
            [("--amqp-listen", self.ports.cloud_amqp), ("--https-listen", self.ports.cloud_https)]
        {
            arguments.extend([flag.into(), address.to_string().into()]);
        }
        arguments
    }

    /// Arguments of the hub.
    pub(super) fn hub_arguments(&self) -> Vec<OsString> {
        let mut arguments = words(&["run", "--manifest"]);
        arguments.extend([
            self.file("manifest.json").into(),
            "--config".into(),
            self.file("hub.toml").into(),
        ]);
        arguments
    }

    /// Environment of the hub.
    pub(super) fn hub_environment(&self) -> [(&'static str, OsString); 6] {
        [
            ("IotHubConnectionString", self.hub.text(None).into()),
            ("EdgeDeviceHostName", HUB_NAME.into()),
            ("EdgeHubDevServerCertificateFile", self.file("hub.pem").into()),
            ("EdgeHubDevServerPrivateKeyFile", self.file("hub.key").into()),
            ("EdgeHubDevTrustBundleFile", self.file("ca.pem").into()),
            ("StorageFolder", self.folder.path().into()),
        ]
    }

    fn hub_settings(&self) -> String {
        let Ports { hub_mqtt, hub_pages, link_amqp, link_https, .. } = self.ports;
        let trust_file = toml::Value::from(self.file("ca.pem").to_string_lossy().into_owned());
        format!(
            "[listen]\nmqtt_address = \"{}\"\nmqtt_port = {}\nmetrics_address = \"{}\"\n\n\
             [amqpSettings]\nenabled = false\n\n[httpSettings]\nenabled = false\nmetrics_port = {}\n\n\
             [upstream]\nhost = \"localhost\"\namqp_port = {}\nhttps_port = {}\ntrust_file = {trust_file}\n",
            hub_mqtt.ip(),
            hub_mqtt.port(),
            hub_pages.ip(),
            hub_pages.port(),
            link_amqp.port(),
            link_https.port(),
        )
    }

    fn write(&self, name: &str, text: &str) -> Result<(), DemoError> {
        fs::write(self.file(name), text).map_err(DemoError::io(format!("writing {name}")))
    }
}

impl Ports {
    fn choose(stay: bool) -> Result<Self, DemoError> {
        // All are held until all are chosen, so that none is chosen twice.
        let mut held = Vec::new();
        let mut next = || free_port(&mut held);
        let (cloud_amqp, cloud_https, link_amqp, link_https, hub_pages) =
            (next()?, next()?, next()?, next()?, next()?);
        let hub_mqtt = if stay {
            let address = local(SDK_PORT);
            TcpListener::bind(address).map_err(|source| DemoError::PortTaken { port: SDK_PORT, source })?;
            address
        } else {
            next()?
        };
        Ok(Self { cloud_amqp, cloud_https, link_amqp, link_https, hub_mqtt, hub_pages })
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn free_port(held: &mut Vec<TcpListener>) -> Result<SocketAddr, DemoError> {
    for _ in 0..PORT_TRIES_MAX {
        let address = local(fastrand::u16(PORTS));
        if let Ok(listener) = TcpListener::bind(address) {
            held.push(listener);
            return Ok(address);
        }
    }
    Err(DemoError::NoFreePort { tries: PORT_TRIES_MAX })
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn certificates(folder: &TempDir) -> Result<Arc<rustls::ClientConfig>, DemoError> {
    let authority = Authority::new("edgehub demo root")?;
    let write = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).map_err(DemoError::io(format!("writing {name}")))
    };
    for (stem, name) in [("cloud", CLOUD_NAME), ("hub", HUB_NAME)] {
        let mut names = vec![name.to_owned(), "localhost".to_owned(), "127.0.0.1".to_owned()];
        names.dedup();
        let issued = authority.issue_server(&names)?;
        write(&format!("{stem}.pem"), &issued.chain_pem)?;
        write(&format!("{stem}.key"), &issued.key_pem)?;
    }
    let root_pem = authority.root_pem();
    write("ca.pem", &root_pem)?;
    let root = CertificateDer::from_pem_slice(root_pem.as_bytes())
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    roots.add(root)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

async fn identity(
    program: &Program,
    folder: &TempDir,
    arguments: &[&str],
) -> Result<ConnectionString, DemoError> {
    let mut command = words(&["cloud", "identity", "create", "--data-dir"]);
    command.push(folder.path().join("cloud").into());
    command.extend(words(arguments));
    let printed = program.output(&command).await?;
    let text = printed.lines().map(str::trim).find(|line| line.starts_with("HostName=")).unwrap_or_default();
    ConnectionString::parse(text)
        .map(|identity| identity.with_host(CLOUD_NAME))
        .map_err(|fault| DemoError::ConnectionString { identity: arguments.join(" "), fault })
}

/// The manifest of the tutorial with its two routes word for word and a longer time to live; with `stay` also
/// routes for the visitor's own device and module.
fn manifest(stay: bool) -> Result<String, DemoError> {
    let mut manifest: Value =
        serde_json::from_str(MANIFEST).map_err(|_| DemoError::Manifest("is not JSON"))?;
    let desired = manifest
        .pointer_mut("/modulesContent/$edgeHub/properties.desired")
        .ok_or(DemoError::Manifest("has no $edgeHub"))?;
    desired["storeAndForwardConfiguration"]["timeToLiveSecs"] = json!(TIME_TO_LIVE_SECS);
    if stay {
        let routes = &mut desired["routes"];
        routes["ownDeviceToIoTHub"] =
            json!("FROM /messages/* WHERE NOT IS_DEFINED($connectionModuleId) INTO $upstream");
        routes["ownDeviceToOwnModule"] = json!(
            "FROM /messages/* WHERE NOT IS_DEFINED($connectionModuleId) \
             INTO BrokeredEndpoint(\"/modules/ownmodule/inputs/fromDevice\")"
        );
        routes["ownModuleToIoTHub"] = json!("FROM /messages/modules/ownmodule/* INTO $upstream");
    }
    Ok(format!("{manifest:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::board::Route;

    #[test]
    fn the_manifest_has_the_routes_of_the_example_and_a_longer_time_to_live() {
        let original: Value = serde_json::from_str(MANIFEST).expect("valid");
        let ours: Value = serde_json::from_str(&manifest(false).expect("valid")).expect("valid");
        let at = |manifest: &Value, name: &str| {
            manifest["modulesContent"]["$edgeHub"]["properties.desired"][name].clone()
        };
        assert_eq!(at(&ours, "routes"), at(&original, "routes"));
        assert_eq!(at(&ours, "storeAndForwardConfiguration")["timeToLiveSecs"], 7_200);
        for route in Route::ALL {
            assert!(at(&ours, "routes")[route.name()].is_string(), "{}", route.name());
        }
        let stay: Value = serde_json::from_str(&manifest(true).expect("valid")).expect("valid");
        assert_eq!(at(&stay, "routes").as_object().map(serde_json::Map::len), Some(5));
    }
}
