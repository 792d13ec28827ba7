//! What is known of one identity, and its two JSON forms: in the store, and in the answers of scope calls.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};

use super::key::SymmetricKey;
use super::name::Identity;

/// Longest scope id, generation id or thumbprint in bytes.
const TEXT_BYTES_MAX: usize = 512;

/// Most parent scopes of one identity; the cloud hub gives one.
const PARENT_SCOPES_MAX: usize = 8;

/// Longest continuation link in bytes.
const CONTINUATION_BYTES_MAX: usize = 4_096;

/// What is known of one identity, as the registry has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceIdentity {
    /// Whose record this is.
    pub identity: Identity,
    /// How it proves who it is.
    pub authentication: Authentication,
    /// Whether it may connect. Modules are always enabled.
    pub status: Status,
    /// Whether it is an edge device: one that others can be below.
    pub edge: bool,
    /// For an edge device its own scope id; for a leaf that of its parent.
    pub device_scope: Option<Arc<str>>,
    /// The scope id of the parent.
    pub parent_scopes: Vec<Arc<str>>,
    /// Differs between identities of the same name that were created at different times.
    pub generation_id: Arc<str>,
}

/// How an identity proves who it is. `Debug` never prints a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authentication {
    /// By tokens signed with one of two keys. A key that the registry sent in no readable form is absent.
    SymmetricKey {
        /// Tried first.
        primary: Option<SymmetricKey>,
        /// Tried second; lets keys be rolled.
        secondary: Option<SymmetricKey>,
    },
    /// By a certificate with one of two thumbprints (hex of SHA-1 or SHA-256).
    CertificateThumbprint {
        /// First thumbprint.
        primary: Option<Arc<str>>,
        /// Second thumbprint.
        secondary: Option<Arc<str>>,
    },
    /// By a certificate that a trusted authority issued.
    CertificateAuthority,
    /// Not at all.
    None,
}

/// Whether an identity may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It may.
    Enabled,
    /// It may not.
    Disabled,
}

/// One page of a scope answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScopePage {
    /// Devices and modules.
    pub identities: Vec<ServiceIdentity>,
    /// What to ask for the next page with; absent on the last.
    pub continuation: Option<String>,
    /// Entries that could not be read and are left out of `identities`.
    pub unreadable: usize,
}

/// Why bytes are no record or no page. Holds nothing of their content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServiceIdentityError {
    /// Not the JSON that is expected.
    #[error("not a scope document: {category} error at line {line}, column {column}")]
    Json {
        /// Syntax, data or end of input.
        category: &'static str,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// Readable JSON with a value that cannot be.
    #[error("not a scope document: {0}")]
    Value(&'static str),
}

impl ServiceIdentity {
    /// The keys that tokens of this identity can be signed with.
    pub fn keys(&self) -> impl Iterator<Item = &SymmetricKey> {
        let (primary, secondary) = match &self.authentication {
            Authentication::SymmetricKey { primary, secondary } => (primary.as_ref(), secondary.as_ref()),
            Authentication::CertificateThumbprint { .. }
            | Authentication::CertificateAuthority
            | Authentication::None => (None, None),
        };
        primary.into_iter().chain(secondary)
    }

    /// The scope id of the parent, if there is a parent.
    pub fn parent_scope(&self) -> Option<&Arc<str>> {
        let own_scope_is_parents = !self.edge && self.identity.module_id().is_none();
        self.parent_scopes.first().or(self.device_scope.as_ref().filter(|_| own_scope_is_parents))
    }

    /// The form in the store. It holds the keys: encrypt it.
    pub fn to_stored(&self) -> Vec<u8> {
        serde_json::to_vec(&Stored::from(self)).expect("JSON") // plain data: no maps, no fallible parts
    }

    /// Reads the form in the store.
    ///
    /// # Errors
    /// When the bytes are damaged.
    pub fn from_stored(bytes: &[u8]) -> Result<Self, ServiceIdentityError> {
        serde_json::from_slice::<Stored>(bytes)?.try_into()
    }
}

impl ScopePage {
    /// Reads an answer. Entries with an impossible name are counted and left out; the rest of the page stays good.
    ///
    /// # Errors
    /// When it is no JSON of the shape, or one of the three top-level members is missing.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ServiceIdentityError> {
        let answer: Answer = serde_json::from_slice(bytes)?;
        let mut page = ScopePage::default();
        if let Some(link) = answer.continuation_link.filter(|link| !link.is_empty()) {
            if link.len() > CONTINUATION_BYTES_MAX {
                return Err(ServiceIdentityError::Value("the continuation link is longer than 4096 bytes"));
            }
            page.continuation = Some(link);
        }
        let devices = answer.devices.unwrap_or_default().into_iter().map(ServiceIdentity::try_from);
        let modules = answer.modules.unwrap_or_default().into_iter().map(ServiceIdentity::try_from);
        for entry in devices.chain(modules) {
            match entry {
                Ok(identity) => page.identities.push(identity),
                Err(_) => page.unreadable += 1,
            }
        }
        Ok(page)
    }

    /// Writes an answer, with the members and their order that every known reader takes.
    pub fn to_json(&self) -> Vec<u8> {
        let (modules, devices): (Vec<_>, Vec<_>) =
            self.identities.iter().partition(|entry| entry.identity.module_id().is_some());
        let answer = Answer {
            devices: Some(devices.into_iter().map(AnswerDevice::from).collect()),
            modules: Some(modules.into_iter().map(AnswerModule::from).collect()),
            continuation_link: self.continuation.clone(),
        };
        serde_json::to_vec(&answer).expect("JSON") // plain data: no maps, no fallible parts
    }
}

