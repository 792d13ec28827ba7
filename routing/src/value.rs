//! Owns the values of a running program, and how they compare and combine.

use std::cmp::Ordering;

use crate::body::BodyText;
use crate::evaluate::Truth;
use crate::program::{Arithmetic, Comparison};
use crate::text;

/// A value on the stack.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'m> {
    Undefined,
    /// `absent`: of a body path that matched nothing.
    Null {
        absent: bool,
    },
    Bool(bool),
    /// Of a number, NaN is undefined; of a body value it is not.
    Number(f64),
    /// A text that is null, which is not the same as null.
    NullText,
    Text(TextPlace<'m>),
}

/// Where the bytes of a text are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TextPlace<'m> {
    /// In the message, or a literal.
    Borrowed(&'m [u8]),
    Body(BodyText),
    /// Made by an operation; in the buffer of made texts.
    Made {
        start: usize,
        end: usize,
    },
}

impl Value<'_> {
    pub(crate) fn of_truth(truth: Truth) -> Value<'static> {
        match truth {
            Truth::True => Value::Bool(true),
            Truth::False => Value::Bool(false),
            Truth::Undefined => Value::Undefined,
        }
    }

    /// The place of its kind in the order of body values: boolean, number, text, null; none if it is undefined.
    pub(crate) fn rank(&self) -> Option<u8> {
        match self {
            Value::Undefined => None,
            Value::Bool(_) => Some(0),
            Value::Number(_) => Some(1),
            Value::NullText | Value::Text(_) => Some(2),
            Value::Null { .. } => Some(3),
        }
    }

    /// The truth value; everything else is undefined.
    pub(crate) fn truth(&self) -> Truth {
        match self {
            Value::Bool(true) => Truth::True,
            Value::Bool(false) => Truth::False,
            _ => Truth::Undefined,
        }
    }

    /// The number; everything else is NaN.
    pub(crate) fn number(&self) -> f64 {
        match self {
            Value::Number(number) => *number,
            _ => f64::NAN,
        }
    }
}

impl Truth {
    pub(crate) fn and(self, other: Truth) -> Truth {
        match (self, other) {
            (Truth::False, _) | (_, Truth::False) => Truth::False,
            (Truth::True, Truth::True) => Truth::True,
            _ => Truth::Undefined,
        }
    }

    pub(crate) fn or(self, other: Truth) -> Truth {
        match (self, other) {
            (Truth::True, _) | (_, Truth::True) => Truth::True,
            (Truth::False, Truth::False) => Truth::False,
            _ => Truth::Undefined,
        }
    }

    pub(crate) fn opposite(self) -> Truth {
        match self {
            Truth::True => Truth::False,
            Truth::False => Truth::True,
            Truth::Undefined => Truth::Undefined,
        }
    }
}

impl Comparison {
    pub(crate) fn holds(self, order: Ordering) -> bool {
        match self {
            Comparison::Equal => order.is_eq(),
            Comparison::NotEqual => order.is_ne(),
            Comparison::Less => order.is_lt(),
            Comparison::LessOrEqual => order.is_le(),
            Comparison::Greater => order.is_gt(),
            Comparison::GreaterOrEqual => order.is_ge(),
        }
    }

    /// Texts; where only equality matters, their order is not looked for.
    pub(crate) fn of_texts(self, left: &[u8], right: &[u8]) -> bool {
        match self {
            Comparison::Equal => left == right,
            Comparison::NotEqual => left != right,
            _ => self.holds(text::compare(left, right)),
        }
    }

    /// Numbers of which neither is NaN.
    pub(crate) fn of_numbers(self, left: f64, right: f64) -> Truth {
        match left.partial_cmp(&right) {
            Some(order) if self.holds(order) => Truth::True,
            Some(_) => Truth::False,
            None => Truth::Undefined,
        }
    }
}

impl Arithmetic {
    pub(crate) fn apply(self, left: f64, right: f64) -> f64 {
        match self {
            Arithmetic::Multiply => left * right,
            Arithmetic::Divide => left / right,
            Arithmetic::Remainder => left % right,
            Arithmetic::Add => left + right,
            Arithmetic::Subtract => left - right,
        }
    }
}

/// The order of body numbers: NaN equals itself and is below all others.
pub(crate) fn order_of_body_numbers(left: f64, right: f64) -> Ordering {
    left.partial_cmp(&right).unwrap_or_else(|| right.is_nan().cmp(&left.is_nan()))
}
