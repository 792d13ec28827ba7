//! Owns the throw-away certificate authority for demonstrations and tests.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use super::CertificateError;

/// Days that a throw-away certificate is valid.
const VALID_DAYS: i64 = 30;
/// Time by which the clock of another machine may be behind.
const CLOCK_SKEW: Duration = Duration::hours(1);

/// A root certificate and its key, alive as long as the value. Not for production: the key is nowhere
/// protected.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key as PEM text.
pub struct IssuedCertificate {
    /// The certificate, followed by the root.
    pub chain_pem: String,
    /// The private key (PKCS #8).
    pub key_pem: String,
}

/// The files written by [`write_demo`].
#[derive(Clone, Debug)]
pub struct DemoFiles {
    /// The root: clients must trust it.
    pub root: PathBuf,
    /// Server certificate and chain.
    pub certificate: PathBuf,
    /// Private key of the server certificate.
    pub private_key: PathBuf,
}

impl Authority {
    /// Makes a root with a P-256 key.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn new(name: &str) -> Result<Self, CertificateError> {
        let mut params = params(Vec::new(), name)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    /// The root certificate.
    pub fn root_pem(&self) -> String {
        self.issuer.pem()
    }

    /// Issues a server certificate for DNS names and IP addresses; the first is the common name.
    ///
    /// # Errors
    /// A name is not a DNS name.
    pub fn issue_server(&self, names: &[String]) -> Result<IssuedCertificate, CertificateError> {
        let common_name = names.first().map_or("localhost", String::as_str);
        self.issue(names.to_vec(), common_name, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// Issues a client certificate with this common name.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn issue_client(&self, common_name: &str) -> Result<IssuedCertificate, CertificateError> {
        self.issue(Vec::new(), common_name, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn issue(
        &self,
        names: Vec<String>,
        common_name: &str,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<IssuedCertificate, CertificateError> {
        let mut params = params(names, common_name)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(IssuedCertificate {
            chain_pem: format!("{}{}", certificate.pem(), self.issuer.pem()),
            key_pem: key.serialize_pem(),
        })
    }
}

/// Makes a root and a server certificate and writes them as `root.pem`, `server.pem` and `server.key`, the
/// key readable for its owner only. The root's key is forgotten.
///
/// # Errors
/// A name is not a DNS name, or a file cannot be written.
pub fn write_demo(folder: &Path, names: &[String]) -> Result<DemoFiles, CertificateError> {
    let unwritable = |path: &Path, error: std::io::Error| CertificateError::Unwritable {
        path: path.into(),
        reason: error.to_string(),
    };
    std::fs::create_dir_all(folder).map_err(|error| unwritable(folder, error))?;
    let authority = Authority::new("edgehub demo root")?;
    let server = authority.issue_server(names)?;
    let files = DemoFiles {
        root: folder.join("root.pem"),
        certificate: folder.join("server.pem"),
        private_key: folder.join("server.key"),
    };
    for (path, text, mode) in [
        (&files.root, authority.root_pem(), 0o644),
        (&files.certificate, server.chain_pem, 0o644),
        (&files.private_key, server.key_pem, 0o600),
    ] {
        // A file that is there may have wider permissions: it is replaced, not overwritten.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(unwritable(path, error));
            }
            _ => {}
        }
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| unwritable(path, error))?;
    }
    Ok(files)
}

fn params(names: Vec<String>, common_name: &str) -> Result<CertificateParams, CertificateError> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + Duration::days(VALID_DAYS);
    Ok(params)
}
