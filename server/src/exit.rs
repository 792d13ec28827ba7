//! Owns the end of the process: which failure gives which exit code.

use std::process::ExitCode;

use crate::admin::client::AdminError;
use crate::admin::socket::SocketError;
use crate::certificate::CertificateError;
use crate::listen::ListenError;
use crate::manifest::ManifestError;
use crate::settings::SettingsError;

/// Why the program ends with something else than success. The text is one line: what failed, why, and what
/// to do next.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line cannot be read.
    #[error("{0}")]
    CommandLine(String),
    /// The settings cannot be used.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The certificates cannot be used.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A port cannot be opened.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The operator's socket cannot be opened.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A running hub cannot be asked, or does not do it.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] edgehub_storage::OpenError),
    /// The store of a stopped hub cannot be read.
    #[error(transparent)]
    StoreContent(#[from] edgehub_storage::StoreError),
    /// Who the hub is cannot be told.
    #[error("{what} cannot be used: {reason}")]
    Identity {
        /// Which part of it.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// Nothing says which routes to run.
    #[error("there is no configuration; give the deployment manifest with --manifest FILE")]
    NoConfiguration,
    /// The hub's configuration cannot be used.
    #[error("the configuration of $edgeHub cannot be used: {0}; correct the manifest")]
    Configuration(String),
    /// The stand-in for the cloud hub cannot do what it was asked for.
    #[error("cloud: {0}")]
    Cloud(String),
    /// A file of the route tools cannot be used.
    #[error("{path} cannot be read: {reason}")]
    RouteFile {
        /// The file, as the command line names it.
        path: String,
        /// Why.
        reason: String,
    },
    /// Something that the system refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl Failure {
    /// 1: settings, certificates, manifest, routes or command line must be corrected; 2: a port or the operator's
    /// socket is not to be had; 3: the system refused something; 4: the store cannot be opened or read; 5: no hub is
    /// running.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::CommandLine(_)
            | Self::Settings(_)
            | Self::Certificate(_)
            | Self::Manifest(_)
            | Self::Identity { .. }
            | Self::NoConfiguration
            | Self::Configuration(_)
            | Self::Cloud(_)
            | Self::RouteFile { .. }
            | Self::Admin(AdminError::Refused(_) | AdminError::Path(_)) => 1,
            Self::Listen(_) | Self::Socket(_) => 2,
            Self::System { .. }
            | Self::Admin(
                AdminError::Forbidden { .. } | AdminError::Timeout { .. } | AdminError::Protocol { .. },
            ) => 3,
            Self::Store(_) | Self::StoreContent(_) => 4,
            Self::Admin(AdminError::NoHub { .. } | AdminError::SwitchedOff) => 5,
        })
    }
}
