//! Owns the tests that look below the public interface: failing writes, and what is left in the engine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use smallvec::SmallVec;

use crate::engine::{DiskBudget, DiskEngine, Engine, Family, Range, Visit};
use crate::*;

const ALL: ReadLimit = ReadLimit { count: usize::MAX, bytes: usize::MAX };

fn store_on(engine: &Arc<Engine>, durability: Durability) -> Store {
    Store::start(PathBuf::new(), Some(durability), Arc::clone(engine), &StoreOptions::memory()).unwrap()
}

fn request(queues: &[&Queue], records: usize, text: &str) -> AppendRequest {
    let targets: SmallVec<[Target; 2]> = queues
        .iter()
        .map(|queue| Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew })
        .collect();
    let record = Record { bytes: Bytes::copy_from_slice(text.as_bytes()), targets };
    AppendRequest { records: vec![record; records], unrouted: 1 }
}

fn delivered(range: std::ops::Range<u64>) -> Vec<Settlement> {
    let settle = |offset| Settlement { offset: Offset::new(offset), outcome: Outcome::Delivered };
    range.map(settle).collect()
}

fn rows(engine: &Engine, family: Family) -> usize {
    let mut rows = 0;
    engine
        .scan(family, &[], None, &mut |_, _| {
            rows += 1;
            Visit::Next
        })
        .unwrap();
    rows
}

fn engines(folder: &tempfile::TempDir) -> [Arc<Engine>; 2] {
    let budget = DiskBudget { cache_bytes: 8 << 20, write_buffer_bytes: 8 << 20, capacity_bytes: u64::MAX };
    let disk = DiskEngine::open(&folder.path().join("db"), budget, crate::damage::DamageLog::default(), None)
        .unwrap();
    [Arc::new(Engine::disk(disk)), Arc::new(Engine::memory())]
}

#[tokio::test]
async fn a_failing_write_refuses_its_requests_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines(&folder) {
        let store = store_on(&engine, Durability::Sync);
        let (one, two) = (store.queue("one").unwrap(), store.queue("two").unwrap());
        store.submit(request(&[&one, &two], 3, "before")).await.unwrap().await.unwrap();
        store.submit(request(&[&one], 2, "before")).await.unwrap().await.unwrap();
        one.settle(&delivered(3..5));
        store.flush().await.unwrap();
        let (ledger, hub) = (one.ledger(), store.hub_ledger());

        one.settle(&delivered(1..2));
        engine.fail_writes(usize::MAX);
        for _ in 0..2 {
            let refused = store.submit(request(&[&one, &two], 2, "lost")).await.unwrap().await;
            assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
        }
        assert_eq!(store.space().state, SpaceState::Full { reason: SpaceReason::Disk });
        engine.fail_writes(0);
        assert_eq!(store.hub_ledger().unrouted(), hub.unrouted());
        assert_eq!((one.tail(), two.tail()), (Offset::new(5), Offset::new(3)));
        assert_eq!(one.ledger().accepted(), ledger.accepted());

        store.submit(request(&[&one, &two], 1, "after")).await.unwrap().await.unwrap();
        let texts = |batch: Batch| -> Vec<(u64, String)> {
            let text = |entry: &Entry| String::from_utf8(entry.bytes.to_vec()).unwrap();
            batch.entries.iter().map(|entry| (entry.offset.get(), text(entry))).collect()
        };
        let before = |offset| (offset, "before".to_owned());
        let expected = vec![before(0), before(2), (5, "after".to_owned())];
        assert_eq!(texts(one.read(Offset::ZERO, ALL).await.unwrap()), expected);
        store.close();

        // The settlement that met the failing write was written after all.
        let store = store_on(&engine, Durability::Sync);
        let one = store.queue("one").unwrap();
        assert_eq!(texts(one.read(Offset::ZERO, ALL).await.unwrap()), expected);
        assert_eq!((one.ledger().delivered(), one.ledger().gap(), store.hub_ledger().gap()), (3, 0, 0));
    }
}

