//! Twins: what a device or module is told to be, what it says it is, and how both change.
//!
//! | room | owns |
//! | --- | --- |
//! | [`json`] | documents and patches: merge, difference, limits |
//! | `change` | the message by which routes hear of a change |
//! | `pending` | patches that wait for the upstream, put together |
//! | `record` | what is kept of one twin |
//! | `store` | the twins on disk, sealed by a cipher or not |
//!
//! Who asks for what, and when, is the hub's affair.

mod change;
pub mod json;
mod pending;
mod record;
mod store;

pub(crate) use change::change_message;
pub use pending::Pending;
pub use record::{REPORTED_BYTES_MAX, TwinRecord, desired_diff, sections, text, unknown_section, version};
pub use store::{CipherError, Ciphering, SealedTwin, TwinCipher, TwinStore, TwinStoreError};
