//! Owns the metrics: the recorder behind the `metrics` facade.
//!
//! Code names a metric exactly as it is exposed – `counter!("edgehub_messages_received_total", "id" => id)` –
//! and the table of known names decides on help text and `ms_telemetry`. A counter whose name lacks `_total`
//! gets it. A name that is used with two kinds keeps the first; the handle of the other records nothing.
//! Labels named like one of the common ones are left out.
//!
//! Handles are to be created once and kept; a macro call looks the series up each time. Series are bounded
//! by [`SERIES_MAX`]. A series that nobody holds a handle of and that has not changed for
//! [`SERIES_IDLE_SECS_MAX`] is dropped.

mod exposition;
mod names;
mod sketch;
mod summary;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, SharedString, Unit};
use parking_lot::RwLock;

pub use names::{Kind, KnownMetric, known};

pub use exposition::EXPOSITION_CONTENT_TYPE;
use exposition::{label_text, valid_name};
use summary::Summary;

/// Most series of all metrics together; further ones record nothing and are counted.
pub const SERIES_MAX: usize = 20_000;
/// Time after which a series that nobody holds and that does not change is dropped, seconds.
pub const SERIES_IDLE_SECS_MAX: u64 = 86_400;
/// Window of the quantiles, except where another is set.
pub const SUMMARY_WINDOW: Duration = Duration::from_secs(600);
/// The quantiles that every summary shows.
pub const QUANTILES: [f64; 4] = [0.1, 0.5, 0.9, 0.99];
/// Time between two looks for idle series.
const SWEEP_INTERVAL: Duration = Duration::from_secs(600);

/// Time since some fixed moment, never going back.
pub(crate) type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The labels that every series begins with.
#[derive(Clone, Debug)]
pub struct CommonLabels {
    /// Host name of the cloud hub.
    pub iothub: String,
    /// Id of the edge device.
    pub edge_device: String,
    /// Different at each start of the process.
    pub instance_number: uuid::Uuid,
}

/// The recorder. Clones share everything; one is installed into the facade, one is asked for the page.
#[derive(Clone)]
pub struct Recorder {
    registry: Arc<Registry>,
}

struct Registry {
    clock: Clock,
    common: String,
    iothub: String,
    windows: HashMap<&'static str, Duration>,
    refused: Arc<AtomicU64>,
    families: RwLock<Families>,
}

#[derive(Default)]
struct Families {
    by_name: BTreeMap<String, Family>,
    series_count: usize,
    described: HashMap<String, String>,
    swept_at: Duration,
}

struct Family {
    kind: Kind,
    /// By the rendered labels, which are in the order of their names.
    series: BTreeMap<String, Series>,
}

struct Series {
    value: Value,
    /// Fingerprint of the value at the last look, and when it was last seen to change.
    seen: u64,
    changed_at: Duration,
}

enum Value {
    Counter(Arc<AtomicU64>),
    Gauge(Arc<AtomicU64>),
    Summary(Arc<Summary>),
}

impl Value {
    fn fingerprint(&self) -> u64 {
        match self {
            Self::Counter(value) | Self::Gauge(value) => value.load(Ordering::Relaxed),
            Self::Summary(summary) => summary.count(),
        }
    }

    /// Somebody besides the registry holds the series.
    fn held(&self) -> bool {
        match self {
            Self::Counter(value) | Self::Gauge(value) => Arc::strong_count(value) > 1,
            Self::Summary(summary) => Arc::strong_count(summary) > 1,
        }
    }
}

impl Recorder {
    /// A recorder without series. `message_size_window` is the window of `edgehub_message_size_bytes`.
    pub fn new(common: &CommonLabels, message_size_window: Duration) -> Self {
        let start = Instant::now();
        Self::with_clock(common, message_size_window, Arc::new(move || start.elapsed()))
    }

    fn with_clock(common: &CommonLabels, message_size_window: Duration, clock: Clock) -> Self {
        let iothub = common.iothub.clone();
        let common = label_text([
            ("iothub", common.iothub.as_str()),
            ("edge_device", &common.edge_device),
            ("instance_number", &common.instance_number.to_string()),
        ]);
        let windows = HashMap::from([("edgehub_message_size_bytes", message_size_window)]);
        let refused = Arc::new(AtomicU64::new(0));
        let families = RwLock::new(Families::default());
        Self { registry: Arc::new(Registry { clock, common, iothub, windows, refused, families }) }
    }

    /// Makes this the recorder of the process.
    ///
    /// # Errors
    /// Another recorder has been installed already.
    pub fn install(&self) -> Result<(), metrics::SetRecorderError<Self>> {
        metrics::set_global_recorder(self.clone())
    }

    /// The page in the Prometheus text format 0.0.4.
    pub fn render(&self) -> String {
        self.registry.sweep_when_due();
        exposition::render(&self.registry)
    }
}

