//! The edgehub message hub as a library: clients in, routes, module inputs and the upstream out.
//!
//! The rooms, in the order in which a message walks through them:
//!
//! | room | owns |
//! | --- | --- |
//! | [`head`] | what speaks to clients: sockets, packets, sessions |
//! | [`message`] | the one message type and its stored form |
//! | [`backend`] | the one trait between the heads and whoever serves them |
//! | [`identity`] | who is who: identities, tokens, the scope cache |
//! | [`dispatch`] | acceptance: size-check, decide, append, acknowledge |
//! | [`delivery`] | one pump per endpoint: order, window, backoff, expiry |
//! | [`configuration`] | the hub's own configuration: where it comes from, what is reported of it |
//! | [`method`] | direct method calls that wait for their answer |
//! | [`twin`] | twins: documents, patches, what of them is stored |
//! | [`upstream`] | the way up: links or connections per identity, tokens, supervision |
//! | [`dial`] | the way to a host: TCP or an HTTP proxy, TLS, WebSocket |
//! | [`amqp`] | the AMQP 1.0 engine that the head and the upstream drive |
//! | `mqtt` | what the head and the upstream have in common of MQTT's bytes |
//! | [`wake`] | wake-ups between threads, and the thread that a task lives on |
//! | [`hub`] | the builder and the handle that an embedder holds |
//!
//! The crate names no environment variable and reads no file; all comes in typed, through
//! [`hub::HubOptions`].

pub mod amqp;
pub mod backend;
pub mod configuration;
pub mod delivery;
pub mod dial;
pub mod dispatch;
pub mod head;
pub mod hub;
pub mod identity;
pub mod message;
pub mod method;
mod mqtt;
pub mod twin;
pub mod upstream;
pub mod wake;
