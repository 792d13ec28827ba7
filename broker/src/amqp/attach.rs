//! Links of a session from attach to detach.

use super::error::{Condition, Error, Fault};
use super::event::*;
use super::link::{Link, LinkState};
use super::performative::*;
use super::put::*;
use super::session::{Session, Shared, mark_link};
use super::value::Text;

/// Attach requests of a session that wait for the owner's answer; more are refused.
const REQUESTS_MAX: usize = 1_024;

impl Session {
    /// Attaches a link of ours.
    pub(super) fn attach(&mut self, shared: &mut Shared<'_>, options: AttachOptions) -> Option<LinkId> {
        let key = (options.role, options.name.clone());
        if self.names.contains_key(&key) || shared.counts.links >= shared.options.links_max {
            return None;
        }
        let state = LinkState::AttachSent { credit: options.credit };
        let mut link = Link::new(shared.counts.next_epoch(), options.name.clone(), options.role, state);
        link.named = true;
        let receives = options.role == Role::Receiver;
        if receives {
            link.max_message_bytes = or_unlimited(options.max_message_bytes);
        }
        link.snd_settle = options.snd_settle.unwrap_or(SenderSettle::Mixed);
        link.rcv_settle = options.rcv_settle.unwrap_or(ReceiverSettle::First);
        let handle = self.place(shared, link)?;
        self.names.insert(key, handle);
        let attach = Attach {
            name: options.name,
            handle,
            role: options.role,
            snd_settle: options.snd_settle,
            rcv_settle: options.rcv_settle,
            source: Some(options.source),
            target: Some(options.target),
            initial_delivery_count: (!receives).then_some(0),
            max_message_bytes: Some(options.max_message_bytes).filter(|limit| *limit > 0),
            properties: options.properties,
        };
        self.frame(shared, |out| put_attach(out, &attach));
        let link = self.links[handle as usize].as_deref()?;
        Some(self.link_id(handle, link))
    }

    pub(super) fn on_attach(
        &mut self,
        shared: &mut Shared<'_>,
        mut attach: Box<Attach>,
    ) -> Result<(), Fault> {
        attach.name = attach.name.detached();
        if attach.handle > shared.options.handle_max {
            return Err(Fault::connection(Condition::FRAMING_ERROR, "handle above handle-max"));
        }
        if self.handles.get(attach.handle).is_some() {
            return Err(Fault::session(Condition::HANDLE_IN_USE, "the handle belongs to another link"));
        }
        let role = attach.role.other();
        match self.names.get(&(role, attach.name.clone())).copied() {
            Some(handle) => {
                let Some(link) = self.links[handle as usize].as_deref_mut() else { return Ok(()) };
                if matches!(link.state, LinkState::AttachSent { .. })
                    || matches!(link.state, LinkState::DetachSent) && link.peer_handle.is_none()
                {
                    self.handles.insert(attach.handle, handle);
                    self.on_attach_answer(shared, handle, *attach);
                    return Ok(());
                }
                let text = format!("a link named {:?} is attached in this session", &*attach.name);
                self.refuse_new(shared, *attach, Error::new(Condition::RESOURCE_LOCKED, text))
            }
            None if shared.client => {
                let error = Error::new(Condition::NOT_ALLOWED, "this end takes no links");
                self.refuse_new(shared, *attach, error)
            }
            None if shared.counts.links >= shared.options.links_max || self.requests >= REQUESTS_MAX => {
                let error = Error::new(Condition::RESOURCE_LIMIT_EXCEEDED, "too many links");
                self.refuse_new(shared, *attach, error)
            }
            None => {
                let mut link = Link::new(
                    shared.counts.next_epoch(),
                    attach.name.clone(),
                    role,
                    LinkState::Requested(attach.clone()),
                );
                link.named = true;
                link.peer_handle = Some(attach.handle);
                let key = (role, attach.name.clone());
                let Some(handle) = self.place(shared, link) else { return Ok(()) };
                self.names.insert(key, handle);
                self.handles.insert(attach.handle, handle);
                self.requests += 1;
                let Some(link) = self.links[handle as usize].as_deref() else { return Ok(()) };
                let link = self.link_id(handle, link);
                shared.events.push_back(Event::AttachRequested(AttachRequest { link, attach }));
                Ok(())
            }
        }
    }

