//! A network between the hub and its upstream that fails as it is told, and certificates that do not do.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What the network does with bytes and connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is wrong.
    None,
    /// Bytes vanish while the sockets stay open.
    Swallow,
    /// Nobody reads and nobody writes while the sockets stay open: a peer that is gone without a word.
    Hold,
    /// Connections are reset, also new ones.
    Reset,
    /// Connections are closed as soon as they are there.
    Refuse,
    /// Bytes come late.
    Delay,
}

/// How late bytes come.
const LATE: Duration = Duration::from_millis(20);

/// The network.
pub(crate) struct Network {
    pub(crate) port: u16,
    fault: watch::Sender<Fault>,
    accepting: JoinHandle<()>,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Network {
    /// Leads to a port of this machine.
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let own_port = listener.local_addr().unwrap().port();
        let (fault, faults) = watch::channel(Fault::None);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                connections.spawn(carry(near, port, faults.clone()));
            }
        });
        Self { port: own_port, fault, accepting }
    }

    /// From now on.
    pub(crate) fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

async fn carry(near: TcpStream, port: u16, mut faults: watch::Receiver<Fault>) {
    let broken = |fault: &Fault| matches!(fault, Fault::Reset | Fault::Refuse);
    let at_once = *faults.borrow();
    if broken(&at_once) {
        return end(&near, at_once);
    }
    let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { return };
    let (mut near, mut far) = (near, far);
    {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = far.split();
        tokio::select! {
            () = pump(near_read, far_write, faults.clone()) => {}
            () = pump(far_read, near_write, faults.clone()) => {}
            _ = faults.wait_for(broken) => {}
        }
    }
    let fault = *faults.borrow();
    end(&near, fault);
}

fn end(stream: &TcpStream, fault: Fault) {
    if fault == Fault::Reset {
        // Closing with what is unread and no time to linger sends a reset.
        let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut faults: watch::Receiver<Fault>,
) {
    let mut buffer = vec![0; 16_384];
    loop {
        if faults.wait_for(|fault| *fault != Fault::Hold).await.is_err() {
            return;
        }
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            _ = faults.changed() => continue,
        };
        let Ok(count @ 1..) = read else { return };
        let fault = *faults.borrow();
        match fault {
            Fault::Swallow => continue,
            Fault::Hold => {
                if faults.wait_for(|fault| *fault != Fault::Hold).await.is_err() {
                    return;
                }
            }
            Fault::Delay => tokio::time::sleep(LATE).await,
            Fault::None | Fault::Reset | Fault::Refuse => {}
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// An authority, and servers by it.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) client: Arc<rustls::ClientConfig>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.der().clone()).unwrap();
        let client = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        Self { issuer: Issuer::new(params, key), client: Arc::new(client) }
    }

    /// A server of this name; one that has expired, or not.
    pub(crate) fn server(&self, name: &str, expired: bool) -> Arc<rustls::ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        if expired {
            params.not_before = date_time_ymd(2019, 1, 1);
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        Arc::new(config.with_single_cert(vec![certificate.der().clone()], key).unwrap())
    }
}
