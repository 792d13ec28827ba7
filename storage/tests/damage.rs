//! What a store does about damage: each kind is done to a sound store, which is then opened.
//!
//! Whatever happens, the ledger adds up, nothing is there that was not accepted, nothing is delivered twice out of
//! nothing, and what is lost is said.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use edgehub_storage::{
    AppendRequest, BatchEnd, Damage, DamageKind, DropReason, Durability, Offset, OpenError, Outcome,
    Overflow, Queue, ReadLimit, Record, Settlement, Store, StoreOptions, Table, Target, Ttl,
};

const QUEUES: [&str; 3] = ["iothub", "edge/filter/input1", "edge/archive/in"];
/// The first entries of each queue are settled.
const SETTLED: u64 = 40;

fn options(folder: &Path) -> StoreOptions {
    // Small buffers, so that some entries come to lie in tables.
    StoreOptions {
        write_buffer_bytes: 4 << 20,
        ring_bytes_max: 0,
        durability: Durability::Os,
        ..StoreOptions::disk(folder)
    }
}

fn open(folder: &Path) -> Result<Store, OpenError> {
    Store::open(options(folder))
}

fn body(queue: usize, number: u64) -> Bytes {
    let mut bytes = format!("{queue} {number} ").into_bytes();
    let mut rng = fastrand::Rng::with_seed(number * 7 + queue as u64);
    bytes.extend(std::iter::repeat_with(|| rng.u8(..)).take(600));
    bytes.into()
}

/// Appends a record of its own to each queue, and one that all of them share, `times` times.
async fn append(store: &Store, times: u64) {
    let queues = QUEUES.map(|name| store.queue(name).unwrap());
    let target =
        |queue: &Queue| Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew };
    for _ in 0..times {
        let mut request = AppendRequest { records: Vec::new(), unrouted: 1 };
        for (index, queue) in queues.iter().enumerate() {
            let bytes = body(index, queue.tail().get());
            request.records.push(Record { bytes, targets: [target(queue)].into_iter().collect() });
        }
        let bytes = body(9, queues[0].tail().get() + 1);
        request.records.push(Record { bytes, targets: queues.iter().map(target).collect() });
        store.submit(request).await.unwrap().await.unwrap();
    }
}

async fn settle(store: &Store) {
    for name in QUEUES {
        let settle = |number| Settlement { offset: Offset::new(number), outcome: Outcome::Delivered };
        store.queue(name).unwrap().settle(&(0..SETTLED).map(settle).collect::<Vec<_>>());
    }
    store.flush().await.unwrap();
}

/// A store with entries in tables and in the log; how many each queue has.
async fn filled(folder: &Path, in_tables: u64, in_log: u64) -> u64 {
    let store = open(folder).unwrap();
    store.keyed(Table::Twins).put(b"device", Bytes::from_static(b"twin")).await.unwrap();
    append(&store, in_tables).await;
    store.close();
    // A start writes what is in the log to tables.
    let store = open(folder).unwrap();
    settle(&store).await;
    append(&store, in_log).await;
    let tail = store.queue(QUEUES[0]).unwrap().tail().get();
    store.close();
    tail
}

async fn entries(queue: &Queue) -> BTreeMap<u64, Bytes> {
    let (mut entries, mut next) = (BTreeMap::new(), Offset::ZERO);
    loop {
        let batch = queue.read(next, ReadLimit { count: 1000, bytes: 1 << 20 }).await.unwrap();
        entries.extend(batch.entries.iter().map(|entry| (entry.offset.get(), entry.bytes.clone())));
        next = batch.next;
        if batch.end == BatchEnd::Tail {
            return entries;
        }
    }
}

/// What must hold of every store that opens. Returns how many entries are missing, over all queues.
async fn sound(store: &Store, tail: u64) -> u64 {
    let mut missing = 0;
    for (index, name) in QUEUES.iter().enumerate() {
        let queue = store.queue(name).unwrap();
        let entries = entries(&queue).await;
        for (offset, bytes) in &entries {
            let expected = if offset % 2 == 0 { body(index, *offset) } else { body(9, *offset) };
            assert!(*bytes == expected, "entry {offset} of {name} is another one");
        }
        let ledger = queue.ledger();
        assert_eq!((ledger.gap(), ledger.queued()), (0, entries.len() as u64), "{name}: {ledger:?}");
        assert!(ledger.delivered() <= SETTLED && queue.tail().get() <= tail, "{name}: {ledger:?}");
        let lost = ledger.dropped(DropReason::Unreadable);
        let kept = entries.range(SETTLED..).count() as u64;
        assert!(kept + lost + (tail - queue.tail().get()) >= tail - SETTLED, "{name}: {ledger:?}");
        missing += tail - SETTLED - kept;
    }
    assert_eq!(store.hub_ledger().gap(), 0);
    missing
}

