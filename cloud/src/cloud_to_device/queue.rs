//! The cloud-to-device messages that wait for one device: order, locks, delivery count, expiry.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use edgehub_broker::backend::Outcome;
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, PropertyName, Sender, SystemProperty};
use uuid::Uuid;

use super::feedback::{Feedback, FeedbackStatus};
use super::{Ack, NewMessage, Now, SendError, time_text};

/// Messages that wait for one device, those under way included; as many as the cloud hub allows.
pub const MESSAGES_MAX: usize = 50;

/// How often a message is offered before it is given up; the cloud hub's default.
pub const DELIVERIES_MAX: u32 = 10;

/// How long a device may take to settle a message before it is offered again; the cloud hub's default.
pub const LOCK_SECS: u64 = 60;

/// Messages that one connection has unsettled at a time.
const UNDER_WAY_MAX: usize = 16;

/// The queue of one device.
#[derive(Debug)]
pub(super) struct Queue {
    sender: Arc<Sender>,
    generation_id: Arc<str>,
    /// In order of their sequence numbers.
    waiting: VecDeque<Waiting>,
    last_sequence: u64,
    last_tag: u64,
}

#[derive(Debug)]
struct Waiting {
    sequence: u64,
    message: NewMessage,
    enqueued_millis: i64,
    expires_millis: i64,
    deliveries: u32,
    lock: Option<Lock>,
}

/// The right of one connection to settle a message.
#[derive(Debug, Clone, Copy)]
struct Lock {
    tag: u64,
    connection: u64,
    until: Instant,
}

impl Queue {
    pub(super) fn new(identity: &Identity, generation_id: Arc<str>) -> Self {
        let sender = Sender { identity: identity.clone(), origin: Origin::Downstream, model_id: None };
        Self {
            sender: Arc::new(sender),
            generation_id,
            waiting: VecDeque::new(),
            last_sequence: 0,
            last_tag: 0,
        }
    }