impl From<serde_json::Error> for ServiceIdentityError {
    fn from(error: serde_json::Error) -> Self {
        // The error's own text can quote the input, and with it a key.
        let category = match error.classify() {
            serde_json::error::Category::Io => "input",
            serde_json::error::Category::Syntax => "syntax",
            serde_json::error::Category::Data => "data",
            serde_json::error::Category::Eof => "end of input",
        };
        Self::Json { category, line: error.line(), column: error.column() }
    }
}

/// A member that must be there, null or not.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(deserializer)
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    #[serde(deserialize_with = "present")]
    devices: Option<Vec<AnswerDevice>>,
    #[serde(deserialize_with = "present")]
    modules: Option<Vec<AnswerModule>>,
    #[serde(deserialize_with = "present")]
    continuation_link: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnswerDevice {
    device_id: String,
    generation_id: Option<String>,
    status: Option<String>,
    authentication: Option<AnswerAuthentication>,
    capabilities: Option<Capabilities>,
    device_scope: Option<String>,
    parent_scopes: Option<Vec<String>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnswerModule {
    module_id: String,
    device_id: String,
    generation_id: Option<String>,
    authentication: Option<AnswerAuthentication>,
}

/// The order of the members is the one of the first implementation, whose reader may depend on it.
#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct AnswerAuthentication {
    symmetric_key: Option<KeyPair>,
    x509_thumbprint: Option<ThumbprintPair>,
    r#type: Option<String>,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct KeyPair {
    primary_key: Option<String>,
    secondary_key: Option<String>,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct ThumbprintPair {
    primary_thumbprint: Option<String>,
    secondary_thumbprint: Option<String>,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct Capabilities {
    #[serde(default)]
    iot_edge: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    device_id: String,
    module_id: Option<String>,
    device_scope: Option<String>,
    parent_scopes: Option<Vec<String>>,
    capabilities: Option<Vec<String>>,
    authentication: StoredAuthentication,
    status: String,
    generation_id: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredAuthentication {
    r#type: String,
    symmetric_key: Option<KeyPair>,
    x509_thumbprint: Option<ThumbprintPair>,
}

impl KeyPair {
    fn of(primary: Option<&SymmetricKey>, secondary: Option<&SymmetricKey>) -> Self {
        Self {
            primary_key: primary.map(SymmetricKey::to_base64),
            secondary_key: secondary.map(SymmetricKey::to_base64),
        }
    }

    fn into_authentication(self) -> Authentication {
        let key = |text: Option<String>| text.and_then(|text| SymmetricKey::from_base64(&text).ok());
        Authentication::SymmetricKey { primary: key(self.primary_key), secondary: key(self.secondary_key) }
    }
}

impl ThumbprintPair {
    fn of(primary: Option<&Arc<str>>, secondary: Option<&Arc<str>>) -> Self {
        Self {
            primary_thumbprint: primary.map(|text| text.to_string()),
            secondary_thumbprint: secondary.map(|text| text.to_string()),
        }
    }

    fn into_authentication(self) -> Authentication {
        let text = |text: Option<String>| {
            text.filter(|text| !text.is_empty() && text.len() <= TEXT_BYTES_MAX).map(Arc::from)
        };
        Authentication::CertificateThumbprint {
            primary: text(self.primary_thumbprint),
            secondary: text(self.secondary_thumbprint),
        }
    }
}

impl AnswerAuthentication {
    fn into_authentication(self) -> Authentication {
        // The type's case and its absence are read as the first implementation's reader does: absent is `sas`.
        let kind = self.r#type.as_deref().unwrap_or("sas");
        if kind.eq_ignore_ascii_case("sas") {
            self.symmetric_key.unwrap_or_default().into_authentication()
        } else if kind.eq_ignore_ascii_case("selfSigned") {
            self.x509_thumbprint.unwrap_or_default().into_authentication()
        } else if kind.eq_ignore_ascii_case("certificateAuthority") {
            Authentication::CertificateAuthority
        } else {
            Authentication::None
        }
    }
}

impl From<&Authentication> for AnswerAuthentication {
    fn from(authentication: &Authentication) -> Self {
        let (symmetric_key, x509_thumbprint, name) = match authentication {
            Authentication::SymmetricKey { primary, secondary } => {
                (KeyPair::of(primary.as_ref(), secondary.as_ref()), ThumbprintPair::default(), "sas")
            }
            Authentication::CertificateThumbprint { primary, secondary } => {
                let pair = ThumbprintPair::of(primary.as_ref(), secondary.as_ref());
                (KeyPair::default(), pair, "selfSigned")
            }
            Authentication::CertificateAuthority => {
                (KeyPair::default(), ThumbprintPair::default(), "certificateAuthority")
            }
            Authentication::None => (KeyPair::default(), ThumbprintPair::default(), "none"),
        };
        Self {
            symmetric_key: Some(symmetric_key),
            x509_thumbprint: Some(x509_thumbprint),
            r#type: Some(name.into()),
        }
    }
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Status::Enabled => "enabled",
            Status::Disabled => "disabled",
        }
    }

    /// A status that is not sent is enabled, as the first implementation reads it; an unknown one is not.
    fn read(text: Option<&str>) -> Self {
        match text {
            None => Status::Enabled,
            Some(text) if text.eq_ignore_ascii_case("enabled") => Status::Enabled,
            Some(_) => Status::Disabled,
        }
    }
}

fn text(text: String) -> Result<Arc<str>, ServiceIdentityError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(ServiceIdentityError::Value("a scope or generation id is longer than 512 bytes"));
    }
    Ok(text.into())
}