fn database(folder: &Path) -> PathBuf {
    folder.join("store/db")
}

/// The files of the database whose names have this in them, in order.
fn files(folder: &Path, part: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(database(folder)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.file_name().unwrap().to_str().unwrap().contains(part));
    files.sort();
    files
}

fn largest(folder: &Path, part: &str) -> PathBuf {
    let size = |path: &PathBuf| fs::metadata(path).unwrap().len();
    files(folder, part).into_iter().max_by_key(size).unwrap()
}

/// Changes a byte at a part of the file's length, given in thousandths.
fn flip(file: &Path, thousandths: u64) {
    let opened = fs::File::options().read(true).write(true).open(file).unwrap();
    let at = (opened.metadata().unwrap().len() - 1) * thousandths / 1000;
    let mut byte = [0];
    opened.read_exact_at(&mut byte, at).unwrap();
    opened.write_all_at(&[byte[0] ^ 0x5a], at).unwrap();
}

fn kinds(damage: &[Damage]) -> Vec<DamageKind> {
    damage.iter().map(|damage| damage.kind).collect()
}

/// After damage the store works as any other, and a second start finds nothing.
async fn goes_on(folder: &Path, store: Store, what: &str) {
    let tails: Vec<Offset> = QUEUES.map(|name| store.queue(name).unwrap().tail()).to_vec();
    let queue = store.queue(QUEUES[0]).unwrap();
    let target = Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew };
    let records = vec![Record { bytes: "after".into(), targets: [target].into_iter().collect() }];
    store.submit(AppendRequest { records, unrouted: 0 }).await.unwrap().await.unwrap();
    assert_eq!(entries(&queue).await.last_key_value(), Some((&tails[0].get(), &Bytes::from("after"))));
    let ledgers = QUEUES.map(|name| store.queue(name).unwrap().ledger());
    store.close();
    let store = open(folder).unwrap();
    assert_eq!(store.damage(), [], "{what}");
    assert_eq!(QUEUES.map(|name| store.queue(name).unwrap().ledger()), ledgers, "{what}");
    store.close();
}

#[tokio::test]
async fn a_log_that_ends_early_costs_its_last_request_and_is_no_damage() {
    let folder = tempfile::tempdir().unwrap();
    let tail = filled(folder.path(), 30, 60).await;
    let log = largest(folder.path(), ".log");
    let length = fs::metadata(&log).unwrap().len();
    fs::File::options().write(true).open(&log).unwrap().set_len(length - 9).unwrap();
    let store = open(folder.path()).unwrap();
    assert_eq!(store.damage(), []);
    // The last request had two entries for each queue.
    assert_eq!(sound(&store, tail).await, 6);
    assert_eq!(store.queue(QUEUES[0]).unwrap().tail().get(), tail - 2);
    goes_on(folder.path(), store, "early end").await;
}

#[tokio::test]
async fn a_damaged_log_costs_what_cannot_be_read_and_not_what_lies_behind_it() {
    for (thousandths, ends) in [(300, false), (500, false), (800, false), (999, true)] {
        let folder = tempfile::tempdir().unwrap();
        let tail = filled(folder.path(), 30, 300).await;
        let log = largest(folder.path(), ".log");
        let before = fs::read(&log).unwrap();
        flip(&log, thousandths);
        let damaged = fs::read(&log).unwrap();
        let store = open(folder.path()).unwrap();
        let damage = store.damage();
        assert_eq!(kinds(&damage)[0], DamageKind::Log, "{damage:?}");
        let missing = sound(&store, tail).await;
        assert!(missing > 0 && missing < 3 * 120, "{thousandths}: {missing}");
        let told = damage[0].lost.entries_count;
        if ends {
            assert!(damage[0].lost.unknown);
        } else {
            assert_eq!(
                (told, store.queue(QUEUES[2]).unwrap().tail().get()),
                (missing, tail),
                "{thousandths}"
            );
        }
        let aside = damage[0].set_aside.clone().unwrap();
        assert!(aside.starts_with(folder.path().join("store")));
        assert_eq!(fs::read(aside.join(log.file_name().unwrap())).unwrap(), damaged);
        assert_ne!(before, damaged);
        assert!(fs::read_to_string(aside.join("REPORT")).unwrap().starts_with("log: "));
        assert_eq!(store.keyed(Table::Twins).get(b"device").await.unwrap().unwrap(), "twin");
        goes_on(folder.path(), store, "log").await;
    }
}

