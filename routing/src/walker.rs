//! Owns the plain evaluator: one walk over the checked tree, every operand evaluated, texts as lists of units.
//!
//! It knows nothing of programs, their jumps and their texts in bytes. So it is what programs are compared with in the
//! tests, where it also reads bodies with a reader of its own; and it is what explanations are made of, because it has a
//! value for every node.

use std::cmp::Ordering;
use std::rc::Rc;

use crate::body::BodyPath;
use crate::check::{Checked, Operation, Type};
use crate::evaluate::Truth;
use crate::function::Function;
use crate::message::Text;
use crate::number;
use crate::syntax::BinaryOperator;
use crate::text;

/// Units of text that the operations of one condition may make; beyond that their results are undefined.
const MADE_UNITS_MAX: usize = 8 << 20;

/// The value of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Plain {
    Undefined,
    Null { absent: bool },
    Bool(bool),
    Number(f64),
    NullText,
    Text(Rc<[u16]>),
}

/// What a condition asks of a message.
pub(crate) trait Leaves {
    fn property(&mut self, name: &str) -> Plain;
    fn system(&mut self, name: &str) -> Plain;
    fn body(&mut self, path: &BodyPath) -> Plain;
}

/// The value of every node of the tree, in its order.
pub(crate) fn values(checked: &Checked, leaves: &mut impl Leaves) -> Vec<Plain> {
    let mut values: Vec<Plain> = Vec::with_capacity(checked.nodes.len());
    let mut made_units = 0;
    for (at, node) in checked.nodes.iter().enumerate() {
        let value = leaf(&node.operation, leaves).unwrap_or_else(|| {
            let operands = operands(checked, at);
            let given: Vec<(Plain, Type)> = operands
                .iter()
                .filter_map(|operand| {
                    Some((values.get(*operand)?.clone(), checked.nodes.get(*operand)?.result))
                })
                .collect();
            apply(&node.operation, &given)
        });
        if let (Plain::Text(text), Operation::Binary(_) | Operation::Call(..)) = (&value, &node.operation) {
            made_units += text.len();
        }
        values.push(if made_units > MADE_UNITS_MAX { Plain::Undefined } else { value });
    }
    values
}

/// The value of the whole condition, out of those of its nodes.
pub(crate) fn truth(checked: &Checked, values: &[Plain]) -> Truth {
    match (values.last(), checked.nodes.last().map(|root| root.result)) {
        (Some(Plain::Bool(true)), _) => Truth::True,
        (Some(Plain::Bool(false)), _) | (_, Some(Type::Null)) => Truth::False,
        _ => Truth::Undefined,
    }
}

/// The nodes that are the operands of the node at `at`, from left to right.
pub(crate) fn operands(checked: &Checked, at: usize) -> Vec<usize> {
    let count = match checked.nodes.get(at).map(|node| &node.operation) {
        Some(Operation::Negate | Operation::Not) => 1,
        Some(Operation::Binary(_)) => 2,
        Some(Operation::Call(_, count)) => *count,
        _ => 0,
    };
    let mut found = Vec::with_capacity(count);
    let mut end = at;
    for _ in 0..count {
        let Some(last) = end.checked_sub(1) else { break };
        found.push(last);
        end = checked.nodes.get(last).map_or(0, |node| node.first);
    }
    found.reverse();
    found
}

/// The value of a node without operands.
pub(crate) fn leaf(operation: &Operation, leaves: &mut impl Leaves) -> Option<Plain> {
    Some(match operation {
        Operation::Number(number) => Plain::Number(*number),
        Operation::Text(bytes) => Plain::Text(text::units(bytes).collect()),
        Operation::Bool(value) => Plain::Bool(*value),
        Operation::Null => Plain::Null { absent: false },
        Operation::Undefined => Plain::Undefined,
        Operation::Property(name) => leaves.property(name),
        Operation::System(name) => leaves.system(name),
        Operation::PropertyOrSystem { property, system } => match leaves.property(property) {
            Plain::Undefined => leaves.system(system),
            value => value,
        },
        Operation::Body { property, path } => {
            match property.as_ref().map_or(Plain::Undefined, |name| leaves.property(name)) {
                Plain::Undefined => leaves.body(path),
                value => value,
            }
        }
        Operation::Negate | Operation::Not | Operation::Binary(_) | Operation::Call(..) => return None,
    })
}

