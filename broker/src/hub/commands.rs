//! Owns cloud-to-device messages between the upstream and connected devices. Nothing is kept: what a device does not
//! take stays unsettled, and the upstream sends it again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use bytes::Bytes;
use parking_lot::Mutex;
use time::OffsetDateTime;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::subscriptions::Subscriptions;
use crate::amqp::parse_timestamp;
use crate::backend::{Command, Deliveries, Outcome, Settler, Target};
use crate::identity::Identity;
use crate::message::{Message, SystemProperty, Value};

/// Messages that one device may have without having answered them.
pub const COMMANDS_IN_FLIGHT_MAX: usize = 32;

/// A device that has not answered within this time never does: the upstream's lock on the message has ended.
const ANSWER_SECS: u64 = 300;

/// The messages that devices have.
pub(super) struct Commands {
    subscriptions: Arc<Subscriptions>,
    in_flight: Arc<InFlight>,
    /// Messages whose outcome has not been handed to the upstream; each holds a clone.
    under_way: Arc<()>,
    /// No message is taken any more.
    stopping: AtomicBool,
    runtime: Handle,
}

/// Lock tokens by device.
#[derive(Default)]
struct InFlight {
    tokens: Mutex<AHashMap<Identity, AHashSet<Bytes>>>,
}

/// One message that a device has; its token is free again when it is dropped.
struct Held {
    in_flight: Arc<InFlight>,
    identity: Identity,
    token: Bytes,
}

impl Commands {
    pub(super) fn new(subscriptions: Arc<Subscriptions>, runtime: Handle) -> Self {
        let stopping = AtomicBool::new(false);
        Self { subscriptions, in_flight: Arc::default(), under_way: Arc::default(), stopping, runtime }
    }

