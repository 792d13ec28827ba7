//! Direct methods as services call them: waiting for the client, and for its answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{CallId, Command, Feature, Mailbox, MethodAnswer, MethodCall};
use edgehub_broker::identity::Identity;
use edgehub_broker::method::Calls;
use tokio::time::timeout;

use super::{CloudBackend, Shared};

/// Why a method has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvokeError {
    /// The client is not connected, or takes no methods.
    #[error("the client is not connected, or takes no methods")]
    NotConnected,
    /// It did not answer in time, or its connection ended.
    #[error("the client did not answer in time")]
    NoAnswer,
    /// Too many calls wait.
    #[error("too many methods are being called; come again")]
    Busy,
}

/// Forgets a call when nobody waits for it any more.
struct Waiting<'a> {
    calls: &'a Calls,
    id: CallId,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.calls.give_up(self.id);
    }
}

impl CloudBackend {
    /// Calls a method of a connected client, or of one that comes and takes methods within `connect_max`. Dropping the
    /// future gives the call up.
    ///
    /// # Errors
    /// See [`InvokeError`].
    pub async fn invoke(
        &self,
        identity: &Identity,
        name: Arc<str>,
        payload: Bytes,
        connect_max: Duration,
        response_max: Duration,
    ) -> Result<MethodAnswer, InvokeError> {
        let ready = self.shared.ready(identity);
        let (connection, mailbox) =
            timeout(connect_max, ready).await.map_err(|_| InvokeError::NotConnected)?;
        let calls = &self.shared.calls;
        let (id, answer) = calls.begin(identity, connection).ok_or(InvokeError::Busy)?;
        let _waiting = Waiting { calls, id };
        let answered = async {
            let call = MethodCall { id, name, payload };
            mailbox.send(Command::Invoke(call)).await.map_err(|_| InvokeError::NoAnswer)?;
            drop(mailbox);
            answer.await.map_err(|_| InvokeError::NoAnswer)
        };
        timeout(response_max, answered).await.unwrap_or(Err(InvokeError::NoAnswer))
    }
}

impl Shared {
    /// Resolves when the client takes methods: its connection, and the way to it.
    async fn ready(&self, identity: &Identity) -> (u64, Mailbox) {
        let mut taken = self.methods_taken.subscribe();
        loop {
            let found = {
                let clients = self.clients.lock();
                clients.connected.get(identity).map(|connection| {
                    (connection.number, connection.mailbox.clone(), connection.errands.clone())
                })
            };
            if let Some((number, mailbox, errands)) = found
                && errands.takes(Feature::Methods)
            {
                return (number, mailbox);
            }
            // The sender lives as long as `self`.
            let _ = taken.changed().await;
        }
    }
}
