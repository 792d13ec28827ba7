//! Twins and direct methods on the way to the client: the topic and body of each answer, notification and call.

use bytes::Bytes;
use time::OffsetDateTime;

use super::topic;
use crate::backend::{DesiredPatch, MethodAnswer, MethodCall, TwinAnswer, TwinError, TwinReply};

/// Status of the answer to a call that the client does not take, because it takes no calls any more.
const STATUS_NOT_SUBSCRIBED: i32 = 404;
/// Status of the answer to a call whose name no topic can carry.
const STATUS_BAD_NAME: i32 = 400;

/// A text of the hub's own for a client. No other acknowledgement than that of the protocol is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) topic: String,
    pub(super) payload: Bytes,
}

impl Notice {
    /// What it takes while it waits.
    pub(super) fn bytes(&self) -> usize {
        self.topic.len() + self.payload.len()
    }
}

/// Why a call does not reach the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotCalled {
    /// The name cannot be a level of a topic.
    BadName,
    /// No filter of the client takes calls.
    NotSubscribed,
}

/// The answer to a twin request; nothing when its mark is none that this head gave.
pub(super) fn twin_answer(answer: &TwinAnswer) -> Option<Notice> {
    let request_id = std::str::from_utf8(&answer.correlation).ok()?;
    Some(match &answer.result {
        Ok(TwinReply::Document(document)) => {
            Notice { topic: topic::twin_response(200, request_id, None), payload: document.clone() }
        }
        Ok(TwinReply::Patched { version }) => {
            Notice { topic: topic::twin_response(204, request_id, *version), payload: Bytes::new() }
        }
        Err(error) => twin_failure(request_id, error),
    })
}

/// The answer to a twin request that failed. It has a body: SDKs tell failures by it, or fall over an empty one.
pub(super) fn twin_failure(request_id: &str, error: &TwinError) -> Notice {
    let now = OffsetDateTime::now_utc();
    let time = format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute(),
        now.second(),
    );
    let body = serde_json::json!({
        "errorCode": u32::from(error.status()) * 1_000,
        "message": error.to_string(),
        "trackingId": "",
        "timestampUtc": time,
    });
    Notice {
        topic: topic::twin_response(error.status(), request_id, None),
        payload: Bytes::from(body.to_string()),
    }
}

/// The notification of changed desired properties.
pub(super) fn desired(patch: DesiredPatch) -> Notice {
    Notice { topic: topic::desired(patch.version), payload: patch.patch }
}

/// A call. Without an argument its body is `null`: SDKs refuse an empty one.
pub(super) fn call(call: MethodCall) -> Result<Notice, NotCalled> {
    let topic = topic::method_call(&call.name, call.id).ok_or(NotCalled::BadName)?;
    let payload = if call.payload.is_empty() { Bytes::from_static(b"null") } else { call.payload };
    Ok(Notice { topic, payload })
}

impl NotCalled {
    /// What the caller is answered in place of the client.
    pub(super) fn answer(self) -> MethodAnswer {
        let (status, payload) = match self {
            NotCalled::BadName => (
                STATUS_BAD_NAME,
                r##"{"message":"over MQTT, a method's name cannot hold '/', '+', '#' or U+0000"}"##,
            ),
            NotCalled::NotSubscribed => {
                (STATUS_NOT_SUBSCRIBED, r#"{"message":"the client does not take method calls"}"#)
            }
        };
        MethodAnswer { status, payload: Bytes::from_static(payload.as_bytes()) }
    }
}
