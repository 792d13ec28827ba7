//! Random operations against a plain model, on disk and in memory, with restarts and crashes in between.
//!
//! The seed is printed; `EDGEHUB_STORAGE_SEED=<number>` replays one case, `EDGEHUB_MODEL_CASES=<number>` runs that
//! many instead of a few.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use edgehub_storage::clock::{ManualTimeSource, WALL_PLAUSIBLE_MIN_MS};
use edgehub_storage::{
    AppendRequest, BatchEnd, DeadLetter, DeadLetterReason, DropReason, Durability, Entry, Offset, Outcome,
    Overflow, Queue, ReadLimit, Record, Settlement, Store, StoreError, StoreLimits, StoreOptions, StoreTime,
    Table, Target, Ttl,
};
use fastrand::Rng;

const QUEUES: usize = 4;
const OPERATIONS: usize = 300;
/// What is run without a wish; each takes a fraction of a second.
const CASES: u64 = 24;
const ALL: ReadLimit = ReadLimit { count: usize::MAX, bytes: usize::MAX };

/// What became of an entry, as the model sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Settled(Outcome),
    DeadLettered,
}

#[derive(Debug, Clone)]
struct ModelEntry {
    bytes: Bytes,
    ttl: Ttl,
    accepted_at: StoreTime,
    fate: Option<Fate>,
}

/// A dead letter, and what became of it.
#[derive(Debug, Clone)]
struct ModelLetter {
    queue: usize,
    offset: u64,
    entry: ModelEntry,
    outcome: Option<Outcome>,
}

#[derive(Default, Clone)]
struct Model {
    queues: [Vec<ModelEntry>; QUEUES],
    letters: Vec<ModelLetter>,
    records: u64,
    unrouted: u64,
    refused: u64,
    keyed: BTreeMap<Vec<u8>, Bytes>,
}

impl ModelEntry {
    fn is_expired(&self, now: StoreTime) -> bool {
        match self.ttl {
            Ttl::Infinite => false,
            Ttl::Millis(millis) => now.as_millis() - self.accepted_at.as_millis() >= millis,
        }
    }
}

struct Run {
    rng: Rng,
    time: Arc<ManualTimeSource>,
    options: StoreOptions,
    folder: tempfile::TempDir,
    disk: bool,
    store: Store,
    queues: Vec<Queue>,
    model: Model,
}

impl Run {
    fn new(seed: u64, disk: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let time = Arc::new(ManualTimeSource::new(WALL_PLAUSIBLE_MIN_MS + 1));
        let folder = tempfile::tempdir().unwrap();
        let base = if disk { StoreOptions::disk(folder.path()) } else { StoreOptions::memory() };
        let options = StoreOptions {
            durability: *rng.choice(&[Durability::Sync, Durability::Os, Durability::Os]).unwrap(),
            ring_bytes_max: *rng.choice(&[0, 5_000, 500_000, 50_000_000]).unwrap(),
            write_buffer_bytes: 4 << 20,
            limits: Self::limits(&mut rng),
            time: time.clone(),
            ..base
        };
        let (store, queues) = Self::open(&options);
        Self { rng, time, options, folder, disk, store, queues, model: Model::default() }
    }

    fn limits(rng: &mut Rng) -> StoreLimits {
        StoreLimits {
            max_bytes: *rng.choice(&[None, Some(2 << 20), Some(400_000)]).unwrap(),
            free_floor_bytes: 0,
            dead_letters_max_bytes: *rng.choice(&[0, 20_000, 200_000, 64 << 20]).unwrap(),
        }
    }

    fn open(options: &StoreOptions) -> (Store, Vec<Queue>) {
        let store = Store::open(options.clone()).unwrap();
        let queues = (0..QUEUES).map(|index| store.queue(&format!("queue {index}")).unwrap()).collect();
        (store, queues)
    }