    pub(super) fn generation_id(&self) -> &Arc<str> {
        &self.generation_id
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of the messages.
    pub(super) fn size_bytes(&self) -> usize {
        self.waiting.iter().map(|waiting| waiting.message.size_bytes()).sum()
    }

    pub(super) fn push(
        &mut self,
        message: NewMessage,
        default_life: Duration,
        now: Now,
    ) -> Result<(), SendError> {
        if self.waiting.len() >= MESSAGES_MAX {
            return Err(SendError::QueueFull);
        }
        let default_life = i64::try_from(default_life.as_millis()).unwrap_or(i64::MAX);
        self.last_sequence += 1;
        self.waiting.push_back(Waiting {
            sequence: self.last_sequence,
            enqueued_millis: now.unix_millis,
            expires_millis: message
                .expires_millis
                .unwrap_or_else(|| now.unix_millis.saturating_add(default_life)),
            message,
            deliveries: 0,
            lock: None,
        });
        Ok(())
    }

    /// Locks what may go to a connection now, in order.
    pub(super) fn take(&mut self, connection: u64, now: Now) -> Vec<(u64, Message)> {
        let under_way = self.waiting.iter().filter(|waiting| waiting.lock.is_some()).count();
        let room = UNDER_WAY_MAX.saturating_sub(under_way);
        let Self { sender, waiting, last_tag, .. } = self;
        waiting
            .iter_mut()
            .filter(|waiting| waiting.lock.is_none())
            .take(room)
            .map(|waiting| {
                *last_tag += 1;
                let until = now.instant + Duration::from_secs(LOCK_SECS);
                waiting.lock = Some(Lock { tag: *last_tag, connection, until });
                let message = waiting.stamped(sender.clone());
                waiting.deliveries += 1;
                (*last_tag, message)
            })
            .collect()
    }

    /// Takes the outcome of a delivery. One whose lock is gone means nothing.
    pub(super) fn settle(
        &mut self,
        connection: u64,
        tag: u64,
        outcome: Outcome,
        now: Now,
    ) -> Option<Feedback> {
        let place = self.waiting.iter().position(|waiting| {
            waiting.lock.is_some_and(|lock| lock.tag == tag && lock.connection == connection)
        })?;
        match outcome {
            Outcome::Accepted => self.end(place, FeedbackStatus::Success, now),
            Outcome::Rejected | Outcome::NotConvertible => self.end(place, FeedbackStatus::Rejected, now),
            Outcome::Released => self.unlock(place, now),
            // The next look at the queue finds what has expired.
            Outcome::NotOffered | Outcome::Expired => {
                let waiting = &mut self.waiting[place];
                waiting.lock = None;
                waiting.deliveries = waiting.deliveries.saturating_sub(1);
                None
            }
        }
    }

    /// Frees what a connection left unsettled.
    pub(super) fn connection_ended(&mut self, connection: u64, now: Now) -> Vec<Feedback> {
        self.unlock_all(now, |lock| lock.connection == connection)
    }

    /// Gives up what has expired, frees what was not settled in time.
    pub(super) fn sweep(&mut self, now: Now) -> Vec<Feedback> {
        let mut feedback = self.unlock_all(now, |lock| lock.until <= now.instant);
        let mut place = 0;
        while let Some(waiting) = self.waiting.get(place) {
            // What is under way may still be settled.
            if waiting.lock.is_none() && waiting.expires_millis <= now.unix_millis {
                feedback.extend(self.end(place, FeedbackStatus::Expired, now));
            } else {
                place += 1;
            }
        }
        feedback
    }

    /// How long until [`Queue::sweep`] has something to do, from `now`.
    pub(super) fn next_sweep(&self, now: Now) -> Option<Duration> {
        let due = |waiting: &Waiting| match waiting.lock {
            Some(lock) => lock.until.saturating_duration_since(now.instant),
            None => {
                let millis = waiting.expires_millis.saturating_sub(now.unix_millis).max(0);
                Duration::from_millis(millis.unsigned_abs())
            }
        };
        self.waiting.iter().map(due).min()
    }

    /// Gives up everything.
    pub(super) fn purge(&mut self, now: Now) -> (usize, Vec<Feedback>) {
        let count = self.waiting.len();
        let mut feedback = Vec::new();
        while !self.waiting.is_empty() {
            feedback.extend(self.end(0, FeedbackStatus::Purged, now));
        }
        (count, feedback)
    }

    fn unlock_all(&mut self, now: Now, which: impl Fn(Lock) -> bool) -> Vec<Feedback> {
        let mut feedback = Vec::new();
        let mut place = 0;
        while let Some(waiting) = self.waiting.get(place) {
            let len = self.waiting.len();
            if waiting.lock.is_some_and(&which) {
                feedback.extend(self.unlock(place, now));
            }
            place += usize::from(self.waiting.len() == len);
        }
        feedback
    }

    fn unlock(&mut self, place: usize, now: Now) -> Option<Feedback> {
        let waiting = &mut self.waiting[place];
        waiting.lock = None;
        if waiting.deliveries < DELIVERIES_MAX {
            return None;
        }
        self.end(place, FeedbackStatus::DeliveryCountExceeded, now)
    }

    /// Takes a message out; what its sender wants to hear of that.
    fn end(&mut self, place: usize, status: FeedbackStatus, now: Now) -> Option<Feedback> {
        let waiting = self.waiting.remove(place)?;
        let wanted = match (status, waiting.message.ack) {
            (_, Ack::None) => false,
            (_, Ack::Full) => true,
            (FeedbackStatus::Success, ack) => ack == Ack::Positive,
            (_, ack) => ack == Ack::Negative,
        };
        wanted.then(|| Feedback {
            original_message_id: waiting.message.message_id.unwrap_or_default(),
            status,
            device_id: self.sender.identity.device_id().into(),
            generation_id: self.generation_id.clone(),
            at_millis: now.unix_millis,
        })
    }
}

impl Waiting {
    /// The message as it goes to the device.
    fn stamped(&self, sender: Arc<Sender>) -> Message {
        use SystemProperty as P;
        let (sequence, deliveries) = (self.sequence.to_string(), self.deliveries.to_string());
        let (enqueued, expires) = (time_text(self.enqueued_millis), time_text(self.expires_millis));
        let to = format!("/devices/{}/messages/devicebound", sender.identity.device_id());
        let token = uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid();
        let token = token.hyphenated().encode_lower(&mut Uuid::encode_buffer()).to_owned();
        let added = [
            (P::To, Some(to.as_str())),
            (P::MessageId, self.message.message_id.as_deref()),
            (P::SequenceNumber, Some(&*sequence)),
            (P::DeliveryCount, Some(&*deliveries)),
            (P::EnqueuedTime, Some(&*enqueued)),
            (P::AbsoluteExpiryTime, self.message.expires_millis.map(|_| &*expires)),
            (P::LockToken, Some(&*token)),
        ];
        let added = added
            .into_iter()
            .filter_map(|(name, value)| value.map(|value| (PropertyName::System(name), value)));
        let given = self.message.properties.iter().map(|property| (property.name, property.value));
        let properties = Properties::copied_from(given.chain(added));
        Message::new(sender, properties, self.message.body.clone())
    }
}

#[cfg(test)]
mod tests {
    use edgehub_broker::message::Value;

