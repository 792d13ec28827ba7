//! Texts at and beyond the limits, and texts that are built to be slow.

use edgehub_routing::limits::{EXPRESSION_DEPTH_MAX, ROUTE_BYTES_MAX, ROUTES_MAX};
use edgehub_routing::{Category, Condition, MessageView, PropertyName, RouteSpec, RouteTable, Text, Truth};

struct Empty;

impl MessageView for Empty {
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

fn value(text: &str) -> Result<Truth, Category> {
    match Condition::compile(text) {
        Ok(condition) => Ok(condition.evaluate(&Empty)),
        Err(errors) => Err(errors[0].category),
    }
}

/// `count` times `open`, then `inner`, then `count` times `close`.
fn nested(open: &str, inner: &str, close: &str, count: usize) -> String {
    format!("{}{inner}{}", open.repeat(count), close.repeat(count))
}

/// The stack that threads of the standard library have.
fn on_small_stack(check: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(check).expect("a thread");
    thread.join().expect("the check holds");
}

#[test]
fn nesting_is_bounded_before_anything_recurses() {
    on_small_stack(|| {
        let most = EXPRESSION_DEPTH_MAX;
        assert_eq!(value(&nested("(", "true", ")", most)), Ok(Truth::True));
        assert_eq!(value(&nested("NOT ", "true", "", most)), Ok(Truth::True));
        assert_eq!(value(&nested("is_bool(", "true", ")", most)), Ok(Truth::True));
        assert_eq!(value(&nested("NOT (1 = 1 AND ", "true", ")", most / 2)), Ok(Truth::True));
        assert_eq!(value(&nested("- (1 + 2 * ", "1", ")", most / 2)), Ok(Truth::Undefined));
        assert_eq!(value(&nested("@ ", "true", "", most)), Err(Category::InvalidSymbol));
        assert_eq!(value(&nested("(", "true", "", most)), Err(Category::MissingParen));
        for (open, close) in [("(", ")"), ("NOT ", ""), ("is_bool(", ")"), ("@ ", ""), ("(", "")] {
            assert_eq!(value(&nested(open, "true", close, most + 1)), Err(Category::Limit), "{open}");
            let count = (ROUTE_BYTES_MAX - 4) / (open.len() + close.len());
            assert_eq!(value(&nested(open, "true", close, count)), Err(Category::Limit), "{open}");
        }
    });
}

#[test]
fn long_chains_need_no_depth() {
    on_small_stack(|| {
        for (item, operator, expected) in [
            ("true", " AND ", Truth::True),
            ("false", " OR ", Truth::False),
            ("true", " = ", Truth::True),
            ("undefined", " ?? ", Truth::Undefined),
            ("1 = 1", " AND ", Truth::True),
        ] {
            let count = (ROUTE_BYTES_MAX - 16) / (item.len() + operator.len());
            assert_eq!(value(&vec![item; count].join(operator)), Ok(expected), "{operator}");
        }
        let sum = format!("{} > 0", vec!["1"; 15_000].join(" + "));
        assert_eq!(value(&sum), Ok(Truth::True));
        let arguments = format!("length(concat({})) = 15000", vec!["'x'"; 15_000].join(","));
        assert_eq!(value(&arguments), Ok(Truth::True));
    });
}

#[test]
fn texts_that_are_built_to_be_slow_are_refused() {
    for piece in [
        ")",
        "(a))",
        "(a)) + ",
        "f(a)), ",
        "f(((a),",
        "(a,",
        "/*",
        "/* */ /",
        "'\\",
        "\"\\u",
        "@",
        "?? @",
        ",",
        "{",
        "a[",
        "- ",
        "'\n\\",
        "*/",
        "f((a)) = ",
    ] {
        assert!(value(&piece.repeat((ROUTE_BYTES_MAX - 8) / piece.len())).is_err(), "{piece}");
    }
}

#[test]
fn sizes_are_bounded() {
    let text = |width: usize| format!("'{}' = ''", "x".repeat(width - 7));
    assert_eq!(value(&text(ROUTE_BYTES_MAX)), Ok(Truth::False));
    assert_eq!(value(&text(ROUTE_BYTES_MAX + 1)), Err(Category::Limit));

    let names: Vec<String> = (0..=ROUTES_MAX).map(|number| number.to_string()).collect();
    let routes = names.iter().map(|name| RouteSpec {
        name,
        text: "FROM /* INTO $upstream",
        priority: 0,
        time_to_live_secs: 0,
        upstream_target: None,
    });
    let (table, errors) = RouteTable::compile(routes, "edge");
    assert_eq!((table.len(), errors.len()), (ROUTES_MAX, 1));
    assert_eq!(errors[0].diagnostics[0].category, Category::Limit);
}

#[test]
fn made_texts_are_bounded() {
    struct Large(String);
    impl MessageView for Large {
        fn property(&self, _: &PropertyName) -> Text<'_> {
            Text::Text(&self.0)
        }
        fn system_property(&self, _: &PropertyName) -> Text<'_> {
            Text::Undefined
        }
        fn body(&self) -> &[u8] {
            &[]
        }
    }
    let text = format!("is_defined(concat({}))", vec!["a"; 30_000].join(","));
    let condition = Condition::compile(&text).expect("compiles");
    assert_eq!(condition.evaluate(&Large("x".repeat(262_144))), Truth::False);
    assert_eq!(condition.evaluate(&Large("x".to_owned())), Truth::True);
}
