//! Calls about identities, and their JSON.

use std::sync::Arc;

use edgehub_broker::identity::{Authentication, Identity, ServiceIdentity, Status, SymmetricKey};
use serde::Deserialize;
use serde_json::{Value, json};

use super::fault::Fault;
use super::rest::{Answer, Service};
use crate::registry::{ETag, PutIdentity, RegistryError};

/// Devices in one list; services that have more use queries.
const LIST_MAX: usize = 1_000;

/// A time that never was, as the cloud hub writes it.
pub(super) const NEVER: &str = "0001-01-01T00:00:00Z";

/// An identity as services send it. Members that the stand-in gives itself are passed over.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct IdentityIn {
    status: Option<String>,
    authentication: Option<AuthenticationIn>,
    capabilities: Option<CapabilitiesIn>,
    device_scope: Option<String>,
    parent_scopes: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AuthenticationIn {
    r#type: Option<String>,
    symmetric_key: Option<KeysIn>,
    x509_thumbprint: Option<ThumbprintsIn>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeysIn {
    primary_key: Option<String>,
    secondary_key: Option<String>,
}

impl std::fmt::Debug for KeysIn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeysIn(..)")
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ThumbprintsIn {
    primary_thumbprint: Option<String>,
    secondary_thumbprint: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CapabilitiesIn {
    iot_edge: Option<bool>,
}

pub(super) fn get(service: Service<'_>, identity: &Identity) -> Result<Answer, Fault> {
    let entry = entry(service, identity)?;
    Ok(one(service, &entry))
}

pub(super) fn list(service: Service<'_>, query: &str) -> Result<Answer, Fault> {
    let top = query.split('&').find_map(|pair| pair.strip_prefix("top="));
    let top = match top.map(str::parse::<usize>) {
        None => LIST_MAX,
        Some(Ok(top @ 1..=LIST_MAX)) => top,
        Some(_) => return Err(Fault::invalid(format!("top must be 1 to {LIST_MAX}"))),
    };
    let devices = service.registry.list();
    let devices = devices.iter().filter(|entry| entry.identity.module_id().is_none()).take(top);
    Ok(Answer::ok(&devices.map(|entry| to_json(service, entry)).collect()))
}

pub(super) fn modules(service: Service<'_>, device: &Identity) -> Result<Answer, Fault> {
    entry(service, device)?;
    let all = service.registry.list();
    let of_device = all.iter().filter(|entry| {
        entry.identity.module_id().is_some() && entry.identity.device_id() == device.device_id()
    });
    Ok(Answer::ok(&of_device.map(|entry| to_json(service, entry)).collect()))
}

pub(super) async fn put(
    service: Service<'_>,
    identity: &Identity,
    etag: Option<ETag>,
    given: IdentityIn,
) -> Result<Answer, Fault> {
    let put = given.into_put(etag)?;
    let (registry, of) = (service.registry.clone(), identity.clone());
    let entry = change(move || registry.put(&of, put)).await?;
    service.backend.close_unauthorized();
    Ok(one(service, &entry))
}

pub(super) async fn delete(
    service: Service<'_>,
    identity: &Identity,
    etag: Option<ETag>,
) -> Result<Answer, Fault> {
    let (registry, of) = (service.registry.clone(), identity.clone());
    let etag = etag.unwrap_or(ETag::Any);
    change(move || registry.remove_if(&of, &etag)).await?;
    service.backend.forget(identity).await;
    Ok(Answer::no_content())
}

pub(super) fn purge(service: Service<'_>, device: &Identity) -> Result<Answer, Fault> {
    entry(service, device)?;
    let purged = service.backend.messages().purge(device);
    Ok(Answer::ok(&json!({
        "totalMessagesPurged": purged, "deviceId": device.device_id(), "moduleId": null,
    })))
}

pub(super) fn statistics(service: Service<'_>) -> Result<Answer, Fault> {
    let all = service.registry.list();
    let devices = all.iter().filter(|entry| entry.identity.module_id().is_none());
    let (enabled, disabled): (Vec<_>, Vec<_>) = devices.partition(|entry| entry.status == Status::Enabled);
    Ok(Answer::ok(&json!({
        "totalDeviceCount": enabled.len() + disabled.len(),
        "enabledDeviceCount": enabled.len(),
        "disabledDeviceCount": disabled.len(),
    })))
}

pub(super) fn connected(service: Service<'_>) -> Result<Answer, Fault> {
    Ok(Answer::ok(&json!({ "connectedDeviceCount": service.backend.connected() })))
}

/// What is registered under the name.
pub(super) fn entry(service: Service<'_>, identity: &Identity) -> Result<Arc<ServiceIdentity>, Fault> {
    service.registry.cache().get(identity).ok_or_else(|| Fault::missing(identity))
}

/// Changes the registry, away from the threads of connections.
pub(super) async fn change<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, Fault> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(Fault::new(503, "ServiceUnavailable", "the stand-in is stopping")),
    }
}

fn one(service: Service<'_>, entry: &ServiceIdentity) -> Answer {
    Answer::ok(&to_json(service, entry)).with("etag", format!("\"{}\"", ETag::of(entry)))
}

pub(super) fn connection_state(service: Service<'_>, identity: &Identity) -> &'static str {
    if service.backend.is_connected(identity) { "Connected" } else { "Disconnected" }
}

pub(super) fn status(entry: &ServiceIdentity) -> &'static str {
    match entry.status {
        Status::Enabled => "enabled",
        Status::Disabled => "disabled",
    }
}

