//! The pump of one module input.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use edgehub_storage::{DropReason, Offset, Outcome, Queue, ReadLimit, Settlement, Store};
use metrics::counter;
use smallvec::SmallVec;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::in_flight::InFlight;
use super::sent::SentMetrics;
use super::{Backoff, Consumer, QueueReader, Queued};
use crate::backend::{self, Command, Deliveries, Settler};
use crate::identity::Identity;

/// Bytes that one read of a queue brings at most (a single larger message is brought alone).
const READ_BYTES_MAX: usize = 1 << 20;

/// How often the queues of an absent module are looked at, so that what expires is counted.
const ABSENT_LOOK_SECS: u64 = 10;

/// How a module's input is served.
#[derive(Debug, Clone, Copy)]
pub struct ModulePumpOptions {
    /// Messages that the module may have without having answered.
    pub window: usize,
    /// How long an answer may take before the messages are offered again.
    pub ack_timeout: Duration,
}

/// Delivers the messages of one endpoint to one input of a module, for as long as the hub runs.
pub struct ModulePump {
    module: Identity,
    input: Arc<str>,
    endpoint_id: Arc<str>,
    store: Store,
    options: ModulePumpOptions,
    consumers: watch::Receiver<Option<Consumer>>,
    queues: watch::Receiver<Vec<(u32, Queue)>>,
    reader: QueueReader,
    backoff: Backoff,
    sent: SentMetrics,
}

/// Why serving a consumer ended.
enum End {
    /// The consumer changed or went, or the queues changed.
    Changed,
    /// The consumer failed to take a message.
    Failed,
    /// The hub is stopping.
    Stopped,
}

/// A delivery without an answer.
struct Delivery {
    lane: usize,
    offset: Offset,
    sent_at: Instant,
    route: usize,
}

impl ModulePump {
    /// A pump for an input of a module. `queues` may change while it runs.
    pub fn new(
        module: Identity,
        input: Arc<str>,
        endpoint_id: Arc<str>,
        store: Store,
        options: ModulePumpOptions,
        consumers: watch::Receiver<Option<Consumer>>,
        queues: watch::Receiver<Vec<(u32, Queue)>>,
    ) -> Self {
        let reader = QueueReader::new(&queues.borrow());
        let backoff = Backoff::new();
        let sent = SentMetrics::new(&module.to_string(), &input);
        Self { module, input, endpoint_id, store, options, consumers, queues, reader, backoff, sent }
    }

    /// Runs until the hub drops its side of the queues.
    pub async fn run(mut self) {
        loop {
            let consumer = self.consumers.borrow_and_update().clone();
            let end = match consumer {
                Some(consumer) => {
                    let home = consumer.home.clone();
                    let served = home.run(async move { (self.serve(&consumer).await, self) }).await;
                    let Some((end, pump)) = served else { return };
                    self = pump;
                    end
                }
                None => self.wait_for_consumer().await,
            };
            match end {
                End::Stopped => return,
                End::Changed => self.reader = QueueReader::new(&self.queues.borrow_and_update()),
                End::Failed => {
                    let pause = self.backoff.fail();
                    counter!(
                        "edgehub_operation_retry_total",
                        "id" => self.endpoint_id.to_string(), "operation" => "SendMessageToModule"
                    )
                    .increment(1);
                    tracing::warn!(
                        module = %self.module, input = &*self.input, pause_secs = pause.as_secs_f32(),
                        "Messages were not acknowledged and are offered again after a pause"
                    );
                    tokio::select! {
                        () = sleep(pause) => {}
                        changed = self.consumers.changed() => if changed.is_err() { return },
                    }
                    self.reader.rewind();
                }
            }
        }
    }

    async fn wait_for_consumer(&mut self) -> End {
        loop {
            tokio::select! {
                changed = self.consumers.changed() => {
                    return if changed.is_ok() { End::Changed } else { End::Stopped };
                }
                changed = self.queues.changed() => {
                    return if changed.is_ok() { End::Changed } else { End::Stopped };
                }
                () = sleep(Duration::from_secs(ABSENT_LOOK_SECS)) => {
                    // Reading settles what has expired; the message itself stays where it is.
                    if let Err(error) = self.reader.read(ReadLimit { count: 1, bytes: 1 }).await {
                        tracing::error!(endpoint = &*self.endpoint_id, %error, "The queue cannot be read");
                    }
                    self.reader.rewind();
                }
            }
        }
    }

