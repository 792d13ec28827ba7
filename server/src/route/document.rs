//! Owns the reading of files that hold routes: manifests, desired properties, objects of routes, plain text.

use std::collections::{BTreeSet, HashMap};

use edgehub_routing::{ConfigError, DEFAULT_PRIORITY, HubConfig, OwnedRouteSpec};
use serde_json::{Map, Value, json};

use super::statement::statements;
use crate::manifest::{self, Code, Manifest, Position, member_positions};

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DocumentKind {
    /// A deployment manifest.
    Manifest,
    /// The desired properties of `$edgeHub`.
    Desired,
    /// A JSON object of routes by their names.
    Routes,
    /// Plain text.
    Text,
}

impl DocumentKind {
    /// The name under which the kind is reported.
    pub(super) fn name(self) -> &'static str {
        match self {
            DocumentKind::Manifest => "manifest",
            DocumentKind::Desired => "desired",
            DocumentKind::Routes => "routes",
            DocumentKind::Text => "text",
        }
    }
}

/// A route of a file.
#[derive(Clone, Debug)]
pub(super) struct Located {
    pub(super) spec: OwnedRouteSpec,
    /// Where in the file the route, or the member that holds it, begins.
    pub(super) position: Option<Position>,
}

/// Something that is wrong with a file, not with the text of a route.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    pub(super) code: &'static str,
    pub(super) route: Option<String>,
    pub(super) message: String,
    pub(super) position: Option<Position>,
    pub(super) is_warning: bool,
}

/// A file that holds routes.
#[derive(Clone, Debug)]
pub(super) struct Document {
    pub(super) kind: DocumentKind,
    pub(super) routes: Vec<Located>,
    pub(super) problems: Vec<Problem>,
}

impl Document {
    /// Reads a text. What cannot be understood is a problem, never a failure.
    pub(super) fn read(text: &str) -> Document {
        if !text.trim_start().starts_with(['{', '[']) {
            return of_text(text);
        }
        match serde_json::from_str::<Value>(text) {
            Ok(value) => of_json(text, &value),
            Err(_) => {
                let mut document = Document::empty(DocumentKind::Manifest);
                document.manifest_problems(text);
                document
            }
        }
    }

    fn empty(kind: DocumentKind) -> Document {
        Document { kind, routes: Vec::new(), problems: Vec::new() }
    }

    /// What the reader of manifests refuses, without its warnings about the agent's section.
    fn manifest_problems(&mut self, text: &str) {
        let counts = |problem: &manifest::Problem| {
            problem.code == Code::LayeredDeployment || !problem.path.starts_with("$edgeAgent")
        };
        let problems = Manifest::parse(text).err().unwrap_or_default();
        self.problems.extend(problems.into_iter().filter(counts).map(|problem| Problem {
            code: problem.code.as_str(),
            route: None,
            message: problem.sentence,
            position: Some(problem.position),
            is_warning: false,
        }));
    }

    fn problem(
        &mut self,
        code: &'static str,
        route: Option<&str>,
        message: impl Into<String>,
    ) -> &mut Problem {
        let message = message.into();
        let problem =
            Problem { code, route: route.map(str::to_owned), message, position: None, is_warning: false };
        self.problems.push(problem);
        let last = self.problems.len() - 1;
        &mut self.problems[last]
    }
}

fn of_text(text: &str) -> Document {
    let mut document = Document::empty(DocumentKind::Text);
    let mut names = BTreeSet::new();
    for (number, statement) in statements(text).into_iter().enumerate() {
        let position = Some(Position { line: statement.line as usize, column: statement.column as usize });
        let mut name = statement.name.unwrap_or_else(|| format!("#{}", number + 1));
        if !names.insert(name.clone()) {
            let message = "another route has the same name; in a configuration only one of them would count";
            document.problem("route-name", Some(&name), message).position = position;
            name = format!("{name}#{}", number + 1);
        }
        let spec = OwnedRouteSpec {
            name,
            text: statement.text,
            priority: DEFAULT_PRIORITY,
            time_to_live_secs: 0,
            overflow: None,
        };
        document.routes.push(Located { spec, position });
    }
    document
}

