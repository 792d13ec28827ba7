//! The far end of one identity: its session, the links on it, and the transfers on their way.

use std::collections::VecDeque;
use std::sync::Arc;

use smallvec::SmallVec;
use tokio::time::Instant;
use uuid::Uuid;

use super::control::Wanted;
use crate::amqp::{DeliveryId, LinkId, LinkKind, Outcome, SessionId};
use crate::identity::{ClientToken, Identity};
use crate::message::{Origin, Sender};

/// Kinds of links; what is left out is not made by the upstream end.
pub(super) type Kinds = SmallVec<[LinkKind; 6]>;

/// The far end of an identity.
pub(super) struct Remote {
    pub(super) phase: Phase,
    /// When the phase began, or something happened on a link.
    pub(super) since: Instant,
    pub(super) session: Option<SessionId>,
    /// The token of its own that it is let in with; without one, the hub comes on its behalf.
    pub(super) own: Option<ClientToken>,
    /// What the links of the session have in common.
    pub(super) channel: Uuid,
    links: SmallVec<[Link; 2]>,
    /// Kinds that the upstream does not give, until the identity's pause is over.
    pub(super) refused: Kinds,
    /// Since when a link is missing that could not be asked for yet.
    pub(super) lacking_since: Option<Instant>,
    pub(super) notifying: Notifying,
    /// Whether the hub was told that what the identity wants is in place.
    pub(super) linked: bool,
    /// The identity as the sender of messages to itself.
    pub(super) device: Arc<Sender>,
    /// Transfers in order, and the answers of those that came early.
    pub(super) sent: VecDeque<(DeliveryId, Option<Outcome>)>,
    /// Since when messages wait for credit while nothing is under way.
    pub(super) starved_since: Option<Instant>,
}

/// One link.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    pub(super) kind: LinkKind,
    pub(super) id: LinkId,
    pub(super) attached: bool,
    /// When it was asked for, or attached.
    pub(super) since: Instant,
}

/// How far the session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was asked for yet.
    New,
    Token,
    Session,
    /// The session is there; links come and go.
    Ready,
}

/// How far notifications of desired properties are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notifying {
    No,
    Asked,
    Yes,
    /// The upstream does not give them, until the identity's pause is over.
    Refused,
}

impl Remote {
    pub(super) fn new(identity: &Identity) -> Self {
        Self {
            phase: Phase::New,
            since: Instant::now(),
            session: None,
            own: None,
            channel: Uuid::new_v4(),
            links: SmallVec::new(),
            refused: Kinds::new(),
            lacking_since: None,
            notifying: Notifying::No,
            linked: false,
            device: Arc::new(Sender { identity: identity.clone(), origin: Origin::Internal, model_id: None }),
            sent: VecDeque::new(),
            starved_since: None,
        }
    }

    /// The answer to the oldest transfer, once it is there.
    pub(super) fn next_answer(&mut self) -> Option<Outcome> {
        let answer = self.sent.front_mut()?.1.take()?;
        self.sent.pop_front();
        Some(answer)
    }

    /// All links, attached or asked for.
    pub(super) fn links(&self) -> &[Link] {
        &self.links
    }

    /// The link of a kind, attached or asked for.
    pub(super) fn link(&self, kind: LinkKind) -> Option<&Link> {
        self.links.iter().find(|link| link.kind == kind)
    }

    /// The link of a kind, if it is attached.
    pub(super) fn attached(&self, kind: LinkKind) -> Option<LinkId> {
        self.link(kind).filter(|link| link.attached).map(|link| link.id)
    }

    /// A link was asked for.
    pub(super) fn add(&mut self, kind: LinkKind, id: LinkId) {
        self.links.push(Link { kind, id, attached: false, since: Instant::now() });
    }

    /// A link is attached; its kind.
    pub(super) fn set_attached(&mut self, id: LinkId) -> Option<LinkKind> {
        let link = self.links.iter_mut().find(|link| link.id == id)?;
        (link.attached, link.since) = (true, Instant::now());
        Some(link.kind)
    }

    /// The link of a kind is gone.
    pub(super) fn remove(&mut self, kind: LinkKind) -> Option<LinkId> {
        let at = self.links.iter().position(|link| link.kind == kind)?;
        match kind {
            LinkKind::Telemetry => {
                self.sent.clear();
                self.starved_since = None;
            }
            LinkKind::TwinAnswers | LinkKind::TwinRequests => {
                self.notifying = Notifying::No;
                self.linked = false;
            }
            LinkKind::CloudToDevice | LinkKind::MethodCalls | LinkKind::MethodResponses => {
                self.linked = false
            }
            LinkKind::Inputs | LinkKind::Cbs => {}
        }
        Some(self.links.swap_remove(at).id)
    }

    /// Links that nobody wants any more.
    pub(super) fn excess(&self, wanted: Wanted, asks: bool) -> Kinds {
        let notified = self.notifying != Notifying::No;
        let over = |kind| match kind {
            LinkKind::CloudToDevice => !wanted.cloud_to_device,
            LinkKind::MethodCalls | LinkKind::MethodResponses => !wanted.methods,
            LinkKind::TwinAnswers | LinkKind::TwinRequests => !wanted.desired && notified && !asks,
            LinkKind::Telemetry | LinkKind::Inputs | LinkKind::Cbs => false,
        };
        self.links.iter().map(|link| link.kind).filter(|kind| over(*kind)).collect()
    }
}

/// The links that an identity needs for what it wants, and for requests that wait.
pub(super) fn needed(identity: &Identity, wanted: Wanted, asks: bool) -> Kinds {
    let mut kinds = Kinds::new();
    // Modules have no messages from the cloud.
    if wanted.cloud_to_device && identity.module_id().is_none() {
        kinds.push(LinkKind::CloudToDevice);
    }
    if wanted.methods {
        kinds.extend([LinkKind::MethodCalls, LinkKind::MethodResponses]);
    }
    if wanted.desired || asks {
        kinds.extend([LinkKind::TwinAnswers, LinkKind::TwinRequests]);
    }
    kinds
}
