//! Owns the syntax tree: tokens to a route's parts and to a condition's tree, without a look at types.

mod mistake;

use std::cell::RefCell;
use std::sync::LazyLock;

use pest::Parser;
use pest::error::{ErrorVariant, InputLocation};
use pest::iterators::{Pair, Pairs};
use pest::pratt_parser::{Assoc, Op, PrattParser};

use crate::diagnostic::{Category, Fault, Span, Stage};
use crate::lexer::{Token, TokenKind, tokens};
use crate::limits::{EXPRESSION_DEPTH_MAX, ROUTE_BYTES_MAX};
use crate::parens::{Role, irregular};

use mistake::explained;
pub(crate) use mistake::source_comment;

#[derive(pest_derive::Parser)]
#[grammar = "grammar.pest"]
struct Grammar;

/// The operators between two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum BinaryOperator {
    Multiply,
    Divide,
    Remainder,
    Add,
    Subtract,
    Concat,
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    And,
    Or,
    Coalesce,
}

impl BinaryOperator {
    /// The operator as it is written.
    pub(crate) fn sign(self) -> &'static str {
        match self {
            BinaryOperator::Multiply => "*",
            BinaryOperator::Divide => "/",
            BinaryOperator::Remainder => "%",
            BinaryOperator::Add => "+",
            BinaryOperator::Subtract => "-",
            BinaryOperator::Concat => "||",
            BinaryOperator::Equal => "=",
            BinaryOperator::NotEqual => "!=",
            BinaryOperator::Less => "<",
            BinaryOperator::LessOrEqual => "<=",
            BinaryOperator::Greater => ">",
            BinaryOperator::GreaterOrEqual => ">=",
            BinaryOperator::And => "AND",
            BinaryOperator::Or => "OR",
            BinaryOperator::Coalesce => "??",
        }
    }
}

/// What a node of the tree is. Operands stand before their operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeKind {
    Property,
    System { braced: bool },
    Text,
    Unterminated,
    Integer,
    Real,
    Hex,
    Bool(bool),
    Null,
    Undefined,
    Negate,
    Not,
    Binary(BinaryOperator),
    Call { arguments: usize },
    Invalid(Category),
}

/// A node, and in `first` where its operands begin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    pub(crate) kind: NodeKind,
    /// The operator, the function's name, or the operand itself.
    pub(crate) span: Span,
    /// The whole expression, without parentheses around it.
    pub(crate) extent: Span,
    pub(crate) first: usize,
}

impl Node {
    /// Is it a comparison whose left operand is `not`, without parentheses around it?
    pub(crate) fn negates_only_left_of_comparison(&self, not: &Node) -> bool {
        use BinaryOperator::*;
        let comparison = matches!(
            self.kind,
            NodeKind::Binary(Equal | NotEqual | Less | LessOrEqual | Greater | GreaterOrEqual)
        );
        let own = not.kind == NodeKind::Not && self.first == not.first;
        comparison && own && self.extent.start == not.extent.start
    }
}

/// A condition in postfix order: the operands of a node are the subtrees directly before it, the root is last. So no
/// walk over it needs recursion, however long a chain of operators is.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
}

/// A route, parsed but not compiled.
#[derive(Debug)]
pub(crate) struct RouteSyntax {
    /// The source pattern without the white space and comments between its tokens.
    pub(crate) pattern: String,
    /// From the first to the last token of the source pattern.
    pub(crate) source_span: Span,
    /// Place and tree of the condition.
    pub(crate) condition: Option<(Span, Tree)>,
    pub(crate) sink: SinkSyntax,
    pub(crate) sink_span: Span,
}

/// A sink as written.
#[derive(Debug)]
pub(crate) enum SinkSyntax {
    System(Span),
    /// The name, and the address without its quotes.
    Function(Span, Span),
}

