//! Owns what happens to a damaged database before it is opened: damaged files are set aside by renaming, and all
//! that can be read of them is written to a sound database.
//!
//! Every step can be interrupted. What is set aside is complete before anything goes on, and a start that finds
//! the marks of an interrupted one goes on from there.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::damage::{Damage, DamageKind, DamageLog, Lost, SUSPECT};
use crate::directory::{DATABASE, not_opened, refused, replace, sync};
use crate::engine::wal::{self, LoggedChange};
use crate::engine::{
    Batch, DiskBudget, DiskEngine, DiskOpenError, Engine, EngineError, Family, ReadableScan, Visit,
};
use crate::error::OpenError;

/// At most this many damaged parts are kept in the folder; then the store does not open until someone has looked
/// at the disk.
pub(crate) const SET_ASIDE_MAX: usize = 16;
pub(crate) const SET_ASIDE_PREFIX: &str = "damaged-";

const RESCUE: &str = "rescue";
const REPLAY: &str = "REPLAY";
const DONE: &str = "DONE";
/// Rows are copied in batches of about this size.
const COPY_BYTES: usize = 1 << 20;

/// The opening of a database that may be damaged.
pub(crate) struct Rescue {
    path: PathBuf,
    budget: DiskBudget,
    /// The folder for what is damaged, once there is something.
    aside: Option<PathBuf>,
    found: Vec<(DamageKind, String, Lost)>,
    /// Logs that were set aside, and whose sound records are to be written again.
    replay: Vec<PathBuf>,
    rebuild: bool,
}

impl Rescue {
    pub(crate) fn new(path: &Path, budget: DiskBudget) -> Result<Self, OpenError> {
        let count = set_aside(path).map_err(|error| refused(path, error))?.len();
        if count >= SET_ASIDE_MAX {
            return Err(OpenError::DamagedOften { path: path.to_owned(), count });
        }
        Ok(Self {
            path: path.to_owned(),
            budget,
            aside: None,
            found: Vec::new(),
            replay: Vec::new(),
            rebuild: false,
        })
    }

    pub(crate) fn found(&mut self, kind: DamageKind, reason: String, lost: Lost) {
        self.found.push((kind, reason, lost));
    }

    pub(crate) fn is_marker_damaged(&self) -> bool {
        self.found.iter().any(|(kind, ..)| *kind == DamageKind::Marker)
    }

    /// Renames a file or a directory of the store out of the way.
    pub(crate) fn set_aside(&mut self, part: &Path) -> Result<PathBuf, OpenError> {
        let aside = self.aside_folder()?;
        let name = part.file_name().unwrap_or_default();
        let to = aside.join(name);
        fs::rename(part, &to).map_err(|error| refused(part, error))?;
        sync(&aside)?;
        sync(part.parent().unwrap_or(&self.path))?;
        Ok(to)
    }

    fn aside_folder(&mut self) -> Result<PathBuf, OpenError> {
        if let Some(folder) = &self.aside {
            return Ok(folder.clone());
        }
        let folder = new_aside(&self.path)?;
        self.aside = Some(folder.clone());
        Ok(folder)
    }

    /// Goes on with what an earlier start began.
    pub(crate) fn finish_interrupted(&mut self) -> Result<(), OpenError> {
        let (database, rescue) = (self.path.join(DATABASE), self.path.join(RESCUE));
        if rescue.join(DONE).exists() {
            if !database.exists() {
                self.found(
                    DamageKind::Database,
                    "an earlier start was interrupted while it replaced a damaged database".into(),
                    Lost::unknown(),
                );
                self.adopt()?;
            }
        } else if let Ok(text) = fs::read_to_string(self.path.join(REPLAY)) {
            let mut lines = text.lines().map(PathBuf::from);
            self.aside = lines.next().map(|folder| self.path.join(folder));
            let logs: Vec<PathBuf> = lines.collect();
            self.found(
                DamageKind::Log,
                "an earlier start was interrupted while it read a damaged log".into(),
                Lost::unknown(),
            );
            self.move_logs(&logs)?;
        }
        if rescue.exists() {
            // Copies that this store made itself; the original is still in use, or set aside.
            fs::remove_dir_all(&rescue).map_err(|error| refused(&rescue, error))?;
        }
        Ok(())
    }

