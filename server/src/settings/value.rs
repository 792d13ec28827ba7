//! Owns the conversion of setting texts into typed values.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::dial::HttpProxy;
use edgehub_broker::upstream::plain::BrokerUrl;

use super::layers::{Entry, Layers, Member};
use super::{HostName, Notice, SettingsError};

/// What a flag may be set to.
const FLAG_EXPECTED: &str = "true or false";

/// The address part of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenHost {
    /// Every address: the IPv6 wildcard that also takes IPv4, or the IPv4 wildcard on a machine without IPv6.
    Any,
    /// This address only.
    Address(IpAddr),
}

/// Where a listener is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress {
    /// Address part.
    pub host: ListenHost,
    /// TCP port; 0 lets the system choose one.
    pub port: u16,
}

impl std::fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host {
            ListenHost::Any => write!(f, "*:{}", self.port),
            ListenHost::Address(address) => SocketAddr::new(address, self.port).fmt(f),
        }
    }
}

/// Protocol versions that TLS listeners offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsVersions {
    /// TLS 1.2 (RFC 5246).
    pub tls12: bool,
    /// TLS 1.3 (RFC 8446).
    pub tls13: bool,
}

impl Default for TlsVersions {
    fn default() -> Self {
        Self { tls12: true, tls13: true }
    }
}

/// How severe an event must be to be logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Everything.
    Verbose,
    /// Debug events and above.
    Debug,
    /// Normal operation; the default.
    Info,
    /// Warnings and above.
    Warning,
    /// Errors and above.
    Error,
    /// Only what ends the process.
    Fatal,
}

impl LogLevel {
    /// Reads a level as the reference does: case does not matter, nor does anything after a comma
    /// (`info,mqtt=debug`). `None` for an unknown level, which the reference takes for `info`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split(',').next()?.trim().to_ascii_lowercase().as_str() {
            "verbose" => Some(Self::Verbose),
            "debug" => Some(Self::Debug),
            "info" | "information" => Some(Self::Info),
            "warning" => Some(Self::Warning),
            "error" => Some(Self::Error),
            "fatal" => Some(Self::Fatal),
            _ => None,
        }
    }
}

/// Form of the log's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// The reference's line.
    Text,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// Reads the name of a form, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// What an acknowledgement to a publisher promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The message survives a loss of power.
    Sync,
    /// The message survives a loss of power; acknowledgements wait for a sync that comes this often.
    Interval(Duration),
    /// The message survives the death of the process.
    Os,
    /// The message survives nothing.
    Memory,
}

/// What carries messages to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// AMQP in TLS over TCP.
    Amqp,
    /// AMQP in a WebSocket in TLS.
    AmqpWs,
    /// MQTT in TLS over TCP.
    Mqtt,
    /// MQTT in a WebSocket in TLS.
    MqttWs,
}

/// Who decides on the logins of clients (`AuthenticationMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthenticationMode {
    /// The scope of the edge device.
    Scope,
    /// The scope, and the cloud for those that are not in it.
    CloudAndScope,
    /// The cloud alone.
    Cloud,
}

/// Typed access to the layers; every answer is a valid value or an error that names the setting.
pub(super) struct Values<'a> {
    layers: &'a Layers,
    pub(super) notices: Vec<Notice>,
}

impl<'a> Values<'a> {
    pub(super) fn new(layers: &'a Layers) -> Self {
        Self { layers, notices: Vec::new() }
    }

