//! The pump of one module input.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use edgehub_storage::{DeadLetterReason, Entry, Outcome, Queue, ReadLimit, Settlement, Store};
use metrics::counter;
use smallvec::SmallVec;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::attempts::{ATTEMPTS_MAX, Attempts};
use super::in_flight::InFlight;
use super::losses::{Loss, Losses};
use super::pace::Pace;
use super::sent::{Run, SentMetrics};
use super::{Backoff, BackoffOptions, Consumer, QueueReader, Queued};
use crate::backend::{self, Command, Deliveries, Settler, Target};
use crate::head::warn_limit::WarnLimit;
use crate::identity::Identity;

/// Bytes that one read of a queue brings at most (a single larger message is brought alone).
const READ_BYTES_MAX: usize = 1 << 20;

/// How long a queue that could not be read is left alone.
const UNREADABLE_PAUSE_SECS: u64 = 1;

static WARNINGS: WarnLimit = WarnLimit::new();

/// How a module's input is served.
#[derive(Debug, Clone, Copy)]
pub struct ModulePumpOptions {
    /// Messages that the module may have without having answered; up to 8 times as many while it answers fast, unless it
    /// is one.
    pub window: usize,
    /// How long an answer may take before the messages are offered again.
    pub ack_timeout: Duration,
    /// Pauses before messages that were not taken are offered again.
    pub backoff: BackoffOptions,
    /// The part of the messages that less urgent queues are guaranteed, in percent; at most
    /// [`LOWER_SHARE_PERCENT_MAX`](super::LOWER_SHARE_PERCENT_MAX).
    pub lower_share_percent: u8,
}

impl Default for ModulePumpOptions {
    fn default() -> Self {
        Self {
            window: 16,
            ack_timeout: Duration::from_secs(30),
            backoff: BackoffOptions::default(),
            lower_share_percent: 0,
        }
    }
}

/// Delivers the messages of one endpoint to one input of a module, for as long as the hub runs.
///
/// A message that the module gives back is offered again after a pause, before any later one of its queue. After
/// [`ATTEMPTS_MAX`] times, or when the module rejects it, it goes to the dead letters. A module that does not
/// answer, or leaves, refuses nothing: its messages are offered again for as long as they live.
pub struct ModulePump {
    module: Identity,
    input: Arc<str>,
    endpoint_id: Arc<str>,
    store: Store,
    options: ModulePumpOptions,
    consumers: watch::Receiver<Option<Consumer>>,
    queues: watch::Receiver<Vec<(u32, Queue)>>,
    reader: QueueReader,
    /// Read, but not sent yet.
    ahead: VecDeque<Queued>,
    backoff: Backoff,
    attempts: Attempts,
    hold: Option<Hold>,
    sent: SentMetrics,
    losses: Arc<Losses>,
}

/// A pause of the queues that are as urgent as `level` or less; more urgent ones go on.
#[derive(Debug, Clone, Copy)]
struct Hold {
    level: u32,
    until: Instant,
}

/// Why serving a consumer ended.
enum End {
    /// The consumer changed or went.
    Changed,
    /// No route leads to the endpoint any more, or the hub is stopping.
    Stopped,
}

/// A delivery without an answer.
struct Delivery {
    lane: usize,
    level: u32,
    entry: Entry,
    sent_at: Instant,
    route: usize,
}

/// What one connection has without having answered.
struct Window {
    settler: Settler,
    deliveries: InFlight<Delivery>,
    pace: Pace,
}

impl Window {
    fn new(first: usize) -> Self {
        Self { settler: Settler::new(), deliveries: InFlight::new(), pace: Pace::new(first) }
    }

    /// How many messages may be sent now.
    fn room(&self) -> usize {
        self.pace.room(self.deliveries.len())
    }

    /// Whether something of this priority, or of a less urgent one, is under way.
    fn has_from(&self, level: u32) -> bool {
        self.deliveries.iter().any(|delivery| delivery.level >= level)
    }

    /// What the head kept back at first has its time from when it was sent.
    fn note_sent(&mut self) {
        for (tag, sent_at) in self.settler.take_sent() {
            if let Some(delivery) = self.deliveries.get_mut(tag) {
                delivery.sent_at = sent_at;
            }
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.settler.abandon();
    }
}

impl ModulePump {
    /// A pump for an input of a module. `queues` may change while it runs.
    #[expect(clippy::too_many_arguments, reason = "each is a part of its own, named where it is given")]
    pub(crate) fn new(
        module: Identity,
        input: Arc<str>,
        endpoint_id: Arc<str>,
        store: Store,
        options: ModulePumpOptions,
        consumers: watch::Receiver<Option<Consumer>>,
        queues: watch::Receiver<Vec<(u32, Queue)>>,
        losses: Arc<Losses>,
    ) -> Self {
        let reader = QueueReader::new(&queues.borrow(), options.lower_share_percent);
        let backoff = Backoff::with(options.backoff);
        let sent = SentMetrics::new(&module.to_string(), &input);
        Self {
            module,
            input,
            endpoint_id,
            store,
            options,
            consumers,
            queues,
            reader,
            ahead: VecDeque::new(),
            backoff,
            attempts: Attempts::default(),
            hold: None,
            sent,
            losses,
        }
    }

