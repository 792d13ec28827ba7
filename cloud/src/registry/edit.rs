//! How identities are made and changed, within the rules of the registry. No files.

use std::collections::BTreeMap;
use std::sync::Arc;

use edgehub_broker::identity::{
    Authentication, CHAIN_EDGE_DEVICES_MAX, HUB_MODULE_ID, Identity, ServiceIdentity, Status, SymmetricKey,
};

use super::{NewDevice, PutIdentity, RegistryError};

/// Bytes of a generated key.
const KEY_BYTES: usize = 32;

/// The module that every edge device has beside its hub.
const AGENT_MODULE_ID: &str = "$edgeAgent";

/// Creates an identity, or changes one; as a service asks for it.
pub(super) fn put(
    identities: &mut BTreeMap<Identity, ServiceIdentity>,
    identity: &Identity,
    put: PutIdentity,
) -> Result<ServiceIdentity, RegistryError> {
    let old = identities.get(identity);
    match (&put.etag, old) {
        (None, Some(_)) => return Err(RegistryError::Exists(identity.clone())),
        (Some(_), None) => return Err(RegistryError::Missing(identity.clone())),
        (Some(etag), Some(old)) if !etag.fits(old) => {
            return Err(RegistryError::Precondition(identity.clone()));
        }
        _ => {}
    }
    if identity.module_id().is_some() && !identities.contains_key(&identity.of_device()) {
        return Err(RegistryError::Missing(identity.of_device()));
    }
    let mut entry = match old {
        Some(old) => old.clone(),
        None => new_module(identity.clone())?,
    };
    if let Some(authentication) = put.authentication {
        entry.authentication = with_keys(authentication, &entry.authentication)?;
    }
    entry.status = put.status.unwrap_or(entry.status);
    if identity.module_id().is_none() {
        let children = entry.device_scope.clone().filter(|scope| {
            entry.edge && identities.values().any(|child| child.parent_scope() == Some(scope))
        });
        if !put.edge && children.is_some() {
            return Err(RegistryError::HasChildren(identity.clone()));
        }
        place(identities, &mut entry, put.edge, put.parent_scope)?;
        if put.edge {
            insert_edge_modules(identities, identity)?;
        }
    }
    identities.insert(identity.clone(), entry.clone());
    Ok(entry)
}

/// Puts a device below a parent, or below none.
fn place(
    identities: &BTreeMap<Identity, ServiceIdentity>,
    entry: &mut ServiceIdentity,
    edge: bool,
    parent_scope: Option<Arc<str>>,
) -> Result<(), RegistryError> {
    let parent_scope = match parent_scope {
        None => None,
        Some(scope) => {
            let parent = identities
                .values()
                .find(|other| other.edge && other.device_scope.as_ref() == Some(&scope))
                .ok_or_else(|| RegistryError::NoScope(entry.identity.clone()))?;
            let mut above = Some(parent);
            while let Some(device) = above {
                if device.identity == entry.identity {
                    return Err(RegistryError::TooDeep(entry.identity.clone()));
                }
                above = parent_of(identities, device);
            }
            Some(scope_below(identities, &parent.identity, &entry.identity, edge)?)
        }
    };
    let own = entry.device_scope.clone().filter(|_| entry.edge);
    entry.device_scope = match edge {
        true => Some(own.unwrap_or_else(|| scope_of(&entry.identity, &entry.generation_id))),
        false => parent_scope.clone(),
    };
    entry.parent_scopes = parent_scope.into_iter().collect();
    entry.edge = edge;
    Ok(())
}

/// Keys that are not given stay, or are made.
fn with_keys(given: Authentication, old: &Authentication) -> Result<Authentication, RegistryError> {
    let Authentication::SymmetricKey { primary, secondary } = given else { return Ok(given) };
    let (old_primary, old_secondary) = match old {
        Authentication::SymmetricKey { primary, secondary } => (primary.clone(), secondary.clone()),
        Authentication::CertificateThumbprint { .. }
        | Authentication::CertificateAuthority
        | Authentication::None => (None, None),
    };
    let key = |given: Option<SymmetricKey>, old: Option<SymmetricKey>| match given.or(old) {
        Some(key) => Ok(key),
        None => new_key(),
    };
    Ok(Authentication::SymmetricKey {
        primary: Some(key(primary, old_primary)?),
        secondary: Some(key(secondary, old_secondary)?),
    })
}

