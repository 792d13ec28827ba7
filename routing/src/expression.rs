//! Owns the expressions of a table: equal ones are one, whichever routes they stand in.

use std::collections::HashMap;

use smallvec::SmallVec;

use crate::body::BodyPath;
use crate::check::{Checked, Operation, Type};
use crate::function::Function;
use crate::syntax::BinaryOperator;
use crate::text;

/// Values that are kept for a message because several expressions need them; what goes beyond is evaluated again.
const KEPT_VALUES_MAX: u32 = 4096;

/// Number of an expression.
pub(crate) type ExpressionId = u32;

/// What makes an expression the same as another.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Expression {
    kind: Kind,
    operands: SmallVec<[ExpressionId; 2]>,
}

/// [`Operation`] without what does not matter: the case of names.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Kind {
    Number(u64),
    Text(Vec<u8>),
    Bool(bool),
    Null,
    Undefined,
    Property(String),
    System(String),
    PropertyOrSystem(String, String),
    Body(Option<String>, BodyPath),
    Negate,
    Not,
    Binary(BinaryOperator),
    Call(Function),
}

/// All expressions of the routes of one table.
#[derive(Debug, Default)]
pub(crate) struct Expressions {
    known: HashMap<Expression, ExpressionId>,
    facts: Vec<Facts>,
}

#[derive(Debug)]
struct Facts {
    operands: SmallVec<[ExpressionId; 2]>,
    /// Its value is found by computing, and can be kept.
    kept: bool,
    body: bool,
}

impl Expressions {
    /// The expression of each node of a tree.
    pub(crate) fn add(&mut self, checked: &Checked) -> Vec<ExpressionId> {
        let mut ids: Vec<ExpressionId> = Vec::with_capacity(checked.nodes.len());
        for (at, node) in checked.nodes.iter().enumerate() {
            let (kind, operands) = kind(&node.operation);
            let operands: SmallVec<[ExpressionId; 2]> =
                operands_of(checked, at, operands).filter_map(|operand| ids.get(operand).copied()).collect();
            let body =
                matches!(kind, Kind::Body(..)) || operands.iter().any(|operand| self.needs_body(*operand));
            let kept = !operands.is_empty() && matches!(node.result, Type::Number | Type::Bool | Type::Body);
            let new = self.facts.len() as ExpressionId;
            let expression = Expression { kind, operands };
            let id = match self.known.get(&expression) {
                Some(id) => *id,
                None => {
                    self.facts.push(Facts { operands: expression.operands.clone(), kept, body });
                    self.known.insert(expression, new);
                    new
                }
            };
            ids.push(id);
        }
        ids
    }

    /// Does its value depend on the body?
    pub(crate) fn needs_body(&self, expression: ExpressionId) -> bool {
        self.facts.get(expression as usize).is_some_and(|facts| facts.body)
    }

    /// The expressions whose value is kept because it is needed more than once when `roots` are evaluated, each with its
    /// number among them.
    pub(crate) fn kept(&self, roots: impl Iterator<Item = ExpressionId>) -> HashMap<ExpressionId, u32> {
        let mut uses = vec![0_u32; self.facts.len()];
        let mut kept = HashMap::new();
        let mut due: Vec<ExpressionId> = roots.collect();
        while let Some(next) = due.pop() {
            let (Some(facts), Some(uses)) = (self.facts.get(next as usize), uses.get_mut(next as usize))
            else {
                continue;
            };
            *uses += 1;
            match *uses {
                1 => due.extend(&facts.operands),
                2 if facts.kept && (kept.len() as u32) < KEPT_VALUES_MAX => {
                    kept.insert(next, kept.len() as u32);
                }
                _ => {}
            }
        }
        kept
    }
}

/// The operands of the node at `at`, the last first.
fn operands_of(checked: &Checked, at: usize, count: usize) -> impl Iterator<Item = usize> {
    let before = |node: usize| checked.nodes.get(node).and_then(|node| node.first.checked_sub(1));
    std::iter::successors(at.checked_sub(1), move |last| before(*last)).take(count)
}

/// What an operation is, and how many operands it has.
fn kind(operation: &Operation) -> (Kind, usize) {
    match operation {
        Operation::Number(number) => (Kind::Number(number.to_bits()), 0),
        Operation::Text(text) => (Kind::Text(text.clone()), 0),
        Operation::Bool(value) => (Kind::Bool(*value), 0),
        Operation::Null => (Kind::Null, 0),
        Operation::Undefined => (Kind::Undefined, 0),
        Operation::Property(name) => (Kind::Property(text::folded(name)), 0),
        Operation::System(name) => (Kind::System(text::folded(name)), 0),
        Operation::PropertyOrSystem { property, system } => {
            (Kind::PropertyOrSystem(text::folded(property), text::folded(system)), 0)
        }
        Operation::Body { property, path } => {
            (Kind::Body(property.as_deref().map(text::folded), path.clone()), 0)
        }
        Operation::Negate => (Kind::Negate, 1),
        Operation::Not => (Kind::Not, 1),
        Operation::Binary(operator) => (Kind::Binary(*operator), 2),
        Operation::Call(function, arguments) => (Kind::Call(*function), *arguments),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::check;
    use crate::syntax::parse_condition;

    fn checked(text: &str) -> Checked {
        let tree = parse_condition(text).expect("parses").expect("not empty");
        check(text, &tree).expect("fits")
    }

    #[test]
    fn equal_expressions_are_one_whatever_the_case_of_names() {
        let mut expressions = Expressions::default();
        let root = |ids: Vec<ExpressionId>| ids.last().copied();
        let first = root(expressions.add(&checked("length(level) > 3 AND $body.a[0] = 1")));
        let same = root(expressions.add(&checked("LENGTH(Level)>3 and $body.a[0] = 1.0")));
        assert_eq!(first, same);
        let known = expressions.facts.len();
        for other in ["length(level) > 4", "length(level) > -3", "$body.A[0] = 1", "'level' = 'x'"] {
            let before = expressions.facts.len();
            expressions.add(&checked(other));
            assert!(expressions.facts.len() > before, "{other}");
        }
        assert!(expressions.facts.len() > known);
    }

    #[test]
    fn what_is_needed_twice_is_kept_unless_it_is_a_leaf_or_a_text() {
        let mut expressions = Expressions::default();
        let first = expressions.add(&checked("as_number(a) + 1 > length(lower(b))"));
        let second = expressions.add(&checked("as_number(A) * 2 > 7 OR starts_with(lower(b), 'x')"));
        let roots = [first.last(), second.last()].into_iter().flatten().copied();
        let kept = expressions.kept(roots);
        let as_number = first.get(1).expect("there is one");
        assert_eq!(kept.keys().collect::<Vec<_>>(), [as_number]);
    }
}
