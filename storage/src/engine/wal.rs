//! Owns the write-ahead log as bytes: which of its records are sound, and what each of them changes.
//!
//! The engine itself stops at the first record that it cannot read and says nothing of what lies behind. So the
//! logs are read before it opens them: a log that merely ends early, as after a loss of power, is the engine's;
//! one with something wrong before its end is not.
//!
//! A log is a row of blocks of 32 KiB. A record is one fragment or several, none crosses a block; a fragment has a
//! checksum (4 bytes), a length (2) and a type (1) before its bytes. The manifest has the same form.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::Family;

const BLOCK_BYTES: usize = 32 << 10;
const HEAD_BYTES: usize = 7;
/// A record that claims to be longer is not ours: a write is a group of requests, and a request is bounded.
const RECORD_MAX_BYTES: usize = 256 << 20;

const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;

/// A stretch of a log that cannot be read, although there is more behind it, or although it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hole {
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// What a log looks like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LogScan {
    /// Sound records.
    pub(crate) records: u64,
    pub(crate) holes: Vec<Hole>,
    /// Where the last record begins, if the log ends before it does.
    pub(crate) incomplete_at: Option<u64>,
}

/// Reads a log, and shows each sound record to `visit`, which says whether it understands it.
pub(crate) fn scan(path: &Path, visit: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<LogScan> {
    let mut file = File::open(path)?;
    let mut scanner = Scanner { visit, found: LogScan::default(), record: Vec::new(), open: None, bad: None };
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    let mut base = 0;
    loop {
        block.clear();
        Read::by_ref(&mut file).take(BLOCK_BYTES as u64).read_to_end(&mut block)?;
        scanner.block(&block, base);
        base += block.len() as u64;
        if block.len() < BLOCK_BYTES {
            break;
        }
    }
    Ok(scanner.finish(base))
}

struct Scanner<'a> {
    visit: &'a mut dyn FnMut(&[u8]) -> bool,
    found: LogScan,
    record: Vec<u8>,
    /// Where the record that is being put together begins.
    open: Option<u64>,
    bad: Option<Bad>,
}

/// Where something could not be read, and nothing sound has come since.
struct Bad {
    at: u64,
    /// Whether it looks like a log that ends early.
    early_end: bool,
}

enum Fragment<'a> {
    Sound { kind: u8, bytes: &'a [u8] },
    Unsound { early_end: bool },
}

impl Scanner<'_> {
    fn block(&mut self, block: &[u8], base: u64) {
        let mut at = 0;
        while at < block.len() {
            let rest = &block[at..];
            if rest.len() < HEAD_BYTES && block.len() == BLOCK_BYTES {
                break;
            }
            match fragment(rest, block.len() < BLOCK_BYTES) {
                Fragment::Sound { kind, bytes } => {
                    let end = at + HEAD_BYTES + bytes.len();
                    self.fragment(kind, bytes, base + at as u64, base + end as u64);
                    at = end;
                }
                Fragment::Unsound { early_end } => {
                    self.unsound(base + at as u64, early_end);
                    match (at + 1..block.len()).find(|from| chain(&block[*from..], block.len())) {
                        Some(next) => at = next,
                        None => break,
                    }
                }
            }
        }
    }

    fn unsound(&mut self, at: u64, early_end: bool) {
        let from = self.open.take().unwrap_or(at);
        self.record.clear();
        match &mut self.bad {
            Some(bad) => bad.early_end &= early_end,
            None => self.bad = Some(Bad { at: from, early_end }),
        }
    }

    fn fragment(&mut self, kind: u8, bytes: &[u8], from: u64, to: u64) {
        if let Some(bad) = self.bad.take() {
            self.hole(bad.at, from);
        }
        match kind {
            FULL | FIRST => {
                if let Some(open) = self.open.take() {
                    self.hole(open, from);
                }
                self.record.clear();
                self.record.extend_from_slice(bytes);
                self.open = Some(from);
            }
            MIDDLE | LAST => {
                if self.open.is_none() || self.record.len() + bytes.len() > RECORD_MAX_BYTES {
                    // The rest of a record whose beginning cannot be read.
                    self.open = None;
                    self.hole(from, to);
                    return;
                }
                self.record.extend_from_slice(bytes);
            }
            // Settings of the engine, not data.
            _ => return,
        }
        if kind == FULL || kind == LAST {
            let open = self.open.take().unwrap_or(from);
            if (self.visit)(&self.record) {
                self.found.records += 1;
            } else {
                self.hole(open, to);
            }
        }
    }

    fn hole(&mut self, from: u64, to: u64) {
        match self.found.holes.last_mut() {
            Some(last) if last.to == from => last.to = to,
            _ => self.found.holes.push(Hole { from, to }),
        }
    }

    fn finish(mut self, end: u64) -> LogScan {
        match (self.bad.take(), self.open.take()) {
            (Some(Bad { at, early_end: false }), _) => self.hole(at, end),
            (Some(Bad { at, early_end: true }), _) | (None, Some(at)) => self.found.incomplete_at = Some(at),
            (None, None) => {}
        }
        self.found
    }
}

