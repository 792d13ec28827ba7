//! The name of a device or module.

use std::fmt;
use std::sync::Arc;

/// Longest device or module id, in bytes (the cloud hub's limit is 128 characters of ASCII).
pub const ID_BYTES_MAX: usize = 128;

/// The name of a device (`leaf1`) or of a module on a device (`edge1/filter`).
///
/// Names are case-sensitive. A name cannot be blank and cannot hold `/` or a control character; both would make
/// its text form ambiguous or break a topic.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    device: Arc<str>,
    module: Option<Arc<str>>,
}

/// Why a text is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// A device or module id is empty or only white space.
    #[error("the {0} id is blank")]
    Blank(&'static str),
    /// A device or module id is longer than [`ID_BYTES_MAX`].
    #[error("the {0} id is longer than {ID_BYTES_MAX} bytes")]
    TooLong(&'static str),
    /// A device or module id holds `/` or a control character.
    #[error("the {0} id holds a slash or a control character")]
    Character(&'static str),
}

impl Identity {
    /// The identity of a device.
    ///
    /// # Errors
    /// When the id is blank, too long, or holds a slash or a control character.
    pub fn device(device: &str) -> Result<Self, IdentityError> {
        Ok(Self { device: checked("device", device)?, module: None })
    }

    /// The identity of a module on a device.
    ///
    /// # Errors
    /// When an id is blank, too long, or holds a slash or a control character.
    pub fn module(device: &str, module: &str) -> Result<Self, IdentityError> {
        Ok(Self { device: checked("device", device)?, module: Some(checked("module", module)?) })
    }

    /// Reads the text form: `device` or `device/module`.
    ///
    /// # Errors
    /// As [`Identity::device`] and [`Identity::module`]; a second slash is an illegal character.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        match text.split_once('/') {
            None => Self::device(text),
            Some((device, module)) => Self::module(device, module),
        }
    }

    /// The device's id; for a module, the id of the device it runs on.
    pub fn device_id(&self) -> &str {
        &self.device
    }

    /// The module's id, absent for a device.
    pub fn module_id(&self) -> Option<&str> {
        self.module.as_deref()
    }

    /// The identity of the device that this identity is or runs on.
    pub fn of_device(&self) -> Identity {
        Identity { device: self.device.clone(), module: None }
    }
}

fn checked(what: &'static str, id: &str) -> Result<Arc<str>, IdentityError> {
    if id.trim().is_empty() {
        return Err(IdentityError::Blank(what));
    }
    if id.len() > ID_BYTES_MAX {
        return Err(IdentityError::TooLong(what));
    }
    if id.chars().any(|c| c == '/' || c.is_control()) {
        return Err(IdentityError::Character(what));
    }
    Ok(id.into())
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.module {
            None => f.write_str(&self.device),
            Some(module) => write!(f, "{}/{}", self.device, module),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        for text in ["leaf1", "edge1/$edgeHub", "a b/c.d"] {
            assert_eq!(Identity::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn illegal_names_are_refused() {
        assert_eq!(Identity::parse(""), Err(IdentityError::Blank("device")));
        assert_eq!(Identity::parse("d/"), Err(IdentityError::Blank("module")));
        assert_eq!(Identity::parse("d/m/x"), Err(IdentityError::Character("module")));
        assert_eq!(Identity::parse("d\u{0}"), Err(IdentityError::Character("device")));
        assert_eq!(Identity::parse(&"x".repeat(129)), Err(IdentityError::TooLong("device")));
    }
}
