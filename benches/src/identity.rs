//! Owns the generator's identities: connection strings, and the SAS tokens they sign.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

/// Life of a token, seconds.
const TOKEN_LIFE_SECS: u64 = 24 * 3600;

/// A device or module with its key.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Host name of the cloud hub, part of the token's audience.
    pub host: String,
    /// Device id.
    pub device: String,
    /// Module id.
    pub module: Option<String>,
    key: Vec<u8>,
}

/// A connection string that cannot be used; never holds the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the connection string lacks a usable {0}")]
pub struct IdentityError(&'static str);

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.client_id()).finish()
    }
}

impl Identity {
    /// Reads `HostName=…;DeviceId=…[;ModuleId=…];SharedAccessKey=…`.
    ///
    /// # Errors
    /// A part is missing, or the key is not base64.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let part = |name: &str| {
            text.trim()
                .split(';')
                .find_map(|part| part.split_once('=').filter(|(has, _)| *has == name))
                .map(|(_, value)| value)
        };
        let needed = |name: &'static str| part(name).map(str::to_owned).ok_or(IdentityError(name));
        let key = STANDARD
            .decode(needed("SharedAccessKey")?)
            .map_err(|_base64| IdentityError("SharedAccessKey"))?;
        Ok(Self {
            host: needed("HostName")?,
            device: needed("DeviceId")?,
            module: part("ModuleId").map(str::to_owned),
            key,
        })
    }

    /// MQTT client id: `device` or `device/module`.
    pub fn client_id(&self) -> String {
        match &self.module {
            Some(module) => format!("{}/{module}", self.device),
            None => self.device.clone(),
        }
    }

    /// MQTT user name.
    pub fn user_name(&self) -> String {
        format!("{}/{}/?api-version=2021-04-12", self.host, self.client_id())
    }

    /// What a token is for: host and path of the identity.
    pub fn audience(&self) -> String {
        let module = self.module.as_ref().map(|module| format!("/modules/{module}")).unwrap_or_default();
        format!("{}/devices/{}{module}", self.host, self.device)
    }

    /// The connection string.
    pub fn connection_string(&self) -> String {
        let module = self.module.as_ref().map(|module| format!(";ModuleId={module}")).unwrap_or_default();
        format!(
            "HostName={};DeviceId={}{module};SharedAccessKey={}",
            self.host,
            self.device,
            STANDARD.encode(&self.key)
        )
    }

    /// A SAS token that is good for a day.
    pub fn token(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.token_until(now + TOKEN_LIFE_SECS)
    }

    fn token_until(&self, expiry: u64) -> String {
        let resource = percent_encoded(&self.audience());
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes keys of any length");
        mac.update(format!("{resource}\n{expiry}").as_bytes());
        let signature = percent_encoded(&STANDARD.encode(mac.finalize().into_bytes()));
        format!("SharedAccessSignature sr={resource}&sig={signature}&se={expiry}")
    }
}

fn percent_encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 3 / 2);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_string_goes_both_ways() {
        let text = "HostName=h.test;DeviceId=d;ModuleId=m;SharedAccessKey=c2VjcmV0PT09";
        let identity = Identity::parse(text).expect("valid");
        assert_eq!(identity.client_id(), "d/m");
        assert_eq!(identity.connection_string(), text);
        assert_eq!(format!("{identity:?}"), "Identity(\"d/m\")");
        assert_eq!(Identity::parse("HostName=h;DeviceId=d").err(), Some(IdentityError("SharedAccessKey")));
    }

    #[test]
    fn a_token_signs_resource_and_expiry() {
        let identity = Identity::parse("HostName=h.test;DeviceId=d;SharedAccessKey=c2VjcmV0").expect("valid");
        // Computed with Python's hmac, key "secret", text "h.test%2Fdevices%2Fd\n1700000000".
        let signature = "yfcfsBf9k7C%2BLlLvFf9qjcb65Udog%2FccbwS4k8pH%2BDs%3D";
        let wanted = format!("SharedAccessSignature sr=h.test%2Fdevices%2Fd&sig={signature}&se=1700000000");
        assert_eq!(identity.token_until(1_700_000_000), wanted);
    }
}
