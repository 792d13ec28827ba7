//! Owns the engine on disk: RocksDB, its options, and its errors.

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode,
    ErrorKind, FlushOptions, LogLevel, Options, ReadOptions, ReadTier, WriteBatch, WriteBufferManager,
    WriteOptions,
};

use super::room::Room;
use super::{EngineError, Family, Range, ReadableScan, RowVisitor, Value, Visit};
use crate::damage::DamageLog;

/// The file that lists the tables takes room in steps of this.
const MANIFEST_STEP_BYTES: usize = 64 << 10;

/// The memory that the engine may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DiskBudget {
    pub(crate) cache_bytes: usize,
    pub(crate) write_buffer_bytes: usize,
    /// What the store may take up, by its limit or the size of its file system.
    pub(crate) capacity_bytes: u64,
}

/// How large files and buffers are; a small store or file system gets small ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileSizes {
    wal_bytes: u64,
    write_buffer_bytes: u64,
    file_bytes: u64,
    level_bytes: u64,
}

impl FileSizes {
    fn fit(budget: DiskBudget, capacity_bytes: u64) -> Self {
        let file_bytes = (capacity_bytes / 64).clamp(256 << 10, 16 << 20);
        let buffer_bytes = (capacity_bytes / 64).clamp(128 << 10, 64 << 20);
        Self {
            wal_bytes: (capacity_bytes / 16).clamp(512 << 10, 64 << 20),
            write_buffer_bytes: ((budget.write_buffer_bytes / 4) as u64).max(1 << 20).min(buffer_bytes),
            file_bytes,
            level_bytes: 4 * file_bytes,
        }
    }
}

/// What the engine holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct DiskSizes {
    pub(crate) table_bytes: u64,
    pub(crate) memtable_bytes: u64,
}

/// The engine.
#[derive(Debug)]
pub(crate) struct DiskEngine {
    db: DB,
    pub(super) room: Room,
    budget: DiskBudget,
    damage: DamageLog,
    /// Held until the database is closed.
    _lock: Option<File>,
}

/// Why the database did not open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DiskOpenError {
    Locked,
    ReadOnly,
    Denied(String),
    Full(String),
    Corrupt(String),
    Other(String),
}

impl DiskEngine {
    /// Opens the database, and creates it if there is none. What is found to be damaged later goes to `damage`.
    pub(crate) fn open(
        path: &Path,
        budget: DiskBudget,
        damage: DamageLog,
        lock: Option<File>,
    ) -> Result<Self, DiskOpenError> {
        let (options, families) = options(budget);
        let db = DB::open_cf_descriptors(&options, path, families).map_err(classify_open)?;
        Ok(Self::new(db, path, budget, damage, lock))
    }

    /// Opens the database without changing anything in its folder. One that lacks some of its files opens as
    /// well; reading what was in them fails.
    pub(crate) fn open_read_only(path: &Path, budget: DiskBudget) -> Result<Self, DiskOpenError> {
        let (mut options, families) = options(budget);
        options.set_paranoid_checks(false);
        let db = DB::open_cf_descriptors_read_only(&options, path, families, false).map_err(classify_open)?;
        Ok(Self::new(db, path, budget, DamageLog::default(), None))
    }

    fn new(db: DB, path: &Path, budget: DiskBudget, damage: DamageLog, lock: Option<File>) -> Self {
        Self { db, room: Room::new(path.parent().unwrap_or(path)), budget, damage, _lock: lock }
    }

    /// Makes a database out of the table files in a folder, whatever else is there. Files that cannot be read
    /// at all go to the folder `lost` in it.
    pub(crate) fn assemble(path: &Path, budget: DiskBudget) -> Result<(), DiskOpenError> {
        let (options, _) = options(budget);
        DB::repair(&options, path).map_err(classify_open)
    }

    pub(super) fn damage(&self) -> &DamageLog {
        &self.damage
    }

