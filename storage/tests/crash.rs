//! A process under load is killed at random moments; what it had acknowledged must still be there.
//!
//! The test starts its own binary again as the process to be killed. That one says on its standard output what
//! it did, one line each; a line is in the pipe before the next step begins, so it survives the kill.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use edgehub_storage::{
    AppendRequest, BatchEnd, DeadLetterReason, Durability, Offset, Outcome, Overflow, Queue, ReadLimit,
    Record, Settlement, Store, StoreOptions, Target, Ttl,
};

const FOLDER: &str = "EDGEHUB_STORAGE_CRASH_FOLDER";
const ROUND: &str = "EDGEHUB_STORAGE_CRASH_ROUND";
const KILLS: u64 = 12;
const QUEUES: [&str; 2] = ["left", "right"];

/// Who wrote a record, and which one of theirs it is.
type Id = (u64, u64, u64);

fn options(folder: &Path) -> StoreOptions {
    StoreOptions { ring_bytes_max: 20_000, durability: Durability::Sync, ..StoreOptions::disk(folder) }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("@{line}\n").as_bytes()).and_then(|()| out.flush()).expect("the parent reads");
}

fn id_of(bytes: &[u8]) -> Id {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    (number(0), number(8), number(16))
}

/// Does nothing in a normal run; as the process to be killed, works until it is.
#[test]
fn process_that_is_killed() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let round: u64 = std::env::var(ROUND).unwrap().parse().unwrap();
    // The test harness has begun a line.
    println!();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(options(Path::new(&folder))).unwrap();
        let mut tasks = Vec::new();
        for task in 0..4 {
            tasks.push(tokio::spawn(publish(store.clone(), round, task)));
        }
        for name in QUEUES {
            tasks.push(tokio::spawn(deliver(store.clone(), store.queue(name).unwrap())));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}

async fn publish(store: Store, round: u64, task: u64) {
    let queues = QUEUES.map(|name| store.queue(name).unwrap());
    let mut rng = fastrand::Rng::new();
    let mut number = 0;
    loop {
        let mut request = AppendRequest { records: Vec::new(), unrouted: 1 };
        let mut acknowledged = Vec::new();
        for _ in 0..rng.usize(1..20) {
            let mut bytes = [round, task, number].map(u64::to_le_bytes).concat();
            bytes.resize(24 + rng.usize(0..400), 0);
            let pick = *rng.choice(&[&[0_usize][..], &[1], &[0, 1]]).unwrap();
            let target = |index: &usize| Target {
                queue: queues[*index].id(),
                ttl: Ttl::Infinite,
                overflow: Overflow::RejectNew,
            };
            request.records.push(Record { bytes: bytes.into(), targets: pick.iter().map(target).collect() });
            acknowledged.extend(pick.iter().map(|index| format!("A {index} {round} {task} {number}")));
            number += 1;
        }
        store.submit(request).await.unwrap().await.unwrap();
        say(&acknowledged.join("\n@"));
    }
}

async fn deliver(store: Store, queue: Queue) {
    let mut rng = fastrand::Rng::new();
    let index = queue.id().get();
    let mut next = queue.checkpoint();
    // Entries that were handed out and not settled at once.
    let mut parked = Vec::new();
    loop {
        queue.appended(next).await;
        let batch = queue.read(next, ReadLimit { count: rng.usize(1..60), bytes: 1 << 20 }).await.unwrap();
        next = batch.next;
        let mut settlements = Vec::new();
        for entry in batch.entries {
            let (round, task, number) = id_of(&entry.bytes);
            say(&format!("D {index} {} {round} {task} {number}", entry.offset));
            if rng.u8(0..20) == 0 {
                assert!(queue.dead_letter(&entry, DeadLetterReason::RejectedByReceiver, 1));
                continue;
            }
            parked.push(Settlement { offset: entry.offset, outcome: Outcome::Delivered });
        }
        let keep = rng.usize(0..40);
        while parked.len() > keep {
            settlements.push(parked.swap_remove(rng.usize(..parked.len())));
        }
        queue.settle(&settlements);
        if rng.u8(0..10) == 0 {
            store.flush().await.unwrap();
            let lines: Vec<String> =
                settlements.iter().map(|settled| format!("F {index} {}", settled.offset)).collect();
            say(&lines.join("\n@"));
        }
    }
}

/// What the killed processes said.
#[derive(Default)]
struct Said {
    acknowledged: [BTreeSet<Id>; 2],
    delivered: [BTreeMap<u64, Id>; 2],
    durable: [BTreeSet<u64>; 2],
    repeated: usize,
}

