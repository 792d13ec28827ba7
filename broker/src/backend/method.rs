//! Direct methods: calls to a client and their answers.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

/// The status of an answer that holds none that can be read.
pub const STATUS_UNREADABLE: i32 = 400_000;

/// Names a call. Its text form is a lower-case GUID with dashes, as SDKs expect it; it parses in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallId(Uuid);

impl CallId {
    /// An id that no other call has.
    pub fn new() -> Self {
        Self(uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid())
    }

    /// An id out of its 16 bytes, the first group's highest byte first.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }
}

impl Default for CallId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for CallId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        Uuid::try_parse(text).map(Self)
    }
}

/// A call of a direct method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MethodCall {
    /// Comes back with the answer.
    pub id: CallId,
    /// The method's name.
    pub name: Arc<str>,
    /// The argument as JSON; `null` when the caller gave none.
    pub payload: Bytes,
}

/// What a client answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MethodAnswer {
    /// The client's status, or [`STATUS_UNREADABLE`].
    pub status: i32,
    /// The result as JSON; may be empty.
    pub payload: Bytes,
}
