//! The links on which tokens are put, whose token is due, and the deadlines of the answers.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ahash::AHashMap;
use tokio::time::Instant;

use super::UpstreamOptions;
use super::failure::{Failure, UpstreamCause};
use super::lanes::LaneId;
use super::verdict::ended;
use crate::amqp::{
    AttachOptions, CbsResponse, Connection, Error, LinkId, MessageId, PutToken, Role, SendError, SendOptions,
    SenderSettle, SessionId, Terminus,
};
use crate::identity::{ClientToken, Identity, OWN_TOKEN_LIFE_SECS, SasToken, SignError, escaped};

/// Tokens without an answer and senders whose links are being made, together: after an outage all senders come
/// back at once, and an upstream that has to look each of them up must not run into our time-out.
pub(super) const OPENING_MAX: usize = 64;

/// Shortest time until tokens are put anew.
const RENEW_SECS_MIN: i64 = 60;

/// For whom a token is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// The hub itself; the connection is up when it is accepted.
    Hub,
    /// A lane, which goes on when it is accepted.
    Lane(LaneId),
}

type Signing = Pin<Box<dyn Future<Output = Result<Arc<str>, SignError>> + Send>>;

/// Whose token a holder needs.
pub(super) struct Needed<'a> {
    pub(super) identity: &'a Identity,
    /// One of its own that it is let in with; without it, the hub's.
    pub(super) own: Option<ClientToken>,
}

/// Puts tokens on one connection.
pub(super) struct Tokens {
    session: Option<SessionId>,
    sender: Option<LinkId>,
    receiver: Option<LinkId>,
    receiver_attached: bool,
    next_id: u64,
    /// Whose tokens wait to be put.
    waiting: VecDeque<Holder>,
    /// Tokens that wait for an answer, by message id.
    asked: AHashMap<u64, (Holder, Instant)>,
    /// Since when tokens wait for credit.
    starved_since: Option<Instant>,
    /// The token that is being made, and since when.
    signing: Option<(Signing, Instant)>,
    token: Option<Arc<str>>,
    renew_at: Option<Instant>,
}

impl Tokens {
    /// The first token that is put is the hub's own.
    pub(super) fn new() -> Self {
        Self {
            session: None,
            sender: None,
            receiver: None,
            receiver_attached: false,
            next_id: 1,
            waiting: VecDeque::from([Holder::Hub]),
            asked: AHashMap::new(),
            starved_since: None,
            signing: None,
            token: None,
            renew_at: None,
        }
    }

    /// Begins the session of the token links.
    pub(super) fn begin(&mut self, engine: &mut Connection) -> Result<(), Failure> {
        self.session = Some(engine.begin().ok_or_else(|| closed("the upstream allows no session"))?);
        Ok(())
    }

    /// Attaches the token links if this is their session; whether it is.
    pub(super) fn session_begun(
        &mut self,
        session: SessionId,
        host: &str,
        engine: &mut Connection,
    ) -> Result<bool, Failure> {
        if Some(session) != self.session {
            return Ok(false);
        }
        let address = format!("amqps://{host}/$cbs");
        let link = |role, snd_settle| AttachOptions {
            name: if role == Role::Sender { "cbs-sender" } else { "cbs-receiver" }.into(),
            role,
            source: Terminus::source(if role == Role::Sender { "cbs" } else { &address }),
            target: Terminus::target(if role == Role::Sender { &address } else { "cbs" }),
            snd_settle,
            rcv_settle: None,
            max_message_bytes: 65_536,
            credit: 100,
            properties: Vec::new(),
        };
        self.receiver = engine.attach(session, link(Role::Receiver, None));
        self.sender = engine.attach(session, link(Role::Sender, Some(SenderSettle::Settled)));
        match (self.receiver, self.sender) {
            (Some(_), Some(_)) => Ok(true),
            _ => Err(closed("the upstream allows no token links")),
        }
    }

    /// A link was attached.
    pub(super) fn attached(&mut self, link: LinkId) {
        self.receiver_attached |= self.is_receiver(link);
    }

    /// Whether answers come on this link.
    pub(super) fn is_receiver(&self, link: LinkId) -> bool {
        self.receiver == Some(link)
    }

    /// A link ended: without the token links the connection is of no use.
    pub(super) fn link_lost(&self, link: LinkId, error: Option<&Error>) -> Result<(), Failure> {
        match [self.sender, self.receiver].contains(&Some(link)) {
            true => Err(closed(ended("a token link", error))),
            false => Ok(()),
        }
    }

    /// A session ended.
    pub(super) fn session_lost(&self, session: SessionId, error: Option<&Error>) -> Result<(), Failure> {
        match self.session == Some(session) {
            true => Err(closed(ended("the token session", error))),
            false => Ok(()),
        }
    }

    /// A token is to be put for a holder.
    pub(super) fn want(&mut self, holder: Holder) {
        self.waiting.push_back(holder);
    }

    /// Whether the tokens that were put are half way to their end; said once.
    pub(super) fn take_renewal(&mut self, now: Instant) -> bool {
        self.renew_at.take_if(|at| *at <= now).is_some()
    }

