//! Owns how a command writes its answer to standard output.

use std::io::{ErrorKind, Write as _};

use serde::Serialize;

use crate::exit::Failure;

/// Writes a text. That its reader has seen enough is no failure.
///
/// # Errors
/// Standard output takes nothing.
pub fn text(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(failed),
    }
}

/// Writes a value as JSON for programs, on lines of its own.
///
/// # Errors
/// Standard output takes nothing.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let pretty = serde_json::to_string_pretty(value).map_err(|error| failed(error.into()))?;
    text(&(pretty + "\n"))
}

fn failed(source: std::io::Error) -> Failure {
    Failure::System { what: "standard output", source }
}
