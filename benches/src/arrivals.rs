//! Owns the judgement of what arrived: losses, duplicates and breaks of order, per publisher.

/// What one receiver got from all publishers, each of which numbers its messages from 0.
#[derive(Debug)]
pub struct Arrivals {
    publishers: Vec<Seen>,
    /// Messages that arrived for the first time.
    pub unique: u64,
    /// Messages that arrived again.
    pub duplicates: u64,
    /// First arrivals behind a later message of the same publisher.
    pub order_breaks: u64,
    /// Messages with a number that nobody sent.
    pub foreign: u64,
}

#[derive(Debug)]
struct Seen {
    bits: Vec<u64>,
    count: u64,
    next: u64,
}

impl Arrivals {
    /// Of `publishers` publishers with `messages_each` messages each.
    pub fn new(publishers: usize, messages_each: u64) -> Self {
        let seen =
            || Seen { bits: vec![0; messages_each.div_ceil(64) as usize], count: messages_each, next: 0 };
        Self {
            publishers: std::iter::repeat_with(seen).take(publishers).collect(),
            unique: 0,
            duplicates: 0,
            order_breaks: 0,
            foreign: 0,
        }
    }

    /// Judges one arrival.
    pub fn record(&mut self, publisher: u32, number: u64) {
        let Some(seen) = self.publishers.get_mut(publisher as usize).filter(|seen| number < seen.count)
        else {
            self.foreign += 1;
            return;
        };
        let (word, bit) = ((number / 64) as usize, 1_u64 << (number % 64));
        if seen.bits[word] & bit != 0 {
            self.duplicates += 1;
            return;
        }
        seen.bits[word] |= bit;
        self.unique += 1;
        if number < seen.next {
            self.order_breaks += 1;
        }
        seen.next = seen.next.max(number + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_told_from_the_others() {
        let mut arrivals = Arrivals::new(2, 100);
        for number in [0, 1, 3, 2, 3, 99] {
            arrivals.record(1, number);
        }
        arrivals.record(0, 0);
        arrivals.record(0, 100);
        arrivals.record(2, 0);
        let Arrivals { unique, duplicates, order_breaks, foreign, .. } = arrivals;
        assert_eq!((unique, duplicates, order_breaks, foreign), (6, 1, 1, 2));
    }
}