    /// The peer's answer to our attach.
    fn on_attach_answer(&mut self, shared: &mut Shared<'_>, handle: u32, attach: Attach) {
        let id = self.id;
        let Some(link) = self.links[handle as usize].as_deref_mut() else { return };
        link.peer_handle = Some(attach.handle);
        let LinkState::AttachSent { credit } = link.state else { return };
        let refused = match link.role {
            Role::Sender => attach.target.is_none(),
            Role::Receiver => attach.source.is_none(),
        };
        if refused {
            link.state = LinkState::Refused;
            return;
        }
        link.state = LinkState::Attached;
        match link.role {
            Role::Sender => {
                link.max_message_bytes = or_unlimited(attach.max_message_bytes.unwrap_or(0));
                link.rcv_settle = attach.rcv_settle.unwrap_or(ReceiverSettle::First);
            }
            Role::Receiver => {
                link.delivery_count = attach.initial_delivery_count.unwrap_or(0);
                link.snd_settle = attach.snd_settle.unwrap_or(SenderSettle::Mixed);
                link.credit_target = credit;
                if credit > 0 {
                    mark_link(&mut self.links_due, link, handle);
                }
            }
        }
        let link = LinkId { session: id, handle, epoch: link.epoch };
        shared.events.push_back(Event::Attached { link, properties: attach.properties });
    }

    pub(super) fn accept(&mut self, shared: &mut Shared<'_>, id: LinkId, answer: AttachAnswer) -> bool {
        let Some(link) = self.link_mut(id) else { return false };
        if !matches!(link.state, LinkState::Requested(_)) {
            return false;
        }
        let LinkState::Requested(request) = std::mem::replace(&mut link.state, LinkState::Attached) else {
            return false;
        };
        let role = link.role;
        link.snd_settle = match role {
            Role::Sender => answer.snd_settle.unwrap_or(SenderSettle::Mixed),
            Role::Receiver => request.snd_settle.unwrap_or(SenderSettle::Mixed),
        };
        link.rcv_settle = answer.rcv_settle.unwrap_or(ReceiverSettle::First);
        match role {
            Role::Sender => {
                link.max_message_bytes = or_unlimited(request.max_message_bytes.unwrap_or(0));
                if link.credit > 0 {
                    let (credit, drain) = (link.credit, link.drain);
                    shared.events.push_back(Event::CreditChanged { link: id, credit, drain });
                }
                if link.drain {
                    link.flow_due = true;
                    self.links_due.push(id.handle);
                }
            }
            Role::Receiver => {
                link.max_message_bytes = or_unlimited(answer.max_message_bytes);
                link.delivery_count = request.initial_delivery_count.unwrap_or(0);
                link.credit_target = answer.credit;
                if answer.credit > 0 {
                    link.flow_due = true;
                    self.links_due.push(id.handle);
                }
            }
        }
        self.requests -= 1;
        let attach = Attach {
            name: request.name,
            handle: id.handle,
            role,
            snd_settle: answer.snd_settle,
            rcv_settle: answer.rcv_settle,
            source: request.source,
            target: request.target,
            initial_delivery_count: (role == Role::Sender).then_some(0),
            max_message_bytes: Some(answer.max_message_bytes).filter(|limit| *limit > 0),
            properties: answer.properties,
        };
        self.frame(shared, |out| put_attach(out, &attach));
        true
    }

    pub(super) fn refuse(&mut self, shared: &mut Shared<'_>, id: LinkId, error: Error) -> bool {
        let Some(link) = self.link_mut(id) else { return false };
        if !matches!(link.state, LinkState::Requested(_)) {
            return false;
        }
        let (name, role) = (link.name.clone(), link.role);
        self.write_null_attach(shared, id.handle, name, role);
        self.write_detach(shared, id.handle, true, Some(error));
        true
    }

    fn refuse_new(&mut self, shared: &mut Shared<'_>, attach: Attach, error: Error) -> Result<(), Fault> {
        // A refused link needs a place until the peer's detach; not even that may grow without limit.
        if shared.counts.links >= shared.options.links_max.saturating_add(REQUESTS_MAX as u32) {
            return Err(Fault::connection(Condition::RESOURCE_LIMIT_EXCEEDED, "too many links"));
        }
        let role = attach.role.other();
        let mut link =
            Link::new(shared.counts.next_epoch(), attach.name.clone(), role, LinkState::DetachSent);
        link.peer_handle = Some(attach.handle);
        let Some(handle) = self.place(shared, link) else {
            return Err(Fault::Session(error));
        };
        self.handles.insert(attach.handle, handle);
        self.write_null_attach(shared, handle, attach.name, role);
        self.write_detach(shared, handle, true, Some(error));
        Ok(())
    }

