//! Owns the verb `status`: the whole hub on one screen.

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::sync::Arc;

use edgehub_broker::configuration::Origin;
use edgehub_broker::hub::{Hub, Status};
use edgehub_broker::upstream::{UpstreamState, UpstreamStatus};
use edgehub_routing::DEFAULT_PRIORITY;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use super::table::{Side, Table, bytes, printable, shortened, span};
use crate::log::{codes, recent};
use crate::pages::condition::Reason;
use crate::pages::{HealthAnswer, Pages};

/// Queues that the screen shows, the fullest first; JSON has all.
const QUEUES_SHOWN_MAX: usize = 10;
/// Codes that the screen shows, the latest first; JSON has all.
const CODES_SHOWN_MAX: usize = 5;
/// Characters of a text on the screen.
const TEXT_SHOWN_MAX: usize = 90;

/// What the hub itself does not know of its run.
pub struct Site {
    /// The health pages.
    pub pages: Arc<Pages>,
    /// Host name of the cloud hub.
    pub iothub: String,
    /// How it stands with the configuration.
    pub configuration: watch::Receiver<edgehub_broker::configuration::ConfigurationState>,
    /// When the program was started.
    pub started_at: OffsetDateTime,
}

/// `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusAnswer {
    /// Version of the program.
    pub version: String,
    /// The edge device.
    pub device: String,
    /// Host name of the cloud hub.
    pub iothub: Option<String>,
    /// When the program was started, and how long ago.
    pub started_at: Option<String>,
    /// How long it runs.
    pub uptime_ms: Option<u64>,
    /// As the health pages say.
    pub health: Option<HealthAnswer>,
    /// The configuration in force.
    pub configuration: ConfigurationState,
    /// The way up; `null` without one.
    pub upstream: Option<UpstreamAnswer>,
    /// The ways to targets of their own there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub upstream_targets: Vec<TargetAnswer>,
    /// Open connections and their limit.
    pub clients: ClientCount,
    /// All queues, in the order of their making.
    pub queues: Vec<QueueState>,
    /// The dead letters.
    pub dead_letters: DeadLettersState,
    /// The store.
    pub store: StoreState,
    /// Accepted messages that no route took, since the store was made.
    pub unrouted: u64,
    /// What the ledger of the whole store leaves unexplained.
    pub gap: i128,
    /// What was warned of since the start, by code.
    pub warnings: Vec<WarningState>,
}

/// The configuration in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigurationState {
    /// Where it comes from: `file`, `twin`, or `store` when it is that of the last run.
    pub source: Option<String>,
    /// Routes in force.
    pub routes: u64,
    /// What came of the desired properties of the twin; `null` without any.
    pub desired: Option<DesiredState>,
    /// Why the twin could not be read the last time; `null` when it could.
    pub pull_failed: Option<String>,
}

/// What came of desired properties.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredState {
    /// Their `$version`.
    pub version: Option<u64>,
    /// 200, or 400 when something of them is refused.
    pub code: u16,
    /// What is refused.
    pub description: String,
}

/// The way up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamAnswer {
    /// Host and port.
    pub address: String,
    /// `connecting`, `up`, `throttled` or `backing_off`.
    pub state: String,
    /// Since when.
    pub since: String,
    /// Why it is not up; empty while it is.
    pub reason: String,
    /// Connections lost or refused since the start.
    pub failures: u64,
    /// Transfers without an answer.
    pub in_flight: u64,
    /// Messages read and not settled.
    pub held: u64,
    /// Senders that are parked after a failure of their own.
    pub parked_senders: u64,
}

/// The way to a target of its own at the upstream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetAnswer {
    /// The target.
    pub target: String,
    /// The way there.
    #[serde(flatten)]
    pub way: UpstreamAnswer,
}

/// Open connections and their limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientCount {
    /// Open now.
    pub connected: u64,
    /// At most.
    pub max: u64,
}

/// A queue on the screen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Its name.
    pub queue: String,
    /// The endpoint it belongs to.
    pub endpoint: String,
    /// Its priority.
    pub priority: u32,
    /// No route leads there at present.
    pub detached: bool,
    /// Messages that wait.
    pub queued: u64,
    /// How long the oldest waits.
    pub oldest_age_secs: Option<u64>,
    /// Messages that were delivered since the store was made.
    pub delivered: u64,
}

/// The dead letters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLettersState {
    /// Messages that are there.
    pub count: u64,
    /// How long the oldest is there.
    pub oldest_age_secs: Option<u64>,
}

/// The store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreState {
    /// The level at which publishers are acknowledged.
    pub durability: String,
    /// What it takes up.
    pub used_bytes: u64,
    /// Its limit.
    pub max_bytes: Option<u64>,
    /// What is free in its file system.
    pub free_bytes: Option<u64>,
    /// Why new messages are refused.
    pub full: Option<String>,
}

