//! Owns the reasons for which the demonstration cannot go on.

use std::io;
use std::process::ExitStatus;

/// Why the demonstration ended before its table, or could not begin.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// No port could be bound.
    #[error("no free TCP port found on 127.0.0.1 in {tries} tries; check the limits of this machine")]
    NoFreePort {
        /// How many were tried.
        tries: usize,
    },
    /// The fixed port of the SDKs is in use.
    #[error(
        "port {port} of 127.0.0.1 cannot be used ({source}), and SDKs know no other one; \
         find its owner with `ss -ltnp 'sport = :{port}'`, stop it, and start again"
    )]
    PortTaken {
        /// The port.
        port: u16,
        /// What binding it answered.
        source: io::Error,
    },
    /// Certificates could not be made.
    #[error("the throw-away certificates cannot be made: {0}")]
    Certificates(#[from] crate::certificate::CertificateError),
    /// The clients' side of TLS could not be set up.
    #[error("TLS of the simulated modules cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// The embedded manifest is damaged.
    #[error("the embedded manifest: {0}")]
    Manifest(&'static str),
    /// A command of this program failed.
    #[error("`{command}` failed ({status}): {output}")]
    Command {
        /// Its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// Its error output.
        output: String,
    },
    /// An identity's connection string could not be read.
    #[error("the connection string of {identity}: {fault}")]
    ConnectionString {
        /// The identity.
        identity: String,
        /// What is wrong with it.
        fault: super::connection_string::Fault,
    },
    /// Something did not come in time.
    #[error("waited {limit_secs} s for {awaited}, in vain; {last}")]
    Deadline {
        /// What was awaited.
        awaited: String,
        /// For how long.
        limit_secs: u64,
        /// What was seen last.
        last: String,
    },
    /// A child ended without being told to.
    #[error("the {name} ended by itself ({status})")]
    Ended {
        /// Which one.
        name: &'static str,
        /// How.
        status: ExitStatus,
    },
    /// Ctrl-C, or another signal that ends a program.
    #[error("interrupted")]
    Interrupted,
}

impl DemoError {
    /// An error of the operating system with what was tried.
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
