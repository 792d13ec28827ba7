//! Owns who the hub is: the names and the key out of the connection string or the environment.

use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;

use super::value::Values;
use super::workload::WorkloadSettings;
use super::{Notice, SettingsError};

/// Longest device or module id (IoT Hub's identity registry).
const ID_CHARS_MAX: usize = 128;
/// Longest DNS name (RFC 1035 §2.3.4).
const HOST_BYTES_MAX: usize = 253;

/// A DNS name or an IP address, without port and without brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostName(String);

impl HostName {
    /// Checks the text: 1 to 253 characters, letters, digits, `-`, `_` and `.` (or an IP address).
    pub fn parse(text: &str) -> Result<Self, IdentityFault> {
        let plain = !text.is_empty()
            && text.len() <= HOST_BYTES_MAX
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && text.split('.').all(|label| !label.is_empty() && label.len() <= 63);
        if plain || text.parse::<IpAddr>().is_ok() {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdentityFault::HostName)
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of a device or module as the identity registry allows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegistryId(String);

impl RegistryId {
    /// Checks the text: 1 to 128 ASCII letters, digits and ``- : . + % _ # * ? ! ( ) , = @ $ '``.
    pub fn parse(text: &str) -> Result<Self, IdentityFault> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-:.+%_#*?!(),=@$'".contains(&byte);
        if text.is_empty() || text.len() > ID_CHARS_MAX || !text.bytes().all(allowed) {
            return Err(IdentityFault::Id);
        }
        Ok(Self(text.to_owned()))
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RegistryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A symmetric key, decoded. Its `Debug` form shows nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct SharedKey(Vec<u8>);

impl SharedKey {
    /// Decodes the base64 form of connection strings.
    pub fn parse(text: &str) -> Result<Self, IdentityFault> {
        match base64::engine::general_purpose::STANDARD.decode(text) {
            Ok(bytes) if !bytes.is_empty() => Ok(Self(bytes)),
            _ => Err(IdentityFault::Key),
        }
    }

    /// The raw key bytes, for signing.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedKey(…)")
    }
}

/// What is wrong with a name or a connection string; never holds the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityFault {
    /// Not a host name.
    #[error("a host name must be a DNS name or an IP address without port")]
    HostName,
    /// Not an id of the registry.
    #[error("an id must have 1 to 128 characters, letters, digits and -:.+%_#*?!(),=@$'")]
    Id,
    /// Not a key.
    #[error("SharedAccessKey must be base64")]
    Key,
    /// A part of a connection string that is not `Name=value`.
    #[error("it must consist of parts Name=value, separated by semicolons")]
    Shape,
    /// A part of a connection string is missing.
    #[error("the part {0}= is missing")]
    MissingPart(&'static str),
    /// The connection string belongs to something else than the hub module.
    #[error("ModuleId must be $edgeHub: take the connection string of the hub module, not of the device")]
    ModuleId,
}

/// By what the hub proves itself to the upstream.
#[derive(Clone, Debug)]
pub enum HubProof {
    /// The key of the module `$edgeHub`.
    Key(SharedKey),
    /// The security daemon, which has the key.
    Workload(WorkloadSettings),
}

/// Who the hub is and how it proves it.
#[derive(Clone, Debug)]
pub struct HubIdentity {
    /// Host name of the cloud hub: part of every token audience.
    pub iothub_host: HostName,
    /// The edge device.
    pub device_id: RegistryId,
    /// By what it proves itself.
    pub proof: HubProof,
    /// Name under which clients reach this hub; also accepted in token audiences.
    pub own_host: Option<HostName>,
    /// The parent gateway of a nested hub; it takes the place of the cloud hub as upstream.
    pub parent_host: Option<HostName>,
}

impl HubIdentity {
    pub(super) fn read(values: &mut Values<'_>) -> Result<Self, SettingsError> {
        let own_host = values.host("EdgeDeviceHostName")?;
        if let Some(entry) = values.entry("IotHubConnectionString") {
            for name in [
                "IOTEDGE_DEVICEID",
                "IOTEDGE_IOTHUBHOSTNAME",
                "IOTEDGE_GATEWAYHOSTNAME",
                "IOTEDGE_WORKLOADURI",
            ] {
                if let Some(other) = values.entry(name) {
                    let why = "IotHubConnectionString says who the hub is";
                    let origin = other.origin.clone();
                    values.notices.push(Notice::Ignored { name: name.into(), origin, why });
                }
            }
            return Self::from_connection_string(entry.text.trim(), own_host)
                .map_err(|fault| SettingsError::ConnectionString { origin: entry.origin.clone(), fault });
        }
        if values.text("IOTEDGE_MODULEID") != Some("$edgeHub") {
            return Err(SettingsError::Missing {
                name: "IOTEDGE_MODULEID".into(),
                expected: "$edgeHub, the only module that this program can be".into(),
            });
        }
        let identity = Self {
            iothub_host: values.host("IOTEDGE_IOTHUBHOSTNAME")?.ok_or(SettingsError::NoIdentity)?,
            device_id: values
                .optional("IOTEDGE_DEVICEID", "a device id", |text| RegistryId::parse(text).ok())?
                .ok_or(SettingsError::NoIdentity)?,
            proof: HubProof::Workload(WorkloadSettings::read(values)?),
            own_host,
            parent_host: values.host("IOTEDGE_GATEWAYHOSTNAME")?,
        };
        Ok(identity)
    }

    /// Reads `HostName=..;DeviceId=..;ModuleId=$edgeHub;SharedAccessKey=..[;GatewayHostName=..]`.
    /// Part names are compared without regard to case; unknown parts are skipped.
    pub fn from_connection_string(text: &str, own_host: Option<HostName>) -> Result<Self, IdentityFault> {
        let (mut host, mut device, mut module, mut key, mut gateway) = (None, None, None, None, None);
        for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').ok_or(IdentityFault::Shape)?;
            let value = value.trim();
            match name.trim().to_ascii_lowercase().as_str() {
                "hostname" => host = Some(HostName::parse(value)?),
                "deviceid" => device = Some(RegistryId::parse(value)?),
                "moduleid" => module = Some(value),
                "sharedaccesskey" => key = Some(SharedKey::parse(value)?),
                "gatewayhostname" => gateway = Some(HostName::parse(value)?),
                _ => {}
            }
        }
        if module != Some("$edgeHub") {
            return Err(IdentityFault::ModuleId);
        }
        Ok(Self {
            iothub_host: host.ok_or(IdentityFault::MissingPart("HostName"))?,
            device_id: device.ok_or(IdentityFault::MissingPart("DeviceId"))?,
            proof: HubProof::Key(key.ok_or(IdentityFault::MissingPart("SharedAccessKey"))?),
            own_host,
            parent_host: gateway,
        })
    }

    /// The host to connect to: the parent where there is one, else the cloud hub.
    pub fn upstream_host(&self) -> &HostName {
        self.parent_host.as_ref().unwrap_or(&self.iothub_host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "HostName=h.example;DeviceId=edge1;ModuleId=$edgeHub;SharedAccessKey=c2VjcmV0";

    #[test]
    fn a_connection_string_is_read_part_by_part() {
        let text = format!("{};gatewayhostname=parent", GOOD.replace("HostName", "hostname"));
        let identity = HubIdentity::from_connection_string(&text, None).expect("valid");
        assert_eq!(identity.iothub_host.as_str(), "h.example");
        assert_eq!(identity.upstream_host().as_str(), "parent");
        assert!(matches!(&identity.proof, HubProof::Key(key) if key.expose() == b"secret"));
        assert!(!format!("{identity:?}").contains("115"), "the key must not be shown");
    }

    #[test]
    fn faults_name_the_part() {
        for (from, to, fault) in [
            ("HostName=h.example;", "", IdentityFault::MissingPart("HostName")),
            ("edge1", "edge 1", IdentityFault::Id),
            ("$edgeHub", "other", IdentityFault::ModuleId),
            ("ModuleId=$edgeHub;", "", IdentityFault::ModuleId),
            ("c2VjcmV0", "c2VjcmV0!", IdentityFault::Key),
            ("h.example", "h.example:8883", IdentityFault::HostName),
            ("DeviceId=edge1", "DeviceId", IdentityFault::Shape),
        ] {
            let found = HubIdentity::from_connection_string(&GOOD.replace(from, to), None);
            assert_eq!(found.err(), Some(fault), "{from} -> {to}");
        }
    }
}
