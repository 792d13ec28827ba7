//! Owns the explanation of a decision: the value of every part of every condition, why a part is undefined, and which
//! route won which sink.
//!
//! The values come from the plain evaluator, the decision from the table itself.

mod leaves;
mod picture;
mod reason;

use std::ops::Range;

pub use reason::Reason;

use crate::check::{Checked, Operation, Type};
use crate::condition::Condition;
use crate::evaluate::Truth;
use crate::limits::ROUTES_MAX;
use crate::message::MessageView;
use crate::route::{Route, Sink};
use crate::source::{FoldedPath, MessageRejected, MessageSource};
use crate::syntax::Tree;
use crate::table::{Decision, RouteError, RouteSpec, RouteTable};
use crate::walker::{self, Plain};

pub(crate) use leaves::MessageLeaves;

/// What a part of a condition evaluates to.
#[derive(Clone, Debug, PartialEq)]
pub enum PartValue {
    /// No value; the part's [`Reason`] says why.
    Undefined,
    /// Null, of a literal or of the body.
    Null,
    /// Nothing stands at this path of the body. It counts as null.
    Absent,
    /// A truth value.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A property without a value.
    NullText,
    /// A text; unpaired surrogates are shown as U+FFFD.
    Text(String),
}

/// One part of a condition, with its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Where it stands in the condition, without parentheses around it.
    pub bytes: Range<usize>,
    /// What it does: the operator, the name of the function, `property`, `system property`, `body value` or `literal`.
    pub operation: &'static str,
    /// Its value.
    pub value: PartValue,
    /// Why the value is undefined, or what is surprising about it.
    pub reason: Option<Reason>,
    /// The numbers of its operands in [`Evaluation::parts`], from left to right.
    pub operands: Vec<usize>,
}

/// A condition with the values of all its parts for one message.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// The text of the condition.
    pub text: String,
    /// Operands before what they are operands of, the whole condition last. Empty for an empty condition.
    pub parts: Vec<Part>,
    /// The value of the condition.
    pub truth: Truth,
}

/// What became of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It does not compile.
    Broken,
    /// The message comes from somewhere else.
    OtherSource,
    /// The condition is false.
    False,
    /// The condition is undefined.
    Undefined,
    /// The message goes to the sink by this route.
    Won,
    /// The route of that name sends the message to the same sink, with a smaller priority number.
    LostByPriority(String),
    /// The route of that name sends the message to the same sink with the same priority; its name sorts first.
    LostByName(String),
}

impl Outcome {
    /// The name under which the outcome is reported.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Broken => "broken",
            Outcome::OtherSource => "other-source",
            Outcome::False => "false",
            Outcome::Undefined => "undefined",
            Outcome::Won => "won",
            Outcome::LostByPriority(_) => "lost-by-priority",
            Outcome::LostByName(_) => "lost-by-name",
        }
    }
}

/// One route and one message.
#[derive(Clone, Debug, PartialEq)]
pub struct ExplainedRoute {
    /// Name of the route.
    pub name: String,
    /// Its source, condition text and sink, if it can be parsed.
    pub route: Option<Route>,
    /// What is wrong with it, if it does not compile.
    pub error: Option<RouteError>,
    /// The priority number.
    pub priority: u32,
    /// Its time-to-live in seconds; 0 means the hub-wide value.
    pub time_to_live_secs: u32,
    /// The condition with its values, whether the source matches or not.
    pub condition: Option<Evaluation>,
    /// What became of it.
    pub outcome: Outcome,
}

/// A sink that the message goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExplainedTarget {
    /// The sink.
    pub sink: Sink,
    /// Id of its endpoint.
    pub endpoint_id: String,
    /// The route that won.
    pub route: String,
    /// Its priority number.
    pub priority: u32,
    /// Its time-to-live in seconds; 0 means the hub-wide value.
    pub time_to_live_secs: u32,
}

/// A decision and how it came about.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The path of the message's source.
    pub source_path: String,
    /// All routes, in the order in which they were given.
    pub routes: Vec<ExplainedRoute>,
    /// Where the message goes.
    pub targets: Vec<ExplainedTarget>,
}

