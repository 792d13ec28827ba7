//! The route tools of the built program: check, explain, test.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn route(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edgehub"));
    command.env_clear().arg("route").args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A program that does not read its input has closed it.
    let _closed = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn vectors(name: &str) -> String {
    format!("{}/tests/vectors/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Checks a text from standard input; code and report.
fn check(options: &[&str], input: &str) -> (Option<i32>, String) {
    let output = route(&[&["check", "-"], options].concat(), input);
    (output.status.code(), text(&output))
}

#[test]
fn errors_are_drawn_like_a_compilers() {
    let (code, report) = check(
        &[],
        "up: FORM /messages/* INTO $upstream\nall:\n\tFROM /*\n\tWHERE 'é😀' = 5\n\tINTO $upstream\n",
    );
    assert_eq!(code, Some(1));
    assert_eq!(
        report,
        "error[syntax]: \"FORM\" cannot stand here
 --> standard input:route up:1:5
  |
1 | FORM /messages/* INTO $upstream
  | ^^^^
help: did you mean FROM?

error[operand]: \"=\" needs values of one type, not a text and a number
 --> standard input:route all:4:14
  |
4 |  WHERE 'é😀' = 5
  |              ^
help: convert the text: as_number(text)
help: write `as_number('é😀')` instead of `'é😀'`

2 routes checked: 2 errors, 0 warnings
"
    );
}

#[test]
fn lints_are_warnings_unless_the_check_is_strict() {
    let route = "FROM /messages/* INTO $upstream WHERE level = 'hot'";
    let (code, report) = check(&[], route);
    assert_eq!(code, Some(0));
    assert!(
        report.starts_with("warning[trailing-text]: ")
            && report.ends_with("\n1 route checked: 0 errors, 1 warning\n")
    );
    let (code, report) = check(&["--strict"], route);
    assert_eq!(code, Some(1));
    assert!(
        report.starts_with("error[trailing-text]: ")
            && report.ends_with("\n1 route checked: 1 error, 0 warnings\n")
    );
    assert_eq!(
        check(&["--strict"], "FROM /messages/* INTO $upstream"),
        (Some(0), "1 route checked: 0 errors, 0 warnings\n".into())
    );
}

#[test]
fn documents_are_checked_with_what_is_around_the_routes() {
    let manifest = r#"{"modulesContent": {"$edgeHub": {"properties.desired": {
  "schemaVersion": "1.1",
  "routes": {
    "up": "FROM /messages/* WHERE lenght(a) = 1 INTO $upstream",
    "old": { "route": "FROM /messages/* INTO $upstream", "priority": 11 }
  },
  "storeAndForwardConfiguration": {}
}}}}"#;
    let (code, report) = check(&["--format", "json"], manifest);
    assert_eq!(code, Some(1));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["format"], "edgehub-route-check/1");
    assert_eq!(
        (&report["ok"], &report["errors"], &report["warnings"]),
        (&json!(false), &json!(4), &json!(0))
    );
    let file = &report["files"][0];
    assert_eq!((&file["kind"], &file["routes"]), (&json!("manifest"), &json!(1)));
    let findings = file["findings"].as_array().unwrap();
    let seen: Vec<_> = findings
        .iter()
        .map(|finding| {
            (finding["code"].as_str().unwrap(), finding["route"].as_str(), finding["file"]["line"].as_u64())
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("ttl-missing", None, Some(7)),
            ("priority-range", Some("old"), Some(5)),
            ("unknown-function", Some("up"), Some(4)),
            ("operand", Some("up"), Some(4))
        ]
    );
    assert_eq!(
        findings[2],
        json!({
            "severity": "error",
            "code": "unknown-function",
            "stage": "compile",
            "route": "up",
            "message": "there is no function \"lenght\"",
            "range": { "line": 1, "column": 24, "endLine": 1, "endColumn": 30 },
            "file": { "line": 4, "column": 5 },
            "help": "did you mean length?",
            "suggestion": {
                "replacement": "length",
                "range": { "line": 1, "column": 24, "endLine": 1, "endColumn": 30 },
                "bytes": [23, 29],
            },
            "others": [],
        })
    );
}

#[test]
fn the_manifests_that_the_hub_takes_pass() {
    for name in ["module-composition-example", "middle-layer", "tutorial-top-layer", "runtime-only"] {
        let file = format!("{}/tests/manifests/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let output = route(&["check", &file], "");
        assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output));
    }
    let file = format!("{}/tests/manifests/tutorial-lower-layer.broken.json", env!("CARGO_MANIFEST_DIR"));
    let output = route(&["check", &file], "");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).starts_with("error[json-syntax]: a comma directly before a closing bracket"));
}

#[test]
fn what_cannot_be_read_is_one_line_on_standard_error() {
    for arguments in [
        &["check", "/nowhere/routes.txt"][..],
        &["check"],
        &["test", "/nowhere/vectors.json"],
        &["explain", "--message", "/nowhere/message.json", "--route", "FROM /* INTO $upstream"],
        &["explain", "--message", "-"],
        &["nonsense"],
    ] {
        let output = route(arguments, "{}");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(output.stdout.is_empty());
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.starts_with("edgehub: ") && told.trim_end().lines().count() == 1, "{told}");
    }
}

#[test]
fn an_explanation_has_every_value_and_who_won() {
    let message = r#"{"source": {"kind": "module", "moduleId": "press"}, "properties": {"level": "hot"},
        "systemProperties": {"contentType": "text/plain"}, "body": {"json": {"t": 5}}}"#;
    let routes = [
        "--route",
        "b: FROM /messages/* WHERE level = 'hot' INTO $upstream",
        "--route",
        "a: FROM /messages/modules/press INTO $upstream",
        "--route",
        "FROM /* WHERE $body.t > 4 INTO BrokeredEndpoint('/modules/m/inputs/i')",
    ];
    let output = route(&[&["explain", "--message", "-"], &routes[..]].concat(), message);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        text(&output),
        "message from /messages/modules/press/

route b: would take the message, but route a sends it to the same sink with the same priority, and its name sorts first
  source /messages/ matches
  true  level = 'hot'
  ├─ 'hot'  level
  └─ 'hot'  'hot'

route a: takes the message
  source /messages/modules/press/ matches
  true  true

route #3: does not take the message: the condition is undefined
  source / matches
  undefined  $body.t > 4  -- $body.t is undefined
  ├─ undefined  $body.t  -- the content type is text/plain, not exactly application/json
  └─ 4  4

to iothub by route a, default priority, the hub-wide time to live
"
    );
    let output = route(&[&["explain", "--message", "-", "--format", "json"], &routes[..]].concat(), message);
    let report: Value = serde_json::from_str(&text(&output)).unwrap();
    assert_eq!(report["format"], "edgehub-route-explain/1");
    assert_eq!(report["routes"][0]["outcome"], "lost-by-name");
    assert_eq!(report["routes"][0]["winner"], "a");
    let parts = &report["routes"][2]["condition"]["parts"];
    assert_eq!(parts[0]["reason"]["code"], "content-type-not-json");
    assert_eq!(
        parts[2],
        json!({
            "id": 2, "bytes": [0, 11], "text": "$body.t > 4", "operation": ">", "operands": [0, 1],
            "value": { "kind": "undefined" },
            "reason": { "code": "operand-undefined", "message": "$body.t is undefined" },
        })
    );
    assert_eq!(
        report["targets"],
        json!([{ "endpoint": "iothub", "sink": { "system": "$upstream" }, "route": "a", "priority": 2_000_000_000, "timeToLiveSecs": 0 }])
    );
}

#[test]
fn an_explanation_knows_targets_at_the_upstream() {
    let up = "FROM /messages/* INTO $upstream";
    let (a, b, c) = (format!("a: {up}"), format!("b: {up}"), format!("c: {up}"));
    let arguments = ["explain", "--message", "-", "--route", &a, "--route", &b, "--route", &c];
    let targets = ["--target", "B=/queue/alarms", "--target", "c=/queue/alarms", "--format", "json"];
    let output = route(&[&arguments[..], &targets].concat(), "{}");
    let report: Value = serde_json::from_str(&text(&output)).unwrap();
    let routes = report["routes"].as_array().unwrap().iter();
    assert_eq!(routes.map(|route| &route["outcome"]).collect::<Vec<_>>(), ["won", "won", "lost-by-name"]);
    let endpoints = report["targets"].as_array().unwrap().iter().map(|target| &target["endpoint"]);
    assert_eq!(endpoints.collect::<Vec<_>>(), ["iothub", "iothub[/queue/alarms]"]);
    assert_eq!(report["targets"][1]["sink"], json!({ "system": "$upstream", "address": "/queue/alarms" }));
}

#[test]
fn an_explanation_takes_priorities_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("routes.json");
    let up = "FROM /messages/* INTO $upstream";
    let document = json!({ "a": { "route": up, "priority": 5 }, "b": { "route": up, "priority": 1, "timeToLiveSecs": 60 }, "c": "FROM" });
    std::fs::write(&file, document.to_string()).unwrap();
    let output =
        route(&["explain", "--file", file.to_str().unwrap(), "--message", "-", "--format", "json"], "{}");
    // A route that does not compile is an error, but the others are explained.
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_str(&text(&output)).unwrap();
    let outcomes: Vec<_> =
        report["routes"].as_array().unwrap().iter().map(|route| route["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["lost-by-priority", "won", "broken"]);
    assert_eq!(report["targets"][0]["timeToLiveSecs"], 60);
}

#[test]
fn the_vectors_of_the_language_pass() {
    let file = |name| format!("{}/../routing/tests/vectors/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let files = [file("conditions"), file("sources"), file("parse_errors")];
    let output = route(&["test", &files[0], &files[1], &files[2]], "");
    assert_eq!(
        (output.status.code(), text(&output)),
        (Some(0), "991 passed, 0 failed, 0 skipped\n".to_owned())
    );
}

#[test]
fn the_vectors_of_other_kinds_pass() {
    let output = route(&["test", &vectors("other-kinds.json")], "");
    assert_eq!(
        (output.status.code(), text(&output)),
        (Some(0), "46 passed, 0 failed, 3 skipped\n".to_owned())
    );
}

#[test]
fn vectors_that_fail_are_named_with_what_was_expected_and_found() {
    let output = route(&["test", &vectors("failing.json")], "");
    assert_eq!(output.status.code(), Some(1));
    let report = text(&output);
    assert!(report.ends_with("\n0 passed, 24 failed, 0 skipped\n"), "{report}");
    let file = vectors("failing.json");
    for part in [
        format!("FAILED {file}: value\n  expected: {{\"number\":3}}\n  got:      2: 1 + 1\n"),
        format!(
            "FAILED {file}: unknown\n  expected: a kind of vector that this program knows\n  got:      the unknown kind \"twin-query\"\n"
        ),
        format!("FAILED {file}: #24\n"),
        format!("FAILED {file}: condition\n  expected: false\n  got:      true: 1 = 1\n"),
    ] {
        assert!(report.contains(&part), "{part}\nin\n{report}");
    }
}
