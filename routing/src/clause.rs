//! Owns the clauses of a condition: a condition is a conjunction of clauses, and each clause is about one subject.
//!
//! `level = 'hot' AND ($body.rpm < 5 OR $body.rpm > 90)` has two: one tests the subject `level`, one `$body.rpm`. What a
//! clause says of its subject are comparisons with literals, joined by `AND`, `OR` and `NOT`: defined exactly if the
//! subject is comparable, and then fixed by where the subject stands among the literals. Whatever has another form is a
//! clause whose subject is the part of the condition itself, and which tests that it is true.

use std::cmp::Ordering;

use smallvec::SmallVec;

use crate::check::{Checked, Operation, Type};
use crate::expression::{ExpressionId, Expressions};
use crate::program::Comparison;
use crate::syntax::BinaryOperator;
use crate::text;

/// Clauses of one condition; one that has more is taken whole, as a single clause.
const CLAUSES_MAX: usize = 8;

/// Literals that a clause compares its subject with; a part that has more is taken as a subject itself.
const LITERALS_MAX: usize = 8;

/// What a subject is compared with.
#[derive(Clone, Debug)]
pub(crate) enum Literal {
    Bool(bool),
    Number(f64),
    /// WTF-8.
    Text(Vec<u8>),
    Null,
}

impl Literal {
    /// The order of body values, which is also that of values of one type.
    pub(crate) fn order(&self, other: &Literal) -> Ordering {
        match (self, other) {
            (Literal::Bool(own), Literal::Bool(other)) => own.cmp(other),
            (Literal::Number(own), Literal::Number(other)) => {
                own.partial_cmp(other).unwrap_or(Ordering::Equal)
            }
            (Literal::Text(own), Literal::Text(other)) => text::compare(own, other),
            _ => self.rank().cmp(&other.rank()),
        }
    }

    /// The place of its kind in the order of body values.
    pub(crate) fn rank(&self) -> u8 {
        match self {
            Literal::Bool(_) => 0,
            Literal::Number(_) => 1,
            Literal::Text(_) => 2,
            Literal::Null => 3,
        }
    }
}

/// One step of what a clause tests, in postfix order.
#[derive(Clone, Copy, Debug)]
enum Test {
    /// The subject with that literal.
    Compare(Comparison, usize),
    Not,
    And,
    Or,
}

/// One clause.
#[derive(Clone, Debug)]
pub(crate) struct Clause {
    /// The subject's node in the checked tree.
    pub(crate) node: usize,
    pub(crate) subject: Subject,
    pub(crate) literals: Vec<Literal>,
    tests: Vec<Test>,
}

/// What a clause is about; the clauses of all routes about one subject belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Subject {
    /// The value of an expression.
    Value(ExpressionId),
    /// The truth of an expression, which may be a body value: then everything but a truth value is undefined.
    Truth(ExpressionId),
}

impl Clause {
    /// Does it hold for a subject that stands in this order to the literals?
    pub(crate) fn holds(&self, order: impl Fn(usize) -> Ordering) -> bool {
        let mut stack: SmallVec<[bool; 16]> = SmallVec::new();
        for test in &self.tests {
            let value = match test {
                Test::Compare(comparison, literal) => comparison.holds(order(*literal)),
                Test::Not => !stack.pop().unwrap_or_default(),
                Test::And | Test::Or => {
                    let (right, left) = (stack.pop().unwrap_or_default(), stack.pop().unwrap_or_default());
                    if matches!(test, Test::And) { left && right } else { left || right }
                }
            };
            stack.push(value);
        }
        stack.pop().unwrap_or_default()
    }

    /// The truth of the node itself.
    fn whole(node: usize, expression: ExpressionId) -> Clause {
        Clause {
            node,
            subject: Subject::Truth(expression),
            literals: vec![Literal::Bool(true)],
            tests: vec![Test::Compare(Comparison::Equal, 0)],
        }
    }

    /// Adds what `other` says of the same subject; false if that is too much for one clause.
    fn join(&mut self, other: &Clause) -> bool {
        let own = self.literals.len();
        if own + other.literals.len() > LITERALS_MAX {
            return false;
        }
        self.literals.extend(other.literals.iter().cloned());
        self.tests.extend(other.tests.iter().map(|test| match *test {
            Test::Compare(comparison, literal) => Test::Compare(comparison, own + literal),
            other => other,
        }));
        self.tests.push(Test::And);
        true
    }
}

