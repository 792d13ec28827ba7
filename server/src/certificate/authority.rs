//! Owns the throw-away certificate authority for demonstrations and tests.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::OffsetDateTime;

use super::CertificateError;

/// How long a throw-away certificate is valid.
const LIFE: Duration = Duration::from_secs(30 * 86_400);
/// How long a root is valid that outlives its process.
const KEPT_ROOT_LIFE: Duration = Duration::from_secs(3_650 * 86_400);
/// Time by which the clock of another machine may be behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3_600);

/// A root certificate and its key. Not for production: the key is nowhere protected.
pub struct Authority {
    root_pem: String,
    issuer: Issuer<'static, KeyPair>,
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
    /// Makes a root with a P-256 key, alive as long as the value.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn new(name: &str) -> Result<Self, CertificateError> {
        Self::of(name, KeyPair::generate()?, LIFE)
    }

    /// The root that is kept in a folder as `root.pem` and `root.key`, made when it is not there. `name` must be that
    /// of the first call.
    ///
    /// # Errors
    /// The files cannot be read or written, or hold something else.
    pub fn open(folder: &Path, name: &str) -> Result<Self, CertificateError> {
        let (root, private_key) = (folder.join("root.pem"), folder.join("root.key"));
        if !private_key.exists() {
            std::fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
            let key = KeyPair::generate()?;
            let key_pem = key.serialize_pem();
            let made = Self::of(name, key, KEPT_ROOT_LIFE)?;
            // The key comes last: what is interrupted before is made anew.
            write(&root, &made.root_pem, 0o644)?;
            write(&private_key, &key_pem, 0o600)?;
            return Ok(made);
        }
        let read = |what, path: &Path| {
            std::fs::read_to_string(path).map_err(|error| CertificateError::Unreadable {
                what,
                path: path.into(),
                reason: error.to_string(),
            })
        };
        let key = KeyPair::from_pem(&read("private key", &private_key)?)?;
        Ok(Self {
            root_pem: read("root", &root)?,
            issuer: Issuer::new(root_params(name, KEPT_ROOT_LIFE)?, key),
        })
    }

    fn of(name: &str, key: KeyPair, life: Duration) -> Result<Self, CertificateError> {
        let params = root_params(name, life)?;
        Ok(Self { root_pem: params.self_signed(&key)?.pem(), issuer: Issuer::new(params, key) })
    }

    /// The root certificate.
    pub fn root_pem(&self) -> String {
        self.root_pem.clone()
    }

    /// Issues a server certificate for DNS names and IP addresses; the first is the common name.
    ///
    /// # Errors
    /// A name is not a DNS name.
    pub fn issue_server(&self, names: &[String]) -> Result<IssuedCertificate, CertificateError> {
        self.issue_server_for(names, LIFE)
    }

    /// The same, valid for a time of the caller's.
    ///
    /// # Errors
    /// A name is not a DNS name.
    pub fn issue_server_for(
        &self,
        names: &[String],
        life: Duration,
    ) -> Result<IssuedCertificate, CertificateError> {
        let common_name = names.first().map_or("localhost", String::as_str);
        self.issue(names.to_vec(), common_name, ExtendedKeyUsagePurpose::ServerAuth, life)
    }

    /// Issues a client certificate with this common name.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn issue_client(&self, common_name: &str) -> Result<IssuedCertificate, CertificateError> {
        self.issue(Vec::new(), common_name, ExtendedKeyUsagePurpose::ClientAuth, LIFE)
    }

    fn issue(
        &self,
        names: Vec<String>,
        common_name: &str,
        usage: ExtendedKeyUsagePurpose,
        life: Duration,
    ) -> Result<IssuedCertificate, CertificateError> {
        let mut params = params(names, common_name, life)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(IssuedCertificate {
            chain_pem: format!("{}{}", certificate.pem(), self.root_pem),
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
    std::fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
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
        write(path, &text, mode)?;
    }
    Ok(files)
}

/// Writes a file that nobody else may read before it has its permissions.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), CertificateError> {
    // A file that is there may have wider permissions: it is replaced, not overwritten.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(unwritable(path, &error));
        }
        _ => {}
    }
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| unwritable(path, &error))
}

fn unwritable(path: &Path, error: &std::io::Error) -> CertificateError {
    CertificateError::Unwritable { path: path.into(), reason: error.to_string() }
}

fn root_params(name: &str, life: Duration) -> Result<CertificateParams, CertificateError> {
    let mut params = params(Vec::new(), name, life)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn params(
    names: Vec<String>,
    common_name: &str,
    life: Duration,
) -> Result<CertificateParams, CertificateError> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + life;
    Ok(params)
}