/// The value of a node with operands, out of theirs.
pub(crate) fn apply(operation: &Operation, operands: &[(Plain, Type)]) -> Plain {
    match (operation, operands) {
        (Operation::Negate, [(value, _)]) => Plain::Number(-number_of(value)),
        (Operation::Not, [operand]) => match operand {
            (_, Type::Null) => Plain::Bool(true),
            (Plain::Bool(value), _) => Plain::Bool(!value),
            _ => Plain::Undefined,
        },
        (Operation::Binary(operator), [left, right]) => binary(*operator, left.clone(), right.clone()),
        (Operation::Call(function, _), arguments) => call(*function, arguments),
        _ => Plain::Undefined,
    }
}

pub(crate) fn of_text(text: Text<'_>) -> Plain {
    match text {
        Text::Undefined => Plain::Undefined,
        Text::Null => Plain::NullText,
        Text::Text(text) => Plain::Text(text.encode_utf16().collect()),
    }
}

/// The number, or NaN.
pub(crate) fn number_of(value: &Plain) -> f64 {
    if let Plain::Number(number) = value { *number } else { f64::NAN }
}

fn to_body(value: Plain, given: Type) -> Plain {
    match (value, given) {
        (Plain::Number(number), Type::Number) if number.is_nan() => Plain::Undefined,
        (value, _) => value,
    }
}

fn binary(operator: BinaryOperator, left: (Plain, Type), right: (Plain, Type)) -> Plain {
    use BinaryOperator::*;
    let types = (left.1, right.1);
    let body = types.0 == Type::Body || types.1 == Type::Body;
    let (left, right) =
        if body { (to_body(left.0, left.1), to_body(right.0, right.1)) } else { (left.0, right.0) };
    let holds = |order: Ordering| match operator {
        Equal => order == Ordering::Equal,
        NotEqual => order != Ordering::Equal,
        Less => order == Ordering::Less,
        LessOrEqual => order != Ordering::Greater,
        Greater => order == Ordering::Greater,
        _ => order != Ordering::Less,
    };
    match operator {
        Multiply | Divide | Remainder | Add | Subtract => match (&left, &right) {
            (Plain::Number(left), Plain::Number(right)) => Plain::Number(match operator {
                Multiply => left * right,
                Divide => left / right,
                Remainder => left % right,
                Add => left + right,
                _ => left - right,
            }),
            _ => Plain::Undefined,
        },
        Concat => call(Function::Concat, &[(left, types.0), (right, types.1)]),
        Equal | NotEqual | Less | LessOrEqual | Greater | GreaterOrEqual => {
            let order = if body { body_order(&left, &right) } else { plain_order(&left, &right) };
            order.map_or(Plain::Undefined, |order| Plain::Bool(holds(order)))
        }
        And | Or if body => match (left, right) {
            (Plain::Bool(left), Plain::Bool(right)) => {
                Plain::Bool(if operator == And { left && right } else { left || right })
            }
            _ => Plain::Undefined,
        },
        And | Or => match (types, operator) {
            ((Type::Null, Type::Null), _) => Plain::Null { absent: false },
            ((Type::Null, _) | (_, Type::Null), And) => Plain::Null { absent: false },
            ((Type::Null, _), _) => right,
            ((_, Type::Null), _) => left,
            _ => {
                let decisive = Plain::Bool(operator == Or);
                match (&left, &right) {
                    (left, right) if *left == decisive || *right == decisive => decisive,
                    (Plain::Undefined, _) | (_, Plain::Undefined) => Plain::Undefined,
                    _ => Plain::Bool(operator == And),
                }
            }
        },
        Coalesce => match (&left, types.0) {
            (Plain::Undefined, _) => right,
            (Plain::Number(number), Type::Number) if number.is_nan() => right,
            _ => left,
        },
    }
}

