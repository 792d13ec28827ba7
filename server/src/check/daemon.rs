//! Owns the checks of what comes from the security daemon: trust, and a server certificate.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use super::{Checked, Verdict, local};
use crate::certificate::{ServerCertificate, certificates_of_pem};
use crate::settings::{HubProof, Settings};
use crate::workload::WorkloadClient;

const CHECK: &str = "certificates";

/// What the daemon of a hub without a key of its own gives; none for a hub that has one.
pub(super) struct Given {
    /// The check of the server certificate.
    pub(super) certificates: Checked,
    /// Whom the hub trusts; empty when the daemon does not tell.
    pub(super) bundle: Vec<CertificateDer<'static>>,
}

/// Asks the daemon, as the hub does at its start; all together has the limit.
pub(super) async fn ask(settings: &Settings, limit: Duration) -> Option<Given> {
    let HubProof::Workload(workload) = &settings.hub.proof else { return None };
    let client = WorkloadClient::new(workload.clone());
    let late = || {
        let text = format!(
            "the workload API at {} does not answer within {} s; look at the security daemon",
            client.settings().uri,
            limit.as_secs()
        );
        Given { certificates: Checked::new(CHECK, Verdict::Error, text), bundle: Vec::new() }
    };
    Some(timeout(limit, given(settings, &client)).await.unwrap_or_else(|_| late()))
}

async fn given(settings: &Settings, client: &WorkloadClient) -> Given {
    let error = |text: String| Checked::new(CHECK, Verdict::Error, text);
    let bundle = match client.trust_bundle().await {
        Ok(bundle) => bundle,
        Err(fault) => return Given { certificates: error(fault.to_string()), bundle: Vec::new() },
    };
    let host = settings.hub.own_host.as_ref().filter(|_| settings.listen.uses_tls());
    let certificates = match host {
        None => Checked::new(CHECK, Verdict::Skipped, "no TLS listener is on"),
        Some(host) => match issued(client, host.as_str()).await {
            Ok(certificate) => local::in_time(&certificate),
            Err(text) => error(text),
        },
    };
    Given { certificates, bundle }
}

/// A certificate for this name, as the daemon issues it: it can be used, and is for the name.
async fn issued(client: &WorkloadClient, host: &str) -> Result<ServerCertificate, String> {
    let issued = client.server_certificate(host).await.map_err(|fault| fault.to_string())?;
    let unusable = |reason: &dyn std::fmt::Display| {
        format!("the workload API issues a certificate that is not usable: {reason}")
    };
    let certificate = ServerCertificate::from_pem(&issued.chain_pem, &issued.key_pem);
    let certificate = certificate.map_err(|fault| unusable(&fault))?;
    let chain = certificates_of_pem(issued.chain_pem.as_bytes()).map_err(|reason| unusable(&reason))?;
    local::covers(&chain, host)?;
    Ok(certificate)
}
