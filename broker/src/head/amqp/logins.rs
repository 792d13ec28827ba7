//! Logins under way on one connection with the links that wait for them, and checks of newer tokens.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};

use ahash::AHashMap;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::timeout;

use super::limits::AmqpLimits;
use crate::amqp::{AttachRequest, LinkId, LinkKind, SessionId};
use crate::backend::{Backend, CommandReceiver, Login, LoginError, MAILBOX_COMMANDS_MAX, Mailbox};
use crate::identity::Identity;

/// A link that waits, and what it is for.
pub(super) type WaitingLink = (LinkKind, AttachRequest);

/// Logins by identity, and checks of newer tokens.
pub(super) struct Logins<B: Backend> {
    tasks: JoinSet<Done<B>>,
    of_task: AHashMap<Id, Running>,
    waiting: AHashMap<Identity, Vec<WaitingLink>>,
    /// Logins for which there was no room yet, oldest first.
    due: VecDeque<Login>,
}

/// A login that succeeded.
pub(super) struct LoggedIn<B: Backend> {
    pub(super) client: B::Client,
    pub(super) mailbox: CommandReceiver,
}

/// What has ended.
pub(super) enum Ended<B: Backend> {
    /// A login, and the links that waited for it.
    Login { login: Login, links: Vec<WaitingLink>, result: Result<LoggedIn<B>, LoginError> },
    /// The check of a newer token of an identity that is logged in.
    Renewal { login: Login, number: u64, result: Result<(), LoginError> },
}

enum Done<B: Backend> {
    Login(Result<LoggedIn<B>, LoginError>),
    Renewal(Result<(), LoginError>),
}

struct Running {
    login: Login,
    /// Of a renewal: which login of the identity it is for.
    renews: Option<u64>,
}

impl<B: Backend> Logins<B> {
    pub(super) fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            of_task: AHashMap::new(),
            waiting: AHashMap::new(),
            due: VecDeque::new(),
        }
    }

    /// Identities whose login is under way, or due.
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

    /// Starts a login, on which a link may wait already, as soon as there is room for it.
    pub(super) fn start(
        &mut self,
        backend: &B,
        limits: &AmqpLimits,
        login: Login,
        link: Option<WaitingLink>,
    ) {
        self.waiting.insert(login.identity.clone(), link.into_iter().collect());
        self.due.push_back(login);
        self.start_due(backend, limits);
    }

    /// Starts logins that are due, as far as there is room. The time of each begins here.
    pub(super) fn start_due(&mut self, backend: &B, limits: &AmqpLimits) {
        while self.tasks.len() < limits.logins_max
            && let Some(login) = self.due.pop_front()
        {
            let (backend, asked, limit) = (backend.clone(), login.clone(), limits.login_max);
            let task = self.tasks.spawn(async move {
                let (sender, mailbox) = Mailbox::channel(MAILBOX_COMMANDS_MAX);
                Done::Login(match timeout(limit, backend.login(asked, sender)).await {
                    Ok(result) => result.map(|client| LoggedIn { client, mailbox }),
                    Err(_) => Err(too_slow()),
                })
            });
            self.of_task.insert(task.id(), Running { login, renews: None });
        }
    }

    /// Starts the check of a newer token for the login of this number.
    pub(super) fn renew(
        &mut self,
        backend: &B,
        client: &B::Client,
        limits: &AmqpLimits,
        login: Login,
        number: u64,
    ) {
        let (check, limit) = (backend.reauthenticate(client, login.clone()), limits.login_max);
        let task = self.tasks.spawn(async move {
            Done::Renewal(timeout(limit, check).await.unwrap_or_else(|_| Err(too_slow())))
        });
        self.of_task.insert(task.id(), Running { login, renews: Some(number) });
    }

    /// What has ended next.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended<B>> {
        while let Poll::Ready(Some(joined)) = self.tasks.poll_join_next_with_id(cx) {
            if let Some(ended) = self.ended(joined) {
                return Poll::Ready(ended);
            }
        }
        Poll::Pending
    }

    fn ended(&mut self, joined: Result<(Id, Done<B>), JoinError>) -> Option<Ended<B>> {
        let (task, done) = match joined {
            Ok((task, done)) => (task, Some(done)),
            Err(error) => (error.id(), None),
        };
        let Running { login, renews } = self.of_task.remove(&task)?;
        // A login that panicked must not leave its links waiting.
        let failed = || LoginError::Unavailable("the login failed".into());
        Some(match (renews, done) {
            (Some(number), Some(Done::Renewal(result))) => Ended::Renewal { login, number, result },
            (Some(number), _) => Ended::Renewal { login, number, result: Err(failed()) },
            (None, done) => {
                let links = self.waiting.remove(&login.identity).unwrap_or_default();
                let result = match done {
                    Some(Done::Login(result)) => result,
                    Some(Done::Renewal(_)) | None => Err(failed()),
                };
                Ended::Login { login, links, result }
            }
        })
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

fn too_slow() -> LoginError {
    LoginError::Unavailable("the login took too long".into())
}

/// The text of a link property; keys and values come as symbol or string.
pub(super) fn property(request: &AttachRequest, name: &str) -> Option<Arc<str>> {
    let found = request.attach.properties.iter().find(|(key, _)| key.as_str() == name);
    found.and_then(|(_, value)| value.as_text()).map(|text| text.as_str().into())
}
