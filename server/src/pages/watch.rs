//! Owns which conditions hold of a running hub: configuration, upstream, store, certificate.

use std::sync::Arc;

use edgehub_broker::configuration::ConfigurationState;
use edgehub_broker::hub::Hub;
use edgehub_broker::upstream::{UpstreamState, UpstreamStatus};
use edgehub_storage::{SpaceState, Store};
use time::{Duration, OffsetDateTime};

use super::condition::{Condition, ConditionCode};
use crate::certificate::{ServerCertificate, Validity};
use crate::store;

/// A certificate that ends within this time is to be renewed.
pub const CERTIFICATE_WARNING: Duration = Duration::days(14);

/// What holds of this hub at this moment.
pub fn of(
    hub: &Hub,
    stored: &Store,
    configuration: &ConfigurationState,
    certificate: Option<&Arc<ServerCertificate>>,
) -> Vec<Condition> {
    let mut found = Vec::new();
    if let Some(status) = configuration.desired.as_ref().filter(|status| status.code != 200) {
        found.push(Condition::new(
            ConditionCode::ConfigurationRejected,
            format!("{}; what was in force before stays; correct the deployment", status.description),
        ));
    }
    let own = hub.upstream().map(|status| (String::new(), status.borrow().clone()));
    let targets = hub.upstream_targets().into_iter();
    let targets = targets.map(|status| (format!(" to {}", status.target), status.way));
    for (to, status) in own.into_iter().chain(targets) {
        let code = match status.state {
            UpstreamState::Up => continue,
            UpstreamState::Throttled => ConditionCode::UpstreamThrottled,
            UpstreamState::Connecting | UpstreamState::BackingOff => ConditionCode::UpstreamUnreachable,
        };
        // Once is enough where several ways have the same trouble.
        if found.iter().any(|condition| condition.code == code) {
            continue;
        }
        let UpstreamStatus { address, reason, .. } = status;
        let hint = match code {
            ConditionCode::UpstreamThrottled => {
                format!("the upstream {address}{to} asked for a pause; messages wait: {reason}")
            }
            _ => format!(
                "the upstream {address}{to} is not connected ({reason}); messages are stored; `edgehub check` tells what is wrong"
            ),
        };
        found.push(Condition::new(code, hint));
    }
    if let SpaceState::Full { reason } = stored.space().state {
        found.push(Condition::new(ConditionCode::StoreFull, format!("the store is full: {reason}")));
    }
    let damage = store::texts(stored);
    if !damage.is_empty() {
        found.push(Condition::new(ConditionCode::StoreDamaged, damage.join("; ")));
    }
    let validity = certificate.and_then(|certificate| certificate.validity());
    found.extend(validity.and_then(|validity| of_certificate(&validity, OffsetDateTime::now_utc())));
    found
}

/// What holds of a server certificate at this moment.
pub fn of_certificate(validity: &Validity, now: OffsetDateTime) -> Option<Condition> {
    if let Some(text) = validity.warning(now) {
        return Some(Condition::new(ConditionCode::CertificateInvalid, text));
    }
    (validity.not_after - now < CERTIFICATE_WARNING).then(|| {
        let text = format!(
            "the server certificate expires at {}; renew it, then send SIGHUP to put it in force",
            validity.not_after
        );
        Condition::new(ConditionCode::CertificateExpiring, text)
    })
}

/// Sets the gauge of the certificate; call it before the metrics are rendered.
pub fn observe_certificate(certificate: Option<&Arc<ServerCertificate>>) {
    let Some(validity) = certificate.and_then(|certificate| certificate.validity()) else { return };
    let left = validity.not_after - OffsetDateTime::now_utc();
    metrics::gauge!("edgehub_certificate_expiry_seconds", "kind" => "server").set(left.as_seconds_f64());
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_certificate_is_told_of_before_it_ends() {
        let validity = Validity {
            not_before: datetime!(2026-01-01 00:00 UTC),
            not_after: datetime!(2026-03-01 00:00 UTC),
        };
        let code = |now| of_certificate(&validity, now).map(|condition| condition.code);
        assert_eq!(code(datetime!(2025-12-31 00:00 UTC)), Some(ConditionCode::CertificateInvalid));
        assert_eq!(code(datetime!(2026-02-01 00:00 UTC)), None);
        assert_eq!(code(datetime!(2026-02-20 00:00 UTC)), Some(ConditionCode::CertificateExpiring));
        assert_eq!(code(datetime!(2026-03-02 00:00 UTC)), Some(ConditionCode::CertificateInvalid));
    }
}
