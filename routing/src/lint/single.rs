//! Owns the lints of one route that is looked at alone.

use super::{LINTS_OF_ROUTE_MAX, Lint, LintCode, Subject, repeated};
use crate::check::{Checked, Operation, Type};
use crate::diagnostic::{Span, Suggestion};
use crate::function::Function;
use crate::lexer::TokenKind;
use crate::message::SystemProperty;
use crate::route::Sink;
use crate::suggest::nearest;
use crate::syntax::{BinaryOperator, Node, NodeKind, SinkSyntax, Tree, source_comment};
use crate::text::{equal_names, strip_prefix};

/// The lints of `route`, in no particular order.
pub(super) fn lints(route: &Subject<'_>) -> Vec<Lint> {
    let mut found = Vec::new();
    found.extend(comment_swallow(route));
    found.extend(inner_wildcard(route));
    found.extend(dead_source(route));
    found.extend(sink_words(route));
    found.extend(trailing_text(route));
    if let Some((_, tree, checked)) = route.condition() {
        found.extend(constant_undefined(route, tree, checked));
        for (at, node) in tree.nodes.iter().enumerate() {
            if found.len() >= LINTS_OF_ROUTE_MAX {
                break;
            }
            found.extend(of_node(route, tree, checked, at, node));
        }
    }
    found
}

fn comment_swallow(route: &Subject<'_>) -> Option<Lint> {
    let text = route.spec.text;
    let comment = source_comment(&route.tokens, text)?;
    let inner = comment.of(text).strip_prefix("/*")?.strip_suffix("*/")?;
    let lint = |message: &str| route.lint(LintCode::CommentSwallow, comment, message);
    Some(match inner.rsplit_once("/*") {
        // The comment that was meant is inside of the one that the wildcard has opened.
        Some((swallowed, _)) => {
            lint("the /* of the source begins a comment: all of this is ignored, up to */")
                .with_hint(
                    "leave the wildcard out (a source includes everything below it), and the comment too",
                )
                .with_suggestion(route.suggestion(comment, swallowed.trim_end().to_owned()))
        }
        None => lint("a comment in the source: the /* is no wildcard here")
            .with_hint("put comments behind the sink's route, or leave them out")
            .with_suggestion(route.suggestion(comment, String::new())),
    })
}

fn trailing_text(route: &Subject<'_>) -> Option<Lint> {
    let text = route.spec.text;
    let sink = route.syntax.sink_span;
    let mut rest = route.tokens.iter().filter(|token| token.span.start >= sink.end);
    let first = rest.next()?;
    let end = rest.next_back().map_or(first.span.end, |last| last.span.end);
    let trailing = Span { start: first.span.start, end };
    let lint = |message: &str| route.lint(LintCode::TrailingText, trailing, message);
    let removed = || {
        let all = Span { start: sink.end, end: text.len() as u32 };
        route.suggestion(all, String::new())
    };
    if first.kind != TokenKind::Where {
        let message = if first.kind == TokenKind::Comma {
            "a second sink is ignored: only the first one gets messages"
        } else {
            "this text behind the sink is ignored"
        };
        return Some(lint(message).with_hint("write one route for each sink").with_suggestion(removed()));
    }
    let into =
        route.tokens.iter().rfind(|token| token.kind == TokenKind::Into && token.span.end <= sink.start)?;
    let moved = match &route.syntax.condition {
        Some(_) => removed(),
        None => {
            let own = Span { start: into.span.start, end: sink.end };
            let place = Span { start: own.start, end: trailing.end };
            route.suggestion(place, format!("{} {}", trailing.of(text), own.of(text)))
        }
    };
    let lint =
        lint("this WHERE stands behind the sink and is ignored: the route takes every message of its source");
    Some(lint.with_hint("write the condition before INTO").with_suggestion(moved))
}

