//! What the hub keeps for one connected identity.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::Hub;
use crate::backend::{Mailbox, PublishError};
use crate::delivery::Consumer;
use crate::dispatch::{Published, Publisher};
use crate::message::Sender;
use crate::wake::Home;

/// One connected identity. Dropping it ends its connection for the hub.
pub struct HubClient {
    pub(super) hub: Hub,
    pub(super) connection: u64,
    pub(super) sender: Arc<Sender>,
    pub(super) publisher: Publisher,
    pub(super) mailbox: Mailbox,
    pub(super) inputs: bool,
}

impl HubClient {
    /// Messages for the module's inputs come to this connection, or do so no longer.
    pub(super) fn set_inputs(&mut self, on: bool) {
        if self.inputs == on {
            return;
        }
        self.inputs = on;
        let identity = &self.sender.identity;
        if on {
            let consumer =
                Consumer { connection: self.connection, mailbox: self.mailbox.clone(), home: Home::here() };
            self.hub.arrive(identity, consumer);
        } else {
            self.hub.leave(identity, self.connection);
        }
    }
}

impl Drop for HubClient {
    fn drop(&mut self) {
        self.hub.disconnected(&self.sender.identity, self.connection);
    }
}

/// Resolves when published messages are stored.
pub struct HubCommit {
    commit: Published,
}

impl HubCommit {
    pub(super) fn new(commit: Published) -> Self {
        Self { commit }
    }
}

impl Future for HubCommit {
    type Output = Result<(), PublishError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.commit).poll(context)
    }
}
