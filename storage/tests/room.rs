//! How the store keeps its bounds: the limit, what happens at it, and that room which is free again is used again.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_storage::{
    AppendRequest, Backend, DropReason, Durability, Line, Offset, Outcome, Overflow, Queue, ReadLimit,
    Record, Settlement, SpaceReason, Store, StoreError, StoreLimits, StoreOptions, Table, Target, Ttl,
};

const ALL: ReadLimit = ReadLimit { count: usize::MAX, bytes: usize::MAX };
const MAX_BYTES: u64 = 24 << 20;
/// A compaction keeps its input until its output is there.
const SLACK_BYTES: u64 = MAX_BYTES / 16;
const RECORD_BYTES: usize = 4_000;
const FULL: StoreError = StoreError::Full { reason: SpaceReason::Limit };

fn limits() -> StoreLimits {
    StoreLimits { max_bytes: Some(MAX_BYTES), free_floor_bytes: 0, dead_letters_max_bytes: 2 << 20 }
}

/// One store on disk, one in memory.
fn stores(folder: &tempfile::TempDir) -> [StoreOptions; 2] {
    [StoreOptions::disk(folder.path()), StoreOptions::memory()].map(|options| StoreOptions {
        durability: Durability::Os,
        limits: limits(),
        ring_bytes_max: 1 << 20,
        ..options
    })
}

fn target(queue: &Queue, overflow: Overflow) -> Target {
    Target { queue: queue.id(), ttl: Ttl::Infinite, overflow }
}

/// Does not compress.
fn noise(rng: &mut fastrand::Rng, bytes: usize) -> Bytes {
    let mut noise = vec![0; bytes];
    rng.fill(&mut noise);
    noise.into()
}

fn request(rng: &mut fastrand::Rng, records: usize, targets: &[Target]) -> AppendRequest {
    let record = || Record { bytes: noise(rng, RECORD_BYTES), targets: targets.iter().copied().collect() };
    AppendRequest { records: std::iter::repeat_with(record).take(records).collect(), unrouted: 0 }
}

async fn append(store: &Store, request: AppendRequest) -> Result<(), StoreError> {
    store.submit(request).await.unwrap().await
}

/// What the operating system says that a directory takes up.
fn disk_usage(path: &Path) -> u64 {
    let own = path.symlink_metadata().map_or(0, |data| data.blocks() * 512);
    let Ok(entries) = path.read_dir() else { return own };
    own + entries.flatten().map(|entry| disk_usage(&entry.path())).sum::<u64>()
}

fn most(options: &StoreOptions) -> u64 {
    match options.backend {
        Backend::Disk { .. } => MAX_BYTES + SLACK_BYTES,
        Backend::Memory => MAX_BYTES,
    }
}

fn used(store: &Store, options: &StoreOptions) -> u64 {
    match &options.backend {
        Backend::Disk { path } => disk_usage(&path.join("store")),
        Backend::Memory => store.space().used_bytes,
    }
}

async fn settle_all(queue: &Queue) {
    let mut next = queue.checkpoint();
    while next < queue.tail() {
        let batch = queue.read(next, ALL).await.unwrap();
        let delivered =
            |entry: &edgehub_storage::Entry| Settlement { offset: entry.offset, outcome: Outcome::Delivered };
        queue.settle(&batch.entries.iter().map(delivered).collect::<Vec<_>>());
        next = batch.next;
    }
}

async fn fill(store: &Store, options: &StoreOptions, rng: &mut fastrand::Rng, targets: &[Target]) -> u64 {
    let mut accepted = 0;
    loop {
        let count = rng.usize(1..40);
        let answer = append(store, request(rng, count, targets)).await;
        assert!(used(store, options) <= most(options), "{} {:?}", used(store, options), store.space());
        match answer {
            Ok(()) => accepted += count as u64,
            Err(error) => {
                assert_eq!(error, FULL);
                return accepted;
            }
        }
        assert!(accepted < 1_000_000, "never full");
    }
}

