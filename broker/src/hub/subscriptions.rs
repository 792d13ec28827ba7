//! Owns which features connected clients have switched on, and tells the upstream.
//!
//! A record lives from the first feature of a connection to its last, or to its end. What is wanted is told upstream by
//! one task, which never waits for an identity's link: the other side keeps it over reconnects.

use std::time::Duration;

use ahash::AHashMap;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use tokio::time::Instant;

use super::identity_queue::IdentityQueue;
use crate::backend::{Feature, Mailbox};
use crate::identity::Identity;
use crate::upstream::control::{Control, Wanted};

/// The features of connected clients.
pub(super) struct Subscriptions {
    /// The hub itself: it always wants its desired properties and its methods.
    own: Identity,
    clients: DashMap<Identity, Subscribed, ahash::RandomState>,
    changed: IdentityQueue,
}

struct Subscribed {
    connection: u64,
    mailbox: Mailbox,
    wanted: Wanted,
    /// It has asked for changes of desired properties, and has not heard since that what it wants is in place.
    desired_anew: bool,
    /// Nothing but the connection to the upstream is new since what it wants was in place.
    reconnected: bool,
    /// Its twin is to be read whatever the period.
    twin_due: bool,
    /// When its twin was last to be read because nothing but the connection was new.
    reconnect_read_at: Option<Instant>,
    /// When a later such reading is planned for.
    reconnect_planned_at: Option<Instant>,
}

/// When the twin of a client is to be read because its links are new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RefreshTime {
    /// Its client does not want to know, or it is planned already.
    Never,
    Now,
    /// It was read a short while ago, after another new connection. The caller comes again, once.
    After(Duration),
}

impl Subscriptions {
    pub(super) fn new(own: Identity) -> Self {
        let subscriptions = Self { own, clients: DashMap::default(), changed: IdentityQueue::default() };
        subscriptions.changed.push(&subscriptions.own);
        subscriptions
    }

    /// Switches a feature of a connection on or off. A connection that was replaced changes nothing.
    pub(super) fn set(
        &self,
        identity: &Identity,
        connection: u64,
        mailbox: &Mailbox,
        feature: Feature,
        on: bool,
    ) {
        let change: fn(&mut Wanted) -> &mut bool = match feature {
            Feature::CloudToDevice if identity.module_id().is_none() => |wanted| &mut wanted.cloud_to_device,
            Feature::Methods => |wanted| &mut wanted.methods,
            Feature::DesiredProperties => |wanted| &mut wanted.desired,
            // These are between the client and the hub.
            Feature::CloudToDevice | Feature::ModuleInputs | Feature::TwinResponses => return,
        };
        let fresh = || Subscribed {
            connection,
            mailbox: mailbox.clone(),
            wanted: Wanted::default(),
            desired_anew: false,
            reconnected: false,
            twin_due: false,
            reconnect_read_at: None,
            reconnect_planned_at: None,
        };
        match self.clients.entry(identity.clone()) {
            Entry::Occupied(entry) if entry.get().connection > connection => return,
            Entry::Occupied(mut entry) => {
                if entry.get().connection < connection {
                    entry.insert(fresh());
                }
                entry.get_mut().set(change, on);
                if entry.get().wanted.is_nothing() {
                    entry.remove();
                }
            }
            Entry::Vacant(_) if !on => return,
            Entry::Vacant(entry) => entry.insert(fresh()).set(change, on),
        }
        self.changed.push(identity);
    }

    /// A connection has ended.
    pub(super) fn ended(&self, identity: &Identity, connection: u64) {
        if self.clients.remove_if(identity, |_, client| client.connection == connection).is_some() {
            self.changed.push(identity);
        }
    }

    /// What an identity wants at this moment.
    pub(super) fn wanted(&self, identity: &Identity) -> Wanted {
        if *identity == self.own {
            return Wanted { desired: true, methods: true, cloud_to_device: false };
        }
        self.clients.get(identity).map(|client| client.wanted).unwrap_or_default()
    }

    /// The way to the client if it wants what `is_wanted` looks for, and the number of its connection.
    pub(super) fn client(
        &self,
        identity: &Identity,
        is_wanted: impl Fn(Wanted) -> bool,
    ) -> Option<(u64, Mailbox)> {
        let client = self.clients.get(identity)?;
        is_wanted(client.wanted).then(|| (client.connection, client.mailbox.clone()))
    }

