//! Owns the vectors of conditions and their parts: value, error, constant expression, body path.

use edgehub_routing::{
    Condition, DEFAULT_PRIORITY, Decision, Diagnostic, MessageView, PropertyName, RouteSpec, RouteTable,
    Text, Truth, check_body_path,
};
use serde_json::{Value, json};

use super::{File, Refusal, Verdict, same, same_error, text};
use crate::route::message::{escaped, units};

/// The value of a condition on its own, and in a route of a table.
pub(super) fn condition(file: &File<'_>, vector: &Value) -> Verdict {
    let own = escaped(text(vector, "condition")?);
    let message = file.message(vector)?;
    let condition = Condition::compile(&own).map_err(|errors| refused(&errors, &vector["expect"]))?;
    let alone = condition.evaluate(&message);
    let expected = match vector["expect"].as_str() {
        Some("any") => None,
        Some(expected) => Some(expected.to_owned()),
        None => vector["expect"].as_bool().map(|expected| expected.to_string()),
    };
    let in_route = match own.trim().is_empty() {
        // A route cannot have an empty condition.
        true => alone,
        false => in_route(&own, &message)?,
    };
    let Some(expected) = expected else {
        return if vector["expect"] == "any" {
            Ok(())
        } else {
            Err(Refusal::malformed("a vector whose expectation is no text"))
        };
    };
    if word(alone) == expected && word(in_route) == expected {
        return Ok(());
    }
    let got = match alone == in_route {
        true => word(alone).to_owned(),
        false => format!("{} alone, {} in a route", word(alone), word(in_route)),
    };
    Err(Refusal::Failed { expected, got: format!("{got}: {own}") })
}

fn in_route(condition: &str, message: &impl MessageView) -> Result<Truth, Refusal> {
    let route = format!("FROM /messages WHERE {condition} INTO $upstream");
    let spec = RouteSpec {
        name: "r",
        text: &route,
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        upstream_target: None,
    };
    let (table, errors) = RouteTable::compile([spec], "edge");
    if let Some(error) = errors.first() {
        return Err(Refusal::Failed { expected: "a route that compiles".to_owned(), got: error.to_string() });
    }
    let mut decision = Decision::new();
    table.decide(&table.candidates_at("/messages/"), message, &mut decision);
    Ok(match (decision.targets.len(), decision.undefined) {
        (1, 0) => Truth::True,
        (0, 0) => Truth::False,
        _ => Truth::Undefined,
    })
}

fn word(truth: Truth) -> &'static str {
    match truth {
        Truth::True => "true",
        Truth::False => "false",
        Truth::Undefined => "undefined",
    }
}

fn refused(errors: &[Diagnostic], expected: &Value) -> Refusal {
    let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
    Refusal::Failed {
        expected: expected.to_string(),
        got: format!("it does not compile: {}", errors.join("; ")),
    }
}

/// A condition that must be refused.
pub(super) fn condition_error(vector: &Value) -> Verdict {
    let own = text(vector, "condition")?;
    match Condition::compile(own) {
        Ok(_) => {
            Err(Refusal::Failed { expected: vector["error"].to_string(), got: "it compiles".to_owned() })
        }
        Err(errors) => match errors.first() {
            Some(first) => same_error(vector, first, first.in_condition.or(first.in_route)),
            None => Err(Refusal::malformed("no error is given")),
        },
    }
}

/// A message that has nothing: constant expressions do not ask for anything.
struct Nothing;

impl MessageView for Nothing {
    fn property(&self, _: &PropertyName) -> Text<'_> {
        Text::Undefined
    }

    fn system_property(&self, _: &PropertyName) -> Text<'_> {
        Text::Undefined
    }

    fn body(&self) -> &[u8] {
        &[]
    }
}

