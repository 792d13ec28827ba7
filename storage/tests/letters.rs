//! What operators may rely on: dead letters, purging, peeking.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use bytes::Bytes;
use edgehub_storage::clock::{ManualTimeSource, WALL_PLAUSIBLE_MIN_MS};
use edgehub_storage::{
    AppendRequest, Backend, BatchEnd, DeadLetter, DeadLetterReason, DropReason, Offset, Outcome, Overflow,
    Queue, ReadLimit, Record, Settlement, Store, StoreError, StoreLimits, StoreOptions, Target, Ttl,
};

const ALL: ReadLimit = ReadLimit { count: usize::MAX, bytes: usize::MAX };

fn record(bytes: impl Into<Bytes>, queue: &Queue, ttl: Ttl) -> Record {
    let target = Target { queue: queue.id(), ttl, overflow: Overflow::RejectNew };
    Record { bytes: bytes.into(), targets: [target].into_iter().collect() }
}

async fn append(store: &Store, records: Vec<Record>) {
    store.submit(AppendRequest { records, unrouted: 0 }).await.unwrap().await.unwrap();
}

fn texts(letters: &[DeadLetter]) -> Vec<(u64, &str)> {
    letters.iter().map(|letter| (letter.id.get(), str::from_utf8(&letter.bytes).unwrap())).collect()
}

/// A store on disk that can be opened again, and one in memory that cannot.
fn stores(folder: &tempfile::TempDir, time: &Arc<ManualTimeSource>) -> [StoreOptions; 2] {
    [StoreOptions::disk(folder.path()), StoreOptions::memory()]
        .map(|options| StoreOptions { time: time.clone(), ..options })
}

#[tokio::test]
async fn dead_letters_are_kept_with_their_reason_and_put_back() {
    let folder = tempfile::tempdir().unwrap();
    let time = Arc::new(ManualTimeSource::new(WALL_PLAUSIBLE_MIN_MS));
    for options in stores(&folder, &time) {
        let disk = options.backend != Backend::Memory;
        let store = Store::open(options.clone()).unwrap();
        let (one, two) = (store.queue("one").unwrap(), store.queue("two").unwrap());
        let ttl = Ttl::Millis(60_000);
        append(&store, vec![record("a", &one, ttl), record("b", &one, ttl), record("c", &one, ttl)]).await;
        append(&store, vec![record("d", &two, Ttl::Infinite)]).await;
        let accepted_at = store.now();
        time.advance(1_000);
        let entries = one.read(Offset::ZERO, ALL).await.unwrap().entries;
        assert!(one.dead_letter(&entries[1], DeadLetterReason::RejectedByReceiver, 3));
        assert!(one.dead_letter(&entries[1], DeadLetterReason::Conversion, 9), "once is enough");
        let other = two.read(Offset::ZERO, ALL).await.unwrap().entries.remove(0);
        assert!(two.dead_letter(&other, DeadLetterReason::OutOfScope, 0));
        store.flush().await.unwrap();
        let dead_lettered_at = store.now();
        let store = if disk {
            store.close();
            Store::open(options).unwrap()
        } else {
            store
        };
        let (one, two) = (store.queue("one").unwrap(), store.queue("two").unwrap());
        let dead = store.dead_letters();
        assert_eq!((one.ledger().dead_lettered(), one.ledger().queued(), one.ledger().gap()), (1, 2, 0));
        assert_eq!((store.hub_ledger().dead_letters().queued(), store.hub_ledger().gap()), (2, 0));
        let letters = dead.list(None, ALL, None).await.unwrap();
        assert_eq!(texts(&letters), [(0, "b"), (1, "d")]);
        assert_eq!(&letters[0].queue_name[..], "one");
        let letter = dead.get(Offset::ZERO).await.unwrap().unwrap();
        assert_eq!(letter, letters[0]);
        assert_eq!((letter.queue, letter.offset, letter.attempts), (one.id(), Offset::new(1), 3));
        assert_eq!((letter.reason, letter.ttl), (DeadLetterReason::RejectedByReceiver, ttl));
        assert_eq!((letter.accepted_at, letter.dead_lettered_at), (accepted_at, dead_lettered_at));
        assert_eq!(texts(&dead.list(None, ALL, Some(two.id())).await.unwrap()), [(1, "d")]);
        assert_eq!(texts(&dead.list(Some(Offset::ZERO), ALL, None).await.unwrap()), [(1, "d")]);
        let first = ReadLimit { count: 1, bytes: usize::MAX };
        assert_eq!(texts(&dead.list(None, first, None).await.unwrap()), [(0, "b")]);

        // Back at the end of its queue, with its time to live counted anew.
        time.advance(50_000);
        let ids = [Offset::ZERO, Offset::new(7), Offset::ZERO];
        assert_eq!(dead.redrive(&ids).await.unwrap(), 1);
        assert_eq!(dead.redrive(&ids).await.unwrap(), 0);
        assert_eq!(one.tail(), Offset::new(4));
        time.advance(20_000);
        let batch = one.read(Offset::ZERO, ALL).await.unwrap();
        assert_eq!((batch.expired, batch.entries.len()), (2, 1));
        assert_eq!((&batch.entries[0].bytes[..], batch.entries[0].ttl), (&b"b"[..], ttl));
        assert_eq!(batch.entries[0].offset, Offset::new(3));
        assert_eq!(dead.discard(&[Offset::new(1), Offset::new(1)]).await.unwrap(), 1);
        let hub = store.hub_ledger();
        let ledger = hub.dead_letters();
        assert_eq!((ledger.accepted(), ledger.delivered(), ledger.queued()), (2, 1, 0));
        assert_eq!((ledger.dropped(DropReason::Purged), ledger.gap(), hub.gap()), (1, 0, 0));
        assert_eq!(dead.list(None, ALL, None).await.unwrap(), []);
        assert_eq!(dead.get(Offset::ZERO).await.unwrap(), None);
        let many = vec![Offset::ZERO; 1_025];
        assert!(matches!(dead.discard(&many).await, Err(StoreError::TooManyLetters { .. })));
    }
}

