//! The workload API of the security daemon: whoever holds the hub's key signs, encrypts and issues certificates for it.
//!
//! | room | owns |
//! | --- | --- |
//! | `client` | the calls, their deadlines and retries |
//! | `cipher` | stored twins, sealed with keys that the daemon wraps |
//! | `transport` | one HTTP request over a Unix socket or TCP |
//! | `provision` | what a hub must have before it opens a port |
//! | `keeper` | certificate and trust of a running hub: asked for anew before they end |
//! | [`stand_in`] | the other side, for tests and development |

mod cipher;
mod client;
mod keeper;
mod provision;
pub mod stand_in;
mod transport;

pub use cipher::WorkloadCipher;
pub use client::{IssuedCertificate, WorkloadClient, WorkloadError};
pub use keeper::{BundleTaker, Keeper, Renewal};
pub use provision::{Provisioned, provision};
pub use transport::ANSWER_BYTES_MAX;
