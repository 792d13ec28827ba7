//! The user name of CONNECT: whom the client claims to be, and what it says about itself.

use std::sync::Arc;

use super::percent;
use crate::identity::{Identity, IdentityError};

/// What one old client sends as its last segments, with slashes in it.
const OLD_CLIENT: &str =
    "/api-version=2017-06-30/DeviceClientType=Microsoft.Azure.Devices.Client/1.5.1-preview-003";
const OLD_CLIENT_PRODUCT: &str = "Microsoft.Azure.Devices.Client/1.5.1-preview-003";

/// A user name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserName {
    /// Whom the client claims to be.
    pub identity: Identity,
    /// Product and version of its SDK; may be empty.
    pub product_info: Arc<str>,
    /// Plug-and-play model.
    pub model_id: Option<Arc<str>>,
    /// Ids joined by `;`, target first, acting edge device last; not blank.
    pub auth_chain: Option<Arc<str>>,
}

/// Why a text is no user name of a device or module.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserNameError {
    /// Not `host/device/?properties` or `host/device/module/?properties`.
    #[error("the user name is not host/device/?properties or host/device/module/?properties")]
    Shape,
    /// The property `api-version` is missing or blank.
    #[error("the user name has no api-version")]
    ApiVersion,
    /// A device or module id is illegal.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl UserName {
    /// Reads a user name.
    ///
    /// # Errors
    /// When its shape is unknown, an id is illegal, or `api-version` is missing.
    pub fn parse(text: &str) -> Result<Self, UserNameError> {
        let segments: Vec<&str> = text.splitn(SEGMENTS_MAX + 1, '/').collect();
        let (ids, properties) = match segments.as_slice() {
            [_, ids @ .., last] if last.starts_with('?') && matches!(ids.len(), 1 | 2) => (ids, &last[1..]),
            [_, ids @ .., last] if last.contains("api-version=") && matches!(ids.len(), 1 | 2) => {
                (ids, *last)
            }
            [_, device, module, _, _, _] if is_old_client(text) => {
                let identity = Identity::module(device.trim(), module.trim())?;
                return Ok(Self {
                    identity,
                    product_info: OLD_CLIENT_PRODUCT.into(),
                    model_id: None,
                    auth_chain: None,
                });
            }
            _ => return Err(UserNameError::Shape),
        };
        let identity = match ids {
            [device] => Identity::device(device.trim())?,
            [device, module] => Identity::module(device.trim(), module.trim())?,
            _ => return Err(UserNameError::Shape),
        };
        let properties = properties.trim();
        let value = |name: &str| {
            properties
                .split('&')
                .map(|part| part.split_once('=').unwrap_or((part, "")))
                .find(|(candidate, _)| *candidate == name)
                .map(|(_, value)| percent::decode(value))
        };
        let not_blank = |name: &str| value(name).filter(|value| !value.trim().is_empty());
        not_blank("api-version").ok_or(UserNameError::ApiVersion)?;
        Ok(Self {
            identity,
            product_info: value("DeviceClientType").unwrap_or_default().into(),
            model_id: not_blank("model-id").map(Arc::from),
            auth_chain: not_blank("auth-chain").map(Arc::from),
        })
    }

    /// Whether the client acts on behalf of another than the one it names (a chain of at least two), and if so,
    /// whether the chain begins with the identity that it names.
    pub fn on_behalf_of(&self) -> Option<bool> {
        let (target, _) = self.auth_chain.as_deref()?.split_once(';')?;
        Some(target == self.identity.to_string())
    }
}

/// More segments than any user name has.
const SEGMENTS_MAX: usize = 6;

fn is_old_client(text: &str) -> bool {
    let at = text.len().checked_sub(OLD_CLIENT.len());
    at.and_then(|at| text.get(at..)).is_some_and(|end| end.eq_ignore_ascii_case(OLD_CLIENT))
}