    use super::*;

    fn now() -> Now {
        Now { instant: Instant::now(), unix_millis: 1_700_000_000_000 }
    }

    fn later(now: Now, secs: u64) -> Now {
        Now {
            instant: now.instant + Duration::from_secs(secs),
            unix_millis: now.unix_millis + 1_000 * i64::try_from(secs).unwrap(),
        }
    }

    fn queue() -> Queue {
        Queue::new(&Identity::device("d1").unwrap(), "7".into())
    }

    fn message(id: &str, ack: Ack) -> NewMessage {
        NewMessage {
            message_id: Some(id.into()),
            ack,
            expires_millis: None,
            properties: Properties::copied_from([(PropertyName::Application("a"), "1")]),
            body: "x".into(),
        }
    }

    const LIFE: Duration = Duration::from_secs(3_600);

    fn text(message: &Message, property: SystemProperty) -> String {
        match message.properties.system(property) {
            Value::Text(text) => text.to_owned(),
            Value::Null | Value::Absent => panic!("{property:?} is missing"),
        }
    }

    #[test]
    fn messages_are_offered_in_order_and_again_after_release_or_lock_timeout() {
        let (mut queue, now) = (queue(), now());
        for id in ["m1", "m2"] {
            queue.push(message(id, Ack::Full), LIFE, now).unwrap();
        }
        let taken = queue.take(1, now);
        assert_eq!(taken.len(), 2);
        let first = &taken[0].1;
        assert_eq!(text(first, SystemProperty::MessageId), "m1");
        assert_eq!(text(first, SystemProperty::SequenceNumber), "1");
        assert_eq!(text(first, SystemProperty::DeliveryCount), "0");
        assert_eq!(text(first, SystemProperty::To), "/devices/d1/messages/devicebound");
        assert_eq!(text(first, SystemProperty::LockToken).len(), 36);
        assert_eq!(first.properties.application(|name| name == "a"), Value::Text("1"));
        assert!(queue.take(1, now).is_empty());
        assert_eq!(queue.settle(1, taken[0].0, Outcome::Released, now), None);
        let again = queue.take(1, now);
        assert_eq!(text(&again[0].1, SystemProperty::DeliveryCount), "1");
        // The lock of the second runs out; its late settlement means nothing, nor does that of another connection.
        let now = later(now, LOCK_SECS);
        assert_eq!(queue.sweep(now), []);
        assert_eq!(queue.settle(1, taken[1].0, Outcome::Accepted, now), None);
        let again = queue.take(1, now);
        assert_eq!(again.len(), 2);
        assert_eq!(queue.settle(2, again[1].0, Outcome::Accepted, now), None);
        let done = queue.settle(1, again[1].0, Outcome::Accepted, now).unwrap();
        assert_eq!((&*done.original_message_id, done.status), ("m2", FeedbackStatus::Success));
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn feedback_is_what_was_asked_for() {
        for (ack, outcome, status) in [
            (Ack::None, Outcome::Accepted, None),
            (Ack::None, Outcome::Rejected, None),
            (Ack::Positive, Outcome::Accepted, Some(FeedbackStatus::Success)),
            (Ack::Positive, Outcome::Rejected, None),
            (Ack::Negative, Outcome::Accepted, None),
            (Ack::Negative, Outcome::Rejected, Some(FeedbackStatus::Rejected)),
            (Ack::Negative, Outcome::NotConvertible, Some(FeedbackStatus::Rejected)),
            (Ack::Full, Outcome::Accepted, Some(FeedbackStatus::Success)),
            (Ack::Full, Outcome::Rejected, Some(FeedbackStatus::Rejected)),
        ] {
            let (mut queue, now) = (queue(), now());
            queue.push(message("m", ack), LIFE, now).unwrap();
            let tag = queue.take(1, now)[0].0;
            let feedback = queue.settle(1, tag, outcome, now);
            assert_eq!(feedback.map(|feedback| feedback.status), status, "{ack:?} {outcome:?}");
            assert_eq!(queue.len(), 0);
        }
    }

    #[test]
    fn a_message_that_is_never_taken_is_given_up() {
        let (mut queue, now) = (queue(), now());
        queue.push(message("m", Ack::Negative), LIFE, now).unwrap();
        // Not having been offered at all costs nothing.
        for _ in 0..2 * DELIVERIES_MAX {
            let tag = queue.take(1, now)[0].0;
            assert_eq!(queue.settle(1, tag, Outcome::NotOffered, now), None);
        }
        for _ in 1..DELIVERIES_MAX {
            queue.take(1, now);
            assert_eq!(queue.connection_ended(2, now), []);
            assert_eq!(queue.connection_ended(1, now), []);
        }
        queue.take(1, now);
        let feedback = queue.connection_ended(1, now);
        assert_eq!(feedback[0].status, FeedbackStatus::DeliveryCountExceeded);
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn messages_expire_but_not_under_way() {
        let (mut queue, now) = (queue(), now());
        queue.push(message("m1", Ack::Full), Duration::from_secs(10), now).unwrap();
        let own = NewMessage { expires_millis: Some(now.unix_millis + 5_000), ..message("m2", Ack::Full) };
        queue.push(own, LIFE, now).unwrap();
        assert_eq!(queue.next_sweep(now), Some(Duration::from_secs(5)));
        let under_way = queue.take(1, now);
        assert_eq!(text(&under_way[1].1, SystemProperty::AbsoluteExpiryTime), "2023-11-14T22:13:25Z");
        queue.settle(1, under_way[0].0, Outcome::Released, now);
        let now = later(now, 20);
        let feedback = queue.sweep(now);
        assert_eq!(feedback.len(), 1);
        assert_eq!((&*feedback[0].original_message_id, feedback[0].status), ("m1", FeedbackStatus::Expired));
        assert!(queue.settle(1, under_way[1].0, Outcome::Accepted, now).is_some());
    }

    #[test]
    fn the_queue_is_bounded_and_can_be_purged() {
        let (mut queue, now) = (queue(), now());
        for _ in 0..MESSAGES_MAX {
            queue.push(message("m", Ack::Negative), LIFE, now).unwrap();
        }
        assert_eq!(queue.push(message("m", Ack::None), LIFE, now), Err(SendError::QueueFull));
        assert_eq!(queue.take(1, now).len(), UNDER_WAY_MAX);
        let (purged, feedback) = queue.purge(now);
        assert_eq!((purged, feedback.len()), (MESSAGES_MAX, MESSAGES_MAX));
        assert_eq!((queue.len(), queue.size_bytes()), (0, 0));
    }
}
