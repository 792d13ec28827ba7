//! What became of cloud-to-device messages, for the services that sent them.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;

use super::time_text;

/// Records that wait for a service; the oldest is dropped for the newest.
pub const FEEDBACK_MAX: usize = 10_000;

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum FeedbackStatus {
    /// The device completed it.
    Success,
    /// It expired before the device took it.
    Expired,
    /// It was offered too often.
    DeliveryCountExceeded,
    /// The device rejected it.
    Rejected,
    /// The queue was purged.
    Purged,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feedback {
    /// The id of the message that it is about.
    pub original_message_id: String,
    /// What became of it.
    pub status: FeedbackStatus,
    /// The device.
    pub device_id: Arc<str>,
    /// The device's generation.
    pub generation_id: Arc<str>,
    /// When that was, in milliseconds since 1970.
    pub at_millis: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Record<'a> {
    original_message_id: &'a str,
    enqueued_time_utc: String,
    status_code: FeedbackStatus,
    description: FeedbackStatus,
    device_id: &'a str,
    device_generation_id: &'a str,
}

impl Feedback {
    /// Records as the body of a feedback message: a JSON array.
    pub fn to_json(records: &[Feedback]) -> Vec<u8> {
        let records: Vec<_> = records
            .iter()
            .map(|record| Record {
                original_message_id: &record.original_message_id,
                enqueued_time_utc: time_text(record.at_millis),
                status_code: record.status,
                description: record.status,
                device_id: &record.device_id,
                device_generation_id: &record.generation_id,
            })
            .collect();
        serde_json::to_vec(&records).expect("JSON") // plain data: no maps, no fallible parts
    }
}

/// The records that wait, shared by all receivers: each goes to one of them.
#[derive(Debug, Default)]
pub struct FeedbackQueue {
    waiting: Mutex<VecDeque<Feedback>>,
    arrived: Notify,
}

impl FeedbackQueue {
    /// Puts records in line.
    pub(super) fn push(&self, records: Vec<Feedback>) {
        if records.is_empty() {
            return;
        }
        let mut waiting = self.waiting.lock();
        waiting.extend(records);
        let over = waiting.len().saturating_sub(FEEDBACK_MAX);
        waiting.drain(..over);
        drop(waiting);
        if over > 0 {
            tracing::warn!(
                code = "EH7008",
                dropped = over,
                "nobody takes feedback; the oldest records are dropped"
            );
        }
        self.arrived.notify_one();
    }

    /// Puts records that were not taken back, in front.
    pub fn put_back(&self, records: Vec<Feedback>) {
        let mut waiting = self.waiting.lock();
        for record in records.into_iter().rev() {
            waiting.push_front(record);
        }
        let over = waiting.len().saturating_sub(FEEDBACK_MAX);
        waiting.drain(..over);
        drop(waiting);
        self.arrived.notify_one();
    }

    /// Takes at most `max` records; none when none wait.
    pub fn take(&self, max: usize) -> Vec<Feedback> {
        let mut waiting = self.waiting.lock();
        let count = waiting.len().min(max);
        let taken = waiting.drain(..count).collect();
        let more = !waiting.is_empty();
        drop(waiting);
        if more {
            self.arrived.notify_one();
        }
        taken
    }

    /// Resolves when there may be records. Cancel safe.
    pub async fn arrived(&self) {
        self.arrived.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: usize) -> Feedback {
        Feedback {
            original_message_id: id.to_string(),
            status: FeedbackStatus::DeliveryCountExceeded,
            device_id: "d1".into(),
            generation_id: "7".into(),
            at_millis: 1_700_000_000_000,
        }
    }

    #[test]
    fn the_body_is_that_of_the_cloud() {
        assert_eq!(
            String::from_utf8(Feedback::to_json(&[record(1)])).unwrap(),
            concat!(
                r#"[{"originalMessageId":"1","enqueuedTimeUtc":"2023-11-14T22:13:20Z","#,
                r#""statusCode":"DeliveryCountExceeded","description":"DeliveryCountExceeded","#,
                r#""deviceId":"d1","deviceGenerationId":"7"}]"#
            )
        );
    }

    #[tokio::test]
    async fn the_oldest_go_first_and_are_dropped_first() {
        let queue = FeedbackQueue::default();
        queue.push((0..=FEEDBACK_MAX).map(record).collect());
        queue.arrived().await;
        let taken = queue.take(2);
        assert_eq!(taken[0].original_message_id, "1");
        queue.put_back(taken);
        queue.arrived().await;
        assert_eq!(queue.take(1)[0].original_message_id, "1");
    }
}
