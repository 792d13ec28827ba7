//! The control plane on the connections: twin requests up, notifications, method calls and cloud-to-device messages down.

use std::task::{Context, Waker};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::answers::Paid;
use super::super::control::{self, ControlError, Request};
use super::super::lanes::LaneId;
use super::super::tell;
use super::super::twins::{Answered, Ask};
use super::super::work::Work;
use super::Connections;
use super::packet::{self, PacketId, SENT_BYTES_MAX};
use super::remote::{Feature, Features, Phase, Remote, needed};
use super::topic::{self, Downward};
use crate::amqp::SendError;
use crate::backend::Outcome;
use crate::head::mqtt::packet::Publish;

const TOO_LARGE: SendError = SendError::TooLarge { limit_bytes: SENT_BYTES_MAX as u64 };

impl Connections {
    /// Takes a request of the hub.
    pub(in super::super) fn request(&mut self, request: Request, work: &mut Work) {
        let (identity, ask) = match request {
            _ if !self.progress.is_up() => return work.offline(request),
            Request::Twin { identity, answer } => (identity, Ask::Get(answer)),
            Request::PatchReported { identity, patch, answer } => (identity, Ask::Patch(patch, answer)),
            Request::Want { identity, wanted } => {
                let lane = work.lanes.lane_of(&identity);
                if work.wants.set(lane, wanted)
                    && let Some(remote) = self.remotes.get_mut(&lane)
                {
                    remote.linked = false;
                }
                if lane != self.own && self.is_unused(lane, work) {
                    self.drop_remote(lane);
                }
                return self.arrange(lane, work);
            }
        };
        let lane = work.lanes.lane_of(&identity);
        let refused =
            self.remotes.get(&lane).is_some_and(|remote| remote.refused.contains(&Feature::TwinAnswers));
        if let Some(error) = work.wants.parked(lane) {
            ask.fail(error.clone());
        } else if refused {
            ask.fail(ControlError::Unsupported);
        } else {
            self.twins.take(lane, ask, Instant::now());
            self.arrange(lane, work);
        }
    }

    /// The pause of these identities is over.
    pub(in super::super) fn resume(&mut self, lanes: Vec<LaneId>, work: &mut Work) {
        for lane in lanes {
            if let Some(remote) = self.remotes.get_mut(&lane) {
                remote.refused.clear();
            }
            self.arrange(lane, work);
        }
    }

    /// Brings what an identity is subscribed to in line with what it wants and asks, and tells the hub once all is in
    /// place.
    pub(in super::super) fn arrange(&mut self, lane: LaneId, work: &mut Work) {
        if !self.progress.is_up() {
            return;
        }
        let features = self.needed(lane, work);
        let wanted = work.wants.of(lane);
        let phase = self.remotes.get(&lane).map_or(Phase::New, |remote| remote.phase);
        if phase == Phase::New && !features.is_empty() {
            let identity = work.identity(lane);
            self.remotes.entry(lane).or_insert_with(|| Remote::new(identity));
            self.open(lane, work);
        }
        let Some(remote) = self.remotes.get_mut(&lane).filter(|remote| remote.is_open()) else { return };
        let Some(mut connection) = remote.connection.take() else { return };
        let identity = work.identity(lane);
        for feature in remote.take_excess(wanted) {
            let packet_id = connection.packet_id(|id| remote.uses(id));
            connection.put(|out| packet::unsubscribe(out, packet_id, &feature.filter(identity)));
        }
        for feature in &features {
            if !remote.knows(*feature) {
                let packet_id = connection.packet_id(|id| remote.uses(id));
                let at_least_once = *feature == Feature::CloudToDevice;
                let filter = feature.filter(identity);
                connection.put(|out| packet::subscribe(out, packet_id, &filter, at_least_once));
                remote.asked_for(*feature, packet_id);
            }
        }
        remote.connection = Some(connection);
        let in_place = features.iter().all(|feature| remote.has(*feature));
        let parked = work.wants.parked(lane).is_some();
        if in_place && !parked && !wanted.is_nothing() && !remote.linked {
            remote.linked = true;
            if remote.refused.is_empty() {
                work.wants.succeeded(lane);
            }
            work.outbox.linked(work.lanes.sender(lane));
        }
        self.flush(lane);
    }

