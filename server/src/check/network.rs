//! Owns the checks beyond this machine: names, TLS of the upstream, and the clock beside that of the upstream.

use std::path::Path;
use std::time::Duration;

use rustls::pki_types::ServerName;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{Checked, Verdict};
use crate::certificate::upstream_config;
use crate::settings::{Settings, UpstreamProtocol};

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

/// Asks the network; each step has the limit.
pub(super) async fn reach(settings: &Settings, limit: Duration) -> Reached {
    let upstream = &settings.upstream;
    let host = upstream.host.as_str();
    let names = names(settings, limit).await;
    let (check, port) = match upstream.protocol {
        UpstreamProtocol::Amqp => ("upstream_amqp", upstream.amqp_port),
        UpstreamProtocol::AmqpWs => ("upstream_amqp", upstream.https_port),
        UpstreamProtocol::Mqtt => ("upstream_mqtt", upstream.mqtt_port),
        UpstreamProtocol::MqttWs => ("upstream_mqtt", upstream.https_port),
    };
    let messages = match connect(settings, port, limit).await {
        Ok(_) => {
            Checked::new(check, Verdict::Ok, format!("{host}:{port} is reached, its certificate is trusted"))
        }
        Err(text) => Checked::new(check, Verdict::Error, text),
    };
    let (https, upstream_time) = match connect(settings, upstream.https_port, limit).await {
        Ok(stream) => {
            let text = format!("{host}:{} is reached, its certificate is trusted", upstream.https_port);
            let time = timeout(limit, date(stream, host)).await.ok().flatten();
            (Checked::new("upstream_https", Verdict::Ok, text), time)
        }
        Err(text) => (Checked::new("upstream_https", Verdict::Error, text), None),
    };
    Reached { names, messages, https, upstream_time }
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

async fn names(settings: &Settings, limit: Duration) -> Checked {
    let own = settings.hub.own_host.as_ref().map(|host| host.as_str());
    let upstream = settings.upstream.host.as_str();
    let mut unknown = Vec::new();
    for (host, purpose) in
        own.map(|host| (host, "clients use")).into_iter().chain([(upstream, "is the upstream")])
    {
        let found = timeout(limit, lookup_host((host, 0))).await;
        if !found.is_ok_and(|found| found.is_ok_and(|mut addresses| addresses.next().is_some())) {
            unknown.push((host, purpose));
        }
    }
    if unknown.is_empty() {
        let own = own.map_or("EdgeDeviceHostName is not set".to_owned(), |own| format!("{own} is known"));
        return Checked::new("names", Verdict::Ok, format!("{upstream} is known; {own}"));
    }
    // That this machine does not know its own name keeps nobody else from it.
    let verdict =
        if unknown.iter().any(|(host, _)| *host == upstream) { Verdict::Error } else { Verdict::Warning };
    let texts: Vec<String> =
        unknown.iter().map(|(host, purpose)| format!("{host}, which {purpose}, has no address")).collect();
    Checked::new(
        "names",
        verdict,
        format!("{}; correct the name, or the DNS of this machine", texts.join("; ")),
    )
}

async fn connect(settings: &Settings, port: u16, limit: Duration) -> Result<TlsStream<TcpStream>, String> {
    let host = settings.upstream.host.as_str();
    let bundle = settings.certificates.as_ref().and_then(|files| files.trust_bundle.as_deref());
    let files = bundle.into_iter().chain(settings.upstream.trust_file.as_deref());
    let (config, _) = upstream_config(files.map(Path::new)).map_err(|fault| fault.to_string())?;
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| format!("{host} is no name that a certificate can have"))?;
    let connecting = async {
        let stream = TcpStream::connect((host, port)).await.map_err(|fault| {
            format!("{host}:{port} is not reached: {fault}; look at network and firewall")
        })?;
        TlsConnector::from(config).connect(name, stream).await.map_err(|fault| {
            format!("{host}:{port} is reached, but not trusted: {fault}; look at upstream.trust_file and the clock")
        })
    };
    let late =
        || format!("{host}:{port} is not reached within {} s; look at network and firewall", limit.as_secs());
    timeout(limit, connecting).await.unwrap_or_else(|_| Err(late()))
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
