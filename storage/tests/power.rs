//! A process under load loses not only its life but the machine's power: what was not made durable is gone, or is
//! there in part. What was acknowledged must still be there, as far as its level promises.
//!
//! A library that is loaded before the C library notes what was made durable (`power/journal.c`). When the process
//! has been killed, a second folder is filled with what would have survived: each file up to its last sync and,
//! by chance, a torn or garbled part of what came after it; and the names that the directories would have, where
//! each change without a sync of its directory is undone by chance.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod load;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use edgehub_storage::DamageKind;
use load::{Kill, Said};

/// Does nothing in a normal run; as the process to be killed, works until it is.
#[test]
fn process_that_is_killed() {
    load::work_until_killed();
}

fn compile(folder: &Path) -> PathBuf {
    let library = folder.join("journal.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/power/journal.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).arg("-ldl");
    let compiled = compiler.output().expect("this test needs a C compiler that is called cc");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    library
}

/// What a process has done to the files of its folder.
struct Journal {
    /// Changes of names, in order, and whether they are durable.
    names: Vec<(Change, bool)>,
    /// How many bytes of a file are durable, by its inode number.
    synced: BTreeMap<u64, u64>,
}

enum Change {
    Made(u64, PathBuf),
    Renamed(PathBuf, PathBuf),
    Removed(PathBuf),
}

impl Change {
    fn is_in(&self, directory: &Path) -> bool {
        match self {
            Self::Made(_, path) | Self::Removed(path) => path.parent() == Some(directory),
            Self::Renamed(from, to) => from.parent() == Some(directory) && to.parent() == Some(directory),
        }
    }
}

impl Journal {
    fn read(file: &Path, mut synced: BTreeMap<u64, u64>) -> Self {
        let text = fs::read_to_string(file).unwrap();
        let mut names: Vec<(Change, bool)> = Vec::new();
        let mut syncs: BTreeMap<String, (PathBuf, usize)> = BTreeMap::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words[at].parse::<u64>().unwrap();
            match words[0] {
                "C" => names.push((Change::Made(number(1), words[2].into()), false)),
                "R" => names.push((Change::Renamed(words[1].into(), words[2].into()), false)),
                "U" => names.push((Change::Removed(words[1].into()), false)),
                "T" => drop(synced.insert(number(1), 0)),
                "S" => {
                    let length = synced.entry(number(1)).or_default();
                    *length = number(2).max(*length);
                }
                "d" => drop(syncs.insert(words[1].to_owned(), (words[2].into(), names.len()))),
                "D" => {
                    let (directory, before) = syncs.remove(words[1]).unwrap();
                    let changes = names[..before].iter_mut().filter(|(change, _)| change.is_in(&directory));
                    changes.for_each(|(_, durable)| *durable = true);
                }
                other => panic!("{other} is no note"),
            }
        }
        Self { names, synced }
    }
}

fn walk(folder: &Path, visit: &mut dyn FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let data = fs::metadata(&path).unwrap();
        visit(&path, &data);
        if data.is_dir() {
            walk(&path, visit);
        }
    }
}

/// How the part of a file that was not synced ends up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    Gone,
    Torn,
    Garbled,
}

