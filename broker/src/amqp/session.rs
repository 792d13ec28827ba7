//! One session: its windows, its flows, and what is due to be written for it.

use std::collections::{HashMap, VecDeque};

use bytes::BytesMut;

use super::error::Error;
use super::event::*;
use super::frame::{FrameKind, put_frame};
use super::link::{HandleTable, Link, LinkState};
use super::output::Output;
use super::performative::*;
use super::put::*;
use super::serial::SerialTable;
use super::value::Text;

/// First transfer number and first delivery number.
pub(super) const FIRST_OUTGOING_ID: u32 = 1;

/// What a session shares with its connection.
pub(super) struct Shared<'a> {
    pub(super) output: &'a mut Output,
    pub(super) events: &'a mut VecDeque<Event>,
    pub(super) options: &'a Options,
    pub(super) counts: &'a mut Counts,
    /// True for the end that dialled: it takes no links from the peer.
    pub(super) client: bool,
}

/// Totals of a connection that are compared with its limits.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) epoch: u32,
    pub(super) links: u32,
    pub(super) unsettled: usize,
    pub(super) partial_bytes: usize,
    /// Largest frame that may be sent, in bytes.
    pub(super) frame_max_bytes: usize,
    pub(super) tag_prefix: [u8; 8],
    pub(super) tag_counter: u64,
    /// `send` was refused for the backlog.
    pub(super) backlog_refused: bool,
}

impl Counts {
    pub(super) fn next_epoch(&mut self) -> u32 {
        self.epoch = self.epoch.wrapping_add(1);
        self.epoch
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SessionState {
    BeginSent,
    Mapped,
    EndSent,
}

/// A received delivery that is not settled.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) handle: u32,
    pub(super) presettled: bool,
}

/// Dispositions of consecutive deliveries that go out as one.
#[derive(Debug)]
struct Range {
    first: u32,
    last: u32,
    settled: bool,
    outcome: Outcome,
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) state: SessionState,
    pub(super) peer_channel: Option<u16>,
    pub(super) links: Vec<Option<Box<Link>>>,
    pub(super) free_handles: Vec<u32>,
    pub(super) handles: HandleTable,
    pub(super) names: HashMap<(Role, Text), u32>,
    pub(super) requests: usize,

    pub(super) next_outgoing_id: u32,
    pub(super) remote_window: u32,
    pub(super) next_incoming_id: u32,
    pub(super) incoming_window: u32,
    pub(super) peer_handle_max: u32,
    pub(super) window_refused: bool,

    pub(super) received: SerialTable<Received>,
    pub(super) last_delivery_id: Option<u32>,
    pub(super) sent: SerialTable<u32>,
    pub(super) next_delivery_id: u32,
    /// Deliveries of which frames wait for the peer's window.
    pub(super) pending: VecDeque<super::transfer::Pending>,

    as_sender: Option<Range>,
    as_receiver: Option<Range>,
    pub(super) flow_due: bool,
    pub(super) links_due: Vec<u32>,
    /// Listed in the connection's table of sessions with something to flush.
    pub(super) listed: bool,
}

impl Session {
    pub(super) fn new(id: SessionId, state: SessionState, options: &Options) -> Self {
        Self {
            id,
            state,
            peer_channel: None,
            links: Vec::new(),
            free_handles: Vec::new(),
            handles: HandleTable::default(),
            names: HashMap::new(),
            requests: 0,
            next_outgoing_id: FIRST_OUTGOING_ID,
            remote_window: 0,
            next_incoming_id: 0,
            incoming_window: options.incoming_window,
            peer_handle_max: u32::MAX,
            window_refused: false,
            received: SerialTable::default(),
            last_delivery_id: None,
            sent: SerialTable::default(),
            next_delivery_id: FIRST_OUTGOING_ID,
            pending: VecDeque::new(),
            as_sender: None,
            as_receiver: None,
            flow_due: false,
            links_due: Vec::new(),
            listed: false,
        }
    }

    /// Our begin.
    pub(super) fn write_begin(&self, shared: &mut Shared<'_>) {
        let begin = Begin {
            remote_channel: self.peer_channel,
            next_outgoing_id: self.next_outgoing_id,
            incoming_window: self.incoming_window,
            outgoing_window: shared.options.incoming_window,
            handle_max: shared.options.handle_max,
        };
        self.frame(shared, |out| put_begin(out, &begin));
    }

