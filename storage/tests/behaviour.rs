//! What callers may rely on, one promise per test.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use bytes::Bytes;
use edgehub_storage::clock::{ManualTimeSource, WALL_PLAUSIBLE_MIN_MS};
use edgehub_storage::{
    AppendRequest, Backend, BatchEnd, DropReason, Durability, Entry, Offset, OpenError, Outcome, Overflow,
    Queue, ReadLimit, Record, SETTLE_WINDOW_MAX, Settlement, Store, StoreError, StoreOptions, Table, Target,
    Ttl,
};

const ALL: ReadLimit = ReadLimit { count: usize::MAX, bytes: usize::MAX };
const WALL_MS: i64 = WALL_PLAUSIBLE_MIN_MS + 86_400_000;
const YEAR_MS: i64 = 365 * 86_400_000;

fn record(bytes: impl Into<Bytes>, queue: &Queue, ttl: Ttl) -> Record {
    Record {
        bytes: bytes.into(),
        targets: [Target { queue: queue.id(), ttl, overflow: Overflow::RejectNew }].into_iter().collect(),
    }
}

async fn append(store: &Store, records: Vec<Record>) {
    store.submit(AppendRequest { records, unrouted: 0 }).await.unwrap().await.unwrap();
}

fn settlement(offset: u64, outcome: Outcome) -> Settlement {
    Settlement { offset: Offset::new(offset), outcome }
}

fn offsets(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.offset.get()).collect()
}

async fn read_all(queue: &Queue, limit: ReadLimit) -> Vec<Entry> {
    let (mut entries, mut next) = (Vec::new(), Offset::ZERO);
    loop {
        let batch = queue.read(next, limit).await.unwrap();
        assert!(batch.entries.len() <= limit.count);
        entries.extend(batch.entries);
        next = batch.next;
        if batch.end == BatchEnd::Tail {
            return entries;
        }
    }
}

fn options(folder: &tempfile::TempDir, time: &Arc<ManualTimeSource>) -> StoreOptions {
    StoreOptions { time: time.clone(), durability: Durability::Os, ..StoreOptions::disk(folder.path()) }
}

#[tokio::test]
async fn a_long_expired_prefix_is_passed_in_one_read() {
    const EXPIRED: u64 = 40_000;
    for ring_bytes_max in [0, 64 << 20] {
        // Whole stretches expire together, or one live entry in each stands in the way.
        for live_every in [u64::MAX, 7_000] {
            let time = Arc::new(ManualTimeSource::new(WALL_MS));
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open(StoreOptions { ring_bytes_max, ..options(&folder, &time) }).unwrap();
            let queue = store.queue("q").unwrap();
            let mut live = Vec::new();
            for chunk in 0..EXPIRED / 2_000 {
                let records = (chunk * 2_000..(chunk + 1) * 2_000)
                    .map(|offset| {
                        let stays = offset % live_every == live_every - 1;
                        let ttl = if stays { Ttl::Infinite } else { Ttl::Millis(1_000) };
                        live.extend(stays.then_some(offset));
                        record(Bytes::from_static(b"old"), &queue, ttl)
                    })
                    .collect();
                append(&store, records).await;
            }
            append(&store, vec![record(Bytes::from_static(b"new"), &queue, Ttl::Millis(2_000))]).await;
            live.push(EXPIRED);
            time.advance(1_000);

            let mut found = Vec::new();
            let (mut next, mut expired, mut reads) = (Offset::ZERO, 0, 0);
            while found.len() < live.len() {
                let batch = queue.read(next, ReadLimit { count: 10, bytes: 1 << 20 }).await.unwrap();
                assert!(!batch.entries.is_empty());
                found.extend(offsets(&batch.entries));
                (next, expired, reads) = (batch.next, expired + batch.expired, reads + 1);
            }
            assert_eq!(found, live);
            assert!(reads <= live.len());
            assert_eq!(expired, EXPIRED + 1 - live.len() as u64);
            assert_eq!((queue.ledger().expired(), queue.ledger().gap()), (expired, 0));
            store.close();

            let store = Store::open(options(&folder, &time)).unwrap();
            let queue = store.queue("q").unwrap();
            assert_eq!(queue.ledger().expired(), expired);
            assert_eq!(offsets(&read_all(&queue, ALL).await), live);
        }
    }
}