/// The fragment at the start of `rest`, which goes to the end of its block.
fn fragment(rest: &[u8], last_block: bool) -> Fragment<'_> {
    if rest.iter().all(|byte| *byte == 0) {
        // Room that was set aside and never written to.
        return Fragment::Unsound { early_end: true };
    }
    let Some((head, tail)) = rest.split_at_checked(HEAD_BYTES) else {
        return Fragment::Unsound { early_end: last_block };
    };
    let length = usize::from(u16::from_le_bytes([head[4], head[5]]));
    let Some(bytes) = tail.get(..length) else {
        return Fragment::Unsound { early_end: last_block && (FULL..=LAST).contains(&head[6]) };
    };
    let stored = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    if head[6] != 0 && stored == masked(crc32c(crc32c(0, &head[6..]), bytes)) {
        Fragment::Sound { kind: head[6], bytes }
    } else {
        Fragment::Unsound { early_end: false }
    }
}

/// Whether sound fragments go from the start of `rest` to the end of its block. Anything less could be bytes that
/// a sender put into a message.
fn chain(mut rest: &[u8], block_bytes: usize) -> bool {
    let full = block_bytes == BLOCK_BYTES;
    let mut sound = false;
    loop {
        if rest.is_empty() || full && rest.len() < HEAD_BYTES {
            return sound;
        }
        if rest.get(6).is_some_and(|kind| !(FULL..=LAST).contains(kind)) {
            return false;
        }
        match fragment(rest, !full) {
            Fragment::Sound { bytes, .. } => {
                sound = true;
                rest = &rest[HEAD_BYTES + bytes.len()..];
            }
            Fragment::Unsound { early_end } => return sound && early_end,
        }
    }
}

/// One change of a record of the write-ahead log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoggedChange<'a> {
    Put(Family, &'a [u8], &'a [u8]),
    Delete(Family, &'a [u8]),
    DeleteRange(Family, &'a [u8], &'a [u8]),
}

/// The changes of a record, in order; `None` if it is not one of ours.
pub(crate) fn changes(record: &[u8]) -> Option<Vec<LoggedChange<'_>>> {
    const DELETE: u8 = 0x4;
    const PUT: u8 = 0x5;
    const NOTE: u8 = 0x3;
    const NOTHING: u8 = 0xD;
    const DELETE_RANGE: u8 = 0xE;
    let mut rest = Row(record);
    let _sequence = rest.take(8)?;
    let count = u32::from_le_bytes(rest.take(4)?.try_into().ok()?);
    let mut changes = Vec::new();
    while !rest.0.is_empty() {
        match rest.take(1)?[0] {
            PUT => changes.push(LoggedChange::Put(rest.family()?, rest.bytes()?, rest.bytes()?)),
            DELETE => changes.push(LoggedChange::Delete(rest.family()?, rest.bytes()?)),
            DELETE_RANGE => {
                changes.push(LoggedChange::DeleteRange(rest.family()?, rest.bytes()?, rest.bytes()?));
            }
            NOTE => drop(rest.bytes()?),
            NOTHING => {}
            _ => return None,
        }
    }
    (changes.len() == count as usize).then_some(changes)
}

struct Row<'a>(&'a [u8]);

impl<'a> Row<'a> {
    fn take(&mut self, length_bytes: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length_bytes)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self) -> Option<u32> {
        let mut number = 0_u64;
        for shift in (0..35).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u32::try_from(number).ok();
            }
        }
        None
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(length as usize)
    }

    /// The engine numbers the families in the order in which they were made; 0 is one that is not used.
    fn family(&mut self) -> Option<Family> {
        let number = self.number()?;
        Family::ALL.get((number as usize).checked_sub(1)?).copied()
    }
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The CRC of RFC 3720 §12.1, continued from `crc`.
fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    let mut crc = !crc;
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        let low = crc ^ u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        let [a, b, c, d] = low.to_le_bytes();
        let index = [a, b, c, d, word[4], word[5], word[6], word[7]];
        crc = index.iter().enumerate().fold(0, |sum, (at, byte)| sum ^ TABLES[7 - at][usize::from(*byte)]);
    }
    for byte in words.remainder() {
        crc = crc >> 8 ^ TABLES[0][usize::from(crc as u8 ^ byte)];
    }
    !crc
}

