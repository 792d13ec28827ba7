//! Owns the look at a store that no hub has open: what is in it, whether it is sound, what waits in its queues, and
//! its repair.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::audit::{self, Finding, FindingKind};
use crate::damage::{Damage, SUSPECT};
use crate::directory::{self, DATABASE, FORMAT, Marker, State, not_opened, refused};
use crate::engine::{DiskBudget, DiskEngine, DiskOpenError, Engine, EngineError, Family};
use crate::error::{OpenError, StoreError};
use crate::ledger::{HubLedger, Ledger};
use crate::record::{Entry, Offset, QueueId};
use crate::recovery;
use crate::rescue::{self, ManifestProblem};
use crate::rows::{self, Body, DEAD_LETTERS_QUEUE, ReferenceHead};

/// Memory for the look at a store; there is no hub beside it.
const BUDGET: DiskBudget =
    DiskBudget { cache_bytes: 32 << 20, write_buffer_bytes: 32 << 20, capacity_bytes: u64::MAX };

/// A store that is read and not changed: not one byte of its folder, its lock file included. No hub can open it
/// meanwhile.
#[derive(Debug)]
pub struct StoreReader {
    path: PathBuf,
    /// `None` if the database cannot be opened; the findings say why.
    engine: Option<Engine>,
    findings: Vec<Finding>,
    ready: bool,
    _lock: Option<File>,
}

/// What is in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreStat {
    /// The store's directory.
    pub path: PathBuf,
    /// The format of its files.
    pub format: u32,
    /// Table files, in bytes.
    pub table_bytes: u64,
    /// The write-ahead log, in bytes.
    pub log_bytes: u64,
    /// The account of the store.
    pub ledger: HubLedger,
    /// Its queues, in the order of their ids.
    pub queues: Vec<QueueStat>,
    /// Its tables of keyed state that have rows, by name.
    pub tables: Vec<TableStat>,
    /// The folders with damaged parts that were set aside, oldest first.
    pub set_aside: Vec<PathBuf>,
    /// Whether tables were found to be damaged and the next start reads them all.
    pub suspect: bool,
}

/// What is in a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueStat {
    /// Its id.
    pub id: QueueId,
    /// Its name; `None` if it is lost.
    pub name: Option<String>,
    /// Its account.
    pub ledger: Ledger,
    /// The first entry that is not settled.
    pub checkpoint: Offset,
    /// The offset of the next entry.
    pub tail: Offset,
}

/// What is in a table of keyed state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableStat {
    /// Its name.
    pub name: String,
    /// How many keys it has.
    pub keys: u64,
    /// Their values, in bytes.
    pub value_bytes: u64,
}

impl StoreReader {
    /// Opens the store in this storage folder to read it.
    ///
    /// # Errors
    /// When there is none, it is in use or of a newer format, or its folder cannot be read. Damage is no error:
    /// [`verify`](Self::verify) tells of it.
    pub fn open(folder: &Path) -> Result<Self, OpenError> {
        let directory::Existing { path, marker, lock } = directory::look(folder)?;
        let mut reader = Self { path, engine: None, findings: Vec::new(), ready: true, _lock: lock };
        match marker {
            Marker::Missing => reader.file("the file FORMAT is missing".into()),
            Marker::Damaged(reason) => reader.file(format!("the file FORMAT {reason}")),
            Marker::Valid(state) => reader.ready = state == State::Ready,
        }
        let database = reader.path.join(DATABASE);
        if !database.is_dir() {
            if reader.ready {
                reader.file("the database is gone".into());
            }
            return Ok(reader);
        }
        let files = rescue::names(&database).map_err(|error| refused(&database, error))?;
        if reader.ready {
            match rescue::examine_manifest(&database, &files).map_err(|error| refused(&database, error))? {
                None => {}
                Some(ManifestProblem::Current { .. }) => reader.file("CURRENT is missing or damaged".into()),
                Some(ManifestProblem::Unusable(reason)) => reader.file(reason),
            }
            if !files.iter().any(|name| rescue::is_log(name)) {
                reader.file("there is no write-ahead log".into());
            }
        }
        for (log, reason) in
            rescue::examine_logs(&database, &files).map_err(|error| refused(&database, error))?
        {
            reader.file(format!("{}: {reason}", log.display()));
        }
        match DiskEngine::open_read_only(&database, BUDGET) {
            Ok(engine) => reader.engine = Some(Engine::disk(engine)),
            Err(DiskOpenError::Corrupt(reason)) if reader.ready => reader.file(reason),
            Err(DiskOpenError::Corrupt(_)) => {}
            Err(error) => return Err(not_opened(&reader.path, error)),
        }
        Ok(reader)
    }

    fn file(&mut self, detail: String) {
        self.findings.push(Finding { kind: FindingKind::File, queue: None, detail });
    }

    fn engine(&self) -> Result<&Engine, StoreError> {
        self.engine.as_ref().ok_or_else(|| {
            let reasons: Vec<&str> = self.findings.iter().map(|finding| finding.detail.as_str()).collect();
            StoreError::Damaged { reason: reasons.join("; ").into() }
        })
    }

