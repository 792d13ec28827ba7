//! How often the receiver gave each message back.

use std::collections::BTreeMap;

use edgehub_storage::Offset;

/// A message that its receiver gave back this often is given up.
pub const ATTEMPTS_MAX: u32 = 10;

/// Counts for messages that were given back and are not settled. A refused message is offered again before any
/// later one of its queue, so there are never more of them than the window has places, per queue. Counts
/// outlive the connection, not the process: after a restart each message has all its attempts again.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    counts: BTreeMap<(usize, Offset), u32>,
}

impl Attempts {
    /// The message was given back once more.
    pub(crate) fn refused(&mut self, lane: usize, offset: Offset) {
        *self.counts.entry((lane, offset)).or_default() += 1;
    }

    /// How often the message was given back.
    pub(crate) fn count(&self, lane: usize, offset: Offset) -> u32 {
        self.counts.get(&(lane, offset)).copied().unwrap_or_default()
    }

    /// The message is settled.
    pub(crate) fn settled(&mut self, lane: usize, offset: Offset) {
        if !self.counts.is_empty() {
            self.counts.remove(&(lane, offset));
        }
    }

    /// Forgets what was settled by others, such as expired messages: what lies before a queue's checkpoint.
    pub(crate) fn prune(&mut self, checkpoint: impl Fn(usize) -> Offset) {
        self.counts.retain(|(lane, offset), _| *offset >= checkpoint(*lane));
    }

    /// Messages with a count.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.counts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_per_message_and_forgotten_with_it() {
        let mut attempts = Attempts::default();
        for count in 0..ATTEMPTS_MAX {
            assert_eq!(attempts.count(0, Offset::new(7)), count);
            attempts.refused(0, Offset::new(7));
        }
        attempts.refused(1, Offset::new(7));
        attempts.settled(0, Offset::new(7));
        assert_eq!(attempts.count(0, Offset::new(7)), 0);
        assert_eq!(attempts.count(1, Offset::new(7)), 1);
        attempts.prune(|_| Offset::new(8));
        assert_eq!(attempts.len(), 0);
    }
}
