//! Listeners over loopback: TLS with and without a client certificate, limits, stop.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdTcpListener};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use edgehub::certificate::authority::{Authority, IssuedCertificate, write_demo};
use edgehub::certificate::{
    CertificateError, ServerCertificate, UpstreamTrust, load_bundle, load_certificates, provider,
    server_config,
};
use edgehub::listen::{ConnectionGate, ConnectionThreads, ListenError, TlsGate, bind};
use edgehub::settings::{CertificateFiles, ListenAddress, ListenHost, TlsSettings, TlsVersions};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const TIMEOUT: Duration = Duration::from_secs(60);
const LOOPBACK: ListenAddress =
    ListenAddress { host: ListenHost::Address(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST)), port: 0 };

fn threads() -> ConnectionThreads {
    ConnectionThreads::start(NonZeroUsize::new(2).unwrap()).unwrap()
}

fn within<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(TIMEOUT, future).await.expect("in time") })
}

fn write(folder: &Path, issued: &IssuedCertificate) -> CertificateFiles {
    let files = CertificateFiles {
        certificate: folder.join("c.pem"),
        private_key: folder.join("k.pem"),
        trust_bundle: None,
    };
    std::fs::write(&files.certificate, &issued.chain_pem).unwrap();
    std::fs::write(&files.private_key, &issued.key_pem).unwrap();
    files
}

/// A TLS listener that tells each client the number of certificates that it showed.
struct TlsServer {
    threads: ConnectionThreads,
    authority: Authority,
    certificate: Arc<ServerCertificate>,
    folder: tempfile::TempDir,
    address: SocketAddr,
}

impl TlsServer {
    fn start(versions: TlsVersions, handshake_timeout: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("test root").unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let files = write(folder.path(), &authority.issue_server(&names).unwrap());
        let certificate = Arc::new(ServerCertificate::load(&files).unwrap());
        let settings = TlsSettings {
            versions,
            client_certificates: true,
            renew_after_max: None,
            handshake_timeout,
            handshakes_waiting_max: 2,
        };
        let config = server_config(Arc::clone(&certificate), &settings).unwrap();
        let gate = TlsGate::new(config, 2, handshake_timeout, settings.handshakes_waiting_max);
        let threads = threads();
        let listener = bind("test", LOOPBACK, 16).unwrap();
        let address = listener.address();
        threads
            .serve_tls(
                listener,
                &ConnectionGate::new(100),
                Arc::new(gate),
                |mut stream, _peer, _at| async move {
                    let shown = stream.get_ref().1.peer_certificates().map_or(0, <[_]>::len);
                    let _gone = stream.write_all(&[shown as u8]).await;
                    let _gone = stream.shutdown().await;
                },
            )
            .unwrap();
        Self { threads, authority, certificate, folder, address }
    }

    fn client(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
        shown: Option<&IssuedCertificate>,
    ) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.root_pem().as_bytes()).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        let config = match shown {
            None => builder.with_no_client_auth(),
            Some(issued) => {
                let chain =
                    CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes()).collect::<Result<_, _>>();
                let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes());
                builder.with_client_auth_cert(chain.unwrap(), key.unwrap()).unwrap()
            }
        };
        TlsConnector::from(Arc::new(config))
    }

    /// Connects and reads what the server tells; also whether the session was resumed.
    async fn ask(&self, connector: &TlsConnector) -> std::io::Result<(u8, bool)> {
        let stream = TcpStream::connect(self.address).await?;
        let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await?;
        let shown = stream.read_u8().await?;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await?;
        let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
        Ok((shown, resumed))
    }
}

#[test]
fn handshakes_with_and_without_a_client_certificate() {
    let server = TlsServer::start(TlsVersions::default(), TIMEOUT);
    let issued = server.authority.issue_client("leaf1").unwrap();
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let plain = server.client(&[version], None);
        assert_eq!(within(server.ask(&plain)).unwrap(), (0, false));
        let showing = server.client(&[version], Some(&issued));
        assert_eq!(within(server.ask(&showing)).unwrap(), (2, false));
        assert_eq!(within(server.ask(&showing)).unwrap(), (2, true), "a resumed session keeps the chain");
    }
    server.threads.stop(TIMEOUT);
}

