//! Owns the form of the log: one line per event on standard output, as the reference writes it.
//!
//! `<6> 2026-08-21 10:57:24.123 +00:00 [INF] - Text of the event key=value`; at levels debug and verbose the
//! component stands before the dash. Control characters in texts and fields are escaped, so that a client
//! cannot forge a line through its name.

use std::fmt::{self, Write as _};
use std::io::Write as _;

use time::{OffsetDateTime, UtcOffset};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

use crate::settings::LogLevel;

/// Target of events that end the process: `error!(target: FATAL_TARGET, ..)` is written as `[FTL]`.
pub const FATAL_TARGET: &str = "edgehub::fatal";

/// Installs the log for the whole process. Call it before any thread is started: the local offset from UTC,
/// which every line names, can only be asked for then.
///
/// # Errors
/// Another subscriber has been installed already.
pub fn install(level: LogLevel) -> Result<(), tracing::subscriber::SetGlobalDefaultError> {
    let offset = UtcOffset::current_local_offset().unwrap_or(UtcOffset::UTC);
    let lines = Lines::new(level, offset, |line| {
        // A log that cannot be written has nowhere to say so; the hub goes on.
        let _unwritable = std::io::stdout().lock().write_all(line.as_bytes());
    });
    tracing::subscriber::set_global_default(subscriber(lines))
}

fn subscriber(lines: Lines<impl Fn(&str) + Send + Sync + 'static>) -> impl Subscriber + Send + Sync {
    let filter = filter(lines.level);
    tracing_subscriber::registry().with(lines.with_filter(filter))
}

/// Our own components at the level asked for; foreign crates at `info` at most, whose details drown ours.
fn filter(level: LogLevel) -> Targets {
    let own = match level {
        LogLevel::Verbose => LevelFilter::TRACE,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Fatal => LevelFilter::OFF,
    };
    let foreign = own.min(LevelFilter::INFO);
    Targets::new().with_default(foreign).with_target("edgehub", own).with_target(FATAL_TARGET, Level::ERROR)
}

/// The layer that writes the lines.
struct Lines<W> {
    level: LogLevel,
    offset: UtcOffset,
    write: W,
}

impl<W: Fn(&str)> Lines<W> {
    fn new(level: LogLevel, offset: UtcOffset, write: W) -> Self {
        Self { level, offset, write }
    }

    fn line(&self, now: OffsetDateTime, event: &Event<'_>) -> String {
        let metadata = event.metadata();
        let (severity, abbreviation) = match *metadata.level() {
            Level::ERROR if metadata.target() == FATAL_TARGET => (0, "FTL"),
            Level::ERROR => (3, "ERR"),
            Level::WARN => (4, "WRN"),
            Level::INFO => (6, "INF"),
            Level::DEBUG => (7, "DBG"),
            Level::TRACE => (7, "VRB"),
        };
        let now = now.to_offset(self.offset);
        let (hours, minutes, _) = now.offset().as_hms();
        let sign = if now.offset().is_negative() { '-' } else { '+' };
        let mut line = String::with_capacity(160);
        // Writing into a String cannot fail.
        let _infallible = write!(
            line,
            "<{severity}> {:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:03} {sign}{:02}:{:02} [{abbreviation}] ",
            now.year(),
            u8::from(now.month()),
            now.day(),
            now.hour(),
            now.minute(),
            now.second(),
            now.millisecond(),
            hours.unsigned_abs(),
            minutes.unsigned_abs(),
        );
        if self.level <= LogLevel::Debug {
            let component = metadata.target().rsplit("::").next().unwrap_or_default();
            let _infallible = write!(line, "[{component}] ");
        }
        line.push_str("- ");
        let mut fields = Fields { message: String::new(), rest: String::new() };
        event.record(&mut fields);
        push_escaped(&mut line, &fields.message);
        line.push_str(&fields.rest);
        line.push('\n');
        line
    }
}

impl<S, W> Layer<S> for Lines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: Fn(&str) + 'static,
{
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        (self.write)(&self.line(OffsetDateTime::now_utc(), event));
    }
}

