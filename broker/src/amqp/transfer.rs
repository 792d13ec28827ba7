//! Deliveries in both directions: transfers, their fragments, and their settlement.

use bytes::{Bytes, BytesMut};

use super::error::{Condition, Error, Fault};
use super::event::*;
use super::frame::{FrameKind, begin_frame, end_frame};
use super::link::{LinkState, Partial};
use super::performative::*;
use super::put::*;
use super::serial::before;
use super::session::{Received, Session, SessionState, Shared};

/// Unsettled deliveries that a session may have sent.
const SENT_UNSETTLED_MAX: usize = 65_536;

/// A delivery that is not completely sent.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) handle: u32,
    head: Option<TransferHead>,
    rest: Payload,
}

impl Session {
    // ---- receiving ----------------------------------------------------------------------------------------

    pub(super) fn on_transfer(
        &mut self,
        shared: &mut Shared<'_>,
        transfer: Transfer,
        payload: Bytes,
    ) -> Result<(), Fault> {
        if self.incoming_window == 0 {
            return Err(Fault::session(Condition::WINDOW_VIOLATION, "transfer outside the window"));
        }
        self.incoming_window -= 1;
        self.next_incoming_id = self.next_incoming_id.wrapping_add(1);
        if self.incoming_window <= shared.options.incoming_window / 2
            && shared.counts.unsettled < shared.options.unsettled_max
        {
            self.mark_flow_due();
        }
        let Some(handle) = self.handles.get(transfer.handle) else {
            return Err(Fault::session(Condition::UNATTACHED_HANDLE, "transfer on an unknown handle"));
        };
        match self.receive_transfer(shared, handle, transfer, payload) {
            Err(Fault::Link(error)) => {
                self.fail_link(shared, handle, error);
                Ok(())
            }
            other => other,
        }
    }

    fn receive_transfer(
        &mut self,
        shared: &mut Shared<'_>,
        handle: u32,
        transfer: Transfer,
        payload: Bytes,
    ) -> Result<(), Fault> {
        let Some(link) = self.links[handle as usize].as_deref_mut() else { return Ok(()) };
        match link.state {
            LinkState::DetachSent => return Ok(()),
            LinkState::Attached if link.role == Role::Receiver => {}
            _ => return Err(Fault::link(Condition::ILLEGAL_STATE, "the link takes no transfers")),
        }

        let mut partial = match link.partial.take() {
            Some(partial) => {
                shared.counts.partial_bytes -= partial.bytes.len();
                if transfer.delivery_id.is_some_and(|id| id != partial.delivery_id) {
                    return Err(Fault::link(Condition::INVALID_FIELD, "a delivery was not completed"));
                }
                partial
            }
            None => {
                let id = transfer
                    .delivery_id
                    .ok_or_else(|| Fault::session(Condition::INVALID_FIELD, "delivery-id is missing"))?;
                if self.last_delivery_id.is_some_and(|last| !before(last, id)) {
                    return Err(Fault::session(Condition::INVALID_FIELD, "delivery-id does not ascend"));
                }
                self.last_delivery_id = Some(id);
                if transfer.resume {
                    return Err(Fault::link(Condition::NOT_IMPLEMENTED, "deliveries cannot be resumed"));
                }
                if link.credit == 0 {
                    return Err(Fault::link(Condition::TRANSFER_LIMIT_EXCEEDED, "transfer without credit"));
                }
                link.credit -= 1;
                link.delivery_count = link.delivery_count.wrapping_add(1);
                let format = transfer.message_format.unwrap_or(0);
                if !transfer.more && !transfer.aborted {
                    if payload.len() as u64 > link.max_message_bytes {
                        return Err(too_large(link.max_message_bytes));
                    }
                    let settled = transfer.settled.unwrap_or(false);
                    return self.deliver(shared, handle, id, transfer.tag, format, settled, payload);
                }
                Box::new(Partial {
                    delivery_id: id,
                    tag: transfer.tag,
                    format,
                    settled: false,
                    bytes: BytesMut::new(),
                })
            }
        };

        partial.settled |= transfer.settled.unwrap_or(false);
        if transfer.aborted {
            link.unsettled += 1; // settled_one takes it back
            if link.settled_one() {
                self.mark_link_due(handle);
            }
            return Ok(());
        }
        let size = partial.bytes.len() + payload.len();
        if size as u64 > link.max_message_bytes {
            return Err(too_large(link.max_message_bytes));
        }
        if shared.counts.partial_bytes + size > shared.options.partial_max_bytes {
            return Err(Fault::link(
                Condition::RESOURCE_LIMIT_EXCEEDED,
                "too many incomplete messages on this connection",
            ));
        }
        partial.bytes.extend_from_slice(&payload);
        if transfer.more {
            shared.counts.partial_bytes += size;
            link.partial = Some(partial);
            return Ok(());
        }
        let Partial { delivery_id, tag, format, settled, bytes } = *partial;
        self.deliver(shared, handle, delivery_id, tag, format, settled, bytes.freeze())
    }