    /// Takes no further messages: the upstream keeps them. Those that devices have are waited for as before.
    pub(super) fn refuse(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Messages whose outcome has not been handed to the upstream.
    pub(super) fn under_way(&self) -> usize {
        Arc::strong_count(&self.under_way) - 1
    }

    /// Whether a device has messages that it has not answered.
    pub(super) fn has_some(&self, device: &Identity) -> bool {
        self.in_flight.tokens.lock().contains_key(device)
    }

    /// Hands a message to its device. When that is away, or has enough, the place for the outcome is dropped.
    pub(super) fn deliver(&self, identity: Identity, mut message: Message, settle: oneshot::Sender<Outcome>) {
        if self.stopping.load(Ordering::Relaxed) {
            return;
        }
        let Some((_, mailbox)) = self.subscriptions.client(&identity, |wanted| wanted.cloud_to_device) else {
            tracing::debug!(client = %identity, "A cloud-to-device message finds no device");
            return;
        };
        let Some(token) = message.properties.system_bytes(SystemProperty::LockToken) else {
            tracing::warn!(code = "EH4013", client = %identity, "A cloud-to-device message without lock token is not delivered");
            return;
        };
        let Some(held) = self.in_flight.hold(identity, token) else { return };
        message.expires_at = expires_at(&message, OffsetDateTime::now_utc());
        let settler = Settler::new();
        let deliveries =
            Deliveries { target: Target::Device, messages: vec![(0, message)], settler: settler.clone() };
        // A full mailbox is a device that is not there at present: nobody else waits for it.
        if mailbox.try_send(Command::Deliver(deliveries)).is_err() {
            return;
        }
        let under_way = self.under_way.clone();
        self.runtime.spawn(async move {
            let _under_way = under_way;
            let answered = tokio::select! {
                outcomes = settler.settled() => outcomes.first().map(|(_, outcome)| *outcome),
                () = mailbox.closed() => settler.take().first().map(|(_, outcome)| *outcome),
                () = tokio::time::sleep(Duration::from_secs(ANSWER_SECS)) => None,
            };
            if answered.is_none() {
                // The upstream sends it again: what still waits for the device's credit must not follow as well.
                settler.abandon();
            }
            drop(held);
            let outcome = match answered {
                Some(outcome @ (Outcome::Accepted | Outcome::Rejected | Outcome::Released)) => outcome,
                Some(Outcome::NotConvertible) => Outcome::Rejected,
                // The upstream finds that it has expired, and tells whoever sent it.
                Some(Outcome::Expired) => Outcome::Released,
                // It comes again when the upstream's lock ends, not at once.
                Some(Outcome::NotOffered) | None => return,
            };
            // The upstream's link may be gone; then the message comes again.
            let _ = settle.send(outcome);
        });
    }
}

/// When the time that a message has by its own properties ends. None if that is over already: the upstream, which has just
/// sent it, has another clock.
fn expires_at(message: &Message, now: OffsetDateTime) -> Option<Instant> {
    let Value::Text(text) = message.properties.system(SystemProperty::AbsoluteExpiryTime) else {
        return None;
    };
    let left_millis = i128::from(parse_timestamp(text)?) - now.unix_timestamp_nanos() / 1_000_000;
    let left_millis = u64::try_from(left_millis).ok().filter(|left| *left > 0)?;
    Instant::now().checked_add(Duration::from_millis(left_millis))
}

impl InFlight {
    /// None when the device has this message already, or enough of them.
    fn hold(self: &Arc<Self>, identity: Identity, token: Bytes) -> Option<Held> {
        let mut tokens = self.tokens.lock();
        let of_device = tokens.entry(identity.clone()).or_default();
        if of_device.len() >= COMMANDS_IN_FLIGHT_MAX || !of_device.insert(token.clone()) {
            return None;
        }
        Some(Held { in_flight: self.clone(), identity, token })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut tokens = self.in_flight.tokens.lock();
        if let Some(of_device) = tokens.get_mut(&self.identity) {
            of_device.remove(&self.token);
            if of_device.is_empty() {
                tokens.remove(&self.identity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{CommandReceiver, Feature, Mailbox};
    use crate::message::{Origin, Properties, PropertyName, Sender};

    struct Device {
        commands: Commands,
        identity: Identity,
        mailbox: CommandReceiver,
    }

    impl Device {
        fn subscribed() -> Self {
            let subscriptions = Arc::new(Subscriptions::new(Identity::parse("edge/$edgeHub").unwrap()));
            let identity = Identity::parse("leaf").unwrap();
            let (sender, mailbox) = Mailbox::channel(COMMANDS_IN_FLIGHT_MAX);
            subscriptions.set(&identity, 1, &sender, Feature::CloudToDevice, true);
            // The subscription keeps the mailbox open.
            Self { commands: Commands::new(subscriptions, Handle::current()), identity, mailbox }
        }

        fn send(&self, token: &'static str) -> oneshot::Receiver<Outcome> {
            let sender =
                Sender { identity: self.identity.clone(), origin: Origin::Downstream, model_id: None };
            let token = (PropertyName::System(SystemProperty::LockToken), token);
            let properties = Properties::copied_from([token]);
            let message = Message::new(Arc::new(sender), properties, Bytes::new());
            let (settle, outcome) = oneshot::channel();
            self.commands.deliver(self.identity.clone(), message, settle);
            outcome
        }

        /// What reached the device's mailbox.
        fn next(&mut self) -> Option<Settler> {
            match self.mailbox.try_recv().ok()? {
                Command::Deliver(deliveries) => Some(deliveries.settler),
                other => panic!("{other:?} is no delivery"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_without_answer_is_given_up_when_its_lock_ends_and_not_sent_late() {
        let mut device = Device::subscribed();
        let begun = Instant::now();
        let outcome = device.send("t");
        let settler = device.next().unwrap();
        assert!(!settler.is_abandoned());
        device.send("t");
        assert!(device.next().is_none(), "it has this message already");
        outcome.await.expect_err("no outcome: the upstream sends it again");
        assert_eq!(begun.elapsed().as_secs(), ANSWER_SECS);
        assert!(settler.is_abandoned(), "the head may still hold it back for want of credit");
        let again = device.send("t");
        device.next().unwrap().settle([(0, Outcome::Accepted)]);
        assert_eq!(again.await, Ok(Outcome::Accepted));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_within_the_time_counts_and_gives_nothing_up() {
        let mut device = Device::subscribed();
        let outcome = device.send("t");
        let settler = device.next().unwrap();
        tokio::time::sleep(Duration::from_secs(ANSWER_SECS - 1)).await;
        settler.settle([(0, Outcome::Rejected)]);
        assert_eq!(outcome.await, Ok(Outcome::Rejected));
        assert!(!settler.is_abandoned());
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_has_the_time_that_its_upstream_gave_it() {
        let sender =
            Sender { identity: Identity::parse("leaf").unwrap(), origin: Origin::Internal, model_id: None };
        let sender = Arc::new(sender);
        let now = OffsetDateTime::from_unix_timestamp(1_893_456_000).unwrap();
        for (text, left_millis) in [
            ("2030-01-01T00:00:01.5000000Z", Some(1_500)),
            ("2030-01-01T01:00:01+01:00", Some(1_000)),
            // It was sent this moment, so it is a clock that is wrong.
            ("2030-01-01T00:00:00Z", None),
            ("2029-01-01T00:00:00Z", None),
            ("soon", None),
        ] {
            let expiry = [(PropertyName::System(SystemProperty::AbsoluteExpiryTime), text)];
            let message = Message::new(sender.clone(), Properties::copied_from(expiry), Bytes::new());
            let left = expires_at(&message, now).map(|at| at - Instant::now());
            assert_eq!(left, left_millis.map(Duration::from_millis), "{text}");
        }
        let without = Message::new(sender, Properties::empty(), Bytes::new());
        assert_eq!(expires_at(&without, now), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_whose_device_leaves_is_given_up_at_once() {
        let mut device = Device::subscribed();
        let begun = Instant::now();
        let outcome = device.send("t");
        let settler = device.next().unwrap();
        drop(device);
        outcome.await.expect_err("no outcome");
        assert!(settler.is_abandoned());
        assert_eq!(begun.elapsed().as_secs(), 0);
    }
}
