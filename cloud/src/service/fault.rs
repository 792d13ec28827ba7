//! Errors of service calls, in the cloud hub's form.

use edgehub_broker::identity::{IDENTITIES_MAX, Identity, IdentityError};
use serde_json::json;

use crate::backend::{InvokeError, ServiceError};
use crate::cloud_to_device::SendError;
use crate::registry::RegistryError;
use crate::twin::{TwinFault, TwinStoreError};

/// An error of a service call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub(crate) struct Fault {
    /// As in HTTP.
    pub(crate) status: u16,
    /// The cloud hub's name for it.
    pub(crate) code: &'static str,
    /// What is wrong.
    pub(crate) message: String,
}

impl Fault {
    pub(crate) fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    pub(crate) fn invalid(message: impl std::fmt::Display) -> Self {
        Self::new(400, "ArgumentInvalid", message.to_string())
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(401, "IotHubUnauthorizedAccess", message)
    }

    pub(crate) fn missing(identity: &Identity) -> Self {
        let code = if identity.module_id().is_some() { "ModuleNotFound" } else { "DeviceNotFound" };
        Self::new(404, code, format!("{identity} is not registered"))
    }

    fn internal(error: impl std::fmt::Display) -> Self {
        tracing::error!(code = "EH7013", %error, "a service call failed");
        Self::new(500, "ServerError", error.to_string())
    }

    /// The body of the answer.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let message = format!("ErrorCode:{};{}", self.code, self.message);
        json!({ "Message": message, "ExceptionMessage": "" }).to_string().into()
    }
}

impl From<IdentityError> for Fault {
    fn from(error: IdentityError) -> Self {
        Self::invalid(error)
    }
}

impl From<RegistryError> for Fault {
    fn from(error: RegistryError) -> Self {
        let text = error.to_string();
        match error {
            RegistryError::Missing(identity) => Self::missing(&identity),
            RegistryError::Exists(identity) if identity.module_id().is_some() => {
                Self::new(409, "ModuleAlreadyExistsOnDevice", text)
            }
            RegistryError::Exists(_) => Self::new(409, "DeviceAlreadyExists", text),
            RegistryError::Precondition(_) => Self::new(412, "PreconditionFailed", text),
            RegistryError::Id(_)
            | RegistryError::NotEdge(_)
            | RegistryError::NoScope(_)
            | RegistryError::TooDeep(_)
            | RegistryError::HasChildren(_)
            | RegistryError::NoKey(_) => Self::invalid(text),
            RegistryError::Full(_) => {
                Self::new(403, "IotHubQuotaExceeded", format!("there are {IDENTITIES_MAX} identities"))
            }
            RegistryError::File { .. }
            | RegistryError::Damaged { .. }
            | RegistryError::Version { .. }
            | RegistryError::Random => Self::internal(text),
        }
    }
}

impl From<ServiceError> for Fault {
    fn from(error: ServiceError) -> Self {
        let text = error.to_string();
        match error {
            ServiceError::Missing(identity) => Self::missing(&identity),
            ServiceError::Twin(TwinStoreError::Fault(TwinFault::Precondition)) => {
                Self::new(412, "PreconditionFailed", text)
            }
            ServiceError::Twin(TwinStoreError::Fault(TwinFault::Invalid(_))) => Self::invalid(text),
            ServiceError::Twin(
                TwinStoreError::File { .. } | TwinStoreError::Damaged { .. } | TwinStoreError::Interrupted,
            ) => Self::internal(text),
            ServiceError::Send(SendError::NoDevice) => Self::new(404, "DeviceNotFound", text),
            ServiceError::Send(SendError::QueueFull) => {
                Self::new(403, "DeviceMaximumQueueDepthExceeded", text)
            }
            ServiceError::Send(SendError::Full) => Self::new(503, "ServiceUnavailable", text),
            ServiceError::Send(SendError::TooLarge) => Self::new(413, "MessageTooLarge", text),
            ServiceError::Send(SendError::Expired) => Self::new(400, "ArgumentInvalid", text),
        }
    }
}

impl From<InvokeError> for Fault {
    fn from(error: InvokeError) -> Self {
        let text = error.to_string();
        match error {
            InvokeError::NotConnected => Self::new(404, "DeviceNotOnline", text),
            InvokeError::NoAnswer => Self::new(504, "GatewayTimeout", text),
            InvokeError::Busy => Self::new(429, "ThrottlingException", text),
        }
    }
}
