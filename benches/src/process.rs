//! Owns the view on a running process: processor time and memory, as Linux tells them (proc(5)).

use std::fs;
use std::io;
use std::time::Duration;

/// Ticks per second in /proc: USER_HZ, which is 100 on every architecture that this is built for.
const TICKS_PER_SEC: u64 = 100;

/// What a process has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// User and system time of all its threads.
    pub cpu: Duration,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
}

/// The usage of a process until now.
///
/// # Errors
/// There is no such process.
pub fn usage(pid: u32) -> io::Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let cpu = cpu_of(&stat).ok_or_else(|| io::Error::other("unexpected form of /proc/<pid>/stat"))?;
    let resident_bytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        * 1024;
    Ok(Usage { cpu, resident_bytes })
}

fn cpu_of(stat: &str) -> Option<Duration> {
    // The name in parentheses may hold anything, also blanks and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11);
    let ticks = times.next()?.parse::<u64>().ok()? + times.next()?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / TICKS_PER_SEC))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stand_behind_the_last_parenthesis() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 4 0 1 2 3";
        assert_eq!(cpu_of(stat), Some(Duration::from_secs(3)));
        assert!(usage(std::process::id()).expect("we run").resident_bytes > 0);
    }
}
