//! What is on its way to the client: packet ids, what waits for its PUBACK or for room, and what became of each message.

use std::collections::VecDeque;

use ahash::AHashMap;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::control::Notice;
use super::packet::{PacketId, QoS};
use super::session::Session;
use super::wire::Wire;
use super::{encode, topic};
use crate::backend::{Deliveries, Outcome, Settler, Target};
use crate::identity::Identity;
use crate::message::{Message, Value};

/// User property with which a message asks for a lower QoS.
const QOS_PROPERTY: &str = "mqtt-qos";

/// Bounds of what is on its way to one client.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeliveryLimits {
    pub(super) in_flight_max: usize,
    pub(super) waiting_max: usize,
    pub(super) waiting_bytes_max: usize,
    pub(super) notices_waiting_max: usize,
    pub(super) notices_waiting_bytes_max: usize,
    pub(super) notices_in_flight_max: usize,
    pub(super) output_backlog_bytes_max: usize,
}

/// The client takes too slowly what nobody offers it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooSlow;

/// What became of a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notified {
    /// It is written, or waits for room.
    Taken,
    /// No filter of the client takes it; it is forgotten.
    NotSubscribed,
}

pub(super) struct Deliverer {
    limits: DeliveryLimits,
    receiver: Identity,
    next_packet_id: u16,
    in_flight: AHashMap<PacketId, InFlight>,
    /// How many times each delivery is in flight; more than nothing makes the next one a duplicate.
    in_flight_keys: AHashMap<u64, u32>,
    hasher: ahash::RandomState,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    /// Something went back for want of room. What comes next does as well, until nothing waits: it must not overtake.
    sends_back: bool,
    notices_waiting: VecDeque<Notice>,
    notices_waiting_bytes: usize,
    notices_in_flight: usize,
    /// QoS 0 deliveries, with the position in the output behind which each is settled.
    unwritten: VecDeque<(u64, Settler, u64)>,
    acknowledged: Vec<(Settler, u64)>,
    topic: Vec<u8>,
}

struct InFlight {
    settlement: Option<(Settler, u64)>,
    key: u64,
}

struct Waiting {
    target: Target,
    settler: Settler,
    tag: u64,
    message: Message,
}

/// What was not sent.
#[derive(Default)]
struct Unsent {
    not_offered: Vec<(Settler, u64)>,
    expired: Vec<(Settler, u64)>,
    /// The time that messages are judged by, once one asks for it.
    now: Option<Instant>,
}

impl Deliverer {
    pub(super) fn new(receiver: Identity, limits: DeliveryLimits) -> Self {
        Self {
            limits,
            receiver,
            next_packet_id: 1,
            in_flight: AHashMap::new(),
            in_flight_keys: AHashMap::new(),
            hasher: ahash::RandomState::new(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            sends_back: false,
            notices_waiting: VecDeque::new(),
            notices_waiting_bytes: 0,
            notices_in_flight: 0,
            unwritten: VecDeque::new(),
            acknowledged: Vec::new(),
            topic: Vec::new(),
        }
    }

    /// Takes deliveries over; they are written at once or when there is room. Those that may not even wait go back to
    /// where they came from.
    pub(super) fn deliver<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        wire: &mut Wire<S>,
        session: &Session,
        deliveries: Deliveries,
    ) {
        let Deliveries { target, messages, settler } = deliveries;
        let mut unsent = Unsent::default();
        self.send_notices(wire, session);
        self.forget_abandoned();
        for (tag, message) in messages {
            let waiting = Waiting { target: target.clone(), settler: settler.clone(), tag, message };
            if self.waiting.is_empty() && !self.sends_back && self.has_room(wire) {
                self.send(wire, session, waiting, &mut unsent);
            } else {
                self.keep_back(waiting, &mut unsent);
            }
        }
        unsent.settle();
    }