/// The clauses of a condition, those first that are quick to look at; none if it is true for every message.
///
/// `ids` are the expressions of its nodes.
pub(crate) fn clauses(checked: &Checked, ids: &[ExpressionId], expressions: &Expressions) -> Vec<Clause> {
    let reader = Reader { checked, ids };
    let Some(root) = checked.nodes.len().checked_sub(1) else { return Vec::new() };
    let mut clauses: Vec<Clause> = Vec::new();
    let mut due = vec![root];
    while let Some(node) = due.pop() {
        if let Some((left, right)) = reader.both(node, BinaryOperator::And) {
            due.extend([right, left]);
            continue;
        }
        if matches!(reader.operation(node), Some(Operation::Bool(true))) {
            continue;
        }
        let clause = reader.single_subject(node).unwrap_or_else(|| Clause::whole(node, reader.id(node)));
        match clauses.iter_mut().find(|known| known.subject == clause.subject) {
            None => clauses.push(clause),
            Some(known) => {
                let joined = known.join(&clause);
                // A subject has one clause in a condition, so what cannot be joined is a subject itself.
                let whole = Clause::whole(node, reader.id(node));
                if !joined && clauses.iter().all(|known| known.subject != whole.subject) {
                    clauses.push(whole);
                }
            }
        }
        if clauses.len() > CLAUSES_MAX {
            return vec![Clause::whole(root, reader.id(root))];
        }
    }
    clauses.sort_by_key(|clause| {
        let body = expressions.needs_body(reader.id(clause.node));
        (body, matches!(clause.subject, Subject::Truth(_)))
    });
    clauses
}

struct Reader<'t> {
    checked: &'t Checked,
    ids: &'t [ExpressionId],
}

