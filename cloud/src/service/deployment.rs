//! Configuration content for one edge device: desired properties of its modules, all at once.

use std::collections::BTreeMap;

use edgehub_broker::identity::Identity;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::fault::Fault;
use super::identity::{change, entry};
use super::rest::{Answer, Service};
use crate::registry::{PutIdentity, RegistryError};
use crate::twin::{ChangeMode, TwinChange};

/// Modules in one content.
const MODULES_MAX: usize = 100;

/// Content as services send it, and as deployment manifests are written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ContentIn {
    modules_content: BTreeMap<String, Map<String, Value>>,
}

/// Replaces the desired properties of the modules that are named; modules that do not exist are created.
pub(super) async fn apply(
    service: Service<'_>,
    device: &Identity,
    content: ContentIn,
) -> Result<Answer, Fault> {
    if !entry(service, device)?.edge {
        return Err(Fault::invalid(format!("{device} is no edge device")));
    }
    if content.modules_content.len() > MODULES_MAX {
        return Err(Fault::invalid(format!("the content has more than {MODULES_MAX} modules")));
    }
    let mut changes = Vec::new();
    for (module, mut members) in content.modules_content {
        let module = Identity::module(device.device_id(), &module)?;
        let desired = members.remove("properties.desired");
        if let Some(other) = members.keys().next() {
            let text = format!("{module} has the member {other:?}; only properties.desired is served");
            return Err(Fault::invalid(text));
        }
        changes.push((module, desired));
    }
    for (module, desired) in changes {
        let (registry, of) = (service.registry.clone(), module.clone());
        match change(move || Ok(registry.put(&of, PutIdentity::default()))).await? {
            Ok(_) | Err(RegistryError::Exists(_)) => {}
            Err(error) => return Err(error.into()),
        }
        if desired.is_some() {
            let change = TwinChange { tags: None, desired };
            service.backend.change_twin(&module, change, ChangeMode::Replace, None).await?;
        }
    }
    Ok(Answer::no_content())
}
