//! Owns by which certificates a running hub judges others: the upstream, and clients that show one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use edgehub_broker::identity::{ClientTrust, ScopeClient, ScopeRefresher};
use rustls::pki_types::CertificateDer;
use tracing::{info, warn};

use crate::certificate::{CertificateError, UpstreamTrust, load_bundle};

/// Puts trust bundles in force, without closing a connection that the new one still trusts.
#[derive(Clone)]
pub struct Trust {
    upstream: Arc<UpstreamTrust>,
    /// Roots for the upstream only, read again with each bundle.
    upstream_file: Option<PathBuf>,
    refresher: Arc<ScopeRefresher<ScopeClient>>,
}

impl Trust {
    /// Nothing is in force for clients yet.
    pub(super) fn new(
        upstream: Arc<UpstreamTrust>,
        upstream_file: Option<&Path>,
        refresher: Arc<ScopeRefresher<ScopeClient>>,
    ) -> Self {
        Self { upstream, upstream_file: upstream_file.map(Path::to_owned), refresher }
    }

    /// Judges everybody by this bundle from now on.
    ///
    /// # Errors
    /// A certificate is not usable for the upstream; then everything stays as it is.
    pub fn take(&self, bundle: Vec<CertificateDer<'static>>) -> Result<(), CertificateError> {
        let further = load_bundle(self.upstream_file.as_deref())?;
        self.upstream.replace(bundle.iter().cloned().chain(further))?;
        let trusted = bundle.len();
        self.refresher.set_client_trust(client_trust(bundle));
        info!(trusted, "The trust bundle is in force");
        Ok(())
    }
}

/// The bundle as it judges the certificates of clients.
pub(super) fn client_trust(bundle: Vec<CertificateDer<'static>>) -> ClientTrust {
    let (trust, unusable) = ClientTrust::new(bundle);
    if unusable > 0 {
        warn!(
            code = "EH3007",
            unusable, "Certificates of the trust bundle cannot be used for those of clients"
        );
    }
    trust
}