#[tokio::test]
async fn the_oldest_dead_letters_make_room_for_new_ones() {
    let folder = tempfile::tempdir().unwrap();
    let time = Arc::new(ManualTimeSource::new(WALL_PLAUSIBLE_MIN_MS));
    for options in stores(&folder, &time) {
        let limits = StoreLimits { dead_letters_max_bytes: 100_000, ..StoreLimits::default() };
        let store = Store::open(StoreOptions { limits, ..options }).unwrap();
        let queue = store.queue("q").unwrap();
        for number in 0..300_u32 {
            let mut bytes = vec![0; 1_000];
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            append(&store, vec![record(bytes, &queue, Ttl::Infinite)]).await;
            let entry = queue.read(queue.checkpoint(), ALL).await.unwrap().entries.remove(0);
            assert!(queue.dead_letter(&entry, DeadLetterReason::AttemptsExhausted, 10));
            store.flush().await.unwrap();
        }
        let ledger = store.dead_letters().ledger();
        assert_eq!((ledger.accepted(), ledger.gap(), store.hub_ledger().gap()), (300, 0, 0));
        let kept = ledger.queued();
        assert!((80..100).contains(&kept), "{kept}");
        assert_eq!(ledger.dropped(DropReason::Overflow), 300 - kept);
        let letters = store.dead_letters().list(None, ALL, None).await.unwrap();
        assert_eq!(letters.len() as u64, kept);
        assert_eq!(letters.last().unwrap().id, Offset::new(299));

        // A lower bound holds soon; without any room there are no dead letters, but a count.
        store.set_limits(StoreLimits { dead_letters_max_bytes: 30_000, ..limits });
        store.flush().await.unwrap();
        assert!(store.dead_letters().ledger().queued() < 30);
        store.set_limits(StoreLimits { dead_letters_max_bytes: 0, ..limits });
        store.flush().await.unwrap();
        assert_eq!(store.dead_letters().ledger().queued(), 0);
        append(&store, vec![record("x", &queue, Ttl::Infinite)]).await;
        let entry = queue.read(queue.checkpoint(), ALL).await.unwrap().entries.remove(0);
        assert!(queue.dead_letter(&entry, DeadLetterReason::AttemptsExhausted, 10));
        assert_eq!(queue.ledger().dropped(DropReason::AttemptsExhausted), 1);
        assert_eq!((queue.ledger().queued(), store.hub_ledger().gap()), (0, 0));
    }
}

#[tokio::test]
async fn purging_drops_what_waits_and_peeking_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let time = Arc::new(ManualTimeSource::new(WALL_PLAUSIBLE_MIN_MS));
    for options in stores(&folder, &time) {
        let store = Store::open(options).unwrap();
        let queue = store.queue("q").unwrap();
        let records = (0..10_u8).map(|number| record(vec![number], &queue, Ttl::Millis(1_000))).collect();
        append(&store, records).await;
        queue.settle(&[Settlement { offset: Offset::new(4), outcome: Outcome::Delivered }]);
        time.advance(1_000);
        let limit = ReadLimit { count: 6, bytes: usize::MAX };
        let batch = queue.peek(Offset::ZERO, limit).await.unwrap();
        let offsets: Vec<u64> = batch.entries.iter().map(|entry| entry.offset.get()).collect();
        assert_eq!(
            (offsets, batch.next, batch.end),
            (vec![0, 1, 2, 3, 5, 6], Offset::new(7), BatchEnd::More)
        );
        assert_eq!(queue.peek(batch.next, limit).await.unwrap().end, BatchEnd::Tail);
        assert!(batch.entries.iter().all(|entry| entry.is_expired(store.now())));
        assert_eq!(queue.purge(Offset::new(6)), 5);
        assert_eq!(queue.purge(Offset::new(6)), 0);
        assert_eq!((queue.checkpoint(), queue.ledger().dropped(DropReason::Purged)), (Offset::new(6), 5));
        assert_eq!(queue.purge(Offset::new(99)), 4);
        assert_eq!((queue.ledger().queued(), queue.ledger().gap()), (0, 0));
        assert_eq!(queue.peek(Offset::ZERO, limit).await.unwrap().entries, []);
    }
}
