//! Twin requests on one connection: those that wait for their link, those that wait for an answer, and their deadlines.

use std::collections::VecDeque;
use std::time::Duration;

use ahash::AHashMap;
use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::control::ControlError;
use super::convert;
use super::lanes::LaneId;
use crate::amqp::{Connection, LinkId, Message, SendError, SendOptions};

/// Requests of one identity that wait at a time.
pub(super) const REQUESTS_PER_IDENTITY_MAX: usize = 16;

/// Requests that wait at a time, over all identities.
pub(super) const REQUESTS_MAX: usize = 4_096;

/// Bytes of an error's text that are kept.
const ERROR_TEXT_BYTES_MAX: usize = 512;

type Answer<T> = oneshot::Sender<Result<T, ControlError>>;

/// What is asked of the upstream.
#[derive(Debug)]
pub(super) enum Ask {
    /// The whole twin.
    Get(Answer<Bytes>),
    /// A patch of reported properties.
    Patch(Bytes, Answer<Option<u64>>),
    /// Notifications of changed desired properties.
    Notify,
}

/// What came of a request that the upstream answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answered {
    /// The request is done.
    Done,
    /// Notifications are on.
    Notifying,
    /// Notifications are refused.
    NotNotifying(ControlError),
    /// The upstream asks for a pause.
    Throttled(String),
    /// A notification: desired properties changed.
    Desired(Bytes),
    /// Nobody asked, or nobody can read it.
    Stray,
}

impl Ask {
    /// Nobody waits for the answer any more.
    fn is_abandoned(&self) -> bool {
        match self {
            Ask::Get(answer) => answer.is_closed(),
            Ask::Patch(_, answer) => answer.is_closed(),
            Ask::Notify => false,
        }
    }

    /// Answers with an error. Whoever asked may have given up.
    pub(super) fn fail(self, error: ControlError) {
        match self {
            Ask::Get(answer) => drop(answer.send(Err(error))),
            Ask::Patch(_, answer) => drop(answer.send(Err(error))),
            Ask::Notify => {}
        }
    }
}

/// The requests of one connection.
#[derive(Debug, Default)]
pub(super) struct Twins {
    waiting: AHashMap<LaneId, VecDeque<(Ask, Instant)>>,
    /// By correlation id.
    asked: AHashMap<String, (LaneId, Ask, Instant)>,
    /// How many of each identity are there.
    counts: AHashMap<LaneId, usize>,
    total: usize,
}

impl Twins {
    /// Takes a request in; one beyond the bounds fails at once.
    pub(super) fn take(&mut self, lane: LaneId, ask: Ask, now: Instant) {
        let count = self.counts.get(&lane).copied().unwrap_or(0);
        // Notifications are asked for by the hub's own doing, once per session.
        let bounded = !matches!(ask, Ask::Notify);
        if bounded && (count >= REQUESTS_PER_IDENTITY_MAX || self.total >= REQUESTS_MAX) {
            ask.fail(ControlError::Timeout);
            return;
        }
        self.counts.insert(lane, count + 1);
        self.total += 1;
        self.waiting.entry(lane).or_default().push_back((ask, now));
    }

    /// Whether an identity waits for anything.
    pub(super) fn has(&self, lane: LaneId) -> bool {
        self.counts.contains_key(&lane)
    }

    /// Sends what an identity waits to ask, as far as the link's credit goes.
    ///
    /// # Errors
    /// Why the link takes no more now.
    pub(super) fn send(
        &mut self,
        lane: LaneId,
        link: LinkId,
        engine: &mut Connection,
        now: Instant,
    ) -> Result<(), SendError> {
        self.send_by(lane, now, |ask| {
            let (correlation, payload) = match ask {
                Ask::Get(_) => convert::twin_get(),
                Ask::Patch(patch, _) => convert::twin_patch(patch.clone()),
                Ask::Notify => convert::twin_notify(),
            };
            let options = SendOptions { settled: true, ..SendOptions::default() };
            engine.send(link, payload, options).map(|_| correlation)
        })
    }

    /// The same by way of `send`, which gives the correlation id.
    ///
    /// # Errors
    /// The first of `send` but for requests that are too large: those fail alone.
    pub(super) fn send_by(
        &mut self,
        lane: LaneId,
        now: Instant,
        mut send: impl FnMut(&Ask) -> Result<String, SendError>,
    ) -> Result<(), SendError> {
        while let Some((ask, _)) = self.waiting.get_mut(&lane).and_then(VecDeque::pop_front) {
            if ask.is_abandoned() {
                self.done(lane);
                continue;
            }
            match send(&ask) {
                Ok(correlation) => {
                    self.asked.insert(correlation, (lane, ask, now));
                }
                Err(SendError::TooLarge { limit_bytes }) => {
                    let text = format!("it is larger than the {limit_bytes} bytes that the upstream takes");
                    ask.fail(ControlError::Refused { status: 413, text });
                    self.done(lane);
                }
                Err(error) => {
                    self.waiting.entry(lane).or_default().push_front((ask, now));
                    return Err(error);
                }
            }
        }
        self.waiting.remove(&lane);
        Ok(())
    }

