//! Owns the faults that a message asks for, by the application properties with which the tests of public SDKs ask a cloud
//! hub for them: `AzIoTHub_FaultOperationType`, `AzIoTHub_FaultOperationDelayInSecs`, `AzIoTHub_FaultOperationDurationInSecs`.
//!
//! | type | what happens after the delay |
//! | --- | --- |
//! | `InvokeThrottling` | for the duration all messages of all senders are refused, and a pause is asked for |
//! | `KillAmqpD2CLink` | the links of the sender are detached with `amqp:link:detach-forced`; no duration |
//!
//! The message itself is telemetry like any other. Other types have no effect.

use std::time::Duration;

use edgehub_broker::message::Message;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Longest delay and longest duration, in seconds; more counts as this.
pub const FAULT_SECS_MAX: u64 = 3_600;

/// Identities whose links are to be detached; more are left alone.
pub(super) const DETACHING_MAX: usize = 64;

/// What a message asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Throttle { delay: Duration, duration: Duration },
    Detach { delay: Duration },
}

impl Fault {
    pub(super) fn of(message: &Message) -> Option<Self> {
        let properties = &message.properties;
        let text = |name: &str| {
            properties.application_properties().find(|(found, _)| *found == name).map(|(_, value)| value)
        };
        let kind = text("AzIoTHub_FaultOperationType")?;
        let secs = |name| {
            let secs = text(name).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
            Duration::from_secs(secs.min(FAULT_SECS_MAX))
        };
        let delay = secs("AzIoTHub_FaultOperationDelayInSecs");
        match kind {
            "InvokeThrottling" => {
                Some(Self::Throttle { delay, duration: secs("AzIoTHub_FaultOperationDurationInSecs") })
            }
            "KillAmqpD2CLink" => Some(Self::Detach { delay }),
            _ => None,
        }
    }
}

/// Whether messages are refused at present.
#[derive(Debug, Default)]
pub(super) struct Throttling(Mutex<Option<(Instant, Instant)>>);

impl Throttling {
    /// From `delay` on, for `duration`; replaces what was asked for before.
    pub(super) fn start(&self, now: Instant, delay: Duration, duration: Duration) {
        let from = now + delay;
        *self.0.lock() = Some((from, from + duration));
    }

    pub(super) fn is_on(&self, now: Instant) -> bool {
        self.0.lock().is_some_and(|(from, until)| (from..until).contains(&now))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use edgehub_broker::identity::Identity;
    use edgehub_broker::message::{Origin, Properties, PropertyName, Sender};

    use super::*;

    fn asks(properties: &[(&str, &str)]) -> Option<Fault> {
        let identity = Identity::device("leaf1").unwrap();
        let sender = Arc::new(Sender { identity, origin: Origin::Downstream, model_id: None });
        let properties = properties.iter().map(|(name, value)| (PropertyName::Application(name), *value));
        let properties: Vec<_> = properties.collect();
        Fault::of(&Message::new(sender, Properties::copied_from(properties), "x".into()))
    }

    #[test]
    fn what_messages_ask_for() {
        const KIND: &str = "AzIoTHub_FaultOperationType";
        let (delay, duration) =
            ("AzIoTHub_FaultOperationDelayInSecs", "AzIoTHub_FaultOperationDurationInSecs");
        let secs = Duration::from_secs;
        let throttle = |delay, duration| Fault::Throttle { delay: secs(delay), duration: secs(duration) };
        for (properties, expected) in [
            (&[][..], None),
            (&[("level", "hot")], None),
            (&[(KIND, "KillTcp")], None),
            (&[(KIND, "InvokeThrottling"), (duration, "20")], Some(throttle(0, 20))),
            (&[(KIND, "InvokeThrottling"), (delay, "1"), (duration, "9999999")], Some(throttle(1, 3_600))),
            (&[(KIND, "InvokeThrottling"), (duration, "-5")], Some(throttle(0, 0))),
            (&[(KIND, "KillAmqpD2CLink"), (delay, "2")], Some(Fault::Detach { delay: secs(2) })),
        ] {
            assert_eq!(asks(properties), expected, "{properties:?}");
        }
    }

    #[test]
    fn throttling_begins_and_ends() {
        let (throttling, now) = (Throttling::default(), Instant::now());
        assert!(!throttling.is_on(now));
        throttling.start(now, Duration::from_secs(1), Duration::from_secs(2));
        let at = |secs| throttling.is_on(now + Duration::from_secs(secs));
        assert_eq!([at(0), at(1), at(2), at(3)], [false, true, true, false]);
    }
}
