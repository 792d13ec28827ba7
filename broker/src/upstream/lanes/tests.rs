//! Lanes: order, chunks, parking, what is read again, and how many transfers are under way.

use super::*;
use crate::message::{Message, Origin, Properties, Sender};
use bytes::Bytes;
use edgehub_storage::{Entry, Offset, Ttl};
use std::sync::Arc;

fn queued(sender: &str, offset: u64) -> Queued {
    queued_at(0, sender, offset)
}

fn queued_at(level: u32, sender: &str, offset: u64) -> Queued {
    let sender =
        Sender { identity: Identity::parse(sender).unwrap(), origin: Origin::Downstream, model_id: None };
    let message = Message::new(Arc::new(sender), Properties::empty(), Bytes::new());
    let entry = Entry {
        offset: Offset::new(offset),
        bytes: message.to_record(),
        accepted_at: StoreTime::default(),
        ttl: Ttl::Infinite,
    };
    Queued {
        lane: level as usize,
        level,
        rank: level,
        alone: false,
        priority: level.to_string().into(),
        entry,
        message,
    }
}

fn offsets<'a>(messages: impl IntoIterator<Item = &'a Queued>) -> Vec<u64> {
    messages.into_iter().map(|queued| queued.entry.offset.get()).collect()
}

#[test]
fn messages_go_in_chunks_and_come_back_settled_in_order() {
    let mut lanes = Lanes::new(2, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued("a", 0), now).unwrap();
    for offset in 1..5 {
        assert_eq!(lanes.push(queued("a", offset), now), Some(lane));
    }
    assert_eq!(offsets(lanes.next_chunk(lane)), [0, 1]);
    lanes.sent(lane, 2, now);
    lanes.sent(lane, 2, now);
    assert_eq!(offsets(lanes.next_chunk(lane)), [4]);
    assert_eq!(offsets(&lanes.settled(lane, now).unwrap().messages), [0, 1]);
    assert_eq!(lanes.held(), 3);
    assert_eq!(lanes.in_flight(), 1);
}

#[test]
fn a_parked_lane_holds_nothing_and_is_read_again_while_others_go_on() {
    let mut lanes = Lanes::new(10, BackoffOptions::default());
    let now = Instant::now();
    let bad = lanes.push(queued("bad", 3), now).unwrap();
    let good = lanes.push(queued("good", 4), now).unwrap();
    lanes.sent(bad, 1, now);
    let pause = lanes.park(bad, now);
    assert_eq!(lanes.push(queued("bad", 5), now), None);
    assert_eq!(lanes.held(), 1);
    assert!(lanes.wake(now).is_empty());
    assert_eq!(lanes.wake(now + pause), [(0, Offset::new(3))]);
    assert_eq!(lanes.push(queued("bad", 3), now), Some(bad));
    assert_eq!(lanes.push(queued("good", 4), now), None, "already held");
    assert_eq!(lanes.push(queued("bad", 5), now), Some(bad));
    assert_eq!(offsets(lanes.next_chunk(good)), [4]);
    assert_eq!(offsets(lanes.next_chunk(bad)), [3, 5]);
}

#[test]
fn a_refused_chunk_goes_again_one_by_one() {
    let mut lanes = Lanes::new(10, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued("a", 0), now).unwrap();
    for offset in 1..4 {
        lanes.push(queued("a", offset), now);
    }
    lanes.sent(lane, 3, now);
    lanes.sent(lane, 1, now);
    lanes.push(queued("a", 4), now);
    lanes.set_aside(lane);
    assert!(!lanes.is_ready(lane), "what was sent behind it is answered first");
    assert_eq!(offsets(&lanes.settled(lane, now).unwrap().messages), [3]);
    for offset in 0..3 {
        assert!(lanes.is_ready(lane));
        assert_eq!(offsets(lanes.next_chunk(lane)), [offset]);
        lanes.sent(lane, 1, now);
        assert!(offset == 2 || !lanes.is_ready(lane), "one at a time");
        lanes.settled(lane, now);
    }
    lanes.push(queued("a", 5), now);
    assert_eq!(offsets(lanes.next_chunk(lane)), [4, 5], "together again");
}

#[test]
fn what_was_set_aside_when_the_lane_fails_is_read_again() {
    let mut lanes = Lanes::new(2, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued("a", 0), now).unwrap();
    for offset in 1..5 {
        lanes.push(queued("a", offset), now);
    }
    lanes.sent(lane, 2, now);
    lanes.sent(lane, 2, now);
    lanes.set_aside(lane);
    let pause = lanes.park(lane, now);
    assert_eq!((lanes.held(), lanes.in_flight()), (0, 0));
    assert_eq!(lanes.wake(now + pause), [(0, Offset::new(0))]);
}

