//! Owns the verb `tap`: messages as they are accepted, a bounded sample, one JSON object per line.

use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::dispatch::{Tap, TapError, TapOptions, Tapped};
use edgehub_broker::hub::Hub;
use edgehub_broker::message::SenderCache;
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::answer::Refusal;
use super::shown::ShownMessage;

/// Messages of one tap, at most.
pub const TAP_MESSAGES_MAX: u32 = 10_000;
/// Longest time of one tap; a connection lives little longer.
pub const TAP_SECS_MAX: u32 = 280;
/// Lines that wait for their reader.
const LINES_WAITING_MAX: usize = 16;

/// What is looked at, and how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapOrder {
    /// A condition as behind `WHERE`; none takes every message.
    pub condition: Option<String>,
    /// A source as behind `FROM`; none is `/messages/*`.
    pub from: Option<String>,
    /// So many messages at most, 1 to [`TAP_MESSAGES_MAX`].
    pub limit: u32,
    /// So long at most, 1 to [`TAP_SECS_MAX`].
    pub seconds: u32,
    /// Whether bodies are shown.
    pub bodies: bool,
}

impl Default for TapOrder {
    fn default() -> Self {
        Self { condition: None, from: None, limit: 20, seconds: 30, bodies: false }
    }
}

/// One line of `GET /v1/tap`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TapLine {
    /// A message.
    Message(Box<TappedMessage>),
    /// The last line.
    End(TapEnd),
}

/// A message that passed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TappedMessage {
    /// When it was seen.
    pub at: String,
    /// The endpoints that it went to; none if no route took it.
    pub endpoints: Vec<String>,
    /// The message itself.
    pub message: ShownMessage,
}

/// Why a tap ended, and what it did not show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapEnd {
    /// `limit` or `seconds`.
    pub end: String,
    /// Messages that met the condition.
    pub matched: u64,
    /// Of those, messages that came too fast to be shown.
    pub left_out: u64,
}

/// Opens a tap; its lines come through the channel. When the reader is gone, it is closed.
pub(super) fn open(hub: &Hub, order: &TapOrder) -> Result<mpsc::Receiver<Bytes>, Refusal> {
    let options = TapOptions { condition: order.condition.clone(), source: order.from.clone() };
    let tap = hub.tap(&options).map_err(|error| {
        let status = match error {
            TapError::Condition(_) => StatusCode::BAD_REQUEST,
            TapError::TooMany => StatusCode::SERVICE_UNAVAILABLE,
        };
        Refusal::new(status, error.to_string())
    })?;
    let (lines, receiver) = mpsc::channel(LINES_WAITING_MAX);
    tokio::spawn(run(tap, order.clone(), lines));
    Ok(receiver)
}

async fn run(mut tap: Tap, order: TapOrder, lines: mpsc::Sender<Bytes>) {
    let end_at = Instant::now() + Duration::from_secs(u64::from(order.seconds));
    let mut senders = SenderCache::default();
    let mut shown = 0;
    let end = loop {
        if shown >= order.limit {
            break "limit";
        }
        let tapped = tokio::select! {
            tapped = tap.next() => tapped,
            () = sleep_until(end_at) => break "seconds",
            () = lines.closed() => return,
        };
        let Some(tapped) = tapped else { break "seconds" };
        let message = TapLine::Message(Box::new(message(&tapped, order.bodies, &mut senders)));
        if lines.send(line(&message)).await.is_err() {
            return;
        }
        shown += 1;
    };
    let last = TapEnd { end: end.to_owned(), matched: tap.matched(), left_out: tap.left_out() };
    // A reader that is gone needs no last line.
    let _ = lines.send(line(&TapLine::End(last))).await;
}

fn message(tapped: &Tapped, bodies: bool, senders: &mut SenderCache) -> TappedMessage {
    TappedMessage {
        at: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
        endpoints: tapped.endpoints.iter().map(ToString::to_string).collect(),
        message: ShownMessage::from_record(&tapped.record, bodies, senders),
    }
}

fn line(line: &TapLine) -> Bytes {
    // Plain data with text keys; it cannot fail to be JSON.
    Bytes::from(serde_json::to_string(line).unwrap_or_default() + "\n")
}
