//! The load generator of edgehub as a library: MQTT and AMQP clients that are cheap enough not to be what is measured.
//!
//! The program is `load`; criterion benchmarks of the parts are in `benches/`.

pub mod amqp;
pub mod arrivals;
pub mod client;
pub mod identity;
pub mod latency;
pub mod peer;
pub mod process;
pub mod rabbitmq;
pub mod scenario;
pub mod site;
pub mod wire;