    /// Runs until the hub drops its side of the queues.
    pub async fn run(mut self) {
        loop {
            // Another pump may serve the endpoint by now.
            if self.queues.has_changed().is_err() {
                return;
            }
            let consumer = self.consumers.borrow_and_update().clone();
            let end = match consumer {
                Some(consumer) => {
                    let home = consumer.home.clone();
                    let served = home.run(async move { (self.serve(&consumer).await, self) }).await;
                    let Some((end, pump)) = served else { return };
                    self = pump;
                    end
                }
                None => self.wait_for_change().await,
            };
            match end {
                End::Stopped => return,
                End::Changed => self.begin_anew(),
            }
        }
    }

    /// What is not settled is read again; a new connection does not wait for the pauses of the one before.
    fn begin_anew(&mut self) {
        self.ahead.clear();
        self.reader.rewind();
        self.hold = None;
    }

    /// Nobody is there to send to.
    async fn wait_for_change(&mut self) -> End {
        loop {
            tokio::select! {
                changed = self.consumers.changed() => return ended(&changed),
                changed = self.queues.changed() => match changed {
                    Ok(()) => self.replace_queues(),
                    Err(_) => return End::Stopped,
                }
            }
        }
    }

    /// What is under way stays under way; what was read ahead is read again, in the new order.
    fn replace_queues(&mut self) {
        self.forget_ahead();
        self.reader.replace(&self.queues.borrow_and_update());
    }

    fn forget_ahead(&mut self) {
        for queued in self.ahead.drain(..) {
            self.reader.rewind_to(queued.lane, queued.entry.offset);
        }
    }

    /// Runs on the consumer's thread: what goes to and fro with each message crosses no other one.
    async fn serve(&mut self, consumer: &Consumer) -> End {
        let mut window = Window::new(self.options.window);
        loop {
            self.lift_hold(&window);
            let above = self.hold.map(|hold| hold.level);
            let room = window.room();
            if room > 0 && self.ahead.is_empty() {
                let limit = ReadLimit { count: self.reader.count(room), bytes: READ_BYTES_MAX };
                match self.reader.read(limit, above).await {
                    Ok(queued) => self.ahead.extend(queued),
                    Err(error) => {
                        tracing::error!(code = "EH4007", endpoint = &*self.endpoint_id, %error, "The queue cannot be read");
                        let pause = Duration::from_secs(UNREADABLE_PAUSE_SECS);
                        self.hold = Some(Hold { level: 0, until: Instant::now() + pause });
                        continue;
                    }
                }
            }
            if room > 0 && !self.ahead.is_empty() {
                // A place in the mailbox first: what expires while it is full is not sent.
                tokio::select! {
                    permit = consumer.mailbox.reserve() => match permit {
                        Ok(permit) => {
                            let deliveries = self.deliveries(room, &mut window);
                            if !deliveries.messages.is_empty() {
                                permit.send(Command::Deliver(deliveries));
                            }
                        }
                        Err(_) => return self.wait_for_change().await,
                    },
                    changed = self.consumers.changed() => return ended(&changed),
                    changed = self.queues.changed() => match changed {
                        Ok(()) => self.replace_queues(),
                        Err(_) => return End::Stopped,
                    },
                }
                // What was answered while the window filled makes room for the next read at once.
                let outcomes = window.settler.take();
                self.settle(outcomes, &mut window);
                continue;
            }
            let late_at = window.deliveries.oldest().map(|oldest| oldest.sent_at + self.options.ack_timeout);
            // A pause that is over waits for the answers of what is under way, and for nothing else: if it ended since it
            // was looked at, it is looked at again at once.
            let lift_at = self
                .hold
                .filter(|hold| hold.until > Instant::now() || !window.has_from(hold.level))
                .map(|hold| hold.until);
            let wake_at = late_at.into_iter().chain(lift_at).min();
            tokio::select! {
                outcomes = window.settler.settled() => self.settle(outcomes, &mut window),
                () = self.reader.readable(above), if room > 0 => {}
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {
                    window.note_sent();
                    let oldest = window.deliveries.oldest().map(|oldest| oldest.sent_at);
                    if oldest.is_some_and(|sent_at| sent_at + self.options.ack_timeout <= Instant::now()) {
                        self.give_up(&mut window);
                    }
                }
                changed = self.consumers.changed() => return ended(&changed),
                changed = self.queues.changed() => match changed {
                    Ok(()) => self.replace_queues(),
                    Err(_) => return End::Stopped,
                },
            }
        }
    }

