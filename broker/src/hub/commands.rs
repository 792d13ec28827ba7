//! Owns cloud-to-device messages between the upstream and connected devices. Nothing is kept: what a device does not
//! take stays unsettled, and the upstream sends it again.

use std::sync::Arc;
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::subscriptions::Subscriptions;
use crate::backend::{Command, Deliveries, Outcome, Settler, Target};
use crate::identity::Identity;
use crate::message::{Message, SystemProperty};

/// Messages that one device may have without having answered them.
pub const COMMANDS_IN_FLIGHT_MAX: usize = 32;

/// A device that has not answered within this time never does: the upstream's lock on the message has ended.
const ANSWER_SECS: u64 = 300;

/// The messages that devices have.
pub(super) struct Commands {
    subscriptions: Arc<Subscriptions>,
    in_flight: Arc<InFlight>,
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
        Self { subscriptions, in_flight: Arc::default(), runtime }
    }

    /// Hands a message to its device. When that is away, or has enough, the place for the outcome is dropped.
    pub(super) fn deliver(&self, identity: Identity, message: Message, settle: oneshot::Sender<Outcome>) {
        let Some((_, mailbox)) = self.subscriptions.client(&identity, |wanted| wanted.cloud_to_device) else {
            tracing::debug!(client = %identity, "A cloud-to-device message finds no device");
            return;
        };
        let Some(token) = message.properties.system_bytes(SystemProperty::LockToken) else {
            tracing::warn!(client = %identity, "A cloud-to-device message without lock token is not delivered");
            return;
        };
        let Some(held) = self.in_flight.hold(identity, token) else { return };
        let settler = Settler::new();
        let deliveries =
            Deliveries { target: Target::Device, messages: vec![(0, message)], settler: settler.clone() };
        // A full mailbox is a device that is not there at present: nobody else waits for it.
        if mailbox.try_send(Command::Deliver(deliveries)).is_err() {
            return;
        }
        self.runtime.spawn(async move {
            let answered = tokio::select! {
                outcomes = settler.settled() => outcomes.first().map(|(_, outcome)| *outcome),
                () = mailbox.closed() => settler.take().first().map(|(_, outcome)| *outcome),
                () = tokio::time::sleep(Duration::from_secs(ANSWER_SECS)) => None,
            };
            drop(held);
            let outcome = match answered {
                Some(outcome @ (Outcome::Accepted | Outcome::Rejected | Outcome::Released)) => outcome,
                Some(Outcome::NotConvertible) => Outcome::Rejected,
                // It comes again when the upstream's lock ends, not at once.
                Some(Outcome::NotOffered) | None => return,
            };
            // The upstream's link may be gone; then the message comes again.
            let _ = settle.send(outcome);
        });
    }
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
