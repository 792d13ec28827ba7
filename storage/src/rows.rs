//! Owns the stored form: every key and every value, byte by byte.
//!
//! Keys are big-endian, so that they sort by queue and position. Values are little-endian.

use bytes::Bytes;

use crate::clock::{ClockRow, StoreTime, Uptime};
use crate::cursor::{PAGE_WORDS, PageBits};
use crate::ledger::{DropReason, Outcomes};
use crate::letters::DeadLetterReason;
use crate::record::Ttl;

const HUB: u8 = 1;
const CLOCK: u8 = 2;
const NAME: u8 = 3;
const APPEND: u8 = 4;
const SETTLE: u8 = 5;
const PAGE: u8 = 6;
const MARK: u8 = 7;

const FLAG_LOGGED: u8 = 1;
const FLAG_FINITE: u8 = 2;

/// The queue that holds the dead letters; no queue that callers open gets this id.
pub(crate) const DEAD_LETTERS_QUEUE: u32 = u32::MAX;

/// The largest header of a reference: flags, time, time to live, position in the log, length there.
pub(crate) const REFERENCE_HEAD_MAX_BYTES: usize = 1 + 8 + 8 + 8 + 4;

/// The largest head of a dead letter.
const LETTER_HEAD_MAX_BYTES: usize = 1 + 4 + 4 + 8 + 8 + 1 + 8;

/// A number in the log: the segment in the upper 40 bits, the position in it in the lower 24.
pub(crate) const SEGMENT_SHIFT: u32 = 24;

pub(crate) fn reference_key(queue: u32, offset: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&queue.to_be_bytes());
    key[4..].copy_from_slice(&offset.to_be_bytes());
    key
}

pub(crate) fn reference_offset(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(4..)?.try_into().ok()?))
}

pub(crate) fn log_key(sequence: u64) -> [u8; 8] {
    sequence.to_be_bytes()
}

pub(crate) fn segment_start(segment: u64) -> [u8; 8] {
    (segment << SEGMENT_SHIFT).to_be_bytes()
}

/// A body that several queues share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Logged {
    pub(crate) sequence: u64,
    pub(crate) length_bytes: u32,
}

/// Where the body of an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body<'a> {
    Inline(&'a [u8]),
    Logged(Logged),
}

/// The head of a reference: everything but an inline body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReferenceHead {
    pub(crate) accepted_at: StoreTime,
    pub(crate) ttl: Ttl,
    pub(crate) logged: Option<Logged>,
}

impl ReferenceHead {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let mut flags = 0;
        if self.logged.is_some() {
            flags |= FLAG_LOGGED;
        }
        if matches!(self.ttl, Ttl::Millis(_)) {
            flags |= FLAG_FINITE;
        }
        out.push(flags);
        put(out, self.accepted_at.as_millis());
        if let Ttl::Millis(millis) = self.ttl {
            put(out, millis);
        }
        if let Some(logged) = self.logged {
            put(out, logged.sequence);
            out.extend_from_slice(&logged.length_bytes.to_le_bytes());
        }
    }

    pub(crate) fn decode(value: &[u8]) -> Option<(Self, Body<'_>)> {
        let mut row = Row(value);
        let flags = row.byte()?;
        if flags & !(FLAG_LOGGED | FLAG_FINITE) != 0 {
            return None;
        }
        let accepted_at = StoreTime::from_millis(row.number()?);
        let ttl = if flags & FLAG_FINITE != 0 { Ttl::Millis(row.number()?) } else { Ttl::Infinite };
        let logged = if flags & FLAG_LOGGED != 0 {
            Some(Logged { sequence: row.number()?, length_bytes: row.length()? })
        } else {
            None
        };
        let body = match logged {
            Some(logged) => Body::Logged(logged),
            None => Body::Inline(row.0),
        };
        Some((Self { accepted_at, ttl, logged }, body))
    }
}

/// What a dead letter says before its bytes: where it comes from, and why it is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LetterHead {
    pub(crate) reason: DeadLetterReason,
    pub(crate) attempts: u32,
    pub(crate) queue: u32,
    pub(crate) offset: u64,
    pub(crate) accepted_at: StoreTime,
    pub(crate) ttl: Ttl,
}