    /// Looks at the files that the engine needs, before it does.
    pub(crate) fn examine(&mut self) -> Result<(), OpenError> {
        let database = self.path.join(DATABASE);
        let files = names(&database).map_err(|error| refused(&database, error))?;
        self.examine_manifest(&database, &files)?;
        let problems = examine_logs(&database, &files).map_err(|error| refused(&database, error))?;
        let first = problems.first().map(|(log, _)| log.clone());
        for (log, reason) in problems {
            self.found(DamageKind::Log, format!("{}: {reason}", log.display()), Lost::unknown());
        }
        if !files.iter().any(|name| is_log(name)) {
            self.found(DamageKind::Log, "there is no write-ahead log".into(), Lost::unknown());
        }
        let Some(first) = first.filter(|_| !self.rebuild) else { return Ok(()) };
        let logs: Vec<PathBuf> =
            files.iter().filter(|name| is_log(name) && Path::new(name) >= first).map(PathBuf::from).collect();
        let aside = self.aside_folder()?;
        let aside = Path::new(aside.file_name().unwrap_or_default()).to_owned();
        let lines: Vec<String> =
            std::iter::once(&aside).chain(&logs).map(|line| format!("{}\n", line.display())).collect();
        replace(&self.path, REPLAY, &lines.concat())?;
        self.move_logs(&logs)
    }

    fn move_logs(&mut self, logs: &[PathBuf]) -> Result<(), OpenError> {
        let (database, aside) = (self.path.join(DATABASE), self.aside_folder()?);
        for log in logs {
            if database.join(log).exists() {
                self.set_aside(&database.join(log))?;
            }
            self.replay.push(aside.join(log));
        }
        Ok(())
    }

    fn examine_manifest(&mut self, database: &Path, files: &[String]) -> Result<(), OpenError> {
        let problem = examine_manifest(database, files).map_err(|error| refused(database, error))?;
        let reason = match problem {
            None => return Ok(()),
            Some(ManifestProblem::Current { manifest }) => {
                if database.join("CURRENT").exists() {
                    self.set_aside(&database.join("CURRENT"))?;
                }
                replace(database, "CURRENT", &format!("{manifest}\n"))?;
                "the file CURRENT was missing or damaged, and was made anew".into()
            }
            Some(ManifestProblem::Unusable(reason)) => {
                self.rebuild = true;
                reason
            }
        };
        self.found(DamageKind::Manifest, reason, Lost::default());
        Ok(())
    }

    /// Opens the database, or what can be read of it.
    pub(crate) fn open(&mut self, damage: &DamageLog, lock: File) -> Result<Engine, OpenError> {
        let database = self.path.join(DATABASE);
        if !self.rebuild {
            match self.try_open(damage, &lock) {
                Ok(engine) => return self.replay_into(engine),
                Err(DiskOpenError::Corrupt(reason)) => {
                    let kind = if reason.contains(".sst") { DamageKind::Table } else { DamageKind::Manifest };
                    self.found(kind, reason, Lost::unknown());
                }
                Err(error) => return Err(not_opened(&self.path, error)),
            }
        }
        self.rebuild(&database)?;
        let opened = self.try_open(damage, &lock);
        opened.map_err(|error| not_opened(&self.path, error))
    }

