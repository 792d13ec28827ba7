//! Owns the check of a database against itself: every entry and body is read, and names, counters, checkpoints and
//! stretches are held against them.
//!
//! Takes as long as the database is large; done after damage, and when an operator asks for it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use ahash::AHashMap;

use crate::clock::{ClockRow, StoreTime};
use crate::cursor::{Cursor, PageBits};
use crate::engine::{Engine, EngineError, Family};
use crate::ledger::{Ledger, Outcomes};
use crate::recovery::do_stretches_follow;
use crate::registry::QUEUES_MAX;
use crate::rows::{self, DEAD_LETTERS_QUEUE, HubRow, Mark, MetaRow, ReferenceHead, SettleRow};

/// A stretch that is built anew ends at this many entries ..
const STRETCH_ENTRIES_MAX: u64 = 10_000;
/// .. or bytes ..
const STRETCH_BYTES: u64 = 4 << 20;
/// .. or segments of the log.
const STRETCH_SEGMENTS_MAX: usize = 16;
/// Queues with this id and higher ones are the store's own.
pub(crate) const QUEUE_IDS_END: u32 = QUEUES_MAX as u32;
/// Stretches of missing entries that are noted per queue; more of them are found when they are read.
const MISSING_MAX: usize = 4096;

/// What a check can find. The list is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FindingKind {
    /// Files that the database needs are damaged or missing.
    File,
    /// Part of a table cannot be read.
    Table,
    /// A row is not understood.
    Row,
    /// The name of a queue is missing.
    Name,
    /// A queue's tail or checkpoint does not fit its entries.
    Position,
    /// A ledger does not add up.
    Ledger,
    /// A stretch of a queue does not fit its entries.
    Stretch,
    /// Entries that wait are missing or cannot be understood.
    Entry,
    /// The body of an entry is missing or has another length.
    Body,
    /// Bodies that no queue refers to.
    Orphan,
}

impl FindingKind {
    /// The kind as it is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Table => "table",
            Self::Row => "row",
            Self::Name => "name",
            Self::Position => "position",
            Self::Ledger => "ledger",
            Self::Stretch => "stretch",
            Self::Entry => "entry",
            Self::Body => "body",
            Self::Orphan => "orphan",
        }
    }
}

/// One thing that a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// The queue, if it is about one.
    pub queue: Option<String>,
    /// What was found.
    pub detail: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.queue {
            Some(queue) => write!(out, "{}: queue {queue}: {}", self.kind.as_str(), self.detail),
            None => write!(out, "{}: {}", self.kind.as_str(), self.detail),
        }
    }
}

/// What was stored of a queue, and what its entries say.
#[derive(Debug, Default)]
pub(crate) struct QueueAudit {
    pub(crate) name: Option<String>,
    pub(crate) open: Option<Mark>,
    pub(crate) settle: Option<SettleRow>,
    pub(crate) marks: Vec<Mark>,
    pages: Vec<(u64, Box<PageBits>)>,
    /// Which entries are settled, as far as that is stored.
    pub(crate) cursor: Cursor,
    /// The first offset that was never used.
    pub(crate) tail: u64,
    /// Entries that wait and cannot be read: offsets, and whether only the body is missing.
    pub(crate) lost: Vec<Range<u64>>,
    bodiless: u64,
    /// The stretches that the entries would make; the last one grows.
    pub(crate) built: Vec<Mark>,
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    /// The first entry that was seen, and where the next is expected.
    first: Option<u64>,
    next: u64,
}

/// What was found in a database.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    pub(crate) hub: Option<HubRow>,
    pub(crate) clock: Option<ClockRow>,
    pub(crate) queues: BTreeMap<u32, QueueAudit>,
    /// Rows that are not understood.
    pub(crate) unknown: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bodies in each segment of the log.
    pub(crate) bodies: BTreeMap<u64, u64>,
    /// When the newest entry was accepted.
    pub(crate) newest: StoreTime,
    /// Families of which parts cannot be read.
    pub(crate) passed: Vec<(Family, u64)>,
}

