//! Owns the setting of the operator's socket, which the hub and the operator's verbs must read alike.

use std::path::PathBuf;

use super::layers::Layers;
use super::value::Values;
use super::{SettingsError, Sources, hub_folder};

/// File name of the socket below the hub's folder.
const SOCKET_FILE: &str = "admin.sock";

/// The operator's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminSocket {
    /// There is none.
    Off,
    /// `admin.socket` names it: a hub that cannot open it does not start.
    Given(PathBuf),
    /// In the hub's folder, below `StorageFolder`: a hub that cannot open it warns, and runs without.
    Default(PathBuf),
}

impl AdminSocket {
    /// The socket as the hub with the same settings has it. Nothing else is read, so that an operator needs
    /// neither the hub's key nor its certificates.
    ///
    /// # Errors
    /// A file or flag that is not readable as settings, with the reason.
    pub fn load(sources: Sources<'_>) -> Result<Self, SettingsError> {
        let layers = Layers::load(sources)?;
        Ok(Self::read(&Values::new(&layers)))
    }

    pub(super) fn read(values: &Values<'_>) -> Self {
        match values.text("admin:socket") {
            Some(text) if text.eq_ignore_ascii_case("off") => Self::Off,
            Some(text) => Self::Given(text.into()),
            None => Self::Default(hub_folder(values).join(SOCKET_FILE)),
        }
    }
}
