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

/// Changes of what a connection wants that the upstream may have yet to put in place; it has no more features upstream.
const CHANGES_MAX: u8 = 3;

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
    /// When its twin was read from the upstream for the last time.
    twin_read_at: Option<Instant>,
    /// When a later reading is planned for.
    twin_planned_at: Option<Instant>,
    /// How often the upstream was told of something else that it wants, less how often that was put in place.
    changes: u8,
    /// Its twin is to be read whatever the period: the upstream tells of changes since now, and was asked to anew.
    twin_due: bool,
    /// It has asked for changes of desired properties since the upstream was told for the last time.
    desired_anew: bool,
}

/// When the twin of a client is to be read because its links are new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RefreshTime {
    /// Its client does not want to know, or it is planned already.
    Never,
    Now,
    /// It was read a short while ago. The caller comes again, once.
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
            twin_read_at: None,
            twin_planned_at: None,
            changes: 0,
            twin_due: false,
            desired_anew: false,
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

    /// The twin of an identity has been read from the upstream.
    pub(super) fn twin_read(&self, identity: &Identity) {
        if let Some(mut client) = self.clients.get_mut(identity) {
            client.twin_read_at = Some(Instant::now());
        }
    }

    /// What an identity wants is in place upstream. If that is something new, its twin is to be read: a change that was
    /// made between the client's own reading and now was told to nobody. New links alone do not ask for it, or every
    /// outage would be followed by a reading of every twin.
    pub(super) fn linked(&self, identity: &Identity) {
        if let Some(mut client) = self.clients.get_mut(identity)
            && client.changes > 0
        {
            client.changes -= 1;
            client.twin_due |= client.wanted.desired;
        }
    }

    /// When the twin of an identity is to be read because its links are new: at most once in `period`, and once more for
    /// each time that the client asked for something new.
    pub(super) fn refresh_time(&self, identity: &Identity, period: Duration) -> RefreshTime {
        if *identity == self.own {
            return RefreshTime::Now;
        }
        let Some(mut client) = self.clients.get_mut(identity).filter(|client| client.wanted.desired) else {
            return RefreshTime::Never;
        };
        let now = Instant::now();
        let next = client.twin_read_at.map(|at| at + period).filter(|next| *next > now);
        match next {
            Some(next) if !client.twin_due => {
                if client.twin_planned_at.is_some_and(|at| at > now) {
                    return RefreshTime::Never;
                }
                client.twin_planned_at = Some(next);
                RefreshTime::After(next - now)
            }
            _ => {
                (client.twin_planned_at, client.twin_due) = (None, false);
                RefreshTime::Now
            }
        }
    }

    /// There is a new connection to the upstream. All identities are told again, and each hears once that what it wants is
    /// in place, however often it was told before.
    pub(super) fn tell_all(&self) {
        self.changed.push(&self.own);
        let all = self.clients.iter_mut().map(|mut entry| {
            entry.changes = entry.changes.min(1);
            entry.key().clone()
        });
        let all: Vec<Identity> = all.collect();
        all.iter().for_each(|identity| self.changed.push(identity));
    }

    /// The upstream is being told what an identity wants, or that it is the same as before. Then the upstream says nothing of
    /// it; whether the twin is to be looked at all the same.
    fn telling(&self, identity: &Identity, is_same: bool) -> bool {
        let Some(mut client) = self.clients.get_mut(identity) else { return false };
        let anew = std::mem::take(&mut client.desired_anew);
        if !is_same {
            client.changes = CHANGES_MAX.min(client.changes + 1);
            return false;
        }
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
                if self.telling(&identity, is_same) {
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

    #[tokio::test(start_paused = true)]
    async fn a_twin_is_read_again_once_in_a_period_and_not_forgotten() {
        const PERIOD: Duration = Duration::from_secs(120);
        let subscriptions = subscriptions();
        let (mailbox, _receiver) = Mailbox::channel(1);
        let leaf = id("leaf");
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Never);
        subscriptions.set(&leaf, 1, &mailbox, Feature::DesiredProperties, true);
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Now);
        subscriptions.twin_read(&leaf);
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::After(Duration::from_secs(100)));
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Never);
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Now);
        assert_eq!(subscriptions.refresh_time(&id("edge1/$edgeHub"), PERIOD), RefreshTime::Now);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reading_that_is_planned_is_planned_again_when_the_client_has_read_meanwhile() {
        const PERIOD: Duration = Duration::from_secs(120);
        let subscriptions = subscriptions();
        let (mailbox, _receiver) = Mailbox::channel(1);
        let leaf = id("leaf");
        subscriptions.set(&leaf, 1, &mailbox, Feature::DesiredProperties, true);
        subscriptions.twin_read(&leaf);
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::After(PERIOD));
        tokio::time::advance(Duration::from_secs(50)).await;
        subscriptions.twin_read(&leaf);
        tokio::time::advance(Duration::from_secs(70)).await;
        let rest = Duration::from_secs(50);
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::After(rest), "its time has come");
        tokio::time::advance(rest).await;
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Now);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wanted_anew_is_followed_by_a_reading_within_the_period_and_new_links_are_not() {
        const PERIOD: Duration = Duration::from_secs(120);
        let subscriptions = subscriptions();
        let (mailbox, _receiver) = Mailbox::channel(1);
        let leaf = id("leaf");
        let set = |feature, on| subscriptions.set(&leaf, 1, &mailbox, feature, on);
        let linked = || {
            subscriptions.linked(&leaf);
            subscriptions.refresh_time(&leaf, PERIOD)
        };
        let told = |is_same| subscriptions.telling(&leaf, is_same);
        set(Feature::Methods, true);
        assert!(!told(false));
        subscriptions.twin_read(&leaf);
        set(Feature::DesiredProperties, true);
        set(Feature::DesiredProperties, true);
        assert!(!told(false));
        // The first may be in place for the methods only.
        assert_eq!([linked(), linked()], [RefreshTime::Now, RefreshTime::Now]);
        assert_eq!(linked(), RefreshTime::After(PERIOD), "after an outage");
        set(Feature::DesiredProperties, false);
        told(false);
        assert_eq!(linked(), RefreshTime::Never);
        set(Feature::DesiredProperties, true);
        told(false);
        assert_eq!(linked(), RefreshTime::Now, "also while one is planned");
        // Off and on again before the upstream was told: it says nothing, and what came between was told to nobody.
        set(Feature::DesiredProperties, false);
        set(Feature::DesiredProperties, true);
        assert!(told(true) && !told(true));
        assert_eq!(subscriptions.refresh_time(&leaf, PERIOD), RefreshTime::Now);
        // A client that switches to and fro asks for no more than the features it has, and after an outage for one.
        assert!((0..99).all(|_| !told(false)));
        assert_eq!([linked(), linked(), linked()], [RefreshTime::Now; 3]);
        assert_ne!(linked(), RefreshTime::Now);
        assert!((0..99).all(|_| !told(false)));
        subscriptions.tell_all();
        assert_eq!(linked(), RefreshTime::Now);
        assert_ne!(linked(), RefreshTime::Now);
    }
}
