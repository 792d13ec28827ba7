//! The lints: each where it belongs, each change that they propose compiles and silences them, nothing elsewhere.

use edgehub_routing::{DEFAULT_PRIORITY, Lint, LintCode, RouteSpec, RouteTable, lint};

fn spec<'a>(name: &'a str, text: &'a str) -> RouteSpec<'a> {
    RouteSpec { name, text, priority: DEFAULT_PRIORITY, time_to_live_secs: 0, upstream_target: None }
}

fn of(text: &str) -> Vec<Lint> {
    let (table, errors) = RouteTable::compile([spec("r", text)], "edge");
    assert_eq!(table.len(), 1, "{text}: {errors:?}");
    lint([spec("r", text)])
}

fn underlined(text: &str, lint: &Lint) -> String {
    let range = lint.in_route.expect("a place");
    let line = text.lines().nth(range.line as usize - 1).unwrap_or_default();
    let units: Vec<u16> = line.encode_utf16().collect();
    let end = (range.end_column as usize - 1).min(units.len());
    String::from_utf16_lossy(&units[range.column as usize - 1..end])
}

/// A route, the code of its only lint, what it underlines, and the route with the change that it proposes.
const SINGLE: &[(&str, &str, &str, Option<&str>)] = &[
    (
        "FROM /* WHERE a!='x' INTO $upstream",
        "glued-operator",
        "a!",
        Some("FROM /* WHERE a != 'x' INTO $upstream"),
    ),
    ("FROM /* WHERE a-1 = 'x' INTO $upstream", "glued-operator", "a-1", None),
    (
        "FROM /* WHERE $body.n*2 > 5 INTO $upstream",
        "glued-operator",
        "$body.n*2",
        Some("FROM /* WHERE $body.n * 2 > 5 INTO $upstream"),
    ),
    (
        "FROM /* WHERE a = b||c INTO $upstream",
        "glued-operator",
        "b||c",
        Some("FROM /* WHERE a = b || c INTO $upstream"),
    ),
    ("FROM /* WHERE {$body.n-1} = 1 INTO $upstream", "glued-operator", "$body.n-1", None),
    (
        "FROM /* WHERE a = 'it''s' INTO $upstream",
        "glued-operator",
        "'it''s'",
        Some("FROM /* WHERE a = 'it\\'s' INTO $upstream"),
    ),
    (
        "FROM /messages/modules/mix/* WHERE zone = 'n' /* only north */ INTO $upstream",
        "comment-swallow",
        "/* WHERE zone = 'n' /* only north */",
        Some("FROM /messages/modules/mix WHERE zone = 'n' INTO $upstream"),
    ),
    (
        "FROM /* everything */ /messages INTO $upstream",
        "comment-swallow",
        "/* everything */",
        Some("FROM  /messages INTO $upstream"),
    ),
    (
        "FROM /messages/* /* all */ INTO $upstream",
        "comment-swallow",
        "/* /* all */",
        Some("FROM /messages INTO $upstream"),
    ),
    (
        "FROM /messages/* INTO $upstream WHERE a = 'x'",
        "trailing-text",
        "WHERE a = 'x'",
        Some("FROM /messages/* WHERE a = 'x' INTO $upstream"),
    ),
    ("FROM /* INTO $upstream, $upstream", "trailing-text", ", $upstream", Some("FROM /* INTO $upstream")),
    ("FROM /* INTO $upstream;", "trailing-text", ";", Some("FROM /* INTO $upstream")),
    ("FROM /messages/modules/*/outputs/* INTO $upstream", "inner-wildcard", "*", None),
    (
        "FROM /messages/modules/*/outputs/alarm/* WHERE a = 'x' or b = 'y' INTO $upstream",
        "inner-wildcard",
        "*",
        Some("FROM /messages/modules/* WHERE $outputName = 'alarm' AND (a = 'x' or b = 'y') INTO $upstream"),
    ),
    ("FROM /messages/modules/a*b INTO $upstream", "inner-wildcard", "a*b", None),
    ("FROM /message/* INTO $upstream", "dead-source", "/message/*", Some("FROM /messages/* INTO $upstream")),
    (
        "FROM /messages/module/m INTO $upstream",
        "dead-source",
        "/messages/module/m",
        Some("FROM /messages/modules/m INTO $upstream"),
    ),
    (
        "FROM /messages/modules/m/output/o/* INTO $upstream",
        "dead-source",
        "/messages/modules/m/output/o/*",
        Some("FROM /messages/modules/m/outputs/o/* INTO $upstream"),
    ),
    ("FROM /messages/leaf-3/* INTO $upstream", "dead-source", "/messages/leaf-3/*", None),
    ("FROM /deviceLifecycleEvents INTO $upstream", "dead-source", "/deviceLifecycleEvents", None),
    ("FROM /twinChangeNotifications/m/* INTO $upstream", "dead-source", "/twinChangeNotifications/m/*", None),
    (
        "FROM /twinChangeNotification INTO $upstream",
        "dead-source",
        "/twinChangeNotification",
        Some("FROM /twinChangeNotifications INTO $upstream"),
    ),
    (
        "FROM /twinChangeNotifications INTO BrokeredEndpoint('/module/m/input/i')",
        "sink-words",
        "/module/m/input/i",
        Some("FROM /twinChangeNotifications INTO BrokeredEndpoint('/modules/m/inputs/i')"),
    ),
    ("FROM /* WHERE alert INTO $upstream", "constant-undefined", "alert", None),
    ("FROM /* WHERE 1 + 1 INTO $upstream", "constant-undefined", "1 + 1", None),
    ("FROM /* WHERE undefined INTO $upstream", "constant-undefined", "undefined", None),
    (
        "FROM /* WHERE TRUE INTO $upstream",
        "constant-undefined",
        "TRUE",
        Some("FROM /* WHERE true INTO $upstream"),
    ),
    ("FROM /* WHERE $body.x >= true INTO $upstream", "mixed-compare", ">=", None),
    ("FROM /* WHERE null < $body.x INTO $upstream", "mixed-compare", "<", None),
    (
        "FROM /* WHERE is_null($body.x) INTO $upstream",
        "is-null-body",
        "is_null($body.x)",
        Some("FROM /* WHERE $body.x = null INTO $upstream"),
    ),
    (
        "FROM /* WHERE NOT IS_NULL($body.x + 1) INTO $upstream",
        "is-null-body",
        "IS_NULL($body.x + 1)",
        Some("FROM /* WHERE NOT (($body.x + 1) = null) INTO $upstream"),
    ),
    (
        "FROM /* WHERE is_defined($body.x) and a = 'b' INTO $upstream",
        "is-defined-body",
        "is_defined($body.x)",
        Some("FROM /* WHERE ($body.x != null) and a = 'b' INTO $upstream"),
    ),
    (
        "FROM /* WHERE NOT $body.open = true INTO $upstream",
        "not-binds-tighter",
        "NOT",
        Some("FROM /* WHERE NOT ($body.open = true) INTO $upstream"),
    ),
    (
        "FROM /* WHERE a = 'x' and not is_bool(true) < false INTO $upstream",
        "not-binds-tighter",
        "not",
        Some("FROM /* WHERE a = 'x' and NOT (is_bool(true) < false) INTO $upstream"),
    ),
    (
        "FROM /messages/* INTO BrokeredEndpoint(\"/modules/m/inputs/i\")",
        "loop",
        "BrokeredEndpoint(\"/modules/m/inputs/i\")",
        Some(
            "FROM /messages/* WHERE ($connectionModuleId ?? '') != 'm' INTO BrokeredEndpoint(\"/modules/m/inputs/i\")",
        ),
    ),
    (
        "FROM /messages/modules/M/outputs/o WHERE a = 'x' INTO BrokeredEndpoint(\"/modules/m/inputs/i\")",
        "loop",
        "BrokeredEndpoint(\"/modules/m/inputs/i\")",
        Some(
            "FROM /messages/modules/M/outputs/o WHERE ($connectionModuleId ?? '') != 'm' AND (a = 'x') INTO \
             BrokeredEndpoint(\"/modules/m/inputs/i\")",
        ),
    ),
    (
        "FROM /* WHERE $contentTyp = 'x' INTO $upstream",
        "unknown-system-property",
        "$contentTyp",
        Some("FROM /* WHERE $contentType = 'x' INTO $upstream"),
    ),
    (
        "FROM /* WHERE {$correlationId} = 'x' INTO $upstream",
        "unknown-system-property",
        "$correlationId",
        Some("FROM /* WHERE {$cid} = 'x' INTO $upstream"),
    ),
    ("FROM /* WHERE $body = 'x' INTO $upstream", "unknown-system-property", "$body", None),
];

