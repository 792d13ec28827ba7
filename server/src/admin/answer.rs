//! Owns what a running hub answers: the JSON forms that hub and command line share.
//!
//! Times are RFC 3339 in UTC on the store's clock, spans are milliseconds. `null` stands for "not known" or "never".

use std::collections::BTreeMap;

use edgehub_storage::{DropReason, Ledger};
use hyper::StatusCode;
use serde::{Deserialize, Serialize};

use super::shown::ShownMessage;

/// `GET /v1/ledger`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerAnswer {
    /// Every queue, in the order of its making.
    pub queues: Vec<QueueAccount>,
    /// The sum of all queues.
    pub total: Account,
    /// The dead letters: accepted are those that queues moved there, delivered those that were put back, dropped
    /// those that were dropped (`purged`) or had to make room (`overflow`), queued those that are there.
    pub dead_letters: Account,
    /// Accepted messages that no route took, since the store was made.
    pub unrouted: u64,
    /// What the accounts of the whole store leave unexplained; 0 in a sound store.
    pub gap: i128,
}

/// A queue and its account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueAccount {
    /// Its name.
    pub queue: String,
    /// What became of its messages.
    pub ledger: Account,
}

/// An account: `accepted = delivered + expired + dropped + dead_lettered + queued + gap`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Messages that were appended.
    pub accepted: u64,
    /// Messages that were delivered.
    pub delivered: u64,
    /// Messages whose time to live ended first.
    pub expired: u64,
    /// Messages that were dropped, by reason; reasons without any are left out.
    pub dropped: BTreeMap<String, u64>,
    /// Messages that were moved to the dead letters.
    pub dead_lettered: u64,
    /// Messages that wait.
    pub queued: u64,
    /// What the equation leaves unexplained; 0 in a sound store.
    pub gap: i128,
}

/// `GET /v1/queues`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuesAnswer {
    /// Every queue, in the order of its making.
    pub queues: Vec<QueueAnswer>,
}

/// `GET /v1/queues/{name}`, and a member of `GET /v1/queues`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueAnswer {
    /// Its name.
    pub queue: String,
    /// The endpoint it belongs to.
    pub endpoint: String,
    /// Its priority; 0 is the most urgent.
    pub priority: u32,
    /// Whether a route leads to its endpoint.
    pub state: QueueState,
    /// Messages that wait.
    pub queued: u64,
    /// How long the oldest of them waits.
    pub oldest_age_ms: Option<u64>,
    /// The first offset that is not finished.
    pub checkpoint: u64,
    /// The offset that the next message takes.
    pub tail: u64,
    /// What became of its messages.
    pub ledger: Account,
}

/// Whether a route leads to a queue's endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QueueState {
    /// A route does.
    Attached,
    /// None does: its messages are kept until their time to live ends.
    Detached,
}

/// `GET /v1/queues/{name}/messages`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessagesAnswer {
    /// The queue.
    pub queue: String,
    /// Messages that wait, the oldest first.
    pub messages: Vec<QueuedMessage>,
    /// Where the next page begins; `null` when this one ends the queue.
    pub next: Option<u64>,
}

/// A message that waits in a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedMessage {
    /// Its place in the queue.
    pub offset: u64,
    /// When it was accepted.
    pub accepted_at: String,
    /// How long it waits.
    pub age_ms: u64,
    /// How long it may still wait; `null` for ever.
    pub time_left_ms: Option<u64>,
    /// The message itself.
    pub message: ShownMessage,
}

/// `POST /v1/queues/{name}/purge`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeAnswer {
    /// The queue.
    pub queue: String,
    /// Whether it was done.
    pub applied: bool,
    /// Messages that were dropped, or would be.
    pub messages: u64,
    /// Only offsets below this one.
    pub before: u64,
}

/// `GET /v1/dead-letters`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLettersAnswer {
    /// The oldest first.
    pub dead_letters: Vec<DeadLetterAnswer>,
    /// The id that the next page begins with; `null` when this one is the last.
    pub next: Option<u64>,
}

/// `GET /v1/dead-letters/{id}`, and a member of `GET /v1/dead-letters`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterAnswer {
    /// Its id.
    pub id: u64,
    /// The queue that it was in.
    pub queue: String,
    /// Its place there.
    pub offset: u64,
    /// Why it could not be delivered.
    pub reason: String,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was accepted.
    pub accepted_at: String,
    /// When it was moved to the dead letters.
    pub dead_lettered_at: String,
    /// How long ago that was.
    pub age_ms: u64,
    /// The message itself.
    pub message: ShownMessage,
}

/// `POST /v1/dead-letters/redrive` and `POST /v1/dead-letters/drop`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LettersAnswer {
    /// Whether it was done.
    pub applied: bool,
    /// Dead letters that were put back or dropped, or would be, by queue.
    pub queues: BTreeMap<String, u64>,
    /// Ids that were named and are not there.
    pub missing: Vec<u64>,
    /// Where the next request goes on, as its `from`; `null` when there are no more.
    pub next: Option<u64>,
    /// What the next request gives as its `below`, so that it does not meet what came meanwhile; `null` for ids.
    pub below: Option<u64>,
}

/// The body of every answer that is not 200.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorAnswer {
    /// What was wrong, why, and what to do.
    pub error: String,
}

/// Why a request is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status of the answer.
    pub status: StatusCode,
    /// What was wrong, why, and what to do.
    pub text: String,
    /// The methods that are allowed, when that is what was wrong.
    pub allow: Option<&'static str>,
}

impl Refusal {
    /// A refusal with this status and text.
    pub fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), allow: None }
    }

    /// The path is there, the method is not.
    pub fn method(allow: &'static str) -> Self {
        let text = format!("this path takes {allow} only");
        Self { status: StatusCode::METHOD_NOT_ALLOWED, text, allow: Some(allow) }
    }
}

impl From<Ledger> for Account {
    fn from(ledger: Ledger) -> Self {
        let dropped =
            DropReason::ALL.iter().map(|reason| (reason.as_str().to_owned(), ledger.dropped(*reason)));
        Self {
            accepted: ledger.accepted(),
            delivered: ledger.delivered(),
            expired: ledger.expired(),
            dropped: dropped.filter(|(_, count)| *count > 0).collect(),
            dead_lettered: ledger.dead_lettered(),
            queued: ledger.queued(),
            gap: ledger.gap(),
        }
    }
}

impl LedgerAnswer {
    /// Whether every account adds up.
    pub fn is_balanced(&self) -> bool {
        let mut accounts =
            self.queues.iter().map(|queue| &queue.ledger).chain([&self.total, &self.dead_letters]);
        self.gap == 0 && accounts.all(|account| account.gap == 0)
    }
}

impl LettersAnswer {
    /// Takes in what another request did.
    pub fn add(&mut self, part: Self) {
        for (queue, count) in part.queues {
            *self.queues.entry(queue).or_default() += count;
        }
        self.missing.extend(part.missing);
        (self.next, self.below) = (part.next, part.below);
    }

    /// All queues together.
    pub fn total(&self) -> u64 {
        self.queues.values().sum()
    }
}

impl Account {
    /// Adds another account to this one.
    pub fn add(&mut self, other: &Self) {
        self.accepted += other.accepted;
        self.delivered += other.delivered;
        self.expired += other.expired;
        for (reason, count) in &other.dropped {
            *self.dropped.entry(reason.clone()).or_default() += count;
        }
        self.dead_lettered += other.dead_lettered;
        self.queued += other.queued;
        self.gap += other.gap;
    }
}