    /// A request, and the model as it is when the request is accepted.
    fn request(&mut self, records: usize, overflow: Overflow) -> (AppendRequest, Model) {
        let mut model = self.model.clone();
        let rng = &mut self.rng;
        let mut request = AppendRequest { records: Vec::new(), unrouted: rng.u64(0..2) };
        model.unrouted += request.unrouted;
        let bulk = records > 100;
        let bulk_targets = rng.usize(1..3);
        let now = self.store.now();
        for _ in 0..records {
            let length = if bulk { 3 } else { *rng.choice(&[0, 1, 100, 300, 5_000]).unwrap() };
            let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(length).collect();
            let mut record = Record { bytes: bytes.into(), targets: Default::default() };
            let mut indices: Vec<usize> = (0..QUEUES).collect();
            rng.shuffle(&mut indices);
            let count = if bulk { bulk_targets } else { *rng.choice(&[0, 1, 1, 1, 2, 3]).unwrap() };
            for index in &indices[..count] {
                let ttl = match rng.u8(0..3) {
                    0 => Ttl::Infinite,
                    1 => Ttl::Millis(rng.u64(0..2_000)),
                    _ => Ttl::Millis(rng.u64(0..40_000)),
                };
                record.targets.push(Target { queue: self.queues[*index].id(), ttl, overflow });
                let entry = ModelEntry { bytes: record.bytes.clone(), ttl, accepted_at: now, fate: None };
                model.queues[*index].push(entry);
            }
            if record.targets.is_empty() {
                model.unrouted += 1;
            } else {
                model.records += 1;
            }
            request.records.push(record);
        }
        (request, model)
    }

    async fn append(&mut self) {
        for _ in 0..self.rng.usize(1..6) {
            let records = if self.rng.u8(0..120) == 0 { 3_000 } else { self.rng.usize(0..6) };
            let policies = [Overflow::RejectNew, Overflow::DropOldest, Overflow::DeadLetter];
            let overflow = *self.rng.choice(&policies).unwrap();
            let (request, accepted) = self.request(records, overflow);
            let answer = self.store.submit(request).await.unwrap().await;
            match answer {
                Ok(()) => self.model = accepted,
                Err(StoreError::Full { .. }) => self.model.refused += 1,
                Err(error) => panic!("{error}"),
            }
            self.learn_overflow(overflow).await;
            assert_eq!(self.store.hub_ledger().gap(), 0);
        }
    }

    /// Which entries made room is the store's choice; that they are the oldest ones is checked.
    async fn learn_overflow(&mut self, overflow: Overflow) {
        let mut moved = Vec::new();
        for index in 0..QUEUES {
            let ledger = self.queues[index].ledger();
            let model = &self.model.queues[index];
            let count = |fate| model.iter().filter(|entry| entry.fate == Some(fate)).count() as u64;
            let dropped = Fate::Settled(Outcome::Dropped(DropReason::Overflow));
            let (fresh_drops, fresh_letters) = (
                ledger.dropped(DropReason::Overflow) - count(dropped),
                ledger.dead_lettered() - count(Fate::DeadLettered),
            );
            if fresh_drops + fresh_letters == 0 {
                continue;
            }
            assert_ne!(overflow, Overflow::RejectNew, "a queue made room that must not");
            assert!(fresh_letters == 0 || overflow == Overflow::DeadLetter);
            let one = ReadLimit { count: 1, bytes: 1 };
            let waiting = self.queues[index].peek(Offset::ZERO, one).await.unwrap();
            let first = waiting.entries.first().map_or(self.queues[index].tail(), |entry| entry.offset).get();
            let (mut drops, mut letters, now) = (fresh_drops, fresh_letters, self.store.now());
            // Of entries that had expired by then it does not matter which were dropped.
            for also_expired in [false, true] {
                for (offset, entry) in self.model.queues[index].iter_mut().enumerate() {
                    if offset as u64 >= first || entry.fate.is_some() || entry.is_expired(now) != also_expired
                    {
                        continue;
                    }
                    if letters > 0 {
                        letters -= 1;
                        entry.fate = Some(Fate::DeadLettered);
                        moved.push((index, offset as u64, entry.clone()));
                    } else if drops > 0 {
                        drops -= 1;
                        entry.fate = Some(dropped);
                    } else {
                        assert!(also_expired, "{offset} is gone without a count");
                    }
                }
            }
            assert_eq!((drops, letters), (0, 0), "others than the oldest made room");
        }
        self.add_letters(moved).await;
    }

