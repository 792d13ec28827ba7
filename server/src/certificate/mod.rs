//! Owns certificates and the TLS configurations made of them.
//!
//! The cryptography provider is passed explicitly everywhere: as soon as a dependency links a second one,
//! the implicit default panics.

pub mod authority;
mod trust;
mod validity;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{self, CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, InconsistentKeys, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
};

use crate::settings::{CertificateFiles, TlsSettings, TlsVersions};

pub use trust::UpstreamTrust;
pub use validity::Validity;

/// Longest PEM file that is read, bytes.
const PEM_BYTES_MAX: u64 = 1024 * 1024;

/// Why certificates cannot be used. No variant holds a key.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("{what} {path} cannot be read: {reason}; check the path and the permissions")]
    Unreadable {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// A file has no certificate.
    #[error("{what} {path} holds no certificate; it must be PEM text with BEGIN CERTIFICATE")]
    NoCertificate {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A file has no private key.
    #[error("private key {path} holds no key; it must be PEM text with BEGIN PRIVATE KEY, not encrypted")]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// The key belongs to another certificate.
    #[error("private key {key} does not belong to the first certificate in {certificate}; give the pair")]
    KeyDoesNotMatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The content of a file is not usable.
    #[error("{what} {path} cannot be used: {reason}")]
    Unusable {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Reason.
        reason: String,
    },
    /// A certificate and its key, given as text, do not work.
    #[error("certificate and key cannot be used: {0}")]
    Pair(String),
    /// A trust bundle, given as certificates, does not work.
    #[error("a certificate of the trust bundle cannot be used: {0}")]
    Bundle(String),
    /// No certificate at all to judge the upstream by.
    #[error(
        "there is no root certificate to judge the upstream by: the system has none; install the package \
         ca-certificates, or set EdgeHubDevTrustBundleFile or upstream.trust_file"
    )]
    NoRoots,
    /// A TLS configuration cannot be made.
    #[error("TLS cannot be configured: {0}")]
    Tls(#[from] rustls::Error),
    /// A certificate cannot be made.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    /// A file cannot be written.
    #[error("file {path} cannot be written: {reason}; choose another folder")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
}

/// The server certificate in force. It can be exchanged while connections are open: handshakes that begin
/// later see the new one.
#[derive(Debug)]
pub struct ServerCertificate {
    current: ArcSwap<CertifiedKey>,
}

impl ServerCertificate {
    /// Loads the certificate, its chain and its key.
    ///
    /// # Errors
    /// A file is missing or holds something else, or the key belongs to another certificate.
    pub fn load(files: &CertificateFiles) -> Result<Self, CertificateError> {
        Ok(Self { current: ArcSwap::from_pointee(load_key(files)?) })
    }

    /// Loads the files again and puts the result in force.
    ///
    /// # Errors
    /// As for [`Self::load`]; the certificate in force stays.
    pub fn reload(&self, files: &CertificateFiles) -> Result<(), CertificateError> {
        self.current.store(Arc::new(load_key(files)?));
        Ok(())
    }

    /// The certificate, its chain and its key out of PEM texts.
    ///
    /// # Errors
    /// A text holds something else, or the key belongs to another certificate.
    pub fn from_pem(chain_pem: &str, key_pem: &str) -> Result<Self, CertificateError> {
        Ok(Self { current: ArcSwap::from_pointee(key_of_pem(chain_pem, key_pem)?) })
    }

    /// Puts another certificate in force.
    ///
    /// # Errors
    /// As for [`Self::from_pem`]; the certificate in force stays.
    pub fn replace(&self, chain_pem: &str, key_pem: &str) -> Result<(), CertificateError> {
        self.current.store(Arc::new(key_of_pem(chain_pem, key_pem)?));
        Ok(())
    }

