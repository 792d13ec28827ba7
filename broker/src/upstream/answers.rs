//! What the hub owes the upstream on one connection: the answers of method calls, and what became of cloud-to-device
//! messages.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use ahash::AHashMap;
use futures_util::stream::{FuturesUnordered, Stream};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::convert;
use super::lanes::LaneId;
use crate::amqp::{Connection, DeliveryId, LinkId, MessageId, SendError, SendOptions};
use crate::backend::{MethodAnswer, Outcome};

/// Method calls whose answers are waited for at a time, over all identities.
pub(super) const CALLS_MAX: usize = 1_024;

/// Cloud-to-device messages whose outcomes are waited for at a time, over all identities.
pub(super) const DELIVERIES_MAX: usize = 4_096;

/// The upstream waits for no answer of a call longer than this: connect and response time-outs at their largest, and a
/// little.
const CALL_SECS_MAX: u64 = 630;

/// Something that is no longer owed. `C` names a call, `D` a message, as their protocol does.
#[derive(Debug)]
pub(super) enum Paid<C, D> {
    /// A method was answered.
    Call(LaneId, C, MethodAnswer),
    /// A call got no answer.
    Silence,
    /// What became of a cloud-to-device message.
    Delivery(D, Outcome),
    /// The hub said nothing about a cloud-to-device message: it stays as it is.
    Unsettled,
}

type Owed<C, D> = Pin<Box<dyn Future<Output = Paid<C, D>> + Send>>;

/// The answers that one connection waits for.
pub(super) struct Answers<C = MessageId, D = DeliveryId> {
    owed: FuturesUnordered<Owed<C, D>>,
    /// Calls that wait for an answer, or whose answer waits for its link.
    calls: usize,
    deliveries: usize,
    /// What was answered, and waits to be worked through.
    paid: VecDeque<Paid<C, D>>,
    /// Answers of methods that wait for their link.
    waiting: AHashMap<LaneId, VecDeque<(C, MethodAnswer)>>,
}

impl<C, D> Default for Answers<C, D> {
    fn default() -> Self {
        Self {
            owed: FuturesUnordered::new(),
            calls: 0,
            deliveries: 0,
            paid: VecDeque::new(),
            waiting: AHashMap::new(),
        }
    }
}

impl<C: Send + 'static, D: Send + 'static> Answers<C, D> {
    /// Whether another call can be waited for.
    pub(super) fn has_room_for_call(&self) -> bool {
        self.calls < CALLS_MAX
    }

    /// Whether another message can be waited for.
    pub(super) fn has_room_for_delivery(&self) -> bool {
        self.deliveries < DELIVERIES_MAX
    }

    /// Waits for the answer of a call.
    pub(super) fn expect_call(
        &mut self,
        lane: LaneId,
        correlation: C,
        answer: oneshot::Receiver<MethodAnswer>,
    ) {
        self.calls += 1;
        self.owed.push(Box::pin(async move {
            match timeout(Duration::from_secs(CALL_SECS_MAX), answer).await {
                Ok(Ok(answer)) => Paid::Call(lane, correlation, answer),
                Ok(Err(_)) | Err(_) => Paid::Silence,
            }
        }));
    }

    /// Waits for the outcome of a message.
    pub(super) fn expect_delivery(&mut self, delivery: D, outcome: oneshot::Receiver<Outcome>) {
        self.deliveries += 1;
        self.owed.push(Box::pin(async move {
            match outcome.await {
                Ok(outcome) => Paid::Delivery(delivery, outcome),
                Err(_) => Paid::Unsettled,
            }
        }));
    }

    /// Ready when something was answered.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(Some(paid)) = Pin::new(&mut self.owed).poll_next(cx) {
            match paid {
                Paid::Call(..) => {}
                Paid::Silence => self.calls -= 1,
                Paid::Delivery(..) | Paid::Unsettled => self.deliveries -= 1,
            }
            self.paid.push_back(paid);
        }
        if self.paid.is_empty() { Poll::Pending } else { Poll::Ready(()) }
    }

    /// The next that was answered.
    pub(super) fn next(&mut self) -> Option<Paid<C, D>> {
        self.paid.pop_front()
    }

    /// An answer waits for the link of its identity.
    pub(super) fn wait(&mut self, lane: LaneId, correlation: C, answer: MethodAnswer) {
        self.waiting.entry(lane).or_default().push_back((correlation, answer));
    }

    /// The session of an identity is gone: answers that waited for its link go nowhere.
    pub(super) fn forget(&mut self, lane: LaneId) {
        self.calls -= self.waiting.remove(&lane).map_or(0, |waiting| waiting.len());
    }

    /// Sends the answers of an identity that wait by way of `send`.
    ///
    /// # Errors
    /// The first of `send` but for answers that are too large: those go nowhere.
    pub(super) fn send_by(
        &mut self,
        lane: LaneId,
        mut send: impl FnMut(&C, &MethodAnswer) -> Result<(), SendError>,
    ) -> Result<(), SendError> {
        while let Some((correlation, answer)) = self.waiting.get_mut(&lane).and_then(VecDeque::pop_front) {
            match send(&correlation, &answer) {
                Ok(()) => self.calls -= 1,
                Err(SendError::TooLarge { limit_bytes }) => {
                    self.calls -= 1;
                    tracing::warn!(
                        code = "EH5007",
                        limit_bytes,
                        "The answer of a method is larger than the upstream takes"
                    );
                }
                Err(error) => {
                    self.waiting.entry(lane).or_default().push_front((correlation, answer));
                    return Err(error);
                }
            }
        }
        self.waiting.remove(&lane);
        Ok(())
    }
}

impl Answers {
    /// Sends the answers of an identity that wait, as far as the link's credit goes.
    ///
    /// # Errors
    /// Why the link takes no more now.
    pub(super) fn send(
        &mut self,
        lane: LaneId,
        link: LinkId,
        engine: &mut Connection,
    ) -> Result<(), SendError> {
        self.send_by(lane, |correlation, answer| {
            let payload = convert::method_response(correlation, answer);
            let options = SendOptions { settled: true, ..SendOptions::default() };
            engine.send(link, payload, options).map(|_| ())
        })
    }
}
