use super::*;
use std::collections::HashSet;

const EDGE: &str = "ed\"ge\\1\n";

fn recorder() -> (Recorder, Arc<AtomicU64>) {
    let now_secs = Arc::new(AtomicU64::new(0));
    let hand = Arc::clone(&now_secs);
    let common = CommonLabels {
        iothub: "h.example".into(),
        edge_device: EDGE.into(),
        instance_number: uuid::Uuid::nil(),
    };
    let clock: Clock = Arc::new(move || Duration::from_secs(hand.load(Ordering::Relaxed)));
    (Recorder::with_clock(&common, Duration::from_secs(3600), clock), now_secs)
}

/// One sample of a page.
#[derive(Debug)]
struct Sample {
    family: String,
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

impl Sample {
    fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(label, _)| label == name).map(|(_, value)| value.as_str())
    }
}

/// Reads a page and accepts nothing that the format does not allow: each family has HELP, TYPE and then its
/// samples, families and series are unique, names fit their family.
fn parse(page: &str) -> Vec<Sample> {
    assert!(page.is_empty() || page.ends_with('\n'));
    let (mut samples, mut families, mut series) = (Vec::new(), HashSet::new(), HashSet::new());
    let mut family: Option<(String, String)> = None;
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let name = help.split(' ').next().unwrap().to_owned();
            let declared = lines.next().unwrap().strip_prefix("# TYPE ").unwrap();
            let (typed, kind) = declared.split_once(' ').unwrap();
            assert_eq!(typed, name);
            assert!(families.insert(name.clone()), "{name} twice");
            assert!(kind != "counter" || name.ends_with("_total"));
            family = Some((name, kind.to_owned()));
            continue;
        }
        let (family, kind) = family.as_ref().expect("a sample after its head");
        let sample = parse_sample(family, line);
        let suffix = sample.name.strip_prefix(family.as_str()).expect("a name of the family");
        match (kind.as_str(), suffix) {
            ("counter" | "gauge", "") | ("summary", "_sum" | "_count") => {
                assert!(sample.label("quantile").is_none());
            }
            ("summary", "") => assert!(sample.label("quantile").is_some()),
            other => panic!("{other:?} in {line}"),
        }
        assert!(series.insert(line.rsplit_once(' ').unwrap().0.to_owned()), "{line} twice");
        samples.push(sample);
    }
    samples
}