    pub(super) fn entry(&self, name: &'static str) -> Option<&'a Entry> {
        self.layers.get(name)
    }

    /// The members of a section that is listed as a whole.
    pub(super) fn members(&self, section: &'static str) -> impl Iterator<Item = &'a Member> + use<'a> {
        self.layers.members(section)
    }

    pub(super) fn text(&self, name: &'static str) -> Option<&'a str> {
        self.entry(name).map(|entry| entry.text.trim())
    }

    /// A value that the conversion understands, `None` when the setting is absent.
    pub(super) fn optional<T>(
        &self,
        name: &'static str,
        expected: &str,
        convert: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, SettingsError> {
        let Some(entry) = self.entry(name) else { return Ok(None) };
        match convert(entry.text.trim()) {
            Some(value) => Ok(Some(value)),
            None => Err(SettingsError::value(name, entry, expected)),
        }
    }

    /// As [`Self::optional`], for a setting that must have a value.
    pub(super) fn required<T>(
        &self,
        name: &'static str,
        expected: &str,
        convert: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, SettingsError> {
        self.optional(name, expected, convert)?
            .ok_or_else(|| SettingsError::Missing { name: name.into(), expected: expected.into() })
    }

    pub(super) fn flag(&self, name: &'static str) -> Result<bool, SettingsError> {
        self.required(name, FLAG_EXPECTED, parse_flag)
    }

    /// A flag that need not be given.
    pub(super) fn optional_flag(&self, name: &'static str) -> Result<Option<bool>, SettingsError> {
        self.optional(name, FLAG_EXPECTED, parse_flag)
    }

    pub(super) fn integer<T>(&self, name: &'static str, range: RangeInclusive<T>) -> Result<T, SettingsError>
    where
        T: FromStr + PartialOrd + std::fmt::Display,
    {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.required(name, &expected, |text| text.parse().ok().filter(|number| range.contains(number)))
    }

    /// Whole seconds, at most a year.
    pub(super) fn seconds(&self, name: &'static str, at_least: u64) -> Result<Duration, SettingsError> {
        self.integer(name, at_least..=366 * 86_400).map(Duration::from_secs)
    }

    /// A time span as the reference writes it: `[days.]hours:minutes[:seconds[.fraction]]`.
    pub(super) fn span(&self, name: &'static str) -> Result<Duration, SettingsError> {
        self.required(name, "a time span such as 01:30:00 (hours:minutes:seconds)", parse_span)
    }

    pub(super) fn host(&self, name: &'static str) -> Result<Option<HostName>, SettingsError> {
        self.optional(name, "a DNS name or an IP address", |text| HostName::parse(text).ok())
    }

    pub(super) fn listen(
        &self,
        host: &'static str,
        port: &'static str,
    ) -> Result<ListenAddress, SettingsError> {
        let host = self.required(host, "any, or an IP address", parse_listen_host)?;
        Ok(ListenAddress { host, port: self.integer(port, 0..=u16::MAX)? })
    }

    /// A value out of a closed list; as with the reference, an unknown one falls back to `fallback` – but we
    /// say so.
    pub(super) fn choice<T>(
        &mut self,
        name: &'static str,
        fallback: T,
        fallback_name: &'static str,
        convert: impl FnOnce(&str) -> Option<T>,
    ) -> T {
        let Some(entry) = self.entry(name) else { return fallback };
        convert(entry.text.trim()).unwrap_or_else(|| {
            self.notices.push(Notice::FellBack { name, origin: entry.origin.clone(), to: fallback_name });
            fallback
        })
    }

    /// `UpstreamProtocol`: case does not matter.
    pub(super) fn upstream_protocol(&mut self) -> UpstreamProtocol {
        self.choice("UpstreamProtocol", UpstreamProtocol::Amqp, "Amqp", |text| {
            match text.to_ascii_lowercase().as_str() {
                "amqp" => Some(UpstreamProtocol::Amqp),
                "amqpws" => Some(UpstreamProtocol::AmqpWs),
                "mqtt" => Some(UpstreamProtocol::Mqtt),
                "mqttws" => Some(UpstreamProtocol::MqttWs),
                _ => None,
            }
        })
    }

    /// `AuthenticationMode`: case does not matter.
    pub(super) fn authentication_mode(&mut self) -> AuthenticationMode {
        self.choice("AuthenticationMode", AuthenticationMode::Scope, "Scope", |text| {
            match text.to_ascii_lowercase().as_str() {
                "scope" => Some(AuthenticationMode::Scope),
                "cloudandscope" => Some(AuthenticationMode::CloudAndScope),
                "cloud" => Some(AuthenticationMode::Cloud),
                _ => None,
            }
        })
    }

    /// `https_proxy` with the exceptions of `no_proxy`.
    pub(super) fn proxy(&self) -> Result<Option<Arc<HttpProxy>>, SettingsError> {
        let Some(entry) = self.entry("https_proxy") else { return Ok(None) };
        let exceptions = self.text("no_proxy").unwrap_or_default();
        match HttpProxy::parse(&entry.text, exceptions) {
            Ok(proxy) => Ok(Some(Arc::new(proxy))),
            Err(fault) => Err(SettingsError::Proxy { origin: entry.origin.clone(), fault }),
        }
    }

    /// The URL of a broker; errors hold nothing of it.
    pub(super) fn broker_url(&self, name: &'static str) -> Result<BrokerUrl, SettingsError> {
        let expected = "amqps://user:password@host:port";
        let entry = self.entry(name);
        let entry =
            entry.ok_or_else(|| SettingsError::Missing { name: name.into(), expected: expected.into() })?;
        let fault = |fault| SettingsError::Broker { origin: entry.origin.clone(), fault };
        entry.text.parse().map_err(fault)
    }

    /// `SslProtocols`: unknown entries are skipped, none at all means the default; a list that names only
    /// versions without any security left is refused.
    pub(super) fn tls_versions(&mut self) -> Result<TlsVersions, SettingsError> {
        const NAME: &str = "SslProtocols";
        let Some(entry) = self.entry(NAME) else { return Ok(TlsVersions::default()) };
        let mut versions = TlsVersions { tls12: false, tls13: false };
        let (mut outdated, mut unknown) = (false, false);
        for item in entry.text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let version = item.to_ascii_lowercase().replace(['.', '_'], "");
            match version.strip_prefix("tls").map(|rest| rest.strip_prefix('v').unwrap_or(rest)) {
                Some("12") => versions.tls12 = true,
                Some("13") => versions.tls13 = true,
                Some("" | "1" | "10" | "11") => outdated = true,
                _ => unknown = true,
            }
        }
        if versions.tls12 || versions.tls13 {
            if outdated || unknown {
                let to = "its entries for TLS 1.2 and 1.3";
                self.notices.push(Notice::FellBack { name: NAME, origin: entry.origin.clone(), to });
            }
            return Ok(versions);
        }
        if outdated {
            return Err(SettingsError::OutdatedTls { origin: entry.origin.clone() });
        }
        let to = "tls1.2,tls1.3";
        self.notices.push(Notice::FellBack { name: NAME, origin: entry.origin.clone(), to });
        Ok(TlsVersions::default())
    }
}

fn parse_flag(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// Reads `off`, a port (loopback) or an address with a port.
pub(super) fn parse_plain_listener(text: &str) -> Option<Option<ListenAddress>> {
    if text.eq_ignore_ascii_case("off") {
        return Some(None);
    }
    if let Ok(port) = text.parse::<u16>() {
        let host = ListenHost::Address(IpAddr::V4(Ipv4Addr::LOCALHOST));
        return Some(Some(ListenAddress { host, port }));
    }
    if let Some(port) = text.strip_prefix("any:") {
        return Some(Some(ListenAddress { host: ListenHost::Any, port: port.parse().ok()? }));
    }
    let address: SocketAddr = text.parse().ok()?;
    Some(Some(ListenAddress { host: ListenHost::Address(address.ip()), port: address.port() }))
}

fn parse_listen_host(text: &str) -> Option<ListenHost> {
    if text.eq_ignore_ascii_case("any") {
        return Some(ListenHost::Any);
    }
    text.trim_start_matches('[').trim_end_matches(']').parse().ok().map(ListenHost::Address)
}

/// `[d.]hh:mm[:ss[.fraction]]`, not negative.
fn parse_span(text: &str) -> Option<Duration> {
    let mut parts = text.split(':');
    let (first, minutes) = (parts.next()?, parts.next()?);
    let seconds = parts.next().unwrap_or("0");
    if parts.next().is_some() {
        return None;
    }
    let (days, hours) = first.split_once('.').unwrap_or(("0", first));
    let (seconds, fraction) = seconds.split_once('.').unwrap_or((seconds, "0"));
    let number = |text: &str, below: u64| text.parse::<u64>().ok().filter(|number| *number < below);
    if fraction.len() > 9 {
        return None;
    }
    let nanos: u32 = format!("{fraction:0<9}").parse().ok()?;
    let secs = ((number(days, 10_000)? * 24 + number(hours, 24)?) * 60 + number(minutes, 60)?) * 60
        + number(seconds, 60)?;
    Some(Duration::new(secs, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        for (text, millis) in [
            ("01:00:00", Some(3_600_000)),
            ("00:10", Some(600_000)),
            ("1.02:00:00", Some(93_600_000)),
            ("00:00:00.5", Some(500)),
            ("00:00:00.0000001", Some(0)),
            ("60", None),
            ("-00:01:00", None),
            ("24:00:00", None),
            ("00:60:00", None),
            ("00:00:00:00", None),
            ("", None),
        ] {
            assert_eq!(parse_span(text).map(|span| span.as_millis()), millis, "{text:?}");
        }
    }

    #[test]
    fn plain_listeners_without_an_address_are_on_loopback() {
        let shown = |text| parse_plain_listener(text).map(|found| found.map(|at| at.to_string()));
        assert_eq!(shown("off"), Some(None));
        assert_eq!(shown("1883"), Some(Some("127.0.0.1:1883".into())));
        assert_eq!(shown("any:1883"), Some(Some("*:1883".into())));
        assert_eq!(shown("[::1]:1"), Some(Some("[::1]:1".into())));
        assert_eq!(shown("on"), None);
        assert_eq!(shown("70000"), None);
    }

    #[test]
    fn log_levels() {
        assert_eq!(LogLevel::parse("INFO,mqtt=debug"), Some(LogLevel::Info));
        assert_eq!(LogLevel::parse("information"), Some(LogLevel::Info));
        assert_eq!(LogLevel::parse("loud"), None);
    }
}
