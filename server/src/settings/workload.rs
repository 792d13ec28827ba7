//! Owns where the security daemon is, and which version of its workload API is spoken.

use std::fmt;
use std::path::PathBuf;

use super::value::Values;
use super::{HostName, SettingsError};

/// The newest version of the API that is spoken here.
const API_VERSION: &str = "2020-07-07";
/// Longest generation id, characters.
const GENERATION_CHARS_MAX: usize = 128;

/// Where the daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkloadUri {
    /// A Unix socket.
    Unix(PathBuf),
    /// Plain HTTP over TCP.
    Http {
        /// Host.
        host: HostName,
        /// Port.
        port: u16,
    },
}

impl WorkloadUri {
    /// Reads `unix:///path` or `http://host[:port][/]`.
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        match scheme.to_ascii_lowercase().as_str() {
            "unix" => (rest.starts_with('/') && rest.len() > 1).then(|| Self::Unix(rest.into())),
            "http" => {
                let rest = rest.trim_end_matches('/');
                let (host, port) = match rest.rsplit_once(':') {
                    Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                        (host, port.parse().ok()?)
                    }
                    _ => (rest, 80),
                };
                let host = host.trim_start_matches('[').trim_end_matches(']');
                Some(Self::Http { host: HostName::parse(host).ok()?, port })
            }
            _ => None,
        }
    }
}

impl fmt::Display for WorkloadUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Http { host, port } => {
                write!(f, "http://{}", edgehub_broker::dial::authority(host.as_str(), *port))
            }
        }
    }
}

/// How the workload API is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadSettings {
    /// Where it is.
    pub uri: WorkloadUri,
    /// Which of the module's lives this is; part of every path.
    pub generation_id: String,
    /// The version spoken.
    pub api_version: String,
}

impl WorkloadSettings {
    pub(super) fn read(values: &Values<'_>) -> Result<Self, SettingsError> {
        let uri_expected = "unix:///path of the socket, or http://host:port";
        let generation_expected = "the generation id of the module, as the agent sets it";
        Ok(Self {
            uri: values
                .optional("IOTEDGE_WORKLOADURI", uri_expected, WorkloadUri::parse)?
                .ok_or(SettingsError::NoIdentity)?,
            generation_id: values.required("IOTEDGE_MODULEGENERATIONID", generation_expected, |text| {
                let fits = !text.is_empty() && text.chars().count() <= GENERATION_CHARS_MAX;
                fits.then(|| text.to_owned())
            })?,
            api_version: values
                .optional("IOTEDGE_APIVERSION", "a version such as 2020-07-07", api_version)?
                .unwrap_or_else(|| API_VERSION.to_owned()),
        })
    }
}

/// The older of the version that the daemon offers and the one that is spoken here. Versions are dates, so their texts
/// sort as they do.
fn api_version(offered: &str) -> Option<String> {
    let mut parts = offered.split('-');
    let digits = |part: Option<&str>, count: usize| {
        part.is_some_and(|part| part.len() == count && part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let is_date = digits(parts.next(), 4) && digits(parts.next(), 2) && digits(parts.next(), 2);
    let rest_is_plain = parts.all(|part| part.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    (is_date && rest_is_plain).then(|| offered.min(API_VERSION).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris() {
        for (text, shown) in [
            ("unix:///var/run/iotedge/workload.sock", Some("unix:///var/run/iotedge/workload.sock")),
            ("UNIX:///s", Some("unix:///s")),
            ("http://10.0.0.1:15581/", Some("http://10.0.0.1:15581")),
            ("http://daemon", Some("http://daemon:80")),
            ("http://[::1]:8080", Some("http://[::1]:8080")),
            ("unix://relative", None),
            ("unix:///", None),
            ("https://daemon", None),
            ("http://daemon:x", None),
            ("http://user@daemon", None),
            ("/var/run/iotedge/workload.sock", None),
            ("", None),
        ] {
            assert_eq!(WorkloadUri::parse(text).map(|uri| uri.to_string()).as_deref(), shown, "{text:?}");
        }
    }

    #[test]
    fn the_older_version_is_spoken() {
        for (offered, spoken) in [
            ("2018-06-28", Some("2018-06-28")),
            ("2019-01-30", Some("2019-01-30")),
            ("2020-07-07", Some("2020-07-07")),
            ("2021-12-07", Some("2020-07-07")),
            ("2019-10-22-preview", Some("2019-10-22-preview")),
            ("2020", None),
            ("20-07-07", None),
            ("2020-07-07&x=y", None),
        ] {
            assert_eq!(api_version(offered).as_deref(), spoken, "{offered}");
        }
    }
}