fn parse_sample(family: &str, line: &str) -> Sample {
    let (name, mut rest) = line.split_once('{').expect("labels");
    let mut labels = Vec::new();
    loop {
        let (label, after) = rest.split_once("=\"").expect("a label");
        assert!(valid_name(label) && !label.contains(':'));
        let (mut value, mut characters) = (String::new(), after.char_indices());
        let end = loop {
            match characters.next().expect("a closing quote") {
                (at, '"') => break at,
                (_, '\\') => match characters.next().expect("an escape").1 {
                    'n' => value.push('\n'),
                    escaped @ ('"' | '\\') => value.push(escaped),
                    other => panic!("escape {other}"),
                },
                (_, plain) => value.push(plain),
            }
        };
        labels.push((label.to_owned(), value));
        rest = &after[end + 1..];
        match rest.split_at(1) {
            (",", more) => rest = more,
            ("}", value) => {
                let value = value.strip_prefix(' ').unwrap().parse().unwrap();
                return Sample { family: family.into(), name: name.into(), labels, value };
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_page_has_the_contracted_form() {
    let (recorder, _) = recorder();
    metrics::with_local_recorder(&recorder, || {
        metrics::counter!("edgehub_messages_received_total", "route_output" => "o", "id" => "a\"\\\n")
            .increment(3);
        metrics::gauge!("edgehub_connected_clients").set(-2.5);
        metrics::gauge!("edgehub_queue_length", "endpoint" => "iothub").set(7.0);
        let sizes = metrics::histogram!("edgehub_message_size_bytes", "id" => "leaf1");
        for size in 1..=100 {
            sizes.record(f64::from(size));
        }
        metrics::histogram!("edgehub_offline_duration_seconds", "id" => "x").record_many(1.0, 0);
        metrics::counter!("own_thing").increment(1);
    });
    let samples = parse(&recorder.render());
    for sample in &samples {
        let first: Vec<_> = sample.labels.iter().take(3).map(|(name, _)| name.as_str()).collect();
        assert_eq!(first, ["iothub", "edge_device", "instance_number"]);
        assert_eq!(sample.label("edge_device"), Some(EDGE));
        let known = names::find(&sample.family);
        let telemetry = sample.label("ms_telemetry");
        assert_eq!(telemetry, known.filter(|known| known.telemetry).map(|_| "True"), "{sample:?}");
    }
    let one = |name: &str| {
        let mut found = samples.iter().filter(|sample| sample.name == name);
        let sample = found.next().unwrap_or_else(|| panic!("{name}"));
        assert!(found.next().is_none());
        sample
    };
    let received = one("edgehub_messages_received_total");
    assert_eq!((received.value, received.label("id")), (3.0, Some("a\"\\\n")));
    assert_eq!(received.labels.last().unwrap().0, "ms_telemetry");
    assert_eq!(one("edgehub_connected_clients").value, -2.5);
    assert_eq!(one("own_thing_total").value, 1.0);
    assert_eq!(one("edgehub_message_size_bytes_sum").value, 5050.0);
    assert_eq!(one("edgehub_message_size_bytes_count").value, 100.0);
    let quantiles: Vec<_> = samples
        .iter()
        .filter(|sample| sample.name == "edgehub_message_size_bytes")
        .map(|sample| (sample.label("quantile").unwrap(), sample.value))
        .collect();
    let wanted = [("0.1", 10.0), ("0.5", 50.0), ("0.9", 90.0), ("0.99", 99.0)];
    for ((label, value), (wanted_label, wanted)) in quantiles.iter().zip(wanted) {
        assert!(*label == wanted_label && (value / wanted - 1.0).abs() < 0.0101, "{quantiles:?}");
    }
    assert_eq!(quantiles.len(), wanted.len());
    assert!(
        samples
            .iter()
            .any(|sample| sample.name == "edgehub_offline_duration_seconds" && sample.value.is_nan())
    );
}

/// The reference's metrics: name, kind, and whether its collector may forward them.
const OF_THE_REFERENCE: [(&str, Kind, bool); 21] = [
    ("edgehub_messages_received_total", Kind::Counter, true),
    ("edgehub_message_size_bytes", Kind::Summary, false),
    ("edgehub_messages_sent_total", Kind::Counter, true),
    ("edgehub_message_send_duration_seconds", Kind::Summary, false),
    ("edgehub_message_process_duration_seconds", Kind::Summary, true),
    ("edgehub_messages_dropped_total", Kind::Counter, true),
    ("edgehub_messages_unack_total", Kind::Counter, true),
    ("edgehub_queue_length", Kind::Gauge, true),
    ("edgehub_gettwin_total", Kind::Counter, true),
    ("edgehub_gettwin_duration_seconds", Kind::Summary, false),
    ("edgehub_reported_properties_total", Kind::Counter, true),
    ("edgehub_reported_properties_update_duration_seconds", Kind::Summary, false),
    ("edgehub_direct_methods_total", Kind::Counter, true),
    ("edgehub_direct_method_duration_seconds", Kind::Summary, false),
    ("edgehub_offline_count_total", Kind::Counter, true),
    ("edgehub_offline_duration_seconds", Kind::Summary, true),
    ("edgehub_operation_retry_total", Kind::Counter, true),
    ("edgehub_client_connect_failed_total", Kind::Counter, true),
    ("edgehub_client_connect_success_total", Kind::Counter, false),
    ("edgehub_client_disconnect_total", Kind::Counter, false),
    ("edgehub_connected_clients", Kind::Gauge, false),
];

#[test]
fn the_reference_s_metrics_keep_name_kind_and_mark() {
    for (name, kind, telemetry) in OF_THE_REFERENCE {
        let known = names::find(name).unwrap_or_else(|| panic!("{name} is not known"));
        assert_eq!((known.kind, known.telemetry), (kind, telemetry), "{name}");
    }
    let (recorder, _) = recorder();
    metrics::with_local_recorder(&recorder, || {
        // As the rooms of twins and methods record them.
        metrics::counter!("edgehub_gettwin_total", "source" => "upstream", "id" => "leaf1").increment(1);
        metrics::histogram!("edgehub_gettwin_duration_seconds", "source" => "upstream", "id" => "leaf1")
            .record(0.5);
        metrics::counter!("edgehub_direct_methods_total", "from" => "upstream", "to" => "e/m").increment(1);
        metrics::histogram!("edgehub_direct_method_duration_seconds", "from" => "upstream", "to" => "e/m")
            .record(0.5);
    });
    let samples = parse(&recorder.render());
    let of = |name: &str| samples.iter().filter(|sample| sample.family == name).collect::<Vec<_>>();
    for name in ["edgehub_gettwin_duration_seconds", "edgehub_direct_method_duration_seconds"] {
        let quantiles: Vec<_> = of(name).into_iter().filter_map(|sample| sample.label("quantile")).collect();
        assert_eq!(quantiles, ["0.1", "0.5", "0.9", "0.99"], "{name}");
        assert!(of(name).iter().all(|sample| sample.label("ms_telemetry").is_none()));
    }
    assert_eq!(of("edgehub_gettwin_total")[0].label("ms_telemetry"), Some("True"));
}

#[test]
fn connects_show_the_identity_as_the_reference_writes_it() {
    let (recorder, _) = recorder();
    metrics::with_local_recorder(&recorder, || {
        metrics::counter!("edgehub_client_connect_success_total", "id" => "leaf1").increment(1);
        metrics::counter!("edgehub_client_disconnect_total", "id" => "edge1/filter").increment(1);
        metrics::counter!("edgehub_client_connect_failed_total", "id" => "leaf1", "reason" => "x")
            .increment(1);
    });
    let samples = parse(&recorder.render());
    let id =
        |name: &str| samples.iter().find(|sample| sample.name == name).and_then(|sample| sample.label("id"));
    assert_eq!(
        id("edgehub_client_connect_success_total"),
        Some("DeviceId: leaf1 [IotHubHostName: h.example]")
    );
    assert_eq!(
        id("edgehub_client_disconnect_total"),
        Some("DeviceId: edge1; ModuleId: filter [IotHubHostName: h.example]")
    );
    assert_eq!(id("edgehub_client_connect_failed_total"), Some("leaf1"));
}

#[test]
fn every_known_metric_is_documented_with_its_kind() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    for known in known() {
        let row =
            text.lines().find(|line| line.starts_with('|') && line.contains(&format!("`{}`", known.name)));
        let row = row.unwrap_or_else(|| panic!("{} is not in docs/reference/metrics.md", known.name));
        assert!(row.split('|').nth(2).unwrap().trim().starts_with(known.kind.word()), "{row}");
    }
}

#[test]
fn label_order_does_not_make_a_new_series() {
    let (recorder, _) = recorder();
    metrics::with_local_recorder(&recorder, || {
        metrics::counter!("x_total", "a" => "1", "b" => "2").increment(1);
        metrics::counter!("x_total", "b" => "2", "a" => "1").increment(1);
        metrics::counter!("x_total", "b" => "2", "a" => "1", "iothub" => "forged").increment(1);
    });
    let samples = parse(&recorder.render());
    assert_eq!(samples.len(), 1);
    assert_eq!(samples[0].value, 3.0);
}

#[test]
fn one_name_has_one_kind_and_bad_names_are_refused() {
    let (recorder, _) = recorder();
    metrics::with_local_recorder(&recorder, || {
        metrics::gauge!("x_total").set(4.0);
        metrics::counter!("x_total", "a" => "1").increment(1);
        metrics::counter!("not a name").increment(1);
    });
    assert!(parse(&recorder.render().replace("# TYPE x_total gauge", "# TYPE x_total counter")).len() == 1);
}

#[test]
fn series_are_bounded_and_refusals_are_counted() {
    let (recorder, _) = recorder();
    metrics::with_local_recorder(&recorder, || {
        for number in 0..SERIES_MAX + 5 {
            metrics::counter!("x_total", "id" => number.to_string()).increment(1);
        }
    });
    let samples = parse(&recorder.render());
    assert_eq!(samples.len(), SERIES_MAX + 1);
    let refused = samples.iter().find(|sample| sample.name == "edgehub_metrics_series_refused_total");
    assert_eq!(refused.map(|sample| sample.value), Some(5.0));
}

#[test]
fn idle_series_are_dropped_unless_somebody_holds_them() {
    let (recorder, now_secs) = recorder();
    let held = metrics::with_local_recorder(&recorder, || {
        metrics::counter!("x_total", "id" => "gone").increment(1);
        metrics::histogram!("y_seconds", "id" => "gone").record(1.0);
        metrics::counter!("x_total", "id" => "held")
    });
    now_secs.store(700, Ordering::Relaxed);
    assert_eq!(parse(&recorder.render()).len(), 8);
    now_secs.store(700 + SERIES_IDLE_SECS_MAX - 1, Ordering::Relaxed);
    assert_eq!(parse(&recorder.render()).len(), 8);
    now_secs.store(1_400 + SERIES_IDLE_SECS_MAX, Ordering::Relaxed);
    held.increment(2);
    let samples = parse(&recorder.render());
    assert_eq!(samples.len(), 1);
    assert_eq!(samples[0].label("id"), Some("held"));
}

#[test]
fn every_known_counter_ends_in_total() {
    for known in known() {
        assert_eq!(known.kind == Kind::Counter, known.name.ends_with("_total"), "{}", known.name);
        assert!(valid_name(known.name));
    }
}
