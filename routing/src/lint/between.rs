//! Owns the lints that compare two routes: ties and sinks that another route always wins.

use super::{Lint, LintCode, Subject};
use crate::check::Operation;
use crate::text;

/// The lints, each with the number of its route.
pub(super) fn lints(routes: &[Subject<'_>]) -> Vec<(usize, Lint)> {
    let mut found = Vec::new();
    for (at, route) in routes.iter().enumerate() {
        let rivals = || routes.iter().filter(|other| other.sink == route.sink);
        if let Some(winner) = rivals().find(|other| always_wins(other, route)) {
            found.push((at, shadowed(route, winner)));
        }
        // Of all that tie, the one whose name sorts first wins; each of the others is reported against it.
        let first = rivals().filter(|other| ties(other, route)).min_by(|a, b| order(a, b));
        if let Some(winner) = first.filter(|winner| order(winner, route).is_lt()) {
            found.push((at, tie(route, winner)));
        }
    }
    found
}

fn order(a: &Subject<'_>, b: &Subject<'_>) -> std::cmp::Ordering {
    text::compare(a.spec.name.as_bytes(), b.spec.name.as_bytes())
}

fn always_wins(other: &Subject<'_>, route: &Subject<'_>) -> bool {
    let always = match &other.checked {
        None => true,
        Some(checked) => {
            matches!(checked.nodes.last().map(|root| &root.operation), Some(Operation::Bool(true)))
        }
    };
    other.spec.priority < route.spec.priority && always && other.source.covers(&route.source)
}

fn ties(other: &Subject<'_>, route: &Subject<'_>) -> bool {
    other.spec.priority == route.spec.priority
        && other.spec.time_to_live_secs != route.spec.time_to_live_secs
        && (other.source.covers(&route.source) || route.source.covers(&other.source))
}

fn shadowed(route: &Subject<'_>, winner: &Subject<'_>) -> Lint {
    let message = format!(
        "this route never sends anything: route {:?} takes every message of this source to the same sink with priority {}",
        winner.spec.name, winner.spec.priority
    );
    route
        .lint(LintCode::ShadowedSink, route.syntax.sink_span, message)
        .with_hint("remove one of the two, or give this one the smaller priority number")
        .with_others([winner.spec.name.to_owned()])
}

fn tie(route: &Subject<'_>, winner: &Subject<'_>) -> Lint {
    let message = format!(
        "route {:?} has the same sink and priority but another time to live: for a message that both match, that one \
         counts, because its name sorts first",
        winner.spec.name
    );
    route
        .lint(LintCode::Tie, route.syntax.sink_span, message)
        .with_hint("give one of the two another priority, or both the same timeToLiveSecs")
        .with_others([winner.spec.name.to_owned()])
}
