//! Owns what the engine's directory takes up, and the file in it that is a reserve of room.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::rescue::SET_ASIDE_PREFIX;
use crate::space::Measured;

const RESERVE: &str = "RESERVE";
/// The unit of [`MetadataExt::blocks`].
const BLOCK_BYTES: u64 = 512;
/// Directories below this depth are not ours.
const DEPTH_MAX: usize = 3;

/// The size of the file system that holds a path, or will hold it; `None` if it does not say.
pub(crate) fn file_system_bytes(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    let system = rustix::fs::statvfs(there).ok()?;
    Some(system.f_blocks.saturating_mul(system.f_frsize)).filter(|bytes| *bytes > 0)
}

/// The directory of a store.
#[derive(Debug)]
pub(crate) struct Room {
    directory: PathBuf,
}

impl Room {
    pub(super) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// What the directory takes up, as `du` counts it, and what is free in its file system.
    pub(super) fn measure(&self) -> io::Result<Measured> {
        let system = rustix::fs::statvfs(&self.directory)?;
        Ok(Measured {
            used_bytes: blocks(&self.directory, DEPTH_MAX)? * BLOCK_BYTES,
            free_bytes: Some(system.f_bavail.saturating_mul(system.f_frsize)),
            total_bytes: Some(system.f_blocks.saturating_mul(system.f_frsize)),
        })
    }

    /// How large the reserve is; 0 if there is none.
    pub(super) fn reserve_bytes(&self) -> u64 {
        fs::metadata(self.directory.join(RESERVE)).map_or(0, |data| data.len())
    }

    /// Gives the reserve to the file system.
    pub(super) fn give_reserve(&self) -> io::Result<()> {
        match fs::remove_file(self.directory.join(RESERVE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Takes a reserve of this size from the file system; one of another size goes.
    pub(super) fn take_reserve(&self, bytes: u64) -> io::Result<()> {
        if self.reserve_bytes() == bytes {
            return Ok(());
        }
        self.give_reserve()?;
        let path = self.directory.join(RESERVE);
        let taken = File::create(&path).and_then(|file| fill(file, bytes));
        if taken.is_err() {
            // Half of a reserve would be taken for a whole one.
            self.give_reserve()?;
        }
        taken
    }
}

/// Makes a file of this size that has its room.
fn fill(mut file: File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let zeros = [0; 64 << 10];
            let mut left = bytes;
            while left > 0 {
                let count = left.min(zeros.len() as u64);
                file.write_all(&zeros[..count as usize])?;
                left -= count;
            }
            file.sync_all()
        }
        Err(error) => Err(error.into()),
        Ok(()) => Ok(()),
    }
}

fn blocks(directory: &Path, depth: usize) -> io::Result<u64> {
    let mut sum = fs::symlink_metadata(directory)?.blocks();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // What was set aside is the operator's: the limit is for what the store goes on with.
        if entry.file_name().as_encoded_bytes().starts_with(SET_ASIDE_PREFIX.as_bytes()) {
            continue;
        }
        // A file may go while we look.
        let Ok(data) = entry.metadata() else { continue };
        sum += match data.is_dir() && depth > 1 {
            true => blocks(&entry.path(), depth - 1).unwrap_or_else(|_| data.blocks()),
            false => data.blocks(),
        };
    }
    Ok(sum)
}
