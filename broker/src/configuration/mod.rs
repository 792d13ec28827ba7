//! The hub's own configuration: where it comes from, when it is put in force, and what the upstream is told of it.
//!
//! ```text
//!  manifest ──┐                          ┌──▶ Hub::apply (routes, times to live, limit of the store)
//!  store ─────┼──▶ Configuration ────────┼──▶ store: what is in force, for the next start
//!  own twin ──┘      reads, compares     └──▶ Reporter ──▶ own twin: version, status, clients
//! ```
//!
//! * `document` reads desired properties and says in the reference's words why they are refused;
//! * `broker_section` checks the section `mqttBroker`, which nothing else reads;
//! * `stored` is the form in which the configuration in force outlives the process;
//! * `clients` keeps who has to be reported as connected, however often they come and go;
//! * `report` sends reported properties, one update at a time;
//! * `course` is the order of it all.
//!
//! What counts when several are there: the twin of `$edgeHub` as the upstream has it; else what was in force before the
//! restart; else the manifest. With [`Configuration::from_file`] the manifest alone.

mod broker_section;
mod clients;
mod course;
mod document;
mod report;
mod stored;

use std::future::Future;
use std::sync::Arc;

use tokio::sync::watch;

use crate::backend::TwinError;
use crate::hub::DesiredProperties;
use crate::twin::json::Object;

pub use clients::{ClientRoll, LISTED_BYTES_MAX, PATCH_CLIENTS_BYTES_MAX};
pub use course::{Configuration, ConfigurationOptions, ConfigurationState, InForce, Origin, StartError};
pub use document::{DESCRIPTION_BYTES_MAX, Refusal, Status, read};
pub use report::{ProgramVersion, REPORT_RETRY};

/// The hub's own twin, as this room needs it.
pub trait OwnTwin: Send + Sync + 'static {
    /// The desired properties, all patches merged: whether they can be put in force does not matter, the next patch
    /// may correct them. `None` until they are known, from a cache or the upstream.
    fn desired(&self) -> watch::Receiver<Option<Arc<DesiredProperties>>>;

    /// Resolves as soon as the upstream can be asked; at once if it can be now.
    fn reachable(&self) -> impl Future<Output = ()> + Send;

    /// Reads the twin from the upstream; what it brings is seen through [`OwnTwin::desired`].
    ///
    /// # Errors
    /// The upstream did not give it.
    fn pull(&self) -> impl Future<Output = Result<(), TwinError>> + Send;

    /// Merges a patch into the reported properties; done when it cannot be lost any more.
    ///
    /// # Errors
    /// It is not taken: for good with [`TwinError::Invalid`], else for now.
    fn report(&self, patch: &Object) -> impl Future<Output = Result<(), TwinError>> + Send;
}