fn scopes(scopes: Option<Vec<String>>) -> Result<Vec<Arc<str>>, ServiceIdentityError> {
    let scopes = scopes.unwrap_or_default();
    if scopes.len() > PARENT_SCOPES_MAX {
        return Err(ServiceIdentityError::Value("an identity has more than 8 parent scopes"));
    }
    scopes.into_iter().map(text).collect()
}

const NAME: ServiceIdentityError = ServiceIdentityError::Value("a device or module id is not possible");

fn named(device: &str, module: Option<&str>) -> Result<Identity, ServiceIdentityError> {
    match module {
        None => Identity::device(device),
        Some(module) => Identity::module(device, module),
    }
    .map_err(|_| NAME)
}

impl TryFrom<AnswerDevice> for ServiceIdentity {
    type Error = ServiceIdentityError;

    fn try_from(device: AnswerDevice) -> Result<Self, Self::Error> {
        Ok(Self {
            identity: named(&device.device_id, None)?,
            authentication: device
                .authentication
                .map_or(Authentication::None, AnswerAuthentication::into_authentication),
            status: Status::read(device.status.as_deref()),
            edge: device.capabilities.unwrap_or_default().iot_edge,
            device_scope: device.device_scope.filter(|scope| !scope.is_empty()).map(text).transpose()?,
            parent_scopes: scopes(device.parent_scopes)?,
            generation_id: text(device.generation_id.unwrap_or_default())?,
        })
    }
}

