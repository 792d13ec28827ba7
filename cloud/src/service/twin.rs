//! Calls about twins, and their JSON.

use edgehub_broker::identity::{Identity, ServiceIdentity};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::fault::Fault;
use super::identity::{NEVER, authentication, connection_state, entry, status};
use super::rest::{Answer, Service};
use crate::registry::ETag;
use crate::twin::{ChangeMode, Twin, TwinChange};

/// A twin as services send it. Members that the stand-in gives itself are passed over.
#[derive(Debug, Deserialize)]
pub(super) struct TwinIn {
    tags: Option<Value>,
    properties: Option<PropertiesIn>,
}

#[derive(Debug, Deserialize)]
struct PropertiesIn {
    desired: Option<Value>,
}

pub(super) async fn get(service: Service<'_>, identity: &Identity) -> Result<Answer, Fault> {
    let entry = entry(service, identity)?;
    let twin = service.backend.twin_of(identity).await?;
    Ok(one(service, &entry, &twin))
}

pub(super) async fn patch(
    service: Service<'_>,
    identity: &Identity,
    etag: Option<ETag>,
    given: TwinIn,
) -> Result<Answer, Fault> {
    let change = TwinChange { tags: given.tags, desired: given.properties.and_then(|given| given.desired) };
    changed(service, identity, etag, change, ChangeMode::Merge).await
}

/// What is not given becomes empty.
pub(super) async fn replace(
    service: Service<'_>,
    identity: &Identity,
    etag: Option<ETag>,
    given: TwinIn,
) -> Result<Answer, Fault> {
    let empty = || Some(Value::Object(Map::new()));
    let change = TwinChange {
        tags: given.tags.or_else(empty),
        desired: given.properties.and_then(|given| given.desired).or_else(empty),
    };
    changed(service, identity, etag, change, ChangeMode::Replace).await
}

async fn changed(
    service: Service<'_>,
    identity: &Identity,
    etag: Option<ETag>,
    change: TwinChange,
    mode: ChangeMode,
) -> Result<Answer, Fault> {
    let entry = entry(service, identity)?;
    let etag = match etag {
        None | Some(ETag::Any) => None,
        Some(ETag::Is(text)) => Some(text),
    };
    let twin = service.backend.change_twin(identity, change, mode, etag).await?;
    Ok(one(service, &entry, &twin))
}

fn one(service: Service<'_>, entry: &ServiceIdentity, twin: &Twin) -> Answer {
    Answer::ok(&to_json(service, entry, twin)).with("etag", format!("\"{}\"", twin.etag()))
}

pub(super) fn to_json(service: Service<'_>, entry: &ServiceIdentity, twin: &Twin) -> Value {
    let identity = &entry.identity;
    let (kind, thumbprints) = authentication(entry);
    let mut object = json!({
        "deviceId": identity.device_id(),
        "etag": twin.etag(),
        "deviceEtag": ETag::of(entry),
        "version": twin.version(),
        "status": status(entry),
        "statusUpdateTime": NEVER,
        "connectionState": connection_state(service, identity),
        "lastActivityTime": NEVER,
        "cloudToDeviceMessageCount": service.backend.messages().waiting(identity),
        "authenticationType": kind,
        "x509Thumbprint": thumbprints,
        "modelId": "",
        "tags": twin.tags(),
        "properties": twin.to_service(),
    });
    if let Some(module) = identity.module_id() {
        object["moduleId"] = module.into();
        return object;
    }
    object["capabilities"] = json!({ "iotEdge": entry.edge });
    if let Some(scope) = &entry.device_scope {
        object["deviceScope"] = (&**scope).into();
    }
    object["parentScopes"] = entry.parent_scopes.iter().map(|scope| &**scope).collect();
    object
}
