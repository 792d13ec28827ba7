//! Owns the types: a syntax tree becomes a tree in which every operand fits its operator.

use crate::body::BodyPath;
use crate::diagnostic::{Category, Fault, Span, Stage};
use crate::function::Function;
use crate::suggest::nearest;
use crate::syntax::{BinaryOperator, Node, NodeKind, Tree};
use crate::text;

/// The static types; every expression has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    Number,
    Text,
    Bool,
    Null,
    Undefined,
    /// Known only when the message is there: values of the body.
    Body,
}

impl Type {
    fn words(self) -> &'static str {
        match self {
            Type::Number => "a number",
            Type::Text => "a text",
            Type::Bool => "a truth value",
            Type::Null => "null",
            Type::Undefined => "undefined",
            Type::Body => "a body value",
        }
    }
}

/// What a checked node does; operands stand before it.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Number(f64),
    /// WTF-8.
    Text(Vec<u8>),
    Bool(bool),
    Null,
    Undefined,
    Property(String),
    System(String),
    /// `$x`: the application property named `$x`, else the system property `x`.
    PropertyOrSystem {
        property: String,
        system: String,
    },
    /// The application property comes first, if one is named.
    Body {
        property: Option<String>,
        path: BodyPath,
    },
    Negate,
    Not,
    Binary(BinaryOperator),
    Call(Function, usize),
}

/// A node with its type; `first` is where its operands begin.
#[derive(Clone, Debug)]
pub(crate) struct CheckedNode {
    pub(crate) operation: Operation,
    pub(crate) result: Type,
    pub(crate) first: usize,
}

/// A condition without type errors, in postfix order like [`Tree`].
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) nodes: Vec<CheckedNode>,
}

/// Gives each node of `tree` its type, operands before operators, left before right.
///
/// `text` is what the spans of the tree count in.
pub(crate) fn check(text: &str, tree: &Tree) -> Result<Checked, Vec<Fault>> {
    let nodes = Vec::with_capacity(tree.nodes.len());
    let mut checker = Checker { text, tree: &tree.nodes, nodes, faults: Vec::new() };
    for node in &tree.nodes {
        let (operation, result) = checker.node(node);
        checker.nodes.push(CheckedNode { operation, result, first: node.first });
    }
    let mut faults: Vec<Fault> = checker.faults.into_iter().map(|(_, fault)| fault).collect();
    if faults.iter().any(|fault| fault.category == Category::Unsupported) {
        faults.retain(|fault| fault.category == Category::Unsupported);
    }
    if faults.is_empty() { Ok(Checked { nodes: checker.nodes }) } else { Err(faults) }
}

struct Checker<'t> {
    text: &'t str,
    tree: &'t [Node],
    nodes: Vec<CheckedNode>,
    /// Each with the node that it was found at.
    faults: Vec<(usize, Fault)>,
}

type Typed = (Operation, Type);

/// What stands in the place of a node that is wrong.
const WRONG: Typed = (Operation::Undefined, Type::Undefined);

