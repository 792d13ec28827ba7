//! Owns the lints: what compiles, but is likely not to mean what its author wants.
//!
//! A lint never changes what a route does; see [`lint`]. Lints that need one route only are found in `single`, those
//! that compare routes in `between`, those that follow messages from route to route in `loops`.

mod between;
mod loops;
mod single;

use std::fmt;

use crate::check::{Checked, check};
use crate::diagnostic::{Span, Suggestion, TextRange};
use crate::lexer::{Token, tokens};
use crate::limits::ROUTES_MAX;
use crate::route::{Sink, resolve_sink};
use crate::source::{FoldedPath, pattern_path};
use crate::syntax::{RouteSyntax, Tree, parse_route};
use crate::table::RouteSpec;

/// Lints of one route; what is beyond is not reported.
pub const LINTS_OF_ROUTE_MAX: usize = 32;

/// Bytes of a route up to which changes are proposed: each is tried out before.
const SUGGESTED_BYTES_MAX: usize = 8 * 1024;

/// Characters of a part of the route that a message repeats.
const REPEATED_CHARS_MAX: usize = 40;

/// The kinds of lints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LintCode {
    /// An operator without spaces around it is part of a name.
    GluedOperator,
    /// A comment begins in the source: the wildcard `/*` has opened it.
    CommentSwallow,
    /// Text after the sink, which is ignored.
    TrailingText,
    /// An asterisk that is not at the end of the source is no wildcard.
    InnerWildcard,
    /// No message comes from this source.
    DeadSource,
    /// The address of the sink does not say `modules` and `inputs`.
    SinkWords,
    /// The condition is no truth value, so it is never true.
    ConstantUndefined,
    /// A body value is ordered against a truth value or null: only their kinds count.
    MixedCompare,
    /// `is_null` of a body value is true for almost everything.
    IsNullBody,
    /// `is_defined` of a body value is true for a missing member.
    IsDefinedBody,
    /// Two routes with different times to live compete for a sink on equal terms.
    Tie,
    /// What a module sends may come back to it.
    Loop,
    /// Another route always wins the sink.
    ShadowedSink,
    /// `NOT a = b` means `(NOT a) = b`.
    NotBindsTighter,
    /// A name with `$` that is almost the name of a system property.
    UnknownSystemProperty,
}

impl LintCode {
    /// All of them.
    pub const ALL: [LintCode; 15] = [
        LintCode::GluedOperator,
        LintCode::CommentSwallow,
        LintCode::TrailingText,
        LintCode::InnerWildcard,
        LintCode::DeadSource,
        LintCode::SinkWords,
        LintCode::ConstantUndefined,
        LintCode::MixedCompare,
        LintCode::IsNullBody,
        LintCode::IsDefinedBody,
        LintCode::Tie,
        LintCode::Loop,
        LintCode::ShadowedSink,
        LintCode::NotBindsTighter,
        LintCode::UnknownSystemProperty,
    ];