    /// What an identity wants is in place upstream, so that it is told of changes since now. What was changed before may
    /// have been told to nobody: its twin is to be read. Only after a new connection of all identities that may wait, or a
    /// connection that comes and goes would be followed by a reading of every twin each time.
    pub(super) fn linked(&self, identity: &Identity) {
        let client = self.clients.get_mut(identity).filter(|client| client.wanted.desired);
        let Some(mut client) = client else { return };
        let reconnected = std::mem::take(&mut client.reconnected);
        let anew = std::mem::take(&mut client.desired_anew);
        client.twin_due |= anew || !reconnected;
    }

    /// The reading of an identity's twin was given up, as the upstream was lost: the next news of its links asks for it.
    pub(super) fn twin_missed(&self, identity: &Identity) {
        if let Some(mut client) = self.clients.get_mut(identity) {
            client.twin_due |= client.wanted.desired;
        }
    }

    /// When the twin of an identity is to be read because its links are new: at once, but for new connections once in
    /// `period`.
    pub(super) fn refresh_time(&self, identity: &Identity, period: Duration) -> RefreshTime {
        if *identity == self.own {
            return RefreshTime::Now;
        }
        let Some(mut client) = self.clients.get_mut(identity).filter(|client| client.wanted.desired) else {
            return RefreshTime::Never;
        };
        let now = Instant::now();
        if std::mem::take(&mut client.twin_due) {
            client.reconnect_planned_at = None;
            return RefreshTime::Now;
        }
        match client.reconnect_read_at.map(|at| at + period).filter(|next| *next > now) {
            Some(_) if client.reconnect_planned_at.is_some_and(|at| at > now) => RefreshTime::Never,
            Some(next) => {
                client.reconnect_planned_at = Some(next);
                RefreshTime::After(next - now)
            }
            None => {
                (client.reconnect_read_at, client.reconnect_planned_at) = (Some(now), None);
                RefreshTime::Now
            }
        }
    }

    /// There is a new connection to the upstream: all identities are told again.
    pub(super) fn tell_all(&self) {
        self.changed.push(&self.own);
        let all = self.clients.iter_mut().map(|mut entry| {
            entry.reconnected = true;
            entry.key().clone()
        });
        let all: Vec<Identity> = all.collect();
        all.iter().for_each(|identity| self.changed.push(identity));
    }

    /// The upstream is being told that an identity wants the same as before. If that is in place, it says nothing of it;
    /// whether the twin is to be looked at all the same.
    fn telling_again(&self, identity: &Identity) -> bool {
        // On a new connection everything has to be put in place.
        let client = self.clients.get_mut(identity).filter(|client| !client.reconnected);
        let Some(mut client) = client else { return false };
        let anew = std::mem::take(&mut client.desired_anew);
        client.twin_due |= anew;
        anew
    }

    /// Tells the upstream what is wanted; for ever. What was switched off and on again before it was told is in place
    /// already, and the upstream says nothing of it: then `in_place` hears of it.
    pub(super) async fn tell(&self, control: &Control, in_place: impl Fn(&Identity)) {
        let mut told: AHashMap<Identity, Wanted> = AHashMap::new();
        loop {
            let identity = self.changed.next().await;
            let wanted = self.wanted(&identity);
            if wanted.is_nothing() {
                if told.remove(&identity).is_none() {
                    continue;
                }
            } else {
                let is_same = told.insert(identity.clone(), wanted) == Some(wanted);
                if is_same && self.telling_again(&identity) {
                    in_place(&identity);
                }
            }
            control.want(&identity, wanted).await;
        }
    }
}

