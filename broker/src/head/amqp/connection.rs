//! One AMQP connection: its turns, and which event goes to which of its parts.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use ahash::AHashMap;
use tokio::io::{AsyncRead, AsyncWrite};

use super::handover::{self, HandedOver, IsForeign};
use super::identity::{Connected, accept};
use super::limits::AmqpLimits;
use super::logins::{self, Ended, LoggedIn, Logins};
use super::mailboxes::Mailboxes;
use super::telemetry::Telemetry;
use super::tokens::Tokens;
use super::turn::{HeldLinks, Links, Outcomes, Purpose, Turn};
use crate::amqp::{
    AttachRequest, Condition, Connection, Delivery, Driver, Error, Event, LinkAddress, LinkId, LinkKind,
    Options, Outcome, Role, SaslCode, SessionId,
};
use crate::backend::{Backend, CloseReason, Command, Credentials, Login, LoginError, Protocol};
use crate::head::mqtt::Peer;
use crate::identity::Identity;

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
    let _ = serve_unless_foreign(stream, backend, limits, peer, None, shutdown).await;
}

/// Serves one connection to its end, unless a token is put on it before anybody has logged in that is not for the head:
/// then the connection is the caller's. `shutdown` resolves when the process stops.
pub async fn serve_or_hand_over<S, B>(
    stream: S,
    backend: B,
    limits: AmqpLimits,
    peer: Peer,
    is_foreign: IsForeign,
    shutdown: impl Future<Output = ()> + Send,
) -> Option<HandedOver<S>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    B: Backend,
{
    serve_unless_foreign(stream, backend, limits, peer, Some(is_foreign), shutdown).await
}

async fn serve_unless_foreign<S, B>(
    stream: S,
    backend: B,
    limits: AmqpLimits,
    peer: Peer,
    is_foreign: Option<IsForeign>,
    shutdown: impl Future<Output = ()> + Send,
) -> Option<HandedOver<S>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    B: Backend,
{
    let options =
        Options { handshake_timeout: limits.open_max, links_max: limits.links_max, ..Options::default() };
    let engine = Connection::listener(options, peer.accepted_at.into_std());
    let address = peer.address;
    let mut head = Head {
        driver: Driver::new(stream, engine),
        backend,
        tokens: Tokens::new(&limits),
        limits,
        peer,
        logins: Logins::new(),
        identities: AHashMap::new(),
        mailboxes: Mailboxes::default(),
        links: Links::default(),
        held: HeldLinks::default(),
        outcomes: Outcomes::default(),
        telemetry: Telemetry::new(),
        is_foreign,
        foreign: None,
    };
    let reason = head.run(pin!(shutdown)).await;
    if let Some(request) = head.foreign {
        let answer_links = head.tokens.into_receivers();
        return Some(HandedOver { driver: head.driver, request, answer_links });
    }
    tracing::debug!(?address, reason, "AMQP connection ended");
    // Whatever the peer has not read by then is lost to it; it will ask again on its next connection.
    let _ = head.driver.shutdown().await;
    None
}

/// The state of one connection.
struct Head<S, B: Backend> {
    driver: Driver<S>,
    backend: B,
    limits: AmqpLimits,
    peer: Peer,
    tokens: Tokens,
    logins: Logins<B>,
    identities: AHashMap<Identity, Connected<B>>,
    mailboxes: Mailboxes,
    links: Links,
    held: HeldLinks,
    outcomes: Outcomes,
    telemetry: Telemetry<B>,
    /// Which tokens the head is not for; none if it is for all.
    is_foreign: Option<IsForeign>,
    /// A request with such a token: the connection is to be handed over.
    foreign: Option<Delivery>,
}

