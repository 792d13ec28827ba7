//! The routes in force together with the queues that they lead to.

use std::sync::Arc;

use ahash::AHashMap;
use edgehub_routing::{
    DEFAULT_PRIORITY, Endpoint, OverflowPolicy, RouteIndex, RouteTable, Sink, upstream_target,
};
use edgehub_storage::{Overflow, Queue, Store, StoreError, Target, Ttl};
use smallvec::SmallVec;

/// An immutable snapshot: compiled routes, the queue of every endpoint and priority, the hub-wide time to live.
pub struct Routing {
    table: RouteTable,
    queues: Vec<QueuePlan>,
    time_to_live: Ttl,
    /// By the index of the route.
    overflow: Vec<Overflow>,
}

/// What holds for every route that says nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteDefaults {
    /// Time to live in seconds; negative never ends, 0 ends at once.
    pub time_to_live_secs: i32,
    /// What becomes of messages when the store is full.
    pub overflow: OverflowPolicy,
}

/// The queues of one endpoint, the most urgent first.
#[derive(Clone)]
pub struct QueuePlan {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Its queues by priority.
    pub queues: Vec<(u32, Queue)>,
}

impl Routing {
    /// No routes: every message is accepted and counted as unrouted.
    pub fn empty() -> Self {
        Self {
            table: RouteTable::empty(),
            queues: Vec::new(),
            time_to_live: Ttl::Infinite,
            overflow: Vec::new(),
        }
    }

    /// Opens the queues that the table needs. Queues of earlier runs come back under the same names, those of
    /// priorities that no route uses any more included, so that what waits in them is still delivered.
    /// `overflow` tells the policy of a route by its name, if it has one of its own.
    ///
    /// # Errors
    /// When the store refuses to open a queue.
    pub fn open(
        table: RouteTable,
        defaults: RouteDefaults,
        overflow: impl Fn(&str) -> Option<OverflowPolicy>,
        store: &Store,
    ) -> Result<Self, StoreError> {
        let existing = store.queues();
        let mut by_name: AHashMap<&str, Vec<(u32, &Queue)>> = AHashMap::new();
        for queue in &existing {
            let (endpoint, priority) = split_queue_name(queue.name());
            by_name.entry(endpoint).or_default().push((priority, queue));
        }
        let mut queues = Vec::new();
        for endpoint in table.endpoints() {
            let mut of_endpoint: Vec<(u32, Queue)> = by_name
                .get(&*endpoint.id)
                .into_iter()
                .flatten()
                .map(|(priority, queue)| (*priority, Queue::clone(queue)))
                .collect();
            for priority in &endpoint.priorities {
                if !of_endpoint.iter().any(|(known, _)| known == priority) {
                    of_endpoint.push((*priority, store.queue(&queue_name(&endpoint.id, *priority))?));
                }
            }
            of_endpoint.sort_by_key(|(priority, _)| *priority);
            queues.push(QueuePlan { endpoint: endpoint.clone(), queues: of_endpoint });
        }
        let overflow = (0..)
            .map_while(|index| table.route_name(RouteIndex(index)))
            .map(|name| overflow_of(overflow(name).unwrap_or(defaults.overflow)))
            .collect();
        Ok(Self { table, queues, time_to_live: time_to_live(defaults.time_to_live_secs), overflow })
    }

    /// Serves besides what waits for targets of the upstream that no route of the table has any more, as far as `serves`
    /// says so of a target and of whether something waits for it.
    pub(crate) fn with_former_targets(mut self, store: &Store, serves: impl Fn(&str, bool) -> bool) -> Self {
        for queue in store.queues() {
            let (endpoint, priority) = split_queue_name(queue.name());
            let Some(target) = upstream_target(endpoint) else { continue };
            let known = self.queues.iter().position(|plan| *plan.endpoint.id == *endpoint);
            match known {
                Some(at) if at < self.table.endpoints().len() => {}
                Some(at) => self.queues[at].queues.push((priority, queue)),
                None => {
                    let id: Arc<str> = endpoint.into();
                    let sink = Sink::UpstreamTarget(target.into());
                    let endpoint = Endpoint { id, sink, priorities: SmallVec::new() };
                    self.queues.push(QueuePlan { endpoint, queues: vec![(priority, queue)] });
                }
            }
        }
        let of_table = self.table.endpoints().len();
        let former = self.queues.split_off(of_table);
        self.queues.extend(former.into_iter().filter_map(|mut plan| {
            plan.queues.sort_by_key(|(priority, _)| *priority);
            let waits = plan.queues.iter().any(|(_, queue)| queue.ledger().queued() > 0);
            let target = upstream_target(&plan.endpoint.id)?;
            serves(target, waits).then_some(plan)
        }));
        self
    }

