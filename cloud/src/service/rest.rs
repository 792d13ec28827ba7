//! The service calls over HTTPS: which path and verb means what, headers in and out. No sockets.

use bytes::Bytes;
use edgehub_broker::identity::Identity;
use edgehub_broker::twin::json;
use hyper::Method;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::fault::Fault;
use super::{access, deployment, identity, method, query, twin};
use crate::backend::CloudBackend;
use crate::registry::{ETag, Registry};

/// Largest body of a service call.
pub(crate) const BODY_BYTES_MAX: usize = 512 * 1_024;

/// Objects and arrays inside each other below the root of a body.
const BODY_DEPTH_MAX: usize = 64;

/// A service call as it came in.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) method: &'a Method,
    /// Decoded segments.
    pub(crate) path: &'a [&'a str],
    pub(crate) query: &'a str,
    pub(crate) authorization: Option<&'a str>,
    pub(crate) if_match: Option<&'a str>,
    pub(crate) continuation: Option<&'a str>,
    pub(crate) page_size: Option<&'a str>,
}

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource<'a> {
    Devices,
    Query,
    DeviceStatistics,
    ServiceStatistics,
    Identity(&'a str, Option<&'a str>),
    Modules(&'a str),
    Messages(&'a str),
    Deployment(&'a str),
    Twin(&'a str, Option<&'a str>),
    Methods(&'a str, Option<&'a str>),
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names and values of headers.
    pub(crate) headers: Vec<(&'static str, String)>,
    /// JSON; nothing with status 204.
    pub(crate) body: Vec<u8>,
}

/// What calls are answered from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Service<'a> {
    pub(crate) registry: &'a std::sync::Arc<Registry>,
    pub(crate) backend: &'a CloudBackend,
}

impl Answer {
    pub(super) fn ok(body: &Value) -> Self {
        Self { status: 200, headers: Vec::new(), body: body.to_string().into() }
    }

    pub(super) fn no_content() -> Self {
        Self { status: 204, headers: Vec::new(), body: Vec::new() }
    }

    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl From<Fault> for Answer {
    fn from(fault: Fault) -> Self {
        let body = fault.to_json();
        Self { status: fault.status, headers: vec![("iothub-errorcode", fault.code.to_owned())], body }
    }
}

impl<'a> Resource<'a> {
    /// What the segments of a path name; words ignore case.
    pub(crate) fn of(path: &[&'a str]) -> Option<Self> {
        let is = |segment: &str, word: &str| segment.eq_ignore_ascii_case(word);
        match *path {
            [devices] | [devices, ""] if is(devices, "devices") => Some(Self::Devices),
            [devices, query] if is(devices, "devices") && is(query, "query") => Some(Self::Query),
            [devices, device] if is(devices, "devices") => Some(Self::Identity(device, None)),
            [devices, device, of] if is(devices, "devices") && is(of, "modules") => {
                Some(Self::Modules(device))
            }
            [devices, device, of] if is(devices, "devices") && is(of, "commands") => {
                Some(Self::Messages(device))
            }
            [devices, device, of] if is(devices, "devices") && is(of, "applyConfigurationContent") => {
                Some(Self::Deployment(device))
            }
            [devices, device, modules, module] if is(devices, "devices") && is(modules, "modules") => {
                Some(Self::Identity(device, Some(module)))
            }
            [statistics, of] if is(statistics, "statistics") && is(of, "devices") => {
                Some(Self::DeviceStatistics)
            }
            [statistics, of] if is(statistics, "statistics") && is(of, "service") => {
                Some(Self::ServiceStatistics)
            }
            [twins, device] if is(twins, "twins") => Some(Self::Twin(device, None)),
            [twins, device, methods] if is(twins, "twins") && is(methods, "methods") => {
                Some(Self::Methods(device, None))
            }
            [twins, device, modules, module] if is(twins, "twins") && is(modules, "modules") => {
                Some(Self::Twin(device, Some(module)))
            }
            [twins, device, modules, module, methods]
                if is(twins, "twins") && is(modules, "modules") && is(methods, "methods") =>
            {
                Some(Self::Methods(device, Some(module)))
            }
            _ => None,
        }
    }
}

/// Answers a call whose path names something.
pub(crate) async fn answer(
    service: Service<'_>,
    resource: Resource<'_>,
    call: &Call<'_>,
    body: &Bytes,
) -> Answer {
    match dispatch(service, resource, call, body).await {
        Ok(answer) => answer,
        Err(fault) => {
            tracing::debug!(verb = %call.method, path = ?call.path, %fault, "a service call is refused");
            fault.into()
        }
    }
}

async fn dispatch(
    service: Service<'_>,
    resource: Resource<'_>,
    call: &Call<'_>,
    body: &Bytes,
) -> Result<Answer, Fault> {
    use Resource as R;
    access::authorize(service.registry, call.authorization)?;
    // The command line may have changed the file since.
    if let Err(error) = service.registry.reload() {
        tracing::warn!(code = "EH7014", %error, "the registry is not read again");
    }
    let etag = call.if_match.map(etag);
    match (resource, call.method) {
        (R::Devices, &Method::GET) => identity::list(service, call.query),
        (R::Query, &Method::POST) => query::run(service, call, body).await,
        (R::DeviceStatistics, &Method::GET) => identity::statistics(service),
        (R::ServiceStatistics, &Method::GET) => identity::connected(service),
        (R::Identity(device, module), &Method::GET) => identity::get(service, &named(device, module)?),
        (R::Identity(device, module), &Method::PUT) => {
            identity::put(service, &named(device, module)?, etag, parse(body)?).await
        }
        (R::Identity(device, module), &Method::DELETE) => {
            identity::delete(service, &named(device, module)?, etag).await
        }
        (R::Modules(device), &Method::GET) => identity::modules(service, &named(device, None)?),
        (R::Messages(device), &Method::DELETE) => identity::purge(service, &named(device, None)?),
        (R::Deployment(device), &Method::POST) => {
            deployment::apply(service, &named(device, None)?, parse(body)?).await
        }
        (R::Twin(device, module), &Method::GET) => twin::get(service, &named(device, module)?).await,
        (R::Twin(device, module), &Method::PATCH) => {
            twin::patch(service, &named(device, module)?, etag, parse(body)?).await
        }
        (R::Twin(device, module), &Method::PUT) => {
            twin::replace(service, &named(device, module)?, etag, parse(body)?).await
        }
        (R::Methods(device, module), &Method::POST) => {
            method::invoke(service, &named(device, module)?, parse(body)?).await
        }
        _ => Err(Fault::new(405, "MethodNotAllowed", format!("{} is not served here", call.method))),
    }
}

/// Reads a body whose size and nesting are checked.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    let object = json::parse(body, BODY_BYTES_MAX, BODY_DEPTH_MAX).map_err(Fault::invalid)?;
    // The error names members and types, never a key.
    serde_json::from_value(Value::Object(object))
        .map_err(|_| Fault::invalid("the body is not of the form that this call takes"))
}

fn named(device: &str, module: Option<&str>) -> Result<Identity, Fault> {
    Ok(match module {
        None => Identity::device(device)?,
        Some(module) => Identity::module(device, module)?,
    })
}

/// The header `If-Match`: `*` or a text, quoted or not.
fn etag(header: &str) -> ETag {
    let text = header.trim();
    let text = text.strip_prefix("W/").unwrap_or(text);
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    if text == "*" { ETag::Any } else { ETag::Is(text.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_are_read() {
        for (header, expected) in [
            ("*", ETag::Any),
            ("\"*\"", ETag::Any),
            ("\"AAE=\"", ETag::Is("AAE=".into())),
            ("W/\"AAE=\"", ETag::Is("AAE=".into())),
            ("AAE=", ETag::Is("AAE=".into())),
            ("\"", ETag::Is("\"".into())),
        ] {
            assert_eq!(etag(header), expected, "{header}");
        }
    }

    #[test]
    fn paths_name_resources() {
        let of = |path: &'static str| {
            let segments: Vec<&'static str> = path.split('/').skip(1).collect();
            Resource::of(&segments)
        };
        for (path, expected) in [
            ("/devices", Some(Resource::Devices)),
            ("/devices/", Some(Resource::Devices)),
            ("/Devices/d1", Some(Resource::Identity("d1", None))),
            ("/devices/query", Some(Resource::Query)),
            ("/devices/d1/modules", Some(Resource::Modules("d1"))),
            ("/devices/d1/modules/m1", Some(Resource::Identity("d1", Some("m1")))),
            ("/devices/d1/commands", Some(Resource::Messages("d1"))),
            ("/devices/d1/applyConfigurationContent", Some(Resource::Deployment("d1"))),
            ("/twins/d1", Some(Resource::Twin("d1", None))),
            ("/twins/d1/modules/m1", Some(Resource::Twin("d1", Some("m1")))),
            ("/twins/d1/methods", Some(Resource::Methods("d1", None))),
            ("/twins/d1/modules/m1/methods", Some(Resource::Methods("d1", Some("m1")))),
            ("/statistics/devices", Some(Resource::DeviceStatistics)),
            ("/statistics/service", Some(Resource::ServiceStatistics)),
            ("/devices/d1/other", None),
            ("/twins", None),
            ("/jobs/v2/j1", None),
        ] {
            assert_eq!(of(path), expected, "{path}");
        }
    }
}
