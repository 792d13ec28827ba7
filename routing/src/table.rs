//! Owns the table: routes compiled together, and the decision which sinks a message goes to.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;
use thiserror::Error;

use crate::check::{Checked, check};
use crate::diagnostic::{Category, Diagnostic, Fault, Span, Stage};
use crate::limits::ROUTES_MAX;
use crate::message::{MessageView, SystemProperty};
use crate::plan::{Plan, PlanScratch, PlannedRoute, Start};
use crate::route::{Sink, resolve_sink};
use crate::source::{FoldedPath, MessageRejected, MessageSource, pattern_path};
use crate::syntax::parse_route;
use crate::text;

/// The priority of a route that names none: below all that can be named.
pub const DEFAULT_PRIORITY: u32 = 2_000_000_000;

/// One route of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct RouteSpec<'a> {
    /// Its name, unique in the configuration.
    pub name: &'a str,
    /// Its text.
    pub text: &'a str,
    /// 0 to 9, 0 the highest, or [`DEFAULT_PRIORITY`].
    pub priority: u32,
    /// How long its messages are kept, in seconds; 0 means the hub-wide value.
    pub time_to_live_secs: u32,
    /// The address at the upstream that its messages go to, if it leads to `$upstream` and not to the address of all others.
    /// Routes to different addresses have different sinks.
    pub upstream_target: Option<&'a str>,
}

/// A route that did not compile.
#[derive(Clone, Debug, PartialEq, Error)]
pub struct RouteError {
    /// Name of the route.
    pub name: String,
    /// What is wrong with it, at least one; the first is the one to report if there is room for one only.
    pub diagnostics: Vec<Diagnostic>,
}

impl fmt::Display for RouteError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "route {:?}", self.name)?;
        self.diagnostics.iter().try_for_each(|diagnostic| write!(formatter, "; {diagnostic}"))
    }
}

/// Number of an endpoint in its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointIndex(pub u32);

/// Number of a route in its table; routes are in the order of their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteIndex(pub u32);

/// A sink that at least one route of the table names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// See [`Sink::endpoint_id`].
    pub id: Arc<str>,
    /// Where it leads.
    pub sink: Sink,
    /// The priorities of its routes, ascending, each once; each pair of endpoint and priority is a queue.
    pub priorities: SmallVec<[u32; 2]>,
}

struct CompiledRoute {
    name: Arc<str>,
    priority: u32,
    time_to_live_secs: u32,
    endpoint: EndpointIndex,
    source: FoldedPath,
    /// Where it stands in the order of decision: by endpoint, then by priority, then by name.
    rank: usize,
}

/// Routes compiled together. Immutable.
pub struct RouteTable {
    generation: u64,
    routes: Vec<CompiledRoute>,
    endpoints: Vec<Endpoint>,
    plan: Plan,
}

/// The routes of one table whose source covers one path; made once per sender and output and then kept.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    generation: u64,
    path: FoldedPath,
    /// By endpoint, then by priority, then by name: the first that matches wins its endpoint.
    routes: SmallVec<[RouteIndex; 8]>,
    start: Start,
}

impl Candidates {
    /// The table that they belong to; see [`RouteTable::generation`].
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// True if no message of this source can match.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// The routes.
    pub fn routes(&self) -> &[RouteIndex] {
        &self.routes
    }
}

/// One queue that a message goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The endpoint; each at most once in a decision.
    pub endpoint: EndpointIndex,
    /// The priority of the route that won.
    pub priority: u32,
    /// Its time-to-live in seconds; 0 means the hub-wide value at the moment of storing.
    pub time_to_live_secs: u32,
    /// The route that won.
    pub route: RouteIndex,
}

/// Where one message goes. Kept by the caller and filled again for each message, so that its memory is reused.
#[derive(Default)]
pub struct Decision {
    /// The queues, in the order of endpoints; empty if no route matched.
    pub targets: SmallVec<[Target; 4]>,
    /// How many conditions that were looked at were undefined. Routes that a better one for the same endpoint has already
    /// beaten are not looked at.
    pub undefined: u32,
    scratch: PlanScratch,
}

impl Decision {
    /// An empty decision.
    pub fn new() -> Decision {
        Decision::default()
    }
}