fn plain_order(left: &Plain, right: &Plain) -> Option<Ordering> {
    match (left, right) {
        (Plain::Number(left), Plain::Number(right)) => left.partial_cmp(right),
        (Plain::Text(left), Plain::Text(right)) => Some(left.cmp(right)),
        (Plain::Bool(left), Plain::Bool(right)) => Some(left.cmp(right)),
        (Plain::Null { .. }, Plain::Null { .. }) => Some(Ordering::Equal),
        _ => None,
    }
}

fn body_order(left: &Plain, right: &Plain) -> Option<Ordering> {
    let rank = |value: &Plain| match value {
        Plain::Undefined => None,
        Plain::Bool(_) => Some(0),
        Plain::Number(_) => Some(1),
        Plain::NullText | Plain::Text(_) => Some(2),
        Plain::Null { .. } => Some(3),
    };
    let ranks = (rank(left)?, rank(right)?);
    Some(match (left, right) {
        (Plain::Number(left), Plain::Number(right)) => match (left.is_nan(), right.is_nan()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            (false, false) => left.partial_cmp(right)?,
        },
        (Plain::NullText, Plain::Text(_)) => Ordering::Less,
        (Plain::Text(_), Plain::NullText) => Ordering::Greater,
        (Plain::Text(left), Plain::Text(right)) => left.cmp(right),
        (Plain::Bool(left), Plain::Bool(right)) => left.cmp(right),
        _ => ranks.0.cmp(&ranks.1),
    })
}

