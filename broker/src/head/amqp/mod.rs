//! The AMQP 1.0 head: one task per connection that owns its socket, engine, tokens and links.
//!
//! Many identities share a connection: each link belongs to the identity of its address, and each identity is
//! logged in once, with the token that was put for it or, on behalf of it, for the hub of a child device.
//!
//! [`connection`] has the turns and knows which event is for whom; [`clients`] logs in and out; [`identity`] is one logged-in identity with one link
//! of each function, whose parts are [`telemetry`], [`deliveries`], [`twin`] and [`methods`].

mod clients;
mod connection;
pub(crate) mod convert;
mod deliveries;
mod identity;
mod limits;
mod logins;
mod mailboxes;
mod methods;
mod outbox;
mod plain;
mod telemetry;
mod tokens;
mod turn;
mod twin;

pub use connection::serve;
pub use limits::AmqpLimits;