/// Fills `to` with what is left of `from`. Returns whether anything was left garbled.
fn lose_power(
    from: &Path,
    to: &Path,
    grave: &Path,
    before: &BTreeMap<PathBuf, u64>,
    journal: &Journal,
) -> bool {
    let mut names = before.clone();
    for (change, durable) in &journal.names {
        if !durable && fastrand::bool() {
            continue;
        }
        match change {
            Change::Made(inode, path) => drop(names.insert(path.clone(), *inode)),
            Change::Renamed(old, new) => {
                if let Some(inode) = names.remove(old) {
                    names.insert(new.clone(), inode);
                }
            }
            Change::Removed(path) => drop(names.remove(path)),
        }
    }
    let mut contents: BTreeMap<u64, PathBuf> = BTreeMap::new();
    for folder in [grave, from] {
        walk(folder, &mut |path, data| drop(contents.insert(data.ino(), path.to_owned())));
    }
    walk(from, &mut |path, data| {
        if data.is_dir() {
            fs::create_dir_all(to.join(path.strip_prefix(from).unwrap())).unwrap();
        }
    });
    let mut garbled = false;
    for (path, inode) in names {
        let mut bytes = fs::read(&contents[&inode]).unwrap();
        let synced = (*journal.synced.get(&inode).unwrap_or(&0) as usize).min(bytes.len());
        let rest = *fastrand::choice(&[Rest::Gone, Rest::Torn, Rest::Torn, Rest::Garbled]).unwrap();
        let kept = if rest == Rest::Gone { synced } else { fastrand::usize(synced..=bytes.len()) };
        if rest == Rest::Garbled {
            garbled |= kept < bytes.len();
            bytes[kept..].iter_mut().for_each(|byte| *byte = fastrand::u8(..));
        } else {
            bytes.truncate(kept);
        }
        fs::write(to.join(path.strip_prefix(from).unwrap()), bytes).unwrap();
    }
    garbled
}

fn cut_power(level: &str, rounds: u64) {
    let seed = load::seed();
    let place = tempfile::tempdir().unwrap();
    let library = compile(place.path());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut said = Said::default();
    let mut folder = place.path().join("0");
    // The first start of all is not what is tested.
    load::open(&folder, level).close();
    for round in 0..rounds {
        let (journal, grave) = (place.path().join("journal"), place.path().join("grave"));
        fs::write(&journal, "").unwrap();
        fs::create_dir(&grave).unwrap();
        let (mut before, mut synced) = (BTreeMap::new(), BTreeMap::new());
        walk(&folder, &mut |path, data| {
            if data.is_file() {
                before.insert(path.to_owned(), data.ino());
                synced.insert(data.ino(), data.len());
            }
        });
        let environment = vec![
            ("LD_PRELOAD", library.as_path()),
            ("EDGEHUB_POWER_FOLDER", folder.as_path()),
            ("EDGEHUB_POWER_JOURNAL", journal.as_path()),
            ("EDGEHUB_POWER_GRAVE", grave.as_path()),
        ];
        Kill { folder: &folder, round, seed, level, environment }.run(&mut said);
        let left = place.path().join((round + 1).to_string());
        let journal = Journal::read(&journal, synced);
        let garbled = lose_power(&folder, &left, &grave, &before, &journal);
        let store = load::open(&left, level);
        let damage = store.damage();
        // Garbage behind the last sync cannot be told from damage; and costs nothing that was promised.
        let allowed = |kind| matches!(kind, DamageKind::Log | DamageKind::Manifest);
        assert!(damage.iter().all(|damage| allowed(damage.kind)), "{damage:?}");
        if level != "os" {
            let lost: u64 = damage.iter().map(|damage| damage.lost.entries_count).sum();
            assert!(damage.is_empty() || garbled || lost == 0, "{damage:?}");
        }
        runtime.block_on(load::inspect(store, &mut said, Some(level)));
        fs::remove_dir_all(&grave).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        folder = left;
        for entry in fs::read_dir(folder.join("store")).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_str().unwrap().starts_with("damaged-") {
                fs::remove_dir_all(path).unwrap();
            }
        }
    }
    let (acknowledged, repeated) = (said.acknowledged(), said.repeated);
    println!("{level}: {acknowledged} acknowledged, {repeated} repeated after {rounds} losses of power");
    assert!(level == "os" || acknowledged > 0);
}

#[test]
fn what_is_acknowledged_at_the_level_sync_survives_a_loss_of_power() {
    cut_power("sync", load::kills(10));
}

#[test]
fn what_is_acknowledged_at_the_level_interval_survives_a_loss_of_power() {
    cut_power("interval", load::kills(5));
}

#[test]
fn a_store_at_the_level_os_opens_after_a_loss_of_power_with_a_sound_ledger() {
    cut_power("os", load::kills(5));
}