/// What was warned of under one code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarningState {
    /// The code.
    pub code: String,
    /// `warning` or `error`, the last time.
    pub level: String,
    /// How often since the start.
    pub count: u64,
    /// When last.
    pub last_at: String,
    /// With which text.
    pub text: String,
    /// What to do.
    pub next: String,
}

impl StatusAnswer {
    /// The state at this moment.
    pub fn of(hub: &Hub, site: Option<&Site>) -> Self {
        let status = hub.status();
        let now = OffsetDateTime::now_utc();
        let uptime = site.map(|site| (now - site.started_at).whole_milliseconds());
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            iothub: site.map(|site| site.iothub.clone()),
            started_at: site.map(|site| shown(site.started_at)),
            uptime_ms: uptime.map(|uptime| u64::try_from(uptime).unwrap_or_default()),
            health: site.map(|site| site.pages.health()),
            configuration: configuration(hub, site),
            upstream: status.upstream.as_ref().map(way),
            upstream_targets: targets(&status),
            clients: ClientCount { connected: status.clients.len() as u64, max: hub.clients_max() as u64 },
            queues: queues(&status),
            dead_letters: DeadLettersState {
                count: status.dead_letters.count,
                oldest_age_secs: status.dead_letters.oldest_age_secs,
            },
            store: StoreState {
                durability: status.durability.to_owned(),
                used_bytes: status.space.used_bytes,
                max_bytes: status.space.max_bytes,
                free_bytes: status.space.free_bytes,
                full: status.space.full,
            },
            unrouted: status.unrouted,
            gap: status.gap,
            device: status.device,
            warnings: warnings(),
        }
    }

    /// The same for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, text: String| {
            let _infallible = writeln!(out, "{name:<14} {}", printable(&text));
        };
        let iothub = self.iothub.as_ref().map(|host| format!(" of {host}")).unwrap_or_default();
        let uptime = self.uptime_ms.map(|uptime| format!(", up for {}", span(uptime))).unwrap_or_default();
        line("hub", format!("{}{iothub}, edgehub {}{uptime}", self.device, self.version));
        if let Some(health) = &self.health {
            line("health", health.status.clone());
            for Reason { code, since, hint } in health.reasons.iter().chain(&health.warnings) {
                line("", format!("{} since {since}: {hint}", code.as_str()));
            }
        }
        line("configuration", self.configuration.text());
        line("upstream", self.upstream.as_ref().map_or("none".into(), UpstreamAnswer::text));
        for target in &self.upstream_targets {
            line("", format!("to {}: {}", target.target, target.way.text()));
        }
        line("clients", format!("{} of at most {}", self.clients.connected, self.clients.max));
        line("store", self.store.text());
        let oldest = self.dead_letters.oldest_age_secs;
        let oldest =
            oldest.map(|secs| format!(", the oldest for {}", span(secs * 1_000))).unwrap_or_default();
        line("dead letters", format!("{}{oldest}", self.dead_letters.count));
        let gap = if self.gap == 0 { "adds up".into() } else { format!("GAP {}", self.gap) };
        line("ledger", format!("{gap}; {} messages that no route took", self.unrouted));
        self.queues_text(&mut out);
        self.warnings_text(&mut out);
        out
    }

    fn queues_text(&self, out: &mut String) {
        let mut fullest: Vec<&QueueState> = self.queues.iter().collect();
        fullest.sort_by_key(|queue| Reverse(queue.queued));
        let mut table = Table::new([
            ("QUEUE", Side::Left),
            ("PRIORITY", Side::Right),
            ("STATE", Side::Left),
            ("QUEUED", Side::Right),
            ("OLDEST", Side::Right),
            ("DELIVERED", Side::Right),
        ]);
        for queue in fullest.iter().take(QUEUES_SHOWN_MAX) {
            let priority = if queue.priority == DEFAULT_PRIORITY {
                "default".into()
            } else {
                queue.priority.to_string()
            };
            table.row([
                queue.queue.clone(),
                priority,
                if queue.detached { "detached".into() } else { "attached".into() },
                queue.queued.to_string(),
                queue.oldest_age_secs.map_or("-".into(), |secs| span(secs * 1_000)),
                queue.delivered.to_string(),
            ]);
        }
        let _infallible = write!(out, "\n{}\n", table.lines().join("\n"));
        if let Some(more) = fullest.len().checked_sub(QUEUES_SHOWN_MAX).filter(|more| *more > 0) {
            let _infallible = writeln!(out, "{more} more: `edgehub queues list`");
        }
    }

    fn warnings_text(&self, out: &mut String) {
        if self.warnings.is_empty() {
            out.push_str("\nNothing was warned of since the start.\n");
            return;
        }
        let mut latest: Vec<&WarningState> = self.warnings.iter().collect();
        latest.sort_by(|a, b| b.last_at.cmp(&a.last_at));
        let mut table = Table::new([
            ("CODE", Side::Left),
            ("COUNT", Side::Right),
            ("LAST", Side::Left),
            ("TEXT", Side::Left),
        ]);
        for warning in latest.iter().take(CODES_SHOWN_MAX) {
            let text = shortened(&warning.text, TEXT_SHOWN_MAX);
            table.row([warning.code.clone(), warning.count.to_string(), warning.last_at.clone(), text]);
        }
        let _infallible = write!(out, "\n{}\n", table.lines().join("\n"));
    }
}