    /// The code under which the lint is reported; it stays the same from release to release.
    pub fn name(self) -> &'static str {
        match self {
            LintCode::GluedOperator => "glued-operator",
            LintCode::CommentSwallow => "comment-swallow",
            LintCode::TrailingText => "trailing-text",
            LintCode::InnerWildcard => "inner-wildcard",
            LintCode::DeadSource => "dead-source",
            LintCode::SinkWords => "sink-words",
            LintCode::ConstantUndefined => "constant-undefined",
            LintCode::MixedCompare => "mixed-compare",
            LintCode::IsNullBody => "is-null-body",
            LintCode::IsDefinedBody => "is-defined-body",
            LintCode::Tie => "tie",
            LintCode::Loop => "loop",
            LintCode::ShadowedSink => "shadowed-sink",
            LintCode::NotBindsTighter => "not-binds-tighter",
            LintCode::UnknownSystemProperty => "unknown-system-property",
        }
    }

    /// What the language does there, in one or two sentences.
    pub fn explanation(self) -> &'static str {
        match self {
            LintCode::GluedOperator => {
                "Names may contain + - * % ! ' & and |, so an operator needs spaces around it: a!='x' asks for the \
                 property a!."
            }
            LintCode::CommentSwallow => {
                "/* begins a comment, also at the end of a source. If */ stands anywhere later, all between is \
                 ignored, a WHERE too."
            }
            LintCode::TrailingText => {
                "What stands behind the sink is ignored: a WHERE there filters nothing, a second sink gets nothing."
            }
            LintCode::InnerWildcard => {
                "Only asterisks at the end of a source are wildcards. Elsewhere they are letters of a name."
            }
            LintCode::DeadSource => {
                "Messages come from /messages, /messages/modules/{module}, /messages/modules/{module}/outputs/{output} \
                 and /twinChangeNotifications. The device is no part of it."
            }
            LintCode::SinkWords => {
                "The first and the third part of a sink's address are not looked at; by convention they are modules \
                 and inputs."
            }
            LintCode::ConstantUndefined => {
                "Only a condition that is a truth value can be true. A text or a number alone never is."
            }
            LintCode::MixedCompare => {
                "Body values of different kinds are ordered by kind only: boolean < number < text < null."
            }
            LintCode::IsNullBody => {
                "is_null of a body value is true for every value that is there, and false for a missing member. \
                 `= null` is true for null and for a missing member."
            }
            LintCode::IsDefinedBody => {
                "A missing member of the body counts as null, which is defined; objects, arrays and texts that look \
                 like dates are undefined."
            }
            LintCode::Tie => {
                "Of two routes with the same sink and priority, the one whose name sorts first gives the time to live."
            }
            LintCode::Loop => {
                "What a module sends is matched by a route that leads back to it, so messages may go round without end."
            }
            LintCode::ShadowedSink => {
                "A sink gets a message once, by the route with the smallest priority number; this route is never it."
            }
            LintCode::NotBindsTighter => {
                "NOT binds tighter than every operator between two values: NOT a = b is (NOT a) = b."
            }
            LintCode::UnknownSystemProperty => {
                "A name with $ that no message has is undefined, and no error."
            }
        }
    }

    /// The lint of that name.
    pub fn of_name(name: &str) -> Option<LintCode> {
        LintCode::ALL.into_iter().find(|code| code.name() == name)
    }
}

/// A trap that a route has stepped into.
#[derive(Clone, Debug, PartialEq)]
pub struct Lint {
    /// Which.
    pub code: LintCode,
    /// Name of the route.
    pub route: String,
    /// What was found, in words.
    pub message: String,
    /// Where, counted from the first character of the route.
    pub in_route: Option<TextRange>,
    /// What to write instead, in words.
    pub hint: Option<String>,
    /// The same as a change of the text, where one is certain to compile.
    pub suggestion: Option<Suggestion>,
    /// Names of the other routes that are concerned: of a loop in the order of the messages' way.
    pub others: Vec<String>,
}

impl fmt::Display for Lint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.code.name())?;
        if let Some(range) = self.in_route {
            write!(formatter, " at line {} column {}", range.line, range.column)?;
        }
        write!(formatter, ": {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(formatter, " ({hint})")?;
        }
        Ok(())
    }
}

/// Looks for the traps of the language in routes, each alone and all together. Routes that do not compile are passed
/// over: [`RouteTable::compile`](crate::RouteTable::compile) says what is wrong with them. The result is in the order of
/// the routes, and within a route in the order of its text.
///
/// At most [`ROUTES_MAX`] routes are looked at, and at most [`LINTS_OF_ROUTE_MAX`] lints of one route reported.
///
/// ```
/// use edgehub_routing::{DEFAULT_PRIORITY, LintCode, RouteSpec, lint};
///
/// let text = "FROM /messages/* INTO $upstream WHERE level = 'hot'";
/// let (priority, time_to_live_secs) = (DEFAULT_PRIORITY, 0);
/// let lints = lint([RouteSpec { name: "up", text, priority, time_to_live_secs, upstream_target: None }]);
/// assert_eq!(lints[0].code, LintCode::TrailingText);
/// let corrected = lints[0].suggestion.as_ref().and_then(|suggestion| suggestion.apply(text));
/// assert_eq!(corrected.as_deref(), Some("FROM /messages/* WHERE level = 'hot' INTO $upstream"));
/// ```
pub fn lint<'a>(routes: impl IntoIterator<Item = RouteSpec<'a>>) -> Vec<Lint> {
    let routes: Vec<Subject<'_>> = routes.into_iter().take(ROUTES_MAX).filter_map(Subject::new).collect();
    let mut found: Vec<Vec<Lint>> = routes.iter().map(single::lints).collect();
    for (route, lint) in between::lints(&routes).into_iter().chain(loops::lints(&routes)) {
        if let Some(own) = found.get_mut(route) {
            own.push(lint);
        }
    }
    for own in &mut found {
        own.sort_by_key(|lint| lint.in_route.map(|range| (range.line, range.column)));
        own.truncate(LINTS_OF_ROUTE_MAX);
    }
    found.into_iter().flatten().collect()
}

