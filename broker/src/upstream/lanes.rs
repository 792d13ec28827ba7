//! Lanes to the upstream: one per sender, so that a failing sender parks alone and order holds per sender.
//!
//! The pump reads its queues once, in order, and every message goes to the lane of its sender. A lane holds what was
//! read and not yet settled. When a lane fails, what it held is forgotten and read again later, from its first
//! unsettled entry on; what other lanes hold meanwhile is recognised by its place and left out. While a lane
//! is parked, its messages are not held at all, so a sender that fails for days costs no memory. After a failure a
//! lane takes one transfer's worth until it succeeds, so that it cannot fill the memory that all lanes share. A
//! message that is more urgent than all that failed ends the pause of its lane.
//!
//! When the receiver refuses a transfer of several messages, these are set aside, and nothing more is sent until
//! the transfers behind it are answered; then the messages go again one by one, and only the guilty one is
//! refused. What was sent behind them and accepted is not sent again.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use edgehub_storage::StoreTime;
use tokio::time::Instant;

use super::lane::Lane;
pub(crate) use super::lane::{Chunk, Place};
use crate::delivery::{Backoff, BackoffOptions, Queued};
use crate::identity::Identity;

/// Messages that the lanes of all ways up hold together.
pub(crate) const HELD_MESSAGES_MAX: usize = 4_096;

/// Bytes of records that the lanes of all ways up hold together; one message more of each may exceed it.
pub(crate) const HELD_BYTES_MAX: usize = 16 << 20;

/// Transfers of one lane without an answer, unless the protocol allows for more.
pub(crate) const LANE_TRANSFERS_MAX: usize = 16;

/// Answered transfers after which one more may be under way, when there were fewer.
const WIDEN_TRANSFERS: usize = 16;

/// Largest sum of message sizes in one transfer.
const CHUNK_BYTES_MAX: usize = 262_144;

/// Names a lane for as long as the lanes exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LaneId(usize);

/// All lanes.
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
    by_sender: AHashMap<Identity, LaneId>,
    held: AHashSet<Place>,
    held_bytes: usize,
    in_flight: usize,
    /// When lanes are to be read again, in order of time.
    wakes: BTreeSet<(Instant, LaneId)>,
    held_messages_max: usize,
    held_bytes_max: usize,
    batch_max: usize,
    transfers_max: usize,
    /// Transfers of one lane that may be without an answer at present.
    window: usize,
    /// Transfers that were answered since that became more or less.
    answered: usize,
    backoff: BackoffOptions,
}

impl LaneId {
    /// A name in tests.
    #[cfg(test)]
    pub(super) fn new(index: usize) -> Self {
        Self(index)
    }

    #[cfg(test)]
    pub(super) fn index(self) -> usize {
        self.0
    }
}

impl Lanes {
    /// No lanes; `batch_max` is the largest number of messages in one transfer, at least 1.
    pub(crate) fn new(batch_max: usize, backoff: BackoffOptions) -> Self {
        Self {
            lanes: Vec::new(),
            by_sender: AHashMap::new(),
            held: AHashSet::new(),
            held_bytes: 0,
            in_flight: 0,
            wakes: BTreeSet::new(),
            held_messages_max: HELD_MESSAGES_MAX,
            held_bytes_max: HELD_BYTES_MAX,
            batch_max: batch_max.max(1),
            transfers_max: LANE_TRANSFERS_MAX,
            window: LANE_TRANSFERS_MAX,
            answered: 0,
            backoff,
        }
    }

    /// The same for one of so many ways up, which share the bounds in equal parts, so that none waits for the room that
    /// another one takes.
    pub(crate) fn one_of(mut self, ways: usize) -> Self {
        self.held_messages_max = (HELD_MESSAGES_MAX / ways.max(1)).max(1);
        self.held_bytes_max = (HELD_BYTES_MAX / ways.max(1)).max(1);
        self
    }

