//! Events on their way to the hub, in order, bounded, and without a wait for whoever holds the connection.

use std::collections::VecDeque;

use ahash::AHashSet;
use tokio::sync::mpsc;

use super::control::Downward;
use crate::identity::Identity;

/// Events that wait while the hub's channel is full.
const WAITING_MAX: usize = 1_024;

/// Takes events to the hub.
pub(super) struct Outbox {
    hub: mpsc::Sender<Downward>,
    waiting: VecDeque<Downward>,
    /// Identities of which something was left out for want of room; they are told to look for themselves.
    missed: AHashSet<Identity>,
    /// Whether the last that the hub heard of the connection is that it is up.
    heard_up: bool,
}

impl Outbox {
    pub(super) fn new(hub: mpsc::Sender<Downward>) -> Self {
        Self { hub, waiting: VecDeque::new(), missed: AHashSet::new(), heard_up: false }
    }

    /// The connection is up.
    pub(super) fn up(&mut self) {
        self.waiting.push_back(Downward::Up);
        self.pump();
    }

    /// The connection is lost. What it brought and nobody has taken is void: it comes again, or is looked up.
    pub(super) fn down(&mut self) {
        self.forget();
        if self.heard_up {
            self.waiting.push_back(Downward::Down);
            self.pump();
        }
    }

    /// What an identity wants is in place.
    pub(super) fn linked(&mut self, identity: &Identity) {
        if self.push(Downward::Linked(identity.clone())).is_err() {
            self.missed.insert(identity.clone());
        }
    }

    /// Gives an event back for which there is no room.
    pub(super) fn push(&mut self, event: Downward) -> Result<(), Box<Downward>> {
        if self.waiting.len() >= WAITING_MAX {
            self.pump();
        }
        if self.waiting.len() >= WAITING_MAX {
            return Err(Box::new(event));
        }
        self.waiting.push_back(event);
        self.pump();
        Ok(())
    }

    /// The identity missed a change: it hears that it is linked once there is room, and looks for itself.
    pub(super) fn missed(&mut self, identity: &Identity) {
        self.missed.insert(identity.clone());
    }

    /// Whether something waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Waits for room and gives on what waits. Cancel safe.
    pub(super) async fn turn(&mut self) {
        let room = self.hub.reserve().await.map(|permit| {
            if let Some(event) = self.waiting.pop_front() {
                self.heard_up = heard_up(&event, self.heard_up);
                permit.send(event);
            }
        });
        match room {
            Ok(()) => self.pump(),
            // Nobody listens any more: the hub is stopping.
            Err(_) => self.forget(),
        }
    }

    /// Gives on what waits, as far as there is room.
    fn pump(&mut self) {
        loop {
            while let Some(event) = self.waiting.pop_front() {
                let heard_up = heard_up(&event, self.heard_up);
                match self.hub.try_send(event) {
                    Ok(()) => self.heard_up = heard_up,
                    Err(mpsc::error::TrySendError::Full(event)) => {
                        self.waiting.push_front(event);
                        return;
                    }
                    Err(mpsc::error::TrySendError::Closed(_)) => return self.forget(),
                }
            }
            let Some(identity) = self.missed.iter().next().cloned() else { return };
            self.missed.remove(&identity);
            self.waiting.push_back(Downward::Linked(identity));
        }
    }

    fn forget(&mut self) {
        self.waiting.clear();
        self.missed.clear();
    }
}

/// What the hub knows of the connection once it has the event.
fn heard_up(event: &Downward, before: bool) -> bool {
    match event {
        Downward::Up => true,
        Downward::Down => false,
        Downward::Linked(_)
        | Downward::Desired { .. }
        | Downward::Method { .. }
        | Downward::CloudToDevice { .. } => before,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> Identity {
        Identity::parse(&format!("d{number}")).unwrap()
    }

    fn names(receiver: &mut mpsc::Receiver<Downward>) -> Vec<String> {
        let mut names = Vec::new();
        while let Ok(event) = receiver.try_recv() {
            names.push(match event {
                Downward::Up => "up".into(),
                Downward::Down => "down".into(),
                Downward::Linked(identity) => identity.to_string(),
                other => panic!("{other:?}"),
            });
        }
        names
    }

    #[tokio::test]
    async fn a_slow_hub_hears_of_every_identity_once_there_is_room() {
        let (sender, mut receiver) = mpsc::channel(1);
        let mut outbox = Outbox::new(sender);
        let count = WAITING_MAX + 10;
        (0..count).for_each(|number| outbox.linked(&id(number)));
        let mut heard = names(&mut receiver);
        while heard.len() < count {
            outbox.turn().await;
            heard.extend(names(&mut receiver));
        }
        heard.sort_unstable();
        heard.dedup();
        assert_eq!(heard.len(), count);
        assert!(outbox.is_empty());
    }

    #[tokio::test]
    async fn a_lost_connection_voids_what_it_brought_and_is_told_only_to_who_heard_of_it() {
        let (sender, mut receiver) = mpsc::channel(1);
        let mut outbox = Outbox::new(sender);
        outbox.down();
        outbox.up();
        outbox.linked(&id(1));
        assert_eq!(names(&mut receiver), ["up"]);
        outbox.linked(&id(2));
        outbox.linked(&id(3));
        outbox.down();
        outbox.up();
        outbox.down();
        let mut heard = names(&mut receiver);
        while !outbox.is_empty() {
            outbox.turn().await;
            heard.extend(names(&mut receiver));
        }
        assert!(heard.ends_with(&["down".to_owned()]), "{heard:?}");
        assert!(!heard.contains(&"d3".to_owned()), "{heard:?}");
    }
}