/// Parses a whole route.
pub(crate) fn parse_route(text: &str) -> Result<RouteSyntax, Fault> {
    let tokens = read(text)?;
    if tokens.is_empty() {
        return Err(Fault::without_place(Category::EmptyRoute, Stage::Parse, "the route is empty")
            .with_hint("write FROM source INTO sink"));
    }
    let after = |from: usize, kind| {
        let rest = tokens.get(from..).unwrap_or_default();
        rest.iter().position(|token| token.kind == kind).map(|at| at + from)
    };
    let first = after(0, TokenKind::From).and_then(|from| after(from, TokenKind::Where)).map(|at| at + 1);
    let condition = match first {
        Some(first) => first..after(first, TokenKind::Into).unwrap_or(tokens.len()),
        None => 0..0,
    };
    let letters = letters(&tokens, condition, Stage::Parse)?;
    let route = parse(Rule::route, &letters, &tokens, text)?;
    let mut pattern = String::new();
    let mut source_span = Span { start: 0, end: 0 };
    let mut condition = None;
    let mut sink = None;
    for part in route.into_inner() {
        match part.as_rule() {
            Rule::source => {
                source_span = span_of(&tokens, &part);
                let span = part.as_span();
                let own = tokens.get(span.start()..span.end()).unwrap_or_default();
                own.iter().for_each(|token| pattern.push_str(token.of(text)));
            }
            Rule::condition => condition = Some((span_of(&tokens, &part), tree(&tokens, part))),
            Rule::sink => sink = Some((sink_of(&tokens, &part), span_of(&tokens, &part))),
            _ => {}
        }
    }
    let end = Span { start: text.len() as u32, end: text.len() as u32 };
    let (sink, sink_span) = sink.unwrap_or((SinkSyntax::System(end), end));
    Ok(RouteSyntax { pattern, source_span, condition, sink, sink_span })
}

/// Parses a condition that stands alone; none if there is no token in it.
pub(crate) fn parse_condition(text: &str) -> Result<Option<Tree>, Fault> {
    let compile = |mut fault: Fault| {
        fault.stage = Stage::Compile;
        fault
    };
    let tokens = read(text).map_err(compile)?;
    if tokens.is_empty() {
        return Ok(None);
    }
    let letters = letters(&tokens, 0..tokens.len(), Stage::Compile)?;
    let pair = parse(Rule::alone, &letters, &tokens, text).map_err(compile)?;
    Ok(Some(tree(&tokens, pair)))
}

fn read(text: &str) -> Result<Vec<Token>, Fault> {
    if text.len() > ROUTE_BYTES_MAX {
        let message = format!("the text is {} bytes long, at most {ROUTE_BYTES_MAX} are allowed", text.len());
        return Err(Fault::without_place(Category::Limit, Stage::Parse, message));
    }
    Ok(tokens(text))
}

/// The letters for the grammar. The nesting is bounded here, before anything that recurses sees it.
fn letters(tokens: &[Token], condition: std::ops::Range<usize>, stage: Stage) -> Result<String, Fault> {
    let mut letters: Vec<u8> = tokens.iter().map(|token| letter(token.kind)).collect();
    let own = tokens.get(condition.clone()).unwrap_or_default();
    check_depth(own, stage)?;
    for (at, role) in irregular(own) {
        if let Some(letter) = letters.get_mut(condition.start + at) {
            *letter = if role == Role::Unclosed { b'[' } else { b']' };
        }
    }
    Ok(letters.into_iter().map(char::from).collect())
}

fn check_depth(condition: &[Token], stage: Stage) -> Result<(), Fault> {
    let mut open: Vec<usize> = Vec::new();
    let mut depth = 0;
    let mut run = 0;
    for token in condition {
        match token.kind {
            TokenKind::LeftParen => {
                open.push(run + 1);
                depth += run + 1;
                run = 0;
            }
            TokenKind::RightParen => {
                depth -= open.pop().unwrap_or_default();
                run = 0;
            }
            TokenKind::Not | TokenKind::Minus | TokenKind::Unknown => run += 1,
            _ => run = 0,
        }
        if depth + run > EXPRESSION_DEPTH_MAX {
            let message = format!("the condition is nested more than {EXPRESSION_DEPTH_MAX} deep");
            return Err(Fault::new(Category::Limit, stage, token.span, message));
        }
    }
    Ok(())
}

fn letter(kind: TokenKind) -> u8 {
    match kind {
        TokenKind::LeftBrace => b'{',
        TokenKind::RightBrace => b'}',
        TokenKind::Select => b'S',
        TokenKind::From => b'F',
        TokenKind::Where => b'W',
        TokenKind::Into => b'I',
        TokenKind::Text => b's',
        TokenKind::Unterminated => b'z',
        TokenKind::Integer => b'i',
        TokenKind::Hex => b'h',
        TokenKind::Real => b'r',
        TokenKind::True => b't',
        TokenKind::False => b'f',
        TokenKind::Null => b'n',
        TokenKind::Undefined => b'u',
        TokenKind::LeftParen => b'(',
        TokenKind::RightParen => b')',
        TokenKind::Comma => b',',
        TokenKind::Plus => b'+',
        TokenKind::Minus => b'-',
        TokenKind::Star => b'*',
        TokenKind::Slash => b'/',
        TokenKind::Percent => b'%',
        TokenKind::And => b'&',
        TokenKind::Or => b'|',
        TokenKind::Not => b'!',
        TokenKind::Equal => b'=',
        TokenKind::NotEqual => b'#',
        TokenKind::LessOrEqual => b'l',
        TokenKind::GreaterOrEqual => b'g',
        TokenKind::Greater => b'>',
        TokenKind::Less => b'<',
        TokenKind::Concat => b'c',
        TokenKind::Coalesce => b'q',
        TokenKind::SystemName => b'$',
        TokenKind::Name => b'a',
        // In no rule of the grammar.
        TokenKind::PathText => b'P',
        TokenKind::Unknown => b'?',
    }
}

