//! Owns the search for loops: modules whose messages a route leads back to them, at once or over other modules.

use std::collections::{HashMap, HashSet, VecDeque};

use super::{Lint, LintCode, Subject};
use crate::body::BodyPath;
use crate::check::{Checked, Operation, Type};
use crate::diagnostic::Span;
use crate::route::Sink;
use crate::source::{FoldedPath, MessageSource};
use crate::syntax::BinaryOperator;
use crate::text::equal_names;
use crate::walker::{self, Leaves, Plain};

/// Ways from module to module that are followed in one search; what is beyond is not looked at.
const STEPS_MAX: usize = 4_000_000;

/// Nodes of conditions that are evaluated in one search; beyond that a condition counts as one that may be true.
const EVALUATED_NODES_MAX: usize = 500_000;

/// Other modules that are named in a message.
const NAMED_MAX: usize = 8;

/// The lints, each with the number of its route. A loop is reported once, at the first of its routes.
pub(super) fn lints(routes: &[Subject<'_>]) -> Vec<(usize, Lint)> {
    let map = Map::new(routes);
    let mut found = Vec::new();
    let mut looped: HashSet<usize> = HashSet::new();
    for (at, ways) in map.ways.iter().enumerate() {
        let Some((target, _)) = ways else { continue };
        if map.leads(at, *target) {
            looped.insert(at);
            found.push((at, own_loop(&routes[at])));
        }
    }
    let mut steps = 0;
    for at in 0..routes.len() {
        if looped.contains(&at) {
            continue;
        }
        if let Some(cycle) = map.shortest_cycle(at, &mut steps) {
            looped.extend(&cycle);
            let first = cycle.iter().copied().min().unwrap_or(at);
            let turn = cycle.iter().position(|route| *route == first).unwrap_or_default();
            let cycle: Vec<usize> = cycle[turn..].iter().chain(&cycle[..turn]).copied().collect();
            found.push((first, long_loop(routes, &cycle)));
        }
    }
    found
}

fn module<'r>(route: &'r Subject<'_>) -> Option<(&'r str, Span)> {
    match &route.sink {
        Sink::ModuleInput { module, .. } => Some((module, route.syntax.sink_span)),
        Sink::Upstream | Sink::UpstreamTarget(_) => None,
    }
}

fn own_loop(route: &Subject<'_>) -> Lint {
    let (name, place) = module(route).unwrap_or(("", route.syntax.sink_span));
    let message = format!("what module {name:?} sends is matched by this route and comes back to it");
    let lint = route
        .lint(LintCode::Loop, place, message)
        .with_hint("narrow the source to the outputs that are meant, or leave the module's own messages out");
    let fits = name.chars().all(|character| !matches!(character, '\'' | '\\') && !character.is_control());
    let condition = format!("($connectionModuleId ?? '') != '{name}'");
    lint.with_suggestion(if fits { route.further_condition(&condition) } else { None })
}

