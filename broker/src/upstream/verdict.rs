//! What the answers of the upstream mean for the messages of a transfer, and its conditions for a sender.
//!
//! Everything is transient but a closed list: a condition that nobody foresaw must not cost messages.

use super::control::ControlError;
use crate::amqp::{Error, Outcome};

/// What an answer means for the messages of a transfer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The upstream has them.
    Delivered,
    /// The receiver will never take it.
    Refused(String),
    /// Everything else is transient.
    Later {
        /// Why, for logs and the status.
        reason: String,
        /// Whether the upstream asked for a pause.
        throttled: bool,
    },
}

impl Verdict {
    pub(super) fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Accepted => Verdict::Delivered,
            Outcome::Rejected(None) => Verdict::Refused("without a reason".into()),
            Outcome::Rejected(Some(error)) if is_permanent(error.condition.as_str()) => {
                Verdict::Refused(error.to_string())
            }
            Outcome::Rejected(Some(error)) => Verdict::Later {
                reason: format!("the upstream answered {error}"),
                throttled: is_throttling(error.condition.as_str()),
            },
            Outcome::Modified { undeliverable_here: true, .. } => {
                Verdict::Refused("undeliverable here".into())
            }
            Outcome::Released | Outcome::Modified { .. } => {
                Verdict::Later { reason: "the upstream released a transfer".into(), throttled: false }
            }
        }
    }
}

/// Conditions by which a receiver says that the message itself is at fault.
fn is_permanent(condition: &str) -> bool {
    matches!(
        condition,
        "amqp:link:message-size-exceeded"
            | "amqp:decode-error"
            | "amqp:invalid-field"
            | "amqp:not-implemented"
            | "amqp:precondition-failed"
            | "com.microsoft:argument-error"
            | "com.microsoft:argument-out-of-range"
    )
}

/// Conditions by which a receiver asks for a pause.
pub(super) fn is_throttling(condition: &str) -> bool {
    matches!(
        condition,
        "amqp:resource-limit-exceeded"
            | "com.microsoft:device-container-throttled"
            | "com.microsoft:server-busy"
            | "com.microsoft:iot-hub-suspended"
            | "com.microsoft:iot-hub-quota-exceeded"
    )
}

/// Conditions by which the upstream says that it does not let an identity in.
fn is_refusal(condition: &str) -> bool {
    matches!(
        condition,
        "amqp:unauthorized-access" | "amqp:not-found" | "com.microsoft:iot-hub-not-found-error"
    )
}

/// What those hear who asked for something of an identity whose links failed.
pub(super) fn control_error(error: Option<&Error>) -> ControlError {
    match error {
        Some(error) if is_refusal(error.condition.as_str()) => ControlError::Unauthorized(error.to_string()),
        Some(error) if is_throttling(error.condition.as_str()) => {
            ControlError::Refused { status: 429, text: error.to_string() }
        }
        Some(_) | None => ControlError::Offline,
    }
}

/// The same for a token that was refused with a status.
pub(super) fn token_error(status: i32, text: &str) -> ControlError {
    match status {
        429 => ControlError::Refused { status: 429, text: text.to_owned() },
        400..=499 => ControlError::Unauthorized(text.to_owned()),
        _ => ControlError::Offline,
    }
}

/// A sentence about something that the upstream ended.
pub(super) fn ended(what: &str, error: Option<&Error>) -> String {
    match error {
        Some(error) => format!("{what} was ended by the upstream: {error}"),
        None => format!("{what} was ended by the upstream"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amqp::Condition;

    #[test]
    fn only_the_closed_list_discards() {
        let rejected = |condition: &'static str| {
            Verdict::of(&Outcome::Rejected(Some(Error::from(Condition::of(condition)))))
        };
        for (condition, refused, paused) in [
            ("amqp:link:message-size-exceeded", true, false),
            ("com.microsoft:argument-error", true, false),
            ("amqp:unauthorized-access", false, false),
            ("amqp:internal-error", false, false),
            ("com.example:never-heard-of", false, false),
            ("com.microsoft:iot-hub-quota-exceeded", false, true),
            ("amqp:resource-limit-exceeded", false, true),
        ] {
            let verdict = rejected(condition);
            assert_eq!(matches!(verdict, Verdict::Refused(_)), refused, "{condition}");
            assert_eq!(matches!(verdict, Verdict::Later { throttled: true, .. }), paused, "{condition}");
        }
        assert_eq!(Verdict::of(&Outcome::Accepted), Verdict::Delivered);
        assert!(matches!(Verdict::of(&Outcome::Rejected(None)), Verdict::Refused(_)));
        assert!(matches!(Verdict::of(&Outcome::Released), Verdict::Later { throttled: false, .. }));
    }
}
