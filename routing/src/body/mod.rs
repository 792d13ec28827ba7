//! Owns the way into the body of a message: whether it can be read, and what stands at the paths that conditions ask for.

mod date;
mod json;
mod lenient;
mod path;
mod select;
mod strict;
mod tape;

pub(crate) use path::{BodyPath, Step};
pub(crate) use select::BodyPaths;

use std::ops::Range;

use crate::message::{MessageView, Text};
use crate::text::equal_names;

use json::{Refusal, Visitor};
use select::{Frame, Selector};
use tape::{Tape, TapeNode};

/// What stands at one path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Slot {
    /// Nothing.
    Absent,
    Null,
    Bool(bool),
    Number(f64),
    Text(BodyText),
    /// An object, an array, a text that looks like a date, or a body that cannot be read.
    Undefined,
}

/// Where a text of the body lies; see [`BodyScratch::text`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BodyText {
    /// In the buffer of texts whose escapes had to be replaced.
    decoded: bool,
    start: u32,
    length: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    NotRead,
    /// The text is the body itself.
    Plain,
    /// The text is in the buffer: it was not valid UTF-8.
    Transcoded,
    Unreadable,
}

impl BodyText {
    /// These bytes of the text, which it has.
    pub(crate) fn part(self, bytes: Range<usize>) -> BodyText {
        BodyText { start: self.start + bytes.start as u32, length: bytes.len() as u32, ..self }
    }

    fn of<'a>(self, text: &'a [u8], decoded: &'a [u8]) -> &'a [u8] {
        let buffer = if self.decoded { decoded } else { text };
        buffer.get(self.start as usize..(self.start + self.length) as usize).unwrap_or_default()
    }
}

/// What is known about the body of one message; the memory is reused for the next.
#[derive(Debug, Default)]
pub(crate) struct BodyScratch {
    state: State,
    transcoded: Vec<u8>,
    decoded: Vec<u8>,
    slots: Vec<Slot>,
    frames: Vec<Frame>,
    tape: Vec<TapeNode>,
}

impl BodyScratch {
    /// Forgets the message before, and memory beyond `kept_bytes` in each buffer.
    pub(crate) fn begin_message(&mut self, kept_bytes: usize) {
        if self.state == State::NotRead {
            return;
        }
        self.state = State::NotRead;
        for buffer in [&mut self.transcoded, &mut self.decoded] {
            buffer.clear();
            buffer.shrink_to(kept_bytes);
        }
        self.tape.clear();
        self.tape.shrink_to(kept_bytes / size_of::<TapeNode>());
    }

    /// What stands at one of `paths` in the body of `message`; the body is read at the first question, for all paths.
    pub(crate) fn slot<M: MessageView + ?Sized>(
        &mut self,
        paths: &BodyPaths,
        message: &M,
        slot: u32,
    ) -> Slot {
        if self.state == State::NotRead {
            self.state = match self.encoding(paths, message) {
                Some(Encoding::Utf8) => self.read_utf8(paths, message.body()),
                Some(Encoding::Utf16) => {
                    transcode_utf16(message.body(), &mut self.transcoded);
                    self.read_transcoded(paths)
                }
                Some(Encoding::Utf32) => {
                    transcode_utf32(message.body(), &mut self.transcoded);
                    self.read_transcoded(paths)
                }
                None => State::Unreadable,
            };
        }
        match self.state {
            State::Unreadable | State::NotRead => Slot::Undefined,
            State::Plain | State::Transcoded => {
                self.slots.get(slot as usize).copied().unwrap_or(Slot::Undefined)
            }
        }
    }

    /// The bytes of a text that a slot of this message holds.
    pub(crate) fn text<'a>(&'a self, body: &'a [u8], text: BodyText) -> &'a [u8] {
        let own = if self.state == State::Transcoded { &self.transcoded } else { body };
        text.of(own, &self.decoded)
    }

