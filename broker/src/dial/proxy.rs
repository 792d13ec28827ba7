//! An HTTP proxy: its address, what it is not asked for, and the tunnel through it (RFC 9110 §9.3.6).

use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use percent_encoding::percent_decode_str;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{DialError, authority};

/// Longest head of a proxy's answer, bytes.
pub const PROXY_ANSWER_BYTES_MAX: usize = 16 * 1_024;

/// Longest URL of a proxy, and longest list of exceptions, bytes.
const SETTING_BYTES_MAX: usize = 8 * 1_024;

/// The port of a URL that names none.
const DEFAULT_PORT: u16 = 80;

/// Why a text is no proxy. Holds nothing of the text, which may have credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyUrlError {
    /// Another scheme than `http`.
    #[error("the proxy must be reached by http://; TLS towards the proxy itself and SOCKS are not spoken")]
    Scheme,
    /// No host, or one with characters that no host has.
    #[error("the URL of the proxy names no host; the form is http://[user:password@]host:port")]
    Host,
    /// A port that is none.
    #[error("the port of the proxy must be a number from 1 to 65535")]
    Port,
    /// Longer than any URL.
    #[error("the URL of the proxy or the list of exceptions is longer than {SETTING_BYTES_MAX} bytes")]
    Length,
}

/// An HTTP proxy. `Debug` and `Display` show host and port, never credentials.
#[derive(Clone)]
pub struct HttpProxy {
    host: String,
    port: u16,
    /// Value of `Proxy-Authorization` (RFC 7617).
    authorization: Option<String>,
    exceptions: Vec<Exception>,
}

/// Hosts that are reached without the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    /// All of them.
    Everything,
    /// A name and all below it, or an address; lower case.
    Host { name: String, port: Option<u16> },
}

impl HttpProxy {
    /// Reads a URL such as `http://user:password@proxy:3128`, and a list of hosts that are reached without it, as the
    /// variable `no_proxy` has it: names (which stand for all below them as well), addresses, each with or without a
    /// port, separated by commas; `*` for all.
    ///
    /// # Errors
    /// The part that cannot be used.
    pub fn parse(url: &str, exceptions: &str) -> Result<Self, ProxyUrlError> {
        if url.len().max(exceptions.len()) > SETTING_BYTES_MAX {
            return Err(ProxyUrlError::Length);
        }
        let url = url.trim();
        let rest = match url.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some(_) => return Err(ProxyUrlError::Scheme),
            None => url,
        };
        let rest = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, address) = match rest.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, rest),
        };
        let (host, port) = host_and_port(address)?;
        let usable = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        if host.is_empty() || !host.bytes().all(usable) {
            return Err(ProxyUrlError::Host);
        }
        Ok(Self {
            host: host.to_owned(),
            port: port.unwrap_or(DEFAULT_PORT),
            authorization: user.map(|user| {
                // A colon in the user's name comes encoded; the first plain one ends it.
                let (name, password) = user.split_once(':').unwrap_or((user, ""));
                let mut plain: Vec<u8> = percent_decode_str(name).collect();
                plain.push(b':');
                plain.extend(percent_decode_str(password));
                format!("Basic {}", BASE64.encode(plain))
            }),
            exceptions: exceptions.split(',').filter_map(Exception::parse).collect(),
        })
    }

    /// Its host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether a host is reached through it: not this machine itself, nor what is excepted.
    pub fn serves(&self, host: &str, port: u16) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        !here && !self.exceptions.iter().any(|exception| exception.covers(&host, port))
    }

    /// Asks for a tunnel on a fresh connection to the proxy; afterwards the stream is that to the host.
    pub(super) async fn tunnel(
        &self,
        mut stream: TcpStream,
        host: &str,
        port: u16,
    ) -> Result<TcpStream, DialError> {
        let broken = |reason: String| DialError::ProxyAnswer { proxy: self.to_string(), reason };
        let target = authority(host, port);
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
        if let Some(authorization) = &self.authorization {
            request.push_str("Proxy-Authorization: ");
            request.push_str(authorization);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await.map_err(|error| broken(error.to_string()))?;
        let mut answer = Vec::with_capacity(1_024);
        let end = loop {
            let searched = answer.len().saturating_sub(3);
            if stream.read_buf(&mut answer).await.map_err(|error| broken(error.to_string()))? == 0 {
                return Err(broken("it ends the connection".into()));
            }
            if let Some(at) = memchr::memmem::find(&answer[searched..], b"\r\n\r\n") {
                break searched + at + 4;
            }
            if answer.len() > PROXY_ANSWER_BYTES_MAX {
                return Err(broken(format!("its head is longer than {PROXY_ANSWER_BYTES_MAX} bytes")));
            }
        };
        let status = status(&answer).ok_or_else(|| broken("it is not HTTP".into()))?;
        match status {
            // The host speaks only when it was spoken to: what is there already is not its.
            200..=299 if end == answer.len() => Ok(stream),
            200..=299 => Err(broken("bytes come before the tunnel is used".into())),
            status => Err(DialError::ProxyRefuses {
                proxy: self.to_string(),
                status,
                host: host.to_owned(),
                port,
                next: if status == 407 {
                    "give the user and password in https_proxy: http://user:password@host:port"
                } else {
                    "let the proxy connect to this host, or except the host with no_proxy"
                },
            }),
        }
    }
}

