//! Codes: every place that warns has one of its own, the list knows it, and the documentation shows the list.

// A test's helpers fail like the test itself.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use edgehub::log::{codes, recent};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const CRATES: [&str; 5] = ["broker/src", "cloud/src", "routing/src", "server/src", "storage/src"];

/// A place that warns.
struct Site {
    place: String,
    code: Option<String>,
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.extension() {
            _ if path.is_dir() => files(&path, found),
            Some(extension) if extension == "rs" && !path.ends_with("tests.rs") => found.push(path),
            Some(_) | None => {}
        }
    }
}

/// The places of one source. Tests stand last in every file, and comments are no places.
fn sites(path: &Path) -> Vec<Site> {
    let text = std::fs::read_to_string(path).unwrap();
    let program = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let mut found = Vec::new();
    for name in ["warn!(", "error!("] {
        for (at, _) in program.match_indices(name) {
            let line = &program[program[..at].rfind('\n').map_or(0, |end| end + 1)..at];
            // Another macro whose name ends alike.
            let other = line.ends_with(|character: char| character.is_alphanumeric() || character == '_');
            if other || line.contains("//") {
                continue;
            }
            let mut rest = program[at + name.len()..].trim_start();
            if let Some(target) = rest.strip_prefix("target:") {
                rest = target.split_once(',').unwrap().1.trim_start();
            }
            let code = rest.strip_prefix("code = \"").and_then(|code| code.split('"').next());
            let number = program[..at].matches('\n').count() + 1;
            found.push(Site { place: format!("{}:{number}", path.display()), code: code.map(str::to_owned) });
        }
    }
    found
}

#[test]
fn every_place_that_warns_has_a_code_of_its_own_that_the_list_knows() {
    let mut sources = Vec::new();
    CRATES.iter().for_each(|folder| files(&Path::new(REPOSITORY).join(folder), &mut sources));
    let found: Vec<Site> = sources.iter().flat_map(|path| sites(path)).collect();
    assert!(found.len() > 60, "only {} places: does the search still work?", found.len());
    let mut places: BTreeMap<&str, &str> = BTreeMap::new();
    let mut faults = Vec::new();
    for site in &found {
        match &site.code {
            None => faults.push(format!("{} has no code; give it the next one of its room", site.place)),
            Some(code) => {
                if codes::find(code).is_none() {
                    faults.push(format!("{}: {code} is not in server/src/log/codes.rs", site.place));
                }
                if let Some(other) = places.insert(code, &site.place) {
                    faults.push(format!("{}: {code} belongs to {other}", site.place));
                }
            }
        }
    }
    for known in codes::known() {
        if known.code != recent::FOREIGN && !places.contains_key(known.code) {
            faults.push(format!("{} is in the list, and nothing warns with it", known.code));
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn the_documentation_shows_the_list() {
    let path = Path::new(REPOSITORY).join("docs/reference/log-codes.md");
    let text = std::fs::read_to_string(path).unwrap();
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| `EH")).collect();
    let wanted: Vec<String> = codes::known()
        .iter()
        .map(|known| format!("| `{}` | {} | {} |", known.code, known.meaning, known.next))
        .collect();
    assert_eq!(rows, wanted);
}