#[tokio::test]
async fn a_log_that_is_gone_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let tail = filled(folder.path(), 30, 60).await;
    for log in files(folder.path(), ".log") {
        fs::remove_file(log).unwrap();
    }
    let store = open(folder.path()).unwrap();
    assert_eq!(kinds(&store.damage()), [DamageKind::Log]);
    assert!(store.damage()[0].lost.unknown);
    assert!(sound(&store, tail).await > 0);
    goes_on(folder.path(), store, "no log").await;
}

#[tokio::test]
async fn each_file_of_the_database_may_be_damaged_or_missing() {
    use DamageKind::{Database, Manifest, Marker, Table};
    type Harm = fn(&Path);
    let cases: [(&str, Harm, &[DamageKind], bool); 13] = [
        ("table, a byte of a block", |folder| flip(&largest(folder, ".sst"), 300), &[], true),
        ("table, a byte of the footer", |folder| flip(&largest(folder, ".sst"), 999), &[Table], true),
        (
            "table, cut",
            |folder| {
                fs::File::options().write(true).open(largest(folder, ".sst")).unwrap().set_len(5000).unwrap()
            },
            &[Table],
            true,
        ),
        ("table, missing", |folder| fs::remove_file(largest(folder, ".sst")).unwrap(), &[Table], true),
        ("manifest, a byte", |folder| flip(&largest(folder, "MANIFEST"), 500), &[Manifest], false),
        (
            "manifest, cut",
            |folder| {
                fs::File::options()
                    .write(true)
                    .open(largest(folder, "MANIFEST"))
                    .unwrap()
                    .set_len(100)
                    .unwrap()
            },
            &[Manifest],
            false,
        ),
        (
            "manifest, missing",
            |folder| fs::remove_file(largest(folder, "MANIFEST")).unwrap(),
            &[Manifest],
            false,
        ),
        ("current, a byte", |folder| flip(&database(folder).join("CURRENT"), 500), &[Manifest], false),
        (
            "current, missing",
            |folder| fs::remove_file(database(folder).join("CURRENT")).unwrap(),
            &[Manifest],
            false,
        ),
        ("marker, a byte", |folder| flip(&folder.join("store/FORMAT"), 100), &[Marker], false),
        ("marker, missing", |folder| fs::remove_file(folder.join("store/FORMAT")).unwrap(), &[Marker], false),
        ("database, missing", |folder| fs::remove_dir_all(database(folder)).unwrap(), &[Database], true),
        (
            "identity, options and lock, missing",
            |folder| {
                for part in ["IDENTITY", "OPTIONS", "LOCK"] {
                    files(folder, part).iter().for_each(|file| fs::remove_file(file).unwrap());
                }
            },
            &[],
            false,
        ),
    ];
    for (what, harm, expected, lossy) in cases {
        println!("{what}");
        let folder = tempfile::tempdir().unwrap();
        let tail = filled(folder.path(), 400, 60).await;
        harm(folder.path());
        let store = open(folder.path()).unwrap();
        assert_eq!(kinds(&store.damage()), expected, "{what}: {:?}", store.damage());
        let found = store.damage();
        let missing = sound(&store, tail).await;
        assert_eq!(missing > 0, lossy, "{what}: {missing} missing");
        for damage in found {
            if damage.kind != Database && !what.ends_with("missing") {
                assert!(damage.set_aside.as_ref().is_some_and(|aside| aside.is_dir()), "{what}: {damage}");
            }
            let told = damage.lost.entries_count;
            assert!(!lossy || damage.lost.unknown || told == missing, "{what}: {damage}");
        }
        if expected.is_empty() && lossy {
            // It is found when it is read, and set aside by the next start.
            assert!(!store.damage().is_empty() && store.damage().iter().all(|damage| damage.kind == Table));
            assert_eq!(store.damage_count(Table), store.damage().len() as u64);
            store.close();
            let store = open(folder.path()).unwrap();
            assert_eq!(kinds(&store.damage()), [Table], "{:?}", store.damage());
            assert!(store.damage()[0].set_aside.is_some());
            assert_eq!(sound(&store, tail).await, missing);
            goes_on(folder.path(), store, what).await;
            continue;
        }
        goes_on(folder.path(), store, what).await;
    }
}

