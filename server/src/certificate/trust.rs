//! Owns by which certificates the upstream is judged, while connections to it are made.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::{CertificateError, provider, versions};
use crate::settings::TlsVersions;

/// Trusts the system's roots and those of a bundle, which can be exchanged: handshakes that begin later are judged by
/// the new one.
#[derive(Debug)]
pub struct UpstreamTrust {
    current: ArcSwap<WebPkiServerVerifier>,
}

impl UpstreamTrust {
    /// Trusts this bundle beside the system's roots. Roots of the system that cannot be read are answered as warnings.
    ///
    /// # Errors
    /// A certificate of the bundle is not usable, or there is no root at all.
    pub fn new(
        bundle: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<(Self, Vec<String>), CertificateError> {
        let (verifier, warnings) = verifier(bundle)?;
        Ok((Self { current: ArcSwap::new(verifier) }, warnings))
    }

    /// Trusts another bundle from now on. Connections that are open stay.
    ///
    /// # Errors
    /// As for [`Self::new`]; the bundle in force stays.
    pub fn replace(
        &self,
        bundle: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<(), CertificateError> {
        self.current.store(verifier(bundle)?.0);
        Ok(())
    }

    /// The configuration of connections that are judged by it.
    ///
    /// # Errors
    /// The versions and the provider do not go together.
    pub fn config(self: &Arc<Self>) -> Result<Arc<ClientConfig>, CertificateError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&versions(TlsVersions::default()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::<Self>::clone(self))
            .with_no_client_auth();
        // A session that is resumed would not be judged again.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

impl ServerCertVerifier for UpstreamTrust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let current = self.current.load();
        current.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current.load().verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current.load().verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.current.load().supported_verify_schemes()
    }
}

fn verifier(
    bundle: impl IntoIterator<Item = CertificateDer<'static>>,
) -> Result<(Arc<WebPkiServerVerifier>, Vec<String>), CertificateError> {
    let mut roots = RootCertStore::empty();
    for certificate in bundle {
        roots.add(certificate).map_err(|error| CertificateError::Bundle(error.to_string()))?;
    }
    let system = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(system.certs);
    if roots.is_empty() {
        return Err(CertificateError::NoRoots);
    }
    let warnings = system.errors.iter().map(ToString::to_string).collect();
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| CertificateError::Bundle(error.to_string()))?;
    Ok((verifier, warnings))
}
