//! Owns what the settings have to say to the operator: notices for the log, errors that prevent the start.

use std::fmt;
use std::path::PathBuf;

use edgehub_broker::dial::ProxyUrlError;
use edgehub_broker::upstream::plain::BrokerUrlError;
use edgehub_broker::upstream::targets::RouteTargetsError;

use super::catalog::{self, setting_id};
use super::identity::IdentityFault;
use super::layers::{Entry, Origin};
use super::mask::{self, Masked};

/// Something the operator should know; one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A name that nothing knows.
    Unknown {
        /// As given.
        name: String,
        /// Where.
        origin: Origin,
        /// A known name that is probably meant.
        suggestion: Option<String>,
    },
    /// A setting without effect.
    Ignored {
        /// Documented spelling.
        name: String,
        /// Where.
        origin: Origin,
        /// Reason.
        why: &'static str,
    },
    /// A setting that takes effect in another way.
    Mapped {
        /// Documented spelling.
        name: String,
        /// Where.
        origin: Origin,
        /// In which way.
        how: &'static str,
    },
    /// A value out of a closed list was not understood, and the default is used.
    FellBack {
        /// Documented spelling.
        name: &'static str,
        /// Where.
        origin: Origin,
        /// What is used.
        to: &'static str,
    },
    /// The store is in the temporary folder.
    TemporaryStore(PathBuf),
}

impl Notice {
    /// Something is probably not as the operator wants it; the others only explain.
    pub fn is_warning(&self) -> bool {
        match self {
            Self::Unknown { .. } | Self::FellBack { .. } | Self::TemporaryStore(_) => true,
            Self::Ignored { .. } | Self::Mapped { .. } => false,
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { name, origin, suggestion: Some(known) } => {
                write!(f, "setting {name} ({origin}) is unknown; did you mean {known}?")
            }
            Self::Unknown { name, origin, suggestion: None } => {
                write!(f, "setting {name} ({origin}) is unknown and has no effect")
            }
            Self::Ignored { name, origin, why } => {
                write!(f, "setting {name} ({origin}) has no effect: {why}")
            }
            Self::Mapped { name, origin, how } => {
                write!(f, "setting {name} ({origin}) is taken in a different way: {how}")
            }
            Self::FellBack { name, origin, to } => {
                write!(f, "setting {name} ({origin}) holds a value that is not known; using {to}")
            }
            Self::TemporaryStore(path) => write!(
                f,
                "StorageFolder is not set: messages are kept in {}, which may not survive a restart of the \
                 machine or container; set StorageFolder to a mounted folder",
                path.display()
            ),
        }
    }
}

/// Why the settings cannot be used. No variant holds a secret.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The settings file cannot be read.
    #[error("settings file {path} cannot be read: {reason}; check the path and the permissions")]
    FileUnreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// The settings file is not TOML, or the reference's is not JSON.
    #[error("settings file {path}, line {line}, column {column}: {reason}; correct the file")]
    FileSyntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What the parser expected.
        reason: String,
    },
    /// A value does not convert.
    #[error("setting {name} ({origin}){shown} does not convert: expected {expected}")]
    Value {
        /// Documented spelling.
        name: String,
        /// Where it was given.
        origin: Origin,
        /// The value, for settings that are no secrets.
        shown: String,
        /// What would be right.
        expected: String,
    },
    /// A setting without default is not given.
    #[error("setting {name} is missing: expected {expected}")]
    Missing {
        /// Documented spelling.
        name: String,
        /// What would be right.
        expected: String,
    },
    /// `--set` with a name that nothing knows.
    #[error("command line flag {flag}: there is no setting {name}; see the reference of settings")]
    UnknownFlagSetting {
        /// The flag.
        flag: String,
        /// The name after it.
        name: String,
    },
    /// The connection string is not usable.
    #[error("setting IotHubConnectionString ({origin}) is not usable: {fault}")]
    ConnectionString {
        /// Where it was given.
        origin: Origin,
        /// What is wrong.
        fault: IdentityFault,
    },
    /// The proxy is not usable.
    #[error("setting https_proxy ({origin}) is not usable: {fault}")]
    Proxy {
        /// Where it was given.
        origin: Origin,
        /// What is wrong; holds nothing of the URL.
        fault: ProxyUrlError,
    },
    /// The broker is not usable.
    #[error("setting upstream.url ({origin}) is not usable: {fault}")]
    Broker {
        /// Where it was given.
        origin: Origin,
        /// What is wrong; holds nothing of the URL.
        fault: BrokerUrlError,
    },
    /// A hub is above, which has no addresses to choose from.
    #[error(
        "setting upstream.targets ({origin}) needs another broker above: a hub takes all messages at one place; set \
         upstream.kind = \"amqp\", or remove the targets"
    )]
    TargetsOfHub {
        /// Where the first was given.
        origin: Origin,
    },
    /// The targets are not usable.
    #[error("setting upstream.targets is not usable: {0}; shorten it or give routes the same target")]
    Targets(RouteTargetsError),
    /// Nothing says who the hub is.
    #[error(
        "nothing says who the hub is; set IotHubConnectionString \
         (HostName=..;DeviceId=..;ModuleId=$edgeHub;SharedAccessKey=..), or run it as the agent does, with \
         IOTEDGE_IOTHUBHOSTNAME, IOTEDGE_DEVICEID, IOTEDGE_MODULEGENERATIONID and IOTEDGE_WORKLOADURI"
    )]
    NoIdentity,
    /// Only versions of TLS that no longer exist are named.
    #[error(
        "setting SslProtocols ({origin}) names only versions below TLS 1.2, which are not supported; use \
         tls1.2,tls1.3"
    )]
    OutdatedTls {
        /// Where it was given.
        origin: Origin,
    },
    /// A TLS listener is on and has no certificate.
    #[error(
        "setting {missing} is missing: the TLS listeners need a certificate and its key; set \
         EdgeHubDevServerCertificateFile and EdgeHubDevServerPrivateKeyFile to PEM files (`edgehub \
         certificate create-demo` makes some for trying out), or switch the listeners off with \
         mqttSettings__enabled, amqpSettings__enabled and httpSettings__enabled=false"
    )]
    NoCertificate {
        /// The setting that is not given.
        missing: &'static str,
    },
}

impl SettingsError {
    pub(super) fn value(name: &str, entry: &Entry, expected: &str) -> Self {
        let known = catalog::find(&setting_id(name));
        let shown = match known.map(|known| mask::masked(known, &entry.text)) {
            Some(Masked::Plain(text)) => {
                let mut text: String = text.chars().take(60).collect();
                text.retain(|character| !character.is_control());
                format!(" = {text:?}")
            }
            Some(Masked::Hidden) | None => String::new(),
        };
        Self::Value { name: name.into(), origin: entry.origin.clone(), shown, expected: expected.into() }
    }
}
