//! Settled messages for one link of the client, which wait until it gives credit: twin answers, notifications, method
//! calls.

use std::collections::VecDeque;

use bytes::Bytes;

use super::turn::Turn;
use crate::amqp::{LinkId, Payload, SendError, SendOptions};

/// Messages of one link in order.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    link: Option<LinkId>,
    waiting: VecDeque<Payload>,
    waiting_bytes: usize,
}

/// The client takes too little of what it asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overflow;

impl Outbox {
    /// The link on which messages go out.
    pub(super) fn link(&self) -> Option<LinkId> {
        self.link
    }

    /// Messages go out on this link from now on, also those that wait.
    pub(super) fn attach<B>(&mut self, turn: &mut Turn<'_, B>, link: LinkId) {
        self.link = Some(link);
        self.resume(turn);
    }

    /// There is no link any more, and nobody who asked.
    pub(super) fn detach(&mut self) {
        *self = Self::default();
    }

    /// Sends a message, now or when there is credit. Without a link it waits for one.
    ///
    /// # Errors
    /// When too much waits; the message is dropped.
    pub(super) fn push<B>(&mut self, turn: &mut Turn<'_, B>, payload: Payload) -> Result<(), Overflow> {
        let bytes = size(&payload);
        let (count_max, bytes_max) = (turn.limits.replies_waiting_max, turn.limits.reply_bytes_max);
        // A single large one always has its turn.
        let fits = self.waiting.is_empty() || self.waiting_bytes + bytes <= bytes_max;
        if self.waiting.len() >= count_max || !fits {
            return Err(Overflow);
        }
        self.waiting_bytes += bytes;
        self.waiting.push_back(payload);
        self.resume(turn);
        Ok(())
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn resume<B>(&mut self, turn: &mut Turn<'_, B>) {
        let Some(link) = self.link else { return };
        while let Some(payload) = self.waiting.front() {
            let options = SendOptions { settled: true, ..SendOptions::default() };
            match turn.engine.send(link, payload.clone(), options) {
                Ok(_) => {}
                Err(error @ SendError::TooLarge { .. }) => {
                    tracing::warn!(code = "EH2013", %error, "A twin answer, notification or method call is dropped");
                }
                Err(error) => {
                    turn.held.add(link, error);
                    return;
                }
            }
            if let Some(sent) = self.waiting.pop_front() {
                self.waiting_bytes -= size(&sent);
            }
        }
        if self.waiting.capacity() > 16 {
            self.waiting = VecDeque::new();
        }
    }
}

fn size(payload: &Payload) -> usize {
    payload.iter().map(Bytes::len).sum()
}
