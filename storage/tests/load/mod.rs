//! A process that works on a store until it is killed, and the account of what it had said.
//!
//! The test starts its own binary again as the process to be killed. That one says on its standard output what
//! it did, one line each; a line is in the pipe before the next step begins, so it survives the kill.

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
const LEVEL: &str = "EDGEHUB_STORAGE_CRASH_LEVEL";
const SEED: &str = "EDGEHUB_STORAGE_SEED";
const QUEUES: [&str; 2] = ["left", "right"];

/// Who wrote a record, and which one of theirs it is.
type Id = (u64, u64, u64);

/// The levels by the names that the environment gives them.
pub(crate) fn durability(level: &str) -> Durability {
    match level {
        "sync" => Durability::Sync,
        "interval" => Durability::Interval { millis: 20 },
        "os" => Durability::Os,
        other => panic!("{other} is no level"),
    }
}

fn options(folder: &Path, durability: Durability) -> StoreOptions {
    StoreOptions {
        ring_bytes_max: 20_000,
        // Small buffers, so that tables are written and logs are changed while the process lives.
        write_buffer_bytes: 4 << 20,
        durability,
        ..StoreOptions::disk(folder)
    }
}

/// The seed of this run: given, or chosen and printed.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("{SEED}={seed}");
    fastrand::seed(seed);
    seed
}

/// How often a process is killed: as often as the environment says, or as given.
pub(crate) fn kills(default: u64) -> u64 {
    std::env::var("EDGEHUB_STORAGE_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(default)
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("@{line}\n").as_bytes()).and_then(|()| out.flush()).expect("the parent reads");
}

fn id_of(bytes: &[u8]) -> Id {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    (number(0), number(8), number(16))
}

/// Works on the store until it is killed, if this process is the one to be.
pub(crate) fn work_until_killed() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let number = |name| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let (round, seed) = (number(ROUND), number(SEED));
    let durability = durability(&std::env::var(LEVEL).unwrap());
    // The test harness has begun a line.
    println!();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(options(Path::new(&folder), durability)).unwrap();
        let mut tasks = Vec::new();
        for task in 0..4 {
            let rng = fastrand::Rng::with_seed(seed ^ (round << 8 | task));
            tasks.push(tokio::spawn(publish(store.clone(), round, task, rng)));
        }
        for name in QUEUES {
            let queue = store.queue(name).unwrap();
            let rng = fastrand::Rng::with_seed(seed ^ (round << 8 | 0x80 | u64::from(queue.id().get())));
            tasks.push(tokio::spawn(deliver(store.clone(), queue, rng)));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}

async fn publish(store: Store, round: u64, task: u64, mut rng: fastrand::Rng) {
    let queues = QUEUES.map(|name| store.queue(name).unwrap());
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

async fn deliver(store: Store, queue: Queue, mut rng: fastrand::Rng) {
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
pub(crate) struct Said {
    acknowledged: [BTreeSet<Id>; 2],
    delivered: [BTreeMap<u64, Id>; 2],
    durable: [BTreeSet<u64>; 2],
    /// Deliveries that were repeated.
    pub(crate) repeated: usize,
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

/// One life of a process, and its end.
pub(crate) struct Kill<'a> {
    pub(crate) folder: &'a Path,
    pub(crate) round: u64,
    pub(crate) seed: u64,
    pub(crate) level: &'a str,
    pub(crate) environment: Vec<(&'a str, &'a Path)>,
}

impl Kill<'_> {
    /// Starts the process, hears what it says, and kills it at a random moment.
    pub(crate) fn run(&self, said: &mut Said) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process_that_is_killed", "--nocapture", "--test-threads=1"])
            .env(FOLDER, self.folder)
            .env(ROUND, self.round.to_string())
            .env(SEED, self.seed.to_string())
            .env(LEVEL, self.level)
            .envs(self.environment.iter().copied())
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
}

impl Said {
    /// How much was acknowledged, over all lives.
    pub(crate) fn acknowledged(&self) -> usize {
        self.acknowledged.iter().map(BTreeSet::len).sum()
    }

    /// Forgets what was only said to a process: at this level a loss of power may undo it.
    fn forget(&mut self, queue: usize, tail: u64, waiting: &BTreeMap<u64, Id>, level: &str) {
        self.delivered[queue]
            .retain(|offset, id| *offset < tail && waiting.get(offset).is_none_or(|at| at == id));
        if level == "os" {
            self.durable[queue].clear();
            let delivered: BTreeSet<Id> = self.delivered[queue].values().copied().collect();
            let waiting: BTreeSet<Id> = waiting.values().copied().collect();
            self.acknowledged[queue].retain(|id| delivered.contains(id) || waiting.contains(id));
        }
    }
}

pub(crate) fn open(folder: &Path, level: &str) -> Store {
    Store::open(options(folder, durability(level))).unwrap()
}

/// Holds the store against what was said of it. `power` is the level, if more than the process has died.
pub(crate) async fn inspect(store: Store, said: &mut Said, power: Option<&str>) {
    let weak = power.filter(|level| *level != "sync");
    // Among other things: what has left a queue for the dead letters is there.
    assert_eq!(store.hub_ledger().gap(), 0);
    let all = ReadLimit { count: usize::MAX, bytes: usize::MAX };
    let letters = store.dead_letters().list(None, all, None).await.unwrap();
    assert_eq!(letters.len() as u64, store.hub_ledger().dead_letters().queued());
    for (index, name) in QUEUES.iter().enumerate() {
        let queue = store.queue(name).unwrap();
        assert_eq!(queue.id().get() as usize, index);
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
        let ledger = queue.ledger();
        assert_eq!((ledger.gap(), ledger.queued()), (0, waiting.len() as u64));
        if let Some(level) = weak {
            said.forget(index, ledger.accepted(), &waiting, level);
        }
        for letter in letters.iter().filter(|letter| letter.queue == queue.id()) {
            let offset = letter.offset.get();
            assert!(!waiting.contains_key(&offset), "{offset} is in two places");
            // What was said of it may have been undone, and forgotten.
            let was = said.delivered[index].get(&offset);
            assert!(was == Some(&id_of(&letter.bytes)) || weak.is_some(), "{offset} was never handed out");
        }
        assert!(ledger.delivered() <= said.delivered[index].len() as u64);
        for offset in &said.durable[index] {
            assert!(!waiting.contains_key(offset), "{offset} was settled for good, and waits");
        }
        let mut seen = said.delivered[index].clone();
        for (offset, id) in waiting {
            assert_eq!(*seen.entry(offset).or_insert(id), id, "offset {offset} was used twice");
        }
        let counted = seen.len() as u64 + ledger.dropped_total();
        if weak.is_none() {
            assert_eq!(counted, ledger.accepted(), "an entry was settled without being delivered");
        }
        assert!(counted >= ledger.accepted(), "an entry was settled without being delivered");
        assert!(ledger.dropped_total() == 0 || !store.damage().is_empty() || power.is_some());
        let ids: BTreeSet<Id> = seen.values().copied().collect();
        assert_eq!(ids.len(), seen.len(), "a record is there twice");
        let lost: Vec<&Id> = said.acknowledged[index].difference(&ids).collect();
        assert!(lost.is_empty(), "{name}: acknowledged and lost: {lost:?}");
        let mut last: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for (offset, (round, task, number)) in seen {
            if let Some(before) = last.insert((round, task), number) {
                assert!(before < number, "{name}: order of {round}/{task} broken at offset {offset}");
            }
        }
    }
    store.close();
}
