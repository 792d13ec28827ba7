//! Owns the words for a value that is undefined, or defined against expectation.

use std::fmt;

use super::leaves::MessageLeaves;
use crate::check::{CheckedNode, Operation, Type};
use crate::function::Function;
use crate::message::MessageView;
use crate::syntax::BinaryOperator;
use crate::walker::Plain;

/// Characters of a part of the condition, or of a value, that a reason repeats.
const REPEATED_CHARS_MAX: usize = 60;

/// Why a part of a condition has the value that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The message has no such application property.
    PropertyAbsent,
    /// The message has no such system property.
    SystemPropertyAbsent {
        /// Whether the hub knows a system property of that name at all.
        known: bool,
    },
    /// The message has no content type.
    ContentTypeAbsent,
    /// The content type is another.
    ContentTypeOther(String),
    /// The message has no content encoding.
    ContentEncodingAbsent,
    /// The content encoding is another.
    ContentEncodingOther(String),
    /// The body is no JSON object; with what a parser says.
    BodyUnreadable(Option<String>),
    /// The path compiles but cannot be followed in any body.
    PathWithoutMeaning,
    /// Nothing stands at the path; with where the way ends.
    PathNotFound(Option<String>),
    /// What stands at the path is no boolean, number, text or null.
    NotScalar(&'static str),
    /// The text at the path looks like a date.
    LooksLikeDate,
    /// The literal `undefined`, or a number that is none.
    UndefinedLiteral,
    /// A part that is needed is undefined.
    OperandUndefined(String),
    /// A part that is needed is a property without value.
    OperandNull(String),
    /// A part has another kind than the operator needs.
    OtherKind(String),
    /// A text is no number.
    TextNoNumber(String),
    /// The result of the calculation is no number.
    NoNumber,
    /// The places that are asked for lie outside of the text.
    OutsideOfText,
    /// The condition makes more text than it may.
    TooMuchText,
    /// Values of different kinds were ordered by their kinds.
    OrderedByKind(String),
    /// `is_null` of a body value, or `is_defined` of one, says something else than it seems to.
    BodyTest(&'static str),
    /// The whole condition is no truth value.
    NoTruthValue,
}

impl Reason {
    /// The code under which the reason is reported; it stays the same from release to release.
    pub fn code(&self) -> &'static str {
        match self {
            Reason::PropertyAbsent => "property-absent",
            Reason::SystemPropertyAbsent { .. } => "system-property-absent",
            Reason::ContentTypeAbsent => "content-type-absent",
            Reason::ContentTypeOther(_) => "content-type-not-json",
            Reason::ContentEncodingAbsent => "content-encoding-absent",
            Reason::ContentEncodingOther(_) => "content-encoding-not-supported",
            Reason::BodyUnreadable(_) => "body-unreadable",
            Reason::PathWithoutMeaning => "path-without-meaning",
            Reason::PathNotFound(_) => "path-not-found",
            Reason::NotScalar(_) => "not-scalar",
            Reason::LooksLikeDate => "looks-like-date",
            Reason::UndefinedLiteral => "undefined-literal",
            Reason::OperandUndefined(_) => "operand-undefined",
            Reason::OperandNull(_) => "operand-null",
            Reason::OtherKind(_) => "type-mismatch",
            Reason::TextNoNumber(_) => "text-no-number",
            Reason::NoNumber => "no-number",
            Reason::OutsideOfText => "outside-of-text",
            Reason::TooMuchText => "too-much-text",
            Reason::OrderedByKind(_) => "ordered-by-kind",
            Reason::BodyTest(_) => "body-test",
            Reason::NoTruthValue => "no-truth-value",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::PropertyAbsent => write!(formatter, "the message has no such property"),
            Reason::SystemPropertyAbsent { known: true } => {
                write!(formatter, "the message has no such system property")
            }
            Reason::SystemPropertyAbsent { known: false } => {
                write!(
                    formatter,
                    "the message has no such property, and there is no system property of that name"
                )
            }
            Reason::ContentTypeAbsent => {
                write!(formatter, "the message has no content type; bodies are read only as application/json")
            }
            Reason::ContentTypeOther(given) => {
                write!(formatter, "the content type is {}, not exactly application/json", repeated(given))
            }
            Reason::ContentEncodingAbsent => {
                write!(formatter, "the message has no content encoding; it must be utf-8, utf-16 or utf-32")
            }
            Reason::ContentEncodingOther(given) => {
                write!(formatter, "the content encoding is {}, not utf-8, utf-16 or utf-32", repeated(given))
            }
            Reason::BodyUnreadable(Some(detail)) => write!(formatter, "the body is no JSON object: {detail}"),
            Reason::BodyUnreadable(None) => {
                write!(formatter, "the body is no JSON object, or nested too deep")
            }
            Reason::PathWithoutMeaning => write!(formatter, "this path cannot be followed in any body"),
            Reason::PathNotFound(Some(detail)) => {
                write!(formatter, "nothing stands at this path, which counts as null: {detail}")
            }
            Reason::PathNotFound(None) => {
                write!(formatter, "nothing stands at this path, which counts as null")
            }
            Reason::NotScalar(found) => write!(formatter, "at this path stands {found}"),
            Reason::LooksLikeDate => write!(formatter, "the text at this path looks like a date"),
            Reason::UndefinedLiteral => write!(formatter, "it is written so"),
            Reason::OperandUndefined(part) => write!(formatter, "{} is undefined", repeated(part)),
            Reason::OperandNull(part) => write!(formatter, "{} is a property without value", repeated(part)),
            Reason::OtherKind(text) | Reason::OrderedByKind(text) => write!(formatter, "{text}"),
            Reason::TextNoNumber(text) => write!(formatter, "{:?} is no number", repeated(text)),
            Reason::NoNumber => write!(formatter, "the result is no number"),
            Reason::OutsideOfText => write!(formatter, "start or length lie outside of the text"),
            Reason::TooMuchText => write!(formatter, "the condition makes more text than it may"),
            Reason::BodyTest(text) => write!(formatter, "{text}"),
            Reason::NoTruthValue => write!(formatter, "the condition is no truth value, so it is undefined"),
        }
    }
}