#[test]
fn each_trap_has_its_lint() {
    for (text, code, place, corrected) in SINGLE {
        let found = of(text);
        let codes: Vec<_> = found.iter().map(|lint| lint.code.name()).collect();
        assert_eq!(codes, [*code], "{text}: {found:#?}");
        assert_eq!(underlined(text, &found[0]), *place, "{text}");
        if let Some(corrected) = corrected {
            let suggestion = found[0].suggestion.as_ref().unwrap_or_else(|| panic!("{text}: no change"));
            let changed = suggestion.apply(text).expect("the same text");
            assert_eq!(changed, *corrected, "{text}");
            assert_eq!(of(&changed), [], "{changed}");
        }
    }
}

#[test]
fn every_code_is_tested_and_explained() {
    for code in LintCode::ALL {
        assert_eq!(LintCode::of_name(code.name()), Some(code));
        assert!(code.explanation().ends_with('.'), "{}", code.name());
        let elsewhere = [LintCode::Tie, LintCode::ShadowedSink];
        assert!(elsewhere.contains(&code) || SINGLE.iter().any(|(_, name, ..)| *name == code.name()));
    }
}

#[test]
fn sound_routes_have_no_lints() {
    for text in [
        "FROM /* INTO $upstream",
        "SELECT * FROM /messages WHERE a = 'x' /* a comment */ INTO $upstream",
        "FROM /messages INTO $upstream /* the end */",
        "FROM /messages/modules/sensor-1/outputs/out-2/* INTO $upstream",
        "FROM /messages/modules/a/* INTO BrokeredEndpoint('/modules/b/inputs/i')",
        "FROM /twinChangeNotifications/* INTO BrokeredEndpoint('modules/b/inputs/i/')",
        "FROM /* WHERE as_number(a) - 1 = 2 or true INTO $upstream",
        "FROM /* WHERE NOT (a = 'x') INTO $upstream",
        "FROM /* WHERE NOT is_null(a) AND (NOT is_bool(true)) = false INTO $upstream",
        "FROM /* WHERE is_defined(a) AND is_null(a) INTO $upstream",
        "FROM /* WHERE $body.x = null AND $body.y > 5 AND $iothub-interface-id = 'x' INTO $upstream",
        "FROM /* WHERE $tm = 'x' AND $CONTENTTYPE = 'y' AND $absolute-expiry-time = '' INTO $upstream",
        "FROM /* WHERE null INTO $upstream",
        "FROM /messages/* WHERE NOT is_defined($connectionModuleId) INTO BrokeredEndpoint('/modules/m/inputs/i')",
        "FROM /messages/* WHERE $connectionModuleId = 'n' AND $body.x = 1 INTO BrokeredEndpoint('/modules/m/inputs/i')",
    ] {
        assert_eq!(of(text), [], "{text}");
    }
}

