//! The ways to targets of their own at the upstream: started with the first route, and kept as long as the hub runs.

use edgehub_storage::Queue;

use super::{Hub, Inner, Pumps};
use crate::upstream::targets::{RouteTargets, Target, TargetStatus};
use crate::upstream::{self, UpstreamStatus};

impl Inner {
    /// Which routes have a target of their own.
    pub(super) fn route_targets(&self) -> RouteTargets {
        self.upstream_options.as_ref().map(|options| options.targets()).unwrap_or_default()
    }

    /// Whether there can be a way to a target.
    pub(super) fn can_reach(&self, target: &str) -> bool {
        self.upstream_options.as_ref().is_some_and(|options| options.way_to(target).is_some())
    }

    /// The state of each way.
    pub(super) fn target_statuses(&self) -> Vec<TargetStatus> {
        let pumps = self.pumps.lock();
        let status = |way: &upstream::Handle| -> UpstreamStatus { way.status().borrow().clone() };
        let each = pumps.targets.iter();
        each.map(|(target, way)| TargetStatus { target: target.clone(), way: status(way) }).collect()
    }

    /// Targets that take messages now.
    pub(super) fn targets_up(&self) -> Vec<Target> {
        let up = self.target_statuses().into_iter().filter(|status| status.way.state.is_up());
        up.map(|status| status.target).collect()
    }
}

impl Pumps {
    /// Whether there is a way to a target.
    pub(super) fn serves(&self, target: &str) -> bool {
        self.targets.contains_key(&Target::from(target))
    }
}

impl Hub {
    /// Sends these queues to a target, the most urgent first.
    pub(super) fn serve_target(&self, pumps: &mut Pumps, target: &str, queues: Vec<(u32, Queue)>) {
        let inner = &self.inner;
        let key = Target::from(target);
        if let Some(way) = pumps.targets.get(&key) {
            return way.serve(queues);
        }
        // A table has targets only where the upstream has ways to them.
        let Some(options) = inner.upstream_options.as_ref().and_then(|options| options.way_to(target)) else {
            return;
        };
        let way = upstream::start(options, None, inner.store.clone(), inner.losses.clone(), &inner.delivery);
        way.serve(queues);
        pumps.targets.insert(key, way);
    }
}