impl Checker<'_> {
    fn node(&mut self, node: &Node) -> Typed {
        let own = node.span.of(self.text);
        match node.kind {
            NodeKind::Property => (Operation::Property(own.to_owned()), Type::Text),
            NodeKind::System { braced } => self.system(node.span, own, braced),
            NodeKind::Text => {
                let inner = own.get(1..own.len().saturating_sub(1)).unwrap_or_default();
                (Operation::Text(unescaped(inner)), Type::Text)
            }
            NodeKind::Unterminated => {
                let message = "the text has no closing quote";
                self.fault(Fault::new(Category::UnterminatedString, Stage::Compile, node.span, message));
                (Operation::Text(Vec::new()), Type::Text)
            }
            NodeKind::Integer | NodeKind::Real => match own.parse() {
                Ok(number) => (Operation::Number(number), Type::Number),
                // A real without digits, such as e5, has no value.
                Err(_) => WRONG,
            },
            NodeKind::Hex => match hexadecimal(own) {
                Some(number) => (Operation::Number(number), Type::Number),
                None => WRONG,
            },
            NodeKind::Bool(value) => (Operation::Bool(value), Type::Bool),
            NodeKind::Null => (Operation::Null, Type::Null),
            NodeKind::Undefined => WRONG,
            NodeKind::Negate => match self.operand() {
                Type::Number => (Operation::Negate, Type::Number),
                Type::Body => self.unsupported(
                    node.span,
                    "the sign of a body value cannot be changed",
                    "write 0 - value",
                ),
                given => self.operand_fault(node.span, own, &[given], "a number"),
            },
            NodeKind::Not => match self.operand() {
                Type::Bool | Type::Null | Type::Body => (Operation::Not, Type::Bool),
                given => {
                    let typed = self.operand_fault(node.span, own, &[given], "a truth value");
                    self.suggest_wider_not(node);
                    typed
                }
            },
            NodeKind::Binary(operator) => self.binary(node.span, own, operator),
            NodeKind::Call { arguments } => self.call(node, own, arguments),
            NodeKind::Invalid(category) => {
                let message = match category {
                    Category::MissingParen => "this parenthesis is not closed".to_owned(),
                    Category::UnmatchedParen => "one closing parenthesis too many".to_owned(),
                    _ => format!("{own:?} has no meaning here"),
                };
                self.fault(Fault::new(category, Stage::Compile, node.span, message));
                WRONG
            }
        }
    }

    fn fault(&mut self, fault: Fault) {
        self.faults.push((self.nodes.len(), fault));
    }

    /// The type of the only or the right operand of the node that comes next.
    fn operand(&self) -> Type {
        self.nodes.last().map_or(Type::Undefined, |node| node.result)
    }

    /// The types of the operands of the binary node that comes next.
    fn operands(&self) -> (Type, Type) {
        let right = self.nodes.last();
        let left = right.and_then(|right| self.nodes.get(right.first.checked_sub(1)?));
        (left.map_or(Type::Undefined, |left| left.result), self.operand())
    }

    fn system(&mut self, span: Span, name: &str, braced: bool) -> Typed {
        let bracketed = name.contains(['[', ']']);
        let property = || Some(name.to_owned()).filter(|_| !braced && !bracketed);
        if let Some(path) = text::strip_prefix(name, "$body.") {
            match BodyPath::parse(path) {
                Ok(path) => return (Operation::Body { property: property(), path }, Type::Body),
                Err(reason) => {
                    let fault = Fault::new(Category::BodyPath, Stage::Compile, span, reason);
                    self.fault(fault.with_hint("write $body.member, $body.member.inner or $body.list[0]"));
                    if braced {
                        return WRONG;
                    }
                }
            }
        }
        let system = name.get(1..).unwrap_or_default().to_owned();
        match property() {
            _ if bracketed => WRONG,
            Some(property) => (Operation::PropertyOrSystem { property, system }, Type::Text),
            None => (Operation::System(system), Type::Text),
        }
    }

    fn binary(&mut self, span: Span, own: &str, operator: BinaryOperator) -> Typed {
        use BinaryOperator::*;
        use Type::*;
        let (left, right) = self.operands();
        let typed = |result| (Operation::Binary(operator), result);
        match operator {
            Multiply | Divide | Remainder | Add | Subtract => match (left, right) {
                (Number, Number) => typed(Number),
                (Number | Body, Number | Body) if operator == Remainder => self.unsupported(
                    span,
                    "there is no remainder of body values",
                    "only of numbers: as_number(value)",
                ),
                (Number | Body, Number | Body) => typed(Body),
                _ => self.operand_fault(span, own, &[left, right], "numbers"),
            },
            Concat => match (left, right) {
                (Text | Body, Text | Body) => typed(Text),
                _ => self.operand_fault(span, own, &[left, right], "texts"),
            },
            Equal | NotEqual | Less | LessOrEqual | Greater | GreaterOrEqual | Coalesce => {
                let common = match (left, right) {
                    (left, right) if left == right => Some(left),
                    (Body, Number | Text | Bool | Null) | (Number | Text | Bool | Null, Body) => Some(Body),
                    _ => None,
                };
                match common {
                    Some(common) => typed(if operator == Coalesce { common } else { Bool }),
                    None => self.operand_fault(span, own, &[left, right], "values of one type"),
                }
            }
            And | Or => match (left, right) {
                (Null, Undefined) | (Undefined, Null) => {
                    self.unsupported(span, "null cannot be combined with undefined", "leave one of them out")
                }
                (Body, Null) if operator == And => self.unsupported(
                    span,
                    "a body value cannot be combined with null",
                    "compare it: value = null",
                ),
                (Null, Null) => typed(Null),
                (Bool, Null) | (Null, Bool) => typed(if operator == And { Null } else { Bool }),
                (Bool | Undefined, Bool | Undefined) | (Body, _) => typed(Bool),
                _ => self.operand_fault(span, own, &[left, right], "truth values"),
            },
        }
    }

    fn call(&mut self, node: &Node, name: &str, arguments: usize) -> Typed {
        let Some(function) = Function::of_name(name) else {
            // The arguments of a function that does not exist are not looked at.
            self.faults.retain(|(at, _)| *at < node.first);
            let message = format!("there is no function {name:?}");
            let fault = Fault::new(Category::UnknownFunction, Stage::Compile, node.span, message);
            self.fault(match nearest(name, Function::names()) {
                Some(known) => fault.with_guess(node.span, known),
                None => fault,
            });
            return WRONG;
        };
        let mut given = Vec::with_capacity(arguments);
        let mut end = self.nodes.len();
        for _ in 0..arguments {
            let Some(argument) = end.checked_sub(1).and_then(|last| self.nodes.get(last)) else { break };
            given.push(argument.result);
            end = argument.first;
        }
        given.reverse();
        match function.result(&given) {
            Some(result) => (Operation::Call(function, arguments), result),
            None => {
                let message = format!("{} does not take {}", name, list(&given));
                let fault = Fault::new(Category::Argument, Stage::Compile, node.span, message);
                self.fault(fault.with_hint(format!("it is {}", function.usage())));
                WRONG
            }
        }
    }

    fn operand_fault(&mut self, span: Span, operator: &str, given: &[Type], wanted: &str) -> Typed {
        let message = format!("{operator:?} needs {wanted}, not {}", list(given));
        let fault = Fault::new(Category::Operand, Stage::Compile, span, message);
        self.fault(match given {
            [Type::Text, Type::Number] | [Type::Number, Type::Text] => {
                let place = self.operand_place(given[0] == Type::Text);
                fault
                    .with_hint("convert the text: as_number(text)")
                    .with_replacement(place, format!("as_number({})", place.of(self.text)))
            }
            [Type::Bool | Type::Null | Type::Undefined, Type::Body] => {
                let place = self.operand_place(false);
                fault
                    .with_hint("compare the body value: value = true")
                    .with_replacement(place, format!("{} = true", place.of(self.text)))
            }
            _ => fault,
        });
        WRONG
    }

    /// The place of an operand of the binary node that comes next.
    fn operand_place(&self, left: bool) -> Span {
        let right = self.nodes.len().saturating_sub(1);
        let at = match left {
            true => self.nodes.get(right).map_or(0, |right| right.first.saturating_sub(1)),
            false => right,
        };
        self.tree.get(at).map_or(Span { start: 0, end: 0 }, |node| node.extent)
    }

    /// `NOT a = b` is `(NOT a) = b`: where the operand of NOT does not fit, the comparison is likely to be meant.
    fn suggest_wider_not(&mut self, not: &Node) {
        let at = self.nodes.len();
        let parent = self.tree.iter().skip(at + 1).find(|node| node.first <= not.first);
        let (Some(parent), Some(operand)) = (parent, at.checked_sub(1).and_then(|at| self.tree.get(at)))
        else {
            return;
        };
        if parent.negates_only_left_of_comparison(not)
            && let Some((_, fault)) = self.faults.last_mut()
        {
            let meant = Span { start: operand.extent.start, end: parent.extent.end };
            fault.hint =
                Some("NOT binds tighter than a comparison: put the comparison in parentheses".into());
            fault.replacement = Some((parent.extent, format!("NOT ({})", meant.of(self.text))));
        }
    }

    fn unsupported(&mut self, span: Span, message: &str, hint: &str) -> Typed {
        self.fault(Fault::new(Category::Unsupported, Stage::Compile, span, message).with_hint(hint));
        WRONG
    }
}

