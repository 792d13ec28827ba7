//! Owns `edgehub cloud twin …`: reading and changing twins in the stand-in's folder. A running stand-in tells its clients.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use edgehub_broker::identity::Identity;
use edgehub_broker::twin::json;
use edgehub_cloud::twin::{ChangeMode, SECTION_BYTES_MAX, TwinChange};
use edgehub_cloud::{Registry, Twin, TwinStore};
use serde_json::Value;

use super::{REGISTRY_FILE, TWINS_FOLDER, named};
use crate::cli::{ChangeTwinOptions, TwinCommand, TwinOptions};
use crate::exit::Failure;

/// Largest document: tags and desired properties at their limits, and as much again for blanks.
const DOCUMENT_BYTES_MAX: usize = 4 * SECTION_BYTES_MAX;

/// Levels of a document above the properties themselves, and those of the properties.
const DOCUMENT_DEPTH_MAX: usize = 2 + json::PATCH_DEPTH_MAX;

/// Reads or changes a twin; the twin after it, as services see it.
pub(super) fn execute(command: &TwinCommand) -> Result<String, Failure> {
    let twin = match command {
        TwinCommand::Get(options) => {
            let (store, identity, generation) = open(options)?;
            store.read(&identity, &generation).map_err(failed)?
        }
        TwinCommand::Patch(options) => change(options, ChangeMode::Merge)?,
        TwinCommand::Replace(options) => change(options, ChangeMode::Replace)?,
    };
    let shown = serde_json::json!({
        "etag": twin.etag(), "version": twin.version(), "tags": twin.tags(), "properties": twin.to_service(),
    });
    serde_json::to_string_pretty(&shown).map_err(failed)
}

fn change(options: &ChangeTwinOptions, mode: ChangeMode) -> Result<Twin, Failure> {
    let (store, identity, generation) = open(&options.twin)?;
    let mut document = read(&options.document)?;
    let tags = document.remove("tags");
    let desired = match document.remove("properties") {
        None => None,
        Some(Value::Object(mut properties)) => properties.remove("desired"),
        Some(_) => return Err(Failure::Cloud("the member properties must be an object".into())),
    };
    if tags.is_none() && desired.is_none() {
        return Err(Failure::Cloud("the document has neither tags nor properties.desired".into()));
    }
    let change = TwinChange { tags, desired };
    let changed = store.change(&identity, &generation, |twin| twin.change(change, mode, None));
    let (twin, _) = changed.map_err(failed)?;
    store.announce().map_err(failed)?;
    Ok(twin)
}

fn open(options: &TwinOptions) -> Result<(TwinStore, Identity, String), Failure> {
    let identity = named(&options.device_id, options.module_id.as_deref())?;
    // The host name is part of tokens, not of twins.
    let registry = Registry::open(options.data_dir.join(REGISTRY_FILE), "localhost").map_err(failed)?;
    let entry = registry.cache().get(&identity);
    let entry = entry.ok_or_else(|| {
        Failure::Cloud(format!("{identity} does not exist; create it with `identity create`"))
    })?;
    let store = TwinStore::new(options.data_dir.join(TWINS_FOLDER));
    Ok((store, identity, entry.generation_id.to_string()))
}

fn read(path: &Path) -> Result<json::Object, Failure> {
    let mut text = Vec::new();
    let limit = DOCUMENT_BYTES_MAX as u64 + 1;
    let unreadable = |error: io::Error| Failure::Cloud(format!("{} cannot be read: {error}", path.display()));
    if path == Path::new("-") {
        io::stdin().lock().take(limit).read_to_end(&mut text).map_err(unreadable)?;
    } else {
        File::open(path).map_err(unreadable)?.take(limit).read_to_end(&mut text).map_err(unreadable)?;
    }
    json::parse(&text, DOCUMENT_BYTES_MAX, DOCUMENT_DEPTH_MAX).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Cloud(error.to_string())
}
