//! Owns the end of a run: what is under way is finished within its time, and what is left is said.

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::time::Duration;

use edgehub_broker::hub::Hub;
use tokio::runtime::Handle;
use tracing::info;

/// Queues that the last lines name, the fullest first.
const QUEUES_NAMED_MAX: usize = 32;

/// Ends the traffic of a hub. A further signal, at any time until the process has ended, ends it at once: what was
/// acknowledged is stored. Blocks.
pub fn drain(hub: &Hub, limit: Duration, control: &Handle, again: impl Future<Output = ()> + Send + 'static) {
    let stopping = hub.clone();
    control.spawn(async move {
        again.await;
        info!("Another signal: ending at once");
        say_left(&stopping);
        std::process::exit(0);
    });
    let left = control.block_on(hub.drain(limit));
    if !left.complete {
        info!(limit_secs = limit.as_secs(), "Not everything that could be delivered was");
    }
}

/// One line with what stays in each queue.
pub fn say_left(hub: &Hub) {
    let mut queues: Vec<(String, u64)> = hub.remainder().queues.into_iter().collect();
    queues.sort_by_key(|(_, queued)| Reverse(*queued));
    let total: u64 = queues.iter().map(|(_, queued)| queued).sum();
    let mut named = String::new();
    for (name, queued) in queues.iter().take(QUEUES_NAMED_MAX) {
        let separator = if named.is_empty() { "" } else { ", " };
        let _infallible = write!(named, "{separator}{name}: {queued}");
    }
    let others = queues.len().saturating_sub(QUEUES_NAMED_MAX);
    match (total, others) {
        (0, _) => info!(queued = 0, "Nothing is left in the queues"),
        (_, 0) => info!(queued = total, queues = named, "What is queued stays stored"),
        (_, _) => info!(queued = total, queues = named, others, "What is queued stays stored"),
    }
}
