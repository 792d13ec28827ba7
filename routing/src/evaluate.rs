//! Owns the evaluation: a program, a message, and the memory that evaluations share.

use std::cmp::Ordering;

use smallvec::SmallVec;

use crate::bits::BitSet;
use crate::body::{BodyScratch, Slot};
use crate::clause::Literal;
use crate::family::{Comparable, Family};
use crate::function::Function;
use crate::message::{MessageView, Text};
use crate::number;
use crate::program::{Op, Program, Vocabulary};
use crate::text::{self, Part};
use crate::value::{TextPlace, Value, order_of_body_numbers};

/// Bytes of text that the operations of one condition may make; beyond that their results are undefined.
const MADE_BYTES_MAX: usize = 16 << 20;

/// Operands that wait on the stack before it takes memory from the heap.
const STACK_INLINE: usize = 32;

/// Bytes that a buffer keeps for the next message.
const KEPT_BYTES: usize = 64 << 10;

/// The value of a condition for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// The message is routed.
    True,
    /// It is not.
    False,
    /// It is not, because a value that the condition needs is missing or of the wrong kind.
    Undefined,
}

/// Memory that is reused from message to message.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    body: BodyScratch,
    made: Vec<u8>,
    digits: String,
    names: Names,
    /// The values that programs keep for others, each with the number of the message that it belongs to.
    kept: Vec<(u64, Value<'static>)>,
    /// Number of the message.
    message: u64,
}

/// The properties of a message by the names that a table knows, once they have been gone through.
#[derive(Debug, Default)]
struct Names {
    listed: bool,
    /// By name: the message that has the property, and the place where it stands there.
    places: Vec<(u64, u32)>,
    /// The names that the message has.
    present: Vec<u32>,
    folded: String,
}

/// Of no message.
const NEVER: u64 = u64::MAX;

impl Scratch {
    /// Forgets the message before.
    pub(crate) fn begin_message(&mut self) {
        self.message += 1;
        self.names.listed = false;
        self.body.begin_message(KEPT_BYTES);
        if self.made.capacity() > KEPT_BYTES || self.digits.capacity() > KEPT_BYTES {
            self.made.clear();
            self.made.shrink_to(KEPT_BYTES);
            self.digits.clear();
            self.digits.shrink_to(KEPT_BYTES);
        }
    }
}

impl Program {
    /// The value of the condition for `message`. [`Scratch::begin_message`] has to be called before the first program
    /// sees a message.
    pub(crate) fn evaluate<M: MessageView + ?Sized>(
        &self,
        vocabulary: &Vocabulary,
        message: &M,
        scratch: &mut Scratch,
    ) -> Truth {
        Machine::new(vocabulary, message, scratch).value(self).truth()
    }
}

/// A message, and what is needed to evaluate programs for it.
pub(crate) struct Machine<'m, 's, M: ?Sized> {
    vocabulary: &'m Vocabulary,
    message: &'m M,
    scratch: &'s mut Scratch,
    stack: SmallVec<[Value<'m>; STACK_INLINE]>,
}

impl<'m, 's, M: MessageView + ?Sized> Machine<'m, 's, M> {
    pub(crate) fn new(vocabulary: &'m Vocabulary, message: &'m M, scratch: &'s mut Scratch) -> Self {
        Machine { vocabulary, message, scratch, stack: SmallVec::new() }
    }

    #[inline]
    fn value(&mut self, program: &Program) -> Value<'m> {
        // Most subjects are one look-up.
        match program.ops[..] {
            [Op::Property(name)] => self.property(name),
            [Op::PropertyOrBody { property, slot }] => self.property_or_body(property, slot),
            _ => {
                self.scratch.made.clear();
                self.run(&program.ops);
                self.pop()
            }
        }
    }

