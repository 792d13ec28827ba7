//! One AMQP connection: tokens, logins, links, and the messages on them.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use ahash::AHashMap;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::timeout;

use super::convert;
use super::mailboxes::Mailboxes;
use super::tokens::Tokens;
use crate::amqp::{
    AttachAnswer, AttachRequest, Condition, Connection, Delivery, DeliveryId, Driver, Error, Event,
    LinkAddress, LinkId, LinkKind, Options, Outcome, Role, SaslCode, parse_batch,
};
use crate::backend::{
    Backend, CloseReason, Command, Credentials, Login, LoginError, MAILBOX_COMMANDS_MAX, Protocol,
    PublishError,
};
use crate::head::mqtt::Peer;
use crate::identity::Identity;
use crate::message::Message;

/// Credit of links on which clients send.
const CREDIT: u32 = 1_000;

/// Largest transfer that is announced, in bytes.
const TRANSFER_BYTES_MAX: u64 = 1_048_576;

/// Links of one identity that may wait for its login.
const LINKS_WAITING_MAX: usize = 8;

/// Limits of one connection.
#[derive(Debug, Clone)]
pub struct AmqpLimits {
    /// From accepting the socket to the client's open.
    pub open_max: Duration,
    /// A login that takes longer is refused for now.
    pub login_max: Duration,
    /// Identities that share the connection.
    pub identities_max: usize,
    /// Logins under way at a time.
    pub logins_max: usize,
    /// Tokens that are kept.
    pub tokens_max: usize,
    /// Bytes of the tokens that are kept: whoever puts them is not known yet.
    pub token_bytes_max: usize,
}

impl Default for AmqpLimits {
    fn default() -> Self {
        Self {
            open_max: Duration::from_secs(60),
            login_max: Duration::from_secs(60),
            identities_max: 2_000,
            logins_max: 256,
            tokens_max: 4_096,
            token_bytes_max: 2 << 20,
        }
    }
}