fn call(function: Function, arguments: &[(Plain, Type)]) -> Plain {
    let number_at = |at: usize| arguments.get(at).map_or(f64::NAN, |(value, _)| number_of(value));
    let text_at = |at: usize| match arguments.get(at) {
        Some((Plain::Text(text), _)) => Some(text.clone()),
        _ => None,
    };
    let given = arguments.first().map(|(value, given)| (value, *given));
    let mapped = |map: fn(char) -> char| match text_at(0) {
        Some(own) => {
            let characters = char::decode_utf16(own.iter().copied());
            Plain::Text(
                characters
                    .flat_map(|character| match character {
                        Ok(character) => map(character).encode_utf16(&mut [0; 2]).to_vec(),
                        Err(lone) => vec![lone.unpaired_surrogate()],
                    })
                    .collect(),
            )
        }
        None => Plain::Undefined,
    };
    let two = |holds: fn(&[u16], &[u16]) -> bool| match (text_at(0), text_at(1)) {
        (Some(of), Some(part)) => Plain::Bool(holds(&of, &part)),
        _ => Plain::Undefined,
    };
    match function {
        Function::Abs => Plain::Number(number_at(0).abs()),
        Function::Ceiling => Plain::Number(number_at(0).ceil()),
        Function::Floor => Plain::Number(number_at(0).floor()),
        Function::Exp => Plain::Number(number_at(0).exp()),
        Function::Sqrt => Plain::Number(number_at(0).sqrt()),
        Function::Square => Plain::Number(number_at(0) * number_at(0)),
        Function::Sign => Plain::Number(match number_at(0) {
            number if number > 0.0 => 1.0,
            number if number < 0.0 => -1.0,
            number => number.abs(),
        }),
        Function::Power if number_at(0).is_nan() || number_at(1).is_nan() => Plain::Number(f64::NAN),
        Function::Power => Plain::Number(number_at(0).powf(number_at(1))),
        Function::AsNumber => match given {
            Some((Plain::Number(number), _)) => Plain::Number(*number),
            Some((Plain::Text(own), _)) => {
                let own = String::from_utf16_lossy(own);
                Plain::Number(number::parse(own.as_bytes(), &mut String::new()).unwrap_or(f64::NAN))
            }
            _ => Plain::Number(f64::NAN),
        },
        Function::IsBool => match given {
            Some((Plain::Undefined, Type::Bool | Type::Body)) => Plain::Undefined,
            given => Plain::Bool(matches!(given, Some((Plain::Bool(_), _)))),
        },
        Function::IsNumber => Plain::Bool(number_at(0).is_finite()),
        Function::IsString => Plain::Bool(text_at(0).is_some()),
        Function::IsDefined => Plain::Bool(match given {
            Some((Plain::Number(number), Type::Number)) => !number.is_nan(),
            given => given.is_some_and(|(value, _)| *value != Plain::Undefined),
        }),
        Function::IsNull => match given {
            Some((Plain::Undefined, Type::Body)) => Plain::Undefined,
            // True also for what is not null at all: a fault of the reference that routes rely on.
            Some((value, Type::Body)) => Plain::Bool(*value != Plain::Null { absent: true }),
            given => Plain::Bool(matches!(given, Some((Plain::Null { .. } | Plain::NullText, _)))),
        },
        Function::Concat => {
            let mut joined = Vec::new();
            for (part, _) in arguments {
                match part {
                    Plain::Text(part) => joined.extend_from_slice(part),
                    Plain::NullText => {}
                    _ => return Plain::Undefined,
                }
                if joined.len() > MADE_UNITS_MAX {
                    return Plain::Undefined;
                }
            }
            Plain::Text(joined.into())
        }
        Function::Length => Plain::Number(text_at(0).map_or(f64::NAN, |own| own.len() as f64)),
        Function::Lower => mapped(text::lower),
        Function::Upper => mapped(text::upper),
        Function::Substring => {
            let Some(own) = text_at(0) else { return Plain::Undefined };
            let (start, whole) = (number_at(1), own.len() as f64);
            let length = if arguments.len() == 3 { number_at(2) } else { whole - start.trunc() };
            let start_fits =
                start >= 0.0 && if arguments.len() == 3 { start < whole } else { start <= whole };
            let fits = start_fits && length >= 0.0 && (arguments.len() == 2 || length <= whole - start);
            match fits {
                true => own
                    .get(start as usize..start as usize + length as usize)
                    .map_or(Plain::Undefined, |part| Plain::Text(part.into())),
                false => Plain::Undefined,
            }
        }
        Function::IndexOf => Plain::Number(match (text_at(0), text_at(1)) {
            (Some(of), Some(part)) => position(&of, &part).map_or(-1.0, |at| at as f64),
            _ => f64::NAN,
        }),
        Function::StartsWith => two(|of, part| of.starts_with(part)),
        Function::EndsWith => two(|of, part| of.ends_with(part)),
        Function::Contains => match (text_at(0), text_at(1)) {
            (Some(of), Some(part)) => Plain::Bool(position(&of, &part).is_some()),
            _ => Plain::Undefined,
        },
    }
}

/// The first place of `part` in `of`, by the method of Knuth, Morris and Pratt: neither can be so long that it hangs.
fn position(of: &[u16], part: &[u16]) -> Option<usize> {
    let mut borders = vec![0; part.len() + 1];
    let mut width = 0;
    for at in 1..part.len() {
        while width > 0 && part[at] != part[width] {
            width = borders[width];
        }
        width += usize::from(part[at] == part[width]);
        borders[at + 1] = width;
    }
    width = 0;
    for (at, unit) in of.iter().enumerate() {
        if width == part.len() {
            return Some(at - width);
        }
        while width > 0 && part[width] != *unit {
            width = borders[width];
        }
        width += usize::from(part[width] == *unit);
    }
    (width == part.len()).then(|| of.len() - width)
}

#[cfg(test)]
mod tests;
