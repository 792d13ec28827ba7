//! Logins under way on one connection, and the links that wait for them.

use std::sync::Arc;
use std::task::{Context, Poll};

use ahash::AHashMap;
use tokio::sync::mpsc;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::timeout;

use super::limits::AmqpLimits;
use crate::amqp::{AttachRequest, LinkId, LinkKind, SessionId};
use crate::backend::{Backend, Command, Login, LoginError, MAILBOX_COMMANDS_MAX};
use crate::identity::Identity;

/// A link that waits, and what it is for.
pub(super) type WaitingLink = (LinkKind, AttachRequest);

/// Logins by identity.
pub(super) struct Logins<B: Backend> {
    tasks: JoinSet<Result<LoggedIn<B>, LoginError>>,
    of_task: AHashMap<Id, Identity>,
    waiting: AHashMap<Identity, Vec<WaitingLink>>,
}

/// A login that succeeded.
pub(super) struct LoggedIn<B: Backend> {
    pub(super) client: B::Client,
    pub(super) mailbox: mpsc::Receiver<Command>,
}

/// A login that has ended, and the links that waited for it.
pub(super) struct Ended<B: Backend> {
    pub(super) identity: Identity,
    pub(super) links: Vec<WaitingLink>,
    pub(super) result: Result<LoggedIn<B>, LoginError>,
}

impl<B: Backend> Logins<B> {
    pub(super) fn new() -> Self {
        Self { tasks: JoinSet::new(), of_task: AHashMap::new(), waiting: AHashMap::new() }
    }

    /// Identities whose login is under way.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Logins and checks under way.
    pub(super) fn running(&self) -> usize {
        self.tasks.len()
    }

    /// Puts a link in line behind the login of its identity, if one is under way. Gives it back when there is none, or
    /// too many wait: then the second is true.
    pub(super) fn join(
        &mut self,
        identity: &Identity,
        link: WaitingLink,
        links_max: usize,
    ) -> Result<(), (WaitingLink, bool)> {
        match self.waiting.get_mut(identity) {
            None => Err((link, false)),
            Some(links) if links.len() >= links_max => Err((link, true)),
            Some(links) => {
                links.push(link);
                Ok(())
            }
        }
    }

    /// Starts a login, on which a link may wait already.
    pub(super) fn start(&mut self, backend: B, limits: &AmqpLimits, login: Login, link: Option<WaitingLink>) {
        let (identity, limit) = (login.identity.clone(), limits.login_max);
        let task = self.tasks.spawn(async move {
            let (sender, mailbox) = mpsc::channel(MAILBOX_COMMANDS_MAX);
            match timeout(limit, backend.login(login, sender)).await {
                Ok(result) => result.map(|client| LoggedIn { client, mailbox }),
                Err(_) => Err(LoginError::Unavailable("the login took too long".into())),
            }
        });
        self.of_task.insert(task.id(), identity.clone());
        self.waiting.insert(identity, link.into_iter().collect());
    }

    /// The next login that has ended.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended<B>> {
        while let Poll::Ready(Some(joined)) = self.tasks.poll_join_next_with_id(cx) {
            if let Some(ended) = self.ended(joined) {
                return Poll::Ready(ended);
            }
        }
        Poll::Pending
    }

    fn ended(
        &mut self,
        joined: Result<(Id, Result<LoggedIn<B>, LoginError>), JoinError>,
    ) -> Option<Ended<B>> {
        let (task, result) = match joined {
            Ok((task, result)) => (task, result),
            // A login that panicked must not leave its links waiting.
            Err(error) => (error.id(), Err(LoginError::Unavailable("the login failed".into()))),
        };
        let identity = self.of_task.remove(&task)?;
        let links = self.waiting.remove(&identity).unwrap_or_default();
        Some(Ended { identity, links, result })
    }

    /// A session is gone, and with it its links that were not answered.
    pub(super) fn session_gone(&mut self, session: SessionId) {
        for links in self.waiting.values_mut() {
            links.retain(|(_, request)| request.link.session() != session);
        }
    }

    /// A link is gone before it was answered.
    pub(super) fn link_gone(&mut self, link: LinkId) {
        for links in self.waiting.values_mut() {
            links.retain(|(_, request)| request.link != link);
        }
    }
}

/// The text of a link property; keys and values come as symbol or string.
pub(super) fn property(request: &AttachRequest, name: &str) -> Option<Arc<str>> {
    let found = request.attach.properties.iter().find(|(key, _)| key.as_str() == name);
    found.and_then(|(_, value)| value.as_text()).map(|text| text.as_str().into())
}
