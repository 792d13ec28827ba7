//! Link addresses: the path of a link's node, and the function and identity that it names.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::performative::{Attach, ReceiverSettle, Role, SenderSettle};

/// Characters that stay as they are in an id: letters, digits and the unreserved marks.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Function of a link, seen from the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LinkKind {
    /// Put-token requests (the client sends) or responses.
    Cbs,
    /// Messages of a device or a module's outputs; the client sends.
    Telemetry,
    /// Messages to a module's inputs; the client receives.
    Inputs,
    /// Cloud-to-device messages; the client receives.
    CloudToDevice,
    /// Direct method calls; the client receives.
    MethodCalls,
    /// Answers to direct method calls; the client sends.
    MethodResponses,
    /// Twin requests; the client sends.
    TwinRequests,
    /// Twin answers and notifications; the client receives.
    TwinAnswers,
}

impl LinkKind {
    /// Settle modes of the hub's answer: sender's, then receiver's. `None` = the field is left out.
    pub fn settle_modes(self, asked: &Attach) -> (Option<SenderSettle>, Option<ReceiverSettle>) {
        let sender = match self {
            Self::Cbs if asked.role == Role::Receiver => Some(SenderSettle::Settled),
            Self::Cbs | Self::Telemetry => asked.snd_settle,
            Self::Inputs | Self::CloudToDevice => None,
            Self::MethodCalls | Self::MethodResponses | Self::TwinRequests | Self::TwinAnswers => {
                Some(SenderSettle::Settled)
            }
        };
        let receiver = match self {
            Self::CloudToDevice => ReceiverSettle::Second,
            _ => ReceiverSettle::First,
        };
        (sender, Some(receiver))
    }
}

/// What a link address names. Ids are decoded and not blank.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LinkAddress {
    /// `$cbs`
    Cbs,
    /// A function of a device or of a module.
    Node {
        /// The function.
        kind: LinkKind,
        /// The device.
        device_id: String,
        /// The module, if it is one.
        module_id: Option<String>,
    },
}

/// An address that names nothing that a client may attach to in that role. Answer with `amqp:not-allowed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// No path of the table.
    #[error("the address names no node of this hub")]
    Unknown,
    /// The node exists for the other direction only.
    #[error("the node cannot be used in this direction")]
    Direction,
    /// An id is empty, blank, or not UTF-8 when decoded.
    #[error("the address has an empty or malformed id")]
    BadId,
}

impl LinkAddress {
    /// Reads an address, absolute (`amqps://host/…`) or relative, for a peer in `peer_role`. Literals ignore case;
    /// the host is not looked at.
    pub fn parse(address: &str, peer_role: Role) -> Result<Self, AddressError> {
        let path = path(address).ok_or(AddressError::Unknown)?;
        let mut parts = path.split('/');
        let mut literal =
            |expected: &str| parts.next().is_some_and(|part| part.eq_ignore_ascii_case(expected));
        if path.eq_ignore_ascii_case("$cbs") {
            return Ok(Self::Cbs);
        }
        if !literal("devices") {
            return Err(AddressError::Unknown);
        }
        let device = parts.next().ok_or(AddressError::Unknown)?;
        let rest: Vec<&str> = parts.take(5).collect();
        let is = |part: &str, expected: &str| part.eq_ignore_ascii_case(expected);
        let (module, function) = match rest[..] {
            [modules, module, ref function @ ..] if is(modules, "modules") => (Some(module), function),
            ref function => (None, function),
        };
        let kind = match (function, peer_role) {
            (&[a, b], _) if is(a, "messages") && is(b, "events") => match peer_role {
                Role::Sender => LinkKind::Telemetry,
                Role::Receiver if module.is_some() => LinkKind::Inputs,
                Role::Receiver => return Err(AddressError::Direction),
            },
            (&[a, b], _) if is(a, "messages") && is(b, "devicebound") => match peer_role {
                Role::Sender => return Err(AddressError::Direction),
                Role::Receiver => LinkKind::CloudToDevice,
            },
            (&[a, b], _) if is(a, "methods") && is(b, "devicebound") => match peer_role {
                Role::Sender => LinkKind::MethodResponses,
                Role::Receiver => LinkKind::MethodCalls,
            },
            (&[a], _) if is(a, "twin") => match peer_role {
                Role::Sender => LinkKind::TwinRequests,
                Role::Receiver => LinkKind::TwinAnswers,
            },
            _ => return Err(AddressError::Unknown),
        };
        Ok(Self::Node { kind, device_id: decode(device)?, module_id: module.map(decode).transpose()? })
    }

    /// The function.
    pub fn kind(&self) -> LinkKind {
        match self {
            Self::Cbs => LinkKind::Cbs,
            Self::Node { kind, .. } => *kind,
        }
    }

    /// The absolute form with a host, as a client sends it.
    pub fn to_uri(&self, host: &str) -> String {
        let (kind, device_id, module_id) = match self {
            Self::Cbs => return format!("amqps://{host}/$cbs"),
            Self::Node { kind, device_id, module_id } => (kind, device_id, module_id),
        };
        let function = match kind {
            LinkKind::Cbs => "$cbs",
            LinkKind::Telemetry | LinkKind::Inputs => "messages/events",
            LinkKind::CloudToDevice => "messages/deviceBound",
            LinkKind::MethodCalls | LinkKind::MethodResponses => "methods/deviceBound",
            LinkKind::TwinRequests | LinkKind::TwinAnswers => "twin",
        };
        let device = utf8_percent_encode(device_id, ENCODED);
        match module_id {
            None => format!("amqps://{host}/devices/{device}/{function}"),
            Some(module) => {
                let module = utf8_percent_encode(module, ENCODED);
                format!("amqps://{host}/devices/{device}/modules/{module}/{function}")
            }
        }
    }
}

/// The path without its first slash, still encoded; query and fragment are cut off.
fn path(address: &str) -> Option<&str> {
    let scheme = address.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("amqps"));
    let path = match scheme {
        true => address[5..].strip_prefix("://")?.split_once('/')?.1,
        false => address.strip_prefix('/').unwrap_or(address),
    };
    path.split(['?', '#']).next()
}

/// Percent-decoding of an id; a raw plus is a blank.
fn decode(id: &str) -> Result<String, AddressError> {
    let spaced = id.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8().map_err(|_| AddressError::BadId)?;
    if decoded.trim().is_empty() { Err(AddressError::BadId) } else { Ok(decoded.into_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_hosts_and_round_trips() {
        for bad in [
            "amqps",
            "amqps:/devices/d/twin",
            "amqps://host",
            "amqpsdevices/d/twin",
            "amqp://h/devices/d/twin",
        ] {
            assert_eq!(LinkAddress::parse(bad, Role::Sender), Err(AddressError::Unknown), "{bad}");
        }
        let node = LinkAddress::Node {
            kind: LinkKind::TwinRequests,
            device_id: "a b+%/ü".into(),
            module_id: Some("$edgeHub".into()),
        };
        let uri = node.to_uri("gw:5671");
        assert_eq!(uri, "amqps://gw:5671/devices/a%20b%2B%25%2F%C3%BC/modules/%24edgeHub/twin");
        assert_eq!(LinkAddress::parse(&uri, Role::Sender), Ok(node.clone()));
        assert_eq!(LinkAddress::parse(&format!("{uri}?x=/y"), Role::Sender), Ok(node));
    }
}
