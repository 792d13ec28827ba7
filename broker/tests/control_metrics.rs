//! What the control plane counts, under the names and labels that dashboards know.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

mod control_site;
mod module_site;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use control_site::{OWN, command, get, id, memory, quick, report_all, start};
use edgehub_broker::backend::{Backend, Command, Feature, MethodAnswer};
use edgehub_broker::hub::{Caller, Invocation};
use metrics::{
    Counter, CounterFn, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
};
use module_site::{connect, until};
use parking_lot::Mutex;
use serde_json::json;

/// How often each series was counted or observed.
#[derive(Default, Clone)]
struct Series(Arc<Mutex<BTreeMap<String, u64>>>);

struct One {
    series: Series,
    name: String,
}

impl Series {
    fn one(&self, key: &Key) -> Arc<One> {
        let mut labels: Vec<String> =
            key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        labels.sort_unstable();
        let name = key.name().trim_start_matches("edgehub_");
        Arc::new(One { series: self.clone(), name: format!("{name}{{{}}}", labels.join(",")) })
    }

    fn count(&self, name: &str) -> u64 {
        self.0.lock().get(name).copied().unwrap_or(0)
    }
}

impl CounterFn for One {
    fn increment(&self, value: u64) {
        *self.series.0.lock().entry(self.name.clone()).or_default() += value;
    }

    fn absolute(&self, value: u64) {
        self.series.0.lock().insert(self.name.clone(), value);
    }
}

impl HistogramFn for One {
    fn record(&self, _: f64) {
        self.increment(1);
    }
}

impl Recorder for Series {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.one(key))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.one(key))
    }
}

#[test]
fn the_control_plane_counts_under_the_known_names() {
    let series = Series::default();
    metrics::with_local_recorder(&series, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work());
    });
    for (name, count) in [
        ("gettwin_total{id=leaf,source=edge_hub}", 2),
        ("gettwin_duration_seconds{id=leaf,source=edge_hub}", 2),
        ("gettwin_total{id=leaf,source=upstream}", 1),
        ("gettwin_duration_seconds{id=leaf,source=upstream}", 1),
        ("reported_properties_total{id=leaf,target=edge_hub}", 2),
        ("reported_properties_update_duration_seconds{id=leaf,target=edge_hub}", 2),
        ("reported_properties_total{id=leaf,target=upstream}", 1),
        ("reported_properties_update_duration_seconds{id=leaf,target=upstream}", 1),
        ("direct_methods_total{from=upstream,to=leaf}", 1),
        ("direct_method_duration_seconds{from=upstream,to=leaf}", 1),
        ("direct_methods_total{from=edge1/caller,to=leaf}", 1),
        ("offline_count_total{id=edge1/$edgeHub}", 1),
        ("offline_duration_seconds{id=edge1/$edgeHub}", 2),
    ] {
        assert_eq!(series.count(name), count, "{name} among {:#?}", series.0.lock());
    }
}

async fn work() {
    let (hub, cloud) = start(&memory(), quick());
    let mut leaf = connect(&hub, "leaf").await;
    get(&hub, &mut leaf).await;
    report_all(&hub, &mut leaf, [json!({ "a": 1 }), json!({ "b": 1 })]).await;
    cloud.up().await;
    until(|| cloud.patches("leaf").len() == 1).await;
    get(&hub, &mut leaf).await;
    let unknown = Invocation {
        caller: Caller::Client(id("edge1/caller")),
        target: id("leaf"),
        name: "m".into(),
        payload: "null".into(),
        connect_timeout: Duration::ZERO,
        response_timeout: Duration::from_secs(20),
    };
    assert_eq!(hub.invoke(unknown).await.unwrap_err().status(), 404);
    hub.subscribe(&mut leaf.client, Feature::Methods, true);
    let answered = cloud.call("leaf", "m", "null").await;
    let Command::Invoke(call) = command(&mut leaf).await else { panic!("a call was expected") };
    hub.method_answered(&mut leaf.client, call.id, MethodAnswer { status: 200, payload: "null".into() });
    answered.await.unwrap();
    until(|| cloud.reads(OWN) == 1).await;
    cloud.down().await;
    cloud.up().await;
}
