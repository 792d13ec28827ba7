//! Owns which entries of a queue are settled: a prefix, and a bounded set of single offsets beyond it.
//!
//! The set is a bitmap in pages, so that settling out of order costs a bit in memory and one small page per
//! write, however many entries are open.

use std::collections::BTreeMap;

/// How far beyond the checkpoint entries can be settled one by one, and so how far beyond it they are handed out.
/// Bounds the memory per queue to 128 KiB, and a bit for each entry that expired or was dropped farther away.
pub const SETTLE_WINDOW_MAX: u64 = 1 << 20;

const PAGE_BITS: u64 = 4096;
pub(crate) const PAGE_WORDS: usize = (PAGE_BITS / 64) as usize;

/// The bits of one page; bit `n` of page `p` is offset `p * 4096 + n`.
pub(crate) type PageBits = [u64; PAGE_WORDS];

#[derive(Debug, Clone)]
struct Page {
    bits: Box<PageBits>,
    dirty: bool,
    stored: bool,
}

impl Page {
    fn empty() -> Self {
        Self { bits: Box::new([0; PAGE_WORDS]), dirty: true, stored: false }
    }
}

/// The words of page `number` that `from..to` touches, with the bits of it.
fn masks(number: u64, from: u64, to: u64) -> impl Iterator<Item = (usize, u64)> {
    let first = number * PAGE_BITS;
    let (low, high) = (from.max(first) - first, to.min(first + PAGE_BITS) - first);
    (low / 64..high.div_ceil(64)).map(move |word| {
        let (begin, end) = (low.saturating_sub(word * 64), (high - word * 64).min(64));
        (word as usize, u64::MAX >> (64 - (end - begin)) << begin)
    })
}

/// The settled entries of one queue.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cursor {
    prefix: u64,
    beyond: u64,
    pages: BTreeMap<u64, Page>,
    /// Stored pages that the prefix has passed.
    gone: Vec<u64>,
}