    #[allow(clippy::too_many_arguments)] // the fields of a transfer, in its order
    fn deliver(
        &mut self,
        shared: &mut Shared<'_>,
        handle: u32,
        number: u32,
        tag: Option<DeliveryTag>,
        format: u32,
        settled: bool,
        payload: Bytes,
    ) -> Result<(), Fault> {
        // Windows stop a peer at the limit; what was granted before may exceed it, but not without end.
        if shared.counts.unsettled >= shared.options.unsettled_max.saturating_mul(2) {
            return Err(Fault::connection(
                Condition::RESOURCE_LIMIT_EXCEEDED,
                "too many unsettled deliveries",
            ));
        }
        let session = self.id;
        let Some(link) = self.links[handle as usize].as_deref_mut() else { return Ok(()) };
        link.unsettled += 1;
        shared.counts.unsettled += 1;
        let id = LinkId { session, handle, epoch: link.epoch };
        // Fragments of several links may end in another order than they began.
        self.received.insert(number, Received { handle, presettled: settled });
        shared.events.push_back(Event::Delivery(Delivery {
            link: id,
            id: DeliveryId { session, number, sent: false },
            tag,
            format,
            settled,
            payload,
        }));
        Ok(())
    }

    /// Detaches a link for a fault of the peer.
    pub(super) fn fail_link(&mut self, shared: &mut Shared<'_>, handle: u32, error: Error) {
        let Some(link) = self.links[handle as usize].as_deref() else { return };
        let link = self.link_id(handle, link);
        self.write_detach(shared, handle, true, Some(error.clone()));
        shared.events.push_back(Event::Detached { link, error: Some(error), by: By::Engine });
    }

    /// Settles a received delivery; false when it is not known (any more).
    pub(super) fn settle_received(&mut self, shared: &mut Shared<'_>, number: u32, outcome: Outcome) -> bool {
        let Some(received) = self.received.get_mut(number) else { return false };
        let (handle, presettled) = (received.handle, received.presettled);
        let Some(link) = self.links[handle as usize].as_deref_mut() else { return false };
        // With rcv-settle-mode second the sender settles first; its disposition removes the delivery.
        let second = link.rcv_settle == ReceiverSettle::Second && !presettled;
        if !second {
            self.received.remove(number);
            self.count_settled(shared, handle);
        }
        if !presettled {
            self.dispose(shared, Role::Receiver, number, !second, outcome);
        }
        true
    }

    fn count_settled(&mut self, shared: &mut Shared<'_>, handle: u32) {
        // A window that unsettled deliveries had closed opens again.
        let full = shared.options.unsettled_max;
        if shared.counts.unsettled >= full || self.incoming_window == 0 {
            self.mark_flow_due();
        }
        shared.counts.unsettled -= 1;
        if let Some(link) = self.links[handle as usize].as_deref_mut()
            && link.settled_one()
        {
            self.mark_link_due(handle);
        }
    }

    pub(super) fn on_disposition(&mut self, shared: &mut Shared<'_>, disposition: Disposition) {
        let Disposition { role, first, last, settled, outcome } = disposition;
        match role {
            Role::Sender if settled => {
                let mut handles = Vec::new();
                self.received.remove_range(first, last, |_, received| handles.push(received.handle));
                for handle in handles {
                    self.count_settled(shared, handle);
                }
            }
            Role::Receiver if settled || outcome.is_some() => {
                let outcome = outcome.unwrap_or(Outcome::Released);
                let (session, links) = (self.id, &mut self.links);
                let mut answered = Vec::new();
                self.sent.remove_range(first, last, |number, handle| {
                    let Some(link) = links.get_mut(handle as usize).and_then(Option::as_deref_mut) else {
                        return;
                    };
                    link.unsettled = link.unsettled.saturating_sub(1);
                    let delivery = DeliveryId { session, number, sent: true };
                    let link = LinkId { session, handle, epoch: link.epoch };
                    shared.events.push_back(Event::Settled { link, delivery, outcome: outcome.clone() });
                    if !settled {
                        answered.push(number);
                    }
                });
                for number in answered {
                    self.dispose(shared, Role::Sender, number, true, Outcome::Accepted);
                }
            }
            // An intermediate state changes nothing.
            Role::Sender | Role::Receiver => {}
        }
    }

    // ---- sending ------------------------------------------------------------------------------------------

