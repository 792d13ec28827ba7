//! Owns how names, counters, checkpoints and stretches are made anew out of the entries, so that every ledger adds
//! up again. What cannot be read is counted as dropped, with the reason `unreadable`.

use std::fmt::Write as _;

use bytes::Bytes;

use crate::audit::{Audit, QUEUE_IDS_END, QueueAudit};
use crate::clock::ClockRow;
use crate::damage::Lost;
use crate::engine::{Batch, Engine, EngineError, Family};
use crate::ledger::{DropReason, Outcome, Outcomes};
use crate::rows::{self, DEAD_LETTERS_QUEUE, HubRow, SettleRow};

/// What a rebuild has done.
#[derive(Debug, Default)]
pub(crate) struct Rebuilt {
    pub(crate) lost: Lost,
    /// What had to be made anew, one sentence each.
    pub(crate) notes: Vec<String>,
    /// The rows that were replaced, one line each: key and value in hexadecimal digits.
    pub(crate) replaced: String,
}

/// Makes the rows of `audit` fit each other, in one atomic write that is synced.
pub(crate) fn rebuild(engine: &Engine, audit: Audit) -> Result<Rebuilt, EngineError> {
    let mut rebuilt = Rebuilt::default();
    let mut batch = engine.batch(64 << 10);
    let orphans = audit.orphans();
    for (key, value) in &audit.unknown {
        rebuilt.keep(key, value);
        // A row of the queues that is not understood is never read; only those of the accounts are in the way.
        engine.delete(&mut batch, Family::Meta, key);
    }
    if !audit.unknown.is_empty() {
        rebuilt.notes.push(format!("{} rows are not understood", audit.unknown.len()));
    }
    let Audit { hub, clock, mut queues, bodies, newest, .. } = audit;
    // Ids have no hole. A queue beyond the highest id is the store's own: it has no name and no part in the counters.
    let own = queues.split_off(&QUEUE_IDS_END);
    let count = queues.keys().next_back().map_or(0, |last| last + 1);
    let mut segments_end = bodies.keys().next_back().map_or(0, |last| last + 1);
    let (mut accepted, mut redriven, mut letters) = (0, 0, 0);
    for (id, mut queue) in own {
        queue.name =
            Some(if id == DEAD_LETTERS_QUEUE { "dead letters".into() } else { format!("number {id}") });
        let (name, outcomes) = account(engine, &mut batch, id, &mut queue, &mut rebuilt);
        if id == DEAD_LETTERS_QUEUE {
            (redriven, letters) = (outcomes.delivered, queue.tail);
        }
        store(engine, &mut batch, id, &name, queue, outcomes, &mut rebuilt);
    }
    let mut accounts = Vec::new();
    for id in 0..count {
        let mut queue = queues.remove(&id).unwrap_or_default();
        accepted += queue.tail;
        let used = queue.built.iter().flat_map(|mark| &mark.segments).map(|(segment, _)| segment + 1).max();
        segments_end = segments_end.max(used.unwrap_or(0));
        let (name, outcomes) = account(engine, &mut batch, id, &mut queue, &mut rebuilt);
        accounts.push((name, queue, outcomes));
    }
    balance_letters(accounts.iter_mut().map(|(_, _, outcomes)| outcomes), letters, &mut rebuilt);
    for (id, (name, queue, outcomes)) in (0..).zip(accounts) {
        store(engine, &mut batch, id, &name, queue, outcomes, &mut rebuilt);
    }
    let mut row = hub.unwrap_or(HubRow { records: accepted, ..HubRow::default() });
    if hub.is_none() && accepted > 0 {
        rebuilt
            .notes
            .push("the counters of the store are gone; its records are counted as its entries".into());
    } else if row.references + redriven != accepted {
        let made = row.references + redriven;
        rebuilt.notes.push(format!("the store had counted {made} entries, its queues {accepted}"));
    }
    row.references = accepted.saturating_sub(redriven);
    row.next_segment = row.next_segment.max(segments_end);
    if hub != Some(row) {
        let value = encoded(|out| rows::encode_hub(&row, out));
        if let Some(before) = hub {
            rebuilt.keep(&rows::hub_key(), &encoded(|out| rows::encode_hub(&before, out)));
        }
        put(engine, &mut batch, &rows::hub_key(), &value);
    }
    if clock.is_none() && accepted > 0 {
        // The clock goes on no earlier than the newest entry.
        let store_ms = newest.as_millis();
        let row = ClockRow { store_ms, wall_ms: i64::try_from(store_ms).unwrap_or(i64::MAX), uptime: None };
        put(engine, &mut batch, &rows::clock_key(), &encoded(|out| rows::encode_clock(&row, out)));
        rebuilt.notes.push("the store's clock is gone; it goes on from the newest entry".into());
    }
    for segment in orphans {
        let (from, to) = (rows::segment_start(segment), rows::segment_start(segment + 1));
        engine.delete_range(&mut batch, Family::Log, &from, &to);
    }
    engine.write(batch, true)?;
    Ok(rebuilt)
}

