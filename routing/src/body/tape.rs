//! Owns the paths with wildcards: they need the whole document, which is written down as a flat list of values.

use std::collections::HashMap;

use super::json::{JsonText, Scalar, Visitor};
use super::select::{place_of, slot_of};
use super::{BodyPaths, BodyText, Slot, Step};

/// Values looked at for one path of one message; a path that needs more is undefined.
const VISITS_MAX: usize = 1 << 18;

/// One value of a document.
#[derive(Clone, Copy, Debug)]
pub(super) struct TapeNode {
    /// The member that it is the value of.
    name: Option<BodyText>,
    value: TapeValue,
    /// The index after the last value inside this one.
    end: u32,
    /// Its member is repeated later in the object, so it is not there.
    replaced: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum TapeValue {
    Object,
    Array,
    Scalar(Slot),
}

/// Writes a document down.
pub(super) struct Tape<'s> {
    nodes: &'s mut Vec<TapeNode>,
    decoded: &'s mut Vec<u8>,
    /// How much of `decoded` belongs to others.
    kept: usize,
    open: Vec<usize>,
    name: Option<BodyText>,
}

impl<'s> Tape<'s> {
    pub(super) fn new(nodes: &'s mut Vec<TapeNode>, decoded: &'s mut Vec<u8>) -> Tape<'s> {
        let kept = decoded.len();
        Tape { nodes, decoded, kept, open: Vec::new(), name: None }
    }

    fn push(&mut self, value: TapeValue) {
        let end = self.nodes.len() as u32 + 1;
        self.nodes.push(TapeNode { name: self.name.take(), value, end, replaced: false });
    }
}

impl<'t> Visitor<'t> for Tape<'_> {
    fn begin(&mut self) {
        self.nodes.clear();
        self.decoded.truncate(self.kept);
        self.open.clear();
        self.name = None;
    }

    fn open(&mut self, array: bool) {
        self.open.push(self.nodes.len());
        self.push(if array { TapeValue::Array } else { TapeValue::Object });
    }

    fn looks_inside(&self) -> bool {
        true
    }

    fn close(&mut self) {
        let end = self.nodes.len() as u32;
        if let Some(node) = self.open.pop().and_then(|open| self.nodes.get_mut(open)) {
            node.end = end;
        }
    }

    fn member(&mut self, name: JsonText<'t>) {
        self.name = Some(place_of(name, self.decoded));
    }

    fn value(&mut self, value: Scalar<'t>) {
        let slot = slot_of(value, self.decoded);
        self.push(TapeValue::Scalar(slot));
    }
}

/// Fills the slots of all paths with wildcards.
pub(super) fn search(
    paths: &BodyPaths,
    tape: &mut [TapeNode],
    text: &str,
    decoded: &[u8],
    slots: &mut [Slot],
) {
    mark_replaced(tape, text.as_bytes(), decoded);
    let searcher = Searcher { tape };
    for (slot, steps) in paths.searches() {
        if let Some(slot) = slots.get_mut(*slot as usize) {
            *slot = searcher.value(steps, |name| name.of(text.as_bytes(), decoded));
        }
    }
}

fn mark_replaced(tape: &mut [TapeNode], text: &[u8], decoded: &[u8]) {
    let mut seen = HashMap::new();
    for object in 0..tape.len() {
        if tape.get(object).is_none_or(|node| node.value != TapeValue::Object) {
            continue;
        }
        seen.clear();
        let mut at = object + 1;
        let end = tape.get(object).map_or(0, |node| node.end as usize);
        while let Some(member) = tape.get(at).filter(|_| at < end) {
            let next = member.end as usize;
            let before = member.name.and_then(|name| seen.insert(name.of(text, decoded), at));
            if let Some(before) = before.and_then(|before| tape.get_mut(before)) {
                before.replaced = true;
            }
            at = next;
        }
    }
}

struct Searcher<'s> {
    tape: &'s [TapeNode],
}

impl Searcher<'_> {
    /// The value if there is exactly one match, absent if there is none, undefined if there are several.
    fn value<'n>(&self, steps: &[Step], text: impl Fn(BodyText) -> &'n [u8]) -> Slot {
        let mut found = vec![0];
        let mut visits_left = VISITS_MAX;
        for step in steps {
            let mut next = Vec::new();
            for at in found {
                if self.follow(at, step, &text, &mut visits_left, &mut next).is_none() {
                    return Slot::Undefined;
                }
            }
            found = next;
        }
        match found[..] {
            [] => Slot::Absent,
            [only] => match self.tape.get(only).map(|node| node.value) {
                Some(TapeValue::Scalar(slot)) => slot,
                _ => Slot::Undefined,
            },
            _ => Slot::Undefined,
        }
    }

    /// Appends what one step leads to from the value at `at`; none if that takes too long.
    fn follow<'n>(
        &self,
        at: usize,
        step: &Step,
        text: &impl Fn(BodyText) -> &'n [u8],
        visits_left: &mut usize,
        next: &mut Vec<usize>,
    ) -> Option<()> {
        let node = self.tape.get(at)?;
        let mut within = at + 1;
        if matches!(step, Step::AnyBelow) {
            next.push(at);
        }
        let mut index = 0;
        while within < node.end as usize {
            *visits_left = visits_left.checked_sub(1)?;
            let inner = self.tape.get(within)?;
            if inner.replaced {
                within = inner.end as usize;
                continue;
            }
            let is_named = |name: &str| inner.name.is_some_and(|own| text(own) == name.as_bytes());
            let matches = match (step, node.value) {
                (Step::Member(name), TapeValue::Object) | (Step::MemberBelow(name), _) => is_named(name),
                (Step::Element(wanted), TapeValue::Array) => index == *wanted,
                (Step::AnyMember, TapeValue::Object) | (Step::AnyElement, TapeValue::Array) => true,
                (Step::AnyBelow, _) => true,
                (Step::Member(_) | Step::AnyMember | Step::Element(_) | Step::AnyElement, _) => {
                    return Some(());
                }
            };
            if matches {
                next.push(within);
            }
            index += 1;
            within = match step {
                Step::MemberBelow(_) | Step::AnyBelow => within + 1,
                Step::Member(_) | Step::AnyMember | Step::Element(_) | Step::AnyElement => inner.end as usize,
            };
        }
        Some(())
    }
}