impl TryFrom<AnswerModule> for ServiceIdentity {
    type Error = ServiceIdentityError;

    fn try_from(module: AnswerModule) -> Result<Self, Self::Error> {
        Ok(Self {
            identity: named(&module.device_id, Some(&module.module_id))?,
            authentication: module
                .authentication
                .map_or(Authentication::None, AnswerAuthentication::into_authentication),
            status: Status::Enabled,
            edge: false,
            device_scope: None,
            parent_scopes: Vec::new(),
            generation_id: text(module.generation_id.unwrap_or_default())?,
        })
    }
}

fn owned(texts: &[Arc<str>]) -> Vec<String> {
    texts.iter().map(|text| text.to_string()).collect()
}

impl From<&ServiceIdentity> for AnswerDevice {
    fn from(entry: &ServiceIdentity) -> Self {
        Self {
            device_id: entry.identity.device_id().to_owned(),
            generation_id: Some(entry.generation_id.to_string()),
            status: Some(entry.status.as_str().into()),
            authentication: Some((&entry.authentication).into()),
            capabilities: Some(Capabilities { iot_edge: entry.edge }),
            device_scope: entry.device_scope.as_ref().map(|scope| scope.to_string()),
            parent_scopes: Some(owned(&entry.parent_scopes)),
        }
    }
}

impl From<&ServiceIdentity> for AnswerModule {
    fn from(entry: &ServiceIdentity) -> Self {
        Self {
            module_id: entry.identity.module_id().unwrap_or_default().to_owned(),
            device_id: entry.identity.device_id().to_owned(),
            generation_id: Some(entry.generation_id.to_string()),
            authentication: Some((&entry.authentication).into()),
        }
    }
}

impl From<&ServiceIdentity> for Stored {
    fn from(entry: &ServiceIdentity) -> Self {
        let (name, symmetric_key, x509_thumbprint) = match &entry.authentication {
            Authentication::SymmetricKey { primary, secondary } => {
                ("SymmetricKey", Some(KeyPair::of(primary.as_ref(), secondary.as_ref())), None)
            }
            Authentication::CertificateThumbprint { primary, secondary } => {
                let pair = ThumbprintPair::of(primary.as_ref(), secondary.as_ref());
                ("CertificateThumbprint", None, Some(pair))
            }
            Authentication::CertificateAuthority => ("CertificateAuthority", None, None),
            Authentication::None => ("None", None, None),
        };
        Self {
            device_id: entry.identity.device_id().to_owned(),
            module_id: entry.identity.module_id().map(str::to_owned),
            device_scope: entry.device_scope.as_ref().map(|scope| scope.to_string()),
            parent_scopes: Some(owned(&entry.parent_scopes)),
            capabilities: Some(entry.edge.then(|| EDGE.to_owned()).into_iter().collect()),
            authentication: StoredAuthentication { r#type: name.into(), symmetric_key, x509_thumbprint },
            status: entry.status.as_str().into(),
            generation_id: entry.generation_id.to_string(),
        }
    }
}

const EDGE: &str = "iotEdge";

impl TryFrom<Stored> for ServiceIdentity {
    type Error = ServiceIdentityError;

    fn try_from(stored: Stored) -> Result<Self, Self::Error> {
        let authentication = stored.authentication;
        let authentication = match authentication.r#type.as_str() {
            "SymmetricKey" => authentication.symmetric_key.unwrap_or_default().into_authentication(),
            "CertificateThumbprint" => {
                authentication.x509_thumbprint.unwrap_or_default().into_authentication()
            }
            "CertificateAuthority" => Authentication::CertificateAuthority,
            "None" => Authentication::None,
            _ => return Err(ServiceIdentityError::Value("the authentication type is unknown")),
        };
        Ok(Self {
            identity: named(&stored.device_id, stored.module_id.as_deref())?,
            authentication,
            status: Status::read(Some(&stored.status)),
            edge: stored.capabilities.unwrap_or_default().iter().any(|capability| capability == EDGE),
            device_scope: stored.device_scope.map(text).transpose()?,
            parent_scopes: scopes(stored.parent_scopes)?,
            generation_id: text(stored.generation_id)?,
        })
    }
}