    fn encoding<M: MessageView + ?Sized>(&self, paths: &BodyPaths, message: &M) -> Option<Encoding> {
        match message.system_property(paths.content_type()) {
            Text::Text(content_type) if equal_names(content_type, "application/json") => {}
            _ => return None,
        }
        match message.system_property(paths.content_encoding()) {
            Text::Text(encoding) if equal_names(encoding, "utf-8") => Some(Encoding::Utf8),
            Text::Text(encoding) if equal_names(encoding, "utf-16") => Some(Encoding::Utf16),
            Text::Text(encoding) if equal_names(encoding, "utf-32") => Some(Encoding::Utf32),
            _ => None,
        }
    }

    fn read_utf8(&mut self, paths: &BodyPaths, body: &[u8]) -> State {
        if let Ok(text) = std::str::from_utf8(body) {
            return if self.read(paths, text) { State::Plain } else { State::Unreadable };
        }
        for chunk in body.utf8_chunks() {
            self.transcoded.extend_from_slice(chunk.valid().as_bytes());
            if !chunk.invalid().is_empty() {
                push(&mut self.transcoded, char::REPLACEMENT_CHARACTER);
            }
        }
        self.read_transcoded(paths)
    }

    fn read_transcoded(&mut self, paths: &BodyPaths) -> State {
        let buffer = std::mem::take(&mut self.transcoded);
        let readable = std::str::from_utf8(&buffer).is_ok_and(|text| self.read(paths, text));
        self.transcoded = buffer;
        if readable { State::Transcoded } else { State::Unreadable }
    }

    /// Fills the slots from `text`; false if it is not an object in the dialect.
    fn read(&mut self, paths: &BodyPaths, text: &str) -> bool {
        // Places in the text are kept in 32 bits.
        if u32::try_from(text.len()).is_err() {
            return false;
        }
        self.slots.clear();
        self.slots.resize(paths.len(), Slot::Absent);
        let mut selector = Selector::new(paths, &mut self.slots, &mut self.frames, &mut self.decoded);
        let found = scan(text, &mut selector);
        if found && paths.has_searches() {
            scan(text, &mut Tape::new(&mut self.tape, &mut self.decoded));
            tape::search(paths, &mut self.tape, text, &self.decoded, &mut self.slots);
        }
        for slot in paths.undefined() {
            if let Some(slot) = self.slots.get_mut(*slot as usize) {
                *slot = Slot::Undefined;
            }
        }
        found
    }
}

/// Strict first; the lenient dialect is the slow second attempt.
fn scan<'t>(text: &'t str, visitor: &mut impl Visitor<'t>) -> bool {
    visitor.begin();
    match strict::scan(text, visitor) {
        Ok(()) => true,
        Err(Refusal::TooDeep) => false,
        Err(Refusal::Malformed) => {
            visitor.begin();
            lenient::scan(text, visitor).is_ok()
        }
    }
}

#[derive(Clone, Copy)]
enum Encoding {
    Utf8,
    Utf16,
    Utf32,
}

fn push(buffer: &mut Vec<u8>, character: char) {
    buffer.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
}

fn transcode_utf16(body: &[u8], buffer: &mut Vec<u8>) {
    let (pairs, odd) = body.as_chunks::<2>();
    for unit in char::decode_utf16(pairs.iter().map(|pair| u16::from_le_bytes(*pair))) {
        push(buffer, unit.unwrap_or(char::REPLACEMENT_CHARACTER));
    }
    if !odd.is_empty() {
        push(buffer, char::REPLACEMENT_CHARACTER);
    }
}

fn transcode_utf32(body: &[u8], buffer: &mut Vec<u8>) {
    let (quads, odd) = body.as_chunks::<4>();
    for quad in quads {
        push(buffer, char::from_u32(u32::from_le_bytes(*quad)).unwrap_or(char::REPLACEMENT_CHARACTER));
    }
    if !odd.is_empty() {
        push(buffer, char::REPLACEMENT_CHARACTER);
    }
}
