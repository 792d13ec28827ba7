//! The method links of one identity: calls to the client, and its answers.

use bytes::Bytes;

use super::convert;
use super::outbox::{Outbox, Overflow};
use super::turn::Turn;
use crate::amqp::{
    Delivery, Message as Encoded, MessageEncoder, MessageId, MessageProperties, Outcome, Payload, Text, Value,
};
use crate::backend::{Backend, CallId, MethodAnswer, MethodCall, STATUS_UNREADABLE};

/// The application property with the name of a called method.
const NAME: &str = "IoThub-methodname";
/// The application property with the status of an answer.
const STATUS: &str = "IoThub-status";
/// What is called without an argument gets this one: SDKs answer an empty body with an error.
const NO_PAYLOAD: Bytes = Bytes::from_static(b"null");

/// Calls the client, if it has a link for calls.
///
/// # Errors
/// When there is no room; the caller finds its call unanswered.
pub(super) fn call<B>(calls: &mut Outbox, turn: &mut Turn<'_, B>, call: MethodCall) -> Result<(), Overflow> {
    match calls.link() {
        Some(_) => calls.push(turn, encode(call)),
        None => Ok(()),
    }
}

fn encode(call: MethodCall) -> Payload {
    // SDKs parse the id as a GUID; those that want text make one of it.
    let correlation_id = Some(MessageId::uuid_or_string(&call.id.to_string()));
    let mut encoder = MessageEncoder::with_capacity(96 + call.name.len());
    encoder
        .properties(&MessageProperties { correlation_id, ..MessageProperties::default() })
        .application_strings([(NAME, &*call.name)]);
    encoder.data(if call.payload.is_empty() { NO_PAYLOAD } else { call.payload })
}

/// Takes an answer of the client. One that names no call is accepted and ignored.
pub(super) fn answered<B: Backend>(turn: &mut Turn<'_, B>, client: &mut B::Client, delivery: &Delivery) {
    turn.engine.settle(delivery.id, Outcome::Accepted);
    match Encoded::parse(&delivery.payload).ok().and_then(|message| Some((call_id(&message)?, message))) {
        Some((call, message)) => turn.backend.method_answered(client, call, read(&message)),
        None => tracing::debug!("A method answer without a correlation id that is a GUID is ignored"),
    }
}

/// Clients answer a uuid with a uuid, its text, or its 16 bytes.
fn call_id(message: &Encoded) -> Option<CallId> {
    match message.properties().ok()?.correlation_id? {
        MessageId::Uuid(bytes) => Some(CallId::from_bytes(bytes)),
        MessageId::String(text) => text.parse().ok(),
        MessageId::Binary(bytes) => bytes[..].try_into().ok().map(CallId::from_bytes),
        MessageId::Ulong(_) => None,
    }
}

fn read(message: &Encoded) -> MethodAnswer {
    let named =
        |entry: Result<(Text, Value), _>| entry.ok().filter(|(key, _)| key.eq_ignore_ascii_case(STATUS));
    let status = message
        .application_properties()
        .ok()
        .and_then(|mut entries| entries.find_map(named))
        .and_then(|(_, status)| i32::try_from(status.as_i64()?).ok());
    match (status, convert::document(message)) {
        (Some(status), Ok(payload)) => MethodAnswer { status, payload },
        _ => MethodAnswer { status: STATUS_UNREADABLE, payload: Bytes::new() },
    }
}