fn list(types: &[Type]) -> String {
    match types {
        [] => "nothing".to_owned(),
        _ => types.iter().map(|given| given.words()).collect::<Vec<_>>().join(" and "),
    }
}

/// The signed 64-bit number that at most 16 significant digits are.
fn hexadecimal(own: &str) -> Option<f64> {
    let digits = own.get(2..)?.trim_start_matches('0');
    if digits.is_empty() {
        return Some(0.0);
    }
    u64::from_str_radix(digits, 16).ok().map(|bits| bits as i64 as f64)
}

/// The value of a text literal, made in two passes: units by their number first, then escaped quotes and backslashes.
fn unescaped(inner: &str) -> Vec<u8> {
    if !inner.contains('\\') {
        return inner.as_bytes().to_vec();
    }
    let units: Vec<u16> = inner.encode_utf16().collect();
    let mut numbered = Vec::with_capacity(units.len());
    let mut rest = &units[..];
    while let [first, tail @ ..] = rest {
        match escaped_unit(rest) {
            Some((unit, after)) => {
                numbered.push(unit);
                rest = after;
            }
            None => {
                numbered.push(*first);
                rest = tail;
            }
        }
    }
    let mut value = Vec::with_capacity(inner.len());
    let mut rest = &numbered[..];
    const BACKSLASH: u16 = b'\\' as u16;
    const QUOTE: u16 = b'"' as u16;
    const APOSTROPHE: u16 = b'\'' as u16;
    while let [first, tail @ ..] = rest {
        let (unit, after) = match (first, tail) {
            (&BACKSLASH, [escaped @ (BACKSLASH | QUOTE | APOSTROPHE), after @ ..]) => (*escaped, after),
            _ => (*first, tail),
        };
        text::push_unit(&mut value, 0, unit);
        rest = after;
    }
    value
}

fn escaped_unit(units: &[u16]) -> Option<(u16, &[u16])> {
    let ([backslash, letter, digits @ ..], after) = units.split_at_checked(6)? else { return None };
    if *backslash != u16::from(b'\\') || ![u16::from(b'u'), u16::from(b'U')].contains(letter) {
        return None;
    }
    let digit = |unit: &u16| char::from_u32(u32::from(*unit)).and_then(|digit| digit.to_digit(16));
    let value = digits.iter().try_fold(0, |value, unit| Some(value << 4 | digit(unit)?))?;
    Some((value as u16, after))
}
