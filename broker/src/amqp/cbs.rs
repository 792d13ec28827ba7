//! Claims-based security: the messages of a put-token exchange on the `$cbs` links. Tokens are not looked into.

use super::error::WireError;
use super::event::{Payload, Secret};
use super::message::{Message, MessageEncoder, MessageProperties};
use super::text::MessageId;
use super::value::{Text, Value};

const OPERATION: &str = "put-token";
const TOKEN_TYPES: [&str; 2] = ["azure-devices.net:sastoken", "servicebus.windows.net:sastoken"];

/// A put-token request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutToken {
    /// The token as received.
    pub token: Secret,
    /// What the client calls the audience; the identity is that of the token, not of this name.
    pub name: Text,
}

/// A request that cannot be served; answer with status 400 and this text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CbsError {
    /// `operation` is missing or not `put-token`.
    #[error("the application property operation must be put-token")]
    Operation,
    /// `type` is missing or unknown.
    #[error("the application property type must be azure-devices.net:sastoken")]
    TokenType,
    /// `name` is missing or empty.
    #[error("the application property name must be a non-empty string")]
    Name,
    /// The body is no amqp-value with a non-empty string.
    #[error("the body must be an amqp-value with the token as a string")]
    Body,
    /// The message cannot be decoded.
    #[error("the request cannot be decoded: {0}")]
    Malformed(#[from] WireError),
}

impl PutToken {
    /// Reads a request. The message id comes apart from it, because a bad request is answered, too.
    pub fn decode(message: &Message) -> (Option<MessageId>, Result<Self, CbsError>) {
        match message.properties() {
            Ok(properties) => (properties.message_id, Self::decode_body(message)),
            Err(error) => (None, Err(error.into())),
        }
    }

    fn decode_body(message: &Message) -> Result<Self, CbsError> {
        let (mut operation, mut kind, mut name) = (None, None, None);
        for entry in message.application_properties()? {
            let (key, value) = entry?;
            match key.as_str() {
                "operation" => operation = value.as_text().cloned(),
                "type" => kind = value.as_text().cloned(),
                "name" => name = value.as_text().cloned(),
                _ => {}
            }
        }
        if !operation.is_some_and(|operation| operation.eq_ignore_ascii_case(OPERATION)) {
            return Err(CbsError::Operation);
        }
        let known = |kind: Text| TOKEN_TYPES.iter().any(|known| kind.eq_ignore_ascii_case(known));
        if !kind.is_some_and(known) {
            return Err(CbsError::TokenType);
        }
        let name = name.filter(|name| !name.is_empty()).ok_or(CbsError::Name)?;
        match message.value()? {
            Some(Value::String(token)) if !token.is_empty() => Ok(Self { token: Secret(token), name }),
            _ => Err(CbsError::Body),
        }
    }

    /// Writes a request, as a client of another hub. `expires_millis` since 1970.
    pub fn encode(message_id: MessageId, name: &str, token: &str, expires_millis: i64) -> Payload {
        let mut encoder = MessageEncoder::with_capacity(256 + token.len());
        encoder
            .properties(&MessageProperties { message_id: Some(message_id), ..MessageProperties::default() })
            .application_values([
                ("operation", Value::String(Text::from_static(OPERATION))),
                ("type", Value::String(Text::from_static(TOKEN_TYPES[0]))),
                ("name", Value::String(name.into())),
                ("expiration", Value::TimestampMillis(expires_millis)),
            ]);
        encoder.value(&Value::String(token.into()))
    }
}

/// The answer to a put-token request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CbsResponse {
    /// The request's message id, in its type.
    pub correlation_id: Option<MessageId>,
    /// 200 (202 from others), 400 or 500; written as an AMQP `int`.
    pub status_code: i32,
    /// `OK`, or what is wrong.
    pub description: Text,
}

impl CbsResponse {
    /// True when the token was taken.
    pub fn is_ok(&self) -> bool {
        matches!(self.status_code, 200 | 202)
    }

    /// Writes the answer; to be sent settled.
    pub fn encode(&self) -> Payload {
        let mut encoder = MessageEncoder::with_capacity(160);
        encoder
            .properties(&MessageProperties {
                correlation_id: self.correlation_id.clone(),
                ..MessageProperties::default()
            })
            .application_values([
                ("status-code", Value::Int(self.status_code)),
                ("status-description", Value::String(self.description.clone())),
            ]);
        encoder.no_body()
    }

    /// Reads an answer; the status may have any integer type.
    pub fn decode(message: &Message) -> Result<Self, WireError> {
        let status = message.application_property("status-code")?.and_then(|status| status.as_i64());
        let description = message.application_property("status-description")?;
        Ok(Self {
            correlation_id: message.properties()?.correlation_id,
            status_code: status
                .and_then(|status| i32::try_from(status).ok())
                .ok_or(WireError::MissingField)?,
            description: description.as_ref().and_then(Value::as_text).cloned().unwrap_or_default(),
        })
    }
}