#[tokio::test]
async fn the_limit_holds_and_room_that_is_settled_is_used_again() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let folder = tempfile::tempdir().unwrap();
    for options in stores(&folder) {
        let store = Store::open(options.clone()).unwrap();
        let mut watch = store.watch_space();
        let (one, two) = (store.queue("one").unwrap(), store.queue("two").unwrap());
        let targets = [target(&one, Overflow::RejectNew), target(&two, Overflow::RejectNew)];
        for cycle in 0..4 {
            let targets = if cycle % 2 == 0 { &targets[..1] } else { &targets };
            let least = MAX_BYTES / 2 / RECORD_BYTES as u64;
            let (start, mut accepted) = (Instant::now(), 0);
            // On a slow machine what was settled before is still being given back when the store is full again.
            while accepted <= least {
                let full = || format!("full after {accepted} records in cycle {cycle}: {:?}", store.space());
                assert!(start.elapsed() < Duration::from_secs(60), "{}", full());
                accepted += fill(&store, &options, &mut rng, targets).await;
            }
            assert!(watch.has_changed().unwrap(), "nobody was told");
            watch.mark_unchanged();

            // Nothing of a refused request is in any queue, or counted.
            let before = (one.tail(), two.tail(), store.hub_ledger());
            assert_eq!(append(&store, request(&mut rng, 10_000, targets)).await, Err(FULL));
            assert_eq!((one.tail(), two.tail(), store.hub_ledger()), before);
            // What is not an append goes on.
            store.keyed(Table::Twins).put(b"device", noise(&mut rng, 30_000)).await.unwrap();
            assert_eq!(store.hub_ledger().gap(), 0);

            settle_all(&one).await;
            settle_all(&two).await;
            let start = Instant::now();
            while append(&store, request(&mut rng, 40, targets)).await.is_err() {
                assert!(start.elapsed() < Duration::from_secs(60), "still full: {:?}", store.space());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            println!("open again after {:?} {:?}", start.elapsed(), store.space());
            assert!(used(&store, &options) <= most(&options));
        }
        assert_eq!((one.ledger().gap(), two.ledger().gap(), store.hub_ledger().gap()), (0, 0, 0));
    }
}

#[tokio::test]
async fn the_oldest_make_room_where_the_policy_says_so() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for overflow in [Overflow::DeadLetter, Overflow::DropOldest] {
        let folder = tempfile::tempdir().unwrap();
        for options in stores(&folder) {
            let store = Store::open(options.clone()).unwrap();
            let (kept, flowing) = (store.queue("kept").unwrap(), store.queue("flowing").unwrap());
            append(&store, request(&mut rng, 500, &[target(&kept, Overflow::RejectNew)])).await.unwrap();
            let targets = [target(&flowing, overflow)];
            let (start, mut peak) = (Instant::now(), 0);
            for _ in 0..300 {
                append(&store, request(&mut rng, 40, &targets)).await.unwrap();
                let used_bytes = used(&store, &options);
                peak = peak.max(used_bytes);
                assert!(used_bytes <= most(&options), "{used_bytes} {:?}", store.space());
                assert_eq!(store.hub_ledger().gap(), 0);
            }
            println!("{overflow:?} {:?}: 48 MB in {:?}, peak {peak}", options.backend, start.elapsed());
            store.flush().await.unwrap();
            let (ledger, letters) = (flowing.ledger(), store.dead_letters().ledger());
            assert_eq!((ledger.accepted(), ledger.gap(), kept.ledger().queued()), (12_000, 0, 500));
            let gone = match overflow {
                Overflow::DropOldest => ledger.dropped(DropReason::Overflow),
                _ => ledger.dead_lettered(),
            };
            assert_eq!(gone, flowing.checkpoint().get(), "the oldest go first: {ledger:?}");
            assert_eq!(gone + ledger.queued(), 12_000);
            assert!(ledger.queued() * RECORD_BYTES as u64 > MAX_BYTES / 3, "{ledger:?}");
            if overflow == Overflow::DeadLetter {
                assert_eq!(letters.accepted(), gone);
                assert_eq!(letters.dropped(DropReason::Overflow) + letters.queued(), gone);
                let bytes = letters.queued() * RECORD_BYTES as u64;
                assert!(bytes > 1 << 20 && bytes <= 2 << 20, "{bytes}");
            }

            // A queue that may not make room refuses for all.
            let mixed = [target(&flowing, overflow), target(&kept, Overflow::RejectNew)];
            let before = (flowing.ledger(), kept.ledger());
            assert_eq!(append(&store, request(&mut rng, 10_000, &mixed)).await, Err(FULL));
            assert_eq!((flowing.ledger(), kept.ledger()), before);
            // What does not fit at all is refused, and the store goes on.
            let huge = Record { bytes: noise(&mut rng, 40 << 20), targets: targets.into_iter().collect() };
            let huge = AppendRequest { records: vec![huge], unrouted: 0 };
            let before = flowing.ledger();
            assert_eq!(append(&store, huge).await, Err(FULL));
            assert_eq!(flowing.ledger(), before, "something was dropped in vain");
            append(&store, request(&mut rng, 40, &targets)).await.unwrap();
            assert_eq!(store.hub_ledger().gap(), 0);
        }
    }
}

