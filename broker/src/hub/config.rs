//! Putting routes in force: compile, open queues, swap, start and stop pumps.

use std::sync::Arc;

use ahash::AHashMap;
use edgehub_routing::{
    ConfigError, HubConfig, Lint, OwnedRouteSpec, Route, RouteError, RouteSpec, RouteTable, Sink, lint,
};
use edgehub_storage::StoreLimits;

use super::{Hub, Pumps};
use crate::dispatch::{RouteDefaults, Routing};
use crate::identity::Identity;
use crate::upstream::targets::RouteTargets;

/// Lints of one configuration that are logged one by one.
const LINTS_LOGGED_MAX: usize = 50;

/// Why a configuration is not in force; the one before stays.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The document itself is refused.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The store refuses a queue.
    #[error("the queues of the routes cannot be opened: {0}")]
    Store(String),
}

/// What came into force.
#[derive(Debug, Default)]
pub struct Applied {
    /// Names of the routes in force.
    pub routes: Vec<String>,
    /// The same routes with their texts, in no order.
    pub in_force: Vec<OwnedRouteSpec>,
    /// Entries of the document that are no routes.
    pub malformed: Vec<ConfigError>,
    /// Routes that do not compile.
    pub rejected: Vec<RouteError>,
    /// Bad routes whose last good version stays in force.
    pub kept: Vec<String>,
    /// What compiles but is hardly meant, in the routes of the document.
    pub lints: Vec<Lint>,
    /// Names that a target at the upstream is set for, but that no route in force which leads there has.
    pub idle_targets: Vec<String>,
}

fn as_spec<'a>(route: &'a OwnedRouteSpec, targets: &'a RouteTargets) -> RouteSpec<'a> {
    RouteSpec { upstream_target: targets.of(&route.name), ..route.as_spec() }
}

fn idle_targets(targets: &RouteTargets, in_force: &[OwnedRouteSpec]) -> Vec<String> {
    let leads_up =
        |route: &OwnedRouteSpec| Route::parse(&route.text).is_ok_and(|route| route.sink == Sink::Upstream);
    let used =
        |name: &str| in_force.iter().any(|route| route.name.eq_ignore_ascii_case(name) && leads_up(route));
    targets.routes().filter(|name| !used(name)).map(str::to_owned).collect()
}

fn log_lints(lints: &[Lint]) {
    for lint in lints.iter().take(LINTS_LOGGED_MAX) {
        tracing::warn!(code = "EH4001", route = lint.route, "A route may not mean what it says: {lint}");
    }
    if let Some(more) = lints.len().checked_sub(LINTS_LOGGED_MAX).filter(|more| *more > 0) {
        tracing::warn!(
            code = "EH4002",
            more,
            "Further routes may not mean what they say; edgehub route check lists them"
        );
    }
}

impl Applied {
    /// Whether every route of the document is in force.
    pub fn is_complete(&self) -> bool {
        self.malformed.is_empty() && self.rejected.is_empty()
    }
}