    /// What the control plane of an identity needs now.
    fn needed(&self, lane: LaneId, work: &Work) -> Features {
        if work.wants.parked(lane).is_some() {
            return Features::new();
        }
        let mut features = needed(work.identity(lane), work.wants.of(lane), self.twins.has(lane));
        if let Some(remote) = self.remotes.get(&lane) {
            features.retain(|feature| !remote.refused.contains(feature));
        }
        features
    }

    /// A subscription was answered. What the upstream does not give is asked for again after a pause.
    pub(super) fn subscribed(&mut self, lane: LaneId, packet_id: PacketId, granted: bool, work: &mut Work) {
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        // What is not wanted any more is not waited for.
        let Some(feature) = remote.answered(packet_id, granted) else { return };
        remote.since = Instant::now();
        if !granted {
            tell::not_served(work.identity(lane), feature, "the subscription is refused");
            remote.refused.push(feature);
            if feature == Feature::TwinAnswers {
                self.twins.fail(lane, &ControlError::Unsupported);
            }
            work.wants.park(lane, None, Instant::now());
        }
        self.arrange(lane, work);
    }

    /// Sends the requests and answers of an identity that wait.
    fn flush(&mut self, lane: LaneId) {
        let Some(remote) = self.remotes.get_mut(&lane).filter(|remote| remote.is_open()) else { return };
        let twins = remote.has(Feature::TwinAnswers);
        let Some(connection) = &mut remote.connection else { return };
        let next_request = &mut self.next_request;
        if twins {
            let sent = self.twins.send_by(lane, Instant::now(), |ask| {
                *next_request += 1;
                let request_id = next_request.to_string();
                let (topic, body) = match ask {
                    Ask::Get(_) => (topic::twin_get(&request_id), Default::default()),
                    Ask::Patch(patch, _) => (topic::twin_patch(&request_id), patch.clone()),
                    // Notifications are a subscription here.
                    Ask::Notify => return Err(SendError::NotAttached),
                };
                let published = connection.publish(&topic, None, false, &body);
                published.then_some(request_id).ok_or(TOO_LARGE)
            });
            debug_assert!(sent.is_ok(), "{sent:?}");
        }
        let calls = &mut remote.calls;
        let sent = self.answers.send_by(lane, |request_id, answer| {
            calls.remove(request_id);
            let topic = topic::method_response(answer.status, request_id);
            connection.publish(&topic, None, false, &answer.payload).then_some(()).ok_or(TOO_LARGE)
        });
        debug_assert!(sent.is_ok(), "{sent:?}");
    }