fn scope_of(identity: &Identity, generation_id: &str) -> Arc<str> {
    format!("ms-azure-iot-edge://{identity}-{generation_id}").into()
}

fn parent_of<'a>(
    identities: &'a BTreeMap<Identity, ServiceIdentity>,
    device: &ServiceIdentity,
) -> Option<&'a ServiceIdentity> {
    let scope = device.parent_scope()?;
    identities.values().find(|other| other.edge && other.device_scope.as_ref() == Some(scope))
}

fn insert_edge_modules(
    identities: &mut BTreeMap<Identity, ServiceIdentity>,
    device: &Identity,
) -> Result<(), RegistryError> {
    for module in [AGENT_MODULE_ID, HUB_MODULE_ID] {
        let module = Identity::module(device.device_id(), module)?;
        if !identities.contains_key(&module) {
            identities.insert(module.clone(), new_module(module)?);
        }
    }
    Ok(())
}

pub(super) fn insert_device(
    identities: &mut BTreeMap<Identity, ServiceIdentity>,
    device: NewDevice<'_>,
) -> Result<ServiceIdentity, RegistryError> {
    let identity = Identity::device(device.id)?;
    let parent = device.parent.map(Identity::device).transpose()?;
    if identities.contains_key(&identity) {
        return Err(RegistryError::Exists(identity));
    }
    let parent_scope = match &parent {
        None => None,
        Some(parent) => Some(scope_below(identities, parent, &identity, device.edge)?),
    };
    let generation_id = generation_id();
    let own_scope = scope_of(&identity, &generation_id);
    let created = ServiceIdentity {
        identity: identity.clone(),
        authentication: new_keys()?,
        status: Status::Enabled,
        edge: device.edge,
        device_scope: if device.edge { Some(own_scope) } else { parent_scope.clone() },
        parent_scopes: parent_scope.into_iter().collect(),
        generation_id,
    };
    if device.edge {
        insert_edge_modules(identities, &identity)?;
    }
    identities.insert(identity, created.clone());
    Ok(created)
}

/// The scope id of the parent, if something may be put below it.
fn scope_below(
    identities: &BTreeMap<Identity, ServiceIdentity>,
    parent: &Identity,
    child: &Identity,
    child_is_edge: bool,
) -> Result<Arc<str>, RegistryError> {
    let entry = identities.get(parent).ok_or_else(|| RegistryError::Missing(parent.clone()))?;
    let Some(scope) = entry.device_scope.as_ref().filter(|_| entry.edge) else {
        return Err(RegistryError::NotEdge(parent.clone()));
    };
    let mut depth = usize::from(child_is_edge);
    let mut above = Some(entry);
    while let Some(device) = above {
        depth += 1;
        if depth > CHAIN_EDGE_DEVICES_MAX {
            return Err(RegistryError::TooDeep(child.clone()));
        }
        above = parent_of(identities, device);
    }
    Ok(scope.clone())
}

pub(super) fn new_module(identity: Identity) -> Result<ServiceIdentity, RegistryError> {
    Ok(ServiceIdentity {
        identity,
        authentication: new_keys()?,
        status: Status::Enabled,
        edge: false,
        device_scope: None,
        parent_scopes: Vec::new(),
        generation_id: generation_id(),
    })
}

pub(super) fn new_keys() -> Result<Authentication, RegistryError> {
    Ok(Authentication::SymmetricKey { primary: Some(new_key()?), secondary: Some(new_key()?) })
}

pub(super) fn new_key() -> Result<SymmetricKey, RegistryError> {
    let mut bytes = [0; KEY_BYTES];
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| RegistryError::Random)?;
    SymmetricKey::from_bytes(bytes).map_err(|_| RegistryError::Random)
}

/// A number that grows with time, as the cloud hub's: 100 ns steps since the year 1.
fn generation_id() -> Arc<str> {
    const UNIX_EPOCH_TICKS: i128 = 621_355_968_000_000_000;
    let ticks = time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 100 + UNIX_EPOCH_TICKS;
    ticks.to_string().into()
}
