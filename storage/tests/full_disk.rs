//! A small file system that another program fills: what is accepted stays, and the store goes on when there is room.
//!
//! The test starts its own binary again in a mount namespace of its own, where it may mount a small file system in
//! memory. Where the kernel does not allow that, the test fails and says so.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_storage::{
    AppendRequest, Durability, Entry, Offset, Outcome, Overflow, Queue, ReadLimit, Record, Settlement,
    SpaceReason, SpaceState, Store, StoreError, StoreOptions, Table, Target, Ttl,
};

const FOLDER: &str = "EDGEHUB_STORAGE_SMALL_DISK";
const READY: &str = "the small file system is there";
const PROMPT: Duration = Duration::from_secs(60);

fn main_options(folder: &Path) -> StoreOptions {
    StoreOptions { durability: Durability::Sync, ring_bytes_max: 1 << 20, ..StoreOptions::disk(folder) }
}

#[test]
fn a_full_disk_is_survived() {
    let folder = tempfile::tempdir().unwrap();
    for size in ["64m", "24m"] {
        let script = format!(
            "mount -t tmpfs -o size={size} none {} && exec \"$0\" --exact on_a_small_disk --nocapture",
            folder.path().display()
        );
        let child = Command::new("unshare")
            .args(["-Urm", "sh", "-c", &script])
            .arg(std::env::current_exe().unwrap())
            .env(FOLDER, folder.path())
            .output();
        let child = child.expect("a small file system needs the program `unshare` (util-linux)");
        let said = String::from_utf8_lossy(&child.stdout);
        let complaint = String::from_utf8_lossy(&child.stderr);
        assert!(said.contains(READY), "a small file system needs a namespace of its own: {complaint}");
        println!("{size}: {said}");
        assert!(child.status.success(), "{said}{complaint}");
    }
}

/// Does nothing in a normal run; in the namespace, works on the small file system.
#[test]
fn on_a_small_disk() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    println!("\n{READY}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(Path::new(&folder)));
}

async fn run(folder: &Path) {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut store = Store::open(main_options(folder)).unwrap();
    let mut accepted = 0;
    for cycle in 0..3 {
        let queue = store.queue("q").unwrap();
        let before = accepted;
        let reason = fill(&store, &queue, &mut rng, &mut accepted).await;
        println!("{} records, {reason:?}, {:?}", accepted - before, store.space());
        assert_eq!(reason, SpaceReason::FreeFloor);

        // Another program takes all that is left.
        let hog = folder.join("hog");
        take_all_that_is_left(&hog, &folder.join("store/RESERVE"));
        settle(&queue, accepted - 100).await;
        println!("filled by another program: {:?}", store.space());
        wait("settlements", || store.flush()).await;
        let twins = store.keyed(Table::Twins);
        wait("keyed state", || twins.put(b"device", Bytes::from_static(b"twin"))).await;
        let refused = append(&store, &queue, &mut rng, 20_000).await;
        println!("with no room: {refused:?} {:?}", store.space());
        assert_eq!(queue.ledger().gap(), 0);

        // It gives the room back.
        fs::remove_file(&hog).unwrap();
        accepted = queue.tail().get();
        let start = Instant::now();
        while append(&store, &queue, &mut rng, 2_000).await.is_err() {
            assert!(start.elapsed() < PROMPT, "still refused: {:?}", store.space());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        accepted += 1;
        println!("accepted again after {:?}", start.elapsed());
        assert_eq!(queue.tail().get(), accepted);
        let waiting = queue.ledger().queued();
        if cycle == 1 {
            store.close();
            store = Store::open(main_options(folder)).unwrap();
        }
        let queue = store.queue("q").unwrap();
        assert_eq!(
            (queue.ledger().queued(), queue.ledger().gap(), store.hub_ledger().gap()),
            (waiting, 0, 0)
        );
        settle(&queue, accepted).await;
        let start = Instant::now();
        while !folder.join("store/RESERVE").exists() || store.space().state != SpaceState::Open {
            assert!(start.elapsed() < PROMPT, "the reserve is gone: {:?}", store.space());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    store.close();
}

/// What is left without the store's reserve: on a slow machine the store gives that up while the hog still takes, and
/// would then have no room at all, as nobody promises that it goes on without.
fn take_all_that_is_left(hog: &Path, reserve: &Path) {
    let reserve_bytes = fs::metadata(reserve).map_or(0, |data| data.len());
    let mut file = fs::File::create(hog).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    if !reserve.exists() {
        let length_bytes = file.metadata().unwrap().len();
        file.set_len(length_bytes.saturating_sub(reserve_bytes)).unwrap();
    }
}

async fn append(
    store: &Store,
    queue: &Queue,
    rng: &mut fastrand::Rng,
    length_bytes: usize,
) -> Result<(), StoreError> {
    let mut bytes = vec![0; length_bytes];
    rng.fill(&mut bytes);
    let target = Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew };
    let record = Record { bytes: bytes.into(), targets: [target].into_iter().collect() };
    store.submit(AppendRequest { records: vec![record], unrouted: 0 }).await.unwrap().await
}

async fn fill(store: &Store, queue: &Queue, rng: &mut fastrand::Rng, accepted: &mut u64) -> SpaceReason {
    loop {
        match append(store, queue, rng, 20_000).await {
            Ok(()) => *accepted += 1,
            Err(StoreError::Full { reason }) => return reason,
            Err(error) => panic!("{error}"),
        }
    }
}

async fn settle(queue: &Queue, upto: u64) {
    let mut next = queue.checkpoint();
    while next.get() < upto {
        let batch = queue.read(next, ReadLimit { count: 100, bytes: 1 << 20 }).await.unwrap();
        let delivered = |entry: &Entry| Settlement { offset: entry.offset, outcome: Outcome::Delivered };
        let below = batch.entries.iter().filter(|entry| entry.offset < Offset::new(upto));
        queue.settle(&below.map(delivered).collect::<Vec<_>>());
        next = batch.next;
    }
}

/// Tries until it succeeds; refusals are for want of room.
async fn wait<F: Future<Output = Result<(), StoreError>>>(what: &str, attempt: impl Fn() -> F) {
    let start = Instant::now();
    while let Err(error) = attempt().await {
        assert!(matches!(error, StoreError::Full { .. } | StoreError::Io { .. }), "{what}: {error}");
        assert!(start.elapsed() < PROMPT, "{what} found no room: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    if start.elapsed() > Duration::from_millis(200) {
        println!("{what} went on after {:?}", start.elapsed());
    }
}