    /// The same with another number of transfers of one lane without an answer.
    pub(crate) fn with_transfers_max(self, transfers_max: usize) -> Self {
        Self { transfers_max, window: transfers_max, ..self }
    }

    /// How many more messages may be read, 0 when the lanes are full.
    pub(crate) fn room(&self) -> usize {
        if self.room_bytes() == 0 { 0 } else { self.held_messages_max.saturating_sub(self.held.len()) }
    }

    /// How many more bytes of records may be read.
    pub(crate) fn room_bytes(&self) -> usize {
        self.held_bytes_max.saturating_sub(self.held_bytes)
    }

    /// Messages that are held, sent or not.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// Transfers without an answer.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Lanes that wait to be read again.
    pub(crate) fn parked(&self) -> usize {
        self.wakes.len()
    }

    /// The lane of an identity that has one.
    pub(crate) fn find(&self, sender: &Identity) -> Option<LaneId> {
        self.by_sender.get(sender).copied()
    }

    /// The sender of a lane.
    pub(crate) fn sender(&self, lane: LaneId) -> &Identity {
        &self.lanes[lane.0].sender
    }

    /// Takes a message that was read. Gives the lane if it holds the message now; none if it is held already, or
    /// its lane will have it read again.
    pub(crate) fn push(&mut self, queued: Queued, now: Instant) -> Option<LaneId> {
        let place = (queued.lane, queued.entry.offset);
        if self.held.contains(&place) {
            return None;
        }
        let id = self.lane_of(&queued.message.sender.identity);
        let lane = &mut self.lanes[id.0];
        let probing = lane.backoff.failures() > 0 && lane.len() >= self.batch_max;
        if lane.wake_at.is_some() || !lane.skipped.is_empty() || probing {
            lane.skip(place);
            if lane.parked_level.is_some_and(|level| queued.level < level) {
                // It did not fail, so it does not wait for those that did.
                lane.parked_level = Some(queued.level);
                self.wake_at(id, now);
            }
            return None;
        }
        self.held.insert(place);
        self.held_bytes += queued.entry.bytes.len();
        lane.take(queued);
        Some(id)
    }

    /// The rank of what the lane would send next; none if it has nothing.
    pub(crate) fn rank(&self, lane: LaneId) -> Option<u32> {
        self.lanes[lane.0].pending.front().map(|queued| queued.rank)
    }

    /// Whether a lane has something that may be sent now.
    pub(crate) fn is_ready(&self, lane: LaneId) -> bool {
        let lane = &self.lanes[lane.0];
        let alone = lane.pending.front().is_some_and(|queued| queued.alone);
        let transfers_max = if alone { 1 } else { self.window };
        !lane.pending.is_empty() && lane.set_aside.is_empty() && lane.sent.len() < transfers_max
    }

    /// Whether a lane holds nothing.
    pub(crate) fn is_idle(&self, lane: LaneId) -> bool {
        self.lanes[lane.0].is_idle()
    }

    /// The messages of the lane's next transfer; they stay at the head of the lane until [`Lanes::sent`].
    pub(crate) fn next_chunk(&self, lane: LaneId) -> impl Iterator<Item = &Queued> {
        let lane = &self.lanes[lane.0];
        let mut bytes = 0;
        let mut count = 0;
        let first = lane.pending.front();
        let alone = first.is_some_and(|first| first.alone);
        let level = first.map(|first| first.level);
        lane.pending.iter().take_while(move |queued| {
            bytes += queued.entry.bytes.len();
            count += 1;
            // One priority only, so that a less urgent message cannot spoil the transfer of a more urgent one.
            let fits = count <= self.batch_max && bytes <= CHUNK_BYTES_MAX;
            count == 1 || (fits && !alone && !queued.alone && Some(queued.level) == level)
        })
    }