    /// Runs on the consumer's thread: what goes to and fro with each message crosses no other one.
    async fn serve(&mut self, consumer: &Consumer) -> End {
        let settler = Settler::new();
        let mut window: InFlight<Delivery> = InFlight::new();
        let mut refused = false;
        // Read, but not sent yet; dropped with the window, for the next read begins at the first open entry.
        let mut ahead: VecDeque<Queued> = VecDeque::new();
        loop {
            if refused && window.len() == 0 {
                return End::Failed;
            }
            let room = self.room(&window, refused);
            if room > 0 && ahead.is_empty() {
                let limit = ReadLimit { count: self.reader.count(room), bytes: READ_BYTES_MAX };
                match self.reader.read(limit).await {
                    Ok(queued) => ahead.extend(queued),
                    Err(error) => {
                        tracing::error!(endpoint = &*self.endpoint_id, %error, "The queue cannot be read");
                        return End::Failed;
                    }
                }
            }
            if room > 0 && !ahead.is_empty() {
                let queued = ahead.drain(..room.min(ahead.len()));
                let deliveries = self.deliveries(queued, &settler, &mut window);
                if deliveries.messages.is_empty() {
                    continue;
                }
                let sending = consumer.mailbox.send(Command::Deliver(deliveries));
                tokio::select! {
                    sent = sending => if sent.is_err() { return self.wait_for_change().await },
                    changed = self.consumers.changed() => {
                        return if changed.is_ok() { End::Changed } else { End::Stopped };
                    }
                }
                // What was answered while the window filled makes room for the next read at once.
                self.settle(settler.take(), &mut window, &mut refused);
                continue;
            }
            let deadline = window.oldest().map(|delivery| delivery.sent_at + self.options.ack_timeout);
            tokio::select! {
                outcomes = settler.settled() => self.settle(outcomes, &mut window, &mut refused),
                () = self.reader.readable(), if room > 0 => {}
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    return End::Failed;
                }
                changed = self.consumers.changed() => {
                    return if changed.is_ok() { End::Changed } else { End::Stopped };
                }
                changed = self.queues.changed() => {
                    return if changed.is_ok() { End::Changed } else { End::Stopped };
                }
            }
        }
    }

    /// How many messages may be sent now. A window that is nearly full is not topped up message by message: each
    /// time costs a wake-up of two threads.
    fn room(&self, window: &InFlight<Delivery>, refused: bool) -> usize {
        let room = self.options.window.saturating_sub(window.len());
        if refused || room < (self.options.window / 4).max(1) { 0 } else { room }
    }

    /// The connection is gone, but the hub has not heard of it yet.
    async fn wait_for_change(&mut self) -> End {
        match self.consumers.changed().await {
            Ok(()) => End::Changed,
            Err(_) => End::Stopped,
        }
    }

    fn deliveries(
        &mut self,
        queued: impl ExactSizeIterator<Item = Queued>,
        settler: &Settler,
        window: &mut InFlight<Delivery>,
    ) -> Deliveries {
        let now = self.store.now();
        let sent_at = Instant::now();
        let mut messages = Vec::with_capacity(queued.len());
        for Queued { lane, priority, entry, message, .. } in queued {
            if entry.is_expired(now) {
                self.reader.settle_one(lane, entry.offset, Outcome::Expired);
                let output = message.output().unwrap_or_default();
                self.sent.dropped(&message.sender.identity, output, "ttl_expiry");
                continue;
            }
            let route = self.sent.route(&message, &priority);
            self.sent.sent(route, now.millis_since(entry.accepted_at));
            let tag = window.push(Delivery { lane, offset: entry.offset, sent_at, route });
            messages.push((tag, message));
        }
        Deliveries { input: self.input.clone(), messages, settler: settler.clone() }
    }

    fn settle(
        &mut self,
        outcomes: Vec<(u64, backend::Outcome)>,
        window: &mut InFlight<Delivery>,
        refused: &mut bool,
    ) {
        let mut settled: SmallVec<[(usize, Settlement); 16]> = SmallVec::new();
        for (tag, outcome) in outcomes {
            let Some(delivery) = window.take(tag) else { continue };
            self.sent.answered(delivery.route, delivery.sent_at.elapsed().as_secs_f64());
            let outcome = match outcome {
                backend::Outcome::Accepted => Outcome::Delivered,
                backend::Outcome::Rejected => {
                    let reason = DropReason::RejectedByReceiver;
                    let (from, output) = self.sent.source(delivery.route);
                    self.sent.dropped(from, output, reason.as_str());
                    tracing::warn!(
                        module = %self.module, input = &*self.input, %from,
                        "The module rejected a message; it is dropped"
                    );
                    Outcome::Dropped(reason)
                }
                // Whatever follows is let through to its answers, then all is offered again from here on.
                backend::Outcome::Released => {
                    *refused = true;
                    continue;
                }
            };
            settled.push((delivery.lane, Settlement { offset: delivery.offset, outcome }));
        }
        if !settled.is_empty() {
            self.backoff.succeed();
        }
        for of_lane in settled.chunk_by(|(a, _), (b, _)| a == b) {
            let settlements: SmallVec<[Settlement; 16]> =
                of_lane.iter().map(|(_, settlement)| *settlement).collect();
            self.reader.settle(of_lane[0].0, &settlements);
        }
    }
}
