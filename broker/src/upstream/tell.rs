//! What the log says of identities on the way up, the same over AMQP and MQTT; each warning is limited. `to` is the target of
//! a way that is one of several.

use std::fmt::Debug;
use std::time::Duration;

use metrics::counter;

use super::watchdog::{Stall, WatchdogStep};
use crate::head::warn_limit::WarnLimit;
use crate::identity::Identity;

static STALL_WARNINGS: WarnLimit = WarnLimit::new();
static FEATURE_WARNINGS: WarnLimit = WarnLimit::new();
static IDENTITY_WARNINGS: WarnLimit = WarnLimit::new();
static DOWNWARD_WARNINGS: WarnLimit = WarnLimit::new();

/// Something of an identity does not get on, and the watchdog takes a step.
pub(super) fn stalled(identity: &Identity, to: Option<&str>, stall: Stall, step: WatchdogStep) {
    if let Some(others) = STALL_WARNINGS.admit() {
        tracing::warn!(
            code = "EH5008", %identity, to, step = step.as_str(), reason = stall.as_str(), others,
            "Nothing gets on with the upstream; it is started anew from here"
        );
    }
}

/// The upstream does not give an identity what is wanted.
pub(super) fn not_served(identity: &Identity, kind: impl Debug, reason: &str) {
    if let Some(others) = FEATURE_WARNINGS.admit() {
        tracing::warn!(
            code = "EH5011", %identity, ?kind, reason, others,
            "The upstream does not serve what a client wants; it is asked again after a pause"
        );
    }
}

/// The session or connection of an identity failed.
pub(super) fn failed(identity: &Identity, to: Option<&str>, reason: &str, pause: Duration) {
    counter!("edgehub_operation_retry_total", "id" => "iothub", "operation" => "SendMessageToCloud")
        .increment(1);
    if let Some(others) = IDENTITY_WARNINGS.admit() {
        tracing::warn!(
            code = "EH5012", %identity, to, reason, pause_secs = pause.as_secs_f32(), others,
            "The upstream session of an identity failed and is made anew after a pause"
        );
    }
}

/// What came down cannot be read.
pub(super) fn unreadable(identity: &Identity, what: &'static str) {
    if let Some(others) = DOWNWARD_WARNINGS.admit() {
        tracing::warn!(code = "EH5009", %identity, what, others, "The upstream sent what cannot be read");
    }
}

/// What came down finds no room; `kind` is its name in metrics.
pub(super) fn no_room(identity: &Identity, kind: &'static str, text: &'static str) {
    counter!("edgehub_upstream_refused_total", "kind" => kind).increment(1);
    if let Some(others) = DOWNWARD_WARNINGS.admit() {
        tracing::warn!(code = "EH5010", %identity, others, "{text}");
    }
}
