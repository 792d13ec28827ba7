//! Owns the simulated temperature sensor: module `tempSensor`, output `temperatureOutput`.

use std::f64::consts::TAU;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::board::{Board, Route};
use super::client::Publisher;
use super::connection_string::ConnectionString;

/// The application property that holds the sequence number.
pub(super) const SEQUENCE: &str = "sequence";
/// Readings above this machine temperature pass the filter, °C.
pub(super) const THRESHOLD_CELSIUS: f64 = 25.0;

/// Publishes readings at a steady rate until told to stop.
pub(super) async fn run(
    identity: ConnectionString,
    publisher: Publisher,
    board: Board,
    per_second: u32,
    mut stop: watch::Receiver<bool>,
) {
    let mut tick = tokio::time::interval(Duration::from_secs(1) / per_second.max(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for sequence in 0.. {
        tokio::select! {
            _ = tick.tick() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let warm = temperature_celsius(sequence) > THRESHOLD_CELSIUS;
        {
            let mut accounts = board.lock();
            accounts.route(Route::SensorToFilter).publish(sequence);
            if warm {
                accounts.end_to_end.publish(sequence);
            }
        }
        let topic = identity.output_topic(
            "temperatureOutput",
            &[("$.ct", "application/json"), ("$.ce", "utf-8"), (SEQUENCE, &sequence.to_string())],
        );
        let acknowledged = board.clone();
        let done = Box::new(move || {
            let mut accounts = acknowledged.lock();
            accounts.route(Route::SensorToFilter).acknowledge(sequence);
            if warm {
                accounts.end_to_end.acknowledge(sequence);
            }
        });
        if !publisher.publish(topic, reading(sequence).into_bytes(), done).await {
            return;
        }
    }
}

/// Rises and falls around the threshold, so that about half of the readings pass it.
fn temperature_celsius(sequence: u64) -> f64 {
    THRESHOLD_CELSIUS + 4.0 * (TAU * ((sequence % 20) as f64 + 0.5) / 20.0).sin()
}

fn reading(sequence: u64) -> String {
    let temperature = temperature_celsius(sequence);
    let created = time::OffsetDateTime::now_utc()
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default();
    serde_json::json!({
        "machine": { "temperature": temperature, "pressure": 1.0 + (temperature - 21.0) / 9.0 },
        "ambient": { "temperature": 21.0, "humidity": 25 },
        "timeCreated": created,
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_readings_are_warm() {
        let warm = (0..200).filter(|sequence| temperature_celsius(*sequence) > THRESHOLD_CELSIUS).count();
        assert_eq!(warm, 100);
    }
}