/// Decides where `message` goes, and says why. The decision is that of a [`RouteTable`] of these routes.
///
/// ```
/// use edgehub_routing::{DEFAULT_PRIORITY, MessageSource, MessageView, PropertyName, RouteSpec, Text, explain};
///
/// struct Cold;
/// impl MessageView for Cold {
///     fn property(&self, name: &PropertyName) -> Text<'_> {
///         if name.matches("level") { Text::Text("cold") } else { Text::Undefined }
///     }
///     fn system_property(&self, _: &PropertyName) -> Text<'_> {
///         Text::Undefined
///     }
///     fn body(&self) -> &[u8] {
///         b"{}"
///     }
/// }
///
/// let text = "FROM /messages/* WHERE $body.alarm OR level = 'hot' INTO $upstream";
/// let (priority, time_to_live_secs) = (DEFAULT_PRIORITY, 0);
/// let route = RouteSpec { name: "up", text, priority, time_to_live_secs, upstream_target: None };
/// let explanation = explain([route], "edge-9", &MessageSource::Device, &Cold)?;
/// assert_eq!(explanation.routes[0].outcome.name(), "undefined");
/// let condition = explanation.routes[0].condition.as_ref().unwrap();
/// assert_eq!(condition.to_string(), "\
/// undefined  $body.alarm OR level = 'hot'  -- both must be truth values: $body.alarm is undefined
/// ├─ undefined  $body.alarm  -- the message has no content type; bodies are read only as application/json
/// └─ false  level = 'hot'
///    ├─ 'cold'  level
///    └─ 'hot'  'hot'
/// ");
/// # Ok::<(), edgehub_routing::MessageRejected>(())
/// ```
///
/// # Errors
/// The message is to be refused if an id in its source is blank.
pub fn explain<'a, M: MessageView + ?Sized>(
    routes: impl IntoIterator<Item = RouteSpec<'a>>,
    edge_device_id: &str,
    source: &MessageSource<'_>,
    message: &M,
) -> Result<Explanation, MessageRejected> {
    let routes: Vec<RouteSpec<'_>> = routes.into_iter().take(ROUTES_MAX).collect();
    let (table, mut errors) = RouteTable::compile(routes.iter().copied(), edge_device_id);
    let source_path = source.path()?;
    let path = FoldedPath::new(&source_path);
    let mut decision = Decision::new();
    table.decide(&table.candidates(source)?, message, &mut decision);
    let targets: Vec<ExplainedTarget> = decision
        .targets
        .iter()
        .filter_map(|target| {
            let endpoint = table.endpoint(target.endpoint)?;
            Some(ExplainedTarget {
                sink: endpoint.sink.clone(),
                endpoint_id: endpoint.id.to_string(),
                route: table.route_name(target.route)?.to_owned(),
                priority: target.priority,
                time_to_live_secs: target.time_to_live_secs,
            })
        })
        .collect();
    let explained = |spec: RouteSpec<'_>| {
        // Errors are in the order of the routes, so that of this route, if there is one, is the first.
        let broken = errors.first().is_some_and(|error| error.name == spec.name);
        let error = broken.then(|| errors.remove(0));
        let route = Route::parse(spec.text).ok();
        let route = route.map(|route| Route { sink: route.sink.at(spec.upstream_target), ..route });
        let condition = route.as_ref().and_then(|route| Condition::compile(&route.condition).ok());
        let condition = condition.filter(|_| error.is_none()).map(|condition| condition.explain(message));
        let outcome = match (&route, &condition) {
            (Some(route), Some(condition)) => {
                outcome(&spec, route, condition.truth, FoldedPath::new(&route.source).covers(&path), &targets)
            }
            _ => Outcome::Broken,
        };
        ExplainedRoute {
            name: spec.name.to_owned(),
            route,
            error,
            priority: spec.priority,
            time_to_live_secs: spec.time_to_live_secs,
            condition,
            outcome,
        }
    };
    let routes = routes.into_iter().map(explained).collect();
    Ok(Explanation { source_path, routes, targets })
}

fn outcome(
    spec: &RouteSpec<'_>,
    route: &Route,
    truth: Truth,
    matched: bool,
    targets: &[ExplainedTarget],
) -> Outcome {
    if !matched {
        return Outcome::OtherSource;
    }
    match truth {
        Truth::False => Outcome::False,
        Truth::Undefined => Outcome::Undefined,
        Truth::True => match targets.iter().find(|target| target.sink == route.sink) {
            Some(winner) if winner.route != spec.name && winner.priority < spec.priority => {
                Outcome::LostByPriority(winner.route.clone())
            }
            Some(winner) if winner.route != spec.name => Outcome::LostByName(winner.route.clone()),
            _ => Outcome::Won,
        },
    }
}

/// The values of all parts of a condition that has been checked.
pub(crate) fn evaluation<M: MessageView + ?Sized>(
    text: &str,
    tree: &Tree,
    checked: &Checked,
    message: &M,
) -> Evaluation {
    let mut leaves = MessageLeaves::new(checked, message);
    let values = walker::values(checked, &mut leaves);
    let truth = walker::truth(checked, &values);
    let mut parts = Vec::with_capacity(values.len());
    for (at, (node, (own, value))) in tree.nodes.iter().zip(checked.nodes.iter().zip(&values)).enumerate() {
        let operands = walker::operands(checked, at);
        let given: Vec<reason::Operand<'_>> = operands
            .iter()
            .filter_map(|operand| {
                Some(reason::Operand {
                    text: tree.nodes.get(*operand)?.extent.of(text),
                    value: values.get(*operand)?,
                    kind: checked.nodes.get(*operand)?.result,
                })
            })
            .collect();
        let root = at + 1 == values.len();
        parts.push(Part {
            bytes: node.extent.start as usize..node.extent.end as usize,
            operation: operation(&own.operation),
            value: shown(value, own.result),
            reason: reason::of_node(own, value, &given, &mut leaves).or_else(|| {
                let no_truth = matches!(own.result, Type::Number | Type::Text);
                (root && no_truth).then_some(Reason::NoTruthValue)
            }),
            operands,
        });
    }
    Evaluation { text: text.to_owned(), parts, truth }
}

fn shown(value: &Plain, kind: Type) -> PartValue {
    match value {
        Plain::Number(number) if number.is_nan() && kind == Type::Number => PartValue::Undefined,
        Plain::Undefined => PartValue::Undefined,
        Plain::Null { absent: true } => PartValue::Absent,
        Plain::Null { absent: false } => PartValue::Null,
        Plain::Bool(value) => PartValue::Bool(*value),
        Plain::Number(number) => PartValue::Number(*number),
        Plain::NullText => PartValue::NullText,
        Plain::Text(text) => PartValue::Text(String::from_utf16_lossy(text)),
    }
}

fn operation(operation: &Operation) -> &'static str {
    match operation {
        Operation::Number(_) | Operation::Text(_) | Operation::Bool(_) => "literal",
        Operation::Null | Operation::Undefined => "literal",
        Operation::Property(_) => "property",
        Operation::System(_) | Operation::PropertyOrSystem { .. } => "system property",
        Operation::Body { .. } => "body value",
        Operation::Negate => "-",
        Operation::Not => "NOT",
        Operation::Binary(operator) => operator.sign(),
        Operation::Call(function, _) => function.name(),
    }
}
