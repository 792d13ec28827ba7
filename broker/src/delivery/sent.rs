//! Metric handles of a pump: one set per sender, output and priority, so that counting a message costs no look-up.

use std::sync::Arc;

use ahash::AHashMap;
use metrics::{Counter, Histogram, counter, histogram};
use smallvec::SmallVec;

use crate::identity::Identity;
use crate::message::Message;

/// Sets of handles that a pump keeps. When they are used up it starts over with none: places that were given out
/// stay valid, but count for whoever has them next.
const KEPT_MAX: usize = 4_096;

/// The metrics of what one endpoint was sent.
pub(crate) struct SentMetrics {
    to: String,
    input: String,
    routes: Vec<Route>,
    /// Places by the hash of sender, output and priority.
    places: AHashMap<u64, SmallVec<[usize; 1]>>,
    hasher: ahash::RandomState,
    /// The place that was asked for last, which is often the next one too.
    last: usize,
    /// The place that is given away next.
    next: usize,
}

/// Equal things that come one after the other, to be counted together: messages of one sender that were stored, sent or
/// answered at once are alike.
pub(crate) struct Run<T> {
    of: Option<(T, usize)>,
}

impl<T: PartialEq> Run<T> {
    pub(crate) fn new() -> Self {
        Self { of: None }
    }

    /// Adds one; what went before and is unlike it comes back with its number.
    pub(crate) fn add(&mut self, one: T) -> Option<(T, usize)> {
        match &mut self.of {
            Some((of, count)) if *of == one => {
                *count += 1;
                None
            }
            _ => self.of.replace((one, 1)),
        }
    }

    /// What is left, with its number.
    pub(crate) fn end(self) -> Option<(T, usize)> {
        self.of
    }
}

struct Route {
    from: Identity,
    output: Option<Box<str>>,
    priority: Arc<str>,
    sent: Counter,
    send_duration: Histogram,
    process_duration: Histogram,
}

impl SentMetrics {
    /// For the endpoint that metrics name `to`, and its input (empty for the upstream).
    pub(crate) fn new(to: &str, input: &str) -> Self {
        Self {
            to: to.into(),
            input: input.into(),
            routes: Vec::new(),
            places: AHashMap::new(),
            hasher: ahash::RandomState::new(),
            last: 0,
            next: 0,
        }
    }

    /// The place of the handles for a message; valid for as long as the pump lives.
    pub(crate) fn route(&mut self, message: &Message, priority: &Arc<str>) -> usize {
        let from = &message.sender.identity;
        let output = message.output();
        let fits = |route: &Route| {
            route.from == *from && route.output.as_deref() == output && route.priority == *priority
        };
        if self.routes.get(self.last).is_some_and(fits) {
            return self.last;
        }
        let hash = self.hasher.hash_one((from, output, &**priority));
        let places = self.places.get(&hash).map_or(&[][..], |places| &places[..]);
        if let Some(place) = places.iter().copied().find(|place| fits(&self.routes[*place])) {
            self.last = place;
            return place;
        }
        let place = ("from", from.to_string());
        let to = ("to", self.to.clone());
        let from_output = ("from_route_output", output.unwrap_or_default().to_owned());
        let input = ("to_route_input", self.input.clone());
        let level = ("priority", priority.to_string());
        let labels = [place.clone(), to.clone(), from_output.clone(), input.clone()];
        let sent_labels = [place.clone(), to.clone(), from_output, input, level.clone()];
        let route = Route {
            from: from.clone(),
            output: output.map(Box::from),
            priority: priority.clone(),
            sent: counter!("edgehub_messages_sent_total", &sent_labels),
            send_duration: histogram!("edgehub_message_send_duration_seconds", &labels),
            process_duration: histogram!("edgehub_message_process_duration_seconds", &[place, to, level]),
        };
        if self.next == KEPT_MAX {
            self.next = 0;
            self.places.clear();
        }
        self.last = self.next;
        self.next += 1;
        match self.routes.get_mut(self.last) {
            Some(slot) => *slot = route,
            None => self.routes.push(route),
        }
        self.places.entry(hash).or_default().push(self.last);
        self.last
    }

    /// Counts a message that is on the wire, and how long it was in the hub before.
    pub(crate) fn sent(&self, route: usize, in_hub_millis: u64) {
        self.sent_many(route, in_hub_millis, 1);
    }

    /// The same for several messages.
    pub(crate) fn sent_many(&self, route: usize, in_hub_millis: u64, count: usize) {
        let route = &self.routes[route];
        route.sent.increment(count as u64);
        route.process_duration.record_many(in_hub_millis as f64 / 1_000.0, count);
    }

    /// Notes how long an answer took.
    pub(crate) fn answered(&self, route: usize, seconds: f64) {
        self.answered_many(route, seconds, 1);
    }

    /// The same for several answers.
    pub(crate) fn answered_many(&self, route: usize, seconds: f64, count: usize) {
        self.routes[route].send_duration.record_many(seconds, count);
    }

    /// Whose messages a set of handles counts, and their output.
    pub(crate) fn source(&self, route: usize) -> (&Identity, &str) {
        let route = &self.routes[route];
        (&route.from, route.output.as_deref().unwrap_or_default())
    }
}
