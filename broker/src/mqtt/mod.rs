//! MQTT on the wire, for both directions: what the head and the upstream have in common of its bytes.
//!
//! | room | owns |
//! | --- | --- |
//! | `inlet` | bytes from a stream into a buffer of exactly the size that arrived |
//! | `outlet` | bytes that wait until a stream takes them |
//! | `length` | where a packet ends |

mod inlet;
mod length;
mod outlet;

pub(crate) use inlet::{READ_BYTES, poll_read_once};
pub(crate) use length::{Extent, Malformed};
pub(crate) use outlet::Outlet;
