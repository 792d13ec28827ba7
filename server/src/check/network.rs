//! Owns the checks beyond this machine: names, the ways to the upstream, and the clock beside that of the upstream.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::dial::{self, Carried, DialError, HttpProxy, Target, Transport, authority};
use edgehub_broker::upstream::UpstreamKind;
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::{Checked, Verdict};
use crate::certificate::{UpstreamTrust, load_bundle};
use crate::hub::{WayUp, way_up};
use crate::settings::Settings;

/// Longest part of an answer that is read for its date, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// A clock that is off by more is worth a word.
const CLOCK_WARNING_SECS: i64 = 30;
/// With a clock that is off by more, tokens are refused.
const CLOCK_ERROR_SECS: i64 = 300;
/// No clock of a machine that runs this program shows an earlier time: 2025-01-01.
const EARLIEST_UNIX_SECS: i64 = 1_735_689_600;

/// What was found of the network.
pub(super) struct Reached {
    /// Names that must be known.
    pub(super) names: Checked,
    /// The port on which messages go up.
    pub(super) messages: Checked,
    /// Its HTTPS port.
    pub(super) https: Checked,
    /// What time it is there.
    pub(super) upstream_time: Option<OffsetDateTime>,
}

/// Asks the network, on the ways that the hub takes; each step has the limit. `bundle` is what the security daemon trusts.
pub(super) async fn reach(
    settings: &Settings,
    bundle: Vec<CertificateDer<'static>>,
    limit: Duration,
) -> Reached {
    let way = way_up(&settings.upstream);
    let (host, https_port) = (settings.upstream.host.as_str(), settings.upstream.https_port);
    let names = names(settings, &way, limit).await;
    let (check, carried) = match way.kind {
        UpstreamKind::Hub | UpstreamKind::Amqp(_) => ("upstream_amqp", Carried::Amqp),
        UpstreamKind::MqttHub => ("upstream_mqtt", Carried::Mqtt),
    };
    let tls = match trust(settings, bundle) {
        Ok(tls) => tls,
        Err(text) => {
            let failed = |check| Checked::new(check, Verdict::Error, text.clone());
            let (messages, https) = (failed(check), failed("upstream_https"));
            return Reached { names, messages, https, upstream_time: None };
        }
    };
    let target = |host, port, proxy| Target { host, port, tls: &tls, proxy };
    let way_target = target(&way.host, way.port, proxy_of(&way.transport));
    let messages = match within(limit, way_target, dial::stream(way_target, &way.transport, carried)).await {
        Ok(_) => {
            let form = match way.transport {
                Transport::Tls => "",
                Transport::Tcp => " in clear text",
                Transport::WebSocket { .. } => " in a WebSocket",
            };
            let text = reached(way_target, form, !matches!(way.transport, Transport::Tcp));
            Checked::new(check, Verdict::Ok, text)
        }
        Err(text) => Checked::new(check, Verdict::Error, text),
    };
    let https_target = target(host, https_port, settings.upstream.proxy.as_deref());
    let (https, upstream_time) = match within(limit, https_target, dial::tls(https_target)).await {
        Ok(stream) => {
            let time = timeout(limit, date(stream, host)).await.ok().flatten();
            (Checked::new("upstream_https", Verdict::Ok, reached(https_target, "", true)), time)
        }
        Err(text) => (Checked::new("upstream_https", Verdict::Error, text), None),
    };
    Reached { names, messages, https, upstream_time }
}

fn reached(target: Target<'_>, form: &str, is_trusted: bool) -> String {
    let trusted = if is_trusted { ", its certificate is trusted" } else { "" };
    let by = match through(target) {
        Some(proxy) => format!(" through the proxy {}", authority(proxy.host(), proxy.port())),
        None => String::new(),
    };
    format!("{} is reached{by}{form}{trusted}", authority(target.host, target.port))
}

/// The proxy that a host is reached through, if it is.
fn through<'a>(target: Target<'a>) -> Option<&'a HttpProxy> {
    target.proxy.filter(|proxy| proxy.serves(target.host, target.port))
}

fn proxy_of(transport: &Transport) -> Option<&HttpProxy> {
    match transport {
        Transport::Tls | Transport::Tcp => None,
        Transport::WebSocket { proxy } => proxy.as_deref(),
    }
}

/// The clock of this machine, beside that of the upstream where it was told.
pub(super) fn clock(upstream: Option<OffsetDateTime>) -> Checked {
    let now = OffsetDateTime::now_utc();
    let (verdict, text) = judge(now, upstream);
    Checked::new("clock", verdict, text)
}

fn judge(now: OffsetDateTime, upstream: Option<OffsetDateTime>) -> (Verdict, String) {
    if now.unix_timestamp() < EARLIEST_UNIX_SECS {
        return (Verdict::Error, format!("the clock of this machine shows {now}; set it"));
    }
    let Some(upstream) = upstream else {
        return (Verdict::Ok, format!("{now}; the upstream did not tell its own"));
    };
    let off_secs = (now - upstream).whole_seconds();
    let text = format!("{off_secs} s from that of the upstream");
    match off_secs.abs() {
        CLOCK_ERROR_SECS.. => (Verdict::Error, format!("{text}: tokens are refused; set the clock")),
        CLOCK_WARNING_SECS.. => (Verdict::Warning, format!("{text}; set the clock")),
        _ => (Verdict::Ok, text),
    }
}

