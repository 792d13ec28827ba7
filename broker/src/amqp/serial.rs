//! An ordered table with 32-bit keys of a peer, made for keys that mostly ascend and mostly leave at the front.

use std::collections::VecDeque;

/// True when `a` is before `b` in serial number arithmetic (RFC 1982), as transfer numbers are compared.
pub(super) fn before(a: u32, b: u32) -> bool {
    a != b && b.wrapping_sub(a) < 0x8000_0000
}

/// Sorted keys with holes. Look-ups of dense keys take one step, others a binary search; memory is bounded by
/// twice the live entries, however the holes are spread.
#[derive(Debug)]
pub(super) struct SerialTable<T> {
    entries: VecDeque<(u32, Option<T>)>,
    live: usize,
}

impl<T> Default for SerialTable<T> {
    fn default() -> Self {
        Self { entries: VecDeque::new(), live: 0 }
    }
}

impl<T> SerialTable<T> {
    /// Live entries.
    pub(super) fn len(&self) -> usize {
        self.live
    }

    /// Adds an entry, mostly behind all others. An entry with the same key is replaced.
    pub(super) fn insert(&mut self, key: u32, value: T) {
        if self.entries.back().is_none_or(|(last, _)| before(*last, key)) {
            self.entries.push_back((key, Some(value)));
            self.live += 1;
            return;
        }
        let at = self.lower_bound(key);
        match self.entries.get_mut(at) {
            Some((found, slot)) if *found == key => {
                self.live += usize::from(slot.is_none());
                *slot = Some(value);
            }
            _ => {
                self.entries.insert(at, (key, Some(value)));
                self.live += 1;
            }
        }
    }

    pub(super) fn get_mut(&mut self, key: u32) -> Option<&mut T> {
        let at = self.find(key)?;
        self.entries[at].1.as_mut()
    }

    pub(super) fn remove(&mut self, key: u32) -> Option<T> {
        let at = self.find(key)?;
        let value = self.entries[at].1.take()?;
        self.live -= 1;
        self.tidy();
        Some(value)
    }

    /// Removes every live entry of `first..=last`, in order. Takes no longer than there are entries, whatever
    /// range a peer names.
    pub(super) fn remove_range(&mut self, first: u32, last: u32, mut removed: impl FnMut(u32, T)) {
        if first != last && !before(first, last) {
            return;
        }
        let mut at = self.lower_bound(first);
        while let Some((key, slot)) = self.entries.get_mut(at) {
            if *key != last && !before(*key, last) {
                break;
            }
            if let Some(value) = slot.take() {
                self.live -= 1;
                removed(*key, value);
            }
            at += 1;
        }
        self.tidy();
    }

    /// Keeps the entries for which `keep` is true.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.entries.retain(|(_, value)| value.as_ref().is_some_and(&mut keep));
        self.live = self.entries.len();
    }

    fn find(&self, key: u32) -> Option<usize> {
        let (front, _) = self.entries.front()?;
        let guess = key.wrapping_sub(*front) as usize;
        if self.entries.get(guess).is_some_and(|(found, _)| *found == key) {
            return Some(guess);
        }
        let at = self.lower_bound(key);
        self.entries.get(at).is_some_and(|(found, _)| *found == key).then_some(at)
    }

    fn lower_bound(&self, key: u32) -> usize {
        self.entries.partition_point(|(found, _)| before(*found, key))
    }

    fn tidy(&mut self) {
        while let Some((_, None)) = self.entries.front() {
            self.entries.pop_front();
        }
        if self.entries.len() > 2 * self.live + 32 {
            self.entries.retain(|(_, value)| value.is_some());
        }
        if self.live == 0 && self.entries.capacity() > 256 {
            self.entries = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn serial_order_wraps() {
        assert!(before(1, 2) && !before(2, 1) && !before(1, 1));
        assert!(before(u32::MAX, 0) && !before(0, u32::MAX));
        let mut table = SerialTable::default();
        for (key, value) in [(5, 'c'), (u32::MAX, 'x'), (0, 'b'), (u32::MAX, 'a')] {
            table.insert(key, value);
        }
        let mut seen = Vec::new();
        table.remove_range(u32::MAX - 3, 4, |key, value| seen.push((key, value)));
        assert_eq!(seen, [(u32::MAX, 'a'), (0, 'b')]);
        assert_eq!((table.len(), table.remove(5), table.remove(5)), (1, Some('c'), None));
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(steps in proptest::collection::vec((0u8..4, 0u32..60), 0..200)) {
            let mut table = SerialTable::default();
            let mut model = BTreeMap::new();
            let mut next = 0u32;
            for (what, n) in steps {
                match what {
                    0 => {
                        table.insert(n, n);
                        model.insert(n, n);
                    }
                    1 => {
                        next += 1 + n % 3;
                        table.insert(next, n);
                        model.insert(next, n);
                    }
                    2 => prop_assert_eq!(table.remove(n), model.remove(&n)),
                    _ => {
                        let mut removed = Vec::new();
                        table.remove_range(n, n + 7, |k, v| removed.push((k, v)));
                        let expected: Vec<_> = model.range(n..=n + 7).map(|(k, v)| (*k, *v)).collect();
                        model.retain(|k, _| !(n..=n + 7).contains(k));
                        prop_assert_eq!(removed, expected);
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert!(table.entries.len() <= 2 * table.live + 33);
            }
        }
    }
}