    /// Opens the database as it is. When there was a sign of damaged tables, all of them are read.
    fn try_open(&self, damage: &DamageLog, lock: &File) -> Result<Engine, DiskOpenError> {
        let lock = lock.try_clone().map_err(|error| DiskOpenError::Other(error.to_string()))?;
        let database = self.path.join(DATABASE);
        let engine = Engine::disk(DiskEngine::open(&database, self.budget, damage.clone(), Some(lock))?);
        let suspect = self.path.join(SUSPECT).exists();
        let families = if suspect { &Family::ALL[..] } else { &[Family::Meta] };
        for family in families {
            engine.scan(*family, &[], None, &mut |_, _| Visit::Next).map_err(|error| match error {
                EngineError::Corrupt(reason) => DiskOpenError::Corrupt(reason),
                EngineError::Full(reason) => DiskOpenError::Full(reason),
                EngineError::Io(reason) => DiskOpenError::Other(reason),
            })?;
        }
        Ok(engine)
    }

    /// Writes the sound records of logs that were set aside, in their order. Rows that were written from them
    /// before are written again: the last change of each is the same.
    fn replay_into(&mut self, engine: Engine) -> Result<Engine, OpenError> {
        let logs = std::mem::take(&mut self.replay);
        if logs.is_empty() {
            return Ok(engine);
        }
        self.write_records(&engine, &logs)?;
        self.set_aside(&self.path.join(REPLAY))?;
        Ok(engine)
    }

    fn write_records(&self, engine: &Engine, logs: &[PathBuf]) -> Result<(), OpenError> {
        for log in logs {
            let mut failed = None;
            let scanned = wal::scan(log, &mut |record| {
                let Some(changes) = wal::changes(record) else { return false };
                if failed.is_none() {
                    let mut batch = engine.batch(record.len());
                    for change in changes {
                        match change {
                            LoggedChange::Put(family, key, value) => {
                                put(engine, &mut batch, family, key, value)
                            }
                            LoggedChange::Delete(family, key) => engine.delete(&mut batch, family, key),
                            LoggedChange::DeleteRange(family, from, to) => {
                                engine.delete_range(&mut batch, family, from, to);
                            }
                        }
                    }
                    failed = engine.write(batch, false).err();
                }
                true
            });
            scanned.map_err(|error| refused(log, error))?;
            failed.map_or(Ok(()), |error| Err(self.engine_failed(error)))?;
        }
        engine.sync().map_err(|error| self.engine_failed(error))
    }

    fn engine_failed(&self, error: EngineError) -> OpenError {
        let error = match error {
            EngineError::Full(reason) => DiskOpenError::Full(reason),
            EngineError::Corrupt(reason) | EngineError::Io(reason) => DiskOpenError::Other(reason),
        };
        not_opened(&self.path, error)
    }

    /// Makes a sound database out of the tables and logs that can be read, and sets the damaged one aside.
    fn rebuild(&mut self, database: &Path) -> Result<(), OpenError> {
        let rescue = self.path.join(RESCUE);
        if rescue.exists() {
            fs::remove_dir_all(&rescue).map_err(|error| refused(&rescue, error))?;
        }
        let sound = rescue.join(DATABASE);
        fs::create_dir_all(&rescue).map_err(|error| refused(&rescue, error))?;
        let files = names(database).map_err(|error| refused(database, error))?;
        if !self.copy_database(database, &sound)? {
            self.copy_tables(database, &files, &rescue, &sound)?;
        }
        let engine = self.open_sound(&sound)?;
        let logs: Vec<PathBuf> =
            files.iter().filter(|name| is_log(name)).map(|name| database.join(name)).collect();
        self.write_records(&engine, &logs)?;
        drop(engine);
        replace(&rescue, DONE, "")?;
        self.adopt()?;
        fs::remove_dir_all(&rescue).map_err(|error| refused(&rescue, error))
    }

    /// The damaged database goes, the sound one comes.
    fn adopt(&mut self) -> Result<(), OpenError> {
        let database = self.path.join(DATABASE);
        if database.exists() {
            self.set_aside(&database)?;
        }
        let sound = self.path.join(RESCUE).join(DATABASE);
        fs::rename(&sound, &database).map_err(|error| refused(&sound, error))?;
        sync(&self.path)
    }