fn of_json(text: &str, value: &Value) -> Document {
    let positions = member_positions(text);
    let Value::Object(outer) = value else {
        let mut document = Document::empty(DocumentKind::Routes);
        document.problem(
            "wrong-type",
            None,
            "the document must be an object, or plain text with one route per line",
        );
        return document;
    };
    if let Some((path, desired)) = desired_of_manifest(outer) {
        let mut document = of_desired(DocumentKind::Manifest, desired, &path, &positions);
        if document.problems.iter().all(|problem| problem.is_warning) {
            // The reader of manifests is stricter than the hub in a few places.
            document.manifest_problems(text);
        }
        return document;
    }
    if ["modulesContent", "moduleContent", "content"].iter().any(|name| outer.contains_key(*name)) {
        let mut document = Document::empty(DocumentKind::Manifest);
        document.manifest_problems(text);
        return document;
    }
    let wrappers: [&[&str]; 4] = [
        &["$edgeHub", "properties.desired"],
        &["properties.desired"],
        &["properties", "desired"],
        &["desired"],
    ];
    for path in wrappers {
        if let Some(desired) =
            path.iter().try_fold(value, |at, name| at.get(*name)).filter(|at| at.is_object())
        {
            return of_desired(DocumentKind::Desired, desired, &format!("{}/", path.join("/")), &positions);
        }
    }
    if outer.contains_key("schemaVersion") || outer.contains_key("storeAndForwardConfiguration") {
        return of_desired(DocumentKind::Desired, value, "", &positions);
    }
    match outer.get("routes") {
        Some(routes) if outer.len() == 1 && !routes.is_string() => of_routes(routes, "routes/", &positions),
        _ => of_routes(value, "", &positions),
    }
}

/// The desired properties of `$edgeHub` in a manifest, with their path.
fn desired_of_manifest(outer: &Map<String, Value>) -> Option<(String, &Value)> {
    let (prefix, outer) = match outer.get("content").and_then(Value::as_object) {
        Some(inner) => ("content/", inner),
        None => ("", outer),
    };
    let (name, content) = ["modulesContent", "moduleContent"]
        .into_iter()
        .find_map(|name| outer.get(name).map(|content| (name, content)))?;
    let desired = content.get("$edgeHub")?.get("properties.desired").filter(|desired| desired.is_object())?;
    Some((format!("{prefix}{name}/$edgeHub/properties.desired/"), desired))
}

fn of_desired(
    kind: DocumentKind,
    desired: &Value,
    path: &str,
    positions: &HashMap<String, Position>,
) -> Document {
    let (config, errors) = HubConfig::inspect(desired);
    let mut document = Document::empty(kind);
    document.add(config, errors, &format!("{path}routes/"), positions);
    for problem in &mut document.problems {
        // Where the member is missing, the document that lacks it is named.
        let member = match problem.code {
            "schema-version" => "schemaVersion",
            "routes-missing" | "route-shape" => "routes",
            _ => "storeAndForwardConfiguration",
        };
        let around = || positions.get(path.trim_end_matches('/'));
        problem.position =
            problem.position.or_else(|| positions.get(&format!("{path}{member}")).or_else(around).copied());
    }
    document
}

fn of_routes(routes: &Value, path: &str, positions: &HashMap<String, Position>) -> Document {
    let desired = json!({
        "schemaVersion": "1.3",
        "routes": routes,
        "storeAndForwardConfiguration": { "timeToLiveSecs": 7200 },
    });
    let (config, errors) = HubConfig::inspect(&desired);
    let mut document = Document::empty(DocumentKind::Routes);
    document.add(config, errors, path, positions);
    document
}

