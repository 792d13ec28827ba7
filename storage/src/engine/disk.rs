//! Owns the engine on disk: RocksDB, its options, and its errors.

use std::path::Path;

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, ErrorKind,
    FlushOptions, LogLevel, Options, ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};

use super::room::Room;
use super::{EngineError, Family, Range, Value, Visit};

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
}

/// Why the database did not open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DiskOpenError {
    Locked,
    Corrupt(String),
    Other(String),
}

impl DiskEngine {
    pub(crate) fn open(path: &Path, budget: DiskBudget) -> Result<Self, DiskOpenError> {
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
        options.set_manifest_preallocation_size(MANIFEST_STEP_BYTES);
        options.set_max_background_jobs(2);
        options.set_max_open_files(256);
        options.set_bytes_per_sync(1 << 20);
        options.set_wal_bytes_per_sync(1 << 20);
        options.set_max_log_file_size(1 << 20);
        options.set_keep_log_file_num(2);
        options.set_log_level(LogLevel::Warn);
        options.set_max_manifest_file_size(sizes.wal_bytes.min(16 << 20) as usize);
        // The default family holds nothing, but its write buffer would decide how much must be free before the
        // library writes again after the disk was full.
        let names = Family::ALL.map(Family::name).into_iter().chain([rocksdb::DEFAULT_COLUMN_FAMILY_NAME]);
        let families = names.map(|name| ColumnFamilyDescriptor::new(name, family_options(&cache, sizes)));
        let db = DB::open_cf_descriptors(&options, path, families).map_err(|error| {
            let reason = error.to_string();
            match error.kind() {
                ErrorKind::IOError if reason.contains("lock") && reason.contains("LOCK") => {
                    DiskOpenError::Locked
                }
                ErrorKind::Corruption | ErrorKind::InvalidArgument | ErrorKind::NotSupported => {
                    DiskOpenError::Corrupt(reason)
                }
                _ => DiskOpenError::Other(reason),
            }
        })?;
        Ok(Self { db, room: Room::new(path.parent().unwrap_or(path)), budget })
    }

    pub(super) fn family(&self, family: Family) -> &ColumnFamily {
        self.db.cf_handle(family.name()).expect("open created every family") // `open` fails otherwise
    }

    pub(super) fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), EngineError> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db.write_opt(batch, &options).map_err(classify)
    }

    pub(super) fn sync(&self) -> Result<(), EngineError> {
        self.db.flush_wal(true).map_err(classify)
    }

    /// Writes what the log holds to tables, so that the log can go; then rewrites the tables of ranges.
    pub(super) fn compact(&self, ranges: &[Range]) {
        let families = Family::ALL.map(|family| self.family(family));
        let mut flush = FlushOptions::default();
        flush.set_wait(true);
        if let Err(error) = self.db.flush_cfs_opt(&families.each_ref().map(|family| &**family), &flush) {
            tracing::warn!(%error, "could not flush the store to make room");
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
                tracing::warn!(%error, "could not fit the store's files to its limit");
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
            tracing::warn!(%error, family = family.name(), "could not drop the files of settled entries");
        }
    }

    pub(super) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let value = self.db.get_pinned_cf(&self.family(family), key).map_err(classify)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
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
        rows.status().map_err(classify)
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

fn classify(error: rocksdb::Error) -> EngineError {
    let reason = error.to_string();
    if reason.contains("No space left") || reason.contains("Disk quota exceeded") {
        return EngineError::Full(reason);
    }
    match error.kind() {
        ErrorKind::Corruption => EngineError::Corrupt(reason),
        _ => EngineError::Io(reason),
    }
}