    /// The routes whose clause in `family` holds; none if the clauses of all its members are undefined.
    #[inline]
    pub(crate) fn holding<'f>(&mut self, family: &'f Family) -> Option<&'f BitSet> {
        let value = self.value(&family.subject);
        let comparable = match (family.comparable, &value) {
            (_, Value::Undefined) => false,
            (Comparable::Truth, value) => matches!(value, Value::Bool(_)),
            (Comparable::Typed, value) => match value {
                Value::Number(number) => !number.is_nan(),
                Value::Text(_) | Value::Bool(_) => true,
                Value::Undefined | Value::Null { .. } | Value::NullText => false,
            },
            (Comparable::Body, _) => true,
        };
        if comparable { family.holding(|literal| self.order_to(&value, literal)) } else { None }
    }

    /// The order of a body value and a literal; it is that of values of one type, too.
    #[inline]
    fn order_to(&self, value: &Value<'m>, literal: &Literal) -> Ordering {
        match (value, literal) {
            (Value::Bool(own), Literal::Bool(literal)) => own.cmp(literal),
            (Value::Number(own), Literal::Number(literal)) => order_of_body_numbers(*own, *literal),
            (Value::Text(own), Literal::Text(literal)) => text::compare(self.bytes(own), literal),
            (Value::NullText, Literal::Text(_)) => Ordering::Less,
            _ => value.rank().cmp(&Some(literal.rank())),
        }
    }

    /// Goes through the properties of the message, to find those that have a name in the vocabulary; gives their names.
    /// None if the message does not let itself be gone through.
    pub(crate) fn list_properties(&mut self) -> Option<&[u32]> {
        let places = self.message.property_places()?;
        let Scratch { names, message: now, .. } = &mut *self.scratch;
        names.places.resize(self.vocabulary.names().max(names.places.len()), (NEVER, 0));
        names.present.clear();
        names.listed = true;
        for place in 0..places {
            let Some((name, _)) = self.message.property_at(place) else { continue };
            names.folded.clear();
            fold_into(&mut names.folded, name);
            let Some(name) = self.vocabulary.name_of(&names.folded) else { continue };
            // Of several the first counts.
            if let Some(known) = names.places.get_mut(name as usize).filter(|(message, _)| message != now) {
                *known = (*now, place as u32);
                names.present.push(name);
            }
        }
        Some(&names.present)
    }

    fn run(&mut self, ops: &[Op]) {
        let mut at = 0;
        while let Some(op) = ops.get(at) {
            at += 1;
            let value = match *op {
                Op::JumpIf(wanted, target) => {
                    if matches!(self.stack.last(), Some(Value::Bool(value)) if *value == wanted) {
                        at = target as usize;
                    }
                    continue;
                }
                Op::JumpIfDefined(target) => {
                    match self.stack.last() {
                        Some(Value::Undefined) | None => drop(self.stack.pop()),
                        Some(_) => at = target as usize,
                    }
                    continue;
                }
                Op::JumpIfNumber(target) => {
                    match self.stack.last() {
                        Some(Value::Number(number)) if !number.is_nan() => at = target as usize,
                        _ => drop(self.stack.pop()),
                    }
                    continue;
                }
                Op::Recall(kept, target) => match self.scratch.kept.get(kept as usize) {
                    Some((message, value)) if *message == self.scratch.message => {
                        at = target as usize;
                        *value
                    }
                    _ => continue,
                },
                Op::Keep(kept) => {
                    self.keep(kept);
                    continue;
                }
                Op::Number(number) => Value::Number(number),
                Op::Literal(slot) => Value::Text(TextPlace::Borrowed(self.vocabulary.literal_at(slot))),
                Op::Bool(value) => Value::Bool(value),
                Op::Null => Value::Null { absent: false },
                Op::Undefined => Value::Undefined,
                Op::Property(name) => self.property(name),
                Op::System(name) => self.system(name),
                Op::PropertyOrSystem { property, system } => match self.property(property) {
                    Value::Undefined => self.system(system),
                    value => value,
                },
                Op::Body(slot) => self.body(slot),
                Op::PropertyOrBody { property, slot } => self.property_or_body(property, slot),
                Op::ToBody => match self.pop() {
                    Value::Number(number) if number.is_nan() => Value::Undefined,
                    value => value,
                },
                Op::Negate => Value::Number(-self.pop().number()),
                Op::Not => match self.pop() {
                    Value::Null { .. } => Value::Bool(true),
                    value => Value::of_truth(value.truth().opposite()),
                },
                Op::NotBody => Value::of_truth(self.pop().truth().opposite()),
                Op::Arithmetic(kind) => {
                    let (left, right) = self.pop_two();
                    Value::Number(kind.apply(left.number(), right.number()))
                }
                Op::ArithmeticBody(kind) => match self.pop_two() {
                    (Value::Number(left), Value::Number(right)) => Value::Number(kind.apply(left, right)),
                    _ => Value::Undefined,
                },
                Op::Compare(comparison) => match self.pop_two() {
                    (Value::Number(left), Value::Number(right)) => {
                        Value::of_truth(comparison.of_numbers(left, right))
                    }
                    (Value::Bool(left), Value::Bool(right)) => {
                        Value::Bool(comparison.holds(left.cmp(&right)))
                    }
                    (Value::Text(left), Value::Text(right)) => {
                        Value::Bool(comparison.of_texts(self.bytes(&left), self.bytes(&right)))
                    }
                    _ => Value::Undefined,
                },
                Op::CompareLiteral(comparison, literal) => match self.pop() {
                    Value::Text(left) => Value::Bool(
                        comparison.of_texts(self.bytes(&left), self.vocabulary.literal_at(literal)),
                    ),
                    _ => Value::Undefined,
                },
                Op::CompareBody(comparison) => {
                    let (left, right) = self.pop_two();
                    match self.order(&left, &right) {
                        Some(order) => Value::Bool(comparison.holds(order)),
                        None => Value::Undefined,
                    }
                }
                Op::And => {
                    let (left, right) = self.pop_two();
                    Value::of_truth(left.truth().and(right.truth()))
                }
                Op::Or => {
                    let (left, right) = self.pop_two();
                    Value::of_truth(left.truth().or(right.truth()))
                }
                Op::AndBody => match self.pop_two() {
                    (Value::Bool(left), Value::Bool(right)) => Value::Bool(left && right),
                    _ => Value::Undefined,
                },
                Op::OrBody => match self.pop_two() {
                    (Value::Bool(left), Value::Bool(right)) => Value::Bool(left || right),
                    _ => Value::Undefined,
                },
                Op::IsBool => match self.pop() {
                    Value::Undefined => Value::Undefined,
                    value => Value::Bool(matches!(value, Value::Bool(_))),
                },
                Op::IsNumber => Value::Bool(self.pop().number().is_finite()),
                Op::IsString => Value::Bool(matches!(self.pop(), Value::Text(_))),
                Op::IsDefined => Value::Bool(!matches!(self.pop(), Value::Undefined)),
                Op::IsDefinedNumber => Value::Bool(!self.pop().number().is_nan()),
                Op::IsNullText => Value::Bool(matches!(self.pop(), Value::NullText)),
                Op::IsNullBody => match self.pop() {
                    Value::Undefined => Value::Undefined,
                    // True also for values that are not null at all: a fault of the reference that routes rely on.
                    value => Value::Bool(!matches!(value, Value::Null { absent: true })),
                },
                Op::Call(function, arguments) => self.call(function, arguments as usize),
            };
            self.stack.push(value);
        }
    }

    fn pop(&mut self) -> Value<'m> {
        self.stack.pop().unwrap_or(Value::Undefined)
    }

    fn pop_two(&mut self) -> (Value<'m>, Value<'m>) {
        let right = self.pop();
        (self.pop(), right)
    }

    /// Keeps the value on the stack, unless it is a text that is gone when the program ends.
    fn keep(&mut self, number: u32) {
        let value = match self.stack.last() {
            Some(Value::Undefined) | None => Value::Undefined,
            Some(Value::Null { absent }) => Value::Null { absent: *absent },
            Some(Value::Bool(value)) => Value::Bool(*value),
            Some(Value::Number(number)) => Value::Number(*number),
            Some(Value::NullText) => Value::NullText,
            Some(Value::Text(TextPlace::Body(text))) => Value::Text(TextPlace::Body(*text)),
            Some(Value::Text(TextPlace::Borrowed(_) | TextPlace::Made { .. })) => return,
        };
        let (number, kept) = (number as usize, &mut self.scratch.kept);
        if kept.len() <= number {
            kept.resize(number + 1, (NEVER, Value::Undefined));
        }
        if let Some(place) = kept.get_mut(number) {
            *place = (self.scratch.message, value);
        }
    }

    fn property(&self, name: u32) -> Value<'m> {
        if self.scratch.names.listed {
            return match self.scratch.names.places.get(name as usize) {
                Some((message, place)) if *message == self.scratch.message => self
                    .message
                    .property_at(*place as usize)
                    .map_or(Value::Undefined, |(_, value)| of_text(value)),
                _ => Value::Undefined,
            };
        }
        self.vocabulary.name_at(name).map_or(Value::Undefined, |name| of_text(self.message.property(name)))
    }

    fn system(&self, name: u32) -> Value<'m> {
        self.vocabulary
            .name_at(name)
            .map_or(Value::Undefined, |name| of_text(self.message.system_property(name)))
    }

    fn body(&mut self, slot: u32) -> Value<'m> {
        match self.scratch.body.slot(&self.vocabulary.paths, self.message, slot) {
            Slot::Absent => Value::Null { absent: true },
            Slot::Null => Value::Null { absent: false },
            Slot::Bool(value) => Value::Bool(value),
            Slot::Number(number) => Value::Number(number),
            Slot::Text(text) => Value::Text(TextPlace::Body(text)),
            Slot::Undefined => Value::Undefined,
        }
    }

    fn property_or_body(&mut self, property: u32, slot: u32) -> Value<'m> {
        match self.property(property) {
            Value::Undefined => self.body(slot),
            value => value,
        }
    }

    fn bytes(&self, place: &TextPlace<'m>) -> &[u8] {
        match *place {
            TextPlace::Borrowed(bytes) => bytes,
            TextPlace::Body(text) => self.scratch.body.text(self.message.body(), text),
            TextPlace::Made { start, end } => self.scratch.made.get(start..end).unwrap_or_default(),
        }
    }

    /// The order of two body values: boolean, number, text, null.
    fn order(&self, left: &Value<'m>, right: &Value<'m>) -> Option<Ordering> {
        let ranks = (left.rank()?, right.rank()?);
        Some(match (left, right) {
            (Value::Bool(left), Value::Bool(right)) => left.cmp(right),
            (Value::Number(left), Value::Number(right)) => order_of_body_numbers(*left, *right),
            (Value::Text(left), Value::Text(right)) => text::compare(self.bytes(left), self.bytes(right)),
            (Value::NullText, Value::Text(_)) => Ordering::Less,
            (Value::Text(_), Value::NullText) => Ordering::Greater,
            _ => ranks.0.cmp(&ranks.1),
        })
    }

    /// A function of numbers and texts. A number that is undefined is NaN, a text that is undefined is [`Value::Undefined`].
    fn call(&mut self, function: Function, arguments: usize) -> Value<'m> {
        let number = |value: f64| Value::Number(value);
        match function {
            Function::Abs => number(self.pop().number().abs()),
            Function::Ceiling => number(self.pop().number().ceil()),
            Function::Floor => number(self.pop().number().floor()),
            Function::Exp => number(self.pop().number().exp()),
            Function::Sqrt => number(self.pop().number().sqrt()),
            Function::Square => number(self.pop().number().powi(2)),
            Function::Sign => {
                let of = self.pop().number();
                number(if of == 0.0 || of.is_nan() { of.abs() } else { of.signum() })
            }
            Function::Power => {
                let (base, exponent) = self.pop_two();
                let (base, exponent) = (base.number(), exponent.number());
                let undefined = base.is_nan() || exponent.is_nan();
                number(if undefined { f64::NAN } else { base.powf(exponent) })
            }
            Function::AsNumber => number(match self.pop() {
                Value::Number(number) => number,
                Value::Text(text) => {
                    let mut digits = std::mem::take(&mut self.scratch.digits);
                    let parsed = number::parse(self.bytes(&text), &mut digits);
                    self.scratch.digits = digits;
                    parsed.unwrap_or(f64::NAN)
                }
                _ => f64::NAN,
            }),
            Function::Concat => self.concat(arguments),
            Function::Length => match self.pop() {
                Value::Text(text) => number(text::length_units(self.bytes(&text)) as f64),
                _ => number(f64::NAN),
            },
            Function::Lower => self.mapped(text::lower),
            Function::Upper => self.mapped(text::upper),
            Function::Substring => {
                let length = (arguments == 3).then(|| self.pop().number());
                let (of, start) = self.pop_two();
                self.substring(of, start.number(), length).unwrap_or(Value::Undefined)
            }
            Function::IndexOf => match self.pop_two() {
                (Value::Text(of), Value::Text(part)) => {
                    number(text::index_of(self.bytes(&of), self.bytes(&part)).map_or(-1.0, |at| at as f64))
                }
                _ => number(f64::NAN),
            },
            Function::StartsWith => self.relation(text::starts_with),
            Function::EndsWith => self.relation(text::ends_with),
            Function::Contains => self.relation(text::contains),
            // They have operations of their own.
            Function::IsBool
            | Function::IsDefined
            | Function::IsNull
            | Function::IsNumber
            | Function::IsString => Value::Undefined,
        }
    }

    fn relation(&mut self, holds: fn(&[u8], &[u8]) -> bool) -> Value<'m> {
        match self.pop_two() {
            (Value::Text(of), Value::Text(part)) => Value::Bool(holds(self.bytes(&of), self.bytes(&part))),
            _ => Value::Undefined,
        }
    }

    fn mapped(&mut self, map: fn(char) -> char) -> Value<'m> {
        match self.pop() {
            Value::Text(place) => self.make(|machine, made, _| match place {
                TextPlace::Made { start, end } => text::push_mapped_within(made, start..end, map),
                TextPlace::Borrowed(_) | TextPlace::Body(_) => {
                    text::push_mapped(made, machine.bytes(&place), map)
                }
            }),
            _ => Value::Undefined,
        }
    }

    fn concat(&mut self, arguments: usize) -> Value<'m> {
        let first = self.stack.len().saturating_sub(arguments);
        let parts = self.stack.get(first..).unwrap_or_default();
        let joined = if parts.iter().all(|part| matches!(part, Value::Text(_) | Value::NullText)) {
            self.make(|machine, made, start| {
                for part in machine.stack.get(first..).unwrap_or_default() {
                    match part {
                        Value::Text(TextPlace::Made { start: from, end }) => {
                            push_made(made, start, *from, *end)
                        }
                        Value::Text(place) => text::push_text(made, start, machine.bytes(place)),
                        // A null text counts as empty.
                        _ => {}
                    }
                    if made.len() > MADE_BYTES_MAX {
                        return;
                    }
                }
            })
        } else {
            Value::Undefined
        };
        self.stack.truncate(first);
        joined
    }

    /// Lets `fill` append a text to the buffer of made texts.
    fn make(&mut self, fill: impl FnOnce(&Self, &mut Vec<u8>, usize)) -> Value<'m> {
        let mut made = std::mem::take(&mut self.scratch.made);
        let start = made.len();
        fill(self, &mut made, start);
        let end = made.len();
        self.scratch.made = made;
        if end > MADE_BYTES_MAX {
            return Value::Undefined;
        }
        Value::Text(TextPlace::Made { start, end })
    }

    fn substring(&mut self, of: Value<'m>, start: f64, length: Option<f64>) -> Option<Value<'m>> {
        let Value::Text(place) = of else { return None };
        let own = self.bytes(&place);
        let units = text::length_units(own);
        let whole = units as f64;
        // Comparisons with NaN are false, so undefined numbers end here.
        let (start, length) = match length {
            None if start >= 0.0 && start <= whole => (start as usize, units - start as usize),
            Some(length) if start >= 0.0 && start < whole && length >= 0.0 && length <= whole - start => {
                (start as usize, length as usize)
            }
            _ => return None,
        };
        let place = match text::part(own, start, length) {
            Part::Bytes(part) => match place {
                TextPlace::Borrowed(bytes) => TextPlace::Borrowed(bytes.get(part)?),
                TextPlace::Body(text) => TextPlace::Body(text.part(part)),
                TextPlace::Made { start, .. } => {
                    TextPlace::Made { start: start + part.start, end: start + part.end }
                }
            },
            Part::Split => {
                let units: Vec<u16> = text::units(own).skip(start).take(length).collect();
                return Some(self.make(|_, made, start| {
                    units.iter().for_each(|unit| text::push_unit(made, start, *unit));
                }));
            }
        };
        Some(Value::Text(place))
    }
}

/// Appends a text that lies in the same buffer.
fn push_made(made: &mut Vec<u8>, start: usize, from: usize, end: usize) {
    let Some(own) = made.get(from..end) else { return };
    if matches!(own, [0xED, 0xB0..=0xBF, ..]) {
        // A low surrogate may have to join the high one before it.
        let copy = own.to_vec();
        return text::push_text(made, start, &copy);
    }
    made.extend_from_within(from..end);
}

/// Appends `name`, its case folded away.
fn fold_into(folded: &mut String, name: &str) {
    if name.is_ascii() {
        folded.push_str(name);
        folded.make_ascii_uppercase();
    } else {
        folded.extend(name.chars().map(text::fold));
    }
}

fn of_text(text: Text<'_>) -> Value<'_> {
    match text {
        Text::Undefined => Value::Undefined,
        Text::Null => Value::NullText,
        Text::Text(text) => Value::Text(TextPlace::Borrowed(text.as_bytes())),
    }
}