    /// Copies all rows that can be read out of a database whose list of files is sound. False if one of the files
    /// keeps the others from being read.
    fn copy_database(&mut self, database: &Path, sound: &Path) -> Result<bool, OpenError> {
        if self.rebuild {
            return Ok(false);
        }
        match DiskEngine::open_read_only(database, self.budget) {
            Ok(engine) => Ok(self.copy_rows(&Engine::disk(engine), sound)?.reached_end),
            Err(_) => Ok(false),
        }
    }

    /// Copies all rows out of those tables that can be read from end to end, whatever the list of files says.
    fn copy_tables(
        &mut self,
        database: &Path,
        files: &[String],
        rescue: &Path,
        sound: &Path,
    ) -> Result<(), OpenError> {
        let linked = rescue.join("linked");
        fs::create_dir_all(&linked).map_err(|error| refused(&linked, error))?;
        let mut tables = 0;
        for table in files.iter().filter(|name| name.ends_with(".sst")) {
            let from = database.join(table);
            fs::hard_link(&from, linked.join(table)).map_err(|error| refused(&from, error))?;
            tables += 1;
        }
        if sound.exists() {
            fs::remove_dir_all(sound).map_err(|error| refused(sound, error))?;
        }
        if tables == 0 {
            return Ok(());
        }
        // Not read-only: families of which no table is left are made again.
        let opened = DiskEngine::assemble(&linked, self.budget)
            .and_then(|()| DiskEngine::open(&linked, self.budget, DamageLog::default(), None));
        for table in names(&linked.join("lost")).unwrap_or_default() {
            if !self.found.iter().any(|(_, reason, _)| reason.contains(&table)) {
                self.found(DamageKind::Table, format!("{table}: it cannot be read"), Lost::unknown());
            }
        }
        match opened {
            Ok(engine) => drop(self.copy_rows(&Engine::disk(engine), sound)?),
            Err(DiskOpenError::Corrupt(reason)) => {
                let reason = format!("no table can be read: {reason}");
                self.found(DamageKind::Table, reason, Lost::unknown());
            }
            Err(error) => return Err(not_opened(&self.path, error)),
        }
        Ok(())
    }

    fn copy_rows(&self, from: &Engine, sound: &Path) -> Result<ReadableScan, OpenError> {
        let to = self.open_sound(sound)?;
        let mut whole = ReadableScan { passed: 0, reached_end: true };
        for family in Family::ALL {
            let mut batch = to.batch(COPY_BYTES);
            let mut bytes = 0;
            let scanned = from.scan_readable(family, &mut |key, value| {
                put(&to, &mut batch, family, key, value);
                bytes += key.len() + value.len();
                if bytes < COPY_BYTES {
                    return Ok(());
                }
                bytes = 0;
                to.write(std::mem::replace(&mut batch, to.batch(COPY_BYTES)), false)
            });
            let scanned = scanned.and_then(|scan| to.write(batch, false).map(|()| scan));
            let scan = scanned.map_err(|error| self.engine_failed(error))?;
            whole.passed += scan.passed;
            whole.reached_end &= scan.reached_end;
        }
        to.sync().map_err(|error| self.engine_failed(error))?;
        Ok(whole)
    }

    fn open_sound(&self, path: &Path) -> Result<Engine, OpenError> {
        let opened = DiskEngine::open(path, self.budget, DamageLog::default(), None);
        opened.map(Engine::disk).map_err(|error| not_opened(&self.path, error))
    }

    /// Hands over what was found, and listens for more.
    pub(crate) fn finish(self, damage: &DamageLog) -> Result<(), OpenError> {
        let suspect = self.path.join(SUSPECT);
        if suspect.exists() {
            fs::remove_file(&suspect).map_err(|error| refused(&suspect, error))?;
        }
        for (kind, reason, lost) in self.found {
            damage.found(Damage { kind, reason, set_aside: self.aside.clone(), lost });
        }
        damage.listen();
        Ok(())
    }
}

/// The folders with damaged parts, oldest first.
pub(crate) fn set_aside(path: &Path) -> io::Result<Vec<PathBuf>> {
    let names = names(path)?.into_iter().filter(|name| name.starts_with(SET_ASIDE_PREFIX));
    Ok(names.map(|name| path.join(name)).collect())
}

