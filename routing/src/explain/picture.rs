//! Owns the picture of an evaluation: a tree, the whole condition first.

use std::fmt;

use super::reason::repeated;
use super::{Evaluation, Part, PartValue};

/// Levels that are drawn; what is deeper is drawn at this level.
const LEVELS_MAX: usize = 40;

impl fmt::Display for PartValue {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PartValue::Undefined => write!(formatter, "undefined"),
            PartValue::Null => write!(formatter, "null"),
            PartValue::Absent => write!(formatter, "null (absent)"),
            PartValue::Bool(value) => write!(formatter, "{value}"),
            PartValue::Number(number) => write!(formatter, "{number}"),
            PartValue::NullText => write!(formatter, "no value"),
            PartValue::Text(text) => write!(formatter, "'{}'", repeated(text)),
        }
    }
}

impl fmt::Display for Evaluation {
    /// One line for each part: its value, its text, and the reason if there is one. Operands stand below what they are
    /// operands of. The operands of a chain of one operator stand side by side.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(root) = self.parts.len().checked_sub(1) else { return writeln!(formatter, "undefined") };
        // What is still to be drawn, the last first: part, level, and for each level whether more follows there.
        let mut waiting = vec![(root, 0_usize, true)];
        let mut more = [false; LEVELS_MAX + 1];
        while let Some((at, level, last)) = waiting.pop() {
            let Some(part) = self.parts.get(at) else { continue };
            more[level] = !last;
            for outer in more.iter().take(level).skip(1) {
                formatter.write_str(if *outer { "│  " } else { "   " })?;
            }
            if level > 0 {
                formatter.write_str(if last { "└─ " } else { "├─ " })?;
            }
            let text = self.text.get(part.bytes.clone()).unwrap_or_default();
            write!(formatter, "{}  {}", part.value, repeated(text))?;
            match &part.reason {
                Some(reason) => writeln!(formatter, "  -- {reason}")?,
                None => writeln!(formatter)?,
            }
            let operands = self.chain(part);
            let inner = (level + 1).min(LEVELS_MAX);
            for (place, operand) in operands.iter().enumerate().rev() {
                waiting.push((*operand, inner, place + 1 == operands.len()));
            }
        }
        Ok(())
    }
}

impl Evaluation {
    /// The operands of a part; for `a AND b AND c` all three.
    fn chain(&self, part: &Part) -> Vec<usize> {
        let mut found = Vec::new();
        let mut operands = &part.operands;
        let chained = matches!(part.operation, "AND" | "OR" | "||" | "+" | "*");
        while let [left, right] = operands[..] {
            found.push(right);
            match self.parts.get(left) {
                Some(inner) if chained && inner.operation == part.operation => operands = &inner.operands,
                _ => {
                    found.push(left);
                    found.reverse();
                    return found;
                }
            }
        }
        operands.clone()
    }
}