#[tokio::test]
async fn nothing_of_a_line_overtakes_what_was_refused() {
    let mut rng = fastrand::Rng::with_seed(8);
    let folder = tempfile::tempdir().unwrap();
    for options in stores(&folder) {
        let store = Store::open(StoreOptions { limits: limits(), ..options }).unwrap();
        let queue = store.queue("q").unwrap();
        let targets = [target(&queue, Overflow::RejectNew)];
        let (line, other) = (Line::default(), Line::default());
        // Together, so that the writer may find them in one group.
        let huge = AppendRequest {
            records: vec![Record {
                bytes: noise(&mut rng, 40 << 20),
                targets: targets.into_iter().collect(),
            }],
            unrouted: 0,
        };
        let first = store.submit_in(&line, request(&mut rng, 1, &targets)).await.unwrap();
        let refused = store.submit_in(&line, huge).await.unwrap();
        let behind = store.submit_in(&line, request(&mut rng, 1, &targets)).await.unwrap();
        let of_other = store.submit_in(&other, request(&mut rng, 1, &targets)).await.unwrap();
        let alone = store.submit(request(&mut rng, 1, &targets)).await.unwrap();
        assert_eq!(first.await, Ok(()));
        assert_eq!(refused.await, Err(FULL));
        assert_eq!(behind.await, Err(StoreError::Behind));
        assert_eq!((of_other.await, alone.await), (Ok(()), Ok(())));
        // There is room, and still nothing of the line is taken.
        let later = store.submit_in(&line, request(&mut rng, 1, &targets)).await.unwrap();
        assert_eq!(later.await, Err(StoreError::Behind));
        assert_eq!(queue.ledger().accepted(), 3);
    }
}

#[tokio::test]
async fn a_limit_that_changes_holds_from_the_next_request_on() {
    let mut rng = fastrand::Rng::with_seed(7);
    let folder = tempfile::tempdir().unwrap();
    for options in stores(&folder) {
        let unlimited = StoreLimits { max_bytes: None, ..limits() };
        let store = Store::open(StoreOptions { limits: unlimited, ..options.clone() }).unwrap();
        let queue = store.queue("q").unwrap();
        let targets = [target(&queue, Overflow::RejectNew)];
        for _ in 0..300 {
            append(&store, request(&mut rng, 40, &targets)).await.unwrap();
        }
        store.set_limits(limits());
        assert_eq!(append(&store, request(&mut rng, 1, &targets)).await, Err(FULL));
        assert_eq!((queue.ledger().queued(), store.limits()), (12_000, limits()), "nothing is removed");
        store.set_limits(unlimited);
        append(&store, request(&mut rng, 1, &targets)).await.unwrap();
        store.set_limits(limits());
        settle_all(&queue).await;
        let start = Instant::now();
        while append(&store, request(&mut rng, 1, &targets)).await.is_err() {
            assert!(start.elapsed() < Duration::from_secs(60), "still full: {:?}", store.space());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(queue.purge(Offset::new(u64::MAX)), 1);
        // A floor that the file system is below.
        if let Backend::Disk { .. } = options.backend {
            let free_bytes = store.space().free_bytes.unwrap();
            let floor = StoreLimits { free_floor_bytes: free_bytes * 2, ..unlimited };
            store.set_limits(floor);
            // At most a 16th of the file system is kept free, so this one is full only by chance.
            let full = StoreError::Full { reason: SpaceReason::FreeFloor };
            if let Err(error) = append(&store, request(&mut rng, 1, &targets)).await {
                assert_eq!(error, full);
            }
        }
    }
}