#[test]
fn a_more_urgent_message_ends_the_pause_of_those_that_failed_and_an_equal_one_does_not() {
    let mut lanes = Lanes::new(10, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued_at(5, "a", 0), now).unwrap();
    lanes.sent(lane, 1, now);
    lanes.park(lane, now);
    assert_eq!(lanes.push(queued_at(5, "a", 1), now), None);
    assert_eq!(lanes.push(queued_at(7, "a", 0), now), None);
    assert!(lanes.wake(now).is_empty());
    assert_eq!(lanes.push(queued_at(2, "a", 0), now), None);
    let mut places = lanes.wake(now);
    places.sort_unstable();
    assert_eq!(places, [(2, Offset::new(0)), (5, Offset::new(0)), (7, Offset::new(0))]);
    assert_eq!(lanes.push(queued_at(2, "a", 0), now), Some(lane));
    lanes.park(lane, now);
    assert_eq!(lanes.push(queued_at(2, "a", 1), now), None);
    assert!(lanes.wake(now).is_empty(), "it failed as well");
}

#[test]
fn a_message_of_the_guaranteed_share_goes_first_and_overtakes_none_of_its_queue() {
    let mut lanes = Lanes::new(10, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued_at(1, "a", 0), now).unwrap();
    lanes.push(queued_at(5, "a", 0), now);
    lanes.push(queued_at(5, "a", 1), now);
    lanes.push(Queued { rank: 1, ..queued_at(5, "a", 2) }, now);
    lanes.push(queued_at(1, "a", 1), now);
    let mut order = Vec::new();
    while lanes.rank(lane).is_some() {
        let chunk: Vec<(u32, u64)> =
            lanes.next_chunk(lane).map(|queued| (queued.level, queued.entry.offset.get())).collect();
        lanes.discard(lane, chunk.len(), now);
        order.push(chunk);
    }
    assert_eq!(order, [vec![(1, 0)], vec![(5, 0)], vec![(1, 1)], vec![(5, 1), (5, 2)]]);
}

#[test]
fn what_expires_while_it_waits_is_taken_out() {
    let mut lanes = Lanes::new(10, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued("a", 0), now).unwrap();
    for offset in 1..4 {
        let mut queued = queued("a", offset);
        queued.entry.ttl = Ttl::Millis(if offset == 2 { 10 } else { 20 });
        lanes.push(queued, now);
    }
    let at = StoreTime::default().checked_add_millis(15).unwrap();
    assert_eq!(offsets(&lanes.expire(at, now)), [2]);
    assert_eq!(offsets(lanes.next_chunk(lane)), [0, 1, 3]);
    assert_eq!(lanes.held(), 3);
}

#[test]
fn a_reset_forgets_everything() {
    let mut lanes = Lanes::new(10, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued("a", 0), now).unwrap();
    lanes.sent(lane, 1, now);
    lanes.park(lane, now);
    lanes.reset();
    assert_eq!((lanes.held(), lanes.in_flight(), lanes.next_wake()), (0, 0, None));
    assert_eq!(lanes.push(queued("a", 0), now), Some(lane));
}

#[test]
fn after_a_reset_every_lane_takes_and_sends_what_it_had_in_any_state() {
    let mut lanes = Lanes::new(2, BackoffOptions::default());
    let now = Instant::now();
    let sent = lanes.push(queued("sent", 0), now).unwrap();
    for _ in 0..LANE_TRANSFERS_MAX {
        lanes.sent(sent, lanes.next_chunk(sent).count(), now);
    }
    let aside = lanes.push(queued("aside", 1), now).unwrap();
    lanes.sent(aside, 1, now);
    lanes.push(queued("aside", 2), now).unwrap();
    lanes.sent(aside, 1, now);
    lanes.set_aside(aside);
    let waits = lanes.push(queued("waits", 3), now).unwrap();
    let parked = lanes.push(queued("parked", 4), now).unwrap();
    lanes.park(parked, now);
    assert!([sent, aside, parked].iter().all(|lane| !lanes.is_ready(*lane)));
    lanes.reset();
    assert_eq!((lanes.held(), lanes.in_flight(), lanes.parked()), (0, 0, 0));
    assert_eq!(lanes.room_bytes(), HELD_BYTES_MAX);
    for (lane, sender, offset) in
        [(sent, "sent", 0), (aside, "aside", 1), (waits, "waits", 3), (parked, "parked", 4)]
    {
        assert_eq!(lanes.push(queued(sender, offset), now), Some(lane));
        assert!(lanes.is_ready(lane), "{sender}");
        assert_eq!(offsets(lanes.next_chunk(lane)), [offset], "{sender}");
    }
}

