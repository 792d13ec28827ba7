//! Owns the program of an expression: the checked tree as a flat list of operations on a stack, names and paths shared by
//! all programs of a table. A value that several programs need is kept by the first of them that a message lets run.

use std::collections::HashMap;

use ahash::RandomState;

use crate::body::BodyPaths;
use crate::check::{Checked, CheckedNode, Operation, Type};
use crate::function::Function;
use crate::message::{PropertyName, SystemProperty};
use crate::syntax::BinaryOperator;

/// What the programs of one table have in common.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary {
    names: Vec<PropertyName>,
    name_slots: HashMap<Box<str>, u32, RandomState>,
    literals: Vec<Box<[u8]>>,
    literal_slots: HashMap<Box<[u8]>, u32>,
    pub(crate) paths: BodyPaths,
}

impl Vocabulary {
    fn name(&mut self, spelled: &str) -> u32 {
        let name = PropertyName::new(spelled);
        if let Some(slot) = self.name_slots.get(name.folded()) {
            return *slot;
        }
        let slot = self.names.len() as u32;
        self.name_slots.insert(name.folded().into(), slot);
        self.names.push(name);
        slot
    }

    fn literal(&mut self, text: &[u8]) -> u32 {
        if let Some(slot) = self.literal_slots.get(text) {
            return *slot;
        }
        let slot = self.literals.len() as u32;
        self.literal_slots.insert(text.into(), slot);
        self.literals.push(text.into());
        slot
    }

    /// How many names there are.
    pub(crate) fn names(&self) -> usize {
        self.names.len()
    }

    /// The number of the name that is `folded` when its case is folded away.
    pub(crate) fn name_of(&self, folded: &str) -> Option<u32> {
        self.name_slots.get(folded).copied()
    }

    pub(crate) fn name_at(&self, slot: u32) -> Option<&PropertyName> {
        self.names.get(slot as usize)
    }

    pub(crate) fn literal_at(&self, slot: u32) -> &[u8] {
        self.literals.get(slot as usize).map_or(&[][..], |literal| literal)
    }
}

/// The six comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Comparison {
    /// The comparison that an operator is.
    pub(crate) fn of(operator: BinaryOperator) -> Option<Comparison> {
        match operator {
            BinaryOperator::Equal => Some(Comparison::Equal),
            BinaryOperator::NotEqual => Some(Comparison::NotEqual),
            BinaryOperator::Less => Some(Comparison::Less),
            BinaryOperator::LessOrEqual => Some(Comparison::LessOrEqual),
            BinaryOperator::Greater => Some(Comparison::Greater),
            BinaryOperator::GreaterOrEqual => Some(Comparison::GreaterOrEqual),
            BinaryOperator::Multiply
            | BinaryOperator::Divide
            | BinaryOperator::Remainder
            | BinaryOperator::Add
            | BinaryOperator::Subtract
            | BinaryOperator::Concat
            | BinaryOperator::And
            | BinaryOperator::Or
            | BinaryOperator::Coalesce => None,
        }
    }

    /// The same comparison with its sides exchanged.
    pub(crate) fn mirrored(self) -> Comparison {
        match self {
            Comparison::Equal | Comparison::NotEqual => self,
            Comparison::Less => Comparison::Greater,
            Comparison::LessOrEqual => Comparison::GreaterOrEqual,
            Comparison::Greater => Comparison::Less,
            Comparison::GreaterOrEqual => Comparison::LessOrEqual,
        }
    }
}

/// The five kinds of arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    Multiply,
    Divide,
    Remainder,
    Add,
    Subtract,
}