impl Said {
    fn hear(&mut self, line: &str) {
        let mut words = line.split(' ');
        let kind = words.next();
        let numbers: Vec<u64> = words.map(|word| word.parse().expect("a number")).collect();
        match (kind, numbers.as_slice()) {
            (Some("A"), &[queue, round, task, number]) => {
                self.acknowledged[queue as usize].insert((round, task, number));
            }
            (Some("D"), &[queue, offset, round, task, number]) => {
                let (queue, id) = (queue as usize, (round, task, number));
                assert!(
                    !self.durable[queue].contains(&offset),
                    "{offset} was settled for good, and came again"
                );
                if let Some(before) = self.delivered[queue].insert(offset, id) {
                    assert_eq!(before, id, "offset {offset} was used twice");
                    self.repeated += 1;
                }
            }
            (Some("F"), &[queue, offset]) => {
                self.durable[queue as usize].insert(offset);
            }
            _ => {}
        }
    }
}

fn run_and_kill(folder: &Path, round: u64, said: &mut Said) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "process_that_is_killed", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let life = Duration::from_millis(fastrand::u64(20..400));
    let mut kill_at = None;
    let mut line = String::new();
    loop {
        line.clear();
        let length = lines.read_line(&mut line).unwrap();
        // The kill may cut the last line.
        if length == 0 || !line.ends_with('\n') {
            break;
        }
        if let Some(text) = line.trim_end().strip_prefix('@') {
            said.hear(text);
            // Its life begins with the first thing that it does.
            let at = *kill_at.get_or_insert_with(|| Instant::now() + life);
            if Instant::now() >= at {
                let _ = child.kill();
            }
        }
    }
    assert!(!child.wait().unwrap().success(), "the process ended before it was killed");
}

async fn inspect(folder: &Path, said: &Said) {
    let store = Store::open(options(folder)).unwrap();
    // Among other things: what has left a queue for the dead letters is there.
    assert_eq!(store.hub_ledger().gap(), 0);
    let all = ReadLimit { count: usize::MAX, bytes: usize::MAX };
    let letters = store.dead_letters().list(None, all, None).await.unwrap();
    assert_eq!(letters.len() as u64, store.hub_ledger().dead_letters().queued());
    for (index, name) in QUEUES.iter().enumerate() {
        let queue = store.queue(name).unwrap();
        let ledger = queue.ledger();
        assert_eq!((queue.id().get() as usize, ledger.gap()), (index, 0));
        let mut waiting = BTreeMap::new();
        let mut next = Offset::ZERO;
        loop {
            let batch = queue.read(next, ReadLimit { count: 1000, bytes: 1 << 20 }).await.unwrap();
            waiting.extend(batch.entries.iter().map(|entry| (entry.offset.get(), id_of(&entry.bytes))));
            next = batch.next;
            if batch.end == BatchEnd::Tail {
                break;
            }
        }
        assert_eq!(ledger.queued(), waiting.len() as u64);
        for letter in letters.iter().filter(|letter| letter.queue == queue.id()) {
            let offset = letter.offset.get();
            assert!(!waiting.contains_key(&offset), "{offset} is in two places");
            assert_eq!(said.delivered[index].get(&offset), Some(&id_of(&letter.bytes)));
        }
        assert!(ledger.delivered() <= said.delivered[index].len() as u64);
        for offset in &said.durable[index] {
            assert!(!waiting.contains_key(offset), "{offset} was settled for good, and waits");
        }
        let mut seen = said.delivered[index].clone();
        for (offset, id) in waiting {
            assert_eq!(*seen.entry(offset).or_insert(id), id, "offset {offset} was used twice");
        }
        assert_eq!(seen.len() as u64, ledger.accepted(), "an entry was settled without being delivered");
        let ids: BTreeSet<Id> = seen.values().copied().collect();
        assert_eq!(ids.len(), seen.len(), "a record is there twice");
        let lost: Vec<&Id> = said.acknowledged[index].difference(&ids).collect();
        assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
        let mut last: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for (offset, (round, task, number)) in seen {
            if let Some(before) = last.insert((round, task), number) {
                assert!(before < number, "{name}: order of {round}/{task} broken at offset {offset}");
            }
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_the_process_is_killed() {
    let seed = std::env::var("EDGEHUB_STORAGE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("EDGEHUB_STORAGE_SEED={seed}");
    fastrand::seed(seed);
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut said = Said::default();
    for round in 0..KILLS {
        run_and_kill(folder.path(), round, &mut said);
        runtime.block_on(inspect(folder.path(), &said));
    }
    let store = Store::open(options(folder.path())).unwrap();
    assert!(store.dead_letters().ledger().accepted() > 0);
    let count = |sets: &[BTreeSet<Id>; 2]| sets.iter().map(BTreeSet::len).sum::<usize>();
    println!("{} acknowledged, {} repeated after {KILLS} kills", count(&said.acknowledged), said.repeated);
    assert!(count(&said.acknowledged) > 0);
}
