//! Owns what a hub must have from the workload API before it opens a port: trust, and a certificate.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tracing::{info, warn};

use super::WorkloadClient;
use crate::certificate::ServerCertificate;

/// Pause after the first round that failed; doubled for each further one.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// What the daemon gave.
pub struct Provisioned {
    /// The server certificate, when one was asked for.
    pub certificate: Option<ServerCertificate>,
    /// The trust bundle.
    pub bundle: Vec<CertificateDer<'static>>,
}

/// Asks until everything is there: after a start of the machine the daemon may come later than the hub. `told` hears
/// why it is not there yet.
pub async fn provision(
    client: &WorkloadClient,
    common_name: Option<&str>,
    told: impl Fn(String),
) -> Provisioned {
    let mut pause = PAUSE_FIRST;
    loop {
        match once(client, common_name).await {
            Ok(provisioned) => return provisioned,
            Err(reason) => {
                warn!(code = "EH1011", "{reason}");
                told(reason);
                tokio::time::sleep(pause.mul_f64(1.0 + fastrand::f64() / 10.0)).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

async fn once(client: &WorkloadClient, common_name: Option<&str>) -> Result<Provisioned, String> {
    let bundle = client.trust_bundle().await.map_err(|error| error.to_string())?;
    let certificate = match common_name {
        None => None,
        Some(name) => Some(certificate(client, name).await?),
    };
    info!(uri = %client.settings().uri, trusted = bundle.len(), "The workload API answers");
    Ok(Provisioned { certificate, bundle })
}

async fn certificate(client: &WorkloadClient, common_name: &str) -> Result<ServerCertificate, String> {
    let issued = client.server_certificate(common_name).await.map_err(|error| error.to_string())?;
    let certificate = ServerCertificate::from_pem(&issued.chain_pem, &issued.key_pem)
        .map_err(|error| format!("the workload API issues a certificate that is not usable: {error}"))?;
    if let Some(validity) = certificate.validity() {
        match validity.warning(OffsetDateTime::now_utc()) {
            Some(text) => warn!(code = "EH1012", "{text}"),
            None => info!("the server certificate expires at {}", validity.not_after),
        }
    }
    Ok(certificate)
}