/// One operation. It takes its operands from the stack and leaves its result there.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Number(f64),
    Literal(u32),
    Bool(bool),
    Null,
    Undefined,
    Property(u32),
    System(u32),
    PropertyOrSystem {
        property: u32,
        system: u32,
    },
    Body(u32),
    PropertyOrBody {
        property: u32,
        slot: u32,
    },
    /// A number becomes a body value: there a result that is no number is not undefined, so it is told apart before.
    ToBody,
    Negate,
    /// The opposite of a truth value; null is true.
    Not,
    /// The opposite of a body value.
    NotBody,
    Arithmetic(Arithmetic),
    /// Undefined unless both are numbers.
    ArithmeticBody(Arithmetic),
    /// Two numbers or two truth values or two texts.
    Compare(Comparison),
    /// A text with a literal.
    CompareLiteral(Comparison, u32),
    CompareBody(Comparison),
    And,
    Or,
    /// Undefined unless both are truth values.
    AndBody,
    OrBody,
    /// Goes on at that operation if the value on the stack is this one, and leaves it there.
    JumpIf(bool, u32),
    /// Goes on at that operation if the value on the stack is defined; takes it off if it is not.
    JumpIfDefined(u32),
    /// The same, for a number.
    JumpIfNumber(u32),
    IsBool,
    IsNumber,
    IsString,
    IsDefined,
    IsDefinedNumber,
    IsNullText,
    IsNullBody,
    /// A function of that many texts or numbers.
    Call(Function, u32),
    /// Goes on at that operation, with the value of that number, if it is kept for this message.
    Recall(u32, u32),
    /// Keeps the value on the stack under that number, for this message.
    Keep(u32),
}

/// A condition, ready to be evaluated.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) ops: Vec<Op>,
}

/// What is still to be done while a tree is turned into operations.
enum Work {
    Node(usize),
    /// A node, even if its value is one that is kept.
    Compute(usize),
    Emit(Op),
    /// Emits a jump whose target is not known yet.
    Jump(Op),
    /// The target of the latest jump is here.
    Land,
}

impl Program {
    /// The program of a tree; names, literals and paths are added to `vocabulary`.
    pub(crate) fn new(checked: &Checked, vocabulary: &mut Vocabulary) -> Program {
        match checked.nodes.len().checked_sub(1) {
            Some(root) => Program::of_truth(checked, root, &[], vocabulary),
            None => Program { ops: vec![Op::Undefined] },
        }
    }

    /// The program that gives the truth of the node at `at` as that of a whole condition. See [`Program::of_value`].
    pub(crate) fn of_truth(
        checked: &Checked,
        at: usize,
        kept: &[Option<u32>],
        vocabulary: &mut Vocabulary,
    ) -> Program {
        match checked.nodes.get(at).map(|node| node.result) {
            Some(Type::Bool | Type::Body) => Program::of_value(checked, at, kept, vocabulary),
            Some(Type::Null) => Program { ops: vec![Op::Bool(false)] },
            Some(Type::Number | Type::Text | Type::Undefined) | None => Program { ops: vec![Op::Undefined] },
        }
    }

    /// The program that gives the value of the node at `at`. The nodes that have a number in `kept` share their values
    /// with all programs in which they have the same.
    pub(crate) fn of_value(
        checked: &Checked,
        at: usize,
        kept: &[Option<u32>],
        vocabulary: &mut Vocabulary,
    ) -> Program {
        let (ops, jumps) = (Vec::new(), Vec::new());
        let mut compiler = Compiler { nodes: &checked.nodes, kept, vocabulary, ops, jumps };
        compiler.compile(at);
        compiler.ops.shrink_to_fit();
        Program { ops: compiler.ops }
    }

    /// Does it ask for nothing of a message but system properties for which `constant` is true?
    pub(crate) fn is_constant(
        &self,
        vocabulary: &Vocabulary,
        constant: impl Fn(SystemProperty) -> bool,
    ) -> bool {
        self.ops.iter().all(|op| match op {
            Op::Property(_) | Op::PropertyOrSystem { .. } | Op::Body(_) | Op::PropertyOrBody { .. } => false,
            Op::System(name) => {
                vocabulary.name_at(*name).and_then(PropertyName::system).is_some_and(&constant)
            }
            _ => true,
        })
    }

    /// Does it ask for application properties?
    pub(crate) fn asks_properties(&self) -> bool {
        let asks =
            |op: &Op| matches!(op, Op::Property(_) | Op::PropertyOrSystem { .. } | Op::PropertyOrBody { .. });
        self.ops.iter().any(asks)
    }

    /// The name, if the program does nothing but give the value of that application property.
    pub(crate) fn property(&self) -> Option<u32> {
        match self.ops[..] {
            [Op::Property(name)] => Some(name),
            _ => None,
        }
    }
}

struct Compiler<'t> {
    nodes: &'t [CheckedNode],
    kept: &'t [Option<u32>],
    vocabulary: &'t mut Vocabulary,
    ops: Vec<Op>,
    /// Jumps without target.
    jumps: Vec<usize>,
}