/// What a turn waits for.
enum News<B: Backend> {
    Login(Ended<B>),
    Command(Identity, Option<Command>),
    /// Messages were stored, or the socket moved.
    Moved,
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
                Ok(News::Moved) => {}
                Ok(News::Login(ended)) => self.login_ended(ended),
                Ok(News::Command(identity, command)) => self.command(&identity, command),
            }
        }
    }

    /// Waits for the next thing to happen. Cancel safe: whatever is taken is returned.
    async fn news(&mut self) -> News<B> {
        poll_fn(|cx| {
            if let Poll::Ready(ended) = self.logins.poll(cx) {
                return Poll::Ready(News::Login(ended));
            }
            if self.telemetry.poll_commits(self.driver.connection(), cx) {
                return Poll::Ready(News::Moved);
            }
            if let Poll::Ready((identity, command)) = self.mailboxes.poll_command(cx) {
                return Poll::Ready(News::Command(identity, command));
            }
            self.driver.poll_turn(cx).map(|()| News::Moved)
        })
        .await
    }

    /// Works through what arrived; a text when the connection is over.
    async fn handle_events(&mut self) -> Option<String> {
        let mut ended = None;
        while let Some(event) = self.driver.connection().poll_event() {
            if let Event::Delivery(delivery) = &event
                && self.takes_over(delivery)
            {
                self.foreign = Some(delivery.clone());
                return Some("handed over".into());
            }
            match event {
                Event::SaslPlain { .. } => self.driver.connection().sasl_outcome(SaslCode::Auth),
                Event::AttachRequested(request) => self.attach_requested(request),
                Event::Delivery(delivery) => self.received(&delivery),
                Event::Settled { link, delivery, outcome } => {
                    self.with_link(link, |connected, turn, _| connected.settled(turn, delivery, &outcome));
                }
                Event::Detached { link, .. } => {
                    // What was sent before the end of a link counts.
                    self.publish().await;
                    self.link_gone(link);
                }
                Event::SessionEnded { session, .. } => {
                    self.publish().await;
                    self.tokens.session_gone(session);
                    for link in self.links.of_session(session) {
                        self.link_gone(link);
                    }
                    self.logins.session_gone(session);
                }
                Event::CreditChanged { link, .. } => self.resume(link),
                Event::WindowOpened { session } => self.resume_held(Some(session)),
                Event::OutputDrained => self.resume_held(None),
                Event::Closed { error, .. } => {
                    let why =
                        error.map_or_else(|| "closed by the client".to_owned(), |error| error.to_string());
                    ended = Some(why);
                }
                // Only the listener's own links are attached here, and these need no answer.
                Event::Opened(_)
                | Event::SessionBegun { .. }
                | Event::Attached { .. }
                | Event::AttachRefused { .. } => {}
            }
        }
        self.publish().await;
        self.outcomes.report();
        ended
    }

    async fn publish(&mut self) {
        self.telemetry.publish(self.driver.connection(), &self.backend, &mut self.identities).await;
    }

    /// Whether a delivery shows that the connection is for somebody else.
    fn takes_over(&self, delivery: &Delivery) -> bool {
        self.is_foreign.is_some_and(|is_foreign| {
            matches!(self.links.get(delivery.link), Some(Purpose::Tokens))
                && self.identities.is_empty()
                && self.logins.len() == 0
                && handover::is_foreign(delivery, is_foreign)
        })
    }

    // ---- links --------------------------------------------------------------------------------------------

    fn attach_requested(&mut self, request: AttachRequest) {
        let address = request.address();
        let parsed =
            address.as_ref().map(|address| LinkAddress::parse(address.as_str(), request.attach.role));
        match parsed {
            Some(Ok(LinkAddress::Cbs)) => self.accept_tokens(&request),
            Some(Ok(LinkAddress::Node { kind, device_id, module_id })) => {
                let identity = match &module_id {
                    None => Identity::device(&device_id),
                    Some(module) => Identity::module(&device_id, module),
                };
                match identity {
                    Ok(identity) => self.attach(identity, kind, request),
                    Err(error) => self.refuse(request.link, Condition::NOT_ALLOWED, error.to_string()),
                }
            }
            Some(Err(error)) => self.refuse(request.link, Condition::NOT_ALLOWED, error.to_string()),
            None => self.refuse(request.link, Condition::NOT_ALLOWED, "the link has no address"),
        }
    }

    fn refuse(&mut self, link: LinkId, condition: Condition, text: impl Into<String>) {
        self.driver.connection().refuse_attach(link, Error::new(condition, text));
    }

    fn accept_tokens(&mut self, request: &AttachRequest) {
        if request.attach.role == Role::Receiver && !self.tokens.has_room_for_receiver() {
            self.refuse(request.link, Condition::RESOURCE_LIMIT_EXCEEDED, "too many links for tokens");
            return;
        }
        if !accept(self.driver.connection(), request, LinkKind::Cbs) {
            return;
        }
        self.links.insert(request.link, Purpose::Tokens);
        if request.attach.role == Role::Receiver {
            self.tokens.add_receiver(request.link);
            self.tokens.send_answers(self.driver.connection());
        }
    }

    /// A link of an identity, which is logged in first, unless it is already.
    fn attach(&mut self, identity: Identity, kind: LinkKind, request: AttachRequest) {
        if self.identities.contains_key(&identity) {
            self.with_identity(&identity, |connected, turn| connected.attach(turn, kind, &request));
            return;
        }
        let text = "too many identities or links on one connection; come again or open another";
        match self.logins.join(&identity, (kind, request), self.limits.links_waiting_max) {
            Ok(()) => {}
            Err(((_, request), true)) => self.refuse(request.link, Condition::INTERNAL_ERROR, text),
            Err(((kind, request), false)) => {
                let room = self.identities.len() + self.logins.len() < self.limits.identities_max
                    && self.logins.running() < self.limits.logins_max;
                if !room {
                    self.refuse(request.link, Condition::INTERNAL_ERROR, text);
                    return;
                }
                let login = self.login(&identity, &request);
                self.logins.start(self.backend.clone(), &self.limits, login, Some((kind, request)));
            }
        }
    }

    fn login(&self, identity: &Identity, request: &AttachRequest) -> Login {
        let auth_chain = logins::property(request, "com.microsoft:auth-chain");
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
        let product_info: Option<Arc<str>> = logins::property(request, "com.microsoft:client-version");
        let model_id = logins::property(request, "com.microsoft:model-id");
        Login {
            identity: identity.clone(),
            credentials,
            auth_chain,
            product_info: product_info.unwrap_or_else(|| "".into()),
            model_id: model_id.filter(|id| !id.trim().is_empty()),
            protocol: Protocol::Amqp,
            peer: self.peer.address,
        }
    }

    fn link_gone(&mut self, link: LinkId) {
        self.tokens.link_gone(link);
        self.logins.link_gone(link);
        if let Some(Purpose::Of(identity, _)) = self.links.remove(link) {
            self.with_identity(&identity, |connected, turn| connected.link_gone(turn, link));
            self.forget_if_unused(&identity);
        }
    }

    /// There is credit on a link on which this side sends.
    fn resume(&mut self, link: LinkId) {
        match self.links.get(link) {
            Some(Purpose::Tokens) => self.tokens.send_answers(self.driver.connection()),
            Some(Purpose::Of(..)) => {
                self.with_link(link, |connected, turn, kind| connected.resume(turn, kind))
            }
            None => {}
        }
    }

    /// There is room in a session, or in the output.
    fn resume_held(&mut self, session: Option<SessionId>) {
        self.tokens.send_answers(self.driver.connection());
        for link in self.held.take(session) {
            self.resume(link);
        }
    }

    fn received(&mut self, delivery: &Delivery) {
        match self.links.get(delivery.link) {
            Some(Purpose::Of(identity, LinkKind::Telemetry)) => {
                if let Some(connected) = self.identities.get(identity) {
                    let engine = self.driver.connection();
                    self.telemetry.received(engine, &self.backend, identity, &connected.client, delivery);
                }
            }
            Some(Purpose::Of(..)) => {
                self.with_link(delivery.link, |connected, turn, kind| {
                    connected.received(turn, kind, delivery)
                });
            }
            Some(Purpose::Tokens) => {
                let engine = self.driver.connection();
                engine.settle(delivery.id, Outcome::Accepted);
                self.tokens.request(delivery.link.session(), &delivery.payload);
                self.tokens.send_answers(engine);
            }
            // The link was ended by this side meanwhile.
            None => {}
        }
    }

    // ---- identities ---------------------------------------------------------------------------------------

    fn login_ended(&mut self, ended: Ended<B>) {
        let Ended { identity, links, result } = ended;
        match result {
            Ok(LoggedIn { client, mailbox }) => {
                tracing::info!(client = %identity, "Client connected (AMQP)");
                self.identities.insert(identity.clone(), Connected::new(identity.clone(), client));
                self.mailboxes.insert(&identity, mailbox);
                for (kind, request) in &links {
                    self.with_identity(&identity, |connected, turn| connected.attach(turn, *kind, request));
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
                for (_, request) in links {
                    self.refuse(request.link, condition.clone(), error.to_string());
                }
            }
        }
    }

    fn forget_if_unused(&mut self, identity: &Identity) {
        if self.identities.get(identity).is_some_and(Connected::is_unused) {
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
                };
                self.drop_identity(identity, &Error::new(condition, text));
            }
            Some(command) => {
                self.with_identity(identity, |connected, turn| connected.command(turn, command));
                self.forget_if_unused(identity);
            }
            None => self.drop_identity(identity, &Condition::INTERNAL_ERROR.into()),
        }
    }

    fn drop_identity(&mut self, identity: &Identity, error: &Error) {
        self.mailboxes.remove(identity);
        self.with_identity(identity, |connected, turn| connected.end(turn, error));
        self.identities.remove(identity);
    }

    /// Lends the connection to the identity of a link.
    fn with_link(&mut self, link: LinkId, work: impl FnOnce(&mut Connected<B>, &mut Turn<'_, B>, LinkKind)) {
        if let Some(Purpose::Of(identity, kind)) = self.links.get(link) {
            let (identity, kind) = (identity.clone(), *kind);
            self.with_identity(&identity, |connected, turn| work(connected, turn, kind));
        }
    }

    /// Lends the connection to an identity, if it is logged in.
    fn with_identity(&mut self, identity: &Identity, work: impl FnOnce(&mut Connected<B>, &mut Turn<'_, B>)) {
        if let Some(connected) = self.identities.get_mut(identity) {
            let mut turn = Turn {
                engine: self.driver.connection(),
                backend: &self.backend,
                limits: &self.limits,
                links: &mut self.links,
                held: &mut self.held,
                outcomes: &mut self.outcomes,
            };
            work(connected, &mut turn);
        }
    }
}