fn long_loop(routes: &[Subject<'_>], cycle: &[usize]) -> Lint {
    let (first, rest) = (&routes[cycle[0]], &cycle[1..]);
    let mut names: Vec<String> = cycle
        .iter()
        .filter_map(|at| module(&routes[*at]))
        .take(NAMED_MAX)
        .map(|(name, _)| name.to_owned())
        .collect();
    if cycle.len() > NAMED_MAX {
        names.push("…".to_owned());
    }
    names.extend(names.first().cloned());
    let message = format!("messages may go round: {}", names.join(" → "));
    first
        .lint(LintCode::Loop, first.syntax.sink_span, message)
        .with_hint("narrow the source of one of these routes to the outputs that are meant")
        .with_others(rest.iter().map(|at| routes[*at].spec.name.to_owned()))
}

/// Which routes lead from which modules to which.
struct Map {
    /// Of each route to a module: the module, and the modules whose messages the route may take.
    ways: Vec<Option<(usize, HashSet<usize>)>>,
    /// Of each module: the routes that may take its messages.
    leaving: Vec<Vec<usize>>,
}

impl Map {
    fn new(routes: &[Subject<'_>]) -> Map {
        // Only modules that are somebody's sink can be part of a loop.
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        let mut names: Vec<(&str, FoldedPath)> = Vec::new();
        for (name, _) in routes.iter().filter_map(module) {
            if let Ok(path) = (MessageSource::Module { module: name, output: None }).path() {
                numbers.entry(name).or_insert_with(|| {
                    names.push((name, FoldedPath::new(&path)));
                    names.len() - 1
                });
            }
        }
        let mut leaving = vec![Vec::new(); names.len()];
        let mut ways = Vec::with_capacity(routes.len());
        let mut evaluated = 0;
        for (at, route) in routes.iter().enumerate() {
            let Some(target) = module(route).and_then(|(name, _)| numbers.get(name)) else {
                ways.push(None);
                continue;
            };
            let mut from = HashSet::new();
            for (number, (name, path)) in names.iter().enumerate() {
                let matched = route.source.covers(path) || path.covers(&route.source);
                if matched && may_be_true(route.checked.as_ref(), name, &mut evaluated) {
                    from.insert(number);
                    leaving[number].push(at);
                }
            }
            ways.push(Some((*target, from)));
        }
        Map { ways, leaving }
    }

    /// May the route take messages of the module?
    fn leads(&self, route: usize, module: usize) -> bool {
        self.ways.get(route).and_then(Option::as_ref).is_some_and(|(_, from)| from.contains(&module))
    }

    fn target(&self, route: usize) -> Option<usize> {
        self.ways.get(route)?.as_ref().map(|(target, _)| *target)
    }

    /// The routes of the shortest loop that begins with the route, in the order in which messages take them.
    fn shortest_cycle(&self, route: usize, steps: &mut usize) -> Option<Vec<usize>> {
        let start = self.target(route)?;
        let mut reached: HashMap<usize, (usize, Option<usize>)> = HashMap::from([(start, (route, None))]);
        let mut waiting = VecDeque::from([start]);
        while let Some(module) = waiting.pop_front() {
            if self.leads(route, module) {
                let mut cycle = Vec::new();
                let mut at = Some(module);
                while let Some((by, before)) = at.and_then(|module| reached.get(&module)) {
                    cycle.push(*by);
                    at = *before;
                }
                cycle.reverse();
                return Some(cycle);
            }
            for next in self.leaving.get(module).into_iter().flatten() {
                *steps += 1;
                if *steps > STEPS_MAX {
                    return None;
                }
                if let Some(target) = self.target(*next)
                    && !reached.contains_key(&target)
                {
                    reached.insert(target, (*next, Some(module)));
                    waiting.push_back(target);
                }
            }
        }
        None
    }
}

/// What is known of a value when only the sender is known.
#[derive(Clone)]
enum Known {
    Value(Plain),
    /// False or undefined.
    NotTrue,
    Nothing,
}

impl Known {
    fn is_not_true(&self) -> bool {
        match self {
            Known::Value(value) => *value != Plain::Bool(true),
            Known::NotTrue => true,
            Known::Nothing => false,
        }
    }
}

/// A message of which only the sending module is known: asking for anything else is noted.
struct Sender<'a> {
    module: &'a str,
    asked_more: bool,
}

impl Leaves for Sender<'_> {
    fn property(&mut self, name: &str) -> Plain {
        // A property that is named like what is known of the sender is not expected.
        self.asked_more |= !equal_names(name, "$connectionModuleId");
        Plain::Undefined
    }

    fn system(&mut self, name: &str) -> Plain {
        if equal_names(name, "connectionModuleId") {
            return Plain::Text(self.module.encode_utf16().collect());
        }
        self.asked_more = true;
        Plain::Undefined
    }

    fn body(&mut self, _: &BodyPath) -> Plain {
        self.asked_more = true;
        Plain::Undefined
    }
}

/// Can the condition be true for a message of that module?
fn may_be_true(condition: Option<&Checked>, module: &str, evaluated: &mut usize) -> bool {
    let Some(checked) = condition else { return true };
    *evaluated += checked.nodes.len();
    if *evaluated > EVALUATED_NODES_MAX {
        return true;
    }
    let mut known: Vec<Known> = Vec::with_capacity(checked.nodes.len());
    for (at, node) in checked.nodes.iter().enumerate() {
        let mut sender = Sender { module, asked_more: false };
        let value = match walker::leaf(&node.operation, &mut sender) {
            Some(_) if sender.asked_more => Known::Nothing,
            Some(value) => Known::Value(value),
            None => of_operands(checked, at, &known),
        };
        known.push(value);
    }
    match (known.last(), checked.nodes.last().map(|root| root.result)) {
        (Some(root), Some(Type::Bool | Type::Body)) => !root.is_not_true(),
        _ => false,
    }
}

fn of_operands(checked: &Checked, at: usize, known: &[Known]) -> Known {
    let operands = walker::operands(checked, at);
    let given: Vec<(&Known, Type)> = operands
        .iter()
        .filter_map(|operand| Some((known.get(*operand)?, checked.nodes.get(*operand)?.result)))
        .collect();
    let Some(operation) = checked.nodes.get(at).map(|node| &node.operation) else { return Known::Nothing };
    let values: Option<Vec<(Plain, Type)>> = given
        .iter()
        .map(|(known, given)| match known {
            Known::Value(value) => Some((value.clone(), *given)),
            Known::NotTrue | Known::Nothing => None,
        })
        .collect();
    if let Some(values) = values {
        return Known::Value(walker::apply(operation, &values));
    }
    // Null operands follow rules of their own.
    if given.iter().any(|(_, given)| *given == Type::Null) {
        return Known::Nothing;
    }
    let body = given.iter().any(|(_, given)| *given == Type::Body);
    match (operation, &given[..]) {
        (Operation::Binary(BinaryOperator::And), [(left, _), (right, _)])
            if left.is_not_true() || right.is_not_true() =>
        {
            Known::NotTrue
        }
        (Operation::Binary(BinaryOperator::Or), [(left, _), (right, _)]) => {
            let holds = |known: &Known| matches!(known, Known::Value(Plain::Bool(true)));
            if left.is_not_true() && right.is_not_true() {
                Known::NotTrue
            } else if !body && (holds(left) || holds(right)) {
                Known::Value(Plain::Bool(true))
            } else {
                Known::Nothing
            }
        }
        _ => Known::Nothing,
    }
}