/// Serves one connection to its end. `shutdown` resolves when the process stops.
pub async fn serve<S, B>(
    stream: S,
    backend: B,
    limits: AmqpLimits,
    peer: Peer,
    shutdown: impl Future<Output = ()> + Send,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    B: Backend,
{
    let options = Options { handshake_timeout: limits.open_max, ..Options::default() };
    let engine = Connection::listener(options, peer.accepted_at.into_std());
    let address = peer.address;
    let mut head = Head {
        driver: Driver::new(stream, engine),
        backend,
        tokens: Tokens::new(&limits),
        limits,
        peer,
        logins: JoinSet::new(),
        login_tasks: AHashMap::new(),
        waiting: AHashMap::new(),
        identities: AHashMap::new(),
        mailboxes: Mailboxes::default(),
        links: AHashMap::new(),
        commits: VecDeque::new(),
    };
    let reason = head.run(pin!(shutdown)).await;
    tracing::debug!(?address, reason, "AMQP connection ended");
    // Whatever the peer has not read by then is lost to it; it will ask again on its next connection.
    let _ = head.driver.shutdown().await;
}

/// The state of one connection.
struct Head<S, B: Backend> {
    driver: Driver<S>,
    backend: B,
    limits: AmqpLimits,
    peer: Peer,
    tokens: Tokens,
    logins: JoinSet<Result<LoggedIn<B>, LoginError>>,
    /// Whose login a task is.
    login_tasks: AHashMap<Id, Identity>,
    /// Links that wait for the login of their identity.
    waiting: AHashMap<Identity, Vec<AttachRequest>>,
    identities: AHashMap<Identity, Connected<B>>,
    mailboxes: Mailboxes,
    links: AHashMap<LinkId, Purpose>,
    /// In the order in which the store was asked, which is the order in which it answers.
    commits: VecDeque<Pending<B>>,
}

/// What a link on which the client sends is for.
enum Purpose {
    Tokens,
    Telemetry(Identity),
}

/// A login that succeeded.
struct LoggedIn<B: Backend> {
    client: B::Client,
    mailbox: mpsc::Receiver<Command>,
}

/// An identity that is logged in on this connection.
struct Connected<B: Backend> {
    client: B::Client,
    /// Its telemetry link. A second one replaces the first.
    telemetry: Option<LinkId>,
}

/// Deliveries whose messages wait for the store.
struct Pending<B: Backend> {
    commit: B::Commit,
    deliveries: Vec<DeliveryId>,
}

/// What one turn brought for one identity.
#[derive(Default)]
struct Gathered {
    messages: Vec<Message>,
    deliveries: Vec<DeliveryId>,
}

/// What a turn waits for, besides the socket.
enum News<B: Backend> {
    Login(Result<(Id, Result<LoggedIn<B>, LoginError>), JoinError>),
    Commit(Pending<B>, Result<(), PublishError>),
    Command(Identity, Option<Command>),
    Socket,
}

impl<S, B> Head<S, B>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    B: Backend,
{
    async fn run(&mut self, mut shutdown: Pin<&mut (impl Future<Output = ()> + Send)>) -> String {
        loop {
            // Nothing is read while the store has no room, so what is in memory stays bounded.
            let turn = async {
                match self.handle_events().await {
                    Some(reason) => Err(reason),
                    None => Ok(self.news().await),
                }
            };
            let news = tokio::select! {
                news = turn => news,
                () = shutdown.as_mut() => {
                    let error = Error::new(Condition::DETACH_FORCED, "Server busy, please retry operation");
                    self.driver.connection().close(Some(error), std::time::Instant::now());
                    return "the hub is stopping".into();
                }
            };
            match news {
                Err(reason) => return reason,
                Ok(News::Socket) => {}
                Ok(News::Login(joined)) => self.login_ended(joined),
                Ok(News::Commit(pending, result)) => self.committed(&pending, result),
                Ok(News::Command(identity, command)) => self.command(&identity, command),
            }
        }
    }

    /// Waits for the next thing to happen. Cancel safe: whatever is taken is returned.
    async fn news(&mut self) -> News<B> {
        poll_fn(|cx| {
            if let Poll::Ready(Some(joined)) = self.logins.poll_join_next_with_id(cx) {
                return Poll::Ready(News::Login(joined));
            }
            if let Some(first) = self.commits.front_mut()
                && let Poll::Ready(result) = Pin::new(&mut first.commit).poll(cx)
                && let Some(first) = self.commits.pop_front()
            {
                return Poll::Ready(News::Commit(first, result));
            }
            if let Poll::Ready((identity, command)) = self.mailboxes.poll_command(cx) {
                return Poll::Ready(News::Command(identity, command));
            }
            self.driver.poll_turn(cx).map(|()| News::Socket)
        })
        .await
    }

    /// Works through what arrived; a text when the connection is over.
    async fn handle_events(&mut self) -> Option<String> {
        let mut gathered: AHashMap<Identity, Gathered> = AHashMap::new();
        let mut ended = None;
        while let Some(event) = self.driver.connection().poll_event() {
            match event {
                Event::SaslPlain { .. } => self.driver.connection().sasl_outcome(SaslCode::Auth),
                Event::AttachRequested(request) => self.attach_requested(request),
                Event::Delivery(delivery) => self.delivery(delivery, &mut gathered),
                Event::Detached { link, .. } => {
                    // What was sent before the end of a link counts.
                    self.publish_all(&mut gathered).await;
                    self.link_gone(link);
                }
                Event::SessionEnded { session, .. } => {
                    self.publish_all(&mut gathered).await;
                    self.tokens.session_gone(session);
                    let gone: Vec<LinkId> =
                        self.links.keys().copied().filter(|link| link.session() == session).collect();
                    gone.into_iter().for_each(|link| self.link_gone(link));
                }
                Event::CreditChanged { .. } | Event::WindowOpened { .. } | Event::OutputDrained => {
                    self.tokens.send_answers(self.driver.connection());
                }
                Event::Closed { error, .. } => {
                    let why =
                        error.map_or_else(|| "closed by the client".to_owned(), |error| error.to_string());
                    ended = Some(why);
                }
                // Only the listener's own links are attached and sent on here, and these need no answer.
                Event::Opened(_)
                | Event::SessionBegun { .. }
                | Event::Attached { .. }
                | Event::AttachRefused { .. }
                | Event::Settled { .. } => {}
            }
        }
        self.publish_all(&mut gathered).await;
        ended
    }

    async fn publish_all(&mut self, gathered: &mut AHashMap<Identity, Gathered>) {
        for (identity, gathered) in gathered.drain() {
            self.publish(&identity, gathered).await;
        }
    }

    fn attach_requested(&mut self, request: AttachRequest) {
        let role = request.attach.role;
        let address = request.address();
        let parsed = address.as_ref().map(|address| LinkAddress::parse(address.as_str(), role));
        match parsed {
            Some(Ok(LinkAddress::Cbs)) => self.accept_tokens(request),
            Some(Ok(LinkAddress::Node { kind: LinkKind::Telemetry, device_id, module_id })) => {
                let identity = match &module_id {
                    None => Identity::device(&device_id),
                    Some(module) => Identity::module(&device_id, module),
                };
                match identity {
                    Ok(identity) => self.attach(identity, request),
                    Err(error) => self.refuse(request.link, Condition::NOT_ALLOWED, error.to_string()),
                }
            }
            Some(Ok(_)) => {
                let text = "links of this function are not served by this release";
                self.refuse(request.link, Condition::NOT_IMPLEMENTED, text);
            }
            Some(Err(error)) => self.refuse(request.link, Condition::NOT_ALLOWED, error.to_string()),
            None => self.refuse(request.link, Condition::NOT_ALLOWED, "the link has no address"),
        }
    }

    fn refuse(&mut self, link: LinkId, condition: Condition, text: impl Into<String>) {
        self.driver.connection().refuse_attach(link, Error::new(condition, text));
    }

    fn accept(&mut self, request: &AttachRequest, kind: LinkKind) -> bool {
        let asked = &request.attach;
        let (snd_settle, rcv_settle) = kind.settle_modes(asked);
        let max_message_bytes = match asked.max_message_bytes {
            Some(size) if (1..=TRANSFER_BYTES_MAX).contains(&size) => size,
            Some(_) | None => TRANSFER_BYTES_MAX,
        };
        let answer = AttachAnswer {
            snd_settle,
            rcv_settle,
            max_message_bytes,
            credit: CREDIT,
            properties: Vec::new(),
        };
        self.driver.connection().accept_attach(request.link, answer)
    }

    fn accept_tokens(&mut self, request: AttachRequest) {
        if !self.accept(&request, LinkKind::Cbs) {
            return;
        }
        match request.attach.role {
            Role::Sender => {
                self.links.insert(request.link, Purpose::Tokens);
            }
            Role::Receiver => {
                self.tokens.add_receiver(request.link);
                self.tokens.send_answers(self.driver.connection());
            }
        }
    }

    /// A telemetry link: its identity is logged in first, unless it is already.
    fn attach(&mut self, identity: Identity, request: AttachRequest) {
        if self.identities.contains_key(&identity) {
            self.attach_logged_in(&identity, &request);
            return;
        }
        let waiting = self.waiting.get(&identity).map(Vec::len);
        let room = match waiting {
            Some(links) => links < LINKS_WAITING_MAX,
            None => {
                self.identities.len() + self.waiting.len() < self.limits.identities_max
                    && self.logins.len() < self.limits.logins_max
            }
        };
        if !room {
            let text = "too many identities or links on one connection; come again or open another";
            self.refuse(request.link, Condition::INTERNAL_ERROR, text);
            return;
        }
        if waiting.is_none() {
            let login = self.login(&identity, &request);
            let (backend, limit) = (self.backend.clone(), self.limits.login_max);
            let task = self.logins.spawn(async move {
                let (sender, mailbox) = mpsc::channel(MAILBOX_COMMANDS_MAX);
                match timeout(limit, backend.login(login, sender)).await {
                    Ok(result) => result.map(|client| LoggedIn { client, mailbox }),
                    Err(_) => Err(LoginError::Unavailable("the login took too long".into())),
                }
            });
            self.login_tasks.insert(task.id(), identity.clone());
        }
        self.waiting.entry(identity).or_default().push(request);
    }

    fn login(&self, identity: &Identity, request: &AttachRequest) -> Login {
        let text = |name: &str| -> Option<Arc<str>> {
            let found = request.attach.properties.iter().find(|(key, _)| key.as_str() == name);
            found.and_then(|(_, value)| value.as_text()).map(|text| text.as_str().into())
        };
        let auth_chain = text("com.microsoft:auth-chain");
        let actor = auth_chain
            .as_deref()
            .filter(|chain| chain.contains(';'))
            .and_then(|chain| chain.rsplit(';').next())
            .and_then(|device| Identity::module(device, crate::identity::HUB_MODULE_ID).ok());
        let own = self.tokens.get(identity);
        let token = own.or_else(|| actor.and_then(|actor| self.tokens.get(&actor)));
        let credentials = match token {
            Some(token) => Credentials::SasToken(token.clone()),
            None if !self.peer.certificates.is_empty() => {
                Credentials::Certificate(self.peer.certificates.clone())
            }
            None => Credentials::None,
        };
        Login {
            identity: identity.clone(),
            credentials,
            auth_chain,
            product_info: text("com.microsoft:client-version").unwrap_or_else(|| "".into()),
            model_id: text("com.microsoft:model-id").filter(|id| !id.trim().is_empty()),
            protocol: Protocol::Amqp,
            peer: self.peer.address,
        }
    }

    fn login_ended(&mut self, joined: Result<(Id, Result<LoggedIn<B>, LoginError>), JoinError>) {
        let (task, result) = match joined {
            Ok((task, result)) => (task, result),
            // A login that panicked must not leave its links waiting.
            Err(error) => (error.id(), Err(LoginError::Unavailable("the login failed".into()))),
        };
        if let Some(identity) = self.login_tasks.remove(&task) {
            self.logged_in(identity, result);
        }
    }

    fn logged_in(&mut self, identity: Identity, result: Result<LoggedIn<B>, LoginError>) {
        let requests = self.waiting.remove(&identity).unwrap_or_default();
        match result {
            Ok(LoggedIn { client, mailbox }) => {
                tracing::info!(client = %identity, "Client connected (AMQP)");
                self.identities.insert(identity.clone(), Connected { client, telemetry: None });
                self.mailboxes.insert(&identity, mailbox);
                for request in &requests {
                    self.attach_logged_in(&identity, request);
                }
                // All links may have gone while the login was under way.
                self.forget_if_unused(&identity);
            }
            Err(error) => {
                let condition = match &error {
                    LoginError::Refused(_) => Condition::UNAUTHORIZED_ACCESS,
                    LoginError::Unavailable(_) => Condition::INTERNAL_ERROR,
                };
                tracing::info!(client = %identity, %error, "Link refused");
                for request in requests {
                    self.refuse(request.link, condition.clone(), error.to_string());
                }
            }
        }
    }

    fn attach_logged_in(&mut self, identity: &Identity, request: &AttachRequest) {
        if !self.accept(request, LinkKind::Telemetry) {
            return;
        }
        self.links.insert(request.link, Purpose::Telemetry(identity.clone()));
        let Some(connected) = self.identities.get_mut(identity) else { return };
        if let Some(older) = connected.telemetry.replace(request.link) {
            self.links.remove(&older);
            self.driver.connection().detach(older, None);
        }
    }

    fn link_gone(&mut self, link: LinkId) {
        self.tokens.link_gone(link);
        for requests in self.waiting.values_mut() {
            requests.retain(|request| request.link != link);
        }
        if let Some(Purpose::Telemetry(identity)) = self.links.remove(&link) {
            if let Some(connected) = self.identities.get_mut(&identity) {
                connected.telemetry.take_if(|current| *current == link);
            }
            self.forget_if_unused(&identity);
        }
    }

    fn forget_if_unused(&mut self, identity: &Identity) {
        if self.identities.get(identity).is_some_and(|connected| connected.telemetry.is_none()) {
            self.identities.remove(identity);
            self.mailboxes.remove(identity);
            tracing::info!(client = %identity, "Client disconnected (AMQP)");
        }
    }

    fn command(&mut self, identity: &Identity, command: Option<Command>) {
        match command {
            Some(Command::Close(reason)) => {
                let (condition, text) = match reason {
                    CloseReason::TakenOver => (Condition::STOLEN, "a newer connection took over"),
                    CloseReason::Unauthorized => {
                        (Condition::UNAUTHORIZED_ACCESS, "the credentials are not valid any more")
                    }
                    CloseReason::Stopping => (Condition::DETACH_FORCED, "the hub is stopping"),
                    CloseReason::Kicked => (Condition::DETACH_FORCED, "an operator closed the connection"),
                };
                self.drop_identity(identity, Error::new(condition, text));
            }
            // No consumer is registered on this head, so nothing is delivered; offered again elsewhere if it were.
            Some(Command::Deliver(deliveries)) => {
                let unwanted =
                    deliveries.messages.iter().map(|(tag, _)| (*tag, crate::backend::Outcome::NotOffered));
                deliveries.settler.settle(unwanted);
            }
            Some(Command::TwinAnswer(_) | Command::Desired(_) | Command::Invoke(_)) => {}
            None => self.drop_identity(identity, Condition::INTERNAL_ERROR.into()),
        }
    }

    fn drop_identity(&mut self, identity: &Identity, error: Error) {
        self.mailboxes.remove(identity);
        let link = self.identities.remove(identity).and_then(|connected| connected.telemetry);
        if let Some(link) = link {
            self.links.remove(&link);
            self.driver.connection().detach(link, Some(error));
        }
    }

    fn delivery(&mut self, delivery: Delivery, gathered: &mut AHashMap<Identity, Gathered>) {
        let identity = match self.links.get(&delivery.link) {
            Some(Purpose::Telemetry(identity)) => identity,
            Some(Purpose::Tokens) => {
                let engine = self.driver.connection();
                engine.settle(delivery.id, Outcome::Accepted);
                self.tokens.request(delivery.link.session(), &delivery.payload);
                self.tokens.send_answers(engine);
                return;
            }
            // The link was ended by this side meanwhile.
            None => return,
        };
        let Some(connected) = self.identities.get(identity) else { return };
        let sender = self.backend.sender(&connected.client);
        let messages = parse_batch(delivery.format, &delivery.payload)
            .map_err(|error| Error::new(Condition::DECODE_ERROR, error.to_string()))
            .and_then(|batch| {
                batch
                    .iter()
                    .map(|encoded| convert::message(encoded, sender.clone()))
                    .collect::<Result<Vec<_>, _>>()
            })
            .and_then(|messages| {
                // All are looked at before the first is stored.
                for message in &messages {
                    self.backend.check(&connected.client, message).map_err(|error| refusal(&error))?;
                }
                Ok(messages)
            });
        match messages {
            Ok(messages) => {
                let of_identity = gathered.entry(identity.clone()).or_default();
                of_identity.messages.extend(messages);
                of_identity.deliveries.push(delivery.id);
            }
            Err(error) => {
                tracing::debug!(client = %identity, %error, "A transfer is rejected");
                self.driver.connection().settle(delivery.id, Outcome::Rejected(Some(error)));
            }
        }
    }

    async fn publish(&mut self, identity: &Identity, gathered: Gathered) {
        let Gathered { messages, deliveries } = gathered;
        let Some(connected) = self.identities.get_mut(identity) else { return };
        match self.backend.publish(&mut connected.client, messages).await {
            Ok(commit) => self.commits.push_back(Pending { commit, deliveries }),
            Err(error) => self.settle_all(&deliveries, &Outcome::Rejected(Some(refusal(&error)))),
        }
    }

    fn committed(&mut self, pending: &Pending<B>, result: Result<(), PublishError>) {
        let outcome = match result {
            Ok(()) => Outcome::Accepted,
            Err(error) => Outcome::Rejected(Some(refusal(&error))),
        };
        self.settle_all(&pending.deliveries, &outcome);
    }

    fn settle_all(&mut self, deliveries: &[DeliveryId], outcome: &Outcome) {
        for delivery in deliveries {
            self.driver.connection().settle(*delivery, outcome.clone());
        }
    }
}

/// What a sender is told about messages that are not stored.
fn refusal(error: &PublishError) -> Error {
    let condition = match error {
        PublishError::TooLarge { .. } => Condition::MESSAGE_SIZE_EXCEEDED,
        PublishError::Malformed(_) => Condition::INVALID_FIELD,
        PublishError::Full(_) => Condition::of("com.microsoft:device-container-throttled"),
        PublishError::Store(_) => Condition::INTERNAL_ERROR,
    };
    Error::new(condition, error.to_string())
}
