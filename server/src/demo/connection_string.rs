//! Owns the connection strings of the simulated modules, and the tokens that are made of them.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, Mac};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::Sha256;

/// Everything but the unreserved characters (RFC 3986 §2.3).
pub(super) const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// What is wrong with a connection string; never holds its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A part is missing.
    #[error("its part {0}= is missing")]
    Missing(&'static str),
    /// The key is not base64.
    #[error("its SharedAccessKey is not base64")]
    Key,
}

/// Who a client is and how it proves it. `Debug` does not show the key.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct ConnectionString {
    host: String,
    device_id: String,
    module_id: Option<String>,
    key: Vec<u8>,
}

impl ConnectionString {
    /// Reads `HostName=..;DeviceId=..[;ModuleId=..];SharedAccessKey=..`; other parts are skipped.
    pub(super) fn parse(text: &str) -> Result<Self, Fault> {
        let part = |name: &'static str| {
            let of_name = |part: &str| part.trim().strip_prefix(name)?.strip_prefix('=').map(str::to_owned);
            text.split(';').find_map(of_name).filter(|value| !value.is_empty())
        };
        let needed = |name| part(name).ok_or(Fault::Missing(name));
        let key = BASE64.decode(needed("SharedAccessKey")?).map_err(|_| Fault::Key)?;
        Ok(Self {
            host: needed("HostName")?,
            device_id: needed("DeviceId")?,
            module_id: part("ModuleId"),
            key,
        })
    }

    /// The same identity at a cloud hub of this name.
    pub(super) fn with_host(self, host: &str) -> Self {
        Self { host: host.to_owned(), ..self }
    }

    /// The text, for the gateway where one is given.
    pub(super) fn text(&self, gateway: Option<&str>) -> String {
        let mut text = format!("HostName={};DeviceId={}", self.host, self.device_id);
        if let Some(module_id) = &self.module_id {
            text += &format!(";ModuleId={module_id}");
        }
        text += &format!(";SharedAccessKey={}", BASE64.encode(&self.key));
        if let Some(gateway) = gateway {
            text += &format!(";GatewayHostName={gateway}");
        }
        text
    }

    /// `{device}` or `{device}/{module}`: the MQTT client id.
    pub(super) fn client_id(&self) -> String {
        match &self.module_id {
            Some(module_id) => format!("{}/{module_id}", self.device_id),
            None => self.device_id.clone(),
        }
    }

    /// The MQTT user name, as SDKs make it.
    pub(super) fn user_name(&self) -> String {
        format!("{}/{}/?api-version=2021-04-12&DeviceClientType=edgehub-demo", self.host, self.client_id())
    }

    /// The topic for messages of one output, with these properties.
    pub(super) fn output_topic(&self, output: &str, properties: &[(&str, &str)]) -> String {
        let mut topic = format!("devices/{}", self.device_id);
        if let Some(module_id) = &self.module_id {
            topic += &format!("/modules/{module_id}");
        }
        topic += &format!("/messages/events/%24.on={}", utf8_percent_encode(output, RESERVED));
        for (name, value) in properties {
            let (name, value) = (utf8_percent_encode(name, RESERVED), utf8_percent_encode(value, RESERVED));
            topic += &format!("&{name}={value}");
        }
        topic
    }

    /// The filter for the inputs of a module.
    pub(super) fn inputs_filter(&self) -> String {
        let module_id = self.module_id.as_deref().unwrap_or_default();
        format!("devices/{}/modules/{module_id}/inputs/#", self.device_id)
    }

    /// A token that is valid until then (seconds since 1970-01-01 UTC).
    pub(super) fn token(&self, expires_at_secs: u64) -> String {
        let mut audience = format!("{}/devices/{}", self.host, self.device_id);
        if let Some(module_id) = &self.module_id {
            audience += &format!("/modules/{module_id}");
        }
        let audience = utf8_percent_encode(&audience, RESERVED).to_string();
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&self.key).expect("a key"); // HMAC takes any length
        mac.update(format!("{audience}\n{expires_at_secs}").as_bytes());
        let signature = BASE64.encode(mac.finalize().into_bytes());
        let signature = utf8_percent_encode(&signature, RESERVED);
        format!("SharedAccessSignature sr={audience}&sig={signature}&se={expires_at_secs}")
    }
}

impl fmt::Debug for ConnectionString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConnectionString").field(&self.client_id()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "HostName=hub1.example.net;DeviceId=d1;\
                        SharedAccessKey=cHJpbWFyeS1rZXktb2YtdGhlLWlkZW50aXR5LTAwMDE=";

    #[test]
    fn a_token_is_that_of_the_published_vector() {
        let identity = ConnectionString::parse(TEXT).expect("valid");
        assert_eq!(
            identity.token(1_700_003_600),
            "SharedAccessSignature sr=hub1.example.net%2Fdevices%2Fd1\
             &sig=iAEPIzB5vsu%2BMM%2B97WOtVBAmIze%2BKsssQD56d7Tbz14%3D&se=1700003600"
        );
    }

    #[test]
    fn the_text_is_read_and_written() {
        let text = TEXT.replace(";Shared", ";ModuleId=m;Shared");
        let identity = ConnectionString::parse(&text).expect("valid").with_host("other");
        assert_eq!(
            identity.text(Some("gw")),
            text.replace("hub1.example.net", "other") + ";GatewayHostName=gw"
        );
        assert_eq!(identity.client_id(), "d1/m");
        assert_eq!(identity.inputs_filter(), "devices/d1/modules/m/inputs/#");
        assert_eq!(
            identity.output_topic("out", &[("$.ct", "a/b"), ("sequence", "7")]),
            "devices/d1/modules/m/messages/events/%24.on=out&%24.ct=a%2Fb&sequence=7"
        );
        assert!(!format!("{identity:?}").contains("cHJ"), "the key must not be shown");
    }

    #[test]
    fn faults_name_the_part() {
        assert_eq!(
            ConnectionString::parse("HostName=h;SharedAccessKey=AA==").err(),
            Some(Fault::Missing("DeviceId"))
        );
        assert_eq!(
            ConnectionString::parse("HostName=h;DeviceId=d").err(),
            Some(Fault::Missing("SharedAccessKey"))
        );
        assert_eq!(
            ConnectionString::parse("HostName=h;DeviceId=d;SharedAccessKey=?").err(),
            Some(Fault::Key)
        );
    }
}