    /// The store has these letters now, in an order of its own; and it may have dropped its oldest ones.
    async fn add_letters(&mut self, mut moved: Vec<(usize, u64, ModelEntry)>) {
        let listed = self.store.dead_letters().list(None, ALL, None).await.unwrap();
        let tail = self.store.dead_letters().ledger().accepted() as usize;
        assert_eq!(tail, self.model.letters.len() + moved.len());
        let here: BTreeMap<u64, _> = listed.iter().map(|letter| (letter.id.get(), letter)).collect();
        for id in self.model.letters.len()..tail {
            let is = |letter: &DeadLetter, (index, offset, _): &(usize, u64, ModelEntry)| {
                self.queues[*index].id() == letter.queue && *offset == letter.offset.get()
            };
            let position = match here.get(&(id as u64)) {
                Some(letter) => moved.iter().position(|one| is(letter, one)),
                // Dropped at once: any that is not here.
                None => moved.iter().position(|one| !listed.iter().any(|letter| is(letter, one))),
            };
            let position = position.expect("a dead letter that nobody moved there");
            let (queue, offset, entry) = moved.remove(position);
            self.model.letters.push(ModelLetter { queue, offset, entry, outcome: None });
        }
        self.learn_letters(&here);
    }

    fn learn_letters(&mut self, here: &BTreeMap<u64, &DeadLetter>) {
        let mut live_before = false;
        for (id, letter) in self.model.letters.iter_mut().enumerate() {
            match here.get(&(id as u64)) {
                Some(found) => {
                    live_before = true;
                    assert_eq!(letter.outcome, None, "letter {id} came back");
                    assert_eq!((&found.bytes, found.ttl), (&letter.entry.bytes, letter.entry.ttl));
                    assert_eq!(found.accepted_at, letter.entry.accepted_at);
                    let queue = self.queues[letter.queue].id();
                    assert_eq!((found.queue, found.offset.get()), (queue, letter.offset));
                }
                None if letter.outcome.is_none() => {
                    assert!(!live_before, "letter {id} went before older ones");
                    letter.outcome = Some(Outcome::Dropped(DropReason::Overflow));
                }
                None => {}
            }
        }
    }

    async fn read(&mut self) {
        let index = self.rng.usize(..QUEUES);
        let queue = self.queues[index].clone();
        let tail = self.model.queues[index].len() as u64;
        let from = if self.rng.bool() { queue.checkpoint().get() } else { self.rng.u64(0..=tail) };
        let limit = ReadLimit {
            count: *self.rng.choice(&[1, 2, 10, 1_000, 100_000]).unwrap(),
            bytes: *self.rng.choice(&[1, 1_000, 100_000, 1 << 30]).unwrap(),
        };
        let peek = self.rng.u8(0..4) == 0;
        let before = queue.ledger();
        let batch = if peek {
            let batch = queue.peek(Offset::new(from), limit).await.unwrap();
            assert_eq!(queue.ledger().delivered(), before.delivered());
            batch
        } else {
            queue.read(Offset::new(from), limit).await.unwrap()
        };
        let now = self.store.now();
        let model = &mut self.model.queues[index];
        let next = batch.next.get();
        assert!(batch.entries.len() <= limit.count && next <= tail.max(from));
        let bytes: usize = batch.entries.iter().map(|entry| entry.bytes.len()).sum();
        assert!(bytes <= limit.bytes || batch.entries.len() == 1);
        let mut entries = batch.entries.iter();
        let mut expired = 0;
        let mut expected: Option<&Entry> = entries.next();
        for offset in from..next.max(from) {
            let modelled = &mut model[offset as usize];
            if expected.is_some_and(|entry| entry.offset.get() == offset) {
                let entry = expected.unwrap();
                assert_eq!(modelled.fate, None);
                assert!(peek || !modelled.is_expired(now));
                assert_eq!((&entry.bytes, entry.ttl), (&modelled.bytes, modelled.ttl));
                assert_eq!(entry.accepted_at, modelled.accepted_at);
                expected = entries.next();
            } else if modelled.fate.is_none() {
                assert!(modelled.is_expired(now), "entry {offset} of queue {index} was passed over");
                modelled.fate = Some(Fate::Settled(Outcome::Expired));
                expired += 1;
            }
        }
        assert!(expected.is_none(), "entries out of order or outside of the batch");
        // The keeper may have settled some before.
        assert!(batch.expired <= expired);
        match batch.end {
            BatchEnd::Tail => assert_eq!(next, tail.max(from)),
            BatchEnd::More => assert!(!batch.entries.is_empty()),
            BatchEnd::Window => panic!("the window is larger than all queues of this test"),
        }
    }

