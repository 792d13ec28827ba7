//! Owns a condition on its own, outside of a table: for tools and tests.

use std::fmt;

use crate::check::check;
use crate::diagnostic::{Diagnostic, Fault, Span};
use crate::evaluate::{Scratch, Truth};
use crate::message::MessageView;
use crate::program::{Program, Vocabulary};
use crate::syntax::parse_condition;

/// A condition that compiles.
pub struct Condition {
    /// None: the text is empty.
    program: Option<Program>,
    vocabulary: Vocabulary,
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
        let program = match parse_condition(text).map_err(|fault| vec![locate(fault)])? {
            None => None,
            Some(tree) => {
                let checked = check(text, &tree);
                let checked = checked.map_err(|faults| faults.into_iter().map(locate).collect::<Vec<_>>())?;
                Some(Program::new(&checked, &mut vocabulary))
            }
        };
        Ok(Condition { program, vocabulary })
    }

    /// Its value for `message`; an empty condition is undefined.
    pub fn evaluate<M: MessageView + ?Sized>(&self, message: &M) -> Truth {
        match &self.program {
            None => Truth::Undefined,
            Some(program) => program.evaluate(&self.vocabulary, message, &mut Scratch::default()),
        }
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Condition").field("program", &self.program).finish_non_exhaustive()
    }
}