/// Runs the grammar; its failure is reported at the first token at which nothing can continue.
fn parse<'l>(rule: Rule, letters: &'l str, tokens: &[Token], text: &str) -> Result<Pair<'l, Rule>, Fault> {
    let error = match Grammar::parse(rule, letters) {
        Ok(mut pairs) => match pairs.next() {
            Some(pair) => return Ok(pair),
            None => return Err(Fault::without_place(Category::Syntax, Stage::Parse, "nothing to parse")),
        },
        Err(error) => error,
    };
    let at = match error.location {
        InputLocation::Pos(at) | InputLocation::Span((at, _)) => at,
    };
    let mut expected = match error.variant {
        ErrorVariant::ParsingError { positives, .. } => positives,
        ErrorVariant::CustomError { .. } => Vec::new(),
    };
    if expected.contains(&Rule::route) {
        expected = vec![Rule::select, Rule::from];
    }
    let fault = match tokens.get(at) {
        Some(token) => {
            let found = token.of(text);
            let found: String = found.chars().take(40).collect();
            Fault::new(Category::Syntax, Stage::Parse, token.span, format!("{found:?} cannot stand here"))
        }
        None => {
            let end = Span { start: text.len() as u32, end: text.len() as u32 };
            Fault::new(Category::Syntax, Stage::Parse, end, "the text ends too early")
        }
    };
    Err(explained(fault, at, &expected, tokens, text))
}

fn span_of(tokens: &[Token], pair: &Pair<'_, Rule>) -> Span {
    let span = pair.as_span();
    let start = tokens.get(span.start()).map_or(0, |token| token.span.start);
    let end =
        span.end().checked_sub(1).and_then(|last| tokens.get(last)).map_or(start, |token| token.span.end);
    Span { start, end }
}

fn sink_of(tokens: &[Token], sink: &Pair<'_, Rule>) -> SinkSyntax {
    let first = sink.as_span().start();
    let at = |at: usize| tokens.get(at).map_or(Span { start: 0, end: 0 }, |token| token.span);
    if tokens.get(first).is_some_and(|token| token.kind == TokenKind::SystemName) {
        return SinkSyntax::System(at(first));
    }
    let quoted = at(first + 2);
    SinkSyntax::Function(at(first), Span { start: quoted.start + 1, end: quoted.end.saturating_sub(1) })
}

static PRECEDENCE: LazyLock<PrattParser<Rule>> = LazyLock::new(|| {
    let left = |rule| Op::infix(rule, Assoc::Left);
    PrattParser::new()
        .op(left(Rule::unknown))
        .op(left(Rule::coalesce))
        .op(left(Rule::or))
        .op(left(Rule::and))
        .op(left(Rule::equal) | left(Rule::not_equal))
        .op(left(Rule::less) | left(Rule::less_or_equal) | left(Rule::greater) | left(Rule::greater_or_equal))
        .op(left(Rule::plus) | left(Rule::minus) | left(Rule::concat))
        .op(left(Rule::star) | left(Rule::slash) | left(Rule::percent))
        .op(Op::prefix(Rule::not))
        .op(Op::prefix(Rule::negate))
});

/// The tree of a pair that holds one expression.
fn tree(tokens: &[Token], pair: Pair<'_, Rule>) -> Tree {
    let builder = Builder { tokens, nodes: RefCell::default() };
    if let Some(expression) = pair.into_inner().find(|inner| inner.as_rule() == Rule::expression) {
        builder.expression(expression.into_inner());
    }
    Tree { nodes: builder.nodes.into_inner() }
}

/// The callbacks of the precedence climber share the list of nodes; no borrow of it outlives a push.
struct Builder<'t> {
    tokens: &'t [Token],
    nodes: RefCell<Vec<Node>>,
}

/// A subtree: the index at which it begins, and its place with the parentheses around it.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    place: Span,
}