    fn fault(&self, error: rocksdb::Error) -> EngineError {
        let error = classify(error);
        if let EngineError::Corrupt(reason) = &error {
            self.damage.suspect(reason);
        }
        error
    }

    pub(super) fn family(&self, family: Family) -> &ColumnFamily {
        self.db.cf_handle(family.name()).expect("open created every family") // `open` fails otherwise
    }

    pub(super) fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), EngineError> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db.write_opt(batch, &options).map_err(|error| self.fault(error))
    }

    pub(super) fn sync(&self) -> Result<(), EngineError> {
        self.db.flush_wal(true).map_err(|error| self.fault(error))
    }

    /// Writes what the log holds to tables, so that the log can go; then rewrites the tables of ranges.
    pub(super) fn compact(&self, ranges: &[Range]) {
        let families = Family::ALL.map(|family| self.family(family));
        let mut flush = FlushOptions::default();
        flush.set_wait(true);
        if let Err(error) = self.db.flush_cfs_opt(&families.each_ref().map(|family| &**family), &flush) {
            tracing::warn!(code = "EH6005", %error, "could not flush the store to make room");
            return;
        }
        for range in ranges {
            // Not by dropping files: the deletion itself may be in one by now, and what it covers would come back.
            self.db.compact_range_cf(&self.family(range.family), Some(&range.from), Some(&range.to));
        }
    }

    /// Fits files and write buffers to what the store may take up.
    pub(super) fn fit(&self, capacity_bytes: u64) {
        let sizes = FileSizes::fit(self.budget, capacity_bytes);
        let bytes = [sizes.write_buffer_bytes, sizes.file_bytes, sizes.level_bytes, 2 * sizes.level_bytes];
        let [buffer, file, level, compaction] = bytes.map(|bytes| bytes.to_string());
        let options = [
            ("write_buffer_size", buffer.as_str()),
            ("target_file_size_base", file.as_str()),
            ("max_bytes_for_level_base", level.as_str()),
            ("max_compaction_bytes", compaction.as_str()),
        ];
        for family in Family::ALL {
            if let Err(error) = self.db.set_options_cf(&self.family(family), &options) {
                tracing::warn!(code = "EH6006", %error, "could not fit the store's files to its limit");
            }
        }
    }

    pub(super) fn reclaim(&self, range: &Range) {
        let Range { family, from, to } = range;
        let family = *family;
        // The library's end is inclusive: a table that ends with the first live key would go with all before it.
        let last = predecessor(to);
        // Only makes room earlier; compaction does the same later, so a failure needs no answer.
        if let Err(error) = self.db.delete_file_in_range_cf(&self.family(family), from, &last) {
            tracing::warn!(code = "EH6007", %error, family = family.name(), "could not drop the files of settled entries");
        }
    }

    pub(super) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let value = self.db.get_pinned_cf(&self.family(family), key).map_err(|error| self.fault(error))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    /// As `get`, if write buffers and cache tell; nothing when the disk would have to be read, or cannot be.
    pub(super) fn get_in_memory(&self, family: Family, key: &[u8]) -> Option<Option<Bytes>> {
        let mut options = ReadOptions::default();
        options.set_read_tier(ReadTier::BlockCache);
        let value = self.db.get_pinned_cf_opt(&self.family(family), key, &options).ok()?;
        Some(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    pub(super) fn scan(
        &self,
        family: Family,
        from: &[u8],
        to: Option<&[u8]>,
        visit: &mut dyn FnMut(&[u8], Value<'_>) -> Visit,
    ) -> Result<(), EngineError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from);
        if let Some(to) = to {
            options.set_iterate_upper_bound(to);
        }
        options.fill_cache(false);
        let mut rows = self.db.raw_iterator_cf_opt(&self.family(family), options);
        rows.seek(from);
        while let Some((key, value)) = rows.item() {
            if visit(key, Value::Borrowed(value)) == Visit::Stop {
                return Ok(());
            }
            rows.next();
        }
        rows.status().map_err(|error| self.fault(error))
    }

    /// Visits all rows of a family that can be read, and passes over the rest.
    pub(super) fn scan_readable(
        &self,
        family: Family,
        visit: RowVisitor<'_>,
    ) -> Result<ReadableScan, EngineError> {
        // An iterator that met something unreadable stays confused about the blocks near it: each begins anew.
        let rows_from = |key: &[u8]| {
            let mut options = ReadOptions::default();
            options.fill_cache(false);
            let mut rows = self.db.raw_iterator_cf_opt(&self.family(family), options);
            rows.seek(key);
            rows
        };
        let (mut from, mut passed) = (Vec::new(), 0);
        let mut rows = rows_from(&from);
        loop {
            while let Some((key, value)) = rows.item() {
                visit(key, value)?;
                from.clear();
                from.extend_from_slice(key);
                rows.next();
            }
            if rows.status().is_ok() {
                return Ok(ReadableScan { passed, reached_end: true });
            }
            passed += 1;
            let readable = |key: &[u8]| rows_from(key).status().is_ok();
            // The first distance at which rows can be read again, then the nearest place before it.
            let Some(far) = (0..KEY_BITS).find(|bit| key_ahead(&from, *bit).is_none_or(|key| readable(&key)))
            else {
                return Ok(ReadableScan { passed, reached_end: false });
            };
            let Some(mut next) = key_ahead(&from, far) else {
                return Ok(ReadableScan { passed, reached_end: false });
            };
            let mut start = far.checked_sub(1).and_then(|bit| key_ahead(&from, bit)).unwrap_or(from);
            for bit in (0..far.saturating_sub(1)).rev() {
                let Some(middle) = key_ahead(&start, bit).filter(|middle| *middle < next) else { continue };
                if readable(&middle) {
                    next = middle;
                } else {
                    start = middle;
                }
            }
            // Shorter keys are the same number, and come first.
            let length = next.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            let shortest = (length..next.len()).find(|length| readable(&next[..*length]));
            next.truncate(shortest.unwrap_or(next.len()));
            rows = rows_from(&next);
            from = next;
        }
    }

    pub(super) fn sizes(&self) -> DiskSizes {
        let mut sizes = DiskSizes::default();
        for family in Family::ALL {
            let family = self.family(family);
            let number = |name| self.db.property_int_value_cf(&family, name).ok().flatten().unwrap_or(0);
            sizes.table_bytes += number(rocksdb::properties::TOTAL_SST_FILES_SIZE);
            sizes.memtable_bytes += number(rocksdb::properties::CUR_SIZE_ALL_MEM_TABLES);
        }
        sizes
    }
}