    /// The next messages, as far as they have not expired meanwhile; at most `room` are looked at. Each says when it will.
    fn deliveries(&mut self, room: usize, window: &mut Window) -> Deliveries {
        let now = self.store.now();
        let sent_at = Instant::now();
        let count = room.min(self.ahead.len());
        let mut messages = Vec::with_capacity(count);
        let mut run = Run::new();
        for Queued { lane, level, priority, entry, mut message, .. } in self.ahead.drain(..count) {
            let expires_at = entry.ttl.expires_at(entry.accepted_at);
            if expires_at.is_some_and(|at| at <= now) {
                let output = message.output().unwrap_or_default();
                self.losses.tell(Loss::Expired, &message.sender.identity, output, || {
                    self.reader.settle_one(lane, entry.offset, Outcome::Expired)
                });
                continue;
            }
            let left = expires_at.map(|at| Duration::from_millis(at.millis_since(now)));
            message.expires_at = left.and_then(|left| sent_at.checked_add(left));
            let route = self.sent.route(&message, &priority);
            if let Some(((route, in_hub_millis), count)) =
                run.add((route, now.millis_since(entry.accepted_at)))
            {
                self.sent.sent_many(route, in_hub_millis, count);
            }
            window.pace.sent(entry.bytes.len());
            let tag = window.deliveries.push(Delivery { lane, level, entry, sent_at, route });
            messages.push((tag, message));
        }
        if let Some(((route, in_hub_millis), count)) = run.end() {
            self.sent.sent_many(route, in_hub_millis, count);
        }
        Deliveries { target: Target::Input(self.input.clone()), messages, settler: window.settler.clone() }
    }

    fn settle(&mut self, outcomes: Vec<(u64, backend::Outcome)>, window: &mut Window) {
        let mut delivered: SmallVec<[(usize, Settlement); 16]> = SmallVec::new();
        // The most urgent priority of which something came back.
        let mut returned: Option<u32> = None;
        let now = Instant::now();
        let mut run = Run::new();
        for (tag, outcome) in outcomes {
            let Some(delivery) = window.deliveries.take(tag) else { continue };
            let after = now.saturating_duration_since(delivery.sent_at);
            window.pace.answered(delivery.entry.bytes.len(), after);
            if let Some(((route, after), count)) = run.add((delivery.route, after)) {
                self.sent.answered_many(route, after.as_secs_f64(), count);
            }
            let (lane, offset) = (delivery.lane, delivery.entry.offset);
            let came_back = match outcome {
                backend::Outcome::Accepted => {
                    self.attempts.settled(lane, offset);
                    delivered.push((lane, Settlement { offset, outcome: Outcome::Delivered }));
                    false
                }
                backend::Outcome::Rejected => {
                    !self.dead_letter(&delivery, DeadLetterReason::RejectedByReceiver)
                }
                backend::Outcome::NotConvertible => {
                    !self.dead_letter(&delivery, DeadLetterReason::Conversion)
                }
                backend::Outcome::Released => {
                    let spent = self.attempts.count(lane, offset) + 1 >= ATTEMPTS_MAX;
                    if spent {
                        !self.dead_letter(&delivery, DeadLetterReason::AttemptsExhausted)
                    } else {
                        self.attempts.refused(lane, offset);
                        true
                    }
                }
                backend::Outcome::NotOffered => true,
                backend::Outcome::Expired => {
                    self.expired(&delivery);
                    false
                }
            };
            if came_back {
                returned = Some(returned.map_or(delivery.level, |level| level.min(delivery.level)));
            }
        }
        if let Some(((route, after), count)) = run.end() {
            self.sent.answered_many(route, after.as_secs_f64(), count);
        }
        if !delivered.is_empty() {
            self.backoff.succeed();
        }
        for of_lane in delivered.chunk_by(|(a, _), (b, _)| a == b) {
            let settlements: SmallVec<[Settlement; 16]> =
                of_lane.iter().map(|(_, settlement)| *settlement).collect();
            self.reader.settle(of_lane[0].0, &settlements);
        }
        if let Some(level) = returned.filter(|level| self.hold.is_none_or(|hold| *level < hold.level)) {
            self.hold(level, "Messages came back and are offered again after a pause");
        }
    }

