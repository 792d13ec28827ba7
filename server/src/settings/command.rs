//! Owns `edgehub config`.

use super::show::Shown;
use super::{reference, schema};
use crate::cli::{ConfigCommand, ReportFormat};
use crate::exit::Failure;
use crate::{output, run};

/// Carries out `edgehub config`.
///
/// # Errors
/// A file or flag that is not readable as settings.
pub fn execute(command: &ConfigCommand) -> Result<(), Failure> {
    match command {
        ConfigCommand::Show { settings, given, format } => {
            let sources = run::sources(settings.config.as_deref(), settings.flags());
            let shown = Shown::load(sources, *given)?;
            match format {
                ReportFormat::Text => output::text(&shown.text()),
                ReportFormat::Json => output::json(&shown),
            }
        }
        ConfigCommand::Schema => output::json(&schema::schema()?),
        ConfigCommand::Reference => output::text(&reference::markdown()?),
    }
}