/// Reads names, counters, checkpoints and stretches.
pub(crate) fn accounts(engine: &Engine) -> Result<Audit, EngineError> {
    let mut audit = Audit::default();
    let scan = engine.scan_readable(Family::Meta, &mut |key, value| {
        audit.meta(key, value);
        Ok(())
    })?;
    audit.passed.push((Family::Meta, scan.passed));
    for queue in audit.queues.values_mut() {
        queue.begin();
    }
    Ok(audit)
}

/// Reads a whole database.
pub(crate) fn audit(engine: &Engine) -> Result<Audit, EngineError> {
    let mut audit = accounts(engine)?;
    let mut passed = std::mem::take(&mut audit.passed);
    let scan = engine.scan_readable(Family::Log, &mut |key, _| {
        if let Ok(key) = <[u8; 8]>::try_from(key) {
            *audit.bodies.entry(u64::from_be_bytes(key) >> rows::SEGMENT_SHIFT).or_default() += 1;
        }
        Ok(())
    })?;
    passed.push((Family::Log, scan.passed));
    let scan = engine.scan_readable(Family::Reference, &mut |key, value| audit.entry(engine, key, value))?;
    passed.push((Family::Reference, scan.passed));
    let scan = engine.scan_readable(Family::State, &mut |_, _| Ok(()))?;
    passed.push((Family::State, scan.passed));
    audit.passed = passed.into_iter().filter(|(_, times)| *times > 0).collect();
    for queue in audit.queues.values_mut() {
        queue.end();
    }
    Ok(audit)
}

impl Audit {
    fn meta(&mut self, key: &[u8], value: &[u8]) {
        match rows::decode_meta(key, value) {
            Some(MetaRow::Hub(row)) => self.hub = Some(row),
            Some(MetaRow::Clock(row)) => self.clock = Some(row),
            Some(MetaRow::Name(queue, name)) => self.queue(queue).name = Some(name),
            Some(MetaRow::Append(queue, mark)) => self.queue(queue).open = Some(mark),
            Some(MetaRow::Settle(queue, row)) => self.queue(queue).settle = Some(row),
            Some(MetaRow::Page(queue, page, bits)) => self.queue(queue).pages.push((page, bits)),
            Some(MetaRow::Mark(queue, mark)) => self.queue(queue).marks.push(mark),
            None => self.unknown.push((key.to_vec(), value.to_vec())),
        }
    }

    fn queue(&mut self, id: u32) -> &mut QueueAudit {
        self.queues.entry(id).or_default()
    }

    fn entry(&mut self, engine: &Engine, key: &[u8], value: &[u8]) -> Result<(), EngineError> {
        let Ok(key) = <[u8; 12]>::try_from(key) else {
            self.unknown.push((key.to_vec(), value.to_vec()));
            return Ok(());
        };
        let [a, b, c, d, offset @ ..] = key;
        let (id, offset) = (u32::from_be_bytes([a, b, c, d]), u64::from_be_bytes(offset));
        let decoded = ReferenceHead::decode(value);
        let has_body = match decoded.and_then(|(head, _)| head.logged) {
            None => true,
            Some(logged) => match engine.get(Family::Log, &rows::log_key(logged.sequence)) {
                Ok(body) => body.is_some_and(|body| body.len() == logged.length_bytes as usize),
                Err(EngineError::Corrupt(_)) => false,
                Err(error) => return Err(error),
            },
        };
        if let Some((head, _)) = &decoded {
            self.newest = self.newest.max(head.accepted_at);
        }
        let queue = self.queue(id);
        queue.entry(offset, decoded.map(|(head, _)| head), value.len() as u64, has_body);
        Ok(())
    }

    /// References into each segment of the log, by what is stored.
    fn stored_references(&self) -> AHashMap<u64, u64> {
        let mut references = AHashMap::new();
        for mark in self.queues.values().flat_map(|queue| queue.marks.iter().chain(&queue.open)) {
            for (segment, count) in &mark.segments {
                *references.entry(*segment).or_default() += u64::from(*count);
            }
        }
        references
    }

    /// Entries of the queues that were made of dead letters.
    pub(crate) fn redriven(&self) -> u64 {
        self.queues.get(&DEAD_LETTERS_QUEUE).map_or(0, |letters| letters.outcomes().delivered)
    }

    fn moved_to_letters(&self) -> u64 {
        let queues = self.queues.range(..QUEUE_IDS_END);
        queues.map(|(_, queue)| queue.outcomes().dead_lettered).sum()
    }

