//! Owns what keeps a hub from being ready, or should be looked at although it is: a closed list of codes.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What is the matter. The names are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConditionCode {
    /// The hub is starting.
    Starting,
    /// No configuration is in force yet.
    NoConfiguration,
    /// The hub is stopping.
    Stopping,
    /// The configuration that the twin asks for is refused, in part or as a whole; the one in force stays.
    ConfigurationRejected,
    /// The upstream is not connected; messages are stored.
    UpstreamUnreachable,
    /// The upstream asked for a pause.
    UpstreamThrottled,
    /// New messages find no room.
    StoreFull,
    /// Parts of the store cannot be read.
    StoreDamaged,
    /// The server certificate ends soon.
    CertificateExpiring,
    /// The server certificate has ended, or is not valid yet.
    CertificateInvalid,
}

impl ConditionCode {
    /// Every code, for the documentation.
    pub const ALL: [Self; 10] = [
        Self::Starting,
        Self::NoConfiguration,
        Self::Stopping,
        Self::ConfigurationRejected,
        Self::UpstreamUnreachable,
        Self::UpstreamThrottled,
        Self::StoreFull,
        Self::StoreDamaged,
        Self::CertificateExpiring,
        Self::CertificateInvalid,
    ];

    /// Whether a hub of which it holds is not ready. With the others it does what can be done, and a restart would
    /// not help.
    pub fn blocks(self) -> bool {
        match self {
            Self::Starting | Self::NoConfiguration | Self::Stopping => true,
            Self::ConfigurationRejected
            | Self::UpstreamUnreachable
            | Self::UpstreamThrottled
            | Self::StoreFull
            | Self::StoreDamaged
            | Self::CertificateExpiring
            | Self::CertificateInvalid => false,
        }
    }

    /// The name on pages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::NoConfiguration => "no_configuration",
            Self::Stopping => "stopping",
            Self::ConfigurationRejected => "configuration_rejected",
            Self::UpstreamUnreachable => "upstream_unreachable",
            Self::UpstreamThrottled => "upstream_throttled",
            Self::StoreFull => "store_full",
            Self::StoreDamaged => "store_damaged",
            Self::CertificateExpiring => "certificate_expiring",
            Self::CertificateInvalid => "certificate_invalid",
        }
    }
}

/// Something that is the matter now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// What.
    pub code: ConditionCode,
    /// What is wrong and what to do next, in one sentence.
    pub hint: String,
}

impl Condition {
    /// This code with this sentence.
    pub fn new(code: ConditionCode, hint: impl Into<String>) -> Self {
        Self { code, hint: hint.into() }
    }
}

/// A condition as pages show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// What is the matter.
    pub code: ConditionCode,
    /// When it was first seen, in RFC 3339.
    pub since: String,
    /// What is wrong and what to do next.
    pub hint: String,
}

/// Remembers since when each condition holds.
#[derive(Default)]
pub(super) struct Sinces {
    seen: Mutex<BTreeMap<ConditionCode, OffsetDateTime>>,
}

impl Sinces {
    /// The conditions of this moment, with the time since when each is seen without a break.
    pub(super) fn look(&self, now: OffsetDateTime, conditions: Vec<Condition>) -> Vec<Reason> {
        let mut seen = self.seen.lock();
        seen.retain(|code, _| conditions.iter().any(|condition| condition.code == *code));
        let reason = |condition: Condition| {
            let since = *seen.entry(condition.code).or_insert(now);
            // Whole seconds; the clock's year has four digits.
            let since = since.replace_nanosecond(0).unwrap_or(since).format(&Rfc3339).unwrap_or_default();
            Reason { code: condition.code, since, hint: condition.hint }
        };
        conditions.into_iter().map(reason).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_condition_keeps_its_time_until_it_ends() {
        let sinces = Sinces::default();
        let full = || vec![Condition::new(ConditionCode::StoreFull, "full")];
        let first = datetime!(2026-01-01 00:00:00.5 UTC);
        let since = |now, conditions| sinces.look(now, conditions).pop().map(|reason| reason.since);
        assert_eq!(since(first, full()).as_deref(), Some("2026-01-01T00:00:00Z"));
        assert_eq!(since(first + time::Duration::HOUR, full()).as_deref(), Some("2026-01-01T00:00:00Z"));
        assert_eq!(since(first, Vec::new()), None);
        assert_eq!(since(first + time::Duration::HOUR, full()).as_deref(), Some("2026-01-01T01:00:00Z"));
    }

    #[test]
    fn names_are_those_of_json() {
        for code in ConditionCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }
}
