//! Measures appends with group commit: `append_rate [folder [submitters [records [bytes [seconds]]]]]`.
//!
//! Prints one line per durability level: records per second, and how long a submitter waits for its commit.

use std::time::{Duration, Instant};

use edgehub_storage::{
    AppendRequest, Durability, Offset, Outcome, Overflow, ReadLimit, Record, Settlement, Store, StoreError,
    StoreOptions, Target, Ttl,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map_or_else(std::env::temp_dir, Into::into);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (submitters, records, bytes, seconds) = (number(64)?, number(32)?, number(256)?, number(3)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for durability in [Durability::Sync, Durability::Interval { millis: 10 }, Durability::Os] {
        let path = folder.join(format!("append-rate-{}", std::process::id()));
        let store = Store::open(StoreOptions { durability, ..StoreOptions::disk(&path) })?;
        let level = store.durability_level();
        let span = Duration::from_secs(seconds as u64);
        let mut waits = runtime.block_on(run(&store, submitters, records, bytes, span))?;
        let drained = runtime.block_on(drain(&store))?;
        waits.sort_unstable();
        let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize];
        let rate = (waits.len() * records) as f64 / seconds as f64;
        println!(
            "{level:>8}: {rate:>9.0} records/s, commit p50 {:?} p99 {:?}; drained at {drained:.0}/s",
            at(0.5),
            at(0.99)
        );
        store.close();
        std::fs::remove_dir_all(&path)?;
    }
    Ok(())
}

async fn run(
    store: &Store,
    submitters: usize,
    records: usize,
    bytes: usize,
    span: Duration,
) -> Result<Vec<Duration>, StoreError> {
    let queue = store.queue("q")?;
    let start = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..submitters {
        let (store, target) =
            (store.clone(), Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew });
        tasks.push(tokio::spawn(async move {
            let mut waits = Vec::new();
            while start.elapsed() < span {
                let record = || {
                    // Text of telemetry compresses to about a third; so do these bytes.
                    let body = (0..bytes).map(|at| if at % 3 == 0 { fastrand::u8(..) } else { b' ' });
                    Record {
                        bytes: body.collect::<Vec<u8>>().into(),
                        targets: [target].into_iter().collect(),
                    }
                };
                let request = AppendRequest {
                    records: std::iter::repeat_with(record).take(records).collect(),
                    unrouted: 0,
                };
                let submitted = Instant::now();
                store.submit(request).await?.await?;
                waits.push(submitted.elapsed());
            }
            Ok::<_, StoreError>(waits)
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.map_err(|_| StoreError::Closed)??);
    }
    Ok(all)
}

/// Reads and settles everything; returns entries per second.
async fn drain(store: &Store) -> Result<f64, StoreError> {
    let queue = store.queue("q")?;
    let (start, mut next) = (Instant::now(), Offset::ZERO);
    while next < queue.tail() {
        let batch = queue.read(next, ReadLimit { count: 256, bytes: 1 << 20 }).await?;
        let delivered = batch
            .entries
            .iter()
            .map(|entry| Settlement { offset: entry.offset, outcome: Outcome::Delivered });
        queue.settle(&delivered.collect::<Vec<_>>());
        next = batch.next;
    }
    store.flush().await?;
    Ok(queue.ledger().delivered() as f64 / start.elapsed().as_secs_f64())
}
