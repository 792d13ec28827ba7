//! Owns the paths of a table, merged into a tree: one pass over a body finds the values of all of them.

use std::cmp::Ordering;
use std::collections::HashMap;

use super::json::{JsonText, Scalar, Visitor, number_of, unescape};
use super::{BodyPath, BodyText, Slot, Step, date};
use crate::message::PropertyName;

/// All body paths that the conditions of a table ask for, each with a slot.
#[derive(Debug)]
pub(crate) struct BodyPaths {
    slots: HashMap<BodyPath, u32>,
    /// The first is the root.
    nodes: Vec<PathNode>,
    /// Paths with wildcards.
    searches: Vec<(u32, Vec<Step>)>,
    /// Slots of paths that cannot be followed.
    undefined: Vec<u32>,
    content_type: PropertyName,
    content_encoding: PropertyName,
}

/// A place in a document that is on the way to a value that is asked for.
#[derive(Debug, Default)]
struct PathNode {
    /// In the order of [`by_width`].
    members: Vec<(Box<[u8]>, u32)>,
    elements: Vec<(usize, u32)>,
    slot: Option<u32>,
    /// The slots of this node and of all below it.
    reached: Vec<u32>,
}

impl PathNode {
    /// Where the member of that name leads, or the place in the list that it would have.
    #[inline]
    fn member(&self, name: &[u8]) -> Result<u32, usize> {
        match &self.members[..] {
            [(only, node)] if **only == *name => Ok(*node),
            members => members
                .binary_search_by(|(known, _)| by_width(known, name))
                .map(|place| members.get(place).map_or(NOWHERE, |(_, node)| *node)),
        }
    }
}

/// Names by their width, then by their bytes: most that differ do so in width.
#[inline]
fn by_width(left: &[u8], right: &[u8]) -> Ordering {
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

const ROOT: u32 = 0;
/// Not on the way to anything.
const NOWHERE: u32 = u32::MAX;

impl Default for BodyPaths {
    fn default() -> BodyPaths {
        BodyPaths {
            slots: HashMap::new(),
            nodes: vec![PathNode::default()],
            searches: Vec::new(),
            undefined: Vec::new(),
            content_type: PropertyName::new("contentType"),
            content_encoding: PropertyName::new("contentEncoding"),
        }
    }
}

impl BodyPaths {
    /// The slot of a path, which may have one already.
    pub(crate) fn intern(&mut self, path: &BodyPath) -> u32 {
        if let Some(slot) = self.slots.get(path) {
            return *slot;
        }
        let slot = self.slots.len() as u32;
        self.slots.insert(path.clone(), slot);
        match path.steps() {
            None => self.undefined.push(slot),
            Some(steps) if steps.iter().all(|step| matches!(step, Step::Member(_) | Step::Element(_))) => {
                self.add(steps, slot);
            }
            Some(steps) => self.searches.push((slot, steps.to_vec())),
        }
        slot
    }

    fn add(&mut self, steps: &[Step], slot: u32) {
        let mut at = ROOT;
        for step in steps {
            let new = self.nodes.len() as u32;
            let Some(node) = self.nodes.get_mut(at as usize) else { return };
            node.reached.push(slot);
            let next = match step {
                Step::Member(name) => match node.member(name.as_bytes()) {
                    Ok(next) => next,
                    Err(place) => {
                        node.members.insert(place, (name.as_bytes().into(), new));
                        new
                    }
                },
                Step::Element(index) => match node.elements.iter().find(|(known, _)| known == index) {
                    Some((_, next)) => *next,
                    None => {
                        node.elements.push((*index, new));
                        new
                    }
                },
                Step::AnyMember | Step::AnyElement | Step::MemberBelow(_) | Step::AnyBelow => return,
            };
            if next == new {
                self.nodes.push(PathNode::default());
            }
            at = next;
        }
        if let Some(node) = self.nodes.get_mut(at as usize) {
            node.reached.push(slot);
            node.slot = Some(slot);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn has_searches(&self) -> bool {
        !self.searches.is_empty()
    }

    pub(super) fn searches(&self) -> &[(u32, Vec<Step>)] {
        &self.searches
    }

    pub(super) fn undefined(&self) -> &[u32] {
        &self.undefined
    }

    pub(super) fn content_type(&self) -> &PropertyName {
        &self.content_type
    }

    pub(super) fn content_encoding(&self) -> &PropertyName {
        &self.content_encoding
    }

    fn node(&self, node: u32) -> Option<&PathNode> {
        self.nodes.get(node as usize)
    }
}

/// A container that is open.
#[derive(Debug)]
pub(super) struct Frame {
    node: u32,
    /// In an array, the index of the next element.
    next: Option<usize>,
}

/// Fills the slots while a document is read.
pub(super) struct Selector<'s> {
    paths: &'s BodyPaths,
    slots: &'s mut [Slot],
    frames: &'s mut Vec<Frame>,
    decoded: &'s mut Vec<u8>,
    /// The node of the member whose value is due.
    due: u32,
}

impl<'s> Selector<'s> {
    pub(super) fn new(
        paths: &'s BodyPaths,
        slots: &'s mut [Slot],
        frames: &'s mut Vec<Frame>,
        decoded: &'s mut Vec<u8>,
    ) -> Selector<'s> {
        Selector { paths, slots, frames, decoded, due: ROOT }
    }

    /// The node of the value that comes now.
    #[inline]
    fn arrive(&mut self) -> u32 {
        match self.frames.last_mut() {
            Some(Frame { node: NOWHERE, .. }) => NOWHERE,
            Some(Frame { node, next: Some(next) }) => {
                let index = *next;
                *next += 1;
                let elements = self.paths.node(*node).map_or(&[][..], |node| &node.elements);
                elements.iter().find(|(wanted, _)| *wanted == index).map_or(NOWHERE, |(_, node)| *node)
            }
            _ => self.due,
        }
    }

    #[inline]
    fn set(&mut self, node: u32, value: impl FnOnce(&mut Vec<u8>) -> Slot) {
        let slot = self.paths.node(node).and_then(|node| node.slot);
        if let Some(slot) = slot.and_then(|slot| self.slots.get_mut(slot as usize)) {
            *slot = value(self.decoded);
        }
    }
}

impl<'t> Visitor<'t> for Selector<'_> {
    fn begin(&mut self) {
        self.slots.fill(Slot::Absent);
        self.frames.clear();
        self.decoded.clear();
        self.due = ROOT;
    }

    #[inline]
    fn open(&mut self, array: bool) {
        let node = self.arrive();
        self.set(node, |_| Slot::Undefined);
        self.frames.push(Frame { node, next: array.then_some(0) });
    }

    #[inline]
    fn looks_inside(&self) -> bool {
        let frame = self.frames.last();
        frame.and_then(|frame| Some((self.paths.node(frame.node)?, frame))).is_some_and(|(node, frame)| {
            if frame.next.is_some() { !node.elements.is_empty() } else { !node.members.is_empty() }
        })
    }

    #[inline]
    fn close(&mut self) {
        self.frames.pop();
    }

    #[inline]
    fn member(&mut self, name: JsonText<'t>) {
        self.due = NOWHERE;
        match self.frames.last().and_then(|frame| self.paths.node(frame.node)) {
            Some(node) if !node.members.is_empty() => self.wanted_member(node, name),
            _ => {}
        }
    }

    #[inline]
    fn value(&mut self, value: Scalar<'t>) {
        let node = self.arrive();
        self.set(node, |decoded| slot_of(value, decoded));
    }
}

