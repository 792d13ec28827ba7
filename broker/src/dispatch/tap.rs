//! A look at the messages that pass: a condition of the route language, a bounded sample, nothing changed.
//!
//! While no tap is open, a message pays one relaxed load. An open tap never makes a sender wait: what comes faster
//! than it is looked at is counted and left out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_routing::{DEFAULT_PRIORITY, Decision, MessageSource, RouteSpec, RouteTable};
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc;

use super::view::View;
use crate::message::Message;

/// Taps that may be open at a time.
pub const TAPS_OPEN_MAX: usize = 4;
/// Messages that one tap takes within a second; further ones are counted only.
pub const TAP_MESSAGES_PER_SEC_MAX: u32 = 100;
/// Messages of one tap that wait to be looked at.
const WAITING_MAX: usize = 64;
/// Longest condition or source, in bytes.
const TEXT_BYTES_MAX: usize = 8 * 1024;

/// Which messages are looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TapOptions {
    /// A condition as behind `WHERE`; none takes every message.
    pub condition: Option<String>,
    /// A source as behind `FROM`; none is `/messages/*`.
    pub source: Option<String>,
}

/// Why a tap is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TapError {
    /// Condition or source do not compile.
    #[error("the condition or source cannot be used: {0}")]
    Condition(String),
    /// As many are open as may be.
    #[error("{TAPS_OPEN_MAX} taps are open, which is the limit; end one of them")]
    TooMany,
}

/// A message that was looked at.
#[derive(Clone, Debug)]
pub struct Tapped {
    /// The stored form of the message: [`Message::from_record`] reads it.
    pub record: Bytes,
    /// Ids of the endpoints that it went to; empty if no route took it.
    pub endpoints: Vec<Arc<str>>,
}

/// An open tap; dropping it closes it.
pub struct Tap {
    taps: Arc<Taps>,
    own: Arc<Open>,
    receiver: mpsc::Receiver<Tapped>,
}

/// The open taps of a hub.
#[derive(Default)]
pub(super) struct Taps {
    /// How many there are; looked at for each message, without a lock.
    count: AtomicUsize,
    open: RwLock<Vec<Arc<Open>>>,
}

struct Open {
    table: RouteTable,
    sender: mpsc::Sender<Tapped>,
    matched: AtomicU64,
    left_out: AtomicU64,
    pace: Mutex<Pace>,
}

/// How many were taken within the second that is under way.
struct Pace {
    second_began: Instant,
    taken: u32,
}

impl Tap {
    /// The next message that was taken.
    pub async fn next(&mut self) -> Option<Tapped> {
        self.receiver.recv().await
    }

    /// Messages that met the condition so far.
    pub fn matched(&self) -> u64 {
        self.own.matched.load(Ordering::Relaxed)
    }

    /// Of those, messages that came too fast and were left out.
    pub fn left_out(&self) -> u64 {
        self.own.left_out.load(Ordering::Relaxed)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let mut open = self.taps.open.write();
        open.retain(|other| !Arc::ptr_eq(other, &self.own));
        self.taps.count.store(open.len(), Ordering::Relaxed);
    }
}

impl Taps {
    /// Opens a tap.
    pub(super) fn open(self: &Arc<Self>, options: &TapOptions) -> Result<Tap, TapError> {
        let table = compile(options)?;
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let own = Arc::new(Open {
            table,
            sender,
            matched: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
            pace: Mutex::new(Pace { second_began: Instant::now(), taken: 0 }),
        });
        let mut open = self.open.write();
        if open.len() >= TAPS_OPEN_MAX {
            return Err(TapError::TooMany);
        }
        open.push(own.clone());
        self.count.store(open.len(), Ordering::Relaxed);
        drop(open);
        Ok(Tap { taps: self.clone(), own, receiver })
    }

