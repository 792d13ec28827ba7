//! What speaks to clients: one module per protocol, all of them on [`crate::backend::Backend`].

pub mod amqp;
pub mod anteroom;
pub mod mqtt;
pub(crate) mod warn_limit;
pub mod websocket;