impl Reader<'_> {
    fn id(&self, node: usize) -> ExpressionId {
        self.ids.get(node).copied().unwrap_or(ExpressionId::MAX)
    }

    fn operation(&self, node: usize) -> Option<&Operation> {
        self.checked.nodes.get(node).map(|node| &node.operation)
    }

    fn result(&self, node: usize) -> Option<Type> {
        self.checked.nodes.get(node).map(|node| node.result)
    }

    fn operands(&self, node: usize) -> Option<(usize, usize)> {
        let right = node.checked_sub(1)?;
        let left = self.checked.nodes.get(right)?.first.checked_sub(1)?;
        Some((left, right))
    }

    /// The operands of a node that joins two truth values by `operator`, in three-valued logic.
    fn both(&self, node: usize, operator: BinaryOperator) -> Option<(usize, usize)> {
        if !matches!(self.operation(node)?, Operation::Binary(own) if *own == operator) {
            return None;
        }
        let (left, right) = self.operands(node)?;
        let truth = |node| self.result(node) == Some(Type::Bool);
        (truth(left) && truth(right)).then_some((left, right))
    }

    /// The clause of a part that compares one subject with literals, and nothing else.
    fn single_subject(&self, root: usize) -> Option<Clause> {
        enum Work {
            Node(usize),
            Emit(Test),
        }
        let mut clause: Option<Clause> = None;
        let mut tests = Vec::new();
        let mut due = vec![Work::Node(root)];
        while let Some(next) = due.pop() {
            let node = match next {
                Work::Emit(test) => {
                    tests.push(test);
                    continue;
                }
                Work::Node(node) => node,
            };
            if let Some((left, right)) = self.both(node, BinaryOperator::And) {
                due.extend([Work::Emit(Test::And), Work::Node(right), Work::Node(left)]);
            } else if let Some((left, right)) = self.both(node, BinaryOperator::Or) {
                due.extend([Work::Emit(Test::Or), Work::Node(right), Work::Node(left)]);
            } else if matches!(self.operation(node)?, Operation::Not)
                && self.result(node.checked_sub(1)?) == Some(Type::Bool)
            {
                due.extend([Work::Emit(Test::Not), Work::Node(node - 1)]);
            } else {
                let (subject, comparison, literal) = self.comparison(node)?;
                let own = clause.get_or_insert_with(|| Clause {
                    node: subject,
                    subject: Subject::Value(self.id(subject)),
                    literals: Vec::new(),
                    tests: Vec::new(),
                });
                if own.subject != Subject::Value(self.id(subject)) || own.literals.len() == LITERALS_MAX {
                    return None;
                }
                tests.push(Test::Compare(comparison, own.literals.len()));
                own.literals.push(literal);
            }
        }
        clause.map(|clause| Clause { tests, ..clause })
    }

    /// A comparison of something with a literal.
    fn comparison(&self, node: usize) -> Option<(usize, Comparison, Literal)> {
        let Operation::Binary(operator) = self.operation(node)? else { return None };
        let comparison = Comparison::of(*operator)?;
        let (left, right) = self.operands(node)?;
        let (subject, comparison, literal) = match (self.literal(left), self.literal(right)) {
            (_, Some(literal)) => (left, comparison, literal),
            (Some(literal), None) => (right, comparison.mirrored(), literal),
            (None, None) => return None,
        };
        let comparable = matches!(self.result(subject)?, Type::Number | Type::Text | Type::Bool | Type::Body);
        comparable.then_some((subject, comparison, literal))
    }

    fn literal(&self, node: usize) -> Option<Literal> {
        match self.operation(node)? {
            Operation::Number(number) => Some(Literal::Number(*number)),
            Operation::Text(text) => Some(Literal::Text(text.clone())),
            Operation::Bool(value) => Some(Literal::Bool(*value)),
            Operation::Null => Some(Literal::Null),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::check;
    use crate::syntax::parse_condition;

    /// Subject and number of literals of each clause.
    fn shape(text: &str) -> Vec<(bool, usize)> {
        let tree = parse_condition(text).expect("parses").expect("not empty");
        let checked = check(text, &tree).expect("fits");
        let mut expressions = Expressions::default();
        let ids = expressions.add(&checked);
        let clauses = clauses(&checked, &ids, &expressions);
        clauses
            .iter()
            .map(|clause| (matches!(clause.subject, Subject::Value(_)), clause.literals.len()))
            .collect()
    }

    #[test]
    fn conditions_fall_into_clauses() {
        let (value, whole) = (true, false);
        for (text, expected) in [
            ("true", vec![]),
            ("true AND (true AND true)", vec![]),
            ("level = 'hot'", vec![(value, 1)]),
            ("'hot' = LEVEL OR (NOT (level < 'a') AND level != 'b')", vec![(value, 3)]),
            ("$body.t >= 3 AND 9 > $body.t AND site = 'x'", vec![(value, 1), (value, 2)]),
            ("level = 'a' OR site = 'b'", vec![(whole, 1)]),
            ("level = site AND as_number(rpm) > 5", vec![(value, 1), (whole, 1)]),
            ("is_defined(level) = true", vec![(value, 1)]),
            ("$body.open", vec![(whole, 1)]),
            ("$body.open AND true", vec![(whole, 1)]),
            ("level = 'a' AND null", vec![(whole, 1)]),
            ("level = 'a' AND undefined", vec![(whole, 1)]),
            ("level = 'a' AND false", vec![(value, 1), (whole, 1)]),
            ("null = null", vec![(whole, 1)]),
        ] {
            assert_eq!(shape(text), expected, "{text}");
        }
    }

    #[test]
    fn clauses_are_bounded() {
        let comparisons = |count: usize, operator: &str| {
            (0..count).map(|n| format!("level <> '{n}'")).collect::<Vec<_>>().join(operator)
        };
        assert_eq!(shape(&comparisons(LITERALS_MAX, " OR ")), [(true, LITERALS_MAX)]);
        assert_eq!(shape(&comparisons(LITERALS_MAX + 1, " OR ")), [(false, 1)]);
        assert_eq!(shape(&comparisons(LITERALS_MAX + 1, " AND ")), [(true, LITERALS_MAX), (false, 1)]);
        let subjects =
            |count: usize| (0..count).map(|n| format!("a{n} = ''")).collect::<Vec<_>>().join(" AND ");
        assert_eq!(shape(&subjects(CLAUSES_MAX)).len(), CLAUSES_MAX);
        assert_eq!(shape(&subjects(CLAUSES_MAX + 1)), [(false, 1)]);
    }
}