    /// Waits for the token that is being signed. Ready when it is there, or failed; see [`Tokens::put`].
    pub(super) fn poll_signing(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        let Some((signing, _)) = &mut self.signing else { return Poll::Pending };
        let Poll::Ready(signed) = signing.as_mut().poll(cx) else { return Poll::Pending };
        self.signing = None;
        self.token = Some(signed.map_err(|error| failed(error.to_string()))?);
        Poll::Ready(Ok(()))
    }

    /// Puts the tokens that wait, as far as credit and `opening` (senders whose links are being made) allow.
    /// `needed` says what a holder needs; `None` when that is no token any more.
    pub(super) fn put<'a>(
        &mut self,
        engine: &mut Connection,
        options: &UpstreamOptions,
        opening: usize,
        needed: impl Fn(Holder) -> Option<Needed<'a>>,
    ) -> Result<(), Failure> {
        let (Some(sender), true) = (self.sender, self.receiver_attached) else { return Ok(()) };
        while let Some(holder) = self.waiting.front().copied() {
            let Some(Needed { identity, own }) = needed(holder) else {
                self.waiting.pop_front();
                continue;
            };
            if self.asked.len() + opening >= OPENING_MAX {
                return Ok(());
            }
            let Some(token) = own.map(|own| own.text().clone()).or_else(|| self.token.clone()) else {
                if self.signing.is_none() {
                    let source = options.tokens.clone();
                    let signing: Signing = Box::pin(async move { source.token().await });
                    self.signing = Some((signing, Instant::now()));
                }
                return Ok(());
            };
            if engine.credit(sender) == 0 {
                self.starved_since.get_or_insert_with(Instant::now);
                return Ok(());
            }
            let now_secs = options.tokens.now_secs();
            let expires_at_secs =
                SasToken::parse(&token, now_secs).map_or(now_secs, |token| token.expires_at_secs());
            let id = self.next_id;
            let message_id = MessageId::String(id.to_string().into());
            let name = audience(&options.hub_host, identity);
            let expires_millis = expires_at_secs.saturating_mul(1_000);
            let request = PutToken::encode(message_id, &name, &token, expires_millis);
            match engine.send(sender, request, SendOptions { settled: true, ..SendOptions::default() }) {
                Ok(_) => {
                    self.starved_since = None;
                    self.next_id += 1;
                    self.waiting.pop_front();
                    self.asked.insert(id, (holder, Instant::now()));
                    if holder == Holder::Hub {
                        let half = (expires_at_secs - now_secs) / 2;
                        let secs = half.clamp(RENEW_SECS_MIN, OWN_TOKEN_LIFE_SECS / 2);
                        self.renew_at = Some(Instant::now() + Duration::from_secs(secs.unsigned_abs()));
                    }
                }
                Err(SendError::NotAttached | SendError::TooLarge { .. }) => {
                    return Err(failed("the token link takes no token"));
                }
                Err(
                    SendError::NoCredit
                    | SendError::NoWindow
                    | SendError::Backlog
                    | SendError::TooManyUnsettled,
                ) => {
                    self.starved_since.get_or_insert_with(Instant::now);
                    return Ok(());
                }
            }
        }
        // The next one asks the source again, which knows how old it is.
        self.token = None;
        Ok(())
    }

    /// For whom an answer is; none if nobody asked.
    pub(super) fn answered(&mut self, response: &CbsResponse) -> Option<Holder> {
        let Some(MessageId::String(id)) = &response.correlation_id else { return None };
        let id: u64 = id.as_str().parse().ok()?;
        self.asked.remove(&id).map(|(holder, _)| holder)
    }

    /// Fails when the upstream took too long. Once it was `up`, nothing is wrong with tokens: nothing gets on.
    pub(super) fn look(&self, now: Instant, limit: Duration, up: bool) -> Result<(), Failure> {
        let late = |since: Instant| now.duration_since(since) > limit;
        let cause = if up { UpstreamCause::NoProgress } else { UpstreamCause::Token };
        if self.asked.values().any(|(_, since)| late(*since)) {
            return Err(Failure::new(cause, format!("a token was not answered within {limit:?}")));
        }
        if self.starved_since.is_some_and(late) {
            return Err(Failure::new(cause, format!("the token link gave no credit within {limit:?}")));
        }
        if self.signing.as_ref().is_some_and(|(_, since)| late(*since)) {
            return Err(failed(format!("the hub's own token was not made within {limit:?}")));
        }
        Ok(())
    }
}

fn closed(text: impl Into<String>) -> Failure {
    Failure::new(UpstreamCause::Closed, text)
}

fn failed(text: impl Into<String>) -> Failure {
    Failure::new(UpstreamCause::Token, text)
}

fn audience(hub_host: &str, identity: &Identity) -> String {
    let device = escaped(identity.device_id());
    match identity.module_id() {
        None => format!("{hub_host}/devices/{device}"),
        Some(module) => format!("{hub_host}/devices/{device}/modules/{}", escaped(module)),
    }
}
