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
    /// When its twin was read from the upstream for the last time.
    twin_read_at: Option<Instant>,
    /// Whether a later reading is planned.
    twin_planned: bool,
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
            twin_planned: false,
        };
        match self.clients.entry(identity.clone()) {
            Entry::Occupied(entry) if entry.get().connection > connection => return,
            Entry::Occupied(mut entry) => {
                if entry.get().connection < connection {
                    entry.insert(fresh());
                }
                *change(&mut entry.get_mut().wanted) = on;
                if entry.get().wanted.is_nothing() {
                    entry.remove();
                }
            }
            Entry::Vacant(_) if !on => return,
            Entry::Vacant(entry) => *change(&mut entry.insert(fresh()).wanted) = on,
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

    /// When the twin of an identity is to be read because its links are new: at most once in `period`.
    pub(super) fn refresh_time(&self, identity: &Identity, period: Duration) -> RefreshTime {
        if *identity == self.own {
            return RefreshTime::Now;
        }
        let Some(mut client) = self.clients.get_mut(identity).filter(|client| client.wanted.desired) else {
            return RefreshTime::Never;
        };
        match client.twin_read_at.map(|at| at.elapsed()).filter(|ago| *ago < period) {
            None => {
                client.twin_planned = false;
                RefreshTime::Now
            }
            Some(_) if client.twin_planned => RefreshTime::Never,
            Some(ago) => {
                client.twin_planned = true;
                RefreshTime::After(period - ago)
            }
        }
    }

    /// All identities are told again.
    pub(super) fn tell_all(&self) {
        self.changed.push(&self.own);
        let all: Vec<Identity> = self.clients.iter().map(|entry| entry.key().clone()).collect();
        all.iter().for_each(|identity| self.changed.push(identity));
    }

    /// Tells the upstream what is wanted; for ever.
    pub(super) async fn tell(&self, control: &Control) {
        let mut told: AHashMap<Identity, Wanted> = AHashMap::new();
        loop {
            let identity = self.changed.next().await;
            let wanted = self.wanted(&identity);
            if wanted.is_nothing() {
                if told.remove(&identity).is_none() {
                    continue;
                }
            } else {
                told.insert(identity.clone(), wanted);
            }
            control.want(&identity, wanted).await;
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
}