#[tokio::test]
async fn a_store_at_rest_sees_that_writes_succeed_again() {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines(&folder) {
        let store = store_on(&engine, Durability::Sync);
        let queue = store.queue("q").unwrap();
        let mut watch = store.watch_space();
        engine.fail_writes(2);
        assert!(store.submit(request(&[&queue], 1, "lost")).await.unwrap().await.is_err());
        let open =
            tokio::time::timeout(Duration::from_secs(60), watch.wait_for(|state| *state == SpaceState::Open));
        open.await.unwrap().unwrap();
        assert_eq!((queue.tail(), store.space().state), (Offset::ZERO, SpaceState::Open));
    }
}

#[tokio::test]
async fn keyed_state_waits_for_the_end_of_a_full_disk_but_not_for_ever() {
    let engine = Arc::new(Engine::memory());
    let store = store_on(&engine, Durability::Os);
    let twins = store.keyed(Table::Twins);
    twins.put(b"d1", Bytes::from_static(b"old")).await.unwrap();
    engine.fail_writes(2);
    let (first, second) = tokio::join!(
        twins.put(b"d1", Bytes::from_static(b"new")),
        twins.put(b"d1", Bytes::from_static(b"newest"))
    );
    assert_eq!((first, second), (Ok(()), Ok(())));
    assert_eq!(twins.get(b"d1").await.unwrap(), Some(Bytes::from_static(b"newest")));

    engine.fail_writes(usize::MAX);
    assert!(matches!(twins.put(b"d1", Bytes::from_static(b"lost")).await, Err(StoreError::Full { .. })));
    engine.fail_writes(0);
    store.flush().await.unwrap();
    assert_eq!(twins.get(b"d1").await.unwrap(), Some(Bytes::from_static(b"newest")));
}

#[tokio::test]
async fn the_interval_level_answers_after_its_sync() {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines(&folder) {
        let store = store_on(&engine, Durability::Interval { millis: 20 });
        let queue = store.queue("q").unwrap();
        let start = Instant::now();
        store.submit(request(&[&queue], 1, "x")).await.unwrap().await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(20));
        let commit = store.submit(request(&[&queue], 1, "x")).await.unwrap();
        store.close();
        commit.await.unwrap();
    }
}

#[tokio::test]
async fn a_shared_body_is_released_when_its_last_queue_has_settled_it() {
    const RECORDS: u64 = 25_000;
    let folder = tempfile::tempdir().unwrap();
    for engine in engines(&folder) {
        let store = store_on(&engine, Durability::Os);
        let (one, two) = (store.queue("one").unwrap(), store.queue("two").unwrap());
        for _ in 0..RECORDS / 1000 {
            store.submit(request(&[&one, &two], 1000, "shared")).await.unwrap().await.unwrap();
        }
        assert_eq!(rows(&engine, Family::Log) as u64, RECORDS);
        one.settle(&delivered(0..RECORDS));
        store.flush().await.unwrap();
        assert_eq!(rows(&engine, Family::Log) as u64, RECORDS, "the other queue needs all of it");
        assert!((rows(&engine, Family::Reference) as u64) < 2 * RECORDS, "whole stretches are gone");

        let last = two.read(Offset::new(RECORDS - 1), ALL).await.unwrap();
        assert_eq!(last.entries[0].bytes, "shared");
        two.settle(&delivered(0..RECORDS));
        store.flush().await.unwrap();
        assert!((rows(&engine, Family::Log) as u64) < RECORDS / 2, "whole segments are gone");

        // Queues at rest give back the rest, but for the segment that the next body goes to.
        let deadline = Instant::now() + Duration::from_secs(60);
        while rows(&engine, Family::Reference) > 0 || rows(&engine, Family::Log) > 4096 {
            assert!(Instant::now() < deadline, "space of a quiet queue was not released");
            store.flush().await.unwrap();
        }
        assert_eq!((one.ledger().gap(), two.ledger().queued()), (0, 0));

        // Offsets and positions in the log go on.
        store.submit(request(&[&one, &two], 2, "later")).await.unwrap().await.unwrap();
        store.close();
        let store = store_on(&engine, Durability::Os);
        let two = store.queue("two").unwrap();
        let batch = two.read(Offset::ZERO, ALL).await.unwrap();
        assert_eq!(batch.entries.len(), 2);
        assert_eq!((batch.entries[0].offset.get(), &batch.entries[0].bytes[..]), (RECORDS, &b"later"[..]));
        assert!(rows(&engine, Family::Log) <= 4096);
        two.settle(&delivered(RECORDS..RECORDS + 2));
        store.queue("one").unwrap().settle(&delivered(RECORDS..RECORDS + 2));
        store.close();

        // What the last run left of its segment goes at the second start, when nothing refers to it.
        let store = store_on(&engine, Durability::Os);
        let deadline = Instant::now() + Duration::from_secs(60);
        while rows(&engine, Family::Reference) > 0 {
            assert!(Instant::now() < deadline, "space of a quiet queue was not released");
            store.flush().await.unwrap();
        }
        store.close();
        store_on(&engine, Durability::Os).close();
        assert_eq!(rows(&engine, Family::Log), 0);
        assert_eq!(store_on(&engine, Durability::Os).queue("one").unwrap().tail().get(), RECORDS + 2);
    }
}

