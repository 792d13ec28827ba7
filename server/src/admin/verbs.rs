//! Owns what each request does to the hub.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::dispatch::split_queue_name;
use edgehub_broker::hub::Hub;
use edgehub_broker::message::SenderCache;
use edgehub_storage::{
    BatchEnd, DeadLetter, DeadLetters, Entry, Offset, Queue, QueueId, ReadLimit, Store, StoreError,
};
use hyper::StatusCode;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;

use super::answer::{
    Account, DeadLetterAnswer, DeadLettersAnswer, LedgerAnswer, LettersAnswer, MessagesAnswer, PurgeAnswer,
    QueueAccount, QueueAnswer, QueueState, QueuedMessage, QueuesAnswer, Refusal,
};
use super::request::{Letters, Page, Purge, Request, Select};
use super::shown::{ShownMessage, shown_time};
use super::status::StatusAnswer;
use super::{IDS_MAX, PAGE_BYTES_MAX, clients, tap};

pub use super::status::Site;

/// Looks at the ledger before a gap is believed: while a message is on its way into the store, the accounts of
/// the store and of its queues differ for a moment.
const GAP_LOOKS_MAX: usize = 50;
/// Pause between two looks.
const GAP_PAUSE: Duration = Duration::from_millis(10);
/// Dead letters that are put back or dropped in one write, in bytes.
const LETTERS_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Carries out requests on a hub.
pub struct Verbs {
    hub: Hub,
    site: Option<Site>,
}

/// What an operator gets.
pub enum Answer {
    /// One JSON value.
    Value(Value),
    /// Lines of JSON, as they come.
    Lines(mpsc::Receiver<Bytes>),
}

/// What is done with dead letters.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Redrive,
    Drop,
}

/// A dead letter that something is to be done with.
struct Chosen {
    id: Offset,
    queue: Arc<str>,
    bytes: usize,
}

/// As many dead letters as one request takes, and where the next one goes on.
struct Part {
    letters: Vec<Chosen>,
    next: Option<u64>,
    below: Option<u64>,
}

impl Verbs {
    /// The verbs of this hub.
    pub fn new(hub: Hub) -> Self {
        Self { hub, site: None }
    }

    /// The same, knowing of the program around the hub.
    pub fn at(self, site: Site) -> Self {
        Self { site: Some(site), ..self }
    }