    /// Something came on the answer link of an identity.
    pub(super) fn answered(&mut self, lane: LaneId, message: &Message) -> Answered {
        let Ok(properties) = message.properties() else { return Answered::Stray };
        let body = message.body.data().unwrap_or_default();
        let Some(correlation) = properties.correlation_id else { return Answered::Desired(body) };
        let number = |name| message.annotation(name).ok().flatten().and_then(|value| value.as_i64());
        let status = number("status").and_then(|status| u16::try_from(status).ok()).unwrap_or(500);
        let version = number("version").and_then(|version| u64::try_from(version).ok());
        self.concluded(lane, &correlation.to_string(), status, version, body)
    }

    /// The request with this correlation id was answered.
    pub(super) fn concluded(
        &mut self,
        lane: LaneId,
        key: &str,
        status: u16,
        version: Option<u64>,
        body: Bytes,
    ) -> Answered {
        if self.asked.get(key).is_none_or(|(asker, _, _)| *asker != lane) {
            return Answered::Stray;
        }
        let Some((_, ask, _)) = self.asked.remove(key) else { return Answered::Stray };
        self.done(lane);
        if (200..300).contains(&status) {
            return match ask {
                // Whoever asked may have given up.
                Ask::Get(answer) => {
                    let _ = answer.send(Ok(body));
                    Answered::Done
                }
                Ask::Patch(_, answer) => {
                    let _ = answer.send(Ok(version));
                    Answered::Done
                }
                Ask::Notify => Answered::Notifying,
            };
        }
        let shown = &body[..body.len().min(ERROR_TEXT_BYTES_MAX)];
        let text = String::from_utf8_lossy(shown).into_owned();
        let throttled = status == 429;
        let error = match status {
            401 | 403 => ControlError::Unauthorized(format!("{status} {text}")),
            _ => ControlError::Refused { status, text: text.clone() },
        };
        let notify = matches!(ask, Ask::Notify);
        ask.fail(error.clone());
        match (throttled, notify) {
            (true, false) => Answered::Throttled(format!("a twin request was answered with 429 {text}")),
            (_, true) => Answered::NotNotifying(error),
            (false, false) => Answered::Done,
        }
    }

    /// All that an identity waits for fails.
    pub(super) fn fail(&mut self, lane: LaneId, error: &ControlError) {
        for (ask, _) in self.waiting.remove(&lane).into_iter().flatten() {
            ask.fail(error.clone());
        }
        for (_, (_, ask, _)) in self.asked.extract_if(|_, (asker, _, _)| *asker == lane) {
            ask.fail(error.clone());
        }
        self.total -= self.counts.remove(&lane).unwrap_or(0);
    }

    /// Fails what took too long. Gives the identities whose requests were sent and not answered.
    pub(super) fn look(&mut self, now: Instant, limit: Duration) -> Vec<LaneId> {
        let late = |since: Instant| now.duration_since(since) > limit;
        let mut stalled: Vec<LaneId> = Vec::new();
        let mut over: Vec<LaneId> = Vec::new();
        for (_, (lane, ask, _)) in self.asked.extract_if(|_, (_, _, since)| late(*since)) {
            ask.fail(ControlError::Timeout);
            over.push(lane);
            if !stalled.contains(&lane) {
                stalled.push(lane);
            }
        }
        for (lane, waiting) in &mut self.waiting {
            while waiting.front().is_some_and(|(_, since)| late(*since)) {
                if let Some((ask, _)) = waiting.pop_front() {
                    ask.fail(ControlError::Timeout);
                    over.push(*lane);
                }
            }
        }
        self.waiting.retain(|_, waiting| !waiting.is_empty());
        over.into_iter().for_each(|lane| self.done(lane));
        stalled
    }

    fn done(&mut self, lane: LaneId) {
        let Some(count) = self.counts.get_mut(&lane) else { return };
        *count -= 1;
        self.total -= 1;
        if *count == 0 {
            self.counts.remove(&lane);
        }
    }
}

/// Nobody waits in vain for what went down with the connection.
impl Drop for Twins {
    fn drop(&mut self) {
        let waiting = self.waiting.drain().flat_map(|(_, waiting)| waiting).map(|(ask, _)| ask);
        let asked = self.asked.drain().map(|(_, (_, ask, _))| ask);
        waiting.chain(asked).for_each(|ask| ask.fail(ControlError::Offline));
    }
}