#[tokio::test]
async fn a_wall_clock_that_jumps_while_the_store_is_closed_changes_no_age_unless_the_machine_starts_anew() {
    for (jump_ms, anew, age_ms) in
        [(YEAR_MS, false, 9_000), (-YEAR_MS, false, 9_000), (3_600_000, true, 3_609_000)]
    {
        let time = Arc::new(ManualTimeSource::new(WALL_MS));
        time.boot();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(options(&folder, &time)).unwrap();
        let queue = store.queue("q").unwrap();
        append(&store, vec![record(Bytes::from_static(b"x"), &queue, Ttl::Millis(7_200_000))]).await;
        store.close();
        time.advance(9_000);
        time.jump_wall(jump_ms);
        if anew {
            time.boot();
        }
        let store = Store::open(options(&folder, &time)).unwrap();
        let queue = store.queue("q").unwrap();
        let entry = queue.read(Offset::ZERO, ALL).await.unwrap().entries.remove(0);
        assert_eq!(store.now().millis_since(entry.accepted_at), age_ms, "{jump_ms} {anew}");
        store.close();
    }
}

#[tokio::test]
async fn a_wall_clock_that_jumps_neither_expires_nor_immortalises() {
    for jump_ms in [10 * YEAR_MS, -10 * YEAR_MS, 90_000_000] {
        let time = Arc::new(ManualTimeSource::new(WALL_MS));
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(options(&folder, &time)).unwrap();
        let queue = store.queue("q").unwrap();
        append(&store, vec![record(Bytes::from_static(b"x"), &queue, Ttl::Millis(60_000))]).await;
        time.advance(1_000);
        time.jump_wall(jump_ms);
        assert_eq!(queue.read(Offset::ZERO, ALL).await.unwrap().entries.len(), 1, "{jump_ms}");
        assert_eq!(store.wall_skew_ms(), jump_ms);
        store.close();

        // Switched off for 9 s.
        time.advance(9_000);
        let store = Store::open(options(&folder, &time)).unwrap();
        let queue = store.queue("q").unwrap();
        let entry = queue.read(Offset::ZERO, ALL).await.unwrap().entries.remove(0);
        assert!(!entry.is_expired(store.now()));
        let known = jump_ms > 0;
        let age_ms = if known { 10_000 } else { 1_000 };
        assert_eq!(store.now().millis_since(entry.accepted_at), age_ms, "{jump_ms}");
        time.advance(60_000 - age_ms - 1);
        assert!(!entry.is_expired(store.now()));
        time.advance(1);
        assert!(entry.is_expired(store.now()));
        let batch = queue.read(Offset::ZERO, ALL).await.unwrap();
        assert_eq!((batch.entries.len(), batch.expired, batch.end), (0, 1, BatchEnd::Tail));
    }
}

#[tokio::test]
async fn a_ttl_of_0_expires_at_once_and_a_huge_one_never() {
    let store = Store::open(StoreOptions::memory()).unwrap();
    let queue = store.queue("q").unwrap();
    let ttls = [Ttl::Millis(0), Ttl::Millis(u64::MAX), Ttl::Infinite];
    append(&store, ttls.map(|ttl| record(Bytes::new(), &queue, ttl)).to_vec()).await;
    let batch = queue.read(Offset::ZERO, ALL).await.unwrap();
    assert_eq!((offsets(&batch.entries), batch.expired), (vec![1, 2], 1));
}