#[test]
fn an_urgent_message_goes_before_what_waits_and_behind_what_is_as_urgent() {
    let mut lanes = Lanes::new(10, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued_at(5, "a", 0), now).unwrap();
    lanes.push(queued_at(5, "a", 1), now);
    lanes.push(queued_at(1, "a", 0), now);
    lanes.push(queued_at(1, "a", 1), now);
    let places = |lanes: &Lanes| -> Vec<(u32, u64)> {
        lanes.next_chunk(lane).map(|queued| (queued.level, queued.entry.offset.get())).collect()
    };
    assert_eq!(places(&lanes), [(1, 0), (1, 1)], "one priority in a transfer");
    lanes.sent(lane, 2, now);
    assert_eq!(places(&lanes), [(5, 0), (5, 1)]);
    lanes.sent(lane, 2, now);
    lanes.push(queued_at(1, "a", 2), now);
    lanes.push(queued_at(5, "a", 2), now);
    lanes.set_aside(lane);
    lanes.set_aside(lane);
    for place in [(1, 0), (1, 1), (1, 2), (5, 0), (5, 1), (5, 2)] {
        assert_eq!(places(&lanes)[0], place);
        lanes.sent(lane, 1, now);
        lanes.settled(lane, now);
    }
}

#[test]
fn a_lane_on_probation_takes_one_transfer_and_has_the_rest_read_again_after_its_success() {
    let mut lanes = Lanes::new(2, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued("a", 0), now).unwrap();
    let pause = lanes.park(lane, now);
    let now = now + pause;
    assert_eq!(lanes.wake(now), [(0, Offset::new(0))]);
    for offset in 0..5 {
        assert_eq!(lanes.push(queued("a", offset), now).is_some(), offset < 2);
    }
    lanes.sent(lane, 2, now);
    assert_eq!(lanes.push(queued("a", 5), now), None, "nothing overtakes what was left out");
    lanes.settled(lane, now);
    assert_eq!(lanes.push(queued("a", 6), now), None);
    assert_eq!(lanes.wake(now), [(0, Offset::new(2))]);
    for offset in 2..7 {
        assert_eq!(lanes.push(queued("a", offset), now), Some(lane));
    }
}

#[test]
fn a_lane_on_probation_whose_messages_all_expired_is_read_again() {
    let mut lanes = Lanes::new(1, BackoffOptions::default());
    let now = Instant::now();
    let lane = lanes.push(queued("a", 0), now).unwrap();
    let now = now + lanes.park(lane, now);
    lanes.wake(now);
    lanes.push(queued("a", 0), now);
    lanes.push(queued("a", 1), now);
    lanes.discard(lane, 1, now);
    assert_eq!(lanes.wake(now), [(0, Offset::new(1))]);
}

#[test]
fn after_a_connection_was_closed_for_a_transfer_fewer_are_under_way_until_many_were_answered() {
    let mut lanes = Lanes::new(1, BackoffOptions::default());
    let now = Instant::now();
    let mut offset = 0;
    let mut fill = |lanes: &mut Lanes| {
        loop {
            let lane = lanes.push(queued("a", offset), now).unwrap();
            offset += 1;
            if !lanes.is_ready(lane) {
                return (lane, lanes.in_flight());
            }
            lanes.sent(lane, 1, now);
        }
    };
    assert_eq!(fill(&mut lanes).1, LANE_TRANSFERS_MAX);
    for under_way in [8, 4, 2, 1, 1] {
        lanes.narrow();
        lanes.reset();
        assert_eq!(fill(&mut lanes).1, under_way);
    }
    lanes.reset();
    lanes.narrow();
    for under_way in 1..LANE_TRANSFERS_MAX {
        for _ in 0..WIDEN_TRANSFERS {
            let (lane, in_flight) = fill(&mut lanes);
            assert_eq!(in_flight, under_way);
            lanes.settled(lane, now);
        }
    }
    assert_eq!(fill(&mut lanes).1, LANE_TRANSFERS_MAX);
    lanes.reset();
    lanes.narrow();
    assert_eq!(fill(&mut lanes).1, LANE_TRANSFERS_MAX, "nothing was under way");
}
