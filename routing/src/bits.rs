//! Owns sets of small numbers as bits: the routes of a table, the families that are already known.

/// A set of numbers, each a bit. Sets that are combined are of the same width.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BitSet {
    words: Vec<u64>,
}

impl BitSet {
    /// The empty set, with room for the numbers below `width`.
    pub(crate) fn new(width: usize) -> BitSet {
        BitSet { words: vec![0; width.div_ceil(64)] }
    }

    /// Makes room for the numbers below `width`; what is in the set is void.
    #[inline]
    pub(crate) fn fit(&mut self, width: usize) {
        if self.words.len() != width.div_ceil(64) {
            self.words.resize(width.div_ceil(64), 0);
        }
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Makes it equal to `other`, which is of the same width.
    #[inline]
    pub(crate) fn copy(&mut self, other: &BitSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(own, other)| *own = *other);
    }

    #[inline]
    pub(crate) fn contains(&self, number: usize) -> bool {
        self.words.get(number / 64).is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    #[inline]
    pub(crate) fn insert(&mut self, number: usize) {
        if let Some(word) = self.words.get_mut(number / 64) {
            *word |= 1 << (number % 64);
        }
    }

    #[inline]
    pub(crate) fn remove(&mut self, number: usize) {
        if let Some(word) = self.words.get_mut(number / 64) {
            *word &= !(1 << (number % 64));
        }
    }

    /// Removes all numbers from `first` to before `end`.
    #[inline]
    pub(crate) fn remove_range(&mut self, first: usize, end: usize) {
        let mut at = first;
        while at < end {
            let next = (at / 64 + 1) * 64;
            let width = next.min(end) - at;
            if let Some(word) = self.words.get_mut(at / 64) {
                *word &= !((u64::MAX >> (64 - width)) << (at % 64));
            }
            at = next;
        }
    }

    /// The smallest number that is not below `from`.
    #[inline]
    pub(crate) fn next(&self, from: usize) -> Option<usize> {
        let mut at = from / 64;
        let mut word = self.words.get(at)? & (u64::MAX << (from % 64));
        while word == 0 {
            at += 1;
            word = *self.words.get(at)?;
        }
        Some(at * 64 + word.trailing_zeros() as usize)
    }

    pub(crate) fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Adds the numbers of `other`.
    #[inline]
    pub(crate) fn add(&mut self, other: &BitSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(own, other)| *own |= other);
    }

    /// Removes the numbers of `other`.
    #[inline]
    pub(crate) fn subtract(&mut self, other: &BitSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(own, other)| *own &= !other);
    }

    /// Of the numbers in `among`, keeps those in `kept`.
    #[inline]
    pub(crate) fn keep(&mut self, among: &BitSet, kept: &BitSet) {
        let both = among.words.iter().zip(&kept.words);
        self.words.iter_mut().zip(both).for_each(|(own, (among, kept))| *own &= !among | kept);
    }

    /// Moves the numbers of `other` that are in this set to `target`.
    #[inline]
    pub(crate) fn move_to(&mut self, other: &BitSet, target: &mut BitSet) {
        let both = other.words.iter().zip(&mut target.words);
        self.words.iter_mut().zip(both).for_each(|(own, (other, target))| {
            *target |= *own & other;
            *own &= !other;
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::BitSet;

    const WIDTH: usize = 200;

    fn set_of(numbers: &BTreeSet<usize>) -> BitSet {
        let mut set = BitSet::new(WIDTH);
        numbers.iter().for_each(|number| set.insert(*number));
        set
    }

    fn numbers_of(set: &BitSet) -> BTreeSet<usize> {
        let mut numbers = BTreeSet::new();
        let mut from = 0;
        while let Some(number) = set.next(from) {
            assert!(set.contains(number));
            numbers.insert(number);
            from = number + 1;
        }
        assert_eq!(set.count() as usize, numbers.len());
        numbers
    }

    fn numbers() -> impl Strategy<Value = BTreeSet<usize>> {
        proptest::collection::btree_set(0..WIDTH, 0..WIDTH)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn sets_are_sets(a in numbers(), b in numbers(), c in numbers(), first in 0..WIDTH, end in 0..=WIDTH) {
            let (set_a, set_b, set_c) = (set_of(&a), set_of(&b), set_of(&c));
            prop_assert_eq!(&numbers_of(&set_a), &a);

            let mut set = set_a.clone();
            set.keep(&set_b, &set_c);
            prop_assert_eq!(numbers_of(&set), a.iter().copied().filter(|n| !b.contains(n) || c.contains(n)).collect());

            let (mut set, mut target) = (set_a.clone(), set_c.clone());
            set.move_to(&set_b, &mut target);
            prop_assert_eq!(numbers_of(&set), &a - &b);
            prop_assert_eq!(numbers_of(&target), &c | &(&a & &b));

            set.copy(&set_a);
            set.subtract(&set_b);
            set.add(&set_c);
            prop_assert_eq!(numbers_of(&set), &(&a - &b) | &c);

            set.copy(&set_a);
            set.remove_range(first, end);
            set.remove(end);
            let outside = |n: &usize| (*n < first || *n >= end) && *n != end;
            prop_assert_eq!(numbers_of(&set), a.iter().copied().filter(outside).collect());
            set.clear();
            prop_assert_eq!(&set, &BitSet::new(WIDTH));
            set.fit(WIDTH + 64);
            set.insert(WIDTH + 1);
            prop_assert_eq!(set.next(0), Some(WIDTH + 1));
        }
    }
}