    /// The upstream publishes something for an identity.
    pub(super) fn downward(&mut self, lane: LaneId, publish: Publish, work: &mut Work) {
        let now = Instant::now();
        let identity = work.identity(lane).clone();
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        remote.since = now;
        work.watchdog.progressed(lane, now);
        let Some(downward) = topic::read(&identity, &publish) else {
            // It would come again, and be no more readable.
            self.acknowledge(lane, publish.packet_id);
            tell::unreadable(&identity, "a topic");
            return;
        };
        match downward {
            Downward::TwinAnswer { status, request_id, version } => {
                self.acknowledge(lane, publish.packet_id);
                let answered = self.twins.concluded(lane, &request_id, status, version, publish.payload);
                match answered {
                    Answered::Throttled(reason) => {
                        self.throttled_for(reason, self.options.operation_timeout);
                    }
                    Answered::Stray => {}
                    _ => self.progress.worked = true,
                }
                self.ready(lane, &work.lanes);
            }
            Downward::Desired => {
                self.progress.worked = true;
                self.acknowledge(lane, publish.packet_id);
                let event = control::Downward::Desired { identity: identity.clone(), patch: publish.payload };
                if work.outbox.push(event).is_err() {
                    work.outbox.missed(&identity);
                }
            }
            Downward::Method { name, request_id } => {
                self.progress.worked = true;
                self.acknowledge(lane, publish.packet_id);
                self.called(lane, name, request_id, publish.payload, work);
            }
            Downward::CloudToDevice(properties) => {
                self.progress.worked = true;
                let Some(remote) = self.remotes.get(&lane) else { return };
                let message = topic::message(&properties, publish.payload, remote.device.clone());
                let (settle, receiver) = oneshot::channel();
                let event = control::Downward::CloudToDevice { identity, message: Box::new(message), settle };
                if !self.answers.has_room_for_delivery() || work.outbox.push(event).is_err() {
                    let text = "Too many messages from the cloud wait; one is given back";
                    return tell::no_room(work.identity(lane), "message", text);
                }
                if let Some(packet_id) = publish.packet_id {
                    self.answers.expect_delivery((lane, remote.epoch, packet_id), receiver);
                }
            }
        }
    }

    /// A direct method is called.
    fn called(
        &mut self,
        lane: LaneId,
        name: std::sync::Arc<str>,
        request_id: String,
        payload: bytes::Bytes,
        work: &mut Work,
    ) {
        let payload = if payload.is_empty() { bytes::Bytes::from_static(b"null") } else { payload };
        let (answer, receiver) = oneshot::channel();
        let identity = work.identity(lane).clone();
        let event = control::Downward::Method { identity, name, payload, answer };
        if !self.answers.has_room_for_call() || work.outbox.push(event).is_err() {
            // The caller hears nothing and gives up in its time.
            return tell::no_room(work.identity(lane), "call", "Too many method calls wait; one is dropped");
        }
        if let Some(remote) = self.remotes.get_mut(&lane) {
            remote.calls.insert(request_id.clone());
        }
        self.answers.expect_call(lane, request_id, receiver);
    }

    /// Sends what the hub has answered by now, before anything else is done that the answers could fall victim to.
    pub(in super::super) fn take_answered(&mut self, work: &Work) {
        // The next turn waits for what is not there yet.
        let _ = self.answers.poll(&mut Context::from_waker(Waker::noop()));
        self.take_paid(work);
    }

    /// Works through what the hub has answered.
    pub(super) fn take_paid(&mut self, work: &Work) {
        while let Some(paid) = self.answers.next() {
            match paid {
                Paid::Call(lane, request_id, answer) => {
                    self.answers.wait(lane, request_id, answer);
                    let wanted = work.wants.of(lane).methods;
                    if wanted && self.remotes.contains_key(&lane) {
                        self.flush(lane);
                    } else {
                        self.answers.forget(lane);
                    }
                }
                // A refusal has no packet in MQTT, and a message that is refused must not come for ever.
                Paid::Delivery(
                    (lane, epoch, packet_id),
                    Outcome::Accepted | Outcome::Rejected | Outcome::NotConvertible,
                ) => {
                    // Its connection may be gone, and the message with it.
                    if self.remotes.get(&lane).is_some_and(|remote| remote.epoch == epoch) {
                        self.acknowledge(lane, Some(packet_id));
                    }
                }
                // Unanswered it comes again.
                Paid::Delivery(_, Outcome::Released | Outcome::NotOffered | Outcome::Expired)
                | Paid::Silence
                | Paid::Unsettled => {}
            }
        }
    }

    fn acknowledge(&mut self, lane: LaneId, packet_id: Option<PacketId>) {
        let remote = self.remotes.get_mut(&lane);
        if let Some(packet_id) = packet_id
            && let Some(connection) = remote.and_then(|remote| remote.connection.as_mut())
        {
            connection.put(|out| packet::puback(out, packet_id));
        }
    }
}