static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        tables[0][index] = crc;
        index += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut index = 0;
        while index < 256 {
            let before = tables[table - 1][index];
            tables[table][index] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            index += 1;
        }
        table += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records of these lengths, framed as the engine frames them.
    fn log(lengths: &[usize]) -> Vec<u8> {
        let mut log = Vec::new();
        for (index, length) in lengths.iter().enumerate() {
            let record = vec![index as u8 + 64; *length];
            let (mut rest, mut first) = (&record[..], true);
            loop {
                let room = BLOCK_BYTES - log.len() % BLOCK_BYTES;
                if room < HEAD_BYTES {
                    log.resize(log.len() + room, 0);
                    continue;
                }
                let (bytes, behind) = rest.split_at(rest.len().min(room - HEAD_BYTES));
                let kind = match (first, behind.is_empty()) {
                    (true, true) => FULL,
                    (true, false) => FIRST,
                    (false, false) => MIDDLE,
                    (false, true) => LAST,
                };
                log.extend(masked(crc32c(crc32c(0, &[kind]), bytes)).to_le_bytes());
                log.extend((bytes.len() as u16).to_le_bytes());
                log.push(kind);
                log.extend(bytes);
                (rest, first) = (behind, false);
                if rest.is_empty() {
                    break;
                }
            }
        }
        log
    }

    /// The first byte of each record that was seen, and the rest of the scan.
    fn seen(bytes: &[u8]) -> (Vec<u8>, LogScan) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let mut records = Vec::new();
        let scan = scan(file.path(), &mut |record| {
            records.push(record[0]);
            true
        });
        (records, scan.unwrap())
    }

    const LENGTHS: [usize; 7] = [100, 20_000, 50_000, 7, 90_000, 300, 40];

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720 appendix B.4: 32 bytes of zeros, of ones, and counting up.
        assert_eq!(crc32c(0, &[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(0, &[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(0, &(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    #[test]
    fn a_log_that_ends_early_is_not_damaged_wherever_it_ends() {
        let whole = log(&LENGTHS);
        let (records, scan) = seen(&whole);
        assert_eq!((records.len(), scan.holes.len(), scan.incomplete_at), (7, 0, None));
        for end in (0..whole.len()).step_by(7919).chain(whole.len() - 50..whole.len()) {
            let (records, scan) = seen(&whole[..end]);
            assert_eq!(scan.holes, [], "{end}");
            assert_eq!(scan.records as usize, records.len());
            let mut zeros = whole[..end].to_vec();
            zeros.resize(end + 70_000, 0);
            let (padded, scan) = seen(&zeros);
            // Zeros may complete a record's checksum only by chance.
            assert_eq!((padded, scan.holes.len() <= 1), (records, true), "{end}");
        }
    }

    #[test]
    fn a_changed_byte_is_a_hole_and_costs_one_record_or_the_rest_of_its_block() {
        let whole = log(&LENGTHS);
        for at in (0..whole.len()).step_by(1009).chain(0..8).chain(whole.len() - 47..whole.len()) {
            for flip in [0x01, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                let (records, scan) = seen(&bytes);
                if records.len() == 7 {
                    continue; // the padding at the end of a block
                }
                let last = at >= whole.len() - 47;
                assert!(records.len() >= 4, "{at} {flip}: {records:?}");
                assert!(
                    !scan.holes.is_empty() || last && scan.incomplete_at.is_some(),
                    "{at} {flip}: {scan:?}"
                );
            }
        }
    }

    #[test]
    fn bytes_inside_a_message_are_not_taken_for_records() {
        let inner = log(&[500]);
        let mut message = vec![9; 2000];
        message.splice(1000..1000, inner);
        let mut bytes = log(&[30]);
        let at = bytes.len();
        bytes.extend(masked(crc32c(crc32c(0, &[FULL]), &message)).to_le_bytes());
        bytes.extend((message.len() as u16).to_le_bytes());
        bytes.push(FULL);
        bytes.extend(&message);
        bytes[at] ^= 1;
        let (records, scan) = seen(&bytes);
        assert_eq!((records, scan.holes), (vec![64], vec![Hole { from: at as u64, to: bytes.len() as u64 }]));
    }

    #[test]
    fn any_bytes_are_read_or_refused() {
        let mut rng = fastrand::Rng::with_seed(7);
        for length in [0, 1, 6, 7, 8, 4000, BLOCK_BYTES, BLOCK_BYTES + 3, 3 * BLOCK_BYTES] {
            let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(length).collect();
            assert_eq!(seen(&bytes).0, []);
            let _ = changes(&bytes);
        }
    }
}
