//! Manifests: the files of `tests/manifests` and what a reader must find in each.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use edgehub::manifest::{Code, Manifest, ManifestError, Problem};
use proptest::prelude::*;
use serde_json::Value;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests").join(name)
}

fn faults(name: &str) -> Vec<Problem> {
    match Manifest::read(&file(name)) {
        Err(ManifestError::Faulty { problems, .. }) => problems,
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn what_the_table_expects_is_found() {
    // The codes that belong to the linter of the agent's part: ports, proxies and placeholders.
    const ELSEWHERE: [&str; 5] = [
        "placeholder",
        "port-mismatch",
        "proxy-port-not-published",
        "proxy-module-name",
        "route-address-names-no-module",
    ];
    let table: Value = serde_json::from_slice(&std::fs::read(file("expected.json")).unwrap()).unwrap();
    for (name, expected) in table.as_object().unwrap().iter().filter(|(name, _)| name.ends_with(".json")) {
        if name.contains('/') {
            continue;
        }
        let mut wanted: Vec<_> = expected["problems"]
            .as_array()
            .unwrap()
            .iter()
            .map(|problem| {
                let text = |member: &str| problem[member].as_str().unwrap_or_default().to_owned();
                (text("code"), text("path"), problem["line"].as_u64().unwrap_or_default() as usize)
            })
            .filter(|(code, _, _)| !ELSEWHERE.contains(&code.as_str()))
            .collect();
        let (manifest, problems) = match Manifest::read(&file(name)) {
            Ok(manifest) => (Some(manifest.clone()), manifest.warnings),
            Err(ManifestError::Faulty { problems, .. }) => (None, problems),
            Err(other) => panic!("{other}"),
        };
        let mut found: Vec<_> = problems
            .iter()
            .map(|problem| {
                let line = if problem.code == Code::JsonSyntax { problem.position.line } else { 0 };
                let path = if wanted
                    .iter()
                    .any(|(code, path, _)| code == problem.code.as_str() && path.is_empty())
                {
                    String::new()
                } else {
                    problem.path.clone()
                };
                (problem.code.as_str().to_owned(), path, line)
            })
            .collect();
        wanted.sort();
        found.sort();
        if wanted.iter().any(|(code, _, _)| code == "unknown-property") {
            // The table names one member of several that stand in the wrong place.
            assert!(wanted.iter().all(|wanted| found.contains(wanted)), "{name}: {found:?}");
        } else {
            assert_eq!(found, wanted, "{name}");
        }
        let Some(manifest) = manifest else { continue };
        assert_eq!(manifest.hub_desired["schemaVersion"], expected["hubSchema"], "{name}");
        assert_eq!(manifest.hub_desired["routes"], expected["routes"], "{name}");
        assert_eq!(
            manifest.hub_desired["storeAndForwardConfiguration"]["timeToLiveSecs"],
            expected["timeToLiveSecs"]
        );
        let mut names: Vec<&str> =
            expected["modules"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        names.sort_unstable();
        let mut found = manifest.module_names.clone();
        found.sort();
        assert_eq!(found, names, "{name}");
    }
}

#[test]
fn the_sentences_name_line_column_and_cause() {
    for (name, sentences) in [
        (
            "tutorial-top-layer.broken.json",
            &[
                "line 15, column 69: the object of member REGISTRY_PROXY_REMOTEURL is not closed; a } is missing \
                 after line 15 [json-syntax]",
                "line 44, column 52: a comma directly before a closing bracket; remove it [json-syntax]",
            ][..],
        ),
        (
            "tutorial-lower-layer.broken.json",
            &["line 19, column 52: a comma directly before a closing bracket; remove it [json-syntax]"],
        ),
        (
            "module-composition-skeleton.broken.json",
            &[
                "line 5, column 17: comments and `...`: this is an outline, not a document; replace or remove \
               them [json-syntax]",
            ],
        ),
        (
            "fragments/edgehub-extra-hosts.broken.json",
            &[
                "line 1, column 10: a member without the object around it; put the text into { } [json-syntax]",
            ],
        ),
    ] {
        let found: Vec<_> = faults(name).iter().map(ToString::to_string).collect();
        assert_eq!(found, sentences, "{name}");
    }
}

#[test]
fn a_section_in_the_wrong_place_is_found() {
    let problems = faults("tutorial-top-layer.extra-brace-at-end.broken.json");
    let hub = problems.iter().find(|problem| problem.path == "$edgeHub").expect("reported");
    assert_eq!(hub.code, Code::MissingSection);
    assert!(hub.sentence.contains("it stands inside of $edgeAgent (line "), "{}", hub.sentence);
    assert!(hub.sentence.ends_with("missing after line 15, at the end of REGISTRY_PROXY_REMOTEURL"));
}

#[test]
fn what_the_hub_needs_is_required() {
    let wrap = |hub: &str| {
        format!(
            r#"{{"modulesContent":{{"$edgeAgent":{{"properties.desired":{{"schemaVersion":"1.1","runtime":{{}},
            "systemModules":{{}}}}}},"$edgeHub":{hub}}}}}"#
        )
    };
    let store = r#""storeAndForwardConfiguration":{"timeToLiveSecs":1}"#;
    for (hub, expected) in [
        (format!(r#"{{"properties.desired":{{"schemaVersion":"1.1","routes":{{}},{store}}}}}"#), &[][..]),
        (format!(r#"{{"properties.desired":{{"schemaVersion":"1.0",{store}}}}}"#), &[]),
        (format!(r#"{{"properties.desired":{{"schemaVersion":"1.1",{store}}}}}"#), &[Code::MissingProperty]),
        (
            r#"{"properties.desired":{"routes":[],"storeAndForwardConfiguration":{}}}"#.into(),
            &[Code::MissingProperty, Code::WrongType, Code::MissingProperty],
        ),
        (r#"{"properties.desired.routes.a":"FROM /* INTO $upstream"}"#.into(), &[Code::LayeredDeployment]),
        (r#"{}"#.into(), &[Code::MissingSection]),
        (r#"[]"#.into(), &[Code::WrongType]),
    ] {
        let found: Vec<Code> = match Manifest::parse(&wrap(&hub)) {
            Ok(manifest) => manifest.warnings,
            Err(problems) => problems,
        }
        .iter()
        .map(|problem| problem.code)
        .collect();
        let mut sorted = found.clone();
        sorted.sort_by_key(|code| expected.iter().position(|wanted| wanted == code));
        assert_eq!(sorted.len(), expected.len(), "{hub}: {found:?}");
        assert!(expected.iter().all(|code| found.contains(code)), "{hub}: {found:?}");
    }
    assert!(
        Manifest::parse(&format!(
            "{{\"content\":{}}}",
            wrap(&format!(r#"{{"properties.desired":{{"schemaVersion":"1.1","routes":{{}},{store}}}}}"#))
        ))
        .is_ok()
    );
    assert_eq!(Manifest::parse("[]").unwrap_err()[0].code, Code::WrongType);
    assert_eq!(Manifest::parse("{}").unwrap_err()[0].code, Code::MissingSection);
}

#[test]
fn no_text_makes_the_reader_panic() {
    let whole = std::fs::read_to_string(file("tutorial-top-layer.json")).unwrap();
    for end in (0..whole.len()).filter(|end| whole.is_char_boundary(*end)).step_by(7) {
        let problems = Manifest::parse(&whole[..end]).unwrap_err();
        assert_eq!(problems[0].code, Code::JsonSyntax);
    }
    for text in
        ["", "\"", "\"\\", "\"é\\é", "/*", "/", "...", "}", "]]", "{\"a\":", "{\"a\" \"b\"}", "\u{feff}{}"]
    {
        assert!(Manifest::parse(text).is_err());
    }
    let deep = "[".repeat(200_000);
    assert_eq!(Manifest::parse(&deep).unwrap_err()[0].code, Code::JsonSyntax);
}

/// Any JSON document of modest depth.
fn document() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 60, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map("[a-z/.$\\PC]{0,6}", inner, 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn whatever_is_json_is_never_called_a_syntax_error(document in document(), pretty: bool) {
        let text = if pretty { format!("{document:#}") } else { document.to_string() };
        let problems = Manifest::parse(&text).expect_err("no manifest by chance");
        prop_assert!(problems.iter().all(|problem| problem.code != Code::JsonSyntax));
    }

    #[test]
    fn any_text_has_an_answer(text in "[{}\\[\\]:,\"\\\\/*.\\n a-cé]{0,60}") {
        let _any_answer_without_panic = Manifest::parse(&text);
    }
}
