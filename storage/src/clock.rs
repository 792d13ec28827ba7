//! Owns the store's clock: wall time that neither jumps nor runs backwards.
//!
//! Within a run the clock is the wall time of its start plus monotonic time, so setting the machine's clock
//! while the store is open changes nothing. Between runs it goes on from where it was, plus what elapsed. While the
//! machine stays up its own count of that tells, which nobody sets. After a start of the machine it is the difference
//! of the wall time between then and now, which is right if that clock was right both times. A wall time before
//! [`WALL_PLAUSIBLE_MIN_MS`] belongs to a machine whose clock was never set: the time switched off then counts as
//! nothing.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Wall times before this (2025-01-01T00:00:00Z, milliseconds since 1970) come from a clock that was never set.
pub const WALL_PLAUSIBLE_MIN_MS: i64 = 1_735_689_600_000;

/// A time on the store's clock, in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct StoreTime(u64);

impl StoreTime {
    /// The time with this number of milliseconds.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds since 1970.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// Milliseconds from `earlier` to this time; 0 if `earlier` is later.
    pub const fn millis_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// This time plus some milliseconds; `None` beyond the range.
    pub const fn checked_add_millis(self, millis: u64) -> Option<Self> {
        match self.0.checked_add(millis) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

/// Where time comes from; replaced in tests.
pub trait TimeSource: Send + Sync + fmt::Debug {
    /// The machine's wall clock, in milliseconds since 1970; may jump.
    fn wall_ms(&self) -> i64;
    /// Milliseconds since any fixed moment of this run; never goes back.
    fn monotonic_ms(&self) -> u64;
    /// How long the machine has been up, suspended or not; `None` where that is not told.
    fn uptime(&self) -> Option<Uptime> {
        None
    }
}

/// How long a machine has been up; other than wall time, nobody sets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uptime {
    /// Which start of which machine.
    pub boot_id: u128,
    /// Milliseconds since that start.
    pub millis: u64,
}

/// The time of the machine.
#[derive(Debug)]
pub struct SystemTimeSource {
    start: Instant,
    boot_id: Option<u128>,
}

impl Default for SystemTimeSource {
    fn default() -> Self {
        Self { start: Instant::now(), boot_id: boot_id() }
    }
}

impl TimeSource for SystemTimeSource {
    fn wall_ms(&self) -> i64 {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_millis()).map_or(i64::MIN, |millis| -millis),
        }
    }

    fn monotonic_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    #[cfg(target_os = "linux")]
    fn uptime(&self) -> Option<Uptime> {
        let since = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let (secs, nanos) = (u64::try_from(since.tv_sec).ok()?, u64::try_from(since.tv_nsec).ok()?);
        Some(Uptime { boot_id: self.boot_id?, millis: secs * 1_000 + nanos / 1_000_000 })
    }
}

/// What Linux calls this start of the machine; containers see that of their machine.
fn boot_id() -> Option<u128> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    u128::from_str_radix(&text.trim().replace('-', ""), 16).ok()
}

/// A time that stands still until it is moved; for tests. The machine starts anew when told.
#[derive(Debug, Default)]
pub struct ManualTimeSource {
    wall_ms: AtomicI64,
    monotonic_ms: AtomicU64,
    /// Starts of the machine; 0 is one that does not tell how long it has been up.
    boots: AtomicU64,
}

impl ManualTimeSource {
    /// Starts at this wall time.
    pub fn new(wall_ms: i64) -> Self {
        Self { wall_ms: AtomicI64::new(wall_ms), ..Self::default() }
    }

    /// Starts the machine anew, and from now on it tells how long it has been up.
    pub fn boot(&self) {
        self.boots.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets time pass.
    pub fn advance(&self, millis: u64) {
        self.wall_ms.fetch_add(i64::try_from(millis).unwrap_or(i64::MAX), Ordering::SeqCst);
        self.monotonic_ms.fetch_add(millis, Ordering::SeqCst);
    }

    /// Sets the wall clock as an operator or a time server would: no time passes.
    pub fn jump_wall(&self, by_ms: i64) {
        self.wall_ms.fetch_add(by_ms, Ordering::SeqCst);
    }
}

impl TimeSource for ManualTimeSource {
    fn wall_ms(&self) -> i64 {
        self.wall_ms.load(Ordering::SeqCst)
    }

    fn monotonic_ms(&self) -> u64 {
        self.monotonic_ms.load(Ordering::SeqCst)
    }

    fn uptime(&self) -> Option<Uptime> {
        let boots = self.boots.load(Ordering::SeqCst);
        (boots > 0).then(|| Uptime { boot_id: boots.into(), millis: self.monotonic_ms() })
    }
}

/// What is kept of the clock between runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClockRow {
    /// The store's clock when the row was written: the next run starts no earlier.
    pub(crate) store_ms: u64,
    /// The machine's wall time at the same moment.
    pub(crate) wall_ms: i64,
    /// How long the machine had been up then, where it tells.
    pub(crate) uptime: Option<Uptime>,
}

