//! A connection that turns out to be for somebody else than the head: it is handed over at its first token.
//!
//! A stand-in for the cloud hub serves devices and services on one port; only their tokens tell them apart.

use crate::amqp::{Delivery, Driver, LinkId, Message as Encoded, PutToken};

/// Tells from the text of a token that the head is not for it.
pub type IsForeign = fn(&str) -> bool;

/// A connection on which nobody has logged in, with all its events from the foreign token on.
#[derive(Debug)]
pub struct HandedOver<S> {
    /// Transport and engine.
    pub driver: Driver<S>,
    /// The put-token request with the foreign token; neither settled nor answered.
    pub request: Delivery,
    /// Attached links on which answers to such requests may go out.
    pub answer_links: Vec<LinkId>,
}

/// Whether a put-token request brings a token that is not for the head.
pub(super) fn is_foreign(request: &Delivery, is_foreign: IsForeign) -> bool {
    Encoded::parse(&request.payload)
        .ok()
        .and_then(|message| PutToken::decode(&message).1.ok())
        .is_some_and(|request| is_foreign(request.token.expose()))
}