#[tokio::test]
async fn settling_out_of_order_survives_a_restart() {
    let time = Arc::new(ManualTimeSource::new(WALL_MS));
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(options(&folder, &time)).unwrap();
    let queue = store.queue("q").unwrap();
    let records = (0..10_u8).map(|number| record(vec![number], &queue, Ttl::Infinite)).collect();
    append(&store, records).await;
    let dropped = Outcome::Dropped(DropReason::OutOfScope);
    queue.settle(&[
        settlement(1, Outcome::Delivered),
        settlement(7, dropped),
        settlement(3, Outcome::Dropped(DropReason::NoIdentity)),
        settlement(99, Outcome::Delivered),
        settlement(7, Outcome::Delivered),
    ]);
    for round in 0..2 {
        let store = if round == 0 { store.clone() } else { Store::open(options(&folder, &time)).unwrap() };
        let queue = store.queue("q").unwrap();
        assert_eq!(offsets(&queue.read(Offset::ZERO, ALL).await.unwrap().entries), [0, 2, 4, 5, 6, 8, 9]);
        assert_eq!((queue.checkpoint(), queue.tail()), (Offset::ZERO, Offset::new(10)));
        let ledger = queue.ledger();
        assert_eq!((ledger.accepted(), ledger.delivered()), (10, 1));
        assert_eq!(ledger.dropped(DropReason::NoIdentity), 1);
        assert_eq!((ledger.dropped(DropReason::OutOfScope), ledger.queued(), ledger.gap()), (1, 7, 0));
        if round == 0 {
            store.close();
            continue;
        }
        queue.settle(&[settlement(0, Outcome::Delivered)]);
        assert_eq!(queue.checkpoint(), Offset::new(2));
        queue.settle(&[settlement(2, Outcome::Delivered)]);
        assert_eq!(queue.checkpoint(), Offset::new(4));
    }
}

#[tokio::test]
async fn offsets_and_ids_go_on_after_everything_was_settled() {
    let time = Arc::new(ManualTimeSource::new(WALL_MS));
    let folder = tempfile::tempdir().unwrap();
    for round in 0..3_u64 {
        let store = Store::open(options(&folder, &time)).unwrap();
        let names: Vec<String> = store.queues().iter().map(|queue| queue.name().to_owned()).collect();
        assert_eq!(names, ["a", "A", "b"][..if round == 0 { 0 } else { 3 }]);
        let queues = ["a", "A", "b"].map(|name| store.queue(name).unwrap());
        assert_eq!(queues.each_ref().map(|queue| queue.id().get()), [0, 1, 2]);
        let queue = &queues[1];
        assert_eq!(queue.tail().get(), round * 2);
        append(&store, vec![record("x", queue, Ttl::Infinite), record("y", queue, Ttl::Infinite)]).await;
        assert_eq!(
            offsets(&queue.read(Offset::ZERO, ALL).await.unwrap().entries),
            [round * 2, round * 2 + 1]
        );
        queue.settle(&[
            settlement(round * 2, Outcome::Delivered),
            settlement(round * 2 + 1, Outcome::Delivered),
        ]);
        assert_eq!(queue.oldest_accepted_at().await.unwrap(), None);
        drop((queues, store));
    }
}

#[tokio::test]
async fn what_memory_lets_go_of_is_read_from_disk_in_the_same_order() {
    let time = Arc::new(ManualTimeSource::new(WALL_MS));
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(StoreOptions { ring_bytes_max: 4096, ..options(&folder, &time) }).unwrap();
    let queues = [store.queue("one").unwrap(), store.queue("two").unwrap()];
    let both = || {
        queues
            .iter()
            .map(|queue| Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew })
            .collect()
    };
    for number in 0..200_u8 {
        let shared = Record { bytes: Bytes::from(vec![number; 40]), targets: both() };
        append(&store, vec![shared, record(vec![number; 41], &queues[0], Ttl::Infinite)]).await;
        time.advance(1);
    }
    assert!(store.sizes().ring_bytes <= 4096, "{:?}", store.sizes());
    assert!(store.sizes().ring_bytes > 1024, "{:?}", store.sizes());
    for (queue, count) in queues.iter().zip([400, 200]) {
        let entries = read_all(queue, ReadLimit { count: 7, bytes: 1000 }).await;
        assert_eq!(offsets(&entries), (0..count).collect::<Vec<u64>>());
        let first: Vec<u8> = entries.iter().map(|entry| entry.bytes[0]).collect();
        assert!(first.is_sorted());
        assert_eq!(queue.oldest_accepted_at().await.unwrap(), Some(entries[0].accepted_at));
    }
}

