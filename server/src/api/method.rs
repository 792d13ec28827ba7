//! Owns direct methods over HTTP: what a request must have, in which order it is looked at, and what the caller gets.

use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::MethodAnswer;
use edgehub_broker::hub::{Caller, Invocation, InvokeError};
use edgehub_broker::identity::Identity;
use hyper::body::Body;
use hyper::header::HeaderMap;
use hyper::{Request, StatusCode};

use super::{Api, BODY_BYTES_MAX, Refused, json};

/// Longest name of a method, characters.
pub const NAME_CHARS_MAX: usize = 100;
/// Longest payload, bytes of its text.
pub const PAYLOAD_BYTES_MAX: usize = 131_072;
/// Who calls: `{device}/{module}`.
const CALLER_HEADER: &str = "x-ms-edge-moduleid";
/// Time for the answer, where the request does not say, and what it may say, in seconds.
const RESPONSE_SECS: (u64, std::ops::RangeInclusive<u64>) = (30, 5..=300);
/// Time for the client to connect and subscribe.
const CONNECT_SECS: (u64, std::ops::RangeInclusive<u64>) = (0, 0..=300);
/// What stands for an argument that is not there, and for a result that is empty.
const NULL: Bytes = Bytes::from_static(b"null");

/// A call as its body says it.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    name: String,
    payload: Bytes,
    response_timeout: Duration,
    connect_timeout: Duration,
}

impl Api {
    /// Calls a method of a client; the answer's body.
    pub(super) async fn invoke<B>(
        &self,
        target: (String, Option<String>),
        request: Request<B>,
        certificates: &[Bytes],
    ) -> Result<Bytes, Refused>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let _place = self.place()?;
        let (head, body) = request.into_parts();
        let call = Call::parse(&self.body(body, BODY_BYTES_MAX).await?)
            .map_err(|message| Refused::new(StatusCode::BAD_REQUEST, message))?;
        let caller = self.caller(&head.headers)?;
        self.authenticate(&caller, &head.headers, certificates).await?;
        let (device, module) = target;
        let identity = match &module {
            None => Identity::device(&device),
            Some(module) => Identity::module(&device, module),
        };
        let target = identity.map_err(|_| {
            let module = module.map(|module| format!("/{module}")).unwrap_or_default();
            Refused::new(StatusCode::NOT_FOUND, format!("Client {device}{module} not found"))
        })?;
        let invocation = Invocation {
            caller: Caller::Client(caller),
            target,
            name: call.name.into(),
            payload: call.payload,
            connect_timeout: call.connect_timeout,
            response_timeout: call.response_timeout,
        };
        self.hub.invoke(invocation).await.map(answered).map_err(failed)
    }

    /// Who calls: a module of this edge device.
    fn caller(&self, headers: &HeaderMap) -> Result<Identity, Refused> {
        let invalid = || Refused::new(StatusCode::BAD_REQUEST, "Invalid header value for x-ms-edge-moduleId");
        let text =
            headers.get(CALLER_HEADER).and_then(|value| value.to_str().ok()).ok_or_else(invalid)?.trim();
        let (device, module) = text.trim_matches('/').split_once('/').ok_or_else(invalid)?;
        let caller = Identity::module(device, module.trim_start_matches('/')).map_err(|_| invalid())?;
        if caller.device_id() != self.edge_device.device_id() {
            let message = "Only modules on the same device can invoke DirectMethods";
            return Err(Refused::new(StatusCode::UNAUTHORIZED, message));
        }
        Ok(caller)
    }
}