    /// Segments of the log that no queue refers to. The last one may be in use by the next bodies.
    pub(crate) fn orphans(&self) -> Vec<u64> {
        let references = self.stored_references();
        let last = self.hub.map_or(0, |hub| hub.next_segment);
        let orphan = |segment: &&u64| **segment + 1 < last && !references.contains_key(*segment);
        self.bodies.keys().filter(orphan).copied().collect()
    }

    /// What does not fit.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let mut findings = Findings(Vec::new());
        for (family, times) in &self.passed {
            let detail = format!("{times} places of the family {} cannot be read", family.name());
            findings.add(FindingKind::Table, None, detail);
        }
        for (key, _) in &self.unknown {
            findings.add(FindingKind::Row, None, format!("the row with key {key:02x?} is not understood"));
        }
        let mut accepted = 0;
        for (index, (id, queue)) in self.queues.iter().enumerate() {
            if *id >= QUEUE_IDS_END {
                queue.findings(&mut findings);
                continue;
            }
            if *id as usize != index || queue.name.is_none() {
                findings.add(
                    FindingKind::Name,
                    None,
                    format!("the name of queue {id}, or of one before it, is missing"),
                );
            }
            accepted += queue.tail;
            queue.findings(&mut findings);
        }
        let made = |hub: HubRow| hub.references + self.redriven();
        match self.hub {
            None if accepted > 0 => {
                findings.add(FindingKind::Ledger, None, "the counters of the store are missing".into());
            }
            Some(hub) if made(hub) != accepted => {
                let made = made(hub);
                findings.add(
                    FindingKind::Ledger,
                    None,
                    format!("{made} entries were made, but the queues accepted {accepted}"),
                );
            }
            _ => {}
        }
        let letters = self.queues.get(&DEAD_LETTERS_QUEUE).map_or(0, |letters| letters.tail);
        let moved = self.moved_to_letters();
        if moved != letters {
            let detail = format!("{moved} entries were moved to the dead letters, which took {letters}");
            findings.add(FindingKind::Ledger, None, detail);
        }
        for segment in self.orphans() {
            let bodies = self.bodies[&segment];
            findings.add(
                FindingKind::Orphan,
                None,
                format!("{bodies} bodies in segment {segment} of the log"),
            );
        }
        findings.0
    }
}

struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, kind: FindingKind, queue: Option<&str>, detail: String) {
        self.0.push(Finding { kind, queue: queue.map(str::to_owned), detail });
    }
}

impl QueueAudit {
    fn begin(&mut self) {
        self.marks.sort_by_key(|mark| mark.end);
        if let Some(settle) = self.settle {
            self.cursor = Cursor::restore(settle.prefix, std::mem::take(&mut self.pages));
        }
        self.next = self.cursor.prefix();
    }

    fn entry(&mut self, offset: u64, head: Option<ReferenceHead>, bytes: u64, has_body: bool) {
        if self.first.is_none() {
            self.first = Some(offset);
            if self.settle.is_none() {
                // Nothing says how far the queue is settled: what is gone was.
                self.cursor = Cursor::restore(offset, std::mem::take(&mut self.pages));
                self.next = offset;
            }
            self.built.push(Mark::starting_at(offset.min(self.cursor.prefix())));
        }
        let (logged, expires_at) = match head {
            Some(head) => (head.logged, head.ttl.expires_at(head.accepted_at)),
            None => (None, Some(StoreTime::default())),
        };
        let segment = logged.map(|logged| logged.sequence >> rows::SEGMENT_SHIFT);
        if let Some(open) = self.built.last_mut() {
            open.end = offset;
            let length = logged.map_or(0, |logged| u64::from(logged.length_bytes));
            open.add(12 + bytes + length, expires_at, segment);
            if open.end - open.start >= STRETCH_ENTRIES_MAX
                || open.bytes >= STRETCH_BYTES
                || open.segments.len() >= STRETCH_SEGMENTS_MAX
            {
                let next = Mark::starting_at(open.end);
                self.built.push(next);
            }
        }
        if offset < self.next {
            return;
        }
        self.missing(offset);
        self.next = offset + 1;
        if self.cursor.next_open(offset) != offset {
            return;
        }
        self.entries += 1;
        self.bytes += bytes + logged.map_or(0, |logged| u64::from(logged.length_bytes));
        if head.is_none() || !has_body {
            self.bodiless += u64::from(head.is_some());
            self.lose(offset..offset + 1);
        }
    }