    /// Does what is asked, and says what came of it.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub async fn carry_out(&self, request: Request) -> Result<Answer, Refusal> {
        if let Request::Tap(order) = &request {
            return Ok(Answer::Lines(tap::open(&self.hub, order)?));
        }
        self.value(request).await.map(Answer::Value)
    }

    async fn value(&self, request: Request) -> Result<Value, Refusal> {
        match request {
            Request::Status => json(&StatusAnswer::of(&self.hub, self.site.as_ref())),
            Request::Clients => json(&clients::list(&self.hub)),
            Request::Client { id } => json(&clients::show(&self.hub, &id)?),
            Request::Kick { id, order } => json(&clients::kick(&self.hub, &id, order)?),
            // Its answer is no single value.
            Request::Tap(_) => Err(Refusal::new(StatusCode::NOT_FOUND, "a tap has lines")),
            Request::Ledger => json(&self.ledger().await),
            Request::Queues => json(&self.queues().await),
            Request::Queue { name } => json(&self.queue_answer(&self.queue(&name)?, &self.detached()).await),
            Request::Messages { queue, page } => json(&self.messages(&self.queue(&queue)?, page).await?),
            Request::Purge { queue, order } => json(&purge(&self.queue(&queue)?, order)),
            Request::DeadLetters { queue, page } => json(&self.dead_letters(queue.as_deref(), page).await?),
            Request::DeadLetter { id, bodies } => json(&self.dead_letter(id, bodies).await?),
            Request::Redrive(letters) => json(&self.decide(letters, Fate::Redrive).await?),
            Request::Drop(letters) => json(&self.decide(letters, Fate::Drop).await?),
        }
    }

    fn store(&self) -> &Store {
        self.hub.store()
    }

    fn letters(&self) -> DeadLetters {
        self.store().dead_letters()
    }

    async fn ledger(&self) -> LedgerAnswer {
        let mut answer = self.ledger_now();
        for _ in 1..GAP_LOOKS_MAX {
            if answer.is_balanced() {
                break;
            }
            tokio::time::sleep(GAP_PAUSE).await;
            answer = self.ledger_now();
        }
        answer
    }

    fn ledger_now(&self) -> LedgerAnswer {
        let hub = self.store().hub_ledger();
        let mut total = Account::default();
        let queues = self.store().queues();
        let queues = queues.iter().map(|queue| {
            let ledger = Account::from(queue.ledger());
            total.add(&ledger);
            QueueAccount { queue: queue.name().to_owned(), ledger }
        });
        LedgerAnswer {
            queues: queues.collect(),
            total,
            dead_letters: Account::from(*hub.dead_letters()),
            unrouted: hub.unrouted(),
            gap: hub.gap(),
        }
    }

    async fn queues(&self) -> QueuesAnswer {
        let detached = self.detached();
        let mut queues = Vec::new();
        for queue in self.store().queues() {
            queues.push(self.queue_answer(&queue, &detached).await);
        }
        QueuesAnswer { queues }
    }

    /// Names of the queues that no route leads to.
    fn detached(&self) -> HashSet<String> {
        let queues = self.hub.status().queues.into_iter();
        queues.filter(|queue| queue.detached).map(|queue| queue.queue).collect()
    }

    async fn queue_answer(&self, queue: &Queue, detached: &HashSet<String>) -> QueueAnswer {
        let (endpoint, priority) = split_queue_name(queue.name());
        // One that cannot be read must not hide the others.
        let oldest = queue.oldest_accepted_at().await.unwrap_or_else(|error| {
            tracing::warn!(code = "EH1201", queue = queue.name(), %error, "The oldest message of a queue cannot be read");
            None
        });
        let ledger = queue.ledger();
        let is_detached = detached.contains(queue.name());
        QueueAnswer {
            queue: queue.name().to_owned(),
            endpoint: endpoint.to_owned(),
            priority,
            state: if is_detached { QueueState::Detached } else { QueueState::Attached },
            queued: ledger.queued(),
            oldest_age_ms: oldest.map(|at| self.store().now().millis_since(at)),
            checkpoint: queue.checkpoint().get(),
            tail: queue.tail().get(),
            ledger: ledger.into(),
        }
    }

    async fn messages(&self, queue: &Queue, page: Page) -> Result<MessagesAnswer, Refusal> {
        let from = page.from.map_or(queue.checkpoint(), Offset::new);
        let batch = queue.peek(from, limit(page)).await.map_err(store)?;
        let mut senders = SenderCache::default();
        let shown = |entry: &Entry| self.queued_message(entry, page.bodies, &mut senders);
        Ok(MessagesAnswer {
            queue: queue.name().to_owned(),
            messages: batch.entries.iter().map(shown).collect(),
            next: (batch.end != BatchEnd::Tail).then(|| batch.next.get()),
        })
    }

    fn queued_message(&self, entry: &Entry, bodies: bool, senders: &mut SenderCache) -> QueuedMessage {
        let now = self.store().now();
        let end = entry.ttl.expires_at(entry.accepted_at);
        QueuedMessage {
            offset: entry.offset.get(),
            accepted_at: shown_time(entry.accepted_at),
            age_ms: now.millis_since(entry.accepted_at),
            time_left_ms: end.map(|end| end.millis_since(now)),
            message: ShownMessage::from_record(&entry.bytes, bodies, senders),
        }
    }

    async fn dead_letters(&self, queue: Option<&str>, page: Page) -> Result<DeadLettersAnswer, Refusal> {
        let queue = queue.map(|name| self.queue(name)).transpose()?.map(|queue| queue.id());
        let (letters, next) = self.list(page.from.unwrap_or(0), limit(page), queue).await?;
        let mut senders = SenderCache::default();
        let shown = |letter| self.letter_answer(letter, page.bodies, &mut senders);
        Ok(DeadLettersAnswer { dead_letters: letters.iter().map(shown).collect(), next })
    }

    async fn dead_letter(&self, id: u64, bodies: bool) -> Result<DeadLetterAnswer, Refusal> {
        match self.letters().get(Offset::new(id)).await.map_err(store)? {
            Some(letter) => Ok(self.letter_answer(&letter, bodies, &mut SenderCache::default())),
            None => Err(Refusal::new(
                StatusCode::NOT_FOUND,
                format!("there is no dead letter {id}; `edgehub dlq list` shows all"),
            )),
        }
    }

    /// Dead letters from an id on, and the id where more begin.
    async fn list(
        &self,
        from: u64,
        limit: ReadLimit,
        queue: Option<QueueId>,
    ) -> Result<(Vec<DeadLetter>, Option<u64>), Refusal> {
        let after = from.checked_sub(1).map(Offset::new);
        let letters = self.letters().list(after, limit, queue).await.map_err(store)?;
        let next = match letters.last() {
            None => None,
            Some(last) => {
                let one = ReadLimit { count: 1, bytes: 1 };
                self.letters().list(Some(last.id), one, queue).await.map_err(store)?.pop()
            }
        };
        Ok((letters, next.map(|letter| letter.id.get())))
    }

    fn letter_answer(
        &self,
        letter: &DeadLetter,
        bodies: bool,
        senders: &mut SenderCache,
    ) -> DeadLetterAnswer {
        DeadLetterAnswer {
            id: letter.id.get(),
            queue: letter.queue_name.to_string(),
            offset: letter.offset.get(),
            reason: letter.reason.as_str().to_owned(),
            attempts: letter.attempts,
            accepted_at: shown_time(letter.accepted_at),
            dead_lettered_at: shown_time(letter.dead_lettered_at),
            age_ms: self.store().now().millis_since(letter.dead_lettered_at),
            message: ShownMessage::from_record(&letter.bytes, bodies, senders),
        }
    }

    async fn decide(&self, letters: Letters, fate: Fate) -> Result<LettersAnswer, Refusal> {
        let limit = ReadLimit { count: IDS_MAX, bytes: LETTERS_BYTES_MAX };
        // Ids are offsets among the dead letters: the next one is the number of those that were ever there.
        let now_below = self.letters().ledger().accepted();
        let (part, missing) = match letters.select {
            Select::Ids(ids) => {
                let (letters, missing) = self.choose(ids).await?;
                (Part { letters, next: None, below: None }, missing)
            }
            Select::Queue { name, from, below } => {
                let queue = Some(self.queue(&name)?.id());
                (self.part(from, below.unwrap_or(now_below), limit, queue).await?, Vec::new())
            }
            Select::All { from, below } => {
                (self.part(from, below.unwrap_or(now_below), limit, None).await?, Vec::new())
            }
        };
        let chosen = part.letters;
        let mut queues = BTreeMap::new();
        for letter in &chosen {
            *queues.entry(letter.queue.to_string()).or_default() += 1;
        }
        if letters.apply {
            self.carry_out_fate(&chosen, fate).await?;
            tracing::info!(letters = chosen.len(), ?fate, "An operator decided on dead letters");
        }
        Ok(LettersAnswer { applied: letters.apply, queues, missing, next: part.next, below: part.below })
    }

    async fn part(
        &self,
        from: u64,
        below: u64,
        limit: ReadLimit,
        queue: Option<QueueId>,
    ) -> Result<Part, Refusal> {
        let (letters, next) = self.list(from, limit, queue).await?;
        let letters = letters.into_iter().filter(|letter| letter.id.get() < below);
        Ok(Part {
            letters: letters.map(Chosen::from).collect(),
            next: next.filter(|next| *next < below),
            below: Some(below),
        })
    }

    /// The letters with these ids, and the ids that are not there. Each counts once.
    async fn choose(&self, ids: Vec<u64>) -> Result<(Vec<Chosen>, Vec<u64>), Refusal> {
        let (mut chosen, mut missing, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        for id in ids.into_iter().filter(|id| seen.insert(*id)) {
            match self.letters().get(Offset::new(id)).await.map_err(store)? {
                Some(letter) => chosen.push(Chosen::from(letter)),
                None => missing.push(id),
            }
        }
        Ok((chosen, missing))
    }

    async fn carry_out_fate(&self, chosen: &[Chosen], fate: Fate) -> Result<(), Refusal> {
        let mut rest = chosen;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |letter: &&Chosen| {
                bytes += letter.bytes;
                bytes <= LETTERS_BYTES_MAX
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (part, others) = rest.split_at(count);
            let ids: Vec<Offset> = part.iter().map(|letter| letter.id).collect();
            match fate {
                Fate::Redrive => self.letters().redrive(&ids).await,
                Fate::Drop => self.letters().discard(&ids).await,
            }
            .map_err(store)?;
            rest = others;
        }
        Ok(())
    }

    /// The queue with this name. It is looked for, never made.
    fn queue(&self, name: &str) -> Result<Queue, Refusal> {
        self.store().queues().into_iter().find(|queue| queue.name() == name).ok_or_else(|| {
            Refusal::new(
                StatusCode::NOT_FOUND,
                "there is no queue of this name; `edgehub queues list` shows all",
            )
        })
    }
}

impl From<DeadLetter> for Chosen {
    fn from(letter: DeadLetter) -> Self {
        Self { id: letter.id, queue: letter.queue_name, bytes: letter.bytes.len() }
    }
}

fn purge(queue: &Queue, order: Purge) -> PurgeAnswer {
    // Taken now, so that what is accepted from here on stays.
    let tail = queue.tail();
    let before = order.before.map_or(tail, Offset::new).min(tail);
    let messages = if order.apply { queue.purge(before) } else { queue.queued_below(before) };
    if order.apply {
        tracing::info!(queue = queue.name(), messages, "An operator purged a queue");
    }
    PurgeAnswer { queue: queue.name().to_owned(), applied: order.apply, messages, before: before.get() }
}

fn limit(page: Page) -> ReadLimit {
    ReadLimit { count: usize::from(page.limit), bytes: PAGE_BYTES_MAX }
}

fn json(answer: &impl Serialize) -> Result<Value, Refusal> {
    serde_json::to_value(answer).map_err(|error| {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the answer is no JSON: {error}"))
    })
}

fn store(error: StoreError) -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, format!("the store: {error}"))
}