    /// The time in which the certificate is valid, `None` if its form is unusual.
    pub fn validity(&self) -> Option<Validity> {
        Validity::of(self.current.load().cert.first()?)
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

/// The certificates of a PEM file, at least one.
///
/// # Errors
/// The file cannot be read or holds no certificate.
pub fn load_certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let text = read(what, path)?;
    let certificates = pem_certificates(&text).map_err(|error| CertificateError::Unusable {
        what,
        path: path.into(),
        reason: format!("it is not valid PEM: {error}"),
    })?;
    if certificates.is_empty() {
        return Err(CertificateError::NoCertificate { what, path: path.into() });
    }
    Ok(certificates)
}

/// The certificates of a PEM text, at least one.
///
/// # Errors
/// Why there is none.
pub fn certificates_of_pem(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = pem_certificates(text).map_err(|error| format!("it is not valid PEM: {error}"))?;
    if certificates.is_empty() { Err("it holds no certificate".into()) } else { Ok(certificates) }
}

fn pem_certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(text).collect()
}

/// The configuration of TLS listeners. A client is asked for a certificate when the settings say so, but
/// needs none; one that it gives is proven to be its own, and **not judged**: read it after every handshake,
/// resumed ones too (no verifier is called then), and decide on thumbprint, trust and expiry there.
///
/// # Errors
/// The versions and the provider do not go together.
pub fn server_config(
    certificate: Arc<ServerCertificate>,
    settings: &TlsSettings,
) -> Result<Arc<ServerConfig>, CertificateError> {
    let provider = provider();
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions(settings.versions))?;
    let builder = if settings.client_certificates {
        builder.with_client_cert_verifier(Arc::new(PossessionVerifier { provider }))
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_cert_resolver(certificate);
    // Tickets instead of a cache: any number of clients can resume, and no memory is held for them.
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    config.send_tls13_tickets = 1;
    Ok(Arc::new(config))
}

/// The configuration for connections to the upstream: the system's roots and those of the files given.
/// Roots of the system that cannot be read are answered as warnings.
///
/// # Errors
/// A file is not usable, or there is no root at all.
pub fn upstream_config<'a>(
    trust_files: impl IntoIterator<Item = &'a Path>,
) -> Result<(Arc<ClientConfig>, Vec<String>), CertificateError> {
    let (trust, warnings) = UpstreamTrust::new(load_bundle(trust_files)?)?;
    Ok((Arc::new(trust).config()?, warnings))
}

/// The certificates of all the files.
///
/// # Errors
/// A file cannot be read or holds no certificate.
pub fn load_bundle<'a>(
    files: impl IntoIterator<Item = &'a Path>,
) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let mut bundle = Vec::new();
    for path in files {
        bundle.extend(load_certificates("trust bundle", path)?);
    }
    Ok(bundle)
}

/// The cryptography provider of the program.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn versions(versions: TlsVersions) -> Vec<&'static SupportedProtocolVersion> {
    [(versions.tls13, &rustls::version::TLS13), (versions.tls12, &rustls::version::TLS12)]
        .into_iter()
        .filter_map(|(on, version)| on.then_some(version))
        .collect()
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, CertificateError> {
    let unreadable = |reason| CertificateError::Unreadable { what, path: path.into(), reason };
    let size_bytes = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if size_bytes > PEM_BYTES_MAX {
        return Err(unreadable(format!("it is longer than {PEM_BYTES_MAX} bytes")));
    }
    std::fs::read(path).map_err(|error| unreadable(error.to_string()))
}

fn key_of_pem(chain_pem: &str, key_pem: &str) -> Result<CertifiedKey, CertificateError> {
    let chain = certificates_of_pem(chain_pem.as_bytes()).map_err(CertificateError::Pair)?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|_| CertificateError::Pair("the key's text holds no key".into()))?;
    // The library's texts describe the form of a key, never its content.
    CertifiedKey::from_der(chain, key, &provider()).map_err(|error| CertificateError::Pair(error.to_string()))
}

fn load_key(files: &CertificateFiles) -> Result<CertifiedKey, CertificateError> {
    let chain = load_certificates("server certificate", &files.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&read("private key", &files.private_key)?)
        .map_err(|_| CertificateError::NoKey { path: files.private_key.clone() })?;
    CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => CertificateError::KeyDoesNotMatch {
            certificate: files.certificate.clone(),
            key: files.private_key.clone(),
        },
        // The library's texts describe the form of a key, never its content.
        other => CertificateError::Unusable {
            what: "server certificate",
            path: files.certificate.clone(),
            reason: other.to_string(),
        },
    })
}

/// Proves that a client has the key of its certificate, and nothing else.
#[derive(Debug)]
struct PossessionVerifier {
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for PossessionVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
