//! The control plane over the upstream: twins, methods and cloud-to-device messages of local identities, as the rest
//! of the hub asks for them and hears of them. It knows no protocol.
//!
//! ```text
//!   hub ── Control ──▶ requests, wanted features ──▶ ControlPeer ── upstream connection
//!    ▲                                                   │
//!    └────────────── Downward: desired, call, message ◀──┘
//! ```
//!
//! [`channel`] makes both ends. The hub holds [`Control`] and a receiver of [`Downward`]; whoever keeps the upstream
//! connection, or a test, holds the [`ControlPeer`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::backend::{MethodAnswer, Outcome};
use crate::identity::Identity;
use crate::message::Message;

/// Requests that may wait for the upstream connection.
pub const REQUESTS_MAX: usize = 256;

/// Events that may wait for the hub.
pub const DOWNWARD_MAX: usize = 256;

/// What a local client wants from the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Wanted {
    /// Notifications of changed desired properties.
    pub desired: bool,
    /// Direct methods.
    pub methods: bool,
    /// Cloud-to-device messages.
    pub cloud_to_device: bool,
}

impl Wanted {
    /// Whether nothing is wanted.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// Why the upstream did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// There is no connection; known at once, nothing was waited for.
    #[error("the upstream is not connected")]
    Offline,
    /// No answer came in time, or too much waits already.
    #[error("the upstream did not answer in time")]
    Timeout,
    /// The upstream does not know the identity, or does not let it in.
    #[error("the upstream refused the identity: {0}")]
    Unauthorized(String),
    /// The upstream answered with an error.
    #[error("the upstream answered with status {status}: {text}")]
    Refused {
        /// Its status, as in HTTP.
        status: u16,
        /// Its text.
        text: String,
    },
    /// The upstream of this hub has no twins, methods or cloud-to-device messages.
    #[error("the upstream has no control plane")]
    Unsupported,
}

/// A request to the upstream, with the place for its answer. Dropping that place is an answer too: offline.
#[derive(Debug)]
pub enum Request {
    /// Read the whole twin of an identity.
    Twin {
        /// Whose.
        identity: Identity,
        /// Takes the JSON document, `{"desired":{..},"reported":{..}}`.
        answer: oneshot::Sender<Result<Bytes, ControlError>>,
    },
    /// Merge a patch into the reported properties of an identity.
    PatchReported {
        /// Whose.
        identity: Identity,
        /// The patch, a JSON object; `null` deletes.
        patch: Bytes,
        /// Takes the new version, if the upstream tells it.
        answer: oneshot::Sender<Result<Option<u64>, ControlError>>,
    },
    /// What an identity wants from now on. Nothing at all lets its links go. It holds over reconnects.
    Want {
        /// Who.
        identity: Identity,
        /// What.
        wanted: Wanted,
    },
}

/// What comes from the upstream.
#[derive(Debug)]
pub enum Downward {
    /// The upstream accepted the hub's own identity: the connection is up.
    Up,
    /// The connection is lost.
    Down,
    /// What the identity wants is in place since now. Whatever changed before may have been missed.
    Linked(Identity),
    /// Desired properties of an identity changed.
    Desired {
        /// Whose.
        identity: Identity,
        /// The change, a JSON object with its `$version`.
        patch: Bytes,
    },
    /// A direct method of an identity is called.
    Method {
        /// Whose.
        identity: Identity,
        /// The method's name.
        name: Arc<str>,
        /// The argument as JSON; `null` when there is none.
        payload: Bytes,
        /// Takes the answer; dropping it sends none.
        answer: oneshot::Sender<MethodAnswer>,
    },
    /// A cloud-to-device message; its [`Message::sender`] is the device.
    CloudToDevice {
        /// For whom.
        identity: Identity,
        /// The message with the upstream's system properties, `lockToken` among them.
        message: Box<Message>,
        /// Takes the outcome; dropping it leaves the message unsettled upstream.
        settle: oneshot::Sender<Outcome>,
    },
}

/// The hub's end. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Control {
    /// None without an upstream.
    requests: Option<mpsc::Sender<Request>>,
    timeout: Duration,
}

/// The end of whoever keeps the upstream connection.
#[derive(Debug)]
pub struct ControlPeer {
    /// What the hub asks for.
    pub requests: mpsc::Receiver<Request>,
    /// What the hub hears.
    pub downward: mpsc::Sender<Downward>,
}

/// Both ends, and what the hub hears. A request that is not answered within `timeout` has failed.
pub fn channel(timeout: Duration) -> (Control, mpsc::Receiver<Downward>, ControlPeer) {
    let (requests, requests_receiver) = mpsc::channel(REQUESTS_MAX);
    let (downward, downward_receiver) = mpsc::channel(DOWNWARD_MAX);
    let control = Control { requests: Some(requests), timeout };
    (control, downward_receiver, ControlPeer { requests: requests_receiver, downward })
}

impl Control {
    /// The end of a hub without an upstream: always offline.
    pub fn none() -> Self {
        Self { requests: None, timeout: Duration::ZERO }
    }

    /// Reads the whole twin of an identity.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn twin(&self, identity: &Identity) -> Result<Bytes, ControlError> {
        self.ask(|answer| Request::Twin { identity: identity.clone(), answer }).await
    }

    /// Merges a patch into the reported properties of an identity; answers with their new version, if the upstream
    /// tells it.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn patch_reported(
        &self,
        identity: &Identity,
        patch: Bytes,
    ) -> Result<Option<u64>, ControlError> {
        self.ask(|answer| Request::PatchReported { identity: identity.clone(), patch, answer }).await
    }

    /// Says what an identity wants from now on; waits while too many requests wait.
    pub async fn want(&self, identity: &Identity, wanted: Wanted) {
        if let Some(requests) = &self.requests {
            // A closed channel belongs to a hub that is stopping.
            let _ = requests.send(Request::Want { identity: identity.clone(), wanted }).await;
        }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, ControlError>>) -> Request,
    ) -> Result<T, ControlError> {
        let Some(requests) = &self.requests else { return Err(ControlError::Offline) };
        let (sender, receiver) = oneshot::channel();
        let answered = async {
            requests.send(request(sender)).await.map_err(|_| ControlError::Offline)?;
            receiver.await.map_err(|_| ControlError::Offline)?
        };
        timeout(self.timeout, answered).await.unwrap_or(Err(ControlError::Timeout))
    }
}
