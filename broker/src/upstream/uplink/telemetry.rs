//! Messages on a connection: transfers as credit allows, a turn per lane, and what their answers mean.

use std::time::Duration;

use edgehub_storage::DeadLetterReason;
use metrics::counter;
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::super::fates::{DROP_WARNINGS, deliver};
use super::super::lanes::LaneId;
use super::super::remote::{Phase, Remote};
use super::super::verdict::Verdict;
use super::super::work::Work;
use super::Uplink;
use crate::amqp::{DeliveryId, LinkKind, MESSAGE_FORMAT_BATCH, Outcome, SendError, SendOptions};
use crate::delivery::Queued;
use crate::head::warn_limit::WarnLimit;

static LANE_WARNINGS: WarnLimit = WarnLimit::new();

/// What became of a lane's turn.
enum Turn {
    /// It may have another one.
    More,
    /// An event brings it back.
    Waits,
    /// Nobody can send now.
    Backlog,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Uplink<S> {
    /// Sends what the credit of the links allows, a transfer per lane and turn.
    pub(in super::super) fn send(&mut self, work: &mut Work) {
        // Lanes that cannot go on now leave the queue; the event that lets them go on brings them back.
        while !self.backlogged
            && let Some(lane) = self.turns.next(|lane| work.lanes.rank(lane))
        {
            match self.remotes.get(&lane).map(|remote| remote.phase) {
                Some(Phase::Ready) => {}
                Some(Phase::New) => {
                    self.open(lane, work);
                    continue;
                }
                Some(Phase::Token | Phase::Session) | None => continue,
            }
            match self.send_one(lane, work) {
                Turn::More => self.ready(lane, &work.lanes),
                Turn::Waits => {}
                Turn::Backlog => {
                    self.backlogged = true;
                    self.ready(lane, &work.lanes);
                }
            }
        }
    }

    /// Messages of a lane go to the dead letters; false if these cannot take all of them now, and the lane pauses.
    pub(super) fn give_up(
        &mut self,
        lane: LaneId,
        messages: &[Queued],
        reason: DeadLetterReason,
        text: &str,
        work: &mut Work,
    ) -> bool {
        let taken = self.fates.give_up_all(lane, messages, reason, text, work);
        if !taken {
            self.fail_lane(lane, "the dead letters take no message at present", work);
        }
        taken
    }

    /// Sends one transfer.
    fn send_one(&mut self, lane: LaneId, work: &mut Work) -> Turn {
        let now = self.store.now();
        self.fates.expire_first(lane, now, work);
        let Some(remote) = self.remotes.get_mut(&lane) else { return Turn::Waits };
        let Some(link) = remote.attached(LinkKind::Telemetry) else {
            self.attach(lane, LinkKind::Telemetry, work);
            return Turn::Waits;
        };
        if work.lanes.is_idle(lane) {
            remote.starved_since = None;
        }
        if !work.lanes.is_ready(lane) {
            return Turn::Waits;
        }
        if self.driver.connection().credit(link) == 0 {
            if remote.sent.is_empty() {
                remote.starved_since.get_or_insert_with(Instant::now);
            }
            return Turn::Waits;
        }
        let chunk: SmallVec<[&crate::message::Message; 16]> = work
            .lanes
            .next_chunk(lane)
            .take_while(|queued| !queued.entry.is_expired(now))
            .map(|queued| &queued.message)
            .collect();
        let count = chunk.len();
        let payload = self.options.payload(chunk.into_iter());
        let format = if count > 1 { MESSAGE_FORMAT_BATCH } else { 0 };
        let options = SendOptions { format, ..SendOptions::default() };
        match self.driver.connection().send(link, payload, options) {
            Ok(delivery) => {
                for queued in work.lanes.next_chunk(lane).take(count) {
                    let route = work.sent.route(&queued.message, &queued.priority);
                    work.sent.sent(route, now.millis_since(queued.entry.accepted_at));
                }
                work.lanes.sent(lane, count, Instant::now());
                remote.sent.push_back((delivery, None));
                remote.starved_since = None;
                Turn::More
            }
            Err(SendError::Backlog) => Turn::Backlog,
            Err(SendError::NoCredit | SendError::NoWindow | SendError::TooManyUnsettled) => {
                if remote.sent.is_empty() {
                    remote.starved_since.get_or_insert_with(Instant::now);
                }
                Turn::Waits
            }
            Err(SendError::NotAttached) => {
                self.fail_lane(lane, "the link is gone", work);
                Turn::Waits
            }
            Err(SendError::TooLarge { limit_bytes }) if count == 1 => {
                let reason = format!("it is larger than the {limit_bytes} bytes that the upstream takes");
                let messages = work.lanes.discard(lane, 1, Instant::now());
                self.give_up(lane, &messages, DeadLetterReason::RejectedByReceiver, &reason, work);
                Turn::More
            }
            Err(SendError::TooLarge { .. }) => {
                work.lanes.go_single(lane, count);
                Turn::More
            }
        }
    }

    /// A transfer was answered.
    pub(super) fn answered(&mut self, lane: LaneId, delivery: DeliveryId, outcome: Outcome, work: &mut Work) {
        let now = Instant::now();
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        remote.since = now;
        work.watchdog.progressed(lane, now);
        if let Some(slot) = remote.sent.iter_mut().find(|(id, _)| *id == delivery) {
            slot.1 = Some(outcome);
        }
        while let Some(outcome) = self.remotes.get_mut(&lane).and_then(Remote::next_answer) {
            match Verdict::of(&self.options.outcome(outcome)) {
                Verdict::Delivered => {
                    self.progress.delivered();
                    let Some(chunk) = work.lanes.settled(lane, now) else { break };
                    deliver(&chunk, work.reader.as_ref());
                    let seconds = now.duration_since(chunk.sent_at).as_secs_f64();
                    if let Some(first) = chunk.messages.first() {
                        let route = work.sent.route(&first.message, &first.priority);
                        work.sent.answered(route, seconds);
                    }
                }
                Verdict::Refused(reason) if work.lanes.oldest_len(lane) > 1 => {
                    // One message of the batch may be at fault: each is judged on its own.
                    if DROP_WARNINGS.admit().is_some() {
                        let sender = work.lanes.sender(lane);
                        tracing::warn!(code = "EH5003", %sender, reason, "A batch was refused; its messages go one by one");
                    }
                    work.lanes.set_aside(lane);
                }
                Verdict::Refused(reason) => {
                    let Some(chunk) = work.lanes.settled(lane, now) else { break };
                    let why = DeadLetterReason::RejectedByReceiver;
                    if !self.give_up(lane, &chunk.messages, why, &reason, work) {
                        return;
                    }
                }
                Verdict::Later { reason, throttled } => {
                    let pause = self.fail_lane(lane, &reason, work);
                    if throttled {
                        self.throttled_for(reason, pause);
                    }
                    return;
                }
            }
        }
        self.ready(lane, &work.lanes);
    }

    /// Parks a lane; its link is ended, and made anew when the lane goes on.
    pub(super) fn fail_lane(&mut self, lane: LaneId, reason: &str, work: &mut Work) -> Duration {
        let pause = work.lanes.park(lane, Instant::now());
        counter!("edgehub_operation_retry_total", "id" => "iothub", "operation" => "SendMessageToCloud")
            .increment(1);
        if let Some(others) = LANE_WARNINGS.admit() {
            tracing::warn!(
                code = "EH5004", sender = %work.identity(lane), to = self.to(), reason, pause_secs = pause.as_secs_f32(), others,
                "Messages of one sender cannot go up and are offered again after a pause"
            );
        }
        self.close_link(lane, LinkKind::Telemetry);
        pause
    }
}
