//! Owns the route tools of the command line: check, explain, test. They need no running hub, no settings and no network.

mod check;
mod document;
mod explain;
mod message;
mod statement;
mod vectors;

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::cli::RouteCommand;
use crate::exit::Failure;
use edgehub_routing::{Sink, Suggestion, TextRange};

/// Longest file that is read, bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Runs a route tool. Its report is on standard output.
///
/// # Errors
/// A file cannot be read, or the report cannot be written.
pub fn execute(command: &RouteCommand) -> Result<ExitCode, Failure> {
    let (report, good) = match command {
        RouteCommand::Check(options) => check::report(options)?,
        RouteCommand::Explain(options) => explain::report(options)?,
        RouteCommand::Test(options) => vectors::report(options)?,
    };
    match std::io::stdout().lock().write_all(report.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        written => written.map_err(|source| Failure::System { what: "standard output", source })?,
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The text of a file, or of standard input for `-`; without the mark at its beginning that some editors write.
fn read(path: &str) -> Result<String, Failure> {
    let failure = |reason: String| Failure::RouteFile { path: path.to_owned(), reason };
    let mut bytes = Vec::new();
    let read = if path == "-" {
        std::io::stdin().lock().take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
    };
    read.map_err(|error| failure(error.to_string()))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(failure(format!("it is longer than {FILE_BYTES_MAX} bytes")));
    }
    let text = String::from_utf8(bytes).map_err(|_| failure("it is not UTF-8 text".to_owned()))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The name under which a file is reported.
fn shown(path: &str) -> &str {
    if path == "-" { "standard input" } else { path }
}

fn of_range(range: TextRange) -> Value {
    json!({ "line": range.line, "column": range.column, "endLine": range.end_line, "endColumn": range.end_column })
}

fn of_suggestion(suggestion: &Suggestion) -> Value {
    json!({
        "replacement": suggestion.replacement,
        "range": of_range(suggestion.range),
        "bytes": [suggestion.bytes.start, suggestion.bytes.end],
    })
}

fn of_sink(sink: &Sink) -> Value {
    match sink {
        Sink::Upstream => json!({ "system": "$upstream" }),
        Sink::UpstreamTarget(address) => json!({ "system": "$upstream", "address": &**address }),
        Sink::ModuleInput { module, input } => json!({ "module": &**module, "input": &**input }),
    }
}

/// A count with its noun.
fn counted(count: usize, noun: &str) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{ending}")
}
