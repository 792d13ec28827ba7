//! How entries expire while nobody reads, and how fast a backlog of expired ones is passed.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_storage::clock::{ManualTimeSource, WALL_PLAUSIBLE_MIN_MS};
use edgehub_storage::{
    AppendRequest, Durability, EXPIRY_LAG_MAX_MS, Offset, Outcome, Overflow, Queue, ReadLimit, Record,
    Settlement, Store, StoreOptions, Target, Ttl,
};

/// What is promised for a machine that has time for it.
const LAG: Duration = Duration::from_millis(10 * EXPIRY_LAG_MAX_MS);

fn records(queue: &Queue, count: u64, ttl: impl Fn(u64) -> Ttl) -> Vec<Record> {
    let bytes = Bytes::from_static(b"a record");
    let target = |number| Target { queue: queue.id(), ttl: ttl(number), overflow: Overflow::RejectNew };
    (0..count)
        .map(|number| Record { bytes: bytes.clone(), targets: [target(number)].into_iter().collect() })
        .collect()
}

async fn append(store: &Store, records: Vec<Record>) {
    store.submit(AppendRequest { records, unrouted: 0 }).await.unwrap().await.unwrap();
}

fn stores(folder: &tempfile::TempDir, time: &Arc<ManualTimeSource>) -> [StoreOptions; 2] {
    [StoreOptions::disk(folder.path()), StoreOptions::memory()].map(|options| StoreOptions {
        time: time.clone(),
        durability: Durability::Os,
        ring_bytes_max: 1 << 20,
        ..options
    })
}

async fn until(what: &str, reached: impl Fn() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < LAG, "{what} took longer than {LAG:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn entries_expire_while_nobody_reads() {
    let folder = tempfile::tempdir().unwrap();
    let time = Arc::new(ManualTimeSource::new(WALL_PLAUSIBLE_MIN_MS));
    for options in stores(&folder, &time) {
        let store = Store::open(options).unwrap();
        let [all, mixed, parked, never] =
            ["all", "mixed", "parked", "never"].map(|name| store.queue(name).unwrap());
        append(&store, records(&all, 25_000, |_| Ttl::Millis(1_000))).await;
        // Three times to live in each stretch; one that never ends.
        let ttls = [Ttl::Millis(1_000), Ttl::Millis(60_000), Ttl::Infinite];
        append(&store, records(&mixed, 30_000, |number| ttls[number as usize % 3])).await;
        // One that never ends before many that do.
        append(&store, records(&parked, 1, |_| Ttl::Infinite)).await;
        append(&store, records(&parked, 40_000, |_| Ttl::Millis(1_000))).await;
        append(&store, records(&never, 10, |_| Ttl::Infinite)).await;
        // A wall clock that jumps expires nothing.
        time.jump_wall(365 * 86_400_000);
        time.advance(999);

        // A sweep that finds one entry finds no others: they are due a moment later.
        append(&store, records(&never, 1, |_| Ttl::Millis(0))).await;
        until("the first sweep", || store.hub_ledger().queues().expired() > 0).await;
        assert_eq!((store.hub_ledger().queues().expired(), never.ledger().expired()), (1, 1));
        time.advance(1);
        until("the first expiry", || {
            let expired = [&all, &mixed, &parked].map(|queue| queue.ledger().expired());
            expired == [25_000, 10_000, 40_000]
        })
        .await;
        assert_eq!(all.checkpoint(), Offset::new(25_000));
        time.advance(59_000);
        until("the second expiry", || mixed.ledger().expired() == 20_000).await;
        assert_eq!((mixed.ledger().queued(), never.ledger().queued()), (10_000, 10));
        let limit = ReadLimit { count: 3, bytes: 1 << 20 };
        let batch = mixed.read(Offset::ZERO, limit).await.unwrap();
        assert_eq!(batch.entries.iter().map(|entry| entry.offset.get()).collect::<Vec<_>>(), [2, 5, 8]);
        // What waits behind the expired ones is found at once.
        append(&store, records(&parked, 1, |_| Ttl::Infinite)).await;
        let first = parked.read(Offset::ZERO, limit).await.unwrap();
        let second = parked.read(first.next, limit).await.unwrap();
        let found = first.entries.iter().chain(&second.entries).map(|entry| entry.offset.get());
        assert_eq!(found.collect::<Vec<_>>(), [0, 40_001]);
        parked.settle(&[Settlement { offset: Offset::ZERO, outcome: Outcome::Delivered }]);
        assert_eq!(parked.checkpoint(), Offset::new(40_001));
        store.flush().await.unwrap();
        assert_eq!(store.hub_ledger().gap(), 0);
    }
}

#[tokio::test]
async fn a_million_entries_of_which_most_have_expired_are_passed_at_once() {
    // In each of the queues.
    const TOTAL: u64 = 250_000;
    const EXPIRED: u64 = 225_000;
    const QUEUES: [&str; 4] = ["a", "b", "c", "d"];
    let folder = tempfile::tempdir().unwrap();
    let time = Arc::new(ManualTimeSource::new(WALL_PLAUSIBLE_MIN_MS));
    for (name, options) in ["disk", "memory"].into_iter().zip(stores(&folder, &time)) {
        let store = Store::open(options.clone()).unwrap();
        for queue in QUEUES {
            let queue = store.queue(queue).unwrap();
            for at in (0..TOTAL).step_by(25_000) {
                let ttl = if at < EXPIRED { Ttl::Millis(60_000) } else { Ttl::Infinite };
                append(&store, records(&queue, 25_000, |_| ttl)).await;
            }
        }
        time.advance(60_000);
        let mut took = Vec::new();
        for queue in QUEUES {
            let queue = store.queue(queue).unwrap();
            let start = Instant::now();
            let batch =
                queue.read(queue.checkpoint(), ReadLimit { count: 100, bytes: 1 << 20 }).await.unwrap();
            took.push(start.elapsed());
            assert_eq!(batch.entries[0].offset, Offset::new(EXPIRED));
            assert_eq!((queue.ledger().expired(), queue.ledger().gap()), (EXPIRED, 0));
            store.flush().await.unwrap();
        }
        println!("{name}: passed in {took:?}");
        // Far more than it takes, far less than reading them. One may wait for the removal of what was swept meanwhile,
        // and for a slow machine; not all do.
        assert!(took.iter().min() < Some(&Duration::from_millis(500)), "{took:?}");
        if name == "disk" {
            drop(store);
            let start = Instant::now();
            let store = Store::open(options).unwrap();
            println!("opened in {:?}", start.elapsed());
            for queue in QUEUES {
                assert_eq!(store.queue(queue).unwrap().ledger().queued(), TOTAL - EXPIRED);
            }
        }
    }
}