impl LetterHead {
    /// The letter as it is stored.
    pub(crate) fn letter(&self, bytes: &[u8]) -> Bytes {
        let mut out = Vec::with_capacity(LETTER_HEAD_MAX_BYTES + bytes.len());
        out.push(self.reason as u8);
        out.extend_from_slice(&self.attempts.to_le_bytes());
        out.extend_from_slice(&self.queue.to_le_bytes());
        put(&mut out, self.offset);
        put(&mut out, self.accepted_at.as_millis());
        match self.ttl {
            Ttl::Infinite => out.push(0),
            Ttl::Millis(millis) => {
                out.push(FLAG_FINITE);
                put(&mut out, millis);
            }
        }
        out.extend_from_slice(bytes);
        out.into()
    }

    /// Reads a letter; the bytes share its buffer.
    pub(crate) fn split(letter: &Bytes) -> Option<(Self, Bytes)> {
        let mut row = Row(letter);
        let head = Self {
            reason: DeadLetterReason::from_number(row.byte()?)?,
            attempts: row.length()?,
            queue: row.length()?,
            offset: row.number()?,
            accepted_at: StoreTime::from_millis(row.number()?),
            ttl: match row.byte()? {
                0 => Ttl::Infinite,
                FLAG_FINITE => Ttl::Millis(row.number()?),
                _ => return None,
            },
        };
        let rest = letter.slice(letter.len() - row.0.len()..);
        Some((head, rest))
    }
}

/// A stretch of a queue that is released as one: its size, when its entries expire, and what of the log it refers
/// to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) bytes: u64,
    /// When the first of its entries expires; `None` if none ever does.
    pub(crate) first_expiry: Option<StoreTime>,
    /// When the last of its entries expires; `None` if one never does.
    pub(crate) last_expiry: Option<StoreTime>,
    /// How many references it holds into each segment of the log.
    pub(crate) segments: Vec<(u64, u32)>,
}

impl Mark {
    pub(crate) fn starting_at(start: u64) -> Self {
        Self { start, end: start, last_expiry: Some(StoreTime::default()), ..Self::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(crate) fn add(&mut self, bytes: u64, expires_at: Option<StoreTime>, segment: Option<u64>) {
        self.end += 1;
        self.bytes += bytes;
        self.first_expiry = match (self.first_expiry, expires_at) {
            (Some(first), Some(this)) => Some(first.min(this)),
            (first, this) => first.or(this),
        };
        self.last_expiry = match (self.last_expiry, expires_at) {
            (Some(last), Some(this)) => Some(last.max(this)),
            (None, _) | (_, None) => None,
        };
        if let Some(segment) = segment {
            match self.segments.last_mut() {
                Some((last, references)) if *last == segment => *references += 1,
                _ => self.segments.push((segment, 1)),
            }
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put(out, self.start);
        put(out, self.end);
        put(out, self.bytes);
        for expiry in [self.first_expiry, self.last_expiry] {
            match expiry {
                None => out.push(0),
                Some(time) => {
                    out.push(1);
                    put(out, time.as_millis());
                }
            }
        }
        for (segment, references) in &self.segments {
            put(out, *segment);
            out.extend_from_slice(&references.to_le_bytes());
        }
    }

    pub(crate) fn decode(value: &[u8]) -> Option<Self> {
        let mut row = Row(value);
        let (start, end, bytes) = (row.number()?, row.number()?, row.number()?);
        let mut expiry = || match row.byte()? {
            0 => Some(None),
            1 => Some(Some(StoreTime::from_millis(row.number()?))),
            _ => None,
        };
        let (first_expiry, last_expiry) = (expiry()?, expiry()?);
        let mut segments = Vec::new();
        while !row.0.is_empty() {
            segments.push((row.number()?, row.length()?));
        }
        (start <= end).then_some(Self { start, end, bytes, first_expiry, last_expiry, segments })
    }
}

/// The counters of the whole store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct HubRow {
    pub(crate) records: u64,
    pub(crate) unrouted: u64,
    pub(crate) references: u64,
    /// The first segment of the log that was never written to.
    pub(crate) next_segment: u64,
}

/// How far a queue is settled, and the outcomes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SettleRow {
    pub(crate) prefix: u64,
    pub(crate) outcomes: Outcomes,
}

/// One row of the `meta` family.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum MetaRow {
    Hub(HubRow),
    Clock(ClockRow),
    Name(u32, String),
    /// The stretch that grows; its end is the queue's tail.
    Append(u32, Mark),
    Settle(u32, SettleRow),
    Page(u32, u64, Box<PageBits>),
    Mark(u32, Mark),
}

