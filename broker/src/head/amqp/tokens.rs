//! The tokens that were put on one connection, and the answers to the requests.

use std::collections::VecDeque;
use std::sync::Arc;

use ahash::AHashMap;
use bytes::Bytes;

use super::limits::AmqpLimits;
use crate::amqp::{
    CbsResponse, Connection, LinkId, Message as Encoded, PutToken, SendError, SendOptions, SessionId, Text,
};
use crate::identity::{Identity, SasToken, unix_now_secs};

/// Links on which answers may go out.
const RECEIVERS_MAX: usize = 64;

/// Tokens by the identities that they name. They are kept, not judged: the login at the attach of a link judges.
pub(super) struct Tokens {
    kept: AHashMap<Identity, Arc<str>>,
    kept_bytes: usize,
    of_sasl: Option<(Identity, Arc<str>)>,
    receivers: Vec<LinkId>,
    /// Answers that wait for a link to go out on.
    answers: VecDeque<(SessionId, CbsResponse)>,
    tokens_max: usize,
    bytes_max: usize,
}

impl Tokens {
    pub(super) fn new(limits: &AmqpLimits) -> Self {
        Self {
            kept: AHashMap::new(),
            kept_bytes: 0,
            of_sasl: None,
            receivers: Vec::new(),
            answers: VecDeque::new(),
            tokens_max: limits.tokens_max,
            bytes_max: limits.token_bytes_max,
        }
    }

    /// The last token that names the identity, or that SASL brought for it.
    pub(super) fn get(&self, identity: &Identity) -> Option<&Arc<str>> {
        let of_sasl = || self.of_sasl.as_ref().filter(|(of, _)| of == identity).map(|(_, token)| token);
        self.kept.get(identity).or_else(of_sasl)
    }

    /// SASL proved an identity with this token, which may be that of its device.
    pub(super) fn set_of_sasl(&mut self, identity: Identity, token: Arc<str>) {
        self.of_sasl = Some((identity, token));
    }

    /// Whether one more link for answers may be attached.
    pub(super) fn has_room_for_receiver(&self) -> bool {
        self.receivers.len() < RECEIVERS_MAX
    }

    /// Answers may go out on this link.
    pub(super) fn add_receiver(&mut self, link: LinkId) {
        self.receivers.push(link);
    }

    /// A link is gone.
    pub(super) fn link_gone(&mut self, link: LinkId) {
        self.receivers.retain(|receiver| *receiver != link);
    }

    /// A session is gone.
    pub(super) fn session_gone(&mut self, session: SessionId) {
        self.receivers.retain(|receiver| receiver.session() != session);
    }

    /// Takes a put-token request; the answer waits for [`Tokens::send_answers`]. Gives the identities whose token is
    /// another one now.
    pub(super) fn request(&mut self, session: SessionId, payload: &Bytes) -> Vec<Identity> {
        let (correlation_id, result) = match Encoded::parse(payload) {
            Ok(message) => {
                let (id, request) = PutToken::decode(&message);
                (id, request.map_err(|error| error.to_string()))
            }
            Err(error) => (None, Err(error.to_string())),
        };
        let kept = result.and_then(|request| self.keep(request.token.expose()));
        let (status_code, description) = match &kept {
            Ok(_) => (200, "OK"),
            Err(reason) => (400, reason.as_str()),
        };
        // A client that takes no answers gets none.
        if self.answers.len() < self.tokens_max {
            let description = Text::from(description);
            self.answers.push_back((session, CbsResponse { correlation_id, status_code, description }));
        }
        kept.unwrap_or_default()
    }

    /// Sends the answers that have a link: that of the request's session, else the newest.
    pub(super) fn send_answers(&mut self, engine: &mut Connection) {
        while let Some((session, answer)) = self.answers.front() {
            let same = self.receivers.iter().rev().find(|link| link.session() == *session);
            let Some(link) = same.or(self.receivers.last()) else { return };
            let options = SendOptions { settled: true, ..SendOptions::default() };
            match engine.send(*link, answer.encode(), options) {
                // One that the link cannot take at all must not keep the others.
                Ok(_) | Err(SendError::TooLarge { .. } | SendError::NotAttached) => self.answers.pop_front(),
                Err(
                    SendError::NoCredit
                    | SendError::NoWindow
                    | SendError::Backlog
                    | SendError::TooManyUnsettled,
                ) => return,
            };
        }
    }

    fn keep(&mut self, text: &str) -> Result<Vec<Identity>, String> {
        let token = SasToken::parse(text, unix_now_secs()).map_err(|error| error.to_string())?;
        let identities = token.identities();
        if identities.is_empty() {
            return Err("the token is for no device or module".into());
        }
        let text: Arc<str> = text.into();
        let mut changed = Vec::new();
        for identity in identities {
            let before = self.kept.get(&identity);
            if before.is_some_and(|before| *before == text) {
                continue;
            }
            let before = before.map(|before| before.len());
            let bytes = self.kept_bytes - before.unwrap_or(0) + text.len();
            if (before.is_none() && self.kept.len() >= self.tokens_max) || bytes > self.bytes_max {
                return Err("too many tokens on one connection".into());
            }
            self.kept_bytes = bytes;
            self.kept.insert(identity.clone(), text.clone());
            changed.push(identity);
        }
        Ok(changed)
    }
}