impl Builder<'_> {
    /// Appends the subtree of one expression.
    fn expression(&self, pairs: Pairs<'_, Rule>) -> Part {
        PRECEDENCE
            .map_primary(|pair| self.primary(pair))
            .map_prefix(|operator, operand| {
                let negate = operator.as_rule() == Rule::negate;
                let place = Span { start: self.place(&operator).start, end: operand.place.end };
                let kind = if negate { NodeKind::Negate } else { NodeKind::Not };
                self.push(kind, &operator, Part { place, ..operand })
            })
            .map_infix(|left, operator, right| {
                let part = Part { first: left.first, place: Span { end: right.place.end, ..left.place } };
                match binary(operator.as_rule()) {
                    Some(kind) => self.push(NodeKind::Binary(kind), &operator, part),
                    None => {
                        // The operands of an unknown symbol are not looked at.
                        self.nodes.borrow_mut().truncate(part.first);
                        self.push(NodeKind::Invalid(Category::InvalidSymbol), &operator, part)
                    }
                }
            })
            .parse(pairs)
    }

    fn primary(&self, pair: Pair<'_, Rule>) -> Part {
        let part = Part { first: self.nodes.borrow().len(), place: self.place(&pair) };
        let kind = match pair.as_rule() {
            Rule::name => NodeKind::Property,
            Rule::system_name => NodeKind::System { braced: false },
            Rule::text => NodeKind::Text,
            Rule::unterminated => NodeKind::Unterminated,
            Rule::integer => NodeKind::Integer,
            Rule::real => NodeKind::Real,
            Rule::hex => NodeKind::Hex,
            Rule::true_word => NodeKind::Bool(true),
            Rule::false_word => NodeKind::Bool(false),
            Rule::null_word => NodeKind::Null,
            Rule::symbol => NodeKind::Invalid(Category::InvalidSymbol),
            Rule::unclosed => NodeKind::Invalid(Category::MissingParen),
            Rule::braced => return self.braced(pair, part),
            Rule::group | Rule::call => return self.with_parens(pair, part),
            _ => NodeKind::Undefined,
        };
        self.push(kind, &pair, part)
    }

    fn braced(&self, pair: Pair<'_, Rule>, part: Part) -> Part {
        let name = pair.clone().into_inner().nth(1).unwrap_or(pair);
        self.push(NodeKind::System { braced: true }, &name, part)
    }

    fn with_parens(&self, pair: Pair<'_, Rule>, part: Part) -> Part {
        let inner = pair.clone().into_inner();
        if let Some(extra) = inner.clone().find(|part| part.as_rule() == Rule::extra_paren) {
            return self.push(NodeKind::Invalid(Category::UnmatchedParen), &extra, part);
        }
        let mut arguments = 0;
        for expression in inner.filter(|part| part.as_rule() == Rule::expression) {
            self.expression(expression.into_inner());
            arguments += 1;
        }
        match pair.as_rule() {
            Rule::call => self.push(NodeKind::Call { arguments }, &pair, part),
            _ => part,
        }
    }

    /// From the first to the last token of `pair`.
    fn place(&self, pair: &Pair<'_, Rule>) -> Span {
        span_of(self.tokens, pair)
    }

    /// Appends a node whose span is the first token of `pair` and whose subtree is `part`.
    fn push(&self, kind: NodeKind, pair: &Pair<'_, Rule>, part: Part) -> Part {
        let token = self.tokens.get(pair.as_span().start());
        let span = token.map_or(Span { start: 0, end: 0 }, |token| token.span);
        let node = Node { kind, span, extent: part.place, first: part.first };
        self.nodes.borrow_mut().push(node);
        part
    }
}

fn binary(rule: Rule) -> Option<BinaryOperator> {
    Some(match rule {
        Rule::star => BinaryOperator::Multiply,
        Rule::slash => BinaryOperator::Divide,
        Rule::percent => BinaryOperator::Remainder,
        Rule::plus => BinaryOperator::Add,
        Rule::minus => BinaryOperator::Subtract,
        Rule::concat => BinaryOperator::Concat,
        Rule::equal => BinaryOperator::Equal,
        Rule::not_equal => BinaryOperator::NotEqual,
        Rule::less => BinaryOperator::Less,
        Rule::less_or_equal => BinaryOperator::LessOrEqual,
        Rule::greater => BinaryOperator::Greater,
        Rule::greater_or_equal => BinaryOperator::GreaterOrEqual,
        Rule::and => BinaryOperator::And,
        Rule::or => BinaryOperator::Or,
        Rule::coalesce => BinaryOperator::Coalesce,
        _ => return None,
    })
}
