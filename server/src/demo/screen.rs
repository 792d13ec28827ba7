//! Owns the live view: refreshed in place on a terminal, a line a second elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::board::{Board, Route};
use super::observe::HubView;

const TERMINAL_INTERVAL: Duration = Duration::from_millis(250);
const PLAIN_INTERVAL: Duration = Duration::from_secs(1);
/// Messages that one character of a queue's bar stands for.
const BAR_MESSAGES: u64 = 25;
const BAR_CHARS_MAX: u64 = 24;

/// The live view.
pub(super) struct Screen {
    board: Board,
    hub: watch::Receiver<HubView>,
    started: Instant,
    phase: String,
    terminal: bool,
    drawn_lines: usize,
    drawn: Option<Instant>,
    counts: [(u64, u64); 2],
    rates: [(u64, u64); 2],
    counted: Instant,
}

/// A route at one moment.
struct RouteLine {
    name: &'static str,
    into: u64,
    out: u64,
    rates: (u64, u64),
    queued: u64,
}

impl Screen {
    /// A view of these accounts and this hub.
    pub(super) fn new(board: Board, hub: watch::Receiver<HubView>) -> Self {
        let now = Instant::now();
        let terminal = std::io::stdout().is_terminal();
        Self {
            board,
            hub,
            started: now,
            phase: "starting".into(),
            terminal,
            drawn_lines: 0,
            drawn: None,
            counts: [(0, 0); 2],
            rates: [(0, 0); 2],
            counted: now,
        }
    }

    /// Names what is going on.
    pub(super) fn phase(&mut self, phase: impl Into<String>) {
        self.phase = phase.into();
    }

    /// Prints a line that stays.
    pub(super) fn event(&mut self, text: &str) {
        self.clear();
        print_lines(&[format!("{:5.1} s  {text}", self.started.elapsed().as_secs_f64())]);
        self.drawn = None;
    }

    /// Prints lines that stay, as they are.
    pub(super) fn text(&mut self, lines: &[String]) {
        self.clear();
        print_lines(lines);
        self.drawn = None;
    }

    /// Draws the state when it is time to.
    pub(super) fn refresh(&mut self) {
        let interval = if self.terminal { TERMINAL_INTERVAL } else { PLAIN_INTERVAL };
        if self.drawn.is_some_and(|drawn| drawn.elapsed() < interval) {
            return;
        }
        self.count();
        let routes = self.routes();
        let hub = self.hub.borrow().clone();
        let upstream = hub.status.upstream.as_ref().map_or("unknown", |upstream| &upstream.state);
        let upstream = if hub.fault.is_empty() { upstream } else { "unknown" };
        let hub_state = if hub.fault.is_empty() { "up" } else { "not answering" };
        let elapsed = self.started.elapsed().as_secs_f64();
        let lines = if self.terminal {
            block(elapsed, &self.phase, &routes, upstream, hub_state, hub.status.clients.len())
        } else {
            vec![line(elapsed, &self.phase, &routes, upstream)]
        };
        self.clear();
        print_lines(&lines);
        self.drawn_lines = if self.terminal { lines.len() } else { 0 };
        self.drawn = Some(Instant::now());
    }

    /// Removes the view that is refreshed in place.
    pub(super) fn clear(&mut self) {
        if self.drawn_lines > 0 {
            // Cursor up, then erase to the end of the screen (ECMA-48 CUU, ED).
            print!("\x1b[{}A\x1b[0J", self.drawn_lines);
            self.drawn_lines = 0;
        }
    }

    fn count(&mut self) {
        let elapsed_secs = self.counted.elapsed().as_secs_f64();
        if elapsed_secs < 0.9 {
            return;
        }
        let mut accounts = self.board.lock();
        for route in Route::ALL {
            let totals = accounts.route(route).totals();
            let before = self.counts[route.index()];
            let rate = |now: u64, before: u64| ((now - before) as f64 / elapsed_secs).round() as u64;
            self.rates[route.index()] = (rate(totals.acknowledged, before.0), rate(totals.seen, before.1));
            self.counts[route.index()] = (totals.acknowledged, totals.seen);
        }
        self.counted = Instant::now();
    }

    fn routes(&self) -> [RouteLine; 2] {
        let hub = self.hub.borrow();
        let mut accounts = self.board.lock();
        Route::ALL.map(|route| {
            let totals = accounts.route(route).totals();
            RouteLine {
                name: route.name(),
                into: totals.acknowledged,
                out: totals.seen,
                rates: self.rates[route.index()],
                queued: hub.status.ledger(route).queued,
            }
        })
    }
}

fn print_lines(lines: &[String]) {
    let mut out = std::io::stdout().lock();
    for line in lines {
        // A closed pipe is no reason to leave the children alone.
        let _ = writeln!(out, "{line}");
    }
    let _ = out.flush();
}

fn block(
    elapsed_secs: f64,
    phase: &str,
    routes: &[RouteLine],
    upstream: &str,
    hub: &str,
    clients: usize,
) -> Vec<String> {
    let mut lines = vec![
        format!("--- {elapsed_secs:5.1} s --- {phase} ---"),
        "route                   in  (per s)       out  (per s)   queued".to_owned(),
    ];
    for route in routes {
        let bar =
            "#".repeat(usize::try_from(route.queued.div_ceil(BAR_MESSAGES).min(BAR_CHARS_MAX)).unwrap_or(0));
        lines.push(format!(
            "{:<16} {:>9} {:>8} {:>9} {:>8} {:>8} {bar}",
            route.name, route.into, route.rates.0, route.out, route.rates.1, route.queued,
        ));
    }
    lines.push(format!("upstream: {upstream}   hub: {hub}   clients: {clients}"));
    lines
}

fn line(elapsed_secs: f64, phase: &str, routes: &[RouteLine], upstream: &str) -> String {
    let mut text = format!("{elapsed_secs:5.1} s  {phase}");
    for route in routes {
        text += &format!(" | {} in {} out {} queued {}", route.name, route.into, route.out, route.queued);
    }
    text + &format!(" | upstream {upstream}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_is_small_and_shows_depth_and_state() {
        let routes = Route::ALL.map(|route| RouteLine {
            name: route.name(),
            into: 123_456_789,
            out: 2,
            rates: (150, 75),
            queued: 999_999,
        });
        let lines = block(12.34, "upstream cut", &routes, "backing_off", "not answering", 2);
        assert!(lines.len() <= 12);
        assert!(lines.iter().all(|line| line.chars().count() <= 92), "{lines:#?}");
        assert!(lines[0].contains("12.3 s") && lines[0].contains("upstream cut"));
        assert!(lines[3].contains("999999 ####"));
        assert!(lines[4].contains("backing_off"));
        assert!(line(1.0, "normal", &routes, "up").ends_with("| upstream up"));
    }
}