    /// The peer's begin.
    pub(super) fn on_begin(&mut self, channel: u16, begin: &Begin) {
        self.peer_channel = Some(channel);
        self.next_incoming_id = begin.next_outgoing_id;
        self.remote_window = begin.incoming_window;
        self.peer_handle_max = begin.handle_max;
        if self.state == SessionState::BeginSent {
            self.state = SessionState::Mapped;
        }
    }

    /// Writes our end, and forgets links and deliveries.
    pub(super) fn write_end(&mut self, shared: &mut Shared<'_>, error: Option<&Error>) {
        self.flush(shared);
        self.frame(shared, |out| put_end(out, error));
        self.state = SessionState::EndSent;
        self.forget(shared);
    }

    /// Gives back what the session counts for.
    pub(super) fn forget(&mut self, shared: &mut Shared<'_>) {
        for link in self.links.drain(..).flatten() {
            shared.counts.links -= 1;
            shared.counts.partial_bytes -= link.partial.map_or(0, |partial| partial.bytes.len());
        }
        shared.counts.unsettled -= self.received.len();
        self.received = SerialTable::default();
        self.sent = SerialTable::default();
        self.pending.clear();
        self.names.clear();
        self.handles = HandleTable::default();
        self.links_due.clear();
    }

    pub(super) fn link_id(&self, handle: u32, link: &Link) -> LinkId {
        LinkId { session: self.id, handle, epoch: link.epoch }
    }

    /// The link that `id` names, if it is still that one.
    pub(super) fn link_mut(&mut self, id: LinkId) -> Option<&mut Link> {
        let link = self.links.get_mut(id.handle as usize)?.as_deref_mut()?;
        (link.epoch == id.epoch).then_some(link)
    }

    pub(super) fn link(&self, id: LinkId) -> Option<&Link> {
        let link = self.links.get(id.handle as usize)?.as_deref()?;
        (link.epoch == id.epoch).then_some(link)
    }

    // ---- flow ---------------------------------------------------------------------------------------------

    pub(super) fn on_flow(&mut self, shared: &mut Shared<'_>, flow: &Flow) {
        let acknowledged = flow.next_incoming_id.unwrap_or(FIRST_OUTGOING_ID);
        let in_flight = self.next_outgoing_id.wrapping_sub(acknowledged);
        self.remote_window = flow.incoming_window.saturating_sub(in_flight);
        if self.remote_window > 0 {
            self.send_pending(shared);
            if self.window_refused && self.remote_window > 0 && self.pending.is_empty() {
                self.window_refused = false;
                shared.events.push_back(Event::WindowOpened { session: self.id });
            }
        }
        let Some(peer_handle) = flow.handle else {
            self.flow_due |= flow.echo;
            return;
        };
        let Some(handle) = self.handles.get(peer_handle) else { return };
        let session = self.id;
        let Some(link) = self.links[handle as usize].as_deref_mut() else { return };
        // Clients that do not wait grant credit before their attach is answered; it counts from then on.
        let requested = matches!(link.state, LinkState::Requested(_));
        if !link.is_attached() && !requested {
            return;
        }
        match link.role {
            Role::Sender => {
                if let Some(credit) = flow.link_credit {
                    let used = link.delivery_count.wrapping_sub(flow.delivery_count.unwrap_or(0));
                    let before = (link.credit, link.drain);
                    link.credit = if used < 0x8000_0000 { credit.saturating_sub(used) } else { credit };
                    link.drain = flow.drain;
                    if before != (link.credit, link.drain) && !requested {
                        let id = LinkId { session, handle, epoch: link.epoch };
                        let (credit, drain) = (link.credit, link.drain);
                        shared.events.push_back(Event::CreditChanged { link: id, credit, drain });
                    }
                }
                if flow.echo || link.drain {
                    mark_link(&mut self.links_due, link, handle);
                }
            }
            Role::Receiver => {
                // The sender tells how far it is; ahead of us only when it gave credit back.
                if let Some(count) = flow.delivery_count {
                    let given_back = count.wrapping_sub(link.delivery_count);
                    if link.partial.is_none() && given_back <= link.credit {
                        link.delivery_count = count;
                        link.credit -= given_back;
                    }
                }
                if flow.echo {
                    mark_link(&mut self.links_due, link, handle);
                }
            }
        }
    }

    /// Sets the credit that a receiving link is kept at.
    pub(super) fn set_credit(&mut self, id: LinkId, credit: u32) -> bool {
        let handle = id.handle;
        let Some(link) = self.link_mut(id) else { return false };
        if !link.is_attached() || link.role != Role::Receiver {
            return false;
        }
        link.credit_target = credit;
        link.flow_due = true;
        self.links_due.push(handle);
        true
    }