impl Call {
    /// Reads a body; the error says what is wrong with it. Of members of the same name, whatever their case, the last
    /// counts.
    fn parse(body: &Bytes) -> Result<Self, String> {
        let members = json::members(body).ok_or("the body is no JSON object")?;
        let member = |name: &str| {
            let found = members.iter().rev().find(|(found, _)| found.eq_ignore_ascii_case(name))?;
            (found.1 != b"null").then_some(found.1)
        };
        let name: String = match member("methodName") {
            None => return Err("methodName is missing".into()),
            Some(text) => {
                serde_json::from_slice(text).map_err(|_| String::from("methodName must be a text"))?
            }
        };
        if name.trim().is_empty() || name.chars().count() > NAME_CHARS_MAX {
            return Err(format!("methodName must have 1 to {NAME_CHARS_MAX} characters, not only blanks"));
        }
        // It becomes a part of a topic.
        if name.chars().any(|character| matches!(character, '/' | '+' | '#') || character.is_control()) {
            return Err("methodName must not have any of / + # or control characters".into());
        }
        let payload = match member("payload") {
            None => NULL,
            Some(text) if text.len() > PAYLOAD_BYTES_MAX => {
                return Err(format!("payload must have at most {PAYLOAD_BYTES_MAX} bytes"));
            }
            Some(text) => body.slice_ref(text),
        };
        let seconds =
            |name: &str, (otherwise, range): (u64, std::ops::RangeInclusive<u64>)| match member(name) {
                None => Ok(Duration::from_secs(otherwise)),
                Some(text) => match serde_json::from_slice(text) {
                    Ok(secs) if range.contains(&secs) => Ok(Duration::from_secs(secs)),
                    _ => Err(format!(
                        "{name} must be a whole number from {} to {}",
                        range.start(),
                        range.end()
                    )),
                },
            };
        Ok(Self {
            response_timeout: seconds("responseTimeoutInSeconds", RESPONSE_SECS)?,
            connect_timeout: seconds("connectTimeoutInSeconds", CONNECT_SECS)?,
            name,
            payload,
        })
    }
}

/// The answer's body. What is no JSON is sent as a text.
fn answered(answer: MethodAnswer) -> Bytes {
    let MethodAnswer { status, payload } = answer;
    let payload = match &payload[..] {
        blank if blank.trim_ascii().is_empty() => NULL,
        text if json::is_json(text) => payload,
        // A text is always JSON when it is quoted.
        text => serde_json::to_vec(&String::from_utf8_lossy(text)).unwrap_or_default().into(),
    };
    let mut body = format!("{{\"status\":{status},\"payload\":").into_bytes();
    body.extend_from_slice(&payload);
    body.push(b'}');
    body.into()
}

fn failed(error: InvokeError) -> Refused {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let message = match &error {
        InvokeError::TimedOut(target) => {
            format!("Timed out waiting for device to respond to method request to {target}")
        }
        InvokeError::NotFound(_)
        | InvokeError::Disconnected(_)
        | InvokeError::Busy
        | InvokeError::Stopping => error.to_string(),
    };
    Refused::new(status, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_read_as_it_stands() {
        let text = r#"{"METHODNAME":"old","methodName":"a b","Payload": {"x" : [1, 2]} ,"other":1,"connectTimeoutInSeconds":300}"#;
        let call = Call::parse(&Bytes::from(text)).unwrap();
        let expected = Call {
            name: "a b".into(),
            payload: Bytes::from_static(b"{\"x\" : [1, 2]}"),
            response_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(300),
        };
        assert_eq!(call, expected);
    }

    #[test]
    fn limits_of_a_body() {
        let payload = |bytes: usize| format!(r#"{{"methodName":"m","payload":"{}"}}"#, "x".repeat(bytes - 2));
        assert!(Call::parse(&payload(PAYLOAD_BYTES_MAX).into()).is_ok());
        for (body, part) in [
            (payload(PAYLOAD_BYTES_MAX + 1), "at most 131072 bytes"),
            (r#"{"methodName":7}"#.into(), "must be a text"),
            (r#"{"methodName":"a\nb"}"#.into(), "control characters"),
            (r#"{"methodName":"m","responseTimeoutInSeconds":"20"}"#.into(), "from 5 to 300"),
            (r#"{"methodName":"m","responseTimeoutInSeconds":5.5}"#.into(), "from 5 to 300"),
            (r#"{"methodName":"m","connectTimeoutInSeconds":-1}"#.into(), "from 0 to 300"),
            ("[]".into(), "no JSON object"),
        ] {
            let message = Call::parse(&Bytes::from(body)).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn answers_are_always_json() {
        for (payload, expected) in [
            ("{\"a\":1}", "{\"status\":200,\"payload\":{\"a\":1}}"),
            ("", "{\"status\":200,\"payload\":null}"),
            (" \n", "{\"status\":200,\"payload\":null}"),
            ("no JSON \"", "{\"status\":200,\"payload\":\"no JSON \\\"\"}"),
        ] {
            let answer = MethodAnswer { status: 200, payload: payload.into() };
            assert_eq!(answered(answer), expected);
        }
        let binary = MethodAnswer { status: -1, payload: Bytes::from_static(b"\xff") };
        assert_eq!(answered(binary), "{\"status\":-1,\"payload\":\"\u{fffd}\"}");
    }
}