impl Exception {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        match text.as_str() {
            "" => None,
            "*" => Some(Self::Everything),
            text => {
                // An entry that cannot be read excepts nothing; whoever wrote it sees the proxy asked.
                let (host, port) = host_and_port(text).ok()?;
                let name = host.trim_start_matches("*.").trim_matches('.');
                (!name.is_empty()).then(|| Self::Host { name: name.to_owned(), port })
            }
        }
    }

    fn covers(&self, host: &str, port: u16) -> bool {
        match self {
            Self::Everything => true,
            Self::Host { name, port: only } => {
                let below = || host.strip_suffix(name.as_str()).is_some_and(|above| above.ends_with('.'));
                only.is_none_or(|only| only == port) && (host == name || below())
            }
        }
    }
}

impl fmt::Display for HttpProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&authority(&self.host, self.port))
    }
}

impl fmt::Debug for HttpProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpProxy")
            .field("address", &authority(&self.host, self.port))
            .field("exceptions", &self.exceptions)
            .finish_non_exhaustive()
    }
}

/// `host`, `host:port`, `[v6]`, `[v6]:port`, or a bare IPv6 address.
fn host_and_port(text: &str) -> Result<(&str, Option<u16>), ProxyUrlError> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok((text, None));
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or(ProxyUrlError::Host)?;
            host.parse::<IpAddr>().map_err(|_| ProxyUrlError::Host)?;
            (host, rest.strip_prefix(':'))
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    match port {
        None => Ok((host, None)),
        Some(port) => match port.parse() {
            Ok(port @ 1..) => Ok((host, Some(port))),
            _ => Err(ProxyUrlError::Port),
        },
    }
}

/// The status of an HTTP/1 answer (RFC 9112 §4).
fn status(answer: &[u8]) -> Option<u16> {
    let rest = answer.strip_prefix(b"HTTP/1.")?;
    match rest {
        [b'0'..=b'9', b' ', a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9', b' ' | b'\r', ..] => {
            let digit = |byte: &u8| u16::from(byte - b'0');
            Some(digit(a) * 100 + digit(b) * 10 + digit(c))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (url, expected) in [
            ("http://proxy:3128", Ok("proxy:3128")),
            ("HTTP://proxy.example/", Ok("proxy.example:80")),
            ("proxy.example:8080", Ok("proxy.example:8080")),
            ("http://user:pa%40ss@10.0.0.1:3128/", Ok("10.0.0.1:3128")),
            ("http://[::1]:3128", Ok("[::1]:3128")),
            ("https://proxy:3128", Err(ProxyUrlError::Scheme)),
            ("socks5://proxy", Err(ProxyUrlError::Scheme)),
            ("http://", Err(ProxyUrlError::Host)),
            ("http://user:password@", Err(ProxyUrlError::Host)),
            ("http://a b", Err(ProxyUrlError::Host)),
            ("http://pro\r\nxy", Err(ProxyUrlError::Host)),
            ("http://[::1", Err(ProxyUrlError::Host)),
            ("http://proxy:0", Err(ProxyUrlError::Port)),
            ("http://proxy:65536", Err(ProxyUrlError::Port)),
        ] {
            let shown = HttpProxy::parse(url, "").map(|proxy| proxy.to_string());
            assert_eq!(shown.as_deref().map_err(|error| *error), expected, "{url:?}");
        }
        let long = format!("http://{}", "a".repeat(SETTING_BYTES_MAX));
        assert_eq!(HttpProxy::parse(&long, "").err(), Some(ProxyUrlError::Length));
    }

    #[test]
    fn credentials_are_decoded_and_never_shown() {
        let proxy = HttpProxy::parse("http://us%3Aer:pa%40ss%3a@proxy:1", "").unwrap();
        assert_eq!(
            proxy.authorization.as_deref(),
            Some(&*format!("Basic {}", BASE64.encode("us:er:pa@ss:")))
        );
        assert_eq!(format!("{proxy} {proxy:?}").matches("pa").count(), 0, "{proxy:?}");
        let without_password = HttpProxy::parse("http://user@proxy", "").unwrap();
        assert_eq!(
            without_password.authorization.as_deref(),
            Some(&*format!("Basic {}", BASE64.encode("user:")))
        );
    }

    #[test]
    fn exceptions() {
        let excepted = "example.com, .Inner.test ,*.wild.test,10.0.0.7,only.test:8443,[fd00::1],,bad:port";
        let proxy = HttpProxy::parse("http://proxy", excepted).unwrap();
        for (host, port, through) in [
            ("hub.azure-devices.net", 443, true),
            ("example.com", 443, false),
            ("a.EXAMPLE.com.", 443, false),
            ("notexample.com", 443, true),
            ("inner.test", 443, false),
            ("x.inner.test", 443, false),
            ("x.wild.test", 443, false),
            ("10.0.0.7", 443, false),
            ("10.0.0.70", 443, true),
            ("only.test", 8443, false),
            ("only.test", 443, true),
            ("fd00::1", 443, false),
            ("localhost", 443, false),
            ("127.3.2.1", 443, false),
            ("::1", 443, false),
            ("bad", 443, true),
        ] {
            assert_eq!(proxy.serves(host, port), through, "{host}:{port}");
        }
        assert!(!HttpProxy::parse("http://proxy", "*").unwrap().serves("hub.example", 443));
    }

    #[test]
    fn statuses() {
        for (answer, expected) in [
            ("HTTP/1.1 200 Connection established\r\n\r\n", Some(200)),
            ("HTTP/1.0 407 x\r\n\r\n", Some(407)),
            ("HTTP/1.1 204\r\n\r\n", Some(204)),
            ("HTTP/2 200 OK\r\n\r\n", None),
            ("HTTP/1.1 20 OK\r\n\r\n", None),
            ("HTTP/1.1 2000 OK\r\n\r\n", None),
            ("SSH-2.0-x\r\n\r\n", None),
            ("", None),
        ] {
            assert_eq!(status(answer.as_bytes()), expected, "{answer:?}");
        }
    }
}
