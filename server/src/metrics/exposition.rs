//! Owns the text form of the metrics: Prometheus text exposition format 0.0.4.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use super::names::{self, Kind};
use super::{Family, QUANTILES, Registry, Value};

/// Media type of the page.
pub const EXPOSITION_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Labels that only the exposition itself may set.
pub(super) const RESERVED_LABELS: [&str; 5] =
    ["iothub", "edge_device", "instance_number", "ms_telemetry", "quantile"];

const REFUSED: &str = "edgehub_metrics_series_refused_total";

/// A metric name that every scraper accepts.
pub(super) fn valid_name(name: &str) -> bool {
    name.bytes().enumerate().all(|(place, byte)| {
        byte == b'_' || byte == b':' || byte.is_ascii_alphabetic() || (place > 0 && byte.is_ascii_digit())
    }) && !name.is_empty()
}

/// `name="value",..` with values escaped; characters that a label name must not have become `_`.
pub(super) fn label_text<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (name, value) in labels {
        if !text.is_empty() {
            text.push(',');
        }
        for (place, character) in name.chars().enumerate() {
            let allowed = character == '_'
                || character.is_ascii_alphabetic()
                || (place > 0 && character.is_ascii_digit());
            text.push(if allowed { character } else { '_' });
        }
        text.push_str("=\"");
        for character in value.chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
    }
    text
}

pub(super) fn render(registry: &Registry) -> String {
    let families = registry.families.read();
    let mut page = String::with_capacity(1024 + families.series_count * 200);
    for (name, family) in &families.by_name {
        let known = names::find(name);
        let help = families.described.get(name).map(String::as_str).or(known.map(|known| known.help));
        let telemetry = known.is_some_and(|known| known.telemetry);
        render_family(&mut page, &registry.common, name, help.unwrap_or_default(), telemetry, family);
    }
    drop(families);
    let refused = registry.refused.load(Ordering::Relaxed);
    if refused > 0 {
        let help = names::find(REFUSED).map_or("", |known| known.help);
        push_head(&mut page, REFUSED, help, Kind::Counter);
        push_sample(&mut page, REFUSED, &registry.common, "", "", refused as f64);
    }
    page
}

fn render_family(page: &mut String, common: &str, name: &str, help: &str, telemetry: bool, family: &Family) {
    push_head(page, name, help, family.kind);
    for (labels, series) in &family.series {
        let labels = match (labels.is_empty(), telemetry) {
            (_, false) => labels.clone(),
            (true, true) => "ms_telemetry=\"True\"".to_owned(),
            (false, true) => format!("{labels},ms_telemetry=\"True\""),
        };
        match &series.value {
            Value::Counter(value) => {
                push_sample(page, name, common, &labels, "", value.load(Ordering::Relaxed) as f64);
            }
            Value::Gauge(value) => {
                let value = f64::from_bits(value.load(Ordering::Relaxed));
                push_sample(page, name, common, &labels, "", value);
            }
            Value::Summary(summary) => {
                let snapshot = summary.snapshot(&QUANTILES);
                for (quantile, value) in snapshot.quantiles {
                    let quantile = format!("quantile=\"{quantile}\"");
                    push_sample(page, name, common, &labels, &quantile, value);
                }
                push_sample(page, &format!("{name}_sum"), common, &labels, "", snapshot.sum);
                push_sample(page, &format!("{name}_count"), common, &labels, "", snapshot.count as f64);
            }
        }
    }
}

fn push_head(page: &mut String, name: &str, help: &str, kind: Kind) {
    let help = help.replace('\\', "\\\\").replace('\n', "\\n");
    // Writing into a String cannot fail.
    let _infallible = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {}", kind.word());
}

fn push_sample(page: &mut String, name: &str, common: &str, labels: &str, last: &str, value: f64) {
    page.push_str(name);
    page.push('{');
    page.push_str(common);
    for part in [labels, last].into_iter().filter(|part| !part.is_empty()) {
        page.push(',');
        page.push_str(part);
    }
    page.push_str("} ");
    // Writing into a String cannot fail.
    let _infallible = match value {
        value if value.is_nan() => writeln!(page, "NaN"),
        f64::INFINITY => writeln!(page, "+Inf"),
        f64::NEG_INFINITY => writeln!(page, "-Inf"),
        value => writeln!(page, "{value}"),
    };
}