impl Serialize for ServiceIdentity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Stored::from(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ServiceIdentity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Stored::deserialize(deserializer)?.try_into().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = r#"{"devices":[{"deviceId":"edge-child","generationId":"638000000000000000","status":"enabled","authentication":{"symmetricKey":{"primaryKey":"cHJpbWFyeQ==","secondaryKey":"c2Vjb25kYXJ5"},"x509Thumbprint":{"primaryThumbprint":null,"secondaryThumbprint":null},"type":"sas"},"capabilities":{"iotEdge":true},"deviceScope":"ms-azure-iot-edge://edge-child-638000000000000000","parentScopes":["ms-azure-iot-edge://edge1-637000000000000000"]},{"deviceId":"leaf7","generationId":"638000000000000001","status":"disabled","authentication":{"symmetricKey":{"primaryKey":null,"secondaryKey":null},"x509Thumbprint":{"primaryThumbprint":"AA11","secondaryThumbprint":"BB22"},"type":"selfSigned"},"capabilities":{"iotEdge":false},"deviceScope":"ms-azure-iot-edge://edge-child-638000000000000000","parentScopes":["ms-azure-iot-edge://edge-child-638000000000000000"]}],"modules":[{"moduleId":"$edgeHub","deviceId":"edge-child","generationId":"638000000000000002","authentication":{"symmetricKey":{"primaryKey":"cHJpbWFyeQ==","secondaryKey":"c2Vjb25kYXJ5"},"x509Thumbprint":{"primaryThumbprint":null,"secondaryThumbprint":null},"type":"sas"}}],"continuationLink":null}"#;

    #[test]
    fn a_page_is_written_to_the_letter() {
        let page = ScopePage::from_json(PAGE.as_bytes()).unwrap();
        assert_eq!(page.identities.len(), 3);
        assert_eq!(String::from_utf8(page.to_json()).unwrap(), PAGE);
        assert_eq!(page.identities[1].status, Status::Disabled);
        assert!(page.identities[0].edge);
        assert_eq!(page.identities[2].identity.to_string(), "edge-child/$edgeHub");
        let empty = ScopePage::default().to_json();
        assert_eq!(empty, br#"{"devices":[],"modules":[],"continuationLink":null}"#);
    }

    #[test]
    fn sparse_answers_are_read() {
        let text = r#"{"devices":[{"deviceId":"a","authentication":{"type":"none"},"more":[[1]]},{"deviceId":"a/b"},
            {"deviceId":"c","authentication":{"symmetricKey":{"primaryKey":"%","secondaryKey":"c2Vj"},"x509Thumbprint":{}}}],
            "modules":null,"continuationLink":"next"}"#;
        let page = ScopePage::from_json(text.as_bytes()).unwrap();
        assert_eq!((page.identities.len(), page.unreadable), (2, 1));
        assert_eq!(page.continuation.as_deref(), Some("next"));
        assert_eq!(page.identities[0].authentication, Authentication::None);
        assert_eq!(page.identities[1].keys().count(), 1);
    }

    #[test]
    fn what_is_no_page_is_refused() {
        for text in [
            "",
            "{}",
            "[]",
            r#"{"devices":[],"modules":[]}"#,
            r#"{"devices":{},"modules":[],"continuationLink":null}"#,
        ] {
            assert!(ScopePage::from_json(text.as_bytes()).is_err(), "{text}");
        }
        let deep = "[".repeat(100_000);
        assert!(ScopePage::from_json(deep.as_bytes()).is_err());
        let secret = ScopePage::from_json(br#"{"devices":"c2VjcmV0","modules":[],"continuationLink":null}"#);
        assert!(!secret.unwrap_err().to_string().contains("c2VjcmV0"));
    }

    #[test]
    fn the_stored_form_round_trips() {
        let page = ScopePage::from_json(PAGE.as_bytes()).unwrap();
        for entry in page.identities {
            let stored = entry.to_stored();
            assert_eq!(ServiceIdentity::from_stored(&stored).unwrap(), entry);
            let json: serde_json::Value = serde_json::from_slice(&stored).unwrap();
            assert_eq!(json["deviceId"], entry.identity.device_id());
        }
        assert!(ServiceIdentity::from_stored(b"{}").is_err());
    }
}