impl Drop for DiskEngine {
    fn drop(&mut self) {
        self.db.cancel_all_background_work(true);
    }
}

/// The families of the database: ours, and the default one, which holds nothing; but its write buffer would decide how
/// much must be free before the library writes again after the disk was full.
const FAMILIES: usize = Family::ALL.len() + 1;

fn options(budget: DiskBudget) -> (Options, [ColumnFamilyDescriptor; FAMILIES]) {
    let cache = Cache::new_lru_cache(budget.cache_bytes);
    // Without stalling: with it, a budget shared by several families blocks the writer for ever before any
    // of them is full enough to be flushed (facebook/rocksdb issue 11780).
    let buffers = WriteBufferManager::new_write_buffer_manager_with_cache(
        budget.write_buffer_bytes,
        false,
        cache.clone(),
    );
    let sizes = FileSizes::fit(budget, budget.capacity_bytes);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_write_buffer_manager(&buffers);
    options.set_max_total_wal_size(sizes.wal_bytes);
    // The engine stops at the first record that it cannot read. What lies behind it was looked at before.
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_manifest_preallocation_size(MANIFEST_STEP_BYTES);
    options.set_max_background_jobs(2);
    options.set_max_open_files(256);
    options.set_bytes_per_sync(1 << 20);
    options.set_wal_bytes_per_sync(1 << 20);
    options.set_max_log_file_size(1 << 20);
    options.set_keep_log_file_num(2);
    options.set_log_level(LogLevel::Warn);
    options.set_max_manifest_file_size(sizes.wal_bytes.min(16 << 20) as usize);
    let names: [&str; FAMILIES] = std::array::from_fn(|n| {
        Family::ALL.get(n).map_or(rocksdb::DEFAULT_COLUMN_FAMILY_NAME, |own| own.name())
    });
    let families = names.map(|name| ColumnFamilyDescriptor::new(name, family_options(&cache, sizes)));
    (options, families)
}

