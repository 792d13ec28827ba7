//! The twin links of one identity: requests to the backend, answers and notifications to the client.

use bytes::Bytes;

use super::convert;
use super::outbox::{Outbox, Overflow};
use super::turn::Turn;
use crate::amqp::{
    Condition, Delivery, Error, Message as Encoded, MessageEncoder, MessageId, MessageProperties, Outcome,
    Payload, Value, timestamp_text,
};
use crate::backend::{
    Backend, CORRELATION_BYTES_MAX, DesiredPatch, Feature, TwinAnswer, TwinError, TwinOperation, TwinReply,
    TwinRequest,
};

/// Requests without an answer, and what waits to go out.
#[derive(Debug, Default)]
pub(super) struct Twin {
    asked: usize,
    pub(super) answers: Outbox,
}

/// What a message on the request link asks for.
enum Asked {
    Get,
    Patch(Bytes),
    Notifications(bool),
}

/// What is sent back: status, version if it is known, and a JSON body, which may be empty.
struct Answer {
    status: i32,
    version: Option<u64>,
    body: Bytes,
}

impl Twin {
    /// Takes a request.
    ///
    /// # Errors
    /// When its answer finds no room.
    pub(super) fn request<B: Backend>(
        &mut self,
        turn: &mut Turn<'_, B>,
        client: &mut B::Client,
        delivery: &Delivery,
    ) -> Result<(), Overflow> {
        let (correlation, asked) = match read(&delivery.payload) {
            Ok(request) => request,
            Err(error) => {
                turn.engine.settle(delivery.id, Outcome::Rejected(Some(error)));
                return Ok(());
            }
        };
        turn.engine.settle(delivery.id, Outcome::Accepted);
        let operation = match asked {
            Some(Asked::Get) => TwinOperation::Get,
            Some(Asked::Patch(document)) => TwinOperation::PatchReported(document),
            Some(Asked::Notifications(on)) => {
                turn.backend.subscribe(client, Feature::DesiredProperties, on);
                let answer = Answer { status: 200, version: None, body: Bytes::new() };
                return self.answers.push(turn, encode(correlation, answer));
            }
            None => {
                tracing::debug!("A twin request with an unknown operation is ignored");
                return Ok(());
            }
        };
        let refused = if self.asked >= turn.limits.twin_requests_max {
            Err(TwinError::Busy)
        } else {
            let request = TwinRequest { correlation: Some(correlation.encoded()), operation };
            turn.backend.twin(client, request)
        };
        match refused {
            Ok(()) => {
                self.asked += 1;
                Ok(())
            }
            Err(error) => self.answers.push(turn, encode(correlation, failure(&error))),
        }
    }

    /// Passes an answer on.
    ///
    /// # Errors
    /// When it finds no room.
    pub(super) fn answer<B>(&mut self, turn: &mut Turn<'_, B>, answer: TwinAnswer) -> Result<(), Overflow> {
        self.asked = self.asked.saturating_sub(1);
        let reply = match answer.result {
            Ok(TwinReply::Document(body)) => Answer { status: 200, version: None, body },
            Ok(TwinReply::Patched { version }) => Answer { status: 204, version, body: Bytes::new() },
            Err(error) => failure(&error),
        };
        match MessageId::from_encoded(&answer.correlation) {
            Ok(correlation) => self.answers.push(turn, encode(correlation, reply)),
            Err(error) => {
                tracing::warn!(code = "EH2014", %error, "A twin answer to no request of this connection is dropped");
                Ok(())
            }
        }
    }

    /// Tells of changed desired properties, if the client has a link for it.
    ///
    /// # Errors
    /// When it finds no room.
    pub(super) fn desired<B>(&mut self, turn: &mut Turn<'_, B>, patch: DesiredPatch) -> Result<(), Overflow> {
        match self.answers.link() {
            Some(_) => self.answers.push(turn, notification(patch)),
            None => Ok(()),
        }
    }
}

/// The correlation id and the operation of a request; no operation if it is unknown.
fn read(payload: &Bytes) -> Result<(MessageId, Option<Asked>), Error> {
    let malformed =
        |error| Error::new(Condition::DECODE_ERROR, format!("the twin request cannot be read: {error}"));
    let message = Encoded::parse(payload).map_err(malformed)?;
    let correlation = message
        .properties()
        .map_err(malformed)?
        .correlation_id
        .filter(|id| id.encoded().len() <= CORRELATION_BYTES_MAX)
        .ok_or_else(|| {
            Error::new(Condition::INVALID_FIELD, "a twin request needs a correlation-id of at most 1 KiB")
        })?;
    let operation = message.annotation("operation").map_err(malformed)?;
    let operation = operation.as_ref().and_then(Value::as_text).map(|text| text.to_ascii_uppercase());
    let asked = match operation.as_deref() {
        Some("GET") => Some(Asked::Get),
        Some("PATCH") => Some(Asked::Patch(convert::document(&message)?)),
        Some("PUT") => Some(Asked::Notifications(true)),
        Some("DELETE") => Some(Asked::Notifications(false)),
        Some(_) | None => None,
    };
    Ok((correlation, asked))
}

/// The answer for a failed request. SDKs read its body, so there is one.
fn failure(error: &TwinError) -> Answer {
    let status = error.status();
    let now_millis = crate::identity::unix_now_secs().saturating_mul(1_000);
    let body = serde_json::json!({
        "errorCode": u32::from(status) * 1_000,
        "message": error.to_string(),
        "trackingId": "",
        "timestampUtc": timestamp_text(now_millis).unwrap_or_default(),
    });
    Answer { status: status.into(), version: None, body: body.to_string().into() }
}

fn encode(correlation: MessageId, answer: Answer) -> Payload {
    let mut encoder = MessageEncoder::with_capacity(96);
    let version = answer.version.and_then(|version| i64::try_from(version).ok());
    let version = version.map(|version| ("version", Value::Long(version)));
    encoder
        .annotations([("status", Value::Int(answer.status))].into_iter().chain(version))
        .properties(&MessageProperties { correlation_id: Some(correlation), ..MessageProperties::default() });
    encoder.data(answer.body)
}

fn notification(patch: DesiredPatch) -> Payload {
    MessageEncoder::with_capacity(16).data(patch.patch)
}