fn together(routes: &[(&str, &str, u32, u32)]) -> Vec<(String, String, Vec<String>)> {
    let specs = routes.iter().map(|(name, text, priority, time_to_live_secs)| RouteSpec {
        name,
        text,
        priority: *priority,
        time_to_live_secs: *time_to_live_secs,
        upstream_target: None,
    });
    let found = lint(specs);
    found.into_iter().map(|lint| (lint.route, lint.code.name().to_owned(), lint.others)).collect()
}

fn one(route: &str, code: &str, others: &[&str]) -> (String, String, Vec<String>) {
    (route.to_owned(), code.to_owned(), others.iter().map(|&other| other.to_owned()).collect())
}

#[test]
fn ties_are_reported_once_for_each_route_that_loses() {
    let up = "FROM /messages/* INTO $upstream";
    let below = "FROM /messages/modules/m WHERE a = 'x' INTO $UPSTREAM";
    assert_eq!(
        together(&[("c", up, 3, 0), ("a", below, 3, 60), ("b", up, 3, 0), ("d", up, 4, 9)]),
        [
            one("c", "tie", &["a"]),
            one("b", "tie", &["a"]),
            // Their condition is true for all messages.
            one("d", "shadowed-sink", &["c"]),
        ]
    );
    assert_eq!(together(&[("a", up, 3, 5), ("b", up, 3, 5)]), []);
    let other = "FROM /messages/modules/n INTO $upstream";
    assert_eq!(together(&[("a", below, 3, 5), ("b", other, 3, 6)]), []);
    let elsewhere = "FROM /messages/modules/n INTO BrokeredEndpoint('/modules/x/inputs/i')";
    assert_eq!(together(&[("a", up, 3, 5), ("b", elsewhere, 3, 6)]), []);
}

