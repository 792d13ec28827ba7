//! Owns the latency histogram: logarithmic buckets with a relative error below two percent.

use serde::Serialize;

/// Linear steps per power of two, as a power of two: 64 steps keep the error below 1/64.
const STEP_BITS: u32 = 6;
const STEPS: usize = 1 << STEP_BITS;
const BUCKETS: usize = (u64::BITS as usize - STEP_BITS as usize + 1) * STEPS;

/// Counts durations in nanoseconds; memory does not grow with them.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max_ns: u64,
}

/// Percentiles in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half of the samples are at most this.
    pub p50_us: f64,
    /// 90 percent are at most this.
    pub p90_us: f64,
    /// 99 percent are at most this.
    pub p99_us: f64,
    /// 99.9 percent are at most this.
    pub p999_us: f64,
    /// The largest sample, exact.
    pub max_us: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0, max_ns: 0 }
    }
}

impl Histogram {
    /// Counts one sample.
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds all samples of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// The percentiles; `None` without samples.
    pub fn percentiles(&self) -> Option<Percentiles> {
        (self.total > 0).then(|| Percentiles {
            p50_us: self.quantile_us(0.5),
            p90_us: self.quantile_us(0.9),
            p99_us: self.quantile_us(0.99),
            p999_us: self.quantile_us(0.999),
            max_us: self.max_ns as f64 / 1000.0,
        })
    }

    fn quantile_us(&self, quantile: f64) -> f64 {
        let rank = ((self.total as f64 * quantile).ceil() as u64).clamp(1, self.total);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper_bound_ns(index).min(self.max_ns) as f64 / 1000.0;
            }
        }
        self.max_ns as f64 / 1000.0
    }
}

fn bucket(ns: u64) -> usize {
    let magnitude = (u64::BITS - ns.leading_zeros()).saturating_sub(STEP_BITS + 1);
    magnitude as usize * STEPS + (ns >> magnitude) as usize
}

fn upper_bound_ns(index: usize) -> u64 {
    let magnitude = (index / STEPS).saturating_sub(1);
    let step = (index - magnitude * STEPS) as u64;
    ((u128::from(step) + 1) << magnitude).saturating_sub(1).min(u128::from(u64::MAX)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_its_values_within_the_error() {
        for shift in 0..64 {
            for ns in [1_u64 << shift, (1 << shift) + (1 << shift) / 3, u64::MAX >> shift] {
                let bound = upper_bound_ns(bucket(ns));
                assert!(bound >= ns, "{ns} in a bucket up to {bound}");
                assert!(bound - ns <= ns / STEPS as u64, "{ns} in a bucket up to {bound}");
            }
        }
        assert_eq!(upper_bound_ns(bucket(0)), 0);
    }

    #[test]
    fn percentiles_of_a_known_distribution() {
        let mut histogram = Histogram::default();
        assert!(histogram.percentiles().is_none());
        for us in 1..=1000 {
            histogram.record(us * 1000);
        }
        let found = histogram.percentiles().expect("there are samples");
        for (value, wanted) in [(found.p50_us, 500.0), (found.p90_us, 900.0), (found.p99_us, 990.0)] {
            assert!((value - wanted).abs() <= wanted / 60.0, "{value} for {wanted}");
        }
        assert!((found.max_us - 1000.0).abs() < f64::EPSILON);
    }
}
