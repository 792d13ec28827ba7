//! One AMQP connection: its turns, and which event goes to which of its parts.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;

use ahash::AHashMap;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Sleep, sleep_until};

use super::clients::STOPPING;
use super::handover::{self, HandedOver, IsForeign};
use super::identity::{Connected, accept};
use super::limits::AmqpLimits;
use super::logins::{Ended, Logins};
use super::mailboxes::Mailboxes;
use super::telemetry::Telemetry;
use super::tokens::Tokens;
use super::turn::{HeldLinks, Links, Outcomes, Purpose, Turn};
use crate::amqp::{
    AttachRequest, Condition, Connection, Delivery, Driver, Error, Event, LinkAddress, LinkId, LinkKind,
    Options, Outcome, Role, SessionId,
};
use crate::backend::{Backend, Command};
use crate::head::mqtt::Peer;
use crate::identity::Identity;

/// Commands that are done without a look at the socket.
const COMMANDS_IN_A_ROW_MAX: usize = 64;

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
    let options = Options {
        handshake_timeout: limits.open_max,
        links_max: limits.links_max,
        sasl_external: !peer.certificates.is_empty(),
        ..Options::default()
    };
    let engine = Connection::listener(options, peer.accepted_at.into_std());
    let address = peer.address;
    let mut head = Head {
        driver: Driver::new(stream, engine),
        backend,
        tokens: Tokens::new(&limits),
        nobody_until: Some(Box::pin(sleep_until(peer.accepted_at + limits.first_login_max))),
        limits,
        peer,
        logins: Logins::new(),
        login_number: 0,
        identities: AHashMap::new(),
        renewals_due: VecDeque::new(),
        sasl_login: None,
        by_certificate: false,
        mailboxes: Mailboxes::default(),
        commands_in_a_row: 0,
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
pub(super) struct Head<S, B: Backend> {
    pub(super) driver: Driver<S>,
    pub(super) backend: B,
    pub(super) limits: AmqpLimits,
    pub(super) peer: Peer,
    pub(super) tokens: Tokens,
    pub(super) logins: Logins<B>,
    /// The number of the last login that succeeded.
    pub(super) login_number: u64,
    pub(super) identities: AHashMap<Identity, Connected<B>>,
    /// Identities with a newer token that was not checked yet.
    pub(super) renewals_due: VecDeque<Identity>,
    /// Whose password SASL waits for.
    pub(super) sasl_login: Option<Identity>,
    /// Somebody logged in by certificate.
    pub(super) by_certificate: bool,
    /// When the connection ends if nobody is logged in: at the beginning, and after its last identity was taken over.
    pub(super) nobody_until: Option<Pin<Box<Sleep>>>,
    pub(super) mailboxes: Mailboxes,
    commands_in_a_row: usize,
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
    /// Nobody is logged in, in all the time.
    NobodyCame,
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
                    let error = Error::new(Condition::DETACH_FORCED, STOPPING);
                    self.close(error);
                    return "the hub is stopping".into();
                }
            };
            match news {
                Err(reason) => return reason,
                Ok(News::Moved) => {}
                Ok(News::Login(ended)) => self.ended(ended),
                Ok(News::NobodyCame) => {
                    let error = Error::new(Condition::CONNECTION_FORCED, "nobody is logged in");
                    self.close(error);
                }
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
            if let Some(nobody_until) = &mut self.nobody_until
                && nobody_until.as_mut().poll(cx).is_ready()
            {
                self.nobody_until = None;
                // Whoever is about to come has its own limit.
                if self.logins.len() == 0 {
                    return Poll::Ready(News::NobodyCame);
                }
            }
            if self.telemetry.poll_commits(self.driver.connection(), cx) {
                return Poll::Ready(News::Moved);
            }
            // Commands that come together are written together, but do not keep the socket waiting without end.
            if self.commands_in_a_row == COMMANDS_IN_A_ROW_MAX {
                self.commands_in_a_row = 0;
                if self.driver.poll_turn(cx).is_ready() {
                    return Poll::Ready(News::Moved);
                }
            }
            if let Poll::Ready((identity, command)) = self.mailboxes.poll_command(cx) {
                self.commands_in_a_row += 1;
                return Poll::Ready(News::Command(identity, command));
            }
            self.commands_in_a_row = 0;
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
                Event::SaslPlain { user, password } => self.sasl_plain(&user, &password),
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

    pub(super) fn close(&mut self, error: Error) {
        let now = tokio::time::Instant::now().into_std();
        self.driver.connection().close(Some(error), now);
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

    pub(super) fn refuse(&mut self, link: LinkId, condition: Condition, text: impl Into<String>) {
        self.driver.connection().refuse_attach(link, Error::new(condition, text));
    }

    fn accept_tokens(&mut self, request: &AttachRequest) {
        if self.by_certificate {
            let text = "the connection is authenticated by certificate; it takes no tokens";
            self.refuse(request.link, Condition::NOT_ALLOWED, text);
            return;
        }
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
                let changed = self.tokens.request(delivery.link.session(), &delivery.payload);
                self.tokens.send_answers(engine);
                self.tokens_changed(&changed);
            }
            // The link was ended by this side meanwhile.
            None => {}
        }
    }

    /// Lends the connection to the identity of a link.
    fn with_link(&mut self, link: LinkId, work: impl FnOnce(&mut Connected<B>, &mut Turn<'_, B>, LinkKind)) {
        if let Some(Purpose::Of(identity, kind)) = self.links.get(link) {
            let (identity, kind) = (identity.clone(), *kind);
            self.with_identity(&identity, |connected, turn| work(connected, turn, kind));
        }
    }

    /// Lends the connection to an identity, if it is logged in.
    pub(super) fn with_identity(
        &mut self,
        identity: &Identity,
        work: impl FnOnce(&mut Connected<B>, &mut Turn<'_, B>),
    ) {
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