#[test]
fn a_route_that_can_never_win_is_shadowed() {
    let wide = "FROM /* WHERE true INTO $upstream";
    let narrow = "FROM /messages/modules/m WHERE a = 'x' INTO $upstream";
    assert_eq!(together(&[("a", narrow, 5, 0), ("b", wide, 1, 0)]), [one("a", "shadowed-sink", &["b"])]);
    assert_eq!(together(&[("a", narrow, 1, 0), ("b", wide, 5, 0)]), []);
    assert_eq!(together(&[("a", narrow, 1, 0), ("b", wide, 5, 0)]), []);
    assert_eq!(together(&[("a", wide, 5, 0), ("b", narrow, 1, 0)]), []);
    let asks = "FROM /* WHERE a = 'x' INTO $upstream";
    assert_eq!(together(&[("a", narrow, 5, 0), ("b", asks, 1, 0)]), []);
}

#[test]
fn loops_over_modules_are_reported_once_with_their_routes() {
    let to = |from: &str, to: &str| {
        format!("FROM /messages/modules/{from}/* INTO BrokeredEndpoint('/modules/{to}/inputs/i')")
    };
    let found = |routes: &[(&str, String)]| {
        let routes: Vec<_> = routes.iter().map(|(name, text)| (*name, text.as_str(), 1, 0)).collect();
        together(&routes)
    };
    assert_eq!(found(&[("x", to("a", "b")), ("y", to("b", "a"))]), [one("x", "loop", &["y"])]);
    assert_eq!(
        found(&[
            ("z", to("c", "a")),
            ("x", to("a/outputs/o", "b")),
            ("y", to("b", "c")),
            ("w", to("d", "a"))
        ]),
        [one("z", "loop", &["x", "y"])]
    );
    assert_eq!(found(&[("x", to("a", "b")), ("y", to("b", "c"))]), []);
    // Module ids of sources match in any case.
    assert_eq!(found(&[("x", to("A", "b")), ("y", to("B", "a"))]), [one("x", "loop", &["y"])]);
    // A loop of its own, and one over another module.
    let own = "FROM /messages/* INTO BrokeredEndpoint('/modules/a/inputs/i')".to_owned();
    assert_eq!(found(&[("x", own), ("y", to("a", "b"))]), [one("x", "loop", &[]), one("x", "loop", &["y"])]);
    // A condition can break a loop.
    let devices = "FROM /messages/* WHERE NOT is_defined($connectionModuleId) INTO BrokeredEndpoint('/modules/a/inputs/i')";
    assert_eq!(found(&[("x", devices.to_owned()), ("y", to("a", "b"))]), []);
}

#[test]
fn many_routes_and_long_ones_take_no_long_time() {
    let names: Vec<String> = (0..1024).map(|number| format!("m{number}")).collect();
    let texts: Vec<String> = names
        .iter()
        .map(|name| {
            format!("FROM /messages/* WHERE $connectionModuleId != '{name}' INTO BrokeredEndpoint('/modules/{name}/inputs/i')")
        })
        .collect();
    let found = lint(names.iter().zip(&texts).map(|(name, text)| spec(name, text)));
    assert!(found.iter().all(|lint| lint.code == LintCode::Loop) && !found.is_empty());
    for piece in ["NOT $body.a = true and ", "a!='x' or ", "is_null($body.x) and ", "$contentTyp = '' and "] {
        let condition = piece.repeat(60_000 / piece.len());
        let text = format!("FROM /* WHERE {condition} true = true INTO $upstream");
        let found = lint([spec("r", &text)]);
        assert!(!found.is_empty() && found.len() <= edgehub_routing::LINTS_OF_ROUTE_MAX, "{piece}");
    }
}
