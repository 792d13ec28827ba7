//! Which modules are there to take messages.

use dashmap::DashMap;
use tokio::sync::watch;

use crate::backend::Mailbox;
use crate::identity::Identity;
use crate::wake::Home;

/// The connection that takes the messages for a module's inputs.
#[derive(Clone, Debug)]
pub struct Consumer {
    /// Tells one connection of an identity from the next.
    pub connection: u64,
    /// The way to it.
    pub mailbox: Mailbox,
    /// The thread that it lives on, where its messages are best read and settled.
    pub home: Home,
}

/// The consumers by module. Touched when a module subscribes or leaves, and when a pump starts.
#[derive(Default)]
pub struct Presence {
    consumers: DashMap<Identity, watch::Sender<Option<Consumer>>, ahash::RandomState>,
}

impl Presence {
    /// Nobody is there.
    pub fn new() -> Self {
        Self::default()
    }

    /// A module takes messages from now on; a consumer that it had before is replaced.
    pub fn arrive(&self, module: &Identity, consumer: Consumer) {
        self.slot(module, |slot| slot.send_replace(Some(consumer)));
    }

    /// The module's connection takes no more messages. A newer connection is left alone.
    pub fn leave(&self, module: &Identity, connection: u64) {
        self.slot(module, |slot| {
            slot.send_if_modified(|current| {
                let own = current.as_ref().is_some_and(|consumer| consumer.connection == connection);
                if own {
                    *current = None;
                }
                own
            })
        });
    }

    /// The consumer of a module, now and later.
    pub fn watch(&self, module: &Identity) -> watch::Receiver<Option<Consumer>> {
        self.slot(module, watch::Sender::subscribe)
    }

    /// Whether a module takes messages at present.
    pub fn is_there(&self, module: &Identity) -> bool {
        self.consumers.get(module).is_some_and(|slot| slot.borrow().is_some())
    }

    /// Whether this connection is the one that takes the module's messages.
    pub fn is_taken_by(&self, module: &Identity, connection: u64) -> bool {
        let own = |consumer: &Consumer| consumer.connection == connection;
        self.consumers.get(module).is_some_and(|slot| slot.borrow().as_ref().is_some_and(own))
    }

    fn slot<R>(&self, module: &Identity, then: impl FnOnce(&watch::Sender<Option<Consumer>>) -> R) -> R {
        then(&self.consumers.entry(module.clone()).or_insert_with(|| watch::Sender::new(None)))
    }
}