struct Fields {
    message: String,
    rest: String,
}

impl Fields {
    fn push(&mut self, name: &str, value: &str) {
        if name == "message" {
            self.message.push_str(value);
            return;
        }
        self.rest.push(' ');
        self.rest.push_str(name);
        self.rest.push('=');
        push_escaped(&mut self.rest, value);
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field.name(), &format!("{value:?}"));
    }
}

fn push_escaped(line: &mut String, text: &str) {
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    fn logged(level: LogLevel, offset: UtcOffset, emit: impl FnOnce()) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        let layer = Lines::new(level, offset, move |line: &str| sink.lock().unwrap().push(line.to_owned()));
        tracing::subscriber::with_default(subscriber(layer), emit);
        Arc::try_unwrap(lines).unwrap().into_inner().unwrap()
    }

    /// `^<[0-7]> \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [+-]\d\d:\d\d \[[A-Z]{3}\] (\[[^]]+\] )?- `,
    /// written as a pattern of one character per character; answers what follows the dash.
    fn text_of(line: &str) -> Option<&str> {
        const HEAD: &str = "<o> dddd-dd-dd dd:dd:dd.ddd sdd:dd [AAA] ";
        let fits = HEAD.bytes().zip(line.bytes()).all(|(pattern, byte)| match pattern {
            b'o' => (b'0'..=b'7').contains(&byte),
            b'd' => byte.is_ascii_digit(),
            b's' => byte == b'+' || byte == b'-',
            b'A' => byte.is_ascii_uppercase(),
            literal => byte == literal,
        });
        let rest = line.get(HEAD.len()..).filter(|_| fits)?;
        match rest.strip_prefix("- ") {
            Some(text) => Some(text),
            None => rest.strip_prefix('[')?.split_once("] - ").map(|(_, text)| text),
        }
    }

    #[test]
    fn lines_have_the_contracted_form() {
        let lines = logged(LogLevel::Verbose, UtcOffset::UTC, || {
            tracing::trace!("one");
            tracing::debug!("two");
            tracing::info!(client = %"leaf1", count = 3, "three");
            tracing::warn!("four");
            tracing::error!("five");
            tracing::error!(target: FATAL_TARGET, "six");
        });
        let heads: Vec<_> = lines.iter().map(|line| (&line[..3], &line[35..40])).collect();
        assert_eq!(
            heads,
            [
                ("<7>", "[VRB]"),
                ("<7>", "[DBG]"),
                ("<6>", "[INF]"),
                ("<4>", "[WRN]"),
                ("<3>", "[ERR]"),
                ("<0>", "[FTL]")
            ]
        );
        assert!(lines.iter().all(|line| text_of(line).is_some() && line.ends_with('\n')), "{lines:?}");
        assert!(lines[2].contains("[tests] - three client=leaf1 count=3\n"), "{}", lines[2]);
    }

    #[test]
    fn at_info_there_is_no_component_and_nothing_below() {
        let offset = UtcOffset::from_hms(-3, -30, 0).unwrap();
        let lines = logged(LogLevel::Info, offset, || {
            tracing::debug!("hidden");
            tracing::info!("shown");
        });
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains(" -03:30 [INF] - shown\n"), "{}", lines[0]);
    }

    #[test]
    fn at_fatal_only_fatal_is_shown() {
        let lines = logged(LogLevel::Fatal, UtcOffset::UTC, || {
            tracing::error!("hidden");
            tracing::error!(target: FATAL_TARGET, "shown");
        });
        assert_eq!(lines.len(), 1);
    }

    #[test]
    fn a_line_cannot_be_forged() {
        let lines = logged(LogLevel::Info, UtcOffset::UTC, || {
            tracing::info!(client = "a\n<6> forged", "text\rmore\u{1b}[0m");
        });
        assert_eq!(lines[0].matches('\n').count(), 1);
        assert!(lines[0].ends_with("- text\\rmore\\u{1b}[0m client=a\\n<6> forged\n"), "{}", lines[0]);
    }
}
