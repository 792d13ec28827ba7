//! Messages on their way to one identity: what waits for credit, what the client has, and what became of each.

use std::collections::VecDeque;

use ahash::AHashMap;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::convert;
use super::turn::Turn;
use crate::amqp::{DeliveryId, LinkId, Outcome as PeerOutcome, SendError, SendOptions};
use crate::backend::{Deliveries, Outcome, Settler, Target};
use crate::message::Message;

/// The messages for the inputs of one module, or for one device.
///
/// They go out in the order in which they came, as far as the client's credit goes. A message that waits is not under
/// way: its settler hears of it when it is sent, so that the time for its answer begins then.
#[derive(Debug, Default)]
pub(super) struct Deliverer {
    link: Option<LinkId>,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    /// Something went back for want of room. What comes next does as well, until nothing waits: it must not overtake.
    sends_back: bool,
    in_flight: AHashMap<DeliveryId, InFlight>,
    /// Those of all that is here, each once: one per input.
    settlers: SmallVec<[Settler; 1]>,
}

#[derive(Debug)]
struct Waiting {
    target: Target,
    settler: Settler,
    tag: u64,
    message: Message,
}

#[derive(Debug)]
struct InFlight {
    settler: Settler,
    tag: u64,
    /// The delivery tag, if it is that of a lock token.
    lock: Option<[u8; 16]>,
}

impl Deliverer {
    /// Messages go out on this link from now on, also those that wait. What the client has from an older one comes
    /// again.
    pub(super) fn attach<B>(&mut self, turn: &mut Turn<'_, B>, link: LinkId) {
        self.give_back_in_flight(turn);
        self.link = Some(link);
        self.resume(turn);
    }

    /// There is no link any more: all that is not answered goes back to where it came from.
    pub(super) fn detach<B>(&mut self, turn: &mut Turn<'_, B>) {
        self.link = None;
        self.give_back_in_flight(turn);
        for Waiting { settler, tag, .. } in std::mem::take(&mut self.waiting) {
            turn.outcomes.push(settler, tag, Outcome::NotOffered);
        }
        (self.waiting_bytes, self.sends_back) = (0, false);
        self.settlers.clear();
    }

    /// Takes messages over. Those that may not even wait go back to where they came from.
    pub(super) fn deliver<B>(&mut self, turn: &mut Turn<'_, B>, deliveries: Deliveries) {
        let Deliveries { target, messages, settler } = deliveries;
        self.forget_abandoned(turn);
        if self.link.is_none() {
            settler.settle(messages.iter().map(|(tag, _)| (*tag, Outcome::NotOffered)));
            return;
        }
        let now = Instant::now();
        if !self.settlers.iter().any(|known| known.same_as(&settler)) {
            self.settlers.push(settler.clone());
        }
        for (tag, message) in messages {
            let waiting = Waiting { target: target.clone(), settler: settler.clone(), tag, message };
            // Nothing overtakes what waits.
            if !self.waiting.is_empty() || self.sends_back || !self.send(turn, &waiting, now) {
                self.keep_back(turn, waiting);
            }
        }
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn resume<B>(&mut self, turn: &mut Turn<'_, B>) {
        let now = Instant::now();
        while let Some(waiting) = self.waiting.pop_front() {
            let bytes = waiting.message.size_bytes();
            if !waiting.settler.is_abandoned() {
                if !self.send(turn, &waiting, now) {
                    self.waiting.push_front(waiting);
                    return;
                }
                waiting.settler.sent(waiting.tag);
            }
            self.waiting_bytes -= bytes;
        }
        self.sends_back = false;
    }

    /// Appends a message to those that wait. One alone may always wait, whatever its size.
    fn keep_back<B>(&mut self, turn: &mut Turn<'_, B>, waiting: Waiting) {
        let bytes = self.waiting_bytes + waiting.message.size_bytes();
        self.sends_back |= !self.waiting.is_empty()
            && (self.waiting.len() >= turn.limits.deliveries_waiting_max
                || bytes > turn.limits.deliveries_waiting_bytes_max);
        if self.sends_back {
            turn.outcomes.push(waiting.settler, waiting.tag, Outcome::NotOffered);
        } else {
            self.waiting_bytes = bytes;
            self.waiting.push_back(waiting);
        }
    }

    /// The client settled a delivery.
    pub(super) fn settled<B>(&mut self, turn: &mut Turn<'_, B>, delivery: DeliveryId, outcome: &PeerOutcome) {
        let Some(InFlight { settler, tag, .. }) = self.in_flight.remove(&delivery) else { return };
        let outcome = match outcome {
            PeerOutcome::Accepted => Outcome::Accepted,
            PeerOutcome::Rejected(_) | PeerOutcome::Modified { undeliverable_here: true, .. } => {
                Outcome::Rejected
            }
            PeerOutcome::Released | PeerOutcome::Modified { undeliverable_here: false, .. } => {
                Outcome::Released
            }
        };
        turn.outcomes.push(settler, tag, outcome);
        // The session may have had too many unsettled deliveries.
        if !self.waiting.is_empty() {
            self.resume(turn);
        }
    }

    /// False when the message has to wait. One whose time has ended by `now` is not sent.
    fn send<B>(&mut self, turn: &mut Turn<'_, B>, waiting: &Waiting, now: Instant) -> bool {
        let Some(link) = self.link else { return false };
        if waiting.message.is_expired(now) {
            turn.outcomes.push(waiting.settler.clone(), waiting.tag, Outcome::Expired);
            return true;
        }
        if turn.engine.credit(link) == 0 {
            return false;
        }
        let Waiting { target, settler, tag, message } = waiting;
        let (payload, lock) = convert::encode(message, target);
        // Tags are unique among what is under way; two messages may carry the same token.
        let lock = lock.filter(|lock| self.in_flight.values().all(|other| other.lock != Some(*lock)));
        let options = SendOptions { tag: lock, ..SendOptions::default() };
        match turn.engine.send(link, payload, options) {
            Ok(delivery) => {
                self.in_flight.insert(delivery, InFlight { settler: settler.clone(), tag: *tag, lock });
                true
            }
            Err(error @ SendError::TooLarge { .. }) => {
                tracing::warn!(code = "EH2012", %error, "The client takes no message of this size");
                turn.outcomes.push(settler.clone(), *tag, Outcome::NotConvertible);
                true
            }
            Err(error) => {
                turn.held.add(link, error);
                false
            }
        }
    }

    fn give_back_in_flight<B>(&mut self, turn: &mut Turn<'_, B>) {
        for (_, InFlight { settler, tag, .. }) in self.in_flight.drain() {
            turn.outcomes.push(settler, tag, Outcome::NotOffered);
        }
    }

    /// Whoever made these deliveries waits for them no longer, and makes them anew.
    fn forget_abandoned<B>(&mut self, turn: &mut Turn<'_, B>) {
        let known = self.settlers.len();
        self.settlers.retain(|settler| !settler.is_abandoned());
        if self.settlers.len() == known {
            return;
        }
        let waiting_bytes = &mut self.waiting_bytes;
        self.waiting.retain(|waiting| {
            let abandoned = waiting.settler.is_abandoned();
            if abandoned {
                *waiting_bytes -= waiting.message.size_bytes();
            }
            !abandoned
        });
        self.sends_back &= !self.waiting.is_empty();
        self.in_flight.retain(|delivery, in_flight| {
            let abandoned = in_flight.settler.is_abandoned();
            if abandoned {
                turn.engine.settle(*delivery, PeerOutcome::Released);
            }
            !abandoned
        });
    }
}
