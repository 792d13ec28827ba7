//! Owns the ledger: what became of every accepted entry, and the closed lists of outcomes.

use crate::record::Offset;

/// Why an entry was dropped. The list is closed: nothing else removes an entry without delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// The receiver refused it, and no dead-letter queue took it.
    RejectedByReceiver = 0,
    /// Its sender is no longer in scope.
    OutOfScope = 1,
    /// It names no sender.
    NoIdentity = 2,
    /// It cannot be converted to the receiver's protocol.
    Conversion = 3,
    /// A declared overflow policy made room.
    Overflow = 4,
    /// An operator purged it.
    Purged = 5,
    /// Its stored bytes are damaged or gone.
    Unreadable = 6,
    /// It was tried as often as it may be, and no dead-letter queue took it.
    AttemptsExhausted = 7,
}

impl DropReason {
    /// All reasons.
    pub const ALL: [Self; 8] = [
        Self::RejectedByReceiver,
        Self::OutOfScope,
        Self::NoIdentity,
        Self::Conversion,
        Self::Overflow,
        Self::Purged,
        Self::Unreadable,
        Self::AttemptsExhausted,
    ];

    /// The reason as a metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RejectedByReceiver => "rejected_by_receiver",
            Self::OutOfScope => "out_of_scope",
            Self::NoIdentity => "no_identity",
            Self::Conversion => "conversion",
            Self::Overflow => "overflow",
            Self::Purged => "purged",
            Self::Unreadable => "unreadable",
            Self::AttemptsExhausted => "attempts_exhausted",
        }
    }
}

/// What became of an entry that a caller settles. One more is there: to be moved to the dead letters, with
/// [`Queue::dead_letter`](crate::Queue::dead_letter).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Its receiver has it.
    Delivered,
    /// Its time to live ended.
    Expired,
    /// It was given up.
    Dropped(DropReason),
}

/// An entry and what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Settlement {
    /// The entry.
    pub offset: Offset,
    /// What became of it.
    pub outcome: Outcome,
}

/// How many entries had each outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Outcomes {
    pub(crate) delivered: u64,
    pub(crate) expired: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) dropped: [u64; DropReason::ALL.len()],
}

impl Outcomes {
    pub(crate) fn count(&mut self, outcome: Outcome, entries: u64) {
        let counter = match outcome {
            Outcome::Delivered => &mut self.delivered,
            Outcome::Expired => &mut self.expired,
            Outcome::Dropped(reason) => &mut self.dropped[reason as usize],
        };
        *counter += entries;
    }

    pub(crate) fn total(&self) -> u64 {
        self.delivered + self.expired + self.dead_lettered + self.dropped.iter().sum::<u64>()
    }
}

/// The account of one queue, exact at any time and kept across restarts:
/// `accepted = delivered + expired + dropped + dead-lettered + queued`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ledger {
    pub(crate) accepted: u64,
    pub(crate) outcomes: Outcomes,
    pub(crate) queued: u64,
}

impl Ledger {
    /// Entries that were appended, ever.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Entries that were delivered.
    pub fn delivered(&self) -> u64 {
        self.outcomes.delivered
    }

    /// Entries whose time to live ended first.
    pub fn expired(&self) -> u64 {
        self.outcomes.expired
    }

    /// Entries that were moved to the dead letters.
    pub fn dead_lettered(&self) -> u64 {
        self.outcomes.dead_lettered
    }

    /// Entries dropped for this reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.outcomes.dropped[reason as usize]
    }

    /// Entries dropped for any reason.
    pub fn dropped_total(&self) -> u64 {
        self.outcomes.dropped.iter().sum()
    }

    /// Entries that wait. Counted from positions, not derived from the other numbers.
    pub fn queued(&self) -> u64 {
        self.queued
    }

    /// What the equation leaves unexplained: accepted minus all the rest. 0 in a sound store.
    pub fn gap(&self) -> i128 {
        i128::from(self.accepted) - i128::from(self.outcomes.total()) - i128::from(self.queued)
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.accepted += other.accepted;
        self.queued += other.queued;
        self.outcomes.delivered += other.outcomes.delivered;
        self.outcomes.expired += other.outcomes.expired;
        self.outcomes.dead_lettered += other.outcomes.dead_lettered;
        for (sum, number) in self.outcomes.dropped.iter_mut().zip(other.outcomes.dropped) {
            *sum += number;
        }
    }
}

/// The account of the whole store, kept across restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HubLedger {
    pub(crate) records: u64,
    pub(crate) unrouted: u64,
    pub(crate) references: u64,
    pub(crate) queues: Ledger,
    pub(crate) dead_letters: Ledger,
}

impl HubLedger {
    /// Records that at least one queue took.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Accepted messages that no route took.
    pub fn unrouted(&self) -> u64 {
        self.unrouted
    }

    /// Queue entries that were made from all records; at least [`records`](Self::records).
    pub fn references(&self) -> u64 {
        self.references
    }

    /// The sum of the ledgers of all queues.
    pub fn queues(&self) -> &Ledger {
        &self.queues
    }

    /// The account of the dead letters: accepted are those that queues moved there, delivered those that were
    /// put back into their queue, dropped those that were discarded (`purged`) or had to make room (`overflow`).
    /// They are not part of [`queues`](Self::queues).
    pub fn dead_letters(&self) -> &Ledger {
        &self.dead_letters
    }

    /// What the accounts leave unexplained: entries made of records and of dead letters minus entries accepted by
    /// the queues, entries moved to the dead letters minus those accepted there, and the gaps of all. 0 in a sound
    /// store while no append is under way, and nothing is on its way to the dead letters.
    pub fn gap(&self) -> i128 {
        let made = i128::from(self.references) + i128::from(self.dead_letters.delivered());
        let moved = i128::from(self.queues.dead_lettered()) - i128::from(self.dead_letters.accepted);
        made - i128::from(self.queues.accepted) + moved + self.queues.gap() + self.dead_letters.gap()
    }
}
