//! What errors propose: each change, and that the text with it compiles.

use edgehub_routing::{Diagnostic, RouteSpec, RouteTable};

fn errors(text: &str) -> Vec<Diagnostic> {
    let spec = RouteSpec { name: "r", text, priority: 0, time_to_live_secs: 0, upstream_target: None };
    let (_, mut errors) = RouteTable::compile([spec], "edge");
    errors.pop().map(|error| error.diagnostics).unwrap_or_default()
}

#[test]
fn likely_slips_are_corrected() {
    for (text, corrected) in [
        ("FORM /messages/* INTO $upstream", "FROM /messages/* INTO $upstream"),
        ("SELCT * FROM /messages/* INTO $upstream", "SELECT * FROM /messages/* INTO $upstream"),
        ("FROM /messages/* WERE a = 'x' INTO $upstream", "FROM /messages/* WHERE a = 'x' INTO $upstream"),
        ("FROM /messages/* WHERE a = 'x' INOT $upstream", "FROM /messages/* WHERE a = 'x' INTO $upstream"),
        ("FROM /messages/* INT $upstream", "FROM /messages/* INTO $upstream"),
        (
            "FROM /* WHERE a = 'x' ADN b = 'y' INTO $upstream",
            "FROM /* WHERE a = 'x' AND b = 'y' INTO $upstream",
        ),
        (
            "FROM /* WHERE a = 'x' && b = 'y' INTO $upstream",
            "FROM /* WHERE a = 'x' AND b = 'y' INTO $upstream",
        ),
        ("FROM /* WHERE a == 'x' INTO $upstream", "FROM /* WHERE a = 'x' INTO $upstream"),
        (
            "FROM /* WHERE starts_wiht(a, 'x') INTO $upstream",
            "FROM /* WHERE starts_with(a, 'x') INTO $upstream",
        ),
        ("FROM /* WHERE level > 5 INTO $upstream", "FROM /* WHERE as_number(level) > 5 INTO $upstream"),
        (
            "FROM /* WHERE 5 <= (a || b) INTO $upstream",
            "FROM /* WHERE 5 <= (as_number(a || b)) INTO $upstream",
        ),
        (
            "FROM /* WHERE true and $body.open INTO $upstream",
            "FROM /* WHERE true and $body.open = true INTO $upstream",
        ),
        (
            "FROM /* WHERE NOT level = 'hot' INTO $upstream",
            "FROM /* WHERE NOT (level = 'hot') INTO $upstream",
        ),
        (
            "FROM /* WHERE true or not a < b INTO $upstream",
            "FROM /* WHERE true or NOT (a < b) INTO $upstream",
        ),
        ("FROM /messages/* INTO $upstraem", "FROM /messages/* INTO $upstream"),
        ("FROM /messages/* INTO upstream", "FROM /messages/* INTO $upstream"),
        (
            "FROM /messages/* INTO BrokerEndpoint('/modules/m/inputs/i')",
            "FROM /messages/* INTO BrokeredEndpoint('/modules/m/inputs/i')",
        ),
        (
            "FROM /messages/* INTO BrokeredEndpoint(/modules/m/inputs/i)",
            "FROM /messages/* INTO BrokeredEndpoint(\"/modules/m/inputs/i\")",
        ),
    ] {
        let found = errors(text);
        let suggestion = found.first().and_then(|first| first.suggestion.as_ref());
        let suggestion = suggestion.unwrap_or_else(|| panic!("{text}: {found:?}"));
        assert_eq!(suggestion.apply(text).as_deref(), Some(corrected), "{text}");
        assert_eq!(errors(corrected), [], "{corrected}");
    }
}

#[test]
fn hints_name_what_is_far_from_the_place() {
    let hint = |text: &str| errors(text).remove(0).hint.unwrap_or_default();
    assert_eq!(hint("FROM /* WHERE a = 'x INTO $upstream"), "the quote at line 1 column 19 is not closed");
    assert_eq!(
        hint("FROM /* WHERE a = 'x' /* c */ INTO $upstream /* d */"),
        "the /* at line 1 column 6 begins a comment"
    );
    assert_eq!(hint("FROM /messages/* WHERE INTO $upstream"), "expected an expression");
}

#[test]
fn nothing_is_proposed_for_what_is_no_slip() {
    for text in
        ["FROM /* WHERE frequency(a) INTO $upstream", "FROM /* INTO $downstream", "nonsense", "FROM /* WHERE"]
    {
        assert!(errors(text)[0].suggestion.is_none(), "{text}");
    }
}

#[test]
fn all_errors_of_a_condition_are_reported() {
    let categories: Vec<_> = errors("FROM /* WHERE lenght(a) = 1 and b = 5 and $body. = 'x' INTO $upstream")
        .iter()
        .map(|error| error.category.name())
        .collect();
    assert_eq!(categories, ["unknown-function", "operand", "operand", "body-path"]);
}