    fn write_null_attach(&mut self, shared: &mut Shared<'_>, handle: u32, name: Text, role: Role) {
        let attach = Attach {
            name,
            handle,
            role,
            snd_settle: None,
            rcv_settle: None,
            source: None,
            target: None,
            initial_delivery_count: (role == Role::Sender).then_some(0),
            max_message_bytes: None,
            properties: Vec::new(),
        };
        self.frame(shared, |out| put_attach(out, &attach));
    }

    /// Puts a link at a free handle; `None` when the peer's handle-max allows no more.
    fn place(&mut self, shared: &mut Shared<'_>, link: Link) -> Option<u32> {
        let free = self.free_handles.pop();
        let handle = free.or_else(|| u32::try_from(self.links.len()).ok())?;
        if handle > self.peer_handle_max {
            return None;
        }
        shared.counts.links += 1;
        match self.links.get_mut(handle as usize) {
            Some(place) => *place = Some(Box::new(link)),
            None => self.links.push(Some(Box::new(link))),
        }
        Some(handle)
    }

    /// Detaches a link of ours; the peer's detach is awaited in silence.
    pub(super) fn write_detach(
        &mut self,
        shared: &mut Shared<'_>,
        handle: u32,
        closed: bool,
        error: Option<Error>,
    ) {
        self.flush(shared);
        let detach = Detach { handle, closed, error };
        self.frame(shared, |out| put_detach(out, &detach));
        self.void_deliveries(shared, handle);
        if let Some(link) = self.links[handle as usize].as_deref_mut() {
            if matches!(link.state, LinkState::Requested(_)) {
                self.requests -= 1;
            }
            link.state = LinkState::DetachSent;
        }
    }

    pub(super) fn on_detach(&mut self, shared: &mut Shared<'_>, detach: Detach) {
        // Some clients detach a refused link twice: what is gone may go again.
        let Some(handle) = self.handles.get(detach.handle) else { return };
        let Some(link) = self.links[handle as usize].as_deref() else { return };
        let (id, name, role) = (self.link_id(handle, link), link.name.clone(), link.role);
        let event = match link.state {
            LinkState::DetachSent => None,
            LinkState::Requested(_) => {
                self.write_null_attach(shared, handle, name, role);
                Some(Event::Detached { link: id, error: detach.error, by: By::Peer })
            }
            LinkState::Refused => Some(Event::AttachRefused { link: id, error: detach.error }),
            LinkState::AttachSent { .. } | LinkState::Attached => {
                Some(Event::Detached { link: id, error: detach.error, by: By::Peer })
            }
        };
        if let Some(event) = event {
            self.write_detach(shared, handle, detach.closed, None);
            shared.events.push_back(event);
        }
        self.drop_link(shared, handle);
    }

    fn drop_link(&mut self, shared: &mut Shared<'_>, handle: u32) {
        let Some(link) = self.links[handle as usize].take() else { return };
        shared.counts.links -= 1;
        if link.named {
            self.names.remove(&(link.role, link.name));
        }
        if let Some(peer) = link.peer_handle {
            self.handles.remove(peer);
        }
        self.free_handles.push(handle);
    }

    /// Forgets everything in flight on a link.
    fn void_deliveries(&mut self, shared: &mut Shared<'_>, handle: u32) {
        let Some(link) = self.links[handle as usize].as_deref_mut() else { return };
        if let Some(partial) = link.partial.take() {
            shared.counts.partial_bytes -= partial.bytes.len();
        }
        if link.unsettled > 0 {
            match link.role {
                Role::Sender => self.sent.retain(|sent| *sent != handle),
                Role::Receiver => {
                    let before = self.received.len();
                    self.received.retain(|received| received.handle != handle);
                    shared.counts.unsettled -= before - self.received.len();
                }
            }
            link.unsettled = 0;
        }
        self.pending.retain(|pending| pending.handle != handle);
    }
}

fn or_unlimited(limit_bytes: u64) -> u64 {
    if limit_bytes == 0 { u64::MAX } else { limit_bytes }
}