    async fn settle(&mut self) {
        let index = self.rng.usize(..QUEUES);
        self.expire_one(index).await;
        let queue = &self.queues[index];
        let (from, tail) = (queue.checkpoint().get(), queue.tail().get());
        if from == tail {
            return;
        }
        let outcomes = [
            Outcome::Delivered,
            Outcome::Delivered,
            Outcome::Delivered,
            Outcome::Dropped(DropReason::Conversion),
            Outcome::Dropped(DropReason::Purged),
        ];
        let outcome = *self.rng.choice(&outcomes).unwrap();
        let offsets: Vec<u64> = match self.rng.u8(0..10) {
            0..5 => (from..tail.min(from + self.rng.u64(1..300))).collect(),
            5 => (from..tail).collect(),
            6 => (from..tail).filter(|_| self.rng.u8(0..3) > 0).collect(),
            _ => (0..self.rng.usize(1..20)).map(|_| self.rng.u64(from..tail)).collect(),
        };
        let settlements: Vec<Settlement> =
            offsets.iter().map(|offset| Settlement { offset: Offset::new(*offset), outcome }).collect();
        queue.settle(&settlements);
        for offset in offsets {
            self.model.queues[index][offset as usize].fate.get_or_insert(Fate::Settled(outcome));
        }
    }

    async fn dead_letter(&mut self) {
        let index = self.rng.usize(..QUEUES);
        let queue = self.queues[index].clone();
        let count = self.rng.usize(1..30);
        let batch = queue.read(queue.checkpoint(), ReadLimit { count, bytes: 1 << 20 }).await.unwrap();
        self.expire_one(index).await;
        let mut moved = Vec::new();
        for entry in batch.entries {
            if self.rng.bool() {
                continue;
            }
            let before = queue.ledger();
            let reason = DeadLetterReason::ALL[self.rng.usize(..5)];
            assert!(queue.dead_letter(&entry, reason, 7));
            let ledger = queue.ledger();
            let modelled = &mut self.model.queues[index][entry.offset.get() as usize];
            assert_eq!(modelled.fate, None);
            if ledger.dead_lettered() > before.dead_lettered() {
                modelled.fate = Some(Fate::DeadLettered);
                moved.push((index, entry.offset.get(), modelled.clone()));
            } else {
                let dropped = reason.as_drop();
                assert_eq!(ledger.dropped(dropped), before.dropped(dropped) + 1);
                modelled.fate = Some(Fate::Settled(Outcome::Dropped(dropped)));
            }
        }
        self.store.flush().await.unwrap();
        self.add_letters(moved).await;
    }

    async fn letters(&mut self) {
        let count = self.model.letters.len() as u64;
        let ids: Vec<Offset> =
            (0..self.rng.usize(1..8)).map(|_| Offset::new(self.rng.u64(0..=count))).collect();
        let redrive = self.rng.bool();
        let now = self.store.now();
        let answer = match redrive {
            true => self.store.dead_letters().redrive(&ids).await,
            false => self.store.dead_letters().discard(&ids).await,
        };
        let done = match answer {
            Ok(done) => done,
            Err(error) => {
                assert!(redrive && matches!(error, StoreError::Full { .. }), "{error}");
                return;
            }
        };
        let mut found = 0;
        for id in ids {
            let Some(letter) = self.model.letters.get_mut(id.get() as usize) else { continue };
            if letter.outcome.is_some() {
                continue;
            }
            found += 1;
            if redrive {
                letter.outcome = Some(Outcome::Delivered);
                let entry = ModelEntry { accepted_at: now, fate: None, ..letter.entry.clone() };
                self.model.queues[letter.queue].push(entry);
            } else {
                letter.outcome = Some(Outcome::Dropped(DropReason::Purged));
            }
        }
        assert_eq!(done, found);
    }

