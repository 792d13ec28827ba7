//! Random operations against a plain model, with restarts in between.
//!
//! The seed is printed; `EDGEHUB_STORAGE_SEED=<number>` replays one.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use edgehub_storage::clock::{ManualTimeSource, WALL_PLAUSIBLE_MIN_MS};
use edgehub_storage::{
    AppendRequest, BatchEnd, DropReason, Durability, Entry, Offset, Outcome, Overflow, Queue, ReadLimit,
    Record, Settlement, Store, StoreOptions, StoreTime, Table, Target, Ttl,
};
use fastrand::Rng;

const QUEUES: usize = 4;

#[derive(Clone)]
struct ModelEntry {
    bytes: Bytes,
    ttl: Ttl,
    accepted_at: StoreTime,
    outcome: Option<Outcome>,
}

#[derive(Default)]
struct Model {
    queues: [Vec<ModelEntry>; QUEUES],
    records: u64,
    unrouted: u64,
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
            time: time.clone(),
            ..base
        };
        let (store, queues) = Self::open(&options);
        Self { rng, time, options, folder, disk, store, queues, model: Model::default() }
    }

    fn open(options: &StoreOptions) -> (Store, Vec<Queue>) {
        let store = Store::open(options.clone()).unwrap();
        let queues = (0..QUEUES).map(|index| store.queue(&format!("queue {index}")).unwrap()).collect();
        (store, queues)
    }

    fn request(&mut self, records: usize) -> AppendRequest {
        let rng = &mut self.rng;
        let mut request = AppendRequest { records: Vec::new(), unrouted: rng.u64(0..2) };
        self.model.unrouted += request.unrouted;
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
                record.targets.push(Target {
                    queue: self.queues[*index].id(),
                    ttl,
                    overflow: Overflow::RejectNew,
                });
                let entry = ModelEntry { bytes: record.bytes.clone(), ttl, accepted_at: now, outcome: None };
                self.model.queues[*index].push(entry);
            }
            if record.targets.is_empty() {
                self.model.unrouted += 1;
            } else {
                self.model.records += 1;
            }
            request.records.push(record);
        }
        request
    }

    async fn append(&mut self) {
        let mut commits = Vec::new();
        for _ in 0..self.rng.usize(1..6) {
            let records = if self.rng.u8(0..80) == 0 { 3_000 } else { self.rng.usize(0..6) };
            let request = self.request(records);
            commits.push(self.store.submit(request).await.unwrap());
        }
        for commit in commits {
            commit.await.unwrap();
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
        let batch = queue.read(Offset::new(from), limit).await.unwrap();
        let now = self.store.now();
        let model = &mut self.model.queues[index];
        let next = batch.next.get();
        assert!(batch.entries.len() <= limit.count && next <= tail);
        let bytes: usize = batch.entries.iter().map(|entry| entry.bytes.len()).sum();
        assert!(bytes <= limit.bytes || batch.entries.len() == 1);
        let mut entries = batch.entries.iter();
        let mut expired = 0;
        let mut expected: Option<&Entry> = entries.next();
        for offset in from..next.max(from) {
            let modelled = &mut model[offset as usize];
            if expected.is_some_and(|entry| entry.offset.get() == offset) {
                let entry = expected.unwrap();
                assert_eq!((modelled.outcome, modelled.is_expired(now)), (None, false));
                assert_eq!((&entry.bytes, entry.ttl), (&modelled.bytes, modelled.ttl));
                assert_eq!(entry.accepted_at, modelled.accepted_at);
                expected = entries.next();
            } else if modelled.outcome.is_none() {
                assert!(modelled.is_expired(now), "entry {offset} of queue {index} was passed over");
                modelled.outcome = Some(Outcome::Expired);
                expired += 1;
            }
        }
        assert!(expected.is_none(), "entries out of order or outside of the batch");
        // The keeper may have settled some before.
        assert!(batch.expired <= expired);
        match batch.end {
            BatchEnd::Tail => assert_eq!(next, tail),
            BatchEnd::More => assert!(!batch.entries.is_empty()),
            BatchEnd::Window => panic!("the window is larger than all queues of this test"),
        }
    }

    async fn settle(&mut self) {
        // Which of expired entries the keeper has settled is not known.
        self.expire().await;
        let index = self.rng.usize(..QUEUES);
        let queue = &self.queues[index];
        let (from, tail) = (queue.checkpoint().get(), queue.tail().get());
        if from == tail {
            return;
        }
        let outcome = *self
            .rng
            .choice(&[
                Outcome::Delivered,
                Outcome::Delivered,
                Outcome::Dropped(DropReason::NoIdentity),
                Outcome::Dropped(DropReason::Conversion),
                Outcome::Dropped(DropReason::Purged),
            ])
            .unwrap();
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
            self.model.queues[index][offset as usize].outcome.get_or_insert(outcome);
        }
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
        if self.rng.bool() {
            self.store.clone().close();
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

    /// Reads all queues through, so that all that has expired is settled.
    async fn expire(&mut self) {
        for (queue, model) in self.queues.iter().zip(&mut self.model.queues) {
            let (mut next, now) = (Offset::ZERO, self.store.now());
            while next < queue.tail() {
                let limit = ReadLimit { count: 100_000, bytes: usize::MAX };
                next = queue.read(next, limit).await.unwrap().next;
            }
            for entry in model.iter_mut().filter(|entry| entry.outcome.is_none() && entry.is_expired(now)) {
                entry.outcome = Some(Outcome::Expired);
            }
        }
    }

    async fn check(&mut self) {
        self.expire().await;
        for (queue, model) in self.queues.iter().zip(&self.model.queues) {
            let ledger = queue.ledger();
            let count = |outcome| model.iter().filter(|entry| entry.outcome == outcome).count() as u64;
            assert_eq!(ledger.accepted(), model.len() as u64);
            assert_eq!(ledger.delivered(), count(Some(Outcome::Delivered)));
            assert_eq!(ledger.expired(), count(Some(Outcome::Expired)));
            assert_eq!(ledger.dead_lettered(), 0);
            for reason in DropReason::ALL {
                assert_eq!(ledger.dropped(reason), count(Some(Outcome::Dropped(reason))));
            }
            assert_eq!((ledger.queued(), ledger.gap()), (count(None), 0));
            let first = model.iter().position(|entry| entry.outcome.is_none());
            assert_eq!(queue.checkpoint().get(), first.unwrap_or(model.len()) as u64);
            assert_eq!(queue.tail().get(), model.len() as u64);
            let oldest = first.map(|first| model[first].accepted_at);
            assert_eq!(queue.oldest_accepted_at().await.unwrap(), oldest);
        }
        let hub = self.store.hub_ledger();
        assert_eq!((hub.records(), hub.unrouted(), hub.gap()), (self.model.records, self.model.unrouted, 0));
        assert!(self.store.sizes().ring_bytes <= self.options.ring_bytes_max as u64);
    }

    async fn run(&mut self, operations: usize) {
        for _ in 0..operations {
            match self.rng.u8(0..100) {
                0..30 => self.append().await,
                30..60 => self.read().await,
                60..80 => self.settle().await,
                80..90 => self.keyed().await,
                90..95 => self.time.advance(self.rng.u64(0..1_500)),
                95 => self.time.jump_wall(self.rng.i64(0..1_000_000_000)),
                96 => self.reopen().await,
                _ => self.check().await,
            }
        }
        self.check().await;
        for index in 0..QUEUES {
            let queue = self.queues[index].clone();
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

#[test]
fn agrees_with_the_model() {
    let given = std::env::var("EDGEHUB_STORAGE_SEED").ok().and_then(|seed| seed.parse().ok());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for round in 0..if given.is_some() { 2 } else { 8 } {
        let seed = given.unwrap_or_else(|| fastrand::u64(..));
        let disk = round % 2 == 0;
        println!("EDGEHUB_STORAGE_SEED={seed} (disk: {disk})");
        let mut run = Run::new(seed, disk);
        runtime.block_on(run.run(1_000));
        let Run { store, folder, .. } = run;
        store.close();
        drop(folder);
    }
}
