//! The MQTT head as a client sees it.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod cloud_to_device;
mod connection;
mod control;
mod decisions;
mod differential;
mod mock;
mod slow;
mod vectors;