    async fn purge(&mut self) {
        let index = self.rng.usize(..QUEUES);
        self.expire_one(index).await;
        let upto = self.rng.u64(0..=self.model.queues[index].len() as u64 + 1);
        let mut purged = 0;
        for entry in self.model.queues[index].iter_mut().take(upto as usize) {
            if entry.fate.is_none() {
                entry.fate = Some(Fate::Settled(Outcome::Dropped(DropReason::Purged)));
                purged += 1;
            }
        }
        assert_eq!(self.queues[index].purge(Offset::new(upto)), purged);
    }

    async fn set_limits(&mut self) {
        let limits = Self::limits(&mut self.rng);
        self.options.limits = limits;
        self.store.set_limits(limits);
        self.store.flush().await.unwrap();
        self.add_letters(Vec::new()).await;
    }

    async fn keyed(&mut self) {
        let table = self.store.keyed(Table::Identities);
        let key = vec![self.rng.u8(0..12); self.rng.usize(0..3)];
        match self.rng.u8(0..4) {
            0 => {
                table.delete(&key).await.unwrap();
                self.model.keyed.remove(&key);
            }
            1 => assert_eq!(table.get(&key).await.unwrap().as_ref(), self.model.keyed.get(&key)),
            2 => {
                let value = Bytes::from(vec![self.rng.u8(..); self.rng.usize(0..50)]);
                table.put(&key, value.clone()).await.unwrap();
                self.model.keyed.insert(key, value);
            }
            _ => {
                let rows = table.all().await.unwrap();
                let rows: Vec<(Vec<u8>, Bytes)> =
                    rows.into_iter().map(|(key, value)| (key.to_vec(), value)).collect();
                assert_eq!(rows, self.model.keyed.clone().into_iter().collect::<Vec<_>>());
            }
        }
    }

    async fn reopen(&mut self) {
        match self.rng.u8(0..3) {
            0 => self.store.clone().close(),
            // A crash: what the files hold at this moment is all that is left.
            1 if self.disk => {
                self.store.flush().await.unwrap();
                self.folder = copy_folder(self.folder.path());
                let limits = self.options.limits;
                let base = StoreOptions::disk(self.folder.path());
                self.options = StoreOptions { backend: base.backend, limits, ..self.options.clone() };
            }
            _ => {}
        }
        // The last clone closes a store that was not closed; queues do not hold it open.
        self.store = Store::open(StoreOptions::memory()).unwrap();
        if self.rng.bool() {
            self.time.advance(self.rng.u64(0..500));
        }
        (self.store, self.queues) = Self::open(&self.options);
        if !self.disk {
            self.model = Model::default();
        }
        self.check().await;
    }

    /// Reads a queue through, so that all of it that has expired is settled.
    async fn expire_one(&mut self, index: usize) {
        let (queue, model) = (&self.queues[index], &mut self.model.queues[index]);
        let (mut next, now) = (Offset::ZERO, self.store.now());
        while next < queue.tail() {
            let limit = ReadLimit { count: 100_000, bytes: usize::MAX };
            next = queue.read(next, limit).await.unwrap().next;
        }
        for entry in model.iter_mut().filter(|entry| entry.fate.is_none() && entry.is_expired(now)) {
            entry.fate = Some(Fate::Settled(Outcome::Expired));
        }
    }

