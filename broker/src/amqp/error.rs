//! What goes wrong on the wire: AMQP error conditions, and the faults that the engine answers with them.

use std::borrow::Cow;
use std::fmt;

/// An AMQP error condition, the symbol of the `error` type (AMQP 1.0 §2.8.14).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Condition(Cow<'static, str>);

impl Condition {
    /// `amqp:internal-error`
    pub const INTERNAL_ERROR: Self = Self::of("amqp:internal-error");
    /// `amqp:not-found`
    pub const NOT_FOUND: Self = Self::of("amqp:not-found");
    /// `amqp:unauthorized-access`
    pub const UNAUTHORIZED_ACCESS: Self = Self::of("amqp:unauthorized-access");
    /// `amqp:decode-error`
    pub const DECODE_ERROR: Self = Self::of("amqp:decode-error");
    /// `amqp:resource-limit-exceeded`
    pub const RESOURCE_LIMIT_EXCEEDED: Self = Self::of("amqp:resource-limit-exceeded");
    /// `amqp:not-allowed`
    pub const NOT_ALLOWED: Self = Self::of("amqp:not-allowed");
    /// `amqp:invalid-field`
    pub const INVALID_FIELD: Self = Self::of("amqp:invalid-field");
    /// `amqp:not-implemented`
    pub const NOT_IMPLEMENTED: Self = Self::of("amqp:not-implemented");
    /// `amqp:resource-locked`
    pub const RESOURCE_LOCKED: Self = Self::of("amqp:resource-locked");
    /// `amqp:illegal-state`
    pub const ILLEGAL_STATE: Self = Self::of("amqp:illegal-state");
    /// `amqp:connection:forced`
    pub const CONNECTION_FORCED: Self = Self::of("amqp:connection:forced");
    /// `amqp:connection:framing-error`
    pub const FRAMING_ERROR: Self = Self::of("amqp:connection:framing-error");
    /// `amqp:session:window-violation`
    pub const WINDOW_VIOLATION: Self = Self::of("amqp:session:window-violation");
    /// `amqp:session:errant-link`
    pub const ERRANT_LINK: Self = Self::of("amqp:session:errant-link");
    /// `amqp:session:handle-in-use`
    pub const HANDLE_IN_USE: Self = Self::of("amqp:session:handle-in-use");
    /// `amqp:session:unattached-handle`
    pub const UNATTACHED_HANDLE: Self = Self::of("amqp:session:unattached-handle");
    /// `amqp:link:detach-forced`
    pub const DETACH_FORCED: Self = Self::of("amqp:link:detach-forced");
    /// `amqp:link:transfer-limit-exceeded`
    pub const TRANSFER_LIMIT_EXCEEDED: Self = Self::of("amqp:link:transfer-limit-exceeded");
    /// `amqp:link:message-size-exceeded`
    pub const MESSAGE_SIZE_EXCEEDED: Self = Self::of("amqp:link:message-size-exceeded");
    /// `amqp:link:stolen`
    pub const STOLEN: Self = Self::of("amqp:link:stolen");

    /// A condition from a text of the program, usable in constants.
    pub const fn of(text: &'static str) -> Self {
        Self(Cow::Borrowed(text))
    }

    /// The symbol's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for Condition {
    fn from(text: String) -> Self {
        Self(Cow::Owned(text))
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The `error` type of AMQP 1.0 §2.8.14, sent with detach, end, close and rejected. The `info` map is not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{condition}{}", .description.as_deref().map(|text| format!(": {text}")).unwrap_or_default())]
pub struct Error {
    /// What kind of error.
    pub condition: Condition,
    /// Free text for a person.
    pub description: Option<String>,
}

impl Error {
    /// An error with a description.
    pub fn new(condition: Condition, description: impl Into<String>) -> Self {
        Self { condition, description: Some(description.into()) }
    }
}

impl From<Condition> for Error {
    fn from(condition: Condition) -> Self {
        Self { condition, description: None }
    }
}

/// Bytes that are not what AMQP 1.0 part 1 (types) or part 2 (frames) allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A value needs more bytes than there are.
    #[error("a value ends behind its frame")]
    Truncated,
    /// A constructor that AMQP does not define.
    #[error("unknown type constructor 0x{0:02x}")]
    UnknownConstructor(u8),
    /// More nesting than [`super::wire::NESTING_MAX`].
    #[error("values are nested too deeply")]
    TooDeep,
    /// Size or count of a list, map or array contradicts its content.
    #[error("size or count of a compound value is wrong")]
    BadCompound,
    /// Another type than the field has.
    #[error("a field has the wrong type")]
    WrongType,
    /// Text that is not UTF-8, or a character or boolean outside its range.
    #[error("a value is outside its type's range")]
    BadValue,
    /// A mandatory field is null or missing.
    #[error("a mandatory field is missing")]
    MissingField,
    /// More messages than [`super::BATCH_MESSAGES_MAX`] in a batch.
    #[error("too many messages in a batch")]
    TooManyMessages,
    /// A descriptor that is not expected at this place.
    #[error("unexpected descriptor")]
    UnexpectedDescriptor,
}

/// A fault of the peer, with the scope that it ends.
#[derive(Debug)]
pub(super) enum Fault {
    Connection(Error),
    Session(Error),
    Link(Error),
}

impl Fault {
    pub(super) fn connection(condition: Condition, text: &str) -> Self {
        Self::Connection(Error::new(condition, text))
    }

    pub(super) fn session(condition: Condition, text: &str) -> Self {
        Self::Session(Error::new(condition, text))
    }

    pub(super) fn link(condition: Condition, text: &str) -> Self {
        Self::Link(Error::new(condition, text))
    }
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self::Connection(Error::new(Condition::DECODE_ERROR, error.to_string()))
    }
}