    /// Whether anybody looks.
    #[inline]
    pub(super) fn any(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// Shows a message that has been decided to the open taps. `endpoints` is asked for only when one takes it.
    #[cold]
    pub(super) fn show(
        &self,
        source: &MessageSource<'_>,
        message: &Message,
        endpoints: impl Fn() -> Vec<Arc<str>>,
    ) {
        let open = self.open.read().clone();
        for tap in open.iter().filter(|tap| tap.takes(source, message)) {
            tap.matched.fetch_add(1, Ordering::Relaxed);
            let sent = tap.keeps_pace() && {
                // The record is a copy: it keeps no receive buffer alive.
                let tapped = Tapped { record: message.to_record(), endpoints: endpoints() };
                tap.sender.try_send(tapped).is_ok()
            };
            if !sent {
                tap.left_out.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl Open {
    fn takes(&self, source: &MessageSource<'_>, message: &Message) -> bool {
        let Ok(candidates) = self.table.candidates(source) else { return false };
        let mut decision = Decision::new();
        self.table.decide(&candidates, &View::new(message), &mut decision);
        !decision.targets.is_empty()
    }

    fn keeps_pace(&self) -> bool {
        let now = Instant::now();
        let mut pace = self.pace.lock();
        if now.duration_since(pace.second_began) >= Duration::from_secs(1) {
            *pace = Pace { second_began: now, taken: 0 };
        }
        pace.taken += 1;
        pace.taken <= TAP_MESSAGES_PER_SEC_MAX
    }
}

/// A table of one route, whose match is what the tap takes.
fn compile(options: &TapOptions) -> Result<RouteTable, TapError> {
    let condition = options.condition.as_deref().filter(|text| !text.trim().is_empty());
    let source = options.source.as_deref().unwrap_or("/messages/*");
    if condition.map_or(0, str::len) + source.len() > TEXT_BYTES_MAX {
        return Err(TapError::Condition(format!("they are longer than {TEXT_BYTES_MAX} bytes together")));
    }
    let filter = condition.map(|text| format!("WHERE {text} ")).unwrap_or_default();
    let text = format!("FROM {source} {filter}INTO $upstream");
    let spec = RouteSpec {
        name: "tap",
        text: &text,
        priority: DEFAULT_PRIORITY,
        time_to_live_secs: 0,
        upstream_target: None,
    };
    let (table, errors) = RouteTable::compile([spec], "tap");
    match errors.first() {
        None => Ok(table),
        Some(error) => Err(TapError::Condition(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;
    use crate::message::{Origin, Properties, PropertyName, Sender};

    fn message(level: &str) -> Message {
        let identity = Identity::parse("edge1/press").unwrap();
        let sender = Arc::new(Sender { identity, origin: Origin::Internal, model_id: None });
        let own = [(PropertyName::Application("level"), level)];
        Message::new(sender, Properties::copied_from(own), Bytes::new())
    }

    fn open(taps: &Arc<Taps>, condition: &str, source: Option<&str>) -> Result<Tap, TapError> {
        taps.open(&TapOptions { condition: Some(condition.into()), source: source.map(str::to_owned) })
    }

    const PRESS: MessageSource<'_> = MessageSource::Module { module: "press", output: Some("alarm") };

    #[test]
    fn a_tap_takes_what_its_condition_and_source_say() {
        let taps = Arc::new(Taps::default());
        assert!(!taps.any());
        let mut hot = open(&taps, "level = 'hot'", None).unwrap();
        let mut devices = open(&taps, "", Some("/messages/modules/other/*")).unwrap();
        assert!(taps.any());
        for level in ["hot", "cold", "hot"] {
            taps.show(&PRESS, &message(level), || vec!["iothub".into()]);
        }
        assert_eq!((hot.matched(), hot.left_out(), devices.matched()), (2, 0, 0));
        assert_eq!(hot.receiver.try_recv().unwrap().endpoints, ["iothub".into()]);
        assert!(devices.receiver.try_recv().is_err());
        drop((hot, devices));
        assert!(!taps.any());
    }

    #[test]
    fn what_comes_too_fast_is_counted_and_nobody_waits() {
        let taps = Arc::new(Taps::default());
        let tap = open(&taps, "", None).unwrap();
        let total = 1_000;
        for _ in 0..total {
            taps.show(&PRESS, &message("x"), Vec::new);
        }
        assert_eq!(tap.matched(), total);
        assert!(tap.left_out() >= total - WAITING_MAX as u64, "{}", tap.left_out());
    }

    #[test]
    fn taps_are_few_and_their_conditions_are_checked() {
        let taps = Arc::new(Taps::default());
        let _open: Vec<_> = (0..TAPS_OPEN_MAX).map(|_| open(&taps, "true", None).unwrap()).collect();
        assert_eq!(open(&taps, "true", None).err(), Some(TapError::TooMany));
        for bad in ["level = 5 AND", "level =", "((("] {
            assert!(matches!(open(&taps, bad, None), Err(TapError::Condition(_))), "{bad}");
        }
        assert!(matches!(open(&taps, &"a".repeat(TEXT_BYTES_MAX), None), Err(TapError::Condition(_))));
        assert!(matches!(open(&taps, "true", Some("nowhere")), Err(TapError::Condition(_))));
    }
}
