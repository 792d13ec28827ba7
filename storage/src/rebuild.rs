//! Owns how names, counters, checkpoints and stretches are made anew out of the entries, so that every ledger adds
//! up again. What cannot be read is counted as dropped, with the reason `unreadable`.

use std::fmt::Write as _;

use bytes::Bytes;

use crate::audit::{Audit, QueueAudit};
use crate::clock::ClockRow;
use crate::damage::Lost;
use crate::engine::{Batch, Engine, EngineError, Family};
use crate::ledger::{DropReason, Outcome, Outcomes};
use crate::rows::{self, HubRow, SettleRow};

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
    let count = queues.keys().next_back().map_or(0, |last| last + 1);
    let mut segments_end = bodies.keys().next_back().map_or(0, |last| last + 1);
    let mut accepted = 0;
    for id in 0..count {
        let queue = queues.remove(&id).unwrap_or_default();
        accepted += queue.tail;
        let used = queue.built.iter().flat_map(|mark| &mark.segments).map(|(segment, _)| segment + 1).max();
        segments_end = segments_end.max(used.unwrap_or(0));
        rebuild_queue(engine, &mut batch, id, queue, &mut rebuilt)?;
    }
    let mut row = hub.unwrap_or(HubRow { records: accepted, ..HubRow::default() });
    if hub.is_none() && accepted > 0 {
        rebuilt
            .notes
            .push("the counters of the store are gone; its records are counted as its entries".into());
    } else if row.references != accepted {
        rebuilt
            .notes
            .push(format!("the store had counted {} entries, its queues {accepted}", row.references));
    }
    row.references = accepted;
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
        let row = ClockRow { store_ms, wall_ms: i64::try_from(store_ms).unwrap_or(i64::MAX) };
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

fn rebuild_queue(
    engine: &Engine,
    batch: &mut Batch,
    id: u32,
    queue: QueueAudit,
    rebuilt: &mut Rebuilt,
) -> Result<(), EngineError> {
    let are_stretches_sound = queue.are_stretches_sound();
    let before = queue.outcomes();
    let QueueAudit { name, open, settle, marks, mut cursor, tail, lost, built, .. } = queue;
    let name = name.unwrap_or_else(|| {
        let name = format!("recovered-queue-{id}");
        put(engine, batch, &rows::name_key(id), name.as_bytes());
        rebuilt.notes.push(format!("the name of queue {id} is gone; it is {name} now"));
        name
    });
    let mut outcomes = before;
    let settled = cursor.prefix() + cursor.beyond();
    balance(&name, &mut outcomes, settled, rebuilt);
    for range in lost {
        rebuilt.lost.add(&name, range.start, range.end - 1);
        // Those beyond the window are dropped and counted when they are read.
        let dropped = cursor.settle_range(range.start, range.end);
        outcomes.count(Outcome::Dropped(DropReason::Unreadable), dropped);
    }
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
        return Ok(());
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
    Ok(())
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
