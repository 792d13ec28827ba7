//! The question whether the upstream lets an identity in with a token of its own: a short connection of its own, so that
//! a wrong token costs the hub's connection nothing.
//!
//! Over AMQP the token is put, and then the link for messages attached, as a parent hub judges a token at the first link
//! only; over MQTT the answer to CONNECT says it. An upstream lets an identity in once at a time: links that the hub has for
//! it on its own connection may end, and are made anew.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use super::control::ControlError;
use super::dial::dial;
use super::failure::Failure;
use super::plain::UpstreamKind;
use super::tokens::{Needed, Tokens};
use super::verdict::{control_error, ended, token_error};
use super::{UpstreamOptions, convert, mqtt};
use crate::amqp::{
    CbsResponse, Connection, Driver, Error, Event, LinkId, LinkKind, Message, Options, Outcome, SessionId,
};
use crate::identity::{ClientToken, Identity, ProofError, Proving, TokenProver};

/// Asks the upstream of a hub.
pub struct UpstreamProver {
    options: UpstreamOptions,
}

impl UpstreamProver {
    /// Asks the upstream that is reached like this; each question takes [`UpstreamOptions::operation_timeout`] at most.
    pub fn new(options: UpstreamOptions) -> Self {
        Self { options }
    }

    async fn ask(&self, identity: &Identity, token: &Arc<str>) -> Result<(), ProofError> {
        let options = &self.options;
        match options.kind {
            UpstreamKind::Amqp(_) => {
                Err(unavailable("the upstream is a broker that knows no tokens of clients"))
            }
            UpstreamKind::Hub => {
                let stream = dial(options, None).await.map_err(not_reached)?.stream;
                Question::new(stream, options, identity, token).answer().await
            }
            UpstreamKind::MqttHub => {
                let stream = dial(options, None).await.map_err(not_reached)?.stream;
                mqtt::prove(stream, options, identity, token).await
            }
        }
    }
}

impl TokenProver for UpstreamProver {
    fn prove<'a>(&'a self, identity: &'a Identity, token: &'a Arc<str>) -> Proving<'a> {
        let limit = self.options.operation_timeout;
        Box::pin(async move {
            let asked = timeout(limit, self.ask(identity, token)).await;
            asked
                .unwrap_or_else(|_| Err(unavailable(&format!("the upstream did not judge within {limit:?}"))))
        })
    }
}

/// One connection over AMQP for one question.
struct Question<'a, S> {
    driver: Driver<S>,
    options: &'a UpstreamOptions,
    identity: &'a Identity,
    token: ClientToken,
    tokens: Tokens,
    session: Option<SessionId>,
    link: Option<LinkId>,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Question<'a, S> {
    fn new(stream: S, options: &'a UpstreamOptions, identity: &'a Identity, token: &Arc<str>) -> Self {
        let engine = Connection::client(
            Options {
                container_id: Uuid::new_v4().to_string().into(),
                hostname: Some(options.host.as_str().into()),
                sasl: options.sasl(),
                idle_timeout: options.idle_timeout,
                handshake_timeout: options.operation_timeout,
                ..Options::default()
            },
            Instant::now().into_std(),
        );
        Self {
            driver: Driver::new(stream, engine),
            options,
            identity,
            token: ClientToken::of_client(token, options.tokens.now_secs()),
            tokens: Tokens::new(),
            session: None,
            link: None,
        }
    }

    async fn answer(mut self) -> Result<(), ProofError> {
        let answer = self.judgement().await;
        self.driver.connection().close(None, std::time::Instant::now());
        // What the peer does not see of this end it will see as a lost connection.
        let _ = self.driver.shutdown().await;
        answer
    }

    async fn judgement(&mut self) -> Result<(), ProofError> {
        loop {
            while let Some(event) = self.driver.connection().poll_event() {
                if self.take(event)? {
                    return Ok(());
                }
            }
            let (identity, own) = (self.identity, &self.token);
            let needed = |_| Some(Needed { identity, own: Some(own.clone()) });
            self.tokens.put(self.driver.connection(), self.options, 0, needed).map_err(not_reached)?;
            self.driver.turn().await;
        }
    }

    /// Whether the upstream has let the identity in.
    fn take(&mut self, event: Event) -> Result<bool, ProofError> {
        match event {
            Event::Opened(_) => self.tokens.begin(self.driver.connection()).map_err(not_reached)?,
            Event::SessionBegun { session } => {
                let engine = self.driver.connection();
                let host = &self.options.host;
                if !self.tokens.session_begun(session, host, engine).map_err(not_reached)? {
                    self.attach(session)?;
                }
            }
            Event::Attached { link, .. } => self.tokens.attached(link),
            // A link without credit may still be ended for want of the right to it.
            Event::CreditChanged { link, credit, .. } => return Ok(self.link == Some(link) && credit > 0),
            Event::Delivery(delivery) => {
                self.driver.connection().settle(delivery.id, Outcome::Accepted);
                if self.tokens.is_receiver(delivery.link) {
                    let answer = Message::parse(&delivery.payload)
                        .and_then(|message| CbsResponse::decode(&message))
                        .map_err(|error| unavailable(&format!("the answer cannot be read: {error}")))?;
                    self.token_answered(&answer)?;
                }
            }
            Event::AttachRefused { link, error } | Event::Detached { link, error, .. } => {
                let what = if self.link == Some(link) { "the link" } else { "a token link" };
                return Err(judged(control_error(error.as_ref()), &ended(what, error.as_ref())));
            }
            Event::SessionEnded { error, .. } => return Err(lost("the session", error.as_ref())),
            Event::Closed { error, .. } => return Err(lost("the connection", error.as_ref())),
            Event::AttachRequested(request) => {
                let error = Error::from(crate::amqp::Condition::NOT_ALLOWED);
                self.driver.connection().refuse_attach(request.link, error);
            }
            Event::SaslPlain { .. }
            | Event::Settled { .. }
            | Event::WindowOpened { .. }
            | Event::OutputDrained => {}
        }
        Ok(false)
    }

    fn token_answered(&mut self, answer: &CbsResponse) -> Result<(), ProofError> {
        if self.tokens.answered(answer).is_none() || self.session.is_some() {
            return Ok(());
        }
        if !answer.is_ok() {
            let text = format!("{} {}", answer.status_code, &*answer.description);
            return Err(judged(token_error(answer.status_code, &text), &text));
        }
        self.session = self.driver.connection().begin();
        self.session.map(drop).ok_or_else(|| unavailable("the upstream allows no session"))
    }

    fn attach(&mut self, session: SessionId) -> Result<(), ProofError> {
        let channel = Uuid::new_v4();
        let options = convert::link(LinkKind::Telemetry, self.identity, None, None, channel, self.options);
        self.link = self.driver.connection().attach(session, options);
        self.link.map(drop).ok_or_else(|| unavailable("the upstream allows no link"))
    }
}

fn judged(error: ControlError, text: &str) -> ProofError {
    match error {
        ControlError::Unauthorized(_) => ProofError::Refused(text.to_owned()),
        ControlError::Offline
        | ControlError::Timeout
        | ControlError::Refused { .. }
        | ControlError::Unsupported => unavailable(text),
    }
}

fn lost(what: &str, error: Option<&Error>) -> ProofError {
    judged(control_error(error), &ended(what, error))
}

pub(super) fn not_reached(failure: Failure) -> ProofError {
    unavailable(&failure.text)
}

pub(super) fn unavailable(text: &str) -> ProofError {
    ProofError::Unavailable(text.to_owned())
}