impl Subscribed {
    fn set(&mut self, feature: fn(&mut Wanted) -> &mut bool, on: bool) {
        let known = feature(&mut self.wanted);
        if *known != on {
            *known = on;
            self.desired_anew |= self.wanted.desired && on;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(120);

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    fn subscriptions() -> Subscriptions {
        Subscriptions::new(id("edge1/$edgeHub"))
    }

    #[test]
    fn a_record_lives_as_long_as_its_connection_wants_something() {
        let subscriptions = subscriptions();
        let (mailbox, _receiver) = Mailbox::channel(1);
        let (leaf, module) = (id("leaf"), id("edge1/m"));
        let set = |identity, connection, feature, on| {
            subscriptions.set(identity, connection, &mailbox, feature, on);
        };
        set(&module, 1, Feature::CloudToDevice, true);
        set(&module, 1, Feature::TwinResponses, true);
        set(&module, 1, Feature::ModuleInputs, true);
        assert!(subscriptions.clients.is_empty(), "a module has no cloud-to-device messages");
        set(&leaf, 1, Feature::CloudToDevice, true);
        set(&leaf, 1, Feature::Methods, true);
        assert_eq!(
            subscriptions.wanted(&leaf),
            Wanted { methods: true, cloud_to_device: true, desired: false }
        );
        set(&leaf, 2, Feature::DesiredProperties, true);
        assert_eq!(subscriptions.wanted(&leaf), Wanted { desired: true, ..Wanted::default() });
        set(&leaf, 1, Feature::Methods, true);
        subscriptions.ended(&leaf, 1);
        assert_eq!(
            subscriptions.client(&leaf, |wanted| wanted.desired).map(|(connection, _)| connection),
            Some(2)
        );
        assert!(subscriptions.client(&leaf, |wanted| wanted.methods).is_none());
        set(&leaf, 2, Feature::DesiredProperties, false);
        assert!(subscriptions.clients.is_empty());
        set(&leaf, 3, Feature::Methods, true);
        subscriptions.ended(&leaf, 3);
        assert!(subscriptions.clients.is_empty());
    }

    /// A client that wants to hear of its desired properties, and whose links are in place.
    fn linked_client(subscriptions: &Subscriptions) -> Identity {
        let leaf = id("leaf");
        let (mailbox, _receiver) = Mailbox::channel(1);
        subscriptions.set(&leaf, 1, &mailbox, Feature::DesiredProperties, true);
        subscriptions.linked(&leaf);
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Now);
        leaf
    }

    fn reconnect(subscriptions: &Subscriptions, identity: &Identity) -> RefreshTime {
        subscriptions.tell_all();
        assert!(!subscriptions.telling_again(identity), "it hears when it is in place");
        subscriptions.linked(identity);
        subscriptions.refresh_time(identity, PERIOD)
    }

    #[tokio::test(start_paused = true)]
    async fn new_connections_are_followed_by_a_reading_once_in_a_period_and_none_is_forgotten() {
        let subscriptions = subscriptions();
        assert_eq!(subscriptions.refresh_time(&id("leaf"), PERIOD), RefreshTime::Never);
        let leaf = linked_client(&subscriptions);
        assert_eq!(reconnect(&subscriptions, &leaf), RefreshTime::Now, "the first one");
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(reconnect(&subscriptions, &leaf), RefreshTime::After(Duration::from_secs(100)));
        assert_eq!(reconnect(&subscriptions, &leaf), RefreshTime::Never, "it is planned");
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Now);
        assert_eq!(subscriptions.refresh_time(&id("edge1/$edgeHub"), PERIOD), RefreshTime::Now);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_told_of_changes_again_is_read_at_once() {
        let subscriptions = subscriptions();
        let leaf = linked_client(&subscriptions);
        reconnect(&subscriptions, &leaf);
        assert_ne!(reconnect(&subscriptions, &leaf), RefreshTime::Now);
        let linked = || {
            subscriptions.linked(&leaf);
            subscriptions.refresh_time(&leaf, PERIOD)
        };
        // Its own links were lost, or a change was: as often as it happens, also while a reading is planned.
        assert_eq!([linked(), linked()], [RefreshTime::Now; 2]);
        // The upstream was lost before the reading had come to its end.
        subscriptions.twin_missed(&leaf);
        assert_eq!(reconnect(&subscriptions, &leaf), RefreshTime::Now);
        assert_ne!(reconnect(&subscriptions, &leaf), RefreshTime::Now);
        // Off and on again before the upstream was told: it says nothing, and what came between was told to nobody.
        let (mailbox, _receiver) = Mailbox::channel(1);
        let set = |connection, on| {
            subscriptions.set(&leaf, connection, &mailbox, Feature::DesiredProperties, on);
        };
        let methods = |on| subscriptions.set(&leaf, 1, &mailbox, Feature::Methods, on);
        methods(true);
        set(1, false);
        set(1, true);
        assert!(subscriptions.telling_again(&leaf) && !subscriptions.telling_again(&leaf));
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Now);
        // The same on a connection that is new to the upstream, which has something to say.
        set(1, false);
        set(1, true);
        assert_eq!(reconnect(&subscriptions, &leaf), RefreshTime::Now);
        assert_ne!(reconnect(&subscriptions, &leaf), RefreshTime::Now);
        // News of what was wanted before, then of what is wanted now; also when the client is another one.
        for connection in 1..3 {
            set(connection, false);
            set(connection, true);
            assert_eq!([linked(), linked()], [RefreshTime::Now; 2]);
        }
        subscriptions.ended(&leaf, 2);
        subscriptions.twin_missed(&leaf);
        assert_eq!(linked(), RefreshTime::Never);
    }
}
