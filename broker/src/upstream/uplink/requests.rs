//! The control plane on a connection: twin requests up, notifications, method calls and cloud-to-device messages down.

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::answers::Paid;
use super::super::control::{ControlError, Downward, Request};
use super::super::convert;
use super::super::lanes::LaneId;
use super::super::remote::Notifying;
use super::super::tell;
use super::super::twins::{Answered, Ask};
use super::super::work::Work;
use super::Uplink;
use crate::amqp::{Condition, Delivery, Error, LinkKind, Message, Outcome, SendError};

impl<S: AsyncRead + AsyncWrite + Unpin> Uplink<S> {
    /// Takes a request of the hub.
    pub(in super::super) fn request(&mut self, request: Request, work: &mut Work) {
        let (identity, ask) = match request {
            _ if !self.options.is_hub() => return work.unsupported(request),
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
                if self.is_unused(lane, work) {
                    self.drop_remote(lane);
                }
                return self.arrange(lane, work);
            }
        };
        let lane = work.lanes.lane_of(&identity);
        let refused =
            self.remotes.get(&lane).is_some_and(|remote| remote.refused.contains(&LinkKind::TwinRequests));
        if let Some(error) = work.wants.parked(lane) {
            ask.fail(error.clone());
        } else if refused {
            ask.fail(ControlError::Unsupported);
        } else {
            self.twins.take(lane, ask, Instant::now());
            self.arrange(lane, work);
        }
    }

    /// Sends the requests and answers of an identity that wait, as far as its links go.
    pub(super) fn flush(&mut self, lane: LaneId) {
        let Some(remote) = self.remotes.get(&lane) else { return };
        // An answer must have a link to come on.
        let twin = remote.attached(LinkKind::TwinAnswers).and(remote.attached(LinkKind::TwinRequests));
        let methods = remote.attached(LinkKind::MethodResponses);
        let engine = self.driver.connection();
        let asked = twin.map_or(Ok(()), |link| self.twins.send(lane, link, engine, Instant::now()));
        let answered = methods.map_or(Ok(()), |link| self.answers.send(lane, link, engine));
        for result in [asked, answered] {
            match result {
                Ok(()) => {}
                Err(SendError::Backlog | SendError::NoWindow | SendError::TooManyUnsettled) => {
                    self.blocked.insert(lane);
                }
                // Credit brings the identity back, or its deadline does; the loss of a link is an event.
                Err(SendError::NoCredit | SendError::NotAttached | SendError::TooLarge { .. }) => {}
            }
        }
    }

    /// An answer to a twin request, or a notification.
    pub(super) fn twin_answered(&mut self, lane: LaneId, delivery: &Delivery, work: &mut Work) {
        self.driver.connection().settle(delivery.id, Outcome::Accepted);
        let Ok(message) = Message::parse(&delivery.payload) else {
            return tell::unreadable(work.identity(lane), "a twin message");
        };
        let now = Instant::now();
        let answered = self.twins.answered(lane, &message);
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        remote.since = now;
        match answered {
            Answered::Stray => return,
            Answered::Done => self.progress.worked = true,
            Answered::Throttled(reason) => {
                self.throttled_for(reason, self.options.operation_timeout);
            }
            Answered::Notifying => {
                remote.notifying = Notifying::Yes;
                // What changed before was not told.
                remote.linked = false;
            }
            Answered::NotNotifying(error) => {
                tracing::debug!(identity = %work.identity(lane), %error, "The upstream gives no notifications");
                remote.notifying = Notifying::Refused;
                work.wants.park(lane, None, now);
            }
            Answered::Desired(patch) => {
                self.progress.worked = true;
                let identity = work.identity(lane).clone();
                if work.outbox.push(Downward::Desired { identity: identity.clone(), patch }).is_err() {
                    work.outbox.missed(&identity);
                }
            }
        }
        work.watchdog.progressed(lane, now);
        self.arrange(lane, work);
    }

    /// A direct method is called.
    pub(super) fn called(&mut self, lane: LaneId, delivery: &Delivery, work: &mut Work) {
        self.driver.connection().settle(delivery.id, Outcome::Accepted);
        self.touch(lane, work);
        let call = Message::parse(&delivery.payload).ok();
        let Some((correlation, name, payload)) = call.as_ref().and_then(convert::method_call) else {
            return tell::unreadable(work.identity(lane), "a method call");
        };
        let (answer, receiver) = oneshot::channel();
        let identity = work.identity(lane).clone();
        let event = Downward::Method { identity, name, payload, answer };
        if !self.answers.has_room_for_call() || work.outbox.push(event).is_err() {
            // The caller hears nothing and gives up in its time.
            return tell::no_room(work.identity(lane), "call", "Too many method calls wait; one is dropped");
        }
        self.answers.expect_call(lane, correlation, receiver);
    }

    /// A cloud-to-device message.
    pub(super) fn cloud_to_device(&mut self, lane: LaneId, delivery: &Delivery, work: &mut Work) {
        self.touch(lane, work);
        let Some(remote) = self.remotes.get(&lane) else { return };
        let tag = delivery.tag.as_ref().map(|tag| tag.as_bytes());
        let message = Message::parse(&delivery.payload)
            .map_err(|error| Error::new(Condition::DECODE_ERROR, error.to_string()))
            .and_then(|encoded| convert::cloud_to_device(&encoded, tag, remote.device.clone()));
        let engine = self.driver.connection();
        let message = match message {
            Ok(message) => Box::new(message),
            Err(error) => {
                engine.settle(delivery.id, Outcome::Rejected(Some(error)));
                return tell::unreadable(work.identity(lane), "a cloud-to-device message");
            }
        };
        let (settle, receiver) = oneshot::channel();
        let identity = work.identity(lane).clone();
        let event = Downward::CloudToDevice { identity, message, settle };
        if !self.answers.has_room_for_delivery() || work.outbox.push(event).is_err() {
            engine.settle(delivery.id, Outcome::Released);
            return tell::no_room(
                work.identity(lane),
                "message",
                "Too many messages from the cloud wait; one is given back",
            );
        }
        self.answers.expect_delivery(delivery.id, receiver);
    }

    /// Works through what the hub has answered.
    pub(super) fn take_paid(&mut self, work: &Work) {
        while let Some(paid) = self.answers.next() {
            match paid {
                Paid::Call(lane, correlation, answer) => {
                    self.answers.wait(lane, correlation, answer);
                    let wanted = work.wants.of(lane).methods;
                    if wanted && self.remotes.contains_key(&lane) {
                        self.flush(lane);
                    } else {
                        self.answers.forget(lane);
                    }
                }
                Paid::Delivery(delivery, outcome) => {
                    // Its link may be gone, and the message with it.
                    self.driver.connection().settle(delivery, convert::settlement(outcome));
                }
                Paid::Silence | Paid::Unsettled => {}
            }
        }
    }

    /// Something came for an identity.
    fn touch(&mut self, lane: LaneId, work: &mut Work) {
        let now = Instant::now();
        self.progress.worked = true;
        if let Some(remote) = self.remotes.get_mut(&lane) {
            remote.since = now;
        }
        work.watchdog.progressed(lane, now);
    }
}