    /// The first `count` messages of the lane are on their way, as one transfer.
    pub(crate) fn sent(&mut self, lane: LaneId, count: usize, now: Instant) {
        let lane = &mut self.lanes[lane.0];
        let messages = lane.pending.drain(..count).collect();
        lane.sent.push_back(Chunk { messages, sent_at: now });
        self.in_flight += 1;
    }

    /// Takes the first `count` messages out of the lane, unsent.
    pub(crate) fn discard(&mut self, lane: LaneId, count: usize, now: Instant) -> Vec<Queued> {
        let taken: Vec<Queued> = self.lanes[lane.0].pending.drain(..count).collect();
        self.forget(&taken);
        self.read_again_if_due(lane, now);
        taken
    }

    /// Takes all messages out of the lane that are not sent.
    pub(crate) fn discard_all(&mut self, lane: LaneId, now: Instant) -> Vec<Queued> {
        let count = self.lanes[lane.0].pending.len();
        self.discard(lane, count, now)
    }

    /// Takes out what has expired while it waited, in any lane.
    pub(crate) fn expire(&mut self, at: StoreTime, now: Instant) -> Vec<Queued> {
        let mut expired = Vec::new();
        for index in 0..self.lanes.len() {
            let lane = &mut self.lanes[index];
            if !lane.pending.iter().any(|queued| queued.entry.is_expired(at)) {
                continue;
            }
            let (over, live): (VecDeque<_>, VecDeque<_>) =
                lane.pending.drain(..).partition(|queued| queued.entry.is_expired(at));
            lane.pending = live;
            let over = Vec::from(over);
            self.forget(&over);
            self.read_again_if_due(LaneId(index), now);
            expired.extend(over);
        }
        expired
    }

    /// When the lane's oldest transfer was sent.
    pub(crate) fn oldest_sent_at(&self, lane: LaneId) -> Option<Instant> {
        self.lanes[lane.0].sent.front().map(|chunk| chunk.sent_at)
    }

    /// The lane's oldest transfer was answered for good: delivered, or refused for ever. Transfers of one lane are
    /// answered in their order, as one link carries them.
    pub(crate) fn settled(&mut self, id: LaneId, now: Instant) -> Option<Chunk> {
        let lane = &mut self.lanes[id.0];
        let chunk = lane.sent.pop_front()?;
        lane.backoff.succeed();
        if lane.sent.is_empty() {
            lane.take_up();
        }
        self.in_flight -= 1;
        self.widen();
        self.forget(&chunk.messages);
        self.read_again_if_due(id, now);
        Some(chunk)
    }

    /// The receiver refused the lane's oldest transfer, which holds several messages: they go again one by one
    /// when all sent behind it is answered.
    pub(crate) fn set_aside(&mut self, lane: LaneId) {
        let lane = &mut self.lanes[lane.0];
        if let Some(chunk) = lane.sent.pop_front() {
            lane.set_aside.extend(chunk.messages);
            self.in_flight -= 1;
        }
        if lane.sent.is_empty() {
            lane.take_up();
        }
    }

    /// How many messages the lane's oldest transfer holds.
    pub(crate) fn oldest_len(&self, lane: LaneId) -> usize {
        self.lanes[lane.0].sent.front().map_or(0, |chunk| chunk.messages.len())
    }

    /// The next `count` messages go one by one.
    pub(crate) fn go_single(&mut self, lane: LaneId, count: usize) {
        self.lanes[lane.0].pending.iter_mut().take(count).for_each(|queued| queued.alone = true);
    }

    /// The lane failed: it is parked, and what it held will be read again.
    pub(crate) fn park(&mut self, id: LaneId, now: Instant) -> Duration {
        let lane = &mut self.lanes[id.0];
        let pause = lane.backoff.fail();
        self.in_flight -= lane.sent.len();
        let sent = lane.sent.drain(..).flat_map(|chunk| chunk.messages);
        let held: Vec<Queued> = sent.chain(lane.set_aside.drain(..)).chain(lane.pending.drain(..)).collect();
        for queued in &held {
            lane.skip((queued.lane, queued.entry.offset));
        }
        lane.parked_level = held.iter().map(|queued| queued.level).min();
        self.forget(&held);
        self.wake_at(id, now + pause);
        pause
    }

