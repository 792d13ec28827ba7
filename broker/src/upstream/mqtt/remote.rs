//! The far end of one identity: its connection, what it is subscribed to, and the messages on their way.

use std::collections::VecDeque;
use std::sync::Arc;

use ahash::AHashSet;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::connection::Connection;
use super::packet::PacketId;
use super::topic;
use crate::dial::UpstreamStream;
use crate::identity::{ClientToken, Identity};
use crate::message::{Origin, Sender};
use crate::upstream::control::Wanted;

/// Features; what is left out is not subscribed to.
pub(super) type Features = SmallVec<[Feature; 4]>;

/// What an identity can subscribe to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Feature {
    /// Answers to twin requests.
    TwinAnswers,
    /// Notifications of changed desired properties.
    Desired,
    /// Direct methods.
    Methods,
    /// Messages from the cloud.
    CloudToDevice,
}

/// The far end of an identity.
pub(super) struct Remote {
    pub(super) phase: Phase,
    /// When the phase began, or something happened on the connection.
    pub(super) since: Instant,
    /// Tells this connection from earlier ones of the identity.
    pub(super) epoch: u64,
    pub(super) connection: Option<Connection<UpstreamStream>>,
    /// The token of its own that it is let in with; without one, the hub comes on its behalf.
    pub(super) own: Option<ClientToken>,
    /// Publishes in order, and whether they are acknowledged.
    pub(super) sent: VecDeque<(PacketId, bool)>,
    subscriptions: SmallVec<[Subscription; 4]>,
    /// What the upstream does not give, until the identity's pause is over.
    pub(super) refused: Features,
    /// Whether the hub was told that what the identity wants is in place.
    pub(super) linked: bool,
    /// The model that the connection was made with.
    pub(super) model_id: Option<Arc<str>>,
    /// When the connection is made anew with a fresh token, as soon as nothing is under way, and at the latest.
    pub(super) renewal: Option<(Instant, Instant)>,
    /// Method calls without an answer.
    pub(super) calls: AHashSet<String>,
    /// The identity as the sender of messages to itself.
    pub(super) device: Arc<Sender>,
}

/// How far the connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was asked for yet.
    New,
    /// It waits for its turn to connect.
    Waiting,
    /// Token, name look-up, TCP, TLS.
    Dialling,
    /// CONNECT is sent.
    Connecting,
    /// CONNECT is accepted.
    Open,
}

/// One subscription.
struct Subscription {
    feature: Feature,
    packet_id: PacketId,
    granted: bool,
    asked_at: Instant,
}

impl Feature {
    /// The filter of an identity for it.
    pub(super) fn filter(self, identity: &Identity) -> String {
        match self {
            Feature::TwinAnswers => topic::TWIN_ANSWERS.to_owned(),
            Feature::Desired => topic::DESIRED.to_owned(),
            Feature::Methods => topic::METHODS.to_owned(),
            Feature::CloudToDevice => topic::device_bound(identity.device_id()),
        }
    }
}

impl Remote {
    pub(super) fn new(identity: &Identity) -> Self {
        Self {
            phase: Phase::New,
            since: Instant::now(),
            epoch: 0,
            connection: None,
            own: None,
            sent: VecDeque::new(),
            subscriptions: SmallVec::new(),
            refused: Features::new(),
            linked: false,
            model_id: None,
            renewal: None,
            calls: AHashSet::new(),
            device: Arc::new(Sender { identity: identity.clone(), origin: Origin::Internal, model_id: None }),
        }
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        (self.phase, self.since) = (phase, Instant::now());
    }

    /// Whether the upstream has accepted the connection.
    pub(super) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether the connection is to be made anew with a fresh token: nothing new is begun on it.
    pub(super) fn is_renewing(&self, now: Instant) -> bool {
        self.renewal.is_some_and(|(at, _)| now >= at)
    }

    /// Whether the upstream has given a feature.
    pub(super) fn has(&self, feature: Feature) -> bool {
        self.subscriptions.iter().any(|subscription| subscription.feature == feature && subscription.granted)
    }

    /// Whether a packet identifier is in use.
    pub(super) fn uses(&self, id: PacketId) -> bool {
        self.sent.iter().any(|(sent, _)| *sent == id)
            || self.subscriptions.iter().any(|subscription| subscription.packet_id == id)
    }

    /// A feature was asked for.
    pub(super) fn asked_for(&mut self, feature: Feature, packet_id: PacketId) {
        let subscription = Subscription { feature, packet_id, granted: false, asked_at: Instant::now() };
        self.subscriptions.push(subscription);
    }

    /// Whether a feature is there, or asked for.
    pub(super) fn knows(&self, feature: Feature) -> bool {
        self.subscriptions.iter().any(|subscription| subscription.feature == feature)
    }

    /// The upstream answered; the feature that was asked for, if any was.
    pub(super) fn answered(&mut self, packet_id: PacketId, granted: bool) -> Option<Feature> {
        let asked =
            |subscription: &Subscription| !subscription.granted && subscription.packet_id == packet_id;
        let at = self.subscriptions.iter().position(asked)?;
        self.subscriptions[at].granted = granted;
        let feature = self.subscriptions[at].feature;
        if !granted {
            self.subscriptions.swap_remove(at);
        }
        Some(feature)
    }

    /// Features that nobody wants any more; they are forgotten.
    pub(super) fn take_excess(&mut self, wanted: Wanted) -> Features {
        let over = |subscription: &Subscription| match subscription.feature {
            Feature::TwinAnswers => false,
            Feature::Desired => !wanted.desired,
            Feature::Methods => !wanted.methods,
            Feature::CloudToDevice => !wanted.cloud_to_device,
        };
        let excess = self.subscriptions.iter().filter(|subscription| over(subscription));
        let excess = excess.map(|subscription| subscription.feature).collect();
        self.subscriptions.retain(|subscription| !over(subscription));
        excess
    }

    /// Since when a subscription waits for its answer.
    pub(super) fn unsubscribed_since(&self) -> Option<Instant> {
        let asked = self.subscriptions.iter().filter(|subscription| !subscription.granted);
        asked.map(|subscription| subscription.asked_at).min()
    }
}

/// What an identity needs for what it wants, and for requests that wait.
pub(super) fn needed(identity: &Identity, wanted: Wanted, asks: bool) -> Features {
    let mut features = Features::new();
    if wanted.desired || asks {
        features.push(Feature::TwinAnswers);
    }
    if wanted.desired {
        features.push(Feature::Desired);
    }
    if wanted.methods {
        features.push(Feature::Methods);
    }
    // Modules have no messages from the cloud.
    if wanted.cloud_to_device && identity.module_id().is_none() {
        features.push(Feature::CloudToDevice);
    }
    features
}