impl Document {
    fn add(
        &mut self,
        config: HubConfig,
        errors: Vec<ConfigError>,
        path: &str,
        positions: &HashMap<String, Position>,
    ) {
        let position = |name: &str| positions.get(&format!("{path}{name}")).copied();
        for error in errors {
            let own = error.route.as_deref().and_then(position);
            self.problem(error.category.name(), error.route.as_deref(), error.message).position = own;
        }
        for spec in config.routes {
            if let Some(unit) = spec.name.chars().find(|unit| matches!(unit, '.' | '$' | '#' | ' ')) {
                let message =
                    format!("the cloud refuses a deployment in which the name of a route holds {unit:?}");
                let problem = self.problem("route-name-characters", Some(&spec.name), message);
                problem.is_warning = true;
                problem.position = position(&spec.name);
            }
            self.routes.push(Located { position: position(&spec.name), spec });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kind, names of routes, code and line of each problem.
    type Seen = (&'static str, Vec<String>, Vec<(&'static str, Option<usize>)>);

    fn read(text: &str) -> Seen {
        let document = Document::read(text);
        let names = document.routes.iter().map(|route| route.spec.name.clone()).collect();
        let codes =
            document.problems.iter().map(|problem| (problem.code, problem.position.map(|at| at.line)));
        (document.kind.name(), names, codes.collect())
    }

    #[test]
    fn every_shape_is_known() {
        const DESIRED: &str = "{\"schemaVersion\":\"1.1\",\n\"routes\":{\"up\":\"FROM /* INTO $upstream\"},\n\
                               \"storeAndForwardConfiguration\":{\"timeToLiveSecs\":1}}";
        let up = || vec!["up".to_owned()];
        assert_eq!(read(DESIRED), ("desired", up(), vec![]));
        for (before, after, kind) in [
            ("{\"modulesContent\":{\"$edgeHub\":{\"properties.desired\":", "}}}", "manifest"),
            ("{\"content\":{\"moduleContent\":{\"$edgeHub\":{\"properties.desired\":", "}}}}", "manifest"),
            ("{\"$edgeHub\":{\"properties.desired\":", "}}", "desired"),
            ("{\"properties.desired\":", "}", "desired"),
            ("{\"moduleId\":\"$edgeHub\",\"properties\":{\"desired\":", "}}", "desired"),
        ] {
            assert_eq!(read(&format!("{before}{DESIRED}{after}")), (kind, up(), vec![]), "{before}");
        }
        assert_eq!(read("{\"routes\":{\"up\":\"FROM /* INTO $upstream\"}}"), ("routes", up(), vec![]));
        assert_eq!(
            read("{\"up\":{\"route\":\"FROM /* INTO $upstream\",\"priority\":2}}"),
            ("routes", up(), vec![])
        );
        assert_eq!(
            read("{\"routes\":\"FROM /* INTO $upstream\"}"),
            ("routes", vec!["routes".to_owned()], vec![])
        );
        assert_eq!(read("up: FROM /* INTO $upstream"), ("text", up(), vec![]));
        assert_eq!(read("FROM /* INTO $upstream").1, ["#1"]);
    }

    #[test]
    fn problems_of_the_document_are_all_reported_with_their_line() {
        let (kind, names, problems) = read(
            "{\"schemaVersion\": \"2.0\",\n\"routes\": {\n\"a\": {\"route\": \"FROM /* INTO $upstream\", \"priority\": 12},\n\
             \"b c\": \"FROM /* INTO $upstream\"},\n\"storeAndForwardConfiguration\": {}}",
        );
        assert_eq!((kind, names), ("desired", vec!["b c".to_owned()]));
        assert_eq!(
            problems,
            [
                ("schema-version", Some(1)),
                ("ttl-missing", Some(5)),
                ("priority-range", Some(3)),
                ("route-name-characters", Some(4))
            ]
        );
        assert_eq!(read("{\"modulesContent\": {}}").2, [("missing-section", Some(1))]);
        assert_eq!(read("{\"a\": 1,}").2, [("json-syntax", Some(1))]);
        assert_eq!(read("[1]").2, [("wrong-type", None)]);
        assert_eq!(read("a: FROM /a\na: FROM /b").2, [("route-name", Some(2))]);
    }
}
