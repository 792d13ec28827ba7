//! What an operator sees of the clients, and how one is sent away.

use std::time::UNIX_EPOCH;

use super::{Connected, Hub, close};
use crate::backend::{CloseReason, Protocol};
use crate::dispatch::{Tap, TapError, TapOptions};
use crate::identity::Identity;

/// A client's open connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// Whose it is.
    pub identity: Identity,
    /// Tells one connection of an identity from the next.
    pub connection: u64,
    /// The head it came through.
    pub protocol: Protocol,
    /// Where it comes from, if that is known.
    pub peer: Option<std::net::SocketAddr>,
    /// Product and version of its SDK, as it says; may be empty.
    pub product_info: String,
    /// When it logged in, in seconds since 1970.
    pub since_unix_secs: u64,
    /// When its credentials end, in seconds since 1970; absent when only a change can end them.
    pub credentials_until_unix_secs: Option<i64>,
    /// Whether it takes the messages for the inputs of its module.
    pub takes_inputs: bool,
}

impl Hub {
    /// The open connections, by identity.
    pub fn clients(&self) -> Vec<Client> {
        let clients = self.inner.clients.iter();
        let mut clients: Vec<Client> = clients.map(|entry| Client::new(entry.key(), entry.value())).collect();
        for client in &mut clients {
            client.takes_inputs = self.takes_inputs(client);
        }
        clients.sort_by_cached_key(|client| client.identity.to_string());
        clients
    }

    /// The open connection of an identity.
    pub fn client(&self, identity: &Identity) -> Option<Client> {
        // The guard ends here: no other map is touched under it.
        let mut client =
            self.inner.clients.get(identity).map(|entry| Client::new(identity, entry.value()))?;
        client.takes_inputs = self.takes_inputs(&client);
        Some(client)
    }

    /// Connections that may be open at a time.
    pub fn clients_max(&self) -> usize {
        self.inner.clients_max
    }

    /// Closes the connection of an identity; false if there is none. It may come again.
    pub fn kick(&self, identity: &Identity) -> bool {
        let mailbox = self.inner.clients.get(identity).map(|entry| entry.value().mailbox.clone());
        let Some(mailbox) = mailbox else { return false };
        close(mailbox, CloseReason::Kicked, &self.inner.delivery);
        true
    }

    /// Looks at messages as they are accepted; see [`TapOptions`].
    ///
    /// # Errors
    /// The condition does not compile, or as many taps are open as may be.
    pub fn tap(&self, options: &TapOptions) -> Result<Tap, TapError> {
        self.inner.dispatch.tap(options)
    }

    fn takes_inputs(&self, client: &Client) -> bool {
        self.inner.presence.is_taken_by(&client.identity, client.connection)
    }
}

impl Client {
    fn new(identity: &Identity, connected: &Connected) -> Self {
        let login = connected.proved.login();
        Self {
            identity: identity.clone(),
            connection: connected.connection,
            protocol: login.protocol,
            peer: login.peer,
            product_info: login.product_info.to_string(),
            since_unix_secs: connected.since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            credentials_until_unix_secs: connected.proved.until_secs(),
            takes_inputs: false,
        }
    }
}
