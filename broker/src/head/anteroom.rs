//! Owns who is connected and has not said yet who it is: a bounded number. When there are too many, whoever has waited
//! longest is sent away, because a client speaks at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use metrics::counter;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Connections that may wait at a time unless another number is given.
pub const WAITING_MAX: usize = 2_048;

/// A room that connections share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Anteroom {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    waiting_max: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    /// By the order of their coming.
    places: BTreeMap<u64, Arc<Notify>>,
}

/// The place of one connection; dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    room: Anteroom,
    number: u64,
    sent_away: Arc<Notify>,
}

impl Default for Anteroom {
    fn default() -> Self {
        Self::new(WAITING_MAX)
    }
}

impl Anteroom {
    /// A room for this many connections, at least one.
    pub fn new(waiting_max: usize) -> Self {
        let waiting = Mutex::default();
        Self { shared: Arc::new(Shared { waiting_max: waiting_max.max(1), waiting }) }
    }

    /// Takes a place; whoever has waited longest loses its own if there is none left.
    pub fn enter(&self) -> Place {
        let sent_away = Arc::new(Notify::new());
        let mut waiting = self.shared.waiting.lock();
        let number = waiting.next;
        waiting.next += 1;
        waiting.places.insert(number, sent_away.clone());
        let crowded = waiting.places.len() > self.shared.waiting_max;
        let oldest = if crowded { waiting.places.pop_first() } else { None };
        drop(waiting);
        if let Some((_, oldest)) = oldest {
            oldest.notify_one();
            counter!("edgehub_connections_refused_total", "listener" => "mqtt", "reason" => "before_login")
                .increment(1);
        }
        Place { room: self.clone(), number, sent_away }
    }
}

impl Place {
    /// Resolves when somebody who came later needs the place. Cancel safe.
    pub async fn sent_away(&self) {
        self.sent_away.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.shared.waiting.lock().places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn who_has_waited_longest_makes_room() {
        let room = Anteroom::new(2);
        let gone = |place: &Place| place.sent_away().now_or_never().is_some();
        let (first, second) = (room.enter(), room.enter());
        assert!(!gone(&first) && !gone(&second));
        let third = room.enter();
        assert!(gone(&first) && !gone(&second) && !gone(&third));
        // A place that is given back is free, one that was lost is not given back twice.
        drop((first, third));
        let fourth = room.enter();
        assert!(!gone(&second) && !gone(&fourth));
        let _fifth = room.enter();
        assert!(gone(&second) && !gone(&fourth));
        assert_eq!(room.shared.waiting.lock().places.len(), 2);
    }
}
