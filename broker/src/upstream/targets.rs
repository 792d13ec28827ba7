//! The targets of another broker: which routes have one of their own, and the way up to each.
//!
//! A target is an address, or a template of one. It is part of its endpoint, `iothub[address]`, and so of the names of its
//! queues: what was stored for a target still finds there when its routes, or the settings, are others.
//!
//! Each target is a way of its own, with its own supervisor and connection. Brokers slow down, block and close whole
//! connections for the sake of one full queue; on a connection of its own a target holds up nobody else.

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::plain::{AddressTemplate, PlainAmqp, UpstreamKind};
use super::{UpstreamOptions, UpstreamStatus};

/// Different targets at most. All share the room for messages in memory.
pub const TARGETS_MAX: usize = 64;

/// Longest target, in bytes: with it, the names of its queues are still legal.
pub const TARGET_BYTES_MAX: usize = 1_000;

/// Which routes have a target of their own. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct RouteTargets {
    /// Name of the route and target; none: it is the address that all others have.
    of_routes: Arc<[(String, Option<Arc<str>>)]>,
    different: usize,
}

/// Why routes cannot have these targets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteTargetsError {
    /// Longer than [`TARGET_BYTES_MAX`].
    #[error("the target of route {0} is longer than {TARGET_BYTES_MAX} bytes")]
    TooLong(String),
    /// More different ones than [`TARGETS_MAX`].
    #[error("there are more than {TARGETS_MAX} different targets")]
    TooMany,
}

impl RouteTargets {
    /// The targets of these routes, beside the address of all others. A target that is the same template as that
    /// address is no other target.
    ///
    /// # Errors
    /// When a target is too long, or there are too many.
    pub fn new(
        address: &AddressTemplate,
        of_routes: impl IntoIterator<Item = (String, AddressTemplate)>,
    ) -> Result<Self, RouteTargetsError> {
        let mut different: Vec<Arc<str>> = Vec::new();
        let mut routes = Vec::new();
        for (route, target) in of_routes {
            if target == *address {
                routes.push((route, None));
                continue;
            }
            let text = target.to_string();
            if text.len() > TARGET_BYTES_MAX {
                return Err(RouteTargetsError::TooLong(route));
            }
            let known = different.iter().find(|other| ***other == *text).cloned();
            let target = known.unwrap_or_else(|| {
                different.push(text.into());
                different[different.len() - 1].clone()
            });
            routes.push((route, Some(target)));
        }
        if different.len() > TARGETS_MAX {
            return Err(RouteTargetsError::TooMany);
        }
        Ok(Self { of_routes: routes.into(), different: different.len() })
    }

    /// The target of a route, if it has one of its own. The case of names does not matter, as in all settings.
    pub fn of(&self, route: &str) -> Option<&str> {
        let (_, target) = self.of_routes.iter().find(|(name, _)| name.eq_ignore_ascii_case(route))?;
        target.as_deref()
    }

    /// The routes that a target is named for.
    pub fn routes(&self) -> impl Iterator<Item = &str> {
        self.of_routes.iter().map(|(route, _)| route.as_str())
    }
}

/// The way to one target at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct TargetStatus {
    /// The target.
    pub target: Target,
    /// The way there.
    #[serde(flatten)]
    pub way: UpstreamStatus,
}

/// A target of its own: an address at the upstream, or a template of one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target(Arc<str>);

impl Target {
    /// The text of the address.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl From<&str> for Target {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl UpstreamOptions {
    /// Which routes have a target of their own; none where a hub is above.
    pub fn targets(&self) -> RouteTargets {
        let UpstreamKind::Amqp(plain) = &self.kind else { return RouteTargets::default() };
        plain.targets.clone()
    }

    /// The way to a target; none where a hub is above, or if the target is none.
    pub fn way_to(&self, target: &str) -> Option<UpstreamOptions> {
        let UpstreamKind::Amqp(plain) = &self.kind else { return None };
        let kind = UpstreamKind::Amqp(PlainAmqp { address: target.parse().ok()?, ..plain.clone() });
        Some(UpstreamOptions { kind, target: Some(Target::from(target)), ..self.clone() })
    }

    /// How many ways up there are, this one included.
    pub(super) fn ways(&self) -> usize {
        self.targets().different + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(of_routes: &[(&str, &str)]) -> Result<RouteTargets, RouteTargetsError> {
        let pairs = of_routes.iter().map(|(route, text)| ((*route).to_owned(), text.parse().unwrap()));
        RouteTargets::new(&"/queue/{deviceId}".parse().unwrap(), pairs)
    }

    #[test]
    fn routes_share_targets_and_the_address_of_all_is_none_of_them() {
        let found =
            targets(&[("Alarms", "/queue/a"), ("b", "/queue/a"), ("c", "/queue/{deviceId}")]).unwrap();
        assert_eq!(
            ["alarms", "b", "c", "d"].map(|route| found.of(route)),
            [Some("/queue/a"), Some("/queue/a"), None, None]
        );
        assert_eq!(found.different, 1);
        assert_eq!(found.routes().collect::<Vec<_>>(), ["Alarms", "b", "c"]);
    }

    #[test]
    fn targets_are_bounded() {
        let long = "x".repeat(TARGET_BYTES_MAX + 1);
        assert_eq!(targets(&[("a", &long)]).unwrap_err(), RouteTargetsError::TooLong("a".into()));
        let name = crate::dispatch::queue_name(&format!("iothub[{}]", &long[1..]), 9);
        assert!(name.len() <= edgehub_storage::QUEUE_NAME_MAX_BYTES);
        let many: Vec<String> = (0..=TARGETS_MAX).map(|number| number.to_string()).collect();
        let pairs: Vec<(&str, &str)> = many.iter().map(|text| (text.as_str(), text.as_str())).collect();
        assert_eq!(targets(&pairs).unwrap_err(), RouteTargetsError::TooMany);
        assert!(targets(&pairs[1..]).is_ok());
    }
}