    /// Takes note of open entries that should be between here and `offset`.
    fn missing(&mut self, offset: u64) {
        let mut at = self.cursor.next_open(self.next);
        while at < offset {
            let end = if self.cursor.beyond() == 0 {
                offset
            } else {
                (at + 1..offset).find(|open| self.cursor.next_open(*open) != *open).unwrap_or(offset)
            };
            self.lose(at..end);
            at = self.cursor.next_open(end);
        }
    }

    fn lose(&mut self, range: Range<u64>) {
        let full = self.lost.len() >= MISSING_MAX;
        match self.lost.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if full => {}
            _ => self.lost.push(range),
        }
    }

    fn end(&mut self) {
        let seen = self.built.last().map_or(0, |open| open.end);
        let stored = self.open.as_ref().map_or(0, |open| open.end);
        self.tail = stored.max(seen).max(self.cursor.end());
        if self.settle.is_none() && self.first.is_none() {
            self.cursor = Cursor::restore(self.tail, std::mem::take(&mut self.pages));
            self.next = self.tail;
        }
        self.missing(self.tail);
        let tail = self.tail;
        match self.built.last_mut() {
            Some(open) => open.end = tail,
            None => self.built.push(Mark { end: tail, ..Mark::starting_at(self.cursor.prefix()) }),
        }
    }

    /// The account as it is stored.
    pub(crate) fn ledger(&self) -> Ledger {
        let accepted = self.open.as_ref().map_or(0, |open| open.end);
        let settled = self.cursor.prefix() + self.cursor.beyond();
        Ledger { accepted, outcomes: self.outcomes(), queued: accepted.saturating_sub(settled) }
    }

    pub(crate) fn outcomes(&self) -> Outcomes {
        self.settle.map(|row| row.outcomes).unwrap_or_default()
    }

    /// Whether the stored stretches follow on each other up to the tail, and count no less than the entries do.
    pub(crate) fn are_stretches_sound(&self) -> bool {
        let open = self.open.clone().unwrap_or_else(|| Mark::starting_at(0));
        let stored: Vec<&Mark> = self.marks.iter().chain([&open]).collect();
        let apart = stored.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let chained = apart && do_stretches_follow(stored.iter().copied(), &self.cursor);
        let start = self.first.unwrap_or(u64::MAX).min(self.cursor.prefix());
        let covers = open.end == self.tail && stored[0].start <= start;
        let count = |marks: &mut dyn Iterator<Item = &Mark>| {
            let mut references: AHashMap<u64, u64> = AHashMap::new();
            for (segment, count) in marks.flat_map(|mark| &mark.segments) {
                *references.entry(*segment).or_default() += u64::from(*count);
            }
            references
        };
        let held = count(&mut stored.iter().copied());
        let seen = count(&mut self.built.iter());
        chained
            && covers
            && seen.iter().all(|(segment, count)| held.get(segment).is_some_and(|held| held >= count))
    }

    fn findings(&self, findings: &mut Findings) {
        let name = self.name.as_deref();
        let stored = self.open.as_ref().map_or(0, |open| open.end);
        if stored != self.tail {
            let detail = format!("its tail is {stored}, but there are entries up to {}", self.tail);
            findings.add(FindingKind::Position, name, detail);
        }
        let settled = self.cursor.prefix() + self.cursor.beyond();
        let total = self.outcomes().total();
        if settled != total {
            let detail = format!("{settled} entries are settled, but it counts the outcomes of {total}");
            findings.add(FindingKind::Ledger, name, detail);
        }
        if !self.are_stretches_sound() {
            findings.add(FindingKind::Stretch, name, "its stretches do not fit its entries".into());
        }
        for range in &self.lost {
            let detail = format!("entries {} to {} cannot be read", range.start, range.end - 1);
            findings.add(FindingKind::Entry, name, detail);
        }
        if self.bodiless > 0 {
            let detail = format!("{} of these entries have no body", self.bodiless);
            findings.add(FindingKind::Body, name, detail);
        }
    }
}