    async fn check(&mut self) {
        for index in 0..QUEUES {
            self.expire_one(index).await;
        }
        for (queue, model) in self.queues.iter().zip(&self.model.queues) {
            let ledger = queue.ledger();
            let count = |fate| model.iter().filter(|entry| entry.fate == fate).count() as u64;
            let settled = |outcome| count(Some(Fate::Settled(outcome)));
            assert_eq!(ledger.accepted(), model.len() as u64);
            assert_eq!(ledger.delivered(), settled(Outcome::Delivered));
            assert_eq!(ledger.expired(), settled(Outcome::Expired));
            assert_eq!(ledger.dead_lettered(), count(Some(Fate::DeadLettered)));
            for reason in DropReason::ALL {
                assert_eq!(ledger.dropped(reason), settled(Outcome::Dropped(reason)), "{reason:?}");
            }
            assert_eq!((ledger.queued(), ledger.gap()), (count(None), 0));
            let first = model.iter().position(|entry| entry.fate.is_none());
            assert_eq!(queue.checkpoint().get(), first.unwrap_or(model.len()) as u64);
            assert_eq!(queue.tail().get(), model.len() as u64);
            let oldest = first.map(|first| model[first].accepted_at);
            assert_eq!(queue.oldest_accepted_at().await.unwrap(), oldest);
        }
        self.add_letters(Vec::new()).await;
        let hub = self.store.hub_ledger();
        let letters = |outcome| {
            self.model.letters.iter().filter(|letter| letter.outcome == Some(outcome)).count() as u64
        };
        let ledger = hub.dead_letters();
        assert_eq!(ledger.accepted(), self.model.letters.len() as u64);
        assert_eq!(ledger.delivered(), letters(Outcome::Delivered));
        for reason in [DropReason::Purged, DropReason::Overflow] {
            assert_eq!(ledger.dropped(reason), letters(Outcome::Dropped(reason)));
        }
        assert_eq!((hub.records(), hub.unrouted(), hub.gap()), (self.model.records, self.model.unrouted, 0));
        assert!(self.store.sizes().ring_bytes <= self.options.ring_bytes_max as u64);
    }

    async fn run(&mut self) {
        for _ in 0..OPERATIONS {
            match self.rng.u8(0..100) {
                0..30 => self.append().await,
                30..50 => self.read().await,
                50..65 => self.settle().await,
                65..72 => self.dead_letter().await,
                72..76 => self.letters().await,
                76..79 => self.purge().await,
                79..81 => self.set_limits().await,
                81..87 => self.keyed().await,
                87..93 => self.time.advance(self.rng.u64(0..1_500)),
                93 => self.time.jump_wall(self.rng.i64(0..1_000_000_000)),
                94..96 => self.reopen().await,
                _ => self.check().await,
            }
            assert_eq!(self.store.hub_ledger().queues().gap(), 0);
        }
        self.check().await;
        for queue in &self.queues {
            let mut next = queue.checkpoint();
            while next < queue.tail() {
                let batch = queue.read(next, ReadLimit { count: 500, bytes: 1 << 20 }).await.unwrap();
                let settled =
                    |entry: &Entry| Settlement { offset: entry.offset, outcome: Outcome::Delivered };
                queue.settle(&batch.entries.iter().map(settled).collect::<Vec<_>>());
                next = batch.next;
            }
            assert_eq!((queue.ledger().queued(), queue.ledger().gap()), (0, 0));
        }
    }
}

/// The files of a folder, with their lengths.
fn files(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(data) if data.is_dir() => found.extend(files(&entry.path())),
            Ok(data) => drop(found.insert(entry.path(), data.len())),
            Err(_) => {}
        }
    }
    found
}

/// Copies what the files hold at one moment: again, if they changed meanwhile, as a compaction does.
fn copy_folder(from: &Path) -> tempfile::TempDir {
    loop {
        let copy = tempfile::tempdir().unwrap();
        let before = files(from);
        let copied = before.keys().all(|path| {
            let target = copy.path().join(path.strip_prefix(from).unwrap());
            std::fs::create_dir_all(target.parent().unwrap()).unwrap();
            std::fs::copy(path, target).is_ok()
        });
        if copied && files(from) == before {
            return copy;
        }
    }
}

#[test]
fn agrees_with_the_model() {
    let number = |name| std::env::var(name).ok().and_then(|number| number.parse::<u64>().ok());
    let given = number("EDGEHUB_STORAGE_SEED");
    let cases = if given.is_some() { 2 } else { number("EDGEHUB_MODEL_CASES").unwrap_or(CASES) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut refused, mut letters) = (0, 0);
    for case in 0..cases {
        let seed = given.unwrap_or_else(|| fastrand::u64(..));
        let disk = case % 4 == 0;
        println!("EDGEHUB_STORAGE_SEED={seed} (disk: {disk})");
        let mut run = Run::new(seed, disk);
        runtime.block_on(run.run());
        refused += run.model.refused;
        letters += run.model.letters.len();
        let Run { store, folder, .. } = run;
        store.close();
        drop(folder);
    }
    println!("{refused} requests refused, {letters} dead letters in {cases} cases");
}
