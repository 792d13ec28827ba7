//! The MQTT 3.1.1 head: one task per connection that owns its socket, codec and session.

pub mod bag;
mod connection;
mod control;
mod deliver;
mod encode;
mod end;
pub mod filter;
pub mod frame;
mod handshake;
pub mod packet;
mod percent;
pub mod session;
pub mod topic;
pub mod username;
mod wire;

pub use connection::{MqttLimits, Peer, refuse, serve};
pub use encode::ConnectCode;
pub use end::{ConnectionEnd, ProtocolError};