async fn names(settings: &Settings, way: &WayUp, limit: Duration) -> Checked {
    let own = settings.hub.own_host.as_ref().map(|host| host.as_str());
    let upstream = &settings.upstream;
    // A proxy looks up the names of those who are reached through it.
    let by = |host, port, proxy: Option<&HttpProxy>| match proxy.filter(|proxy| proxy.serves(host, port)) {
        Some(proxy) => (proxy.host().to_owned(), "is the proxy"),
        None => (host.to_owned(), "is the upstream"),
    };
    let mut needed = vec![
        by(&way.host, way.port, proxy_of(&way.transport)),
        by(upstream.host.as_str(), upstream.https_port, upstream.proxy.as_deref()),
    ];
    needed.dedup();
    let mut unknown = Vec::new();
    for (host, purpose) in needed.iter().map(|(host, purpose)| (host.as_str(), *purpose)) {
        if !is_known(host, limit).await {
            unknown.push(format!("{host}, which {purpose}, has no address"));
        }
    }
    // That this machine does not know its own name keeps nobody else from it.
    let verdict = if unknown.is_empty() { Verdict::Warning } else { Verdict::Error };
    if let Some(own) = own
        && !is_known(own, limit).await
    {
        unknown.push(format!("{own}, which clients use, has no address"));
    }
    if unknown.is_empty() {
        let own = own.map_or("EdgeDeviceHostName is not set".to_owned(), |own| format!("{own} is known"));
        let known: Vec<String> = needed.iter().map(|(host, _)| format!("{host} is known")).collect();
        return Checked::new("names", Verdict::Ok, format!("{}; {own}", known.join("; ")));
    }
    let text = format!("{}; correct the name, or the DNS of this machine", unknown.join("; "));
    Checked::new("names", verdict, text)
}

async fn is_known(host: &str, limit: Duration) -> bool {
    let found = timeout(limit, lookup_host((host, 0))).await;
    found.is_ok_and(|found| found.is_ok_and(|mut addresses| addresses.next().is_some()))
}

/// Whom the hub trusts upstream.
fn trust(
    settings: &Settings,
    mut bundle: Vec<CertificateDer<'static>>,
) -> Result<Arc<rustls::ClientConfig>, String> {
    let of_files = settings.certificates.as_ref().and_then(|files| files.trust_bundle.as_deref());
    let files = of_files.into_iter().chain(settings.upstream.trust_file.as_deref());
    let config = || {
        bundle.extend(load_bundle(files.map(Path::new))?);
        let (trust, _) = UpstreamTrust::new(bundle)?;
        Arc::new(trust).config()
    };
    config().map_err(|fault| fault.to_string())
}

/// A way to a host, within the limit; else what is wrong, and what to do.
async fn within<T>(
    limit: Duration,
    target: Target<'_>,
    dialling: impl Future<Output = Result<T, DialError>>,
) -> Result<T, String> {
    let host = authority(target.host, target.port);
    match timeout(limit, dialling).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(DialError::Tcp { host, port, source })) => {
            let what = if through(target).is_some() { "the proxy " } else { "" };
            let address = authority(&host, port);
            Err(format!("{what}{address} is not reached: {source}; look at network and firewall"))
        }
        Ok(Err(DialError::Tls { source, .. })) => Err(format!(
            "{host} is reached, but not trusted: {source}; look at upstream.trust_file and the clock"
        )),
        Ok(Err(
            fault @ (DialError::Name(_)
            | DialError::ProxyRefuses { .. }
            | DialError::ProxyAnswer { .. }
            | DialError::WebSocket { .. }),
        )) => Err(fault.to_string()),
        Err(_) => {
            Err(format!("{host} is not reached within {} s; look at network and firewall", limit.as_secs()))
        }
    }
}

/// The date of an HTTP answer (RFC 9110 §6.6.1), whatever its status.
async fn date(mut stream: TlsStream<TcpStream>, host: &str) -> Option<OffsetDateTime> {
    let request = format!("HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut head = Vec::new();
    let mut piece = [0; 2048];
    while head.len() < HEAD_BYTES_MAX && !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        match stream.read(&mut piece).await {
            Ok(length @ 1..) => head.extend_from_slice(&piece[..length]),
            Ok(_) | Err(_) => break,
        }
    }
    date_of(&String::from_utf8_lossy(&head))
}

fn date_of(head: &str) -> Option<OffsetDateTime> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(name, _)| name.trim().eq_ignore_ascii_case("date"))?;
    OffsetDateTime::parse(value.trim(), &Rfc2822).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn the_clock_is_judged_by_that_of_the_upstream() {
        let now = datetime!(2026-11-21 10:00:00 UTC);
        let verdict = |secs| judge(now, Some(now + time::Duration::seconds(secs))).0;
        assert_eq!(verdict(5), Verdict::Ok);
        assert_eq!((verdict(-40), verdict(40)), (Verdict::Warning, Verdict::Warning));
        assert_eq!((verdict(-3_600), verdict(3_600)), (Verdict::Error, Verdict::Error));
        assert_eq!(judge(now, None).0, Verdict::Ok);
        assert_eq!(judge(datetime!(1970-01-01 00:10 UTC), None).0, Verdict::Error);
    }

    #[test]
    fn dates_are_found_in_heads() {
        let head = "HTTP/1.1 404 Not Found\r\nserver: x\r\nDate: Sat, 21 Nov 2026 10:00:00 GMT\r\n\r\n";
        assert_eq!(date_of(head), Some(datetime!(2026-11-21 10:00:00 UTC)));
        for none in ["", "HTTP/1.1 200 OK\r\n\r\n", "date: yesterday\r\n"] {
            assert_eq!(date_of(none), None, "{none:?}");
        }
    }
}
