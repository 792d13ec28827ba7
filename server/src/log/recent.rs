//! Owns the memory of warnings and errors: for each code how often, when last, and with which text.

use std::collections::BTreeMap;
use std::fmt;

use parking_lot::Mutex;
use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::codes;

/// Characters of a text that are kept.
const TEXT_CHARS_MAX: usize = 300;
/// Stands for events without a code: those of libraries.
pub const FOREIGN: &str = "EH0000";

/// By code; the list of codes bounds it.
static RECENT: Mutex<BTreeMap<&'static str, Recent>> = Mutex::new(BTreeMap::new());

/// What was logged under one code since the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recent {
    /// The code.
    pub code: &'static str,
    /// Whether the last one was an error; otherwise it was a warning.
    pub is_error: bool,
    /// How often.
    pub count: u64,
    /// When last.
    pub last_at: OffsetDateTime,
    /// The last text, shortened.
    pub text: String,
}

/// Every code under which something was logged, in their order.
pub fn recent() -> Vec<Recent> {
    RECENT.lock().values().cloned().collect()
}

/// Sets the counters of warnings and errors; call it before the metrics are rendered.
pub fn observe() {
    for recent in recent() {
        metrics::counter!("edgehub_log_warnings_total", "code" => recent.code).absolute(recent.count);
    }
}

/// The layer that remembers.
pub(super) struct Remember;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Remember {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let level = *event.metadata().level();
        if level > Level::WARN {
            return;
        }
        let mut words = Words::default();
        event.record(&mut words);
        let code = codes::find(&words.code).map_or(FOREIGN, |known| known.code);
        let text: String = words.text.chars().take(TEXT_CHARS_MAX).collect();
        let (is_error, now) = (level == Level::ERROR, OffsetDateTime::now_utc());
        let mut recent = RECENT.lock();
        let entry = recent.entry(code).or_insert_with(|| Recent {
            code,
            is_error,
            count: 0,
            last_at: now,
            text: String::new(),
        });
        (entry.is_error, entry.last_at, entry.text) = (is_error, now, text);
        entry.count += 1;
    }
}

/// Code and text of an event.
#[derive(Default)]
struct Words {
    code: String,
    text: String,
}

impl Visit for Words {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "code" => value.clone_into(&mut self.code),
            "message" => value.clone_into(&mut self.text),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.text = format!("{value:?}");
        }
    }
}