/// Makes a folder for what is damaged, named by the time.
pub(crate) fn new_aside(path: &Path) -> Result<PathBuf, OpenError> {
    let form = format_description!("[year][month][day]T[hour][minute][second]Z");
    let time = OffsetDateTime::from(SystemTime::now()).format(form).unwrap_or_else(|_| "unknown".into());
    let mut number = 1;
    loop {
        let suffix = if number == 1 { String::new() } else { format!("-{number}") };
        let folder = path.join(format!("{SET_ASIDE_PREFIX}{time}{suffix}"));
        match fs::create_dir(&folder) {
            Ok(()) => {
                sync(path)?;
                return Ok(folder);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number <= SET_ASIDE_MAX => {
                number += 1
            }
            Err(error) => return Err(refused(&folder, error)),
        }
    }
}

/// What is wrong with the list of the database's files.
pub(crate) enum ManifestProblem {
    /// Only the file that names it; this is the one to name.
    Current { manifest: String },
    /// The list itself.
    Unusable(String),
}

/// Looks at the list of the database's files.
pub(crate) fn examine_manifest(database: &Path, files: &[String]) -> io::Result<Option<ManifestProblem>> {
    let manifests: Vec<&String> = files.iter().filter(|name| name.starts_with("MANIFEST-")).collect();
    let current = fs::read(database.join("CURRENT")).unwrap_or_default();
    let named = manifests.iter().find(|name| current == format!("{name}\n").as_bytes());
    let manifest = match (named, manifests.as_slice()) {
        (Some(named), _) => *named,
        (None, [only]) => *only,
        (None, _) => {
            return Ok(Some(ManifestProblem::Unusable("there is no manifest, or CURRENT names none".into())));
        }
    };
    let scan = wal::scan(&database.join(manifest.as_str()), &mut |_| true)?;
    // One that ends early is what a loss of power leaves; but a file of tables may be named only there.
    let reason = match (scan.holes.first(), scan.incomplete_at, scan.records) {
        (Some(hole), ..) => format!("{manifest}: bytes {} to {} cannot be read", hole.from, hole.to),
        (None, Some(at), _) => format!("{manifest}: its last record, at byte {at}, is not complete"),
        (None, None, 0) => format!("{manifest}: it is empty"),
        (None, None, _) if named.is_none() => {
            return Ok(Some(ManifestProblem::Current { manifest: manifest.clone() }));
        }
        (None, None, _) => return Ok(None),
    };
    Ok(Some(ManifestProblem::Unusable(reason)))
}

/// Which logs cannot be read to their end, and why. A last log that ends early is sound: its last record was
/// being written when the power went, and was not acknowledged.
pub(crate) fn examine_logs(database: &Path, files: &[String]) -> io::Result<Vec<(PathBuf, String)>> {
    let mut problems: Vec<(PathBuf, String)> = Vec::new();
    let mut incomplete: Option<(PathBuf, String)> = None;
    for name in files.iter().filter(|name| is_log(name)) {
        let scan = wal::scan(&database.join(name), &mut |record| wal::changes(record).is_some())?;
        if scan.records > 0 {
            problems.extend(incomplete.take());
        }
        for hole in &scan.holes {
            problems.push((name.into(), format!("bytes {} to {} cannot be read", hole.from, hole.to)));
        }
        if let Some(at) = scan.incomplete_at {
            let reason = format!("the record at byte {at} is not complete, although later ones are");
            incomplete.get_or_insert((name.into(), reason));
        }
    }
    problems.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(problems)
}

/// The names in a directory, in order; names that are not text are none of ours.
pub(crate) fn names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.extend(entry?.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

pub(crate) fn is_log(name: &str) -> bool {
    name.strip_suffix(".log").is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn put(engine: &Engine, batch: &mut Batch, family: Family, key: &[u8], value: &[u8]) {
    engine.put(batch, family, key, value, &Bytes::new());
}