    pub(super) fn send(
        &mut self,
        shared: &mut Shared<'_>,
        id: LinkId,
        payload: Payload,
        options: SendOptions,
    ) -> Result<DeliveryId, SendError> {
        if self.state != SessionState::Mapped {
            return Err(SendError::NotAttached);
        }
        let (waiting, unsettled) = (!self.pending.is_empty(), self.sent.len());
        let remote_window = self.remote_window;
        let number = self.next_delivery_id;
        let link = self.link_mut(id).ok_or(SendError::NotAttached)?;
        if !link.is_attached() || link.role != Role::Sender {
            return Err(SendError::NotAttached);
        }
        let size = payload.iter().map(|piece| piece.len() as u64).sum::<u64>();
        if size > link.max_message_bytes {
            return Err(SendError::TooLarge { limit_bytes: link.max_message_bytes });
        }
        if link.credit == 0 {
            return Err(SendError::NoCredit);
        }
        if shared.output.len() >= shared.options.output_max_bytes {
            shared.counts.backlog_refused = true;
            return Err(SendError::Backlog);
        }
        if waiting || remote_window == 0 {
            self.window_refused = true;
            return Err(SendError::NoWindow);
        }
        if unsettled >= SENT_UNSETTLED_MAX {
            return Err(SendError::TooManyUnsettled);
        }
        let settled = match link.snd_settle {
            SenderSettle::Settled => true,
            SenderSettle::Unsettled => false,
            SenderSettle::Mixed => options.settled,
        };
        link.credit -= 1;
        link.delivery_count = link.delivery_count.wrapping_add(1);
        if !settled {
            link.unsettled += 1;
            self.sent.insert(number, id.handle);
        }
        self.next_delivery_id = number.wrapping_add(1);
        let tag = options.tag.unwrap_or_else(|| {
            let mut tag = [0; 16];
            tag[..8].copy_from_slice(&shared.counts.tag_prefix);
            tag[8..].copy_from_slice(&shared.counts.tag_counter.to_be_bytes());
            shared.counts.tag_counter = shared.counts.tag_counter.wrapping_add(1);
            tag
        });
        let head = TransferHead { delivery_id: number, tag, message_format: options.format, settled };
        // What is sent may be the answer to what was received: clients such as uAMQP take an answer for a failure
        // when their request is not settled yet.
        self.flush_settled(shared);
        let mut pending = Pending { handle: id.handle, head: Some(head), rest: payload };
        if !self.transmit(shared, &mut pending) {
            self.pending.push_back(pending);
        }
        Ok(DeliveryId { session: self.id, number, sent: true })
    }

    /// Continues deliveries that waited for the window.
    pub(super) fn send_pending(&mut self, shared: &mut Shared<'_>) {
        while let Some(mut pending) = self.pending.pop_front() {
            if !self.transmit(shared, &mut pending) {
                self.pending.push_front(pending);
                return;
            }
        }
    }

    /// Writes frames of a delivery while the window lasts; true when it is complete.
    fn transmit(&mut self, shared: &mut Shared<'_>, pending: &mut Pending) -> bool {
        while self.remote_window > 0 {
            let tail = shared.output.tail();
            let start = begin_frame(tail, FrameKind::Amqp, self.id.channel);
            put_transfer(tail, pending.handle, pending.head.take().as_ref());
            let mut room = shared.counts.frame_max_bytes.saturating_sub(tail.len() - start);
            let left = pending.rest.iter().map(Bytes::len).sum::<usize>();
            let more = left > room;
            if more {
                set_more(tail);
            }
            end_frame(tail, start, left.min(room));
            let mut whole = 0;
            for piece in &mut pending.rest {
                if piece.len() > room {
                    shared.output.put_payload(piece.split_to(room));
                    break;
                }
                room -= piece.len();
                shared.output.put_payload(std::mem::take(piece));
                whole += 1;
            }
            pending.rest.drain(..whole);
            self.remote_window -= 1;
            self.next_outgoing_id = self.next_outgoing_id.wrapping_add(1);
            if !more {
                return true;
            }
        }
        false
    }

    /// Gives a sent delivery up: it is settled as released, a later disposition is ignored.
    pub(super) fn settle_sent(&mut self, shared: &mut Shared<'_>, number: u32, outcome: Outcome) -> bool {
        let Some(handle) = self.sent.remove(number) else { return false };
        if let Some(Some(link)) = self.links.get_mut(handle as usize) {
            link.unsettled = link.unsettled.saturating_sub(1);
        }
        self.dispose(shared, Role::Sender, number, true, outcome);
        true
    }
}

fn too_large(limit_bytes: u64) -> Fault {
    let text = format!("the message is larger than {limit_bytes} bytes");
    Fault::Link(Error::new(Condition::MESSAGE_SIZE_EXCEEDED, text))
}