impl ConfigurationState {
    fn text(&self) -> String {
        let source = self.source.as_deref().unwrap_or("nowhere yet");
        let mut text = format!("{} routes in force, from {source}", self.routes);
        if let Some(desired) = &self.desired {
            let version = desired.version.map(|version| format!(" {version}")).unwrap_or_default();
            let _infallible = write!(text, "; twin{version}: {} {}", desired.code, desired.description);
        }
        if let Some(why) = &self.pull_failed {
            let _infallible = write!(text, "; the twin cannot be read: {why}");
        }
        text.trim_end().to_owned()
    }
}

impl UpstreamAnswer {
    fn text(&self) -> String {
        let why = if self.reason.is_empty() { String::new() } else { format!(": {}", self.reason) };
        let mut text = format!("{} {} since {}{why}", self.address, self.state, self.since);
        let _infallible = write!(
            text,
            "; {} lost or refused, {} in flight, {} held",
            self.failures, self.in_flight, self.held
        );
        if self.parked_senders > 0 {
            let _infallible = write!(text, ", {} senders parked", self.parked_senders);
        }
        text
    }
}

impl StoreState {
    fn text(&self) -> String {
        let max = self.max_bytes.map_or("no limit".into(), |max| format!("of at most {}", bytes(max)));
        let free = self.free_bytes.map(|free| format!(", {} free on the disk", bytes(free)));
        let full = self.full.as_ref().map(|why| format!("; FULL: {why}"));
        format!(
            "{} used, {max}{}, durability {}{}",
            bytes(self.used_bytes),
            free.unwrap_or_default(),
            self.durability,
            full.unwrap_or_default()
        )
    }
}

fn configuration(hub: &Hub, site: Option<&Site>) -> ConfigurationState {
    let state = site.map(|site| site.configuration.borrow().clone()).unwrap_or_default();
    let source = state.in_force.map(|in_force| match in_force.origin {
        Origin::File => "file".to_owned(),
        Origin::Store => "store".to_owned(),
        Origin::Twin => "twin".to_owned(),
    });
    let desired = state.desired.map(|status| DesiredState {
        version: status.desired_version,
        code: status.code,
        description: status.description,
    });
    ConfigurationState {
        source,
        routes: hub.routes_in_force() as u64,
        desired,
        pull_failed: state.pull_failed,
    }
}

fn targets(status: &Status) -> Vec<TargetAnswer> {
    let each = status.upstream_targets.iter();
    each.map(|status| TargetAnswer { target: status.target.to_string(), way: way(&status.way) }).collect()
}

fn way(upstream: &UpstreamStatus) -> UpstreamAnswer {
    let state = match upstream.state {
        UpstreamState::Connecting => "connecting",
        UpstreamState::Up => "up",
        UpstreamState::Throttled => "throttled",
        UpstreamState::BackingOff => "backing_off",
    };
    let since = i64::try_from(upstream.since_unix_secs).unwrap_or(i64::MAX);
    UpstreamAnswer {
        address: upstream.address.clone(),
        state: state.to_owned(),
        since: OffsetDateTime::from_unix_timestamp(since).map(shown).unwrap_or_default(),
        reason: upstream.reason.clone(),
        failures: upstream.failures,
        in_flight: upstream.in_flight as u64,
        held: upstream.held as u64,
        parked_senders: upstream.parked_senders as u64,
    }
}

fn queues(status: &Status) -> Vec<QueueState> {
    let queues = status.queues.iter().map(|queue| QueueState {
        queue: queue.queue.clone(),
        endpoint: queue.endpoint.clone(),
        priority: queue.priority,
        detached: queue.detached,
        queued: queue.ledger.queued,
        oldest_age_secs: queue.oldest_age_secs,
        delivered: queue.ledger.delivered,
    });
    queues.collect()
}

fn warnings() -> Vec<WarningState> {
    let warnings = recent::recent().into_iter().map(|recent| WarningState {
        code: recent.code.to_owned(),
        level: if recent.is_error { "error".into() } else { "warning".into() },
        count: recent.count,
        last_at: shown(recent.last_at),
        text: recent.text,
        next: codes::find(recent.code).map_or(String::new(), |known| known.next.to_owned()),
    });
    warnings.collect()
}

/// Whole seconds in RFC 3339.
pub(super) fn shown(at: OffsetDateTime) -> String {
    at.replace_nanosecond(0).unwrap_or(at).format(&Rfc3339).unwrap_or_default()
}