impl Compiler<'_> {
    /// Emits the operations of the tree whose root is `root`. Chains of operators are deep trees, so no recursion.
    fn compile(&mut self, root: usize) {
        let mut work = vec![Work::Node(root)];
        while let Some(next) = work.pop() {
            match next {
                Work::Node(node) => match self.kept.get(node).copied().flatten() {
                    Some(kept) => work.extend([
                        Work::Land,
                        Work::Emit(Op::Keep(kept)),
                        Work::Compute(node),
                        Work::Jump(Op::Recall(kept, 0)),
                    ]),
                    None => self.node(node, &mut work),
                },
                Work::Compute(node) => self.node(node, &mut work),
                Work::Emit(op) => self.ops.push(op),
                Work::Jump(op) => {
                    self.jumps.push(self.ops.len());
                    self.ops.push(op);
                }
                Work::Land => {
                    let here = self.ops.len() as u32;
                    let jump = self.jumps.pop().and_then(|jump| self.ops.get_mut(jump));
                    if let Some(
                        Op::JumpIf(_, target)
                        | Op::JumpIfDefined(target)
                        | Op::JumpIfNumber(target)
                        | Op::Recall(_, target),
                    ) = jump
                    {
                        *target = here;
                    }
                }
            }
        }
    }

    fn result(&self, node: usize) -> Type {
        self.nodes.get(node).map_or(Type::Undefined, |node| node.result)
    }

    /// Emits a leaf, or puts what makes a node onto `work`, the last first.
    fn node(&mut self, at: usize, work: &mut Vec<Work>) {
        let Some(node) = self.nodes.get(at) else { return };
        let op = match &node.operation {
            Operation::Number(number) => Op::Number(*number),
            Operation::Text(text) => Op::Literal(self.vocabulary.literal(text)),
            Operation::Bool(value) => Op::Bool(*value),
            Operation::Null => Op::Null,
            Operation::Undefined => Op::Undefined,
            Operation::Property(name) => Op::Property(self.vocabulary.name(name)),
            Operation::System(name) => Op::System(self.vocabulary.name(name)),
            Operation::PropertyOrSystem { property, system } => {
                let (property, system) = (self.vocabulary.name(property), self.vocabulary.name(system));
                Op::PropertyOrSystem { property, system }
            }
            Operation::Body { property, path } => {
                let slot = self.vocabulary.paths.intern(path);
                match property {
                    Some(property) => Op::PropertyOrBody { property: self.vocabulary.name(property), slot },
                    None => Op::Body(slot),
                }
            }
            Operation::Negate => return work.extend([Work::Emit(Op::Negate), Work::Node(at - 1)]),
            Operation::Not => {
                let op = if self.result(at - 1) == Type::Body { Op::NotBody } else { Op::Not };
                return work.extend([Work::Emit(op), Work::Node(at - 1)]);
            }
            Operation::Binary(operator) => return self.binary(at, *operator, work),
            Operation::Call(function, arguments) => return self.call(at, *function, *arguments, work),
        };
        self.ops.push(op);
    }

    fn binary(&mut self, at: usize, operator: BinaryOperator, work: &mut Vec<Work>) {
        let right = at - 1;
        let Some(left) = self.nodes.get(right).and_then(|right| right.first.checked_sub(1)) else { return };
        let types = (self.result(left), self.result(right));
        let body = types.0 == Type::Body || types.1 == Type::Body;
        let both = |op: Op| [Some(Work::Emit(op)), convert(types.1, body), Some(Work::Node(right))];
        let first = [convert(types.0, body), Some(Work::Node(left))];
        let arithmetic = |kind| if body { Op::ArithmeticBody(kind) } else { Op::Arithmetic(kind) };
        let op = match operator {
            BinaryOperator::Multiply => arithmetic(Arithmetic::Multiply),
            BinaryOperator::Divide => arithmetic(Arithmetic::Divide),
            BinaryOperator::Remainder => arithmetic(Arithmetic::Remainder),
            BinaryOperator::Add => arithmetic(Arithmetic::Add),
            BinaryOperator::Subtract => arithmetic(Arithmetic::Subtract),
            BinaryOperator::Concat => Op::Call(Function::Concat, 2),
            BinaryOperator::Equal
            | BinaryOperator::NotEqual
            | BinaryOperator::Less
            | BinaryOperator::LessOrEqual
            | BinaryOperator::Greater
            | BinaryOperator::GreaterOrEqual => {
                let Some(comparison) = Comparison::of(operator) else { return };
                return self.compare(at, comparison, types, work);
            }
            BinaryOperator::And if body => Op::AndBody,
            BinaryOperator::Or if body => Op::OrBody,
            BinaryOperator::And | BinaryOperator::Or => {
                let and = operator == BinaryOperator::And;
                match types {
                    (Type::Null, Type::Null) => self.ops.push(Op::Null),
                    (Type::Null, _) | (_, Type::Null) if and => self.ops.push(Op::Null),
                    (Type::Null, _) => work.push(Work::Node(right)),
                    (_, Type::Null) => work.push(Work::Node(left)),
                    _ => {
                        let op = if and { Op::And } else { Op::Or };
                        let rest = [Work::Node(right), Work::Jump(Op::JumpIf(!and, 0)), Work::Node(left)];
                        work.extend([Work::Land, Work::Emit(op)].into_iter().chain(rest));
                    }
                }
                return;
            }
            BinaryOperator::Coalesce => {
                if types.0 == Type::Undefined {
                    return work.push(Work::Node(right));
                }
                let jump =
                    if types.0 == Type::Number && !body { Op::JumpIfNumber(0) } else { Op::JumpIfDefined(0) };
                let right = [Some(Work::Land), convert(types.1, body), Some(Work::Node(right))];
                return work.extend(right.into_iter().chain([Some(Work::Jump(jump))]).chain(first).flatten());
            }
        };
        work.extend(both(op).into_iter().chain(first).flatten());
    }

    fn compare(&mut self, at: usize, comparison: Comparison, types: (Type, Type), work: &mut Vec<Work>) {
        let right = at - 1;
        let Some(left) = self.nodes.get(right).and_then(|right| right.first.checked_sub(1)) else { return };
        let body = types.0 == Type::Body || types.1 == Type::Body;
        let literal = match self.nodes.get(right).map(|node| &node.operation) {
            Some(Operation::Text(text)) if types.0 == Type::Text => Some(self.vocabulary.literal(text)),
            _ => None,
        };
        match (types, literal) {
            ((Type::Null, Type::Null), _) => {
                let same = [Comparison::Equal, Comparison::LessOrEqual, Comparison::GreaterOrEqual];
                self.ops.push(Op::Bool(same.contains(&comparison)));
            }
            ((Type::Undefined, Type::Undefined), _) => self.ops.push(Op::Undefined),
            (_, Some(literal)) => {
                work.extend([Work::Emit(Op::CompareLiteral(comparison, literal)), Work::Node(left)]);
            }
            _ => {
                let op = if body { Op::CompareBody(comparison) } else { Op::Compare(comparison) };
                let right = [Some(Work::Emit(op)), convert(types.1, body), Some(Work::Node(right))];
                work.extend(
                    right.into_iter().chain([convert(types.0, body), Some(Work::Node(left))]).flatten(),
                );
            }
        }
    }

    fn call(&mut self, at: usize, function: Function, arguments: usize, work: &mut Vec<Work>) {
        let given = self.result(at - 1);
        let op = match (function, given) {
            (Function::IsBool, Type::Bool | Type::Body) => Op::IsBool,
            (Function::IsNumber, Type::Number | Type::Body) => Op::IsNumber,
            (Function::IsString, Type::Text | Type::Body) => Op::IsString,
            (Function::IsDefined, Type::Number) => Op::IsDefinedNumber,
            (Function::IsDefined, Type::Text | Type::Bool | Type::Body) => Op::IsDefined,
            (Function::IsNull, Type::Text) => Op::IsNullText,
            (Function::IsNull, Type::Body) => Op::IsNullBody,
            (Function::IsDefined | Function::IsNull, Type::Null) => return self.ops.push(Op::Bool(true)),
            (
                Function::IsBool
                | Function::IsNumber
                | Function::IsString
                | Function::IsDefined
                | Function::IsNull,
                _,
            ) => return self.ops.push(Op::Bool(false)),
            (function, _) => Op::Call(function, arguments as u32),
        };
        work.push(Work::Emit(op));
        let mut end = at;
        for _ in 0..arguments {
            let Some(last) = end.checked_sub(1) else { break };
            work.push(Work::Node(last));
            end = self.nodes.get(last).map_or(0, |node| node.first);
        }
    }
}

/// What makes a value of type `given` the operand of an operation on body values.
fn convert(given: Type, body: bool) -> Option<Work> {
    (body && given == Type::Number).then_some(Work::Emit(Op::ToBody))
}