#[test]
fn a_foreign_client_certificate_is_let_through_to_be_judged_later() {
    let server = TlsServer::start(TlsVersions::default(), TIMEOUT);
    let foreign = Authority::new("elsewhere").unwrap().issue_client("x").unwrap();
    let connector = server.client(&[&rustls::version::TLS13], Some(&foreign));
    assert_eq!(within(server.ask(&connector)).unwrap(), (2, false));
    server.threads.stop(TIMEOUT);
}

#[test]
fn versions_that_are_switched_off_are_refused() {
    let server = TlsServer::start(TlsVersions { tls12: false, tls13: true }, TIMEOUT);
    assert!(within(server.ask(&server.client(&[&rustls::version::TLS12], None))).is_err());
    assert!(within(server.ask(&server.client(&[&rustls::version::TLS13], None))).is_ok());
    server.threads.stop(TIMEOUT);
}

#[test]
fn a_renewed_certificate_is_used_by_the_next_handshake() {
    let mut server = TlsServer::start(TlsVersions::default(), TIMEOUT);
    let old = server.client(&[&rustls::version::TLS13], None);
    assert!(within(server.ask(&old)).is_ok());
    server.authority = Authority::new("new root").unwrap();
    let files =
        write(server.folder.path(), &server.authority.issue_server(&["localhost".to_owned()]).unwrap());
    server.certificate.reload(&files).unwrap();
    let new = server.client(&[&rustls::version::TLS13], None);
    assert!(within(server.ask(&new)).is_ok());
    std::fs::write(&files.certificate, "nothing").unwrap();
    assert!(matches!(server.certificate.reload(&files), Err(CertificateError::NoCertificate { .. })));
    assert!(
        within(server.ask(&server.client(&[&rustls::version::TLS13], None))).is_ok(),
        "the last one stays"
    );
    server.threads.stop(TIMEOUT);
}

#[test]
fn silent_clients_are_cut_off_and_hold_nobody_up() {
    let server = TlsServer::start(TlsVersions::default(), Duration::from_millis(300));
    within(async {
        // More silent ones than handshakes may wait: accepting pauses until their deadline.
        let mut silent = Vec::new();
        for _ in 0..5 {
            silent.push(TcpStream::connect(server.address).await.unwrap());
        }
        let connector = server.client(&[&rustls::version::TLS13], None);
        while server.ask(&connector).await.is_err() {}
        for mut stream in silent {
            let mut rest = Vec::new();
            let _end_or_reset = stream.read_to_end(&mut rest).await;
        }
    });
    server.threads.stop(TIMEOUT);
}

#[test]
fn connections_over_the_limit_are_closed_and_a_panic_ends_only_its_own() {
    let threads = threads();
    let listener = bind("test", LOOPBACK, 16).unwrap();
    let address = listener.address();
    let echo = |mut stream: TcpStream, _peer, _at| async move {
        while let Ok(byte) = stream.read_u8().await {
            assert_ne!(byte, b'!', "told to panic");
            let _gone = stream.write_u8(byte).await;
        }
    };
    threads.serve(listener, &ConnectionGate::new(2), echo).unwrap();
    within(async {
        let (mut first, mut second) = (open(address).await, open(address).await);
        let mut third = TcpStream::connect(address).await.unwrap();
        let mut rest = Vec::new();
        assert!(matches!(third.read_to_end(&mut rest).await, Ok(0) | Err(_)));
        first.write_u8(b'!').await.unwrap();
        assert!(matches!(first.read_to_end(&mut rest).await, Ok(0) | Err(_)));
        second.write_u8(b'a').await.unwrap();
        assert_eq!(second.read_u8().await.unwrap(), b'a');
        // The place of the first is free again as soon as its task is gone.
        loop {
            let mut fourth = TcpStream::connect(address).await.unwrap();
            if fourth.write_u8(b'b').await.is_ok() && fourth.read_u8().await.is_ok() {
                break;
            }
        }
    });
    // The second is still connected: its task does not end, and is cut off.
    let begun = Instant::now();
    threads.stop(Duration::from_millis(100));
    assert!(begun.elapsed() < TIMEOUT);
}