fn family_options(cache: &Cache, sizes: FileSizes) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_block_size(16 << 10);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(sizes.write_buffer_bytes as usize);
    options.set_max_write_buffer_number(3);
    options.set_target_file_size_base(sizes.file_bytes);
    options.set_max_bytes_for_level_base(sizes.level_bytes);
    // A compaction keeps its input until its output is there.
    options.set_max_compaction_bytes(2 * sizes.level_bytes);
    options.set_compression_type(DBCompressionType::Lz4);
    options
}

/// The key before this one, among keys of its length; the key itself if it is the first.
fn predecessor(key: &[u8]) -> Vec<u8> {
    let mut before = key.to_vec();
    for byte in before.iter_mut().rev() {
        match byte.checked_sub(1) {
            Some(less) => {
                *byte = less;
                return before;
            }
            None => *byte = u8::MAX,
        }
    }
    key.to_vec()
}

/// Keys are looked at as numbers of this many bits.
const KEY_BITS: u32 = 40 * 8;

/// The key that lies 2^`bit` ahead, keys taken as numbers; `None` beyond the last one.
fn key_ahead(key: &[u8], bit: u32) -> Option<Vec<u8>> {
    let mut ahead = key.to_vec();
    ahead.resize((KEY_BITS / 8) as usize, 0);
    let mut at = ahead.len() - 1 - (bit / 8) as usize;
    let mut carry = 1_u16 << (bit % 8);
    while carry > 0 {
        carry += u16::from(ahead[at]);
        ahead[at] = carry as u8;
        carry >>= 8;
        if carry > 0 {
            at = at.checked_sub(1)?;
        }
    }
    Some(ahead)
}

fn is_missing_table(reason: &str) -> bool {
    reason.contains("No such file") && reason.contains(".sst")
}

fn classify_open(error: rocksdb::Error) -> DiskOpenError {
    let reason = error.to_string();
    let says = |text: &str| reason.contains(text);
    if says("No space left") || says("Disk quota exceeded") {
        DiskOpenError::Full(reason)
    } else if says("Read-only file system") {
        DiskOpenError::ReadOnly
    } else if says("Permission denied") || says("Operation not permitted") {
        DiskOpenError::Denied(reason)
    } else if error.kind() == ErrorKind::IOError && says("LOCK") {
        DiskOpenError::Locked
    } else if says("Column families not opened") {
        // A newer version made them; they are not damaged.
        DiskOpenError::Other(reason)
    } else {
        match error.kind() {
            ErrorKind::Corruption | ErrorKind::InvalidArgument | ErrorKind::NotSupported => {
                DiskOpenError::Corrupt(reason)
            }
            ErrorKind::IOError if says("No such file") => DiskOpenError::Corrupt(reason),
            _ => DiskOpenError::Other(reason),
        }
    }
}

fn classify(error: rocksdb::Error) -> EngineError {
    let reason = error.to_string();
    if reason.contains("No space left") || reason.contains("Disk quota exceeded") {
        return EngineError::Full(reason);
    }
    match error.kind() {
        ErrorKind::Corruption => EngineError::Corrupt(reason),
        _ if is_missing_table(&reason) => EngineError::Corrupt(reason),
        _ => EngineError::Io(reason),
    }
}
