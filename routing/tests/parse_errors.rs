//! The vectors of texts that must be refused: category and range of the first error.

#[allow(dead_code)] // Each runner needs a part of it.
mod support;

use edgehub_routing::{Condition, Diagnostic, RouteSpec, RouteTable, Stage, TextRange};
use serde_json::Value;
use support::Vectors;

#[test]
fn conditions_are_refused_at_the_right_place() {
    Vectors::open("parse_errors.json").check("condition-error", 187, |vector| {
        let text = vector["condition"].as_str().expect("a text");
        let errors = Condition::compile(text).err().ok_or_else(|| format!("{text} compiles"))?;
        let first = errors.first().ok_or("no diagnostic")?;
        compare(text, first, first.in_route, &vector["error"])
    });
}

#[test]
fn routes_are_refused_at_the_right_place() {
    Vectors::open("parse_errors.json").check("route-error", 76, |vector| {
        let text = vector["route"].as_str().expect("a text");
        let spec = RouteSpec { name: "r", text, priority: 0, time_to_live_secs: 0, upstream_target: None };
        let (table, errors) = RouteTable::compile([spec], "edge-9");
        if !table.is_empty() {
            return Err(format!("{text} compiles"));
        }
        let first = errors.first().and_then(|error| error.diagnostics.first()).ok_or("no diagnostic")?;
        if vector["error"]["stage"] != first.stage.name() {
            return Err(format!("{text}: stage {:?}", first.stage));
        }
        let range = if first.stage == Stage::Compile { first.in_condition } else { first.in_route };
        compare(text, first, range, &vector["error"])
    });
}

fn compare(text: &str, found: &Diagnostic, range: Option<TextRange>, expected: &Value) -> Result<(), String> {
    let number = |member: &str| expected[member].as_u64().map(|number| number as u32);
    let wanted = match (number("line"), number("column"), number("endLine"), number("endColumn")) {
        (Some(line), Some(column), Some(end_line), Some(end_column)) => {
            Some(TextRange { line, column, end_line, end_column })
        }
        _ => None,
    };
    if expected["category"] == found.category.name() && (wanted.is_none() || wanted == range) {
        Ok(())
    } else {
        Err(format!("{text}: {found} {range:?}"))
    }
}