/// The value of a constant expression: compared within the language, by a condition around it.
pub(super) fn value(vector: &Value) -> Verdict {
    let expression = escaped(text(vector, "expression")?);
    let expect = &vector["expect"];
    let conditions = match expectation(expect, &expression) {
        Some(conditions) => conditions,
        None if *expect == "any" => vec![(format!("({expression}) = ({expression})"), None)],
        None => return Err(Refusal::malformed(format!("an expectation that is no value: {expect}"))),
    };
    for (condition, truth) in conditions {
        let compiled = Condition::compile(&condition).map_err(|errors| refused(&errors, expect))?;
        if truth.is_some_and(|truth| compiled.evaluate(&Nothing) != truth) {
            let shown = Condition::compile(&expression).ok().and_then(|alone| {
                let evaluation = alone.explain(&Nothing);
                evaluation.parts.last().map(|root| root.value.to_string())
            });
            let got = shown.unwrap_or_else(|| "another value".to_owned());
            return Err(Refusal::Failed {
                expected: expect.to_string(),
                got: format!("{got}: {expression}"),
            });
        }
    }
    Ok(())
}

/// Conditions about an expression, and what they must be.
fn expectation(expect: &Value, expression: &str) -> Option<Vec<(String, Option<Truth>)>> {
    let holds = |condition: String| (condition, Some(Truth::True));
    let is_undefined = || vec![(format!("is_defined({expression})"), Some(Truth::False))];
    let number = expect.get("number").or(Some(expect).filter(|expect| expect.is_number()));
    if let Some(number) = number {
        let own = match number {
            Value::String(word) => match word.as_str() {
                "Infinity" => "1e999".to_owned(),
                "-Infinity" => "-1e999".to_owned(),
                "NaN" => return Some(is_undefined()),
                digits => digits.parse::<f64>().ok().filter(|number| number.is_finite())?.to_string(),
            },
            _ => literal(number.as_f64()?),
        };
        let mut conditions = vec![holds(format!("({expression}) = {own}"))];
        if own == "-0" {
            conditions.push(holds(format!("1 / ({expression}) = -1e999")));
        }
        return Some(conditions);
    }
    if let Some(string) = expect.get("string") {
        return match string {
            Value::Null => Some(vec![holds(format!("is_null({expression})"))]),
            _ => Some(vec![holds(format!("({expression}) = {}", quoted(string.as_str()?)))]),
        };
    }
    let boolean = ["bool", "boolean"].into_iter().find_map(|name| expect.get(name)).and_then(Value::as_bool);
    if let Some(boolean) = boolean.or_else(|| expect.as_bool()) {
        return Some(vec![(expression.to_owned(), Some(if boolean { Truth::True } else { Truth::False }))]);
    }
    if *expect == "undefined" || expect.get("undefined").is_some() {
        return Some(is_undefined());
    }
    (*expect == "null" || expect.get("null").is_some()).then(|| vec![holds(format!("is_null({expression})"))])
}

/// The literal of a number; an exponent keeps very large and small ones short.
fn literal(number: f64) -> String {
    if number == 0.0 && number.is_sign_negative() { "-0".to_owned() } else { format!("{number:e}") }
}

/// The literal of a text, every unit that is no letter or digit by its number.
fn quoted(value: &str) -> String {
    let mut literal = "'".to_owned();
    for unit in units(value) {
        match char::from_u32(u32::from(unit)).filter(char::is_ascii_alphanumeric) {
            Some(plain) => literal.push(plain),
            // A literal is unescaped twice, so a backslash takes two.
            None if unit == u16::from(b'\\') => literal.push_str("\\u005C\\u005C"),
            None => literal.push_str(&format!("\\u{unit:04X}")),
        }
    }
    literal.push('\'');
    literal
}

/// The check of a body path.
pub(super) fn body_path(vector: &Value) -> Verdict {
    let checked = check_body_path(text(vector, "path")?);
    let mut got = json!({ "valid": checked.is_ok() });
    if let Err(reason) = checked {
        got["reason"] = reason.into();
    }
    match &vector["expect"] {
        Value::Bool(valid) => same(&json!({ "valid": valid }), &got),
        expect => same(&json!({ "valid": expect["valid"] }), &got),
    }
}
