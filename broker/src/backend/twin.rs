//! Twin requests of clients, their answers, and notifications of changed desired properties.

use bytes::Bytes;

/// Largest [`TwinRequest::correlation`], in bytes. A head refuses requests with a larger one.
pub const CORRELATION_BYTES_MAX: usize = 1_024;

/// What a client asks of its own twin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TwinRequest {
    /// The head's mark of the request, which comes back with the answer as it is: the request id of MQTT, the
    /// encoded correlation id of AMQP. Without one there is no answer.
    pub correlation: Option<Bytes>,
    /// What is asked.
    pub operation: TwinOperation,
}

/// An operation on a twin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TwinOperation {
    /// Read the whole twin.
    Get,
    /// Merge a JSON document into the reported properties.
    PatchReported(Bytes),
}

/// The answer to a [`TwinRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TwinAnswer {
    /// The mark of the request.
    pub correlation: Bytes,
    /// What came of it.
    pub result: Result<TwinReply, TwinError>,
}

/// A twin request that succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TwinReply {
    /// The twin as JSON, `{"desired":{..},"reported":{..}}`: status 200.
    Document(Bytes),
    /// The reported properties are changed: status 204.
    Patched {
        /// Their new version, if it is known.
        version: Option<u64>,
    },
}

/// Why a twin request fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TwinError {
    /// The request breaks a rule of the document.
    #[error("{0}")]
    Invalid(String),
    /// Too many requests of the client wait.
    #[error("too many twin requests wait; come again")]
    Busy,
    /// It failed for another reason.
    #[error("{0}")]
    Failed(String),
}

impl TwinError {
    /// The status that clients see: 400, 429 or 500.
    pub fn status(&self) -> u16 {
        match self {
            TwinError::Invalid(_) => 400,
            TwinError::Busy => 429,
            TwinError::Failed(_) => 500,
        }
    }
}

/// A change of desired properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredPatch {
    /// The change as a JSON document that holds its `$version`.
    pub patch: Bytes,
    /// The version of the desired properties after it.
    pub version: u64,
}
