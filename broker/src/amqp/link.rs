//! The state of one link end, and the table from a peer's handles to ours.

use bytes::BytesMut;

use super::performative::{Attach, DeliveryTag, ReceiverSettle, Role, SenderSettle};
use super::value::Text;

/// Deliveries that are settled before credit is renewed, at most.
const RENEW_MAX: u32 = 100;

/// Where a link is between attach and detach.
#[derive(Debug)]
pub(super) enum LinkState {
    /// The peer attached; the owner has not answered.
    Requested(Box<Attach>),
    /// We attached; the peer has not answered. Holds the credit to grant.
    AttachSent { credit: u32 },
    /// Both attached.
    Attached,
    /// The peer answered our attach with null; its detach follows.
    Refused,
    /// We detached; frames of the peer are ignored until its detach.
    DetachSent,
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) epoch: u32,
    pub(super) name: Text,
    /// Our role.
    pub(super) role: Role,
    pub(super) state: LinkState,
    pub(super) peer_handle: Option<u32>,
    /// The session's name table points here (false for a refused duplicate).
    pub(super) named: bool,
    pub(super) snd_settle: SenderSettle,
    pub(super) rcv_settle: ReceiverSettle,
    /// Largest message on this link in bytes, `u64::MAX` = no limit: ours when we receive, the peer's when we send.
    pub(super) max_message_bytes: u64,
    /// Deliveries so far (serial number).
    pub(super) delivery_count: u32,
    /// Deliveries that may follow.
    pub(super) credit: u32,
    /// Deliveries that are not settled, in the direction of the link.
    pub(super) unsettled: u32,
    /// Receiving: the credit that is renewed.
    pub(super) credit_target: u32,
    /// Receiving: settled since the last flow.
    pub(super) settled_since_flow: u32,
    /// Sending: the peer wants unused credit back.
    pub(super) drain: bool,
    /// A flow for this link is due.
    pub(super) flow_due: bool,
    /// Receiving: a delivery of which more frames will come.
    pub(super) partial: Option<Box<Partial>>,
}

#[derive(Debug)]
pub(super) struct Partial {
    pub(super) delivery_id: u32,
    pub(super) tag: Option<DeliveryTag>,
    pub(super) format: u32,
    pub(super) settled: bool,
    pub(super) bytes: BytesMut,
}

impl Link {
    pub(super) fn new(epoch: u32, name: Text, role: Role, state: LinkState) -> Self {
        Self {
            epoch,
            name,
            role,
            state,
            peer_handle: None,
            named: false,
            snd_settle: SenderSettle::Mixed,
            rcv_settle: ReceiverSettle::First,
            max_message_bytes: u64::MAX,
            delivery_count: 0,
            credit: 0,
            unsettled: 0,
            credit_target: 0,
            settled_since_flow: 0,
            drain: false,
            flow_due: false,
            partial: None,
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        matches!(self.state, LinkState::Attached)
    }

    /// Counts a settled incoming delivery; true when credit should be renewed.
    pub(super) fn settled_one(&mut self) -> bool {
        self.unsettled = self.unsettled.saturating_sub(1);
        self.settled_since_flow = self.settled_since_flow.saturating_add(1);
        self.credit_target > 0
            && self.settled_since_flow >= RENEW_MAX.min((self.credit_target * 2).div_ceil(3))
    }
}

/// Peer handle → our handle. Sorted; handles given out one by one are found in one step.
#[derive(Debug, Default)]
pub(super) struct HandleTable(Vec<(u32, u32)>);

impl HandleTable {
    pub(super) fn get(&self, peer: u32) -> Option<u32> {
        match self.0.get(peer as usize) {
            Some((found, ours)) if *found == peer => Some(*ours),
            _ => self.find(peer).ok().map(|at| self.0[at].1),
        }
    }

    pub(super) fn insert(&mut self, peer: u32, ours: u32) {
        match self.find(peer) {
            Ok(at) => self.0[at].1 = ours,
            Err(at) => self.0.insert(at, (peer, ours)),
        }
    }

    pub(super) fn remove(&mut self, peer: u32) {
        if let Ok(at) = self.find(peer) {
            self.0.remove(at);
        }
    }

    fn find(&self, peer: u32) -> Result<usize, usize> {
        self.0.binary_search_by_key(&peer, |(found, _)| *found)
    }
}
