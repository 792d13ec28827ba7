//! Owns `edgehub route explain`: one message, the values of all conditions, and who won.

use std::fmt::Write as _;
use std::ops::Range;

use edgehub_routing::{
    DEFAULT_PRIORITY, Evaluation, ExplainedRoute, Explanation, Origin, Outcome, OwnedRouteSpec, PartValue,
    RouteSpec, Truth, explain,
};
use serde_json::{Value, json};

use super::document::{Document, Located};
use super::message::{Message, parse_json};
use super::{of_range, of_sink, of_suggestion, read, shown};
use crate::cli::{ReportFormat, RouteExplainOptions};
use crate::exit::Failure;

/// Characters of a part of a condition that the report for programs repeats; its place is complete.
const PART_CHARS_MAX: usize = 200;

/// The report, and whether all routes compile.
///
/// # Errors
/// A file cannot be read, or the message is none.
pub(super) fn report(options: &RouteExplainOptions) -> Result<(String, bool), Failure> {
    let routes = routes(options)?;
    let unreadable = |reason: String| Failure::RouteFile { path: shown(&options.message).to_owned(), reason };
    let value = parse_json(&read(&options.message)?).map_err(|error| unreadable(error.to_string()))?;
    // A whole vector is as good as the message in it.
    let value = value.get("message").filter(|message| message.is_object()).unwrap_or(&value);
    let message = Message::parse(value).map_err(unreadable)?;
    if message.is_path() {
        return Err(unreadable("a source of kind path has no sender; give a device or a module".to_owned()));
    }
    let target = |name: &str| options.targets.iter().find(|(route, _)| route.eq_ignore_ascii_case(name));
    let specs = routes.iter().map(|route| RouteSpec {
        upstream_target: target(&route.name).map(|(_, target)| target.as_str()),
        ..route.as_spec()
    });
    let explanation = match explain(specs, &options.edge_device_id, &message.source(), &message) {
        Ok(explanation) => explanation,
        Err(rejected) => return Err(unreadable(format!("the hub refuses the message: {rejected}"))),
    };
    let good = explanation.routes.iter().all(|route| route.outcome != Outcome::Broken);
    Ok(match options.format {
        ReportFormat::Text => (text(&explanation, &routes), good),
        ReportFormat::Json => (format!("{:#}\n", of_explanation(&explanation)), good),
    })
}

fn routes(options: &RouteExplainOptions) -> Result<Vec<OwnedRouteSpec>, Failure> {
    let of_located = |route: Located| route.spec;
    if let Some(path) = &options.file {
        let document = Document::read(&read(path)?);
        if let Some(problem) = document.problems.iter().find(|_| document.routes.is_empty()) {
            let reason = format!("there are no routes in it: {}", problem.message);
            return Err(Failure::RouteFile { path: shown(path).to_owned(), reason });
        }
        return Ok(document.routes.into_iter().map(of_located).collect());
    }
    let mut found = Vec::new();
    for (number, text) in options.routes.iter().enumerate() {
        let mut routes = Document::read(text).routes;
        found.push(match (routes.pop(), routes.is_empty()) {
            (Some(route), true) if route.spec.name != "#1" => route.spec,
            (Some(route), true) => OwnedRouteSpec { name: format!("#{}", number + 1), ..route.spec },
            // More than one statement: the option is for one route, so it is taken as it is.
            _ => OwnedRouteSpec {
                name: format!("#{}", number + 1),
                text: text.clone(),
                priority: DEFAULT_PRIORITY,
                time_to_live_secs: 0,
                overflow: None,
            },
        });
    }
    Ok(found)
}

fn text(explanation: &Explanation, routes: &[OwnedRouteSpec]) -> String {
    let mut text = format!("message from {}\n", explanation.source_path);
    for (route, spec) in explanation.routes.iter().zip(routes) {
        let _ = writeln!(text, "\nroute {}: {}", route.name, outcome(route));
        if let Some(error) = &route.error {
            for diagnostic in &error.diagnostics {
                let name = format!("route {}", route.name);
                let _ = write!(text, "{}", diagnostic.render(&Origin::of_route(&name), &spec.text));
            }
        }
        if let Some(parsed) = &route.route {
            let matches = if route.outcome == Outcome::OtherSource { "does not match" } else { "matches" };
            let _ = writeln!(text, "  source {} {matches}", parsed.source);
        }
        if let Some(condition) = &route.condition {
            for line in condition.to_string().lines() {
                let _ = writeln!(text, "  {line}");
            }
        }
    }
    let _ = writeln!(text);
    for target in &explanation.targets {
        let time_to_live = match target.time_to_live_secs {
            0 => "the hub-wide time to live".to_owned(),
            seconds => format!("time to live {seconds} s"),
        };
        let _ = writeln!(
            text,
            "to {} by route {}, {}, {time_to_live}",
            target.endpoint_id,
            target.route,
            priority(target.priority)
        );
    }
    if explanation.targets.is_empty() {
        let _ = writeln!(text, "no route takes the message: it is dropped, and its sender is told success");
    }
    text
}

