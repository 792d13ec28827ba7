//! Owns the pairing of parentheses: which are closed, which are not, which closes are one too many.
//!
//! The error productions of the language are ambiguous (a group may lack its close, a group or a call may have one close
//! too many), and an ordered choice cannot look that far ahead. So the roles are settled before the grammar sees the
//! tokens, by the rules: a call must be closed; if closes are missing, the earlier groups take those that exist; if there
//! are too many, the inner group or call takes one if the outer then still closes.

use crate::lexer::{Token, TokenKind};

/// How often the roles are revised before the text is left as it is, for the grammar to refuse.
const REVISIONS_MAX: usize = 64;

/// What a parenthesis of a condition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// One of a pair.
    Paired,
    /// Opens a group that nothing closes.
    Unclosed,
    /// Closes what is closed already.
    Extra,
}

/// One parenthesis or comma of a condition.
#[derive(Clone, Copy)]
struct Mark {
    token: usize,
    kind: MarkKind,
    role: Role,
    /// Stands directly behind a parenthesis that closes.
    after_close: bool,
    /// Belongs to an argument that a comma has ended: its role is settled.
    settled: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum MarkKind {
    Group,
    Call,
    Close,
    Comma,
}

/// The tokens of `condition` whose role is not [`Role::Paired`], by their index.
pub(crate) fn irregular(condition: &[Token]) -> Vec<(usize, Role)> {
    let mut marks = marks(condition);
    for _ in 0..REVISIONS_MAX {
        let trouble = walk(&mut marks);
        if !revise(&mut marks, trouble) {
            break;
        }
    }
    let irregular = marks.iter().filter(|mark| mark.role != Role::Paired);
    irregular.map(|mark| (mark.token, mark.role)).collect()
}

fn marks(condition: &[Token]) -> Vec<Mark> {
    let mut before = None;
    let mut found = Vec::new();
    for (token, kind) in condition.iter().map(|token| token.kind).enumerate() {
        let mark = match kind {
            TokenKind::LeftParen if before == Some(TokenKind::Name) => Some(MarkKind::Call),
            TokenKind::LeftParen => Some(MarkKind::Group),
            TokenKind::RightParen => Some(MarkKind::Close),
            TokenKind::Comma => Some(MarkKind::Comma),
            _ => None,
        };
        if let Some(kind) = mark {
            let after_close = before == Some(TokenKind::RightParen);
            found.push(Mark { token, kind, role: Role::Paired, after_close, settled: false });
        }
        before = Some(kind);
    }
    found
}

/// The first place at which the roles do not work out.
enum Trouble {
    None,
    /// Groups are open at this mark, which needs a call or nothing; they began after `from`.
    Open {
        from: usize,
        at: usize,
        count: usize,
    },
    /// This close or comma stands where nothing is open.
    Stray {
        at: usize,
    },
}

fn walk(marks: &mut [Mark]) -> Trouble {
    let mut open: Vec<usize> = Vec::new();
    for at in 0..marks.len() {
        let mark = marks[at];
        match (mark.kind, mark.role) {
            (MarkKind::Group | MarkKind::Call, Role::Paired) => open.push(at),
            (MarkKind::Close, Role::Paired) => {
                if open.pop().is_none() {
                    return Trouble::Stray { at };
                }
            }
            (MarkKind::Comma, _) => match open.iter().rposition(|open| marks[*open].kind == MarkKind::Call) {
                Some(call) if call + 1 == open.len() => {
                    let from = open[call];
                    let unsettled = marks[from + 1..=at].iter_mut().rev().skip(1);
                    unsettled.take_while(|mark| !mark.settled).for_each(|mark| mark.settled = true);
                    marks[at].settled = true;
                }
                Some(call) => {
                    return Trouble::Open { from: open[call] + 1, at, count: open.len() - call - 1 };
                }
                None => return Trouble::Stray { at },
            },
            (_, Role::Unclosed | Role::Extra) => {}
        }
    }
    match open.len() {
        0 => Trouble::None,
        count => Trouble::Open { from: 0, at: marks.len(), count },
    }
}

/// Changes roles to mend `trouble`; false if there is none or it cannot be mended.
fn revise(marks: &mut [Mark], trouble: Trouble) -> bool {
    match trouble {
        Trouble::None => false,
        Trouble::Open { from, at, count } => leave_open(marks.get_mut(from..at).unwrap_or_default(), count),
        Trouble::Stray { at } => {
            for at in 1..=at {
                let Some([before, mark]) = marks.get(at - 1..=at) else { return false };
                if mark.kind == MarkKind::Close
                    && mark.role == Role::Paired
                    && mark.after_close
                    && !mark.settled
                    && before.role == Role::Paired
                {
                    marks[at].role = Role::Extra;
                    return true;
                }
            }
            false
        }
    }
}

/// Takes the close from the latest `count` groups that can do without.
fn leave_open(marks: &mut [Mark], mut count: usize) -> bool {
    let steps: Vec<i64> = marks
        .iter()
        .map(|mark| match (mark.kind, mark.role) {
            (MarkKind::Group | MarkKind::Call, Role::Paired) => 1,
            (MarkKind::Close, Role::Paired) => -1,
            _ => 0,
        })
        .collect();
    let mut depth: i64 = steps.iter().sum();
    // The least depth from here to the end: each group left open lowers it.
    let mut least = depth;
    let mut changed = false;
    for (mark, step) in marks.iter_mut().zip(&steps).rev() {
        least = least.min(depth);
        let group = mark.kind == MarkKind::Group && mark.role == Role::Paired && !mark.settled;
        if count > 0 && group && least >= 1 {
            mark.role = Role::Unclosed;
            least -= 1;
            count -= 1;
            changed = true;
        }
        depth -= step;
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lexer::tokens;

    /// The text with `[` for a group left open and `]` for a close too many.
    fn roles(text: &str) -> String {
        let tokens = tokens(text);
        let mut bytes = text.as_bytes().to_vec();
        for (token, role) in irregular(&tokens) {
            let mark = if role == Role::Unclosed { b'[' } else { b']' };
            bytes[tokens[token].span.start as usize] = mark;
        }
        String::from_utf8(bytes).expect("ASCII in, ASCII out")
    }

    #[test]
    fn faults_are_given_to_the_right_parenthesis() {
        for (text, expected) in [
            ("(a) f(b, (c))", "(a) f(b, (c))"),
            ("((a)", "([a)"),
            ("(a", "[a"),
            ("((a", "[[a"),
            ("(a = 'x' and (b = 'y')", "(a = 'x' and [b = 'y')"),
            ("(a))", "(a)]"),
            ("((a)))", "((a)])"),
            ("((a) and b))", "((a) and b)]"),
            ("((a)) and b)", "((a)] and b)"),
            ("(a)) and (b", "(a)] and [b"),
            ("f(a))", "f(a)]"),
            ("f((a)", "f([a)"),
            ("f(a, (b)", "f(a, [b)"),
            ("f((a, b)", "f([a, b)"),
            ("(f((a), b)", "[f((a), b)"),
            ("f(g(a)), 'n')", "f(g(a)], 'n')"),
            ("a)", "a)"),
            ("f(a", "f(a"),
            ("(a)))", "(a)])"),
        ] {
            assert_eq!(roles(text), expected, "{text}");
        }
    }
}