impl<'s> Selector<'s> {
    /// A member of an object that is on the way to something.
    fn wanted_member(&mut self, node: &'s PathNode, name: JsonText<'_>) {
        let start = self.decoded.len();
        let own = if name.escaped {
            unescape(name.raw, self.decoded);
            self.decoded.get(start..).unwrap_or_default()
        } else {
            name.raw
        };
        let found = node.member(own);
        self.decoded.truncate(start);
        let Ok(found) = found else { return };
        self.due = found;
        // A member that is repeated takes the place of the one before, with all that was in it.
        for slot in self.paths.node(found).map_or(&[][..], |node| &node.reached) {
            if let Some(slot) = self.slots.get_mut(*slot as usize) {
                *slot = Slot::Absent;
            }
        }
    }
}

/// The slot of a value; texts with escapes go into `decoded`.
pub(super) fn slot_of(value: Scalar<'_>, decoded: &mut Vec<u8>) -> Slot {
    match value {
        Scalar::Null => Slot::Null,
        Scalar::Bool(value) => Slot::Bool(value),
        Scalar::Number(value) => Slot::Number(value),
        Scalar::Digits(digits) => Slot::Number(number_of(digits)),
        Scalar::Undefined => Slot::Undefined,
        Scalar::Text(text) => {
            let place = place_of(text, decoded);
            let bytes = match place.decoded {
                true => decoded.get(place.start as usize..).unwrap_or_default(),
                false => text.raw,
            };
            if date::looks_like_date(bytes) { Slot::Undefined } else { Slot::Text(place) }
        }
    }
}

/// Where the value of a text lies; with escapes it goes into `decoded`.
pub(super) fn place_of(text: JsonText<'_>, decoded: &mut Vec<u8>) -> BodyText {
    if !text.escaped {
        return BodyText { decoded: false, start: text.at as u32, length: text.raw.len() as u32 };
    }
    let start = decoded.len();
    unescape(text.raw, decoded);
    BodyText { decoded: true, start: start as u32, length: (decoded.len() - start) as u32 }
}
