//! Messages that a consumer has and has not answered yet, in the order of sending.

use std::collections::VecDeque;

/// A window of unsettled deliveries; tags count up by one.
#[derive(Debug)]
pub(crate) struct InFlight<T> {
    first_tag: u64,
    slots: VecDeque<Option<T>>,
    open: usize,
}

impl<T> InFlight<T> {
    pub(crate) fn new() -> Self {
        Self { first_tag: 0, slots: VecDeque::new(), open: 0 }
    }

    /// Deliveries without an answer.
    pub(crate) fn len(&self) -> usize {
        self.open
    }

    /// Adds a delivery and names it.
    pub(crate) fn push(&mut self, delivery: T) -> u64 {
        self.slots.push_back(Some(delivery));
        self.open += 1;
        self.first_tag + self.slots.len() as u64 - 1
    }

    /// Takes an answered delivery; none for a tag that is unknown or was answered before.
    pub(crate) fn take(&mut self, tag: u64) -> Option<T> {
        let index = usize::try_from(tag.checked_sub(self.first_tag)?).ok()?;
        let taken = self.slots.get_mut(index)?.take()?;
        self.open -= 1;
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first_tag += 1;
        }
        Some(taken)
    }

    /// A delivery without an answer.
    pub(crate) fn get_mut(&mut self, tag: u64) -> Option<&mut T> {
        let index = usize::try_from(tag.checked_sub(self.first_tag)?).ok()?;
        self.slots.get_mut(index)?.as_mut()
    }

    /// All deliveries without an answer, in the order of sending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten()
    }

    /// The delivery that has waited longest.
    pub(crate) fn oldest(&self) -> Option<&T> {
        self.slots.front().and_then(Option::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_in_any_order() {
        let mut window = InFlight::new();
        let tags: Vec<u64> = (0..5).map(|number| window.push(number)).collect();
        assert_eq!(window.take(tags[2]), Some(2));
        assert_eq!(window.take(tags[2]), None);
        assert_eq!(window.oldest(), Some(&0));
        assert_eq!(window.take(tags[0]), Some(0));
        assert_eq!(window.take(tags[1]), Some(1));
        assert_eq!(window.oldest(), Some(&3));
        assert_eq!(window.len(), 2);
        assert_eq!(window.take(tags[1]), None);
        assert_eq!(window.take(99), None);
        let tag = window.push(5);
        assert_eq!(window.take(tag), Some(5));
    }
}
