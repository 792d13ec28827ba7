//! Who may call as a service: whoever shows a token of the policy.

use edgehub_broker::identity::{SasToken, TokenError, unix_now_secs};

use super::fault::Fault;
use crate::registry::{Registry, SERVICE_POLICY};

/// Checks a token of the policy: `SharedAccessSignature sr=<host>&sig=..&se=..&skn=iothubowner`. Gives its expiry in
/// seconds since 1970, without tolerance.
pub(crate) fn authorize(registry: &Registry, token: Option<&str>) -> Result<i64, Fault> {
    let Some(token) = token else { return Err(Fault::unauthorized("the header Authorization is missing")) };
    let token = ServiceToken::parse(token)?;
    let judged = token.check(registry);
    if judged.is_ok() {
        return judged;
    }
    // The command line may have made the key since.
    match registry.reload() {
        Ok(true) => token.check(registry),
        Ok(false) => judged,
        Err(error) => {
            tracing::warn!(code = "EH7012", %error, "the registry is not read again");
            judged
        }
    }
}

/// A token that names the policy, and is not expired.
struct ServiceToken(SasToken);

impl ServiceToken {
    fn parse(text: &str) -> Result<Self, Fault> {
        let token = SasToken::parse(text, unix_now_secs()).map_err(|error| match error {
            TokenError::Malformed(_) => Fault::unauthorized(error.to_string()),
            TokenError::Expired { .. } | TokenError::Audience | TokenError::Signature => refused(error),
        })?;
        match policy(text) {
            Some(SERVICE_POLICY) => Ok(Self(token)),
            Some(_) => Err(Fault::unauthorized(format!("there is no policy but {SERVICE_POLICY}"))),
            None => Err(Fault::unauthorized("the token names no policy (skn)")),
        }
    }

    fn check(&self, registry: &Registry) -> Result<i64, Fault> {
        self.0.check_service_audience(registry.hosts()).map_err(refused)?;
        self.0.check_signature(registry.service_key().as_ref()).map_err(refused)?;
        Ok(self.0.expires_at_secs())
    }
}

/// The policy that a token names; that of a device names none.
pub(crate) fn policy(token: &str) -> Option<&str> {
    let fields = token.split_once(char::is_whitespace)?.1;
    let field = fields.split('&').find_map(|field| {
        let (name, value) = field.split_once('=')?;
        name.eq_ignore_ascii_case("skn").then_some(value)
    });
    field.filter(|name| !name.is_empty())
}

fn refused(error: TokenError) -> Fault {
    Fault::unauthorized(error.to_string())
}