impl Cursor {
    pub(crate) fn restore(prefix: u64, pages: Vec<(u64, Box<PageBits>)>) -> Self {
        let mut cursor = Self { prefix, ..Self::default() };
        for (number, bits) in pages {
            if (number + 1).saturating_mul(PAGE_BITS) <= prefix {
                cursor.gone.push(number);
                continue;
            }
            let first = number * PAGE_BITS;
            cursor.beyond += (0..PAGE_BITS)
                .filter(|bit| first + bit >= prefix && bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
                .count() as u64;
            cursor.pages.insert(number, Page { bits, dirty: false, stored: true });
        }
        cursor
    }

    /// The first entry that is not settled.
    pub(crate) fn prefix(&self) -> u64 {
        self.prefix
    }

    /// How many entries beyond the prefix are settled.
    pub(crate) fn beyond(&self) -> u64 {
        self.beyond
    }

    /// The highest settled offset beyond the prefix, plus one; the prefix if there is none.
    pub(crate) fn end(&self) -> u64 {
        for (number, page) in self.pages.iter().rev() {
            for (index, word) in page.bits.iter().enumerate().rev() {
                if *word != 0 {
                    let end = number * PAGE_BITS + index as u64 * 64 + u64::from(64 - word.leading_zeros());
                    return end.max(self.prefix);
                }
            }
        }
        self.prefix
    }

    /// Whether an entry at this offset can be settled.
    pub(crate) fn reaches(&self, offset: u64) -> bool {
        offset < self.prefix.saturating_add(SETTLE_WINDOW_MAX)
    }

    /// Settles one entry; false if it was settled before or is out of reach.
    pub(crate) fn settle(&mut self, offset: u64) -> bool {
        if offset < self.prefix || !self.reaches(offset) {
            return false;
        }
        if offset == self.prefix {
            self.prefix += 1;
            self.absorb();
            return true;
        }
        let page = self.pages.entry(offset / PAGE_BITS).or_insert_with(Page::empty);
        let (word, bit) = ((offset % PAGE_BITS / 64) as usize, 1_u64 << (offset % 64));
        if page.bits[word] & bit != 0 {
            return false;
        }
        page.bits[word] |= bit;
        page.dirty = true;
        self.beyond += 1;
        true
    }

    /// Settles all entries of `from..to`, out of reach too; returns how many were not settled before.
    pub(crate) fn settle_range(&mut self, from: u64, to: u64) -> u64 {
        if to <= self.prefix.max(from) {
            return 0;
        }
        if from <= self.prefix {
            let known = self.settled_within(self.prefix, to);
            let fresh = to - self.prefix - known;
            self.beyond -= known;
            self.prefix = to;
            self.absorb();
            return fresh;
        }
        let mut fresh = 0;
        for number in from / PAGE_BITS..=(to - 1) / PAGE_BITS {
            let page = self.pages.entry(number).or_insert_with(Page::empty);
            for (index, mask) in masks(number, from, to) {
                let word = &mut page.bits[index];
                fresh += u64::from((mask & !*word).count_ones());
                *word |= mask;
            }
            page.dirty = true;
        }
        self.beyond += fresh;
        fresh
    }

    /// Whether all entries of `from..to` are settled.
    pub(crate) fn is_settled(&self, from: u64, to: u64) -> bool {
        let from = from.max(self.prefix);
        from >= to || self.beyond >= to - from && self.settled_within(from, to) == to - from
    }

    /// How many entries below `to` are not settled.
    pub(crate) fn open_below(&self, to: u64) -> u64 {
        to.saturating_sub(self.prefix) - self.settled_within(self.prefix, to)
    }

    /// How many entries of `from..to`, which lies beyond the prefix, are settled.
    fn settled_within(&self, from: u64, to: u64) -> u64 {
        if self.beyond == 0 || from >= to {
            return 0;
        }
        let pages = self.pages.range(from / PAGE_BITS..=(to - 1) / PAGE_BITS);
        let settled = |(number, page): (&u64, &Page)| -> u64 {
            masks(*number, from, to)
                .map(|(index, mask)| u64::from((page.bits[index] & mask).count_ones()))
                .sum()
        };
        pages.map(settled).sum()
    }

    /// The first entry from `from` on that is not settled.
    pub(crate) fn next_open(&self, from: u64) -> u64 {
        let mut at = from.max(self.prefix);
        if self.beyond == 0 {
            return at;
        }
        while let Some(page) = self.pages.get(&(at / PAGE_BITS)) {
            let settled = (page.bits[(at % PAGE_BITS / 64) as usize] >> (at % 64)).trailing_ones();
            at += u64::from(settled);
            if settled == 0 || !at.is_multiple_of(64) {
                break;
            }
        }
        at
    }

    /// What has changed since the last call: pages to write, and pages to delete.
    pub(crate) fn take_changes(&mut self) -> (Vec<(u64, Box<PageBits>)>, Vec<u64>) {
        let mut written = Vec::new();
        for (number, page) in &mut self.pages {
            if std::mem::take(&mut page.dirty) {
                page.stored = true;
                written.push((*number, page.bits.clone()));
            }
        }
        (written, std::mem::take(&mut self.gone))
    }

    /// Takes back what [`take_changes`](Self::take_changes) gave, because it could not be written.
    pub(crate) fn return_changes(&mut self, written: &[u64], gone: Vec<u64>) {
        for number in written {
            match self.pages.get_mut(number) {
                Some(page) => page.dirty = true,
                // Passed meanwhile; the row may or may not exist, and deleting it twice is harmless.
                None => self.gone.push(*number),
            }
        }
        self.gone.extend(gone);
    }

    fn absorb(&mut self) {
        if self.beyond > 0 {
            let end = self.next_open(self.prefix);
            self.beyond -= end - self.prefix;
            self.prefix = end;
        }
        while let Some(first) = self.pages.first_entry() {
            if (first.key() + 1) * PAGE_BITS > self.prefix {
                break;
            }
            let (number, page) = first.remove_entry();
            if page.stored {
                self.gone.push(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn agrees_with_a_set(offsets in prop::collection::vec(0_u64..20_000, 0..400), run in 0_u64..9_000) {
            let mut cursor = Cursor::default();
            let mut settled = BTreeSet::new();
            let mut stored = BTreeSet::new();
            for (step, offset) in offsets.iter().copied().enumerate() {
                if step % 50 == 49 {
                    let before = settled.len();
                    settled.extend(offset..offset + run);
                    let fresh = cursor.settle_range(offset, offset + run);
                    prop_assert_eq!(fresh as usize, settled.len() - before);
                } else {
                    prop_assert_eq!(cursor.settle(offset), settled.insert(offset));
                }
                let prefix = (0..).find(|at| !settled.contains(at)).expect("the set is finite");
                prop_assert_eq!(cursor.prefix(), prefix);
                prop_assert_eq!(cursor.beyond() as usize, settled.range(prefix..).count());
                prop_assert_eq!(cursor.end(), settled.last().map_or(0, |last| last + 1).max(prefix));
                let open = (offset..).find(|at| !settled.contains(at)).expect("the set is finite");
                prop_assert_eq!(cursor.next_open(offset), open);
                let open_below = offset - settled.range(..offset).count() as u64;
                prop_assert_eq!(cursor.open_below(offset), open_below);
                let all = (offset..offset + run).all(|at| settled.contains(&at));
                prop_assert_eq!(cursor.is_settled(offset, offset + run), all);
                if step % 7 == 0 {
                    let (written, gone) = cursor.take_changes();
                    if step % 14 == 0 {
                        let numbers: Vec<u64> = written.iter().map(|page| page.0).collect();
                        cursor.return_changes(&numbers, gone);
                    } else {
                        stored.extend(written.iter().map(|page| page.0));
                        for number in gone {
                            stored.remove(&number);
                        }
                    }
                }
            }
            let (written, gone) = cursor.take_changes();
            stored.extend(written.iter().map(|page| page.0));
            for number in gone {
                stored.remove(&number);
            }
            let held: Vec<u64> = cursor.pages.keys().copied().collect();
            prop_assert_eq!(stored.into_iter().collect::<Vec<_>>(), held);
            let pages = cursor.pages.iter().map(|(number, page)| (*number, page.bits.clone())).collect();
            let restored = Cursor::restore(cursor.prefix(), pages);
            prop_assert_eq!(restored.beyond(), cursor.beyond());
        }
    }

    #[test]
    fn nothing_is_settled_out_of_reach() {
        let mut cursor = Cursor::default();
        assert!(cursor.settle(SETTLE_WINDOW_MAX - 1));
        assert!(!cursor.settle(SETTLE_WINDOW_MAX));
        assert!(cursor.settle(0));
        assert!(cursor.settle(SETTLE_WINDOW_MAX));
    }
}
