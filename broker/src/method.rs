//! Direct method calls that wait for the answer of a connected client.

use ahash::AHashMap;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::backend::{CallId, MethodAnswer};
use crate::identity::Identity;

/// Calls that may wait at a time, over all clients.
pub const CALLS_MAX: usize = 4_096;

/// The calls that are out. One lock, held for single look-ups.
#[derive(Debug, Default)]
pub struct Calls {
    waiting: Mutex<AHashMap<CallId, Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    identity: Identity,
    /// The connection that was asked; only it may answer.
    connection: u64,
    answer: oneshot::Sender<MethodAnswer>,
}

impl Calls {
    /// Takes a new call of a client's method in; none when [`CALLS_MAX`] wait. The receiver fails when the connection
    /// ends.
    pub fn begin(
        &self,
        identity: &Identity,
        connection: u64,
    ) -> Option<(CallId, oneshot::Receiver<MethodAnswer>)> {
        let (answer, receiver) = oneshot::channel();
        let id = CallId::new();
        let mut waiting = self.waiting.lock();
        if waiting.len() >= CALLS_MAX {
            // Those whose caller has given up need no place.
            waiting.retain(|_, call| !call.answer.is_closed());
            if waiting.len() >= CALLS_MAX {
                return None;
            }
        }
        waiting.insert(id, Waiting { identity: identity.clone(), connection, answer });
        Some((id, receiver))
    }

    /// Hands an answer to whoever waits for it; false when nobody does, or another client was asked.
    pub fn answered(&self, identity: &Identity, connection: u64, id: CallId, answer: MethodAnswer) -> bool {
        let call = {
            let mut waiting = self.waiting.lock();
            let asked = waiting
                .get(&id)
                .is_some_and(|call| call.connection == connection && call.identity == *identity);
            if asked { waiting.remove(&id) } else { None }
        };
        call.is_some_and(|call| call.answer.send(answer).is_ok())
    }

    /// How many wait for an answer.
    pub fn under_way(&self) -> usize {
        self.waiting.lock().values().filter(|call| !call.answer.is_closed()).count()
    }

    /// Whether a connection has been asked for something that it has not answered.
    pub fn is_asked(&self, identity: &Identity, connection: u64) -> bool {
        let waiting = self.waiting.lock();
        waiting.values().any(|call| {
            call.connection == connection && call.identity == *identity && !call.answer.is_closed()
        })
    }

    /// Forgets a call whose caller has given up.
    pub fn give_up(&self, id: CallId) {
        self.waiting.lock().remove(&id);
    }

    /// Ends all calls that a connection was asked for.
    pub fn connection_ended(&self, identity: &Identity, connection: u64) {
        self.waiting.lock().retain(|_, call| call.connection != connection || call.identity != *identity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    fn answer() -> MethodAnswer {
        MethodAnswer { status: 200, payload: "{}".into() }
    }

    #[tokio::test]
    async fn only_who_was_asked_answers_and_once() {
        let calls = Calls::default();
        let (call, receiver) = calls.begin(&id("d1"), 1).unwrap();
        assert!(!calls.answered(&id("d2"), 1, call, answer()));
        assert!(!calls.answered(&id("d1"), 2, call, answer()));
        assert!(!calls.answered(&id("d1"), 1, CallId::new(), answer()));
        let in_capitals: CallId = call.to_string().to_uppercase().parse().unwrap();
        assert!(calls.answered(&id("d1"), 1, in_capitals, answer()));
        assert_eq!(receiver.await.unwrap(), answer());
        assert!(!calls.answered(&id("d1"), 1, call, answer()));
    }

    #[tokio::test]
    async fn the_end_of_a_connection_ends_its_calls() {
        let calls = Calls::default();
        let (_, of_first) = calls.begin(&id("d1"), 1).unwrap();
        let (second, of_second) = calls.begin(&id("d1"), 2).unwrap();
        calls.connection_ended(&id("d1"), 1);
        assert!(of_first.await.is_err());
        assert!(calls.answered(&id("d1"), 2, second, answer()));
        assert!(of_second.await.is_ok());
    }

    #[test]
    fn calls_are_bounded_and_given_up_ones_need_no_place() {
        let calls = Calls::default();
        let mut receivers: Vec<_> = (0..CALLS_MAX).filter_map(|_| calls.begin(&id("d1"), 1)).collect();
        assert_eq!(receivers.len(), CALLS_MAX);
        assert!(calls.begin(&id("d1"), 1).is_none());
        receivers.pop();
        assert!(calls.begin(&id("d1"), 1).is_some());
        let (first, _receiver) = receivers.swap_remove(0);
        calls.give_up(first);
        assert!(calls.begin(&id("d1"), 1).is_some());
    }
}