impl Hub {
    /// Puts a configuration in force. Each route compiles alone: good ones run, a bad one keeps its last good
    /// version if it had one. Messages that are being decided finish under the old routes; none is lost. The limit of
    /// the store comes into force with the routes.
    ///
    /// # Errors
    /// When the document has no hub-wide time to live, or the store refuses a queue. Then nothing changes.
    pub fn apply(&self, config: &HubConfig) -> Result<Applied, ApplyError> {
        let time_to_live_secs = config.hub_wide_time_to_live_secs()?;
        let mut pumps = self.inner.pumps.lock();
        let device_id = self.inner.edge_device.device_id();
        let mut applied = Applied { malformed: config.rejected.clone(), ..Applied::default() };
        let targets = self.inner.route_targets();
        let (_, rejected) =
            RouteTable::compile(config.routes.iter().map(|route| as_spec(route, &targets)), device_id);
        let mut in_force: AHashMap<String, OwnedRouteSpec> = config
            .routes
            .iter()
            .filter(|route| !rejected.iter().any(|error| error.name == route.name))
            .map(|route| (route.name.clone(), route.clone()))
            .collect();
        let bad = rejected
            .iter()
            .map(|error| error.name.as_str())
            .chain(config.rejected.iter().filter_map(|error| error.route.as_deref()));
        for name in bad {
            if let Some(before) = pumps.good_routes.get(name) {
                in_force.insert(name.to_owned(), before.clone());
                applied.kept.push(name.to_owned());
            }
        }
        let (table, _) =
            RouteTable::compile(in_force.values().map(|route| as_spec(route, &targets)), device_id);
        let defaults = RouteDefaults { time_to_live_secs, overflow: self.inner.overflow };
        let overflow = |name: &str| in_force.get(name).and_then(|route| route.overflow);
        let serves = |target: &str, waits| (waits || pumps.serves(target)) && self.inner.can_reach(target);
        let routing = Routing::open(table, defaults, overflow, &self.inner.store)?
            .with_former_targets(&self.inner.store, serves);
        self.inner.store.set_limits(StoreLimits {
            // Without a limit of its own a configuration lifts that of the one before; 0 and less are none.
            max_bytes: config
                .store_limit_bytes
                .and_then(|bytes| u64::try_from(bytes).ok())
                .filter(|bytes| *bytes > 0),
            ..self.inner.limits
        });
        applied.rejected = rejected;
        applied.routes = in_force.keys().cloned().collect();
        applied.routes.sort_unstable();
        applied.in_force = in_force.values().cloned().collect();
        self.serve(&mut pumps, &routing);
        self.inner.dispatch.apply(routing);
        pumps.good_routes = in_force;
        drop(pumps);
        applied.lints = lint(config.routes.iter().map(|route| as_spec(route, &targets)));
        log_lints(&applied.lints);
        applied.idle_targets = idle_targets(&targets, &applied.in_force);
        for route in &applied.idle_targets {
            tracing::warn!(
                code = "EH4036",
                route,
                "A target is set for a route that is not in force or does not lead to $upstream"
            );
        }
        Ok(applied)
    }

    /// Starts, changes and stops pumps so that each endpoint of the routing has one. A queue whose endpoint is
    /// gone keeps its messages, detached, until a route names the endpoint again; only what waits for a target at the
    /// upstream goes on.
    fn serve(&self, pumps: &mut Pumps, routing: &Routing) {
        let mut gone: Vec<Arc<str>> = pumps.modules.keys().cloned().collect();
        let mut upstream_queues = Vec::new();
        for plan in routing.plans() {
            let id = &plan.endpoint.id;
            gone.retain(|known| known != id);
            match &plan.endpoint.sink {
                Sink::Upstream => upstream_queues.clone_from(&plan.queues),
                Sink::UpstreamTarget(target) => self.serve_target(pumps, target, plan.queues.clone()),
                Sink::ModuleInput { module, input } => match pumps.modules.get(id) {
                    Some(running) => {
                        running.send_if_modified(|queues| {
                            // An endpoint only gains queues: those without a route are served until they are empty.
                            let changed = queues.len() != plan.queues.len();
                            if changed {
                                queues.clone_from(&plan.queues);
                            }
                            changed
                        });
                    }
                    None => match Identity::module(self.inner.edge_device.device_id(), module) {
                        Ok(identity) => {
                            self.spawn_pump(pumps, id, identity, input, plan.queues.clone());
                        }
                        Err(error) => tracing::warn!(
                            code = "EH4003", endpoint = &**id, %error,
                            "No module can have this name; what is routed to it waits until its time to live ends"
                        ),
                    },
                },
            }
        }
        if let Some(upstream) = &self.inner.upstream {
            upstream.serve(upstream_queues);
        }
        for id in gone {
            tracing::info!(
                endpoint = &*id,
                "No route leads to this endpoint any more; its queues are detached"
            );
            pumps.modules.remove(&id);
        }
    }
}