    /// A message that the lane gave out is to be read again, after the pause that follows.
    pub(crate) fn read_again(&mut self, lane: LaneId, queued: &Queued) {
        self.lanes[lane.0].skip((queued.lane, queued.entry.offset));
    }

    /// When the next lane is to be read again.
    pub(crate) fn next_wake(&self) -> Option<Instant> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// What a lane failed for has changed: if it is parked, its pause ends.
    pub(crate) fn end_pause(&mut self, id: LaneId, now: Instant) {
        if self.lanes[id.0].wake_at.is_some() {
            self.wake_at(id, now);
        }
    }

    /// Lets the lanes go on whose pause is over; gives the places from where to read again, at once.
    pub(crate) fn wake(&mut self, now: Instant) -> Vec<Place> {
        let mut places = Vec::new();
        while let Some((_, id)) = self.wakes.first().filter(|(at, _)| *at <= now).copied() {
            self.wakes.pop_first();
            let lane = &mut self.lanes[id.0];
            lane.wake_at = None;
            lane.parked_level = None;
            places.append(&mut lane.skipped);
        }
        places
    }

    /// The connection is gone or new: nothing is held or parked any more; all is read again from the start.
    pub(crate) fn reset(&mut self) {
        for lane in &mut self.lanes {
            lane.pending.clear();
            lane.sent.clear();
            lane.set_aside.clear();
            lane.wake_at = None;
            lane.parked_level = None;
            lane.skipped.clear();
        }
        self.wakes.clear();
        self.held.clear();
        self.held_bytes = 0;
        self.in_flight = 0;
    }

    /// The connection ended in the place of an answer: with fewer transfers under way, fewer are sent
    /// twice when it does so again.
    pub(crate) fn narrow(&mut self) {
        if self.in_flight > 0 {
            self.window = (self.window / 2).max(1);
            self.answered = 0;
        }
    }

    /// A transfer was answered: after some of them, one more may be under way.
    fn widen(&mut self) {
        self.answered += 1;
        if self.answered >= WIDEN_TRANSFERS && self.window < self.transfers_max {
            self.window += 1;
            self.answered = 0;
        }
    }

    /// The lane of an identity, whether it ever sends anything or not.
    pub(crate) fn lane_of(&mut self, sender: &Identity) -> LaneId {
        if let Some(id) = self.by_sender.get(sender) {
            return *id;
        }
        let id = LaneId(self.lanes.len());
        self.lanes.push(Lane {
            sender: sender.clone(),
            pending: VecDeque::new(),
            sent: VecDeque::new(),
            set_aside: Vec::new(),
            backoff: Backoff::with(self.backoff),
            wake_at: None,
            parked_level: None,
            skipped: Vec::new(),
        });
        self.by_sender.insert(sender.clone(), id);
        id
    }

    /// What a lane could not take while it was on probation is read again once it succeeded, or holds nothing.
    fn read_again_if_due(&mut self, id: LaneId, now: Instant) {
        let lane = &self.lanes[id.0];
        let may = lane.backoff.failures() == 0 || lane.is_idle();
        if may && !lane.skipped.is_empty() && lane.wake_at.is_none() {
            self.wake_at(id, now);
        }
    }

    fn wake_at(&mut self, id: LaneId, at: Instant) {
        if let Some(before) = self.lanes[id.0].wake_at.replace(at) {
            self.wakes.remove(&(before, id));
        }
        self.wakes.insert((at, id));
    }

    fn forget(&mut self, messages: &[Queued]) {
        for queued in messages {
            self.held.remove(&(queued.lane, queued.entry.offset));
            self.held_bytes -= queued.entry.bytes.len();
        }
    }
}

#[cfg(test)]
mod tests;