fn inner_wildcard(route: &Subject<'_>) -> Option<Lint> {
    let pattern = route.syntax.pattern.trim_end_matches(['*', '/']);
    let kept = pattern.find('*')?;
    let source = route.syntax.source_span;
    let own = |span: Span| span.start >= source.start && span.end <= source.end;
    let holder = route
        .tokens
        .iter()
        .filter(|token| own(token.span))
        .find(|token| token.of(route.spec.text).contains('*'))?;
    let lint = route
        .lint(LintCode::InnerWildcard, holder.span, "this asterisk is no wildcard: only those at the end are")
        .with_hint(
            "end the source here, and select with $connectionModuleId or $outputName in the condition",
        );
    // The prefix up to the last slash, with a wildcard.
    let prefix =
        pattern.get(..kept).and_then(|before| before.rfind('/')).and_then(|slash| pattern.get(..=slash));
    let wider = format!("{}*", prefix.unwrap_or("/"));
    let segments: Vec<&str> = pattern.split('/').collect();
    let suggestion = match segments[..] {
        ["", messages, modules, "*"] | ["", messages, modules, "*", _]
            if equal_names(messages, "messages") && equal_names(modules, "modules") =>
        {
            route.suggestion(source, wider)
        }
        ["", messages, modules, "*", outputs, output]
            if equal_names(messages, "messages")
                && equal_names(modules, "modules")
                && equal_names(outputs, "outputs")
                && !output.contains(['*', '\'']) =>
        {
            with_output(route, &wider, output)
        }
        _ => None,
    };
    Some(lint.with_suggestion(suggestion))
}

/// The route with a wider source and the output in its condition.
fn with_output(route: &Subject<'_>, source: &str, output: &str) -> Option<Suggestion> {
    let text = route.spec.text;
    let own = route.syntax.source_span;
    match route.condition() {
        None => route.suggestion(own, format!("{source} WHERE $outputName = '{output}'")),
        Some((span, ..)) => {
            let place = Span { start: own.start, end: span.end };
            let replacement = format!("{source} WHERE $outputName = '{output}' AND ({})", span.of(text));
            route.suggestion(place, replacement)
        }
    }
}

fn dead_source(route: &Subject<'_>) -> Option<Lint> {
    const TOPS: [&str; 2] = ["messages", "twinChangeNotifications"];
    let segments: Vec<&str> = route.source_path.split('/').filter(|segment| !segment.is_empty()).collect();
    let is = |at: usize, word: &str| segments.get(at).is_some_and(|segment| equal_names(segment, word));
    let (wrong, known) = if segments.is_empty() || (segments.len() == 1 && (is(0, TOPS[0]) || is(0, TOPS[1])))
    {
        return None;
    } else if is(0, "twinChangeNotifications") {
        (1, &[][..])
    } else if !is(0, "messages") {
        (0, &TOPS[..])
    } else if !is(1, "modules") {
        (1, &["modules"][..])
    } else if segments.len() <= 3 || is(3, "outputs") {
        return None;
    } else {
        (3, &["outputs"][..])
    };
    let place = route.syntax.source_span;
    let lint = route.lint(
        LintCode::DeadSource,
        place,
        format!("no message comes from {}", repeated(&route.source_path)),
    );
    let own = segments.get(wrong).copied().unwrap_or_default();
    let corrected = nearest(own, known.iter().copied()).map(|known| {
        let mut corrected = segments.clone();
        corrected[wrong] = known;
        let wildcard = if route.syntax.pattern.ends_with('*') { "/*" } else { "" };
        format!("/{}{wildcard}", corrected.join("/"))
    });
    Some(match (corrected, wrong) {
        (Some(corrected), _) => lint
            .with_hint(format!("did you mean {corrected}?"))
            .with_suggestion(route.suggestion(place, corrected)),
        (None, 1) if is(0, "messages") => lint.with_hint(
            "for one device write /messages/* and WHERE $connectionDeviceId = '…', for a module /messages/modules/…/*",
        ),
        (None, _) => lint.with_hint("sources begin with /messages, /messages/modules/… or /twinChangeNotifications"),
    })
}

fn sink_words(route: &Subject<'_>) -> Option<Lint> {
    let (SinkSyntax::Function(_, address), Sink::ModuleInput { module, input }) =
        (&route.syntax.sink, &route.sink)
    else {
        return None;
    };
    let own = address.of(route.spec.text).trim();
    let own = own.strip_prefix('/').unwrap_or(own);
    let words = own.split('/').step_by(2).take(2);
    if words.eq(["modules", "inputs"]) {
        return None;
    }
    let message = format!(
        "this is input {:?} of module {:?}; the other words are not looked at",
        repeated(input),
        repeated(module)
    );
    let lint = route
        .lint(LintCode::SinkWords, *address, message)
        .with_hint("write /modules/{module}/inputs/{input}");
    Some(lint.with_suggestion(route.suggestion(*address, format!("/modules/{module}/inputs/{input}"))))
}