    pub(super) fn mark_link_due(&mut self, handle: u32) {
        if let Some(Some(link)) = self.links.get_mut(handle as usize) {
            mark_link(&mut self.links_due, link, handle);
        }
    }

    pub(super) fn mark_flow_due(&mut self) {
        self.flow_due = true;
    }

    // ---- what is due --------------------------------------------------------------------------------------

    /// True when [`Session::flush`] has something to write.
    pub(super) fn has_due(&self) -> bool {
        self.flow_due || !self.links_due.is_empty() || self.as_sender.is_some() || self.as_receiver.is_some()
    }

    /// Adds a delivery to the disposition that is due, or starts the next one.
    pub(super) fn dispose(
        &mut self,
        shared: &mut Shared<'_>,
        role: Role,
        number: u32,
        settled: bool,
        outcome: Outcome,
    ) {
        let slot = match role {
            Role::Sender => &mut self.as_sender,
            Role::Receiver => &mut self.as_receiver,
        };
        match slot {
            Some(range)
                if range.last.wrapping_add(1) == number
                    && range.settled == settled
                    && range.outcome == outcome =>
            {
                range.last = number;
            }
            _ => {
                let full = slot.replace(Range { first: number, last: number, settled, outcome });
                if let Some(range) = full {
                    self.write_range(shared, role, &range);
                }
            }
        }
    }

    /// Writes due dispositions, then due flows.
    pub(super) fn flush(&mut self, shared: &mut Shared<'_>) {
        if self.state != SessionState::Mapped {
            return;
        }
        if let Some(range) = self.as_sender.take() {
            self.write_range(shared, Role::Sender, &range);
        }
        self.flush_settled(shared);
        for handle in std::mem::take(&mut self.links_due) {
            self.write_link_flow(shared, handle);
        }
        if std::mem::take(&mut self.flow_due) {
            let flow = self.session_flow(shared);
            self.frame(shared, |out| put_flow(out, &flow));
        }
    }

    /// Writes the disposition of received deliveries that is due.
    pub(super) fn flush_settled(&mut self, shared: &mut Shared<'_>) {
        if let Some(range) = self.as_receiver.take() {
            self.write_range(shared, Role::Receiver, &range);
        }
    }

    fn write_range(&self, shared: &mut Shared<'_>, role: Role, range: &Range) {
        self.frame(shared, |out| {
            put_disposition(out, role, range.first, range.last, range.settled, &range.outcome);
        });
    }

    fn write_link_flow(&mut self, shared: &mut Shared<'_>, handle: u32) {
        let Some(link) = self.links.get_mut(handle as usize).and_then(Option::as_deref_mut) else { return };
        if !std::mem::take(&mut link.flow_due) || !link.is_attached() {
            return;
        }
        let drain = link.drain;
        match link.role {
            Role::Receiver => {
                link.credit = link.credit_target.saturating_sub(link.unsettled);
                link.settled_since_flow = 0;
            }
            // The owner had its turn; what is left is given back.
            Role::Sender if drain && self.pending.iter().all(|pending| pending.handle != handle) => {
                link.delivery_count = link.delivery_count.wrapping_add(link.credit);
                link.credit = 0;
                link.drain = false;
            }
            Role::Sender => {}
        }
        let (count, credit) = (link.delivery_count, link.credit);
        let flow = Flow {
            handle: Some(handle),
            delivery_count: Some(count),
            link_credit: Some(credit),
            drain,
            ..self.session_flow(shared)
        };
        self.flow_due = false;
        self.frame(shared, |out| put_flow(out, &flow));
    }

    /// The session's part of a flow; opens the incoming window as far as unsettled deliveries allow.
    fn session_flow(&mut self, shared: &Shared<'_>) -> Flow {
        let room = shared.options.unsettled_max.saturating_sub(shared.counts.unsettled);
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        self.incoming_window = shared.options.incoming_window.min(room);
        Flow {
            next_incoming_id: Some(self.next_incoming_id),
            incoming_window: self.incoming_window,
            next_outgoing_id: self.next_outgoing_id,
            outgoing_window: shared.options.incoming_window,
            ..Flow::default()
        }
    }

    pub(super) fn frame(&self, shared: &mut Shared<'_>, body: impl FnOnce(&mut BytesMut)) {
        put_frame(shared.output.tail(), FrameKind::Amqp, self.id.channel, body);
    }
}

pub(super) fn mark_link(due: &mut Vec<u32>, link: &mut Link, handle: u32) {
    if !link.flow_due {
        link.flow_due = true;
        due.push(handle);
    }
}