impl Registry {
    /// Finds or makes a series; `None` when there is no room, the name is not allowed or has another kind.
    fn series<T>(&self, key: &Key, kind: Kind, handle: impl Fn(&Value) -> Option<Arc<T>>) -> Option<Arc<T>> {
        let mut name = key.name().to_owned();
        if kind == Kind::Counter && !name.ends_with("_total") {
            name.push_str("_total");
        }
        if !valid_name(&name) {
            return None;
        }
        let mut labels: Vec<_> = key
            .labels()
            .map(|label| (label.key(), label.value()))
            .filter(|(label, _)| !exposition::RESERVED_LABELS.contains(label))
            .collect();
        let text;
        if names::shows_identity_as_text(&name)
            && let Some((_, id)) = labels.iter_mut().find(|(label, _)| *label == "id")
        {
            text = names::identity_text(id, &self.iothub);
            *id = &text;
        }
        labels.sort_unstable();
        labels.dedup_by_key(|(label, _)| *label);
        let labels = label_text(labels);
        if let Some(family) = self.families.read().by_name.get(&name) {
            if family.kind != kind {
                return None;
            }
            if let Some(series) = family.series.get(&labels) {
                return handle(&series.value);
            }
        }
        let mut families = self.families.write();
        if families.series_count >= SERIES_MAX {
            self.sweep(&mut families);
        }
        let full = families.series_count >= SERIES_MAX;
        let Families { by_name, series_count, .. } = &mut *families;
        let family = by_name.entry(name.clone()).or_insert_with(|| Family { kind, series: BTreeMap::new() });
        if family.kind != kind {
            return None;
        }
        if let Some(series) = family.series.get(&labels) {
            return handle(&series.value);
        }
        if full {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let value = match kind {
            Kind::Counter => Value::Counter(Arc::default()),
            Kind::Gauge => Value::Gauge(Arc::default()),
            Kind::Summary => {
                let window = self.windows.get(name.as_str()).copied().unwrap_or(SUMMARY_WINDOW);
                Value::Summary(Arc::new(Summary::new(Arc::clone(&self.clock), window)))
            }
        };
        let made = handle(&value);
        let seen = value.fingerprint();
        family.series.insert(labels, Series { value, seen, changed_at: (self.clock)() });
        *series_count += 1;
        made
    }

    fn sweep_when_due(&self) {
        let swept_at = self.families.read().swept_at;
        if (self.clock)().saturating_sub(swept_at) >= SWEEP_INTERVAL {
            self.sweep(&mut self.families.write());
        }
    }

    /// Drops the series that are idle for too long.
    fn sweep(&self, families: &mut Families) {
        let now = (self.clock)();
        families.swept_at = now;
        let idle_max = Duration::from_secs(SERIES_IDLE_SECS_MAX);
        let mut dropped = 0;
        for family in families.by_name.values_mut() {
            family.series.retain(|_, series| {
                let fingerprint = series.value.fingerprint();
                if fingerprint != series.seen || series.value.held() {
                    series.seen = fingerprint;
                    series.changed_at = now;
                }
                let keep = now.saturating_sub(series.changed_at) < idle_max;
                dropped += usize::from(!keep);
                keep
            });
        }
        families.series_count -= dropped;
        families.by_name.retain(|_, family| !family.series.is_empty());
    }

    fn describe(&self, name: &KeyName, help: &SharedString) {
        let mut families = self.families.write();
        // Bounded like the series: descriptions come from program text.
        if families.described.len() < SERIES_MAX {
            families.described.insert(name.as_str().to_owned(), help.to_string());
        }
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, name: KeyName, _unit: Option<Unit>, help: SharedString) {
        self.registry.describe(&name, &help);
    }

    fn describe_gauge(&self, name: KeyName, _unit: Option<Unit>, help: SharedString) {
        self.registry.describe(&name, &help);
    }

    fn describe_histogram(&self, name: KeyName, _unit: Option<Unit>, help: SharedString) {
        self.registry.describe(&name, &help);
    }

    fn register_counter(&self, key: &Key, _metadata: &Metadata<'_>) -> Counter {
        let handle = |value: &Value| match value {
            Value::Counter(counter) => Some(Arc::clone(counter)),
            Value::Gauge(_) | Value::Summary(_) => None,
        };
        self.registry.series(key, Kind::Counter, handle).map_or_else(Counter::noop, Counter::from_arc)
    }

    fn register_gauge(&self, key: &Key, _metadata: &Metadata<'_>) -> Gauge {
        let handle = |value: &Value| match value {
            Value::Gauge(gauge) => Some(Arc::clone(gauge)),
            Value::Counter(_) | Value::Summary(_) => None,
        };
        self.registry.series(key, Kind::Gauge, handle).map_or_else(Gauge::noop, Gauge::from_arc)
    }

    fn register_histogram(&self, key: &Key, _metadata: &Metadata<'_>) -> Histogram {
        let handle = |value: &Value| match value {
            Value::Summary(summary) => Some(Arc::clone(summary)),
            Value::Counter(_) | Value::Gauge(_) => None,
        };
        self.registry.series(key, Kind::Summary, handle).map_or_else(Histogram::noop, Histogram::from_arc)
    }
}

#[cfg(test)]
mod tests;
