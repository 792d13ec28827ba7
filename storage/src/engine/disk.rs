//! Owns the engine on disk: RocksDB, its options, and its errors.

use std::path::Path;

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, ErrorKind,
    LogLevel, Options, ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};

use super::{EngineError, Family, Value, Visit};

/// The memory that the engine may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DiskBudget {
    pub(crate) cache_bytes: usize,
    pub(crate) write_buffer_bytes: usize,
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
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_write_buffer_manager(&buffers);
        options.set_max_total_wal_size(64 << 20);
        options.set_max_background_jobs(2);
        options.set_max_open_files(256);
        options.set_bytes_per_sync(1 << 20);
        options.set_wal_bytes_per_sync(1 << 20);
        options.set_max_log_file_size(1 << 20);
        options.set_keep_log_file_num(2);
        options.set_log_level(LogLevel::Warn);
        options.set_max_manifest_file_size(16 << 20);
        let families = Family::ALL
            .map(|family| ColumnFamilyDescriptor::new(family.name(), family_options(&cache, budget)));
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
        Ok(Self { db })
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

    pub(super) fn reclaim(&self, family: Family, from: &[u8], to: &[u8]) {
        // Only makes room earlier; compaction does the same later, so a failure needs no answer.
        if let Err(error) = self.db.delete_file_in_range_cf(&self.family(family), from, to) {
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

fn family_options(cache: &Cache, budget: DiskBudget) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_block_size(16 << 10);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size((budget.write_buffer_bytes / 4).clamp(1 << 20, 64 << 20));
    options.set_max_write_buffer_number(3);
    options.set_target_file_size_base(16 << 20);
    options.set_max_bytes_for_level_base(64 << 20);
    options.set_compression_type(DBCompressionType::Lz4);
    options
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