#[tokio::test]
async fn a_read_returns_at_least_one_entry_and_at_most_its_limit() {
    for ring_bytes_max in [0, 1 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let store =
            Store::open(StoreOptions { ring_bytes_max, ..StoreOptions::disk(folder.path()) }).unwrap();
        let queue = store.queue("q").unwrap();
        append(&store, (0..4).map(|_| record(vec![0; 100], &queue, Ttl::Infinite)).collect()).await;
        for (count, bytes, expected) in [(0, 0, 1), (1, 1000, 1), (9, 50, 1), (9, 250, 2), (3, 1000, 3)] {
            let batch = queue.read(Offset::ZERO, ReadLimit { count, bytes }).await.unwrap();
            assert_eq!(batch.entries.len(), expected, "{count} {bytes} {ring_bytes_max}");
            assert_eq!((batch.next.get(), batch.end), (expected as u64, BatchEnd::More));
        }
    }
}

#[tokio::test]
async fn an_append_wakes_who_waits_for_it() {
    let store = Store::open(StoreOptions::memory()).unwrap();
    let queue = store.queue("q").unwrap();
    let waiter = {
        let queue = queue.clone();
        tokio::spawn(async move {
            let (mut next, mut seen) = (Offset::ZERO, 0);
            while seen < 2_000 {
                queue.appended(next).await;
                let batch = queue.read(next, ALL).await.unwrap();
                assert!(!batch.entries.is_empty());
                seen += batch.entries.len();
                next = batch.next;
            }
        })
    };
    for _ in 0..2_000 {
        append(&store, vec![record("x", &queue, Ttl::Infinite)]).await;
    }
    waiter.await.unwrap();

    let queue_of_closed = queue.clone();
    let waiter = tokio::spawn(async move { queue_of_closed.appended(Offset::new(5_000)).await });
    tokio::task::yield_now().await;
    store.close();
    waiter.await.unwrap();
    assert_eq!(queue.read(Offset::ZERO, ALL).await, Err(StoreError::Closed));
}

#[tokio::test]
async fn reading_stops_at_the_settle_window() {
    let store = Store::open(StoreOptions { ring_bytes_max: 0, ..StoreOptions::memory() }).unwrap();
    let queue = store.queue("q").unwrap();
    let total = SETTLE_WINDOW_MAX + 10;
    let bytes = Bytes::from_static(b"x");
    let mut left = total as usize;
    while left > 0 {
        let count = left.min(20_000);
        append(&store, vec![record(bytes.clone(), &queue, Ttl::Infinite); count]).await;
        left -= count;
    }
    let limit = ReadLimit { count: 100, bytes: 1 << 20 };
    let batch = queue.read(Offset::new(SETTLE_WINDOW_MAX - 3), limit).await.unwrap();
    assert_eq!(
        offsets(&batch.entries),
        [SETTLE_WINDOW_MAX - 3, SETTLE_WINDOW_MAX - 2, SETTLE_WINDOW_MAX - 1]
    );
    let batch = queue.read(batch.next, limit).await.unwrap();
    assert_eq!((batch.entries.len(), batch.end), (0, BatchEnd::Window));
    let (checkpointed, ()) = tokio::join!(queue.checkpointed(Offset::ZERO), async {
        queue.settle(&[settlement(0, Outcome::Delivered)]);
    });
    let () = checkpointed;
    assert_eq!(offsets(&queue.read(batch.next, limit).await.unwrap().entries), [SETTLE_WINDOW_MAX]);
}

