//! The cloud-to-device messages of all devices, and the feedback about them. They live as long as the process.

mod feedback;
mod queue;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_broker::backend::Outcome;
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Properties};
use parking_lot::Mutex;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub use feedback::{FEEDBACK_MAX, Feedback, FeedbackQueue, FeedbackStatus};
pub use queue::{DELIVERIES_MAX, LOCK_SECS, MESSAGES_MAX};

use queue::Queue;

/// Largest message, names and values of its properties included.
pub const MESSAGE_BYTES_MAX: usize = 65_536;

/// Bytes of all messages that wait.
pub const TOTAL_BYTES_MAX: usize = 256 * 1_024 * 1_024;

/// Life of a message that names no time of expiry; the cloud hub's default.
pub const DEFAULT_LIFE_SECS: u64 = 3_600;

/// What the sender of a message wants to hear of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Ack {
    /// Nothing.
    #[default]
    None,
    /// That it was completed.
    Positive,
    /// That it was not.
    Negative,
    /// Either.
    Full,
}

impl Ack {
    /// By its name in `iothub-ack`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "none" => Some(Self::None),
            "positive" => Some(Self::Positive),
            "negative" => Some(Self::Negative),
            "full" => Some(Self::Full),
            _ => None,
        }
    }
}

/// A message to be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct NewMessage {
    /// Named by the feedback.
    pub message_id: Option<String>,
    /// What feedback is wanted.
    pub ack: Ack,
    /// When it expires, in milliseconds since 1970.
    pub expires_millis: Option<i64>,
    /// Application properties, and those system properties that the sender may give.
    pub properties: Properties,
    /// The body.
    pub body: Bytes,
}

impl NewMessage {
    fn size_bytes(&self) -> usize {
        let id = self.message_id.as_ref().map_or(0, String::len);
        self.body.len() + self.properties.size_bytes() + id
    }
}

/// Why a message is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// There is no such device.
    #[error("the device is not registered")]
    NoDevice,
    /// The device's queue has no room.
    #[error("{MESSAGES_MAX} messages wait for the device")]
    QueueFull,
    /// All queues together have no room.
    #[error("{TOTAL_BYTES_MAX} bytes of messages wait")]
    Full,
    /// The message is too large.
    #[error("the message is larger than {MESSAGE_BYTES_MAX} bytes")]
    TooLarge,
    /// It is expired already.
    #[error("the message has expired")]
    Expired,
}

/// The time by both clocks: locks go by one, expiry by the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) unix_millis: i64,
}

impl Now {
    pub(crate) fn get() -> Self {
        let millis = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        Self { instant: Instant::now(), unix_millis: i64::try_from(millis).unwrap_or(i64::MAX) }
    }
}

/// All queues. One lock, held for single steps in memory.
#[derive(Debug, Default)]
pub struct CloudToDevice {
    queues: Mutex<HashMap<Identity, Queue>>,
    feedback: FeedbackQueue,
}

impl CloudToDevice {
    /// Puts a message in line for a device of that generation; messages for an older one are forgotten.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send(
        &self,
        device: &Identity,
        generation_id: &Arc<str>,
        message: NewMessage,
    ) -> Result<(), SendError> {
        let now = Now::get();
        let size_bytes = message.size_bytes();
        if size_bytes > MESSAGE_BYTES_MAX {
            return Err(SendError::TooLarge);
        }
        if message.expires_millis.is_some_and(|at| at <= now.unix_millis) {
            return Err(SendError::Expired);
        }
        self.sweep();
        let mut queues = self.queues.lock();
        if queues.values().map(Queue::size_bytes).sum::<usize>() + size_bytes > TOTAL_BYTES_MAX {
            return Err(SendError::Full);
        }
        let queue = queues.entry(device.clone()).or_insert_with(|| Queue::new(device, generation_id.clone()));
        if queue.generation_id() != generation_id {
            *queue = Queue::new(device, generation_id.clone());
        }
        queue.push(message, Duration::from_secs(DEFAULT_LIFE_SECS), now)
    }

    /// Locks what may go to a connection of the device now, in order.
    pub(crate) fn take(
        &self,
        device: &Identity,
        generation_id: &Arc<str>,
        connection: u64,
    ) -> Vec<(u64, Message)> {
        self.with(device, |queue, now| {
            if queue.generation_id() != generation_id {
                return (Vec::new(), Vec::new());
            }
            let feedback = queue.sweep(now);
            (queue.take(connection, now), feedback)
        })
        .unwrap_or_default()
    }

    /// Takes outcomes of what a connection got.
    pub(crate) fn settle(&self, device: &Identity, connection: u64, outcomes: &[(u64, Outcome)]) {
        self.with(device, |queue, now| {
            let feedback =
                outcomes.iter().filter_map(|(tag, outcome)| queue.settle(connection, *tag, *outcome, now));
            ((), feedback.collect())
        });
    }

    /// Frees what a connection left unsettled.
    pub(crate) fn connection_ended(&self, device: &Identity, connection: u64) {
        self.with(device, |queue, now| ((), queue.connection_ended(connection, now)));
    }

    /// How long until a message of the device expires or is to be offered again.
    pub(crate) fn next_sweep(&self, device: &Identity) -> Option<Duration> {
        self.with(device, |queue, now| (queue.next_sweep(now), Vec::new())).flatten()
    }

    /// Gives up what has expired.
    pub fn sweep(&self) {
        let now = Now::get();
        let feedback = {
            let mut queues = self.queues.lock();
            let feedback: Vec<_> = queues.values_mut().flat_map(|queue| queue.sweep(now)).collect();
            feedback
        };
        self.feedback.push(feedback);
    }

    /// Gives up all messages of a device; their number.
    pub fn purge(&self, device: &Identity) -> usize {
        self.with(device, |queue, now| queue.purge(now)).unwrap_or_default()
    }

    /// Messages that wait for a device, those under way included.
    pub fn waiting(&self, device: &Identity) -> usize {
        self.queues.lock().get(device).map_or(0, Queue::len)
    }

    /// What became of messages.
    pub fn feedback(&self) -> &FeedbackQueue {
        &self.feedback
    }

    fn with<T>(
        &self,
        device: &Identity,
        work: impl FnOnce(&mut Queue, Now) -> (T, Vec<Feedback>),
    ) -> Option<T> {
        let (outcome, feedback) = work(self.queues.lock().get_mut(device)?, Now::get());
        self.feedback.push(feedback);
        Some(outcome)
    }
}

/// A time as the cloud hub writes it; the epoch for one that the calendar does not hold.
pub(crate) fn time_text(unix_millis: i64) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_millis) * 1_000_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
        .format(&Rfc3339)
        .unwrap_or_default()
}
