//! Owns certificate and trust bundle of a running hub: both are asked for again before they end, and put in force
//! without closing a connection.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tracing::{error, info, warn};

use super::{WorkloadClient, WorkloadError};
use crate::certificate::{CertificateError, ServerCertificate};

/// The part of the time left after which a certificate is renewed, in percent.
const RENEW_AFTER_PERCENT: u32 = 80;
/// Shortest time between two certificates: a daemon that issues short-lived ones is not asked without end.
const RENEW_MIN: Duration = Duration::from_secs(1);
/// Pause after the first renewal that failed; doubled for each further one.
const RETRY_FIRST: Duration = Duration::from_secs(5);
/// Longest pause.
const RETRY_MAX: Duration = Duration::from_secs(300);
/// How often the trust bundle is asked for.
const BUNDLE_INTERVAL: Duration = Duration::from_secs(3_600);
/// Longest sleep: the clock may have been set meanwhile, or the machine may have slept.
const LOOK: Duration = Duration::from_secs(60);

/// Puts a trust bundle in force.
pub type BundleTaker =
    Box<dyn Fn(Vec<CertificateDer<'static>>) -> Result<(), CertificateError> + Send + Sync>;

/// Asks for a renewal now, before it is due.
#[derive(Clone, Debug, Default)]
pub struct Renewal {
    wanted: Arc<Notify>,
}

impl Renewal {
    /// Asks for it; one that is under way counts.
    pub fn want(&self) {
        self.wanted.notify_one();
    }
}

/// Renews certificate and trust bundle.
pub struct Keeper {
    /// Who is asked.
    pub client: WorkloadClient,
    /// The certificate in force and its name; none when no listener has TLS.
    pub certificate: Option<(Arc<ServerCertificate>, String)>,
    /// The longest time until a renewal (`ServerCertificateRenewAfterInMs`).
    pub renew_after_max: Option<Duration>,
    /// Takes each trust bundle that was fetched.
    pub bundle: BundleTaker,
    /// Wakes it.
    pub renewal: Renewal,
}

impl Keeper {
    /// Runs until it is dropped.
    pub async fn run(self) {
        let mut due = Due::new(self.first_due());
        loop {
            let now = OffsetDateTime::now_utc();
            let sleep = due
                .certificate
                .into_iter()
                .chain([due.bundle])
                .min()
                .map_or(LOOK, |next| Duration::try_from(next - now).unwrap_or_default().min(LOOK));
            let wanted = tokio::select! {
                () = tokio::time::sleep(sleep) => false,
                () = self.renewal.wanted.notified() => true,
            };
            let now = OffsetDateTime::now_utc();
            if let (Some((certificate, name)), Some(at)) = (&self.certificate, due.certificate)
                && (wanted || at <= now)
            {
                due.certificate = Some(match self.renew(certificate, name).await {
                    Ok(next) => {
                        due.retry = RETRY_FIRST;
                        next
                    }
                    Err(reason) => {
                        warn_of(certificate, &reason);
                        let at = OffsetDateTime::now_utc() + due.retry;
                        due.retry = (due.retry * 2).min(RETRY_MAX);
                        at
                    }
                });
            }
            if wanted || due.bundle <= now {
                let taken = match self.client.trust_bundle().await {
                    Ok(bundle) => (self.bundle)(bundle).map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                if let Err(reason) = taken {
                    warn!(code = "EH1013", "{reason}; the trust bundle before stays in force");
                }
                due.bundle = OffsetDateTime::now_utc() + BUNDLE_INTERVAL;
            }
        }
    }

    fn first_due(&self) -> Option<OffsetDateTime> {
        let (certificate, _) = self.certificate.as_ref()?;
        Some(renew_at(OffsetDateTime::now_utc(), certificate, self.renew_after_max))
    }

    /// Puts a new certificate in force; when the next one is due.
    async fn renew(&self, certificate: &ServerCertificate, name: &str) -> Result<OffsetDateTime, String> {
        let text = |error: WorkloadError| error.to_string();
        let issued = self.client.server_certificate(name).await.map_err(text)?;
        certificate.replace(&issued.chain_pem, &issued.key_pem).map_err(|error| error.to_string())?;
        let expiry = certificate.validity().map(|validity| validity.not_after.to_string());
        info!(expires_at = expiry.unwrap_or_default(), "The renewed server certificate is in force");
        Ok(renew_at(OffsetDateTime::now_utc(), certificate, self.renew_after_max))
    }
}

struct Due {
    certificate: Option<OffsetDateTime>,
    bundle: OffsetDateTime,
    retry: Duration,
}

impl Due {
    fn new(certificate: Option<OffsetDateTime>) -> Self {
        Self { certificate, bundle: OffsetDateTime::now_utc() + BUNDLE_INTERVAL, retry: RETRY_FIRST }
    }
}

fn warn_of(certificate: &ServerCertificate, reason: &str) {
    let validity = certificate.validity();
    if validity.is_some_and(|validity| validity.not_after < OffsetDateTime::now_utc()) {
        error!(code = "EH1015", "{reason}; the server certificate has expired, and clients refuse it");
    } else {
        warn!(code = "EH1014", "{reason}; the certificate before stays in force");
    }
}

fn renew_at(now: OffsetDateTime, certificate: &ServerCertificate, max: Option<Duration>) -> OffsetDateTime {
    let not_after = certificate.validity().map(|validity| validity.not_after);
    now + renew_after(not_after.map(|not_after| not_after - now), max)
}

/// How long a certificate is used that has so much time left. One that is of no use when it comes is followed soon by
/// another, but not at once: its successor may be the same.
fn renew_after(left: Option<time::Duration>, max: Option<Duration>) -> Duration {
    // The form of the certificate is unusual: once a day will do.
    let day = Duration::from_secs(86_400);
    let after = match left {
        None => day,
        Some(left) => match Duration::try_from(left) {
            Ok(left) if !left.is_zero() => left * RENEW_AFTER_PERCENT / 100,
            _ => RETRY_FIRST,
        },
    };
    after.min(max.unwrap_or(Duration::MAX)).max(RENEW_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_comes_before_the_end_and_never_at_once() {
        let secs = Duration::from_secs;
        for (left, max, expected) in [
            (Some(time::Duration::days(90)), None, secs(72 * 86_400)),
            (Some(time::Duration::seconds(100)), None, secs(80)),
            (Some(time::Duration::seconds(100)), Some(secs(30)), secs(30)),
            (Some(time::Duration::seconds(100)), Some(Duration::ZERO), RENEW_MIN),
            (Some(time::Duration::milliseconds(10)), None, RENEW_MIN),
            (Some(time::Duration::ZERO), None, RETRY_FIRST),
            (Some(time::Duration::seconds(-100)), None, RETRY_FIRST),
            (None, None, secs(86_400)),
            (None, Some(secs(60)), secs(60)),
        ] {
            assert_eq!(renew_after(left, max), expected, "{left:?} {max:?}");
        }
    }
}