fn priority(priority: u32) -> String {
    if priority == DEFAULT_PRIORITY { "default priority".to_owned() } else { format!("priority {priority}") }
}

fn outcome(route: &ExplainedRoute) -> String {
    match &route.outcome {
        Outcome::Broken => "does not compile".to_owned(),
        Outcome::OtherSource => "does not take the message, which comes from another source".to_owned(),
        Outcome::False => "does not take the message: the condition is false".to_owned(),
        Outcome::Undefined => "does not take the message: the condition is undefined".to_owned(),
        Outcome::Won => "takes the message".to_owned(),
        Outcome::LostByPriority(winner) => format!(
            "would take the message, but route {winner} sends it to the same sink with a smaller priority number than {}",
            route.priority
        ),
        Outcome::LostByName(winner) => format!(
            "would take the message, but route {winner} sends it to the same sink with the same priority, and its name \
             sorts first"
        ),
    }
}

fn of_explanation(explanation: &Explanation) -> Value {
    let routes = explanation.routes.iter().map(|route| {
        let errors = route.error.iter().flat_map(|error| &error.diagnostics).map(|diagnostic| {
            json!({
                "code": diagnostic.category.name(),
                "stage": diagnostic.stage.name(),
                "message": diagnostic.message,
                "range": diagnostic.in_route.map(of_range),
                "help": diagnostic.hint,
                "suggestion": diagnostic.suggestion.as_deref().map(of_suggestion),
            })
        });
        let winner = match &route.outcome {
            Outcome::LostByPriority(winner) | Outcome::LostByName(winner) => Some(winner),
            Outcome::Broken | Outcome::OtherSource | Outcome::False | Outcome::Undefined | Outcome::Won => {
                None
            }
        };
        json!({
            "name": route.name,
            "source": route.route.as_ref().map(|route| &route.source),
            "sink": route.route.as_ref().map(|route| of_sink(&route.sink)),
            "priority": route.priority,
            "timeToLiveSecs": route.time_to_live_secs,
            "outcome": route.outcome.name(),
            "winner": winner,
            "errors": errors.collect::<Vec<_>>(),
            "condition": route.condition.as_ref().map(of_evaluation),
        })
    });
    let targets = explanation.targets.iter().map(|target| {
        json!({
            "endpoint": target.endpoint_id,
            "sink": of_sink(&target.sink),
            "route": target.route,
            "priority": target.priority,
            "timeToLiveSecs": target.time_to_live_secs,
        })
    });
    json!({
        "format": "edgehub-route-explain/1",
        "sourcePath": explanation.source_path,
        "routes": routes.collect::<Vec<_>>(),
        "targets": targets.collect::<Vec<_>>(),
    })
}

fn of_evaluation(evaluation: &Evaluation) -> Value {
    let text = |bytes| -> String {
        let own: &str = evaluation.text.get::<Range<usize>>(bytes).unwrap_or_default();
        own.chars().take(PART_CHARS_MAX).collect()
    };
    let parts = evaluation.parts.iter().enumerate().map(|(number, part)| {
        json!({
            "id": number,
            "bytes": [part.bytes.start, part.bytes.end],
            "text": text(part.bytes.clone()),
            "operation": part.operation,
            "operands": part.operands,
            "value": of_value(&part.value),
            "reason": part.reason.as_ref().map(|reason| json!({
                "code": reason.code(),
                "message": reason.to_string(),
            })),
        })
    });
    json!({
        "text": evaluation.text,
        "value": match evaluation.truth {
            Truth::True => "true",
            Truth::False => "false",
            Truth::Undefined => "undefined",
        },
        "parts": parts.collect::<Vec<_>>(),
    })
}

fn of_value(value: &PartValue) -> Value {
    match value {
        PartValue::Undefined => json!({ "kind": "undefined" }),
        PartValue::Null => json!({ "kind": "null" }),
        PartValue::Absent => json!({ "kind": "absent" }),
        PartValue::Bool(value) => json!({ "kind": "boolean", "value": value }),
        // Numbers that JSON has not are written as texts.
        PartValue::Number(number) if number.is_finite() => json!({ "kind": "number", "value": number }),
        PartValue::Number(number) => json!({ "kind": "number", "value": number.to_string() }),
        PartValue::NullText => json!({ "kind": "no-value" }),
        PartValue::Text(text) => json!({ "kind": "text", "value": text }),
    }
}