/// The name of the authentication, and its two thumbprints.
pub(super) fn authentication(entry: &ServiceIdentity) -> (&'static str, Value) {
    let thumbprints = |primary: Option<&Arc<str>>, secondary: Option<&Arc<str>>| {
        json!({
            "primaryThumbprint": primary.map(|text| &**text),
            "secondaryThumbprint": secondary.map(|text| &**text),
        })
    };
    match &entry.authentication {
        Authentication::SymmetricKey { .. } => ("sas", thumbprints(None, None)),
        Authentication::CertificateThumbprint { primary, secondary } => {
            ("selfSigned", thumbprints(primary.as_ref(), secondary.as_ref()))
        }
        Authentication::CertificateAuthority => ("certificateAuthority", thumbprints(None, None)),
        Authentication::None => ("none", thumbprints(None, None)),
    }
}

fn to_json(service: Service<'_>, entry: &ServiceIdentity) -> Value {
    let identity = &entry.identity;
    let (kind, thumbprints) = authentication(entry);
    let (primary, secondary) = match &entry.authentication {
        Authentication::SymmetricKey { primary, secondary } => (primary.as_ref(), secondary.as_ref()),
        Authentication::CertificateThumbprint { .. }
        | Authentication::CertificateAuthority
        | Authentication::None => (None, None),
    };
    let mut object = json!({
        "deviceId": identity.device_id(),
        "generationId": &*entry.generation_id,
        "etag": ETag::of(entry),
        "connectionState": connection_state(service, identity),
        "connectionStateUpdatedTime": NEVER,
        "lastActivityTime": NEVER,
        "cloudToDeviceMessageCount": service.backend.messages().waiting(identity),
        "authentication": {
            "type": kind,
            "symmetricKey": {
                "primaryKey": primary.map(SymmetricKey::to_base64),
                "secondaryKey": secondary.map(SymmetricKey::to_base64),
            },
            "x509Thumbprint": thumbprints,
        },
    });
    if let Some(module) = identity.module_id() {
        object["moduleId"] = module.into();
        object["managedBy"] = Value::Null;
        return object;
    }
    object["status"] = status(entry).into();
    object["statusReason"] = Value::Null;
    object["statusUpdatedTime"] = NEVER.into();
    object["capabilities"] = json!({ "iotEdge": entry.edge });
    if let Some(scope) = &entry.device_scope {
        object["deviceScope"] = (&**scope).into();
    }
    object["parentScopes"] = entry.parent_scopes.iter().map(|scope| &**scope).collect();
    object
}

impl IdentityIn {
    fn into_put(self, etag: Option<ETag>) -> Result<PutIdentity, Fault> {
        let status = match self.status.as_deref() {
            None => None,
            Some(status) if status.eq_ignore_ascii_case("enabled") => Some(Status::Enabled),
            Some(status) if status.eq_ignore_ascii_case("disabled") => Some(Status::Disabled),
            Some(_) => return Err(Fault::invalid("status must be enabled or disabled")),
        };
        let edge = self.capabilities.and_then(|capabilities| capabilities.iot_edge).unwrap_or(false);
        let first_parent = self.parent_scopes.and_then(|scopes| scopes.into_iter().next());
        // The scope of an edge device is its own; that of a leaf is its parent's.
        let parent_scope = first_parent.or(self.device_scope.filter(|_| !edge));
        let parent_scope = parent_scope.filter(|scope| !scope.is_empty()).map(Into::into);
        let authentication = self.authentication.map(AuthenticationIn::read).transpose()?;
        Ok(PutIdentity { etag, authentication, status, edge, parent_scope })
    }
}

impl AuthenticationIn {
    fn read(self) -> Result<Authentication, Fault> {
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        let kind = self.r#type.as_deref().unwrap_or(match &self.x509_thumbprint {
            Some(ThumbprintsIn { primary_thumbprint: Some(text), .. }) if !text.is_empty() => "selfSigned",
            _ => "sas",
        });
        if kind.eq_ignore_ascii_case("sas") {
            let key = |given: Option<String>| {
                let key = text(given).map(|text| SymmetricKey::from_base64(&text));
                key.transpose().map_err(Fault::invalid)
            };
            let (primary, secondary) = match self.symmetric_key {
                Some(keys) => (key(keys.primary_key)?, key(keys.secondary_key)?),
                None => (None, None),
            };
            return Ok(Authentication::SymmetricKey { primary, secondary });
        }
        if kind.eq_ignore_ascii_case("certificateAuthority") {
            return Ok(Authentication::CertificateAuthority);
        }
        if kind.eq_ignore_ascii_case("none") {
            return Ok(Authentication::None);
        }
        if !kind.eq_ignore_ascii_case("selfSigned") {
            return Err(Fault::invalid("the authentication has an unknown type"));
        }
        let thumbprint = |given: Option<String>| {
            let given = text(given);
            let hex = |text: &String| {
                matches!(text.len(), 40 | 64) && text.bytes().all(|digit| digit.is_ascii_hexdigit())
            };
            match given {
                Some(text) if !hex(&text) => {
                    Err(Fault::invalid("a thumbprint must have 40 or 64 hex digits"))
                }
                other => Ok(other.map(Arc::from)),
            }
        };
        let (primary, secondary) = match self.x509_thumbprint {
            Some(given) => (thumbprint(given.primary_thumbprint)?, thumbprint(given.secondary_thumbprint)?),
            None => (None, None),
        };
        if primary.is_none() {
            return Err(Fault::invalid("selfSigned needs a primary thumbprint"));
        }
        Ok(Authentication::CertificateThumbprint { primary, secondary })
    }
}
