//! Appending to the store: requests of many connections in, commits out, what is delivered settled.

use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use edgehub_storage::{
    AppendRequest, Durability, Outcome, Overflow, Queue, ReadLimit, Record, Settlement, Store, StoreOptions,
    Target, Ttl,
};

/// Records of one request: what one read of a socket brings.
const RECORDS: u64 = 32;
/// Requests that are under way at the same time: as many connections that publish.
const REQUESTS: u64 = 16;
const BODY_BYTES: usize = 256;

async fn append(store: &Store, queues: &[Queue], turns: u64) -> Duration {
    let body = Bytes::from(vec![b'x'; BODY_BYTES]);
    let begin = Instant::now();
    for _ in 0..turns {
        let mut commits = Vec::new();
        for _ in 0..REQUESTS {
            let record = || Record {
                bytes: body.clone(),
                targets: queues
                    .iter()
                    .map(|queue| Target {
                        queue: queue.id(),
                        ttl: Ttl::Infinite,
                        overflow: Overflow::RejectNew,
                    })
                    .collect(),
            };
            let records = (0..RECORDS).map(|_| record()).collect();
            commits
                .push(store.submit(AppendRequest { records, unrouted: 0 }).await.expect("the store is open"));
        }
        for commit in commits {
            commit.await.expect("the disk takes it");
        }
        for queue in queues {
            settle_all(queue).await;
        }
    }
    begin.elapsed()
}

async fn settle_all(queue: &Queue) {
    let mut next = queue.checkpoint();
    while next < queue.tail() {
        let limit = ReadLimit { count: 1024, bytes: 1 << 20 };
        let batch = queue.read(next, limit).await.expect("the store is open");
        let settled: Vec<_> = batch
            .entries
            .iter()
            .map(|entry| Settlement { offset: entry.offset, outcome: Outcome::Delivered })
            .collect();
        queue.settle(&settled);
        next = batch.next;
    }
}

fn bench(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let mut group = criterion.benchmark_group("append");
    group.throughput(Throughput::Elements(RECORDS * REQUESTS));
    for (name, durability, queues) in [
        ("memory, 1 queue", None, 1),
        ("os, 1 queue", Some(Durability::Os), 1),
        ("os, 4 queues", Some(Durability::Os), 4),
        ("sync, 1 queue", Some(Durability::Sync), 1),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let options = match durability {
            None => StoreOptions::memory(),
            Some(durability) => StoreOptions { durability, ..StoreOptions::disk(folder.path()) },
        };
        let store = Store::open(options).expect("an empty folder");
        let queues: Vec<_> =
            (0..queues).map(|n| store.queue(&format!("q{n}")).expect("room for it")).collect();
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|turns| runtime.block_on(append(&store, &queues, turns)));
        });
        assert_eq!(store.hub_ledger().gap(), 0);
        store.close();
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
