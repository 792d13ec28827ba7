//! Owns the table at the end and the verdict.

use super::board::Route;
use super::observe::Ledger;
use super::tally::Totals;

/// Everything that the table and the verdict are made of.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The demonstration's own account of each route.
    pub(super) totals: [Totals; 2],
    /// The hub's account of each route.
    pub(super) ledgers: [Ledger; 2],
    /// The account from the sensor to the cloud, warm readings only.
    pub(super) end_to_end: Totals,
    /// What the hub's ledger leaves unexplained.
    pub(super) gap: i64,
    /// What could not be read as a message of the demonstration.
    pub(super) unreadable: u64,
    /// Clients other than the demonstration's used the upstream route too.
    pub(super) others: u64,
    /// Time to drain after the outage of the upstream and how many messages it held back.
    pub(super) drain: Option<(f64, u64)>,
}

impl Outcome {
    /// The table, one row per figure and one column per route.
    pub(super) fn table(&self) -> Vec<String> {
        let row = |name: &str, values: [String; 2]| format!("{name:<34}{:>18}{:>18}", values[0], values[1]);
        let of_hub = |name: &str, value: fn(&Ledger) -> u64| {
            row(name, [value(&self.ledgers[0]).to_string(), value(&self.ledgers[1]).to_string()])
        };
        let of_tally = |name: &str, value: fn(&Totals) -> u64| {
            row(name, [value(&self.totals[0]).to_string(), value(&self.totals[1]).to_string()])
        };
        let mut lines = vec![
            String::new(),
            row("", Route::ALL.map(|route| route.name().to_owned())),
            "-".repeat(70),
            of_hub("accepted", |ledger| ledger.accepted),
            of_hub("delivered", |ledger| ledger.delivered),
            of_hub("expired", |ledger| ledger.expired),
        ];
        let mut reasons: Vec<&String> =
            self.ledgers.iter().flat_map(|ledger| ledger.dropped.keys()).collect();
        reasons.sort();
        reasons.dedup();
        if reasons.is_empty() {
            lines.push(row("dropped", ["0".into(), "0".into()]));
        }
        for reason in reasons {
            let count = |ledger: &Ledger| ledger.dropped.get(reason).copied().unwrap_or(0).to_string();
            lines
                .push(row(&format!("dropped: {reason}"), [count(&self.ledgers[0]), count(&self.ledgers[1])]));
        }
        lines.extend([
            of_hub("dead-lettered", |ledger| ledger.dead_lettered),
            of_hub("queued", |ledger| ledger.queued),
            of_tally("duplicates (at least once)", Totals::duplicates),
            of_tally("order breaks", |totals| totals.order_breaks),
            of_tally("acknowledged to the sender", |totals| totals.acknowledged),
            of_tally("  of these missing", |totals| totals.missing),
        ]);
        if let Some((secs, messages)) = self.drain {
            let shown = [String::new(), format!("{secs:.1} s ({messages})")];
            lines.push(row("time to drain (messages held)", shown));
        }
        lines.push("-".repeat(70));
        lines.push(format!(
            "sensor to cloud, through both: {} warm readings acknowledged, {} arrived, {} missing",
            self.end_to_end.acknowledged, self.end_to_end.seen, self.end_to_end.missing
        ));
        lines
    }

    /// What speaks against the hub; empty when nothing does.
    pub(super) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut claim = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        for route in Route::ALL {
            let (name, totals, ledger) =
                (route.name(), &self.totals[route.index()], &self.ledgers[route.index()]);
            claim(totals.acknowledged > 0, format!("{name}: no message was acknowledged"));
            claim(
                totals.missing == 0,
                format!("{name}: {} acknowledged messages are missing", totals.missing),
            );
            claim(totals.order_breaks == 0, format!("{name}: the order broke {} times", totals.order_breaks));
            claim(totals.strange == 0, format!("{name}: {} messages that nobody sent", totals.strange));
            claim(
                totals.unacknowledged() == 0,
                format!("{name}: {} not acknowledged", totals.unacknowledged()),
            );
            let dropped: u64 = ledger.dropped.values().sum();
            let lost = ledger.expired + dropped + ledger.dead_lettered;
            claim(lost == 0, format!("{name}: {lost} messages expired, dropped or dead-lettered"));
            claim(ledger.queued == 0, format!("{name}: {} messages still wait", ledger.queued));
            claim(ledger.gap == 0, format!("{name}: the hub's ledger has a gap of {}", ledger.gap));
            // Each message that was seen was accepted at least once, and each delivery was an arrival.
            if !(route == Route::FilterToCloud && self.others > 0) {
                for (what, count) in [("accepted", ledger.accepted), ("delivered", ledger.delivered)] {
                    claim(
                        (totals.seen..=totals.arrivals).contains(&count),
                        format!(
                            "{name}: the hub says {count} {what}, but {} messages arrived, {} with repeats",
                            totals.seen, totals.arrivals
                        ),
                    );
                }
            }
        }
        let missing = self.end_to_end.missing;
        claim(missing == 0, format!("sensor to cloud: {missing} acknowledged readings are missing"));
        claim(self.end_to_end.order_breaks == 0, "sensor to cloud: the order broke".into());
        claim(self.gap == 0, format!("the hub's ledger has a gap of {}", self.gap));
        claim(self.unreadable == 0, format!("{} messages could not be read", self.unreadable));
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Outcome {
        let totals = Totals { published: 10, acknowledged: 10, seen: 10, arrivals: 12, ..Totals::default() };
        let ledger = Ledger { accepted: 11, delivered: 11, ..Ledger::default() };
        Outcome {
            totals: [totals; 2],
            ledgers: [ledger.clone(), ledger],
            end_to_end: totals,
            drain: Some((1.25, 300)),
            ..Outcome::default()
        }
    }

    #[test]
    fn a_good_run_has_no_faults_and_a_full_table() {
        let outcome = good();
        assert_eq!(outcome.faults(), Vec::<String>::new());
        let table = outcome.table().join("\n");
        for figure in
            ["accepted", "delivered", "expired", "dropped", "queued", "duplicates", "order", "1.2 s (300)"]
        {
            assert!(table.contains(figure), "{figure} in\n{table}");
        }
    }

    #[test]
    fn every_deviation_is_a_fault() {
        let spoilers: [fn(&mut Outcome); 12] = [
            |outcome| outcome.totals[0].missing = 1,
            |outcome| outcome.totals[1].order_breaks = 1,
            |outcome| outcome.totals[0].strange = 1,
            |outcome| outcome.totals[0].published = 11,
            |outcome| outcome.ledgers[1].expired = 1,
            |outcome| outcome.ledgers[1].dropped = [("purged".to_owned(), 1)].into(),
            |outcome| outcome.ledgers[0].queued = 1,
            |outcome| outcome.ledgers[0].accepted = 13,
            |outcome| outcome.ledgers[0].delivered = 9,
            |outcome| outcome.gap = -1,
            |outcome| outcome.end_to_end.missing = 1,
            |outcome| outcome.unreadable = 1,
        ];
        for (index, spoil) in spoilers.into_iter().enumerate() {
            let mut outcome = good();
            spoil(&mut outcome);
            assert_eq!(outcome.faults().len(), 1, "spoiler {index}");
        }
        assert!(!Outcome::default().faults().is_empty(), "a run without messages proves nothing");
    }
}
