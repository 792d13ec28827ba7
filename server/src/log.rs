//! Owns the form of the log: one line per event on standard output, as the reference writes it, or one JSON object.
//!
//! `<6> 2026-08-21 10:57:24.123 +00:00 [INF] - Text of the event key=value`; at levels debug and verbose the
//! component stands before the dash. Control characters in texts and fields are escaped, so that a client
//! cannot forge a line through its name.
//!
//! Every warning and error has a field `code` out of the closed list in [`codes`], one code per place in the
//! program: `warn!(code = "EH2107", ..)`. A test reads all sources and finds those without.

pub mod codes;
pub mod recent;

use std::fmt::{self, Write as _};
use std::io::Write as _;

use serde_json::{Map, Value, json};
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

use crate::settings::{LogFormat, LogLevel};

/// Target of events that end the process: `error!(target: FATAL_TARGET, ..)` is written as `[FTL]`.
pub const FATAL_TARGET: &str = "edgehub::fatal";

/// Installs the log for the whole process. Call it before any thread is started: the local offset from UTC,
/// which every line names, can only be asked for then.
///
/// # Errors
/// Another subscriber has been installed already.
pub fn install(level: LogLevel, format: LogFormat) -> Result<(), tracing::subscriber::SetGlobalDefaultError> {
    let offset = UtcOffset::current_local_offset().unwrap_or(UtcOffset::UTC);
    let lines = Lines::new(level, format, offset, |line| {
        // A log that cannot be written has nowhere to say so; the hub goes on.
        let _unwritable = std::io::stdout().lock().write_all(line.as_bytes());
    });
    tracing::subscriber::set_global_default(subscriber(lines))
}

fn subscriber(lines: Lines<impl Fn(&str) + Send + Sync + 'static>) -> impl Subscriber + Send + Sync {
    let filter = filter(lines.level);
    let remember = recent::Remember.with_filter(LevelFilter::WARN);
    tracing_subscriber::registry().with(lines.with_filter(filter)).with(remember)
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
    format: LogFormat,
    offset: UtcOffset,
    write: W,
}

impl<W: Fn(&str)> Lines<W> {
    fn new(level: LogLevel, format: LogFormat, offset: UtcOffset, write: W) -> Self {
        Self { level, format, offset, write }
    }

    fn line(&self, now: OffsetDateTime, event: &Event<'_>) -> String {
        let now = now.to_offset(self.offset);
        match self.format {
            LogFormat::Text => self.text(now, event),
            LogFormat::Json => json_line(now, event),
        }
    }

    fn text(&self, now: OffsetDateTime, event: &Event<'_>) -> String {
        let metadata = event.metadata();
        let (severity, abbreviation, _) = severity(event);
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
            let _infallible = write!(line, "[{}] ", component(metadata.target()));
        }
        line.push_str("- ");
        let mut fields = Fields { message: String::new(), rest: String::new(), code: String::new() };
        event.record(&mut fields);
        push_escaped(&mut line, &fields.message);
        line.push_str(&fields.rest);
        line.push_str(&fields.code);
        line.push('\n');
        line
    }
}

/// Severity of syslog (RFC 5424 §6.2.1), the reference's mark, and the name of the level as settings have it.
fn severity(event: &Event<'_>) -> (u8, &'static str, &'static str) {
    let metadata = event.metadata();
    match *metadata.level() {
        Level::ERROR if metadata.target() == FATAL_TARGET => (0, "FTL", "fatal"),
        Level::ERROR => (3, "ERR", "error"),
        Level::WARN => (4, "WRN", "warning"),
        Level::INFO => (6, "INF", "info"),
        Level::DEBUG => (7, "DBG", "debug"),
        Level::TRACE => (7, "VRB", "verbose"),
    }
}

/// The last part of a logger's name.
fn component(target: &str) -> &str {
    target.rsplit("::").next().unwrap_or_default()
}

/// An event as one JSON object; its fields stand apart, so that none can take the place of a member.
fn json_line(now: OffsetDateTime, event: &Event<'_>) -> String {
    let (severity, _, level) = severity(event);
    let mut fields = JsonFields { message: String::new(), code: None, rest: Map::new() };
    event.record(&mut fields);
    let millis = now.replace_nanosecond(now.nanosecond() / 1_000_000 * 1_000_000).unwrap_or(now);
    let mut object = json!({
        "time": millis.format(&Rfc3339).unwrap_or_default(),
        "level": level,
        "severity": severity,
        "component": component(event.metadata().target()),
        "text": fields.message,
        "fields": fields.rest,
    });
    if let Some(code) = fields.code {
        object["code"] = code.into();
    }
    format!("{object}\n")
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
    /// Stands last, where people look for it.
    code: String,
}

impl Fields {
    fn push(&mut self, name: &str, value: &str) {
        if name == "message" {
            self.message.push_str(value);
            return;
        }
        let to = if name == "code" { &mut self.code } else { &mut self.rest };
        to.push(' ');
        to.push_str(name);
        to.push('=');
        push_escaped(to, value);
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

struct JsonFields {
    message: String,
    code: Option<String>,
    rest: Map<String, Value>,
}

impl JsonFields {
    fn insert(&mut self, field: &Field, value: Value) {
        self.rest.insert(field.name().to_owned(), value);
    }
}

impl Visit for JsonFields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            "code" => self.code = Some(value.to_owned()),
            _ => self.insert(field, value.into()),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.insert(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        match field.name() {
            "message" => self.message = text,
            _ => self.insert(field, text.into()),
        }
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
        let layer = Lines::new(level, LogFormat::Text, offset, move |line: &str| {
            sink.lock().unwrap().push(line.to_owned());
        });
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
    fn json_lines_keep_fields_apart_and_are_one_line_each() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        let layer = Lines::new(LogLevel::Info, LogFormat::Json, UtcOffset::UTC, move |line: &str| {
            sink.lock().unwrap().push(line.to_owned());
        });
        tracing::subscriber::with_default(subscriber(layer), || {
            tracing::warn!(code = "EH1004", client = %"a\n\"b", level = "forged", count = 3, "two\nlines");
            tracing::info!("no code");
        });
        let lines = lines.lock().unwrap();
        assert!(lines.iter().all(|line| line.matches('\n').count() == 1), "{lines:?}");
        let first: Value = serde_json::from_str(&lines[0]).unwrap();
        let time = first["time"].as_str().unwrap();
        assert!(OffsetDateTime::parse(time, &Rfc3339).is_ok(), "{time}");
        assert_eq!(
            (&first["level"], &first["severity"], &first["code"], &first["text"], &first["component"]),
            (&json!("warning"), &json!(4), &json!("EH1004"), &json!("two\nlines"), &json!("tests"))
        );
        assert_eq!(first["fields"], json!({"client": "a\n\"b", "level": "forged", "count": 3}));
        let second: Value = serde_json::from_str(&lines[1]).unwrap();
        assert!(second.get("code").is_none());
        assert!(recent::recent().iter().any(|recent| recent.code == "EH1004" && recent.text == "two\nlines"));
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
