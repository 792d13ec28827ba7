//! Owns `edgehub check`: what a hub with these settings would stumble over, one line each, before it is started.
//!
//! Nothing is changed: a probe file in the storage folder is made without a name and vanishes. It runs beside a
//! running hub as well.

mod daemon;
mod local;
mod network;

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use crate::admin::table::printable;
use crate::cli::{CheckOptions, ReportFormat};
use crate::exit::Failure;
use crate::settings::{Notice, Settings};
use crate::{output, run};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It cannot be made, or does not apply.
    Skipped,
    /// Nothing to do.
    Ok,
    /// The hub runs, but not as it probably should.
    Warning,
    /// The hub does not start, or does not reach what it needs.
    Error,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Name of the check.
    pub check: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found, and what to do.
    pub text: String,
}

/// All lines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Name and version of the form.
    pub format: &'static str,
    /// The worst of all.
    pub verdict: Verdict,
    /// One per check, always the same and in the same order.
    pub checks: Vec<Checked>,
}

/// Carries out `edgehub check`: exit code 0 when there is nothing to do, 1 after warnings, 2 after errors.
///
/// # Errors
/// Standard output takes nothing, or the system gives no event queue.
pub fn execute(options: &CheckOptions) -> Result<ExitCode, Failure> {
    let report = report(options)?;
    match options.format {
        ReportFormat::Text => output::text(&report.text())?,
        ReportFormat::Json => output::json(&report)?,
    }
    Ok(ExitCode::from(match report.verdict {
        Verdict::Skipped | Verdict::Ok => 0,
        Verdict::Warning => 1,
        Verdict::Error => 2,
    }))
}

fn report(options: &CheckOptions) -> Result<Report, Failure> {
    let given = &options.run.settings;
    let loaded = Settings::load(run::sources(given.config.as_deref(), given.flags()));
    let routes = local::routes(options.run.manifest.as_deref());
    let checks = match loaded {
        Ok((settings, notices)) => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|source| Failure::System { what: "the checks cannot be started", source })?;
            let limit = Duration::from_secs(u64::from(options.timeout_secs));
            let given = runtime.block_on(daemon::ask(&settings, limit));
            let (certificates, bundle) = match given {
                Some(given) => (given.certificates, given.bundle),
                None => (local::certificates(&settings), Vec::new()),
            };
            let reached = runtime.block_on(network::reach(&settings, bundle, limit));
            vec![
                of_settings(&notices),
                certificates,
                local::store(&settings),
                local::disk(&settings),
                network::clock(reached.upstream_time),
                reached.names,
                reached.messages,
                reached.https,
                routes,
            ]
        }
        Err(error) => {
            let skipped = |check| Checked::new(check, Verdict::Skipped, "the settings cannot be used");
            let names =
                ["certificates", "store", "disk", "clock", "names", "upstream_amqp", "upstream_https"];
            std::iter::once(Checked::new("settings", Verdict::Error, error.to_string()))
                .chain(names.map(skipped))
                .chain([routes])
                .collect()
        }
    };
    let verdict = checks.iter().map(|checked| checked.verdict).max().unwrap_or(Verdict::Ok);
    Ok(Report { format: "edgehub-check/1", verdict, checks })
}

fn of_settings(notices: &[Notice]) -> Checked {
    let warnings: Vec<String> =
        notices.iter().filter(|notice| notice.is_warning()).map(ToString::to_string).collect();
    if warnings.is_empty() {
        let ignored = notices.len();
        let text = match ignored {
            0 => "usable".to_owned(),
            _ => {
                format!("usable; {ignored} without effect or with another one: `edgehub config show --given`")
            }
        };
        return Checked::new("settings", Verdict::Ok, text);
    }
    Checked::new("settings", Verdict::Warning, warnings.join("; "))
}

impl Checked {
    fn new(check: &'static str, verdict: Verdict, text: impl Into<String>) -> Self {
        Self { check, verdict, text: text.into() }
    }
}

impl Report {
    /// The same for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for Checked { check, verdict, text } in &self.checks {
            let verdict = match verdict {
                Verdict::Skipped => "skipped",
                Verdict::Ok => "ok",
                Verdict::Warning => "warning",
                Verdict::Error => "error",
            };
            // Names of others are in it.
            let _infallible = writeln!(out, "{verdict:<8} {check:<15} {}", printable(text));
        }
        out
    }
}