/// A route that compiles, in all its forms.
struct Subject<'a> {
    spec: RouteSpec<'a>,
    tokens: Vec<Token>,
    syntax: RouteSyntax,
    source_path: String,
    source: FoldedPath,
    sink: Sink,
    /// The types of the condition, if there is one.
    checked: Option<Checked>,
}

impl<'a> Subject<'a> {
    fn new(spec: RouteSpec<'a>) -> Option<Subject<'a>> {
        let syntax = parse_route(spec.text).ok()?;
        let sink = resolve_sink(spec.text, &syntax).ok()?.at(spec.upstream_target);
        let checked = match &syntax.condition {
            Some((_, tree)) => Some(check(spec.text, tree).ok()?),
            None => None,
        };
        let source_path = pattern_path(&syntax.pattern);
        let source = FoldedPath::new(&source_path);
        Some(Subject { tokens: tokens(spec.text), spec, syntax, source_path, source, sink, checked })
    }

    /// The condition's tree with its types.
    fn condition(&self) -> Option<(Span, &Tree, &Checked)> {
        let (span, tree) = self.syntax.condition.as_ref()?;
        Some((*span, tree, self.checked.as_ref()?))
    }

    fn lint(&self, code: LintCode, place: Span, message: impl Into<String>) -> Lint {
        Lint {
            code,
            route: self.spec.name.to_owned(),
            message: message.into(),
            in_route: Some(TextRange::of(self.spec.text, place)),
            hint: None,
            suggestion: None,
            others: Vec::new(),
        }
    }

    /// A change, if the route compiles with it.
    fn suggestion(&self, place: Span, replacement: String) -> Option<Suggestion> {
        if self.spec.text.len() > SUGGESTED_BYTES_MAX {
            return None;
        }
        let suggestion = Suggestion::new(self.spec.text, place, replacement);
        let text = suggestion.apply(self.spec.text)?;
        Subject::new(RouteSpec { text: &text, ..self.spec })?;
        Some(suggestion)
    }

    /// A change that adds a condition to those that are there, if the route compiles with it.
    fn further_condition(&self, condition: &str) -> Option<Suggestion> {
        match self.condition() {
            None => {
                let after = self.syntax.source_span.end;
                let end = Span { start: after, end: after };
                self.suggestion(end, format!(" WHERE {condition}"))
            }
            Some((span, ..)) => {
                let own = span.of(self.spec.text);
                self.suggestion(span, format!("{condition} AND ({own})"))
            }
        }
    }
}

impl Lint {
    fn with_hint(mut self, hint: impl Into<String>) -> Lint {
        self.hint = Some(hint.into());
        self
    }

    fn with_suggestion(mut self, suggestion: Option<Suggestion>) -> Lint {
        self.suggestion = suggestion;
        self
    }

    fn with_others(mut self, others: impl IntoIterator<Item = String>) -> Lint {
        self.others = others.into_iter().collect();
        self
    }
}

/// A part of a route as a message repeats it.
fn repeated(part: &str) -> String {
    match part.char_indices().nth(REPEATED_CHARS_MAX) {
        Some((end, _)) => format!("{}…", part.get(..end).unwrap_or_default()),
        None => part.to_owned(),
    }
}