    /// Writes what waits, as far as there is room; false when nothing could be written.
    pub(super) fn resume<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        wire: &mut Wire<S>,
        session: &Session,
    ) -> bool {
        let mut unsent = Unsent::default();
        let mut resumed = self.send_notices(wire, session);
        while self.has_room(wire)
            && let Some(waiting) = self.waiting.pop_front()
        {
            self.waiting_bytes -= waiting.message.size_bytes();
            resumed = true;
            if !waiting.settler.is_abandoned() {
                // The time for its answer begins now, not when it began to wait.
                waiting.settler.sent(waiting.tag);
                self.send(wire, session, waiting, &mut unsent);
            }
        }
        self.sends_back &= !self.waiting.is_empty();
        unsent.settle();
        resumed
    }

    fn has_room<S: AsyncRead + AsyncWrite + Unpin>(&self, wire: &Wire<S>) -> bool {
        wire.outlet.backlog_bytes() < self.limits.output_backlog_bytes_max
            && self.in_flight.len() < self.limits.in_flight_max
    }

    /// Appends a message to those that wait. One alone may always wait, whatever its size.
    fn keep_back(&mut self, waiting: Waiting, unsent: &mut Unsent) {
        let bytes = self.waiting_bytes + waiting.message.size_bytes();
        self.sends_back |= !self.waiting.is_empty()
            && (self.waiting.len() >= self.limits.waiting_max || bytes > self.limits.waiting_bytes_max);
        if self.sends_back {
            unsent.not_offered.push((waiting.settler, waiting.tag));
        } else {
            self.waiting_bytes = bytes;
            self.waiting.push_back(waiting);
        }
    }

    /// Whoever made these deliveries waits for them no longer, and makes them anew.
    fn forget_abandoned(&mut self) {
        let waiting_bytes = &mut self.waiting_bytes;
        self.waiting.retain(|waiting| {
            let abandoned = waiting.settler.is_abandoned();
            if abandoned {
                *waiting_bytes -= waiting.message.size_bytes();
            }
            !abandoned
        });
        self.sends_back &= !self.waiting.is_empty();
    }

    /// Takes a notice over; it is written at once, before any message, or when there is room.
    pub(super) fn notify<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        wire: &mut Wire<S>,
        session: &Session,
        notice: Notice,
    ) -> Result<Notified, TooSlow> {
        if session.granted(&notice.topic).is_none() {
            return Ok(Notified::NotSubscribed);
        }
        let bytes = self.notices_waiting_bytes + notice.bytes();
        if self.notices_waiting.len() >= self.limits.notices_waiting_max
            || bytes > self.limits.notices_waiting_bytes_max
        {
            return Err(TooSlow);
        }
        self.notices_waiting_bytes = bytes;
        self.notices_waiting.push_back(notice);
        self.send_notices(wire, session);
        Ok(Notified::Taken)
    }

    /// Writes the notices that wait, as far as there is room; false when there were none.
    fn send_notices<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        wire: &mut Wire<S>,
        session: &Session,
    ) -> bool {
        let mut sent = false;
        while wire.outlet.backlog_bytes() < self.limits.output_backlog_bytes_max
            && let Some(notice) = self.notices_waiting.pop_front()
        {
            sent = true;
            self.notices_waiting_bytes -= notice.bytes();
            // The subscription may have gone while the notice waited.
            let Some(granted) = session.granted(&notice.topic) else { continue };
            let room = self.notices_in_flight < self.limits.notices_in_flight_max
                && self.in_flight.len() < self.limits.in_flight_max;
            let packet_id = (granted == QoS::AtLeastOnce && room).then(|| self.new_packet_id());
            let Notice { topic, payload } = notice;
            if encode::publish_header(
                &mut wire.outlet.buffer,
                topic.as_bytes(),
                packet_id,
                false,
                payload.len(),
            ) {
                wire.outlet.put_payload(&payload);
                if let Some(packet_id) = packet_id {
                    self.notices_in_flight += 1;
                    self.in_flight.insert(packet_id, InFlight { settlement: None, key: 0 });
                }
            }
        }
        sent
    }

    /// Takes a PUBACK; false when nothing waited for it. [`Deliverer::settle_acknowledged`] passes it on.
    pub(super) fn acknowledge(&mut self, packet_id: PacketId) -> bool {
        let Some(in_flight) = self.in_flight.remove(&packet_id) else { return false };
        let Some(settlement) = in_flight.settlement else {
            self.notices_in_flight -= 1;
            return true;
        };
        if let Some(count) = self.in_flight_keys.get_mut(&in_flight.key) {
            *count -= 1;
            if *count == 0 {
                self.in_flight_keys.remove(&in_flight.key);
            }
        }
        self.acknowledged.push(settlement);
        true
    }

    /// Settles all that was acknowledged since the last call, once per settler.
    pub(super) fn settle_acknowledged(&mut self) {
        settle_all(&mut self.acknowledged, Outcome::Accepted);
    }

    /// Settles the QoS 0 deliveries that the socket has taken.
    pub(super) fn settle_written(&mut self, written_position: u64) {
        let mut written = Vec::new();
        while self.unwritten.front().is_some_and(|(position, ..)| *position <= written_position)
            && let Some((_, settler, tag)) = self.unwritten.pop_front()
        {
            written.push((settler, tag));
        }
        settle_all(&mut written, Outcome::Accepted);
    }

    fn send<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        wire: &mut Wire<S>,
        session: &Session,
        waiting: Waiting,
        unsent: &mut Unsent,
    ) {
        let Waiting { target, settler, tag, message } = waiting;
        // Its time may have ended since its pump looked: the mailbox and the socket take their time.
        if message.expires_at.is_some() && message.is_expired(*unsent.now.get_or_insert_with(Instant::now)) {
            unsent.expired.push((settler, tag));
            return;
        }
        let mut topic = std::mem::take(&mut self.topic);
        topic.clear();
        // Inputs are a module's, cloud-to-device messages a device's, whatever else a filter would match.
        let (input, takes) = match &target {
            Target::Input(input) => {
                topic::write_input(&mut topic, &self.receiver, input, &message);
                (&**input, self.receiver.module_id().is_some())
            }
            Target::Device => {
                topic::write_device_bound(&mut topic, self.receiver.device_id(), &message);
                ("", self.receiver.module_id().is_none())
            }
        };
        let granted = std::str::from_utf8(&topic).ok().and_then(|text| session.granted(text));
        match granted.filter(|_| takes) {
            None => unsent.not_offered.push((settler, tag)),
            Some(granted) => {
                let asked_for = message.properties.application(|name| name == QOS_PROPERTY);
                let packet_id = (granted == QoS::AtLeastOnce && asked_for != Value::Text("0"))
                    .then(|| self.new_packet_id());
                let key = self.hasher.hash_one((message.id, input));
                let dup = packet_id.is_some() && self.in_flight_keys.contains_key(&key);
                if !encode::publish_header(
                    &mut wire.outlet.buffer,
                    &topic,
                    packet_id,
                    dup,
                    message.body.len(),
                ) {
                    // No PUBLISH can carry it: its topic would be longer than 65,535 bytes.
                    settler.settle([(tag, Outcome::NotConvertible)]);
                } else {
                    wire.outlet.put_payload(&message.body);
                    match packet_id {
                        Some(packet_id) => {
                            *self.in_flight_keys.entry(key).or_default() += 1;
                            let in_flight = InFlight { settlement: Some((settler, tag)), key };
                            self.in_flight.insert(packet_id, in_flight);
                        }
                        None => self.unwritten.push_back((wire.outlet.end_position(), settler, tag)),
                    }
                }
            }
        }
        self.topic = topic;
    }

    /// The next free packet id. There is one, because fewer than 65,535 are in flight.
    fn new_packet_id(&mut self) -> PacketId {
        loop {
            let candidate = PacketId::new(self.next_packet_id);
            self.next_packet_id = self.next_packet_id.wrapping_add(1);
            if let Some(packet_id) = candidate
                && !self.in_flight.contains_key(&packet_id)
            {
                return packet_id;
            }
        }
    }
}

impl Unsent {
    fn settle(mut self) {
        settle_all(&mut self.not_offered, Outcome::NotOffered);
        settle_all(&mut self.expired, Outcome::Expired);
    }
}

fn settle_all(settled: &mut Vec<(Settler, u64)>, outcome: Outcome) {
    while let Some((settler, _)) = settled.first() {
        let settler = settler.clone();
        let of_this = settled.iter().filter(|(other, _)| other.same_as(&settler));
        settler.settle(of_this.map(|(_, tag)| (*tag, outcome)));
        settled.retain(|(other, _)| !other.same_as(&settler));
    }
}