pub(crate) fn hub_key() -> [u8; 1] {
    [HUB]
}

pub(crate) fn clock_key() -> [u8; 1] {
    [CLOCK]
}

pub(crate) fn name_key(queue: u32) -> [u8; 5] {
    queue_key(NAME, queue)
}

pub(crate) fn append_key(queue: u32) -> [u8; 5] {
    queue_key(APPEND, queue)
}

pub(crate) fn settle_key(queue: u32) -> [u8; 5] {
    queue_key(SETTLE, queue)
}

pub(crate) fn page_key(queue: u32, page: u64) -> [u8; 13] {
    numbered_key(PAGE, queue, page)
}

pub(crate) fn mark_key(queue: u32, end: u64) -> [u8; 13] {
    numbered_key(MARK, queue, end)
}

pub(crate) fn encode_hub(row: &HubRow, out: &mut Vec<u8>) {
    for number in [row.records, row.unrouted, row.references, row.next_segment] {
        put(out, number);
    }
}

pub(crate) fn encode_clock(row: &ClockRow, out: &mut Vec<u8>) {
    put(out, row.store_ms);
    out.extend_from_slice(&row.wall_ms.to_le_bytes());
    if let Some(Uptime { boot_id, millis }) = row.uptime {
        out.extend_from_slice(&boot_id.to_le_bytes());
        put(out, millis);
    }
}

pub(crate) fn encode_settle(row: &SettleRow, out: &mut Vec<u8>) {
    let Outcomes { delivered, expired, dead_lettered, dropped } = row.outcomes;
    for number in [row.prefix, delivered, expired, dead_lettered].into_iter().chain(dropped) {
        put(out, number);
    }
}

pub(crate) fn encode_page(bits: &PageBits, out: &mut Vec<u8>) {
    for word in bits {
        put(out, *word);
    }
}

/// Reads a row; `None` if it is not one of ours.
pub(crate) fn decode_meta(key: &[u8], value: &[u8]) -> Option<MetaRow> {
    let mut row = Row(value);
    let mut key = Row(key);
    let kind = key.byte()?;
    let decoded = match kind {
        HUB => MetaRow::Hub(HubRow {
            records: row.number()?,
            unrouted: row.number()?,
            references: row.number()?,
            next_segment: row.number()?,
        }),
        CLOCK => MetaRow::Clock(ClockRow {
            store_ms: row.number()?,
            wall_ms: i64::from_le_bytes(row.take(8)?.try_into().ok()?),
            uptime: match row.0.is_empty() {
                true => None,
                false => Some(Uptime {
                    boot_id: u128::from_le_bytes(row.take(16)?.try_into().ok()?),
                    millis: row.number()?,
                }),
            },
        }),
        NAME => MetaRow::Name(key.queue()?, String::from_utf8(row.rest().to_vec()).ok()?),
        APPEND => MetaRow::Append(key.queue()?, Mark::decode(row.rest())?),
        SETTLE => {
            let prefix = row.number()?;
            let mut outcomes = Outcomes {
                delivered: row.number()?,
                expired: row.number()?,
                dead_lettered: row.number()?,
                dropped: [0; DropReason::ALL.len()],
            };
            for counter in &mut outcomes.dropped {
                // A row of a version that knew fewer reasons is shorter.
                *counter = if row.0.is_empty() { 0 } else { row.number()? };
            }
            MetaRow::Settle(key.queue()?, SettleRow { prefix, outcomes })
        }
        PAGE => {
            let mut bits = Box::new([0; PAGE_WORDS]);
            for word in bits.iter_mut() {
                *word = row.number()?;
            }
            MetaRow::Page(key.queue()?, key.position()?, bits)
        }
        MARK => {
            let queue = key.queue()?;
            let mark = Mark::decode(row.rest())?;
            if key.position()? != mark.end {
                return None;
            }
            MetaRow::Mark(queue, mark)
        }
        _ => return None,
    };
    (row.0.is_empty() && key.0.is_empty()).then_some(decoded)
}