#[tokio::test]
async fn entries_that_are_gone_or_damaged_are_dropped_and_counted() {
    let engine = Arc::new(Engine::memory());
    let store = store_on(&engine, Durability::Os);
    let queue = store.queue("q").unwrap();
    store.submit(request(&[&queue], 6, "sound")).await.unwrap().await.unwrap();
    store.close();
    let mut batch = engine.batch(0);
    engine.delete(&mut batch, Family::Reference, &crate::rows::reference_key(0, 1));
    engine.put(&mut batch, Family::Reference, &crate::rows::reference_key(0, 2), &[0x80], &Bytes::new());
    engine.delete(&mut batch, Family::Reference, &crate::rows::reference_key(0, 5));
    engine.write(batch, false).unwrap();
    let store = store_on(&engine, Durability::Os);
    let queue = store.queue("q").unwrap();
    let mut next = Offset::ZERO;
    let mut offsets = Vec::new();
    while next < queue.tail() {
        let batch = queue.read(next, ALL).await.unwrap();
        offsets.extend(batch.entries.iter().map(|entry| entry.offset.get()));
        next = batch.next;
    }
    assert_eq!(offsets, [0, 3, 4]);
    let ledger = queue.ledger();
    assert_eq!((ledger.dropped(DropReason::Unreadable), ledger.queued(), ledger.gap()), (3, 3, 0));
}

#[test]
fn what_is_live_stays_when_files_beside_it_are_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let [engine, _] = engines(&folder);
    let key = |offset| crate::rows::reference_key(7, offset);
    let body = Bytes::from(vec![1; 1000]);
    // A table that ends with the first live key.
    let mut batch = engine.batch(0);
    for offset in 0..=1_000 {
        engine.put(&mut batch, Family::Reference, &key(offset), &[], &body);
    }
    engine.write(batch, false).unwrap();
    let range =
        |from, to| Range { family: Family::Reference, from: key(from).to_vec(), to: key(to).to_vec() };
    engine.compact(&[range(0, 1_001)]);
    let mut batch = engine.batch(0);
    engine.delete_range(&mut batch, Family::Reference, &key(0), &key(1_000));
    engine.write(batch, true).unwrap();
    engine.reclaim(&range(0, 1_000));
    assert_eq!(engine.get(Family::Reference, &key(1_000)).unwrap(), Some(body.clone()));

    // What was deleted stays so when room is given back, and takes none.
    let mut batch = engine.batch(0);
    for offset in 1_001..3_000 {
        engine.put(&mut batch, Family::Reference, &key(offset), &[], &body);
    }
    engine.write(batch, false).unwrap();
    engine.compact(&[range(0, 3_000)]);
    for step in 1..10 {
        let mut batch = engine.batch(0);
        engine.delete_range(&mut batch, Family::Reference, &key(0), &key(1_000 + step * 100));
        engine.write(batch, true).unwrap();
        engine.reclaim(&range(0, 1_000 + step * 100));
        engine.compact(&[range(900 + step * 100, 1_000 + step * 100)]);
        assert_eq!(rows(&engine, Family::Reference) as u64, 2_000 - step * 100);
    }
}

