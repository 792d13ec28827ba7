//! Owns the programs that `--spawn` starts: a local cloud, a hub below it, their certificates and identities.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use edgehub_broker::identity::{HUB_MODULE_ID, Identity as Id};
use edgehub_cloud::{NewDevice, Registry, RegistryError};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::Value;
use tempfile::TempDir;

use crate::identity::{Identity, IdentityError};
use crate::scenario::Plan;

/// Device id of the edge device that is made.
pub const EDGE: &str = "load-edge";
/// Name that `edgehub cloud` gives the registry in its folder.
const REGISTRY_FILE: &str = "registry.json";
/// Name of the cloud, which is that of the tokens' audience.
pub const CLOUD_HOST: &str = "cloud.load.test";
pub(crate) const READY_TIMEOUT: Duration = Duration::from_secs(60);
pub(crate) const POLL: Duration = Duration::from_millis(5);
/// Time for one request to the hub's pages.
const PAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a site cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// The system refused something.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A certificate could not be made.
    #[error("certificates: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The registry refuses an identity.
    #[error("the registry: {0}")]
    Registry(#[from] RegistryError),
    /// A name is no id.
    #[error("{0}")]
    Id(String),
    /// The registry gave no usable connection string.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The program ended or did not get ready.
    #[error("{what}; its log ends with:\n{log}")]
    NotReady {
        /// What was waited for.
        what: String,
        /// The end of the log.
        log: String,
    },
    /// The peer to compare with is not there.
    #[error("{0} is not installed: run `scripts/setup peers`, or `apt-get install {0}`")]
    NoPeer(&'static str),
    /// A page of the hub has not the expected form.
    #[error("the hub's page {0} has not the expected form")]
    Page(&'static str),
}

pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> SiteError {
    let what = what.into();
    |source| SiteError::System { what, source }
}

/// A running cloud and hub; both are killed when it is dropped, and their files removed.
pub struct Site {
    hub: Child,
    cloud: Child,
    /// Where the hub takes MQTT.
    pub mqtt: SocketAddr,
    /// Where the hub takes AMQP, if it does.
    pub amqp: SocketAddr,
    pages: SocketAddr,
    /// Root certificate for TLS.
    pub root_file: PathBuf,
    /// All identities of the plan.
    pub identities: Vec<Identity>,
    folder: TempDir,
}

/// How the hub is set up.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// TLS on the listeners; plain TCP otherwise.
    pub tls: bool,
    /// Opens the AMQP listener as well.
    pub amqp: bool,
    /// Setting `store.durability`.
    pub durability: String,
    /// Further settings as environment variables.
    pub settings: Vec<(String, String)>,
    /// Where to keep the store; a temporary folder if not given.
    pub storage: Option<PathBuf>,
}

impl Site {
    /// Starts cloud and hub of `program` for a plan, and waits until the hub is ready.
    ///
    /// # Errors
    /// Anything that keeps them from being ready, with the end of their log.
    pub fn start(program: &Path, plan: &Plan, options: &HubOptions) -> Result<Self, SiteError> {
        let folder = TempDir::with_prefix("edgehub-load-").map_err(system("a temporary folder"))?;
        let at = |name: &str| folder.path().join(name);
        let address = free_address()?;
        let root_file = at("root.pem");
        write_certificates(folder.path(), address)?;
        fs::create_dir_all(at("cloud")).map_err(system("the cloud's folder"))?;
        let (identities, hub_identity) = create_identities(&at("cloud").join(REGISTRY_FILE), plan)?;
        let (cloud_amqp, https) = (free_port(address)?, free_port(address)?);
        let mut command = Command::new(program);
        command.arg("cloud").arg("--data-dir").arg(at("cloud")).args(["--host-name", CLOUD_HOST]);
        command.arg("--certificate").arg(at("server.pem")).arg("--private-key").arg(at("server.key"));
        command.args(["--amqp-listen", &cloud_amqp.to_string(), "--https-listen", &https.to_string()]);
        let cloud = spawn(&mut command, &at("cloud.log"))?;
        let manifest = at("deployment.json");
        fs::write(&manifest, plan.manifest().to_string()).map_err(system("writing the manifest"))?;
        let storage = options.storage.clone().unwrap_or_else(|| at("storage"));
        fs::create_dir_all(&storage).map_err(system("the storage folder"))?;
        let pages = free_port(address)?;
        let (mqtt, amqp) = (free_port(address)?, free_port(address)?);
        let mut command = Command::new(program);
        command.arg("run").arg("--manifest").arg(&manifest);
        command
            .env("IotHubConnectionString", hub_identity.connection_string())
            .env("EdgeDeviceHostName", address.to_string())
            .env("EdgeHubDevServerCertificateFile", at("server.pem"))
            .env("EdgeHubDevServerPrivateKeyFile", at("server.key"))
            .env("EdgeHubDevTrustBundleFile", &root_file)
            .env("StorageFolder", &storage)
            .env("RuntimeLogLevel", "warning")
            .env("MaxConnectedClients", "100000")
            .env("amqpSettings__enabled", options.amqp.to_string())
            .env("EDGEHUB_LISTEN__AMQP_ADDRESS", address.to_string())
            .env("httpSettings__enabled", "false")
            .env("httpSettings__metrics_port", pages.port().to_string())
            .env("EDGEHUB_LISTEN__METRICS_ADDRESS", address.to_string())
            .env("EDGEHUB_LISTEN__MQTT_ADDRESS", address.to_string())
            .env("EDGEHUB_UPSTREAM__HOST", address.to_string())
            .env("EDGEHUB_UPSTREAM__AMQP_PORT", cloud_amqp.port().to_string())
            .env("EDGEHUB_UPSTREAM__HTTPS_PORT", https.port().to_string())
            .env("EDGEHUB_UPSTREAM__TRUST_FILE", &root_file)
            .env("EDGEHUB_STORE__DURABILITY", &options.durability);
        if options.tls {
            command.env("EDGEHUB_LISTEN__MQTT_PORT", mqtt.port().to_string());
            command.env("amqpSettings__port", amqp.port().to_string());
        } else {
            let tls_beside = || Ok::<_, SiteError>(free_port(address)?.port().to_string());
            command.env("EDGEHUB_LISTEN__MQTT_PORT", tls_beside()?);
            command.env("EDGEHUB_LISTEN__MQTT_PLAIN", mqtt.to_string());
            command.env("amqpSettings__port", tls_beside()?);
            if options.amqp {
                command.env("EDGEHUB_LISTEN__AMQP_PLAIN", amqp.to_string());
            }
        }
        command.envs(options.settings.iter().map(|(name, value)| (name, value)));
        let hub = spawn(&mut command, &at("hub.log"))?;
        let mut site = Self { hub, cloud, mqtt, amqp, pages, root_file, identities, folder };
        site.wait_ready()?;
        Ok(site)
    }

    /// Process id of the hub.
    pub fn hub_pid(&self) -> u32 {
        self.hub.id()
    }

    /// Messages in all queues, by the ledgers of `/status`.
    ///
    /// # Errors
    /// The page does not answer, or has another form.
    pub fn queued(&self) -> Result<i64, SiteError> {
        self.ledger_sum("queued")
    }

    /// Sum of the gaps of all ledgers: messages that nobody can account for.
    ///
    /// # Errors
    /// The page does not answer, or has another form.
    pub fn gap(&self) -> Result<i64, SiteError> {
        self.ledger_sum("gap")
    }

    fn ledger_sum(&self, field: &str) -> Result<i64, SiteError> {
        let status = self.status()?;
        let mut ledgers = Vec::new();
        collect_ledgers(&status, &mut ledgers);
        ledgers
            .iter()
            .map(|ledger| ledger[field].as_i64())
            .sum::<Option<i64>>()
            .ok_or(SiteError::Page("/status"))
    }

    fn status(&self) -> Result<Value, SiteError> {
        let body = get(self.pages, "/status").map_err(system("the hub's page /status"))?;
        serde_json::from_str(&body).map_err(|_json| SiteError::Page("/status"))
    }

    fn wait_ready(&mut self) -> Result<(), SiteError> {
        let end = Instant::now() + READY_TIMEOUT;
        loop {
            for (child, name) in [(&mut self.cloud, "cloud"), (&mut self.hub, "hub")] {
                if let Some(status) = child.try_wait().map_err(system(format!("watching the {name}")))? {
                    let log = end_of(&self.folder.path().join(format!("{name}.log")));
                    return Err(SiteError::NotReady { what: format!("the {name} ended with {status}"), log });
                }
            }
            if get(self.pages, "/healthz").is_ok() {
                return Ok(());
            }
            if Instant::now() > end {
                let what = format!("the hub is not ready within {} s", READY_TIMEOUT.as_secs());
                return Err(SiteError::NotReady { what, log: end_of(&self.folder.path().join("hub.log")) });
            }
            thread::sleep(POLL);
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for child in [&mut self.hub, &mut self.cloud] {
            // It may have ended by itself.
            let _ended = child.kill();
            let _ended = child.wait();
        }
    }
}

fn collect_ledgers<'a>(value: &'a Value, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(members) => {
            if members.contains_key("accepted") && members.contains_key("gap") {
                found.push(value);
            }
            members.values().for_each(|member| collect_ledgers(member, found));
        }
        Value::Array(members) => members.iter().for_each(|member| collect_ledgers(member, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

pub(crate) fn spawn(command: &mut Command, log: &Path) -> Result<Child, SiteError> {
    let output = File::create(log).map_err(system("a log file"))?;
    let errors = output.try_clone().map_err(system("a log file"))?;
    let name = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(system(format!("starting {name}")))
}

pub(crate) fn end_of(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned()
}

/// The body of a page that answers 200.
fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PAGE_TIMEOUT)?;
    stream.set_read_timeout(Some(PAGE_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => Ok(body.to_owned()),
        _ => Err(io::Error::other(answer.lines().next().unwrap_or("no answer").to_owned())),
    }
}

/// An address of the loopback network of its own, so that ports in use elsewhere do not matter.
pub(crate) fn free_address() -> Result<Ipv4Addr, SiteError> {
    let mut bytes = std::process::id().to_be_bytes();
    bytes[0] = 127;
    loop {
        bytes[3] = bytes[3].wrapping_add(1).max(2);
        if TcpListener::bind((Ipv4Addr::from(bytes), 0)).is_ok() {
            return Ok(Ipv4Addr::from(bytes));
        }
    }
}

pub(crate) fn free_port(address: Ipv4Addr) -> Result<SocketAddr, SiteError> {
    let listener = TcpListener::bind((address, 0)).map_err(system("a free port"))?;
    listener.local_addr().map_err(system("a free port"))
}

pub(crate) fn write_certificates(folder: &Path, address: Ipv4Addr) -> Result<(), SiteError> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "load root");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let root_key = KeyPair::generate()?;
    let root = params.self_signed(&root_key)?;
    let issuer = Issuer::new(params, root_key);
    let key = KeyPair::generate()?;
    let names = vec![CLOUD_HOST.to_owned(), "localhost".to_owned(), IpAddr::V4(address).to_string()];
    let server = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    for (name, text) in [
        ("root.pem", root.pem()),
        ("server.pem", server.pem() + &root.pem()),
        ("server.key", key.serialize_pem()),
    ] {
        fs::write(folder.join(name), text).map_err(system("writing certificates"))?;
    }
    Ok(())
}

/// Makes the edge device and the identities of the plan in the registry of the cloud; gives the latter, and the
/// one of the hub. All devices are made in one write: the registry is one file.
fn create_identities(registry_file: &Path, plan: &Plan) -> Result<(Vec<Identity>, Identity), SiteError> {
    let registry = Registry::open(registry_file, CLOUD_HOST)?;
    registry.create_device(NewDevice { id: EDGE, edge: true, parent: None })?;
    let devices = plan.parties().filter(|party| party.module.is_none());
    registry.create_devices(devices.map(|party| NewDevice {
        id: &party.device,
        edge: false,
        parent: Some(EDGE),
    }))?;
    for party in plan.parties() {
        if let Some(module) = &party.module {
            registry.create_module(&party.device, module)?;
        }
    }
    let identity = |device: &str, module: Option<&str>| {
        let id = match module {
            Some(module) => Id::module(device, module),
            None => Id::device(device),
        };
        let id = id.map_err(|error| SiteError::Id(error.to_string()))?;
        Ok::<_, SiteError>(Identity::parse(&registry.connection_string(&id)?)?)
    };
    let made = plan.parties().map(|party| identity(&party.device, party.module.as_deref()));
    Ok((made.collect::<Result<_, _>>()?, identity(EDGE, Some(HUB_MODULE_ID))?))
}
