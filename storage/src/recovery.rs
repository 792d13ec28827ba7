//! Owns the first look at a stored database: the rows of all queues, checked against each other.
//!
//! Only the `meta` family is read, which grows with the number of queues and of stretches that are not released
//! (one per 4 MiB or 10 000 entries), not with the entries.

use std::collections::BTreeMap;
use std::path::Path;

use ahash::AHashMap;

use crate::audit::audit;
use crate::clock::ClockRow;
use crate::cursor::{Cursor, PageBits};
use crate::damage::{Damage, DamageKind, Lost};
use crate::directory::{replace, report};
use crate::engine::{Engine, EngineError, Family, Range, Visit};
use crate::error::OpenError;
use crate::rebuild::rebuild;
use crate::registry::StoredQueue;
use crate::rescue::new_aside;
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

/// Reads everything that the store needs to go on. After damage, and where rows do not fit each other, they are
/// first made anew out of the entries.
pub(crate) fn recover(engine: &Engine, path: &Path) -> Result<Recovered, OpenError> {
    let found = engine.damage().take_found();
    let recovered = match (found.is_empty(), read(engine, path)) {
        (true, Err(OpenError::Damaged { reason, .. })) => {
            let lost = Lost::default();
            let damage = Damage { kind: DamageKind::Accounts, reason, set_aside: None, lost };
            mend(engine, path, vec![damage])?;
            read(engine, path)?
        }
        (true, read) => read?,
        (false, _) => {
            mend(engine, path, found)?;
            read(engine, path)?
        }
    };
    drop_last_segment(engine, &recovered).map_err(|error| failed(path, error))?;
    Ok(recovered)
}

/// Reads everything, and makes anew what does not fit.
pub(crate) fn repair(engine: &Engine, path: &Path) -> Result<(), OpenError> {
    let mut found = engine.damage().take_found();
    if found.is_empty() {
        let findings = audit(engine).map_err(|error| failed(path, error))?.findings();
        let Some(first) = findings.first() else { return Ok(()) };
        let reason = match findings.len() - 1 {
            0 => first.to_string(),
            more => format!("{first}; and {more} more"),
        };
        found.push(Damage { kind: DamageKind::Accounts, reason, set_aside: None, lost: Lost::default() });
    }
    mend(engine, path, found)?;
    read(engine, path).map(drop)
}

fn failed(path: &Path, error: EngineError) -> OpenError {
    let path = path.to_owned();
    match error {
        EngineError::Corrupt(reason) => OpenError::Damaged { path, reason },
        EngineError::Full(reason) => OpenError::Full { path, reason },
        EngineError::Io(reason) => OpenError::Engine { path, reason },
    }
}

/// Makes the accounts anew, and says what is damaged and lost.
fn mend(engine: &Engine, path: &Path, mut found: Vec<Damage>) -> Result<(), OpenError> {
    let audit = audit(engine).map_err(|error| failed(path, error))?;
    let rebuilt = rebuild(engine, audit).map_err(|error| failed(path, error))?;
    let mut aside = found.iter().find_map(|damage| damage.set_aside.clone());
    if let Some(directory) = engine.damage().directory().filter(|_| !rebuilt.replaced.is_empty()) {
        let folder = match aside {
            Some(folder) => folder,
            None => new_aside(directory)?,
        };
        replace(&folder, "rows", &rebuilt.replaced)?;
        aside = Some(folder);
    }
    if !rebuilt.notes.is_empty() {
        let (reason, lost) = (rebuilt.notes.join("; "), Lost::default());
        match found.iter_mut().find(|damage| damage.kind == DamageKind::Accounts) {
            Some(damage) => damage.reason = format!("{}; {reason}", damage.reason),
            None => found.push(Damage { kind: DamageKind::Accounts, reason, set_aside: None, lost }),
        }
    }
    // Which damage cost which entry is not known: the first one that can have cost any names them all.
    let mut lost = Some(rebuilt.lost);
    for mut damage in found {
        if damage.kind != DamageKind::Marker {
            if let Some(Lost { entries, entries_count, .. }) = lost.take() {
                damage.lost = Lost { entries, entries_count, unknown: damage.lost.unknown };
            }
            damage.set_aside = damage.set_aside.or_else(|| aside.clone());
        }
        report(&damage);
        engine.damage().note(damage);
    }
    Ok(())
}

fn read(engine: &Engine, path: &Path) -> Result<Recovered, OpenError> {
    let damaged = |reason: String| OpenError::Damaged { path: path.to_owned(), reason };
    let failed = |error: EngineError| failed(path, error);
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
    let mut accepted = 0;
    for (id, mut rows) in queues {
        let Some(name) = rows.name.take().filter(|_| id as usize == recovered.queues.len()) else {
            return Err(damaged(format!("the name of queue {id}, or of one before it, is missing")));
        };
        let stored = restore(rows, &name).map_err(damaged)?;
        accepted += stored.open.end;
        for (segment, references) in stored.marks.iter().chain([&stored.open]).flat_map(|mark| &mark.segments)
        {
            *recovered.segments.entry(*segment).or_default() += u64::from(*references);
        }
        recovered.queues.push((name, stored));
    }
    let made = recovered.hub.references + recovered.letters.outcomes.delivered;
    if made != accepted {
        return Err(damaged(format!("{made} entries were made, but the queues accepted {accepted}")));
    }
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
    if !do_stretches_follow(rows.marks.iter().chain([&open]), &cursor) {
        return Err(format!("the stretches of queue {name} do not follow on each other"));
    }
    Ok(StoredQueue { cursor, outcomes: rows.settle.outcomes, open, marks: rows.marks })
}

/// Whether stretches, in their order, hold every entry that waits. One of which all is settled may be gone already.
pub(crate) fn do_stretches_follow<'a>(marks: impl Iterator<Item = &'a Mark>, cursor: &Cursor) -> bool {
    let mut at = cursor.prefix();
    for mark in marks {
        if mark.start > at && cursor.next_open(at) < mark.start {
            return false;
        }
        at = at.max(mark.end);
    }
    true
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