fn constant_undefined(route: &Subject<'_>, tree: &Tree, checked: &Checked) -> Option<Lint> {
    let (node, root) = (tree.nodes.last()?, checked.nodes.last()?);
    let own = node.extent.of(route.spec.text);
    let (kind, hint) = match (root.result, &root.operation) {
        (Type::Text, Operation::Property(name) | Operation::PropertyOrSystem { property: name, .. }) => (
            "a text",
            format!(
                "a property is a text: write {0} = 'true', or is_defined({0}), whichever is meant",
                repeated(name)
            ),
        ),
        (Type::Text, _) => ("a text", "compare it with a text".to_owned()),
        (Type::Number, _) => ("a number", "compare it with a number".to_owned()),
        (Type::Undefined, _) => ("undefined", "write a comparison".to_owned()),
        (Type::Bool | Type::Null | Type::Body, _) => return None,
    };
    let lint = route.lint(
        LintCode::ConstantUndefined,
        node.extent,
        format!("the condition is {kind}, so the route never sends anything"),
    );
    let literal = ["true", "false"].into_iter().find(|literal| own.eq_ignore_ascii_case(literal));
    Some(match literal {
        Some(literal) => lint
            .with_hint(format!("{own} is the name of a property; the literal is {literal}"))
            .with_suggestion(route.suggestion(node.extent, literal.to_owned())),
        None => lint.with_hint(hint),
    })
}

fn of_node(route: &Subject<'_>, tree: &Tree, checked: &Checked, at: usize, node: &Node) -> Option<Lint> {
    match node.kind {
        NodeKind::Property => glued_operator(route, node),
        NodeKind::System { .. } if strip_prefix(node.span.of(route.spec.text), "$body.").is_some() => {
            glued_operator(route, node)
        }
        NodeKind::System { .. } => unknown_system_property(route, node),
        NodeKind::Binary(operator) => mixed_compare(route, checked, at, node, operator)
            .or_else(|| not_binds_tighter(route, tree, at, node)),
        NodeKind::Call { .. } => of_body_test(route, tree, checked, at, node),
        _ => None,
    }
}

/// Operators that the lexer takes for a part of a name, as they are to be written.
const GLUED: [(&str, &str); 6] =
    [("||", "||"), ("&&", "AND"), ("+", "+"), ("*", "*"), ("%", "%"), ("!", "NOT")];

fn glued_operator(route: &Subject<'_>, node: &Node) -> Option<Lint> {
    let text = route.spec.text;
    let name = node.span.of(text);
    let minus = name
        .rsplit_once('-')
        .filter(|(_, after)| !after.is_empty() && after.bytes().all(|byte| byte.is_ascii_digit()));
    if minus.is_none() && !name.contains('\'') && !GLUED.iter().any(|(glued, _)| name.contains(glued)) {
        return None;
    }
    let message = format!("this is one name, {:?}: operators need spaces around them", repeated(name));
    let lint = route.lint(LintCode::GluedOperator, node.span, message);
    if name.contains('\'') {
        let lint = lint.with_hint(
            "a quote in a text is written \\', and a text stands apart from what is before and after it",
        );
        let inner = name.strip_prefix('\'').and_then(|name| name.strip_suffix('\''));
        let escaped = inner.filter(|inner| !inner.replace("''", "").contains('\''));
        let escaped = escaped.map(|inner| format!("'{}'", inner.replace("''", "\\'")));
        return Some(lint.with_suggestion(escaped.and_then(|escaped| route.suggestion(node.span, escaped))));
    }
    let equal = text.get(node.span.end as usize..).is_some_and(|rest| rest.starts_with('='));
    let (name, place, tail) = match name.strip_suffix('!') {
        Some(name) if equal => (name, Span { end: node.span.end + 1, ..node.span }, " != "),
        _ => (name, node.span, ""),
    };
    let mut spaced = name.to_owned();
    if let Some((before, after)) = minus {
        spaced = format!("{before} - {after}");
    }
    for (glued, written) in GLUED {
        spaced = spaced.replace(glued, &format!(" {written} "));
    }
    let spaced = spaced.split_whitespace().collect::<Vec<_>>().join(" ");
    Some(
        lint.with_suggestion(route.suggestion(place, format!("{spaced}{tail}")))
            .with_hint("write spaces around it"),
    )
}

