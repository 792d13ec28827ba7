//! Calls of direct methods.

use std::time::Duration;

use edgehub_broker::identity::Identity;
use edgehub_broker::twin::json;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::fault::Fault;
use super::identity::entry;
use super::rest::{Answer, Service};

/// Characters of a method's name.
const NAME_CHARS_MAX: usize = 100;

/// Largest argument, as text.
const PAYLOAD_BYTES_MAX: usize = 128 * 1_024;

/// Nesting of an answer.
const ANSWER_DEPTH_MAX: usize = 100;

const RESPONSE_TIMEOUT_SECS: std::ops::RangeInclusive<u64> = 5..=300;
const RESPONSE_TIMEOUT_DEFAULT_SECS: u64 = 30;
const CONNECT_TIMEOUT_SECS: std::ops::RangeInclusive<u64> = 0..=300;

/// A call as services send it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct MethodIn {
    method_name: Option<String>,
    #[serde(default)]
    payload: Value,
    response_timeout_in_seconds: Option<u64>,
    connect_timeout_in_seconds: Option<u64>,
}

pub(super) async fn invoke(
    service: Service<'_>,
    identity: &Identity,
    given: MethodIn,
) -> Result<Answer, Fault> {
    entry(service, identity)?;
    let name = given.method_name.filter(|name| (1..=NAME_CHARS_MAX).contains(&name.chars().count()));
    let name =
        name.ok_or_else(|| Fault::invalid(format!("methodName must have 1 to {NAME_CHARS_MAX} characters")))?;
    let response = given.response_timeout_in_seconds.unwrap_or(RESPONSE_TIMEOUT_DEFAULT_SECS);
    let connect = given.connect_timeout_in_seconds.unwrap_or(0);
    if !RESPONSE_TIMEOUT_SECS.contains(&response) || !CONNECT_TIMEOUT_SECS.contains(&connect) {
        return Err(Fault::invalid(
            "a time-out is out of range: 5 to 300 s to answer, 0 to 300 s to connect",
        ));
    }
    let payload = given.payload.to_string();
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(Fault::invalid(format!("the payload is larger than {PAYLOAD_BYTES_MAX} bytes")));
    }
    let (connect, response) = (Duration::from_secs(connect), Duration::from_secs(response));
    let answer = service.backend.invoke(identity, name.into(), payload.into(), connect, response).await?;
    // The client's bytes go into the body as they are, once they are known to be JSON.
    let readable = !json::is_deeper_than(&answer.payload, ANSWER_DEPTH_MAX)
        && serde_json::from_slice::<IgnoredAny>(&answer.payload).is_ok();
    let mut body = format!("{{\"status\":{},\"payload\":", answer.status).into_bytes();
    body.extend_from_slice(if readable { &answer.payload } else { b"null" });
    body.push(b'}');
    Ok(Answer { status: 200, headers: Vec::new(), body })
}
