//! Owns the commands over a stopped store: what is in it, whether it is sound, its repair, its export.

mod damage;
mod export;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use edgehub_storage::{DropReason, Ledger, StoreReader, StoreStat, repair};
use serde_json::{Value, json};

use crate::cli::SettingsOptions;
use crate::exit::Failure;
use crate::run;
use crate::settings::StoreKind;

pub use damage::{add_to_status, observe, texts};

/// Subcommands of `edgehub store`. The hub must not be running.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Shows sizes, queues with their ledgers, tables, and damaged parts that were set aside
    Stat(StatOptions),
    /// Reads everything and names what is not as it should be; exit code 1 if there is something
    Verify(FolderOptions),
    /// Says what is wrong; with --apply puts it right, and sets aside what is damaged
    Repair(RepairOptions),
    /// Prints the entries that wait, as JSON lines
    Export(ExportOptions),
}

/// Where the store is.
#[derive(Args, Debug)]
pub struct FolderOptions {
    /// Folder that holds the directory `store`, instead of the one that the settings name
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "set"])]
    pub path: Option<PathBuf>,
    /// Where settings come from.
    #[command(flatten)]
    pub settings: SettingsOptions,
}

/// Options of `edgehub store stat`.
#[derive(Args, Debug)]
pub struct StatOptions {
    /// Where the store is.
    #[command(flatten)]
    pub folder: FolderOptions,
    /// Form of the output
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// Forms of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Options of `edgehub store repair`.
#[derive(Args, Debug)]
pub struct RepairOptions {
    /// Where the store is.
    #[command(flatten)]
    pub folder: FolderOptions,
    /// Changes the store; without it, only says what is wrong
    #[arg(long)]
    pub apply: bool,
}

/// Options of `edgehub store export`.
#[derive(Args, Debug)]
pub struct ExportOptions {
    /// Where the store is.
    #[command(flatten)]
    pub folder: FolderOptions,
    /// Only this queue
    #[arg(long, value_name = "NAME")]
    pub queue: Option<String>,
}

/// Does what the command says. The exit code is 1 when a check has found something.
///
/// # Errors
/// When there is no store, a hub has it open, or it cannot be read.
pub fn execute(command: &StoreCommand) -> Result<ExitCode, Failure> {
    match command {
        StoreCommand::Stat(options) => stat(options),
        StoreCommand::Verify(options) => verify(options, "the store is sound"),
        StoreCommand::Repair(options) if options.apply => apply(&options.folder),
        StoreCommand::Repair(options) => {
            verify(&options.folder, "the store is sound; there is nothing to repair")
        }
        StoreCommand::Export(options) => export::run(options),
    }
}

fn folder(options: &FolderOptions) -> Result<PathBuf, Failure> {
    if let Some(path) = &options.path {
        return Ok(path.clone());
    }
    let (settings, _) = run::settings(&options.settings)?;
    match settings.store.kind {
        StoreKind::Persistent { folder, .. } => Ok(folder),
        StoreKind::Memory => Err(Failure::CommandLine(
            "the settings keep the store in memory; give its folder with --path".into(),
        )),
    }
}

/// Prints to standard output; a reader that goes away is its own business.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::System { what: "standard output", source })
        }
        _ => Ok(()),
    }
}

fn verify(options: &FolderOptions, sound: &str) -> Result<ExitCode, Failure> {
    let findings = StoreReader::open(&folder(options)?)?.verify()?;
    for finding in &findings {
        print(&format!("{finding}\n"))?;
    }
    if findings.is_empty() {
        print(&format!("{sound}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{} findings; edgehub store repair --apply puts them right", findings.len());
    Ok(ExitCode::FAILURE)
}

fn apply(options: &FolderOptions) -> Result<ExitCode, Failure> {
    let damage = repair(&folder(options)?)?;
    for damage in &damage {
        print(&format!("repaired: {damage}\n"))?;
    }
    if damage.is_empty() {
        print("the store is sound; nothing was changed\n")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn stat(options: &StatOptions) -> Result<ExitCode, Failure> {
    let stat = StoreReader::open(&folder(&options.folder)?)?.stat()?;
    match options.format {
        Format::Json => print(&format!("{}\n", stat_json(&stat)))?,
        Format::Text => print(&stat_text(&stat))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn ledger_json(ledger: &Ledger) -> Value {
    let dropped: serde_json::Map<String, Value> = DropReason::ALL
        .iter()
        .filter(|reason| ledger.dropped(**reason) > 0)
        .map(|reason| (reason.as_str().to_owned(), ledger.dropped(*reason).into()))
        .collect();
    json!({
        "accepted": ledger.accepted(), "delivered": ledger.delivered(), "expired": ledger.expired(),
        "dropped": dropped, "dead_lettered": ledger.dead_lettered(), "queued": ledger.queued(),
        // Beyond 64 bits only in a store that is damaged beyond all measure.
        "gap": i64::try_from(ledger.gap()).unwrap_or(i64::MAX),
    })
}

fn stat_json(stat: &StoreStat) -> Value {
    let queues: Vec<Value> = stat
        .queues
        .iter()
        .map(|queue| {
            json!({
                "id": queue.id.get(), "queue": queue.name, "checkpoint": queue.checkpoint.get(),
                "tail": queue.tail.get(), "ledger": ledger_json(&queue.ledger),
            })
        })
        .collect();
    let tables: Vec<Value> = stat
        .tables
        .iter()
        .map(|table| json!({"table": table.name, "keys": table.keys, "value_bytes": table.value_bytes}))
        .collect();
    json!({
        "path": stat.path, "format": stat.format, "table_bytes": stat.table_bytes, "log_bytes": stat.log_bytes,
        "records": stat.ledger.records(), "unrouted": stat.ledger.unrouted(),
        "gap": i64::try_from(stat.ledger.gap()).unwrap_or(i64::MAX),
        "queues": queues, "tables": tables, "set_aside": stat.set_aside, "suspect": stat.suspect,
    })
}

fn stat_text(stat: &StoreStat) -> String {
    let mut text = format!(
        "store {}, format {}\ntables {} bytes, write-ahead log {} bytes\nrecords {}, unrouted {}, gap {}\n",
        stat.path.display(),
        stat.format,
        stat.table_bytes,
        stat.log_bytes,
        stat.ledger.records(),
        stat.ledger.unrouted(),
        stat.ledger.gap()
    );
    for queue in &stat.queues {
        let ledger = &queue.ledger;
        text += &format!(
            "queue {}: accepted {} = delivered {} + expired {} + dropped {} + dead-lettered {} + queued {}; gap {}\n",
            queue.name.as_deref().unwrap_or("(name lost)"),
            ledger.accepted(),
            ledger.delivered(),
            ledger.expired(),
            ledger.dropped_total(),
            ledger.dead_lettered(),
            ledger.queued(),
            ledger.gap()
        );
    }
    for table in &stat.tables {
        text += &format!("table {}: {} keys, {} bytes\n", table.name, table.keys, table.value_bytes);
    }
    for folder in &stat.set_aside {
        text += &format!("set aside {}\n", folder.display());
    }
    if stat.suspect {
        text += "tables were found to be damaged; the next start looks at all of them\n";
    }
    text
}
