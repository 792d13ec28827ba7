//! The AMQP 1.0 head: one task per connection that owns its socket, engine, tokens and links.
//!
//! Many identities share a connection: each link belongs to the identity of its address, and each identity is
//! logged in once, with the token that was put for it or, on behalf of it, for the hub of a child device.
//!
//! This release serves tokens (`$cbs`) and telemetry links. Links of other functions are refused with
//! `amqp:not-implemented`.

mod connection;
pub(crate) mod convert;
mod mailboxes;
mod tokens;

pub use connection::{AmqpLimits, serve};