#[tokio::test]
async fn requests_are_refused_whole() {
    let store = Store::open(StoreOptions::memory()).unwrap();
    let other = Store::open(StoreOptions::memory()).unwrap();
    let queue = store.queue("q").unwrap();
    other.queue("a").unwrap();
    let strange = other.queue("b").unwrap();
    let records = vec![record("x", &queue, Ttl::Infinite), record("x", &strange, Ttl::Infinite)];
    let refused = store.submit(AppendRequest { records, unrouted: 1 }).await;
    assert_eq!(refused.unwrap_err(), StoreError::UnknownQueue { id: strange.id() });
    assert!(matches!(store.queue(""), Err(StoreError::QueueName { .. })));
    assert!(matches!(store.queue(&"x".repeat(1025)), Err(StoreError::QueueName { .. })));
    store.flush().await.unwrap();
    assert_eq!((queue.tail(), store.hub_ledger().unrouted()), (Offset::ZERO, 0));
}

#[tokio::test]
async fn keyed_state_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let value = |text: &'static str| Bytes::from_static(text.as_bytes());
    {
        let store = Store::open(StoreOptions::disk(folder.path())).unwrap();
        let twins = store.keyed(Table::Twins);
        for key in ["d1", "d2", "d2/m1", "d3"] {
            twins.put(key.as_bytes(), Bytes::copy_from_slice(key.as_bytes())).await.unwrap();
        }
        store.keyed(Table::Sessions).put(b"d1", value("session")).await.unwrap();
        twins.delete(b"d3").await.unwrap();
        twins.put(b"d1", value("")).await.unwrap();
    }
    let store = Store::open(StoreOptions::disk(folder.path())).unwrap();
    let twins = store.keyed(Table::Twins);
    assert_eq!(twins.get(b"d1").await.unwrap(), Some(Bytes::new()));
    assert_eq!(twins.get(b"d3").await.unwrap(), None);
    assert_eq!(store.keyed(Table::Sessions).get(b"d1").await.unwrap(), Some(value("session")));
    let expected = [(value("d1"), value("")), (value("d2"), value("d2")), (value("d2/m1"), value("d2/m1"))];
    assert_eq!(twins.all().await.unwrap(), expected);
    assert_eq!(twins.scan(b"d2", None, 1).await.unwrap(), expected[1..2]);
    assert_eq!(twins.scan(b"d2", Some(b"d2"), 9).await.unwrap(), expected[2..]);
    assert_eq!(twins.scan(b"x", None, 9).await.unwrap(), []);
}

#[test]
fn a_store_that_cannot_be_opened_says_why_and_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let open = |path: &std::path::Path| {
        Store::open(StoreOptions::new(Backend::Disk { path: path.to_owned() })).map(drop)
    };

    // Held by another store.
    let held = Store::open(StoreOptions::disk(path)).unwrap();
    assert!(matches!(open(path), Err(OpenError::Locked { .. })));
    drop(held);
    open(path).unwrap();

    // Not a directory, not creatable.
    let file = path.join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(matches!(open(&file), Err(OpenError::NotADirectory { .. })));
    let text = open(&file.join("below")).unwrap_err().to_string();
    assert!(text.contains(&file.display().to_string()), "{text}");
    assert!(text.contains("choose another storage folder"), "{text}");

    // Markers.
    let marker = path.join("store/FORMAT");
    let sound = std::fs::read(&marker).unwrap();
    std::fs::write(&marker, "edgehub-store 2 ready\n").unwrap();
    assert!(matches!(open(path), Err(OpenError::NewerFormat { found: 2, supported: 1, .. })));
    std::fs::write(&marker, sound).unwrap();
    open(path).unwrap();

    // A foreign database is not touched; the store goes beside its files, and never takes their place.
    let foreign = path.join("moved");
    std::fs::rename(path.join("store/db"), &foreign).unwrap();
    let files = || std::fs::read_dir(&foreign).unwrap().count();
    let before = files();
    open(&foreign).unwrap();
    assert_eq!(files(), before + 1);
    let folder = tempfile::tempdir().unwrap();
    std::fs::rename(&foreign, folder.path().join("store")).unwrap();
    assert!(matches!(open(folder.path()), Err(OpenError::ForeignDatabase { .. })));
}

#[test]
fn a_new_folder_is_for_its_user_only() {
    use std::os::unix::fs::PermissionsExt as _;

    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("edge");
    Store::open(StoreOptions::disk(&folder)).unwrap().close();
    for path in [folder.clone(), folder.join("store")] {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