/// An operand of a node.
pub(super) struct Operand<'a> {
    /// As the condition writes it.
    pub(super) text: &'a str,
    pub(super) value: &'a Plain,
    pub(super) kind: Type,
}

impl Operand<'_> {
    fn is_undefined(&self) -> bool {
        match self.value {
            Plain::Undefined => true,
            Plain::Number(number) => number.is_nan() && self.kind == Type::Number,
            _ => false,
        }
    }
}

/// Why the node has its value; none if there is nothing to say about it.
pub(super) fn of_node<M: MessageView + ?Sized>(
    node: &CheckedNode,
    value: &Plain,
    operands: &[Operand<'_>],
    leaves: &mut MessageLeaves<'_, M>,
) -> Option<Reason> {
    let undefined = match value {
        Plain::Undefined => true,
        Plain::Number(number) => number.is_nan() && node.result == Type::Number,
        _ => false,
    };
    match &node.operation {
        Operation::Property(_) if undefined => Some(Reason::PropertyAbsent),
        Operation::System(name) | Operation::PropertyOrSystem { system: name, .. } if undefined => {
            Some(leaves.of_system(name))
        }
        Operation::Body { path, .. } if undefined || *value == (Plain::Null { absent: true }) => {
            leaves.of_body(path)
        }
        Operation::Undefined => Some(Reason::UndefinedLiteral),
        Operation::Binary(operator) if undefined => of_binary(*operator, operands),
        Operation::Binary(operator) => by_kind(*operator, operands),
        Operation::Call(function, _) if undefined => of_call(*function, operands),
        Operation::Call(function, _) => of_test(*function, operands),
        Operation::Negate | Operation::Not if undefined => Some(match operands {
            [only] if !only.is_undefined() => Reason::OtherKind(format!(
                "{} is {}, not a truth value",
                repeated(only.text),
                kind(only.value)
            )),
            _ => undefined_operand(operands)?,
        }),
        _ => None,
    }
}

fn undefined_operand(operands: &[Operand<'_>]) -> Option<Reason> {
    let undefined = operands.iter().find(|operand| operand.is_undefined());
    undefined.map(|operand| Reason::OperandUndefined(operand.text.to_owned()))
}

fn null_operand(operands: &[Operand<'_>]) -> Option<Reason> {
    let null = operands.iter().find(|operand| *operand.value == Plain::NullText);
    null.map(|operand| Reason::OperandNull(operand.text.to_owned()))
}

fn of_binary(operator: BinaryOperator, operands: &[Operand<'_>]) -> Option<Reason> {
    use BinaryOperator::{Add, And, Divide, Multiply, Or, Remainder, Subtract};
    let body = operands.iter().any(|operand| operand.kind == Type::Body);
    let other = |fits: fn(&Plain) -> bool, wanted: &str| {
        let wrong = operands.iter().find(|operand| !fits(operand.value))?;
        let found = if wrong.is_undefined() { "undefined" } else { kind(wrong.value) };
        Some(Reason::OtherKind(format!("both must be {wanted}: {} is {found}", repeated(wrong.text))))
    };
    match operator {
        And | Or if body => other(|value| matches!(value, Plain::Bool(_)), "truth values"),
        Multiply | Divide | Remainder | Add | Subtract if body && undefined_operand(operands).is_none() => {
            other(|value| matches!(value, Plain::Number(_)), "numbers")
        }
        Multiply | Divide | Remainder | Add | Subtract if undefined_operand(operands).is_none() => {
            Some(Reason::NoNumber)
        }
        BinaryOperator::Concat => of_call(Function::Concat, operands),
        _ => undefined_operand(operands).or_else(|| null_operand(operands)),
    }
}

/// Comparisons of body values of different kinds.
fn by_kind(operator: BinaryOperator, operands: &[Operand<'_>]) -> Option<Reason> {
    use BinaryOperator::{Greater, GreaterOrEqual, Less, LessOrEqual};
    let [left, right] = operands else { return None };
    let body = left.kind == Type::Body || right.kind == Type::Body;
    let kinds = (kind(left.value), kind(right.value));
    if !body || kinds.0 == kinds.1 || !matches!(operator, Less | LessOrEqual | Greater | GreaterOrEqual) {
        return None;
    }
    let text = format!("{} and {} are ordered by kind: boolean < number < text < null", kinds.0, kinds.1);
    Some(Reason::OrderedByKind(text))
}

fn of_call(function: Function, operands: &[Operand<'_>]) -> Option<Reason> {
    if function != Function::Concat
        && let Some(reason) = null_operand(operands)
    {
        return Some(reason);
    }
    if let Some(reason) = undefined_operand(operands) {
        return Some(reason);
    }
    let texts = match function {
        Function::AsNumber => {
            return Some(match operands {
                [Operand { value: Plain::Text(text), .. }] => {
                    Reason::TextNoNumber(String::from_utf16_lossy(text))
                }
                [only] => Reason::OtherKind(format!("{} is {}", repeated(only.text), kind(only.value))),
                _ => Reason::NoNumber,
            });
        }
        Function::Concat | Function::Length | Function::Lower | Function::Upper | Function::IndexOf => true,
        Function::StartsWith | Function::EndsWith | Function::Contains | Function::Substring => true,
        _ => false,
    };
    let fits = |operand: &&Operand<'_>| match operand.value {
        Plain::Text(_) | Plain::NullText => texts,
        Plain::Number(_) => !texts || function == Function::Substring,
        _ => false,
    };
    if let Some(wrong) = operands.iter().find(|operand| !fits(operand)) {
        return Some(Reason::OtherKind(format!("{} is {}", repeated(wrong.text), kind(wrong.value))));
    }
    Some(match function {
        Function::Substring => Reason::OutsideOfText,
        _ if texts => Reason::TooMuchText,
        _ => Reason::NoNumber,
    })
}

/// The two tests that say something else of body values than they seem to.
fn of_test(function: Function, operands: &[Operand<'_>]) -> Option<Reason> {
    let [Operand { value, kind: Type::Body, .. }] = operands else { return None };
    match (function, value) {
        (Function::IsNull, Plain::Null { absent: true }) => {
            Some(Reason::BodyTest("of a body value it is false where nothing stands"))
        }
        (Function::IsNull, Plain::Null { absent: false }) => None,
        (Function::IsNull, _) => {
            Some(Reason::BodyTest("of a body value it is true for every value that is there"))
        }
        (Function::IsDefined, Plain::Null { absent: true }) => {
            Some(Reason::BodyTest("of a body value it is true where nothing stands"))
        }
        _ => None,
    }
}

fn kind(value: &Plain) -> &'static str {
    match value {
        Plain::Undefined => "undefined",
        Plain::Null { .. } => "null",
        Plain::Bool(_) => "a boolean",
        Plain::Number(_) => "a number",
        Plain::NullText => "a text without value",
        Plain::Text(_) => "a text",
    }
}

/// The beginning of a text, on one line.
pub(super) fn repeated(text: &str) -> String {
    let mut shown: String = text
        .chars()
        .take(REPEATED_CHARS_MAX)
        .map(|character| if character.is_control() { ' ' } else { character })
        .collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}
