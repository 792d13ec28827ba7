//! Owns whether a caller is who it says: by the certificate of its connection, one that a proxy forwards, or a token.

use bytes::Bytes;
use edgehub_broker::backend::{Credentials, Login, LoginError, Protocol};
use edgehub_broker::identity::Identity;
use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderMap};

use super::{Api, Refused};
use crate::listen::forwarded::{self, Forwarded};

/// The one scheme of the header `Authorization`.
const SCHEME: &str = "SharedAccessSignature";

impl Api {
    /// Lets a request through that comes from `actor`.
    pub(super) async fn authenticate(
        &self,
        actor: &Identity,
        headers: &HeaderMap,
        certificates: &[Bytes],
    ) -> Result<(), Refused> {
        let credentials = match self.shown(headers, certificates).await? {
            Some(certificates) => Credentials::Certificate(certificates),
            None => Credentials::SasToken(token(headers)?.into()),
        };
        let login = Login {
            identity: actor.clone(),
            credentials,
            auth_chain: None,
            product_info: "".into(),
            model_id: None,
            // What decides on it does not ask for the protocol.
            protocol: Protocol::Mqtt,
            peer: None,
        };
        self.authenticator.authenticate(&login).await.map_err(|error| match error {
            LoginError::Refused(_) => unauthorized(format!("{actor} is not authenticated")),
            LoginError::Unavailable(_) => Refused::new(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("whether {actor} may call cannot be told now; come again"),
            ),
        })
    }

    /// The certificates that the request comes with, if it does.
    async fn shown(
        &self,
        headers: &HeaderMap,
        certificates: &[Bytes],
    ) -> Result<Option<Vec<Bytes>>, Refused> {
        if !certificates.is_empty() {
            return Ok(Some(certificates.to_vec()));
        }
        let Some(proxy) = &self.proxy else { return Ok(None) };
        match forwarded::judge(headers, proxy, &*self.authenticator).await {
            Forwarded::Nothing => Ok(None),
            Forwarded::Certificate(certificate) => Ok(Some(vec![certificate])),
            Forwarded::Refused(reason) => Err(unauthorized(reason)),
        }
    }
}

/// The token of the header `Authorization`. The query is not looked at: it ends up in logs.
fn token(headers: &HeaderMap) -> Result<&str, Refused> {
    let header = headers.get(AUTHORIZATION).ok_or_else(|| unauthorized("Authorization header missing"))?;
    let text = header.to_str().unwrap_or_default().trim();
    match text.split_ascii_whitespace().next() {
        Some(scheme) if scheme.eq_ignore_ascii_case(SCHEME) => Ok(text),
        _ => Err(unauthorized("Invalid Authorization header. Only SharedAccessSignature is supported.")),
    }
}

fn unauthorized(message: impl Into<String>) -> Refused {
    Refused::new(StatusCode::UNAUTHORIZED, message)
}