/// The name of a queue, and its outcomes as they fit its entries.
fn account(
    engine: &Engine,
    batch: &mut Batch,
    id: u32,
    queue: &mut QueueAudit,
    rebuilt: &mut Rebuilt,
) -> (String, Outcomes) {
    let name = queue.name.take().unwrap_or_else(|| {
        let name = format!("recovered-queue-{id}");
        put(engine, batch, &rows::name_key(id), name.as_bytes());
        rebuilt.notes.push(format!("the name of queue {id} is gone; it is {name} now"));
        name
    });
    let mut outcomes = queue.outcomes();
    let settled = queue.cursor.prefix() + queue.cursor.beyond();
    balance(&name, &mut outcomes, settled, rebuilt);
    for range in std::mem::take(&mut queue.lost) {
        rebuilt.lost.add(&name, range.start, range.end - 1);
        // Those beyond the window are dropped and counted when they are read.
        let dropped = queue.cursor.settle_range(range.start, range.end);
        outcomes.count(Outcome::Dropped(DropReason::Unreadable), dropped);
    }
    (name, outcomes)
}

/// Puts the rows of a queue that were not as they are to be.
fn store(
    engine: &Engine,
    batch: &mut Batch,
    id: u32,
    name: &str,
    queue: QueueAudit,
    outcomes: Outcomes,
    rebuilt: &mut Rebuilt,
) {
    let are_stretches_sound = queue.are_stretches_sound();
    let QueueAudit { open, settle, marks, mut cursor, tail, built, .. } = queue;
    let row = SettleRow { prefix: cursor.prefix(), outcomes };
    if settle != Some(row) {
        if let Some(before) = settle {
            rebuilt.keep(&rows::settle_key(id), &encoded(|out| rows::encode_settle(&before, out)));
        }
        put(engine, batch, &rows::settle_key(id), &encoded(|out| rows::encode_settle(&row, out)));
    }
    let (pages, gone) = cursor.take_changes();
    for (page, bits) in pages {
        put(engine, batch, &rows::page_key(id, page), &encoded(|out| rows::encode_page(&bits, out)));
    }
    for page in gone {
        engine.delete(batch, Family::Meta, &rows::page_key(id, page));
    }
    if are_stretches_sound {
        return;
    }
    for mark in &marks {
        let key = rows::mark_key(id, mark.end);
        rebuilt.keep(&key, &encoded(|out| mark.encode(out)));
        engine.delete(batch, Family::Meta, &key);
    }
    if let Some(open) = &open {
        rebuilt.keep(&rows::append_key(id), &encoded(|out| open.encode(out)));
        if open.end != tail {
            rebuilt.notes.push(format!("the tail of queue {name} was {}; it is {tail} now", open.end));
        }
    } else if tail > 0 {
        rebuilt.notes.push(format!("the tail of queue {name} is gone; it is {tail} now"));
    }
    if let Some((open, closed)) = built.split_last() {
        for mark in closed {
            put(engine, batch, &rows::mark_key(id, mark.end), &encoded(|out| mark.encode(out)));
        }
        put(engine, batch, &rows::append_key(id), &encoded(|out| open.encode(out)));
    }
}

/// Lets the outcomes add up to what is settled. Nothing is called delivered that is not known to be.
fn balance(name: &str, outcomes: &mut Outcomes, settled: u64, rebuilt: &mut Rebuilt) {
    let total = outcomes.total();
    if total < settled {
        let unknown = settled - total;
        outcomes.count(Outcome::Dropped(DropReason::Unreadable), unknown);
        rebuilt.notes.push(format!(
            "what became of {unknown} settled entries of queue {name} is not known; they count as dropped, unreadable"
        ));
    }
    let mut excess = total.saturating_sub(settled);
    if excess > 0 {
        rebuilt.notes.push(format!(
            "{excess} entries of queue {name} had outcomes, but are not known to be settled; they are handed out again"
        ));
    }
    let Outcomes { delivered, expired, dead_lettered, dropped } = outcomes;
    for counter in [delivered, expired, dead_lettered].into_iter().chain(dropped) {
        let taken = excess.min(*counter);
        *counter -= taken;
        excess -= taken;
    }
}

