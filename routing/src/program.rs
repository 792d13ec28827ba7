//! Owns the program of a condition: the checked tree as a flat list of operations on a stack, names and paths shared by
//! all conditions of a table.

use std::collections::HashMap;

use crate::body::BodyPaths;
use crate::check::{Checked, CheckedNode, Operation, Type};
use crate::function::Function;
use crate::message::PropertyName;
use crate::syntax::BinaryOperator;

/// What the programs of one table have in common.
#[derive(Debug, Default)]
pub(crate) struct Vocabulary {
    names: Vec<PropertyName>,
    name_slots: HashMap<Box<str>, u32>,
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
}

/// A condition, ready to be evaluated.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) ops: Vec<Op>,
}

/// What is still to be done while a tree is turned into operations.
enum Work {
    Node(usize),
    Emit(Op),
    /// Emits a jump whose target is not known yet.
    Jump(Op),
    /// The target of the latest jump is here.
    Land,
}

impl Program {
    /// The program of a tree; names, literals and paths are added to `vocabulary`.
    pub(crate) fn new(checked: &Checked, vocabulary: &mut Vocabulary) -> Program {
        let mut compiler = Compiler { nodes: &checked.nodes, vocabulary, ops: Vec::new(), jumps: Vec::new() };
        match checked.nodes.last().map(|root| root.result) {
            Some(Type::Bool | Type::Body) => compiler.compile(checked.nodes.len() - 1),
            Some(Type::Null) => compiler.ops.push(Op::Bool(false)),
            Some(Type::Number | Type::Text | Type::Undefined) | None => compiler.ops.push(Op::Undefined),
        }
        compiler.ops.shrink_to_fit();
        Program { ops: compiler.ops }
    }

    /// Is it true for every message?
    pub(crate) fn is_true(&self) -> bool {
        matches!(self.ops[..], [Op::Bool(true)])
    }
}

struct Compiler<'t> {
    nodes: &'t [CheckedNode],
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
                Work::Node(node) => self.node(node, &mut work),
                Work::Emit(op) => self.ops.push(op),
                Work::Jump(op) => {
                    self.jumps.push(self.ops.len());
                    self.ops.push(op);
                }
                Work::Land => {
                    let here = self.ops.len() as u32;
                    let jump = self.jumps.pop().and_then(|jump| self.ops.get_mut(jump));
                    if let Some(
                        Op::JumpIf(_, target) | Op::JumpIfDefined(target) | Op::JumpIfNumber(target),
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
            BinaryOperator::Equal => return self.compare(at, Comparison::Equal, types, work),
            BinaryOperator::NotEqual => return self.compare(at, Comparison::NotEqual, types, work),
            BinaryOperator::Less => return self.compare(at, Comparison::Less, types, work),
            BinaryOperator::LessOrEqual => return self.compare(at, Comparison::LessOrEqual, types, work),
            BinaryOperator::Greater => return self.compare(at, Comparison::Greater, types, work),
            BinaryOperator::GreaterOrEqual => {
                return self.compare(at, Comparison::GreaterOrEqual, types, work);
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
