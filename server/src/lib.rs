//! The edgehub program as a library: settings, certificates, listeners, pages and command line.
//!
//! The program names ports, files and environment variables; the hub gets everything typed.

pub mod admin;
pub mod api;
pub mod certificate;
pub mod check;
pub mod cli;
pub mod cloud;
pub mod demo;
pub mod exit;
pub mod hub;
pub mod listen;
pub mod log;
pub mod manifest;
pub mod metrics;
pub mod output;
pub mod pages;
pub mod route;
pub mod run;
pub mod settings;
pub mod stop;
pub mod store;
pub mod workload;