/// Lets as many entries have moved to the dead letters as these have taken.
fn balance_letters<'a>(
    outcomes: impl Iterator<Item = &'a mut Outcomes>,
    letters: u64,
    rebuilt: &mut Rebuilt,
) {
    let outcomes: Vec<&mut Outcomes> = outcomes.collect();
    let moved: u64 = outcomes.iter().map(|outcomes| outcomes.dead_lettered).sum();
    if moved == letters {
        return;
    }
    rebuilt.notes.push(format!("{moved} entries had moved to the dead letters, which have taken {letters}"));
    let (mut missing, mut excess) = (letters.saturating_sub(moved), moved.saturating_sub(letters));
    for outcomes in outcomes {
        let unreadable = &mut outcomes.dropped[DropReason::Unreadable as usize];
        let found = missing.min(*unreadable);
        let lost = excess.min(outcomes.dead_lettered);
        *unreadable = *unreadable - found + lost;
        outcomes.dead_lettered = outcomes.dead_lettered + found - lost;
        (missing, excess) = (missing - found, excess - lost);
    }
}

impl Rebuilt {
    fn keep(&mut self, key: &[u8], value: &[u8]) {
        for byte in key {
            // Writing to a string does not fail.
            let _ = write!(self.replaced, "{byte:02x}");
        }
        self.replaced.push(' ');
        for byte in value {
            let _ = write!(self.replaced, "{byte:02x}");
        }
        self.replaced.push('\n');
    }
}

fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out);
    out
}

