//! Owns what is counted of an engine: how long its writes take, and what fails.
//!
//! All of it once per batch or failure, never per record.

use std::time::Instant;

use metrics::{counter, histogram};

use super::EngineError;

/// What an engine was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// To write a batch; its sync, if it has one, is part of it.
    Write { sync: bool },
    /// To sync what was written before.
    Sync,
    /// To read a value, or many.
    Read,
}

impl Operation {
    /// The name under which its failures are counted.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Write { .. } => "write",
            Self::Sync => "sync",
            Self::Read => "read",
        }
    }

    /// The name under which its time is counted, if it is.
    const fn timed_as(self) -> Option<&'static str> {
        match self {
            Self::Write { sync: false } => Some("batch"),
            Self::Write { sync: true } => Some("batch_fsync"),
            Self::Sync => Some("fsync"),
            Self::Read => None,
        }
    }
}

/// Runs an operation and counts it.
pub(super) fn metered<T>(
    operation: Operation,
    run: impl FnOnce() -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    let timed = operation.timed_as().map(|kind| (kind, Instant::now()));
    let result = run();
    if let Some((kind, start)) = timed {
        histogram!("edgehub_store_write_duration_seconds", "kind" => kind)
            .record(start.elapsed().as_secs_f64());
    }
    if result.is_err() {
        counter!("edgehub_store_errors_total", "operation" => operation.as_str()).increment(1);
    }
    result
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use metrics::{
        Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    };
    use parking_lot::Mutex;

    use super::super::{DiskBudget, DiskEngine, Engine, Family};
    use super::*;
    use crate::damage::DamageLog;

    /// How often each series was counted or recorded.
    #[derive(Default)]
    struct Counts(Mutex<BTreeMap<String, Arc<AtomicU64>>>);

    struct Recorded(Arc<AtomicU64>);

    impl HistogramFn for Recorded {
        fn record(&self, seconds: f64) {
            assert!((0.0..60.0).contains(&seconds), "{seconds}");
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Counts {
        fn of(&self, key: &Key) -> Arc<AtomicU64> {
            let labels = key.labels().map(|label| format!("{}={}", label.key(), label.value()));
            let name: Vec<String> = std::iter::once(key.name().to_owned()).chain(labels).collect();
            self.0.lock().entry(name.join(" ")).or_default().clone()
        }

        fn shown(&self) -> Vec<(String, u64)> {
            self.0.lock().iter().map(|(name, count)| (name.clone(), count.load(Ordering::SeqCst))).collect()
        }
    }

    impl Recorder for Counts {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            Counter::from_arc(self.of(key))
        }
        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::noop()
        }
        fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::from_arc(Arc::new(Recorded(self.of(key))))
        }
    }

    #[test]
    fn writes_are_timed_by_kind_and_failures_counted_by_operation() {
        let folder = tempfile::tempdir().unwrap();
        let budget =
            DiskBudget { cache_bytes: 1 << 20, write_buffer_bytes: 1 << 20, capacity_bytes: 1 << 30 };
        let disk = DiskEngine::open(&folder.path().join("db"), budget, DamageLog::default(), None).unwrap();
        let counts = Counts::default();
        metrics::with_local_recorder(&counts, || {
            let engine = Engine::disk(disk);
            for sync in [false, true, true] {
                let mut batch = engine.batch(64);
                engine.put(&mut batch, Family::State, b"key", b"", &"value".into());
                engine.write(batch, sync).unwrap();
            }
            engine.sync().unwrap();
            engine.fail_writes(2);
            for _ in 0..2 {
                engine.write(engine.batch(0), true).unwrap_err();
            }
            engine.get(Family::State, b"key").unwrap().unwrap();
            metered(Operation::Read, || Err::<(), _>(EngineError::Corrupt("made up".into()))).unwrap_err();
        });
        let duration = |kind: &str| format!("edgehub_store_write_duration_seconds kind={kind}");
        let errors = |operation: &str| format!("edgehub_store_errors_total operation={operation}");
        let expected = [
            (errors("read"), 1),
            (errors("write"), 2),
            (duration("batch"), 1),
            (duration("batch_fsync"), 4),
            (duration("fsync"), 1),
        ];
        assert_eq!(counts.shown(), expected);
    }
}