fn unknown_system_property(route: &Subject<'_>, node: &Node) -> Option<Lint> {
    const OTHER_NAMES: [(&str, &str); 4] = [
        ("correlationId", "cid"),
        ("deviceId", "connectionDeviceId"),
        ("moduleId", "connectionModuleId"),
        ("correlation-id", "cid"),
    ];
    let name = node.span.of(route.spec.text).strip_prefix('$')?;
    if SystemProperty::of_name(name).is_some() {
        return None;
    }
    let lint = |hint: String| {
        let message = format!("there is no system property {:?}: the value is undefined", repeated(name));
        route.lint(LintCode::UnknownSystemProperty, node.span, message).with_hint(hint)
    };
    if equal_names(name, "body") {
        return Some(lint("a value of the body is $body.member".to_owned()));
    }
    let other = OTHER_NAMES.iter().find(|(other, _)| equal_names(other, name)).map(|(_, known)| *known);
    let known =
        other.or_else(|| nearest(name, SystemProperty::ALL.into_iter().map(SystemProperty::as_str)))?;
    let suggestion = route.suggestion(node.span, format!("${known}"));
    Some(lint(format!("did you mean ${known}?")).with_suggestion(suggestion))
}

fn mixed_compare(
    route: &Subject<'_>,
    checked: &Checked,
    at: usize,
    node: &Node,
    operator: BinaryOperator,
) -> Option<Lint> {
    use BinaryOperator::{Greater, GreaterOrEqual, Less, LessOrEqual};
    if !matches!(operator, Less | LessOrEqual | Greater | GreaterOrEqual) {
        return None;
    }
    let right = checked.nodes.get(at.checked_sub(1)?)?;
    let left = checked.nodes.get(right.first.checked_sub(1)?)?;
    let other = match (left.result, right.result) {
        (Type::Body, other @ (Type::Bool | Type::Null)) | (other @ (Type::Bool | Type::Null), Type::Body) => {
            other
        }
        _ => return None,
    };
    let kind = if other == Type::Null { "null" } else { "a truth value" };
    let message = format!(
        "a body value that is not {kind} is ordered by its kind only: boolean < number < text < null"
    );
    Some(route.lint(LintCode::MixedCompare, node.span, message).with_hint("compare with = or !="))
}

fn not_binds_tighter(route: &Subject<'_>, tree: &Tree, at: usize, node: &Node) -> Option<Lint> {
    let right = tree.nodes.get(at.checked_sub(1)?)?;
    let left = right.first.checked_sub(1)?;
    let not = tree.nodes.get(left).filter(|not| node.negates_only_left_of_comparison(not))?;
    let operand = tree.nodes.get(left.checked_sub(1)?)?;
    let text = route.spec.text;
    let meant = Span { start: not.span.end, end: node.extent.end };
    let message = format!("this means (NOT {}) {} …", repeated(operand.extent.of(text)), node.span.of(text));
    let suggestion = route.suggestion(node.extent, format!("NOT ({})", meant.of(text).trim_start()));
    let lint = route.lint(LintCode::NotBindsTighter, not.span, message);
    Some(lint.with_hint("put the comparison in parentheses").with_suggestion(suggestion))
}

fn of_body_test(route: &Subject<'_>, tree: &Tree, checked: &Checked, at: usize, node: &Node) -> Option<Lint> {
    let argument = at.checked_sub(1)?;
    if checked.nodes.get(argument)?.result != Type::Body {
        return None;
    }
    let text = route.spec.text;
    let own = tree.nodes.get(argument)?.extent.of(text);
    let (code, message, hint, operator) = match checked.nodes.get(at)?.operation {
        Operation::Call(Function::IsNull, 1) => (
            LintCode::IsNullBody,
            "is_null of a body value is true for every value that is there, null or not, and false where nothing is",
            "compare with null, which is true for null and for a missing member",
            "=",
        ),
        Operation::Call(Function::IsDefined, 1) => (
            LintCode::IsDefinedBody,
            "is_defined of a body value is also true where nothing is, and false for an object, an array or a date",
            "compare with null",
            "!=",
        ),
        _ => return None,
    };
    // Parentheses keep the meaning whatever stands around.
    let whole = at + 1 == tree.nodes.len();
    let simple = matches!(tree.nodes.get(argument)?.kind, NodeKind::System { .. });
    let own = if simple { own.to_owned() } else { format!("({own})") };
    let comparison = format!("{own} {operator} null");
    let replacement = if whole { comparison } else { format!("({comparison})") };
    let lint = route.lint(code, node.extent, message).with_hint(hint);
    Some(lint.with_suggestion(route.suggestion(node.extent, replacement)))
}