impl fmt::Debug for Decision {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = formatter.debug_struct("Decision");
        debug.field("targets", &self.targets).field("undefined", &self.undefined).finish_non_exhaustive()
    }
}

impl RouteTable {
    /// Compiles each route on its own: the good ones form the table, the bad ones come back with what is wrong.
    ///
    /// Endpoint ids of modules begin with `edge_device_id`. At most [`ROUTES_MAX`] routes are taken.
    pub fn compile<'a>(
        routes: impl IntoIterator<Item = RouteSpec<'a>>,
        edge_device_id: &str,
    ) -> (RouteTable, Vec<RouteError>) {
        let mut table = RouteTable::empty();
        let mut compiled_routes: Vec<(CompiledRoute, Option<Checked>)> = Vec::new();
        let mut errors = Vec::new();
        let mut endpoints = HashMap::new();
        for (count, spec) in routes.into_iter().enumerate() {
            let compiled = if count < ROUTES_MAX {
                table.compile_route(&spec, edge_device_id, &mut endpoints)
            } else {
                let message = format!("a table holds at most {ROUTES_MAX} routes");
                Err(vec![Fault::without_place(Category::Limit, Stage::Parse, message).locate("", NOWHERE)])
            };
            match compiled {
                Ok(route) => compiled_routes.push(route),
                Err(diagnostics) => errors.push(RouteError { name: spec.name.to_owned(), diagnostics }),
            }
        }
        for endpoint in &mut table.endpoints {
            endpoint.priorities.sort_unstable();
        }
        compiled_routes.sort_by(|(a, _), (b, _)| text::compare(a.name.as_bytes(), b.name.as_bytes()));
        table.rank(compiled_routes);
        (table, errors)
    }

    /// Takes the routes, which are in the order of their names.
    fn rank(&mut self, compiled: Vec<(CompiledRoute, Option<Checked>)>) {
        let (routes, conditions): (Vec<_>, Vec<_>) = compiled.into_iter().unzip();
        self.routes = routes;
        let mut ranked: Vec<PlannedRoute> = self
            .routes
            .iter()
            .zip(conditions)
            .enumerate()
            .map(|(index, (route, condition))| PlannedRoute { target: route.target(index), condition })
            .collect();
        ranked.sort_by_key(|route| (route.target.endpoint, route.target.priority, route.target.route));
        for (rank, planned) in ranked.iter().enumerate() {
            if let Some(route) = self.routes.get_mut(planned.target.route.0 as usize) {
                route.rank = rank;
            }
        }
        self.plan = Plan::new(ranked);
    }

    /// The table without routes.
    pub fn empty() -> RouteTable {
        RouteTable {
            generation: next_generation(),
            routes: Vec::new(),
            endpoints: Vec::new(),
            plan: Plan::default(),
        }
    }

    fn compile_route(
        &mut self,
        spec: &RouteSpec<'_>,
        edge_device_id: &str,
        endpoints: &mut HashMap<Arc<str>, EndpointIndex>,
    ) -> Result<(CompiledRoute, Option<Checked>), Vec<Diagnostic>> {
        let locate = |fault: Fault| fault.locate(spec.text, NOWHERE);
        let syntax = parse_route(spec.text).map_err(|fault| vec![locate(fault)])?;
        let sink = resolve_sink(spec.text, &syntax).map_err(|fault| vec![locate(fault)])?;
        let sink = sink.at(spec.upstream_target);
        let condition = match &syntax.condition {
            None => None,
            Some((span, tree)) => {
                let checked = check(spec.text, tree).map_err(|faults| {
                    faults.into_iter().map(|fault| fault.locate(spec.text, *span)).collect::<Vec<_>>()
                })?;
                Some(checked)
            }
        };
        let id: Arc<str> = sink.endpoint_id(edge_device_id).into();
        let endpoint = *endpoints.entry(id.clone()).or_insert_with(|| {
            self.endpoints.push(Endpoint { id, sink, priorities: SmallVec::new() });
            EndpointIndex(self.endpoints.len() as u32 - 1)
        });
        if let Some(endpoint) = self.endpoints.get_mut(endpoint.0 as usize)
            && !endpoint.priorities.contains(&spec.priority)
        {
            endpoint.priorities.push(spec.priority);
        }
        let route = CompiledRoute {
            name: spec.name.into(),
            priority: spec.priority,
            time_to_live_secs: spec.time_to_live_secs,
            endpoint,
            source: FoldedPath::new(&pattern_path(&syntax.pattern)),
            rank: 0,
        };
        Ok((route, condition))
    }

    /// A number that no other table of this process has: caches are keyed by it.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many routes the table has.
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// True if it has none.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// All sinks of the table, each once; an [`EndpointIndex`] counts in this slice.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The endpoint of that number.
    pub fn endpoint(&self, index: EndpointIndex) -> Option<&Endpoint> {
        self.endpoints.get(index.0 as usize)
    }

    /// The name of a route.
    pub fn route_name(&self, index: RouteIndex) -> Option<&str> {
        self.routes.get(index.0 as usize).map(|route| &*route.name)
    }

    /// The routes whose source matches. To be kept per sender and output as long as the generation is the same.
    ///
    /// # Errors
    /// The message is to be refused if an id in its source is blank.
    pub fn candidates(&self, source: &MessageSource<'_>) -> Result<Candidates, MessageRejected> {
        Ok(self.covering(FoldedPath::new(&source.path()?)))
    }

    /// The same, for messages whose system properties in `constant` are all those of `message`: what conditions say of
    /// these alone is answered now. Only a name in braces, `{$connectionModuleId}`, is constant: without them an
    /// application property of that name comes first.
    ///
    /// # Errors
    /// Those of [`RouteTable::candidates`].
    pub fn candidates_for<M: MessageView + ?Sized>(
        &self,
        source: &MessageSource<'_>,
        constant: &[SystemProperty],
        message: &M,
    ) -> Result<Candidates, MessageRejected> {
        let mut candidates = self.candidates(source)?;
        self.plan.fold(&mut candidates.start, message, |property| constant.contains(&property));
        Ok(candidates)
    }

    /// The routes whose source covers `path`, for tools that know a path but no sender; see [`MessageSource::path`].
    pub fn candidates_at(&self, path: &str) -> Candidates {
        self.covering(FoldedPath::new(path))
    }

    fn covering(&self, path: FoldedPath) -> Candidates {
        let matching = self.routes.iter().enumerate().filter(|(_, route)| route.source.covers(&path));
        let mut found: Vec<_> =
            matching.map(|(index, route)| (route.rank, RouteIndex(index as u32))).collect();
        found.sort_unstable();
        let start = self.plan.start(found.iter().map(|(rank, _)| *rank));
        let routes = found.into_iter().map(|(_, route)| route).collect();
        Candidates { generation: self.generation, path, routes, start }
    }

    /// Decides where `message` goes, into `decision`.
    ///
    /// Of several routes to one endpoint the one with the smallest priority number counts, between equal numbers the one
    /// whose name sorts first. No lock, no I/O; nothing is allocated once `decision` has grown to its size, unless a
    /// condition has more than 32 operands waiting at once, asks for a body path with wildcards or cuts a surrogate
    /// pair in two, or a body is not strict JSON.
    ///
    /// Candidates of another table are not used: those of this one are looked up again, which costs time.
    pub fn decide<M: MessageView + ?Sized>(
        &self,
        candidates: &Candidates,
        message: &M,
        decision: &mut Decision,
    ) {
        let fresh;
        let candidates = if candidates.generation == self.generation {
            candidates
        } else {
            fresh = self.covering(candidates.path.clone());
            &fresh
        };
        let Decision { targets, undefined, scratch } = decision;
        targets.clear();
        *undefined = self.plan.decide(&candidates.start, message, scratch, |target| targets.push(target));
    }
}

impl CompiledRoute {
    /// What it leads to, as the route of that number.
    fn target(&self, index: usize) -> Target {
        Target {
            endpoint: self.endpoint,
            priority: self.priority,
            time_to_live_secs: self.time_to_live_secs,
            route: RouteIndex(index as u32),
        }
    }
}

impl Default for RouteTable {
    fn default() -> RouteTable {
        RouteTable::empty()
    }
}

impl fmt::Debug for RouteTable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = formatter.debug_struct("RouteTable");
        debug.field("generation", &self.generation).field("routes", &self.routes.len());
        debug.field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}

const NOWHERE: Span = Span { start: 0, end: 0 };

fn next_generation() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
