//! Owns the approximate distribution: counts in buckets whose bounds grow by a constant factor.
//!
//! The idea is that of DDSketch (Masson, Rim, Lee: "DDSketch: a fast and fully-mergeable quantile sketch with
//! relative-error guarantees", VLDB 2019): with a growth of `(1+a)/(1-a)` every quantile is answered with a
//! relative error of at most `a`.

/// Relative error of a quantile.
pub(super) const RELATIVE_ERROR: f64 = 0.01;
/// Most buckets of one sketch: a spread of 16 decades. The lowest are merged when values spread further.
const BUCKETS_MAX: usize = 1_860;
/// Values up to this one, in any unit, count as zero.
const ZERO_MAX: f64 = 1e-9;
/// Values above this one count as this one.
const VALUE_MAX: f64 = 1e18;
const GROWTH: f64 = (1.0 + RELATIVE_ERROR) / (1.0 - RELATIVE_ERROR);
/// Natural logarithm of the growth: `2 artanh(a)`, of whose series the first terms are exact enough.
const GROWTH_LN: f64 = {
    let square = RELATIVE_ERROR * RELATIVE_ERROR;
    2.0 * RELATIVE_ERROR * (1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square / 7.0)))
};

/// Counts of values; the buckets cover only the range that was seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Sketch {
    zeros: u64,
    total: u64,
    /// Bucket index of `counts[0]`.
    first: i32,
    counts: Vec<u32>,
}

impl Sketch {
    /// Counts `times` occurrences of a value, which must not be NaN.
    pub(super) fn add(&mut self, value: f64, times: u32) {
        self.total += u64::from(times);
        if value <= ZERO_MAX {
            self.zeros += u64::from(times);
            return;
        }
        let index = bucket(value);
        let slot = self.slot(index);
        self.counts[slot] = self.counts[slot].saturating_add(times);
    }

    /// Adds the counts of another sketch.
    pub(super) fn merge(&mut self, other: &Self) {
        self.zeros += other.zeros;
        self.total += other.total;
        for (index, count) in (other.first..).zip(&other.counts).filter(|(_, count)| **count > 0) {
            let slot = self.slot(index);
            self.counts[slot] = self.counts[slot].saturating_add(*count);
        }
    }

    /// Forgets everything, and gives back what memory it had.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The value at a quantile from 0 to 1, `NaN` when nothing was counted.
    pub(super) fn quantile(&self, quantile: f64) -> f64 {
        if self.total == 0 {
            return f64::NAN;
        }
        // The rank of the value that a sorted list would have at this place, counted from 0.
        let rank = (quantile.clamp(0.0, 1.0) * (self.total - 1) as f64).floor() as u64;
        if rank < self.zeros {
            return 0.0;
        }
        let mut seen = self.zeros;
        for (index, count) in (self.first..).zip(&self.counts) {
            seen += u64::from(*count);
            if rank < seen {
                return middle(index);
            }
        }
        // Only reached when a count has saturated.
        self.counts.len().checked_sub(1).map_or(0.0, |last| middle(self.first + last as i32))
    }

    /// Makes room for a bucket and answers its place.
    fn slot(&mut self, index: i32) -> usize {
        if self.counts.is_empty() {
            self.first = index;
        }
        if index < self.first {
            let room = BUCKETS_MAX - self.counts.len();
            let missing = ((self.first - index) as usize).min(room);
            self.counts.splice(0..0, std::iter::repeat_n(0, missing));
            self.first -= missing as i32;
        }
        let end = self.first + self.counts.len() as i32;
        if index >= end {
            self.counts.resize((index - self.first) as usize + 1, 0);
            let excess = self.counts.len().saturating_sub(BUCKETS_MAX);
            if excess > 0 {
                let merged: u64 = self.counts.drain(..excess).map(u64::from).sum();
                self.first += excess as i32;
                self.counts[0] = self.counts[0].saturating_add(u32::try_from(merged).unwrap_or(u32::MAX));
            }
        }
        usize::try_from(index - self.first).unwrap_or(0)
    }
}

/// Index of the bucket `(GROWTH^(i-1), GROWTH^i]` that holds a value.
fn bucket(value: f64) -> i32 {
    (value.min(VALUE_MAX).ln() / GROWTH_LN).ceil() as i32
}

/// The value of a bucket with equal relative distance to both of its bounds.
fn middle(index: i32) -> f64 {
    2.0 * GROWTH.powi(index) / (GROWTH + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sketch_of(values: &[f64]) -> Sketch {
        let mut sketch = Sketch::default();
        for value in values {
            sketch.add(*value, 1);
        }
        sketch
    }

    fn exact(values: &[f64], quantile: f64) -> f64 {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[(quantile * (sorted.len() - 1) as f64).floor() as usize]
    }

    #[test]
    fn the_logarithm_of_the_growth_is_exact() {
        assert!((GROWTH.ln() - GROWTH_LN).abs() < 1e-15);
    }

    #[test]
    fn an_empty_sketch_has_no_quantiles() {
        assert!(Sketch::default().quantile(0.5).is_nan());
    }

    #[test]
    fn ten_thousand_values_in_order() {
        let values: Vec<f64> = (0..10_000).map(f64::from).collect();
        let sketch = sketch_of(&values);
        for quantile in [0.1, 0.5, 0.9, 0.99] {
            let (found, wanted) = (sketch.quantile(quantile), exact(&values, quantile));
            assert!((found - wanted).abs() <= wanted * 0.0101, "{quantile}: {found} for {wanted}");
        }
    }

    #[test]
    fn the_number_of_buckets_is_bounded_and_the_high_end_stays_exact() {
        let mut sketch = Sketch::default();
        for exponent in -9..=18 {
            sketch.add(2.0 * 10f64.powi(exponent), 1);
            sketch.add(2.0 * 10f64.powi(9 - exponent), 1);
        }
        assert!(sketch.counts.len() <= BUCKETS_MAX);
        sketch.add(f64::INFINITY, 1);
        assert!((sketch.quantile(1.0) / VALUE_MAX - 1.0).abs() < 0.0101);
    }

    proptest! {
        #[test]
        fn quantiles_are_within_the_relative_error(
            values in prop::collection::vec(1e-6f64..1e7, 1..400),
            quantile in 0.0f64..=1.0,
            split in 0usize..400,
        ) {
            let split = split.min(values.len());
            let mut sketch = sketch_of(&values[..split]);
            sketch.merge(&sketch_of(&values[split..]));
            let (found, wanted) = (sketch.quantile(quantile), exact(&values, quantile));
            prop_assert!((found - wanted).abs() <= wanted * 0.0101, "{found} for {wanted}");
        }
    }
}
