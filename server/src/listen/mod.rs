//! Owns the listening sockets: binding them, and saying clearly why one cannot be bound.

pub mod forwarded;
mod handshake;
pub mod https;
mod threads;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

use crate::settings::{ListenAddress, ListenHost};

pub use handshake::{HandshakeFault, TlsGate};
pub use threads::{ConnectionGate, ConnectionThreads, Stopping};

/// A socket that listens and does not block.
#[derive(Debug)]
pub struct Listener {
    name: &'static str,
    address: SocketAddr,
    socket: TcpListener,
}

impl Listener {
    /// What listens, for logs and metrics.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The address in use; it has the port that the system chose if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The socket itself.
    pub fn into_socket(self) -> TcpListener {
        self.socket
    }
}

/// Why a port cannot be opened or served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has the port.
    #[error(
        "{name}: address {address} is in use by another process; stop it (`ss -ltnp` shows who it is) or set \
         another port"
    )]
    InUse {
        /// What should listen.
        name: &'static str,
        /// The address.
        address: ListenAddress,
    },
    /// Low ports need a permission.
    #[error(
        "{name}: address {address} needs a permission; give the program cap_net_bind_service or set a port \
         above 1023"
    )]
    NotPermitted {
        /// What should listen.
        name: &'static str,
        /// The address.
        address: ListenAddress,
    },
    /// The machine does not have the address.
    #[error("{name}: this machine does not have address {address}; set one that it has, or any")]
    NoSuchAddress {
        /// What should listen.
        name: &'static str,
        /// The address.
        address: ListenAddress,
    },
    /// Something else.
    #[error("{name}: address {address} cannot be opened: {source}")]
    Other {
        /// What should listen.
        name: &'static str,
        /// The address.
        address: ListenAddress,
        /// The system's reason.
        source: io::Error,
    },
    /// A thread or its runtime cannot be started.
    #[error("a connection thread cannot be started: {0}; check the limits of processes and open files")]
    Thread(io::Error),
    /// The threads are stopping.
    #[error("{0}: the connection threads are stopping")]
    Stopping(&'static str),
}

/// Opens a listening socket. `backlog` bounds the connections that wait to be accepted.
///
/// # Errors
/// The address is in use, needs a permission or does not exist.
pub fn bind(name: &'static str, address: ListenAddress, backlog: u32) -> Result<Listener, ListenError> {
    let result = match address.host {
        ListenHost::Address(host) => open(SocketAddr::new(host, address.port), backlog),
        ListenHost::Any => {
            let everywhere = SocketAddr::from((Ipv6Addr::UNSPECIFIED, address.port));
            match open(everywhere, backlog) {
                // A machine without IPv6 either has no such sockets or no such address.
                Err(error) if without_ipv6(&error) => {
                    open(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port)), backlog)
                }
                other => other,
            }
        }
    };
    let bound = result.and_then(|socket| Ok((socket.local_addr()?, socket)));
    match bound {
        Ok((local, socket)) => Ok(Listener { name, address: local, socket }),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse { name, address },
            io::ErrorKind::PermissionDenied => ListenError::NotPermitted { name, address },
            io::ErrorKind::AddrNotAvailable => ListenError::NoSuchAddress { name, address },
            _ => ListenError::Other { name, address, source: error },
        }),
    }
}

fn open(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.ip() == Ipv6Addr::UNSPECIFIED {
        socket.set_only_v6(false)?;
    }
    // A restart must not wait for the connections of the last run to be forgotten.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

fn without_ipv6(error: &io::Error) -> bool {
    /// Linux: address family not supported.
    const EAFNOSUPPORT: i32 = 97;
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.kind() == io::ErrorKind::Unsupported
        || matches!(error.raw_os_error(), Some(EAFNOSUPPORT))
}
