//! Owns a condition on its own, outside of a table: for tools and tests.

use std::fmt;

use crate::body::BodyPath;
use crate::check::{Checked, check};
use crate::diagnostic::{Diagnostic, Fault, Span};
use crate::evaluate::{Scratch, Truth};
use crate::explain::{Evaluation, MessageLeaves, evaluation};
use crate::lexer::is_path_unit;
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

/// Checks the text behind `$body.` by itself, for tools: is it a body path that compiles?
///
/// # Errors
/// What is wrong with it.
pub fn check_body_path(path: &str) -> Result<(), &'static str> {
    // In a condition, the lexer ends a name at these; a blank is the path's own affair.
    let ends = |unit: char| unit != ' ' && !is_path_unit(unit);
    match path.find(ends) {
        None => BodyPath::parse(path).map(drop),
        // They may stand where nothing is looked at any more: there, an open bracket does no harm either.
        Some(end) => BodyPath::parse(&format!("{}[", path.get(..end).unwrap_or_default())).map(drop),
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Condition").field("text", &self.text).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::check_body_path;

    #[test]
    fn body_paths_are_checked_by_themselves() {
        for path in ["a", "a.b[0]", "a[0]@", "a]@", "a b", "it's", "a[0][", "$.a"] {
            assert!(check_body_path(path).is_ok(), "{path}");
        }
        for path in ["", "a.", "a@b", "a[0].b@", "7", "a[", "@", "a/b", "a:b"] {
            assert!(check_body_path(path).is_err(), "{path}");
        }
    }
}
