//! Owns a condition on its own, outside of a table: for tools and tests.

use std::fmt;

use crate::check::{Checked, check};
use crate::diagnostic::{Diagnostic, Fault, Span};
use crate::evaluate::{Scratch, Truth};
use crate::explain::{Evaluation, MessageLeaves, evaluation};
use crate::message::MessageView;
use crate::program::{Program, Vocabulary};
use crate::syntax::{Tree, parse_condition};
use crate::walker;

/// A condition that compiles.
pub struct Condition {
    text: String,
    /// None: the text is empty.
    parsed: Option<Parsed>,
    vocabulary: Vocabulary,
}

/// The three forms of a condition.
struct Parsed {
    tree: Tree,
    checked: Checked,
    program: Program,
}

impl Condition {
    /// Compiles the text of a condition, without `WHERE`.
    ///
    /// # Errors
    /// All errors of the condition, in the order in which its tree is walked.
    pub fn compile(text: &str) -> Result<Condition, Vec<Diagnostic>> {
        let whole = Span { start: 0, end: text.len() as u32 };
        let locate = |fault: Fault| fault.locate(text, whole);
        let mut vocabulary = Vocabulary::default();
        let parsed = match parse_condition(text).map_err(|fault| vec![locate(fault)])? {
            None => None,
            Some(tree) => {
                let checked = check(text, &tree);
                let checked = checked.map_err(|faults| faults.into_iter().map(locate).collect::<Vec<_>>())?;
                let program = Program::new(&checked, &mut vocabulary);
                Some(Parsed { tree, checked, program })
            }
        };
        Ok(Condition { text: text.to_owned(), parsed, vocabulary })
    }

    /// Its value for `message`; an empty condition is undefined.
    pub fn evaluate<M: MessageView + ?Sized>(&self, message: &M) -> Truth {
        match &self.parsed {
            None => Truth::Undefined,
            Some(parsed) => parsed.program.evaluate(&self.vocabulary, message, &mut Scratch::default()),
        }
    }

    /// The same value by a plain walk over the tree, without the compiled program: for comparisons, and slow.
    pub fn walk<M: MessageView + ?Sized>(&self, message: &M) -> Truth {
        match &self.parsed {
            None => Truth::Undefined,
            Some(Parsed { checked, .. }) => {
                let values = walker::values(checked, &mut MessageLeaves::new(checked, message));
                walker::truth(checked, &values)
            }
        }
    }

    /// The values of all its parts for `message`, with reasons.
    pub fn explain<M: MessageView + ?Sized>(&self, message: &M) -> Evaluation {
        match &self.parsed {
            None => Evaluation { text: self.text.clone(), parts: Vec::new(), truth: Truth::Undefined },
            Some(Parsed { tree, checked, .. }) => evaluation(&self.text, tree, checked, message),
        }
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Condition").field("text", &self.text).finish_non_exhaustive()
    }
}