    /// The compiled routes.
    pub fn table(&self) -> &RouteTable {
        &self.table
    }

    /// Changes with every new table.
    pub fn generation(&self) -> u64 {
        self.table.generation()
    }

    /// The endpoints with their queues: those of the table, then targets of the upstream that it had before.
    pub fn plans(&self) -> &[QueuePlan] {
        &self.queues
    }

    /// The queue and the time to live that a decision names. A route without its own time to live takes the
    /// hub-wide one of this moment.
    pub(crate) fn target(&self, target: &edgehub_routing::Target) -> Target {
        let plan = &self.queues[target.endpoint.0 as usize];
        let queue = plan
            .queues
            .iter()
            .find(|(priority, _)| *priority == target.priority)
            .map(|(_, queue)| queue.id())
            .expect("the plan holds every priority of the table"); // `open` adds each of `endpoint.priorities`
        let ttl = match target.time_to_live_secs {
            0 => self.time_to_live,
            secs => Ttl::Millis(u64::from(secs) * 1_000),
        };
        // There is one for each route of the table; refusing is what every route did before.
        let overflow = self.overflow.get(target.route.0 as usize).copied().unwrap_or(Overflow::RejectNew);
        Target { queue, ttl, overflow }
    }
}

fn overflow_of(policy: OverflowPolicy) -> Overflow {
    match policy {
        OverflowPolicy::RejectNew => Overflow::RejectNew,
        OverflowPolicy::DropOldest => Overflow::DropOldest,
        OverflowPolicy::DeadLetter => Overflow::DeadLetter,
    }
}

/// A hub-wide time to live: negative never ends, 0 ends at once.
fn time_to_live(secs: i32) -> Ttl {
    u64::try_from(secs).map_or(Ttl::Infinite, |secs| Ttl::Millis(secs * 1_000))
}

/// The name of the queue of an endpoint and a priority.
pub fn queue_name(endpoint_id: &str, priority: u32) -> Arc<str> {
    match priority {
        DEFAULT_PRIORITY => endpoint_id.into(),
        priority => format!("{endpoint_id}_Pri{priority}").into(),
    }
}

/// The endpoint and the priority that a queue's name stands for.
pub fn split_queue_name(name: &str) -> (&str, u32) {
    match name.rsplit_once("_Pri") {
        Some((endpoint, priority)) if priority.len() == 1 => match priority.parse() {
            Ok(priority) => (endpoint, priority),
            Err(_) => (name, DEFAULT_PRIORITY),
        },
        _ => (name, DEFAULT_PRIORITY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_names_are_those_of_the_reference() {
        for (endpoint, priority, name) in [
            ("iothub", DEFAULT_PRIORITY, "iothub"),
            ("iothub", 0, "iothub_Pri0"),
            ("edge1/m_Prio/in", 9, "edge1/m_Prio/in_Pri9"),
            ("edge1/m/x_Pri12", DEFAULT_PRIORITY, "edge1/m/x_Pri12"),
        ] {
            assert_eq!(&*queue_name(endpoint, priority), name);
            assert_eq!(split_queue_name(name), (endpoint, priority));
        }
    }

    #[test]
    fn a_negative_time_to_live_never_ends() {
        assert_eq!(time_to_live(-1), Ttl::Infinite);
        assert_eq!(time_to_live(0), Ttl::Millis(0));
        assert_eq!(time_to_live(10), Ttl::Millis(10_000));
    }
}
