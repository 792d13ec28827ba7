//! Messages on their connections: publishes as far as the window goes, a turn per lane, and their acknowledgements.

use edgehub_storage::DeadLetterReason;
use tokio::time::Instant;

use super::super::fates::deliver;
use super::super::lanes::LaneId;
use super::super::work::Work;
use super::connection::BACKLOG_BYTES_MAX;
use super::packet::{PacketId, SENT_BYTES_MAX};
use super::remote::Phase;
use super::{Connections, topic};
use crate::delivery::Queued;

impl Connections {
    /// Sends what the windows of the connections allow, a message per lane and turn.
    pub(in super::super) fn send(&mut self, work: &mut Work) {
        // Lanes that cannot go on now leave the queue; the event that lets them go on brings them back.
        while let Some(lane) = self.turns.next(|lane| work.lanes.rank(lane)) {
            match self.remotes.get(&lane).map(|remote| remote.phase) {
                Some(Phase::Open) => {
                    if self.send_one(lane, work) {
                        self.ready(lane, &work.lanes);
                    }
                }
                Some(Phase::New) => self.open(lane, work),
                Some(Phase::Waiting | Phase::Dialling | Phase::Connecting) | None => {}
            }
        }
    }

    /// Sends one message; whether the lane may have another turn.
    fn send_one(&mut self, lane: LaneId, work: &mut Work) -> bool {
        let now = self.store.now();
        self.fates.expire_first(lane, now, work);
        let Some(remote) = self.remotes.get_mut(&lane) else { return false };
        if remote.is_renewing(Instant::now()) || !work.lanes.is_ready(lane) {
            return false;
        }
        let Some(queued) = work.lanes.next_chunk(lane).next() else { return false };
        let model_id = &queued.message.sender.model_id;
        if model_id.is_some() && *model_id != remote.model_id {
            // The upstream learns the model with CONNECT only. What is under way brings the lane back.
            if remote.sent.is_empty() && !self.twins.has(lane) {
                self.reconnect(lane, work);
            }
            return false;
        }
        let Some(mut connection) = remote.connection.take() else { return false };
        if connection.backlog_bytes() >= BACKLOG_BYTES_MAX {
            remote.connection = Some(connection);
            self.blocked.insert(lane);
            return false;
        }
        let packet_id = connection.packet_id(|id| remote.uses(id));
        let topic = topic::telemetry(&queued.message);
        let published = connection.publish(&topic, Some(packet_id), false, &queued.message.body);
        remote.connection = Some(connection);
        if !published {
            let reason = format!("it is no MQTT packet of at most {SENT_BYTES_MAX} bytes");
            let messages = work.lanes.discard(lane, 1, Instant::now());
            return self.give_up(lane, &messages, DeadLetterReason::RejectedByReceiver, &reason, work);
        }
        let route = work.sent.route(&queued.message, &queued.priority);
        work.sent.sent(route, now.millis_since(queued.entry.accepted_at));
        work.lanes.sent(lane, 1, Instant::now());
        remote.sent.push_back((packet_id, false));
        true
    }

    /// The upstream has a message.
    pub(super) fn acknowledged(&mut self, lane: LaneId, packet_id: PacketId, work: &mut Work) {
        let now = Instant::now();
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        let Some(slot) = remote.sent.iter_mut().find(|(id, _)| *id == packet_id) else {
            tracing::debug!(identity = %work.identity(lane), %packet_id, "A PUBACK that nobody waits for");
            return;
        };
        slot.1 = true;
        remote.since = now;
        work.watchdog.progressed(lane, now);
        // In the order of sending, whatever the order of the answers.
        while let Some((_, true)) = remote.sent.front() {
            remote.sent.pop_front();
            let Some(chunk) = work.lanes.settled(lane, now) else { break };
            deliver(&chunk, work.reader.as_ref());
            if let Some(first) = chunk.messages.first() {
                let route = work.sent.route(&first.message, &first.priority);
                work.sent.answered(route, now.duration_since(chunk.sent_at).as_secs_f64());
            }
            self.progress.delivered();
        }
        self.ready(lane, &work.lanes);
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
            self.fail_remote(lane, "the dead letters take no message at present", None, work);
        }
        taken
    }
}