/// An owned copy of borrowed bytes.
pub(crate) fn owned(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn queue_key(kind: u8, queue: u32) -> [u8; 5] {
    let mut key = [kind; 5];
    key[1..].copy_from_slice(&queue.to_be_bytes());
    key
}

fn numbered_key(kind: u8, queue: u32, number: u64) -> [u8; 13] {
    let mut key = [kind; 13];
    key[1..5].copy_from_slice(&queue.to_be_bytes());
    key[5..].copy_from_slice(&number.to_be_bytes());
    key
}

fn put(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

/// What is left of a row that is being read.
struct Row<'a>(&'a [u8]);

impl<'a> Row<'a> {
    fn take(&mut self, length_bytes: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length_bytes)?;
        self.0 = rest;
        Some(head)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    fn number(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn length(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn queue(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn position(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head() -> impl Strategy<Value = ReferenceHead> {
        let ttl = prop_oneof![Just(Ttl::Infinite), any::<u64>().prop_map(Ttl::Millis)];
        let logged =
            any::<(u64, u32)>().prop_map(|(sequence, length_bytes)| Logged { sequence, length_bytes });
        (any::<u64>(), ttl, prop::option::of(logged)).prop_map(|(millis, ttl, logged)| ReferenceHead {
            accepted_at: StoreTime::from_millis(millis),
            ttl,
            logged,
        })
    }

    fn letter() -> impl Strategy<Value = LetterHead> {
        let numbers = any::<(u32, u32, u64, u64, Option<u64>)>();
        (0..DeadLetterReason::ALL.len(), numbers).prop_map(
            |(reason, (attempts, queue, offset, millis, ttl))| LetterHead {
                reason: DeadLetterReason::ALL[reason],
                attempts,
                queue,
                offset,
                accepted_at: StoreTime::from_millis(millis),
                ttl: ttl.map_or(Ttl::Infinite, Ttl::Millis),
            },
        )
    }

    fn mark() -> impl Strategy<Value = Mark> {
        let segments = prop::collection::vec(any::<(u64, u32)>(), 0..20);
        let expiries = any::<(Option<u64>, Option<u64>)>();
        (any::<u32>(), any::<u32>(), any::<u64>(), expiries, segments).prop_map(
            |(start, length, bytes, (first, last), segments)| Mark {
                start: start.into(),
                end: u64::from(start) + u64::from(length),
                bytes,
                first_expiry: first.map(StoreTime::from_millis),
                last_expiry: last.map(StoreTime::from_millis),
                segments,
            },
        )
    }

    proptest! {
        #[test]
        fn heads_come_back(head in head(), body in prop::collection::vec(any::<u8>(), 0..20)) {
            let mut row = Vec::new();
            head.encode(&mut row);
            prop_assert!(row.len() <= REFERENCE_HEAD_MAX_BYTES);
            let expected = match head.logged {
                Some(logged) => Body::Logged(logged),
                None => {
                    row.extend_from_slice(&body);
                    Body::Inline(&body)
                }
            };
            prop_assert_eq!(ReferenceHead::decode(&row), Some((head, expected)));
        }

        #[test]
        fn letters_come_back(head in letter(), body in prop::collection::vec(any::<u8>(), 0..20)) {
            let letter = head.letter(&body);
            prop_assert_eq!(LetterHead::split(&letter), Some((head, Bytes::from(body))));
        }

        #[test]
        fn marks_come_back(queue in any::<u32>(), mark in mark()) {
            let mut row = Vec::new();
            mark.encode(&mut row);
            let key = mark_key(queue, mark.end);
            prop_assert_eq!(decode_meta(&append_key(queue), &row), Some(MetaRow::Append(queue, mark.clone())));
            prop_assert_eq!(decode_meta(&key, &row), Some(MetaRow::Mark(queue, mark)));
        }

        #[test]
        fn any_bytes_are_read_or_refused(key in prop::collection::vec(any::<u8>(), 0..16), row in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = ReferenceHead::decode(&row);
            let _ = LetterHead::split(&Bytes::copy_from_slice(&row));
            let _ = decode_meta(&key, &row);
        }
    }
}