/// What a start does that was interrupted while it dealt with damage: the next one goes on, wherever it was.
#[tokio::test]
async fn an_interrupted_rescue_is_finished_by_the_next_start() {
    type Interrupt = fn(&Path);
    let cases: [(&str, Interrupt); 4] = [
        ("a half-made copy", |folder| {
            fs::create_dir_all(folder.join("store/rescue/db")).unwrap();
            fs::write(folder.join("store/rescue/db/CURRENT"), "half").unwrap();
        }),
        ("a copy that is done, and the original still there", |folder| {
            fs::create_dir_all(folder.join("store/rescue/db")).unwrap();
            fs::write(folder.join("store/rescue/DONE"), "").unwrap();
        }),
        ("the original set aside, the copy not yet in its place", |folder| {
            let aside = folder.join("store/damaged-20261121T120000Z");
            fs::create_dir_all(&aside).unwrap();
            fs::create_dir_all(folder.join("store/rescue")).unwrap();
            fs::rename(database(folder), folder.join("store/rescue/db")).unwrap();
            fs::write(folder.join("store/rescue/DONE"), "").unwrap();
        }),
        ("a log set aside, its records not yet written again", |folder| {
            let aside = folder.join("store/damaged-20261121T120000Z");
            fs::create_dir_all(&aside).unwrap();
            let log = largest(folder, ".log");
            let name = log.file_name().unwrap().to_str().unwrap().to_owned();
            fs::write(folder.join("store/REPLAY"), format!("damaged-20261121T120000Z\n{name}\n")).unwrap();
            fs::rename(&log, aside.join(name)).unwrap();
        }),
    ];
    for (what, interrupt) in cases {
        let folder = tempfile::tempdir().unwrap();
        let tail = filled(folder.path(), 30, 60).await;
        interrupt(folder.path());
        let store = open(folder.path()).unwrap();
        assert_eq!(sound(&store, tail).await, 0, "{what}");
        assert!(!folder.path().join("store/rescue").exists() && !folder.path().join("store/REPLAY").exists());
        goes_on(folder.path(), store, what).await;
    }
}

#[tokio::test]
async fn damage_that_compaction_meets_is_told_and_healed_by_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut tail = filled(folder.path(), 400, 60).await;
    flip(&largest(folder.path(), ".sst"), 300);
    let store = open(folder.path()).unwrap();
    // Nothing reads; compaction comes with what is written.
    let mut refused = None;
    for _ in 0..400 {
        let queue = store.queue(QUEUES[0]).unwrap();
        let target = Target { queue: queue.id(), ttl: Ttl::Infinite, overflow: Overflow::RejectNew };
        let record = Record { bytes: vec![0; 100_000].into(), targets: [target].into_iter().collect() };
        let request = AppendRequest { records: vec![record], unrouted: 0 };
        if let Err(error) = store.submit(request).await.unwrap().await {
            refused = Some(error);
            break;
        }
        tail += 1;
    }
    let refused = refused.expect("compaction of a damaged table fails");
    assert!(matches!(refused, edgehub_storage::StoreError::Damaged { .. }), "{refused:?}");
    assert_eq!(kinds(&store.damage()), [DamageKind::Table], "{:?}", store.damage());
    store.close();

    let store = open(folder.path()).unwrap();
    assert_eq!(kinds(&store.damage()), [DamageKind::Table], "{:?}", store.damage());
    assert!(store.damage()[0].lost.entries_count > 0);
    let queue = store.queue(QUEUES[0]).unwrap();
    assert_eq!((queue.tail().get(), queue.ledger().gap()), (tail, 0));
    let kept = entries(&queue).await.len() as u64;
    assert_eq!(kept + queue.ledger().dropped(DropReason::Unreadable) + SETTLED, tail);
    goes_on(folder.path(), store, "compaction").await;
}

#[tokio::test]
async fn damaged_parts_are_never_deleted_and_their_number_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    filled(folder.path(), 3, 3).await;
    for number in 0..16 {
        fs::create_dir(folder.path().join(format!("store/damaged-{number}"))).unwrap();
    }
    let refused = open(folder.path()).unwrap_err();
    assert!(matches!(refused, OpenError::DamagedOften { count: 16, .. }), "{refused}");
    fs::remove_dir(folder.path().join("store/damaged-7")).unwrap();
    open(folder.path()).unwrap().close();
    // Beside them: database, marker, lock, reserve.
    assert_eq!(fs::read_dir(folder.path().join("store")).unwrap().count(), 15 + 4);
}
