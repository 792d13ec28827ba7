//! Owns the judgement of client certificates that a proxy in front of the HTTPS port forwards in a header.
//!
//! A TLS-terminating proxy module shows the certificate that it saw, and its own token with it. Without that token
//! anybody could claim any certificate, so then nobody on the connection is let in.

use bytes::Bytes;
use edgehub_broker::backend::{Credentials, Login, Protocol};
use edgehub_broker::hub::Authenticator;
use edgehub_broker::identity::Identity;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use percent_encoding::percent_decode;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// The header with the certificate: PEM, percent-encoded.
const HEADER: &str = "x-ms-edge-clientcert";

/// What a request says of a certificate that its connection does not have.
#[derive(Debug, PartialEq, Eq)]
pub enum Forwarded {
    /// Nothing.
    Nothing,
    /// The client of the proxy showed this one (DER).
    Certificate(Bytes),
    /// Something that must not be believed, for this reason.
    Refused(&'static str),
}

/// Reads the header, and checks the token beside it: it must be that of the module `proxy`.
pub async fn judge(headers: &HeaderMap, proxy: &Identity, authenticator: &dyn Authenticator) -> Forwarded {
    let Some(header) = headers.get(HEADER) else { return Forwarded::Nothing };
    let Some(token) = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()) else {
        return Forwarded::Refused("a certificate is forwarded without the token of the proxy");
    };
    let login = Login {
        identity: proxy.clone(),
        credentials: Credentials::SasToken(token.into()),
        auth_chain: None,
        product_info: "".into(),
        model_id: None,
        protocol: Protocol::Mqtt,
        peer: None,
    };
    if authenticator.authenticate(&login).await.is_err() {
        return Forwarded::Refused("a certificate is forwarded with a token that is not the proxy's");
    }
    match certificate(header) {
        Some(certificate) => Forwarded::Certificate(certificate),
        None => Forwarded::Refused("the forwarded certificate cannot be read"),
    }
}

fn certificate(header: &HeaderValue) -> Option<Bytes> {
    let pem: Vec<u8> = percent_decode(header.as_bytes()).collect();
    let certificate = CertificateDer::from_pem_slice(&pem).ok()?;
    Some(Bytes::copy_from_slice(&certificate))
}

#[cfg(test)]
mod tests {
    use edgehub_broker::backend::LoginError;
    use edgehub_broker::hub::Authenticating;
    use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

    use super::*;
    use crate::certificate::authority::Authority;

    /// Believes the token `good` of the proxy.
    struct Believing;

    impl Authenticator for Believing {
        fn authenticate<'a>(&'a self, login: &'a Login) -> Authenticating<'a> {
            let good = login.identity.to_string() == "edge1/IoTEdgeAPIProxy"
                && login.credentials == Credentials::SasToken("good".into());
            Box::pin(async move { if good { Ok(()) } else { Err(LoginError::Refused("bad".into())) } })
        }
    }

    #[tokio::test]
    async fn only_with_the_token_of_the_proxy() {
        let issued = Authority::new("root").unwrap().issue_client("leaf1").unwrap();
        let der = CertificateDer::from_pem_slice(issued.chain_pem.as_bytes()).unwrap();
        let encoded = utf8_percent_encode(&issued.chain_pem, NON_ALPHANUMERIC).to_string();
        let proxy = Identity::module("edge1", "IoTEdgeAPIProxy").unwrap();
        for (certificate, token, expected) in [
            (None, None, Forwarded::Nothing),
            (None, Some("good"), Forwarded::Nothing),
            (Some(&*encoded), Some("good"), Forwarded::Certificate(Bytes::copy_from_slice(&der))),
            (
                Some(&*encoded),
                None,
                Forwarded::Refused("a certificate is forwarded without the token of the proxy"),
            ),
            (
                Some(&*encoded),
                Some("bad"),
                Forwarded::Refused("a certificate is forwarded with a token that is not the proxy's"),
            ),
            (Some("%"), Some("good"), Forwarded::Refused("the forwarded certificate cannot be read")),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(certificate) = certificate {
                headers.insert(HEADER, HeaderValue::from_str(certificate).unwrap());
            }
            if let Some(token) = token {
                headers.insert(AUTHORIZATION, HeaderValue::from_static(token));
            }
            assert_eq!(judge(&headers, &proxy, &Believing).await, expected);
        }
    }
}
