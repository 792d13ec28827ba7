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
//! | [`amqp`] | the AMQP 1.0 engine that the head and the upstream drive |
//!
//! The crate names no environment variable and reads no file; all comes in typed, through
//! its builder.

pub mod amqp;
pub mod backend;
pub mod head;
pub mod identity;
pub mod message;