    /// Sizes, queues, tables, and what was set aside. Reads the keyed state and a few rows per queue.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn stat(&self) -> Result<StoreStat, StoreError> {
        let engine = self.engine()?;
        let accounts = audit::accounts(engine)?;
        let hub = accounts.hub.unwrap_or_default();
        let mut ledger = HubLedger {
            records: hub.records,
            unrouted: hub.unrouted,
            references: hub.references,
            ..HubLedger::default()
        };
        let mut queues = Vec::with_capacity(accounts.queues.len());
        for (id, queue) in &accounts.queues {
            let account = queue.ledger();
            if *id == DEAD_LETTERS_QUEUE {
                ledger.dead_letters = account;
                continue;
            }
            ledger.queues.add(&account);
            queues.push(QueueStat {
                id: QueueId(*id),
                name: queue.name.clone(),
                ledger: account,
                checkpoint: Offset::new(queue.cursor.prefix()),
                tail: Offset::new(account.accepted()),
            });
        }
        let mut tables: BTreeMap<u8, (u64, u64)> = BTreeMap::new();
        engine.scan_readable(Family::State, &mut |key, value| {
            if let Some(table) = key.first() {
                let (keys, bytes) = tables.entry(*table).or_default();
                *keys += 1;
                *bytes += value.len() as u64;
            }
            Ok(())
        })?;
        let table = |(number, (keys, value_bytes)): (u8, (u64, u64))| TableStat {
            name: table_name(number),
            keys,
            value_bytes,
        };
        let size = |suffix: &str| {
            let names = rescue::names(&self.path.join(DATABASE)).unwrap_or_default();
            let names = names.into_iter().filter(|name| name.ends_with(suffix));
            names.filter_map(|name| Some(fs::metadata(self.path.join(DATABASE).join(name)).ok()?.len())).sum()
        };
        Ok(StoreStat {
            path: self.path.clone(),
            format: FORMAT,
            table_bytes: size(".sst"),
            log_bytes: size(".log"),
            ledger,
            queues,
            tables: tables.into_iter().map(table).collect(),
            set_aside: rescue::set_aside(&self.path).unwrap_or_default(),
            suspect: self.path.join(SUSPECT).exists(),
        })
    }

    /// Reads everything, and says what is not as it should be. Takes as long as the store is large.
    ///
    /// # Errors
    /// When the disk cannot be read.
    pub fn verify(&self) -> Result<Vec<Finding>, StoreError> {
        let mut findings = self.findings.clone();
        if let Some(engine) = &self.engine {
            findings.extend(audit::audit(engine)?.findings());
        }
        Ok(findings)
    }

    /// Shows the entries that wait, expired ones included, queue by queue in the order of their offsets; of one
    /// queue or of all, without the dead letters. Entries that cannot be read are left out and returned as a number.
    ///
    /// # Errors
    /// When the database cannot be read, or `visit` fails.
    pub fn export<E: From<StoreError>>(
        &self,
        queue: Option<&str>,
        visit: &mut dyn FnMut(&str, Entry) -> Result<(), E>,
    ) -> Result<u64, E> {
        let engine = self.engine()?;
        let accounts = audit::accounts(engine).map_err(StoreError::from)?;
        let mut unreadable = 0;
        let mut failed = None;
        let scan = engine.scan_readable(Family::Reference, &mut |key, value| {
            let stop = || EngineError::Io(String::new());
            let Ok([a, b, c, d, offset @ ..]) = <[u8; 12]>::try_from(key) else { return Ok(()) };
            let (id, offset) = (u32::from_be_bytes([a, b, c, d]), u64::from_be_bytes(offset));
            if id == DEAD_LETTERS_QUEUE {
                return Ok(());
            }
            let found = accounts.queues.get(&id);
            let name = found.and_then(|found| found.name.as_deref()).unwrap_or_default();
            let open = found.is_none_or(|found| found.cursor.next_open(offset) == offset);
            if !open || queue.is_some_and(|queue| queue != name) {
                return Ok(());
            }
            let Some((head, body)) = ReferenceHead::decode(value) else {
                unreadable += 1;
                return Ok(());
            };
            let bytes = match body {
                Body::Inline(bytes) => Some(Bytes::copy_from_slice(bytes)),
                Body::Logged(logged) => match engine.get(Family::Log, &rows::log_key(logged.sequence)) {
                    Ok(body) => body,
                    Err(EngineError::Corrupt(_)) => None,
                    Err(error) => return Err(error),
                },
            };
            let Some(bytes) = bytes else {
                unreadable += 1;
                return Ok(());
            };
            let entry =
                Entry { offset: Offset::new(offset), bytes, accepted_at: head.accepted_at, ttl: head.ttl };
            visit(name, entry).map_err(|error| {
                failed = Some(error);
                stop()
            })
        });
        match (failed, scan) {
            (Some(error), _) => Err(error),
            (None, Err(error)) => Err(StoreError::from(error).into()),
            (None, Ok(scan)) => Ok(unreadable + scan.passed),
        }
    }
}

/// Repairs the store in this storage folder as a start of the hub does after damage, and more: everything is
/// read, and whatever [`StoreReader::verify`] finds is put right. What is damaged is set aside. Returns what was
/// done, nothing if the store is sound.
///
/// # Errors
/// When there is no store, or it cannot be opened.
pub fn repair(folder: &Path) -> Result<Vec<Damage>, OpenError> {
    let path = directory::look(folder)?.path;
    directory::replace(&path, SUSPECT, "an operator asked for a repair\n")?;
    let engine = directory::open(folder, BUDGET)?;
    recovery::repair(&engine, &path)?;
    Ok(engine.damage().all())
}

fn table_name(number: u8) -> String {
    match number {
        1 => "identities".into(),
        2 => "sessions".into(),
        3 => "twins".into(),
        4 => "configuration".into(),
        5 => "products".into(),
        6 => "registry".into(),
        7 => "commands".into(),
        other => format!("table-{other}"),
    }
}