/// A connection that the echo serves.
async fn open(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_u8(b'o').await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'o');
    stream
}

#[test]
fn stop_tells_the_tasks() {
    let threads = threads();
    let listener = bind("test", LOOPBACK, 16).unwrap();
    let address = listener.address();
    let stopping = threads.stopping();
    threads
        .serve(listener, &ConnectionGate::new(2), move |mut stream, _peer, _at| {
            let mut stopping = stopping.clone();
            async move {
                let _gone = stream.write_u8(b'h').await;
                stopping.wait().await;
                let _gone = stream.write_u8(b'b').await;
            }
        })
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut stream = runtime.block_on(TcpStream::connect(address)).unwrap();
    assert_eq!(runtime.block_on(stream.read_u8()).unwrap(), b'h');
    threads.stop(TIMEOUT);
    assert_eq!(runtime.block_on(stream.read_u8()).unwrap(), b'b');
    assert!(runtime.block_on(TcpStream::connect(address)).is_err(), "nobody listens any more");
}

#[test]
fn a_port_in_use_is_named() {
    let taken = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = ListenAddress { port: taken.local_addr().unwrap().port(), ..LOOPBACK };
    let error = bind("MQTT", address, 16).unwrap_err();
    assert!(matches!(error, ListenError::InUse { .. }));
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("MQTT: address {address} is in use by another process; stop it")),
        "{text}"
    );
    let elsewhere = ListenHost::Address("192.0.2.1".parse().unwrap());
    assert!(matches!(
        bind("MQTT", ListenAddress { host: elsewhere, port: 0 }, 16),
        Err(ListenError::NoSuchAddress { .. })
    ));
}

#[test]
fn everywhere_takes_both_families_of_addresses() {
    let listener = bind("test", ListenAddress { host: ListenHost::Any, port: 0 }, 16).unwrap();
    let port = listener.address().port();
    std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    if listener.address().is_ipv6() {
        std::net::TcpStream::connect(("::1", port)).unwrap();
    }
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let demo = write_demo(folder.path(), &["localhost".to_owned()]).unwrap();
    let files = CertificateFiles {
        certificate: demo.certificate.clone(),
        private_key: demo.private_key.clone(),
        trust_bundle: None,
    };
    let certificate = ServerCertificate::load(&files).unwrap();
    assert!(certificate.validity().unwrap().warning(time::OffsetDateTime::now_utc()).is_none());
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&demo.private_key).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let failure = |certificate: &Path, key: &Path| {
        let files =
            CertificateFiles { certificate: certificate.into(), private_key: key.into(), trust_bundle: None };
        ServerCertificate::load(&files).unwrap_err()
    };
    let missing = folder.path().join("missing");
    assert!(matches!(failure(&missing, &demo.private_key), CertificateError::Unreadable { .. }));
    assert!(matches!(failure(&demo.private_key, &demo.private_key), CertificateError::NoCertificate { .. }));
    assert!(matches!(failure(&demo.certificate, &demo.certificate), CertificateError::NoKey { .. }));
    assert!(matches!(failure(&demo.root, &demo.private_key), CertificateError::KeyDoesNotMatch { .. }));
    assert_eq!(load_certificates("trust bundle", &demo.certificate).unwrap().len(), 2);
    assert!(UpstreamTrust::new(load_bundle([demo.root.as_path()]).unwrap()).is_ok());
    assert!(matches!(load_bundle([missing.as_path()]), Err(CertificateError::Unreadable { .. })));
}
