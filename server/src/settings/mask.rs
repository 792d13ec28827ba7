//! Owns which part of a setting's value may be shown.

use super::catalog::KnownSetting;

/// Parts of texts that only secrets have, in lower case: of connection strings and of tokens.
const SECRET_PARTS: [&str; 4] = ["sharedaccesskey", "sharedaccesssignature", "private key-----", "sig="];

/// A value as it may be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Masked {
    /// As it is, without the user and password of an address.
    Plain(String),
    /// Not at all.
    Hidden,
}

/// What of a value may be shown. A secret in the wrong place is not shown either.
pub(super) fn masked(known: &KnownSetting, text: &str) -> Masked {
    let lower = text.to_ascii_lowercase();
    if known.secret || SECRET_PARTS.iter().any(|part| lower.contains(part)) {
        return Masked::Hidden;
    }
    Masked::Plain(without_user(text))
}

/// The text without the user part of an address (RFC 3986 §3.2.1), as proxies are given.
fn without_user(text: &str) -> String {
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (Some(scheme), rest),
        None => (None, text),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    // The last one: a password may hold another. Beyond the authority too, for one that was not encoded.
    let at = rest.rfind('@').filter(|at| *at < end || scheme.is_some());
    match (scheme, at) {
        (Some(scheme), Some(at)) => format!("{scheme}://***{}", &rest[at..]),
        (None, Some(at)) if rest[..at].contains(':') => format!("***{}", &rest[at..]),
        (Some(_) | None, _) => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::find;
    use super::*;

    #[test]
    fn secrets_are_hidden_wherever_they_stand() {
        let plain = find("storagefolder").expect("listed");
        let secret = find("iothubconnectionstring").expect("listed");
        assert_eq!(masked(secret, "anything"), Masked::Hidden);
        for text in [
            "HostName=h;SharedAccessKey=abc",
            "SharedAccessSignature sr=h&sig=x&se=1",
            "-----BEGIN EC PRIVATE KEY-----",
        ] {
            assert_eq!(masked(plain, text), Masked::Hidden, "{text}");
        }
    }

    #[test]
    fn addresses_lose_their_user() {
        let plain = find("https_proxy").expect("listed");
        for (text, shown) in [
            ("http://proxy:3128", "http://proxy:3128"),
            ("http://me:word@proxy:3128", "http://***@proxy:3128"),
            ("http://me:w@rd@proxy:3128/x", "http://***@proxy:3128/x"),
            ("http://me:w/rd@proxy:3128", "http://***@proxy:3128"),
            ("me:word@proxy:3128", "***@proxy:3128"),
            ("/var/lib/edge@home", "/var/lib/edge@home"),
        ] {
            assert_eq!(masked(plain, text), Masked::Plain(shown.into()), "{text}");
        }
    }
}
