//! The hub's own direct method that refreshes identities at once, for operators who changed them in the cloud.

use serde::Deserialize;

use super::super::name::Identity;
use super::super::source::{ScopeError, ScopeSource};
use super::ScopeRefresher;
use crate::backend::MethodAnswer;

/// The method's name; its case does not matter.
pub const REFRESH_METHOD: &str = "RefreshDeviceScopeIdentityCache";

/// Identities that one call may name.
pub const REFRESH_METHOD_IDENTITIES_MAX: usize = 1_000;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Payload {
    device_ids: Vec<String>,
}

impl<S: ScopeSource> ScopeRefresher<S> {
    /// Answers a call of [`REFRESH_METHOD`] with the payload `{"deviceIds":["leaf1","edge1/filter"]}`: status 200 when
    /// all are refreshed, 400 for a payload that names none or too many, 500 when the upstream fails; those before the
    /// failure are refreshed then.
    pub async fn refresh_by_method(&self, payload: &[u8]) -> MethodAnswer {
        let identities = match identities(payload) {
            Ok(identities) => identities,
            Err(reason) => return answer(400, &reason),
        };
        match self.refresh_each(&identities).await {
            Ok(()) => MethodAnswer { status: 200, payload: "null".into() },
            Err(error) => answer(500, &error.to_string()),
        }
    }

    async fn refresh_each(&self, identities: &[Identity]) -> Result<(), ScopeError> {
        let chain = self.cache().edge_device().map(Identity::to_string).unwrap_or_default();
        for identity in identities {
            self.refresh_one(identity, &chain).await?;
            tracing::info!(%identity, "Identity refreshed by a direct method");
        }
        Ok(())
    }
}

fn identities(payload: &[u8]) -> Result<Vec<Identity>, String> {
    let unreadable = |reason: String| {
        format!("the payload must be {{\"deviceIds\":[\"device\",\"device/module\"]}}: {reason}")
    };
    let Payload { device_ids } =
        serde_json::from_slice(payload).map_err(|error| unreadable(error.to_string()))?;
    if device_ids.len() > REFRESH_METHOD_IDENTITIES_MAX {
        return Err(unreadable(format!("it names more than {REFRESH_METHOD_IDENTITIES_MAX}")));
    }
    device_ids.iter().map(|id| Identity::parse(id).map_err(|error| unreadable(error.to_string()))).collect()
}

fn answer(status: i32, message: &str) -> MethodAnswer {
    MethodAnswer { status, payload: serde_json::json!({ "message": message }).to_string().into() }
}