    /// The time of a message ended while the head kept it back.
    fn expired(&mut self, delivery: &Delivery) {
        let (lane, offset) = (delivery.lane, delivery.entry.offset);
        let (from, output) = self.sent.source(delivery.route);
        self.losses
            .tell(Loss::Expired, from, output, || self.reader.settle_one(lane, offset, Outcome::Expired));
        self.attempts.settled(lane, offset);
    }

    /// The message goes to the dead letters; false if they cannot take it now.
    fn dead_letter(&mut self, delivery: &Delivery, reason: DeadLetterReason) -> bool {
        let (lane, offset) = (delivery.lane, delivery.entry.offset);
        let attempts = self.attempts.count(lane, offset) + 1;
        let (from, output) = self.sent.source(delivery.route);
        if let Some(others) = WARNINGS.admit() {
            tracing::warn!(
                code = "EH4008", module = %self.module, input = &*self.input, %from, reason = reason.as_str(), attempts, others,
                "The module does not take a message; it goes to the dead letters"
            );
        }
        let taken = self.losses.dead_letter(reason, from, output, || {
            self.reader.dead_letter(lane, &delivery.entry, reason, attempts)
        });
        if taken {
            self.attempts.settled(lane, offset);
        }
        taken
    }

    /// The module did not answer in time: what it has counts as not sent. That is no refusal by the module, so no
    /// message comes nearer to the dead letters by it.
    fn give_up(&mut self, window: &mut Window) {
        let level = window.deliveries.iter().map(|delivery| delivery.level).min().unwrap_or_default();
        *window = Window::new(self.options.window);
        self.forget_ahead();
        self.reader.rewind();
        self.hold(level, "Messages were not acknowledged in time and are offered again after a pause");
    }

    fn hold(&mut self, level: u32, what: &'static str) {
        let pause = self.backoff.fail();
        let until = Instant::now() + pause;
        let level = self.hold.map_or(level, |hold| hold.level.min(level));
        self.hold = Some(Hold { level, until });
        self.forget_ahead();
        self.attempts.prune(|lane| self.reader.checkpoint(lane));
        counter!(
            "edgehub_operation_retry_total",
            "id" => self.endpoint_id.to_string(), "operation" => "SendMessageToModule"
        )
        .increment(1);
        if let Some(others) = WARNINGS.admit() {
            tracing::warn!(
                code = "EH4009", module = %self.module, input = &*self.input, pause_secs = pause.as_secs_f32(), others, "{what}"
            );
        }
    }

    /// Ends a pause that is over, once everything of its queues that was under way is answered; then they are read
    /// again from the first entry that is not settled.
    fn lift_hold(&mut self, window: &Window) {
        let Some(Hold { level, until }) = self.hold else { return };
        if Instant::now() >= until && !window.has_from(level) {
            self.hold = None;
            self.reader.rewind_from(level);
        }
    }
}

fn ended(changed: &Result<(), watch::error::RecvError>) -> End {
    if changed.is_ok() { End::Changed } else { End::Stopped }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use edgehub_storage::{Offset, Store, StoreOptions, Ttl};

    use super::*;

    fn delivery(sent_at: Instant) -> Delivery {
        let accepted_at = Store::open(StoreOptions::memory()).unwrap().now();
        let entry =
            Entry { offset: Offset::new(0), bytes: bytes::Bytes::new(), accepted_at, ttl: Ttl::Infinite };
        Delivery { lane: 0, level: 0, entry, sent_at, route: 0 }
    }

    #[tokio::test(start_paused = true)]
    async fn what_waited_for_credit_has_its_time_from_when_it_was_sent() {
        let mut window = Window::new(16);
        let handed_over = Instant::now();
        let tags: Vec<u64> = (0..3).map(|_| window.deliveries.push(delivery(handed_over))).collect();
        tokio::time::advance(Duration::from_secs(20)).await;
        window.settler.sent(tags[0]);
        window.settler.sent(tags[1]);
        // An answered one leaves no mark behind.
        window.settler.settle([(tags[1], backend::Outcome::Accepted)]);
        tokio::time::advance(Duration::from_secs(15)).await;
        window.note_sent();
        let sent: Vec<_> = window.deliveries.iter().map(|delivery| delivery.sent_at - handed_over).collect();
        assert_eq!(sent, [20, 0, 0].map(Duration::from_secs));
        assert!(window.settler.take_sent().is_empty());
        let settler = window.settler.clone();
        assert!(!settler.is_abandoned());
        drop(window);
        assert!(settler.is_abandoned(), "the head need not send what it kept back");
    }
}