#[tokio::test]
async fn a_dead_letter_waits_with_its_settlement_for_a_write_that_succeeds() {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines(&folder) {
        let store = store_on(&engine, Durability::Sync);
        let queue = store.queue("q").unwrap();
        store.submit(request(&[&queue], 10, "letter")).await.unwrap().await.unwrap();
        let entries = queue.read(Offset::ZERO, ALL).await.unwrap().entries;
        engine.fail_writes(usize::MAX);
        for entry in &entries[..3] {
            assert!(queue.dead_letter(entry, DeadLetterReason::Conversion, 1));
            assert!(matches!(store.flush().await, Err(StoreError::Full { .. })));
        }
        assert_eq!((queue.ledger().dead_lettered(), queue.ledger().gap()), (3, 0));
        assert_eq!(store.dead_letters().ledger().accepted(), 0);
        let discarded = store.dead_letters().discard(&[Offset::ZERO]).await;
        assert!(matches!(discarded, Err(StoreError::Full { .. })), "{discarded:?}");

        // What dies now has changed nothing.
        let crashed = store_on(&engine, Durability::Sync);
        assert_eq!((crashed.queue("q").unwrap().ledger().queued(), crashed.hub_ledger().gap()), (10, 0));
        crashed.close();

        engine.fail_writes(0);
        store.flush().await.unwrap();
        assert_eq!((store.dead_letters().ledger().queued(), store.hub_ledger().gap()), (3, 0));
        engine.fail_writes(1);
        let ids = [Offset::ZERO, Offset::new(2)];
        assert!(matches!(store.dead_letters().redrive(&ids).await, Err(StoreError::Full { .. })));
        assert_eq!((store.dead_letters().ledger().queued(), queue.tail()), (3, Offset::new(10)));
        assert_eq!(store.dead_letters().redrive(&ids).await.unwrap(), 2);
        assert_eq!((store.dead_letters().ledger().queued(), queue.tail()), (1, Offset::new(12)));
        store.close();

        let store = store_on(&engine, Durability::Sync);
        let letters = store.dead_letters().list(None, ALL, None).await.unwrap();
        assert_eq!(letters.iter().map(|letter| letter.offset.get()).collect::<Vec<_>>(), [1]);
        assert_eq!(store.hub_ledger().gap(), 0);
    }
}

#[tokio::test]
async fn what_waits_for_the_dead_letters_is_bounded() {
    let engine = Arc::new(Engine::memory());
    let store = store_on(&engine, Durability::Sync);
    let queue = store.queue("q").unwrap();
    let text = "x".repeat(1 << 20);
    store.submit(request(&[&queue], 20, &text)).await.unwrap().await.unwrap();
    let mut entries: Vec<Entry> = Vec::new();
    while entries.len() < 20 {
        let next = entries.last().map_or(Offset::ZERO, |last| last.offset.next());
        entries.extend(queue.read(next, ALL).await.unwrap().entries);
    }
    engine.fail_writes(usize::MAX);
    let taken = |entry: &&Entry| queue.dead_letter(entry, DeadLetterReason::Conversion, 1);
    assert_eq!(entries.iter().filter(taken).count(), 15);
    assert_eq!((queue.ledger().queued(), queue.ledger().gap()), (5, 0));
    engine.fail_writes(0);
    store.flush().await.unwrap();
    assert!(entries.iter().skip(15).all(|entry| taken(&entry)));
    store.flush().await.unwrap();
    assert_eq!((store.dead_letters().ledger().queued(), store.hub_ledger().gap()), (20, 0));
}
