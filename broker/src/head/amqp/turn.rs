//! What the identities of a connection share while they work: the engine, the table of links, and what is reported at the
//! end of a turn.

use std::collections::VecDeque;

use ahash::{AHashMap, AHashSet};

use super::limits::AmqpLimits;
use crate::amqp::{Connection, Error, LinkId, LinkKind, SendError, SessionId};
use crate::backend::{Outcome, Settler};
use crate::identity::Identity;

/// What a link of this connection is for.
#[derive(Debug, Clone)]
pub(super) enum Purpose {
    /// Put-token requests.
    Tokens,
    /// A function of an identity.
    Of(Identity, LinkKind),
}

/// The accepted links of a connection.
#[derive(Debug, Default)]
pub(super) struct Links {
    purposes: AHashMap<LinkId, Purpose>,
    sessions: AHashMap<SessionId, Vec<LinkId>>,
}

impl Links {
    pub(super) fn insert(&mut self, link: LinkId, purpose: Purpose) {
        self.purposes.insert(link, purpose);
        self.sessions.entry(link.session()).or_default().push(link);
    }

    pub(super) fn get(&self, link: LinkId) -> Option<&Purpose> {
        self.purposes.get(&link)
    }

    pub(super) fn remove(&mut self, link: LinkId) -> Option<Purpose> {
        let purpose = self.purposes.remove(&link)?;
        if let Some(links) = self.sessions.get_mut(&link.session()) {
            if let Some(at) = links.iter().rposition(|other| *other == link) {
                links.swap_remove(at);
            }
            if links.is_empty() {
                self.sessions.remove(&link.session());
            }
        }
        Some(purpose)
    }

    /// The links of a session.
    pub(super) fn of_session(&self, session: SessionId) -> Vec<LinkId> {
        self.sessions.get(&session).cloned().unwrap_or_default()
    }
}

/// The connection, lent to one of its identities.
pub(super) struct Turn<'a, B> {
    pub(super) engine: &'a mut Connection,
    pub(super) backend: &'a B,
    pub(super) limits: &'a AmqpLimits,
    pub(super) links: &'a mut Links,
    pub(super) held: &'a mut HeldLinks,
    pub(super) outcomes: &'a mut Outcomes,
}

impl<B> Turn<'_, B> {
    /// Ends a link from this side.
    pub(super) fn detach(&mut self, link: LinkId, error: Option<Error>) {
        self.links.remove(link);
        self.engine.detach(link, error);
    }
}

/// Links that could not send for want of room in the session or in the output, in the order in which they go on.
#[derive(Debug, Default)]
pub(super) struct HeldLinks {
    order: VecDeque<LinkId>,
    listed: AHashSet<LinkId>,
}

impl HeldLinks {
    /// Lists a link whose sending failed, unless its own credit is what it waits for: its change is an event.
    pub(super) fn add(&mut self, link: LinkId, error: SendError) {
        let held = match error {
            SendError::NoWindow | SendError::Backlog => true,
            SendError::NoCredit
            | SendError::TooManyUnsettled
            | SendError::NotAttached
            | SendError::TooLarge { .. } => false,
        };
        if held && self.listed.insert(link) {
            self.order.push_back(link);
        }
    }

    /// Those that may try again: of one session, or all.
    pub(super) fn take(&mut self, session: Option<SessionId>) -> Vec<LinkId> {
        let mut taken = Vec::new();
        self.order.retain(|link| {
            let again = session.is_none_or(|session| link.session() == session);
            if again {
                taken.push(*link);
            }
            !again
        });
        for link in &taken {
            self.listed.remove(link);
        }
        taken
    }
}

/// Outcomes of deliveries, passed on once per turn.
#[derive(Debug, Default)]
pub(super) struct Outcomes(Vec<(Settler, u64, Outcome)>);

impl Outcomes {
    pub(super) fn push(&mut self, settler: Settler, tag: u64, outcome: Outcome) {
        self.0.push((settler, tag, outcome));
    }

    /// Tells the settlers, each once for what stands together.
    pub(super) fn report(&mut self) {
        for run in self.0.chunk_by(|(a, ..), (b, ..)| a.same_as(b)) {
            if let [(settler, ..), ..] = run {
                settler.settle(run.iter().map(|(_, tag, outcome)| (*tag, *outcome)));
            }
        }
        self.0.clear();
    }
}
