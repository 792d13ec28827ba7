//! Owns a RabbitMQ with its AMQP 1.0 plug-in that is started to be compared with, as the system has it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::site::{POLL, SiteError, end_of, free_address, free_port, spawn, system};

/// Where Debian puts the versions of RabbitMQ.
const SERVERS: &str = "/usr/lib/rabbitmq/lib";
/// Its start takes ten seconds of a processor of its own.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// User and password that it takes from this machine.
pub const GUEST: &str = "guest";

/// A running RabbitMQ; it is killed when it is dropped, and its files removed.
pub struct RabbitMq {
    broker: Child,
    mapper_port: u16,
    /// Where it takes AMQP 1.0.
    pub address: SocketAddr,
    _folder: TempDir,
}

impl RabbitMq {
    /// Starts it with its defaults and the plug-in. Queues that links make, and messages without a durable header, stay
    /// in its memory.
    ///
    /// # Errors
    /// It is not installed, or does not get ready.
    pub fn start() -> Result<Self, SiteError> {
        let program = installed().ok_or(SiteError::NoPeer("rabbitmq-server"))?;
        let folder = TempDir::with_prefix("edgehub-peer-").map_err(system("a temporary folder"))?;
        let at = |name: &str| folder.path().join(name);
        let address = free_port(free_address()?)?;
        let ports =
            [free_port(Ipv4Addr::LOCALHOST)?, free_port(Ipv4Addr::LOCALHOST)?].map(|address| address.port());
        let [distribution_port, mapper_port] = ports;
        for (name, text) in [
            ("enabled_plugins", "[rabbitmq_amqp1_0].\n".to_owned()),
            ("rabbitmq.conf", format!("listeners.tcp.1 = {address}\n")),
        ] {
            fs::write(at(name), text).map_err(system("the configuration of the peer"))?;
        }
        let log = at("console.log");
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", folder.path())
            .env("LANG", "C.UTF-8")
            // The script becomes the broker instead of waiting for it, so its process is the one to be measured.
            .env("RUNNING_UNDER_SYSTEMD", "true")
            .env("ERL_EPMD_PORT", mapper_port.to_string())
            .env("ERL_EPMD_ADDRESS", Ipv4Addr::LOCALHOST.to_string())
            .env("RABBITMQ_NODENAME", format!("load{distribution_port}@localhost"))
            .env("RABBITMQ_DIST_PORT", distribution_port.to_string())
            .env("RABBITMQ_CONFIG_FILE", at("rabbitmq.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", at("enabled_plugins"))
            .env("RABBITMQ_MNESIA_BASE", at("mnesia"))
            .env("RABBITMQ_LOG_BASE", at("log"))
            .env("RABBITMQ_PID_FILE", at("pid"))
            // Its own helpers end with it.
            .process_group(0);
        let broker = spawn(&mut command, &log)?;
        let mut peer = Self { broker, mapper_port, address, _folder: folder };
        let end = Instant::now() + START_TIMEOUT;
        // It listens last of all.
        while TcpStream::connect(address).is_err() {
            let ended = peer.broker.try_wait().map_err(system("watching RabbitMQ"))?;
            if ended.is_some() || Instant::now() > end {
                let what = "RabbitMQ does not take connections".to_owned();
                return Err(SiteError::NotReady { what, log: end_of(&log) });
            }
            thread::sleep(POLL);
        }
        Ok(peer)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.broker.id()
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.broker.kill();
        let _ended = self.broker.wait();
        // Its port mapper is a process of its own.
        let _ended = Command::new("epmd")
            .args(["-port", &self.mapper_port.to_string(), "-kill"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

fn installed() -> Option<PathBuf> {
    let versions = fs::read_dir(SERVERS).ok()?.flatten();
    versions
        .map(|version| version.path().join("sbin/rabbitmq-server"))
        .filter(|program| program.is_file())
        .max()
}
