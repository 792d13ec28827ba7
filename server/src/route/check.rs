//! Owns `edgehub route check`: errors and lints of the routes in files, for people and for programs.

use std::fmt::Write as _;

use edgehub_routing::{Origin, RouteTable, TextRange, lint};
use serde_json::{Value, json};

use super::document::{Document, DocumentKind, Located};
use super::{counted, of_range, of_suggestion, read, shown};
use crate::cli::{ReportFormat, RouteCheckOptions};
use crate::exit::Failure;
use crate::manifest::Position;

/// One finding, in both forms.
struct Finding {
    is_error: bool,
    picture: String,
    json: Value,
}

/// The report, and whether there is no error.
///
/// # Errors
/// A file cannot be read.
pub(super) fn report(options: &RouteCheckOptions) -> Result<(String, bool), Failure> {
    let (mut text, mut files) = (String::new(), Vec::new());
    let (mut routes, mut errors, mut warnings) = (0, 0, 0);
    for path in &options.files {
        let document = Document::read(&read(path)?);
        let findings = findings(&document, shown(path), options.strict);
        routes += document.routes.len();
        for finding in &findings {
            *if finding.is_error { &mut errors } else { &mut warnings } += 1;
            let _ = writeln!(text, "{}", finding.picture);
        }
        files.push(json!({
            "file": path,
            "kind": document.kind.name(),
            "routes": document.routes.len(),
            "findings": findings.into_iter().map(|finding| finding.json).collect::<Vec<_>>(),
        }));
    }
    let good = errors == 0;
    Ok(match options.format {
        ReportFormat::Text => {
            let (routes, errors) = (counted(routes, "route"), counted(errors, "error"));
            let _ = writeln!(text, "{routes} checked: {errors}, {}", counted(warnings, "warning"));
            (text, good)
        }
        ReportFormat::Json => {
            let report = json!({
                "format": "edgehub-route-check/1",
                "files": files,
                "routes": routes,
                "errors": errors,
                "warnings": warnings,
                "ok": good,
            });
            (format!("{report:#}\n"), good)
        }
    })
}

fn findings(document: &Document, file: &str, strict: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for problem in &document.problems {
        let severity = if problem.is_warning && !strict { "warning" } else { "error" };
        let route = problem.route.as_ref().map(|name| format!(":route {name}")).unwrap_or_default();
        let place = problem.position.map(|at| format!(":{}:{}", at.line, at.column)).unwrap_or_default();
        findings.push(Finding {
            is_error: severity == "error",
            picture: format!(
                "{severity}[{}]: {}\n --> {file}{place}{route}\n",
                problem.code, problem.message
            ),
            json: json!({
                "severity": severity,
                "code": problem.code,
                "stage": "document",
                "route": problem.route,
                "message": problem.message,
                "range": Value::Null,
                "file": problem.position.map(of_position),
                "help": Value::Null,
                "suggestion": Value::Null,
                "others": [],
            }),
        });
    }
    let specs = || document.routes.iter().map(|route| route.spec.as_spec());
    let (_, errors) = RouteTable::compile(specs(), "edge");
    let lints = lint(specs());
    let mut errors = errors.iter().peekable();
    let mut lints = lints.iter().peekable();
    for route in &document.routes {
        let name = format!("{file}:route {}", route.spec.name);
        let origin = origin(document.kind, route, &name);
        // Both are in the order of the routes; routes of one name follow each other.
        if let Some(error) = errors.next_if(|error| error.name == route.spec.name) {
            for diagnostic in &error.diagnostics {
                findings.push(Finding {
                    is_error: true,
                    picture: diagnostic.render(&origin, &route.spec.text),
                    json: json!({
                        "severity": "error",
                        "code": diagnostic.category.name(),
                        "stage": diagnostic.stage.name(),
                        "route": route.spec.name,
                        "message": diagnostic.message,
                        "range": diagnostic.in_route.map(of_range),
                        "file": in_file(document.kind, route, &origin, diagnostic.in_route),
                        "help": diagnostic.hint,
                        "suggestion": diagnostic.suggestion.as_deref().map(of_suggestion),
                        "others": [],
                    }),
                });
            }
            continue;
        }
        while let Some(lint) = lints.next_if(|lint| lint.route == route.spec.name) {
            let severity = if strict { "error" } else { "warning" };
            findings.push(Finding {
                is_error: strict,
                picture: lint.render(severity, &origin, &route.spec.text),
                json: json!({
                    "severity": severity,
                    "code": lint.code.name(),
                    "stage": "lint",
                    "route": route.spec.name,
                    "message": lint.message,
                    "range": lint.in_route.map(of_range),
                    "file": in_file(document.kind, route, &origin, lint.in_route),
                    "help": lint.hint,
                    "suggestion": lint.suggestion.as_ref().map(of_suggestion),
                    "others": lint.others,
                }),
            });
        }
    }
    findings
}

/// Lines and columns count in the file where the route stands there as it is, else in the route.
fn origin<'a>(kind: DocumentKind, route: &Located, name: &'a str) -> Origin<'a> {
    match route.position {
        Some(at) if kind == DocumentKind::Text => {
            Origin { name, first_line: at.line as u32, first_column: at.column as u32 }
        }
        _ => Origin::of_route(name),
    }
}

fn in_file(
    kind: DocumentKind,
    route: &Located,
    origin: &Origin<'_>,
    range: Option<TextRange>,
) -> Option<Value> {
    match (kind, range) {
        (DocumentKind::Text, Some(range)) => {
            let (line, column) = origin.place(range);
            Some(json!({ "line": line, "column": column }))
        }
        _ => route.position.map(of_position),
    }
}

fn of_position(position: Position) -> Value {
    json!({ "line": position.line, "column": position.column })
}