impl ClockRow {
    /// By how much the wall clock is ahead of the store's.
    pub(crate) fn skew_ms(self) -> i128 {
        i128::from(self.wall_ms) - i128::from(self.store_ms)
    }

    /// Milliseconds from the row to a later run.
    fn elapsed_ms(self, wall_ms: i64, uptime: Option<Uptime>) -> u64 {
        if let (Some(then), Some(now)) = (self.uptime, uptime)
            && then.boot_id == now.boot_id
        {
            return now.millis.saturating_sub(then.millis);
        }
        let known = wall_ms >= WALL_PLAUSIBLE_MIN_MS && self.wall_ms >= WALL_PLAUSIBLE_MIN_MS;
        let elapsed = if known { wall_ms.saturating_sub(self.wall_ms).max(0) } else { 0 };
        u64::try_from(elapsed).unwrap_or(0)
    }
}

/// The clock of one run.
#[derive(Debug)]
pub(crate) struct Clock {
    source: Arc<dyn TimeSource>,
    start_store_ms: u64,
    start_monotonic_ms: u64,
}

impl Clock {
    pub(crate) fn start(source: Arc<dyn TimeSource>, last: Option<ClockRow>) -> Self {
        let wall_ms = source.wall_ms();
        let start_store_ms = match last {
            None => u64::try_from(wall_ms).unwrap_or(0),
            Some(last) => last.store_ms.saturating_add(last.elapsed_ms(wall_ms, source.uptime())),
        };
        let start_monotonic_ms = source.monotonic_ms();
        Self { source, start_store_ms, start_monotonic_ms }
    }

    pub(crate) fn now(&self) -> StoreTime {
        let run_ms = self.source.monotonic_ms().saturating_sub(self.start_monotonic_ms);
        StoreTime(self.start_store_ms.saturating_add(run_ms))
    }

    pub(crate) fn row(&self) -> ClockRow {
        ClockRow {
            store_ms: self.now().as_millis(),
            wall_ms: self.source.wall_ms(),
            uptime: self.source.uptime(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALL: i64 = WALL_PLAUSIBLE_MIN_MS + 1_000_000;
    const YEAR_MS: i64 = 365 * 86_400_000;

    #[test]
    fn jumps_within_a_run_change_nothing() {
        let source = Arc::new(ManualTimeSource::new(WALL));
        let clock = Clock::start(source.clone(), None);
        let start = clock.now();
        source.jump_wall(10 * YEAR_MS);
        assert_eq!(clock.now(), start);
        source.jump_wall(-40 * YEAR_MS);
        source.advance(7);
        assert_eq!(clock.now().millis_since(start), 7);
    }

    #[test]
    fn a_restart_counts_the_time_switched_off_and_never_goes_back() {
        // (wall at the last run's end, its store clock, wall now) -> store clock now
        let cases = [
            (WALL, 5_000_u64, WALL + 250, 5_250_u64),
            (WALL, 5_000, WALL - 10 * YEAR_MS, 5_000),
            (1_000, 5_000, WALL, 5_000),
            (WALL, 5_000, 1_000, 5_000),
            (WALL, 5_000, WALL, 5_000),
        ];
        for (wall_ms, store_ms, now_ms, expected) in cases {
            let source = Arc::new(ManualTimeSource::new(now_ms));
            let clock = Clock::start(source, Some(ClockRow { store_ms, wall_ms, uptime: None }));
            assert_eq!(clock.now().as_millis(), expected, "{wall_ms} {store_ms} {now_ms}");
        }
    }

    #[test]
    fn while_the_machine_stays_up_its_wall_clock_does_not_count() {
        // (wall jumps while the store is closed, the machine starts anew) -> milliseconds on the store's clock
        for (jump_ms, anew, expected) in [
            (0, false, 250),
            (YEAR_MS, false, 250),
            (-YEAR_MS, false, 250),
            (YEAR_MS, true, 250 + YEAR_MS.unsigned_abs()),
            (-YEAR_MS, true, 0),
        ] {
            let source = Arc::new(ManualTimeSource::new(WALL));
            source.boot();
            let before = Clock::start(source.clone(), None).row();
            source.advance(250);
            source.jump_wall(jump_ms);
            if anew {
                source.boot();
            }
            let after = Clock::start(source, Some(before)).now();
            assert_eq!(after.as_millis() - before.store_ms, expected, "{jump_ms} {anew}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_how_long_it_has_been_up() {
        let source = SystemTimeSource::default();
        let (first, second) = (source.uptime().unwrap(), source.uptime().unwrap());
        assert!(first.boot_id == second.boot_id && first.boot_id != 0);
        assert!(first.millis > 0 && second.millis >= first.millis);
    }
}
