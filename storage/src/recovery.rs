//! Owns the first look at a stored database: the rows of all queues, checked against each other.
//!
//! Only the `meta` family is read, which grows with the number of queues and of stretches that are not released
//! (one per 4 MiB or 10 000 entries), not with the entries.

use std::collections::BTreeMap;
use std::path::Path;

use ahash::AHashMap;

use crate::clock::ClockRow;
use crate::cursor::{Cursor, PageBits};
use crate::engine::{Engine, EngineError, Family, Range, Visit};
use crate::error::OpenError;
use crate::registry::StoredQueue;
use crate::rows::{self, DEAD_LETTERS_QUEUE, HubRow, Mark, MetaRow, SettleRow};

/// What the store goes on with.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) hub: HubRow,
    pub(crate) clock: Option<ClockRow>,
    /// By id.
    pub(crate) queues: Vec<(String, StoredQueue)>,
    pub(crate) letters: StoredQueue,
    /// References into each segment of the log.
    pub(crate) segments: AHashMap<u64, u64>,
}

#[derive(Default)]
struct Rows {
    name: Option<String>,
    open: Option<Mark>,
    settle: SettleRow,
    pages: Vec<(u64, Box<PageBits>)>,
    marks: Vec<Mark>,
}

/// Reads everything that the store needs to go on.
pub(crate) fn recover(engine: &Engine, path: &Path) -> Result<Recovered, OpenError> {
    let damaged = |reason: String| OpenError::Damaged { path: path.to_owned(), reason };
    let failed = |error: EngineError| match error {
        EngineError::Corrupt(reason) => OpenError::Damaged { path: path.to_owned(), reason },
        EngineError::Full(reason) | EngineError::Io(reason) => {
            OpenError::Engine { path: path.to_owned(), reason }
        }
    };
    let mut recovered = Recovered::default();
    let mut queues: BTreeMap<u32, Rows> = BTreeMap::new();
    let mut unknown = None;
    engine
        .scan(Family::Meta, &[], None, &mut |key, value| {
            match rows::decode_meta(key, &value.whole()) {
                Some(MetaRow::Hub(row)) => recovered.hub = row,
                Some(MetaRow::Clock(row)) => recovered.clock = Some(row),
                Some(MetaRow::Name(queue, name)) => queues.entry(queue).or_default().name = Some(name),
                Some(MetaRow::Append(queue, mark)) => queues.entry(queue).or_default().open = Some(mark),
                Some(MetaRow::Settle(queue, row)) => queues.entry(queue).or_default().settle = row,
                Some(MetaRow::Page(queue, page, bits)) => {
                    queues.entry(queue).or_default().pages.push((page, bits));
                }
                Some(MetaRow::Mark(queue, mark)) => queues.entry(queue).or_default().marks.push(mark),
                None => {
                    unknown = Some(key.to_vec());
                    return Visit::Stop;
                }
            }
            Visit::Next
        })
        .map_err(failed)?;
    if let Some(key) = unknown {
        return Err(damaged(format!("the row with key {key:02x?} is not understood")));
    }
    let letters = queues.remove(&DEAD_LETTERS_QUEUE).unwrap_or_default();
    recovered.letters = restore(letters, "of the dead letters").map_err(damaged)?;
    for (id, mut rows) in queues {
        let Some(name) = rows.name.take().filter(|_| id as usize == recovered.queues.len()) else {
            return Err(damaged(format!("the name of queue {id}, or of one before it, is missing")));
        };
        let stored = restore(rows, &name).map_err(damaged)?;
        for (segment, references) in stored.marks.iter().chain([&stored.open]).flat_map(|mark| &mark.segments)
        {
            *recovered.segments.entry(*segment).or_default() += u64::from(*references);
        }
        recovered.queues.push((name, stored));
    }
    drop_last_segment(engine, &recovered).map_err(failed)?;
    Ok(recovered)
}

/// Puts the rows of one queue together.
fn restore(rows: Rows, name: &str) -> Result<StoredQueue, String> {
    let open = rows.open.unwrap_or_else(|| Mark::starting_at(0));
    let cursor = Cursor::restore(rows.settle.prefix, rows.pages);
    let settled = cursor.prefix() + cursor.beyond();
    if cursor.end() > open.end || settled != rows.settle.outcomes.total() {
        return Err(format!("the ledger of queue {name} does not add up"));
    }
    Ok(StoredQueue { cursor, outcomes: rows.settle.outcomes, open, marks: rows.marks })
}

/// The segment that the last run wrote to is not written to again; if nothing refers to it, nobody else would
/// release it.
fn drop_last_segment(engine: &Engine, recovered: &Recovered) -> Result<(), EngineError> {
    let Some(last) = recovered.hub.next_segment.checked_sub(1) else { return Ok(()) };
    if recovered.segments.contains_key(&last) {
        return Ok(());
    }
    let (from, to) = (rows::segment_start(last), rows::segment_start(last + 1));
    let mut held = false;
    engine.scan(Family::Log, &from, Some(&to), &mut |_, _| {
        held = true;
        Visit::Stop
    })?;
    if held {
        let mut batch = engine.batch(64);
        engine.delete_range(&mut batch, Family::Log, &from, &to);
        // Synced together with all that was recovered, before files go.
        engine.write(batch, true)?;
        engine.reclaim(&Range { family: Family::Log, from: from.to_vec(), to: to.to_vec() });
    }
    Ok(())
}