fn put(engine: &Engine, batch: &mut Batch, key: &[u8], value: &[u8]) {
    engine.put(batch, Family::Meta, key, value, &Bytes::new());
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use crate::engine::Visit;
    use crate::rows::MetaRow;
    use crate::*;

    use super::*;

    const ENTRIES: u64 = 30;

    /// Two queues with entries of their own and shared ones; some are settled, one out of order.
    async fn filled() -> Arc<Engine> {
        let engine = Arc::new(Engine::memory());
        let store = start(&engine);
        let queues = ["one", "two"].map(|name| store.queue(name).unwrap());
        let target = |queue: &Queue| Target {
            queue: queue.id(),
            ttl: Ttl::Millis(1 << 40),
            overflow: Overflow::RejectNew,
        };
        for _ in 0..ENTRIES / 2 {
            let alone = |queue: &Queue| Record {
                bytes: queue.name().to_owned().into(),
                targets: [target(queue)].into_iter().collect(),
            };
            let mut records: Vec<Record> = queues.iter().map(alone).collect();
            records.push(Record { bytes: "both".into(), targets: queues.iter().map(target).collect() });
            store.submit(AppendRequest { records, unrouted: 2 }).await.unwrap().await.unwrap();
        }
        let settle = |offset| Settlement { offset: Offset::new(offset), outcome: Outcome::Delivered };
        queues[0].settle(&(0..7).chain([12]).map(settle).collect::<Vec<_>>());
        store.flush().await.unwrap();
        store.close();
        engine
    }

    fn start(engine: &Arc<Engine>) -> Store {
        Store::start(PathBuf::new(), None, Arc::clone(engine), &StoreOptions::memory()).unwrap()
    }

    fn meta(engine: &Engine) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut rows = Vec::new();
        let scanned = engine.scan(Family::Meta, &[], None, &mut |key, value| {
            rows.push((key.to_vec(), value.whole().to_vec()));
            Visit::Next
        });
        scanned.map(|()| rows).unwrap()
    }

    async fn check(engine: &Arc<Engine>, what: &str) -> Store {
        let store = start(engine);
        assert_eq!(store.hub_ledger().gap(), 0, "{what}");
        for queue in store.queues() {
            let batch = queue.read(Offset::ZERO, ReadLimit { count: 1000, bytes: 1 << 20 }).await.unwrap();
            let ledger = queue.ledger();
            assert_eq!(
                (ledger.gap(), ledger.queued()),
                (0, batch.entries.len() as u64),
                "{what}: {ledger:?}"
            );
            assert_eq!((ledger.accepted(), batch.next.get()), (ENTRIES, ENTRIES), "{what}");
            assert!(ledger.delivered() <= 8, "{what}: {ledger:?}");
        }
        store
    }

    #[tokio::test]
    async fn any_row_of_the_accounts_may_be_gone_or_garbled() {
        let rows = meta(&*filled().await);
        assert!(rows.len() >= 8, "{}", rows.len());
        for (key, value) in rows {
            for garbled in [None, Some(vec![0xee; 3]), Some([&value[..], &[1]].concat())] {
                let what = format!("{:?} {garbled:02x?}", crate::rows::decode_meta(&key, &value));
                let engine = filled().await;
                let mut batch = engine.batch(64);
                match &garbled {
                    None => engine.delete(&mut batch, Family::Meta, &key),
                    Some(row) => put(&engine, &mut batch, &key, row),
                }
                engine.write(batch, false).unwrap();
                let before = audit(&engine);
                let store = check(&engine, &what).await;
                let name = matches!(crate::rows::decode_meta(&key, &value), Some(MetaRow::Name(..)));
                let clock = matches!(crate::rows::decode_meta(&key, &value), Some(MetaRow::Clock(_)));
                if name && garbled.as_ref().is_some_and(|row| row.len() > 3) {
                    assert!(store.queues().iter().any(|queue| queue.name().ends_with('\u{1}')));
                    continue;
                }
                assert!(clock && garbled.is_none() || before > 0, "{what}");
                store.close();
                // The rest is as it was, and a second look finds nothing.
                recovery::repair(&engine, Path::new("")).unwrap();
                assert_eq!(audit(&engine), 0, "{what}");
                check(&engine, &what).await.close();
            }
        }
    }

    fn audit(engine: &Engine) -> usize {
        crate::audit::audit(engine).unwrap().findings().len()
    }

    #[tokio::test]
    async fn a_sound_store_has_no_findings_and_is_not_changed_by_a_repair() {
        let engine = filled().await;
        assert_eq!(crate::audit::audit(&engine).unwrap().findings(), []);
        let before = meta(&engine);
        recovery::repair(&engine, Path::new("")).unwrap();
        assert_eq!((meta(&engine), engine.damage().all()), (before, Vec::new()));
    }

    #[tokio::test]
    async fn lost_entries_and_bodies_are_counted_and_named_and_orphans_go() {
        let engine = filled().await;
        let mut batch = engine.batch(64);
        for offset in [9, 10, 12] {
            engine.delete(&mut batch, Family::Reference, &rows::reference_key(0, offset));
        }
        // A body that both queues take, each at its last offset.
        let mut last = Vec::new();
        let scanned = engine.scan(Family::Log, &[], None, &mut |key, _| {
            last = key.to_vec();
            Visit::Next
        });
        scanned.unwrap();
        engine.delete(&mut batch, Family::Log, &last);
        let orphan = rows::log_key(7 << rows::SEGMENT_SHIFT);
        engine.put(&mut batch, Family::Log, &orphan, &[], &Bytes::from_static(b"nobody's"));
        let hub = HubRow { next_segment: 9, ..hub(&engine) };
        put(&engine, &mut batch, &rows::hub_key(), &encoded(|out| rows::encode_hub(&hub, out)));
        engine.write(batch, false).unwrap();

        recovery::repair(&engine, Path::new("")).unwrap();
        let damage = engine.damage().all();
        let named: Vec<String> = damage.iter().map(|damage| damage.lost.to_string()).collect();
        assert_eq!(named, ["4 entries: one 9-10, one 29, two 29"]);
        assert_eq!(engine.get(Family::Log, &orphan).unwrap(), None);
        let store = check(&engine, "entries and bodies").await;
        let dropped: Vec<u64> =
            store.queues().iter().map(|queue| queue.ledger().dropped(DropReason::Unreadable)).collect();
        assert_eq!(dropped, [3, 1]);
    }

    fn hub(engine: &Engine) -> HubRow {
        let row = engine.get(Family::Meta, &rows::hub_key()).unwrap().unwrap();
        match rows::decode_meta(&rows::hub_key(), &row) {
            Some(MetaRow::Hub(row)) => row,
            other => panic!("{other:?}"),
        }
    }
}
