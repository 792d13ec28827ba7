//! Owns a broker that is started to be compared with: Eclipse Mosquitto, as the system has it.

use std::ffi::OsStr;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::Instant;

use tempfile::TempDir;

use crate::site::{
    POLL, READY_TIMEOUT, SiteError, end_of, free_address, free_port, spawn, system, write_certificates,
};

/// Where Debian puts daemons; not in everybody's `PATH`.
const SYSTEM_FOLDERS: [&str; 2] = ["/usr/sbin", "/usr/local/sbin"];

/// A running broker; it is killed when it is dropped, and its files removed.
pub struct Peer {
    broker: Child,
    /// Where it takes MQTT.
    pub address: SocketAddr,
    /// Root certificate for TLS.
    pub root_file: PathBuf,
    _folder: TempDir,
}

impl Peer {
    /// Starts Mosquitto: no authentication, nothing on disk, no bound that would lose messages of a fast publisher,
    /// and answers sent at once, as the hub does.
    ///
    /// # Errors
    /// It is not installed, or does not get ready.
    pub fn mosquitto(tls: bool) -> Result<Self, SiteError> {
        let program = installed("mosquitto").ok_or(SiteError::NoPeer("mosquitto"))?;
        let folder = TempDir::with_prefix("edgehub-peer-").map_err(system("a temporary folder"))?;
        let at = |name: &str| folder.path().join(name);
        let host = free_address()?;
        let address = free_port(host)?;
        write_certificates(folder.path(), host)?;
        let mut config = format!(
            "listener {} {host}\nallow_anonymous true\npersistence false\nlog_type error\nset_tcp_nodelay true\n\
             max_queued_messages 0\nmax_inflight_messages 0\n",
            address.port()
        );
        if tls {
            let (chain, key) = (at("server.pem"), at("server.key"));
            config += &format!("certfile {}\nkeyfile {}\n", chain.display(), key.display());
        }
        // Started by root it would give its rights up and not find its files.
        config += "user root\n";
        let config_file = at("mosquitto.conf");
        fs::write(&config_file, config).map_err(system("the configuration of the peer"))?;
        let log = at("mosquitto.log");
        let mut broker = spawn(Command::new(program).arg("-c").arg(&config_file), &log)?;
        let end = Instant::now() + READY_TIMEOUT;
        while TcpStream::connect(address).is_err() {
            let ended = broker.try_wait().map_err(system("watching mosquitto"))?;
            if ended.is_some() || Instant::now() > end {
                let _ended = broker.kill();
                let _ended = broker.wait();
                let what = "mosquitto does not take connections".to_owned();
                return Err(SiteError::NotReady { what, log: end_of(&log) });
            }
            thread::sleep(POLL);
        }
        Ok(Self { broker, address, root_file: at("root.pem"), _folder: folder })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.broker.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.broker.kill();
        let _ended = self.broker.wait();
    }
}

fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(OsStr::new(&path))
        .chain(SYSTEM_FOLDERS.map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}
