//! The requests of the scope client: nested calls, and the old ones, which know no child edge devices.

use bytes::Bytes;
use hyper::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::super::name::Identity;
use super::super::scope::HUB_MODULE_ID;
use super::super::scope_call::{ScopeBody, ScopeCall};
use super::super::source::ScopeError;

const NESTED_API_VERSION: &str = "2020-06-30-preview";
const OLD_API_VERSION: &str = "2018-08-30-preview";

/// What RFC 3986 lets stand in a path segment, as far as ids use it; `$edgeHub` is sent as it is.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'$');
/// The same for the value of a query parameter.
const PARAMETER: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// One request, to be sent as often as needed.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) path: String,
    /// Empty without one.
    pub(super) body: Bytes,
}

/// Makes the requests of one edge device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Requests<'a> {
    pub(super) edge_device: &'a Identity,
    pub(super) nested: bool,
}

impl Requests<'_> {
    /// A page of what is immediately below the first device of the chain.
    pub(super) fn all(
        self,
        page_size: u16,
        continuation: Option<&str>,
        auth_chain: &str,
    ) -> Result<Ask, ScopeError> {
        if self.nested {
            let body = ScopeBody {
                page_size: Some(page_size.into()),
                continuation_link: continuation.map(Into::into),
                auth_chain: Some(auth_chain.into()),
                ..ScopeBody::default()
            };
            return self.post(ScopeCall::Below, &body);
        }
        let count = page_size.to_string();
        let mut query = vec![("deviceCount", count.as_str())];
        query.extend(continuation.map(|token| ("continuationToken", token)));
        Ok(self.get("devicesAndModulesInDeviceScope", &query))
    }

    /// One identity, for a module with its device.
    pub(super) fn one(self, identity: &Identity, auth_chain: &str) -> Result<Ask, ScopeError> {
        let (device, module) = (identity.device_id(), identity.module_id());
        if self.nested {
            let body = ScopeBody {
                target_device_id: Some(device.into()),
                target_module_id: module.map(Into::into),
                auth_chain: Some(auth_chain.into()),
                ..ScopeBody::default()
            };
            return self.post(ScopeCall::One, &body);
        }
        let mut query = vec![("targetDeviceId", device)];
        query.extend(module.map(|module| ("targetModuleId", module)));
        Ok(self.get("deviceAndModuleInDeviceScope", &query))
    }

    fn post(self, call: ScopeCall, body: &ScopeBody<'_>) -> Result<Ask, ScopeError> {
        let body = serde_json::to_vec(body).map_err(|error| ScopeError::Answer(error.to_string()))?;
        let path = format!("{}?api-version={NESTED_API_VERSION}", self.path(call.name()));
        Ok(Ask { method: Method::POST, path, body: body.into() })
    }

    fn get(self, name: &str, query: &[(&str, &str)]) -> Ask {
        let parameters: String = query
            .iter()
            .map(|(name, value)| format!("{name}={}&", utf8_percent_encode(value, PARAMETER)))
            .collect();
        let path = format!("{}?{parameters}api-version={OLD_API_VERSION}", self.path(name));
        Ask { method: Method::GET, path, body: Bytes::new() }
    }

    fn path(self, name: &str) -> String {
        let device = utf8_percent_encode(self.edge_device.device_id(), SEGMENT);
        format!("/devices/{device}/modules/{HUB_MODULE_ID}/{name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Identity {
        Identity::parse(text).expect(text)
    }

    #[test]
    fn both_generations_are_asked_to_the_letter() {
        let edge_device = &id("edge 1");
        let base = "/devices/edge%201/modules/$edgeHub";
        let nested = Requests { edge_device, nested: true };
        let first = nested.all(100, None, "edge 1").expect("a request");
        let version = "api-version=2020-06-30-preview";
        assert_eq!(first.method, Method::POST);
        assert_eq!(first.path, format!("{base}/devicesAndModulesInTargetDeviceScope?{version}"));
        assert_eq!(first.body, r#"{"pageSize":100,"authChain":"edge 1"}"#);
        let next = nested.all(100, Some("next"), "c;edge 1").expect("a request");
        assert_eq!(next.body, r#"{"pageSize":100,"continuationLink":"next","authChain":"c;edge 1"}"#);
        let one = nested.one(&id("leaf1/m"), "edge 1").expect("a request");
        assert_eq!(one.path, format!("{base}/getDeviceAndModuleOnBehalfOf?{version}"));
        assert_eq!(one.body, r#"{"targetDeviceId":"leaf1","targetModuleId":"m","authChain":"edge 1"}"#);

        let old = Requests { edge_device, nested: false };
        let version = "api-version=2018-08-30-preview";
        let first = old.all(100, None, "edge 1").expect("a request");
        assert_eq!((first.method, first.body), (Method::GET, Bytes::new()));
        assert_eq!(first.path, format!("{base}/devicesAndModulesInDeviceScope?deviceCount=100&{version}"));
        let next = old.all(5, Some("a=b&c"), "edge 1").expect("a request");
        let query = format!("deviceCount=5&continuationToken=a%3Db%26c&{version}");
        assert_eq!(next.path, format!("{base}/devicesAndModulesInDeviceScope?{query}"));
        let one = old.one(&id("leaf1/$m"), "edge 1").expect("a request");
        let query = format!("targetDeviceId=leaf1&targetModuleId=%24m&{version}");
        assert_eq!(one.path, format!("{base}/deviceAndModuleInDeviceScope?{query}"));
    }
}
